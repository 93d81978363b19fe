"""The model in the place of diffusers' AutoencoderKL: posterior, statistics, tiling, padding, casting, export."""

import copy
import inspect
import itertools

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

from litevae import LiteVAE, UserError
from litevae.latent_statistics import scaling
from litevae.ldm import NormalizedAutoencoder
from litevae.tiling import tile_starts, tile_weights

TINY = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1}
MODELS = {
    "LiteVAE-S": {"size": "S"},
    "ViT": {"size": "S", "aggregator": "vit"},
    "1x1": {"size": "S", "conv1x1": True},
    "SMC": {"size": "S", "decoder_norm": "smc"},
    "RMS": {"size": "S", "decoder_norm": "rms"},
    "VAE-Small": {"size": "vae-small"},
    "DWT": {"size": "dwt", "latent_channels": 12},
}


def built(name, **more):
    torch.manual_seed(0)
    model = LiteVAE(**TINY | MODELS[name] | more).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # at the start blocks add nothing
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model


def images(*shape, seed=0):
    """Smooth images in [-1, 1]."""
    noise = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.avg_pool2d(noise, 5, 1, 2, count_include_pad=False) * 2


def normalized(model):
    channels = model.config.latent_channels
    return NormalizedAutoencoder.of(model, torch.linspace(-1, 1, channels), torch.linspace(0.5, 2, channels))


def test_calls_take_what_autoencoder_kl_takes():
    for name in ("encode", "decode", "forward"):
        stock = inspect.signature(getattr(AutoencoderKL, name)).parameters
        for family in (LiteVAE, NormalizedAutoencoder):
            own = inspect.signature(getattr(family, name)).parameters
            given = [(key, p.default) for key, p in own.items()]
            assert given[: len(stock)] == [(key, p.default) for key, p in stock.items()], (family, name)


@torch.no_grad()
@pytest.mark.parametrize("name", ["LiteVAE-S", "ViT", "1x1", "VAE-Small"])
def test_posterior_and_draw_are_exact_under_autocast(name):
    model, x = built(name), images(2, 3, 64, 64)
    exact = model.encode(x).latent_dist
    with torch.autocast("cpu", torch.bfloat16):
        found = model.encode(x).latent_dist
        draw = found.sample(torch.Generator().manual_seed(1))
    for value in (found.parameters, found.mean, found.logvar, found.std, found.var, found.mode(), draw):
        assert value.dtype == torch.float32
    assert not torch.equal(found.mean, exact.mean)  # the rest of the network is in bf16
    assert not torch.equal(found.parameters, found.parameters.bfloat16().float())
    noise = torch.randn(draw.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close((draw - found.mean) / found.std, noise, atol=1e-3, rtol=1e-3)
    assert (draw == found.mean).float().mean() < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["LiteVAE-S", "VAE-Small", "DWT"])
def test_a_model_in_half_precision_has_fp32_parameters_and_draws_in_its_own_dtype(name, dtype):
    model, x = built(name).to(dtype), images(1, 3, 32, 32)
    for vae in (model, normalized(model)):
        posterior = vae.encode(x.to(dtype)).latent_dist
        assert posterior.parameters.dtype == posterior.mean.dtype == torch.float32
        assert posterior.sample().dtype == posterior.mode().dtype == dtype
        assert vae.decode(posterior.parameters.chunk(2, 1)[0]).sample.dtype == dtype
        assert vae(x.to(dtype), sample_posterior=True).sample.isfinite().all()


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("frozen", [False, True])
def test_encode_gives_a_gradient_to_the_image(name, frozen):
    model, x = built(name).requires_grad_(not frozen), images(1, 3, 32, 32)
    direction = images(1, 3, 32, 32, seed=1)
    x.requires_grad_()
    model.encode(x).latent_dist.mean.square().sum().backward()
    with torch.no_grad():
        up, down = (model.encode(x + s * direction).latent_dist.mean.double().square().sum() for s in (5e-3, -5e-3))
    slope = (x.grad * direction).sum().double()
    torch.testing.assert_close((up - down) / 1e-2, slope, rtol=2e-2, atol=2e-2)


def test_encode_keeps_no_graph_without_need():
    model = built("LiteVAE-S").requires_grad_(False)
    assert not model.encode(images(1, 3, 16, 16)).latent_dist.parameters.requires_grad


@pytest.mark.parametrize("name", ["LiteVAE-S", "1x1"])
def test_sdxl_finds_the_dtype_of_the_decoder(name):
    model = built(name)
    for dtype in (torch.float16, torch.float32):
        model.to(dtype)
        assert next(iter(model.post_quant_conv.parameters())).dtype == dtype
    own = {id(p) for p in model.parameters()}
    assert len(own) == len(list(model.named_parameters())) == len(model.state_dict())
    again = copy.deepcopy(model).half()
    assert next(iter(again.post_quant_conv.parameters())).dtype == torch.float16


def test_statistics_scale_latents_to_unit_variance(tmp_path):
    z = np.random.default_rng(0).normal(size=(1000, 3)) * [1, 2, 3] + [0, -4, 1]
    found = scaling(torch.tensor(z.mean(0)), z.std(0).tolist())
    scaled = (z - found["shift_factor"]) * found["scaling_factor"]
    np.testing.assert_allclose([scaled.mean(), scaled.std()], [0, 1], atol=1e-6)
    assert found["latents_mean"] == pytest.approx(z.mean(0))
    assert found["latents_std"] == pytest.approx(z.std(0))
    LiteVAE(size="S", latent_channels=3, **TINY, **found).save_pretrained(tmp_path)
    config = LiteVAE.from_pretrained(tmp_path).config
    assert {key: config[key] for key in found} == found
    plain = LiteVAE(size="S", **TINY).config
    assert [plain[key] for key in found] == [1.0, 0.0, None, None]
    for mean, std in (([1], [0]), ([1, 2], [1]), ([float("nan")], [1]), ([], [])):
        with pytest.raises(ValueError, match="latent"):
            scaling(mean, std)


@pytest.mark.parametrize(
    ("size", "tile", "overlap"), [(65, 64, 16), (100, 32, 8), (64, 32, 0), (40, 8, 7), (33, 32, 1)]
)
def test_shares_of_tiles_add_up_to_one(size, tile, overlap):
    starts = tile_starts(size, tile, overlap)
    weights, total = tile_weights(size, starts, tile, overlap), torch.zeros(size, dtype=torch.float64)
    for start, weight in zip(starts, weights, strict=True):
        assert weight.min() >= 0
        total[start : start + tile] += weight
    torch.testing.assert_close(total, torch.ones_like(total))
    assert starts[0] == 0
    assert starts[-1] == size - tile
    assert all(a + tile - b >= overlap for a, b in itertools.pairwise(starts))


def local(model):
    """Take away what sees the whole image: attention and group normalisation."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm) or type(child).__name__ == "Attention":
                setattr(module, name, nn.Identity())
    return model


@torch.no_grad()
@pytest.mark.parametrize("wrap", [lambda model: model, normalized], ids=["LiteVAE", "NormalizedAutoencoder"])
@pytest.mark.parametrize("name", ["LiteVAE-S", "DWT"])
def test_tiles_of_local_networks_equal_the_whole(name, wrap):
    model = local(built(name, decoder_norm="none"))
    vae, x = wrap(model), images(1, 3, 8 * 90, 8 * 33)
    mean = vae.encode(x).latent_dist.mean
    whole = vae.decode(mean).sample
    vae.enable_tiling(8 * 64, 0.5)
    assert vae.use_tiling
    assert (model.tile_sample_min_size, model.tile_latent_min_size, model.tile_overlap_factor) == (512, 64, 0.5)
    seen = []
    for part in (model.encoder, model.decoder):
        part.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[-2:]))
    torch.testing.assert_close(vae.encode(x).latent_dist.mean, mean, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(vae.decode(mean).sample, whole, atol=1e-3, rtol=1e-3)
    assert seen == [(512, 264)] * 2 + [(64, 33)] * 2  # memory is that of one tile
    vae.disable_tiling()
    assert torch.equal(vae.decode(mean).sample, whole)


@torch.no_grad()
def test_tiles_of_normalising_networks_are_near_the_whole():
    """Group normalisation and attention see only their tile, so equality is impossible; the difference is bounded."""
    model, x = built("LiteVAE-S"), images(1, 3, 192, 128)
    mean = model.encode(x).latent_dist.mean
    whole = model.decode(mean).sample
    model.enable_tiling(128, 0.5)
    moved = (model.encode(x).latent_dist.mean - mean).square().mean().sqrt() / mean.std()
    image = (model.decode(mean).sample - whole).square().mean().sqrt() / whole.std()
    assert 0 < moved < 0.3, moved
    assert 0 < image < 0.3, image
    with pytest.raises(UserError, match="tile_sample_min_size=100"):
        model.enable_tiling(100)
    with pytest.raises(UserError, match="tile_overlap_factor=1"):
        model.enable_tiling(tile_overlap_factor=1)


@torch.no_grad()
@pytest.mark.parametrize("wrap", [lambda model: model, normalized], ids=["LiteVAE", "NormalizedAutoencoder"])
def test_slices_are_single_images_in_both_directions(wrap):
    model = built("LiteVAE-S")
    vae, x, seen = wrap(model), images(3, 3, 16, 24), []
    whole = vae(x).sample
    vae.enable_slicing()
    for part in (model.encoder, model.decoder):
        part.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    torch.testing.assert_close(vae(x).sample, whole, atol=1e-4, rtol=1e-4)
    assert seen == [1] * 6


@torch.no_grad()
@pytest.mark.parametrize("name", ["LiteVAE-S", "VAE-Small", "DWT"])
def test_any_size_is_padded_and_cropped_on_request(name):
    model, x = built(name), images(1, 3, 21, 34)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (0, 3), (0, 6)), mode="edge")
    for vae in (model, normalized(model)):
        with pytest.raises(UserError, match=r"21x34 is not a multiple of 8.*pad=True.*size=\(21, 34\)"):
            vae.encode(x)
        posterior = vae.encode(x, pad=True).latent_dist
        assert torch.equal(posterior.mean, vae.encode(torch.tensor(padded)).latent_dist.mean)
        image = vae.decode(posterior.mean, size=(21, 34)).sample
        assert torch.equal(image, vae.decode(posterior.mean).sample[..., :21, :34])
        assert image.shape == x.shape


@torch.no_grad()
def test_the_normalised_posterior_is_shifted_and_scaled():
    model, x = built("LiteVAE-S"), images(2, 3, 32, 32)
    vae, raw = normalized(model), model.encode(x).latent_dist
    found = vae.encode(x).latent_dist
    mean, std = torch.linspace(-1, 1, 4).view(4, 1, 1), torch.linspace(0.5, 2, 4).view(4, 1, 1)
    torch.testing.assert_close(found.mean * std + mean, raw.mean)
    torch.testing.assert_close(found.std * std, raw.std)
    torch.testing.assert_close(vae(x).sample, model(x).sample, atol=1e-4, rtol=1e-4)
    tiny = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).eval()
    found = normalized(tiny).encode(x).latent_dist
    torch.testing.assert_close(found.mean * std + mean, tiny.encode(x).latents)
    assert torch.equal(found.sample(), found.mode())


@torch.no_grad()
@pytest.mark.parametrize("name", list(MODELS))
def test_layerwise_casting_stores_fp8_and_computes_bf16(name):
    model, x = built(name), images(1, 3, 32, 32)
    expected = model(x).sample
    model = model.bfloat16()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    stored = [p.dtype for p in model.parameters() if p.ndim == 4]
    assert stored.count(torch.float8_e4m3fn) > len(stored) / 2
    posterior = model.encode(x).latent_dist
    assert posterior.mean.dtype == torch.float32
    image = model.decode(posterior.sample()).sample
    assert image.dtype == torch.bfloat16
    assert (model(x).sample - expected).abs().mean() < 0.3 * expected.std()


class Call(nn.Module):
    """A call that users make, as a module, because this is what PyTorch exports."""

    def __init__(self, vae, name):
        super().__init__()
        self.vae, self.name = vae, name

    def forward(self, x):
        if self.name == "encode":
            return self.vae.encode(x, return_dict=False)[0].mode()
        return self.vae.decode(x).sample

    def input(self, n, h, w):
        """Input for latents of this size."""
        return images(n, 3, 8 * h, 8 * w) if self.name == "encode" else torch.randn(n, 4, h, w)


def exported(call):
    unit = 8 if call.name == "encode" else 1
    sides = {axis: unit * torch.export.Dim(name, min=2, max=64) for axis, name in ((2, "h"), (3, "w"))}
    dynamic = ({0: torch.export.Dim("n", min=1, max=8), **sides},)
    return torch.export.export(call, (call.input(2, 4, 6),), dynamic_shapes=dynamic)


WRAPPED = pytest.mark.parametrize(
    ("name", "wrap"),
    [("LiteVAE-S", lambda model: model), ("VAE-Small", lambda model: model), ("1x1", normalized)],
    ids=["LiteVAE-S", "VAE-Small", "NormalizedAutoencoder"],
)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("half", ["encode", "decode"])
@WRAPPED
def test_exported_calls_take_other_sizes(name, wrap, half):
    call = Call(wrap(built(name)), half)
    program = exported(call).module()
    for shape in ((2, 4, 6), (1, 3, 5), (3, 20, 17)):
        x = call.input(*shape)
        torch.testing.assert_close(program(x), call(x), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("half", ["encode", "decode"])
@WRAPPED
def test_onnxruntime_computes_the_same_at_other_sizes(tmp_path, name, wrap, half):
    onnxruntime = pytest.importorskip("onnxruntime")
    call = Call(wrap(built(name)), half)
    torch.onnx.export(exported(call), dynamo=True).save(tmp_path / "call.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "call.onnx", providers=["CPUExecutionProvider"])
    for shape in ((2, 4, 6), (1, 3, 5), (3, 20, 17)):
        x = call.input(*shape)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.tensor(found), call(x), atol=1e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("half", ["encode", "decode"])
def test_calls_compile_without_a_break(half):
    call = Call(built("LiteVAE-S"), half)
    x = call.input(1, 4, 4)
    torch.testing.assert_close(torch.compile(call, fullgraph=True)(x), call(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("wrap", [lambda model: model, normalized], ids=["LiteVAE", "NormalizedAutoencoder"])
def test_gradient_checkpointing_gives_the_same_gradients(wrap):
    vae, x, found = wrap(built("LiteVAE-S").train()), images(1, 3, 16, 16), []
    for checkpointing in (False, True):
        if checkpointing:
            vae.enable_gradient_checkpointing()
        assert vae.is_gradient_checkpointing == checkpointing
        vae.zero_grad()
        vae(x).sample.square().mean().backward()
        found.append([p.grad.clone() for p in vae.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
