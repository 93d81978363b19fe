"""What an earlier version of this project has left opens and goes on: tests/data/22fa16c.tar.xz holds photos, a model,
a cache, and runs of train_vae and train_ldm, made by its jobs with the commands of tests/data/README.md."""

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from litevae.any_autoencoder import fingerprint, load_autoencoder
from litevae.cache import LatentCache
from litevae.commits import read_commit
from litevae.images import to_tensor
from litevae.ldm import load_ldm
from pipelines.encoding import maintenance, verify
from pipelines.encoding.config import Encode, Repair
from pipelines.encoding.encode import encode_dataset
from pipelines.runtime.cli import load
from pipelines.training import ldm, vae
from pipelines.training.config import TrainLDM, TrainVAE
from tests.in_process import in_process, up_to_the_workers

MADE = Path(__file__).parents[1] / "data" / "22fa16c.tar.xz"
HERE = ["ray.gpu=false", "ray.cpus_per_worker=1", "tracking.enabled=false"]
VAE = [
    "name=vae", "model.encoder=dwt", "model.latent_channels=12", "model.decoder.channels=[8, 8, 8, 8]",
    "model.decoder.layers=1", "loop.ema=0.9", "loop.checkpoint_every=8", "loop.keep=1", "loop.precision=fp32",
    "loss.lpips.weight=0", "loss.adversarial.weight=0", "data.max_bad=0.5", "data.loaders=0",
]  # fmt: skip
STAGES = "stages=[{resolution: 32, images: 24, batch_size: 4}]"  # 16 images have been seen
ENCODE = [
    "transform.resolution=32", "rows_per_shard=4", "batch_size=2", "error_budget=0.5", "precision=fp32",
    "kernels=torch",
]  # fmt: skip
LDM = [
    "name=ldm", "network=tiny", "classes=2", "batch_size=4", "loop.ema=0.9", "loop.checkpoint_every=8", "loop.keep=1",
    "loop.precision=fp32", "sample_images=0",
]  # fmt: skip


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The folder in which it was made: the jobs were given relative paths, as they are here."""
    monkeypatch.chdir(tmp_path)
    with tarfile.open(fileobj=io.BytesIO(MADE.read_bytes())) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def encode(*more):
    places = ["source.uri=photos", "model=model", "out=cache", "root=runs"]
    with in_process():
        return encode_dataset(load(Encode, None, [*ENCODE, *HERE, *places, *more]))


def test_a_cache_is_read_whole_and_is_what_its_model_says(old):
    latents = LatentCache(old / "cache")
    assert (len(latents), latents.shape, latents.content) == (8, (12, 4, 4), "mean")
    assert verify.audit(str(old / "cache"), "none").problems == {}
    model = load_autoencoder(old / "model")
    assert fingerprint(old / "model") == latents.manifest["model"]["fingerprint"]
    row = latents.row(0)
    picture = np.asarray(Image.open(old / "photos" / row["id"]))
    with torch.no_grad():
        expected = model.encode(to_tensor(picture[None])).latent_dist.mean
    torch.testing.assert_close(latents.latents([0], 0, 0, normalize=False), expected.half().float())


def test_a_finished_cache_stays_as_it_is_and_takes_more(old):
    digest = LatentCache(old / "cache").manifest["digest"]
    assert encode()["digest"] == digest
    shutil.copy(old / "photos/cats/1.png", old / "photos/cats/9.png")
    assert encode("append=true")["images"] == 9
    assert LatentCache(old / "cache", version=1).manifest["digest"] == digest


def test_an_unfinished_cache_is_finished_and_a_damaged_one_mended(old):
    digest = LatentCache(old / "cache").manifest["digest"]
    (old / "cache/manifest.json").unlink()
    shutil.rmtree(old / "cache/manifests")
    (old / "cache/commits/000001.json").unlink()
    assert encode()["digest"] == digest
    shard = read_commit(str(old / "cache"), 0)["file"]
    (old / "cache" / shard).unlink()
    words = ["cache=cache", "model=model", "source=photos", "root=runs"]
    with in_process():
        maintenance.repair(load(Repair, None, [*words, *HERE]))
    assert LatentCache(old / "cache").manifest["digest"] == digest


@pytest.mark.slow
def test_runs_go_on_where_they_stopped(old, capsys):
    places = ["root=runs", "data.train.uri=photos"]
    result = vae.train_vae(load(TrainVAE, None, [*VAE, *HERE, *places, STAGES]))
    assert result["images"] == 24
    places = ["root=runs", "cache=cache", "vae=model"]
    result = ldm.train_ldm(load(TrainLDM, None, [*LDM, *HERE, *places, "images=24"]))
    assert result["images"] == 24
    shown = capsys.readouterr().out
    assert shown.count("continues after 16 images") == 2


def test_runs_are_known_as_theirs_and_their_models_open(old):
    """Their configs are those that the same words give now: else a run would be refused."""
    places = ["root=runs", "data.train.uri=photos"]
    with up_to_the_workers({"model": "there", "images": 24}) as noted:
        vae.train_vae(load(TrainVAE, None, [*VAE, *HERE, *places, STAGES]))
        assert noted.started[1] == {"resume": True}
        places = ["root=runs", "cache=cache", "vae=model"]
        ldm.train_ldm(load(TrainLDM, None, [*LDM, *HERE, *places, "images=24"]))
        assert noted.started[1] == {"resume": True}
    load_autoencoder(old / "runs/vae/model")
    loaded = load_ldm(old / "runs/ldm/model")
    assert loaded.classes == 2
