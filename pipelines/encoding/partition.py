"""How the images of a source are cut into shards."""

from collections.abc import Sequence

import numpy as np

from pipelines.data.decode import Shard, Task
from pipelines.data.source import Source


class Partition:
    """How the images of one or several listings are cut into shards.

    Each shard holds up to `size` images of one listing. A row group of a Parquet file, or a range of a tar, that fits
    into one shard is never read by two. `len()` is the number of shards.

    Args:
        sources: of each listing, in order.
        size: images of a shard at most.

    Attributes:
        sizes: int64 (shards,), the images of each shard.
        units: images of all shards.
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

    def shard(self, task: Task) -> Shard:
        """What a worker needs for a task: the part of the source, renumbered from 0."""
        place = int(np.searchsorted(self._shards, task.shard, side="right")) - 1
        ends, index = self._ends[place], task.shard - int(self._shards[place])
        start, end = int(ends[index - 1]) if index else 0, int(ends[index])
        return Shard(task, self.sources[place].part(start, end), int(self._units[place]) + start)


def cut(groups: np.ndarray, size: int) -> np.ndarray:
    """The unit after each shard's last one: whole groups as far as they fit into `size`, larger ones cut evenly."""
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
