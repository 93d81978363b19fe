"""Presets of denoising networks against published and hand-counted sizes."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

from litevae.denoiser import NETWORKS, UNETS, build_denoiser, null_class
from litevae.dit import DiT
from litevae.errors import UserError

SMALL = ("tiny", "dit-s/2")  # one of each kind that a CPU computes in a moment


def on_meta(*args) -> UNet2DModel | DiT:
    with torch.device("meta"):
        return build_denoiser(*args)


def parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def noisy(model):
    """Away from the zeros of the initialisation."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


# --- UNets


def rombach_unet_parameters(latent: int, width: int, multiples: tuple[int, ...], blocks: int, plain: int = 0) -> int:
    """Parameters of latent-diffusion's UNetModel, counted layer by layer; the `plain` finest levels lack attention."""
    time = 4 * width

    def conv(i, o, k=3):
        return k * k * i * o + o

    def res(i, o):
        skip = conv(i, o, 1) if i != o else 0
        return 2 * i + conv(i, o) + conv(time, o, 1) + 2 * o + conv(o, o) + skip

    def attention(level):
        c = width * multiples[level]
        return 2 * c + conv(c, 3 * c, 1) + conv(c, c, 1) if level >= plain else 0

    total = conv(width, time, 1) + conv(time, time, 1) + conv(latent, width)
    skips, c = [width], width
    for level, multiple in enumerate(multiples):
        for _ in range(blocks):
            total += res(c, width * multiple) + attention(level)
            c = width * multiple
            skips.append(c)
        if level + 1 < len(multiples):
            total += conv(c, c)
            skips.append(c)
    total += 2 * res(c, c) + attention(len(multiples) - 1)
    for level, multiple in reversed(list(enumerate(multiples))):
        for _ in range(blocks + 1):
            total += res(c + skips.pop(), width * multiple) + attention(level)
            c = width * multiple
        if level:
            total += conv(c, c)
    return total + 2 * c + conv(c, latent)


# Rombach et al. 2022, Tables 14 (258 M for LDM-8) and 12 (274 M for LDM-4, whose config in latent-diffusion is
# ffhq-ldm-vq-4.yaml); exact by `rombach_unet_parameters`.
@pytest.mark.parametrize(
    ("network", "latent", "size", "expected", "millions", "shape", "attentions"),
    [
        ("ldm-8", 4, 32, 257_733_124, 258, (256, (1, 2, 4), 2), 6 + 1 + 9),
        ("ldm-8", 12, 32, 257_769_996, 258, (256, (1, 2, 4), 2), 6 + 1 + 9),
        ("ldm-4", 3, 64, 274_056_163, 274, (224, (1, 2, 3, 4), 2, 1), 6 + 1 + 9),
    ],
)
def test_unets_have_the_published_size_and_structure(network, latent, size, expected, millions, shape, attentions):
    unet = on_meta(network, latent, size)
    assert parameters(unet) == expected == rombach_unet_parameters(latent, *shape)
    assert round(expected / 1e6) == millions
    there = [m for m in unet.modules() if type(m).__name__ == "Attention"]
    assert len(there) == attentions  # after each ResBlock of each level that has it, and in the middle
    assert all(a.to_q.out_features // a.heads == 32 for a in there)


def test_ldm_4_attends_at_32_16_and_8_of_64():
    unet = on_meta("ldm-4", 3, 64)
    assert [hasattr(b, "attentions") for b in unet.down_blocks] == [False, True, True, True]
    assert [hasattr(b, "attentions") for b in unet.up_blocks] == [True, True, True, False]


@pytest.mark.parametrize(("network", "expected"), [("small", 16_141_444), ("tiny", 1_896_740)])
def test_smaller_unets(network, expected):
    assert parameters(on_meta(network, 4, 16)) == expected


def test_what_blocks_add_starts_at_zero():
    unet = build_denoiser("tiny", 4, 8)
    for name, module in unet.named_modules():
        if type(module).__name__ == "ResnetBlock2D":
            x, t = torch.randn(1, module.in_channels, 8, 8), torch.randn(1, 256)
            skip = module.conv_shortcut(x) if module.conv_shortcut is not None else x
            assert torch.equal(module(x, t), skip), name
        elif type(module).__name__ == "Attention":
            x = torch.randn(1, module.query_dim, 4, 4)
            assert torch.equal(module(x), x), name


@torch.no_grad()
def test_unets_take_fractional_timesteps_as_tensors():
    unet = noisy(build_denoiser("tiny", 4, 8))
    sample = torch.randn(2, 4, 8, 8)
    low, between, high = (unet(sample, torch.tensor([t, t])).sample for t in (3.0, 3.5, 4.0))
    assert torch.equal(low, unet(sample, 3).sample)
    assert not torch.equal(between, low)
    assert not torch.equal(between, high)


# --- conditional models


def test_the_class_none_is_1000_for_diffusers_or_above():
    assert [null_class(n) for n in (1, 10, 1000, 1001, 18000)] == [1000, 1000, 1000, 1001, 18000]


@pytest.mark.parametrize("network", NETWORKS)
def test_classes_add_a_label_table_and_nothing_else(network):
    plain, conditional = on_meta(network, 4, 32), on_meta(network, 4, 32, 1200)
    table = conditional.class_embedding.weight
    assert len(table) == null_class(1200) + 1 == conditional.config.num_class_embeds
    assert parameters(conditional) == parameters(plain) + table.numel()
    assert plain.config.num_class_embeds is None


@pytest.mark.parametrize("network", SMALL)
def test_labels_of_classes_and_of_none_are_learnt(network):
    model = noisy(build_denoiser(network, 4, 8, classes=3))
    labels = torch.tensor([0, 2, null_class(3)])
    model(torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999]), labels).sample.square().mean().backward()
    assert model.class_embedding.weight.grad.any(dim=1).nonzero().flatten().tolist() == labels.tolist()


# --- both kinds alike


@pytest.mark.parametrize("network", SMALL)
def test_a_fresh_network_predicts_zero(network):
    model = build_denoiser(network, 12, 8)
    sample = torch.randn(2, 12, 8, 8)
    for timestep in (3, torch.tensor(3), torch.tensor([0, 999]), torch.tensor([0.5, 999.25])):
        predicted = model(sample, timestep).sample
        assert predicted.shape == sample.shape
        assert not predicted.any()
    config = model.config
    assert (config.sample_size, config.in_channels, config.out_channels) == (8, 12, 12)


def test_the_smallest_unet_learns():
    torch.manual_seed(0)
    model = build_denoiser("tiny", 4, 8)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    sample, target, losses = torch.randn(8, 4, 8, 8), torch.randn(1, 4, 8, 8), []
    for _ in range(12):
        loss = F.mse_loss(model(sample, torch.arange(8) * 100).sample, target.expand(8, -1, -1, -1))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_gradient_checkpointing_of_unets_gives_equal_gradients():
    model = noisy(build_denoiser("tiny", 4, 8)).train()
    sample, calls, found = torch.randn(2, 4, 8, 8), [], []
    model.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for _ in range(2):
        model.zero_grad()
        model(sample, 5).sample.square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters()])
        model.enable_gradient_checkpointing()
    assert len(calls) == 1 + 2  # the second pass computes it again
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("network", "family"), [("tiny", UNet2DModel), ("dit-s/2", DiT)])
@torch.no_grad()
def test_save_and_load(network, family, tmp_path):
    model = noisy(build_denoiser(network, 4, 8, classes=2))
    model.save_pretrained(tmp_path)
    loaded = family.from_pretrained(tmp_path)
    arguments = torch.randn(2, 4, 8, 8), 5, torch.tensor([1, 1000])
    assert torch.equal(loaded(*arguments).sample, model(*arguments).sample)


# --- mistakes


@pytest.mark.parametrize(
    ("network", "size", "message"),
    [
        (
            "small",
            10,
            r"halves latents 2 times, so their size must be a multiple of 4, and it is 10; .*\(32 px at f = 8",
        ),
        (
            "ldm-4",
            36,
            r"halves latents 3 times, so their size must be a multiple of 8, and it is 36; .*\(64 px at f = 8",
        ),
        ("dit-s/2", 9, r"patches of 2x2, so their size must be a multiple of 2, and it is 9; .*\(16 px at f = 8"),
        ("tiny", 0, "multiple of 2, and it is 0"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(network, size, message):
    with pytest.raises(UserError, match=f"network={network} .*{message}"):
        build_denoiser(network, 4, size)


def test_unknown_networks_are_refused():
    with pytest.raises(UserError, match="network=ldm-9 is unknown; choose one of ldm-8, ldm-4, small, tiny, dit-s/2"):
        build_denoiser("ldm-9", 4, 8)
    assert set(UNETS) < set(NETWORKS)
