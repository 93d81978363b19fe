"""Encode images into a latent cache with Ray Data. Each row of the Ray dataset is one planned shard.

    shard -> decode (CPU tasks) -> uint8 pixels -> encode and commit (one actor per worker, on a GPU or on CPUs)

Ray provides streaming, back-pressure and restarts. The plan and the commits (litevae/commits.py) ensure that every
image is in the cache or in its quarantine exactly once, and that a run which is killed, or started twice, does no harm.
Repairing a shard and retrying its quarantine do the same work on some of the shards, and commit the result as the next
generation of each.
"""

import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import chain
from typing import Any

import numpy as np

from litevae import cache, storage
from litevae.commits import committed_shards, constant_channels, read_commits
from litevae.errors import UserError, redact
from pipelines.data.decode import Shard, ShardTask, decode_shard
from pipelines.data.open_source import restore
from pipelines.data.unique_ids import check_ids
from pipelines.encoding import at_work, auto, speed
from pipelines.encoding.config import Encode, MaintainCache
from pipelines.encoding.encoder import ShardEncoder
from pipelines.encoding.listings import inputs_of, source_of
from pipelines.encoding.model_statistics import disagreement
from pipelines.encoding.partition import Partition
from pipelines.encoding.plan import CachePlan, make_plan
from pipelines.encoding.preview import Preview, check_room, judge, look
from pipelines.encoding.stored_ids import StoredIds
from pipelines.encoding.totals import EncodeTotals, listed_losses, listed_reasons
from pipelines.runtime import cluster, host, mlflow_run, mlflow_server, paths, prometheus
from pipelines.runtime.cluster import Placement
from pipelines.runtime.logs import say, without_stderr_lines
from pipelines.runtime.progress import Progress, rounded

# Libraries whose versions the manifest records, because they can change the bytes of a cache.
LIBRARIES = ("litevae", "torch", "diffusers", "pillow", "simplejpeg", "pyarrow", "numpy", "ray")
# How often a shard is retried after its process died. Ray Data by default retries without end, even a shard that kills
# its process every time.
RETRIES = 3
FEW_SHARDS = 100  # shards whose commits are read to find out whether nothing was encoded into a cache
WAVE = 2000  # shards per worker that Ray Data gets at a time, so that the driver's memory does not grow with the data


# --- jobs -------------------------------------------------------------------------------------------------------


def run(config: Encode) -> dict[str, Any]:
    """Run `encode_dataset` and print its summary as a table."""
    return print_summary(encode_dataset(config))


def encode_dataset(config: Encode) -> dict[str, Any]:
    """Encode the images of a source that the cache does not hold yet, and write the manifest.

    An unfinished cache in `out` is continued. With `append`, inputs that are new in the source are added to a finished
    cache.

    Returns:
        The summary that `print_summary` prints: counts, speed, and facts of the manifest.

    Raises:
        UserError: if there is nothing to encode, if `out` is a cache of something else, or if more images can't be read
            than the error budget allows.
    """
    out = paths.output_path("out", config.out, remote=True)
    with at_work.claimed(out, config.takeover) as alone, _leaving_nothing(out, alone):
        job = plan_cache(config, alone, preview=True)
        if job.finished:
            return _summary(job.out, cache.read_manifest(job.out), config.root)
        done = encode_and_track(config, config.model_dump(mode="json"), job, job.todo())
        if len(job.changed):  # only now: a run that is killed before finds the same changes again
            for number, source in enumerate(job.partition.sources, start=1):
                cache.replace_listing(job.out, number, source.listing)
        return done


@contextmanager
def _leaving_nothing(out: str, alone: Callable[[], bool]) -> Iterator[None]:
    """Return a context that leaves no plan behind if it began a cache and fails before a shard was committed.

    Args:
        out: the cache folder.
        alone: whether no other driver is at work on it; one may have begun with the same plan.
    """
    begun = "plan.json" in storage.names(out)
    try:
        yield
    except BaseException:
        with suppress(OSError, UserError):  # the store is away, or the disk; the next job takes the plan over
            committed = committed_shards(out) or storage.names(storage.join(out, "manifests"))
            if not begun and not committed and alone():
                _forget(out)
        raise


@dataclass(frozen=True)
class CacheJob:
    """A cache whose plan and listing are written, with everything that is needed to fill it.

    Attributes:
        out: the cache folder.
        plan: what the cache holds.
        partition: how its images are divided into shards.
        finished: whether every shard is committed and the manifest names them all.
        placement: the workers that Ray provides; None where `encode_dataset` finds a finished cache, which needs none.
        changed: numbers of the units to encode again, because their images were written again.
    """

    out: str
    plan: CachePlan
    partition: Partition
    finished: bool
    placement: Placement | None
    changed: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def todo(self) -> list[ShardTask]:
        """Return a task for each shard that has no commit yet, or that has images which were written again."""
        committed = committed_shards(self.out)
        again = set(self.partition.shards_of(self.changed).tolist())
        return [
            ShardTask(number, committed[number] + 1 if number in committed else 0, keep=number in committed)
            for number in range(len(self.partition))
            if number not in committed or number in again
        ]


def plan_cache(config: Encode, alone: Callable[[], bool] | None = None, preview: bool = False) -> CacheJob:
    """Begin a new cache, or prepare to continue an existing one. Start or join Ray unless the cache is finished.

    A plan with other settings into which nothing was encoded is replaced, with a word, unless another driver is at
    work. Commits name their plan, so that what a process of the earlier job may still commit is known as foreign.

    Args:
        config: the job's config.
        alone: whether no other driver is at work on the cache; None: this is not known.
        preview: whether to look at a few images first, and to say how long the job will take.

    Raises:
        UserError: for the same reasons as `encode_dataset`.
    """
    out = paths.output_path("out", config.out, remote=True)
    if not config.model:
        raise UserError("model is empty; give a model folder, e.g. model=runs/vae/model")
    # `_is_empty` comes first: another driver may write its plan between the two calls.
    empty, files = _is_empty(out), storage.names(out)
    if "plan.json" not in files and not empty:
        raise UserError(f"out={config.out} is not empty and holds no latent cache; give a new or empty folder")
    before = CachePlan.read(out) if "plan.json" in files else None
    inputs = inputs_of(config, out, before)
    sources = inputs.sources
    plan = make_plan(config, sources[0], inputs.identity, before)
    if before:
        try:
            plan.write(out)
        except cache.OtherPlan as error:
            if alone is None or not alone() or _holds_images(out):
                raise
            say(
                f"{out} was begun with other settings, and nothing was encoded into it: it begins anew with those of "
                f"now{str(error).partition('are:')[2]}",
                "WARNING",
            )
            _forget(out)
            return plan_cache(config, alone, preview)
    finished = "manifest.json" in files and inputs.new is None and not len(inputs.changed)
    if finished and cache.read_manifest(out)["source"]["units"] == sum(source.units for source in sources):
        return CacheJob(out, plan, Partition(sources, plan.rows_per_shard), finished=True, placement=None)
    mlflow_run.check(config)
    new = [] if inputs.new is None else [restore(inputs.new)]
    if before:
        known = StoredIds(out, Partition(sources, plan.rows_per_shard), inputs.changed)
        try:
            check_ids([known, *new])
        except UserError as error:
            raise UserError(f"{error}; either takes a new folder") from None
    else:
        check_ids([*sources, *new])
    if inputs.new is not None:
        cache.write_listing(out, len(sources) + 1, inputs.new)
        # The listings in the folder count: another driver may have listed more inputs, or fewer.
        later = cache.read_listings(out)[len(sources) :]
        sources = [*sources, *(restore(listing, sources[0].uri) for listing in later)]
    partition = Partition(sources, plan.rows_per_shard)
    job = CacheJob(out, plan, partition, finished=False, placement=None, changed=inputs.changed)
    seen = Preview(0)
    if preview and (todo := job.todo()):
        seen = look(partition, todo, plan.views)
        judge(seen, config.error_budget, partition.units)
        check_room(out, plan, seen.todo)
    placement = cluster.start(config.ray)
    paths.check_folders({"out": out}, {"source.uri": sources[0].uri, "model": config.model})
    if not before:
        plan = auto.settle(plan, config, placement, partition.units)
    speed.announce(plan, placement, seen, config.yes)
    if before:
        plan.agree(out)
    else:
        plan.write(out)
    if not storage.names(storage.join(out, "listing")):
        cache.write_listing(out, 1, sources[0].listing)
    return replace(job, plan=plan, placement=placement)


def _forget(out: str) -> None:
    """Remove a cache into which nothing was encoded, with the metrics of the job that began it."""
    cache.forget(out, () if storage.is_remote(out) else ("metrics.jsonl",))


def _is_empty(out: str) -> bool:
    """Return whether the folder does not exist or holds nothing but marks of drivers and temporary files."""
    if storage.is_remote(out):
        return all(at_work.is_mark(name) for name, _ in storage.walk(out))
    if not storage.folder_exists(out):
        return True
    # A killed driver leaves temporary files behind.
    return all(name.startswith(".tmp-") or at_work.is_mark(name) for name in os.listdir(out))


def _holds_images(out: str) -> bool:
    """Return whether images were encoded into a cache, or may have been."""
    if storage.names(storage.join(out, "manifests")) or "manifest.json" in storage.names(out):
        return True
    committed = committed_shards(out)
    if len(committed) > FEW_SHARDS:
        return True
    try:
        return any(commit["rows"] for commit in read_commits(out, committed))
    except UserError:  # a damaged commit
        return True


# --- running ------------------------------------------------------------------------------------------------


def encode_and_track(
    config: Encode | MaintainCache, settings: dict[str, Any], job: CacheJob, todo: Sequence[ShardTask]
) -> dict[str, Any]:
    """Encode shards and write the manifest, tracked as an MLflow run.

    Args:
        config: where the run is tracked (`config.tracking`, `config.root`).
        settings: config values that MLflow and the manifest record.
        job: the cache.
        todo: the shards to encode.

    Returns:
        The summary that `print_summary` prints.
    """
    out = job.out
    folder = tracking_folder(out, config.root)
    handle = mlflow_run.start_run(
        config.tracking, config.root, "encode_dataset", os.path.basename(out), settings, folder
    )
    tracker = mlflow_run.Tracker(handle)
    say(f"cache: {out}\nMLflow: {mlflow_run.link(handle)}", cache=out, run=mlflow_run.link(handle))
    status: mlflow_server.Status = "FAILED"
    try:
        result = _encode(job, todo)
        manifest = finish(out, job.plan, job.partition, "encode_dataset", settings, handle, result.pop("devices"))
        summary = _summary(out, manifest, config.root) | result | {"link": mlflow_run.link(handle)}
        numbers = ("images", "quarantined", "images_per_s", "bits_per_pixel", "decode_busy", "encode_busy")
        metrics = {f"encode/{key}": summary[key] for key in numbers}
        for name in ("mean", "std"):
            metrics |= {f"encode/latent_{name}_{n}": value for n, value in enumerate(manifest["latents"][name])}
        tracker.metrics(metrics, step=summary["images"])
        source = manifest["source"]
        tracker.dataset(os.path.basename(source["uri"]), source["digest"], source["uri"], "encoding")
        tracker.dataset(os.path.basename(out), manifest["digest"], out, "latents")
        copy = os.path.join(folder, "manifest.json")
        if storage.is_remote(out):
            storage.put(copy, json.dumps(manifest, indent=1).encode())
        tracker.artifact(copy)
        status = "FINISHED"
        return summary
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.close()
        mlflow_run.finish(handle, status)


def finish(
    out: str,
    plan: CachePlan,
    partition: Partition,
    job: str,
    settings: dict[str, Any],
    handle: mlflow_server.RunHandle,
    devices: Sequence[str],
) -> dict[str, Any]:
    """Write the manifest of a cache whose shards are all committed, with a record of how the cache was made.

    Args:
        job: name of the job.
        settings: config values of the job; secrets are removed.
        handle: the MLflow run.
        devices: names of the devices that encoded.

    Returns:
        The manifest.
    """
    about = {
        "job": job,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": redact(settings),
        "versions": host.versions(LIBRARIES),
        "devices": list(devices),
        "tracking": {"experiment": handle.experiment, "run_id": handle.run_id},
    }
    return cache.write_manifest(out, plan.to_json(), source_of(partition), about)


def tracking_folder(out: str, root: str) -> str:
    """Return the folder for a cache's metrics: the cache itself, or a folder below `root` for a cache on S3."""
    return os.path.join(os.path.abspath(root), os.path.basename(out)) if storage.is_remote(out) else out


def _begun(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Return an iterator over rows that waits for the first one, without a warning of Ray that is no concern of users.

    Ray Data itself puts the arguments of its actors into the object store, and Ray warns that they may be lost there.
    """
    rest = iter(rows)
    with without_stderr_lines("has constructor arguments in the object store"):
        first = next(rest, None)
    return chain([] if first is None else [first], rest)


def _encode(job: CacheJob, todo: Sequence[ShardTask]) -> dict[str, Any]:
    """Encode the shards of these tasks. All other shards keep their commits."""
    import ray.data

    assert job.placement is not None
    out, placement, partition = job.out, job.placement, job.partition
    budget = job.plan.settings.error_budget
    slots = {"decode": placement.decoders, "encode": placement.workers}
    totals = EncodeTotals(partition.units, {stage: min(count, max(1, len(todo))) for stage, count in slots.items()})
    numbers = {task.shard for task in todo}
    kept = {shard: generation for shard, generation in committed_shards(out).items() if shard not in numbers}
    for commit in read_commits(out, kept):
        if strange := cache.foreign(commit, job.plan.id):
            raise UserError(f"{out}: {strange}; `encode_dataset.py repair {out}` encodes it again")
        totals.add_earlier(commit)
    totals.check_budget(budget, out)
    if kept and todo:
        say(f"{len(todo):,} of {len(partition):,} shards are left to encode")
    progress = Progress("encode", totals.images, totals.done, sys.stderr.isatty())
    exported = prometheus.EncodingGauges(os.path.basename(out))
    totals.started = time.monotonic()
    rows: Any = None
    try:
        wave = WAVE * placement.workers
        for begin in range(0, len(todo), wave):
            shards = [partition.shard(task) for task in todo[begin : begin + wave]]
            rows = _begun(_pipeline(job.plan, shards, out, placement).iter_rows())
            for row in rows:
                if row["error"]:
                    raise UserError(
                        f"encoding stopped after {totals.done:,} of {totals.images:,} images: {row['error']}"
                    )
                encoded, reasons = totals.add(row)
                busy = totals.busy()
                exported.show(encoded, reasons, busy)
                totals.check_budget(budget, out)
                percent = {f"{stage}_%": 100 * share for stage, share in busy.items()}
                progress.update(totals.done, totals.text(busy), quarantined=totals.reasons.total(), **percent)
    except ray.exceptions.RayError as error:
        if isinstance(error, ray.exceptions.RayTaskError):
            raise  # an exception in this project's code: its traceback is of use
        cause = str(error).strip().splitlines()[-1]
        raise UserError(
            f"encoding stopped after {totals.done:,} of {totals.images:,} images: {cause}; the same command continues"
        ) from error
    finally:
        progress.close()
        rows = None
        gc.collect()  # otherwise the actors of an interrupted execution keep their GPUs
    return totals.summary()


def _pipeline(plan: CachePlan, shards: Sequence[Shard], out: str, placement: Placement) -> Any:
    """Return a Ray dataset that encodes these shards. Each of its rows is a shard that was just committed."""
    import ray.data
    from ray.data import ActorPoolStrategy, TaskPoolStrategy
    from ray.util.annotations import RayDeprecationWarning

    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # there is no other way to set retries
        pixels = rows.map(
            decode_shard,
            fn_kwargs={"views": plan.views, "hashed": plan.hashed},
            compute=TaskPoolStrategy(size=min(placement.decoders, len(shards))),
            max_retries=RETRIES,
            **placement.decode_options(),
        )
        return pixels.map(
            ShardEncoder,
            fn_constructor_kwargs={"out": out, "plan": plan, "gpu": placement.gpu, "threads": placement.threads},
            compute=ActorPoolStrategy(
                size=min(placement.workers, len(shards)),
                max_tasks_in_flight_per_actor=3,
                max_concurrent_calls_per_actor=2,  # one shard is written while the next is encoded
                enable_true_multi_threading=True,
            ),
            max_task_retries=RETRIES,
            # The number of CPUs must differ from that of decoding: Ray Data fuses operators of equal resources into
            # one, and would then decode in the actor.
            **placement.ray_options() | {"num_cpus": 0.9},
        )


def _summary(out: str, manifest: dict[str, Any], root: str) -> dict[str, Any]:
    """Return the summary of a finished cache in which nothing was encoded now."""
    counts, latents = manifest["counts"], manifest["latents"]
    stored = sum(shard.get("bytes", 0) for shard in manifest["shards"])
    return {
        "images": counts["encoded"],
        "rows": counts["rows"],
        "quarantined": counts["quarantined"],
        "reasons": counts["reasons"],
        "lost_values": counts.get("lost_values", {}),
        "enlarged": counts.get("enlarged", 0),
        "encoded_now": 0,
        "seconds": 0.0,
        "images_per_s": 0.0,
        "steady_images_per_s": 0.0,
        "bits_per_pixel": round(8 * stored / (counts["rows"] * manifest["transform"]["resolution"] ** 2), 4),
        "shape": latents["shape"],
        "latents": latents,
        "disagreement": disagreement(manifest["model"]["config"], latents["mean"], latents["std"]),
        "digest": manifest["digest"],
        "number": manifest["number"],
        "manifest": storage.join(out, "manifest.json"),
        "link": os.path.join(tracking_folder(out, root), "metrics.jsonl"),
    }


def print_summary(done: dict[str, Any]) -> dict[str, Any]:
    """Print the summary of an encode job as a table, and return it."""
    reasons = f"  ({listed_reasons(done['reasons'])})" if done["reasons"] else ""
    latents = done["latents"]
    shape = " x ".join(map(str, done["shape"])) if done["shape"] else f"{len(latents['shapes'])} shapes of"
    rows = {"images encoded": f"{done['images']:,}  ({done['encoded_now']:,} in this run)"}
    if "recovered" in done:
        rows["out of quarantine"] = f"{done['recovered']:,}"
    rows["quarantined"] = f"{done['quarantined']:,}{reasons}"
    if done["enlarged"]:
        rows["enlarged"] = f"{done['enlarged']:,} images, which are smaller than transform.resolution on a side"
    if twice := done.get("encoded_twice"):
        rows["encoded in vain"] = (
            f"{twice:,} of the {done['encoded_now']:,} images of this run: another driver, or an earlier attempt, had "
            f"committed them meanwhile"
        )
    if done["encoded_now"]:
        busy = f"decoding busy {done['decode_busy']:.0%}, encoding {done['encode_busy']:.0%}"
        steady = f", once started {rounded(done['steady_images_per_s'])}" if done["steady_images_per_s"] else ""
        rows["images/s"] = f"{rounded(done['images_per_s'])}{steady}  ({busy})"
    rows["latents"] = f"{shape} {latents['content']}, {latents['dtype']}, {done['bits_per_pixel']:.2f} bits per pixel"
    if constant := constant_channels(latents["mean"], latents["std"]):
        rows["constant channels"] = f"{', '.join(map(str, constant))} (from 0): the same value in all latents"
    if other := done.get("disagreement"):
        rows["model's statistics"] = other
    rows["manifest"] = f"{done['manifest']}, version {done['number']}"
    rows["run"] = done["link"]
    lines = [f"{name:<22}{text}" for name, text in rows.items()] + listed_losses(done["lost_values"])
    say("\n" + "\n".join(lines), **done)
    return done
