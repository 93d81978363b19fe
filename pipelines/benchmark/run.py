"""Run the parts of the benchmark that the config names, one after the other, and write the report."""

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from litevae import storage
from litevae.errors import UserError
from pipelines.benchmark import first_look, meter
from pipelines.benchmark.config import Benchmark
from pipelines.benchmark.meter import ReportTable, Setting
from pipelines.runtime import mlflow_run, outputs

PARTS = {  # the function that measures each part; some parts need packages that only developers have
    "encoder": "pipelines.benchmark.models:encoder",
    "decoder": "pipelines.benchmark.models:decoder",
    "tiling": "pipelines.benchmark.tiling:tiling",
    "vae-step": "pipelines.benchmark.training:vae_step",
    "ldm-step": "pipelines.benchmark.training:ldm_step",
    "ray": "pipelines.benchmark.jobs:ray",
    "encode": "pipelines.benchmark.encoding:encode",
    "memory": "pipelines.benchmark.encoding:memory",
    "loader": "pipelines.benchmark.loader:loader",
    "moments": "pipelines.benchmark.moments:moments",
}


def benchmark(config: Benchmark, parts: Mapping[str, str] = PARTS) -> dict[str, Any]:
    """Measure the parts, and write benchmark.md and benchmark.json to `config.out` again after each table.

    Args:
        config: the job's config.
        parts: "module:function" of each part that the config may name; the function yields tables.

    Returns:
        The content of benchmark.json.

    Raises:
        UserError: if a model, photos or a package that a part needs are missing, or the memory is too small.
    """
    out = first_look.benchmark(config).announce("benchmark")
    device = _device(config)
    threads = config.threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    found: dict[str, Any] = {
        "environment": meter.environment(device, threads),
        "config": outputs.measured(config),
        "parts": {},
    }
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-") as place,
        mlflow_run.tracked_run(config, "benchmark", os.path.basename(out), out) as (tracker, run),
    ):
        setting = Setting(config, device, threads, Path(place))
        for part in config.parts:
            print(f"benchmark: {part}", flush=True)
            start = time.monotonic()
            kept = found["parts"].setdefault(part, {"tables": []})["tables"]
            for table in _tables(part, parts[part], setting):
                print(f"\n{table.markdown}", flush=True)
                kept.append({name: getattr(table, name) for name in ("title", "how", "head", "rows", "samples")})
                _write(out, found)
            found["parts"][part]["seconds"] = round(time.monotonic() - start, 1)
        _write(out, found)
        for name in ("benchmark.md", "benchmark.json"):
            tracker.artifact(os.path.join(out, name))
    print(f"report    {out}/benchmark.md\nsamples   {out}/benchmark.json\nrun       {mlflow_run.link(run)}", flush=True)
    return found


def _device(config: Benchmark) -> torch.device:
    """Return the device to measure, or raise a UserError if gpu=true and there is no GPU."""
    there = torch.cuda.is_available()
    if config.gpu is True and not there:
        raise UserError("gpu=true, but PyTorch finds no GPU here")
    return torch.device("cuda" if there and config.gpu else "cpu")


def _tables(part: str, place: str, setting: Setting) -> Iterator[ReportTable]:
    """Yield the tables of a part, or raise a UserError if it needs a package that is not installed."""
    module, _, function = place.partition(":")
    try:
        yield from getattr(import_module(module), function)(setting)
    except ModuleNotFoundError as error:
        raise UserError(
            f"part {part} compares with {error.name}, which is not installed: pip install {error.name}, or leave the "
            f"part out"
        ) from None


def _write(out: str, found: dict[str, Any]) -> None:
    os.makedirs(out, exist_ok=True)
    about = found["environment"]
    where = f"{about['gpu']}, " if about["gpu"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    text = [
        f"{where}{about['threads']} threads on {about['cores']} cores of {about['processor']}; load before "
        f"{', '.join(map(str, about['load']))}; {versions}",
        *(ReportTable(**table).markdown for part in found["parts"].values() for table in part["tables"]),
    ]
    storage.put(os.path.join(out, "benchmark.md"), "\n\n".join(text).encode())
    storage.put(os.path.join(out, "benchmark.json"), json.dumps(found, indent=1).encode())
