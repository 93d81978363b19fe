"""The shards of a latent cache: Parquet files of latents and of their rows, and of images in quarantine.

The docstring of `litevae.cache` describes the folder of a cache.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from litevae import storage
from litevae.errors import UserError

VERSION = 2
ROW_GROUP = 128  # rows per row group: 2 MB at 8 x 32 x 32; to read one row, a reader reads its whole row group
LOGVAR_RANGE = (-30.0, 20.0)  # diffusers' DiagonalGaussianDistribution clips log-variances to the same range
OWN_COLUMNS = pa.schema(
    [
        pa.field("unit", pa.int64(), nullable=False),  # number of the input in the listing
        pa.field("view", pa.int16(), nullable=False),  # number of the view, if an image gives several crops or flips
        pa.field("height", pa.int32(), nullable=False),  # of the whole image, after EXIF rotation
        pa.field("width", pa.int32(), nullable=False),
        pa.field("crop_top", pa.int32(), nullable=False),  # in pixels of the resized image
        pa.field("crop_left", pa.int32(), nullable=False),
        pa.field("flip", pa.bool_(), nullable=False),
    ]
)
SOURCE_HASH = pa.field("source_sha256", pa.binary(32), nullable=False)  # of the image file's bytes; not in old caches
SIZE_COLUMNS = ("latent_height", "latent_width")  # only in caches whose rows differ in shape
QUARANTINE = pa.schema(
    [("unit", pa.int64()), *((name, pa.string()) for name in ("id", "source", "stage", "error", "message"))]
)
DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}  # NumPy has no bfloat16; its bits are stored
CONTENT_COLUMN = {"moments": "moments", "mean": "latent"}

Shape = tuple[int, int, int]


def latent_layout(
    content: Literal["moments", "mean"], dtype: str, views: int = 1, one_shape: bool = True
) -> dict[str, Any]:
    """Return the description of how rows are stored, which is the `latents` entry of the plan.

    Args:
        content: "moments" of the posterior, or "mean" for a latent without a log-variance.
        dtype: "float16", "bfloat16" or "float32".
        views: Number of rows per image.
        one_shape: Whether all rows have the same shape. False for aspect-ratio buckets.
    """
    order = {"moments": "mean, log-variance", "mean": "latent"}[content]
    common = {"content": content, "dtype": dtype, "byte_order": "little", "order": order}
    return common | {"views": views, "one_shape": one_shape}


def row_schema(carried: pa.Schema, hashed: bool = False) -> pa.Schema:
    """Return the schema of a row without its latent: the cache's own columns, then those carried over from the source.

    Args:
        carried: The columns of the source.
        hashed: Whether rows hold the SHA-256 of their image's bytes in the source, as those of new caches do.

    Raises:
        UserError: if a column of the source has the same name as a column of the cache.
    """
    own = [*OWN_COLUMNS, *([SOURCE_HASH] if hashed else [])]
    ours = ("id", *CONTENT_COLUMN.values(), *SIZE_COLUMNS, *(field.name for field in own))
    if taken := [name for name in carried.names if name in ours]:
        raise UserError(
            f"column {taken[0]!r} can't be carried: the cache has a column of that name; rename it in the source, or "
            f"leave it out of source.columns"
        )
    return pa.schema([pa.field("id", pa.string(), nullable=False), *own, *carried])


def storage_errors(values: np.ndarray, dtype: str = "float16") -> list[str | None]:
    """Return for each row of fp32 latents (N, ...) why it can't be stored in `dtype`.

    The reason is "not_finite" or "out_of_range", or None if the row can be stored.
    """
    axes = tuple(range(1, values.ndim))
    finite = np.isfinite(values).all(axis=axes)
    largest = torch.finfo(getattr(torch, dtype)).max
    inside = np.abs(values).max(axis=axes, initial=0) <= largest
    return [None if f and i else "out_of_range" if f else "not_finite" for f, i in zip(finite, inside, strict=True)]


def finite_rows(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return for each row of stored latents (N, ...) whether all its values are finite."""
    each = (values & 0x7F80) != 0x7F80 if dtype == "bfloat16" else np.isfinite(values)
    return each.reshape(len(values), -1).all(axis=1)


def to_stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Convert fp32 values to the stored dtype, rounded to nearest. bfloat16 is returned as its bits in uint16."""
    if dtype == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16).numpy().view("<u2")
    return np.ascontiguousarray(values, dtype=DTYPES[dtype])


def from_stored(values: np.ndarray, dtype: str) -> Tensor:
    """Convert stored values (see `to_stored`) to a tensor of the stored dtype."""
    if dtype == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def shard_bytes(rows: pa.Table, latents: Sequence[np.ndarray], how: dict[str, Any]) -> bytes:
    """Return a shard as the bytes of a Parquet file.

    A row group has up to `ROW_GROUP` rows, all of one shape.

    Args:
        rows: Table with the columns of `row_schema`: first the rows of the first array of `latents`, then those of the
            second, and so on.
        latents: Arrays (n, C, h, w) in the stored dtype, one per shape.
        how: The storage description from `latent_layout`.
    """
    parts, start = [], 0
    for values in latents:
        parts.append(_with_latents(rows.slice(start, len(values)), values, how))
        start += len(values)
    column = CONTENT_COLUMN[how["content"]]
    statistics = [name for name in parts[0].column_names if name != column]
    return parquet_bytes(parts, "none", write_statistics=statistics)


def _with_latents(rows: pa.Table, values: np.ndarray, how: dict[str, Any]) -> pa.Table:
    count, *shape = values.shape
    width = values.dtype.itemsize * int(np.prod(shape))
    data, kind = pa.py_buffer(np.ascontiguousarray(values)), pa.binary(width)
    about = {key: how[key] for key in ("dtype", "byte_order", "order")}
    if how["one_shape"]:
        about["shape"] = json.dumps(shape)
        column = pa.FixedSizeBinaryArray.from_buffers(kind, count, [None, data])
    else:
        kind = pa.binary()
        about["shape"] = json.dumps([shape[0], *SIZE_COLUMNS])
        offsets = pa.py_buffer(np.arange(0, (count + 1) * width, width, dtype=np.int32))
        column = pa.BinaryArray.from_buffers(kind, count, [None, offsets, data])
        for name, side in zip(SIZE_COLUMNS, shape[1:], strict=True):
            sides = pa.array(np.full(count, side, dtype=np.int32))
            rows = rows.append_column(pa.field(name, pa.int32(), nullable=False), sides)
    field = pa.field(CONTENT_COLUMN[how["content"]], kind, nullable=False, metadata=about)
    rows = rows.replace_schema_metadata(about | {"format": f"litevae-latents {VERSION}"})
    return rows.add_column(1, field, column)


def latents_of(table: pa.Table, shape: Sequence[int], how: dict[str, Any]) -> np.ndarray:
    """Return the latents of rows of one shape, without a copy.

    Args:
        table: Rows of a shard.
        shape: Expected shape (C, h, w) of each row.
        how: The storage description from `latent_layout`.

    Returns:
        Array (n, C, h, w) in the stored dtype; for bfloat16, its bits in uint16.

    Raises:
        UserError: if the rows have another shape.
    """
    column = table[CONTENT_COLUMN[how["content"]]].combine_chunks()
    dtype = np.dtype(DTYPES[how["dtype"]])
    width = dtype.itemsize * int(np.prod(shape))
    if how["one_shape"]:
        sizes, start = column.type.byte_width, column.offset * column.type.byte_width
    else:
        offsets = np.frombuffer(column.buffers()[1], np.int32, len(column) + 1, offset=4 * column.offset)
        sizes, start = np.diff(offsets), int(offsets[0])
    if np.any(sizes != width):
        raise UserError(f"rows have {sizes} bytes, but {tuple(shape)} {how['dtype']} has {width}")
    return np.frombuffer(column.buffers()[-1], dtype, len(column) * width // dtype.itemsize, start).reshape(-1, *shape)


def read_shard(folder: str, commit: dict[str, Any], how: dict[str, Any]) -> tuple[pa.Table, list[np.ndarray]]:
    """Read a shard, and check its sha256 and the checksums of its pages.

    Returns:
        The rows and the latents, as `shard_bytes` takes them.

    Raises:
        UserError: if the file is missing or damaged.
    """
    file = storage.join(folder, commit["file"])
    data = read_checked(file, commit)
    with damage_of(file):
        table = storage.read_table(data)
    latents, start = [], 0
    for count, *shape in commit["shapes"]:
        latents.append(latents_of(table.slice(start, count), shape, how))
        start += count
    ours = (CONTENT_COLUMN[how["content"]], *SIZE_COLUMNS)
    return table.select([name for name in table.column_names if name not in ours]).replace_schema_metadata(), latents


def read_quarantine(folder: str, commit: dict[str, Any]) -> pa.Table:
    """Read the quarantine table of a shard, with the columns of `QUARANTINE`. It may have no rows.

    Raises:
        UserError: if the file is missing or damaged.
    """
    if not commit["quarantined"]:
        return QUARANTINE.empty_table()
    record = commit["quarantine"]
    file = storage.join(folder, record["file"])
    data = read_checked(file, record)
    with damage_of(file):
        return storage.read_table(data)


@contextlib.contextmanager
def damage_of(file: str) -> Iterator[None]:
    """Turn the errors that reading a missing or damaged Parquet file raises into a UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{file} is missing; the cache's manifest names it") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} is damaged: {error}") from error


def read_checked(file: str, record: dict[str, Any]) -> bytes:
    """Read a file and check its size and sha256 against its record in the manifest."""
    try:
        data = storage.read(file)
    except FileNotFoundError:
        raise UserError(f"{file} is missing; the cache's manifest names it") from None
    check_size(file, record, len(data))
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise UserError(f"{file} is damaged: its sha256 differs from the manifest's")
    return data


def check_size(file: str, record: dict[str, Any], found: int | None) -> None:
    if found is None:
        raise UserError(f"{file} is missing; the cache's manifest names it")
    if found != record["bytes"]:
        raise UserError(f"{file} has {found} bytes; the manifest says {record['bytes']}")


def parquet_bytes(parts: Sequence[pa.Table], compression: str, **options: Any) -> bytes:
    """Return a Parquet file of these tables. It is built in memory, so that a store never gets half a file."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink, parts[0].schema, compression=compression, use_dictionary=False, write_page_checksum=True, **options
    ) as writer:
        for part in parts:
            writer.write_table(part, row_group_size=ROW_GROUP)
    return sink.getvalue().to_pybytes()
