"""Images into a latent cache, on Ray Data: one row is one planned shard.

    shard -> decode (CPU tasks) -> uint8 pixels -> encode and commit (one actor a GPU, or a CPU worker)

Ray gives streaming, back-pressure and restarts. That every image is in the cache or in its quarantine exactly once is
the work of the plan and the commits (litevae/cache.py), which also make a killed or doubled run harmless. Repairing a
shard and retrying its quarantine are the same work on some shards, committed as their next generation.
"""

import gc
import hashlib
import json
import os
import platform
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from litevae import cache, storage
from litevae.autoencoder import (
    downsampling,
    encode_latents,
    fingerprint,
    latent_content,
    load_autoencoder,
    model_config,
)
from litevae.errors import UserError
from litevae.images import ImageTransform, to_tensor
from litevae.inference import best_kernels, prepared
from litevae.native import NoKernels
from litevae.precision import autocast
from pipelines.data.decode import Lost, Shard, Task, decode_shard, quarantined, transform_of, unpack, views_of
from pipelines.data.source import Source
from pipelines.data.sources import compare, open_source, restore
from pipelines.encoding.config import Encode, Mend, Repair, Retry
from pipelines.runtime import cluster, mlflow_run, prometheus, tables
from pipelines.runtime.logs import say
from pipelines.runtime.progress import Progress

RETRIES = 3  # of a shard whose process died; Ray Data's default is endless, also for one that always kills it
WAVE = 2000  # shards a worker that Ray Data is given at a time: what the driver holds does not grow with the data
AUTO_BATCH = {"cpu": 32, "cuda": 256}  # where batch_size=auto begins; beyond these nothing is gained
WORTH_COMPILING = 200_000  # images: on an H200 compiling took 50 s, and saved LiteVAE-B 0.8 ms an image
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


# --- jobs -------------------------------------------------------------------------------------------------------


def run(config: Encode) -> dict[str, Any]:
    """`encode_dataset`, then a table for people."""
    return _report(encode_dataset(config))


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
    return _tracked(config, config.model_dump(mode="json"), plan, planned, todo, out, share)


def plan_cache(config: Encode) -> "tuple[str, dict[str, Any], Planned, cluster.Share | None]":
    """Begin a cache, or go on with one: its folder, with plan and listing; and what Ray gives, unless it is finished.

    Raises:
        UserError: as `encode_dataset`.
    """
    out = cluster.output_path("out", config.out, remote=True)
    if not config.model:
        raise UserError("model is empty; give a model folder, e.g. model=runs/vae/model")
    empty, files = _empty(out), storage.names(out)  # in this order: another driver may be writing its plan now
    if "plan.json" not in files and not empty:
        raise UserError(f"out={config.out} holds other files and no latent cache; give a new or empty folder")
    before = cache.read_plan(out) if "plan.json" in files else None
    sources, identity, new = _inputs(config, out, before, finished="manifest.json" in files)
    plan = _plan(config, sources[0], identity, before)
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
            plan["precision"] = _fastest_precision(share)
        if config.kernels == "auto" and not config.compile:
            plan["kernels"] = "torch" if share.gpu else best_kernels("cpu", plan["precision"])
            if share.gpu and planned.units >= WORTH_COMPILING:
                say("encode: compile=true starts a minute later, and then may encode twice as many images a second")
            if not share.gpu and plan["precision"] == "fp32" and plan["kernels"] == "torch":
                say("encode: no C++ compiler here, so by PyTorch's kernels; g++ makes it two to three times as fast")
        if config.batch_size == "auto":
            plan["settings"]["batch_size"] = _largest_batch(plan, share)
        cache.write_plan(out, plan)
    if not storage.names(storage.join(out, "listing")):
        cache.write_listing(out, 1, sources[0].listing)
    return out, plan, planned, share


def _inputs(
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


def _empty(out: str) -> bool:
    if storage.remote(out) or not storage.folder_exists(out):
        return not storage.folder_exists(out)
    return all(name.startswith(".tmp-") for name in os.listdir(out))  # left over where a driver was killed


def _where(config: Encode) -> dict[str, Any]:
    return config.source.model_dump(mode="json") | {"uri": storage.absolute(config.source.uri)}


def repair(config: Repair) -> dict[str, Any]:
    """Encode the shards that the audit finds missing or damaged again, and remove files that belong to none.

    Raises:
        UserError: the plan or the listing is damaged; the model or source is not the cache's.
    """
    from pipelines.encoding.verify import audit

    out, plan, sources = _open(config)
    planned = Planned(sources, plan["rows_per_shard"])
    found = audit(out, source=False)
    for number, problems in found.problems.items():
        say(f"shard {number}: {problems[0]}", "WARNING", shard=number)
    if not found.problems and not found.general:
        say(f"{out}: nothing to repair")
    todo = [Task(number, found.generations.get(number, -1) + 1) for number in found.problems]
    share = cluster.start(config.ray)
    done = _tracked(config, plan["settings"] | config.model_dump(mode="json"), plan, planned, todo, out, share)
    # One that is new belongs to a driver that is about to commit it.
    unnamed = sorted(set(found.unnamed) & set(audit(out, source=False).unnamed))
    for file in unnamed:
        storage.remove(storage.join(out, file))
    if unnamed:
        say(f"removed {len(unnamed)} files of attempts that were not committed")
    return _report(done)


def retry(config: Retry) -> dict[str, Any]:
    """Try quarantined images again; those that are encoded now take their places in their shards.

    Raises:
        UserError: the cache is unfinished or damaged; no image was quarantined for one of these reasons.
    """
    out, plan, sources = _open(config)
    manifest = cache.read_manifest(out)
    known = manifest["counts"]["reasons"]
    if unknown := sorted(set(config.reasons) - known.keys()):
        raise UserError(
            f"reasons: nothing is quarantined as {unknown[0]}; there is {_listed(known) or 'nothing at all'}"
        )
    committed, todo = cache.committed(out), []
    for commit in cache.read_commits(out, committed):
        lost = cache.read_quarantine(out, commit).to_pylist()
        if wanted := [row["unit"] for row in lost if not config.reasons or row["error"] in config.reasons]:
            todo.append(Task(commit["shard"], committed[commit["shard"]] + 1, tuple(wanted)))
    planned = Planned(sources, plan["rows_per_shard"])
    share = cluster.start(config.ray)
    settings = plan["settings"] | config.model_dump(mode="json")
    done = _tracked(config, settings, plan, planned, todo, out, share)
    recovered = done["images"] - manifest["counts"]["encoded"]
    return _report(done | {"encoded_now": recovered, "recovered": recovered})


def _open(config: Mend) -> tuple[str, dict[str, Any], list[Source]]:
    """A cache's folder, plan and sources, both where they are now."""
    if not config.cache:
        raise UserError("give a cache folder")
    out = cluster.output_path("cache", config.cache, remote=True)
    if "plan.json" not in storage.names(out):
        raise UserError(f"{out} is not a latent cache: it has no plan.json")
    plan, sources = cache.read_plan(out), open_listings(out, config.source)
    if not sources:
        raise UserError(f"{out} has no listing of its source; run the encode job with the same settings again")
    if config.model:
        plan["model"]["path"] = os.path.abspath(config.model)
    if fingerprint(plan["model"]["path"]) != plan["model"]["fingerprint"]:
        raise UserError(f"{plan['model']['path']} is not the model that encoded {out}; give that one with model=FOLDER")
    return out, plan, sources


def open_listings(out: str, uri: str = "") -> list[Source]:
    """What a cache is of, from its own listings.

    Args:
        uri: where the source is now, if it was moved.
    """
    return [restore(listing, uri) for listing in cache.read_listings(out)]


# --- the plan -----------------------------------------------------------------------------------------------


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


def _plan(config: Encode, source: Source, identity: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
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


# --- running ------------------------------------------------------------------------------------------------


def _tracked(
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
    status: mlflow_run.Status = "FAILED"
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
    handle: mlflow_run.RunHandle,
    devices: Sequence[str],
) -> dict[str, Any]:
    """Write the manifest of a cache whose shards are all there, and say who made it."""
    about = {
        "job": job,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": mlflow_run.redact(settings),
        "versions": _versions(),
        "devices": list(devices),
        "tracking": {"experiment": handle.experiment, "run_id": handle.run_id},
    }
    return cache.write_manifest(out, plan, _source(planned), about)


def tracking_folder(out: str, root: str) -> str:
    """Where a cache's metrics are kept: within it, or for one on S3 below the root."""
    return os.path.join(os.path.abspath(root), os.path.basename(out)) if storage.remote(out) else out


def _source(planned: Planned) -> dict[str, Any]:
    """All that was listed, as the manifest has it."""
    sources = planned.sources
    digests = [source.digest for source in sources]
    joined = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
    listed = [{"uri": source.uri, "digest": source.digest, "units": source.units} for source in sources]
    total = {"digest": joined, "units": planned.units, "shards": len(planned), "listings": listed}
    return sources[0].identity | total


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
        _add(reasons, commit.get("reasons", {}))
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
                _add(reasons, commit.get("reasons", {}))
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


# --- encoding -------------------------------------------------------------------------------------------------


class Encoder:
    """An actor with the model on its device: pixels of a shard -> latents -> commit. Two threads take turns."""

    def __init__(self, out: str, plan: dict[str, Any], gpu: bool, threads: int):
        self.out, self.plan, self.how = out, plan, plan["latents"]
        self.batch_size: int = plan["settings"]["batch_size"]
        self.device = torch.device("cuda" if gpu else "cpu")
        self.native = plan.get("kernels") == "native"
        self.name = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
        self._model: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._threads, self._turn = threads, threading.Lock()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        error, commit, seconds = row["error"], {}, 0.0
        if not error:
            try:
                with self._turn:
                    torch.set_num_threads(self._threads)  # OpenMP's is each thread's own
                    start = time.perf_counter()
                    encoded = list(self._latents(row["pixels"], row["sizes"]))
                    seconds = time.perf_counter() - start
                commit = self._commit(row, encoded)
            except UserError as problem:
                error = str(problem)
        return {
            "error": error,
            "commit": json.dumps(commit),
            "device": self.name,
            "decode_seconds": row["decode_seconds"],
            "encode_seconds": seconds,
            "finished": time.time(),  # rows reach the driver later
        }

    def _commit(self, row: dict[str, Any], encoded: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
        """Drop what can't be stored, add the rows that a retry keeps, and commit."""
        shard: Shard = row["shard"]
        rows, quarantine = unpack(row["rows"]), unpack(row["quarantine"])
        parts: list[tuple[pa.Table, np.ndarray]] = []
        lost: list[dict[str, Any]] = []
        for places, values in encoded:
            part = rows.take(pa.array(places))
            units = part["unit"].to_numpy()
            bad = {
                int(unit): problem
                for unit, problem in zip(units, cache.unusable(values, self.how["dtype"]), strict=True)
                if problem
            }
            names = dict(zip(units.tolist(), part["id"].to_pylist(), strict=True))
            for unit, problem in bad.items():
                message = f"the model's latents are {problem} for {self.how['dtype']}"
                lost.append(quarantined(shard, unit, names[unit], Lost("encode", problem, message)))
            good = ~np.isin(units, list(bad))
            parts.append((part.filter(pa.array(good)), cache.to_stored(values[good], self.how["dtype"])))
        quarantine = pa.concat_tables([quarantine, pa.Table.from_pylist(lost, schema=cache.QUARANTINE)])
        task = shard.task
        if task.only:
            before = cache.read_commit(self.out, task.shard, task.generation - 1)
            old = cache.read_quarantine(self.out, before)
            tried = pa.array(task.only, pa.int64())
            others = old.filter(pa.compute.invert(pa.compute.is_in(old["unit"], value_set=tried)))
            quarantine = pa.concat_tables([others, quarantine]).sort_by("unit")
            if _reasons(quarantine).equals(_reasons(old.sort_by("unit"))):
                return before  # nothing has changed
            if before["rows"]:
                stored, latents = cache.read_shard(self.out, before, self.how)
                parts += [(stored.slice(start, len(values)), values) for start, values in _with_starts(latents)]
        table, latents = _merged(parts, cache.row_schema(shard.source.schema))
        about = {"batch_size": self.batch_size} if self.batch_size < self.plan["settings"]["batch_size"] else {}
        size = (shard.first, shard.first + shard.source.units)
        return cache.commit_shard(
            self.out,
            task.shard,
            size,
            self.how,
            table,
            latents,
            quarantine.sort_by("unit"),
            task.generation,
            device=self.name,
            **about,
        )

    def _latents(self, pixels: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of each size of image: which rows have it, and their fp32 latents (n, C, h, w)."""
        counts = sizes.astype(np.int64).prod(axis=1) * 3
        starts = np.cumsum(counts) - counts
        for height, width in np.unique(sizes, axis=0).tolist():
            places = np.flatnonzero((sizes == (height, width)).all(axis=1))
            images = [pixels[starts[place] :][: counts[place]].reshape(height, width, 3) for place in places]
            yield places, self.encode(images)

    def close(self) -> None:
        """Give the model's memory back; it is loaded again when it is needed."""
        self._model = None

    def encode(self, images: list[np.ndarray]) -> np.ndarray:
        """uint8 (H, W, 3) images of one size -> fp32 (n, C, h, w).

        Every forward pass has the full batch size, the last one padded: it decides on kernels and so on a result's last
        bits (but not with the native ones). Where a GPU's memory is too small for it, it is halved from there on. A GPU
        computes while the next batch is made ready and brought to it.
        """
        parts: list[np.ndarray] = []
        computing: tuple[torch.Tensor, int] | None = None
        done = 0
        while done < len(images):
            part = images[done : done + self.batch_size]
            batch = np.zeros((len(part) if self.native else self.batch_size, *part[0].shape), dtype=np.uint8)
            np.stack(part, out=batch[: len(part)])
            try:
                launched = self._forward(batch), len(part)
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise UserError(f"not even one image of this size fits into the memory of {self.name}") from None
                self.batch_size //= 2
                say(f"encode: the memory of {self.name} is too small; batch_size={self.batch_size}", "WARNING")
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            if computing is not None:
                parts.append(_fetched(*computing))
            computing = launched
            done += len(part)
        if computing is not None:
            parts.append(_fetched(*computing))
        return np.concatenate(parts)

    @torch.inference_mode()
    def _forward(self, batch: np.ndarray) -> torch.Tensor:
        """uint8 (N, H, W, 3) -> fp32 (N, C, h, w) on the device, of which only the mean where only that is stored."""
        if self._model is None:
            self._model = _load(self.plan, self.device)
        pixels = torch.from_numpy(batch)
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()  # or the copy would wait for the batch before
        with exact(), autocast(self.device, self.plan["precision"]):
            latents = self._model(to_tensor(pixels.to(self.device, non_blocking=True)))
        return latents.float().contiguous()


def _fetched(latents: torch.Tensor, count: int) -> np.ndarray:
    """The first `count`, once they are computed."""
    return latents[:count].cpu().numpy()


def exact() -> AbstractContextManager[None]:
    """On a GPU, fp32 is fp32, and the same pixels give the same latents."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


def _load(plan: dict[str, Any], device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """The plan's model as a function of images.

    Raises:
        UserError: the folder is not there, or holds another model than the job was started with; the plan's kernels
            can't be had on this node.
    """
    folder = plan["model"]["path"]
    if fingerprint(folder) != plan["model"]["fingerprint"]:
        raise UserError(f"{folder} on {platform.node()} is not the model that the job was started with")
    model = load_autoencoder(folder).to(device)
    if "kernels" in plan:
        try:
            prepared(model, device, plan["kernels"], plan["compile"])
        except NoKernels as error:
            raise UserError(f"kernels=native, but on {platform.node()} {error}; or encode with kernels=torch") from None
    halve = latent_content(model) == "moments" and plan["latents"]["content"] == "mean"

    def latents(x: torch.Tensor) -> torch.Tensor:
        found = encode_latents(model, x)
        return found.chunk(2, dim=1)[0] if halve else found

    return torch.compile(latents) if plan["compile"] else latents


def _merged(parts: list[tuple[pa.Table, np.ndarray]], schema: pa.Schema) -> tuple[pa.Table, list[np.ndarray]]:
    """Rows and latents, a block of equal shape after the other, each in the order of units and views."""
    shapes = sorted({values.shape[1:] for _, values in parts if len(values)})
    parts, latents = [schema.empty_table()], []
    for shape in shapes:
        same = [(table, values) for table, values in parts if values.shape[1:] == shape]
        table, values = pa.concat_tables([table for table, _ in same]), np.concatenate([values for _, values in same])
        order = np.lexsort((table["view"].to_numpy(), table["unit"].to_numpy()))
        parts.append(table.take(pa.array(order)))
        latents.append(values[order])
    return pa.concat_tables(parts), latents


def _reasons(quarantine: pa.Table) -> pa.Table:
    return quarantine.drop_columns(["source"])  # which may have moved


def _with_starts(latents: list[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    start = 0
    for values in latents:
        yield start, values
        start += len(values)


# --- what "auto" means ------------------------------------------------------------------------------------------


def _fastest_precision(share: cluster.Share) -> str:
    import ray

    def probe(device: str) -> str:
        with autocast(device, "auto"):
            return "bf16" if torch.is_autocast_enabled(device) else "fp32"

    return ray.get(ray.remote(num_gpus=1, num_cpus=0)(probe).remote("cuda")) if share.gpu else probe("cpu")


def _largest_batch(plan: dict[str, Any], share: cluster.Share) -> int:
    """The batch size that fits, found where the encoders will run; on CPUs 32."""
    import ray

    if not share.gpu:
        return AUTO_BATCH["cpu"]
    largest = max(transform_of(views_of(plan)).sizes, key=lambda size: size[0] * size[1])
    settings = plan["settings"] | {"batch_size": AUTO_BATCH["cuda"]}

    def probe() -> int:
        encoder = Encoder("", plan | {"settings": settings}, True, 1)
        encoder.encode([np.zeros((*largest, 3), dtype=np.uint8)])
        return encoder.batch_size

    return ray.get(ray.remote(num_gpus=share.resources["GPU"], num_cpus=0)(probe).remote())


# --- budget and summary -----------------------------------------------------------------------------------------


def check_budget(reasons: dict[str, int], budget: float, out: str, total: int, name: str = "error_budget") -> None:
    """
    Raises:
        UserError: more images are in quarantine than the budget, a field of this name, allows.
    """
    quarantined = sum(reasons.values())
    if quarantined > budget * total:
        raise UserError(
            f"{quarantined} of {total} images could not be encoded ({_listed(reasons)}), more than {name}="
            f"{budget:g} allows; they are listed in {out}/quarantine. Mend them, or raise the budget and "
            f"run again: it goes on"
        )


def _listed(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))


def _add(total: dict[str, int], more: dict[str, int]) -> None:
    for key, count in more.items():
        total[key] = total.get(key, 0) + count


def _versions() -> dict[str, str]:
    """Of those that are installed: this project may be a working directory and no more."""
    found = {"python": platform.python_version()}
    for name in ("litevae", "torch", "diffusers", "pillow", "simplejpeg", "pyarrow", "numpy", "ray"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


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


def _report(done: dict[str, Any]) -> dict[str, Any]:
    reasons = f"  ({_listed(done['reasons'])})" if done["reasons"] else ""
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
