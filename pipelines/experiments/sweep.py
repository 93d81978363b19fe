"""Train and evaluate many autoencoders on Ray Tune: a table of the paper, or points of a search space.

A *row* is one result that was asked for: a table's row or a point, with a seed. A *trial* (trials.py, run_trial.py) is
one training and the rows that use it. Trainings are kept in <root>/trained under the hash of their config. So a table
that shares a training with an earlier table only evaluates it, and a sweep that was killed resumes where it stopped. In
MLflow each row is a child run of the sweep's run, with the metrics of the training and of the evaluation.
"""

import json
import logging
import math
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from litevae import storage
from litevae.errors import UserError
from pipelines.data.config import Source as SourceConfig
from pipelines.evaluation import report
from pipelines.evaluation.config import Evaluate, EvaluateComplexity
from pipelines.experiments import first_look, paper, run_trial
from pipelines.experiments.config import Compare, Sweep
from pipelines.experiments.search_space import domain, space_fields, tune_space, within
from pipelines.experiments.trials import (
    RESULT,
    TRAINED,
    SweepSetup,
    Trial,
    TrialRow,
    check_fields,
    load_network,
    slug,
    training_lengths,
    trials_of_space,
    trials_of_table,
)
from pipelines.runtime import cluster, mlflow_run, mlflow_server, paths, tables
from pipelines.runtime.logs import say
from pipelines.runtime.schema import dump, merged, validate, values_to_keep
from pipelines.training import run_folder, run_lock
from pipelines.training.config import TrainVAE
from pipelines.training.run_files import LEFT_BY_SWEEP, SWEPT

# Fields that may differ when a sweep resumes. Rows and seeds may, since each row and seed is done on its own.
MAY_CHANGE = ("ray", "concurrent", "rows", "seeds", "data.loaders")
STOPPED = "stopped.json"  # file in a row's folder: asha has stopped the row's training
SHOWN = ("eval/params_m", "eval/reconstruction/", "eval/mmd/", "eval/fid", "eval/frechet/")


def sweep(cfg: Sweep) -> list[dict[str, Any]]:
    """Run the trials that are not done yet.

    results.json, configs/*.yaml, best.yaml and a comparison are written to <root>/<name>.

    Returns:
        The results, one dict per row.

    Raises:
        UserError: if the sweep's config or a trial's config is wrong, another process is working on this sweep, or
            trials failed (raised after the others are done).
    """
    first_look.sweep(cfg)
    table = paper.table(cfg.table) if cfg.table else None
    name = first_look.name_of(cfg)
    root = paths.output_path("root", cfg.root)
    sources = {name: _absolute(getattr(cfg.data, name)) for name in ("train", "val")}
    mlflow_run.check(cfg)
    # The trainings have another root, which would give another default URI.
    uri = mlflow_run.tracking_uri(cfg.tracking, root) if cfg.tracking.enabled else ""
    tracking = cfg.tracking.model_copy(update={"uri": uri})
    data = cfg.data.model_copy(update=sources)
    cfg = cfg.model_copy(update={"name": name, "root": root, "tracking": tracking, "data": data})
    folder = os.path.join(root, name)
    with run_lock.claimed(folder):
        return _sweep(cfg, table, sources, folder)


def _sweep(cfg: Sweep, table: paper.PaperTable | None, sources: dict[str, Any], folder: str) -> list[dict[str, Any]]:
    """Run the sweep in its folder, which this process has locked; see `sweep`."""
    root, name = cfg.root, cfg.name
    if table and table.kind == "complexity":
        return _complexity(cfg, table, folder)
    check_fields(cfg)
    judge = validate(Evaluate, cfg.evaluate)
    report.networks(judge.inception, judge.squeezenet, judge.backbone, judge.backbone_model)
    trials, left_out = trials_of_table(cfg, table, folder) if table else (trials_of_space(cfg, folder), {})
    # With pbt all trials run at the same time. Trials that waited for others to end could not copy from each other.
    placement = cluster.start(cfg.ray, cfg.trials if cfg.scheduler == "pbt" else cfg.concurrent)
    paths.check_folders({"root": root}, {f"data.{name}.uri": source.uri for name, source in sources.items()})
    run_folder.open_run(folder, cfg, MAY_CHANGE, SWEPT, LEFT_BY_SWEEP)
    for row, train in ((row, each.train) for each in trials for row in each.rows):
        path = os.path.join(folder, "configs", f"{slug(row.label)}.yaml")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        storage.put(str(path), dump(validate(TrainVAE, train)).encode())
    count = len(trials) or cfg.trials
    say(f"sweep {name}: {count} trainings, {placement.jobs} at a time, {placement.text}")
    for left, reason in left_out.items():
        say(f"left out: {left}: {reason}", "WARNING")
    lpips = validate(TrainVAE, cfg.train_vae).loss.lpips
    if lpips.weight and (reason := load_network("lpips", lpips.net, lpips.weights)):
        say(f"warning: loss.lpips is off in all trainings: {reason}", "WARNING")
    run = mlflow_run.start_run(cfg.tracking, root, "sweep", name, cfg.model_dump(mode="json"), folder)
    cfg = _beside(cfg, run)
    status: mlflow_server.Status = "FAILED"
    try:
        failed = _tune(cfg, trials, placement, run, folder)
        results = _results(folder, trials, [*table.rows] if table else [])
        storage.put(os.path.join(folder, "results.json"), json.dumps(results, indent=2).encode() + b"\n")
        if best := _best(results, f"eval/reconstruction/{cfg.metric}"):
            winner = values_to_keep(validate(TrainVAE, best["train_vae"] | {"name": f"{name}-best", "root": root}))
            storage.put(os.path.join(folder, "best.yaml"), yaml.safe_dump(winner, sort_keys=False).encode())
        status = "FAILED" if failed else "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        mlflow_run.finish(run, status)
    say(_report(cfg, results, folder))
    if results:
        _compare(cfg, folder)
    if failed:
        again = "the same command continues with them" if trials else "they are not tried again"
        raise UserError(f"{len(failed)} of {count} trials failed; {again}:\n" + "\n".join(failed))
    return results


def _complexity(cfg: Sweep, table: paper.PaperTable, folder: str) -> list[dict[str, Any]]:
    """Measure the rows of a complexity table one after the other, in one job; nothing is trained."""
    from pipelines.evaluation.cost import complexity

    rows = paper.chosen(table, cfg.rows)
    own = {"models": [row.model for row in rows], "out": os.path.join(folder, "complexity"), "overwrite": True}
    shared = {"root": cfg.root, "ray": cfg.ray.model_dump(mode="json"), "tracking": {"enabled": False}}
    parts = paper.at_scale(cfg.scale, "evaluate_complexity"), cfg.evaluate_complexity, own, shared
    job = validate(EvaluateComplexity, merged(*parts))
    run_folder.open_run(folder, cfg, MAY_CHANGE, SWEPT, LEFT_BY_SWEEP)
    run = mlflow_run.start_run(cfg.tracking, cfg.root, "sweep", cfg.name, cfg.model_dump(mode="json"), folder)
    cfg = _beside(cfg, run)
    status: mlflow_server.Status = "FAILED"
    try:
        found = complexity(job)["complexity"]
        results = []
        for row in rows:
            metrics = {f"eval/{name}": value for name, value in found[row.model].items()}
            mine = TrialRow(row.name, cfg.seeds[0], os.path.join(folder, "rows", slug(row.name)), {})
            where = run_trial.tracking_of(cfg, mine, run.run_id or "")
            values = job.model_dump(mode="json", exclude={"models", "tracking"}) | {"model": row.model}
            tracker = mlflow_run.Tracker(
                mlflow_run.start_run(where, cfg.root, "evaluate", row.name, values, mine.folder, resume=False), False
            )
            tracker.metrics(metrics, 0)
            tracker.close("FINISHED")
            results.append({"row": row.name, "seed": mine.seed, "metrics": metrics, "remarks": []})
        storage.put(os.path.join(folder, "results.json"), json.dumps(results, indent=2).encode() + b"\n")
        status = "FINISHED"
    finally:
        mlflow_run.finish(run, status)
    _compare(cfg, folder)
    return results


def _beside(cfg: Sweep, run: mlflow_server.RunHandle) -> Sweep:
    """Return the config with the experiment of the sweep's own run, since workers have another environment."""
    return cfg.model_copy(update={"tracking": cfg.tracking.model_copy(update={"experiment": run.experiment})})


def _absolute(source: SourceConfig) -> SourceConfig:
    """Make a source's local path absolute, so that it means the same in every process."""
    local = source.uri and not storage.is_remote(source.uri)
    return source.model_copy(update={"uri": os.path.abspath(source.uri)}) if local else source


# --- on Ray Tune ------------------------------------------------------------------------------------------------


def _tune(
    cfg: Sweep, trials: list[Trial], placement: cluster.Placement, run: mlflow_server.RunHandle, folder: str
) -> list[str]:
    """Run the trials that are not done.

    If the trials are known beforehand, those that are not done are run, and each resumes where it stopped. If Tune
    draws the points (optuna) or moves them (pbt), Tune's own state is restored instead.

    Returns:
        A message for each trial that failed.
    """
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output is not silent at verbose=0
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C must end this process, not only Tune's loop
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are reported below
    import ray.util
    from ray import tune

    own = {
        "cpus_per_worker": placement.threads,
        "worker_labels": placement.labels,
        "decode_labels": placement.decode_labels,
    }
    setup = SweepSetup(
        cfg=cfg.model_dump(mode="json"), trials=trials, parent=run.run_id or "", folder=folder,
        ray=cfg.ray.model_dump(mode="json") | own, cwd=os.getcwd(),
    )  # fmt: skip

    def one(values: dict[str, Any]) -> None:
        run_trial.run(values, setup)

    left = [
        number
        for number, each in enumerate(trials)
        if not all(row.done or os.path.exists(os.path.join(row.folder, STOPPED)) for row in each.rows)
    ]
    if trials and not left:
        return []
    # The training task asks for its resources itself, and is restarted elsewhere if its node dies. Tune's actor, which
    # only waits for it, stays on the driver's node, because the sweep ends anyway if that node dies.
    beside = f"node:{ray.util.get_node_ip_address()}"
    trainable = tune.with_resources(one, tune.PlacementGroupFactory([{beside: 0.001}]))
    path = os.path.join(folder, "tune")
    if not trials and tune.Tuner.can_restore(path):
        tuner = tune.Tuner.restore(path, trainable, resume_unfinished=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={"trial": tune.grid_search(left)} if trials else tune_space(cfg),
            tune_config=_tune_config(cfg, placement, bool(trials)),
            run_config=tune.RunConfig(
                name="tune", storage_path=folder, verbose=0, callbacks=[_stopped(trials)] if trials else None
            ),
        )
    failed = []
    for result in tuner.fit():
        if result.error is not None:
            found = re.search(r"litevae\.errors\.UserError: (.*)", str(result.error), re.S)
            lines = str(result.error).strip().splitlines() or [repr(result.error)]
            failed.append(f"  {_shown(result.config, trials)}: {found[1].strip() if found else lines[-1]}")
    return failed


def _stopped(trials: list[Trial]) -> Any:
    """Return a callback of Tune that records which trainings the scheduler has stopped, so that none is resumed."""
    from ray import tune

    class RecordStopped(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            mine = given[trial.config["trial"]]
            if os.path.exists(os.path.join(mine.folder, TRAINED)):
                return
            at = {key: trial.last_result.get(key) for key in ("images", "psnr", "ssim")}
            for row in mine.rows:
                os.makedirs(row.folder, exist_ok=True)
                storage.put(os.path.join(row.folder, STOPPED), json.dumps(at).encode())
                print(f"{row.label}: stopped after {at['images']:,} images, psnr {at['psnr']:.4g}", flush=True)

    given = trials
    return RecordStopped()


def _tune_config(cfg: Sweep, placement: cluster.Placement, given: bool) -> Any:
    """Return Tune's config: search algorithm, scheduler and number of trials.

    Args:
        given: whether the trials are known beforehand, so that Tune does not draw points.

    Raises:
        UserError: if search=optuna, but the package is not installed.
    """
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining

    best: dict[str, Any] = {"metric": cfg.metric, "mode": "max"}
    total, every = training_lengths(cfg, cfg.train_vae)
    search = scheduler = None
    if cfg.search == "optuna":
        try:
            from ray.tune.search.optuna import OptunaSearch

            search = OptunaSearch(seed=cfg.seeds[0], **best)
        except (ImportError, AssertionError):
            raise UserError("search=optuna needs the package: pip install optuna") from None
    if cfg.scheduler == "asha":
        scheduler = ASHAScheduler(time_attr="images", grace_period=every, max_t=total + 1, reduction_factor=3, **best)
    elif cfg.scheduler == "pbt":
        # A value from a list stays in the list. A drawn value is changed by 20%, and `within` keeps it in its range.
        fields = dict(space_fields(cfg.space))
        scheduler = PopulationBasedTraining(
            time_attr="images",
            perturbation_interval=every,
            hyperparam_mutations={k: v if isinstance(v, list) else domain(v) for k, v in fields.items()},
            custom_explore_fn=partial(within, fields=fields),
            **best,
        )
    return tune.TuneConfig(
        search_alg=search,
        scheduler=scheduler,
        num_samples=1 if given else cfg.trials,
        max_concurrent_trials=placement.jobs,
        **({} if scheduler else best),
    )


def _best(results: list[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """Return the first seed's result of the row with the highest mean over its seeds; None if there is no such row."""
    values: dict[str, list[float]] = {}
    for result in results:
        values.setdefault(result["row"], []).append(result["metrics"][metric])
    means = {row: sum(found) / len(found) for row, found in values.items() if all(map(math.isfinite, found))}
    row = max(means, key=lambda name: means[name], default=None)
    return next((result for result in results if result["row"] == row), None)


def _shown(config: dict[str, Any] | None, trials: list[Trial]) -> str:
    """Return how messages name a trial: by its rows, or by its drawn values."""
    if config and "trial" in config:
        return " and ".join(row.label for row in trials[config["trial"]].rows)
    return ", ".join(f"{key}={value}" for key, value in (config or {}).items())


# --- the results -------------------------------------------------------------------------------------------


def _results(folder: str, trials: list[Trial], order: list[str]) -> list[dict[str, Any]]:
    """Return the results of the rows that are done.

    They come in the order of the table, or else of the points, or else of the rows' folders.
    """
    files = [os.path.join(row.folder, RESULT) for trial in trials for row in trial.rows]
    files = files or sorted(map(str, Path(folder, "rows").glob(f"*/{RESULT}")))
    found = [json.loads(Path(file).read_text()) for file in files if os.path.exists(file)]
    return sorted(found, key=lambda result: order.index(result["row"])) if order else found


def _report(cfg: Sweep, results: list[dict[str, Any]], folder: str) -> str:
    """Return the final report as text: the metrics of every row, unless the comparison shows them, and the files."""
    lines = [""]
    if not cfg.tracking.enabled:
        names = sorted({name for result in results for name in result["metrics"] if name.startswith(SHOWN)})
        rows = [["", *(name.removeprefix("eval/").removeprefix("reconstruction/") for name in names)]]
        for result in results:
            cells = [f"{result['metrics'][name]:.4g}" if name in result["metrics"] else "-" for name in names]
            rows.append([f"{result['row']}, seed {result['seed']}", *cells])
        lines += [tables.fitted(rows), ""]
    lines += sorted({remark for result in results for remark in result["remarks"]})
    lines.append(f"results  {folder}/results.json")
    if results:
        lines += [f"configs  {folder}/configs", f"best     {folder}/best.yaml (train_vae.py --config)"]
    return "\n".join([*lines, ""])


def _compare(cfg: Sweep, folder: str) -> None:
    """Write the comparison of the sweep's runs, if they are in MLflow."""
    if cfg.tracking.enabled:
        from pipelines.experiments.compare import compare

        out = os.path.join(folder, "comparison")
        where = {"root": cfg.root, "tracking": cfg.tracking.model_dump(), "out": out}
        try:
            compare(validate(Compare, where | {"sweep": cfg.name}))
        except UserError as error:  # only a warning, since all results are in results.json
            say(f"warning: the runs are not compared: {error}", "WARNING")
