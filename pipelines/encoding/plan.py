"""The plan of a cache: which images each shard has, and all that decides what is stored for them."""

import hashlib
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from litevae import cache, storage
from litevae.autoencoder import (
    downsampling,
    fingerprint,
    latent_content,
    load_autoencoder,
    model_config,
)
from litevae.errors import UserError
from litevae.images import ImageTransform
from pipelines.data.decode import Shard, Task, transform_of
from pipelines.data.source import Source
from pipelines.data.sources import compare, open_source, restore
from pipelines.encoding.config import Encode
from pipelines.encoding.encoder import DTYPES
from pipelines.runtime.logs import say


def inputs_of(
    config: Encode, out: str, before: dict[str, Any] | None, finished: bool
) -> tuple[list[Source], dict[str, Any], pa.Table | None]:
    """The cache's sources, their identity, and the listing of what is to be appended.

    A started cache goes on with the listing that it began with; a finished one is compared with its source.
    """
    listings = cache.read_listings(out) if before else []
    if before and listings and before["settings"]["source"] == _where(config) and not finished and not config.append:
        return [restore(listing) for listing in listings], before["source"], None
    fresh = open_source(config.source, labels=restore(listings[-1]).labels if listings else ())
    if out == fresh.uri or out.startswith(fresh.uri + "/"):
        raise UserError(f"out={config.out} lies within the source; give a folder outside {fresh.uri}")
    if not before or not listings:
        return [fresh], fresh.identity, None
    growth = compare(listings, fresh)
    if before["settings"]["source"] != _where(config) and (growth.changed or growth.gone):
        return [fresh], fresh.identity, None  # another source, which the plan refuses
    if growth.changed and config.append:
        raise UserError(
            f"{growth.changed} inputs of {fresh.uri} are not what they were when they were listed "
            f"({growth.examples}); appending only adds. Bring them back, or encode into a new folder"
        )
    if growth.changed or growth.gone or (growth.new.num_rows and not config.append):
        hint = "; --append adds what is new" if growth.new.num_rows and not config.append else ""
        say(
            f"the source is not as it was listed: {growth.new.num_rows:,} inputs new, {growth.changed:,} changed, "
            f"{growth.gone:,} gone{hint}",
            "WARNING",
        )
    same = {key: before["source"][key] for key in ("digest", "units")}
    new = growth.new if growth.new.num_rows and config.append else None
    return [restore(listing, fresh.uri) for listing in listings], fresh.identity | same, new


def is_empty(out: str) -> bool:
    if storage.remote(out) or not storage.folder_exists(out):
        return not storage.folder_exists(out)
    return all(name.startswith(".tmp-") for name in os.listdir(out))  # left over where a driver was killed


def _where(config: Encode) -> dict[str, Any]:
    return config.source.model_dump(mode="json") | {"uri": storage.absolute(config.source.uri)}


def open_listings(out: str, uri: str = "") -> list[Source]:
    """What a cache is of, from its own listings.

    Args:
        uri: where the source is now, if it was moved.
    """
    return [restore(listing, uri) for listing in cache.read_listings(out)]


class Planned:
    """How the inputs are cut: each shard holds up to `size` images of one listing, and no row group of a Parquet file
    (or range of a tar) that would fit into one shard is read by two."""

    def __init__(self, sources: Sequence[Source], size: int):
        self.sources = sources
        self._ends = [cut(source.groups, size) for source in sources]
        self._shards = np.cumsum([0, *map(len, self._ends)])
        self.sizes = np.concatenate([np.diff(ends, prepend=0) for ends in self._ends])  # images of each shard
        self._units = np.cumsum([0, *(source.units for source in sources)])
        self.units = int(self._units[-1])

    def __len__(self) -> int:
        return int(self._shards[-1])

    def shard(self, task: Task) -> Shard:
        place = int(np.searchsorted(self._shards, task.shard, side="right")) - 1
        ends, index = self._ends[place], task.shard - int(self._shards[place])
        start, end = int(ends[index - 1]) if index else 0, int(ends[index])
        return Shard(task, self.sources[place].part(start, end), int(self._units[place]) + start)


def cut(groups: np.ndarray, size: int) -> np.ndarray:
    """The unit after each shard's last one: whole groups as far as they fit into `size`, larger ones cut evenly."""
    if groups.max() == 1:
        return np.append(np.arange(size, len(groups), size), len(groups))
    ends, end, held = [], 0, 0
    for rows in groups.tolist():
        if held and held + rows > size:
            ends.append(end)
            held = 0
        if rows > size:
            pieces = -(-rows // size)
            ends += [end + rows * piece // pieces for piece in range(1, pieces + 1)]
        else:
            held += rows
        end += rows
    return np.array([*ends, end] if held else ends, dtype=np.int64)


def make_plan(
    config: Encode, source: Source, identity: dict[str, Any], before: dict[str, Any] | None
) -> dict[str, Any]:
    """What the cache is of. What a started one has settled by itself ("auto") stays as it is there."""
    transform = transform_of(config.transform)
    settings = {
        key: value for key, value in model_config(config.model).items() if key == "_class_name" or key[0] != "_"
    }
    model = {"path": os.path.abspath(config.model), "fingerprint": fingerprint(config.model), "config": settings}
    content = _try(config.model, transform)
    if config.latents == "mean":
        content = "mean"
    precision = before["precision"] if before and config.precision == "auto" else config.precision
    batch_size = before["settings"]["batch_size"] if before and config.batch_size == "auto" else config.batch_size
    kernels = "torch" if config.kernels == "auto" else config.kernels
    if before and (config.kernels == "auto" or "kernels" not in before):
        kernels = before.get("kernels", "")  # there are none in plans from before kernels could be chosen
    return {
        "model": model,
        "transform": transform.identity | ({"seed": config.transform.seed} if transform.crop == "random" else {}),
        "latents": cache.layout(content, DTYPES[config.dtype], transform.views, not transform.buckets),
        "precision": precision,
        "compile": config.compile,
        **({"kernels": kernels} if kernels else {}),
        "columns": {field.name: str(field.type) for field in cache.row_schema(source.schema)},
        "rows_per_shard": config.rows_per_shard,
        "source": identity,
        "settings": {
            "source": _where(config),
            "batch_size": batch_size,
            "error_budget": config.error_budget,
            "transform": config.transform.model_dump(mode="json"),
        },
    }


def _try(folder: str, transform: ImageTransform) -> Literal["moments", "mean"]:
    """What the model gives, if it takes images of these sizes.

    Raises:
        UserError: it does not.
    """
    model = load_autoencoder(folder)
    factor = downsampling(model)
    for height, width in transform.sizes:
        if height % factor or width % factor:
            raise UserError(
                f"{folder} takes sides that are multiples of {factor} pixels, not {width}x{height}; choose another "
                f"transform.resolution{' or transform.bucket_step' if transform.buckets else ''}"
            )
    return latent_content(model)


def source_of(planned: Planned) -> dict[str, Any]:
    """All that was listed, as the manifest has it."""
    sources = planned.sources
    digests = [source.digest for source in sources]
    joined = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
    listed = [{"uri": source.uri, "digest": source.digest, "units": source.units} for source in sources]
    total = {"digest": joined, "units": planned.units, "shards": len(planned), "listings": listed}
    return sources[0].identity | total


def library_versions() -> dict[str, str]:
    """Of those that are installed: this project may be a working directory and no more."""
    found = {"python": platform.python_version()}
    for name in ("litevae", "torch", "diffusers", "pillow", "simplejpeg", "pyarrow", "numpy", "ray"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
