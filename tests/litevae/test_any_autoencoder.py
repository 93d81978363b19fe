"""How model folders are loaded and told apart: variants, parts, subfolders, devices, and what a fingerprint covers."""

import json
import logging
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from litevae.any_autoencoder import fingerprint, load_autoencoder
from litevae.autoencoder import LiteVAE
from litevae.errors import UserError
from litevae.ldm import NormalizedAutoencoder
from litevae.model_folder import WEIGHTS, weight_files

TINY = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1}
MAKERS = {
    "LiteVAE": lambda: LiteVAE("S", **TINY),
    "AutoencoderKL": lambda: AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
}


@pytest.fixture(scope="module", params=MAKERS)
def model(request):
    torch.manual_seed(0)
    return MAKERS[request.param]().eval()


def assert_same(found, expected, dtype=torch.float32, halved=True):
    expected = expected.state_dict()
    assert found.state_dict().keys() == expected.keys()
    for key, value in found.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value, (expected[key].half() if halved else expected[key]).to(dtype))


@pytest.mark.parametrize("parts", [False, True])
def test_a_folder_with_only_an_fp16_variant(model, tmp_path, parts):
    half = type(model).from_config(model.config).half()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(tmp_path, variant="fp16", **({"max_shard_size": "200KB"} if parts else {}))
    names = {path.name for path in tmp_path.iterdir()}
    assert WEIGHTS not in names
    if parts and type(model) is LiteVAE:
        assert "diffusion_pytorch_model.safetensors.index.fp16.json" in names
        assert len(weight_files(tmp_path)) > 1
    for options in ({}, {"variant": "fp16"}):
        assert_same(load_autoencoder(tmp_path, **options), model)
    assert_same(load_autoencoder(tmp_path, torch_dtype=torch.float16), model, torch.float16)
    before = fingerprint(tmp_path)
    file = tmp_path / weight_files(tmp_path)[-1]
    file.write_bytes(file.read_bytes()[:-2] + b"\x01\x02")
    assert fingerprint(tmp_path) != before


def test_weights_without_a_variant_come_first_and_two_variants_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    own = fingerprint(tmp_path)
    model.save_pretrained(tmp_path, variant="fp16")
    assert (fingerprint(tmp_path), weight_files(tmp_path)) == (own, [WEIGHTS])
    assert weight_files(tmp_path, "fp16") == ["diffusion_pytorch_model.fp16.safetensors"]
    (tmp_path / WEIGHTS).unlink()
    shutil.copy(
        tmp_path / "diffusion_pytorch_model.fp16.safetensors", tmp_path / "diffusion_pytorch_model.ema.safetensors"
    )
    with pytest.raises(UserError, match="only as the variants ema and fp16; keep one"):
        load_autoencoder(tmp_path)
    assert load_autoencoder(tmp_path, variant="ema")
    with pytest.raises(UserError, match=r"has no diffusion_pytorch_model\.bf16\.safetensors"):
        load_autoencoder(tmp_path, variant="bf16")


def test_a_subfolder_and_weights_in_parts(model, tmp_path):
    model.save_pretrained(tmp_path / "vae", max_shard_size="200KB")
    assert_same(load_autoencoder(tmp_path, subfolder="vae"), model, halved=False)


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "cpu"}, {"device_map": "auto"}, {"torch_dtype": torch.bfloat16}, {"subfolder": "vae"},
        {"variant": "fp16"}, {"low_cpu_mem_usage": False},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()),
)  # fmt: skip
def test_the_options_of_from_pretrained(tmp_path, options):
    torch.manual_seed(0)
    model = LiteVAE("S", **TINY).eval()
    model.save_pretrained(
        tmp_path / options.get("subfolder", ""), variant=options.get("variant"), max_shard_size="200KB"
    )
    found, report = LiteVAE.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not [key for keys in report.values() for key in keys]
    dtype = options.get("torch_dtype", torch.float32)
    assert (found.dtype, found.device) == (dtype, torch.device("cpu"))
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = model.to(dtype).encode(x.to(dtype)).latent_dist.mode()
        torch.testing.assert_close(found.encode(x.to(dtype)).latent_dist.mode(), expected)


STATISTICS = {
    "scaling_factor": 0.4, "shift_factor": 0.1, "latents_mean": [0.1, 0.2, 0.3, 0.4],
    "latents_std": [1.0, 2.0, 3.0, 4.0]
}  # fmt: skip


def changed(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return fingerprint(folder)


def test_statistics_do_not_change_the_fingerprint_of_a_litevae_only(tmp_path):
    LiteVAE("S", **TINY).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # as a version without shift_factor, latents_mean and latents_std wrote it
    older = {key: value for key, value in config.items() if key not in STATISTICS or key == "scaling_factor"}
    (tmp_path / "config.json").write_text(json.dumps(older))
    own = fingerprint(tmp_path)
    for name, value in STATISTICS.items():
        assert changed(tmp_path, **{name: value}) == own, name
    assert changed(tmp_path, **dict.fromkeys(("latents_mean", "latents_std"))) == own
    assert changed(tmp_path, wavelet="db2") != own

    other = tmp_path / "other"
    MAKERS["AutoencoderKL"]().save_pretrained(other)
    own = fingerprint(other)
    assert changed(other, scaling_factor=0.4) != own  # older caches have the fingerprint of the whole config


def test_a_normalized_autoencoders_own_statistics_count(tmp_path):
    vae = LiteVAE("S", **TINY)
    NormalizedAutoencoder.of(vae, torch.zeros(4), torch.ones(4)).save_pretrained(tmp_path)
    own = fingerprint(tmp_path)
    inner = json.loads((tmp_path / "config.json").read_text())["autoencoder_config"]
    assert changed(tmp_path, autoencoder_config=inner | STATISTICS) == own
    assert changed(tmp_path, latents_mean=[1.0] * 4) != own


def test_the_weights_decide_the_fingerprint_not_how_the_folder_looks(model, tmp_path):
    model.save_pretrained(tmp_path)
    own = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("# A model\n")
    assert fingerprint(tmp_path) == own


def test_a_model_made_with_positional_arguments_is_made_again_from_its_config():
    model = LiteVAE("dwt", 12, **TINY)
    again = LiteVAE.from_config(model.config)
    assert (again.config.size, again.config.latent_channels) == ("dwt", 12)
    wrapped = NormalizedAutoencoder.of(model, torch.arange(12.0), torch.ones(12))
    assert NormalizedAutoencoder.from_config(wrapped.config).config.latents_mean == [*range(12)]


def test_only_what_a_config_should_not_have_is_warned_of(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    widths = (8, 8, 8, 8)
    AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths).save_pretrained(tmp_path)
    load_autoencoder(tmp_path)
    assert "not expected" not in caplog.text
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"of_tomorrow": 1}))
    load_autoencoder(tmp_path)
    assert "'of_tomorrow': 1} were passed to AutoencoderTiny" in caplog.text
