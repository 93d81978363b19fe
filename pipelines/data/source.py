"""What a source of images is: units in a fixed order, listed once, read by index anywhere.

A source is its listing: an Arrow table of what lies where, small, picklable, and stored beside what is made of it. The
driver lists; workers get the part they read.
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
import pyarrow.csv
import pyarrow.json

from litevae import storage
from litevae.errors import UserError
from litevae.images import ImageError
from pipelines.data.config import Source as SourceConfig
from pipelines.data.discovery import Found

DEFAULTS = SourceConfig()
WINDOW_GROUPS = 4
MAX_GROUP_BYTES = 2**31 - 1
MAX_IMAGE_BYTES = 2**30  # of a file; the largest images that are decoded, uncompressed, have as many
LISTING = pa.schema([("file", pa.large_binary()), ("rows", pa.int32()), ("offset", pa.int64()), ("size", pa.int64())])
SCHEME, READABLE = "^[A-Za-z][A-Za-z0-9+.-]*://", "^(s3://|file:///)"
UNREADABLE = (ValueError, TypeError, OverflowError, RecursionError)  # what a sample's metadata can provoke


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
        return _from_bytes, (type(self), _to_bytes(self.listing))  # Arrow would pickle all of what a slice is of

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
        part = self.listing.slice(first, last + 1 - first)
        return type(self)(with_about(part, about | {"part": (row, stop - start)}))

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
        return decode_path(self.listing["file"][group].as_py())

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


def make_listing(
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
    return with_about(table, about | {"digest": digest_of(table, about)})


def with_about(listing: pa.Table, about: dict[str, Any]) -> pa.Table:
    return listing.replace_schema_metadata({b"source": json.dumps(about).encode()})


def about_of(found: Found, uri: str, schema: pa.Schema, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    packed = base64.b64encode(schema.serialize().to_pybytes()).decode()
    return {"kind": found.kind, "uri": uri, "root": found.root, "schema": packed, "settings": settings, **more}


def digest_of(listing: pa.Table, about: dict[str, Any]) -> str:
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


def _from_bytes(kind: type[Source], listing: bytes) -> Source:
    return kind(pa.ipc.open_stream(listing).read_all())


def locate(folder: str, path: str) -> str:
    """A path or URI as it stands in a list or a table that lies in `folder`."""
    if storage.remote(path) or path.startswith("/"):
        return path
    if path.startswith("file:///"):
        return unquote(path.removeprefix("file://"))
    if is_foreign(path):
        raise ImageError("unreadable", f"{path}: only local paths and s3:// can be read")
    if storage.remote(folder):  # where .. is a name like any other
        return "s3://" + posixpath.normpath(posixpath.join(folder.removeprefix("s3://"), path))
    return storage.join(folder, path)


def is_foreign(path: str) -> bool:
    return bool(re.match(SCHEME, path)) and not re.match(READABLE, path)


def read_file(path: str, size: int = -1) -> bytes:
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


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def id_column_of(have: list[str], config: SourceConfig, name: str, where: str) -> str | None:
    """None where there is none, and none was asked for."""
    if config.id_column in have:
        return config.id_column
    if config.id_column != DEFAULTS.id_column:
        raise UserError(f"{name}.id_column: no column {config.id_column!r} in {where}")
    return None


def encode_path(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")


def decode_path(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")


def shown_path(path: bytes) -> str:
    """A file name as valid text, whatever bytes it has."""
    return path.decode("utf-8", "backslashreplace")
