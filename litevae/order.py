"""An endless, deterministic order of rows that keeps neighbours in storage near each other.

Epoch after epoch, each a permutation: locality groups (files, row groups) are shuffled, then rows within windows of
several groups. Any position is found directly, so the position is all the state there is: resuming continues from
it, and rank r of w workers takes positions r, r + w, ... of the same global order, whatever w is.
"""

from collections.abc import Sequence

import numpy as np


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
        self._epoch = self._window = -1  # what is laid out now

    def __len__(self) -> int:
        """Rows an epoch."""
        return self._rows

    def epoch(self, position: int) -> int:
        return position // self._rows

    def index(self, position: int) -> int:
        """The row at a position, counted from the first epoch's start."""
        epoch, offset = divmod(position, self._rows)
        if epoch != self._epoch:
            self._shuffle_groups(epoch)
        window = int(np.searchsorted(self._window_rows, offset, side="right")) - 1
        if window != self._window:
            self._shuffle_rows(window)
        return int(self._window_order[offset - self._window_rows[window]])

    def _shuffle_groups(self, epoch: int) -> None:
        self._order = _permutation(len(self.groups), self.seed, epoch)
        sizes = self.groups[self._order]
        before = np.cumsum(sizes) - sizes  # rows before each group
        self._edges = np.unique(np.searchsorted(before, np.arange(0, self._rows, self.window)))
        self._edges = self._edges[self._edges < len(sizes)]
        self._window_rows = before[self._edges]
        self._epoch, self._window = epoch, -1

    def _shuffle_rows(self, window: int) -> None:
        end = self._edges[window + 1] if window + 1 < len(self._edges) else len(self._order)
        groups = self._order[self._edges[window] : end]
        rows = np.concatenate([np.arange(self._starts[g], self._starts[g] + self.groups[g]) for g in groups])
        self._window_order = rows[_permutation(len(rows), self.seed, self._epoch, window)]
        self._window = window


def _permutation(size: int, *key: int) -> np.ndarray:
    """From the raw bit stream: NumPy keeps that one between versions, unlike `Generator.permutation`."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(size), kind="stable")
