"""One trial of a sweep: one training, and the evaluation of each row that uses it.

Ray Tune calls `run` in an actor that only waits. The work is done in a Ray task, whose imports take seconds. The task
runs outside Tune's placement group, because no CPU would be left for it inside.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from litevae import storage
from pipelines.encoding.config import Encode
from pipelines.evaluation.config import Evaluate, EvaluateSamples, Sample
from pipelines.experiments import paper
from pipelines.experiments.config import Sweep
from pipelines.experiments.trials import RESULT, TRAINED, SweepSetup, TrainedModel, Trial, TrialRow, point
from pipelines.runtime import cluster
from pipelines.runtime.logs import say
from pipelines.runtime.schema import Tracking, validate
from pipelines.training import run_lock
from pipelines.training.config import TrainLDM, TrainVAE


def run(values: dict[str, Any], setup: SweepSetup) -> None:
    """Run one trial in Tune's actor, and report to Tune what the training reports at its checkpoints.

    Args:
        values: the values that Tune chose: {"trial": a number in `setup.trials`}, or fields of train_vae and a seed.
        setup: what all trials share.
    """
    import ray
    from ray import tune
    from ray.util.queue import Empty, Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    cfg = validate(Sweep, setup.cfg)
    if "trial" in values:
        trial = setup.trials[values["trial"]]
    else:
        begin = ""
        if (found := tune.get_checkpoint()) is not None:  # this trial's own, or with pbt that of a better trial
            with found.as_directory() as path:
                begin = json.loads(Path(path, "checkpoint.json").read_text())["path"]
        drawn = {key: value for key, value in values.items() if key != "seed"}
        trial = point(cfg, drawn, values["seed"], setup.folder, begin)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    reports = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    where = cluster.on_nodes(setup.ray["worker_labels"])
    task = ray.remote(_work).options(num_cpus=0, scheduling_strategy="DEFAULT", max_retries=3, **where)
    running = task.remote(trial, setup, reports)
    finished = False
    while not finished:
        finished = bool(ray.wait([running], timeout=1)[0])
        while True:
            try:
                metrics, path = reports.get_nowait()
            except Empty:
                break
            if cfg.metric not in metrics:  # there was no validation yet
                continue
            if cfg.scheduler != "pbt":
                tune.report(metrics)
                continue
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, "checkpoint.json").write_text(json.dumps({"path": path}))
                tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))
    tune.report(ray.get(running))


def _work(trial: Trial, setup: SweepSetup, reports: Any) -> dict[str, Any]:
    """Train, unless that was done before, and evaluate every row.

    Returns:
        The training's last metrics, with psnr and ssim of the evaluation.
    """
    if os.path.isdir(setup.cwd):
        os.chdir(setup.cwd)
    cfg = validate(Sweep, setup.cfg)
    share = {"ray": setup.ray}
    rows = [replace(row, jobs={job: values | share for job, values in row.jobs.items()}) for row in trial.rows]
    mine = Trial(trial.train | share, rows)
    with _logged(mine.rows[0]):
        trained = _trained(cfg, mine, setup.parent, reports)
    for row in mine.rows:
        if not row.done:
            with _logged(row):
                _evaluate(cfg, mine.train, trained, row, setup.parent)
        judged = json.loads(Path(row.folder, RESULT).read_text())["metrics"]
        numbers = {name: judged[f"eval/reconstruction/{name}"] for name in ("psnr", "ssim")}
        say(f"{row.label}: {'  '.join(f'{name} {value:.4g}' for name, value in numbers.items())}", **numbers)
    # The evaluation's numbers are added, since a training that was resumed at its very end has not validated.
    return trained.metrics | numbers


@contextmanager
def _logged(row: TrialRow) -> Iterator[None]:
    """Redirect what jobs print to log.txt in the row's folder, since the output of many rows would be unreadable."""
    os.makedirs(row.folder, exist_ok=True)
    with open(os.path.join(row.folder, "log.txt"), "a") as file, redirect_stdout(file):
        yield


def _trained(cfg: Sweep, trial: Trial, parent: str, reports: Any) -> TrainedModel:
    """Do the training, unless it was done before."""
    done, row = Path(trial.folder, TRAINED), trial.rows[0]
    os.makedirs(os.path.dirname(trial.folder), exist_ok=True)
    with run_lock.in_turn(f"{trial.folder}.lock"):  # another sweep may do the same training
        if not done.exists():
            from pipelines.training.vae import train_vae

            config = validate(TrainVAE, trial.train | {"tracking": tracking_of(cfg, row, parent).model_dump()})
            result = train_vae(config, [_reporter(reports)])
            metrics = {key: value for key, value in result.items() if isinstance(value, int | float)}
            trained = TrainedModel(trial.folder, result["model"], metrics, row.folder)
            storage.put(str(done), json.dumps(asdict(trained)).encode())
    return TrainedModel(**json.loads(done.read_text()))


def _evaluate(cfg: Sweep, values: dict[str, Any], trained: TrainedModel, row: TrialRow, parent: str) -> None:
    """Do a row's jobs after its training, and log their results to MLflow.

    They are logged to the training's run. If that run belongs to another row, they are logged to a new run, which gets
    a copy of the training's metrics too.
    """
    from pipelines.evaluation.reconstruction import evaluate
    from pipelines.runtime import mlflow_run

    out = os.path.join(row.folder, "evaluation")
    summary = evaluate(
        validate(Evaluate, row.jobs["evaluate"] | {"model": trained.model, "out": out, "overwrite": True})
    )
    folders = [out]
    if "train_ldm" in row.jobs:
        folders.append(_diffusion(row, trained))
    own = trained.row == row.folder and b'"eval/' not in Path(trained.folder, "metrics.jsonl").read_bytes()
    run_folder = trained.folder if own else os.path.join(row.folder, "run")
    run = mlflow_run.start_run(tracking_of(cfg, row, parent), cfg.root, "train_vae", values["name"], values, run_folder)
    tracker = mlflow_run.Tracker(run, system=False)
    images = int(trained.metrics["images"])
    if not own:
        mlflow_run.replay(trained.folder, tracker, images, training=True)
    metrics = {"eval/params_m": _parameters(trained.model, row.part) / 1e6}
    tracker.metrics(metrics, images)
    for folder in folders:
        metrics |= mlflow_run.replay(folder, tracker, images)
    tracker.close("FINISHED")
    result = {
        "row": row.name, "seed": row.seed, "metrics": metrics, "model": trained.model, "evaluation": out,
        "remarks": summary["remarks"], "run": mlflow_run.link(run), "train_vae": values,
    }  # fmt: skip
    storage.put(os.path.join(row.folder, RESULT), json.dumps(result, indent=2).encode() + b"\n")


def _diffusion(row: TrialRow, trained: TrainedModel) -> str:
    """Train a diffusion model on the latents of an autoencoder, sample from it, and evaluate the samples.

    Returns:
        The folder of the evaluation.
    """
    from pipelines.encoding import encode
    from pipelines.evaluation import generated
    from pipelines.evaluation.sample import sample
    from pipelines.training.ldm import train_ldm

    cache, samples, out = (os.path.join(row.folder, name) for name in ("cache", "samples", "evaluation-samples"))
    encode.run(validate(Encode, row.jobs["encode_dataset"] | {"model": trained.model, "out": cache}))
    where = {"cache": cache, "root": row.folder, "name": "ldm", "seed": row.seed}
    ldm = train_ldm(validate(TrainLDM, row.jobs["train_ldm"] | where))
    sample(validate(Sample, row.jobs["sample"] | {"model": ldm["model"], "out": samples}))
    generated.samples(
        validate(
            EvaluateSamples, row.jobs["evaluate_samples"] | {"samples": {"uri": samples}, "out": out, "overwrite": True}
        )
    )
    return out


def _reporter(reports: Any) -> Any:
    """Return a callback of Ray Train that puts (metrics, path) into the queue at each checkpoint of a training."""
    from ray.train import UserCallback

    class Report(UserCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            if checkpoint is not None:
                reports.put((metrics[0], checkpoint.path))

    return Report()


def tracking_of(cfg: Sweep, row: TrialRow, parent: str) -> Tracking:
    """Return the tracking config of a row's run: its name, its parent run and its tags."""
    tags = {"litevae.sweep": cfg.name, "litevae.row": row.name, "litevae.seed": str(row.seed)}
    if cfg.table:
        tags |= {"litevae.table": paper.table(cfg.table).name, "litevae.scale": cfg.scale}
    # The run that the environment names is the sweep's, also where the sweep's could not be opened: not every row's.
    own = {"run": row.label, "parent": parent, "join": False, "tags": cfg.tracking.tags | tags}
    return cfg.tracking.model_copy(update=own)


def _parameters(model: str, part: str) -> int:
    """Count the parameters of one part of a saved autoencoder."""
    from litevae.any_autoencoder import load_autoencoder
    from litevae.autoencoder import count_parameters

    return count_parameters(attrgetter(part)(load_autoencoder(model)))
