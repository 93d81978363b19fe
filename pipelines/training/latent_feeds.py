"""Latents for a diffusion model: from a cache, or of images that are encoded as they are needed."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litevae import cache
from litevae.autoencoder import encode_latents, fingerprint, latent_content, load_autoencoder
from litevae.cache import LatentCache, drawn
from litevae.denoiser import null_class
from litevae.errors import UserError
from litevae.images import ImageError, ImageTransform, to_tensor
from litevae.inference import best_kernels, prepared
from litevae.loader import LatentLoader, stream
from litevae.order import batch_positions
from litevae.precision import autocast
from pipelines.data.source import Source
from pipelines.encoding import encoder
from pipelines.training import ranks
from pipelines.training.config import TrainLDM
from pipelines.training.image_feed import Images
from pipelines.training.worker_setup import LdmSetup

CHUNK = 32  # images of a forward pass of the encoder
Batch = dict[str, Any]


def transform_of(config: TrainLDM) -> ImageTransform:
    data = config.data
    return ImageTransform(data.resolution, data.resize, data.crop, data.flip, decode=data.decode)


def labels_of(values: Sequence[Any], config: TrainLDM) -> Tensor | None:
    """int64 (n,), `null_class` where there is none; None where the model knows no classes.

    Raises:
        UserError: one is no class of the config's.
    """
    if not config.classes:
        return None
    for value in values:
        if value is not None and (not isinstance(value, Integral) or not 0 <= int(value) < config.classes):
            raise UserError(
                f"column {config.label!r} holds {value!r}; with classes={config.classes} it takes 0 to "
                f"{config.classes - 1}, or nothing"
            )
    return torch.tensor([null_class(config.classes) if value is None else value for value in values])


class Feed(ABC):
    """Latents for a diffusion model.

    A batch is a dict of this rank's part: `positions` of its images in the run's endless order, `labels` as `labels_of`
    gives them, and what `latents` makes the latents of.

    Attributes:
        digest: of the data and how they become latents.
        mean, std: (C,), of raw latents: what they are normalised by. There after `begin`.
    """

    digest: str
    mean: Tensor
    std: Tensor

    def __init__(self, config: TrainLDM, rank: int, world: int, device: torch.device):
        self.config, self.rank, self.world, self.device = config, rank, world, device

    @abstractmethod
    def begin(self) -> None:
        """What has to be known before the first batch; a resumed run has it from its checkpoint."""

    @abstractmethod
    def batches(self, start: int, end: int, batch_size: int) -> Iterator[Batch]:
        """From position `start` on, up to `end`; the last one is whole."""

    def latents(self, batch: Batch) -> Tensor:
        """Drawn and normalised: float32 (n, C, h, w) on the device."""
        raw = self.raw(batch)
        mean, std = (v.to(raw.device, non_blocking=True).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (raw - mean) / std

    def raw(self, batch: Batch) -> Tensor:
        return batch["latents"].to(self.device, non_blocking=True)

    def bad(self) -> int:
        """Images that could not be read so far; all ranks call this together."""
        return 0

    def check(self, bad: int) -> None:  # noqa: B027 - a cache has no bad images
        """Raise a UserError if so many are too many."""

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean, "std": self.std}

    def load(self, state: dict[str, Any]) -> None:
        self.mean, self.std = state["mean"], state["std"]


class Cached(Feed):
    """Latents of a cache, drawn anew each epoch."""

    def __init__(self, config: TrainLDM, setup: LdmSetup, rank: int, world: int, device: torch.device):
        super().__init__(config, rank, world, device)
        self._cache = LatentCache(setup.latents.cache, version=setup.latents.version, local=config.cache_local or None)
        self.digest, self.mean, self.std = self._cache.manifest["digest"], self._cache.mean, self._cache.std

    def begin(self) -> None:
        """All of it is in the manifest."""

    def batches(self, start: int, end: int, batch_size: int) -> Iterator[Batch]:
        return from_cache(self._cache, self, start, start, end, batch_size)


def from_cache(latents: LatentCache, feed: Feed, at: int, start: int, end: int, batch_size: int) -> Iterator[Batch]:
    """Raw latents for positions `start` to `end` of a run, from position `at` of the cache's order on."""
    config, columns = feed.config, [feed.config.label] if feed.config.classes else []
    loader = LatentLoader(
        latents, batch_size, config.seed, feed.rank, feed.world, config.draw, normalize=False, columns=columns
    )
    loader.position = at
    for step, batch in zip(batch_positions(start, end, batch_size), loader, strict=False):
        labels = labels_of(batch[config.label] if columns else [], config)
        yield {"positions": step[feed.rank :: feed.world], "labels": labels, "latents": batch["latents"]}


class Encoding(Feed):
    """What both feeds that encode share: the source, and statistics of latents from some of its images."""

    def __init__(self, config: TrainLDM, source: Source, setup: LdmSetup, rank: int, world: int, device: torch.device):
        super().__init__(config, rank, world, device)
        self.source = source
        about = [source.digest, transform_of(config).identity, setup.latents.fingerprint]
        self.digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def begin(self) -> None:
        if hasattr(self, "mean"):
            return
        data, source = self.config.data, self.source
        centred = ImageTransform(data.resolution, data.resize, decode=data.decode)
        # Runs of neighbours, since a row group is read as a whole. The same sums for any number of workers: runs are,
        # and so is the order in which they are added.
        count = -(-min(data.calibrate, source.units) // CHUNK)
        edges = [source.units * n // count for n in range(count + 1)]
        runs = [range(start, min(end, start + CHUNK)) for start, end in pairwise(edges)]
        mine = [list(run) for run in runs][self.rank :: self.world]

        def load(unit: int) -> np.ndarray | None:
            try:
                return centred(source.data(unit)).pixels
            except ImageError:
                return None  # it counts when its turn comes

        found = []
        for number, loaded in enumerate(stream(load, mine, data.loaders)):
            if pixels := [image for image in loaded if image is not None]:
                values, content = self.encoded(pixels)
                part = cache.statistics([values], {"dtype": "float32", "content": content})
                found.append((number * self.world + self.rank, part))
        parts = [part for _, part in sorted(ranks.gathered(found, self.world), key=lambda part: part[0])]
        if not parts:
            raise UserError(f"no image of {source.uri} can be read")
        self.mean, self.std = map(torch.tensor, cache.mean_and_std(parts))

    @abstractmethod
    def encoded(self, pixels: list[np.ndarray]) -> tuple[np.ndarray, str]:
        """uint8 (H, W, 3) images -> fp32 (n, C, h, w), and whether they are "moments" or the "mean"."""


class Online(Encoding):
    """Images through the encoder each time they come, with augmentation if wanted."""

    def __init__(self, config: TrainLDM, setup: LdmSetup, rank: int, world: int, device: torch.device):
        assert setup.latents.source is not None
        super().__init__(config, setup.latents.source, setup, rank, world, device)
        data = config.data
        self._images = Images(self.source, transform_of(config), config.seed, data.loaders, data.max_bad)
        if fingerprint(setup.latents.vae) != setup.latents.fingerprint:
            raise UserError(f"{setup.latents.vae} on this node is not the autoencoder that the job was started with")
        self._vae = load_autoencoder(setup.latents.vae)
        prepared(self._vae, device, best_kernels(device, data.precision))
        self._content = latent_content(self._vae)

    def batches(self, start: int, end: int, batch_size: int) -> Iterator[Batch]:
        pictures = self._images.batches(start, end, batch_size, self.rank, self.world)
        for step, batch in zip(batch_positions(start, end, batch_size), pictures, strict=True):
            positions = step[self.rank :: self.world]
            labels = labels_of([picture.columns.get(self.config.label) for picture in batch], self.config)
            rows = [(n // self.source.units, picture.id) for n, picture in zip(positions, batch, strict=True)]
            pixels = np.stack([picture.pixels for picture in batch])
            yield {"positions": positions, "labels": labels, "pixels": pixels, "rows": rows}

    def raw(self, batch: Batch) -> Tensor:
        found = self._encode(batch["pixels"])
        if self._content == "mean":
            return found
        mean, logvar = found.chunk(2, dim=1)
        return drawn(mean, logvar, self.config.seed, batch["rows"]) if self.config.draw == "sample" else mean

    def encoded(self, pixels: list[np.ndarray]) -> tuple[np.ndarray, str]:
        return self._encode(np.stack(pixels)).cpu().numpy(), self._content

    @torch.no_grad()
    def _encode(self, pixels: np.ndarray) -> Tensor:
        parts = []
        with encoder.exact(), autocast(self.device, self.config.data.precision):
            for part in torch.from_numpy(pixels).split(CHUNK):
                parts.append(encode_latents(self._vae, to_tensor(part.to(self.device))).float())
        return torch.cat(parts)

    def bad(self) -> int:
        return self._images.count_bad(self.world)

    def check(self, bad: int) -> None:
        self._images.check(bad)
