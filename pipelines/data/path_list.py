"""A list of images: a text, CSV or JSON Lines file with the path of an image in each row."""

import csv
import io
import itertools
import os
import posixpath
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from litevae import storage
from litevae.errors import UserError
from litevae.images import ImageError
from pipelines.data.column_types import NoCommonType, NotCarried, column_of, column_of_csv, kind_of, parse_json, to_utf8
from pipelines.data.config import Source as SourceConfig
from pipelines.data.discovery import Found, shown_path
from pipelines.data.file_source import FileSource
from pipelines.data.odd_paths import FIRST, refuse_odd_paths
from pipelines.data.source import (
    DEFAULTS,
    LISTING,
    READABLE,
    SCHEME,
    Source,
    about_of,
    decode_path,
    encode_path,
    id_column_of,
    locate,
    make_listing,
    version_column,
)
from pipelines.data.unusable import explain_content
from pipelines.runtime.logs import say

PATH_COLUMNS = ("image", "file_name", "path", "file", "uri", "url")  # the first of these that a list has
_HEADER_BYTES = 2**20
STATS, STATED = 16, 4096  # how many files are asked for their time at once on a slow file system; paths in a part
SLOW_STAT = 1e-4  # seconds
_SEPARATORS = {";": "';'", "\t": "tabs", "|": "'|'"}

# A column as it stands in the list: an Arrow array of bytes of a text or CSV file, or a list of JSON values.
Column = Any


def list_paths(found: Found, uri: str, config: SourceConfig, name: str) -> Source:
    """Read a list of images.

    Args:
        found: the file.
        uri: its absolute path.
        config: the source's config section.
        name: the name of that section, for error messages.

    Raises:
        UserError: if the list can't be read, has no paths, lacks a column, holds values that a column can't carry, or
            names an image or an id twice.
    """
    have, table = _read_list(uri, config)
    where = f"{uri}; it has {_shown_names(have)}"
    asked = () if config.image_column == DEFAULTS.image_column else (config.image_column,)
    image = next((column for column in asked or PATH_COLUMNS if column in have), None)
    if image is None:
        raise UserError(f"{name}.image_column: no column {' or '.join(map(repr, asked or PATH_COLUMNS))} in {where}")
    identity = id_column_of(have, config, name, where)
    for column in config.columns:
        if column not in have:
            raise UserError(f"{name}.columns: no column {column!r} in {where}")
        if column in ("id", version_column(found.kind), *LISTING.names):
            raise UserError(f"{name}.columns: {column!r} can't be carried from a list under this name; rename it there")
    for column in (image, *([identity] if identity else []), *config.columns):
        if have.count(column) > 1:
            raise UserError(f"{uri}: several columns have one name: {column}")
    if not len(table[image]):
        raise UserError(f"{name}.uri={config.uri}: no paths in it")
    file = _paths(table[image], f"column {image!r} of {uri}")
    if (row := _first(pc.equal(pc.binary_length(file).fill_null(0), 0))) is not None:
        raise UserError(f"{uri}: no path in row {row + 1} of column {image!r}")
    schemes, readable = (pc.match_substring_regex(file, each) for each in (SCHEME, READABLE))
    if (row := _first(pc.and_not(schemes, readable))) is not None:
        raise UserError(
            f"{uri}: {shown_path(file[row].as_py())}: only local paths and s3:// can be read; download it first"
        )
    refuse_odd_paths(file.slice(0, FIRST).to_pylist(), found.root, f"{uri}: column {image!r}", image)
    _refuse_undecodable(file, found.root, uri)
    unique = config.ids == "unique"
    if not unique:
        _refuse_repeats(file, uri, "name every image once", name)
    columns: dict[str, pa.Array | pa.ChunkedArray] = {**_carried(table, config, uri)}
    schema = pa.schema([(column, values.type) for column, values in columns.items()])
    settings: dict[str, Any] = {"image_column": image, "id_column": identity}
    if unique:
        settings["ids"] = config.ids  # only then, so that the digest of other lists stays what it was
        list_name = posixpath.basename(uri)
        columns = {"id": pa.array(f"{list_name}/{row:09d}" for row in range(len(file)))} | columns
    elif identity:
        ids = _ids(table[identity], identity, uri)
        if (row := _first(ids.is_null())) is not None:
            raise UserError(f"{uri}: no value in row {row + 1} of column {identity!r}")
        _refuse_repeats(ids, uri, f"name a column with unique ids by {name}.id_column=...", name)
        columns = {"id": ids} | columns
    columns[version_column(found.kind)] = _versions(file, found.root)
    # A row is known by its path, or by its number if one path may be in several rows.
    offset = np.arange(len(file)) if unique else 0
    return FileSource(make_listing(about_of(found, uri, schema, settings), file, offset=offset, more=columns))


def read_table(
    path: str, names: str, columns: Sequence[str]
) -> tuple[pa.Array | None, dict[str, pa.Array | pa.ChunkedArray]]:
    """Read a list as a column of paths and columns that are carried.

    Args:
        path: a .csv or .jsonl file.
        names: the column of paths.
        columns: the columns to read.

    Returns:
        The paths, large_binary, None if there is no such column; and those of the columns that the list has.

    Raises:
        UserError: if the list can't be read, or holds values that a column can't carry.
    """
    have, table = _read_list(path, SourceConfig(image_column=names, columns=list(columns)))
    carried = SourceConfig(columns=[column for column in columns if column in have])
    paths = _paths(table[names], f"column {names!r} of {path}") if names in have else None
    return paths, _carried(table, carried, path)


# --- reading ----------------------------------------------------------------------------------------------------


def _read_list(path: str, config: SourceConfig) -> tuple[list[str], dict[str, Column]]:
    """Read a list.

    Returns:
        The names of its columns (of a text file: `path`), and those columns that may be needed, by name. No other
        column matters.
    """
    wanted = {*PATH_COLUMNS, config.image_column, config.id_column, *config.columns}
    try:
        data = storage.read(path)
    except OSError as error:
        raise UserError(f"{path} can't be read as a list: {error}") from error
    if explained := explain_content(path, data[:64]):
        raise UserError(explained)
    try:
        data = to_utf8(data)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} can't be read as a list: it begins as {error.encoding.upper()}, and byte {error.start} is none; "
            f"save it as UTF-8"
        ) from None
    if path.lower().endswith(".txt"):
        lines = [line for line in data.splitlines() if line.strip()]
        return ["path"], {"path": pa.array(lines, pa.large_binary())}
    return _read_json_lines(path, data, wanted) if path.lower().endswith(".jsonl") else _read_csv(path, data, wanted)


def _read_json_lines(path: str, data: bytes, wanted: set[str]) -> tuple[list[str], dict[str, Column]]:
    """Read JSON objects, which are one a line as a rule. Bytes that are not UTF-8 become surrogate escapes."""
    text = data.decode("utf-8", "surrogateescape")
    names: dict[str, None] = {}
    values: dict[str, list[Any]] = {}
    columns: list[tuple[str, Callable[[Any], None]]] = []  # of each wanted column that a row had: how to append to it
    keys: Any = ()  # of the row before, which are those of this one as a rule
    count, position = 0, _after_spaces(text, 0)
    while position < len(text):
        try:
            row, end = parse_json(text, position)
        except (ValueError, RecursionError) as error:
            line = text.count("\n", 0, position) + 1
            hint = "; it has to hold one JSON object a line" if text[position] != "{" else ""
            raise UserError(
                f"{path} can't be read as a list: line {line}: {getattr(error, 'msg', error)}{hint}"
            ) from None
        if row.keys() != keys:
            keys = row.keys()
            for name in wanted & (keys - names.keys()):
                values[name] = [None] * count
                columns.append((name, values[name].append))
            names |= dict.fromkeys(keys)
        for name, append in columns:
            append(row.get(name))
        count += 1
        position = _after_spaces(text, end)
    for name, column in values.items():
        if NotCarried in set(map(type, column)):
            place = next(n for n, value in enumerate(column) if isinstance(value, NotCarried))
            raise UserError(f"{path}: column {name!r} is there twice in row {place + 1}")
    return list(names), dict(values)


def _after_spaces(text: str, position: int) -> int:
    return _SPACES.match(text, position).end()  # type: ignore[union-attr]  # it matches everywhere


_SPACES = re.compile(r"[ \t\r\n]*")


def _read_csv(path: str, data: bytes, wanted: set[str]) -> tuple[list[str], dict[str, Column]]:
    """Read the columns of a CSV file as bytes; no value, unlike "" in quotes, is null."""
    names = _header(path, data, wanted)
    places = {name: f"f{names.index(name)}" for name in wanted if name in names}
    if not places:
        return names, {}
    try:
        table = pa.csv.read_csv(
            pa.BufferReader(data),
            # The names are read as a row, because two columns may have one name, which no column was asked for.
            pa.csv.ReadOptions(block_size=min(len(data) + 1, 2**31 - 1), autogenerate_column_names=True),
            pa.csv.ParseOptions(newlines_in_values=True),
            pa.csv.ConvertOptions(
                column_types=dict.fromkeys(places.values(), pa.large_binary()),
                include_columns=[*places.values()],
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
    except pa.ArrowException as error:
        raise UserError(f"{path} can't be read as a list: {error}") from error
    return names, {name: table[place].slice(1) for name, place in places.items()}


def _header(path: str, data: bytes, wanted: set[str]) -> list[str]:
    """Return the names of the columns of a CSV file.

    Raises:
        UserError: if there are none, or if something else than commas separates them.
    """
    try:
        rows = csv.reader(io.StringIO(decode_path(data[:_HEADER_BYTES]), newline=""))
        names = next((row for row in rows if row), None)
    except csv.Error as error:
        raise UserError(f"{path} can't be read as a list: {error}") from error
    if names is None:
        raise UserError(f"{path} can't be read as a list: it is empty")
    if not {*names} & wanted:
        for separator, shown in _SEPARATORS.items():
            parts = [part.strip("\"'") for name in names for part in name.split(separator)]
            if len(parts) > len(names) and {*parts} & wanted:
                raise UserError(f"{path} has {shown} between its columns; write it with commas: {','.join(parts)}")
    return names


# --- columns ----------------------------------------------------------------------------------------------------


def _paths(column: Column, what: str) -> pa.Array:
    """Return a column of paths as the file system's bytes.

    Raises:
        UserError: if they are no text.
    """
    if not isinstance(column, list):
        return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    try:
        if kind_of(column) != pa.string():
            raise NoCommonType(f"{kind_of(column)}", 0)
    except NoCommonType as error:
        raise UserError(f"{what} holds {error}, not paths") from None
    try:
        return pa.array([None if path is None else encode_path(path) for path in column], pa.large_binary())
    except UnicodeEncodeError as error:
        raise UserError(f"{what} holds {error.object!a}, which is no path") from None


def _carried(table: dict[str, Column], config: SourceConfig, path: str) -> dict[str, pa.Array | pa.ChunkedArray]:
    """Return the columns that are carried, each of the type that holds its values unchanged.

    Which columns of a CSV file are numbers is a guess, so it is printed.

    Raises:
        UserError: if there is no such type, or if text is not UTF-8.
    """
    found: dict[str, pa.Array | pa.ChunkedArray] = {}
    read: dict[str, list[str]] = {"numbers": [], "text": []}
    for name in config.columns:
        column, what = table[name], f"{path}: column {name!r}"
        if isinstance(column, list):
            found[name] = _json_column(column, what)
            continue
        found[name], odd = column_of_csv(_text(column, what))
        is_text = found[name].type == pa.string()
        read["text" if is_text else "numbers"].append(
            f"{name} ({odd!r} is not how a number is written)" if odd else name
        )
    if any(read.values()):
        say(f"{path}: read as " + "; as ".join(f"{kind}: {', '.join(names)}" for kind, names in read.items() if names))
    return found


def _ids(column: Column, name: str, path: str) -> pa.Array:
    what = f"{path}: column {name!r}"
    ids = _json_column(column, what, "ids").cast(pa.string()) if isinstance(column, list) else _text(column, what)
    return ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids


def _json_column(values: Sequence[Any], what: str, role: str = "carried") -> pa.Array | pa.ChunkedArray:
    try:
        return column_of(values)
    except NoCommonType as error:
        raise UserError(
            f"{what} holds {error}: row {error.place + 1}; only plain values of one kind are {role}"
        ) from None


def _text(column: pa.Array | pa.ChunkedArray, what: str) -> pa.Array | pa.ChunkedArray:
    """Return bytes as text.

    Raises:
        UserError: if a value is not UTF-8.
    """
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        row, value = next((n, each) for n, each in enumerate(column.to_pylist()) if each and not _is_utf8(each))
        raise UserError(f"{what} is not UTF-8: row {row + 1}, {_odd_byte(value)}; save the list as UTF-8") from None


def _versions(paths: pa.Array, folder: str) -> pa.Array:
    """Return a number for each file that is another once the file is written again.

    It is null for a file that is not there, or that is on S3: to ask for each would take a request each.
    """

    base = os.fsencode(folder)

    def version(path: bytes | None) -> int | None:
        try:
            if path is None:
                return None
            if b":" in path or storage.is_remote(folder):
                where = locate(folder, decode_path(path))
                status = None if storage.is_remote(where) else os.stat(where)
            else:  # the same, in half the time
                status = os.stat(os.path.join(base, path))
        except (OSError, ValueError, ImageError):
            return None
        return None if status is None else (31 * status.st_mtime_ns + status.st_size) % 2**63

    def versions(start: int) -> list[int | None]:
        return [version(path) for path in paths.slice(start, STATED).to_pylist()]

    begun = time.perf_counter()
    found = versions(0)
    slow = time.perf_counter() - begun > STATED * SLOW_STAT  # a file system on a network; else threads only hinder
    with ThreadPoolExecutor(STATS if slow else 1) as threads:
        parts = threads.map(versions, range(STATED, len(paths), STATED))
        return pa.array(itertools.chain(found, *parts), pa.int64())


def _refuse_undecodable(paths: pa.Array, folder: str, uri: str) -> None:
    """Raise a UserError if paths are not UTF-8, and the first of them do not exist.

    A path on Linux may hold any bytes, so one that exists is taken as it is.
    """
    odd: list[tuple[int, bytes]] = []
    for start in range(0, len(paths), 2**16):
        part = paths.slice(start, 2**16)
        try:
            part.cast(pa.large_string())
        except pa.ArrowInvalid:
            odd += [(start + row, path) for row, path in enumerate(part.to_pylist()) if not _is_utf8(path)]
        if len(odd) >= 8:
            break
    if odd and not any(storage.size(locate(folder, decode_path(path))) is not None for _, path in odd[:8]):
        row, path = odd[0]
        raise UserError(
            f"{uri}: {shown_path(path)} in row {row + 1} is not UTF-8 ({_odd_byte(path)}), and there is no file of "
            f"this name; save the list as UTF-8"
        )


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _odd_byte(data: bytes) -> str:
    """Return the first byte that is not UTF-8, as error messages show it."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return f"byte 0x{data[error.start]:02x} after {shown_path(data[: error.start])!r}"
    return ""


def _refuse_repeats(column: pa.Array, path: str, remedy: str, name: str) -> None:
    """Raise a UserError if a value is in two rows.

    Args:
        column: paths or ids.
        path: of the list.
        remedy: what to do, besides letting ids be made from row numbers.
        name: the name of the config section.
    """
    if len(column.unique()) == len(column):
        return
    rows: dict[Any, int] = {}
    for row, value in enumerate(column.to_pylist()):
        if (first := rows.setdefault(value, row)) != row:
            shown = shown_path(value) if isinstance(value, bytes) else value
            raise UserError(
                f"{path}: {shown} is in row {first + 1} and again in row {row + 1}; {remedy}, or give "
                f"{name}.ids=unique: each row is then an image of its own, and its id is made from the row's number"
            )


def _shown_names(names: Sequence[str]) -> str:
    """Return the names of columns for an error message, which says if one is not UTF-8."""
    shown = ", ".join(shown_path(encode_path(name)) for name in names)
    odd = next((raw for raw in map(encode_path, names) if not _is_utf8(raw)), b"")
    return f"{shown} (not UTF-8: {_odd_byte(odd)}; save the list as UTF-8)" if odd else shown


def _first(rows: pa.Array) -> int | None:
    """Return the index of the first row that is true, or None."""
    found = pc.index(rows, True).as_py()
    return None if found < 0 else found
