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
from datetime import UTC, datetime
from typing import Any

from litevae import cache, storage
from litevae.errors import UserError
from litevae.inference import best_kernels
from pipelines.data.decode import Shard, Task, decode_shard, views_of
from pipelines.data.sources import restore
from pipelines.encoding import auto
from pipelines.encoding.config import Encode, Mend
from pipelines.encoding.encoder import Encoder
from pipelines.encoding.plan import Planned, inputs_of, is_empty, library_versions, make_plan, source_of
from pipelines.encoding.totals import add_reasons, check_budget, listed_reasons
from pipelines.runtime import cluster, mlflow_run, mlflow_server, prometheus, tables
from pipelines.runtime.logs import say
from pipelines.runtime.progress import Progress

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
    out, plan, planned, share = plan_cache(config)
    if share is None:
        return _summary(out, cache.read_manifest(out), config.root)
    committed = cache.committed(out)
    todo = [Task(number) for number in range(len(planned)) if number not in committed]
    return run_tracked(config, config.model_dump(mode="json"), plan, planned, todo, out, share)


def plan_cache(config: Encode) -> "tuple[str, dict[str, Any], Planned, cluster.Share | None]":
    """Begin a cache, or go on with one: its folder, with plan and listing; and what Ray gives, unless it is finished.

    Raises:
        UserError: as `encode_dataset`.
    """
    out = cluster.output_path("out", config.out, remote=True)
    if not config.model:
        raise UserError("model is empty; give a model folder, e.g. model=runs/vae/model")
    empty, files = is_empty(out), storage.names(out)  # in this order: another driver may be writing its plan now
    if "plan.json" not in files and not empty:
        raise UserError(f"out={config.out} holds other files and no latent cache; give a new or empty folder")
    before = cache.read_plan(out) if "plan.json" in files else None
    sources, identity, new = inputs_of(config, out, before, finished="manifest.json" in files)
    plan = make_plan(config, sources[0], identity, before)
    if before:
        cache.write_plan(out, plan)  # refuses what differs
        if new is not None:
            cache.write_listing(out, len(sources) + 1, new)
            # what is there counts: another driver may have listed more, or less
            sources = [restore(listing, sources[0].uri) for listing in cache.read_listings(out)]
    planned = Planned(sources, plan["rows_per_shard"])
    if "manifest.json" in files and cache.read_manifest(out)["source"]["shards"] == len(planned):
        return out, plan, planned, None
    share = cluster.start(config.ray)
    cluster.check_folders({"out": out}, {"source.uri": sources[0].uri, "model": config.model})
    if not before:
        if config.precision == "auto":
            plan["precision"] = auto.fastest_precision(share)
        if config.kernels == "auto" and not config.compile:
            plan["kernels"] = "torch" if share.gpu else best_kernels("cpu", plan["precision"])
            if share.gpu and planned.units >= auto.WORTH_COMPILING:
                say("encode: compile=true starts a minute later, and then may encode twice as many images a second")
            if not share.gpu and plan["precision"] == "fp32" and plan["kernels"] == "torch":
                say("encode: no C++ compiler here, so by PyTorch's kernels; g++ makes it two to three times as fast")
        if config.batch_size == "auto":
            plan["settings"]["batch_size"] = auto.largest_batch(plan, share)
        cache.write_plan(out, plan)
    if not storage.names(storage.join(out, "listing")):
        cache.write_listing(out, 1, sources[0].listing)
    return out, plan, planned, share


# --- running ------------------------------------------------------------------------------------------------


def run_tracked(
    config: Encode | Mend,
    settings: dict[str, Any],
    plan: dict[str, Any],
    planned: Planned,
    todo: Sequence[Task],
    out: str,
    share: cluster.Share,
) -> dict[str, Any]:
    """Encode shards and write the manifest, as an MLflow run."""
    folder = tracking_folder(out, config.root)
    handle = mlflow_run.start_run(
        config.tracking, config.root, "encode_dataset", os.path.basename(out), settings, folder
    )
    tracker = mlflow_run.Tracker(handle)
    say(f"cache: {out}\nMLflow: {mlflow_run.link(handle)}", cache=out, run=mlflow_run.link(handle))
    status: mlflow_server.Status = "FAILED"
    try:
        result = _encode(plan, planned, todo, out, share)
        manifest = finish(out, plan, planned, "encode_dataset", settings, handle, result.pop("devices"))
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
            tables.write(copy, json.dumps(manifest, indent=1).encode())
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
    plan: dict[str, Any],
    planned: "Planned",
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
        "versions": library_versions(),
        "devices": list(devices),
        "tracking": {"experiment": handle.experiment, "run_id": handle.run_id},
    }
    return cache.write_manifest(out, plan, source_of(planned), about)


def tracking_folder(out: str, root: str) -> str:
    """Where a cache's metrics are kept: within it, or for one on S3 below the root."""
    return os.path.join(os.path.abspath(root), os.path.basename(out)) if storage.remote(out) else out


def _encode(
    plan: dict[str, Any],
    planned: Planned,
    todo: Sequence[Task],
    out: str,
    share: cluster.Share,
) -> dict[str, Any]:
    """Encode these shards; the others have commits that stay."""
    import ray.data

    total, budget = planned.units, plan["settings"]["error_budget"]
    numbers = {task.shard for task in todo}
    kept = {shard: generation for shard, generation in cache.committed(out).items() if shard not in numbers}
    reasons: dict[str, int] = {}
    done = 0
    for commit in cache.read_commits(out, kept):
        add_reasons(reasons, commit.get("reasons", {}))
        done += commit["units"][1] - commit["units"][0]
    check_budget(reasons, budget, out, total)
    if kept and todo:
        say(f"{len(todo):,} of {len(planned):,} shards to do")
    encoded, devices, busy = 0, set(), {"decode": 0.0, "encode": 0.0}
    finished: list[tuple[float, int]] = []
    slots = {"decode": share.decoders, "encode": share.workers}
    slots = {stage: min(count, max(1, len(todo))) for stage, count in slots.items()}
    progress = Progress("encode", total, done, sys.stderr.isatty())
    shown = prometheus.Encoding(os.path.basename(out))
    start = time.monotonic()
    rows: Any = None
    try:
        wave = WAVE * share.workers
        for begin in range(0, len(todo), wave):
            shards = [planned.shard(task) for task in todo[begin : begin + wave]]
            rows = _pipeline(plan, shards, out, share).iter_rows()
            for row in rows:
                if row["error"]:
                    raise UserError(f"encoding stopped, {done:,} of {total:,} images are done: {row['error']}")
                commit = json.loads(row["commit"])
                add_reasons(reasons, commit.get("reasons", {}))
                count = commit["units"][1] - commit["units"][0]
                encoded, done = encoded + count - commit["quarantined"], done + count
                devices.add(row["device"])
                finished.append((row["finished"], count - commit["quarantined"]))
                now = time.monotonic()
                for stage in busy:
                    busy[stage] += row[f"{stage}_seconds"]
                shares = {stage: busy[stage] / slots[stage] / (now - start) for stage in busy}
                shown.show(count - commit["quarantined"], commit.get("reasons", {}), shares)
                check_budget(reasons, budget, out, total)
                percent = {f"{stage}_%": 100 * share for stage, share in shares.items()}
                progress.update(done, quarantined=sum(reasons.values()), **percent)
    except ray.exceptions.RayError as error:
        if isinstance(error, ray.exceptions.RayTaskError):
            raise  # an exception in our own code, with its traceback
        cause = str(error).strip().splitlines()[-1]
        raise UserError(
            f"encoding stopped, {done:,} of {total:,} images are done; run again to go on: {cause}"
        ) from error
    finally:
        progress.close()
        rows = None
        gc.collect()  # or the actors of an execution that was broken off keep their GPUs
    seconds = time.monotonic() - start
    # Without the start of the actors: from the first shard that was finished to the last.
    finished.sort()
    steady = sum(images for _, images in finished[1:]) / (finished[-1][0] - finished[0][0]) if finished[1:] else 0.0
    return {
        "encoded_now": encoded,
        "seconds": round(seconds, 3),
        "images_per_s": round(encoded / seconds, 3),
        "steady_images_per_s": round(steady, 3),
        **{f"{stage}_busy": round(busy[stage] / slots[stage] / seconds, 3) for stage in busy},
        "devices": sorted(devices),
    }


def _pipeline(plan: dict[str, Any], shards: Sequence[Shard], out: str, share: cluster.Share) -> Any:
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
            fn_kwargs={"views": views_of(plan)},
            compute=TaskPoolStrategy(size=min(share.decoders, len(shards))),
            num_cpus=1,
            max_retries=RETRIES,
            **cluster.on(share.decode_labels),
        )
        return pixels.map(
            Encoder,
            fn_constructor_kwargs={"out": out, "plan": plan, "gpu": share.gpu, "threads": share.threads},
            compute=ActorPoolStrategy(
                size=min(share.workers, len(shards)),
                max_tasks_in_flight_per_actor=3,
                max_concurrent_calls_per_actor=2,  # one shard is written while the next is encoded
                enable_true_multi_threading=True,
            ),
            num_cpus=0.9,  # other than decoding's: operators of equal resources are fused into one, here the actor
            num_gpus=share.resources.get("GPU", 0),
            max_task_retries=RETRIES,
            **cluster.on(share.labels),
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
