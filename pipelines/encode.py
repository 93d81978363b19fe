"""Images into a latent cache, on Ray Data: one row is one planned shard.

    shard number -> decode (CPU tasks) -> uint8 pixels -> encode and commit (one actor a GPU, or a CPU worker)

Ray gives streaming, back-pressure and restarts. That every image is in the cache or in its quarantine exactly once is
the work of the plan and the commits (litevae/cache.py), which also make a killed or doubled run harmless.
"""

import gc
import os
import platform
import sys
import time
import warnings
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from litevae import cache, storage
from litevae.autoencoder import fingerprint, load_autoencoder, model_config
from litevae.errors import UserError
from litevae.images import ImageError, ImageTransform, to_tensor
from litevae.precision import autocast
from pipelines import cluster, tracking
from pipelines.config import Encode
from pipelines.sources import Source, open_source
from pipelines.training import Progress

RETRIES = 3  # of a shard whose process died; Ray Data's default is endless, also for one that always kills it


def run(config: Encode) -> dict[str, Any]:
    """`encode_dataset`, then a table for people."""
    done = encode_dataset(config)
    print(f"\n{'images encoded':<22}{done['images']:,}  ({done['encoded_now']:,} in this run)")
    reasons = ", ".join(f"{count} {reason}" for reason, count in done["reasons"].items())
    print(f"{'quarantined':<22}{done['quarantined']:,}{'  (' + reasons + ')' if reasons else ''}")
    if done["encoded_now"]:
        print(f"{'images/s':<22}{done['images_per_s']:.1f}")
    shape = " x ".join(map(str, done["shape"]))
    print(f"{'latents':<22}{shape} moments, fp16, {done['bits_per_pixel']:.2f} bits per pixel")
    print(f"{'manifest':<22}{done['manifest']}\n{'run':<22}{done['link']}")
    return done


def encode_dataset(config: Encode) -> dict[str, Any]:
    """Encode a source, or what is left of it, and write the manifest.

    Raises:
        UserError: nothing to encode; `out` is a cache of something else; more images than the budget allows can't be
            read.
    """
    out = cluster.output_path("out", config.out)
    if not config.model:
        raise UserError("model is empty; give a model folder, e.g. model=runs/vae/model")
    source = open_source(config.source)
    if out == source.uri or out.startswith(source.uri + os.sep):
        raise UserError(f"out={config.out} lies within the source; give a folder outside {source.uri}")
    transform = ImageTransform(config.transform.resolution, config.transform.resize)
    plan = _plan(config, source, transform)
    present = storage.names(out)
    if present and "plan.json" not in present:
        raise UserError(f"out={config.out} holds other files and no latent cache; give a new or empty folder")
    if "plan.json" in present and config.precision == "auto":  # goes on in the precision it began in
        plan["precision"] = cache.read_plan(out)["precision"]
    if "manifest.json" in present:
        cache.write_plan(out, plan)
        return _summary(out, cache.read_manifest(out))

    share = cluster.start(config.ray)
    if plan["precision"] == "auto":
        plan["precision"] = _fastest_precision(share.gpu)
    cache.write_plan(out, plan)
    settings = config.model_dump(mode="json")
    handle = tracking.start_run(config.tracking, config.root, "encode_dataset", os.path.basename(out), settings, out)
    tracker = tracking.Tracker(handle)
    status: tracking.Status = "FAILED"
    try:
        result = _encode(config, plan, source, transform, out, share)
        about = {
            "job": "encode_dataset",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": tracking.redact(settings),
            "versions": _versions(),
            "devices": result.pop("devices"),
            "tracking": {"experiment": handle.experiment, "run_id": handle.run_id},
        }
        manifest = cache.write_manifest(out, plan, about)
        summary = _summary(out, manifest) | result | {"link": tracking.link(handle)}
        numbers = ("images", "quarantined", "images_per_s", "bits_per_pixel")
        tracker.metrics({f"encode/{key}": summary[key] for key in numbers}, step=summary["images"])
        tracker.dataset(os.path.basename(source.uri), source.digest, source.uri, "encoding")
        tracker.artifact(summary["manifest"])
        status = "FINISHED"
        return summary
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.close()
        tracking.finish(handle, status)


def _plan(config: Encode, source: Source, transform: ImageTransform) -> dict[str, Any]:
    """What the cache is of, and how it is cut: shard k holds units k * rows_per_shard and on."""
    settings = {
        key: value for key, value in model_config(config.model).items() if key == "_class_name" or key[0] != "_"
    }
    columns = {field.name: str(field.type) for field in cache.row_schema(source.schema)}
    return {
        "model": {"path": os.path.abspath(config.model), "fingerprint": fingerprint(config.model), "config": settings},
        "transform": transform.identity,
        "precision": config.precision,
        "source": {"uri": source.uri, "digest": source.digest, "units": source.units},
        "columns": columns,
        "rows_per_shard": config.rows_per_shard,
        "shards": -(-source.units // config.rows_per_shard),
    }


def _encode(
    config: Encode, plan: dict[str, Any], source: Source, transform: ImageTransform, out: str, share: cluster.Share
) -> dict[str, Any]:
    """Encode the shards that have no commit yet."""
    import ray.data

    total, size = source.units, config.rows_per_shard
    finished = cache.committed(out)
    encoded, devices = 0, set()
    reasons: dict[str, int] = {}
    for commit in (cache.read_commit(out, shard) for shard in finished):
        _add(reasons, commit.get("reasons", {}))
    _check_budget(reasons, config, out, total)
    left = sorted(set(range(plan["shards"])) - set(finished))
    done = total - sum(min(size, total - shard * size) for shard in left)
    if finished:
        print(f"going on: {len(finished):,} of {plan['shards']:,} shards are done", flush=True)
    progress = Progress("encode", total, done, sys.stderr.isatty())
    start = time.monotonic()
    try:
        results = _pipeline(config, plan, left, source, transform, out, share)
        for row in results.iter_rows() if left else ():
            if row["error"]:
                raise UserError(row["error"])
            commit = cache.read_commit(out, row["shard"])
            _add(reasons, commit.get("reasons", {}))
            encoded += commit["rows"]
            done += commit["rows"] + commit["quarantined"]
            devices.add(row["device"])
            _check_budget(reasons, config, out, total)
            progress.update(done, quarantined=sum(reasons.values()))
    except ray.exceptions.RayError as error:
        if isinstance(error, ray.exceptions.RayTaskError):
            raise  # an exception in our own code, with its traceback
        cause = str(error).strip().splitlines()[-1]
        raise UserError(
            f"encoding stopped, {done:,} of {total:,} images are done; run again to go on: {cause}"
        ) from error
    finally:
        progress.close()
        results = None
        gc.collect()  # or the actors of an execution that was broken off keep their GPUs
    seconds = time.monotonic() - start
    return {
        "encoded_now": encoded,
        "seconds": round(seconds, 3),
        "images_per_s": round(encoded / seconds, 3),
        "devices": sorted(devices),
    }


def _pipeline(
    config: Encode,
    plan: dict[str, Any],
    left: list[int],
    source: Source,
    transform: ImageTransform,
    out: str,
    share: cluster.Share,
) -> Any:
    """The Ray dataset whose rows are shards that were just committed."""
    import ray.data
    from ray.data import ActorPoolStrategy, TaskPoolStrategy
    from ray.util.annotations import RayDeprecationWarning

    ray.data.DataContext.get_current().enable_progress_bars = False
    shards = ray.data.from_items([{"shard": shard} for shard in left], override_num_blocks=max(1, len(left)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # retries have no other way in
        pixels = shards.map(
            decode_shard,
            fn_kwargs={"source": source, "transform": transform, "size": config.rows_per_shard},
            compute=TaskPoolStrategy(size=config.ray.decode_tasks),
            num_cpus=1,
            max_retries=RETRIES,
        )
        return pixels.map(
            Encoder,
            fn_constructor_kwargs={
                "out": out,
                "model": plan["model"],
                "source": source.uri,
                "batch_size": min(config.batch_size, config.rows_per_shard),
                "precision": plan["precision"],
                "gpu": share.gpu,
                "threads": share.threads,
            },
            compute=ActorPoolStrategy(size=min(share.workers, max(1, len(left))), max_tasks_in_flight_per_actor=2),
            num_cpus=0.9,  # other than decoding's: operators of equal resources are fused into one, here the actor
            num_gpus=1 if share.gpu else 0,
            max_task_retries=RETRIES,
        )


def decode_shard(row: dict[str, Any], source: Source, transform: ImageTransform, size: int) -> dict[str, Any]:
    """A shard's images as uint8 pixels (n, R, R, 3), the columns of their rows, and what could not be read.

    A UserError is returned, not raised: through Ray it would come out as pages of tracebacks.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what is wrong with an image goes into the quarantine
    units = range(row["shard"] * size, min((row["shard"] + 1) * size, source.units))
    pixels = np.empty((len(units), transform.resolution, transform.resolution, 3), dtype=np.uint8)
    rows: list[dict[str, Any]] = []
    lost: list[dict[str, str]] = []
    try:
        for unit in units:
            identity, stage = source.id(unit), "read"
            try:
                item = source.read(unit)
                stage = "decode"
                image = transform(item.data)
            except ImageError as error:
                lost.append(_quarantined(identity, source.uri, stage, error.reason, str(error)))
                continue
            pixels[len(rows)] = image.pixels
            own = {name: getattr(image, name) for name in ("height", "width", "crop_top", "crop_left", "flip")}
            rows.append({"id": identity, **own, **item.columns})
    except UserError as error:
        return {"shard": row["shard"], "error": str(error), "pixels": pixels[:0], "rows": b"", "quarantine": b""}
    return {
        "shard": row["shard"],
        "error": "",
        "pixels": pixels[: len(rows)],
        "rows": _pack(pa.Table.from_pylist(rows, schema=cache.row_schema(source.schema))),
        "quarantine": _pack(pa.Table.from_pylist(lost, schema=cache.QUARANTINE)),
    }


class Encoder:
    """An actor with the model on its device: pixels of a shard -> moments -> commit."""

    def __init__(
        self, out: str, model: dict[str, Any], source: str, batch_size: int, precision: str, gpu: bool, threads: int
    ):
        self.out, self.folder, self.fingerprint, self.source = out, model["path"], model["fingerprint"], source
        self.batch_size, self.precision = batch_size, precision
        self.device = torch.device("cuda" if gpu else "cpu")
        self.name = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
        self.model: Any = None
        torch.set_num_threads(threads)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        error = row["error"]
        if not error:
            try:
                self._commit(row)
            except UserError as problem:
                error = str(problem)
            except torch.OutOfMemoryError:
                error = f"batch_size={self.batch_size} does not fit into the memory of {self.name}; lower it"
        return {"shard": row["shard"], "error": error, "device": self.name}

    def _commit(self, row: dict[str, Any]) -> None:
        rows, quarantine = _unpack(row["rows"]), _unpack(row["quarantine"])
        moments = self._moments(row["pixels"])
        problems = cache.unusable(moments)
        lost = [
            _quarantined(identity, self.source, "encode", problem, f"the model's moments are {problem} for fp16")
            for identity, problem in zip(rows["id"].to_pylist(), problems, strict=True)
            if problem
        ]
        good = np.array([problem is None for problem in problems], dtype=bool)
        quarantine = pa.concat_tables([quarantine, pa.Table.from_pylist(lost, schema=cache.QUARANTINE)])
        cache.commit_shard(
            self.out, row["shard"], rows.filter(pa.array(good)), moments[good].astype(np.float16), quarantine
        )

    @torch.inference_mode()
    def _moments(self, pixels: np.ndarray) -> np.ndarray:
        """fp32 (n, 2 n_z, h, w). Every forward pass has the full batch size, the last one padded: it decides on kernels
        and so on a result's last bits."""
        if self.model is None:
            if fingerprint(self.folder) != self.fingerprint:
                raise UserError(f"{self.folder} on {platform.node()} is not the model that the job was started with")
            self.model = load_autoencoder(self.folder).to(self.device)
        parts = []
        for start in range(0, len(pixels), self.batch_size):
            batch = np.zeros((self.batch_size, *pixels.shape[1:]), dtype=np.uint8)
            part = pixels[start : start + self.batch_size]
            batch[: len(part)] = part
            with autocast(self.device, self.precision):
                posterior = self.model.encode(to_tensor(torch.from_numpy(batch).to(self.device))).latent_dist
            parts.append(posterior.parameters[: len(part)].float().cpu().numpy())
        return np.concatenate(parts) if parts else np.empty((0, 2, 1, 1), dtype=np.float32)


def _quarantined(identity: str, source: str, stage: str, reason: str, message: str) -> dict[str, str]:
    return {"id": identity, "source": source, "stage": stage, "error": reason, "message": message}


def _check_budget(reasons: dict[str, int], config: Encode, out: str, total: int) -> None:
    quarantined = sum(reasons.values())
    if quarantined > config.error_budget * total:
        listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        raise UserError(
            f"{quarantined} of {total} images could not be encoded ({listed}), more than error_budget="
            f"{config.error_budget:g} allows; they are listed in {out}/quarantine. Mend them, or raise the budget and "
            f"run again: it goes on"
        )


def _add(total: dict[str, int], more: dict[str, int]) -> None:
    for key, count in more.items():
        total[key] = total.get(key, 0) + count


def _fastest_precision(gpu: bool) -> str:
    """What "auto" means where the encoders will run."""
    import ray

    def probe(device: str) -> str:
        with autocast(device, "auto"):
            return "bf16" if torch.is_autocast_enabled(device) else "fp32"

    return ray.get(ray.remote(num_gpus=1, num_cpus=0)(probe).remote("cuda")) if gpu else probe("cpu")


def _versions() -> dict[str, str]:
    names = ("litevae", "torch", "diffusers", "pillow", "pyarrow", "numpy", "ray")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def _summary(out: str, manifest: dict[str, Any]) -> dict[str, Any]:
    counts, side = manifest["counts"], manifest["transform"]["resolution"]
    stored = sum(shard.get("bytes", 0) for shard in manifest["shards"])
    return {
        "images": counts["encoded"],
        "quarantined": counts["quarantined"],
        "reasons": counts["reasons"],
        "encoded_now": 0,
        "seconds": 0.0,
        "images_per_s": 0.0,
        "bits_per_pixel": round(8 * stored / (counts["encoded"] * side**2), 4),
        "shape": manifest["latents"]["shape"],
        "digest": manifest["digest"],
        "manifest": os.path.join(out, "manifest.json"),
        "link": os.path.join(out, "metrics.jsonl"),
    }


def _pack(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _unpack(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()
