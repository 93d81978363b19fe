"""Run the whole pipeline in minutes on the photos that come with scikit-image (`make demo`).

Held-out squares of the photos (a face, a cat, a cup ...) become the validation images. Training tiles are cut so that
they do not touch these squares, so no pixel of a validation image is trained on. Then every job runs with its `demo`
preset, as a user would run it.
"""

import json
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from litevae import storage
from litevae.errors import UserError, redact
from pipelines.diagnostics.config import Demo
from pipelines.encoding.config import Encode
from pipelines.evaluation.config import Evaluate, Sample
from pipelines.runtime import cluster, mlflow_run, paths, progress, tables
from pipelines.runtime.cli import load
from pipelines.runtime.commands import command
from pipelines.runtime.estimate import duration
from pipelines.runtime.schema import ConfigT
from pipelines.training.config import TrainLDM, TrainVAE

# For each photo its held-out squares: left, top and side in pixels.
HELD_OUT: dict[str, list[tuple[int, int, int]]] = {
    "astronaut.png": [(145, 5, 165), (370, 5, 130)],
    "chelsea.png": [(125, 20, 210)],
    "coffee.png": [(160, 0, 260)],
    "rocket.jpg": [(255, 110, 140)],
    "motorcycle_left.png": [(330, 150, 200)],
    "camera.png": [(150, 50, 180)],
    "coins.png": [(170, 100, 120)],
    "retina.jpg": [(60, 500, 300)],
    "ihc.png": [(240, 330, 170)],
    "hubble_deep_field.jpg": [(600, 400, 200)],
    "grass.png": [],
    "gravel.png": [],
    "brick.png": [],
    "moon.png": [],
}
TILES = 2000
TILE = 96  # side in pixels; training uses crops of 64 pixels


def demo(config: Demo) -> dict[str, Any]:
    """Run every job in `config.root`, and print a report. A second call resumes where the first one stopped.

    Returns:
        The result of each job by name, and "seconds" in all.
    """
    from pipelines.encoding import encode
    from pipelines.evaluation.reconstruction import evaluate
    from pipelines.evaluation.sample import sample
    from pipelines.training.ldm import train_ldm
    from pipelines.training.vae import train_vae

    started = time.monotonic()
    root = Path(paths.output_path("root", config.root))
    train, held_out = (cut_photos(root / "photos") / split for split in ("train", "val"))
    mlflow_run.check(config)
    gpu = cluster.start(config.ray).gpu
    preset = config.preset or ("demo-gpu" if gpu else "demo")
    common = [f"root={root}"]
    for section in ("ray", "tracking"):
        for name, value in getattr(config, section).model_dump(mode="json", exclude_defaults=True).items():
            common.append(f"{section}.{name}={value if isinstance(value, str) else json.dumps(value)}")

    def run(job: str, cls: type[ConfigT], call: Callable[[ConfigT], dict[str, Any]], *overrides: str) -> dict[str, Any]:
        words = [*overrides, *common]
        print(f"\n$ {command(job)} --config {preset} {redact(shlex.join(words))}", flush=True)
        return call(load(cls, preset, words))

    vae, cache, ldm = f"model={root}/vae/model", f"{root}/cache", f"model={root}/ldm/model"
    data = f"data.train.uri={train}", f"data.val.uri={held_out}"
    done = {
        "train_vae": run("train_vae", TrainVAE, train_vae, *data),
        "encode": run("encode_dataset", Encode, encode.run, f"source.uri={train}", vae, f"out={cache}"),
        "train_ldm": run("train_ldm", TrainLDM, train_ldm, f"cache={cache}"),
        "sample": run("sample", Sample, sample, ldm, f"out={root}/samples"),
        "evaluate": run(
            *("evaluate", Evaluate, evaluate, vae),
            *(f"source.uri={held_out}", f"out={root}/evaluation", "overwrite=true"),
        ),
        "seconds": time.monotonic() - started,
    }
    shutil.copyfile(root / "evaluation" / "reconstructions.png", root / "reconstructions.png")
    shutil.copyfile(root / "samples" / "grid.png", root / "samples.png")
    print(_report(done, root))
    return done


def _report(done: dict[str, Any], root: Path) -> str:
    """Return the demo's final report: what was made and where to look, how good it is, and how fast it was."""

    def rate(value: float) -> str:
        return f"{progress.rounded(value)} images/s" if value else "done before"

    judged, speed = done["evaluate"], done["evaluate"]["images_per_s"]
    ours, bicubic = judged["reconstruction"], judged["bicubic"]
    quality = [
        ["photos that were held out", "LiteVAE", "bicubic by 8"],
        ["PSNR (dB), higher is better", f"{ours['psnr']:.2f}", f"{bicubic['psnr']:.2f}"],
        ["SSIM, higher is better", f"{ours['ssim']:.3f}", f"{bicubic['ssim']:.3f}"],
    ]
    parameters = judged["parameters"]
    stages = [
        ["stage", "speed", "parameters"],
        ["train the autoencoder", rate(done["train_vae"]["images_per_second"]), f"{sum(parameters.values()):,}"],
        ["encode into the cache", rate(done["encode"]["images_per_s"]), ""],
        [
            "train the diffusion model",
            rate(done["train_ldm"]["images_per_second"]),
            f"{done['train_ldm']['parameters']:,}",
        ],
        ["sample", rate(done["sample"]["images_per_s"]), ""],
        ["encoder alone", rate(speed["encoder"]), f"{parameters['encoder']:,}"],
        ["decoder alone", rate(speed["decoder"]), f"{parameters['decoder']:,}"],
    ]
    shown = "\n\n".join(tables.fitted(rows) for rows in (quality, stages))
    return (
        f"\nThe demo is done, in {duration(done['seconds'])}. Look at these two pictures first:\n\n"
        f"  {root}/reconstructions.png\n"
        f"      photos that were not trained on: the original, what LiteVAE makes of it, its latent, the error\n"
        f"  {root}/samples.png\n"
        f"      new images from the diffusion model: colours and textures of the photos, after so short a training\n\n"
        f"{shown}\n\n"
        f"models   {root}/vae/model and {root}/ldm/model\n"
        f"latents  {root}/cache, {done['encode']['bits_per_pixel']:.2f} bits per pixel (an image in 8 bits has 24)\n"
        f"runs     {judged['run']}"
    )


def cut_photos(folder: Path) -> Path:
    """Cut the photos into PNG files in train/<photo>/ and val/<photo>/, the same files on every machine.

    Args:
        folder: where train/ and val/ are made.

    Returns:
        `folder`.

    Raises:
        UserError: if scikit-image is not installed.
    """
    done = folder / "cut.json"
    if done.is_file():
        return folder
    from PIL import Image

    shipped = _shipped_photos()
    draw = np.random.default_rng(0)
    for name, held_out in HELD_OUT.items():
        with Image.open(shipped / name) as image:
            photo = image.convert("RGB")
        stem = name.partition(".")[0]
        for split in ("train", "val"):
            (folder / split / stem).mkdir(parents=True, exist_ok=True)
        for n, (left, top, side) in enumerate(held_out):
            photo.crop((left, top, left + side, top + side)).save(folder / "val" / stem / f"{n}.png")
        if not held_out:
            (folder / "val" / stem).rmdir()
        for n in range(TILES // len(HELD_OUT)):
            box = _free_square(draw, photo.size, held_out)
            tile = photo.resize((TILE, TILE), Image.Resampling.BICUBIC, box=box)
            tile.save(folder / "train" / stem / f"{n:04d}.png", compress_level=1)
    storage.put(str(done), json.dumps({"tiles": TILES // len(HELD_OUT) * len(HELD_OUT), "tile": TILE}).encode())
    return folder


def _shipped_photos() -> Path:
    """Return the folder of the photos in the installed scikit-image."""
    from importlib.util import find_spec

    package = find_spec("skimage")
    if package is None or package.origin is None:
        raise UserError("the demo needs the photos of scikit-image: pip install scikit-image")
    return Path(package.origin).parent / "data"


def _free_square(
    draw: np.random.Generator, size: tuple[int, int], held_out: list[tuple[int, int, int]]
) -> tuple[int, int, int, int]:
    """Draw a random square (left, top, right, bottom) that overlaps no held-out square.

    The logarithm of its side is uniform, so small squares are as likely as large ones. Squares that overlap a held-out
    one are drawn again.

    Args:
        draw: the random generator.
        size: width and height of the photo in pixels.
        held_out: left, top and side of each held-out square.
    """
    while True:
        side = int(np.exp(draw.uniform(np.log(0.75 * TILE), np.log(min(size)))))
        left, top = (int(draw.integers(0, length - side + 1)) for length in size)
        if all(left + side <= x or x + s <= left or top + side <= y or y + s <= top for x, y, s in held_out):
            return left, top, left + side, top + side
