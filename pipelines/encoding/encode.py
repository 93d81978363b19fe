"""Images into a latent cache, on Ray Data: one row is one planned shard.

    shard -> decode (CPU tasks) -> uint8 pixels -> encode and commit (one actor a GPU, or a CPU worker)

Ray gives streaming, back-pressure and restarts. That every image is in the cache or in its quarantine exactly once is
the work of the plan and the commits (litevae/cache.py), which also make a killed or doubled run harmless. Repairing a
shard and retrying its quarantine are the same work on some shards, committed as their next generation.
"""

import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from litevae import cache, storage
from litevae.errors import UserError
from pipelines.data.decode import Shard, Task, decode_shard
from pipelines.data.sources import restore
from pipelines.encoding import auto
from pipelines.encoding.config import Encode, Mend
from pipelines.encoding.encoder import Encoder
from pipelines.encoding.listings import inputs_of, source_of
from pipelines.encoding.partition import Partition
from pipelines.encoding.plan import CachePlan, make_plan
from pipelines.encoding.totals import EncodeTotals, check_budget, listed_reasons
from pipelines.runtime import cluster, host, mlflow_run, mlflow_server, paths, prometheus
from pipelines.runtime.cluster import Placement
from pipelines.runtime.logs import say
from pipelines.runtime.progress import Progress

LIBRARIES = ("litevae", "torch", "diffusers", "pillow", "simplejpeg", "pyarrow", "numpy", "ray")  # that decide on bytes
RETRIES = 3  # of a shard whose process died; Ray Data's default is endless, also for one that always kills it
WAVE = 2000  # shards a worker that Ray Data is given at a time: what the driver holds does not grow with the data


# --- jobs -------------------------------------------------------------------------------------------------------


def run(config: Encode) -> dict[str, Any]:
    """`encode_dataset`, then a table for people."""
    return print_summary(encode_dataset(config))


def encode_dataset(config: Encode) -> dict[str, Any]:
    """Encode a source, or what is left of it, or (`append`) what is new in it, and write the manifest.

    Raises:
        UserError: nothing to encode; `out` is a cache of something else; more images than the budget allows can't be
            read.
    """
    job = plan_cache(config)
    if job.placement is None:
        return _summary(job.out, cache.read_manifest(job.out), config.root)
    return encode_and_track(config, config.model_dump(mode="json"), job, job.todo())


@dataclass(frozen=True)
class CacheJob:
    """A cache that is begun, with its plan and listing written, and what it takes to fill it.

    Attributes:
        out: the cache's folder.
        plan: what the cache holds.
        partition: how its images are cut into shards.
        placement: the workers that Ray gives; None for a finished cache, which takes none.
    """

    out: str
    plan: CachePlan
    partition: Partition
    placement: Placement | None

    @property
    def finished(self) -> bool:
        """Whether every shard is committed and the manifest written."""
        return self.placement is None

    def todo(self) -> list[Task]:
        """A task for each shard without a commit."""
        committed = cache.committed(self.out)
        return [Task(number) for number in range(len(self.partition)) if number not in committed]


def plan_cache(config: Encode) -> CacheJob:
    """Begin a cache, or go on with one. Starts or joins Ray unless the cache is finished.

    Raises:
        UserError: as `encode_dataset`.
    """
    out = paths.output_path("out", config.out, remote=True)
    if not config.model:
        raise UserError("model is empty; give a model folder, e.g. model=runs/vae/model")
    empty, files = _is_empty(out), storage.names(out)  # in this order: another driver may be writing its plan now
    if "plan.json" not in files and not empty:
        raise UserError(f"out={config.out} holds other files and no latent cache; give a new or empty folder")
    before = CachePlan.read(out) if "plan.json" in files else None
    sources, identity, new = inputs_of(config, out, before, finished="manifest.json" in files)
    plan = make_plan(config, sources[0], identity, before)
    if before:
        plan.write(out)  # refuses what differs
        if new is not None:
            cache.write_listing(out, len(sources) + 1, new)
            # what is there counts: another driver may have listed more, or less
            sources = [restore(listing, sources[0].uri) for listing in cache.read_listings(out)]
    partition = Partition(sources, plan.rows_per_shard)
    if "manifest.json" in files and cache.read_manifest(out)["source"]["shards"] == len(partition):
        return CacheJob(out, plan, partition, None)
    placement = cluster.start(config.ray)
    paths.check_folders({"out": out}, {"source.uri": sources[0].uri, "model": config.model})
    if not before:
        plan = auto.settle(plan, config, placement, partition.units)
        plan.write(out)
    if not storage.names(storage.join(out, "listing")):
        cache.write_listing(out, 1, sources[0].listing)
    return CacheJob(out, plan, partition, placement)


def _is_empty(out: str) -> bool:
    if storage.remote(out) or not storage.folder_exists(out):
        return not storage.folder_exists(out)
    return all(name.startswith(".tmp-") for name in os.listdir(out))  # left over where a driver was killed


# --- running ------------------------------------------------------------------------------------------------


def encode_and_track(
    config: Encode | Mend, settings: dict[str, Any], job: CacheJob, todo: Sequence[Task]
) -> dict[str, Any]:
    """Encode shards and write the manifest, as an MLflow run."""
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
        if storage.remote(out):
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
    """Write the manifest of a cache whose shards are all there, and say who made it."""
    about = {
        "job": job,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": mlflow_run.redact(settings),
        "versions": host.versions(LIBRARIES),
        "devices": list(devices),
        "tracking": {"experiment": handle.experiment, "run_id": handle.run_id},
    }
    return cache.write_manifest(out, plan.to_json(), source_of(partition), about)


def tracking_folder(out: str, root: str) -> str:
    """Where a cache's metrics are kept: within it, or for one on S3 below the root."""
    return os.path.join(os.path.abspath(root), os.path.basename(out)) if storage.remote(out) else out


def _encode(job: CacheJob, todo: Sequence[Task]) -> dict[str, Any]:
    """Encode these shards; the others have commits that stay."""
    import ray.data

    assert job.placement is not None
    out, placement, partition = job.out, job.placement, job.partition
    budget = job.plan.settings.error_budget
    slots = {"decode": placement.decoders, "encode": placement.workers}
    totals = EncodeTotals(partition.units, {stage: min(count, max(1, len(todo))) for stage, count in slots.items()})
    numbers = {task.shard for task in todo}
    kept = {shard: generation for shard, generation in cache.committed(out).items() if shard not in numbers}
    for commit in cache.read_commits(out, kept):
        totals.add_earlier(commit)
    check_budget(totals.reasons, budget, out, totals.images)
    if kept and todo:
        say(f"{len(todo):,} of {len(partition):,} shards to do")
    progress = Progress("encode", totals.images, totals.done, sys.stderr.isatty())
    exported = prometheus.Encoding(os.path.basename(out))
    totals.started = time.monotonic()
    rows: Any = None
    try:
        wave = WAVE * placement.workers
        for begin in range(0, len(todo), wave):
            shards = [partition.shard(task) for task in todo[begin : begin + wave]]
            rows = _pipeline(job.plan, shards, out, placement).iter_rows()
            for row in rows:
                if row["error"]:
                    raise UserError(
                        f"encoding stopped, {totals.done:,} of {totals.images:,} images are done: {row['error']}"
                    )
                encoded, reasons = totals.add(row)
                busy = totals.busy()
                exported.show(encoded, reasons, busy)
                check_budget(totals.reasons, budget, out, totals.images)
                percent = {f"{stage}_%": 100 * share for stage, share in busy.items()}
                progress.update(totals.done, quarantined=totals.reasons.total(), **percent)
    except ray.exceptions.RayError as error:
        if isinstance(error, ray.exceptions.RayTaskError):
            raise  # an exception in our own code, with its traceback
        cause = str(error).strip().splitlines()[-1]
        raise UserError(
            f"encoding stopped, {totals.done:,} of {totals.images:,} images are done; run again to go on: {cause}"
        ) from error
    finally:
        progress.close()
        rows = None
        gc.collect()  # or the actors of an execution that was broken off keep their GPUs
    return totals.summary()


def _pipeline(plan: CachePlan, shards: Sequence[Shard], out: str, placement: Placement) -> Any:
    """The Ray dataset whose rows are shards that were just committed."""
    import ray.data
    from ray.data import ActorPoolStrategy, TaskPoolStrategy
    from ray.util.annotations import RayDeprecationWarning

    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # retries have no other way in
        pixels = rows.map(
            decode_shard,
            fn_kwargs={"views": plan.views},
            compute=TaskPoolStrategy(size=min(placement.decoders, len(shards))),
            max_retries=RETRIES,
            **placement.decode_options(),
        )
        return pixels.map(
            Encoder,
            fn_constructor_kwargs={"out": out, "plan": plan, "gpu": placement.gpu, "threads": placement.threads},
            compute=ActorPoolStrategy(
                size=min(placement.workers, len(shards)),
                max_tasks_in_flight_per_actor=3,
                max_concurrent_calls_per_actor=2,  # one shard is written while the next is encoded
                enable_true_multi_threading=True,
            ),
            max_task_retries=RETRIES,
            # Other CPUs than decoding's: operators of equal resources are fused into one, here the actor.
            **placement.ray_options() | {"num_cpus": 0.9},
        )


def _summary(out: str, manifest: dict[str, Any], root: str) -> dict[str, Any]:
    counts = manifest["counts"]
    stored = sum(shard.get("bytes", 0) for shard in manifest["shards"])
    return {
        "images": counts["encoded"],
        "rows": counts["rows"],
        "quarantined": counts["quarantined"],
        "reasons": counts["reasons"],
        "encoded_now": 0,
        "seconds": 0.0,
        "images_per_s": 0.0,
        "steady_images_per_s": 0.0,
        "bits_per_pixel": round(8 * stored / (counts["rows"] * manifest["transform"]["resolution"] ** 2), 4),
        "shape": manifest["latents"]["shape"],
        "latents": manifest["latents"],
        "digest": manifest["digest"],
        "number": manifest["number"],
        "manifest": storage.join(out, "manifest.json"),
        "link": os.path.join(tracking_folder(out, root), "metrics.jsonl"),
    }


def print_summary(done: dict[str, Any]) -> dict[str, Any]:
    reasons = f"  ({listed_reasons(done['reasons'])})" if done["reasons"] else ""
    latents = done["latents"]
    shape = " x ".join(map(str, done["shape"])) if done["shape"] else f"{len(latents['shapes'])} shapes of"
    rows = {"images encoded": f"{done['images']:,}  ({done['encoded_now']:,} in this run)"}
    if "recovered" in done:
        rows["out of quarantine"] = f"{done['recovered']:,}"
    rows["quarantined"] = f"{done['quarantined']:,}{reasons}"
    if done["encoded_now"]:
        busy = f"decoding busy {done['decode_busy']:.0%}, encoding {done['encode_busy']:.0%}"
        rows["images/s"] = f"{done['images_per_s']:.1f}, once started {done['steady_images_per_s']:.1f}  ({busy})"
    rows["latents"] = f"{shape} {latents['content']}, {latents['dtype']}, {done['bits_per_pixel']:.2f} bits per pixel"
    rows["manifest"] = f"{done['manifest']}, version {done['number']}"
    rows["run"] = done["link"]
    say("\n" + "\n".join(f"{name:<22}{text}" for name, text in rows.items()), **done)
    return done
