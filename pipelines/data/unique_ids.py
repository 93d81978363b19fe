"""Check that no two images of a cache have one id: rows are found, and random crops and noise are drawn, by their id.

The ids of a folder, of tars and of numbered rows are unique by how they are made. Those in a column of a Parquet file
are not, and neither are those of a list that has grown.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa

from litevae.errors import UserError
from pipelines.runtime.logs import say

SLOW = 10_000_000  # ids from which on reading them all takes so long that it is said


class HasIds(Protocol):
    """What is read of a source here, with the meaning that it has there."""

    units: int

    @property
    def ids_can_repeat(self) -> bool: ...

    def id_batches(self) -> Iterator[pa.Array]: ...

    def place_of(self, unit: int) -> str: ...


def check_ids(sources: Sequence[HasIds], name: str = "source") -> None:
    """Make sure that the ids of all images of a cache are unique.

    Hashes of all ids are sorted, 8 bytes for each. Only if two are equal are the ids themselves compared.

    Args:
        sources: the source of each listing of the cache, or what else holds their ids.
        name: the name of the config section, for error messages.

    Raises:
        UserError: if two images have one id; or if an image has none.
    """
    if not any(source.ids_can_repeat for source in sources):
        return
    units = sum(source.units for source in sources)
    if units >= SLOW:
        say(f"reading {units:,} ids, to make sure that none is there twice")
    hashes = np.empty(units, np.int64)
    end = 0
    for ids in _batches(sources):
        hashes[end : end + len(ids)] = _hashes(ids)
        end += len(ids)
    hashes.sort()
    repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if len(repeated):
        _refuse_repeats(sources, repeated, name)


def _batches(sources: Sequence[HasIds]) -> Iterator[pa.Array]:
    for source in sources:
        yield from source.id_batches()


def _hashes(ids: pa.Array) -> np.ndarray:
    return np.fromiter(map(hash, ids.to_pylist()), np.int64, len(ids))


def _refuse_repeats(sources: Sequence[HasIds], repeated: np.ndarray, name: str) -> None:
    """Raise a UserError if two images with these hashes have one id, which different ids with one hash have not."""
    places: dict[str, tuple[HasIds, int]] = {}
    first, count = "", 0
    for source in sources:
        unit = 0
        for ids in source.id_batches():
            for row in np.flatnonzero(np.isin(_hashes(ids), repeated)).tolist():
                identity = ids[row].as_py()
                if identity in places:
                    count += 1
                    if not first:
                        where, other = places[identity]
                        first = f"{where.place_of(other)} and {source.place_of(unit + row)} have one id, {identity!r}"
                places.setdefault(identity, (source, unit + row))
            unit += len(ids)
    if count:
        more = f", and {count - 1:,} more rows have the id of another" if count > 1 else ""
        raise UserError(
            f"{first}{more}; ids have to be unique. Name a column with unique ids by {name}.id_column=..., or give "
            f"{name}.ids=unique: ids are then made from file and row"
        )
