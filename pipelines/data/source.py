"""The base class of image sources: units in a fixed order that are listed once and can be read by index anywhere.

A source consists of its listing: an Arrow table that says where each image lies. The listing is small, can be pickled,
and is stored with whatever is made from the source. The driver lists a source; each worker gets the part that it reads.
"""

import base64
import hashlib
import json
import os
import posixpath
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from litevae import storage
from litevae.errors import UserError
from litevae.images import ImageError
from pipelines.data.column_types import NotCarried, as_listed
from pipelines.data.config import Source as SourceConfig
from pipelines.data.discovery import Found
from pipelines.data.left_out import LeftOut

DEFAULTS = SourceConfig()
WINDOW_GROUPS = 4
ID_BATCH = 2**16
MAX_GROUP_BYTES = 2**31 - 1
MAX_IMAGE_BYTES = 2**30  # of a file; the largest images that are decoded have as many bytes uncompressed
LISTING = pa.schema([("file", pa.large_binary()), ("rows", pa.int32()), ("offset", pa.int64()), ("size", pa.int64())])
SCHEME, READABLE = "^[A-Za-z][A-Za-z0-9+.-]*://", "^(s3://|file:///)"


@dataclass(frozen=True)
class Item:
    """An image as it is stored.

    Attributes:
        id: stable and unique within the source.
        data: the encoded image.
        columns: values of the carried columns, by name.
        lost: of columns whose value can't be carried, and is therefore None: why, by name.
    """

    id: str
    data: bytes
    columns: dict[str, Any] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)


class Source(ABC):
    """A source of images. A unit is one image; units are numbered from 0.

    Args:
        listing: the listing, as `make_listing` returns it.

    Attributes:
        kind: "folder", "parquet", "webdataset" or "list".
        uri: absolute path or pattern, or s3:// URI.
        root: the folder that file names in the listing are relative to.
        digest: SHA-256 of the listing and of the settings that decide which images these are. It does not depend on
            where they are stored.
        remote: whether images come from S3.
        units: number of images.
        groups: number of rows in each locality group, in unit order. A group is a file with one image, a row group of
            a Parquet file, or a byte range of a tar.
        window: number of rows that can be read in any order at no extra cost; `EpochOrder` shuffles within a window.
        schema: names and types of the columns that are carried in addition to id and image.
        labels: class names by label, if folders are the classes.
        left_out: what the listing saw and did not take; all that it saw is `units` and this.
        listing: one row per group: `file`, `rows`, `offset` (tar: in bytes; Parquet: number of the row group), `size`
            in bytes (-1: unknown), what tells a file that was written again (`version_column`), and
            what the listing already knows about its images. All other facts are in the metadata of its schema.
    """

    def __init__(self, listing: pa.Table):
        self.listing = listing.combine_chunks()
        self._about: dict[str, Any] = json.loads(listing.schema.metadata[b"source"])
        self.kind: str = self._about["kind"]
        self.uri: str = self._about["uri"]
        self.root: str = self._about["root"]
        self.digest: str = self._about["digest"]
        self.labels: list[str] = self._about.get("labels", [])
        self.left_out = LeftOut.from_json(self._about.get("left_out", {}))
        self.schema = as_listed(pa.ipc.read_schema(pa.py_buffer(base64.b64decode(self._about["schema"]))))
        self.remote = storage.is_remote(self.root)
        rows = self.listing["rows"].to_numpy().astype(np.int64)
        self._starts = np.cumsum(rows) - rows
        # A part can begin in the middle of its first group and end in the middle of its last one.
        self._skip, self.units = self._about.get("part", (0, int(rows.sum())))
        ends = np.minimum(self._starts + rows, self._skip + self.units)
        self.groups = ends - np.maximum(self._starts, self._skip)
        self.window = WINDOW_GROUPS * int(self.groups.max(initial=0))

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_bytes, (type(self), _to_bytes(self.listing))  # Arrow would pickle the whole table of a slice

    @property
    def seen(self) -> int:
        """The number of all images and files that the listing saw: the units and what it left out."""
        return self.units + self.left_out.total

    def accounted(self) -> str:
        """Return a sentence that accounts for all that the listing saw."""
        images = f"{self.units:,} image{'s' if self.units != 1 else ''}"
        if not self.left_out.total:
            return f"{images}, nothing left out"
        return f"{self.seen:,} seen = {images} + {self.left_out.total:,} left out: {self.left_out}"

    @property
    def identity(self) -> dict[str, Any]:
        """Kind, URI, digest, number of units and settings, as JSON values."""
        own = {"kind": self.kind, "uri": self.uri, "digest": self.digest, "units": self.units}
        return own | self._about["settings"]

    def part(self, start: int, stop: int) -> "Source":
        """Return a source of units `start` to `stop` (exclusive), renumbered from 0, for a worker to read."""
        if not 0 <= start < stop <= self.units:
            raise IndexError(f"units {start} ... {stop} of {self.units}")
        (first, row), (last, _) = self._place(start), self._place(stop - 1)
        about = {key: value for key, value in self._about.items() if key not in ("labels", "left_out")}
        part = self.listing.slice(first, last + 1 - first)
        return type(self)(with_about(part, about | {"part": (row, stop - start)}))

    def _place(self, unit: int) -> tuple[int, int]:
        """Return the group of a unit, and its row in the group."""
        if not 0 <= unit < self.units:
            raise IndexError(f"unit {unit} of {self.units}")
        group = int(np.searchsorted(self._starts, unit + self._skip, side="right")) - 1
        return group, unit + self._skip - int(self._starts[group])

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield units `start` to `stop` (exclusive) as (group, first row in the group, number of rows)."""
        while start < stop:
            group, row = self._place(start)
            rows = min(stop - start, self.listing["rows"][group].as_py() - row)
            yield group, row, rows
            start += rows

    def _file(self, group: int) -> str:
        """Return the path of a group's file: relative to the root, or as a list gives it."""
        return decode_path(self.listing["file"][group].as_py())

    @abstractmethod
    def id(self, unit: int) -> str:
        """Return the id of an image, which is stable and unique: its path within the source, or its id column."""

    @abstractmethod
    def ids(self, start: int, stop: int) -> list[str]:
        """Return the ids of units `start` to `stop` (exclusive), without reading images if ids are stored elsewhere."""

    @property
    def ids_can_repeat(self) -> bool:
        """Whether ids come from the user's data, so that two images can have one."""
        return False

    def id_batches(self) -> Iterator[pa.Array]:
        """Yield the ids of all units in order, as arrays of strings."""
        for start in range(0, self.units, ID_BATCH):
            yield pa.array(self.ids(start, min(start + ID_BATCH, self.units)), pa.string())

    def place_of(self, unit: int) -> str:
        """Return where a unit lies, for messages: its file, and its row if the file holds several."""
        group, row = self._place(unit)
        return f"{storage.join(self.root, self._file(group))}, row {row}"

    @abstractmethod
    def columns(self, unit: int) -> dict[str, Any]:
        """Return the values of the columns in `schema`, by name; a `NotCarried` for a value that its column can't hold.

        Such a value costs no image: bad metadata says nothing about the pixels.
        """

    @abstractmethod
    def data(self, unit: int) -> bytes:
        """Return the encoded image.

        Raises:
            ImageError: if it is missing or can't be read.
        """

    def read(self, unit: int) -> Item:
        """Read an image with its id and columns.

        Raises:
            ImageError: if the image is missing or can't be read.
        """
        identity, data, columns = self.id(unit), self.data(unit), self.columns(unit)
        lost = {name: value.reason for name, value in columns.items() if isinstance(value, NotCarried)}
        return Item(identity, data, columns | dict.fromkeys(lost), lost)


def make_listing(
    about: dict[str, Any], file: Any, rows: Any = 1, offset: Any = 0, size: Any = -1, more: dict[str, Any] | None = None
) -> pa.Table:
    """Make a listing with its metadata and digest.

    Args:
        about: the metadata that `Source` reads, without the digest; see `about_of`.
        file: a column.
        rows, offset, size: a column, or one value for all rows.
        more: further columns, by name.
    """
    values = [np.full(len(file), value) if isinstance(value, int) else value for value in (rows, offset, size)]
    table = pa.table(dict(zip(LISTING.names, [file, *values], strict=True))).cast(LISTING)
    for name, column in (more or {}).items():
        table = table.append_column(name, column)
    return with_about(table, about | {"digest": digest_of(table, about)})


def with_about(listing: pa.Table, about: dict[str, Any]) -> pa.Table:
    """Return the listing with this metadata instead of its own."""
    return listing.replace_schema_metadata({b"source": json.dumps(about).encode()})


def about_of(found: Found, uri: str, schema: pa.Schema, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return the metadata of a listing, without the digest.

    Args:
        found: the files.
        uri: absolute path, pattern or s3:// URI.
        schema: the carried columns.
        settings: what decides, together with the listing, which images these are.
        more: further entries.
    """
    own = {"kind": found.kind, "uri": uri, "root": found.root, "schema": packed_schema(schema), "settings": settings}
    return own | {"left_out": found.left_out.to_json(), **more}


def packed_schema(schema: pa.Schema) -> str:
    """Return the carried columns as the metadata of a listing holds them."""
    return base64.b64encode(schema.serialize().to_pybytes()).decode()


def version_column(kind: str) -> str:
    """Return the name of a listing's column that has another number once a file was written again.

    It is null where that is unknown, and absent from older listings.
    """
    return "file version" if kind == "list" else "version"  # a list may carry a column named version


def digest_of(listing: pa.Table, about: dict[str, Any]) -> str:
    """Return the SHA-256 of a listing's values and of its settings. It does not depend on Arrow's memory layout."""
    digest = hashlib.sha256(json.dumps([about["settings"], about.get("names")], sort_keys=True).encode())
    names = LISTING.names if about["kind"] == "folder" else listing.column_names  # labels only number the folders
    for name in (name for name in names if name != version_column(about["kind"])):  # a copy is the same source
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


def _from_bytes(kind: type[Source], listing: bytes) -> Source:
    return kind(pa.ipc.open_stream(listing).read_all())


def locate(folder: str, path: str) -> str:
    """Return the absolute form of a path or URI that is written in a list or a table in `folder`.

    Raises:
        ImageError: if the URI is neither s3:// nor file:///.
    """
    if storage.is_remote(path) or path.startswith("/"):
        return path
    if path.startswith("file:///"):
        return unquote(path.removeprefix("file://"))
    if is_foreign(path):
        raise ImageError("unreadable", f"{path}: only local paths and s3:// can be read")
    if storage.is_remote(folder):  # S3 does not resolve .. in a key
        return "s3://" + posixpath.normpath(posixpath.join(folder.removeprefix("s3://"), path))
    return storage.join(folder, path)


def is_foreign(path: str) -> bool:
    """Return whether a path is a URI of a kind that can't be read, such as https://."""
    return bool(re.match(SCHEME, path)) and not re.match(READABLE, path)


def read_file(path: str, size: int = -1) -> bytes:
    """Read the file of an image.

    Args:
        path: absolute path or s3:// URI.
        size: bytes of the file; -1: unknown.

    Raises:
        ImageError: if the file is missing, too large, not a regular file, or can't be read.
    """
    try:
        if not storage.is_remote(path):
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # a pipe or a device may have no end
                raise ImageError("unreadable", "not a regular file")
            size = status.st_size
        if size > MAX_IMAGE_BYTES:
            raise ImageError("too_large", f"the file has {size / 2**30:.1f} GiB")
        return storage.read(path)
    except (ImageError, storage.Unavailable):  # a store that is unavailable says nothing about the image
        raise
    except FileNotFoundError:
        hint = "; Windows writes paths with backslashes, here they take /" if "\\" in path else ""
        raise ImageError("missing", f"the file does not exist any more{hint}") from None
    except (OSError, ValueError) as error:  # ValueError: the path contains NUL
        raise ImageError("unreadable", getattr(error, "strerror", None) or str(error)) from error


def id_column_of(have: list[str], config: SourceConfig, name: str, where: str) -> str | None:
    """Return the id column, or None if there is none and the config does not name one.

    Args:
        have: the columns.
        config: the source's config section.
        name: the name of that section, for error messages.
        where: the file and its columns, for error messages.

    Raises:
        UserError: if the config names an id column that does not exist.
    """
    if config.id_column in have:
        return config.id_column
    if config.id_column != DEFAULTS.id_column:
        raise UserError(f"{name}.id_column: no column {config.id_column!r} in {where}")
    return None


def encode_path(path: str) -> bytes:
    """Return a path as the bytes that the file system has."""
    return path.encode("utf-8", "surrogateescape")


def decode_path(path: bytes) -> str:
    """Return a path that `encode_path` encoded."""
    return path.decode("utf-8", "surrogateescape")
