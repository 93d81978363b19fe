"""Images from a latent diffusion model, drawn by a pool of workers.

Image i of a job depends on (seed, i) alone: its noise is its own, and batches are cut by number and always full, so
that it comes out bit for bit the same whatever the number of workers or of images. Another batch size, or device,
changes the order of sums within a convolution, and with it single pixels by a level.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from litevae.diffusion import check_steps, load_ldm
from litevae.errors import UserError
from litevae.images import to_uint8
from litevae.pictures import grid
from litevae.precision import autocast
from pipelines import cluster, config, outputs, tracking
from pipelines.actors import pool, spread
from pipelines.training import Progress

GRID = 64  # the first so many images, in rows of 8


def sample(cfg: config.Sample) -> dict[str, Any]:
    """Leave 000000.png ..., grid.png and samples.json in `cfg.out`. Returns samples.json.

    Raises:
        UserError: bad config or model; `cfg.out` holds images of a larger job, which would be mixed with these.
    """
    out = cluster.output_path("out", cfg.out)
    if not cfg.model:
        raise UserError("model is empty; give the folder of a latent diffusion model: model=runs/ldm/model")
    check_steps(load_ldm(cfg.model).scheduler, cfg.steps)
    if os.path.exists(os.path.join(out, _name(cfg.images))):
        raise UserError(
            f"out={out} holds more than images={cfg.images}, from another job; empty it or take another folder"
        )
    cfg = cfg.model_copy(update={"model": os.path.abspath(cfg.model)})

    share = cluster.start(cfg.ray)
    os.makedirs(out, exist_ok=True)
    name = os.path.basename(out)
    run = tracking.start_run(cfg.tracking, cfg.root, "sample", name, cfg.model_dump(mode="json"), out, resume=False)
    tracker = tracking.Tracker(run)
    status: tracking.Status = "FAILED"
    try:
        actors = pool(Sampler, share, cfg, share)
        started = time.monotonic()
        for number, image in _draw(cfg, actors):
            outputs.write(os.path.join(out, _name(number)), image)
        seconds = time.monotonic() - started
        first = [_pixels(os.path.join(out, _name(number))) for number in range(min(cfg.images, GRID))]
        picture = grid(np.stack(first), columns=8)
        outputs.write(os.path.join(out, "grid.png"), outputs.png(picture))
        summary: dict[str, Any] = {
            "model": cfg.model,
            "images": cfg.images,
            "sampler": {"name": "DDIM", "steps": cfg.steps, "eta": cfg.eta, "seed": cfg.seed},
            "batch_size": cfg.batch_size,
            "images_per_s": cfg.images / seconds,
            "run": tracking.link(run),
        }
        outputs.write(os.path.join(out, "samples.json"), json.dumps(summary, indent=2).encode() + b"\n")
        tracker.metrics({"sample/images_per_s": summary["images_per_s"]}, step=0)
        tracker.image("samples", picture, step=0)
        status = "FINISHED"
    finally:
        tracker.close(status)
    print(
        f"{cfg.images} images, {summary['images_per_s']:.2f} a second, {cfg.steps} DDIM steps\n"
        f"images    {out}/{_name(0)} ...\npicture   {out}/grid.png\nrun       {summary['run']}"
    )
    return summary


def _draw(cfg: config.Sample, actors: list[Any]) -> Iterator[tuple[int, bytes]]:
    """(number, PNG), in order."""
    batches = [range(start, start + cfg.batch_size) for start in range(0, cfg.images, cfg.batch_size)]
    drawn = spread(actors, lambda actor, batch: actor.draw.remote(batch), batches)
    progress = Progress("sample", cfg.images, 0, sys.stderr.isatty())
    for batch, images in zip(batches, drawn, strict=True):
        wanted = range(batch.start, min(batch.stop, cfg.images))  # the last batch is a full one too
        yield from zip(wanted, images, strict=False)
        progress.update(wanted.stop)
    progress.close()


class Sampler:
    """A worker: the model on one device."""

    def __init__(self, cfg: config.Sample, share: cluster.Share):
        torch.set_num_threads(share.threads)
        self.cfg, self.device = cfg, torch.device("cuda" if share.gpu else "cpu")
        self.ldm = load_ldm(cfg.model).to(self.device)

    def draw(self, numbers: range) -> list[bytes]:
        """The images of these numbers as PNG."""
        seeds = [(self.cfg.seed, number) for number in numbers]
        with autocast(self.device, self.cfg.precision):
            images = self.ldm.sample(seeds, self.cfg.steps, self.cfg.eta)
        if not images.isfinite().all():
            raise UserError(f"{self.cfg.model} draws NaN or infinite pixels: its training has diverged")
        return [outputs.png(image) for image in to_uint8(images)]


def _name(number: int) -> str:
    return f"{number:06d}.png"


def _pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)
