"""Where images come from: units in a fixed order, listed once, read by index anywhere.

A source is its listing: an Arrow table of what lies where, small, picklable, and stored beside what is made of it. The
driver lists; workers get the part they read.
"""

import base64
import hashlib
import io
import json
import os
import posixpath
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO, Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from litevae import storage
from litevae.errors import UserError
from litevae.images import ImageError
from litevae.storage import Recent
from pipelines.data import tar_index
from pipelines.data.config import Source as SourceConfig
from pipelines.data.discovery import IMAGE_SUFFIXES, THREADS, Found, find, root_of

DEFAULTS = SourceConfig()
WINDOW_GROUPS = 4
MAX_GROUP_BYTES = 2**31 - 1
MAX_IMAGE_BYTES = 2**30  # of a file; the largest images that are decoded, uncompressed, have as many
LISTING = pa.schema([("file", pa.large_binary()), ("rows", pa.int32()), ("offset", pa.int64()), ("size", pa.int64())])
SCHEME, READABLE = "^[A-Za-z][A-Za-z0-9+.-]*://", "^(s3://|file:///)"
UNREADABLE = (ValueError, TypeError, OverflowError, RecursionError)  # what a sample's metadata can provoke
PATH_COLUMNS = ("image", "file_name", "path", "file", "uri", "url")  # of a list, the first that it has


@dataclass(frozen=True)
class Item:
    id: str
    data: bytes
    columns: dict[str, Any] = field(default_factory=dict)


class Source(ABC):
    """
    Attributes:
        kind: folder, parquet, webdataset or list.
        uri: absolute path, pattern or s3://.
        root: the folder that the listing's files are relative to.
        digest: sha256 over the listing and what else decides which images these are; where they lie is no part of it.
        remote: whether images come from S3.
        units: how many images.
        groups: rows in each locality group (1 per file; Parquet: a row group; tars: a byte range), in unit order.
        window: rows that may be read in any order at no extra cost; what an `EpochOrder` shuffles.
        schema: names and types of the columns carried besides id and image.
        labels: class names by label, where folders are the classes.
        listing: a row per group: `file`, `rows`, `offset` (tars: in bytes; Parquet: the row group's number), `size` in
            bytes (-1: unknown), and what is known of its images by now. Everything else is in the schema's metadata.
    """

    def __init__(self, listing: pa.Table):
        self.listing = listing.combine_chunks()
        self._about: dict[str, Any] = json.loads(listing.schema.metadata[b"source"])
        self.kind: str = self._about["kind"]
        self.uri: str = self._about["uri"]
        self.root: str = self._about["root"]
        self.digest: str = self._about["digest"]
        self.labels: list[str] = self._about.get("labels", [])
        self.schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(self._about["schema"])))
        self.remote = storage.remote(self.root)
        rows = self.listing["rows"].to_numpy().astype(np.int64)
        self._starts = np.cumsum(rows) - rows
        # A part begins and ends anywhere in its first and last group.
        self._skip, self.units = self._about.get("part", (0, int(rows.sum())))
        ends = np.minimum(self._starts + rows, self._skip + self.units)
        self.groups = ends - np.maximum(self._starts, self._skip)
        self.window = WINDOW_GROUPS * int(self.groups.max(initial=0))

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (_to_bytes(self.listing),)  # Arrow would pickle all of what a slice is of

    @property
    def identity(self) -> dict[str, Any]:
        """What it is, as plain JSON."""
        own = {"kind": self.kind, "uri": self.uri, "digest": self.digest, "units": self.units}
        return own | self._about["settings"]

    def part(self, start: int, stop: int) -> "Source":
        """Units start ... stop, renumbered from 0: all that a worker needs to read them."""
        if not 0 <= start < stop <= self.units:
            raise IndexError(f"units {start} ... {stop} of {self.units}")
        (first, row), (last, _) = self._place(start), self._place(stop - 1)
        about = {key: value for key, value in self._about.items() if key != "labels"}
        return restore(_with(self.listing.slice(first, last + 1 - first), about | {"part": (row, stop - start)}))

    def _place(self, unit: int) -> tuple[int, int]:
        """The group of a unit, and its row there."""
        if not 0 <= unit < self.units:
            raise IndexError(f"unit {unit} of {self.units}")
        group = int(np.searchsorted(self._starts, unit + self._skip, side="right")) - 1
        return group, unit + self._skip - int(self._starts[group])

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Units start ... stop as (group, its first row, rows)."""
        while start < stop:
            group, row = self._place(start)
            rows = min(stop - start, self.listing["rows"][group].as_py() - row)
            yield group, row, rows
            start += rows

    def _file(self, group: int) -> str:
        """Relative to the root, or as a list has it."""
        return _decode(self.listing["file"][group].as_py())

    @abstractmethod
    def id(self, unit: int) -> str:
        """Stable and unique: source-relative path, or the id column."""

    @abstractmethod
    def ids(self, start: int, stop: int) -> list[str]:
        """Those of units start ... stop, without reading images where ids lie apart from them."""

    @abstractmethod
    def columns(self, unit: int) -> dict[str, Any]:
        """Values of `schema`'s columns.

        Raises:
            ImageError: they can't be read.
        """

    @abstractmethod
    def data(self, unit: int) -> bytes:
        """The encoded image.

        Raises:
            ImageError: it is missing or can't be read.
        """

    def read(self, unit: int) -> Item:
        return Item(self.id(unit), self.data(unit), self.columns(unit))


def open_source(config: SourceConfig, name: str = "source", labels: Sequence[str] = ()) -> Source:
    """
    Args:
        name: the config section, for messages.
        labels: class names that are numbered already, as `Source.labels` of an earlier listing: new ones come after.

    Raises:
        UserError: no such path, no images in it, no such column, ...
    """
    if not config.uri:
        raise UserError(f"{name}.uri is empty; give a folder of images or Parquet file(s): {name}.uri=/data/photos")
    try:
        uri = storage.absolute(config.uri)
    except UserError as error:
        raise UserError(f"{name}.uri: {error}") from None
    found = find(uri, f"{name}.uri={config.uri}")
    if config.split and found.kind != "parquet":
        raise UserError(f"{name}.split={config.split}: {config.uri} is no Parquet, only there are splits")
    if found.kind == "folder":
        return _list_folder(found, uri, config, name, labels)
    return {"parquet": _list_parquet, "webdataset": _list_tars, "list": _list_list}[found.kind](
        found, uri, config, name
    )


def restore(listing: pa.Table, uri: str = "") -> Source:
    """The source of a listing. Nothing is listed again.

    Args:
        uri: where the files are now, if they were moved.
    """
    about = json.loads(listing.schema.metadata[b"source"])
    uri = storage.absolute(uri) if uri else about["uri"]
    if uri != about["uri"]:
        listing = _with(listing, about | {"uri": uri, "root": root_of(uri)})
    kinds: dict[str, Callable[[pa.Table], Source]] = {
        "folder": FileSource,
        "list": FileSource,
        "parquet": ParquetSource,
        "webdataset": TarSource,
    }
    return kinds[about["kind"]](listing)


# --- listings -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Growth:
    """What a source has become since it was listed.

    Attributes:
        new: groups that were not there, as a listing: `restore` makes a source of them.
        changed, gone: how many groups have another size now, or are not there any more.
        examples: files of up to 5 of these, the changed ones first.
    """

    new: pa.Table
    changed: int
    gone: int
    examples: str


def compare(old: list[pa.Table], new: Source) -> Growth:
    """A source's groups against those of earlier listings; the same `file` and `offset` make the same group."""
    every = pa.concat_tables(
        table.select(LISTING.names)
        .cast(LISTING)
        .append_column("new", [np.full(len(table), table is new.listing)])
        .append_column("place", [np.arange(len(table))])
        for table in [*old, new.listing]
    ).combine_chunks()
    order = [(key, "ascending") for key in ("file", "offset", "new")]
    every = every.take(pc.sort_indices(every, sort_keys=order)).combine_chunks()
    is_new = every["new"].to_numpy()
    pairs = _repeats(every, "file", "offset") & ~is_new[:-1] & is_new[1:]
    known = np.append(False, pairs) | np.append(pairs, False)
    changed = np.flatnonzero(pairs & ~_repeats(every, "rows", "size"))
    gone = np.flatnonzero(~is_new & ~known)
    added = np.sort(every["place"].to_numpy()[is_new & ~known])
    examples = [_text(every["file"][int(row)].as_py()) for row in [*changed, *gone][:5]]
    table = new.listing.take(pa.array(added))
    about = json.loads(table.schema.metadata[b"source"])
    table = _with(table, about | {"digest": _digest(table, about)})
    return Growth(table, len(changed), len(gone), ", ".join(examples))


def _repeats(table: pa.Table, *columns: str) -> np.ndarray:
    """Which rows are equal to the next, in these columns."""
    equal = [pc.equal(table[name].slice(0, len(table) - 1), table[name].slice(1)).to_numpy() for name in columns]
    return np.logical_and.reduce(equal)


def _listing(
    about: dict[str, Any], file: Any, rows: Any = 1, offset: Any = 0, size: Any = -1, more: dict[str, Any] | None = None
) -> pa.Table:
    """A listing with its metadata.

    Args:
        about: what `Source` finds there, less the digest.
        file, rows, offset, size: columns, or one value for all rows.
        more: further columns.
    """
    values = [np.full(len(file), value) if isinstance(value, int) else value for value in (rows, offset, size)]
    table = pa.table(dict(zip(LISTING.names, [file, *values], strict=True))).cast(LISTING)
    for name, column in (more or {}).items():
        table = table.append_column(name, column)
    return _with(table, about | {"digest": _digest(table, about)})


def _with(listing: pa.Table, about: dict[str, Any]) -> pa.Table:
    return listing.replace_schema_metadata({b"source": json.dumps(about).encode()})


def _about(found: Found, uri: str, schema: pa.Schema, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    packed = base64.b64encode(schema.serialize().to_pybytes()).decode()
    return {"kind": found.kind, "uri": uri, "root": found.root, "schema": packed, "settings": settings, **more}


def _digest(listing: pa.Table, about: dict[str, Any]) -> str:
    """sha256 over columns' lengths and bytes, however Arrow has them in memory."""
    digest = hashlib.sha256(json.dumps([about["settings"], about.get("names")], sort_keys=True).encode())
    names = LISTING.names if about["kind"] == "folder" else listing.column_names  # labels are a matter of numbering
    for name in names:
        column = listing[name]
        if not pa.types.is_large_binary(column.type):
            column = column.cast(pa.large_string()).cast(pa.large_binary())
        digest.update(pc.binary_length(column).fill_null(-1).to_numpy().astype("<i8").tobytes())
        for chunk in column.fill_null(b"").chunks:
            _, offsets, values = chunk.buffers()
            first, last = np.frombuffer(offsets, np.int64)[[chunk.offset, chunk.offset + len(chunk)]]
            digest.update(memoryview(values)[first:last] if last > first else b"")
    return digest.hexdigest()


def _to_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _unpickle(data: bytes) -> Source:
    return restore(pa.ipc.open_stream(data).read_all())


# --- folders and lists: a file a unit -------------------------------------------------------------------------


class FileSource(Source):
    """A folder tree of images, label = the parent folder's place among all that hold images; or a list of paths."""

    def __init__(self, listing: pa.Table):
        super().__init__(listing)
        self.window = self.units
        if self.kind == "list":
            self.remote |= pc.any(pc.starts_with(self.listing["file"], "s3://")).as_py()

    def id(self, unit: int) -> str:
        return self.ids(self._place(unit)[0], unit + 1)[0]

    def ids(self, start: int, stop: int) -> list[str]:
        part = self.listing.slice(start, stop - start)
        if "id" in part.column_names:
            return part["id"].to_pylist()
        return [_text(path) for path in part["file"].to_pylist()]

    def columns(self, unit: int) -> dict[str, Any]:
        return {name: self.listing[name][unit].as_py() for name in self.schema.names}

    def data(self, unit: int) -> bytes:
        group = self._place(unit)[0]
        path = self._file(group)
        if self.kind == "list":
            return _read_file(_locate(self.root, path))
        return _read_file(storage.join(self.root, path), self.listing["size"][group].as_py())


def _list_folder(found: Found, uri: str, config: SourceConfig, name: str, labels: Sequence[str]) -> Source:
    schema = pa.schema([("label", pa.int64()), ("label_name", pa.string())])
    if unknown := sorted(set(config.columns) - set(schema.names)):
        raise UserError(f"{name}.columns: a folder carries label and label_name, not {', '.join(unknown)}")
    file = found.images["file"]
    parents = pc.struct_field(pc.extract_regex(file, "(?s)^(?P<parent>.*)/"), "parent").fill_null(b"")
    coded = parents.combine_chunks().dictionary_encode()
    folders = [_text(folder) for folder in coded.dictionary.to_pylist()]
    numbers = {folder: number for number, folder in enumerate(dict.fromkeys([*labels, *sorted(folders)]))}
    # the root itself is no class
    of_folder = pa.array([numbers[folder] if folder else None for folder in folders], pa.int64())
    names = pa.array([folder or None for folder in folders], pa.string())
    # In parts: an array of strings ends at 2 GiB, which 240 million short names fill, and Arrow does not say so.
    parts = [names.take(coded.indices.slice(start, 2**20)) for start in range(0, len(coded), 2**20)]
    columns = {"label": of_folder.take(coded.indices), "label_name": pa.chunked_array(parts, pa.string())}
    about = _about(found, uri, schema, {}, labels=list(numbers))
    return FileSource(_listing(about, file, size=found.images["size"], more=columns))


def _list_list(found: Found, uri: str, config: SourceConfig, name: str) -> Source:
    table = _read_list(uri, config)
    have, where = table.column_names, f"{uri}; it has {', '.join(table.column_names)}"
    if len(set(have)) < len(have):
        raise UserError(f"{uri}: several columns have one name: {', '.join(have)}")
    if not len(table):
        raise UserError(f"{name}.uri={config.uri}: no paths in it")
    asked = () if config.image_column == DEFAULTS.image_column else (config.image_column,)
    image = next((column for column in asked or PATH_COLUMNS if column in have), None)
    if image is None:
        raise UserError(f"{name}.image_column: no column {' or '.join(map(repr, asked or PATH_COLUMNS))} in {where}")
    identity = _id_column(have, config, name, where)
    for column in config.columns:
        if column not in have:
            raise UserError(f"{name}.columns: no column {column!r} in {where}")
        if column in ("id", *LISTING.names):
            raise UserError(f"{name}.columns: {column!r} can't be carried from a list under this name; rename it there")
    kind = table.field(image).type
    if not (_is_text(kind) or pa.types.is_large_binary(kind)):
        raise UserError(f"{name}.image_column: column {image!r} of {uri} is {kind}, not paths")
    if identity and pa.types.is_nested(kind := table.field(identity).type):
        raise UserError(f"{name}.id_column: column {identity!r} of {uri} is {kind}; only plain values are ids")
    file = table[image].cast(pa.large_binary()).combine_chunks()
    if (row := _first(pc.equal(pc.binary_length(file).fill_null(0), 0))) is not None:
        raise UserError(f"{uri}: no path in row {row + 1} of column {image!r}")
    schemes, readable = (pc.match_substring_regex(file, each) for each in (SCHEME, READABLE))
    if (row := _first(pc.and_not(schemes, readable))) is not None:
        raise UserError(f"{uri}: {_text(file[row].as_py())}: only local paths and s3:// can be read; download it first")
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
    return FileSource(_listing(_about(found, uri, schema, settings), file, more=columns))


def _read_list(path: str, config: SourceConfig) -> pa.Table:
    try:
        data = storage.read(path)
        if path.lower().endswith(".txt"):
            lines = data.removeprefix(b"\xef\xbb\xbf").splitlines()
            return pa.table({"path": pa.array([line for line in lines if line.strip()], pa.large_binary())})
        block = min(len(data) + 1, 2**31 - 1)  # all in one: types are inferred from the first block
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
    """In a type that Parquet gives back as it is."""
    if pa.types.is_nested(column.type):
        raise UserError(f"{what} is {column.type}; only plain values are carried")
    kinds = {pa.timestamp("s"): pa.timestamp("ms"), pa.time32("s"): pa.time32("ms")}
    kinds |= dict.fromkeys((pa.null(), pa.binary(), pa.large_binary()), pa.string())
    try:
        return column.cast(kinds.get(column.type, column.type))
    except pa.ArrowInvalid as error:
        raise UserError(f"{what} is no text: {error}") from error


def _refuse_repeats(column: pa.Array, path: str) -> None:
    if len(column.unique()) == len(column):
        return
    rows: dict[Any, int] = {}
    for row, value in enumerate(column.to_pylist()):
        if (first := rows.setdefault(value, row)) != row:
            shown = _text(value) if isinstance(value, bytes) else value
            raise UserError(f"{path}: {shown} is in row {first + 1} and again in row {row + 1}; name every image once")


def _first(rows: pa.Array) -> int | None:
    """The first that is true."""
    found = pc.index(rows, True).as_py()
    return None if found < 0 else found


def _locate(folder: str, path: str) -> str:
    """A path or URI as it stands in a list or a table that lies in `folder`."""
    if storage.remote(path) or path.startswith("/"):
        return path
    if path.startswith("file:///"):
        return unquote(path.removeprefix("file://"))
    if _is_foreign(path):
        raise ImageError("unreadable", f"{path}: only local paths and s3:// can be read")
    if storage.remote(folder):  # where .. is a name like any other
        return "s3://" + posixpath.normpath(posixpath.join(folder.removeprefix("s3://"), path))
    return storage.join(folder, path)


def _is_foreign(path: str) -> bool:
    return bool(re.match(SCHEME, path)) and not re.match(READABLE, path)


def _read_file(path: str, size: int = -1) -> bytes:
    """
    Args:
        size: bytes, where they are known.
    """
    try:
        if not storage.remote(path):
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # a pipe or a device may have no end
                raise ImageError("unreadable", "no regular file")
            size = status.st_size
        if size > MAX_IMAGE_BYTES:
            raise ImageError("too_large", f"a file of {size / 2**30:.1f} GiB")
        return storage.read(path)
    except (ImageError, storage.Unavailable):  # where the store is away, that is not the image's fault
        raise
    except FileNotFoundError:
        raise ImageError("missing", "the file is gone") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise ImageError("unreadable", getattr(error, "strerror", None) or str(error)) from error


# --- Parquet --------------------------------------------------------------------------------------------------


class ParquetSource(Source):
    """Parquet files with one image a row: its bytes, a struct of `bytes` and `path`, or its path."""

    def __init__(self, listing: pa.Table):
        super().__init__(listing)
        self._image: str = self._about["settings"]["image_column"]
        self._id: str | None = self._about["settings"]["id_column"]
        self._paths: bool = self._about["paths"]
        self._class_names: dict[str, tuple[str, list[str]]] = self._about["names"]
        carried = [_stored(self._class_names, name) for name in self.schema.names]
        self._columns = list(dict.fromkeys([self._image, *([self._id] if self._id else []), *carried]))
        self._footers = Recent(self._read_footer, limit=4)
        self._tables = Recent(self._read_group, limit=self.window + int(self.groups.max()))

    def _read_footer(self, path: str) -> tuple[pq.FileMetaData, int]:
        return _footer(path), 1

    def _read_group(self, group: int) -> tuple[pa.Table, int]:
        table = self._columns_of(group, self._columns)
        return table, len(table)

    def _columns_of(self, group: int, columns: list[str]) -> pa.Table:
        path, position = storage.join(self.root, self._file(group)), self.listing["offset"][group].as_py()
        try:
            table = storage.read_row_group(path, self._footers(path), position, columns)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: row group {position} can't be read: {error}") from error
        if len(table) != self.listing["rows"][group].as_py():
            raise UserError(f"{path} has changed since it was listed")
        return table.select(columns).combine_chunks()

    def _row(self, unit: int) -> tuple[pa.Table, int]:
        """The row group of a unit, and its row there. Held are as many rows as a window can span."""
        group, row = self._place(unit)
        return self._tables(group), row

    def id(self, unit: int) -> str:
        group, row = self._place(unit)
        if self._id is None and not self._paths:
            return self._number(group, row)
        return self._name(self._tables(group)[self._id or self._image][row].as_py(), group, row)

    def ids(self, start: int, stop: int) -> list[str]:
        ids = []
        for group, first, count in self._spans(start, stop):
            rows = range(first, first + count)
            if self._id is None and not self._paths:
                ids += [self._number(group, row) for row in rows]
                continue
            column = self._id or self._image
            values = self._columns_of(group, [column])[column].slice(first, count).to_pylist()
            ids += [self._name(value, group, row) for value, row in zip(values, rows, strict=True)]
        return ids

    def _number(self, group: int, row: int) -> str:
        return f"{_text(self.listing['file'][group].as_py())}/{self.listing['first'][group].as_py() + row:09d}"

    def _name(self, value: Any, group: int, row: int) -> str:
        if value is None and self._id is None:  # a path that is not there
            return self._number(group, row)
        if value is None:
            number = self.listing["first"][group].as_py() + row
            path = storage.join(self.root, self._file(group))
            raise UserError(f"{path}: row {number} has no value in {self._id!r}")
        return str(value)

    def columns(self, unit: int) -> dict[str, Any]:
        if not self.schema.names:
            return {}
        table, row = self._row(unit)
        return {name: self._value(table, row, name) for name in self.schema.names}

    def _value(self, table: pa.Table, row: int, name: str) -> Any:
        if name not in self._class_names:
            return table[name][row].as_py()
        column, names = self._class_names[name]
        label = table[column][row].as_py()
        return names[label] if label is not None and 0 <= label < len(names) else None

    def data(self, unit: int) -> bytes:
        table, row = self._row(unit)
        value = table[self._image][row].as_py()
        if isinstance(value, dict):
            value = value["bytes"] if value["bytes"] is not None else value.get("path")
        if value is None:
            raise ImageError("missing", f"column {self._image!r} is null")
        if isinstance(value, bytes):
            return value
        file = storage.join(self.root, self._file(self._place(unit)[0]))
        return _read_file(_locate(posixpath.dirname(file), value))


def _list_parquet(found: Found, uri: str, config: SourceConfig, name: str) -> Source:
    files = _of_split(found.files, config.split, name, config.uri)
    paths = [storage.join(found.root, file) for file, _ in files]
    with ThreadPoolExecutor(THREADS) as threads:
        listed = list(threads.map(_row_groups, paths, [size for _, size in files]))
    schema = listed[0][0]
    names = _class_names(schema, config)
    image, identity, carried = _choose_columns(schema, names, config, paths[0], name)
    needed = [image, *([identity] if identity else []), *(_stored(names, column) for column in carried.names)]
    for path, (other, _) in zip(paths, listed, strict=True):
        for column in needed:
            if column not in other.names or other.field(column).type != schema.field(column).type:
                has = other.field(column).type if column in other.names else "no such column"
                raise UserError(f"{path}: column {column!r}: {has}; {paths[0]} has {schema.field(column).type}")
            if storage.has_pickles(kind := schema.field(column).type):
                raise UserError(f"{path}: column {column!r} is {kind}: it may hold pickles, which are not read")
    groups = [(_encode(file), *group) for (file, _), (_, parts) in zip(files, listed, strict=True) for group in parts]
    if not groups:
        raise UserError(f"{name}.uri={config.uri}: no rows in {len(files)} Parquet file(s)")
    file, rows, position, size, first = zip(*groups, strict=True)
    settings, paths_in_it = {"image_column": image, "id_column": identity}, _is_text(schema.field(image).type)
    about = _about(found, uri, carried, settings, names=names, paths=paths_in_it)
    source = ParquetSource(_listing(about, file, rows, position, size, {"first": pa.array(first, pa.int64())}))
    if paths_in_it and not identity and _is_foreign(path := source.id(0)):
        raise UserError(
            f"{name}.image_column: {image!r} has {path}: only local paths and s3:// can be read; download it"
        )
    return source


def _row_groups(path: str, size: int) -> tuple[pa.Schema, list[tuple[int, int, int, int]]]:
    """A file's schema, and its row groups: rows, number, bytes, first row."""
    footer = _footer(path, size)
    groups, first = [], 0
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        if group.total_byte_size > MAX_GROUP_BYTES:
            raise UserError(
                f"{path}: row group {number} has {group.total_byte_size / 2**30:.1f} GiB and would be read as a "
                f"whole; write the file with smaller row groups (100 to 1000 images)"
            )
        stored = sum(group.column(column).total_compressed_size for column in range(group.num_columns))
        if group.num_rows:
            groups.append((group.num_rows, number, stored, first))
        first += group.num_rows
    features = {key: value for key, value in (footer.metadata or {}).items() if key == b"huggingface"}
    return footer.schema.to_arrow_schema().with_metadata(features), groups


def _footer(path: str, size: int | None = None) -> pq.FileMetaData:
    try:
        return storage.read_footer(path, size)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from error


def _of_split(files: list[tuple[str, int]], split: str, name: str, uri: str) -> list[tuple[str, int]]:
    """The files of one split, where they are named as Hugging Face names them: data/train-00000-of-00002.parquet."""
    splits: dict[str, list[tuple[str, int]]] = {}
    for file, size in files:
        if match := re.search(r"(?:^|/)(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.parquet$", file):
            splits.setdefault(match[1], []).append((file, size))
    if split and split not in splits:
        there = (
            f"there are {', '.join(sorted(splits))}"
            if splits
            else "files are not named as train-00000-of-00002.parquet"
        )
        raise UserError(f"{name}.split: no split {split!r} in {uri}; {there}")
    if not split and len(splits) > 1:
        raise UserError(f"{name}.uri={uri} holds several splits; give one, {name}.split={' or '.join(sorted(splits))}")
    return splits[split] if split else files


def _class_names(schema: pa.Schema, config: SourceConfig) -> dict[str, tuple[str, list[str]]]:
    """Columns `label_name` that are asked for: the column `label`, and its class names in Hugging Face's metadata."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        named = {label: feature["names"] for label, feature in features.items() if "names" in feature}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
    wanted = [column for column in config.columns if column not in schema.names and column.endswith("_name")]
    labels = {column: column.removesuffix("_name") for column in wanted}
    return {column: (label, named[label]) for column, label in labels.items() if label in named}


def _stored(names: dict[str, tuple[str, list[str]]], column: str) -> str:
    """The column of the file that a carried one is made from."""
    return names[column][0] if column in names else column


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _choose_columns(
    schema: pa.Schema, names: dict[str, tuple[str, list[str]]], config: SourceConfig, file: str, name: str
) -> tuple[str, str | None, pa.Schema]:
    where = f"{file}; it has {', '.join(schema.names)}"
    for key, column in [("image_column", config.image_column), *(("columns", column) for column in config.columns)]:
        if column not in schema.names and (key == "image_column" or column not in names):
            raise UserError(f"{name}.{key}: no column {column!r} in {where}")
    kind = schema.field(config.image_column).type
    encoded = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(encoded) or pa.types.is_large_binary(encoded) or _is_text(kind)):
        raise UserError(
            f"{name}.image_column: column {config.image_column!r} of {file} is {kind}, not image bytes or paths"
        )
    fields = [
        pa.field(column, pa.string()) if column in names else schema.field(column).remove_metadata()
        for column in config.columns
    ]
    for carried in fields:
        if pa.types.is_nested(carried.type):
            raise UserError(f"{name}.columns: {carried.name!r} is {carried.type}; only plain values are carried")
    return config.image_column, _id_column(schema.names, config, name, where), pa.schema(fields)


def _id_column(have: list[str], config: SourceConfig, name: str, where: str) -> str | None:
    """None where there is none, and none was asked for."""
    if config.id_column in have:
        return config.id_column
    if config.id_column != DEFAULTS.id_column:
        raise UserError(f"{name}.id_column: no column {config.id_column!r} in {where}")
    return None


# --- WebDataset -----------------------------------------------------------------------------------------------


class TarSource(Source):
    """WebDataset's tars: a sample's image, and its other files as columns, by extension."""

    def __init__(self, listing: pa.Table):
        super().__init__(listing)
        self._image: str | None = self._about["settings"]["image_column"]
        self._ranges = Recent(self._read_range, limit=WINDOW_GROUPS + 1)

    def _range(self, group: int) -> tuple[str, int, int]:
        """Path, offset and bytes of a group."""
        offset, size = (self.listing[column][group].as_py() for column in ("offset", "size"))
        return storage.join(self.root, self._file(group)), offset, size

    def _read_range(self, group: int) -> tuple[tuple[list[tar_index.Sample], bytes], int]:
        path, offset, size = self._range(group)
        try:
            data = storage.read_range(path, offset, size)
        except OSError as error:
            raise UserError(f"{path} can't be read: {error}") from error
        return (self._samples(io.BytesIO(data), group, 0), data), 1

    def _samples(self, file: IO[bytes], group: int, start: int) -> list[tar_index.Sample]:
        path, _, size = self._range(group)
        try:
            samples = list(tar_index.read_samples(file, path, start, start + size))
        except storage.Unavailable:
            raise
        except UserError:
            samples = []
        if len(samples) != self.listing["rows"][group].as_py():
            raise UserError(f"{path} has changed since it was listed")
        return samples

    def sample(self, unit: int) -> tuple[tar_index.Sample, bytes]:
        """A sample, and the bytes that its files' offsets are in."""
        group, row = self._place(unit)
        samples, data = self._ranges(group)
        return samples[row], data

    def id(self, unit: int) -> str:
        return self._name(self._place(unit)[0], self.sample(unit)[0])

    def ids(self, start: int, stop: int) -> list[str]:
        ids = []
        for group, row, count in self._spans(start, stop):
            path, offset, size = self._range(group)
            try:
                with tar_index.open_tar(path, offset + size) as file:
                    samples = self._samples(file, group, offset)
            except OSError as error:
                raise UserError(f"{path} can't be read: {error}") from error
            ids += [self._name(group, sample) for sample in samples[row : row + count]]
        return ids

    def _name(self, group: int, sample: tar_index.Sample) -> str:
        return f"{_text(self.listing['file'][group].as_py())}/{sample.key}"

    def columns(self, unit: int) -> dict[str, Any]:
        if not self.schema.names:
            return {}
        sample, data = self.sample(unit)
        values = {}
        for column in self.schema:
            try:
                value = _tar_value(sample, data, column.name)
                if pa.types.is_string(column.type) and not isinstance(value, str | None):
                    value = json.dumps(value)
                values[column.name] = pa.scalar(value, column.type).as_py()
            except KeyError:
                values[column.name] = None
            except UNREADABLE as error:
                raise ImageError("unreadable", f"column {column.name!r} ({column.type}): {error}") from error
        return values

    def data(self, unit: int) -> bytes:
        sample, data = self.sample(unit)
        extension = _image_of(sample, self._image)
        if extension is None:
            raise ImageError("missing", f"no {self._image or 'image'} among {', '.join(sample.files)}")
        if not sample.files[extension].regular:
            raise ImageError("unreadable", f".{extension} is a link or another special file in the tar")
        return _content(sample, data, extension)


def _list_tars(found: Found, uri: str, config: SourceConfig, name: str) -> Source:
    with ThreadPoolExecutor(THREADS) as threads:
        paths = [storage.join(found.root, file) for file, _ in found.files]
        ranges = list(threads.map(tar_index.list_ranges, paths, [size for _, size in found.files]))
    rows = [(_encode(file), *each) for (file, _), parts in zip(found.files, ranges, strict=True) for each in parts]
    if not rows:
        raise UserError(f"{name}.uri={config.uri}: no samples in {len(paths)} tar(s)")
    file, offset, size, samples = zip(*rows, strict=True)
    image = None if config.image_column == DEFAULTS.image_column else config.image_column.lower()

    def source(schema: pa.Schema) -> TarSource:
        about = _about(found, uri, schema, {"image_column": image})
        return TarSource(_listing(about, file, samples, offset, size))

    bare = source(pa.schema([]))
    first = [bare.sample(unit) for unit in range(samples[0])]
    extensions = sorted({extension for sample, _ in first for extension in sample.files})
    where = f"the first samples of {paths[0]}; they have {', '.join(extensions)}"
    if not any(_image_of(sample, image) for sample, _ in first):
        raise UserError(f"{name}.image_column: no {image or 'image'} in {where}")
    return source(pa.schema([(column, _tar_type(first, column, name, where)) for column in config.columns]))


def _tar_type(samples: list[tuple[tar_index.Sample, bytes]], column: str, name: str, where: str) -> pa.DataType:
    """A column's type, from the first samples."""
    values = []
    for sample, data in samples:
        try:
            values.append(_tar_value(sample, data, column))
        except (KeyError, *UNREADABLE):
            continue
    if not values:
        raise UserError(f"{name}.columns: no readable {column!r} in {where}")
    try:
        kind = pa.array(values).type
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{name}.columns: {column!r} is of several types in {where}: {error}") from error
    if pa.types.is_nested(kind):
        raise UserError(f"{name}.columns: {column!r} is {kind}; only plain values are carried")
    return pa.string() if pa.types.is_null(kind) else kind


def _tar_value(sample: tar_index.Sample, data: bytes, column: str) -> Any:
    """Of `cls` (int), `json.field` (what it is) or any other extension (text).

    Raises:
        KeyError: there is none.
        ValueError, RecursionError: it can't be read.
    """
    if not column.startswith("json."):
        text = _content(sample, data, column).decode()
        return int(text) if column == "cls" else text
    content = json.loads(_content(sample, data, "json"))
    if not isinstance(content, dict):
        raise ValueError("the JSON is no object")
    return content[column.removeprefix("json.")]


def _content(sample: tar_index.Sample, data: bytes, extension: str) -> bytes:
    member = sample.files[extension]
    return data[member.offset : member.offset + member.size]


def _image_of(sample: tar_index.Sample, asked: str | None) -> str | None:
    """The extension of its image: the one that is asked for, else the first that is an image's."""
    if asked:
        return asked if asked in sample.files else None
    return next((extension for extension in sample.files if f".{extension}".endswith(IMAGE_SUFFIXES)), None)


def _encode(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")


def _decode(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")


def _text(path: bytes) -> str:
    """A file name as valid text, whatever bytes it has."""
    return path.decode("utf-8", "backslashreplace")
