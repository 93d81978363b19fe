"""One trial of a sweep: a training, and the rows that it serves, each evaluated.

`run` is what Tune calls. Its actor only waits: the work is a task, whose imports take seconds, outside of Tune's
placement group, in which nothing else would find a CPU.
"""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

from litevae import storage
from pipelines.encoding.config import Encode
from pipelines.evaluation.config import Evaluate, EvaluateSamples, Sample
from pipelines.experiments import paper
from pipelines.experiments.config import Sweep
from pipelines.experiments.trials import RESULT, TRAINED, Row, Trial
from pipelines.runtime import cluster
from pipelines.runtime.logs import say
from pipelines.runtime.schema import Tracking, validate
from pipelines.training import run_lock
from pipelines.training.config import TrainLDM, TrainVAE


def run(values: dict[str, Any], setup: dict[str, Any]) -> None:
    """In Tune's actor: one trial, and to Tune what its training reports at checkpoints.

    Args:
        values: Tune's: {"trial": number in setup["trials"]}, or fields of train_vae and a seed.
    """
    import ray
    from ray import tune
    from ray.util.queue import Empty, Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    cfg = validate(Sweep, setup["cfg"])
    if "trial" in values:
        trial = setup["trials"][values["trial"]]
    else:
        from pipelines.experiments.trials import point

        begin = ""
        if (found := tune.get_checkpoint()) is not None:  # of this trial, or with pbt of a better one
            with found.as_directory() as path:
                begin = json.loads(Path(path, "checkpoint.json").read_text())["path"]
        drawn = {key: value for key, value in values.items() if key != "seed"}
        trial = asdict(point(cfg, drawn, values["seed"], setup["folder"], begin))
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    reports = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    where = cluster.on_nodes(setup["ray"]["worker_labels"])
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
            if cfg.metric not in metrics:  # no validation yet
                continue
            if cfg.scheduler != "pbt":
                tune.report(metrics)
                continue
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, "checkpoint.json").write_text(json.dumps({"path": path}))
                tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))
    tune.report(ray.get(running))


def _work(trial: dict[str, Any], setup: dict[str, Any], reports: Any) -> dict[str, Any]:
    """Train, unless that was done before, and evaluate every row. Returns what the training has come to."""
    if os.path.isdir(setup["cwd"]):
        os.chdir(setup["cwd"])
    cfg = validate(Sweep, setup["cfg"])
    share = {"ray": setup["ray"]}
    mine = Trial(trial["train"] | share, [Row(**row) for row in trial["rows"]])
    for row in mine.rows:
        row.jobs = {job: values | share for job, values in row.jobs.items()}
    with _logged(mine.rows[0]):
        trained = _trained(cfg, mine, setup["parent"], reports)
    for row in mine.rows:
        if not row.done:
            with _logged(row):
                _evaluate(cfg, mine.train, trained, row, setup["parent"])
        judged = json.loads(Path(row.folder, RESULT).read_text())["metrics"]
        numbers = {name: judged[f"eval/reconstruction/{name}"] for name in ("psnr", "ssim")}
        say(f"{row.label}: {'  '.join(f'{name} {value:.4g}' for name, value in numbers.items())}", **numbers)
    return trained["metrics"] | numbers  # a training that only had its end missing has validated nothing


@contextmanager
def _logged(row: Row) -> Iterator[None]:
    """What jobs print goes to the row's folder: of many rows nobody could read it."""
    os.makedirs(row.folder, exist_ok=True)
    with open(os.path.join(row.folder, "log.txt"), "a") as file, redirect_stdout(file):
        yield


def _trained(cfg: Sweep, trial: Trial, parent: str, reports: Any) -> dict[str, Any]:
    """What is known of a training, which is done if it was not: its run folder, model, metrics, and whose run it is."""
    done, row = Path(trial.folder, TRAINED), trial.rows[0]
    os.makedirs(os.path.dirname(trial.folder), exist_ok=True)
    with run_lock.in_turn(f"{trial.folder}.lock"):  # another sweep may want the same training
        if not done.exists():
            from pipelines.training.vae import train_vae

            config = validate(TrainVAE, trial.train | {"tracking": tracking_of(cfg, row, parent).model_dump()})
            result = train_vae(config, [_reporter(reports)])
            metrics = {key: value for key, value in result.items() if isinstance(value, int | float)}
            about = {"folder": trial.folder, "model": result["model"], "metrics": metrics, "row": row.folder}
            storage.put(str(done), json.dumps(about).encode())
    return json.loads(done.read_text())


def _evaluate(cfg: Sweep, values: dict[str, Any], trained: dict[str, Any], row: Row, parent: str) -> None:
    """Do what is left of a row after its training, and bring it to MLflow: to the training's run, or if that is another
    row's to a run that gets the training's metrics too."""
    from pipelines.evaluation.reconstruction import evaluate
    from pipelines.runtime import mlflow_run

    out = os.path.join(row.folder, "evaluation")
    summary = evaluate(validate(Evaluate, row.jobs["evaluate"] | {"model": trained["model"], "out": out}))
    folders = [out]
    if "train_ldm" in row.jobs:
        folders.append(_diffusion(row, trained))
    own = trained["row"] == row.folder and b'"eval/' not in Path(trained["folder"], "metrics.jsonl").read_bytes()
    run_folder = trained["folder"] if own else os.path.join(row.folder, "run")
    run = mlflow_run.start_run(tracking_of(cfg, row, parent), cfg.root, "train_vae", values["name"], values, run_folder)
    tracker = mlflow_run.Tracker(run, system=False)
    images = trained["metrics"]["images"]
    if not own:
        mlflow_run.replay(trained["folder"], tracker, images, training=True)
    metrics = {"eval/params_m": _parameters(trained["model"], row.part) / 1e6}
    tracker.metrics(metrics, images)
    for folder in folders:
        metrics |= mlflow_run.replay(folder, tracker, images)
    tracker.close("FINISHED")
    result = {
        "row": row.name, "seed": row.seed, "metrics": metrics, "model": trained["model"], "evaluation": out,
        "remarks": summary["remarks"], "run": mlflow_run.link(run), "train_vae": values,
    }  # fmt: skip
    storage.put(os.path.join(row.folder, RESULT), json.dumps(result, indent=2).encode() + b"\n")


def _diffusion(row: Row, trained: dict[str, Any]) -> str:
    """A diffusion model in the latents of an autoencoder, and its samples, judged. Returns the judge's folder."""
    from pipelines.encoding import encode
    from pipelines.evaluation import generated
    from pipelines.evaluation.sample import sample
    from pipelines.training.ldm import train_ldm

    cache, samples, out = (os.path.join(row.folder, name) for name in ("cache", "samples", "evaluation-samples"))
    encode.run(validate(Encode, row.jobs["encode_dataset"] | {"model": trained["model"], "out": cache}))
    where = {"cache": cache, "root": row.folder, "name": "ldm", "seed": row.seed}
    ldm = train_ldm(validate(TrainLDM, row.jobs["train_ldm"] | where))
    sample(validate(Sample, row.jobs["sample"] | {"model": ldm["model"], "out": samples}))
    generated.samples(
        validate(EvaluateSamples, row.jobs["evaluate_samples"] | {"samples": {"uri": samples}, "out": out})
    )
    return out


def _reporter(reports: Any) -> Any:
    """A callback of Ray Train that hands on what a training reports at its checkpoints."""
    from ray.train import UserCallback

    class Report(UserCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            if checkpoint is not None:
                reports.put((metrics[0], checkpoint.path))

    return Report()


def tracking_of(cfg: Sweep, row: Row, parent: str) -> Tracking:
    """Where a row's run is tracked, and as what."""
    tags = {"litevae.sweep": cfg.name, "litevae.row": row.name, "litevae.seed": str(row.seed)}
    if cfg.table:
        tags |= {"litevae.table": paper.table(cfg.table).name, "litevae.scale": cfg.scale}
    return cfg.tracking.model_copy(update={"run": row.label, "parent": parent, "tags": cfg.tracking.tags | tags})


def _parameters(model: str, part: str) -> int:
    from litevae.autoencoder import count_parameters, load_autoencoder

    return count_parameters(attrgetter(part)(load_autoencoder(model)))
