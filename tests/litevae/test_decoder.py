"""The decoder against diffusers' with the same weights; self-modulated convolution against a slow copy of Eq. 3;
other normalisations; an output of wavelet bands."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder as DiffusersDecoder

from litevae import layers
from litevae.decoder import Decoder
from litevae.layers import SMC, ResBlock, bake, normalisation
from litevae.wavelet import dwt


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


@pytest.mark.parametrize("size", [(2, 5, 7, 4), (3, 5, 16, 18)])  # few positions, and many
@pytest.mark.parametrize(
    ("fast", "plain"),
    [
        (layers.upsampled_conv, lambda x, w, b: F.conv2d(F.interpolate(x, scale_factor=2.0), w, b, padding=1)),
        (layers.pooled_conv, lambda x, w, b: F.avg_pool2d(F.conv2d(x, w, b, padding=1), 2)),
    ],
)
def test_resampling_convolutions_are_the_plain_ones(fast, plain, size):
    generator = torch.Generator().manual_seed(0)
    n, c, h, w = size
    shape = (n, c, h, w) if fast is layers.upsampled_conv else (n, c, 2 * h, 2 * w)
    results = []
    for function in (fast, plain):
        generator.manual_seed(0)
        given = [torch.randn(*s, dtype=torch.float64, generator=generator, requires_grad=True)
                 for s in (shape, (6, c, 3, 3), (6,))]  # fmt: skip
        y = function(*given)
        y.backward(torch.randn(y.shape, dtype=torch.float64, generator=generator))
        results.append([y, *(tensor.grad for tensor in given)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 49_490_179),
        ({"norm": "smc"}, 49_479_327),
        ({"norm": "batch"}, 49_490_179),  # a scale and a shift per channel, as GroupNorm
        ({"norm": "rms"}, 49_490_179 - 10_880),  # no shifts
        # less a 3x3 convolution 256 -> 256 after the last upsampling; 9 more outputs of 128 channels
        ({"wavelet": "haar"}, 49_490_179 - (256 * 256 * 9 + 256) + 9 * (128 * 9 + 1)),
    ],
)
def test_parameters_of_sd_vaes_decoder(options, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Decoder(4, **options).parameters()) == count


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


def test_other_normalisations_are_where_smc_replaces_them():
    kinds = {"batch": "BatchNorm2d", "instance": "InstanceNorm2d", "layer": "LayerNorm2d", "rms": "RMSNorm2d"}
    for norm, kind in kinds.items():
        with torch.device("meta"):
            decoder = Decoder(4, (32, 32, 32, 32), layers=1, norm=norm)
        blocks = [module for module in decoder.modules() if isinstance(module, ResBlock)]
        assert {type(n).__name__ for block in blocks for n in (block.norm1, block.norm2)} == {kind}
        groups = [n for n, module in decoder.named_modules() if isinstance(module, torch.nn.GroupNorm)]
        assert groups == ["mid.1.norm", "norm_out"]


@torch.no_grad()
@pytest.mark.parametrize(
    ("norm", "over"), [("batch", (0, 2, 3)), ("instance", (2, 3)), ("layer", (1,)), ("rms", (1,)), ("group", None)]
)
def test_what_each_normalisation_is_over(norm, over):
    module = normalisation(norm, 8, group_width=4)
    for p in module.parameters():
        torch.nn.init.normal_(p)
    x = 3 * torch.randn(4, 8, 5, 6) + 2
    if over is None:  # two groups
        parts = [(p - p.mean((1, 2, 3), keepdim=True)) / p.std((1, 2, 3), keepdim=True) for p in x.split(4, dim=1)]
        expected = torch.cat(parts, dim=1)
    else:
        mean = 0 if norm == "rms" else x.mean(over, keepdim=True)
        expected = (x - mean) / (x - mean).square().mean(over, keepdim=True).sqrt()
    expected = expected * module.weight.view(-1, 1, 1)
    if norm != "rms":
        expected = expected + module.bias.view(-1, 1, 1)
    torch.testing.assert_close(module(x), expected, atol=2e-2 if over is None else 1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_a_decoder_of_bands_gives_the_image_of_them(wavelet):
    decoder = Decoder(4, (32, 32, 32, 32), layers=1, wavelet=wavelet).eval()
    randomize(decoder)
    bands = []
    decoder.conv_out.register_forward_hook(lambda _module, _inputs, output: bands.append(output))
    image = decoder(torch.randn(2, 4, 4, 5))
    assert (bands[0].shape, image.shape) == ((2, 12, 16, 20), (2, 3, 32, 40))
    torch.testing.assert_close(dwt(image, wavelet) / 2, bands[0], atol=1e-5, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert decoder(torch.randn(1, 4, 4, 4)).dtype == torch.bfloat16
