"""Batches of a latent cache for training: the same global order for any number of workers, from any position on."""

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from litevae.cache import LatentCache, Shape
from litevae.errors import UserError
from litevae.order import EpochOrder
from litevae.storage import Recent

P = TypeVar("P")
T = TypeVar("T")

Place = tuple[Shape, list[int], list[int], int]  # this rank's rows, their epochs, the position after their batch


class LatentLoader:
    """Shuffled batches of a cache, loaded ahead by threads; the position is all its state.

    Rows come in an `EpochOrder`. Where they differ in shape (aspect-ratio buckets), each shape has an order of its own
    and each batch one shape. The batches that begin in an epoch are mixed evenly, a shape's share being its share of
    the rows. All batches are whole, so one may hold the end of a shape's epoch and the beginning of its next: after any
    number of epochs every row has come as often, and of each shape at most the rest of a batch once more.

    Iterating goes on from `position`, also a second time. A batch is a dict:
        latents: float32 (n, n_z, h, w), as `LatentCache.latents` draws them
        index: int64 (n,), rows of the cache
        epoch: int64 (n,), of each row
        and a list of n values for each of `columns`.

    Args:
        batch_size: rows over all ranks.
        rank, world: this rank takes rows rank, rank + world, ... of each batch: fewer than others where the batch does
            not divide by the ranks, maybe none of a short one.
        draw, normalize: as in `LatentCache.latents`.
        threads: that load, a batch each; 0: the caller itself, nothing ahead.
        prefetch: batches to load ahead.
        epochs: to stop after: each row comes exactly so often, and a shape's last batch may be short. None: endless.

    Attributes:
        position: rows that were handed out so far, over all ranks.

    Raises:
        UserError: no such rank, or columns of a batch's own names; in iteration what `LatentCache` raises, when the
            batch's turn comes.
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
        self._mixes = Recent(self._mix, limit=1)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        places = ([place] for place in self._places(self.position))
        with contextlib.closing(stream(self._load, places, self._threads, self._prefetch)) as loaded:
            for ((position, batch),) in loaded:
                self.position = position
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """After the last batch that was handed out, whatever was loaded ahead; plain JSON, the same on all ranks."""
        about = {"seed": self.seed, "batch_size": self.batch_size, "digest": self.cache.manifest["digest"]}
        return {"position": self.position, **about}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, with any number of ranks.

        Raises:
            UserError: the state is of another cache or seed, or of another batch size where rows differ in shape.
        """
        now = self.state_dict()
        if state["digest"] != now["digest"]:
            raise UserError(
                f"{self.cache.path} does not hold what it held when the loader's state was saved; where something was "
                f"appended since, open it as it was: LatentCache(path, version=...)"
            )
        for name in ("seed", "batch_size") if len(self._shapes) > 1 else ("seed",):
            if state[name] != now[name]:
                raise UserError(f"the loader's state is of {name}={state[name]}, and {name} is {now[name]}")
        self.position = state["position"]

    def _load(self, place: Place) -> tuple[int, dict[str, Any]]:
        (_, height, width), rows, epochs, position = place
        latents = torch.empty(0, len(self.cache.mean), height, width)
        if rows:
            latents = self.cache.latents(rows, epochs, self.seed, self._draw, self._normalize)
        numbers = {"index": torch.tensor(rows, dtype=torch.int64), "epoch": torch.tensor(epochs, dtype=torch.int64)}
        columns = self.cache.columns(rows, self._columns) if self._columns else {}
        return position, {"latents": latents, **numbers, **columns}

    def _places(self, position: int) -> Iterator[Place]:
        while (found := self._batch(position)) is not None:
            shape, batch, position = found
            mine = batch[self._rank :: self._world]
            yield shape.shape, [shape.row(p) for p in mine], [shape.order.epoch(p) for p in mine], position

    def _batch(self, position: int) -> "tuple[_Shape, range, int] | None":
        """The batch at a position: its shape, its part of that shape's order, the position after it."""
        number, start = 0, position
        if len(self._shapes) > 1:
            place = position // self.batch_size
            epoch = position // sum(self._rows)  # or an earlier one
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
        """Batches of each shape that begin before an epoch."""
        return [-(-epoch * rows // self.batch_size) for rows in self._rows]

    def _mix(self, epoch: int) -> tuple[tuple[np.ndarray, np.ndarray], int]:
        """Of the batches that begin in an epoch, in order: the shape's number, and where in its order it begins."""
        begun = np.array(self._begun(epoch))
        counts = np.array(self._begun(epoch + 1)) - begun
        shapes = np.repeat(np.arange(len(counts)), counts)
        turns = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        # Each in its part of the epoch, at random there: evenly mixed, and a shape's batches stay in order.
        bits = np.random.PCG64(np.random.SeedSequence((self.seed, epoch, 0, 1))).random_raw(len(turns))
        order = np.argsort((turns + (bits >> np.uint64(11)) * 2.0**-53) / counts[shapes], kind="stable")
        return (shapes[order], (begun[shapes] + turns)[order] * self.batch_size), 1


class _Shape:
    """The order of the rows of one shape."""

    def __init__(self, cache: LatentCache, shape: Shape, groups: np.ndarray, seed: int):
        self.shape = shape
        sizes = cache.groups[groups]
        self._starts = np.cumsum(sizes) - sizes  # of each group: among the rows of this shape ...
        self._first = (np.cumsum(cache.groups) - cache.groups)[groups]  # ... and among all
        # All shapes' windows are open at once, and share the rows that the cache holds.
        self.order = EpochOrder(sizes, seed, int(cache.window * sizes.sum() / len(cache)))

    def row(self, position: int) -> int:
        """The cache's row at a position of the order."""
        index = self.order.index(position)
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        return int(self._first[group]) + index - int(self._starts[group])


def stream(
    load: Callable[[P], T], batches: Iterable[list[P]], threads: int, ahead: int = 2
) -> Generator[list[T], None, None]:
    """`load` of every item of every batch, in order, by threads that work `ahead` batches early.

    Decoding releases the interpreter's lock, so threads do, and need neither the memory nor the forks of processes.
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
