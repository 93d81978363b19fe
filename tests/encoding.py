"""What the tests of the cache jobs share: photos, small models, and the jobs themselves."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from skimage import data as photos

from litevae import storage
from litevae.any_autoencoder import load_autoencoder
from litevae.autoencoder import LiteVAE
from litevae.images import ImageTransform
from litevae.latents import encode_latents
from litevae.shards import latent_layout
from pipelines.data.config import Views
from pipelines.encoding import encode, encoder, plan
from pipelines.encoding.config import Encode
from pipelines.encoding.encode import encode_dataset
from pipelines.encoding.plan import CachePlan, PlannedModel, PlanSettings
from pipelines.runtime.cli import load
from pipelines.runtime.schema import validate
from tests.in_process import in_process

SIDE = 32
MANY = ("rows_per_shard=1",)  # many shards, so that a kill happens in the middle
JOB = Path(__file__).parents[1] / "jobs" / "encode_dataset.py"
BAD = {"cats/empty.jpg": "empty", "cats/zcut.png": "corrupt", "dogs/text.jpg": "not_an_image"}


def save_model(folder, seed=0, change=lambda model: None):
    torch.manual_seed(seed)
    model = LiteVAE("S", latent_channels=4, levels=(3,), block_out_channels=(8, 8, 8, 8), layers_per_block=1)
    change(model)
    model.save_pretrained(folder)
    return str(folder)


def jobs_are_quick(loaded, monkeypatch) -> None:
    """Let all jobs of a test use this loaded model, and leave what they used to Python's own collection."""
    for module in (encoder, plan):
        monkeypatch.setattr(module, "load_autoencoder", lambda folder: loaded)
    monkeypatch.setattr(encode, "gc", SimpleNamespace(collect=lambda: 0))


def cache_plan(**fields) -> CachePlan:
    """Return a plan with these fields; the others have arbitrary values."""
    given = {
        "model": PlannedModel("/m", "f", {}), "transform": {}, "latents": latent_layout("moments", "float16"),
        "precision": "fp32", "compile": False, "columns": {}, "rows_per_shard": 8, "source": {},
        "settings": plan_settings(),
    }  # fmt: skip
    return CachePlan(**given | fields)


def plan_settings(**fields) -> PlanSettings:
    given = {"source": {}, "batch_size": 4, "error_budget": 0.01, "transform": Views().model_dump(mode="json")}
    return PlanSettings(**given | fields)


def crops(count):
    pictures = [photos.astronaut(), photos.chelsea(), photos.coffee()]
    for n in range(count):
        picture = pictures[n % 3]
        y, x = 7 * n % (picture.shape[0] - 60), 11 * n % (picture.shape[1] - 60)
        yield Image.fromarray(picture[y : y + 40 + n % 10, x : x + 60])


def photo_folder(root, count=45):
    """Write photos of two classes, and the three unreadable files of `BAD`, into a folder; return the folder."""
    for name in ("cats", "dogs"):
        (root / name).mkdir()
    for n, photo in enumerate(crops(count)):
        photo.save(root / ("cats" if n % 2 else "dogs") / f"{n:03d}.png")
    (root / "cats/empty.jpg").touch()
    (root / "dogs/text.jpg").write_text("not an image at all")
    whole = (root / "cats/001.png").read_bytes()
    (root / "cats/zcut.png").write_bytes(whole[: len(whole) // 2])
    return root


def encoded_crops(root, rows_per_shard):
    """Encode 24 photos of 64 px in two classes; return the cache, the model folder and the folder of photos."""
    for n, left in enumerate(range(0, 480, 20)):
        folder = root / "photos" / "ab"[n % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photos.coffee()[left // 2 : left // 2 + 64, left : left + 64]).save(folder / f"{n:02}.png")
    torch.manual_seed(0)
    LiteVAE("S", levels=(3,), block_out_channels=(8, 8, 8, 8), layers_per_block=1).save_pretrained(root / "vae")
    values = {
        "source": {"uri": str(root / "photos")}, "model": str(root / "vae"), "out": str(root / "cache"),
        "root": str(root), "transform": {"resolution": 64}, "precision": "fp32", "rows_per_shard": rows_per_shard,
        "ray": {"gpu": False, "cpus_per_worker": 1}, "tracking": {"enabled": False},
    }  # fmt: skip
    with in_process():
        encode_dataset(validate(Encode, values))
    return root / "cache", root / "vae", root / "photos"


def arguments(source, model, out, *more):
    root = f"root={out}-runs" if not storage.is_remote(str(out)) else f"root={os.path.dirname(model)}/s3-runs"
    common = ["tracking.enabled=false", "ray.gpu=false", "ray.cpus_per_worker=1", "error_budget=0.1", root]
    sizes = [f"transform.resolution={SIDE}", "rows_per_shard=8", "batch_size=5", "precision=fp32"]
    return [f"source.uri={source}", f"model={model}", f"out={out}", *common, *sizes, *more]


def config(source, model, out, *more):
    return load(Encode, None, arguments(source, model, out, *more))


def shard_bytes(out):
    out = str(out)
    manifest = json.loads(storage.read(storage.join(out, "manifest.json")))
    return [storage.read(storage.join(out, shard["file"])) if shard["rows"] else b"" for shard in manifest["shards"]]


def moments_by_hand(model, data, transform=None):
    """Return what `encode_latents` gives for each view of an image, as a list."""
    images = [image.pixels for image in (transform or ImageTransform(SIDE, decode="fast")).all(data, 0)]
    vae = load_autoencoder(model)
    with torch.no_grad():
        return [encode_latents(vae, torch.tensor(p).permute(2, 0, 1)[None] / 127.5 - 1)[0] for p in images]


def start_job(source, model, out, *more, **options):
    """Start `python jobs/encode_dataset.py` as a process."""
    command = [sys.executable, str(JOB), *arguments(source, model, out, *more)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | options
    return subprocess.Popen(command, **options)
