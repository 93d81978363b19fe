"""Building blocks: normalisation's constants, and blocks against their definitions."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from litevae import layers
from litevae.autoencoder import LiteVAE
from litevae.layers import Attention, ResBlock, normalisation

KINDS = {
    "group": nn.GroupNorm,
    "batch": nn.BatchNorm2d,
    "instance": nn.InstanceNorm2d,
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
}


@pytest.mark.parametrize("norm", KINDS)
def test_every_normalisation_of_a_model_has_sd_vaes_epsilon(norm):
    """1e-6, which is SD-VAE's; PyTorch's own is 1e-5."""
    with torch.device("meta"):
        model = LiteVAE("S", block_out_channels=(8, 8, 8, 8), layers_per_block=1, decoder_norm=norm)
    found = [module for module in model.modules() if isinstance(module, tuple(KINDS.values()))]
    assert {module.eps for module in found} == {1e-6}
    assert any(isinstance(module, KINDS[norm]) for module in found)
    assert {module.eps for module in (layers.group_norm(64), Attention(32).norm)} == {1e-6}
    assert normalisation(norm, 32, eps=1e-3).eps == 1e-3


@pytest.mark.parametrize(
    ("channels", "width", "groups"),
    [
        (32, 1, 32),
        (16, 1, 16),
        (48, 1, 16),
        (160, 1, 32),
        (64, 4, 16),
        (128, 8, 32),
        (127, 4, 1),
        (8, 16, 1),
        (96, 8, 4),
    ],
)
def test_groups_of_a_normalisation(channels, width, groups):
    """32 as in SD-VAE; fewer where they do not divide the channels or, below 128, would be narrower than asked for."""
    assert layers.group_norm(channels, width).num_groups == groups
    assert groups == math.gcd(32, channels if channels >= 128 else max(1, channels // width))


def test_a_block_is_its_definition():
    torch.manual_seed(0)
    block = ResBlock(8, 16)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 8, 5, 6)
    h = x
    for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
        h = F.group_norm(h, h.shape[1], norm.weight, norm.bias, 1e-6)
        h = F.conv2d(h * torch.sigmoid(h), conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(block(x), h + F.conv2d(x, block.skip.weight, block.skip.bias))
    assert isinstance(ResBlock(8, 8).skip, nn.Identity)
    assert torch.equal(ResBlock(8, 8)(x), x)  # nothing is added at the start


@pytest.mark.parametrize("norm", ["group", "smc", "none"])
def test_a_block_begins_as_its_skip(norm):
    x = torch.randn(2, 8, 5, 6)
    block = ResBlock(8, 16, norm)
    assert torch.equal(block(x), block.skip(x))


def test_attention_is_torchs():
    torch.manual_seed(0)
    ours, x = Attention(8), torch.randn(2, 8, 3, 5)
    theirs = nn.MultiheadAttention(8, 1, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.to_q.weight, ours.to_k.weight, ours.to_v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.to_q.bias, ours.to_k.bias, ours.to_v.bias]))
        theirs.out_proj.weight.copy_(ours.to_out.weight)
        theirs.out_proj.bias.copy_(ours.to_out.bias)
    tokens = F.group_norm(x, 8, eps=1e-6).permute(0, 2, 3, 1).reshape(2, 15, 8)
    expected = x + theirs(tokens, tokens, tokens)[0].reshape(2, 3, 5, 8).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours(x), expected)


def test_a_variance_preserving_conv_keeps_the_variance():
    torch.manual_seed(0)
    conv = layers.variance_preserving_conv(64, 48, 3, stride=2)
    assert (conv.stride, conv.padding, conv.bias.abs().max().item()) == ((2, 2), (1, 1), 0)
    assert conv.weight.std().item() == pytest.approx((64 * 9) ** -0.5, rel=0.02)
    assert layers.variance_preserving_conv(4, 4, 3, padding=0).padding == (0, 0)
    assert layers.variance_preserving_conv(4, 4, 1).padding == (0, 0)
    with torch.no_grad():
        assert layers.variance_preserving_conv(64, 64, 3)(torch.randn(8, 64, 16, 16))[
            ..., 1:-1, 1:-1
        ].std().item() == pytest.approx(1, 0.1)


def test_a_small_posterior_is_of_the_second_half():
    conv = nn.Conv2d(3, 8, 1)
    before = conv.bias.detach().clone()
    layers.small_posterior(conv)
    assert conv.bias[4:].tolist() == [-6] * 4
    assert torch.equal(conv.bias[:4], before[:4])


def test_the_middle_is_block_attention_block():
    middle = layers.middle(32, "rms", 4)
    assert [type(part) for part in middle] == [ResBlock, Attention, ResBlock]
    assert isinstance(middle[0].norm1, nn.RMSNorm)
    assert isinstance(middle[2].norm2, nn.RMSNorm)
    assert middle[1].norm.num_groups == 8
