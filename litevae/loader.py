"""Shuffled training batches of a latent cache, in the same global order for any number of workers."""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from litevae.cache import LatentCache, Shape
from litevae.errors import UserError
from litevae.lru_cache import LRUCache
from litevae.order import EpochOrder

P = TypeVar("P")
T = TypeVar("T")

BatchPlace = tuple[Shape, list[int], list[int], int]  # shape, this rank's rows, their epochs, position after the batch


class LatentLoader:
    """Shuffled batches of a cache, which threads load ahead. The position is the whole state of the loader.

    Rows come in an `EpochOrder`. If rows differ in shape (aspect-ratio buckets), each shape has its own order, and all
    rows of a batch have one shape. The batches of the shapes are mixed evenly within an epoch, in proportion to the
    rows of each shape. All batches are full, so one batch may hold the end of a shape's epoch and the beginning of its
    next one. After any number of epochs every row has come equally often, except that up to one batch of each shape may
    already have begun the next epoch.

    Iteration starts at `position`; a second loop continues where the first one ended. A batch is a dict:
        latents: float32 (n, n_z, h, w), as `LatentCache.latents` returns them
        index: int64 (n,), row numbers in the cache
        epoch: int64 (n,), epoch of each row
        and, for each of `columns`, a list of n values.

    Args:
        cache: The cache.
        batch_size: Rows per batch, over all ranks.
        seed: Seed of the order and of the sampled latents.
        rank: Number of this rank. It takes rows rank, rank + world, ... of each batch. If the batch size is not a
            multiple of the number of ranks, some ranks get fewer rows, and for a short batch possibly none.
        world: Number of ranks.
        draw: "sample" or "mean", as in `LatentCache.latents`.
        normalize: Whether to normalise latents, as in `LatentCache.latents`.
        columns: Names of further columns to load.
        threads: Number of threads; each loads one batch at a time. With 0 the caller loads batches itself, and nothing
            is loaded ahead.
        prefetch: Number of batches to load ahead.
        epochs: Number of epochs after which to stop. Each row then comes exactly so often, and the last batch of a
            shape may be short. None never stops.

    Attributes:
        position: Number of rows that were handed out so far, over all ranks.

    Raises:
        UserError: if the rank does not exist or would get no rows, or a column has the name of an entry of the batch.
            Iteration raises the errors of `LatentCache`, when the batch in question is due.
    """

    def __init__(
        self,
        cache: LatentCache,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        draw: Literal["sample", "mean"] = "sample",
        normalize: bool = True,
        columns: Sequence[str] = (),
        threads: int = 1,
        prefetch: int = 2,
        epochs: int | None = None,
    ):
        if not 0 <= rank < world <= batch_size:
            raise UserError(f"rank={rank} of world={world} gets no rows of batch_size={batch_size}")
        if taken := {"latents", "index", "epoch"} & set(columns):
            raise UserError(f"column {min(taken)!r} can't be loaded: a batch has an entry of that name")
        self.cache, self.batch_size, self.seed, self.position = cache, batch_size, seed, 0
        self._rank, self._world, self._draw, self._normalize = rank, world, draw, normalize
        self._columns, self._threads, self._prefetch, self._epochs = tuple(columns), threads, prefetch, epochs
        numbers: dict[Shape, list[int]] = {}
        for number, shape in enumerate(cache.group_shapes):
            numbers.setdefault(shape, []).append(number)
        self._shapes = [_Shape(cache, shape, np.array(groups), seed) for shape, groups in sorted(numbers.items())]
        self._rows = [len(shape.order) for shape in self._shapes]
        self._mixes = LRUCache(self._mix, limit=1)

    def use_order(self, version: int) -> None:
        """Shuffle as another version of this library does; see `litevae.order.VERSION`."""
        for shape in self._shapes:
            shape.order = EpochOrder(shape.order.groups, self.seed, shape.order.window, version)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        places = ([place] for place in self.places(self.position))
        with contextlib.closing(stream(self._load, places, self._threads, self._prefetch)) as loaded:
            for ((position, batch),) in loaded:
                self.position = position
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last batch that was handed out; batches that were loaded ahead do not count.

        It is plain JSON, and the same on all ranks.
        """
        about = {"seed": self.seed, "batch_size": self.batch_size, "digest": self.cache.manifest["digest"]}
        return {"position": self.position, "order": self._shapes[0].order.version, **about}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state. The number of ranks may have changed.

        Raises:
            UserError: if the state is of another cache or seed, or of another batch size although rows differ in
                shape.
        """
        now = self.state_dict()
        if state["digest"] != now["digest"]:
            raise UserError(
                f"{self.cache.path} has changed since the loader's state was saved; if images were appended, open the "
                f"cache as it was then: LatentCache(path, version=...)"
            )
        for name in ("seed", "batch_size") if len(self._shapes) > 1 else ("seed",):
            if state[name] != now[name]:
                raise UserError(f"the loader's state was saved with {name}={state[name]}, but now {name}={now[name]}")
        self.use_order(state.get("order", 1))
        self.position = state["position"]

    def _load(self, place: BatchPlace) -> tuple[int, dict[str, Any]]:
        """Load this rank's part of a batch; return the position after the batch, and the part."""
        (_, height, width), rows, epochs, position = place
        latents = torch.empty(0, len(self.cache.mean), height, width)
        if rows:
            latents = self.cache.latents(rows, epochs, self.seed, self._draw, self._normalize)
        numbers = {"index": torch.tensor(rows, dtype=torch.int64), "epoch": torch.tensor(epochs, dtype=torch.int64)}
        columns = self.cache.columns(rows, self._columns) if self._columns else {}
        return position, {"latents": latents, **numbers, **columns}

    def places(self, position: int) -> Iterator[BatchPlace]:
        """Yield this rank's part of each batch from a position on."""
        while (found := self._batch(position)) is not None:
            shape, batch, position = found
            mine = batch[self._rank :: self._world]
            yield shape.shape, [shape.row(p) for p in mine], [shape.order.epoch(p) for p in mine], position

    def _batch(self, position: int) -> "tuple[_Shape, range, int] | None":
        """Find the batch at a position; None if the last epoch is over.

        Returns:
            The shape, the positions of the batch in the order of that shape, and the position after the batch.
        """
        number, start = 0, position
        if len(self._shapes) > 1:
            place = position // self.batch_size
            epoch = position // sum(self._rows)  # an upper limit; the loop finds the epoch
            while (first := sum(self._begun(epoch))) > place:
                epoch -= 1
            if self._epochs is not None and epoch >= self._epochs:
                return None
            number, start = (int(column[place - first]) for column in self._mixes(epoch))
        end = start + self.batch_size
        if self._epochs is not None:
            end = min(end, self._epochs * self._rows[number])
        if end <= start:
            return None
        return self._shapes[number], range(start, end), end if len(self._shapes) == 1 else position + self.batch_size

    def _begun(self, epoch: int) -> list[int]:
        """Return for each shape the number of batches that begin before an epoch."""
        return [-(-epoch * rows // self.batch_size) for rows in self._rows]

    def _mix(self, epoch: int) -> tuple[tuple[np.ndarray, np.ndarray], int]:
        """Mix the batches that begin in an epoch.

        Returns:
            For each batch, in order, the number of its shape and its first position in the order of that shape; and 1,
            the size of this entry for `LRUCache`.
        """
        begun = np.array(self._begun(epoch))
        counts = np.array(self._begun(epoch + 1)) - begun
        shapes = np.repeat(np.arange(len(counts)), counts)
        turns = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        # Each shape divides the epoch into as many equal parts as it has batches, and each batch comes at a random time
        # within its part. So shapes are mixed evenly, and the batches of a shape stay in order.
        bits = np.random.PCG64(np.random.SeedSequence((self.seed, epoch, 0, 1))).random_raw(len(turns))
        order = np.argsort((turns + (bits >> np.uint64(11)) * 2.0**-53) / counts[shapes], kind="stable")
        return (shapes[order], (begun[shapes] + turns)[order] * self.batch_size), 1


class _Shape:
    """The order of those rows of a cache that have one shape."""

    def __init__(self, cache: LatentCache, shape: Shape, groups: np.ndarray, seed: int):
        self.shape = shape
        sizes = cache.groups[groups]
        self._starts = np.cumsum(sizes) - sizes  # first row of each group, counted among the rows of this shape
        self._first = (np.cumsum(cache.groups) - cache.groups)[groups]  # the same, counted among all rows of the cache
        # The windows of all shapes are open at once, and share the rows that the cache keeps in memory.
        self.order = EpochOrder(sizes, seed, int(cache.window * sizes.sum() / len(cache)))

    def row(self, position: int) -> int:
        """Return the row number in the cache of a position of the order."""
        index = self.order.index(position)
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        return int(self._first[group]) + index - int(self._starts[group])


def stream(
    load: Callable[[P], T], batches: Iterable[list[P]], threads: int, ahead: int = 2
) -> Generator[list[T], None, None]:
    """Apply `load` to every item of every batch with threads, and yield the results batch by batch, in order.

    Decoding releases the interpreter's lock, so threads are enough; processes would need more memory, and forks.

    Args:
        load: Function that loads an item.
        batches: Batches of items.
        threads: Number of threads. With 0 the caller loads the items, and nothing is loaded ahead.
        ahead: Number of batches to load ahead.
    """
    if not threads:
        for batch in batches:
            yield [load(item) for item in batch]
        return
    waiting: deque[list[Future[T]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for batch in batches:
                waiting.append([pool.submit(load, item) for item in batch])
                if len(waiting) > ahead:
                    yield [sample.result() for sample in waiting.popleft()]
            while waiting:
                yield [sample.result() for sample in waiting.popleft()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
