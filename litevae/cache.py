"""The latent cache: Parquet shards of posterior moments, and a manifest that binds them to one model and one source.

    manifest.json                        written last; the only file that a reader trusts; a copy of the newest file in
                                         manifests/
    manifests/000001.json                one manifest per version; appending, repairing and retrying write a new one
    plan.json                            what the cache is made of (model, source, transform ...); written first
    settings.json                        settings that may change, as they were last agreed to; absent while they are
                                         those of the plan
    listing/000001.parquet               the inputs in the order in which they were listed; appended inputs are in
                                         000002 and so on
    shards/000012-<attempt>.parquet      the rows
    commits/000012.json                  one commit per shard, written only if it does not exist yet: the first writer
                                         has encoded the shard. A shard that is encoded again gets 000012.1.json, and
                                         the commit with the highest number counts
    quarantine/000012-<attempt>.parquet  the images that were not encoded, each with the reason

A file in shards/ or quarantine/ counts only if a commit names it. A writer that was killed, or that ran twice, leaves
at most a file that nobody reads. In each row the column `moments` holds the posterior (2 n_z, h, w), first the mean and
then the log-variance; for an autoencoder without a posterior the column `latent` holds the latent (n_z, h, w). The
values are little-endian bytes, and the metadata of the Parquet field says their dtype and shape.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from litevae import storage
from litevae.commits import (
    committed_shards,
    constant_channels,
    constant_text,
    divisor,
    json_bytes,
    mean_and_std,
    merged_losses,
    read_commits,
    read_json,
)
from litevae.errors import UserError
from litevae.lru_cache import LRUCache
from litevae.shards import (
    CONTENT_COLUMN,
    DTYPES,
    LOGVAR_RANGE,
    ROW_GROUP,
    VERSION,
    Shape,
    check_size,
    damage_of,
    finite_rows,
    from_stored,
    latents_of,
    read_checked,
)

SETTINGS = "settings.json"
WINDOW_GROUPS = 16  # row groups whose rows a reader shuffles together, and which it holds in memory
_MEND = "`encode_dataset.py verify` names all such shards, `repair` encodes them again"


# --- plan and listing -----------------------------------------------------------------------------------------


class OtherPlan(UserError):
    """A folder holds a cache of something else."""


def write_plan(folder: str, plan: dict[str, Any]) -> None:
    """Write the plan if the folder has none; otherwise check that the existing plan is equal.

    The `settings` and the locations of model and source are not compared, because they may change.

    Raises:
        OtherPlan: if the folder holds a cache of something else. The message lists the differences.
    """
    plan = {"version": VERSION, **plan}
    if storage.put_new(storage.join(folder, "plan.json"), json_bytes(plan)):
        return
    before, now = read_plan(folder), json.loads(json_bytes(plan))
    if different := list(_differences(_compared(before), _compared(now))):
        raise OtherPlan(
            f"{folder} holds another cache; give another folder, or delete this one. The differences are:\n  "
            + "\n  ".join(different)
        )


def plan_id(plan: dict[str, Any]) -> str:
    """Return an id of all that can't change in a plan. Each commit has it as `plan`, except those of older versions.

    So the commit of a writer that had begun with another plan, which was replaced meanwhile, is known as foreign.
    """
    return hashlib.sha256(json_bytes(_compared(json.loads(json_bytes({"version": VERSION, **plan}))))).hexdigest()[:16]


def foreign(commit: dict[str, Any], plan: str) -> str:
    """Return what is wrong with a commit that was made by another plan; "" for one of this plan.

    Args:
        commit: the commit.
        plan: the `plan_id` of the cache.
    """
    if commit.get("plan", plan) == plan:
        return ""
    return f"shard {commit['shard']} was committed by a job that had begun with another plan"


def read_plan(folder: str) -> dict[str, Any]:
    """Read the plan of a cache.

    Raises:
        UserError: if there is no plan, or it has another format version.
    """
    return read_json(storage.join(folder, "plan.json"))


def read_settings(folder: str) -> dict[str, Any] | None:
    """Read the settings that were agreed to after the plan was written; None if they are still those of the plan.

    Raises:
        UserError: if the file is damaged.
    """
    try:
        return json.loads(storage.read(storage.join(folder, SETTINGS)))
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{storage.join(folder, SETTINGS)} is damaged: {error}; remove it") from error


def write_settings(folder: str, settings: dict[str, Any]) -> None:
    """Note settings, such as the error budget, that a job has agreed to and that differ from those of the plan."""
    storage.put(storage.join(folder, SETTINGS), json_bytes(settings))


def forget(folder: str, more: Sequence[str] = ()) -> None:
    """Remove the plan of a cache into which nothing was encoded, and all that belongs to it. The plan goes last.

    Args:
        folder: Folder of the cache.
        more: Names of further files in the folder to remove.
    """
    for part in ("commits", "quarantine", "shards", "listing"):
        for name in storage.names(storage.join(folder, part)):
            storage.remove(storage.join(folder, part, name))
        if not storage.is_remote(folder):
            with suppress(OSError):  # raised where the folder is not there or not empty
                os.rmdir(storage.join(folder, part))
    for name in (SETTINGS, *more, "plan.json"):
        storage.remove(storage.join(folder, name))


def write_listing(folder: str, number: int, listing: pa.Table) -> None:
    """Write listing `number` (counted from 1) if it does not exist yet. Of two writers, the first wins."""
    storage.put_new(storage.join(folder, "listing", f"{number:06d}.parquet"), _listing_bytes(listing))


def replace_listing(folder: str, number: int, listing: pa.Table) -> None:
    """Write listing `number` in the place of the one that is there; for inputs that were encoded again."""
    storage.put(storage.join(folder, "listing", f"{number:06d}.parquet"), _listing_bytes(listing))


def read_listings(folder: str) -> list[pa.Table]:
    """Read all listings of a cache, in the order of their numbers.

    Raises:
        UserError: if a listing is damaged.
    """
    found = []
    for name in storage.names(storage.join(folder, "listing")):
        path = storage.join(folder, "listing", name)
        try:
            found.append(storage.read_table(storage.read(path)))
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path} is damaged: {error}; restore it from a copy") from error
    return found


def _listing_bytes(listing: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(listing, sink, compression="zstd", row_group_size=2**17, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


# --- manifest -------------------------------------------------------------------------------------------------


def write_manifest(folder: str, plan: dict[str, Any], source: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """Merge the commits of all shards into a manifest. This makes the cache, or what was appended to it, complete.

    If the newest manifest has the same content already, no new one is written. Several drivers can do this at a time,
    and no manifest has less than one before it: if another driver has written one since the commits were read, they
    are read again, and inputs that another driver has appended stay in.

    Args:
        folder: Folder of the cache.
        plan: The plan, as it was given to `write_plan`.
        source: Description of all listed inputs: `uri`, `digest`, `units` and the number of `shards`.
        run: Description of the run that made the cache. It is not part of the digest.

    Returns:
        The newest manifest.

    Raises:
        UserError: if no image was encoded, or shards are missing.
    """
    history = storage.join(folder, "manifests")
    while True:
        number = max(_newest_number(history), _number_of(storage.read_content(storage.join(folder, "manifest.json"))))
        newest = _manifest_of(history, number)
        known = newest["source"] if newest and newest["source"].get("shards", 0) > source["shards"] else source
        content = _merged(folder, plan, known)
        if newest is None or _content(newest) != _content(content):
            number += 1
            newest = {"format": "litevae-latents", "version": VERSION, "number": number, **content, "run": run}
            if not storage.put_new(storage.join(history, f"{number:06d}.json"), _manifest_bytes(newest)):
                continue  # another driver was faster
        _publish(folder, newest)
        return newest


def _merged(folder: str, plan: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a manifest that merges all commits; arguments and errors as of `write_manifest`."""
    shards = committed_shards(folder)
    if missing := set(range(source["shards"])) - shards.keys():
        raise UserError(f"{folder} is unfinished: {len(missing)} of {source['shards']} shards have no commit")
    commits = list(read_commits(folder, {shard: shards[shard] for shard in range(source["shards"])}))
    known = plan_id(plan)
    if strange := [wrong for commit in commits if (wrong := foreign(commit, known))]:
        raise UserError(f"{folder}: {strange[0]}; {_MEND}")
    images = sum(commit["units"][1] - commit["units"][0] - commit["quarantined"] for commit in commits)
    rows, quarantined = (sum(commit[key] for commit in commits) for key in ("rows", "quarantined"))
    views = plan["latents"]["views"]
    if images + quarantined != source["units"] or rows != images * views:
        raise RuntimeError(
            f"{rows} rows, {views} per image, and {quarantined} quarantined images do not make {source['units']} images"
        )
    if not images:
        raise UserError(f"{folder}: none of {quarantined} images could be encoded; see its quarantine/")
    reasons: dict[str, int] = {}
    lost_values = merged_losses(commits)
    enlarged = sum(commit.get("enlarged", 0) for commit in commits)  # images that are smaller than their views
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
            **({"lost_values": lost_values} if lost_values else {}),
            **({"enlarged": enlarged} if enlarged else {}),
        },
        "row_group": ROW_GROUP,
        "shards": [{key: commit[key] for key in kept if key in commit} for commit in commits],
    }
    content["digest"] = digest(content)
    return content


def _publish(folder: str, manifest: dict[str, Any]) -> None:
    """Make manifest.json the newest manifest, which is this one, or one that another driver has written since.

    A driver that is late must not put its manifest over a newer one. So manifest.json is replaced only if it still is
    what was read, and looked at again after each attempt.
    """
    path, history = storage.join(folder, "manifest.json"), storage.join(folder, "manifests")
    while True:
        if (number := _newest_number(history)) > manifest["number"]:
            manifest = _manifest_of(history, number) or manifest
        before, data = storage.read_content(path), _manifest_bytes(manifest)
        if before is not None and (before.data == data or _number_of(before) > manifest["number"]):
            return
        storage.replace(path, data, before)


def _newest_number(history: str) -> int:
    """Return the number of the newest manifest in a folder `manifests`; 0 if it has none."""
    return max((int(name.removesuffix(".json")) for name in storage.names(history)), default=0)


def _number_of(manifest: storage.Content | None) -> int:
    """Return the number in manifest.json; 0 if there is none, or it is damaged."""
    try:
        return int(json.loads(manifest.data)["number"]) if manifest else 0
    except (ValueError, KeyError, TypeError):
        return 0


def _manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """Return a manifest as it is written."""
    return json.dumps(manifest, indent=1).encode()


def _manifest_of(history: str, number: int) -> dict[str, Any] | None:
    """Return the manifest with this number; None if it is missing or damaged."""
    try:
        return read_json(storage.join(history, f"{number:06d}.json"))
    except storage.Unavailable:
        raise
    except UserError:
        return None


def _content(manifest: dict[str, Any]) -> Any:
    """Return the part of a manifest that decides whether two manifests have the same content."""
    return json.loads(json.dumps([manifest["digest"], manifest["shards"]]))


def digest(manifest: dict[str, Any]) -> str:
    """Return the sha256 of the content of a cache.

    It does not depend on locations or on the random attempt number in file names.
    """
    keys = ("model", "transform", "latents", "precision", "columns")
    plan: dict[str, Any] = {key: manifest[key] for key in keys if key in manifest}
    shards = [[shard["units"], shard["rows"], shard.get("sha256")] for shard in manifest["shards"]]
    return hashlib.sha256(json_bytes([_identity(plan), shards])).hexdigest()


def read_manifest(folder: str | os.PathLike[str], number: int | None = None) -> dict[str, Any]:
    """Read the newest manifest, or the one with a given number.

    Raises:
        UserError: if there is no cache, it is unfinished, it has no manifest with this number, or the manifest has
            another format version.
    """
    folder = storage.absolute(os.fspath(folder))
    files = storage.names(folder)
    if number is not None:
        versions = storage.names(storage.join(folder, "manifests"))
        if f"{number:06d}.json" not in versions:
            raise UserError(f"{folder} has no manifest {number}; it has {', '.join(versions) or 'none'}")
        return read_json(storage.join(folder, "manifests", f"{number:06d}.json"))
    if "manifest.json" not in files:
        if not files and not storage.folder_exists(folder):
            raise UserError(f"latent cache {folder} does not exist")
        if "plan.json" not in files:
            raise UserError(f"{folder} is not a latent cache: it has no manifest.json")
        raise UserError(
            f"{folder} is unfinished: {len(committed_shards(folder))} shards are done; "
            f"run the encode job with the same settings again, it continues where it stopped"
        )
    return read_json(storage.join(folder, "manifest.json"))


def _identity(plan: dict[str, Any]) -> dict[str, Any]:
    """Return the plan without its settings and the locations of model and source.

    Two caches of the same content have the same identity.
    """
    return {
        key: {k: v for k, v in value.items() if k not in ("path", "uri")} if isinstance(value, dict) else value
        for key, value in plan.items()
        if key != "settings"
    }


def _compared(plan: dict[str, Any]) -> dict[str, Any]:
    """Return `_identity` with the default filled in for messages: a plan that names no decoder used Pillow."""
    found = _identity(plan)
    return found | {"transform": {"decode": "pillow"} | found.get("transform", {})}


def _differences(before: Any, now: Any, path: str = "") -> Iterable[str]:
    """List the entries in which two plans differ, one line for each."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif before != now:
        yield f"{path}: {json.dumps(before)} in the cache, {json.dumps(now)} now"


# --- reading --------------------------------------------------------------------------------------------------


class LatentCache:
    """A finished latent cache, read row by row.

    Args:
        path: Folder of the cache, local or s3://.
        verify: Whether to check that latents are finite and, for a shard on the local disk, its sha256 when it is first
            read. The checksums of Parquet pages are always checked.
        version: Number of an earlier manifest, to read the cache as it was before something was appended. None reads
            the newest.
        local: Folder to which whole shards of an s3:// cache are copied before they are read. None reads single row
            groups from the store.

    Attributes:
        manifest: Everything that is known about the cache.
        content: "moments", or "mean" if the cache stores only latents.
        shape: Shape of a stored row: (2 n_z, h, w) for moments, (n_z, h, w) for latents. None if rows differ in shape.
        mean: Mean (n_z,) of the sampled latents over the whole cache.
        std: Standard deviation (n_z,) of the sampled latents over the whole cache.
        constant: Numbers of the channels that are constant up to rounding. Normalised, they are 0.
        groups: Number of rows of each row group.
        group_shapes: Shape of the rows of each row group.
        window: Number of rows that can be read in any order without reading a row group twice. `EpochOrder` shuffles
            rows within windows of this size.

    Raises:
        UserError: if the cache is unfinished or has another format version, or a shard is missing or damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        verify: bool = True,
        version: int | None = None,
        local: str | os.PathLike[str] | None = None,
    ):
        self.path, self.verify = storage.absolute(os.fspath(path)), verify
        self.local = os.path.abspath(local) if local is not None and storage.is_remote(self.path) else None
        self.manifest = read_manifest(self.path, version)
        self._how = latents = self.manifest["latents"]
        self.content: str = latents["content"]
        self.shape: Shape | None = tuple(latents["shape"]) if latents["shape"] else None
        self.mean = torch.tensor(latents["mean"], dtype=torch.float32)
        self.std = torch.tensor(latents["std"], dtype=torch.float32)
        if not torch.cat([self.mean, self.std]).isfinite().all():
            raise UserError(f"{self.path} has no mean and standard deviation: some latents are not finite; {_MEND}")
        self.constant = constant_channels(self.mean, self.std)
        self._shards = [shard for shard in self.manifest["shards"] if shard["rows"]]
        if not storage.is_remote(self.path):  # on S3 a shard is checked when a row of it is read
            for shard in self._shards:
                check_size(self._file(shard), shard, storage.size(self._file(shard)))
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
        self._places = np.array(places)  # per row group: its shard, its position in the shard, its rows
        self.groups = self._places[:, 2]
        largest, shapes = int(self.groups.max()), len(set(self.group_shapes))
        self.window = max(WINDOW_GROUPS, 4 * shapes) * largest  # each shape has its own window, all open at once
        self._starts = np.cumsum(self.groups) - self.groups
        self._files = LRUCache(self._checked_file, limit=len(self._shards))
        self._footers = LRUCache(self._read_footer, limit=1024)
        self._tables = LRUCache(self._load, limit=self.window + shapes * largest)
        self._columns = LRUCache(self._load_columns, limit=16 * self.window)

    def __len__(self) -> int:
        return int(self.groups.sum())

    @cached_property
    def _divisor(self) -> Tensor:
        """What `normalize` divides by. A warning names the constant channels when it is first needed."""
        if self.constant:
            warnings.warn(constant_text(self.path, self.constant), stacklevel=3)
        return divisor(self.mean, self.std)

    @property
    def files(self) -> list[str]:
        """Paths of the Parquet files that hold the rows, in the order of the rows."""
        return [self._file(shard) for shard in self._shards]

    def moments(self, indices: Sequence[int]) -> Tensor:
        """Return the raw, unscaled moments of rows.

        Args:
            indices: Numbers of the n rows.

        Returns:
            Moments (n, 2 n_z, h, w) in the stored dtype: first the mean, then the log-variance.

        Raises:
            UserError: if the cache holds no moments, or the rows differ in shape.
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
        """Return latents of rows, sampled from their posteriors.

        The noise of a sample depends only on (seed, epoch, id and view of the row).

        Args:
            indices: Numbers of the n rows.
            epoch: Epoch of all rows, or one for each row.
            seed: Seed of the noise.
            draw: "sample" of the posterior, or its "mean". The two are the same if the cache stores only latents.
            normalize: Whether to normalise each channel to mean 0 and standard deviation 1 over the whole cache; a
                constant channel becomes 0, with a warning.

        Returns:
            Latents (n, n_z, h, w) in float32.

        Raises:
            UserError: if the rows differ in shape.
        """
        stored, names = self._gather(indices)
        values = torch.from_numpy(_fp32(stored))
        mean, logvar = values.chunk(2, dim=1) if self.content == "moments" else (values, None)
        if draw == "sample" and logvar is not None and names:
            epochs = np.broadcast_to(epoch, len(names))
            mean = sample_posteriors(
                mean, logvar, seed, [(int(e), name) for e, name in zip(epochs, names, strict=True)]
            )
        if not normalize:
            return mean
        channels = (value.numpy()[:, None, None] for value in (self.mean, self._divisor))
        return torch.from_numpy((mean.numpy() - next(channels)) / next(channels))

    def normalize(self, z: Tensor) -> Tensor:
        """Normalise raw latents (N, n_z, h, w): each channel gets mean 0 and standard deviation 1 over the cache.

        A constant channel becomes 0, with a warning.
        """
        return (z - _broadcast(self.mean, z)) / _broadcast(self._divisor, z)

    def denormalize(self, z: Tensor) -> Tensor:
        """Undo `normalize`. The result is what the autoencoder decodes; a constant channel gets its mean."""
        return z * _broadcast(self.std, z) + _broadcast(self.mean, z)

    def row(self, index: int) -> dict[str, Any]:
        """Return the other columns of a row: id, unit, view, height, width, crop, flip, and those from the source."""
        group = self._group(index)
        names = [field.name for field in self._footers(int(self._places[group, 0])).schema.to_arrow_schema()]
        wanted = [name for name in names if name not in CONTENT_COLUMN.values()]
        return self._read(group, wanted).slice(int(index - self._starts[group]), 1).to_pylist()[0]

    def columns(self, indices: Sequence[int], names: Sequence[str]) -> dict[str, list[Any]]:
        """Return the values of other columns, e.g. label.

        Args:
            indices: Numbers of the n rows.
            names: Names of the columns.

        Returns:
            Name -> list of n values.

        Raises:
            UserError: if the cache has no such column.
        """
        found: dict[str, list[Any]] = {name: [] for name in names}
        for index in indices:
            group = self._group(int(index))
            values = self._columns((group, *names))
            for name in names:
                found[name].append(values[name][int(index - self._starts[group])])
        return found

    def _gather(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Return the stored latents of rows of one shape, and for each row the name that its noise depends on."""
        rows = np.asarray(indices, dtype=np.int64)
        groups = [self._group(int(index)) for index in rows]
        shapes = {self.group_shapes[group] for group in groups}
        if len(shapes) > 1:
            raise UserError(f"rows of {len(shapes)} shapes can't form one batch: {sorted(shapes)}")
        shape = shapes.pop() if shapes else self.shape or self.group_shapes[0]
        stored = np.empty((len(rows), *shape), dtype=DTYPES[self._how["dtype"]])
        names = [""] * len(rows)
        for place, (index, group) in enumerate(zip(rows, groups, strict=True)):
            values, keys = self._tables(group)
            stored[place] = values[index - self._starts[group]]
            names[place] = keys[index - self._starts[group]]
        return from_stored(stored, self._how["dtype"]), names

    def _group(self, index: int) -> int:
        """Return the number of the row group that holds a row."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} is out of range: the cache has {len(self)} rows")
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _load(self, group: int) -> tuple[tuple[np.ndarray, list[str]], int]:
        """Load a row group: (stored latents, names that the noise of its rows depends on) and its number of rows."""
        column = CONTENT_COLUMN[self.content]
        table = self._read(group, ["id", "view", column])
        names = [
            f"{name}\0{view}" if view else name
            for name, view in zip(table["id"].to_pylist(), table["view"].to_pylist(), strict=True)
        ]
        values = latents_of(table, self.group_shapes[group], self._how)
        if self.verify and not (good := finite_rows(values, self._how["dtype"])).all():
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
        file, size = self._files(number), self._shards[number]["bytes"]
        with damage_of(file):
            return storage.read_row_group(file, self._footers(number), position, columns, size)

    def _read_footer(self, number: int) -> tuple[pq.FileMetaData, int]:
        file = self._files(number)
        with damage_of(file):
            return storage.read_footer(file, self._shards[number]["bytes"]), 1

    def _file(self, shard: dict[str, Any]) -> str:
        return storage.join(self.path, shard["file"])

    def _checked_file(self, number: int) -> tuple[str, int]:
        """Return the path that a shard is read from, and 1, its size for `LRUCache`.

        With `verify`, the sha256 of a local shard is checked. `_files` calls this once for each shard.
        """
        shard = self._shards[number]
        file = self._file(shard)
        if self.local is not None:
            copy = os.path.join(self.local, f"{shard['sha256']}.parquet")
            if storage.size(copy) != shard["bytes"]:
                storage.put(copy, read_checked(file, shard))
            file = copy
        if self.verify and not storage.is_remote(file):
            read_checked(file, shard)
        return file, 1


def sample_posteriors(mean: Tensor, logvar: Tensor, seed: int, rows: Sequence[tuple[int, str]]) -> Tensor:
    """Sample fp32 latents from posteriors.

    The noise depends on (seed, epoch, id), so that an image that is encoded again gets the same sample as its row in a
    cache.

    Args:
        mean: Means (n, n_z, h, w), fp32.
        logvar: Log-variances (n, n_z, h, w), fp32. They are clipped to `LOGVAR_RANGE`.
        seed: Seed of the noise.
        rows: Epoch and id of each row.
    """
    noise = np.stack([_noise(mean.shape[1:], seed, *row) for row in rows])
    if mean.device.type != "cpu":
        return mean + (0.5 * logvar.clamp(*LOGVAR_RANGE)).exp() * torch.from_numpy(noise).to(mean.device)
    # Computed by NumPy, as in _fp32, because this runs in the threads of loaders. If each of them had torch's own
    # threads, the OpenMP threads of the training step would go to sleep at every barrier (docs/performance.md).
    noise *= np.exp(0.5 * logvar.numpy().clip(*LOGVAR_RANGE))
    noise += mean.numpy()
    return torch.from_numpy(noise)


def _fp32(stored: Tensor) -> np.ndarray:
    """Convert stored latents to fp32, without torch's threads (see `sample_posteriors`)."""
    if stored.dtype == torch.bfloat16:  # a bfloat16 is the upper half of an fp32
        return (stored.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return stored.numpy().astype(np.float32)


def _noise(shape: Sequence[int], seed: int, epoch: int, row: str) -> np.ndarray:
    """Return standard normal noise that depends only on its arguments."""
    key = hashlib.blake2b(f"{seed}\0{epoch}\0{row}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype=np.uint64)))
    return generator.standard_normal(shape, dtype=np.float32)


def _broadcast(channels: Tensor, z: Tensor) -> Tensor:
    return channels.to(z.device, z.dtype).view(1, -1, 1, 1)
