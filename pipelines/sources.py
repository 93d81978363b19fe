"""Where images come from: units in a fixed order, listed once, read by index anywhere.

A source is small and picklable (the listing is arrays, not an object a row), so the driver lists and workers read.
"""

import glob
import hashlib
import os
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from litevae.errors import UserError
from litevae.images import ImageError
from litevae.storage import Recent
from pipelines.config import Source as SourceConfig

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".ppm")
WINDOW_GROUPS = 4
MAX_GROUP_BYTES = 2**31 - 1


@dataclass(frozen=True)
class Item:
    id: str
    data: bytes
    columns: dict[str, Any] = field(default_factory=dict)


class Source(ABC):
    """
    Attributes:
        uri: absolute path.
        digest: sha256 over the listing (paths, sizes, row groups).
        groups: rows in each locality group (1 per file; Parquet: a row group), in unit order.
        window: rows that may be read in any order at no extra cost; what an `EpochOrder` shuffles.
        schema: names and types of the columns carried besides id and image.
    """

    uri: str
    digest: str
    groups: np.ndarray
    window: int
    schema: pa.Schema

    @property
    def units(self) -> int:
        return int(self.groups.sum())

    @abstractmethod
    def id(self, unit: int) -> str:
        """Stable and unique: source-relative path, or the id column."""

    @abstractmethod
    def columns(self, unit: int) -> dict[str, Any]:
        """Values of `schema`'s columns."""

    @abstractmethod
    def data(self, unit: int) -> bytes:
        """The encoded image.

        Raises:
            ImageError: it is missing or can't be read.
        """

    def read(self, unit: int) -> Item:
        return Item(self.id(unit), self.data(unit), self.columns(unit))


def open_source(config: SourceConfig, name: str = "source") -> Source:
    """
    Args:
        name: the config section, for messages.

    Raises:
        UserError: no such path, no images in it, no such column, ...
    """
    uri = config.uri
    if not uri:
        raise UserError(f"{name}.uri is empty; give a folder of images or Parquet file(s): {name}.uri=/data/photos")
    if "://" in uri:
        raise UserError(f"{name}.uri={uri}: only local paths can be read")
    path = os.path.abspath(uri)
    if os.path.isdir(path):
        images, tables = _walk(path)
        if images and tables:
            raise UserError(
                f"{name}.uri={uri} holds both images ({images[0][0].decode(errors='replace')}) and Parquet files "
                f"({tables[0]}); name one of them, e.g. a subfolder or '{os.path.join(uri, '*.parquet')}'"
            )
        if images:
            return FolderSource(path, images, config, name)
        if tables:
            return ParquetSource(path, [os.path.join(path, table) for table in tables], config, name)
        empty = "is empty" if not os.listdir(path) else "has no images and no Parquet files in it"
        raise UserError(f"{name}.uri={uri} {empty} (image suffixes: {' '.join(IMAGE_SUFFIXES)})")
    files = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
    if not files:
        raise UserError(f"{name}.uri={uri} does not exist")
    others = [file for file in files if not file.endswith(".parquet")]
    if others:
        raise UserError(f"{name}.uri={uri}: {others[0]} is neither a folder nor a .parquet file")
    return ParquetSource(os.path.dirname(path), files, config, name)


def _walk(root: str) -> tuple[list[tuple[bytes, int]], list[str]]:
    """Images (relative posix path, bytes) and Parquet files below a folder, sorted. Hidden names are left out:
    they are what systems and tools leave behind (._photo.jpg, .ipynb_checkpoints)."""
    images, tables, seen = [], [], set()
    for folder, children, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link back up the tree
            children.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        children[:] = [child for child in children if not child.startswith(".")]
        for name in names:
            if name.startswith("."):
                continue
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, root)
            if name.lower().endswith(IMAGE_SUFFIXES):
                size = os.stat(path).st_size if os.path.exists(path) else -1  # -1: a dangling link
                images.append((os.fsencode(relative.replace(os.sep, "/")), size))
            elif name.lower().endswith(".parquet"):
                tables.append(relative)
    return sorted(images), sorted(tables)


class FolderSource(Source):
    """A folder tree of images; label = the parent folder's place among all that hold images."""

    schema = pa.schema([("label", pa.int64()), ("label_name", pa.string())])

    def __init__(self, root: str, images: list[tuple[bytes, int]], config: SourceConfig, name: str):
        if unknown := sorted(set(config.columns) - set(self.schema.names)):
            raise UserError(f"{name}.columns: a folder carries label and label_name, not {', '.join(unknown)}")
        self.uri = root
        self._paths = pa.array([path for path, _ in images], pa.large_binary())
        folders = [path.rpartition(b"/")[0] for path, _ in images]
        self._labels = sorted(set(folders))
        index = {folder: number for number, folder in enumerate(self._labels)}
        self._label = np.array([index[folder] for folder in folders], dtype=np.int32)
        self.groups = np.ones(len(images), dtype=np.int64)
        self.window = len(images)
        self.digest = _digest(f"{_text(path)}\0{size}" for path, size in images)

    def id(self, unit: int) -> str:
        return _text(self._paths[unit].as_py())

    def columns(self, unit: int) -> dict[str, Any]:
        label = int(self._label[unit])
        named = self._labels[label] != b""  # the root itself is no class
        return {"label": label if named else None, "label_name": _text(self._labels[label]) if named else None}

    def data(self, unit: int) -> bytes:
        path = os.path.join(os.fsencode(self.uri), self._paths[unit].as_py())
        try:
            with open(path, "rb") as file:
                return file.read()
        except FileNotFoundError:
            raise ImageError("missing", "the file is gone") from None
        except OSError as error:
            raise ImageError("unreadable", error.strerror or str(error)) from error


class ParquetSource(Source):
    """Parquet files with one encoded image a row: bytes, or a struct with a `bytes` field."""

    def __init__(self, root: str, files: list[str], config: SourceConfig, name: str):
        self.uri = config.uri if glob.has_magic(config.uri) else (root if len(files) > 1 else files[0])
        self.uri = os.path.abspath(self.uri)
        self._files = files
        self._names = [os.path.relpath(file, root).replace(os.sep, "/") for file in files]
        with ThreadPoolExecutor(min(16, len(files))) as threads:
            footers = list(threads.map(_footer, files))
        schema = footers[0].schema.to_arrow_schema()
        self._image, self._id, self.schema = _choose_columns(schema, config, files[0], name)
        self._columns = [column for column in (self._image, self._id, *self.schema.names) if column]
        groups, places, listing = [], [], []
        for number, (file, footer) in enumerate(zip(files, footers, strict=True)):
            found = footer.schema.to_arrow_schema()
            for column in self._columns:
                if column not in found.names or found.field(column).type != schema.field(column).type:
                    has = found.field(column).type if column in found.names else "no such column"
                    raise UserError(f"{file}: column {column!r}: {has}; {files[0]} has {schema.field(column).type}")
            for group in range(footer.num_row_groups):
                places.append((number, group))
                groups.append(footer.row_group(group).num_rows)
                size = footer.row_group(group).total_byte_size
                if size > MAX_GROUP_BYTES:
                    raise UserError(
                        f"{file}: row group {group} has {size / 2**30:.1f} GiB and would be read as a whole; "
                        f"write the file with smaller row groups (100 to 1000 images)"
                    )
            rows = ",".join(map(str, groups[len(groups) - footer.num_row_groups :]))
            listing.append(f"{self._names[number]}\0{os.path.getsize(file)}\0{rows}")
        self.groups = np.array(groups, dtype=np.int64)
        if not self.units:
            raise UserError(f"{name}.uri={config.uri}: no rows in {len(files)} Parquet file(s)")
        self._starts = np.cumsum(self.groups) - self.groups
        self._places = np.array(places, dtype=np.int32)
        self._file_starts = self._starts[[places.index((number, 0)) for number in self._places[:, 0]]]
        self.window = WINDOW_GROUPS * int(self.groups.max())
        self.digest = _digest([*listing, repr((self._image, self._id))])
        self._tables = Recent(self._read_group, limit=self.window + int(self.groups.max()))

    def _read_group(self, group: int) -> tuple[pa.Table, int]:
        number, position = self._places[group]
        try:
            with pq.ParquetFile(self._files[number]) as file:
                table = file.read_row_group(position, columns=self._columns)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{self._files[number]}: row group {position} can't be read: {error}") from error
        return table.select(self._columns).combine_chunks(), table.num_rows

    def _row(self, unit: int) -> tuple[pa.Table, int]:
        """The row group of a unit, and its row there. Held are as many rows as a window can span."""
        group = int(np.searchsorted(self._starts, unit, side="right")) - 1
        return self._tables(group), unit - int(self._starts[group])

    def id(self, unit: int) -> str:
        group = int(np.searchsorted(self._starts, unit, side="right")) - 1
        file = self._places[group, 0]
        if self._id is None:
            return f"{self._names[file]}/{unit - self._file_starts[group]:09d}"
        table, row = self._row(unit)
        value = table[self._id][row].as_py()
        if value is None:
            raise UserError(f"{self._files[file]}: row {unit - self._file_starts[group]} has no value in {self._id!r}")
        return str(value)

    def columns(self, unit: int) -> dict[str, Any]:
        if not self.schema.names:
            return {}
        table, row = self._row(unit)
        return {name: table[name][row].as_py() for name in self.schema.names}

    def data(self, unit: int) -> bytes:
        table, row = self._row(unit)
        value = table[self._image][row].as_py()
        if isinstance(value, dict):
            value = value["bytes"]
        if value is None:
            raise ImageError("missing", f"column {self._image!r} is null")
        return value


def _footer(path: str) -> pq.FileMetaData:
    try:
        return pq.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from error


def _choose_columns(schema: pa.Schema, config: SourceConfig, file: str, name: str) -> tuple[str, str | None, pa.Schema]:
    have = ", ".join(schema.names)
    for key, column in [("image_column", config.image_column), *(("columns", column) for column in config.columns)]:
        if column not in schema.names:
            raise UserError(f"{name}.{key}: no column {column!r} in {file}; it has {have}")
    kind = schema.field(config.image_column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(f"{name}.image_column: column {config.image_column!r} of {file} is {kind}, not image bytes")
    identity: str | None = config.id_column
    if identity not in schema.names:
        if identity != SourceConfig().id_column:
            raise UserError(f"{name}.id_column: no column {identity!r} in {file}; it has {have}")
        identity = None
    fields = [schema.field(column).remove_metadata() for column in config.columns]
    for carried in fields:
        if pa.types.is_nested(carried.type):
            raise UserError(f"{name}.columns: {carried.name!r} is {carried.type}; only plain values are carried")
    return config.image_column, identity, pa.schema(fields)


def _text(path: bytes) -> str:
    """A file name as valid text, whatever bytes it has."""
    return path.decode("utf-8", errors="backslashreplace")


def _digest(lines: Any) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()
