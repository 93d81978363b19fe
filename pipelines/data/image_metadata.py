"""Columns of Hugging Face's ImageFolder: metadata.jsonl, .csv or .parquet beside images, a row for each `file_name`."""

import posixpath
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from litevae import storage
from litevae.errors import UserError
from pipelines.data.column_types import plain, widest
from pipelines.data.discovery import METADATA, Found, shown_path
from pipelines.data.path_list import read_table
from pipelines.data.source import encode_path
from pipelines.runtime.logs import say

FILE_NAME = "file_name"


def list_metadata(found: Found, images: pa.ChunkedArray, asked: Sequence[str], name: str) -> dict[str, pa.ChunkedArray]:
    """Return the columns that the metadata files of a folder give its images.

    Args:
        found: the files of the folder; metadata files that give no column are counted as left out.
        images: names of the images, large_binary.
        asked: the columns to look for.
        name: the name of the source's config section, for error messages.

    Returns:
        Those of the columns that are there, each with a value, or null, for every image.

    Raises:
        UserError: if a metadata file can't be read, names an image twice, or has other types than another.
    """
    tables: dict[str, pa.Table] = {}
    for file in found.metadata:
        table = _read(found.root, file, asked) if asked else None
        if table is None:
            found.left_out.leave(METADATA, file)
        else:
            tables[file] = table
    if not tables:
        return {}
    names = pa.chunked_array([chunk for table in tables.values() for chunk in table[FILE_NAME].chunks])
    names = names.combine_chunks()
    if len(names.unique()) < len(names):
        counts = names.value_counts().to_pylist()
        twice = next(shown_path(each["values"]) for each in counts if each["counts"] > 1)
        raise UserError(f"{name}.uri: {', '.join(tables)} has several rows for {twice}; give each image one row")
    rows = pc.index_in(images, value_set=names)
    strange = len(names) - pc.count_distinct(rows).as_py()
    if strange or rows.null_count:
        say(
            f"{', '.join(list(tables)[:3])}: {rows.null_count:,} images have no row there, and {strange:,} rows name "
            f"no image that is read",
            "WARNING",
        )
    return {
        column: _column(tables, column, name).take(rows)
        for column in asked
        if any(column in table.column_names for table in tables.values())
    }


def _read(root: str, file: str, asked: Sequence[str]) -> pa.Table | None:
    """Return the names of the images, relative to the root, and those of the columns that the file has.

    None stands for a file without names that has none of the columns either.
    """
    path = storage.join(root, file)
    if file.lower().endswith(".parquet"):
        names, columns = _read_parquet(path, asked)
    else:
        names, columns = read_table(path, FILE_NAME, asked)
    if names is None and not columns:
        return None
    if names is None:
        raise UserError(f"{path} has no column {FILE_NAME!r}; it names the image of each row")
    folder = encode_path(posixpath.dirname(file))
    files = [each and posixpath.normpath(posixpath.join(folder, each)) for each in names.to_pylist()]
    return pa.table(columns | {FILE_NAME: pa.array(files, pa.large_binary())})


def _read_parquet(path: str, asked: Sequence[str]) -> tuple[pa.ChunkedArray | None, dict[str, pa.ChunkedArray]]:
    """Return what `read_table` returns, of a Parquet file."""
    try:
        file = pq.ParquetFile(pa.BufferReader(storage.read(path)))
        names = file.schema_arrow.names
        table = file.read([column for column in (FILE_NAME, *asked) if column in names])
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} can't be read: {error}") from error
    columns = {}
    for column in table.column_names:
        kind = plain(table[column].type)
        if pa.types.is_nested(kind):
            raise UserError(f"{path}: column {column!r} is {kind}; only plain values are carried")
        columns[column] = table[column].cast(kind)
    files = columns.pop(FILE_NAME, None)
    return None if files is None else files.cast(pa.large_binary()), columns


def _column(tables: dict[str, pa.Table], column: str, name: str) -> pa.ChunkedArray:
    """Return a column of all metadata files end to end, null where a file does not have it."""
    kinds = [table[column].type for table in tables.values() if column in table.column_names]
    kind = widest(kinds)
    if kind is None:
        raise UserError(f"{name}.columns: {column!r} is {' and '.join(map(str, kinds))} in {', '.join(tables)}")
    parts: list[pa.Array] = []
    for table in tables.values():
        there = column in table.column_names
        parts += table[column].cast(kind).chunks if there else [pa.nulls(len(table), kind)]
    return pa.chunked_array(parts, kind)
