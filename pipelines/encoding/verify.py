"""Audit a latent cache: compare every byte of it with its plan, its commits and its source."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc

from litevae import cache, storage
from litevae.commits import committed_shards, latent_statistics, mean_and_std, merged_losses, read_commit
from litevae.errors import UserError
from litevae.images import ImageError
from litevae.shards import SOURCE_HASH, from_stored, read_quarantine, read_shard, storage_errors
from pipelines.data.decode import Shard, ShardTask
from pipelines.data.left_out import LeftOut
from pipelines.encoding.config import Verify
from pipelines.encoding.listings import open_listings, source_of
from pipelines.encoding.partition import Partition
from pipelines.encoding.plan import CachePlan
from pipelines.runtime.commands import command
from pipelines.runtime.logs import say

STALE = 3600.0  # seconds; a temporary file older than this belongs to a killed writer
SHOWN = 10  # problems that a message lists at most


@dataclass
class Audit:
    """The findings of an audit. The cache is sound if `problems`, `general`, `repeated` and `missing` are empty.

    Attributes:
        shards: number of shards in the plan.
        rows: number of rows in the committed shards.
        quarantined: number of images in quarantine.
        bytes: size of the committed shards.
        generations: the newest committed generation of each committed shard.
        problems: what is wrong with each damaged shard, by shard; includes shards without a commit.
        changed: ids of images that are others in the source than those that were encoded, by shard; like `gone`, filled
            only if contents were compared.
        gone: ids of images that were encoded and can't be read any more, each with the reason.
        missing: in an unfinished cache, the shards that have no commit.
        general: what is wrong with the cache as a whole.
        repeated: ids that several images have, each as a sentence.
        left_out: what the newest listing of the source left out.
        unnamed: files that no commit names, left behind by attempts that were not committed.
    """

    shards: int
    rows: int = 0
    quarantined: int = 0
    bytes: int = 0
    generations: dict[int, int] = field(default_factory=dict)
    problems: dict[int, list[str]] = field(default_factory=dict)
    changed: dict[int, list[str]] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    general: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    unnamed: list[str] = field(default_factory=list)


def verify(config: Verify) -> Audit:
    """Audit a cache, and print what was found.

    Raises:
        UserError: if something is wrong; the message lists it.
    """
    if not config.cache:
        raise UserError("give a cache folder")
    out = storage.absolute(config.cache)
    start = time.monotonic()
    found = audit(out, config.source, config.threads)
    seconds = time.monotonic() - start
    of_shards = [f"shard {n}: {text}" for n, texts in found.problems.items() for text in texts]
    if wrong := [*found.general, *found.repeated, *of_shards]:
        more = f"\n  and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        remedy = f"repair it: {command('encode_dataset')} repair {out}"
        if found.missing:
            remedy = "run the encode job with the same settings again; it continues where it stopped"
        elif found.repeated and not found.problems and not found.general:
            remedy = "ids are not unique; encode into a new folder, with another source.id_column or source.ids=unique"
        raise UserError(
            f"{out}: {len(found.problems)} of {found.shards} shards are missing or damaged; {remedy}\n  "
            + "\n  ".join(wrong[:SHOWN])
            + more
        )
    if different := _differences_from_source(out, found):
        raise UserError(different)
    print(f"{out}: sound")
    print(f"{'shards':<22}{found.shards:,}  ({found.bytes / 1e6:,.1f} MB, {found.bytes / 1e6 / seconds:,.0f} MB/s)")
    print(f"{'rows':<22}{found.rows:,}, each once")
    print(f"{'quarantined':<22}{found.quarantined:,}")
    print(f"{'left out':<22}{found.left_out}")
    print(f"{'ids':<22}{'as in the source' if config.source != 'none' else 'not compared with the source'}")
    if config.source == "contents":
        print(f"{'contents':<22}{'the images of the source are those that were encoded'}")
    if found.unnamed:
        print(f"{'left over':<22}{len(found.unnamed):,} files that no commit names; `repair` removes them")
    return found


def _differences_from_source(out: str, found: Audit) -> str:
    """Return a message about images whose contents are others than those that were encoded, or nothing."""
    texts = []
    if changed := [name for _, names in sorted(found.changed.items()) for name in names]:
        texts.append(
            f"{len(changed):,} images are others than those that were encoded ({_examples(changed)}); encode their "
            f"shards again: {command('encode_dataset')} repair {out} contents=true"
        )
    if found.gone:
        texts.append(
            f"{len(found.gone):,} images can't be read any more, and keep their latents ({_examples(found.gone)}); "
            f"bring them back, or compare without them by source=ids"
        )
    return "\n  ".join([f"{out} is sound, but not what its source is now:", *texts]) if texts else ""


def _examples(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")


def audit(out: str, source: Literal["none", "ids", "contents"] = "ids", threads: int = 8) -> Audit:
    """Read every shard of a cache and check it.

    The checks are: the file, its size, its SHA-256, the checksums of its pages, and its columns; every unit of the plan
    is once in the rows or in the quarantine; latents are finite; statistics agree with recomputed ones; no id is there
    twice; the manifest agrees with the commits.

    Args:
        out: the cache folder.
        source: what else to compare: "ids" with those of the source; "contents", the SHA-256 of each image that was
            encoded with that of the image in the source, too. The source must be where it was.
        threads: number of shards to read at a time.

    Raises:
        UserError: if the folder is not a cache, or if its plan or listing is damaged; or if it is so old that it does
            not hold the SHA-256 of its images.
    """
    files = storage.names(out)
    if "plan.json" not in files:
        raise UserError(f"{out} is not a latent cache: it has no plan.json")
    plan, sources = CachePlan.read(out), open_listings(out)
    if not sources:
        raise UserError(f"{out} is unfinished: its source was not listed yet; run the encode job again")
    if source == "contents" and not plan.hashed:
        raise UserError(
            f"{out} was begun by an older version, which did not note the contents of images; compare only the ids "
            f"with source=ids"
        )
    partition = Partition(sources, plan.rows_per_shard)
    found = Audit(len(partition), generations=committed_shards(out), left_out=sources[-1].left_out)
    if "manifest.json" not in files and not storage.names(storage.join(out, "manifests")):
        found.missing = [number for number in range(len(partition)) if number not in found.generations]

    def check(number: int) -> tuple[dict[str, Any], list[str], np.ndarray]:
        if number not in found.generations:
            return {}, ["has no commit"], np.empty(0, np.int64)
        shard, generation = partition.shard(ShardTask(number)), found.generations[number]
        checked = _check_shard(out, plan, shard, generation, source != "none")
        if source == "contents" and not checked[1]:
            changed, gone = _compare_contents(out, plan, shard, checked[0])
            found.gone += gone
            if changed:
                found.changed[number] = changed
        return checked

    commits, keys = [], []
    with ThreadPoolExecutor(threads) as pool:
        for number, (commit, problems, ids) in enumerate(pool.map(check, range(len(partition)))):
            if problems:
                found.problems[number] = problems
            if commit:
                commits.append(commit)
                found.rows, found.quarantined = found.rows + commit["rows"], found.quarantined + commit["quarantined"]
                found.bytes += commit.get("bytes", 0)
            keys.append(ids)
    found.repeated = _duplicates(out, plan, commits, np.concatenate(keys))
    if not found.problems:
        found.general += _check_manifest(out, commits, source_of(partition))
    found.unnamed = unnamed_files(out)
    return found


def _check_shard(
    out: str, plan: CachePlan, shard: Shard, generation: int, source: bool
) -> tuple[dict[str, Any], list[str], np.ndarray]:
    """Return the commit of a shard, what is wrong with the shard, and a hash of the id of each image in its rows."""
    how, nothing = plan.latents, np.empty(0, np.int64)
    try:
        commit = read_commit(out, shard.task.shard, generation)
    except storage.Unavailable:  # says nothing about the shard
        raise
    except UserError as error:
        return {}, [str(error)], nothing
    try:
        if strange := cache.foreign(commit, plan.id):
            return commit, [strange], nothing
        units = (shard.first, shard.first + shard.source.units)
        if tuple(commit["units"]) != units:
            return commit, [f"its commit is of inputs {commit['units']}, the plan says {list(units)}"], nothing
        lost = read_quarantine(out, commit)
        rows, latents = read_shard(out, commit, how) if commit["rows"] else (None, [])
        statistics = commit["statistics"] if rows is not None else {}
    except storage.Unavailable:
        raise
    except UserError as error:
        return commit, [str(error)], nothing
    except (KeyError, TypeError) as error:
        return {}, [f"its commit is damaged: {error!r}"], nothing
    problems = []
    absent = lost["unit"].to_numpy()
    ids = dict(zip(absent.tolist(), lost["id"].to_pylist(), strict=True))
    expected = np.setdiff1d(np.arange(*units), absent)
    keys = nothing
    if rows is not None:
        if (columns := {field.name: str(field.type) for field in rows.schema}) != plan.columns:
            problems.append(f"has columns {columns}, the plan says {plan.columns}")
        views = rows["unit"].to_numpy() * how["views"] + rows["view"].to_numpy()
        wanted = (expected[:, None] * how["views"] + np.arange(how["views"])).reshape(-1)
        if not np.array_equal(np.sort(views), wanted):
            problems.append(f"its {len(views)} rows are not the {len(wanted)} of the inputs that are not in quarantine")
        names = rows["id"].to_pylist()
        ids |= dict(zip(rows["unit"].to_pylist(), names, strict=True))
        keys = np.array([hash(name) for name, view in zip(names, rows["view"].to_pylist(), strict=True) if view == 0])
        if any(storage_errors(_fp32(values, how), how["dtype"]) != [None] * len(values) for values in latents):
            problems.append("has latents that are not finite")
        if not _close(latent_statistics(latents, how), statistics):
            problems.append("its statistics are not those of its latents")
    elif len(expected):
        problems.append(f"has no rows, but {len(expected)} inputs that are not in quarantine")
    if source and not problems:
        listed = shard.source.ids(0, shard.source.units)
        if [ids.get(unit) for unit in range(*units)] != listed:
            place = next(n for n, unit in enumerate(range(*units)) if ids.get(unit) != listed[n])
            problems.append(
                f"input {units[0] + place} is {ids.get(units[0] + place)!r}, in the source {listed[place]!r}"
            )
    return commit, problems, keys


def _compare_contents(out: str, plan: CachePlan, shard: Shard, commit: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Compare the images of a sound shard with those of the source; see `Audit.changed` and `Audit.gone`."""
    changed: list[str] = []
    gone: list[str] = []
    rows, _ = read_shard(out, commit, plan.latents) if commit["rows"] else (None, [])
    if rows is None:
        return changed, gone
    for row in rows.filter(pc.equal(rows["view"], 0)).select(["unit", "id", SOURCE_HASH.name]).to_pylist():
        try:
            data = shard.source.data(row["unit"] - shard.first)
        except ImageError as error:
            gone.append(f"{row['id']}: {error}")
            continue
        if hashlib.sha256(data).digest() != row[SOURCE_HASH.name]:
            changed.append(row["id"])
    return changed, gone


def _fp32(values: np.ndarray, how: dict[str, Any]) -> np.ndarray:
    return from_stored(values, how["dtype"]).float().numpy()


def _close(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(np.allclose(ours[key], theirs[key], rtol=1e-9) for key in ours)


def _duplicates(out: str, plan: CachePlan, commits: list[dict[str, Any]], keys: np.ndarray) -> list[str]:
    """Return a problem for each id that several images have. Different ids may share a hash, so ids are compared."""
    ordered = np.sort(keys)
    twice = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    seen: set[str] = set()
    found: list[str] = []
    for commit in commits if twice else ():
        rows, _ = read_shard(out, commit, plan.latents) if commit["rows"] else (None, [])
        pairs = zip(rows["id"].to_pylist(), rows["view"].to_pylist(), strict=True) if rows is not None else ()
        for name in [name for name, view in pairs if view == 0 and hash(name) in twice]:
            if name in seen:
                found.append(f"id {name!r} is there more than once")
            seen.add(name)
    return found


def _check_manifest(out: str, commits: list[dict[str, Any]], source: dict[str, Any]) -> list[str]:
    """Return what is wrong with the manifest, compared with the commits of all shards and with the listings."""
    try:
        manifest = cache.read_manifest(out)
    except storage.Unavailable:
        raise
    except UserError as error:
        return [str(error)]
    problems = []
    if manifest["digest"] != cache.digest(manifest):
        problems.append(f"{out}/manifest.json: its digest is not that of its content")
    for shard, commit in zip(manifest["shards"], commits, strict=False):
        if wrong := [key for key in shard if shard[key] != commit.get(key)]:
            problems.append(f"{out}/manifest.json: shard {shard['shard']} has another {wrong[0]} than its commit")
    if len(manifest["shards"]) != len(commits):
        problems.append(f"{out}/manifest.json has {len(manifest['shards'])} shards; {len(commits)} are committed")
    for key in ("units", "seen", "left_out"):  # manifests that are older than the count of what is left out lack it
        if manifest["source"].get(key, source[key]) != source[key]:
            problems.append(f"{out}/manifest.json: its source has another {key} than the listings")
    if manifest["counts"].get("lost_values", {}) != merged_losses(commits):
        problems.append(f"{out}/manifest.json: its values that could not be carried are not those of its shards")
    mean, std = mean_and_std(commit["statistics"] for commit in commits if commit["rows"])
    if not np.allclose([mean, std], [manifest["latents"]["mean"], manifest["latents"]["std"]], rtol=1e-9):
        problems.append(f"{out}/manifest.json: its mean and std are not those of its shards")
    return problems


def unnamed_files(out: str) -> list[str]:
    """List files of the cache that no commit names, left behind by attempts that were not committed.

    Args:
        out: the cache folder.

    Returns:
        Paths within the cache folder.
    """
    named = {
        file for commit in _all_commits(out) for file in (commit.get("file"), commit.get("quarantine", {}).get("file"))
    }
    found: list[str] = []
    for folder in ("shards", "quarantine"):
        stored = (f"{folder}/{name}" for name in storage.names(storage.join(out, folder)))
        found += [file for file in stored if file not in named]
    return found + _stale(out)


def _all_commits(out: str) -> Iterator[dict[str, Any]]:
    """Yield every readable commit, also of earlier generations, because earlier manifests name their files."""
    for name in storage.names(storage.join(out, "commits")):
        try:
            yield json.loads(storage.read(storage.join(out, "commits", name)))
        except UserError:  # not skipped: files that only this commit names would count as unnamed
            raise
        except ValueError as error:
            say(f"{out}/commits/{name} is damaged: {error}", "WARNING")


def _stale(out: str) -> list[str]:
    """Return temporary files of killed writers. An S3 store has none."""
    if storage.is_remote(out):
        return []
    files = (path for path in Path(out).glob("*/.tmp-*"))
    return sorted(str(path.relative_to(out)) for path in files if time.time() - path.stat().st_mtime > STALE)
