"""The latent cache: plain Parquet shards of posterior moments, and the manifest that binds them to model and source.

    manifest.json                        written last; the only thing a reader trusts. A copy of the newest of ...
    manifests/000001.json                ... these, one per version: appending, repairing and retrying make new ones
    plan.json                            what the cache is of; written first
    listing/000001.parquet               its inputs as they were listed, in order; what was appended is 000002 and on
    shards/000012-<attempt>.parquet      rows
    commits/000012.json                  one per shard, put-if-absent: whoever writes it first has encoded the shard.
                                         A shard that is encoded again gets 000012.1.json, and the highest counts
    quarantine/000012-<attempt>.parquet  images that were not encoded, and why

A file in shards/ or quarantine/ counts only if a commit names it, so killed or doubled writers leave at most a file
that nobody reads. Of each row `moments` holds the posterior's (2 n_z, h, w), mean then log-variance, or `latent` the
(n_z, h, w) of an autoencoder without one: little-endian bytes, their dtype and shape in the field's metadata.
"""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from litevae import storage
from litevae.errors import UserError
from litevae.storage import Recent

VERSION = 2
ROW_GROUP = 128  # rows: 2 MB at 8 x 32 x 32; one is read to get at a row
WINDOW_GROUPS = 16  # row groups a reader shuffles among each other, and holds in memory
LOGVAR_RANGE = (-30.0, 20.0)  # as diffusers' DiagonalGaussianDistribution clips
OWN_COLUMNS = pa.schema(
    [
        pa.field("unit", pa.int64(), nullable=False),  # the input's number in the listing
        pa.field("view", pa.int16(), nullable=False),  # of several crops and flips of an image
        pa.field("height", pa.int32(), nullable=False),  # of the whole image, upright
        pa.field("width", pa.int32(), nullable=False),
        pa.field("crop_top", pa.int32(), nullable=False),  # in pixels of the resized image
        pa.field("crop_left", pa.int32(), nullable=False),
        pa.field("flip", pa.bool_(), nullable=False),
    ]
)
SIZE_COLUMNS = ("latent_height", "latent_width")  # where rows differ in it
QUARANTINE = pa.schema(
    [("unit", pa.int64()), *((name, pa.string()) for name in ("id", "source", "stage", "error", "message"))]
)
DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}  # NumPy has no bfloat16: its bits
CONTENT_COLUMN = {"moments": "moments", "mean": "latent"}
_MEND = "`encode_dataset.py verify` names all such shards, `repair` encodes them again"

Shape = tuple[int, int, int]


# --- a shard's rows -------------------------------------------------------------------------------------------


def layout(content: Literal["moments", "mean"], dtype: str, views: int = 1, one_shape: bool = True) -> dict[str, Any]:
    """How rows are stored; the plan's `latents`.

    Args:
        content: the posterior's "moments", or a latent ("mean").
        dtype: float16, bfloat16 or float32.
        views: rows an image gives.
        one_shape: False where rows differ in shape (aspect-ratio buckets).
    """
    order = {"moments": "mean, log-variance", "mean": "latent"}[content]
    common = {"content": content, "dtype": dtype, "byte_order": "little", "order": order}
    return common | {"views": views, "one_shape": one_shape}


def row_schema(carried: pa.Schema) -> pa.Schema:
    """A row's columns besides its latent: our own, then what the source carries.

    Raises:
        UserError: the source carries a column of one of our names.
    """
    ours = ("id", *CONTENT_COLUMN.values(), *SIZE_COLUMNS, *OWN_COLUMNS.names)
    if taken := [name for name in carried.names if name in ours]:
        raise UserError(f"column {taken[0]!r} can't be carried: the cache has a column of that name")
    return pa.schema([pa.field("id", pa.string(), nullable=False), *OWN_COLUMNS, *carried])


def unusable(values: np.ndarray, dtype: str = "float16") -> list[str | None]:
    """Per row (N, ...) of fp32 latents: None, or why they can't be stored: not_finite, out_of_range."""
    axes = tuple(range(1, values.ndim))
    finite = np.isfinite(values).all(axis=axes)
    largest = torch.finfo(getattr(torch, dtype)).max
    inside = np.abs(values).max(axis=axes, initial=0) <= largest
    return [None if f and i else "out_of_range" if f else "not_finite" for f, i in zip(finite, inside, strict=True)]


def finite(values: np.ndarray, dtype: str) -> np.ndarray:
    """Per row (N, ...) of stored latents, whether they are numbers all."""
    each = (values & 0x7F80) != 0x7F80 if dtype == "bfloat16" else np.isfinite(values)
    return each.reshape(len(values), -1).all(axis=1)


def to_stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 -> the stored dtype, rounded to nearest (bfloat16 as its bits in uint16)."""
    if dtype == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16).numpy().view("<u2")
    return np.ascontiguousarray(values, dtype=DTYPES[dtype])


def from_stored(values: np.ndarray, dtype: str) -> Tensor:
    """Undoes `to_stored`, as a tensor of that dtype."""
    if dtype == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def shard_bytes(rows: pa.Table, latents: Sequence[np.ndarray], how: dict[str, Any]) -> bytes:
    """A shard as a Parquet file: row groups of up to `ROW_GROUP` rows, each of one shape.

    Args:
        rows: columns of `row_schema`; the rows of the first array, then those of the second ...
        latents: arrays (n, C, h, w) in the stored dtype, one per shape.
        how: a `layout`.
    """
    parts, start = [], 0
    for values in latents:
        parts.append(_with_latents(rows.slice(start, len(values)), values, how))
        start += len(values)
    column = CONTENT_COLUMN[how["content"]]
    statistics = [name for name in parts[0].column_names if name != column]
    return _parquet(parts, "none", write_statistics=statistics)


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
    """A view (n, C, h, w), in the stored dtype, of the rows of one shape; bfloat16 as its bits.

    Raises:
        UserError: they have another shape.
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
        raise UserError(f"rows of {sizes} bytes, not the {width} of {tuple(shape)} {how['dtype']}")
    return np.frombuffer(column.buffers()[-1], dtype, len(column) * width // dtype.itemsize, start).reshape(-1, *shape)


def read_shard(folder: str, commit: dict[str, Any], how: dict[str, Any]) -> tuple[pa.Table, list[np.ndarray]]:
    """What `shard_bytes` was given, checked by its sha256 and the pages' checksums.

    Raises:
        UserError: the file is missing or damaged.
    """
    file = storage.join(folder, commit["file"])
    data = _checked(file, commit)
    with _damage_of(file):
        table = storage.read_table(data)
    latents, start = [], 0
    for count, *shape in commit["shapes"]:
        latents.append(latents_of(table.slice(start, count), shape, how))
        start += count
    ours = (CONTENT_COLUMN[how["content"]], *SIZE_COLUMNS)
    return table.select([name for name in table.column_names if name not in ours]).replace_schema_metadata(), latents


def read_quarantine(folder: str, commit: dict[str, Any]) -> pa.Table:
    """Columns of `QUARANTINE`; of no rows where nothing was.

    Raises:
        UserError: the file is missing or damaged.
    """
    if not commit["quarantined"]:
        return QUARANTINE.empty_table()
    record = commit["quarantine"]
    file = storage.join(folder, record["file"])
    data = _checked(file, record)
    with _damage_of(file):
        return storage.read_table(data)


@contextlib.contextmanager
def _damage_of(file: str) -> Iterator[None]:
    """Turns what reading a damaged Parquet file raises into a UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{file} is missing; the cache's manifest names it") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} is damaged: {error}") from error


def _checked(file: str, record: dict[str, Any]) -> bytes:
    """A file's bytes, if they are those that were recorded."""
    try:
        data = storage.read(file)
    except FileNotFoundError:
        raise UserError(f"{file} is missing; the cache's manifest names it") from None
    _check_size(file, record, len(data))
    if hashlib.sha256(data).hexdigest() != record["sha256"]:
        raise UserError(f"{file} is damaged: its sha256 is not the manifest's")
    return data


def _check_size(file: str, record: dict[str, Any], found: int | None) -> None:
    if found is None:
        raise UserError(f"{file} is missing; the cache's manifest names it")
    if found != record["bytes"]:
        raise UserError(f"{file} has {found} bytes; the manifest says {record['bytes']}")


def _parquet(parts: Sequence[pa.Table], compression: str, **options: Any) -> bytes:
    """The file's bytes are made in memory: a store must never be given half a file."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink, parts[0].schema, compression=compression, use_dictionary=False, write_page_checksum=True, **options
    ) as writer:
        for part in parts:
            writer.write_table(part, row_group_size=ROW_GROUP)
    return sink.getvalue().to_pybytes()


# --- plan and listing -----------------------------------------------------------------------------------------


def write_plan(folder: str, plan: dict[str, Any]) -> None:
    """Put the plan where there is none; where there is one, it has to be equal, but for its `settings` and the places
    of model and source, which may move.

    Raises:
        UserError: the folder holds a cache of something else; the message lists what differs.
    """
    plan = {"version": VERSION, **plan}
    if storage.put_new(storage.join(folder, "plan.json"), _json(plan)):
        return
    before, now = read_plan(folder), json.loads(_json(plan))
    if different := list(_differences(_compared(before), _compared(now))):
        raise UserError(
            f"{folder} is a cache of something else; give another folder, or delete this one. What differs:\n  "
            + "\n  ".join(different)
        )


def read_plan(folder: str) -> dict[str, Any]:
    """
    Raises:
        UserError: there is none, or one of another format version.
    """
    return _read_json(storage.join(folder, "plan.json"))


def write_listing(folder: str, number: int, listing: pa.Table) -> None:
    """Put a source's listing, from 1 on, where there is none; of two writers the first counts."""
    storage.put_new(storage.join(folder, "listing", f"{number:06d}.parquet"), _listing_bytes(listing))


def read_listings(folder: str) -> list[pa.Table]:
    """
    Raises:
        UserError: one is damaged.
    """
    found = []
    for name in storage.names(storage.join(folder, "listing")):
        path = storage.join(folder, "listing", name)
        try:
            found.append(storage.read_table(storage.read(path)))
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path} is damaged: {error}; bring it back from a copy") from error
    return found


def _listing_bytes(listing: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(listing, sink, compression="zstd", row_group_size=2**17, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


# --- commits --------------------------------------------------------------------------------------------------


def commit_shard(
    folder: str,
    shard: int,
    units: tuple[int, int],
    how: dict[str, Any],
    rows: pa.Table,
    latents: Sequence[np.ndarray],
    quarantine: pa.Table,
    generation: int = 0,
    **about: Any,
) -> dict[str, Any]:
    """Write a shard and its quarantine under names of this attempt, then the commit that makes them count.

    Args:
        units: the first and the one after the last.
        how: a `layout`.
        rows, latents: as `shard_bytes` takes them.
        quarantine: columns of `QUARANTINE`.
        generation: 0; of a shard that is encoded again, the one after the last.
        about: what else to note in the commit.

    Returns:
        The commit, which is an earlier one's where that generation was committed already.
    """
    attempt = f"{shard:06d}-{uuid.uuid4().hex[:12]}.parquet"
    latents = [values for values in latents if len(values)]
    commit: dict[str, Any] = {"shard": shard, "units": list(units), "rows": rows.num_rows, **about}
    if generation:
        commit["generation"] = generation
    if latents:
        commit["shapes"] = [list(values.shape) for values in latents]
        commit["statistics"] = statistics(latents, how)
        commit |= _put(folder, f"shards/{attempt}", shard_bytes(rows, latents, how))
    commit["quarantined"] = quarantine.num_rows
    if quarantine.num_rows:
        commit["reasons"] = _count(quarantine["error"].to_pylist())
        commit["quarantine"] = _put(folder, f"quarantine/{attempt}", _parquet([quarantine], "zstd"))
    path = commit_path(folder, shard, generation)
    if storage.put_new(path, _json(commit)):
        return commit
    return _read_json(path)


def _put(folder: str, file: str, data: bytes) -> dict[str, Any]:
    if not storage.put_new(storage.join(folder, file), data):
        raise RuntimeError(f"{file} exists already")
    return {"file": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def commit_path(folder: str, shard: int, generation: int) -> str:
    return storage.join(folder, "commits", f"{shard:06d}.{generation}.json" if generation else f"{shard:06d}.json")


def committed(folder: str) -> dict[int, int]:
    """Finished shards, and the generation of each that counts."""
    found: dict[int, int] = {}
    for name in storage.names(storage.join(folder, "commits")):
        shard, _, generation = name.removesuffix(".json").partition(".")
        found[int(shard)] = max(found.get(int(shard), 0), int(generation or 0))
    return found


def read_commit(folder: str, shard: int, generation: int = 0) -> dict[str, Any]:
    """
    Raises:
        UserError: it is damaged.
    """
    return _read_json(commit_path(folder, shard, generation))


def read_commits(folder: str, shards: dict[int, int]) -> Iterator[dict[str, Any]]:
    """Commits of shards and generations, in the order of shards."""
    numbers = sorted(shards)
    with ThreadPoolExecutor(32) as threads:
        for start in range(0, len(numbers), 10_000):  # not all of millions waiting at once
            part = numbers[start : start + 10_000]
            yield from threads.map(lambda shard: read_commit(folder, shard, shards[shard]), part)


def statistics(latents: Sequence[np.ndarray], how: dict[str, Any]) -> dict[str, Any]:
    """Sums a channel in float64 of stored latents, from which the statistics of any union of shards follow."""
    names = ("mean", "square", "variance")
    total: dict[str, Any] = {"elements": 0, **dict.fromkeys(names, 0.0)}
    for part in latents:
        count, channels, height, width = part.shape
        values = from_stored(part, how["dtype"]).double().numpy().reshape(count, channels, height * width)
        mean, logvar = np.split(values, 2, axis=1) if how["content"] == "moments" else (values, None)
        variance = np.zeros_like(mean) if logvar is None else np.exp(logvar.clip(*LOGVAR_RANGE))
        total["elements"] += count * height * width
        for name, value in zip(names, (mean, mean**2, variance), strict=True):
            total[name] = total[name] + value.sum(axis=(0, 2))
    return {"elements": total["elements"]} | {name: np.asarray(total[name]).tolist() for name in names}


def mean_and_std(parts: Iterable[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Of each channel of the latents that are drawn: z = mean + std * eps, so E[z] = E[mean] and Var[z] = Var[mean] +
    E[std^2].

    Args:
        parts: of `statistics`.
    """
    parts = list(parts)
    elements = sum(part["elements"] for part in parts)
    mean, square, variance = (
        np.sum([part[key] for part in parts], axis=0) / elements for key in ("mean", "square", "variance")
    )
    return mean.tolist(), np.sqrt((square - mean**2).clip(0) + variance).tolist()


# --- manifest -------------------------------------------------------------------------------------------------


def write_manifest(folder: str, plan: dict[str, Any], source: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """Merge every shard's commit into a manifest, which makes the cache, or what was appended to it, complete.

    Where the newest manifest says the same already, it stays the newest.

    Args:
        plan: as given to `write_plan`.
        source: all that was listed: `uri`, `digest`, `units`, and `shards`, how many.
        run: who made it; not part of the digest.

    Raises:
        UserError: nothing was encoded, or shards are missing.
    """
    shards = committed(folder)
    if missing := set(range(source["shards"])) - shards.keys():
        raise UserError(f"{folder} is unfinished: {len(missing)} of {source['shards']} shards have no commit")
    commits = list(read_commits(folder, {shard: shards[shard] for shard in range(source["shards"])}))
    images = sum(commit["units"][1] - commit["units"][0] - commit["quarantined"] for commit in commits)
    rows, quarantined = (sum(commit[key] for commit in commits) for key in ("rows", "quarantined"))
    views = plan["latents"]["views"]
    if images + quarantined != source["units"] or rows != images * views:
        raise RuntimeError(
            f"{rows} rows and {quarantined} in quarantine of {source['units']} images, {views} rows each"
        )
    if not images:
        raise UserError(f"{folder}: none of {quarantined} images could be encoded; see its quarantine/")
    reasons: dict[str, int] = {}
    for commit in commits:
        for reason, count in commit.get("reasons", {}).items():
            reasons[reason] = reasons.get(reason, 0) + count
    encoded = [commit for commit in commits if commit["rows"]]
    mean, std = mean_and_std(commit["statistics"] for commit in encoded)
    shapes: dict[tuple[int, ...], int] = {}
    for count, *shape in (shape for commit in encoded for shape in commit["shapes"]):
        shapes[tuple(shape)] = shapes.get(tuple(shape), 0) + count
    kept = ("shard", "generation", "units", "file", "rows", "shapes", "bytes", "sha256", "quarantined", "quarantine")
    content = {
        **{key: value for key, value in plan.items() if key not in ("version", "source")},
        "source": source,
        "latents": plan["latents"]
        | {"shape": list(min(shapes)) if len(shapes) == 1 else None, "mean": mean, "std": std}
        | {"shapes": [[count, *shape] for shape, count in sorted(shapes.items())]},
        "counts": {
            "input": source["units"],
            "encoded": images,
            "rows": rows,
            "quarantined": quarantined,
            "reasons": dict(sorted(reasons.items())),
        },
        "row_group": ROW_GROUP,
        "shards": [{key: commit[key] for key in kept if key in commit} for commit in commits],
    }
    content["digest"] = digest(content)
    history = storage.join(folder, "manifests")
    number = max((int(name.removesuffix(".json")) for name in storage.names(history)), default=0)
    newest = _manifest_of(history, number)
    while newest is None or _content(newest) != _content(content):
        number += 1
        newest = {"format": "litevae-latents", "version": VERSION, "number": number, **content, "run": run}
        if not storage.put_new(storage.join(history, f"{number:06d}.json"), json.dumps(newest, indent=1).encode()):
            newest = _manifest_of(history, number)  # another driver's
    storage.put(storage.join(folder, "manifest.json"), json.dumps(newest, indent=1).encode())
    return newest


def _manifest_of(history: str, number: int) -> dict[str, Any] | None:
    try:
        return _read_json(storage.join(history, f"{number:06d}.json"))
    except storage.Unavailable:
        raise
    except UserError:
        return None


def _content(manifest: dict[str, Any]) -> Any:
    return json.loads(json.dumps([manifest["digest"], manifest["shards"]]))


def digest(manifest: dict[str, Any]) -> str:
    """sha256 of what a cache holds, without what is chance (the attempt in file names) or place."""
    keys = ("model", "transform", "latents", "precision", "columns")
    plan: dict[str, Any] = {key: manifest[key] for key in keys if key in manifest}
    shards = [[shard["units"], shard["rows"], shard.get("sha256")] for shard in manifest["shards"]]
    return hashlib.sha256(_json([_identity(plan), shards])).hexdigest()


def read_manifest(folder: str | os.PathLike[str], number: int | None = None) -> dict[str, Any]:
    """The newest manifest, or an earlier one.

    Raises:
        UserError: no cache, an unfinished one, no manifest of that number, or one of another format version.
    """
    folder = storage.absolute(os.fspath(folder))
    files = storage.names(folder)
    if number is not None:
        versions = storage.names(storage.join(folder, "manifests"))
        if f"{number:06d}.json" not in versions:
            raise UserError(f"{folder} has no manifest {number}; it has {', '.join(versions) or 'none'}")
        return _read_json(storage.join(folder, "manifests", f"{number:06d}.json"))
    if "manifest.json" not in files:
        if not files and not storage.folder_exists(folder):
            raise UserError(f"latent cache {folder} does not exist")
        if "plan.json" not in files:
            raise UserError(f"{folder} is not a latent cache: it has no manifest.json")
        raise UserError(
            f"{folder} is unfinished: {len(committed(folder))} shards are done; "
            f"run the encode job with the same settings again, it goes on where it stopped"
        )
    return _read_json(storage.join(folder, "manifest.json"))


def _read_json(path: str) -> dict[str, Any]:
    try:
        value = json.loads(storage.read(path))
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if value.get("version", VERSION) != VERSION:
        raise UserError(f"{path} has format version {value['version']}; this library reads {VERSION}")
    return value


def _identity(plan: dict[str, Any]) -> dict[str, Any]:
    """What two caches of the same content agree in: all but settings, and the places of model and source."""
    return {
        key: {k: v for k, v in value.items() if k not in ("path", "uri")} if isinstance(value, dict) else value
        for key, value in plan.items()
        if key != "settings"
    }


def _compared(plan: dict[str, Any]) -> dict[str, Any]:
    """`_identity` for people: a plan that does not say how images were decoded is of those by Pillow."""
    found = _identity(plan)
    return found | {"transform": {"decode": "pillow"} | found["transform"]}


def _differences(before: Any, now: Any, path: str = "") -> Iterable[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif before != now:
        yield f"{path}: {json.dumps(before)} in the cache, {json.dumps(now)} now"


def _count(values: list[str]) -> dict[str, int]:
    return {value: values.count(value) for value in sorted(set(values))}


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode()


# --- reading --------------------------------------------------------------------------------------------------


class LatentCache:
    """Read a finished cache by row.

    Args:
        path: cache folder, local or s3://.
        verify: check what is read: that latents are finite, and where a shard is (or is brought) on a local disk, its
            sha256 when it is first touched. Pages always have checksums.
        version: number of an earlier manifest, to read the cache as it was before something was appended.
        local: folder that shards of an s3:// cache are brought to, whole; without, row groups are read from the store.

    Attributes:
        manifest: everything that is known about the cache.
        content: "moments", or "mean" where only a latent is stored.
        shape: of a stored row, (2 n_z, h, w), or (n_z, h, w) where only a latent is; None where rows differ in it.
        mean, std: (n_z,), of the latents drawn over the whole cache.
        groups: rows of each row group, `group_shapes` their rows' shape, and `window`, the rows that may be read in any
            order at no extra cost: what an `EpochOrder` shuffles.

    Raises:
        UserError: unfinished, of another version, a shard missing or damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        verify: bool = True,
        version: int | None = None,
        local: str | os.PathLike[str] | None = None,
    ):
        self.path, self.verify = storage.absolute(os.fspath(path)), verify
        self.local = os.path.abspath(local) if local is not None and storage.remote(self.path) else None
        self.manifest = read_manifest(self.path, version)
        self._how = latents = self.manifest["latents"]
        self.content: str = latents["content"]
        self.shape: Shape | None = tuple(latents["shape"]) if latents["shape"] else None
        self.mean = torch.tensor(latents["mean"], dtype=torch.float32)
        self.std = torch.tensor(latents["std"], dtype=torch.float32)
        if not torch.cat([self.mean, self.std]).isfinite().all():
            raise UserError(f"{self.path} has no mean and standard deviation: some latents are not finite; {_MEND}")
        self._shards = [shard for shard in self.manifest["shards"] if shard["rows"]]
        if not storage.remote(self.path):  # a store is asked when a row is
            for shard in self._shards:
                _check_size(self._file(shard), shard, storage.size(self._file(shard)))
        size = self.manifest["row_group"]
        places, self.group_shapes = [], []
        for number, shard in enumerate(self._shards):
            lengths = [
                (min(size, rows - start), tuple(shape))
                for rows, *shape in shard["shapes"]
                for start in range(0, rows, size)
            ]
            places += [(number, group, rows) for group, (rows, _) in enumerate(lengths)]
            self.group_shapes += [shape for _, shape in lengths]
        self._places = np.array(places)  # shard, row group there, rows
        self.groups = self._places[:, 2]
        largest, shapes = int(self.groups.max()), len(set(self.group_shapes))
        self.window = max(WINDOW_GROUPS, 4 * shapes) * largest  # every shape has a window open
        self._starts = np.cumsum(self.groups) - self.groups
        self._checked: set[int] = set()
        self._footers = Recent(self._read_footer, limit=1024)
        self._tables = Recent(self._load, limit=self.window + shapes * largest)
        self._columns = Recent(self._load_columns, limit=16 * self.window)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_checked": set()}

    def __len__(self) -> int:
        return int(self.groups.sum())

    def moments(self, indices: Sequence[int]) -> Tensor:
        """(n, 2 n_z, h, w) in the stored dtype: mean, then log-variance, raw and unscaled.

        Raises:
            UserError: the cache holds no moments, or these rows differ in shape.
        """
        if self.content != "moments":
            raise UserError(f"{self.path} holds latents without a log-variance (latents: {self.content})")
        return self._gather(indices)[0]

    def latents(
        self,
        indices: Sequence[int],
        epoch: int | Sequence[int],
        seed: int,
        draw: Literal["sample", "mean"] = "sample",
        normalize: bool = True,
    ) -> Tensor:
        """float32 (n, n_z, h, w). A draw depends on (seed, epoch, the row's id and view) only.

        Args:
            epoch: of all rows, or of each.
            draw: "sample" from the posterior, or its "mean"; the same where only a latent is stored.
            normalize: to mean 0 and standard deviation 1 a channel over the whole cache.

        Raises:
            UserError: these rows differ in shape.
        """
        stored, names = self._gather(indices)
        values = torch.from_numpy(_fp32(stored))
        mean, logvar = values.chunk(2, dim=1) if self.content == "moments" else (values, None)
        if draw == "sample" and logvar is not None and names:
            epochs = np.broadcast_to(epoch, len(names))
            mean = drawn(mean, logvar, seed, [(int(e), name) for e, name in zip(epochs, names, strict=True)])
        if not normalize:
            return mean
        channels = (value.numpy()[:, None, None] for value in (self.mean, self.std))
        return torch.from_numpy((mean.numpy() - next(channels)) / next(channels))

    def normalize(self, z: Tensor) -> Tensor:
        """Raw latents (N, n_z, h, w) -> mean 0, standard deviation 1 a channel over the cache."""
        return (z - _broadcast(self.mean, z)) / _broadcast(self.std, z)

    def denormalize(self, z: Tensor) -> Tensor:
        """Undoes `normalize`: what the autoencoder decodes."""
        return z * _broadcast(self.std, z) + _broadcast(self.mean, z)

    def row(self, index: int) -> dict[str, Any]:
        """A row's other columns: id, unit, view, height, width, crop, flip, and what the source carried."""
        group = self._group(index)
        names = [field.name for field in self._footers(int(self._places[group, 0])).schema.to_arrow_schema()]
        wanted = [name for name in names if name not in CONTENT_COLUMN.values()]
        return self._read(group, wanted).slice(int(index - self._starts[group]), 1).to_pylist()[0]

    def columns(self, indices: Sequence[int], names: Sequence[str]) -> dict[str, list[Any]]:
        """Values of other columns, e.g. label.

        Raises:
            UserError: no such column.
        """
        found: dict[str, list[Any]] = {name: [] for name in names}
        for index in indices:
            group = self._group(int(index))
            values = self._columns((group, *names))
            for name in names:
                found[name].append(values[name][int(index - self._starts[group])])
        return found

    def _gather(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        rows = np.asarray(indices, dtype=np.int64)
        groups = [self._group(int(index)) for index in rows]
        shapes = {self.group_shapes[group] for group in groups}
        if len(shapes) > 1:
            raise UserError(f"rows of {len(shapes)} shapes can't be one batch: {sorted(shapes)}")
        shape = shapes.pop() if shapes else self.shape or self.group_shapes[0]
        stored = np.empty((len(rows), *shape), dtype=DTYPES[self._how["dtype"]])
        names = [""] * len(rows)
        for place, (index, group) in enumerate(zip(rows, groups, strict=True)):
            values, keys = self._tables(group)
            stored[place] = values[index - self._starts[group]]
            names[place] = keys[index - self._starts[group]]
        return from_stored(stored, self._how["dtype"]), names

    def _group(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a cache with {len(self)}")
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _load(self, group: int) -> tuple[tuple[np.ndarray, list[str]], int]:
        """Stored latents and the names of draws of a row group, and its rows."""
        column = CONTENT_COLUMN[self.content]
        table = self._read(group, ["id", "view", column])
        names = [
            f"{name}\0{view}" if view else name
            for name, view in zip(table["id"].to_pylist(), table["view"].to_pylist(), strict=True)
        ]
        values = latents_of(table, self.group_shapes[group], self._how)
        if self.verify and not (good := finite(values, self._how["dtype"])).all():
            file, row = self._file(self._shards[int(self._places[group, 0])]), names[int(good.argmin())]
            raise UserError(f"{file}: the latents of {row!r} are not finite; {_MEND}")
        return (values, names), table.num_rows

    def _load_columns(self, key: tuple[Any, ...]) -> tuple[dict[str, list[Any]], int]:
        group, *names = key
        have = self._footers(int(self._places[group, 0])).schema.to_arrow_schema().names
        if unknown := set(names) - set(have):
            raise UserError(f"{self.path} has no column {min(unknown)!r}; it has {', '.join(have)}")
        table = self._read(group, names)
        return {name: table[name].to_pylist() for name in names}, table.num_rows

    def _read(self, group: int, columns: list[str]) -> pa.Table:
        number, position, _ = (int(value) for value in self._places[group])
        file, size = self._checked_file(number), self._shards[number]["bytes"]
        with _damage_of(file):
            return storage.read_row_group(file, self._footers(number), position, columns, size)

    def _read_footer(self, number: int) -> tuple[pq.FileMetaData, int]:
        file = self._checked_file(number)
        with _damage_of(file):
            return storage.read_footer(file, self._shards[number]["bytes"]), 1

    def _file(self, shard: dict[str, Any]) -> str:
        return storage.join(self.path, shard["file"])

    def _checked_file(self, number: int) -> str:
        """Where a shard is read from; one on a local disk was checked whole."""
        shard = self._shards[number]
        file = self._file(shard)
        if self.local is not None:
            copy = os.path.join(self.local, f"{shard['sha256']}.parquet")
            if number not in self._checked and storage.size(copy) != shard["bytes"]:
                storage.put(copy, _checked(file, shard))
            file = copy
        if storage.remote(file) or not self.verify or number in self._checked:
            return file
        _checked(file, shard)
        self._checked.add(number)
        return file


def drawn(mean: Tensor, logvar: Tensor, seed: int, rows: Sequence[tuple[int, str]]) -> Tensor:
    """Latents drawn from posteriors (n, n_z, h, w), fp32. Noise is that of (seed, epoch, id), so that what is encoded
    anew is drawn as a cache's row would be.

    Args:
        rows: epoch and id of each.
    """
    noise = np.stack([_noise(mean.shape[1:], seed, *row) for row in rows])
    if mean.device.type != "cpu":
        return mean + (0.5 * logvar.clamp(*LOGVAR_RANGE)).exp() * torch.from_numpy(noise).to(mean.device)
    # By NumPy, as in _fp32: this is what loaders' threads do, and with threads of torch's own in each of them OpenMP's
    # in the training step would go to sleep at every barrier (BENCHMARKS.md).
    noise *= np.exp(0.5 * logvar.numpy().clip(*LOGVAR_RANGE))
    noise += mean.numpy()
    return torch.from_numpy(noise)


def _fp32(stored: Tensor) -> np.ndarray:
    if stored.dtype == torch.bfloat16:  # the upper half of an fp32
        return (stored.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return stored.numpy().astype(np.float32)


def _noise(shape: Sequence[int], seed: int, epoch: int, row: str) -> np.ndarray:
    key = hashlib.blake2b(f"{seed}\0{epoch}\0{row}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype=np.uint64)))
    return generator.standard_normal(shape, dtype=np.float32)


def _broadcast(channels: Tensor, z: Tensor) -> Tensor:
    return channels.to(z.device, z.dtype).view(1, -1, 1, 1)
