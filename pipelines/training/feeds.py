"""What the trainers are fed: images of a source; latents of a cache, or encoded on the way, or both in turn.

Every feed gives the same global batches for any number of workers, from any position on, and batches of one form.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from litevae import cache
from litevae.autoencoder import encode_latents, fingerprint, latent_content, load_autoencoder
from litevae.cache import LatentCache, drawn, from_stored
from litevae.denoiser import null_class
from litevae.errors import UserError
from litevae.images import ImageError, ImageTransform, to_tensor
from litevae.inference import best_kernels, prepared
from litevae.loader import LatentLoader, stream
from litevae.order import EpochOrder, batch_positions, seed_for
from litevae.precision import autocast
from pipelines.data import decode
from pipelines.data.source import Source
from pipelines.encoding import encode, encoder, plan, totals
from pipelines.runtime.logs import say
from pipelines.training.config import TrainLDM

WINDOW = 8  # shards whose images are shuffled among each other in the first epoch of write-through
CHUNK = 32  # images of a forward pass of the encoder

Batch = dict[str, Any]


# --- images -----------------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """An image as the transform gives it."""

    id: str
    pixels: np.ndarray  # uint8 (H, W, 3)
    columns: dict[str, Any]


class Images:
    """Positions of a source's endless order as images; the next readable image stands in for a bad one.

    Args:
        loaders: decoding threads.
        max_bad: share of unreadable images that is skipped.
    """

    def __init__(self, source: Source, transform: ImageTransform, seed: int, loaders: int, max_bad: float):
        self._source, self._transform, self._seed = source, transform, seed
        self._loaders, self._max_bad = loaders, max_bad
        self.order = EpochOrder(source.groups, seed, source.window)
        self.bad: dict[str, str] = {}

    def load(self, place: tuple[int, int]) -> Picture:
        """Of a (position, row)."""
        position, row = place
        for _ in range(self._source.units):
            try:
                item = self._source.read(row)
                pixels = self._transform(item.data, seed=seed_for(self._seed, position)).pixels
                return Picture(item.id, pixels, item.columns)
            except ImageError as error:
                name = self._source.id(row)
                if name not in self.bad:
                    self.bad[name] = f"{error.reason}: {error}"
                    say(f"skipped unreadable image {name} ({self.bad[name]})", "WARNING", image=name)
                row = (row + 1) % self._source.units
        raise UserError(f"no image of {self._source.uri} can be read")

    def batches(self, start: int, end: int, batch: int, rank: int, world: int) -> Iterator[list[Picture]]:
        steps = batch_positions(start, end, batch)
        places = ([(position, self.order.index(position)) for position in step[rank::world]] for step in steps)
        return stream(self.load, places, self._loaders)

    def count_bad(self, world: int) -> int:
        """Unreadable images that any rank has met; all ranks call this together."""
        return len(set(gathered([*self.bad], world)))

    def check(self, bad: int) -> None:
        """
        Raises:
            UserError: more images are unreadable than the config allows.
        """
        if bad > self._max_bad * self._source.units:
            some = "; ".join(f"{name} ({reason})" for name, reason in list(self.bad.items())[:3])
            raise UserError(
                f"{bad} of {self._source.units} images can't be read, more than data.max_bad={self._max_bad:g} "
                f"allows: {some or 'named above'}. Remove them, or raise data.max_bad"
            )


def gathered(mine: list[Any], world: int) -> list[Any]:
    """What all ranks have."""
    if world == 1:
        return mine
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, mine)
    return [item for part in parts for item in part]


# --- latents ----------------------------------------------------------------------------------------------------


def make_feed(config: TrainLDM, setup: dict[str, Any], rank: int, world: int, device: torch.device) -> "Feed":
    if config.mode == "cache":
        return Cached(config, setup, rank, world, device)
    return (Online if config.mode == "online" else WriteThrough)(config, setup, rank, world, device)


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

    def __init__(self, config: TrainLDM, setup: dict[str, Any], rank: int, world: int, device: torch.device):
        super().__init__(config, rank, world, device)
        self._cache = LatentCache(setup["cache"], version=setup["version"], local=config.cache_local or None)
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

    def __init__(
        self, config: TrainLDM, source: Source, setup: dict[str, Any], rank: int, world: int, device: torch.device
    ):
        super().__init__(config, rank, world, device)
        self.source = source
        about = [source.digest, transform_of(config).identity, setup["fingerprint"]]
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
        parts = [part for _, part in sorted(gathered(found, self.world), key=lambda part: part[0])]
        if not parts:
            raise UserError(f"no image of {source.uri} can be read")
        self.mean, self.std = map(torch.tensor, cache.mean_and_std(parts))

    @abstractmethod
    def encoded(self, pixels: list[np.ndarray]) -> tuple[np.ndarray, str]:
        """uint8 (H, W, 3) images -> fp32 (n, C, h, w), and whether they are "moments" or the "mean"."""


class Online(Encoding):
    """Images through the encoder each time they come, with augmentation if wanted."""

    def __init__(self, config: TrainLDM, setup: dict[str, Any], rank: int, world: int, device: torch.device):
        super().__init__(config, setup["source"], setup, rank, world, device)
        data = config.data
        self._images = Images(self.source, transform_of(config), config.seed, data.loaders, data.max_bad)
        if fingerprint(setup["vae"]) != setup["fingerprint"]:
            raise UserError(f"{setup['vae']} on this node is not the autoencoder that the job was started with")
        self._vae = load_autoencoder(setup["vae"])
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


class WriteThrough(Encoding):
    """The first epoch encodes and fills a cache, shard by shard; later ones read it.

    In the first epoch images are shuffled within windows of `WINDOW` shards. Before a window's first batch its shards
    are encoded and committed, each by one rank, as the encode job would; those that are there already are not. So the
    cache is whole after one epoch, whatever was killed on the way, and an unfinished one can be finished by that job.
    """

    def __init__(self, config: TrainLDM, setup: dict[str, Any], rank: int, world: int, device: torch.device):
        self._out, self._plan, self._handle = setup["cache"], setup["plan"], setup["handle"]
        listings = plan.open_listings(self._out)
        super().__init__(config, listings[0], setup, rank, world, device)
        # What is appended to the cache later is not for this run: neither inputs ...
        self._listings = len(listings)
        # ... nor, of the finished one, rows.
        self._version: int | None = None
        self._encoder = encoder.Encoder(self._out, self._plan, device.type == "cuda", setup["threads"])
        self._how = self._plan["latents"]
        self._done: set[int] = set()  # shards that are committed, the same on all ranks
        self._reasons: dict[int, dict[str, int]] = {}  # of each shard: why images are in quarantine
        self._window: tuple[int, Window] | None = None

    def begin(self) -> None:
        sources = plan.open_listings(self._out)[: self._listings]
        self._planned = plan.Planned(sources, self._plan["rows_per_shard"])
        self._order = EpochOrder(self._planned.sizes, self.config.seed, WINDOW * self._plan["rows_per_shard"])
        super().begin()

    def encoded(self, pixels: list[np.ndarray]) -> tuple[np.ndarray, str]:
        return self._encoder.encode(pixels), self._how["content"]

    def batches(self, start: int, end: int, batch_size: int) -> Iterator[Batch]:
        first = -(-self._planned.units // batch_size) * batch_size  # where the first epoch's last batch ends
        if start < first:
            mine = [*cache.committed(self._out)] if self.rank == 0 else []  # one rank's: others may see more by now
            self._done = set(gathered(mine, self.world))
            windows = self._windows(start, self._planned.units)
            todo = [[shard] for window in windows for shard in self._mine(window)]
            self._decoded = stream(self._decode, todo, min(self.config.data.loaders, 2), ahead=1)
            for step in batch_positions(start, min(end, first), batch_size):
                yield self._first(step[self.rank :: self.world], step)
        reached = start + -(-(end - start) // batch_size) * batch_size
        if reached >= first and self._version is None:
            self._finish()
        if end > first:
            opened = LatentCache(self._out, version=self._version, local=self.config.cache_local or None)
            start = max(start, first)
            # The draws of its first epoch have been seen.
            yield from from_cache(opened, self, len(opened) + start - first, start, end, batch_size)

    def state(self) -> dict[str, Any]:
        return super().state() | {"version": self._version, "listings": self._listings}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._version, self._listings = state["version"], state["listings"]

    def _windows(self, start: int, end: int) -> Iterator[np.ndarray]:
        """The shards of each window that has a part of positions start ... end."""
        while start < end:
            begin, shards = self._order.window_at(start)
            yield shards
            start = begin + int(self._planned.sizes[shards].sum())

    def _mine(self, shards: np.ndarray) -> list[int]:
        """Those of a window that this rank has to encode."""
        return [int(shard) for shard in shards if int(shard) not in self._done][self.rank :: self.world]

    def _decode(self, shard: int) -> dict[str, Any]:
        row = {"shard": self._planned.shard(decode.Task(shard))}
        return decode.decode_shard(row, decode.views_of(self._plan))

    def _first(self, mine: range, step: range) -> Batch:
        """A batch of the first epoch. All ranks come to each window together."""
        found: dict[int, tuple[np.ndarray, str, Any]] = {}
        for position in step:
            begin, shards = self._order.window_at(position)
            if self._window is None or self._window[0] != begin:
                self._window = begin, self._fill(shards)
            if position in mine:
                found[position] = self._window[1].row(self._order.index(position))
        stored = from_stored(np.stack([found[position][0] for position in mine]), self._how["dtype"]).float()
        latents = stored
        if self._how["content"] == "moments":
            latents, logvar = stored.chunk(2, dim=1)
            if self.config.draw == "sample":
                rows = [(position // self._planned.units, found[position][1]) for position in mine]
                latents = drawn(latents, logvar, self.config.seed, rows)
        labels = labels_of([found[position][2] for position in mine], self.config)
        return {"positions": mine, "labels": labels, "latents": latents}

    def _fill(self, shards: np.ndarray) -> "Window":
        """Encode what is missing of a window, this rank's share, and read all of it.

        Raises:
            UserError: more images can't be encoded than the config allows.
        """
        errors = []
        for _ in self._mine(shards):
            (row,) = next(self._decoded)
            if error := self._encoder(row)["error"]:
                errors.append(error)
                break
        if errors := gathered(errors, self.world):  # and so no rank goes on before all shards are there
            raise UserError(errors[0])
        numbers = [int(shard) for shard in shards]
        self._done |= {*numbers}
        generations = cache.committed(self._out)
        commits = list(cache.read_commits(self._out, {shard: generations[shard] for shard in numbers}))
        self._reasons |= {commit["shard"]: commit.get("reasons", {}) for commit in commits}
        total: Counter[str] = sum(map(Counter, self._reasons.values()), Counter())
        totals.check_budget(total, self.config.data.max_bad, self._out, self._planned.units, "data.max_bad")
        return Window(self._out, commits, self._how, self.config.label if self.config.classes else "")

    def _finish(self) -> None:
        """Rank 0 writes the manifest, which makes the cache complete."""
        errors = []
        if self.rank == 0:
            devices, settings = [self._encoder.name], self._plan["settings"]
            try:
                encode.finish(self._out, self._plan, self._planned, "train_ldm", settings, self._handle, devices)
            except UserError as error:
                errors.append(str(error))
        if errors := gathered(errors, self.world):
            raise UserError(errors[0])
        self._version = cache.read_manifest(self._out)["number"]
        self._encoder.close()  # its memory is for training now


class Window:
    """Rows of some shards, by the number of their image; the next one stands in for one in quarantine.

    Raises:
        UserError: none of its images was encoded.
    """

    def __init__(self, folder: str, commits: list[dict[str, Any]], how: dict[str, Any], label: str):
        tables, self._latents = [], []
        for commit in commits:
            if commit["rows"]:
                table, latents = cache.read_shard(folder, commit, how)
                tables.append(table)
                self._latents += [*latents[0]]
        if not tables:
            raise UserError(f"{folder}: no image of shards {[commit['shard'] for commit in commits]} could be encoded")
        self._units = np.concatenate([table["unit"].to_numpy() for table in tables])
        self._ids = [name for table in tables for name in table["id"].to_pylist()]
        self._labels = [value for table in tables for value in table[label].to_pylist()] if label else []
        self._sorted = np.argsort(self._units)

    def row(self, unit: int) -> tuple[np.ndarray, str, Any]:
        """Stored latents (C, h, w), id and label."""
        place = int(np.searchsorted(self._units, unit, sorter=self._sorted)) % len(self._units)
        row = int(self._sorted[place])
        return self._latents[row], self._ids[row], self._labels[row] if self._labels else None
