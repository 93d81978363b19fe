"""Training a diffusion model online, while filling a cache, and from the cache, by encoders of full size.

Each run is a process of its own without Ray: `python -m tests.benchmarks.modes`.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import ray
import torch
from torch import Tensor

from litevae.autoencoder import LiteVAE
from pipelines.benchmark import meter
from pipelines.benchmark.models import build
from pipelines.runtime import cluster
from pipelines.runtime.cli import load
from pipelines.runtime.mlflow_server import RunHandle
from pipelines.training import ldm
from pipelines.training.config import TrainLDM
from pipelines.training.latent_feeds import LatentBatch
from pipelines.training.worker_setup import LatentData, LdmSetup

ENCODERS = {"S": "LiteVAE-S", "B": "LiteVAE-B", "sd-vae": "SD-VAE"}
MODES: dict[str, Callable[[TrainLDM], LatentData]] = {
    "write-through": ldm.write_through_latents,
    "cache": ldm.cached_latents,
    "online": ldm.online_latents,
}
IMAGES, BATCH = 32, 8  # the images are also a forward pass of write-through, which pads the last one
SHOWN = ("online", "write-through", "cache")


def modes(setting: meter.Setting) -> Iterator[meter.ReportTable]:
    """images/s of each mode by each encoder."""
    place = setting.place / "modes"
    place.mkdir()
    photos = meter.linked(setting.photos(), IMAGES, place / "photos")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ENCODERS}
    for n in range(setting.config.repeats):
        for name in ENCODERS:
            given = {"encoder": name, "photos": str(photos), "folder": str(place / f"{name}-{n}")}
            # What the job's worker has: few spins, one OpenMP thread until torch wants more.
            with meter.Child(
                "tests.benchmarks.modes", environment={**cluster.ENVIRONMENT, "OMP_NUM_THREADS": "1"}
            ) as child:
                runs[name].append(child.ask(**given, threads=setting.threads, device=setting.device.type))
    size = statistics.mean(path.stat().st_size for path in photos.iterdir())
    table = meter.ReportTable(
        "Training a diffusion model online, filling a cache, and from the cache",
        f"{IMAGES} JPEGs at 256 px ({size / 1000:,.1f} kB each), network small on 32 x 32 x 4, batch {BATCH}, encoders "
        f"of full size with random weights, no Ray; images/s of {setting.config.repeats} runs of each in turn: median "
        f"(range). Not training: the share of the time that reading, decoding, encoding and loading take from the "
        f"step, online, write-through and cache. Ahead after: epochs after which filling the cache in the first one "
        f"and then reading it has taken less time than online.",
        ["", *SHOWN, "cache / online", "not training", "cache, bytes an image", "ahead after"],
        samples=dict(runs),
    )
    table.rows += [_row(ENCODERS[name], found) for name, found in runs.items()]
    yield table


def _row(title: str, runs: list[dict[str, Any]]) -> list[str]:
    seconds = {mode: [run[mode]["seconds"] for run in runs] for mode in SHOWN}
    middle = {mode: statistics.median(values) for mode, values in seconds.items()}
    feeding = [f"{statistics.median(run[mode]['feeding'] for run in runs):.1%}" for mode in SHOWN]
    once, saved = middle["write-through"] - middle["cache"], middle["online"] - middle["cache"]
    return [
        title,
        *(meter.median_and_range(meter.rates(values, 1)) for values in seconds.values()),
        f"{meter.ratio(seconds['online'], seconds['cache']):.1f}",
        ", ".join(feeding),
        f"{runs[0]['bytes']:,.0f}",
        f"{once / saved:.2f} epochs" if saved > 0 else "never",
    ]


# --- a run's process ----------------------------------------------------------------------------------------------


def three_modes(encoder: str, photos: str, folder: str, threads: int, device: str) -> dict[str, Any]:
    """Of each mode: seconds an image, and the share of them that is not the network's training."""
    torch.set_num_threads(threads)
    place = Path(folder)
    _save(encoder, place / "vae")
    words = [
        *("network=small", f"batch_size={BATCH}", f"images={IMAGES}", "optim.clip=1", "tracking.enabled=false"),
        *(f"vae={place / 'vae'}", f"root={place}", f"data.source.uri={photos}", f"data.rows_per_shard={IMAGES}"),
        *(f"data.calibrate={BATCH}", f"ray.gpu={str(device == 'cuda').lower()}"),
    ]
    found: dict[str, Any] = {}
    with mock.patch("ray.train.torch.prepare_model", lambda model: model):  # without Ray nothing is to be prepared
        for mode in MODES:
            of_mode = [*words, f"mode={mode}", *([f"cache={place / 'cache'}"] if mode != "online" else [])]
            found[mode] = _timed(load(TrainLDM, None, of_mode), threads, torch.device(device))
    return found | {"bytes": sum(path.stat().st_size for path in (place / "cache" / "shards").iterdir()) / IMAGES}


def _save(encoder: str, folder: Path) -> None:
    """Of full size, but for LiteVAE's decoder, which is not used."""
    torch.manual_seed(0)
    if encoder == "sd-vae":
        build(encoder, "eager").save_pretrained(folder)
    else:
        LiteVAE(encoder, block_out_channels=(8, 8, 8, 8), layers_per_block=1).save_pretrained(folder)


def _timed(config: TrainLDM, threads: int, device: torch.device) -> dict[str, float]:
    """An epoch after a step that warms up."""
    latents = MODES[config.mode](config)
    if config.mode == "write-through":
        latents = ldm.begin_cache(config, latents)
        ray.shutdown()  # of which the plan only asked what there is: its processes would be measured, too
    untracked = RunHandle("", None, "benchmark", config.root)
    setup = LdmSetup(config={}, folder="", data="", handle=untracked, threads=threads, latents=latents)
    task = ldm.LdmTask(config, setup, 0, 1, device)
    task.begin(0)  # encoders warm up by calibrating
    encoding: list[float] = []
    raw = task.feed.raw

    def measured(batch: dict[str, Any]) -> Tensor:
        start = meter.now(device)
        drawn = raw(batch)
        encoding.append(meter.now(device) - start)
        return drawn

    with mock.patch.object(task.feed, "raw", return_value=torch.randn(BATCH, *latents.shape, device=device)):
        for _ in range(2):
            task.step(task.with_noise(LatentBatch(range(BATCH))), 0)
    waited, start, position = 0.0, meter.now(device), 0
    with mock.patch.object(task.feed, "raw", measured):
        batches = iter(task.batches(0, IMAGES, BATCH))
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)  # of write-through also the last time, when the manifest is written
            waited += time.perf_counter() - asked
            if batch is None:
                break
            task.step(batch, position)
            position += BATCH
            meter.now(device)
    seconds = meter.now(device) - start
    return {"seconds": seconds / position, "feeding": (waited + sum(encoding)) / seconds}


if __name__ == "__main__":
    meter.serve(lambda request: three_modes(**request))
