"""An endless, deterministic, shuffled order of rows, in which rows that are stored together come close together.

Each epoch is a permutation of the rows: locality groups (files, row groups) are shuffled, then rows within windows of
several groups. The row at any position is computed directly, so the position is the whole state: a resumed run goes on
from its position, and rank r of w workers takes positions r, r + w, ... of the same global order for every w.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from litevae.lru_cache import LRUCache

# How rows are shuffled. In version 1 the groups of an epoch and the rows of its first window were sorted by the same
# random numbers: their keys (seed, epoch) and (seed, epoch, 0) are one (see `seed_for`), so that the order of single
# files in one window was the square of a permutation. A run that began with version 1 ends with it.
VERSION = 2
_FIRST_WINDOW = 2**32 - 1  # what stands for window 0 in a key of version 2; no window has this number


@dataclass(frozen=True)
class EpochLayout:
    """The shuffled groups of an epoch, and their division into windows.

    Attributes:
        order: Numbers of the groups (groups,), in the order in which they come.
        edges: Index in `order` of the first group of each window (windows,).
        starts: Number of rows of the epoch that come before each window (windows,).
    """

    order: np.ndarray
    edges: np.ndarray
    starts: np.ndarray

    def window_of(self, offset: int) -> int:
        """Return the number of the window that holds row `offset` of the epoch."""
        return int(np.searchsorted(self.starts, offset, side="right")) - 1

    def groups_of(self, window: int) -> np.ndarray:
        """Return the numbers of the groups of a window, in order."""
        end = self.edges[window + 1] if window + 1 < len(self.edges) else None
        return self.order[self.edges[window] : end]


class EpochOrder:
    """The order in which rows come, epoch after epoch: a map from position to row number.

    Args:
        groups: Number of rows in each locality group. Rows are numbered through the groups in order.
        seed: Seed of the permutations of all epochs.
        window: Number of rows to shuffle together. A window ends with the group that fills it.
        version: 1 for the order of earlier versions of this library; see `VERSION`.
    """

    def __init__(self, groups: Sequence[int] | np.ndarray, seed: int, window: int, version: int = VERSION):
        self.groups = np.asarray(groups, dtype=np.int64)
        self.seed, self.window, self.version = seed, max(1, window), version
        self._starts = np.cumsum(self.groups) - self.groups
        self._rows = int(self.groups.sum())
        if not self._rows:
            raise ValueError("an order needs at least one row")
        # Two of each are kept, for threads that read on both sides of an edge at once.
        self._layouts = LRUCache(self._shuffle_groups, limit=2)
        self._windows = LRUCache(self._shuffle_rows, limit=2)

    def __len__(self) -> int:
        """Return the number of rows in an epoch."""
        return self._rows

    def epoch(self, position: int) -> int:
        """Return the number of the epoch that a position lies in."""
        return position // self._rows

    def index(self, position: int) -> int:
        """Return the number of the row at a position. Positions are counted from the start of the first epoch."""
        epoch, offset = divmod(position, self._rows)
        layout = self._layouts(epoch)
        window = layout.window_of(offset)
        return int(self._windows((epoch, window))[offset - layout.starts[window]])

    def window_at(self, position: int) -> tuple[int, np.ndarray]:
        """Return the first position of the window that a position lies in, and the groups of that window."""
        epoch, offset = divmod(position, self._rows)
        layout = self._layouts(epoch)
        window = layout.window_of(offset)
        return epoch * self._rows + int(layout.starts[window]), layout.groups_of(window)

    def _shuffle_groups(self, epoch: int) -> tuple[EpochLayout, int]:
        """Return the layout of an epoch, and 1, its size for `LRUCache`."""
        order = _permutation(len(self.groups), self.seed, epoch)
        sizes = self.groups[order]
        before = np.cumsum(sizes) - sizes
        edges = np.unique(np.searchsorted(before, np.arange(0, self._rows, self.window)))
        edges = edges[edges < len(sizes)]
        return EpochLayout(order, edges, before[edges]), 1

    def _shuffle_rows(self, key: tuple[int, int]) -> tuple[np.ndarray, int]:
        """Return the row numbers of a window (key: epoch, window) in order, and 1, their size for `LRUCache`."""
        epoch, window = key
        groups = self._layouts(epoch).groups_of(window)
        sizes = self.groups[groups]
        rows = np.repeat(self._starts[groups] - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
        number = window or _FIRST_WINDOW * (self.version > 1)
        return rows[_permutation(len(rows), self.seed, epoch, number)], 1


def _permutation(size: int, *key: int) -> np.ndarray:
    """Return a random permutation that depends only on its arguments.

    It sorts raw random bits, because NumPy keeps the raw bit stream the same between versions, but not the result of
    `Generator.permutation`.
    """
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(size), kind="stable")


def seed_for(*key: int) -> int:
    """Return a seed for a key such as (seed of the run, position, rank). Neighbouring keys get uncorrelated seeds.

    Zeros at the end of a key do not count: (7, 3) and (7, 3, 0) give one seed, as with any `SeedSequence`. Two uses of
    one kind of generator therefore need keys that differ in an entry which is not 0.
    """
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def batch_positions(start: int, end: int, batch_size: int) -> Iterator[range]:
    """Yield the positions of global batches from `start` to `end`.

    The last batch is full too, even if it goes beyond `end`, so that every step has the same size.
    """
    return (range(position, position + batch_size) for position in range(start, end, batch_size))
