"""Validation of train_vae: PSNR, SSIM and a picture of reconstructions."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from litevae import metrics
from litevae.images import ImageError, ImageTransform, to_tensor
from litevae.pictures import reconstruction_picture
from litevae.precision import autocast, chosen
from pipelines.data.config import Transform
from pipelines.data.source import Source
from pipelines.runtime.logs import say
from pipelines.training import compiling, ranks
from pipelines.training.config import TrainVAE
from pipelines.training.step_metrics import validation_text

PICTURES = 8  # validation images in the picture of a validation
QUALITY = {"psnr": metrics.psnr, "ssim": metrics.ssim}


def described(images: int, resolution: int) -> str:
    """Return what validation measures, for people, such as "64 images at 128 px"."""
    return f"{images:,} image{'s' if images != 1 else ''} at {resolution} px"


def closing_lines(config: TrainVAE, source: Source | None, metrics: Mapping[str, Any]) -> list[str]:
    """Return the lines about validation with which a run ends: the metrics, and what an evaluation does otherwise.

    Args:
        config: the run's config.
        source: the validation source; None: no validation.
        metrics: the run's last metrics.
    """
    names = ("latent_r2", "psnr", "ssim", "teacher_psnr", "teacher_ssim")
    numbers = {name: metrics[name] for name in names if name in metrics}
    if source is None or not numbers:
        return []
    resolution, images = config.stages[-1].resolution, min(config.val_images, source.units)
    text = validation_text(numbers, f"{described(images, resolution)}, {_cut(config)}")
    other = [f"transform.resolution={resolution}"]
    other += ["transform.resize=none"] * (config.data.resize == "none")
    other += [f"images={images}"] * (images < source.units)
    other += [f"precision={config.loop.precision}"] * (config.loop.precision != "fp32")
    return [
        text,
        f"jobs/evaluate.py takes all images, resized to {Transform().resolution} px, in fp32; it measures the same "
        f"with {' '.join(other)}",
    ]


def _cut(config: TrainVAE) -> str:
    """Return how images are brought to the resolution, for people."""
    return "resized and cropped" if config.data.resize == "shorter" else "cropped, not resized"


class Validation:
    """Validation on the first images of the validation source, centre-cropped and divided among the ranks.

    Metrics are means over all of these images, not means of the ranks' means. Unreadable images are skipped.

    Args:
        source: the validation source; None: no validation.
        config: the run's config.
        resolution: side of the images in pixels.
        rank, world: this rank takes the images rank, rank + world, ...
    """

    _whose: ClassVar[tuple[str, ...]] = ("",)  # prefixes of the metrics of each reconstruction

    def __init__(self, source: Source | None, config: TrainVAE, resolution: int, rank: int, world: int):
        self.images = min(config.val_images, source.units) if source is not None else 0
        self._batch = max(1, config.stages[-1].batch_size // world)
        self._precision, self._compile = config.loop.precision, config.loop.compile
        self._world, self._cut, self._resolution = world, _cut(config), resolution
        transform = ImageTransform(resolution, config.data.resize, max_pixels=config.data.max_pixels)
        pixels = []
        for unit in range(rank, self.images, world):
            assert source is not None
            try:
                pixels.append(transform(source.data(unit)).pixels)
            except ImageError as error:
                say(f"skipped unreadable validation image {source.id(unit)} ({error.reason}: {error})", "WARNING")
        self._pixels = np.stack(pixels) if pixels else np.empty((0, resolution, resolution, 3), np.uint8)

    def measured(self, device: torch.device) -> str:
        """Return what the metrics are measured on and how, for people."""
        how = f"{self._cut} in the middle, decoded from the mean in {chosen(device, self._precision)}"
        return f"the first {described(self.images, self._resolution)}, {how}"

    @torch.no_grad()
    def run(self, model: Any, averaged: AbstractContextManager[None]) -> tuple[dict[str, float], np.ndarray | None]:
        """Reconstruct the images from the posterior's mode. All ranks must call this together.

        Args:
            model: the autoencoder in training mode, to which it returns.
            averaged: context in which the model has the weights to validate.

        Returns:
            `psnr` and `ssim` over all ranks, and a picture of this rank's first images, or None if it has no images.
        """
        values: dict[str, list[float]] = {f"{who}{name}": [] for who in self._whose for name in QUALITY}
        shown: list[list[Tensor]] = [[], [], []]
        model.eval()
        with averaged, compiling.uncompiled():
            for start in range(0, len(self._pixels), self._batch):
                pixels = torch.from_numpy(self._pixels[start : start + self._batch]).to(model.device)
                x = to_tensor(pixels, compiling.memory_format(model.device, self._compile))
                reconstructions, latents = self._reconstruct(model, x)
                for who, images in zip(self._whose, reconstructions, strict=True):
                    for name, measure in QUALITY.items():
                        values[f"{who}{name}"] += measure(images, x).tolist()
                if start < PICTURES:
                    for column, tensor in zip(shown, (x, reconstructions[0], latents), strict=True):
                        column.append(tensor[: PICTURES - start])
        model.train()
        means = {}
        everywhere = ranks.gathered([values], self._world)
        for name in values:
            mean = metrics.Mean()
            for part in everywhere:
                mean.add(torch.tensor(part[name], dtype=torch.float64))
            means[name] = mean.value()
        return means, reconstruction_picture(*map(torch.cat, shown)) if shown[0] else None

    def _reconstruct(self, model: Any, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return reconstructions of a batch in fp32, one for each of `_whose`, and the latents to show."""
        with autocast(model.device, self._precision):
            posterior = model.encode(x).latent_dist
            reconstruction = model.decode(posterior.mode()).sample
        return [reconstruction.float()], posterior.mode().float()
