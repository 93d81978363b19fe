"""The latent cache: plain Parquet shards of posterior moments, and the manifest that binds them to model and source.

    manifest.json                    written last; the only thing a reader trusts
    plan.json                        what the cache is of; written first
    shards/000012-<attempt>.parquet  rows
    commits/000012.json              one per shard, put-if-absent: whoever writes it first has encoded the shard
    quarantine/000012-<attempt>.parquet  images that were not encoded, and why

A file in shards/ or quarantine/ counts only if a commit names it, so killed or doubled writers leave at most a file
that nobody reads. `moments` is fixed_size_binary: fp16 little-endian, (2 n_z, h, w), mean then log-variance.
"""

import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from litevae import storage
from litevae.errors import UserError
from litevae.storage import Recent

VERSION = 1
ROW_GROUP = 128  # rows: 2 MB at 8 x 32 x 32; one is read to get at a row
WINDOW_GROUPS = 16  # row groups a reader shuffles among each other, and holds in memory
MAX_LOGVAR = (-30.0, 20.0)  # as diffusers' DiagonalGaussianDistribution clips
OWN_COLUMNS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),  # of the whole image, upright
        pa.field("width", pa.int32(), nullable=False),
        pa.field("crop_top", pa.int32(), nullable=False),  # in pixels of the resized image
        pa.field("crop_left", pa.int32(), nullable=False),
        pa.field("flip", pa.bool_(), nullable=False),
    ]
)
LAYOUT = {"dtype": "float16", "byte_order": "little", "order": "mean, log-variance"}
QUARANTINE = pa.schema([(name, pa.string()) for name in ("id", "source", "stage", "error", "message")])


# --- writing --------------------------------------------------------------------------------------------------


def row_schema(carried: pa.Schema) -> pa.Schema:
    """A row's columns besides its moments: our own, then what the source carries.

    Raises:
        UserError: the source carries a column of one of our names.
    """
    if taken := [name for name in carried.names if name in (*OWN_COLUMNS.names, "moments")]:
        raise UserError(f"column {taken[0]!r} can't be carried: the cache has a column of that name")
    return pa.schema([*OWN_COLUMNS, *carried])


def unusable(moments: np.ndarray) -> list[str | None]:
    """Per row (N, ...) of fp32 moments: None, or why they can't be stored as fp16: not_finite, out_of_range."""
    axes = tuple(range(1, moments.ndim))
    finite = np.isfinite(moments).all(axis=axes)
    inside = np.abs(moments).max(axis=axes, initial=0) <= np.finfo(np.float16).max
    return [None if f and i else "out_of_range" if f else "not_finite" for f, i in zip(finite, inside, strict=True)]


def write_plan(folder: str, plan: dict[str, Any]) -> None:
    """Put the plan where there is none; where there is one, it has to be the same.

    Raises:
        UserError: the folder holds a cache of something else; the message lists what differs.
    """
    plan = {"version": VERSION, **plan}
    if storage.put_new(os.path.join(folder, "plan.json"), _json(plan)):
        return
    before, now = read_plan(folder), json.loads(_json(plan))
    if different := list(_differences(_identity(before), _identity(now))):
        raise UserError(
            f"{folder} is a cache of something else; give another folder, or delete this one. What differs:\n  "
            + "\n  ".join(different)
        )


def read_plan(folder: str) -> dict[str, Any]:
    return json.loads(storage.read(os.path.join(folder, "plan.json")))


def commit_shard(folder: str, shard: int, rows: pa.Table, moments: np.ndarray, quarantine: pa.Table) -> dict[str, Any]:
    """Write a shard and its quarantine under names of this attempt, then the commit that makes them count.

    Args:
        rows: the columns of `row_schema`.
        moments: fp16 (N, 2 n_z, h, w), a row each.
        quarantine: columns of `QUARANTINE`.

    Returns:
        The commit, which is an earlier one's where the shard was committed already.
    """
    name = f"{shard:06d}"
    attempt = f"{name}-{uuid.uuid4().hex[:12]}.parquet"
    commit: dict[str, Any] = {"shard": shard, "rows": len(moments)}
    if len(moments):
        commit |= {"shape": moments.shape[1:], "statistics": _statistics(moments)}
        commit |= _put(folder, f"shards/{attempt}", _with_moments(rows, moments), "moments")
    commit["quarantined"] = quarantine.num_rows
    if quarantine.num_rows:
        commit["reasons"] = _count(quarantine["error"].to_pylist())
        commit["quarantine"] = _put(folder, f"quarantine/{attempt}", quarantine)
    if storage.put_new(os.path.join(folder, "commits", f"{name}.json"), _json(commit)):
        return commit
    return read_commit(folder, shard)


def read_commit(folder: str, shard: int) -> dict[str, Any]:
    return json.loads(storage.read(os.path.join(folder, "commits", f"{shard:06d}.json")))


def committed(folder: str) -> list[int]:
    """Numbers of the finished shards."""
    return [int(name.removesuffix(".json")) for name in storage.names(os.path.join(folder, "commits"))]


def write_manifest(folder: str, plan: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """Merge every shard's commit into the manifest, which makes the cache complete.

    Args:
        plan: as given to `write_plan`, with `source.units` and `shards` (how many) in it.
        run: who made it; not part of the digest.

    Raises:
        UserError: nothing was encoded.
    """
    commits = [read_commit(folder, shard) for shard in range(plan["shards"])]
    encoded, quarantined = (sum(commit[key] for commit in commits) for key in ("rows", "quarantined"))
    if encoded + quarantined != plan["source"]["units"]:
        raise RuntimeError(f"{encoded} rows + {quarantined} in quarantine of {plan['source']['units']} images")
    if not encoded:
        raise UserError(f"{folder}: none of {quarantined} images could be encoded; see its quarantine/")
    reasons: dict[str, int] = {}
    for commit in commits:
        for reason, count in commit.get("reasons", {}).items():
            reasons[reason] = reasons.get(reason, 0) + count
    kept = ("shard", "file", "rows", "bytes", "sha256", "quarantine")
    content = {
        **plan,
        "latents": _latents([commit for commit in commits if commit["rows"]]),
        "counts": {"input": encoded + quarantined, "encoded": encoded, "quarantined": quarantined, "reasons": reasons},
        "row_group": ROW_GROUP,
        "shards": [{key: commit[key] for key in kept if key in commit} for commit in commits],
    }
    # Without what is chance (the attempt in file names) or place.
    facts = [_identity(plan), [[shard["rows"], shard.get("sha256")] for shard in content["shards"]]]
    digest = hashlib.sha256(_json(facts)).hexdigest()
    manifest = {"format": "litevae-latents", "version": VERSION, "digest": digest, **content, "run": run}
    path = os.path.join(folder, "manifest.json")
    storage.put_new(path, json.dumps(manifest, indent=1).encode())
    return json.loads(storage.read(path))


def _put(folder: str, file: str, table: pa.Table, plain: str | None = None) -> dict[str, Any]:
    """The shard's bytes are made in memory: a store must never be given half a file."""
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP,
        compression="none" if plain else "zstd",
        use_dictionary=False,
        write_statistics=[name for name in table.column_names if name != plain],
        write_page_checksum=True,
    )
    data = sink.getvalue()
    if not storage.put_new(os.path.join(folder, file), data):
        raise RuntimeError(f"{file} exists already")
    return {"file": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _with_moments(rows: pa.Table, moments: np.ndarray) -> pa.Table:
    count, *shape = moments.shape
    width = 2 * int(np.prod(shape))
    data = pa.py_buffer(np.ascontiguousarray(moments, dtype="<f2"))
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), count, [None, data])
    about = LAYOUT | {"shape": json.dumps(shape)}
    field = pa.field("moments", pa.binary(width), nullable=False, metadata=about)
    return rows.replace_schema_metadata(about | {"format": f"litevae-latents {VERSION}"}).add_column(1, field, column)


def _statistics(moments: np.ndarray) -> dict[str, Any]:
    """Sums a channel in float64, from which the statistics of any union of shards follow."""
    count, channels, height, width = moments.shape
    values = moments.astype(np.float64).reshape(count, 2, channels // 2, height * width)
    mean, logvar = values[:, 0], values[:, 1].clip(*MAX_LOGVAR)
    sums = {"mean": mean, "square": mean**2, "variance": np.exp(logvar)}
    return {"elements": count * height * width} | {
        name: value.sum(axis=(0, 2)).tolist() for name, value in sums.items()
    }


def _latents(commits: list[dict[str, Any]]) -> dict[str, Any]:
    """Layout, and mean and standard deviation a channel of the latents that are drawn: z = mean + std * eps, so
    E[z] = E[mean] and Var[z] = Var[mean] + E[std^2]."""
    elements = sum(commit["statistics"]["elements"] for commit in commits)
    mean, square, variance = (
        np.sum([commit["statistics"][key] for commit in commits], axis=0) / elements
        for key in ("mean", "square", "variance")
    )
    std = np.sqrt((square - mean**2).clip(0) + variance)
    return LAYOUT | {"shape": commits[0]["shape"], "mean": mean.tolist(), "std": std.tolist()}


def _identity(plan: dict[str, Any]) -> dict[str, Any]:
    """What two caches of the same content agree in: all but the places of model and source, which may move."""
    return {
        key: {k: v for k, v in value.items() if k not in ("path", "uri")} if isinstance(value, dict) else value
        for key, value in plan.items()
    }


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


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """
    Raises:
        UserError: no cache, an unfinished one, or one of another format version.
    """
    folder = os.fspath(folder)
    if not os.path.isdir(folder):
        raise UserError(f"latent cache {folder} does not exist")
    if "manifest.json" not in storage.names(folder):
        if "plan.json" not in storage.names(folder):
            raise UserError(f"{folder} is not a latent cache: it has no manifest.json")
        raise UserError(
            f"{folder} is unfinished: {len(committed(folder))} of {read_plan(folder)['shards']} shards are done; "
            f"run the encode job with the same settings again, it goes on where it stopped"
        )
    try:
        manifest = json.loads(storage.read(os.path.join(folder, "manifest.json")))
    except ValueError as error:
        raise UserError(f"{folder}/manifest.json is damaged: {error}") from None
    if manifest.get("version") != VERSION:
        raise UserError(f"{folder} has format version {manifest.get('version')}; this library reads {VERSION}")
    return manifest


class LatentCache:
    """Read a finished cache by row.

    Args:
        path: cache folder.
        verify: check each shard's sha256 when it is first touched (pages have checksums besides).

    Attributes:
        manifest: everything that is known about the cache.
        shape: of a row's moments, (2 n_z, h, w).
        mean, std: (n_z,), of the latents drawn over the whole cache.
        groups: rows of each row group, and `window`, the rows that may be read in any order at no extra cost: what
            an `EpochOrder` shuffles.

    Raises:
        UserError: unfinished, of another version, a shard missing or damaged.
    """

    def __init__(self, path: str | os.PathLike[str], verify: bool = True):
        self.path, self.verify = os.path.abspath(path), verify
        self.manifest = read_manifest(self.path)
        latents = self.manifest["latents"]
        self.shape: tuple[int, int, int] = tuple(latents["shape"])
        self.mean = torch.tensor(latents["mean"], dtype=torch.float32)
        self.std = torch.tensor(latents["std"], dtype=torch.float32)
        self._shards = [shard for shard in self.manifest["shards"] if shard["rows"]]
        for shard in self._shards:
            file = self._file(shard)
            if (found := storage.size(file)) is None:
                raise UserError(f"{file} is missing; the manifest of {self.path} names it")
            if found != shard["bytes"]:
                raise UserError(f"{file} has {found} bytes; the manifest says {shard['bytes']}")
        size = self.manifest["row_group"]
        groups = [
            [(number, start // size, min(size, shard["rows"] - start)) for start in range(0, shard["rows"], size)]
            for number, shard in enumerate(self._shards)
        ]
        self._places = np.array([place for shard in groups for place in shard])  # shard, row group there, rows
        self.groups = self._places[:, 2]
        self.window = WINDOW_GROUPS * int(self.groups.max())
        self._starts = np.cumsum(self.groups) - self.groups
        self._checked: set[int] = set()
        self._tables = Recent(self._load, limit=self.window + int(self.groups.max()))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_checked": set()}

    def __len__(self) -> int:
        return int(self.groups.sum())

    def moments(self, indices: Sequence[int]) -> Tensor:
        """fp16 (n, 2 n_z, h, w): mean, then log-variance, raw and unscaled."""
        return torch.from_numpy(self._gather(indices)[0])

    def latents(
        self,
        indices: Sequence[int],
        epoch: int | Sequence[int],
        seed: int,
        draw: Literal["sample", "mean"] = "sample",
        normalize: bool = True,
    ) -> Tensor:
        """float32 (n, n_z, h, w). A draw depends on (seed, epoch, the row's id) only.

        Args:
            epoch: of all rows, or of each.
            draw: "sample" from the posterior, or its "mean".
            normalize: to mean 0 and standard deviation 1 a channel over the whole cache.
        """
        moments, ids = self._gather(indices)
        mean, logvar = torch.from_numpy(moments).float().chunk(2, dim=1)
        if draw == "sample":
            epochs = np.broadcast_to(epoch, len(ids))
            noise = np.stack([_noise(mean.shape[1:], seed, int(e), i) for e, i in zip(epochs, ids, strict=True)])
            mean = mean + (0.5 * logvar.clamp(*MAX_LOGVAR)).exp() * torch.from_numpy(noise)
        return self.normalize(mean) if normalize else mean

    def normalize(self, z: Tensor) -> Tensor:
        """Raw latents (N, n_z, h, w) -> mean 0, standard deviation 1 a channel over the cache."""
        return (z - _broadcast(self.mean, z)) / _broadcast(self.std, z)

    def denormalize(self, z: Tensor) -> Tensor:
        """Undoes `normalize`: what the autoencoder decodes."""
        return z * _broadcast(self.std, z) + _broadcast(self.mean, z)

    def row(self, index: int) -> dict[str, Any]:
        """A row's other columns: id, height, width, crop, flip, and what the source carried."""
        group = self._group(index)
        table = self._read(group, [name for name in self._schema(group).names if name != "moments"])
        return table.slice(int(index - self._starts[group]), 1).to_pylist()[0]

    def _gather(self, indices: Sequence[int]) -> tuple[np.ndarray, list[str]]:
        rows = np.asarray(indices, dtype=np.int64)
        moments = np.empty((len(rows), *self.shape), dtype=np.float16)
        ids = [""] * len(rows)
        for place, index in enumerate(rows):
            group = self._group(int(index))
            values, names = self._tables(group)
            moments[place] = values[index - self._starts[group]]
            ids[place] = names[index - self._starts[group]]
        return moments, ids

    def _group(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a cache with {len(self)}")
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _load(self, group: int) -> tuple[tuple[np.ndarray, list[str]], int]:
        """Moments and ids of a row group, and its rows."""
        table = self._read(group, ["id", "moments"])
        column = table["moments"].combine_chunks()
        values = np.frombuffer(column.buffers()[1], dtype="<f2", offset=column.offset * column.type.byte_width)
        values = values[: len(column) * int(np.prod(self.shape))].reshape(-1, *self.shape)
        return (values, table["id"].to_pylist()), len(column)

    def _read(self, group: int, columns: list[str]) -> pa.Table:
        number, position, _ = self._places[group]
        file = self._checked_file(int(number))
        try:
            with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
                return parquet.read_row_group(int(position), columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{file} is damaged: {error}") from error

    def _schema(self, group: int) -> pa.Schema:
        return pq.read_schema(self._checked_file(int(self._places[group, 0])))

    def _file(self, shard: dict[str, Any]) -> str:
        return os.path.join(self.path, shard["file"])

    def _checked_file(self, number: int) -> str:
        file = self._file(self._shards[number])
        if self.verify and number not in self._checked:
            if hashlib.sha256(storage.read(file)).hexdigest() != self._shards[number]["sha256"]:
                raise UserError(f"{file} is damaged: its sha256 is not the manifest's")
            self._checked.add(number)
        return file


def _noise(shape: Sequence[int], seed: int, epoch: int, row: str) -> np.ndarray:
    key = hashlib.blake2b(f"{seed}\0{epoch}\0{row}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype=np.uint64)))
    return generator.standard_normal(shape, dtype=np.float32)


def _broadcast(channels: Tensor, z: Tensor) -> Tensor:
    return channels.to(z.device, z.dtype).view(1, -1, 1, 1)
