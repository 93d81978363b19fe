"""The ids of the images of an existing cache, to check those of further images against.

Of committed shards they are what the cache holds: the files of its source may have changed since, or be gone.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from litevae import storage
from litevae.commits import committed_shards, read_commit
from litevae.errors import UserError
from litevae.shards import read_quarantine
from pipelines.data.decode import ShardTask
from pipelines.encoding.partition import Partition

SHARDS = 256  # whose ids are read at a time


class StoredIds:
    """The ids of a cache's images, as `check_ids` reads those of a source.

    Args:
        out: the cache folder.
        partition: its images.
        changed: numbers of the units that are to be encoded again, of which the ids are those of the source.

    Attributes:
        units: number of images.
        ids_can_repeat: whether ids come from the user's data.
    """

    def __init__(self, out: str, partition: Partition, changed: np.ndarray):
        self.out, self.partition, self.units = out, partition, partition.units
        self.ids_can_repeat = any(source.ids_can_repeat for source in partition.sources)
        again = {*partition.shards_of(changed).tolist()}
        self._stored = {shard: number for shard, number in committed_shards(out).items() if shard not in again}

    def id_batches(self) -> Iterator[pa.Array]:
        """Yield the ids of all units in order, as arrays of strings."""
        with ThreadPoolExecutor() as threads:
            for start in range(0, len(self.partition), SHARDS):  # in parts, so that few ids are held at a time
                yield from threads.map(self._ids_of, range(start, min(start + SHARDS, len(self.partition))))

    def place_of(self, unit: int) -> str:
        """Return where a unit lies in the source, for messages."""
        for source in self.partition.sources:
            if unit < source.units:
                return source.place_of(unit)
            unit -= source.units
        raise IndexError(f"no unit {unit} in {self.out}")

    def _ids_of(self, shard: int) -> pa.Array:
        source = self.partition.shard(ShardTask(shard)).source
        # The listing of a list holds the ids themselves.
        stored = self._read(shard) if shard in self._stored and source.kind == "parquet" else None
        return pa.array(source.ids(0, source.units), pa.string()) if stored is None else stored

    def _read(self, shard: int) -> pa.Array | None:
        """Return the ids of a committed shard; None if it is damaged, so that it has to be encoded again."""
        try:
            commit = read_commit(self.out, shard, self._stored[shard])
            parts = [read_quarantine(self.out, commit).select(["unit", "id"])]
            if commit["rows"]:
                path = storage.join(self.out, commit["file"])
                footer = storage.read_footer(path)
                for group in range(footer.num_row_groups):
                    rows = storage.read_row_group(path, footer, group, ["unit", "id", "view"])
                    parts.append(rows.filter(pc.equal(rows["view"], 0)).select(["unit", "id"]))
        except storage.Unavailable:
            raise
        except (OSError, UserError, pa.ArrowException, KeyError):
            return None
        rows = pa.concat_tables([part.cast(_UNITS) for part in parts]).sort_by("unit")
        return rows["id"].combine_chunks()


_UNITS = pa.schema([("unit", pa.int64()), ("id", pa.string())])
