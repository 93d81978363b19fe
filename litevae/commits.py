"""The commits of a latent cache: each makes one shard count, and the first writer of a shard wins.

The docstring of `litevae.cache` describes the folder of a cache.
"""

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from litevae import storage
from litevae.errors import UserError
from litevae.shards import LOGVAR_RANGE, VERSION, from_stored, parquet_bytes, shard_bytes

CONSTANT = 1e-6  # a channel whose standard deviation is this part of its mean, or less, is constant up to rounding
EXAMPLES = 5  # values that are named of those that a column could not hold


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
        folder: Folder of the cache.
        shard: Number of the shard.
        units: Number of the first input, and that of the last input plus one.
        how: The storage description from `latent_layout`.
        rows: Rows, as `shard_bytes` takes them.
        latents: Latents, as `shard_bytes` takes them.
        quarantine: Table with the columns of `QUARANTINE`.
        generation: 0 for a new shard. For a shard that is encoded again, the number of its last generation plus one.
        about: Further entries of the commit.

    Returns:
        The commit that counts. If this generation was committed before, it is the earlier commit, with one entry that
        its file does not have: `earlier`, which is True.
    """
    attempt = f"{shard:06d}-{uuid.uuid4().hex[:12]}.parquet"
    latents = [values for values in latents if len(values)]
    commit: dict[str, Any] = {"shard": shard, "units": list(units), "rows": rows.num_rows, **about}
    if generation:
        commit["generation"] = generation
    if latents:
        commit["shapes"] = [list(values.shape) for values in latents]
        commit["statistics"] = latent_statistics(latents, how)
        commit |= _put_file(folder, f"shards/{attempt}", shard_bytes(rows, latents, how))
    commit["quarantined"] = quarantine.num_rows
    if quarantine.num_rows:
        commit["reasons"] = _count(quarantine["error"].to_pylist())
        commit["quarantine"] = _put_file(folder, f"quarantine/{attempt}", parquet_bytes([quarantine], "zstd"))
    path = commit_path(folder, shard, generation)
    if storage.put_new(path, json_bytes(commit)):
        return commit
    return read_json(path) | {"earlier": True}


def _put_file(folder: str, file: str, data: bytes) -> dict[str, Any]:
    if not storage.put_new(storage.join(folder, file), data):
        raise RuntimeError(f"{file} exists already")
    return {"file": file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def commit_path(folder: str, shard: int, generation: int) -> str:
    """Return the path of the commit of one generation of a shard."""
    return storage.join(folder, "commits", f"{shard:06d}.{generation}.json" if generation else f"{shard:06d}.json")


def committed_shards(folder: str) -> dict[int, int]:
    """Return the finished shards: a dict from shard number to the newest generation, which is the one that counts."""
    found: dict[int, int] = {}
    for name in storage.names(storage.join(folder, "commits")):
        shard, _, generation = name.removesuffix(".json").partition(".")
        found[int(shard)] = max(found.get(int(shard), 0), int(generation or 0))
    return found


def read_commit(folder: str, shard: int, generation: int = 0) -> dict[str, Any]:
    """Read the commit of one generation of a shard.

    Raises:
        UserError: if the commit is missing or damaged.
    """
    return read_json(commit_path(folder, shard, generation))


def read_commits(folder: str, shards: dict[int, int]) -> Iterator[dict[str, Any]]:
    """Read the commits of many shards, in the order of their numbers.

    Args:
        folder: Folder of the cache.
        shards: Shard number -> generation, as `committed_shards` returns them.
    """
    numbers = sorted(shards)
    with ThreadPoolExecutor(32) as threads:
        for start in range(0, len(numbers), 10_000):  # so that millions of requests are never queued at once
            part = numbers[start : start + 10_000]
            yield from threads.map(lambda shard: read_commit(folder, shard, shards[shard]), part)


def latent_statistics(latents: Sequence[np.ndarray], how: dict[str, Any]) -> dict[str, Any]:
    """Return sums per channel of stored latents, in float64.

    `mean_and_std` computes the statistics of any set of shards from these sums.
    """
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
    """Return the mean and standard deviation of each channel of the latents that are sampled from the posteriors.

    A sample is z = mean + std * eps, so E[z] = E[mean] and Var[z] = Var[mean] + E[std^2].

    Args:
        parts: Results of `latent_statistics`, one per shard.
    """
    parts = list(parts)
    elements = sum(part["elements"] for part in parts)
    mean, square, variance = (
        np.sum([part[key] for part in parts], axis=0) / elements for key in ("mean", "square", "variance")
    )
    return mean.tolist(), np.sqrt((square - mean**2).clip(0) + variance).tolist()


def constant_channels(mean: Tensor | Sequence[float], std: Tensor | Sequence[float]) -> list[int]:
    """Return the numbers of the channels that have the same value everywhere, up to rounding.

    Args:
        mean: Mean (C,) of each channel, of `mean_and_std`.
        std: Standard deviation (C,) of each channel.
    """
    return torch.nonzero(torch.as_tensor(std) <= CONSTANT * torch.as_tensor(mean).abs()).flatten().tolist()


def divisor(mean: Tensor, std: Tensor) -> Tensor:
    """Return what latents are divided by to normalise them, (C,): the standard deviation; in a constant channel inf.

    So a constant channel becomes 0, and z * std + mean gives its mean back; arguments as of `constant_channels`.
    """
    return std.masked_fill(std <= CONSTANT * mean.abs(), torch.inf)


def constant_text(what: str, channels: Sequence[int]) -> str:
    """Return what to tell a user about channels that are constant in `what`."""
    names = ", ".join(map(str, channels))
    return f"{what}: constant channels of the latents, counted from 0: {names}; normalised, they are 0"


def _count(values: list[str]) -> dict[str, int]:
    return {value: values.count(value) for value in sorted(set(values))}


def read_json(path: str) -> dict[str, Any]:
    """Read a commit, a plan or a manifest.

    Raises:
        UserError: The file is missing or damaged, or has another format version.
    """
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


def json_bytes(value: Any) -> bytes:
    """Return a commit or a plan as it is written."""
    return json.dumps(value, sort_keys=True, indent=1).encode()


def merged_losses(commits: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return which values of columns could not be carried, and are null, in all of these shards.

    Args:
        commits: Commits; their `lost_values` has the number of such values (`count`) of each column, and up to
            `EXAMPLES` of them as [id, reason] (`examples`). Commits without such values do not have the key.

    Returns:
        The same for all shards together.
    """
    total: dict[str, Any] = {}
    for commit in commits:
        for column, found in commit.get("lost_values", {}).items():
            so_far = total.get(column, {"count": 0, "examples": []})
            examples = [*so_far["examples"], *found["examples"]][:EXAMPLES]
            total[column] = {"count": so_far["count"] + found["count"], "examples": examples}
    return total
