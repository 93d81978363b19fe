"""The range of a column of integers, from listings and from the statistics of Parquet files."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc

from litevae import storage
from litevae.errors import UserError
from pipelines.data.discovery import THREADS
from pipelines.data.parquet import ParquetSource, extremes
from pipelines.data.source import Source, decode_path


def label_range(source: Source, column: str) -> tuple[int, int] | None:
    """Return the least and the largest value of a carried column of integers, at most and at least 0.

    Returns:
        The two values; None if only the images themselves, or files beside them, tell.

    Raises:
        UserError: if a file can't be read.
    """
    if column in source.listing.column_names:
        ends = pc.min_max(source.listing[column]).as_py()
        return min(0, ends["min"] or 0), max(0, ends["max"] or 0)
    if not isinstance(source, ParquetSource):
        return None
    names = source.listing["file"].unique().to_pylist()
    return range_in_files([storage.join(source.root, decode_path(name)) for name in names], column)


def range_in_files(paths: Sequence[str], column: str) -> tuple[int, int]:
    """Return the least and the largest value of a column of integers in Parquet files, at most and at least 0.

    Raises:
        UserError: if a file can't be read.
    """

    def ends(path: str) -> tuple[int, int]:
        try:
            return extremes(path, column)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: column {column!r} can't be read: {error}") from error

    with ThreadPoolExecutor(THREADS) as threads:
        found = list(threads.map(ends, paths))
    return min((least for least, _ in found), default=0), max((largest for _, largest in found), default=0)
