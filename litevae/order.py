"""An endless, deterministic order of rows that keeps neighbours in storage near each other.

Epoch after epoch, each a permutation: locality groups (files, row groups) are shuffled, then rows within windows of
several groups. Any position is found directly, so the position is all the state there is: resuming continues from
it, and rank r of w workers takes positions r, r + w, ... of the same global order, whatever w is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from litevae.storage import Recent


@dataclass(frozen=True)
class EpochLayout:
    """How the groups of an epoch are shuffled, and where they are cut into windows.

    Attributes:
        order: (groups,), the number of each group in the order in which they come.
        edges: (windows,), the place in `order` of each window's first group.
        starts: (windows,), the rows of the epoch that come before each window.
    """

    order: np.ndarray
    edges: np.ndarray
    starts: np.ndarray

    def window_of(self, offset: int) -> int:
        """The number of the window that row `offset` of the epoch lies in."""
        return int(np.searchsorted(self.starts, offset, side="right")) - 1

    def groups_of(self, window: int) -> np.ndarray:
        """The groups of a window, in order."""
        end = self.edges[window + 1] if window + 1 < len(self.edges) else None
        return self.order[self.edges[window] : end]


class EpochOrder:
    """Position -> row.

    Args:
        groups: rows in each locality group; rows are numbered through the groups in order.
        seed: of every epoch's permutation.
        window: rows to shuffle among each other; a window ends at the end of the group that fills it.
    """

    def __init__(self, groups: Sequence[int] | np.ndarray, seed: int, window: int):
        self.groups = np.asarray(groups, dtype=np.int64)
        self.seed, self.window = seed, max(1, window)
        self._starts = np.cumsum(self.groups) - self.groups
        self._rows = int(self.groups.sum())
        if not self._rows:
            raise ValueError("an order of no rows")
        # Two of each, for threads that read across an edge.
        self._layouts = Recent(self._shuffle_groups, limit=2)
        self._windows = Recent(self._shuffle_rows, limit=2)

    def __len__(self) -> int:
        """Rows an epoch."""
        return self._rows

    def epoch(self, position: int) -> int:
        return position // self._rows

    def index(self, position: int) -> int:
        """The row at a position, counted from the first epoch's start."""
        epoch, offset = divmod(position, self._rows)
        layout = self._layouts(epoch)
        window = layout.window_of(offset)
        return int(self._windows((epoch, window))[offset - layout.starts[window]])

    def window_at(self, position: int) -> tuple[int, np.ndarray]:
        """Where the window of a position begins, and its groups: those whose rows are shuffled among each other."""
        epoch, offset = divmod(position, self._rows)
        layout = self._layouts(epoch)
        window = layout.window_of(offset)
        return epoch * self._rows + int(layout.starts[window]), layout.groups_of(window)

    def _shuffle_groups(self, epoch: int) -> tuple[EpochLayout, int]:
        """The epoch's layout, which counts as one in the store of recent ones."""
        order = _permutation(len(self.groups), self.seed, epoch)
        sizes = self.groups[order]
        before = np.cumsum(sizes) - sizes
        edges = np.unique(np.searchsorted(before, np.arange(0, self._rows, self.window)))
        edges = edges[edges < len(sizes)]
        return EpochLayout(order, edges, before[edges]), 1

    def _shuffle_rows(self, key: tuple[int, int]) -> tuple[np.ndarray, int]:
        """The rows of a window, in order; they count as one in the store of recent ones."""
        epoch, window = key
        groups = self._layouts(epoch).groups_of(window)
        sizes = self.groups[groups]
        rows = np.repeat(self._starts[groups] - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())
        return rows[_permutation(len(rows), self.seed, epoch, window)], 1


def _permutation(size: int, *key: int) -> np.ndarray:
    """From the raw bit stream: NumPy keeps that one between versions, unlike `Generator.permutation`."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(size), kind="stable")


def seed_for(*key: int) -> int:
    """A seed from (seed of the run, position, rank ...), without correlation between neighbours."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def batch_positions(start: int, end: int, batch_size: int) -> Iterator[range]:
    """Global batches from position `start` on; the last one is whole too, so that every step has the same size."""
    return (range(position, position + batch_size) for position in range(start, end, batch_size))
