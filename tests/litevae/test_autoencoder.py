"""The model as diffusers knows models: folders, posterior, pipelines; folders of diffusers' own autoencoders; and
folders that are damaged."""

import ast
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLKVAE,
    AutoencoderKLQwenImage,
    AutoencoderOobleck,
    AutoencoderTiny,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
    VQModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import litevae
from litevae import LiteVAE, UserError, load_autoencoder
from litevae.any_autoencoder import fingerprint
from litevae.autoencoder import count_parameters
from litevae.latents import downsampling, encode_latents, latent_content
from litevae.model_folder import INDEX, WEIGHTS, model_config

SHARED = Path(__file__).parents[3] / "shared"
SMALL = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}


def kl_like(levels):
    return {
        "block_out_channels": (32,) * levels,
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }


def dc(levels):
    side = {
        "block_types": ("ResBlock",) * (levels - 1) + ("EfficientViTBlock",),
        "block_out_channels": (16,) * (levels - 1) + (32,),
        "layers_per_block": (1,) * levels,
        "qkv_multiscales": ((),) * (levels - 1) + ((5,),),
    }
    both = {f"{half}_{key}": value for half in ("encoder", "decoder") for key, value in side.items()}
    return AutoencoderDC(latent_channels=8, attention_head_dim=8, **both)


# name: the model, its latent channels, its f, and what it encodes to
FAMILIES = {
    "LiteVAE": (lambda: LiteVAE.from_preset("S", latent_channels=12, **SMALL), 12, 8, "moments"),
    "SD-VAE": (lambda: AutoencoderKL(latent_channels=4, **kl_like(4)), 4, 8, "moments"),
    "SD3-VAE": (
        lambda: AutoencoderKL(
            latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, **kl_like(4)
        ),
        16,
        8,
        "moments",
    ),
    "VAE-f4": (lambda: AutoencoderKL(latent_channels=3, **kl_like(3)), 3, 4, "moments"),
    "asymmetric": (
        lambda: AsymmetricAutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            down_block_out_channels=(32,) * 4,
            up_block_out_channels=(32, 32, 32, 64),
        ),
        4,
        8,
        "moments",
    ),
    "FLUX.2": (lambda: AutoencoderKLFlux2(**kl_like(4)), 32, 8, "moments"),
    "KVAE": (lambda: AutoencoderKLKVAE(channels=32, num_enc_blocks=1, num_dec_blocks=1), 16, 8, "moments"),
    "TAESD": (
        lambda: AutoencoderTiny(encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4),
        4,
        8,
        "mean",
    ),
    "DC-AE-f8": (lambda: dc(4), 8, 8, "mean"),
    "DC-AE-f32": (lambda: dc(6), 8, 32, "mean"),
    "DC-AE-f64": (lambda: dc(7), 8, 64, "mean"),
    "VQ-f4": (lambda: VQModel(latent_channels=3, num_vq_embeddings=16, **kl_like(3)), 3, 4, "mean"),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LiteVAE.from_preset("S", latent_channels=4, **SMALL).eval()


@pytest.fixture
def x():
    return torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_encode_and_decode_as_diffusers(model, x):
    posterior = model.encode(x).latent_dist
    assert posterior.parameters.shape == (2, 8, 8, 6)
    assert torch.equal(model.encode(x, return_dict=False)[0].mode(), posterior.mean)
    z = posterior.sample(torch.Generator().manual_seed(1))
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(z, posterior.mean + (0.5 * posterior.logvar).exp() * noise)
    assert model.decode(z).sample.shape == x.shape
    assert torch.equal(model.decode(z, return_dict=False)[0], model.decode(z).sample)


@torch.no_grad()
def test_forward_is_encode_draw_decode(model, x):
    posterior = model.encode(x).latent_dist
    image = model(x, sample_posterior=True, generator=torch.Generator().manual_seed(1)).sample
    assert torch.equal(image, model.decode(posterior.sample(torch.Generator().manual_seed(1))).sample)
    (mode,) = model(x, return_dict=False)
    assert torch.equal(mode, model.decode(posterior.mode()).sample)
    assert torch.equal(mode, model(sample=x).sample)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["group", "smc"])
def test_save_and_load(tmp_path, x, norm):
    model = LiteVAE.from_preset("S", latent_channels=12, decoder_norm=norm, wavelet="db2", downsample="pool", **SMALL)
    model.eval().save_pretrained(tmp_path)
    again = load_autoencoder(tmp_path)
    assert torch.equal(again(x, sample_posterior=False)[0], model(x, sample_posterior=False)[0])
    assert (again.config.wavelet, again.config.downsample, again.config.latent_channels) == ("db2", "pool", 12)


@torch.no_grad()
def test_a_baked_model_is_saved_as_plain_convolutions(tmp_path, x):
    model = LiteVAE.from_preset("S", decoder_norm="smc", **SMALL).eval()
    before = model(x, sample_posterior=False)[0]
    model.bake().save_pretrained(tmp_path)
    assert torch.allclose(load_autoencoder(tmp_path)(x, sample_posterior=False)[0], before, atol=1e-6)


@torch.no_grad()
def test_slicing_changes_nothing(model, x):
    before = model(x, sample_posterior=False)[0]
    model.enable_slicing()
    assert torch.allclose(model(x, sample_posterior=False)[0], before, atol=1e-5)


# Every encoder and decoder of the paper's tables, as values of the config
SYSTEMS = {
    **{f"LiteVAE-{size}": {"size": size} for size in "SBML"},
    "SD-VAE": {"size": "sd-vae"},
    "VAE-Small": {"size": "vae-small"},
    "DWT": {"size": "dwt", "latent_channels": 12},
    "DWT-2": {"size": "dwt-2", "latent_channels": 48},
    "DWT db2": {"size": "dwt", "latent_channels": 12, "wavelet": "db2"},
    "pooling": {"downsample": "pool"},
    "1x1": {"conv1x1": True},
    "SD-VAE 1x1": {"size": "vae-small", "conv1x1": True},
    "NAFNet": {"extractor": "nafnet"},
    "shared": {"shared_extractor": True},
    "shared NAFNet, levels 2 and 3, ViT": {
        "extractor": "nafnet",
        "shared_extractor": True,
        "levels": [2, 3],
        "aggregator": "vit",
    },
    "ViT": {"aggregator": "vit", "vit_grid": 4},
    "levels 2 and 3": {"levels": [2, 3]},
    **{f"decoder {norm}": {"decoder_norm": norm} for norm in ("smc", "batch", "instance", "layer", "rms", "none")},
    "bands": {"output": "wavelet"},
    "SMC bands db2": {"output": "wavelet", "wavelet": "db2", "decoder_norm": "smc"},
}


LARGE = (
    "LiteVAE-M",
    "LiteVAE-L",
    "SD-VAE",
)  # of the parts of the others; in bf16 most of a minute where the CPU has none


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in SYSTEMS]
)
def test_every_system_trains_is_saved_and_loaded(tmp_path, x, name):
    torch.manual_seed(0)
    model = LiteVAE(**{"size": "S"} | SMALL | SYSTEMS[name])
    with torch.no_grad():
        for p in model.parameters():  # at the start blocks add nothing, and gradients stop at their last layer
            p.add_(0.05 * torch.randn_like(p))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    if name not in LARGE:
        part = x[:1, :, :32, :32]
        with torch.no_grad():
            exact = model(part).sample
            with torch.autocast("cpu", torch.bfloat16):
                rough = model(part).sample
        assert 0 < (rough - exact).abs().mean() < 0.05 * exact.std(), (rough - exact).abs().mean() / exact.std()
    posterior = model.encode(x).latent_dist
    image = model.decode(posterior.sample()).sample
    assert image.shape == x.shape
    (F.mse_loss(image, x) + 1e-3 * posterior.kl().mean()).backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    assert not [key for key, g in gradients.items() if g is None or not g.isfinite().all()]
    assert not [key for key, g in gradients.items() if g.ndim > 1 and not g.abs().sum() > 0]
    optimizer.step()
    assert not [key for key, p in model.named_parameters() if torch.equal(p, before[key])]

    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(x, sample_posterior=False)[0]
        for again in (load_autoencoder(tmp_path), LiteVAE.from_pretrained(tmp_path)):
            # Weights lie elsewhere in memory now, which on some processors decides on the order of sums.
            torch.testing.assert_close(again(x, sample_posterior=False)[0], expected, rtol=1e-4, atol=1e-4)
        assert downsampling(again) == 8
        latents, channels = encode_latents(again, x), model.config.latent_channels
        assert latents.shape == (2, channels if model.deterministic else 2 * channels, 8, 6)
        assert latent_content(again) == ("mean" if model.deterministic else "moments")
        torch.testing.assert_close(again.decode(latents[:, :channels]).sample, expected)
        torch.testing.assert_close(model.bake()(x, sample_posterior=False)[0], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("size", ["dwt", "dwt-2"])
def test_an_encoder_without_parameters_gives_a_latent(x, size):
    model = LiteVAE(size=size, latent_channels={"dwt": 12, "dwt-2": 48}[size], **SMALL)
    assert (model.deterministic, count_parameters(model.encoder)) == (True, 0)
    posterior = model.encode(x).latent_dist
    assert torch.equal(posterior.sample(), posterior.mode())
    assert torch.equal(posterior.mode(), encode_latents(model, x))
    assert posterior.kl() == 0
    mean, logvar = posterior.parameters.chunk(2, dim=1)  # who draws from the moments draws the same
    assert torch.allclose(mean + (logvar / 2).exp() * torch.randn_like(mean), mean, atol=1e-5)
    assert not LiteVAE(size="S", **SMALL).deterministic


@torch.no_grad()
def test_1x1_convolutions_start_as_identities_and_are_on_moments_and_latents(model, x):
    convs = LiteVAE(size="S", conv1x1=True, **SMALL).eval()
    assert convs.load_state_dict(model.state_dict(), strict=False).missing_keys == [
        f"{name}.{leaf}" for name in ("quant_conv", "post_quant_conv") for leaf in ("weight", "bias")
    ]
    torch.testing.assert_close(convs(x, sample_posterior=False)[0], model(x, sample_posterior=False)[0])
    for p in (*convs.quant_conv.parameters(), *convs.post_quant_conv.parameters()):
        torch.nn.init.normal_(p)
    moments, conv = encode_latents(model, x), convs.quant_conv
    mixed = torch.einsum("oi,nihw->nohw", conv.weight[:, :, 0, 0], moments) + conv.bias.view(-1, 1, 1)
    torch.testing.assert_close(encode_latents(convs, x), mixed)
    z, conv = moments[:, :4], convs.post_quant_conv
    mixed = torch.einsum("oi,nihw->nohw", conv.weight[:, :, 0, 0], z) + conv.bias.view(-1, 1, 1)
    torch.testing.assert_close(convs.decode(z).sample, model.decode(mixed).sample)


@torch.no_grad()
def test_a_folder_from_before_there_were_variants(tmp_path, model, x):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("extractor", "shared_extractor", "levels", "aggregator", "vit_grid", "conv1x1", "output"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(load_autoencoder(tmp_path)(x, sample_posterior=False)[0], model(x, sample_posterior=False)[0])


def test_a_shared_extractor_is_stored_once(tmp_path):
    LiteVAE(size="S", shared_extractor=True, **SMALL).save_pretrained(tmp_path)
    keys = {key.split(".")[2] for key in load_file(tmp_path / WEIGHTS) if key.startswith("encoder.extractors.")}
    assert keys == {"0"}


def test_it_is_the_vae_of_a_diffusers_pipeline(model):
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, sample_size=4,
        patch_size=2, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    pipeline = DiTPipeline(transformer=transformer, vae=model, scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    images = pipeline(class_labels=[1], num_inference_steps=2, output_type="np", generator=generator).images

    # The same by hand: the pipeline guides by 4 away from class 1000.
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(2)
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for time in scheduler.timesteps:
            given, free = (
                transformer(z, timestep=time[None], class_labels=torch.tensor([label])).sample for label in (1, 1000)
            )
            z = scheduler.step(free + 4 * (given - free), time, z).prev_sample
        expected = model.decode(z / model.config.scaling_factor).sample
    expected = (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert images.shape == (1, 32, 32, 3)
    assert expected.std() > 0.05
    np.testing.assert_allclose(images, expected, atol=1e-4)


def test_the_fingerprint_is_of_config_and_weights(tmp_path, model):
    a, b, c = (tmp_path / name for name in "abc")
    for folder in (a, b, c):
        model.save_pretrained(folder)
    config = json.loads((b / "config.json").read_text())
    (b / "config.json").write_text(json.dumps(dict(reversed(config.items())) | {"_diffusers_version": "9"}))
    assert fingerprint(a) == fingerprint(b)
    (c / "config.json").write_text(json.dumps(config | {"downsample": "pool"}))
    assert fingerprint(a) != fingerprint(c)
    with torch.no_grad():
        model.decoder.conv_out.bias.add_(1e-3)
    model.save_pretrained(c)
    assert fingerprint(a) != fingerprint(c)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_any_autoencoder_of_diffusers_is_loaded_and_encodes(tmp_path, family):
    make, channels, f, content = FAMILIES[family]
    torch.manual_seed(0)
    own = make().eval()
    own.save_pretrained(tmp_path)
    model = load_autoencoder(tmp_path)
    assert (type(model), model.training, model_config(tmp_path)["_class_name"]) == (
        type(own),
        False,
        type(own).__name__,
    )
    x = torch.rand(2, 3, 2 * f, 3 * f) * 2 - 1
    latents = encode_latents(model, x)
    encoded = own.encode(x)
    if content == "moments":
        assert torch.equal(torch.cat([encoded.latent_dist.mean, encoded.latent_dist.logvar], 1), latents)
        latents = latents.chunk(2, dim=1)[0]
    else:
        assert torch.equal(encoded[0], latents)
    assert latents.shape == (2, channels, 2, 3)
    assert latent_content(model) == content
    assert downsampling(model) == f
    assert model.decode(latents, return_dict=False)[0].shape == x.shape
    for height, width in ((2 * f - 1, 3 * f), (2 * f, 3 * f + f // 2)):
        with pytest.raises(UserError, match=rf"multiples of {f} pixels, not {width}x{height}"):
            encode_latents(model, torch.zeros(1, 3, height, width))


@torch.no_grad()
def test_encoding_follows_autocast_and_is_in_fp32_without(tmp_path, x):
    model = AutoencoderTiny(encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4)
    model.half().save_pretrained(tmp_path)  # as most published ones
    model = load_autoencoder(tmp_path)
    assert encode_latents(model, x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert encode_latents(model, x).dtype == torch.bfloat16


@torch.no_grad()
def test_an_sd_vae_with_the_attention_names_of_its_first_release(tmp_path, x):
    model = AutoencoderKL(**kl_like(4)).eval()
    model.save_pretrained(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(tmp_path / WEIGHTS)
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
    assert sum("proj_attn" in key for key in state) == 4
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert torch.equal(encode_latents(load_autoencoder(tmp_path), x), model.encode(x).latent_dist.parameters)


def taesd(weights, x, first=0):
    """madebyollin's network, from its keys: numbered layers, of which those with `conv.0` are residual blocks."""
    layers = sorted({int(key.split(".")[0]) for key in weights})
    for layer in layers:
        if f"{layer}.weight" in weights:
            bias = weights.get(f"{layer}.bias")
            plain = bias is not None or first  # the encoder's convolutions without bias halve, the decoder's do not
            x = F.conv2d(x, weights[f"{layer}.weight"], bias, stride=1 if plain else 2, padding=1)
        else:
            y = x
            for part in (0, 2, 4):
                y = F.conv2d(y, weights[f"{layer}.conv.{part}.weight"], weights[f"{layer}.conv.{part}.bias"], padding=1)
                y = y.relu() if part < 4 else y
            x = (x + y).relu()
        if layer + 1 not in layers and layer < layers[-1]:  # what has no weights has a number too
            x = x.relu() if layer == 1 else x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return x


def published_taesd(name):
    """The encoder's and the decoder's weights, as madebyollin published them."""
    return [load_file(SHARED / f"weights/taesd/{name}_{half}.safetensors") for half in ("encoder", "decoder")]


def random_taesd(channels):
    """As `published_taesd`, of 16 channels between: convolutions whose outputs are about as large as their inputs."""

    def convolution(name, inputs, outputs, biased=True):
        weights = {f"{name}.weight": torch.randn(outputs, inputs, 3, 3) * (9 * inputs) ** -0.5}
        return weights | ({f"{name}.bias": torch.randn(outputs) / 10} if biased else {})

    def blocks(first, count):
        numbers = [(layer, part) for layer in range(first, first + count) for part in (0, 2, 4)]
        return [convolution(f"{layer}.conv.{part}", 16, 16) for layer, part in numbers]

    encoder = [convolution("0", 3, 16), *blocks(1, 1)]
    for stage in range(3):
        encoder += [convolution(f"{2 + 4 * stage}", 16, 16, biased=False), *blocks(3 + 4 * stage, 3)]
    encoder.append(convolution("14", 16, channels))
    decoder = [convolution("1", channels, 16)]  # 0 clamps, 2 is a ReLU
    for stage in range(3):  # and after three blocks one doubles the sides
        decoder += [*blocks(3 + 5 * stage, 3), convolution(f"{7 + 5 * stage}", 16, 16, biased=False)]
    decoder += [*blocks(18, 1), convolution("19", 16, 3)]
    return [{key: value for layer in half for key, value in layer.items()} for half in (encoder, decoder)]


def picture(kind):
    if kind == "published":
        return np.asarray(Image.open(SHARED / "data/kodak/kodim23.png"))[128:384, 256:512]
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


# The published ones where they lie beside the repository: what they make of a photo is the photo, too.
TAESD = [("random", 4, 0), ("random", 16, 0)]
if (SHARED / "weights" / "taesd").is_dir():
    TAESD += [("taesd", 4, 22), ("taesd3", 16, 26)]


@torch.no_grad()
@pytest.mark.parametrize(("name", "channels", "low"), TAESD)
def test_weights_of_taesd_as_they_were_published(tmp_path, name, channels, low):
    torch.manual_seed(0)
    encoder, decoder = random_taesd(channels) if name == "random" else published_taesd(name)
    state = {f"encoder.layers.{key}": value for key, value in encoder.items()}
    for key, value in decoder.items():  # diffusers clamps outside its layers
        number, rest = key.split(".", 1)
        state[f"decoder.layers.{int(number) - 1}.{rest}"] = value
    sizes = {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4}
    AutoencoderTiny(latent_channels=channels, **sizes if name == "random" else {}).save_config(tmp_path)
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    model = load_autoencoder(tmp_path)

    pixels = picture("random" if name == "random" else "published")
    x = torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    z = encode_latents(model, x)
    assert z.shape == (1, channels, pixels.shape[0] // 8, pixels.shape[1] // 8)
    torch.testing.assert_close(z, taesd({key: value.float() for key, value in encoder.items()}, (x + 1) / 2))
    image = model.decode(z, return_dict=False)[0]
    reference = taesd({key: value.float() for key, value in decoder.items()}, (z / 3).tanh() * 3, first=1)
    torch.testing.assert_close(image, reference * 2 - 1, atol=1e-4, rtol=1e-4)
    assert not low or -10 * torch.log10((image - x).div(2).square().mean()) > low  # dB


def test_weights_in_several_files(tmp_path):
    torch.manual_seed(0)
    model = AutoencoderKL(**kl_like(4)).eval()
    one, many = tmp_path / "one", tmp_path / "many"
    model.save_pretrained(one)
    model.save_pretrained(many, max_shard_size="100KB")
    shards = sorted(path.name for path in many.glob("*.safetensors"))
    assert len(shards) > 2
    assert not (many / WEIGHTS).exists()
    for key, value in load_autoencoder(many).state_dict().items():
        assert torch.equal(value, model.state_dict()[key])
    before = fingerprint(many)
    for name in shards:  # every file counts
        whole = (many / name).read_bytes()
        (many / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert fingerprint(many) != before
        (many / name).write_bytes(whole)
    assert fingerprint(many) == before
    (many / shards[1]).rename(many / "elsewhere")
    for use in (load_autoencoder, fingerprint):
        with pytest.raises(UserError, match=f"names {shards[1]}, which is not a safetensors file of this folder"):
            use(many)


def test_an_index_cannot_lead_to_pickles_or_out_of_the_folder(tmp_path):
    folder = tmp_path / "model"
    AutoencoderKL(**kl_like(4)).save_pretrained(folder)
    (folder / WEIGHTS).rename(tmp_path / "outside.safetensors")
    (folder / "weights.bin").write_bytes(pickle.dumps({}))
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "weights.bin"):
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"encoder.conv_in.bias": name}}))
        with pytest.raises(UserError, match="not a safetensors file of this folder"):
            load_autoencoder(folder)
    for text, message in (
        ('{"weight_map": {}}', "no files"),
        ('{"weight_map": 3}', "no files"),
        ("[]", "it does not hold an object"),
    ):
        (folder / INDEX).write_text(text)
        with pytest.raises(UserError, match=message):
            load_autoencoder(folder)


def test_pickles_are_never_loaded(tmp_path):
    AutoencoderKL(**kl_like(4)).save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "diffusion_pytorch_model.bin").exists()
    for use in (load_autoencoder, fingerprint, model_config):
        with pytest.raises(UserError, match=r"diffusion_pytorch_model\.bin is a pickle.*convert it to safetensors"):
            use(tmp_path)


def test_folders_that_hold_something_else(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=f"whole diffusers pipeline; give its autoencoder: {tmp_path}/vae"):
        load_autoencoder(tmp_path)
    UNet2DModel(32, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
                ).save_pretrained(tmp_path / "unet")  # fmt: skip
    with pytest.raises(UserError, match="holds a UNet2DModel, not a LiteVAE or an autoencoder of diffusers"):
        load_autoencoder(tmp_path / "unet")
    video = AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1)
    sound = AutoencoderOobleck(
        encoder_hidden_size=8, decoder_channels=8, channel_multiples=[1, 1], downsampling_ratios=[2, 4]
    )
    layers = AutoencoderKL(in_channels=4, out_channels=4, **kl_like(2))
    for name, model in (("video", video), ("sound", sound), ("layers", layers)):
        model.save_pretrained(tmp_path / name)
        with pytest.raises(
            UserError, match=f"{type(model).__name__}, which encodes video, sound or layers, not RGB images"
        ):
            load_autoencoder(tmp_path / name)
    (tmp_path / "layers" / WEIGHTS).rename(tmp_path / "layers" / "vae.safetensors")
    with pytest.raises(UserError, match=r"rename vae\.safetensors"):
        load_autoencoder(tmp_path / "layers")


def test_damaged_folders_are_named(tmp_path, model):
    with pytest.raises(UserError, match="does not exist"):
        load_autoencoder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"not a model folder: it has no config\.json"):
        load_autoencoder(tmp_path)
    model.save_pretrained(tmp_path)
    whole, config = (tmp_path / WEIGHTS).read_bytes(), json.loads((tmp_path / "config.json").read_text())
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        load_autoencoder(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(whole)
    (tmp_path / "config.json").write_text(json.dumps(config | {"size": "B"}))
    with pytest.raises(UserError, match="weights"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderKL"}))
    with pytest.raises(UserError, match=r"do not fit|can't be loaded"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderOfTomorrow"}))
    with pytest.raises(UserError, match="AutoencoderOfTomorrow, not a LiteVAE"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_autoencoder(tmp_path)


def test_a_folder_without_some_weights_is_not_filled_with_random_ones(tmp_path, model):
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    del state["decoder.conv_out.bias"]
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"decoder\.conv_out\.bias"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": "XL"}, "size='XL' is not one of S, B, M, L, sd-vae, vae-small, dwt, dwt-2"),
        ({"decoder_norm": "weight"}, "decoder_norm='weight' is not one of group, smc, batch, instance, layer, rms"),
        ({"extractor": "vit"}, "extractor='vit' is not one of unet, nafnet"),
        ({"aggregator": "nafnet"}, "aggregator='nafnet' is not one of unet, vit"),
        ({"output": "bands"}, "output='bands' is not one of image, wavelet"),
        ({"levels": []}, r"levels=\[\] must be some of 1, 2, 3"),
        ({"levels": [3, 2]}, "each at most once and in this order"),
        ({"levels": [2, 4]}, r"levels=\[2, 4\]"),
        ({"block_out_channels": (8, 8)}, "exactly 4"),
        ({"wavelet": "hair"}, "unknown wavelet"),
        ({"size": "sd-vae", "wavelet": "hair"}, "unknown wavelet"),
        ({"size": "sd-vae", "levels": [2, 3]}, "levels is for sizes S, B, M, L, and size='sd-vae' has no such choice"),
        ({"size": "dwt", "latent_channels": 12, "aggregator": "vit"}, "aggregator is for sizes S, B, M, L"),
        ({"size": "dwt"}, "size='dwt' gives 12 latent channels, not latent_channels=4; set it to 12"),
        ({"size": "dwt-2", "latent_channels": 12}, "set it to 48"),
        ({"size": "dwt", "latent_channels": 12, "conv1x1": True}, "conv1x1 needs a learned encoder"),
    ],
)
def test_impossible_models_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        LiteVAE(**config)


@pytest.mark.parametrize("path", sorted(Path(litevae.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_no_file_of_the_library_names_ray_or_mlflow(path):
    """Not even in a function; the slow suite imports them where neither can be imported."""
    tree = ast.walk(ast.parse(path.read_text()))
    imports = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [getattr(node, "module", None) or name.name for node in imports for name in node.names]
    assert not {name.partition(".")[0] for name in names} & {"ray", "mlflow", "pydantic", "pipelines", "jobs"}


@pytest.mark.slow
def test_the_library_needs_neither_ray_nor_mlflow():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('ray', 'mlflow', 'pydantic')));"
        "import litevae, litevae.cache, litevae.diffusion, litevae.discriminators, litevae.images, litevae.losses,"
        "litevae.metrics, litevae.order, litevae.perceptual, litevae.pictures, litevae.precision"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
