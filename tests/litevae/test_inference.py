"""What is prepared for inference: every class of autoencoder, with and without slicing."""

import copy

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel

from litevae import inference, native, precision
from litevae.autoencoder import LiteVAE
from litevae.autoencoder_base import one_by_one
from litevae.inference import (
    FastPath,
    cpu_paths,
    enable_slicing,
    latents_error,
    measure_paths,
    prepare_for_inference,
)
from litevae.latents import encode_latents
from litevae.ldm import NormalizedAutoencoder


def kl():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4)


def asymmetric():
    return AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, down_block_out_channels=(8, 8), layers_per_down_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, up_block_out_channels=(8, 8), norm_num_groups=4,
    )  # fmt: skip


def vq():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return VQModel(**blocks, block_out_channels=(8, 8), norm_num_groups=4, num_vq_embeddings=16, latent_channels=3)


def tiny():
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(**widths, **blocks, upsampling_scaling_factor=2)


def dc():
    return AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock",) * 2,
        decoder_block_types=("ResBlock",) * 2, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), upsample_block_type="interpolate", downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm", decoder_act_fns="silu",
    )  # fmt: skip


def lite():
    return LiteVAE("S", block_out_channels=(8, 8, 16, 16), layers_per_block=1)


MODELS = {
    "kl": (kl, True),
    "asymmetric": (asymmetric, False),
    "vq": (vq, False),
    "tiny": (tiny, True),
    "dc": (dc, True),
}


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("name", MODELS)
def test_every_class_of_autoencoder_is_prepared(name, kernels):
    if kernels == "native" and not native.available():
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.inference_mode():
        expected = encode_latents(copy.deepcopy(model), x)
        found = encode_latents(prepare_for_inference(model, "cpu", kernels), x)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_slicing_is_switched_on_only_where_the_model_has_it(name):
    build, able = MODELS[name]
    model = build()
    assert enable_slicing(model) == able
    assert getattr(model, "use_slicing", False) == able


def test_the_autoencoder_within_a_normalised_one_gets_slicing():
    inner = lite().eval()
    wrapped = NormalizedAutoencoder.of(inner, torch.zeros(4), torch.ones(4))
    z = torch.randn(2, 4, 4, 4)
    with torch.inference_mode():
        expected = wrapped.decode(z).sample
        kernels = "native" if native.available() else "torch"
        found = prepare_for_inference(wrapped, "cpu", kernels).decode(z).sample
    assert inner.use_slicing == (kernels == "native")
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("images", [1, 3])
def test_one_by_one_gives_each_image_alone(images):
    seen = []

    def function(x):
        seen.append(len(x))
        return 2 * x

    x = torch.randn(images, 3, 4, 4)
    assert torch.equal(one_by_one(function, x), 2 * x)
    assert seen == [1] * images


PLAIN = [FastPath("torch", "fp32"), FastPath("sliced", "fp32")]
NATIVE = [FastPath("native", "fp32")]
HALF = [FastPath("torch", "bf16"), FastPath("sliced", "bf16")]


@pytest.mark.parametrize(
    ("bf16", "compiler", "allowed", "expected"),
    [
        (False, False, "auto", PLAIN),
        (False, True, "auto", PLAIN + NATIVE),
        (True, True, "auto", PLAIN + NATIVE + HALF),
        (True, True, "fp32", PLAIN + NATIVE),
        (False, True, "bf16", HALF),
    ],
)
def test_the_paths_of_a_cpu(bf16, compiler, allowed, expected, monkeypatch):
    monkeypatch.setattr(inference, "cpu_has_bf16", lambda: bf16)
    monkeypatch.setattr(native, "available", lambda: compiler)
    assert cpu_paths(allowed) == expected


@pytest.mark.parametrize(
    ("amx", "avx512", "expected"), [(False, False, False), (True, False, True), (False, True, True)]
)
def test_bf16_where_the_cpu_multiplies_it(amx, avx512, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert precision.cpu_has_bf16() == expected
    with precision.autocast("cpu", "auto"):
        assert torch.is_autocast_enabled("cpu") == expected


class Costs:
    """A clock that goes on by what each path costs, an image, when the path is called."""

    def __init__(self, monkeypatch, costs):
        self.now, self.calls = 0.0, []
        encoded = inference._encoded

        def counted(path, model, x):
            self.calls.append((path, len(x), x.shape[-1]))
            self.now += costs[path] * len(x)
            return encoded(path, model, x)

        monkeypatch.setattr(inference, "_encoded", counted)
        monkeypatch.setattr(inference, "cpu_paths", lambda allowed: list(costs))

    def __call__(self):
        return self.now


def test_the_fastest_path_is_first(monkeypatch):
    clock = Costs(monkeypatch, dict(zip(PLAIN, (0.02, 0.01), strict=True)))
    found = measure_paths(lite().eval(), (32, 32), 8, seconds=1.0, clock=clock)
    assert [(measured.path, round(measured.speed)) for measured in found] == [(PLAIN[1], 100), (PLAIN[0], 50)]
    assert all(measured.agrees and measured.error < 1e-5 for measured in found)
    assert clock.now < 2.5


def test_large_images_that_are_slow_are_measured_smaller(monkeypatch):
    clock = Costs(monkeypatch, {PLAIN[0]: 3.0})
    measure_paths(lite().eval(), (512, 256), 32, seconds=1.0, clock=clock)
    assert [size for _, _, size in clock.calls[-2:]] == [64, 64]
    assert clock.calls[-1][1] == 2  # at least two images, or batches could not be told from single images


def test_a_path_that_does_not_agree_is_last(monkeypatch):
    clock = Costs(monkeypatch, dict(zip(PLAIN, (0.02, 0.01), strict=True)))
    right = inference.prepare_for_inference

    def spoiled(model, device, kernels, compiled=False):
        prepared = right(model, device, kernels, compiled)
        if kernels == "sliced":
            prepared.encoder.aggregator.conv_out.bias.add_(0.01)
        return prepared

    monkeypatch.setattr(inference, "prepare_for_inference", spoiled)
    found = measure_paths(lite().eval(), (32, 32), 8, seconds=0.1, clock=clock)
    assert [(measured.path, measured.agrees) for measured in found] == [(PLAIN[0], True), (PLAIN[1], False)]


def test_errors_in_their_units():
    mean, logvar = torch.tensor([[[[1.0, -2.0]]]]), torch.full((1, 1, 1, 2), 2 * torch.log(torch.tensor(0.5)))
    expected = torch.cat([mean, logvar], dim=1)
    found = expected + torch.tensor([0.1, 0.0]).view(1, 2, 1, 1)
    assert latents_error(found, expected, "bf16", posterior=True) == pytest.approx(0.1 / 0.5)
    assert latents_error(found, expected, "fp32", posterior=True) == pytest.approx(0.1 / 2)
    assert latents_error(mean + 0.1, mean, "bf16", posterior=False) == pytest.approx(0.1 / mean.std().item())
    assert latents_error(mean / 0, mean, "fp32", posterior=False) == float("inf")
