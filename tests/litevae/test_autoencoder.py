"""The model as diffusers knows models: folders, posterior, pipelines; and folders that are damaged."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from litevae import LiteVAE, UserError, load_autoencoder
from litevae.autoencoder import WEIGHTS, fingerprint

SMALL = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}


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
    image, posterior = model(x, generator=torch.Generator().manual_seed(1))
    assert torch.equal(image, model.decode(posterior.sample(torch.Generator().manual_seed(1))).sample)
    assert torch.equal(model(x, sample_posterior=False)[0], model.decode(posterior.mode()).sample)


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


def test_it_is_the_vae_of_a_diffusers_pipeline(model):
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, sample_size=4,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    pipeline = DiTPipeline(transformer=transformer, vae=model, scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(class_labels=[1], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 32, 32, 3)


def test_the_fingerprint_is_of_config_and_weights(tmp_path, model):
    a, b, c = (tmp_path / name for name in "abc")
    for folder in (a, b, c):
        model.save_pretrained(folder)
    config = json.loads((b / "config.json").read_text())
    (b / "config.json").write_text(json.dumps(dict(reversed(config.items())) | {"_diffusers_version": "9"}))
    assert fingerprint(a) == fingerprint(b)
    (c / "config.json").write_text(json.dumps(config | {"scaling_factor": 2.0}))
    assert fingerprint(a) != fingerprint(c)
    with torch.no_grad():
        model.decoder.conv_out.bias.add_(1e-3)
    model.save_pretrained(c)
    assert fingerprint(a) != fingerprint(c)


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
    with pytest.raises(UserError, match="AutoencoderKL, not a LiteVAE"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_autoencoder(tmp_path)


def test_a_folder_without_some_weights_is_not_filled_with_random_ones(tmp_path, model):
    from safetensors.torch import load_file, save_file

    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    del state["decoder.conv_out.bias"]
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"decoder\.conv_out\.bias"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": "XL"}, "size='XL' is not one of S, B, M, L"),
        ({"decoder_norm": "batch"}, "decoder_norm='batch'"),
        ({"block_out_channels": (8, 8)}, "exactly 4"),
        ({"wavelet": "hair"}, "unknown wavelet"),
    ],
)
def test_impossible_models_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        LiteVAE(**config)


def test_the_library_needs_neither_ray_nor_mlflow():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('ray', 'mlflow', 'pydantic')));"
        "import litevae, litevae.cache, litevae.diffusion, litevae.discriminators, litevae.images, litevae.losses,"
        "litevae.metrics, litevae.order, litevae.perceptual, litevae.pictures, litevae.precision"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
