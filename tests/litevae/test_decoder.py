"""The decoder against diffusers' with the same weights; self-modulated convolution against a slow copy of Eq. 3."""

import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder as DiffusersDecoder

from litevae.decoder import Decoder
from litevae.layers import SMC, bake


def diffusers_state(decoder: Decoder, channels: int, layers: int) -> dict[str, torch.Tensor]:
    """Our weights under diffusers' names."""
    blocks = [("mid.0", "mid_block.resnets.0"), ("mid.2", "mid_block.resnets.1")]
    others = [("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")]
    others += [("mid.1.norm", "mid_block.attentions.0.group_norm")]
    others += [(f"mid.1.{n}", f"mid_block.attentions.0.{n}") for n in ("to_q", "to_k", "to_v")]
    others += [("mid.1.to_out", "mid_block.attentions.0.to_out.0")]
    for level in range(channels):
        blocks += [(f"up.{level}.{n}", f"up_blocks.{level}.resnets.{n}") for n in range(layers + 1)]
        others += [(f"up.{level}.{layers + 1}.1", f"up_blocks.{level}.upsamplers.0.conv")]
    names = dict(others)
    for ours, theirs in blocks:
        names |= {f"{ours}.{n}": f"{theirs}.{n}" for n in ("norm1", "conv1", "norm2", "conv2")}
        names[f"{ours}.skip"] = f"{theirs}.conv_shortcut"
    state = {}
    for key, value in decoder.state_dict().items():
        module, _, leaf = key.rpartition(".")
        state[f"{names[module]}.{leaf}"] = value
    return state


def randomize(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize(("channels", "layers"), [((32, 64, 64, 128), 1), ((128, 128, 256, 256), 2)])
def test_equals_diffusers_decoder(channels, layers):
    """Groups are diffusers' 32 from SD-VAE's 128 channels on, and 16 wide below."""
    torch.manual_seed(0)
    ours = Decoder(4, channels, layers).eval()
    randomize(ours)
    groups = 32 if channels[0] == 128 else None
    theirs = DiffusersDecoder(
        in_channels=4, out_channels=3, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=channels,
        layers_per_block=layers, norm_num_groups=groups or 2,
    ).eval()  # fmt: skip
    theirs.load_state_dict(diffusers_state(ours, len(channels), layers))
    if groups is None:  # diffusers has one number of groups for all widths
        for module in theirs.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.num_groups = 32 if module.num_channels >= 128 else module.num_channels // 16
    z = torch.randn(2, 4, 5, 4)
    with torch.no_grad():
        assert torch.allclose(ours(z), theirs(z), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("norm", "count"), [("group", 49_490_179), ("smc", 49_479_327)])
def test_parameters_of_sd_vaes_decoder(norm, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(4, norm=norm).parameters()) == count


def test_smc_is_equation_3():
    torch.manual_seed(0)
    smc = SMC(3, 5)
    with torch.no_grad():
        smc.scales.copy_(torch.tensor([0.5, 2.0, -1.0]))
        smc.gain.fill_(1.5)
    w, s, expected = smc.conv.weight, smc.scales, torch.empty(5, 3, 3, 3)
    for j in range(5):  # i: input maps, j: output maps, k: positions
        norm = sum((s[i] * w[j, i]).square().sum() for i in range(3)).sqrt()
        for i in range(3):
            expected[j, i] = 1.5 * s[i] * w[j, i] / norm
    assert torch.allclose(smc.weight(), expected, atol=1e-6)
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(smc(x), torch.nn.functional.conv2d(x, expected, smc.conv.bias, padding=1), atol=1e-5)


def test_smcs_weight_does_not_depend_on_its_size():
    smc = SMC(8, 8)
    before = smc.weight()
    with torch.no_grad():
        smc.conv.weight.mul_(100)
    assert torch.allclose(smc.weight(), before, atol=1e-5)


def test_baking_leaves_plain_convolutions_with_equal_output():
    torch.manual_seed(0)
    decoder = Decoder(4, (32, 32, 64, 64), layers=1, norm="smc").eval()
    randomize(decoder)
    z = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        before = decoder(z)
        bake(decoder)
        assert not any(isinstance(m, SMC) for m in decoder.modules())
        assert torch.allclose(decoder(z), before, atol=1e-5)


@pytest.mark.parametrize("norm", ["group", "smc"])
def test_gradients_reach_every_parameter(norm):
    decoder = Decoder(4, (32, 32, 32, 32), layers=1, norm=norm)
    randomize(decoder)
    decoder(torch.randn(1, 4, 4, 4)).square().sum().backward()
    assert not [n for n, p in decoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_a_narrow_decoder_keeps_the_images_brightness():
    """With a group per channel, the last normalisation would make dark and light latents alike."""
    torch.manual_seed(0)
    decoder = Decoder(4, (16, 16, 16, 16), layers=1)
    z = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        assert (decoder(z + 3) - decoder(z)).mean(dim=(2, 3)).abs().max() > 0.05
