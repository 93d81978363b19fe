"""Measure the cost of Ray Train: a training job and the same loop without Ray, in turn, each in its own process."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from litevae.errors import UserError
from litevae.order import seed_for
from pipelines.benchmark import meter
from pipelines.benchmark.loader import synthetic_cache
from pipelines.data.open_source import open_source
from pipelines.runtime import cluster
from pipelines.runtime.cli import load
from pipelines.runtime.mlflow_server import RunHandle
from pipelines.training.config import TrainLDM, TrainVAE
from pipelines.training.worker_setup import LdmSetup, VaeSetup

INTERVALS = 6  # intervals that a run is measured in; the first one is warm-up
JOBS = Path(__file__).resolve().parents[2] / "jobs"
CASES = {  # job, its settings, side of a latent, images per step, number of steps
    "autoencoder: LiteVAE-S, decoder (32, 64, 128, 128), GAN, 64 px": (
        "train_vae",
        "model.encoder=S model.decoder.channels=[32,64,128,128] loss.lpips.weight=0 data.crop=center "
        "loss.adversarial.start=0 loss.adversarial.channels=16",
        8,
        8,
        72,
    ),
    "diffusion model: small, 32 x 32 x 4": ("train_ldm", "network=small", 32, 8, 48),
    "diffusion model: tiny, 8 x 8 x 4": ("train_ldm", "network=tiny", 8, 64, 480),
}


def ray(setting: meter.Setting) -> Iterator[meter.ReportTable]:
    """Measure images/s of both training jobs, and of their loops without Ray."""
    table = meter.ReportTable(
        "What Ray Train adds",
        f"`jobs/train_vae.py` and `jobs/train_ldm.py` beside their own loops in a process without Ray, in turn, "
        f"{setting.config.repeats} of each; of a run the median of {INTERVALS - 1} equal intervals after the first; "
        f"median (range). Waiting: the share of the job's time in which the loop waited for data, at most.",
        ["", "images/s, the loop alone", "the job", "the job / the loop", "waiting for data"],
    )
    for number, (title, (job, changes, side, batch, steps)) in enumerate(CASES.items()):
        folder = setting.place / f"ray-{number}"
        folder.mkdir()
        words = [
            *changes.split(),
            *_data(setting, job, folder, side),
            f"ray.gpu={str(setting.device.type == 'cuda').lower()}",
        ]
        rates: dict[str, list[float]] = {"alone": [], "job": []}
        waiting = 0.0
        for n in range(setting.config.repeats):
            given = {"job": job, "words": [*words, *_length(job, batch, steps)], "batch": batch, "steps": steps}
            rates["alone"].append(_loop_in_a_process(given, setting))
            found = _job(given, folder, f"run-{n}")
            rates["job"].append(found["rate"])
            waiting = max(waiting, found["waiting"])
        table.samples[title] = rates
        shown = [meter.median_and_range(rates[name], 2) for name in ("alone", "job")]
        share = meter.ratio(rates["job"], rates["alone"])
        table.rows.append([f"{title}, batch {batch}", *shown, f"{share:.3f}", f"{waiting:.2%}"])
    yield table


def _data(setting: meter.Setting, job: str, folder: Path, side: int) -> list[str]:
    """Make the data of a case, and return the config words that name them."""
    place = [f"root={folder}", "tracking.enabled=false"]
    if job == "train_vae":
        return [*place, f"data.train.uri={setting.config.source or setting.photos()[0].parent}"]
    from litevae.any_autoencoder import fingerprint
    from litevae.autoencoder import LiteVAE

    LiteVAE("S", block_out_channels=(8, 8, 8, 8), layers_per_block=1).save_pretrained(folder / "vae")
    model = {"path": str(folder / "vae"), "fingerprint": fingerprint(folder / "vae")}
    synthetic_cache(folder / "cache", 4000, (8, side, side), **model)
    return [*place, f"cache={folder / 'cache'}", "sample_images=0"]


def _length(job: str, batch: int, steps: int) -> list[str]:
    """Return the config words for the length of the run, its logging and its checkpoints."""
    images = batch * steps
    every = ["loop.val_every=0", f"loop.log_every={steps // INTERVALS}", f"loop.checkpoint_every={images}"]
    if job == "train_ldm":
        return [*every, f"images={images}", f"batch_size={batch}"]
    return [*every, f"stages=[{{resolution: 64, images: {images}, batch_size: {batch}}}]"]


def _run(command: Sequence[str], **environment: str) -> str:
    """Run a command and return what it printed.

    Args:
        command: the program and its arguments.
        environment: variables that are added to this process's.

    Raises:
        UserError: if the command failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        raise UserError(f"{' '.join(command[:3])} ... failed:\n{(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def _loop_in_a_process(given: dict[str, Any], setting: meter.Setting) -> float:
    """Return images/s of the loop without Ray, in a process with the same environment as the job's worker.

    That is: OpenMP threads spin little while they wait, and there is one of them until torch asks for more.
    """
    command = [sys.executable, "-m", __name__, json.dumps(given | {"threads": setting.threads})]
    return json.loads(_run(command, **cluster.ENVIRONMENT, OMP_NUM_THREADS="1").splitlines()[-1])


def _job(given: dict[str, Any], folder: Path, name: str) -> dict[str, float]:
    """Run the job, and return its images/s and the share of time in which it waited for data."""
    _run([sys.executable, str(JOBS / f"{given['job']}.py"), *given["words"], f"name={name}"])
    lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    logged = [line for line in lines if "train/images_per_second" in line][1:]
    waiting = statistics.mean(line["train/waiting_for_data"] for line in logged)
    return {"rate": statistics.median(line["train/images_per_second"] for line in logged), "waiting": waiting}


def loop_rate(job: str, words: list[str], batch: int, steps: int, threads: int) -> float:
    """Run a job's loop without Ray in this process.

    Args:
        job: "train_vae" or "train_ldm".
        words: the job's config as words of a command line.
        batch: images per step.
        steps: number of steps.
        threads: CPU threads of torch.

    Returns:
        The median images/s of the intervals after the first.
    """
    from pipelines.training import ldm, vae

    torch.set_num_threads(threads)
    task: Any
    with mock.patch("ray.train.torch.prepare_model", lambda model: model):  # there is no DDP without Ray
        if job == "train_vae":
            cfg = load(TrainVAE, None, words)
            device = _device(cfg.ray.gpu)
            untracked = RunHandle("", None, "benchmark", cfg.root)
            source = open_source(cfg.data.train, "data.train")
            setup = VaeSetup(config={}, folder="", data="", handle=untracked, source=source, val=None, lpips=False)
            task = vae.VaeTask(cfg.model_copy(update={"val_images": 1}), setup, 0, 1, device)
        else:
            config = load(TrainLDM, None, words)
            device = _device(config.ray.gpu)
            untracked = RunHandle("", None, "benchmark", config.root)
            latents = ldm.cached_latents(config)
            given = LdmSetup(config={}, folder="", data="", handle=untracked, latents=latents)
            task = ldm.LdmTask(config, given, 0, 1, device)
    task.begin(0)
    rates, every = [], steps // INTERVALS
    start = meter.now(device)
    for step, found in enumerate(task.batches(0, steps * batch, batch), 1):
        torch.manual_seed(seed_for(0, (step - 1) * batch, 0))
        task.step(found, (step - 1) * batch)
        if step % every == 0:
            rates.append(every * batch / (meter.now(device) - start))
            start = meter.now(device)
    return statistics.median(rates[1:])


def _device(gpu: bool | str) -> torch.device:
    return torch.device("cuda" if gpu is True else "cpu")


if __name__ == "__main__":
    print("\n" + json.dumps(loop_rate(**json.loads(sys.argv[1]))))
