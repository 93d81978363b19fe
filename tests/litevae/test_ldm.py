"""The folder of a latent diffusion model: what comes back is what was saved, by us and by diffusers alone."""

import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DPMSolverMultistepScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from litevae.autoencoder import LiteVAE
from litevae.denoiser import build_denoiser, null_class
from litevae.diffusion import Objective
from litevae.dit import DiT
from litevae.errors import UserError
from litevae.ldm import LDM, NormalizedAutoencoder, ldm_fingerprint, load_ldm, save_ldm
from litevae.sampling import sample_latents

MEAN, STD = torch.tensor([0.5, -1.0, 0.1, 3.0]), torch.tensor([2.0, 0.5, 1.25, 0.3])
SMALL = {"block_out_channels": (16,) * 4, "layers_per_block": 1, "norm_num_groups": 8}
AUTOENCODERS = {
    "LiteVAE": lambda: LiteVAE.from_preset("S", block_out_channels=(32, 32, 32, 32), layers_per_block=1),
    "AutoencoderTiny": lambda: AutoencoderTiny(
        encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4
    ),
    "AutoencoderKL": lambda: AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **SMALL
    ),
}
# What is exported: network, classes, objective.
MODELS = {
    "unet-epsilon": ("unet", 0, Objective()),
    "unet-epsilon-cosine": ("unet", 0, Objective(schedule="cosine")),
    "dit-v": ("dit", 0, Objective("v", zero_snr=True)),
    "unet-v-classes": ("unet", 5, Objective("v", "cosine")),
    "dit-epsilon-classes": ("dit", 1000, Objective()),
    "unet-flow": ("unet", 0, Objective("flow")),
    "dit-flow-classes": ("dit", 5, Objective("flow")),
}
LABELS = [4, 1]


def make(
    network: str = "unet", classes: int = 0, objective: Objective = MODELS["unet-epsilon"][2], vae="LiteVAE"
) -> LDM:
    torch.manual_seed(0)
    model: nn.Module
    if network == "unet":
        model = build_denoiser("tiny", 4, 8, classes)
    else:
        model = DiT(8, 4, 4, 48, 2, 4, num_class_embeds=null_class(classes) + 1 if classes else None)
    with torch.no_grad():
        for parameter in model.parameters():  # away from the zeros of the initialisation
            parameter.add_(0.05 * torch.randn_like(parameter))
    autoencoder = NormalizedAutoencoder.of(AUTOENCODERS[vae]().eval(), MEAN, STD)
    return LDM(model.eval(), objective.scheduler(), autoencoder, classes, {"cache": "abc", "config": {"seed": 0}})


@pytest.fixture(scope="module")
def ldm():
    return make()


@pytest.fixture
def folder(ldm, tmp_path):
    save_ldm(tmp_path / "model", ldm)
    return tmp_path / "model"


# --- normalisation


@pytest.mark.parametrize("vae", AUTOENCODERS)
def test_decoding_denormalises(vae):
    ldm = make(vae=vae)
    z = torch.randn(2, 4, 8, 8)
    raw = torch.stack([z[:, c] * STD[c] + MEAN[c] for c in range(4)], dim=1)
    with torch.no_grad():
        expected = ldm.vae.autoencoder.decode(raw).sample
        torch.testing.assert_close(ldm.vae.decode(z).sample, expected)
    torch.testing.assert_close(ldm.decode(z), expected.clamp(-1, 1))
    assert ldm.vae.mean.flatten().tolist() == MEAN.tolist()
    assert ldm.vae.std.flatten().tolist() == STD.tolist()


def test_an_autoencoder_is_taken_as_it_is():
    vae = AUTOENCODERS["LiteVAE"]().eval()
    assert NormalizedAutoencoder.of(vae, MEAN, STD).autoencoder is vae
    with pytest.raises(UserError, match="UNet2DModel is neither LiteVAE nor an autoencoder of diffusers"):
        NormalizedAutoencoder({"_class_name": "UNet2DModel"}, [0.0], [1.0])


# --- the folder, by us


@pytest.mark.parametrize("name", MODELS)
def test_save_and_load_give_the_same_images(name, tmp_path):
    network, classes, objective = MODELS[name]
    ldm = make(network, classes, objective)
    save_ldm(tmp_path, ldm)
    loaded = load_ldm(tmp_path)
    assert (loaded.info, loaded.classes, loaded.shape) == (ldm.info, classes, (4, 8, 8))
    assert not any(part.training for part in (loaded.network, loaded.vae, loaded.vae.autoencoder))
    options = {"steps": 2} | ({"labels": LABELS, "guidance": 2.0} if classes else {})
    images = loaded.sample([1, 2], **options)
    assert images.shape == (2, 3, 64, 64)
    torch.testing.assert_close(images, ldm.sample([1, 2], **options))
    assert torch.equal(images, load_ldm(tmp_path).sample([1, 2], **options))
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize("vae", ["AutoencoderTiny", "AutoencoderKL"])
def test_the_autoencoder_may_be_any_of_diffusers(vae, tmp_path, caplog):
    ldm = make(vae=vae)
    save_ldm(tmp_path, ldm)
    loaded = load_ldm(tmp_path)
    assert type(loaded.vae.autoencoder).__name__ == vae
    images = loaded.sample([1], steps=2)
    assert images.shape == (1, 3, 64, 64)
    torch.testing.assert_close(images, ldm.sample([1], steps=2))
    assert torch.equal(images, load_ldm(tmp_path).sample([1], steps=2))
    assert caplog.text == ""


def test_the_parts_are_models_of_diffusers(folder, ldm):
    unet = UNet2DModel.from_pretrained(folder / "unet")
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), ldm.network.parameters(), strict=True))


def test_saving_again_replaces_the_model(ldm, folder):
    before = ldm_fingerprint(folder)
    vae = NormalizedAutoencoder.of(ldm.vae.autoencoder, MEAN + 1, STD)
    save_ldm(folder, LDM(ldm.network, ldm.scheduler, vae))
    assert load_ldm(folder).vae.mean.flatten().tolist() == (MEAN + 1).tolist()
    assert ldm_fingerprint(folder) != before


def test_the_fingerprint_is_of_what_decides_the_images(ldm, folder, tmp_path):
    def saved(**changes):
        save_ldm(tmp_path / "other", LDM(**(vars(ldm) | changes)))
        return ldm_fingerprint(tmp_path / "other")

    own = ldm_fingerprint(folder)
    assert saved() == saved(info={"another": "run"}) == own
    others = [
        saved(scheduler=Objective("v").scheduler()),
        saved(network=make("dit").network),
        saved(vae=make(vae="AutoencoderKL").vae),
    ]
    assert len({own, *others}) == 4
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(UserError, match="incomplete or damaged"):
        ldm_fingerprint(folder)


def test_an_unfinished_folder_is_refused(ldm, folder, monkeypatch):
    monkeypatch.setattr(type(ldm.scheduler), "save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_ldm(folder, ldm)
    with pytest.raises(UserError, match=r"no ldm\.json"):
        load_ldm(folder)


def test_damaged_folders_are_refused(folder):
    def refused(match):
        with pytest.raises(UserError, match=match):
            load_ldm(folder)

    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused("incomplete or damaged")
    weights.write_bytes(whole)
    tensors = load_file(weights)
    tensors.pop("conv_out.bias")
    save_file(tensors, weights, metadata={"format": "pt"})
    refused("do not fit")
    weights.unlink()
    refused("incomplete or damaged")
    weights.write_bytes(whole)
    assert load_ldm(folder)

    for name in ("unet/config.json", "scheduler/scheduler_config.json"):
        text = (folder / name).read_text()
        for damage in (text[:40], "[]", json.dumps(json.loads(text) | {"_class_name": "Nothing"})):
            (folder / name).write_text(damage)
            refused(f"{name.rpartition('/')[2]} is not of a ")
        (folder / name).unlink()
        refused("incomplete or damaged")
        (folder / name).write_text(text)

    marker = folder / "ldm.json"
    about = json.loads(marker.read_text())
    marker.write_text(json.dumps(about | {"format": 99}))
    refused("format 99; this version of litevae reads 2")
    for damage in (json.dumps(about)[:40], "[]", json.dumps(about | {"classes": None})):
        marker.write_text(damage)
        refused(r"ldm\.json is damaged")
    marker.write_text(json.dumps(about))

    config = folder / "vae" / "config.json" if (folder / "vae").is_dir() else folder / "vqvae" / "config.json"
    text = config.read_text()
    config.write_text(json.dumps(json.loads(text) | {"latents_mean": [0.0] * 4}))
    refused("not the autoencoder")
    config.write_text(text)
    assert load_ldm(folder)
    shutil.rmtree(config.parent)
    refused("does not exist")


# --- the folder, by diffusers alone

_ALONE = """
import json, sys
import numpy as np, torch
import litevae
from diffusers import DiffusionPipeline

folders, labels, out = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
images, names = {}, {}
for name, folder in folders.items():
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    names[name] = type(pipeline).__name__

    def draw(**options):
        generator = torch.Generator().manual_seed(5)
        return pipeline(generator=generator, num_inference_steps=5, output_type="np", **options).images

    if "classes" in name:
        for guidance in (1.0, 3.0):
            images[f"{name} {guidance}"] = draw(class_labels=labels, guidance_scale=guidance)
    else:
        images[f"{name} 1.0"] = draw(batch_size=2)
np.savez(out, **images)
print(json.dumps(names))
"""
_NOTHING_ELSE = 'assert not {"ray", "mlflow", "pydantic", "pipelines", "jobs"} & sys.modules.keys()\n'


class Given:
    """Stands for numpy's generator: the noise that torch's gives the pipelines."""

    def __init__(self, row: int):
        self.row = row

    def standard_normal(self, shape, dtype):
        return torch.randn(2, *shape, generator=torch.Generator().manual_seed(5))[self.row].numpy()


@pytest.fixture(scope="module", params=["here", pytest.param("alone", marks=pytest.mark.slow)])
def pipelines(request, tmp_path_factory):
    """Folders of all models, what diffusers draws from them, pipelines' names, and its words; the slow suite once more
    in a process of its own, where nothing but the library can have helped."""
    root = tmp_path_factory.mktemp("pipelines")
    folders = {}
    for name, (network, classes, objective) in MODELS.items():
        folders[name] = str(root / name)
        save_ldm(root / name, make(network, classes, objective))
    script, out = root / "alone.py", root / "images.npz"
    words = [str(script), json.dumps(folders), json.dumps(LABELS), str(out)]
    if request.param == "here":
        said, printed = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(said):
            patch.setattr(sys, "argv", words)
            exec(compile(_ALONE, script, "exec"), {})
        return folders, np.load(out), json.loads(printed.getvalue()), said.getvalue()
    script.write_text(_ALONE + _NOTHING_ELSE)
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return folders, np.load(out), json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("name", [name for name in MODELS if "flow" not in name])
def test_diffusers_alone_draws_the_same_images(pipelines, name, monkeypatch):
    folders, drawn, names, _ = pipelines
    _, classes, _ = MODELS[name]
    assert names[name] == ("DiTPipeline" if classes else "LDMPipeline")
    monkeypatch.setattr(np.random, "default_rng", Given)
    ldm = load_ldm(folders[name])
    sampler = "dpm++" if name == "unet-epsilon-cosine" else "ddim"
    for guidance in (1.0, 3.0) if classes else (1.0,):
        options = {"labels": LABELS, "guidance": guidance} if classes else {}
        images = ldm.sample(range(2), steps=5, sampler=sampler, **options)
        expected = (images / 2 + 0.5).permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(drawn[f"{name} {guidance}"], expected, atol=1e-4)
        assert expected.std() > 0.05  # an image, not a plain colour


@pytest.mark.parametrize("name", [name for name in MODELS if "flow" in name])
def test_diffusers_alone_draws_flow_by_whole_timesteps(pipelines, name, monkeypatch):
    """Its pipelines know no sampler that asks the network for times between the whole ones: those are rounded down."""
    folders, drawn, _, _ = pipelines
    _, classes, _ = MODELS[name]
    ldm = load_ldm(folders[name])
    for guidance in (1.0, 3.0) if classes else (1.0,):
        scheduler = DPMSolverMultistepScheduler.from_config(ldm.scheduler.config)
        scheduler.set_timesteps(5)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            for t in scheduler.timesteps:
                given = {"class_labels": torch.tensor(LABELS)} if classes else {}
                v = ldm.network(x, t, **given).sample
                if guidance != 1:
                    free = ldm.network(x, t, class_labels=torch.tensor([1000, 1000])).sample
                    v = free + guidance * (v - free)
                x = scheduler.step(v, t, x).prev_sample
        expected = (ldm.decode(x) / 2 + 0.5).permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(drawn[f"{name} {guidance}"], expected, atol=1e-4)

        monkeypatch.setattr(np.random, "default_rng", Given)
        more = {"labels": LABELS, "classes": classes, "guidance": guidance} if classes else {}
        ours = sample_latents(ldm.network, ldm.scheduler, ldm.shape, range(2), 5, "dpm++", **more)
        assert (ours - x).abs().max() < 0.05 * x.abs().max()
        monkeypatch.undo()


def test_diffusers_says_nothing_but_the_autoencoders_class(pipelines):
    lines = [line for line in pipelines[3].splitlines() if line.strip() and "Loading pipeline components" not in line]
    print(lines)
    assert [line for line in lines if not line.startswith("Expected types for ")] == []
