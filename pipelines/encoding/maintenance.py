"""Repair the shards of a cache, and retry the images in its quarantine."""

import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, TypeVar

from litevae import cache, hub, storage
from litevae.any_autoencoder import fingerprint
from litevae.commits import committed_shards, read_commits
from litevae.errors import UserError
from litevae.shards import read_quarantine
from pipelines.data.decode import ShardTask
from pipelines.encoding import at_work
from pipelines.encoding.config import MaintainCache, Repair, Retry
from pipelines.encoding.encode import CacheJob, encode_and_track, print_summary
from pipelines.encoding.listings import open_listings
from pipelines.encoding.partition import Partition
from pipelines.encoding.plan import CachePlan
from pipelines.encoding.totals import listed_reasons
from pipelines.encoding.verify import audit, unnamed_files
from pipelines.runtime import cluster, mlflow_run, paths
from pipelines.runtime.logs import say

Config = TypeVar("Config", bound=MaintainCache)


def _claimed(job: Callable[[Config], dict[str, Any]]) -> Callable[[Config], dict[str, Any]]:
    """Decorate a job on a cache, so that it is marked as at work on it; see `at_work.claimed`."""

    @functools.wraps(job)
    def run(config: Config) -> dict[str, Any]:
        with at_work.claimed(_cache_folder(config), config.takeover):
            return job(config)

    return run


def _cache_folder(config: MaintainCache) -> str:
    """Return the absolute path of the cache.

    Raises:
        UserError: if there is no cache.
    """
    if not config.cache:
        raise UserError("give a cache folder")
    out = paths.output_path("cache", config.cache, remote=True)
    if "plan.json" not in storage.names(out):
        raise UserError(f"{out} is not a latent cache: it has no plan.json")
    return out


@_claimed
def repair(config: Repair) -> dict[str, Any]:
    """Encode again the shards that the audit finds missing or damaged, and remove files that no commit names.

    Returns:
        The summary that `print_summary` prints.

    Raises:
        UserError: if the plan or the listing is damaged, or if the model or the source is not the one of the cache.
    """
    out, plan, partition = _open(config)
    found = audit(out, "contents" if config.contents else "none")
    for number, problems in found.problems.items():
        say(f"shard {number}: {problems[0]}", "WARNING", shard=number)
    for problem in found.repeated:
        say(f"{problem}: no repair can mend this; encode into a new folder with source.ids=unique", "WARNING")
    for number, changes in found.changed.items():
        say(f"shard {number}: {len(changes)} images are others now, such as {changes[0]}", "WARNING", shard=number)
    whole = not found.problems and not found.general and not found.changed
    if whole:
        say(f"{out}: nothing to repair")
    todo = [ShardTask(number, found.generations.get(number, -1) + 1) for number in found.problems]
    todo += [ShardTask(number, found.generations[number] + 1, keep=True) for number in found.changed]
    done = _encode_again(config, CacheJob(out, plan, partition, whole, cluster.start(config.ray)), todo)
    # Remove only files that were unnamed before, too: a new one belongs to a driver that is about to commit it.
    unnamed = sorted({*found.unnamed} & {*unnamed_files(out)})
    for file in unnamed:
        storage.remove(storage.join(out, file))
    if unnamed:
        say(f"removed {len(unnamed)} files of attempts that were not committed")
    return print_summary(done)


@_claimed
def retry(config: Retry) -> dict[str, Any]:
    """Try to encode quarantined images again. Rows of those that succeed now are added to their shards.

    Returns:
        The summary that `print_summary` prints.

    Raises:
        UserError: if the cache is unfinished or damaged, or if nothing is quarantined for one of the given reasons.
    """
    out, plan, partition = _open(config)
    manifest = cache.read_manifest(out)
    known = manifest["counts"]["reasons"]
    if unknown := sorted(set(config.reasons) - known.keys()):
        raise UserError(
            f"reasons: no image is in quarantine as {unknown[0]}; the quarantine has "
            f"{listed_reasons(known) or 'no images'}"
        )
    committed, todo = committed_shards(out), []
    for commit in read_commits(out, committed):
        lost = read_quarantine(out, commit).to_pylist()
        if wanted := [row["unit"] for row in lost if not config.reasons or row["error"] in config.reasons]:
            todo.append(ShardTask(commit["shard"], committed[commit["shard"]] + 1, tuple(wanted)))
    whole = manifest["source"]["shards"] == len(partition)
    done = _encode_again(config, CacheJob(out, plan, partition, whole, cluster.start(config.ray)), todo)
    recovered = done["images"] - manifest["counts"]["encoded"]
    return print_summary(done | {"encoded_now": recovered, "recovered": recovered})


def _encode_again(config: MaintainCache, job: CacheJob, todo: Sequence[ShardTask]) -> dict[str, Any]:
    settings = {key: value for key, value in asdict(job.plan.settings).items() if key != "left_out"}
    return encode_and_track(config, settings | config.model_dump(mode="json"), job, todo)


def _open(config: MaintainCache) -> tuple[str, CachePlan, Partition]:
    """Return the cache folder, the plan and the partition, with the model and the source where they are now."""
    out = _cache_folder(config)
    plan, sources = CachePlan.read(out), open_listings(out, config.source)
    if not sources:
        raise UserError(f"{out} has no listing of its source; run the encode job with the same settings again")
    if config.model:
        plan = replace(plan, model=replace(plan.model, path=hub.pinned(config.model)))
    if fingerprint(plan.model.path) != plan.model.fingerprint:
        raise UserError(f"{plan.model.path} is not the model that encoded {out}; give that one with model=FOLDER")
    mlflow_run.check(config)
    agreed: dict[str, Any] = {}
    with suppress(UserError):  # an unfinished cache has no manifest
        agreed = cache.read_manifest(out).get("settings", {})
    budget = plan.settings.error_budget
    if cache.read_settings(out) is None:  # older versions noted only in the manifest what was agreed to
        budget = agreed.get("error_budget", budget)
    if config.error_budget is not None:
        budget = config.error_budget
    # The largest limit that the cache was made with, so that no image is lost that was encoded before.
    largest = max(plan.views.max_pixels, agreed.get("transform", {}).get("max_pixels", 0))
    transform = plan.settings.transform | {"max_pixels": config.max_pixels or largest}
    plan = replace(plan, settings=replace(plan.settings, transform=transform, error_budget=budget))
    plan.agree(out)
    return out, plan, Partition(sources, plan.rows_per_shard)
