"""A list of images: a text, CSV or JSON Lines file with the path of an image in each row."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from litevae import storage
from litevae.errors import UserError
from pipelines.data.config import Source as SourceConfig
from pipelines.data.discovery import Found, shown_path
from pipelines.data.folder import FileSource
from pipelines.data.source import (
    DEFAULTS,
    LISTING,
    READABLE,
    SCHEME,
    Source,
    about_of,
    id_column_of,
    is_text,
    make_listing,
)

PATH_COLUMNS = ("image", "file_name", "path", "file", "uri", "url")  # the first of these that a list has


def list_paths(found: Found, uri: str, config: SourceConfig, name: str) -> Source:
    """Read a list of images.

    Args:
        found: the file.
        uri: its absolute path.
        config: the source's config section.
        name: the name of that section, for error messages.

    Raises:
        UserError: if the list can't be read, has no paths, lacks a column, or names an image or an id twice.
    """
    table = _read_list(uri, config)
    have, where = table.column_names, f"{uri}; it has {', '.join(table.column_names)}"
    if len(set(have)) < len(have):
        raise UserError(f"{uri}: several columns have the same name: {', '.join(have)}")
    if not len(table):
        raise UserError(f"{name}.uri={config.uri}: the list holds no paths")
    asked = () if config.image_column == DEFAULTS.image_column else (config.image_column,)
    image = next((column for column in asked or PATH_COLUMNS if column in have), None)
    if image is None:
        raise UserError(f"{name}.image_column: no column {' or '.join(map(repr, asked or PATH_COLUMNS))} in {where}")
    identity = id_column_of(have, config, name, where)
    for column in config.columns:
        if column not in have:
            raise UserError(f"{name}.columns: no column {column!r} in {where}")
        if column in ("id", *LISTING.names):
            raise UserError(f"{name}.columns: {column!r} can't be carried from a list under this name; rename it there")
    kind = table.field(image).type
    if not (is_text(kind) or pa.types.is_large_binary(kind)):
        raise UserError(f"{name}.image_column: column {image!r} of {uri} is {kind}, not paths")
    if identity and pa.types.is_nested(kind := table.field(identity).type):
        raise UserError(f"{name}.id_column: column {identity!r} of {uri} is {kind}; only plain values are ids")
    file = table[image].cast(pa.large_binary()).combine_chunks()
    if (row := _first(pc.equal(pc.binary_length(file).fill_null(0), 0))) is not None:
        raise UserError(f"{uri}: no path in row {row + 1} of column {image!r}")
    schemes, readable = (pc.match_substring_regex(file, each) for each in (SCHEME, READABLE))
    if (row := _first(pc.and_not(schemes, readable))) is not None:
        raise UserError(
            f"{uri}: {shown_path(file[row].as_py())}: only local paths and s3:// can be read; download it first"
        )
    _refuse_repeats(file, uri)
    columns = {column: _portable(table[column], f"{name}.columns: {column!r}") for column in config.columns}
    schema = pa.schema([(column, values.type) for column, values in columns.items()])
    if identity:
        ids = table[identity].cast(pa.string()).combine_chunks()
        if (row := _first(ids.is_null())) is not None:
            raise UserError(f"{uri}: no value in row {row + 1} of column {identity!r}")
        _refuse_repeats(ids, uri)
        columns = {"id": ids} | columns
    settings = {"image_column": image, "id_column": identity}
    return FileSource(make_listing(about_of(found, uri, schema, settings), file, more=columns))


def _read_list(path: str, config: SourceConfig) -> pa.Table:
    """Read a list as a table. A text file has one column, `path`."""
    try:
        data = storage.read(path)
        if path.lower().endswith(".txt"):
            lines = data.removeprefix(b"\xef\xbb\xbf").splitlines()
            return pa.table({"path": pa.array([line for line in lines if line.strip()], pa.large_binary())})
        block = min(len(data) + 1, 2**31 - 1)  # one block for all: types are inferred from the first
        if path.lower().endswith(".jsonl"):
            return pa.json.read_json(pa.BufferReader(data), pa.json.ReadOptions(block_size=block))
        texts = dict.fromkeys((*PATH_COLUMNS, config.image_column), pa.large_binary()) | {config.id_column: pa.string()}
        return pa.csv.read_csv(
            pa.BufferReader(data),
            pa.csv.ReadOptions(block_size=block),
            pa.csv.ParseOptions(newlines_in_values=True),
            pa.csv.ConvertOptions(column_types=texts),
        )
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} can't be read as a list: {error}") from error


def _portable(column: pa.ChunkedArray, what: str) -> pa.ChunkedArray:
    """Cast a column to a type that Parquet returns unchanged.

    Args:
        column: the values.
        what: the name of the column, for error messages.

    Raises:
        UserError: if the values are nested, or bytes that are not valid text.
    """
    if pa.types.is_nested(column.type):
        raise UserError(f"{what} is {column.type}; only plain values are carried")
    kinds = {pa.timestamp("s"): pa.timestamp("ms"), pa.time32("s"): pa.time32("ms")}
    kinds |= dict.fromkeys((pa.null(), pa.binary(), pa.large_binary()), pa.string())
    try:
        return column.cast(kinds.get(column.type, column.type))
    except pa.ArrowInvalid as error:
        raise UserError(f"{what} is not text: {error}") from error


def _refuse_repeats(column: pa.Array, path: str) -> None:
    """Raise a UserError if a value is in two rows."""
    if len(column.unique()) == len(column):
        return
    rows: dict[Any, int] = {}
    for row, value in enumerate(column.to_pylist()):
        if (first := rows.setdefault(value, row)) != row:
            shown = shown_path(value) if isinstance(value, bytes) else value
            raise UserError(f"{path}: {shown} is in row {first + 1} and again in row {row + 1}; name every image once")


def _first(rows: pa.Array) -> int | None:
    """Return the index of the first row that is true, or None."""
    found = pc.index(rows, True).as_py()
    return None if found < 0 else found
