"""The feed of mode=write-through: the first epoch encodes images and fills a cache, and later epochs read the cache."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from litevae import cache
from litevae.cache import LatentCache, sample_posteriors
from litevae.commits import committed_shards, read_commits
from litevae.errors import UserError
from litevae.loader import stream
from litevae.order import EpochOrder, batch_positions
from litevae.shards import from_stored, read_shard
from pipelines.data.decode import ShardTask, decode_shard
from pipelines.encoding.encode import finish
from pipelines.encoding.encoder import ShardEncoder
from pipelines.encoding.listings import open_listings
from pipelines.encoding.partition import Partition
from pipelines.encoding.totals import check_budget
from pipelines.training import ranks
from pipelines.training.config import TrainLDM
from pipelines.training.latent_feeds import EncodingFeed, LatentBatch, from_cache, labels_of
from pipelines.training.worker_setup import LdmSetup

WINDOW = 8  # number of shards whose images are shuffled together in the first epoch


class WriteThroughFeed(EncodingFeed):
    """A feed whose first epoch encodes images and fills a cache, shard by shard; later epochs read the cache.

    In the first epoch images are shuffled within windows of `WINDOW` shards. Before a window's first batch, its shards
    are encoded and committed, each by one rank, as the encode job would do it. Shards that are committed already are
    skipped. So the cache is complete after one epoch, even if processes were killed in between, and the encode job can
    complete an unfinished cache.
    """

    def __init__(self, config: TrainLDM, setup: LdmSetup, rank: int, world: int, device: torch.device):
        assert setup.latents.plan is not None
        self._out, self._plan, self._handle = setup.latents.cache, setup.latents.plan, setup.handle
        listings = open_listings(self._out)
        super().__init__(config, listings[0], setup, rank, world, device)
        # This run ignores what is appended to the cache later. The number of listings fixes its inputs, and the
        # manifest's number, which is known after the first epoch, fixes its rows.
        self._listings = len(listings)
        self._version: int | None = None
        self._encoder = ShardEncoder(self._out, self._plan, device.type == "cuda", setup.threads)
        self._how = self._plan.latents
        self._done: set[int] = set()  # committed shards; all ranks have the same set
        self._reasons: dict[int, dict[str, int]] = {}  # for each shard: how many images are in quarantine, by reason
        self._window: tuple[int, Window] | None = None

    def begin(self) -> None:
        """Set up the shards and the order of the first epoch, then the statistics."""
        sources = open_listings(self._out)[: self._listings]
        self._partition = Partition(sources, self._plan.rows_per_shard)
        self._order = EpochOrder(
            self._partition.sizes, self.config.seed, WINDOW * self._plan.rows_per_shard, self.order
        )
        super().begin()

    def encoded(self, pixels: list[np.ndarray]) -> tuple[np.ndarray, str]:
        return self._encoder.encode(pixels), self._how["content"]

    def batches(self, start: int, end: int, batch_size: int) -> Iterator[LatentBatch]:
        first = -(-self._partition.units // batch_size) * batch_size  # position where the first epoch's last batch ends
        if start < first:
            mine = [*committed_shards(self._out)] if self.rank == 0 else []  # rank 0's view counts; others may see more
            self._done = set(ranks.gathered(mine, self.world))
            windows = self._windows(start, self._partition.units)
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
            # Begin with the cache's second epoch, because the draws of its first epoch have been used.
            yield from from_cache(opened, self, len(opened) + start - first, start, end, batch_size)

    def state(self) -> dict[str, Any]:
        return super().state() | {"version": self._version, "listings": self._listings}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._version, self._listings = state["version"], state["listings"]

    def _windows(self, start: int, end: int) -> Iterator[np.ndarray]:
        """Yield the shards of each window that overlaps the positions from `start` to `end`."""
        while start < end:
            begin, shards = self._order.window_at(start)
            yield shards
            start = begin + int(self._partition.sizes[shards].sum())

    def _mine(self, shards: np.ndarray) -> list[int]:
        """Return the shards of a window that this rank must encode."""
        return [int(shard) for shard in shards if int(shard) not in self._done][self.rank :: self.world]

    def _decode(self, shard: int) -> dict[str, Any]:
        row = {"shard": self._partition.shard(ShardTask(shard))}
        return decode_shard(row, self._plan.views, self._plan.hashed)

    def _first(self, mine: range, step: range) -> LatentBatch:
        """Make a batch of the first epoch. All ranks come to each window together.

        Args:
            mine: this rank's positions in the batch.
            step: the positions of the whole batch.
        """
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
                rows = [(position // self._partition.units, found[position][1]) for position in mine]
                latents = sample_posteriors(latents, logvar, self.config.seed, rows)
        labels = labels_of([found[position][2] for position in mine], self.config)
        return LatentBatch(mine, labels, latents=latents)

    def _fill(self, shards: np.ndarray) -> "Window":
        """Encode this rank's share of a window's missing shards, then read the whole window.

        Raises:
            UserError: if a rank failed to encode a shard, or more images are in quarantine than `data.max_bad` allows.
        """
        errors = []
        for _ in self._mine(shards):
            (row,) = next(self._decoded)
            if error := self._encoder(row)["error"]:
                errors.append(error)
                break
        if errors := ranks.gathered(errors, self.world):  # this also waits until all shards are there
            raise UserError(errors[0])
        numbers = [int(shard) for shard in shards]
        self._done |= {*numbers}
        generations = committed_shards(self._out)
        commits = list(read_commits(self._out, {shard: generations[shard] for shard in numbers}))
        self._reasons |= {commit["shard"]: commit.get("reasons", {}) for commit in commits}
        total: Counter[str] = sum(map(Counter, self._reasons.values()), Counter())
        check_budget(total, self.config.data.max_bad, self._out, self._partition.units, "data.max_bad")
        return Window(self._out, commits, self._how, self.config.label if self.config.classes else "")

    def _finish(self) -> None:
        """Let rank 0 write the manifest, which completes the cache, then close the encoder."""
        errors = []
        if self.rank == 0:
            devices, settings = [self._encoder.name], asdict(self._plan.settings)
            try:
                finish(self._out, self._plan, self._partition, "train_ldm", settings, self._handle, devices)
            except UserError as error:
                errors.append(str(error))
        if errors := ranks.gathered(errors, self.world):
            raise UserError(errors[0])
        self._version = cache.read_manifest(self._out)["number"]
        self._encoder.close()  # frees its memory for training


class Window:
    """The rows of a window's shards, found by the number of their image.

    An image in quarantine is replaced by the next one.

    Args:
        folder: the cache.
        commits: the shards' commits.
        how: how latents are stored (the plan's `latents`).
        label: name of the label column; "": no labels.

    Raises:
        UserError: if none of the window's images was encoded.
    """

    def __init__(self, folder: str, commits: list[dict[str, Any]], how: dict[str, Any], label: str):
        tables, self._latents = [], []
        for commit in commits:
            if commit["rows"]:
                table, latents = read_shard(folder, commit, how)
                tables.append(table)
                self._latents += [*latents[0]]
        if not tables:
            raise UserError(f"{folder}: no image of shards {[commit['shard'] for commit in commits]} could be encoded")
        self._units = np.concatenate([table["unit"].to_numpy() for table in tables])
        self._ids = [name for table in tables for name in table["id"].to_pylist()]
        self._labels = [value for table in tables for value in table[label].to_pylist()] if label else []
        self._sorted = np.argsort(self._units)

    def row(self, unit: int) -> tuple[np.ndarray, str, Any]:
        """Return an image's stored latents (C, h, w), its id, and its label or None."""
        place = int(np.searchsorted(self._units, unit, sorter=self._sorted)) % len(self._units)
        row = int(self._sorted[place])
        return self._latents[row], self._ids[row], self._labels[row] if self._labels else None
