"""Divide the images of a source into shards."""

from collections.abc import Sequence

import numpy as np

from pipelines.data.decode import Shard, ShardTask
from pipelines.data.source import Source


class Partition:
    """The division of the images of one or more listings into shards.

    Each shard holds up to `size` images of one listing. A row group of a Parquet file, or a byte range of a tar, that
    fits into one shard is never divided between two. `len()` is the number of shards.

    Args:
        sources: the source of each listing, in order.
        size: largest number of images in a shard.

    Attributes:
        sizes: int64 (shards,), number of images in each shard.
        units: number of images in all shards.
    """

    def __init__(self, sources: Sequence[Source], size: int):
        self.sources = sources
        self._ends = [cut(source.groups, size) for source in sources]
        self._shards = np.cumsum([0, *map(len, self._ends)])
        self.sizes = np.concatenate([np.diff(ends, prepend=0) for ends in self._ends])
        self._units = np.cumsum([0, *(source.units for source in sources)])
        self.units = int(self._units[-1])

    def __len__(self) -> int:
        return int(self._shards[-1])

    def shard(self, task: ShardTask) -> Shard:
        """Return what a worker needs for a task: its part of the source, with units renumbered from 0."""
        place = int(np.searchsorted(self._shards, task.shard, side="right")) - 1
        ends, index = self._ends[place], task.shard - int(self._shards[place])
        start, end = int(ends[index - 1]) if index else 0, int(ends[index])
        return Shard(task, self.sources[place].part(start, end), int(self._units[place]) + start)

    def first(self, shard: int) -> int:
        """Return the number of a shard's first unit in the whole cache."""
        return int(self.sizes[:shard].sum())

    def located(self, units: Sequence[int]) -> list[tuple[Source, list[int]]]:
        """Return the source of each listing that has some of these units, with their numbers in that source."""
        found = []
        for place, source in enumerate(self.sources):
            start, end = int(self._units[place]), int(self._units[place + 1])
            if own := [unit - start for unit in units if start <= unit < end]:
                found.append((source, own))
        return found

    def shards_of(self, units: np.ndarray) -> np.ndarray:
        """Return the numbers of the shards that hold any of these units, sorted."""
        return np.unique(np.searchsorted(np.cumsum(self.sizes), units, side="right"))


def cut(groups: np.ndarray, size: int) -> np.ndarray:
    """Return where each shard ends, int64 (shards,): the number of the unit after its last one.

    A shard takes whole groups as long as they fit into `size`. A group larger than `size` is cut into even pieces.

    Args:
        groups: int64 (groups,), number of units in each group.
        size: largest number of units in a shard.
    """
    if groups.max() == 1:
        return np.append(np.arange(size, len(groups), size), len(groups))
    ends, end, held = [], 0, 0
    for rows in groups.tolist():
        if held and held + rows > size:
            ends.append(end)
            held = 0
        if rows > size:
            pieces = -(-rows // size)
            ends += [end + rows * piece // pieces for piece in range(1, pieces + 1)]
        else:
            held += rows
        end += rows
    return np.array([*ends, end] if held else ends, dtype=np.int64)
