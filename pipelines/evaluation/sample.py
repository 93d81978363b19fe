"""Draw images from a latent diffusion model with a pool of workers.

Image i of a job depends only on (seed, i). Each image has its own noise, and batches are cut by image number and are
always full. So an image is the same bit for bit for any number of workers or of images, and however often the job was
killed. A different batch size, device, or number of threads of a worker (`ray.cpus_per_worker`) changes the order of
sums within a convolution, and so changes single pixels by one level.

    out/sampling.json   what decides each pixel; written first, so that no other job continues with these images
    out/png/            000000.png ..., or
    out/parquet/        part-000000.parquet ...; these folders hold nothing else, so they can be a source of images
    out/grid.png        the first images
    out/samples.json    written last

A file is either complete or absent, and images that exist are not drawn again.
"""

import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import islice, repeat
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from litevae import storage
from litevae.errors import UserError
from litevae.images import to_uint8
from litevae.ldm import LDM, ldm_fingerprint, load_ldm
from litevae.pictures import grid, png
from litevae.precision import autocast
from litevae.sampling import SAMPLERS, label_numbers, sampler_of
from pipelines.evaluation import config, first_look
from pipelines.runtime import cluster, mlflow_run, paths
from pipelines.runtime.actor_pool import pool, spread
from pipelines.runtime.progress import Progress

GRID = 64  # number of images in grid.png, in rows of 8
ROW_GROUP = 128  # images per row group of a Parquet file
WRITERS = 16  # files written at a time

# The layout that Hugging Face uses for images, so that its datasets library returns images and not bytes.
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "label": pa.int64(),
        "seed": pa.int64(),
        "number": pa.int64(),
    },
    metadata={"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})},
)


class Piece(NamedTuple):
    """A file to write: its path, and the numbers of the images in it."""

    path: str
    numbers: range


@dataclass(frozen=True)
class SamplingPlan:
    """Everything that decides the bytes of an image, as sampling.json holds it.

    Attributes:
        model: fingerprint of the model folder.
        shard: images in a Parquet file; None for PNG files.
    """

    model: str
    sampler: str
    steps: int
    eta: float
    guidance: float
    seed: int
    batch_size: int
    precision: str
    format: str
    classes: list[int]
    shard: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the values of sampling.json; `shard` is there only for Parquet files."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def sample(cfg: config.Sample) -> dict[str, Any]:
    """Draw the images that are not in `cfg.out` yet, and write grid.png and samples.json there.

    Returns:
        The content of samples.json.

    Raises:
        UserError: if the config or the model is wrong, or if `cfg.out` holds images of another job, or more than are
            asked for.
    """
    out = first_look.sample(cfg)
    plan = _plan(cfg, load_ldm(cfg.model))
    cfg = cfg.model_copy(update={"model": os.path.abspath(cfg.model), "sampler": plan.sampler, "classes": plan.classes})
    pieces = _pieces(cfg, out)
    missing = _missing(pieces, plan, out)

    mlflow_run.check(cfg)
    placement = cluster.start(cfg.ray)
    paths.check_folders({"out": out}, {"model": cfg.model})
    storage.put_new(storage.join(out, "sampling.json"), _json(plan.to_json()))
    _check_plan(plan, out)  # another job may have written it first
    storage.remove(storage.join(out, "samples.json"))
    name = os.path.basename(out)
    folder = os.path.join(os.path.abspath(cfg.root), name) if storage.is_remote(out) else out
    with mlflow_run.tracked_run(cfg, "sample", name, folder) as (tracker, run):
        drawn = sum(len(piece.numbers) for piece in missing)
        started = time.monotonic()
        if missing:
            actors = pool(Sampler, placement, cfg, placement, plan.model)
            started = time.monotonic()
            _draw(cfg, actors, missing)
        seconds = time.monotonic() - started
        picture = grid(np.stack([*_first(pieces, min(cfg.images, GRID))]), columns=8)
        storage.put(storage.join(out, "grid.png"), png(picture))
        summary: dict[str, Any] = {
            **plan.to_json(),
            "model": cfg.model,
            "fingerprint": plan.model,
            "images": cfg.images,
            "drawn": drawn,
            "images_per_s": drawn / seconds if drawn else 0.0,
            "run": mlflow_run.link(run),
        }
        storage.put(storage.join(out, "samples.json"), _json(summary))
        tracker.metrics({"sample/images_per_s": summary["images_per_s"]}, step=0)
        tracker.image("samples", picture, step=0)
    before = f"{cfg.images - drawn} of them drawn before" if drawn < cfg.images else "all drawn now"
    print(
        f"{cfg.images} images, {before}, {summary['images_per_s']:.2f} a second, {cfg.steps} {cfg.sampler} steps\n"
        f"images    {os.path.dirname(pieces[0].path)}\npicture   {storage.join(out, 'grid.png')}\n"
        f"run       {summary['run']}"
    )
    return summary


# --- what is to be drawn, and what is there -----------------------------------------------------------------------


def _plan(cfg: config.Sample, ldm: LDM) -> SamplingPlan:
    """Return everything that decides the bytes of an image.

    Raises:
        UserError: if the model can't be sampled with these settings.
    """
    sampler = "" if cfg.sampler == "auto" else cfg.sampler
    sampler_of(ldm.scheduler, sampler, cfg.steps, cfg.eta)
    classes = cfg.classes or [*range(ldm.classes)]
    label_numbers(classes or None, ldm.classes, len(classes), cfg.guidance)
    return SamplingPlan(
        model=ldm_fingerprint(cfg.model),
        sampler=sampler or SAMPLERS[ldm.scheduler.config.prediction_type][0],
        steps=cfg.steps,
        eta=cfg.eta,
        guidance=cfg.guidance,
        seed=cfg.seed,
        batch_size=cfg.batch_size,
        precision=cfg.precision,
        format=cfg.format,
        classes=classes,
        shard=cfg.shard if cfg.format == "parquet" else None,
    )


def _pieces(cfg: config.Sample, out: str) -> list[Piece]:
    """Return all files of a job, in the order of image numbers."""
    folder = storage.join(out, cfg.format)
    if cfg.format == "png":
        return [Piece(storage.join(folder, f"{n:06d}.png"), range(n, n + 1)) for n in range(cfg.images)]
    parts = [range(start, min(start + cfg.shard, cfg.images)) for start in range(0, cfg.images, cfg.shard)]
    return [Piece(storage.join(folder, f"part-{n:06d}.parquet"), part) for n, part in enumerate(parts)]


def _check_plan(plan: SamplingPlan, out: str) -> bool:
    """Return whether this job has run in `out` before.

    Raises:
        UserError: if another job has run there.
    """
    path, job = storage.join(out, "sampling.json"), plan.to_json()
    try:
        before = json.loads(storage.read(path))
        differs = [name for name in before.keys() | job.keys() if before.get(name) != job.get(name)]
    except FileNotFoundError:
        return False
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); take another folder") from None
    if differs:
        lines = [f"  {name}: {before.get(name)} there, {job.get(name)} asked for" for name in sorted(differs)]
        raise UserError(
            f"out={out} holds images that were drawn with other settings; empty it or take another folder\n"
            + "\n".join(lines)
        )
    return True


def _missing(pieces: Sequence[Piece], plan: SamplingPlan, out: str) -> list[Piece]:
    """Return the files that have to be drawn, in the order of image numbers.

    Raises:
        UserError: see `sample`.
    """
    folder = os.path.dirname(pieces[0].path)
    there = [name for name in storage.names(folder) if re.search(r"\d{6,}\.(png|parquet)$", name)]
    if not _check_plan(plan, out) and there:
        raise UserError(f"out={out} holds images but no sampling.json that says what they are; take another folder")
    by_name = {os.path.basename(piece.path): piece for piece in pieces}
    missing = [by_name[name] for name in by_name.keys() - set(there)]
    more = [name for name in there if name not in by_name]
    # Only the last part can be from a run that asked for fewer images, or for more.
    last = by_name.get(there[-1]) if there and plan.format == "parquet" else None
    if last is not None:
        try:
            rows = storage.read_footer(last.path).num_rows
        except (OSError, pa.ArrowException):  # damaged
            rows = 0
        more += [there[-1]] * (rows > len(last.numbers))
        missing += [last] * (rows < len(last.numbers))
    if more:
        raise UserError(
            f"out={out} holds more images than images={pieces[-1].numbers.stop}, e.g. in {more[-1]}; raise images, "
            f"empty the folder or take another one"
        )
    return sorted(missing, key=lambda piece: piece.numbers.start)


# --- drawing ------------------------------------------------------------------------------------------------------


def _draw(cfg: config.Sample, actors: list[Any], missing: Sequence[Piece]) -> None:
    """Draw the batches that these files need, and write each file as soon as all its images are drawn."""
    size = cfg.batch_size
    needed = sorted({number // size for piece in missing for number in piece.numbers})
    batches = [range(n * size, (n + 1) * size) for n in needed]  # the last batch is full too
    drawn = spread(actors, lambda actor, batch: actor.draw.remote(batch), batches)
    waiting, held = deque(missing), dict[int, bytes]()
    done = cfg.images - sum(len(piece.numbers) for piece in missing)
    progress = Progress("sample", cfg.images, done, sys.stderr.isatty())
    # Parquet parts are written one after the other, so that only the last one that exists can be incomplete.
    with ThreadPoolExecutor(WRITERS if cfg.format == "png" else 1) as writers:
        for batch, images in zip(batches, drawn, strict=True):
            held |= dict(zip(batch, images, strict=True))
            complete = []
            while waiting and waiting[0].numbers.stop <= batch.stop:
                complete.append(waiting.popleft())
            files = [_file(cfg, piece, held) for piece in complete]
            list(writers.map(storage.put, [piece.path for piece in complete], files))
            done += sum(len(piece.numbers) for piece in complete)
            held = {n: image for n, image in held.items() if waiting and n >= waiting[0].numbers.start}
            progress.update(done)
    progress.close()


def _file(cfg: config.Sample, piece: Piece, images: dict[int, bytes]) -> bytes:
    """Return the content of a file, made from PNG images by number."""
    if cfg.format == "png":
        return images[piece.numbers.start]
    rows = [
        {
            "id": f"{number:06d}",
            "image": {"bytes": images[number], "path": f"{number:06d}.png"},
            "label": label,
            "seed": cfg.seed,
            "number": number,
        }
        for number, label in zip(piece.numbers, _labels(cfg, piece.numbers) or repeat(None), strict=False)
    ]
    table = pa.Table.from_pylist(rows, SCHEMA)
    sink = pa.BufferOutputStream()  # compression would not make PNG smaller
    pq.write_table(table, sink, ROW_GROUP, compression="none", use_dictionary=["label"], write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def _first(pieces: Sequence[Piece], count: int) -> Iterator[np.ndarray]:
    """Yield the pixels of the first `count` images, read from the files."""
    stored = (image for piece in pieces for image in _images(piece.path))
    for data in islice(stored, count):
        yield np.asarray(Image.open(BytesIO(data)))


def _images(path: str) -> Iterator[bytes]:
    if path.endswith(".png"):
        yield storage.read(path)
        return
    footer = storage.read_footer(path)
    for group in range(footer.num_row_groups):
        rows = storage.read_row_group(path, footer, group, ["image"])["image"].to_pylist()
        yield from (row["bytes"] for row in rows)


def _labels(cfg: config.Sample, numbers: range) -> list[int] | None:
    """Return the class of each image, or None for an unconditional model."""
    return [cfg.classes[number % len(cfg.classes)] for number in numbers] if cfg.classes else None


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


class Sampler:
    """A Ray actor that holds the model on one device.

    Args:
        cfg: the config.
        placement: the resources of the worker.
        fingerprint: `ldm_fingerprint` of the model on the driver.

    Raises:
        UserError: if the model on its node is not that of the driver.
    """

    def __init__(self, cfg: config.Sample, placement: cluster.Placement, fingerprint: str):
        torch.set_num_threads(placement.threads)
        if ldm_fingerprint(cfg.model) != fingerprint:
            raise UserError(f"{cfg.model} is not the same model here as where the job was started")
        self.cfg, self.device = cfg, torch.device("cuda" if placement.gpu else "cpu")
        self.ldm = load_ldm(cfg.model).to(self.device)
        self.encoders = ThreadPoolExecutor(placement.threads)

    def draw(self, numbers: range) -> list[bytes]:
        """Draw the images with these numbers, and return them as PNG files.

        Raises:
            UserError: if pixels are NaN or infinite.
        """
        cfg = self.cfg
        with autocast(self.device, cfg.precision):
            images = self.ldm.sample(
                [(cfg.seed, number) for number in numbers],
                steps=cfg.steps,
                sampler=cfg.sampler,
                eta=cfg.eta,
                labels=_labels(cfg, numbers),
                guidance=cfg.guidance,
            )
        if not images.isfinite().all():
            raise UserError(f"{cfg.model} draws NaN or infinite pixels: its training has diverged")
        return list(self.encoders.map(png, to_uint8(images)))
