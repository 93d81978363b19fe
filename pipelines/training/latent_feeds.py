"""Feeds that give a diffusion model its latents, from a cache or from images that are encoded when needed."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litevae.any_autoencoder import fingerprint, load_autoencoder
from litevae.cache import LatentCache, sample_posteriors
from litevae.commits import divisor, latent_statistics, mean_and_std
from litevae.denoiser import null_class
from litevae.errors import UserError
from litevae.images import ImageError, ImageTransform, to_tensor
from litevae.inference import best_kernels, prepare_for_inference
from litevae.latents import encode_latents, latent_content
from litevae.loader import LatentLoader, stream
from litevae.order import VERSION, batch_positions
from litevae.precision import autocast
from pipelines.data.source import Source
from pipelines.encoding import encoder
from pipelines.training import ranks
from pipelines.training.config import TrainLDM
from pipelines.training.image_feed import Images
from pipelines.training.worker_setup import LdmSetup

CHUNK = 32  # images per forward pass of the encoder


@dataclass(frozen=True)
class LatentBatch:
    """This rank's part of a global batch of n images.

    Attributes:
        positions: places of the images in the run's endless order.
        labels: as `labels_of` returns them.
        latents: raw latents (n, C, h, w), drawn but not normalised, of a feed that has them.
        pixels: uint8 (n, H, W, 3), of a feed that encodes them when they are needed.
        rows: (epoch, id) of each image of such a feed.
        noise, u: see `litevae.diffusion.random_numbers`; a feed leaves them to the training task.
    """

    positions: Sequence[int]
    labels: Tensor | None = None
    latents: Tensor | None = None
    pixels: np.ndarray | None = None
    rows: Sequence[tuple[int, str]] | None = None
    noise: Tensor | None = None
    u: Tensor | None = None


def training_transform(config: TrainLDM) -> ImageTransform:
    """Return the image transform for training that `config.data` describes."""
    data = config.data
    return ImageTransform(
        data.resolution, data.resize, data.crop, data.flip, decode=data.decode, max_pixels=data.max_pixels
    )


def labels_of(values: Sequence[Any], config: TrainLDM) -> Tensor | None:
    """Convert the labels of a batch to a tensor.

    Args:
        values: n class numbers; None for an image without a class.

    Returns:
        int64 (n,), with `null_class` for an image without a class; None for an unconditional model.

    Raises:
        UserError: if a value is not an integer from 0 to `config.classes` - 1.
    """
    if not config.classes:
        return None
    for value in values:
        if value is not None and (not isinstance(value, Integral) or not 0 <= int(value) < config.classes):
            raise UserError(
                f"column {config.label!r} holds {value!r}; with classes={config.classes} it may hold 0 to "
                f"{config.classes - 1}, or null"
            )
    return torch.tensor([null_class(config.classes) if value is None else value for value in values])


class Feed(ABC):
    """One rank's source of latents for the training of a diffusion model.

    Attributes:
        digest: hash of the data and of how they become latents.
        order: how the data are shuffled; see `litevae.order.VERSION`.
        mean, std: (C,), statistics of the raw latents, by which they are normalised. They are known after `begin`.
    """

    digest: str
    mean: Tensor
    std: Tensor
    order: int = VERSION

    def __init__(self, config: TrainLDM, rank: int, world: int, device: torch.device):
        self.config, self.rank, self.world, self.device = config, rank, world, device

    @abstractmethod
    def begin(self) -> None:
        """Compute the statistics, unless `load` restored them."""

    @abstractmethod
    def batches(self, start: int, end: int, batch_size: int) -> Iterator[LatentBatch]:
        """Yield this rank's part of each batch from position `start` up to `end`; the last batch is whole too.

        Args:
            batch_size: images per batch over all ranks.
        """

    def latents(self, batch: LatentBatch) -> Tensor:
        """Return a batch's latents, drawn and normalised: float32 (n, C, h, w) on the device."""
        raw = self.raw(batch)
        by = divisor(self.mean, self.std)
        mean, by = (v.to(raw.device, non_blocking=True).view(1, -1, 1, 1) for v in (self.mean, by))
        return (raw - mean) / by

    def raw(self, batch: LatentBatch) -> Tensor:
        """Return a batch's latents, drawn but not normalised: float32 (n, C, h, w)."""
        assert batch.latents is not None
        return batch.latents.to(self.device, non_blocking=True)

    def bad(self) -> int:
        """Return how many images could not be read so far. All ranks must call this together."""
        return 0

    def check(self, bad: int) -> None:  # noqa: B027 - a cache has no bad images
        """Check the number of unreadable images, as `bad` returns it.

        Raises:
            UserError: if there are more of them than `data.max_bad` allows.
        """

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores of this feed."""
        return {"mean": self.mean, "std": self.std}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.mean, self.std = state["mean"], state["std"]


class CachedFeed(Feed):
    """Latents from a cache; with `draw=sample` they are drawn again from their posteriors in each epoch."""

    def __init__(self, config: TrainLDM, setup: LdmSetup, rank: int, world: int, device: torch.device):
        super().__init__(config, rank, world, device)
        self._cache = LatentCache(setup.latents.cache, version=setup.latents.version, local=config.cache_local or None)
        self.digest, self.mean, self.std = self._cache.manifest["digest"], self._cache.mean, self._cache.std

    def begin(self) -> None:
        """Do nothing: the cache's manifest has the statistics."""

    def batches(self, start: int, end: int, batch_size: int) -> Iterator[LatentBatch]:
        return from_cache(self._cache, self, start, start, end, batch_size)


def from_cache(
    latents: LatentCache, feed: Feed, at: int, start: int, end: int, batch_size: int
) -> Iterator[LatentBatch]:
    """Yield batches of raw latents from a cache for positions `start` to `end` of a run.

    Args:
        latents: the cache.
        feed: the feed whose config, rank and number of ranks apply.
        at: the position in the cache's own order with which position `start` of the run begins.
        batch_size: images per batch over all ranks.
    """
    config, columns = feed.config, [feed.config.label] if feed.config.classes else []
    loader = LatentLoader(
        latents, batch_size, config.seed, feed.rank, feed.world, config.draw, normalize=False, columns=columns
    )
    loader.use_order(feed.order)
    loader.position = at
    for step, batch in zip(batch_positions(start, end, batch_size), loader, strict=False):
        labels = labels_of(batch[config.label] if columns else [], config)
        yield LatentBatch(step[feed.rank :: feed.world], labels, latents=batch["latents"])


class EncodingFeed(Feed):
    """Base of the two feeds that encode images: it keeps the source and computes statistics from some of its images."""

    def __init__(self, config: TrainLDM, source: Source, setup: LdmSetup, rank: int, world: int, device: torch.device):
        super().__init__(config, rank, world, device)
        self.source = source
        about = [source.digest, training_transform(config).identity, setup.latents.fingerprint]
        self.digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def begin(self) -> None:
        """Compute mean and std from about `data.calibrate` evenly spaced images, unless a checkpoint gave them.

        Raises:
            UserError: if none of these images can be read.
        """
        if hasattr(self, "mean"):
            return
        data, source = self.config.data, self.source
        centred = ImageTransform(data.resolution, data.resize, decode=data.decode, max_pixels=data.max_pixels)
        # Images are taken in runs of neighbours, since a row group is read as a whole. The sums are the same for any
        # number of workers, because the runs are the same and are added in the same order.
        count = -(-min(data.calibrate, source.units) // CHUNK)
        edges = [source.units * n // count for n in range(count + 1)]
        runs = [range(start, min(end, start + CHUNK)) for start, end in pairwise(edges)]
        mine = [list(run) for run in runs][self.rank :: self.world]

        def load(unit: int) -> np.ndarray | None:
            try:
                return centred(source.data(unit)).pixels
            except ImageError:
                return None  # counted as bad later, when training reaches it

        found = []
        for number, loaded in enumerate(stream(load, mine, data.loaders)):
            if pixels := [image for image in loaded if image is not None]:
                values, content = self.encoded(pixels)
                part = latent_statistics([values], {"dtype": "float32", "content": content})
                found.append((number * self.world + self.rank, part))
        parts = [part for _, part in sorted(ranks.gathered(found, self.world), key=lambda part: part[0])]
        if not parts:
            raise UserError(f"no image of {source.uri} can be read")
        self.mean, self.std = map(torch.tensor, mean_and_std(parts))

    @abstractmethod
    def encoded(self, pixels: list[np.ndarray]) -> tuple[np.ndarray, str]:
        """Encode n uint8 (H, W, 3) images.

        Returns:
            fp32 (n, C, h, w), and what they are: "moments" (mean, then log-variance) or only the "mean".
        """


class OnlineFeed(EncodingFeed):
    """Latents of images that are encoded again in every epoch, so that crops and mirroring can be random."""

    def __init__(self, config: TrainLDM, setup: LdmSetup, rank: int, world: int, device: torch.device):
        assert setup.latents.source is not None
        super().__init__(config, setup.latents.source, setup, rank, world, device)
        data = config.data
        self._images = Images(self.source, training_transform(config), config.seed, data.loaders, data.max_bad)
        if fingerprint(setup.latents.vae) != setup.latents.fingerprint:
            raise UserError(f"{setup.latents.vae} on this node is not the autoencoder that the job was started with")
        self._vae = load_autoencoder(setup.latents.vae)
        prepare_for_inference(self._vae, device, best_kernels(device, data.precision))
        self._content = latent_content(self._vae)

    def begin(self) -> None:
        self._images.order.version = self.order
        super().begin()

    def batches(self, start: int, end: int, batch_size: int) -> Iterator[LatentBatch]:
        pictures = self._images.batches(start, end, batch_size, self.rank, self.world)
        for step, batch in zip(batch_positions(start, end, batch_size), pictures, strict=True):
            positions = step[self.rank :: self.world]
            labels = labels_of([picture.columns.get(self.config.label) for picture in batch], self.config)
            rows = [(n // self.source.units, picture.id) for n, picture in zip(positions, batch, strict=True)]
            pixels = np.stack([picture.pixels for picture in batch])
            yield LatentBatch(positions, labels, pixels=pixels, rows=rows)

    def raw(self, batch: LatentBatch) -> Tensor:
        """Encode a batch's images and draw latents, or take the posterior's mean: float32 (n, C, h, w)."""
        assert batch.pixels is not None
        found = self._encode(batch.pixels)
        if self._content == "mean":
            return found
        mean, logvar = found.chunk(2, dim=1)
        if self.config.draw != "sample":
            return mean
        assert batch.rows is not None
        return sample_posteriors(mean, logvar, self.config.seed, batch.rows)

    def encoded(self, pixels: list[np.ndarray]) -> tuple[np.ndarray, str]:
        return self._encode(np.stack(pixels)).cpu().numpy(), self._content

    @torch.no_grad()
    def _encode(self, pixels: np.ndarray) -> Tensor:
        parts = []
        with encoder.deterministic_fp32(), autocast(self.device, self.config.data.precision):
            for part in torch.from_numpy(pixels).split(CHUNK):
                parts.append(encode_latents(self._vae, to_tensor(part.to(self.device))).float())
        return torch.cat(parts)

    def bad(self) -> int:
        return self._images.count_bad(self.world)

    def check(self, bad: int) -> None:
        self._images.check(bad)
