"""Many trainings, each evaluated: a table of the paper, or points of any config fields, on Ray Tune.

A *row* is what is asked for (a table's row, or a point, with a seed); a *trial* (trial.py) is one training and the rows
that it serves. Trainings are kept under the hash of their config, in <root>/trained: a table that has one in common
with an earlier table evaluates it, and a sweep that was killed goes on where it was. In MLflow each row is a run below
the sweep's; it has the training's metrics and the evaluation's.
"""

import hashlib
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from litevae import storage
from litevae.errors import UserError
from litevae.perceptual import WeightsMissing, load_esrgan, load_lpips
from pipelines.data.config import Source as SourceConfig
from pipelines.data.source import Source
from pipelines.data.sources import open_source
from pipelines.encoding.config import Encode
from pipelines.evaluation import report
from pipelines.evaluation.config import Evaluate, EvaluateComplexity, EvaluateSamples, Sample
from pipelines.evaluation.generated import check_networks
from pipelines.experiments import paper, run_trial
from pipelines.experiments.config import Compare, Sweep
from pipelines.experiments.run_trial import RESULT, TRAINED, Row, Trial
from pipelines.runtime import cluster, mlflow_run, tables
from pipelines.runtime.logs import say
from pipelines.runtime.schema import Tracked, dump, validate, values_to_keep
from pipelines.training import checkpoint
from pipelines.training.config import TrainLDM, TrainVAE

# What may differ when a sweep goes on: rows and seeds are done one by one.
FREE = ("ray", "concurrent", "rows", "seeds", "data.loaders")
RESERVED = (
    "seed",
    "name",
    "root",
    "ray",
    "begin",
    "tracking",
    "data.train",
    "data.val",
)  # not of `train_vae` and `space`
NOT_WEIGHTS = (
    "name", "root", "ray", "data.loaders", "data.max_bad", "loop.log_every", "loop.keep", "loop.max_restarts",
    "loop.max_skipped", "loop.checkpoint_every",
)  # fmt: skip
DRAWS = ("uniform", "loguniform", "randint", "choice")
STOPPED = "stopped.json"  # in a row's folder: asha has stopped its training
NETWORKS = ("inception", "squeezenet", "backbone", "backbone_model")  # of the judge of samples
SHOWN = ("eval/params_m", "eval/reconstruction/", "eval/mmd/", "eval/fid", "eval/frechet/")


def sweep(cfg: Sweep) -> list[dict[str, Any]]:
    """Run the trials that are not done yet; leave results.json, configs/*.yaml, best.yaml and a comparison in
    <root>/<name>. Returns the results, a dict a row.

    Raises:
        UserError: bad config, or a config of a trial; another process is at work on this sweep; trials failed (after
            the others are done).
    """
    if bool(cfg.table) == bool(cfg.space):
        raise UserError("give either table=... (of the paper) or space.FIELD=... (fields of train_vae to vary)")
    if cfg.table and (cfg.search, cfg.scheduler) != ("grid", "none"):
        raise UserError("a table's rows are all trained to their end: search and scheduler are for space.FIELD=...")
    table = paper.table(cfg.table) if cfg.table else None
    name = cfg.name or (f"table-{table.name}-{cfg.scale}" if table else "sweep")
    root = cluster.output_path("root", cfg.root)
    sources = {name: _absolute(getattr(cfg.data, name)) for name in ("train", "val")}
    uri = mlflow_run.tracking_uri(cfg.tracking, root) if cfg.tracking.enabled else ""  # trainings have another root
    tracked = cfg.tracking.model_copy(update={"uri": uri})
    data = cfg.data.model_copy(update=sources)
    cfg = cfg.model_copy(update={"name": name, "root": root, "tracking": tracked, "data": data})
    folder = os.path.join(root, name)
    with checkpoint.claimed(folder):
        return _sweep(cfg, table, sources, folder)


def _sweep(cfg: Sweep, table: paper.Table | None, sources: dict[str, Any], folder: str) -> list[dict[str, Any]]:
    root, name = cfg.root, cfg.name
    if table and table.kind == "complexity":
        return _complexity(cfg, table, folder)
    if not cfg.data.train.uri or not cfg.data.val.uri:
        raise UserError("a sweep trains on data.train.uri=... and evaluates on data.val.uri=...")
    _check_fields(cfg)
    judge = validate(Evaluate, cfg.evaluate)
    report.networks(judge.inception, judge.squeezenet, judge.backbone, judge.backbone_model)
    trials, left_out = _of_table(cfg, table, folder) if table else (_of_space(cfg, folder), {})
    # A population that waits for each other's places would have nobody to learn from.
    share = cluster.start(cfg.ray, cfg.trials if cfg.scheduler == "pbt" else cfg.concurrent)
    cluster.check_folders({"root": root}, {f"data.{name}.uri": source.uri for name, source in sources.items()})
    checkpoint.open_run(folder, cfg, FREE)
    for row, train in ((row, each.train) for each in trials for row in each.rows):
        path = os.path.join(folder, "configs", f"{_slug(row.label)}.yaml")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        tables.write(path, dump(validate(TrainVAE, train)).encode())
    count = len(trials) or cfg.trials
    say(f"sweep {name}: {count} trainings, {share.jobs} at a time, {share.text}")
    for left, reason in left_out.items():
        say(f"left out: {left}: {reason}", "WARNING")
    lpips = validate(TrainVAE, cfg.train_vae).loss.lpips
    if lpips.weight and (reason := _load("lpips", lpips.net, lpips.weights)):
        say(f"warning: loss.lpips is off in all trainings: {reason}", "WARNING")
    run = mlflow_run.start_run(cfg.tracking, root, "sweep", name, cfg.model_dump(mode="json"), folder)
    status: mlflow_run.Status = "FAILED"
    try:
        failed = _tune(cfg, trials, share, run, folder)
        results = _results(folder, trials, [*table.rows] if table else [])
        tables.write(os.path.join(folder, "results.json"), json.dumps(results, indent=2).encode() + b"\n")
        if best := _best(results, f"eval/reconstruction/{cfg.metric}"):
            winner = values_to_keep(validate(TrainVAE, best["train_vae"] | {"name": f"{name}-best", "root": root}))
            tables.write(os.path.join(folder, "best.yaml"), yaml.safe_dump(winner, sort_keys=False).encode())
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
        again = "the same command goes on with them" if trials else "they are not tried again"
        raise UserError(f"{len(failed)} of {count} trials failed; {again}:\n" + "\n".join(failed))
    return results


def _complexity(cfg: Sweep, table: paper.Table, folder: str) -> list[dict[str, Any]]:
    """A table of what encoders cost: nothing is trained, and one job measures all rows, one after the other."""
    from pipelines.evaluation.cost import complexity

    rows = paper.chosen(table, cfg.rows)
    own = {"models": [row.model for row in rows], "out": os.path.join(folder, "complexity")}
    shared = {"root": cfg.root, "ray": cfg.ray.model_dump(mode="json"), "tracking": {"enabled": False}}
    parts = paper.at_scale(cfg.scale, "evaluate_complexity"), cfg.evaluate_complexity, own, shared
    job = validate(EvaluateComplexity, paper.merged(*parts))
    checkpoint.open_run(folder, cfg, FREE)
    run = mlflow_run.start_run(cfg.tracking, cfg.root, "sweep", cfg.name, cfg.model_dump(mode="json"), folder)
    status: mlflow_run.Status = "FAILED"
    try:
        found = complexity(job)["complexity"]
        results = []
        for row in rows:
            metrics = {f"eval/{name}": value for name, value in found[row.model].items()}
            mine = Row(row.name, cfg.seeds[0], os.path.join(folder, "rows", _slug(row.name)), {})
            where = run_trial.tracked(cfg, mine, run.run_id or "")
            values = job.model_dump(mode="json", exclude={"models", "tracking"}) | {"model": row.model}
            tracker = mlflow_run.Tracker(
                mlflow_run.start_run(where, cfg.root, "evaluate", row.name, values, mine.folder, resume=False), False
            )
            tracker.metrics(metrics, 0)
            tracker.close("FINISHED")
            results.append({"row": row.name, "seed": mine.seed, "metrics": metrics, "remarks": []})
        tables.write(os.path.join(folder, "results.json"), json.dumps(results, indent=2).encode() + b"\n")
        status = "FINISHED"
    finally:
        mlflow_run.finish(run, status)
    _compare(cfg, folder)
    return results


# --- what is to be trained --------------------------------------------------------------------------------------


def _of_table(cfg: Sweep, table: paper.Table, folder: str) -> tuple[list[Trial], dict[str, str]]:
    """Trials of a table, rows of one training together; and rows that can't be run here, with the reason."""
    left_out: dict[str, str] = {}
    trials: dict[str, Trial] = {}
    for row in paper.chosen(table, cfg.rows):
        values = paper.scaled(table, row, cfg.scale)
        train = paper.merged(values["train_vae"], cfg.train_vae)
        if reason := _missing(train, row.needs):
            left_out[row.name] = reason
            continue
        jobs = _jobs(cfg, values, table.kind)
        for seed in cfg.seeds:
            where = os.path.join(folder, "rows", _slug(f"{row.name}, seed {seed}"))
            _add(trials, Trial(_train(cfg, train, seed), [Row(row.name, seed, where, jobs, table.part)]))
    if not trials:
        raise UserError("; ".join(f"{row}: {reason}" for row, reason in left_out.items()))
    return list(trials.values()), left_out


def _of_space(cfg: Sweep, folder: str) -> list[Trial]:
    """The points of a grid or of a random search, with every seed; none where Tune draws them as it goes."""
    fields, by_tune = dict(_fields(cfg.space)), cfg.search == "optuna" or cfg.scheduler == "pbt"
    drawn = [key for key, values in fields.items() if isinstance(values, dict)]
    if cfg.search == "grid" and drawn and not by_tune:
        raise UserError(f"space.{drawn[0]} is drawn: set search=random or optuna, or give a list of values")
    if by_tune and len(cfg.seeds) > 1:
        raise UserError(f"seeds={cfg.seeds}: optuna and pbt take one seed")
    for key, values in fields.items():  # a wrong field or value is to be found before anything is trained
        for value in values if isinstance(values, list) else next(iter(values.values())):
            point(cfg, {key: value}, cfg.seeds[0], folder)
    if by_tune:
        return []
    if cfg.search == "grid":
        points = [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]
    else:
        generator = np.random.default_rng(cfg.seeds[0])
        points = [{key: _drawn(values, generator) for key, values in fields.items()} for _ in range(cfg.trials)]
    trials: dict[str, Trial] = {}
    for values in points:
        for seed in cfg.seeds:
            _add(trials, point(cfg, values, seed, folder))
    return list(trials.values())


def _add(trials: dict[str, Trial], new: Trial) -> None:
    """One training for rows that have it in common; a point that is drawn twice is one row."""
    known = trials.setdefault(new.train["name"], Trial(new.train))
    known.rows += [row for row in new.rows if row.folder not in [other.folder for other in known.rows]]


def point(cfg: Sweep, values: dict[str, Any], seed: int, folder: str, begin: str = "") -> Trial:
    """The trial of a point: values of dotted fields of train_vae, over `cfg.train_vae`.

    Args:
        begin: checkpoint of another training that this one goes on from.

    Raises:
        UserError: the values make no config of train_vae.
    """
    shown = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in values.items()}
    name = ", ".join(f"{key}={value}" for key, value in shown.items())
    train = _train(cfg, paper.merged(cfg.train_vae, _nested(values)), seed, begin)
    if begin:  # the same values, come to from elsewhere
        name += f" ({train['name']})"
    jobs = _jobs(cfg, {"evaluate": {"transform": {"resolution": train["stages"][-1]["resolution"]}}}, "vae")
    return Trial(train, [Row(name, seed, os.path.join(folder, "rows", train["name"]), jobs)])


def _train(cfg: Sweep, values: dict[str, Any], seed: int, begin: str = "") -> dict[str, Any]:
    """A complete TrainVAE's values, named by the hash of what matters to the weights."""
    own: dict[str, Any] = {"seed": seed, "begin": begin}
    if cfg.scheduler != "none" or cfg.search == "optuna":
        total, every = _lengths(cfg, values)
        own["loop"] = {"val_every": every, "checkpoint_every": every, "keep": 1 + total // every}
    config = validate(TrainVAE, paper.merged({"data": cfg.data.model_dump(mode="json")}, values, own))
    if config.loss.lpips.weight and _missing(values, "lpips"):  # as the training would; here it is part of the name
        values = paper.merged(values, {"loss": {"lpips": {"weight": 0.0}}})
        return _train(cfg, values, seed, begin)
    kept = values_to_keep(config)
    named = checkpoint.flatten(kept) | {f"data.{name}": _digest(cfg, name) for name in ("train", "val")}
    fields = {  # without what a training from before there was the field had anyway
        k: v for k, v in sorted(named.items()) if not _is(k, NOT_WEIGHTS) and (k, v) not in checkpoint.BEFORE.items()
    }
    digest = hashlib.sha256(json.dumps(fields).encode())
    return kept | {"name": f"vae-{digest.hexdigest()[:12]}", "root": os.path.join(cfg.root, "trained")}


def _is(field: str, names: Iterable[str]) -> bool:
    return any(field == name or field.startswith(name + ".") for name in names)


def _check_fields(cfg: Sweep) -> None:
    """
    Raises:
        UserError: a section would be overwritten by what the sweep itself sets.
    """
    searched = cfg.scheduler != "none" or cfg.search == "optuna"
    for section, values in (("train_vae", cfg.train_vae), ("space", _leaves(cfg.space))):
        for field in checkpoint.flatten(values):
            if _is(field, RESERVED):
                own = field.partition(".")[0]
                raise UserError(f"{section}.{field} is the sweep's own: set {'seeds' if own == 'seed' else own}")
            if searched and _is(field, ("loop.val_every", "loop.checkpoint_every", "loop.keep")):
                raise UserError(f"{section}.{field} follows from `every` where trials are looked at as they go")


def _leaves(space: dict[str, Any]) -> dict[str, Any]:
    return {key: 0 for key, _ in _fields(space)}


def _lengths(cfg: Sweep, values: dict[str, Any]) -> tuple[int, int]:
    """Images of a training, and between looks at it."""
    total = sum(stage.images for stage in validate(TrainVAE, values).stages)
    return total, cfg.every or -(-total // 8)


def _jobs(cfg: Sweep, values: dict[str, Any], kind: paper.Kind) -> dict[str, dict[str, Any]]:
    """Values of the jobs after the training, checked; what only the trial knows is still open."""
    val, train = (source.model_dump(mode="json") for source in (cfg.data.val, cfg.data.train))
    classes: dict[str, type[Tracked]] = {"evaluate": Evaluate}
    sources: dict[str, Any] = {"evaluate": {"source": val}}
    if kind == "ldm":
        classes |= {"encode_dataset": Encode, "train_ldm": TrainLDM}
        classes |= {"sample": Sample, "evaluate_samples": EvaluateSamples}
        sources |= {"encode_dataset": {"source": train}, "evaluate_samples": {"source": train}}
    shared = {"root": cfg.root, "tracking": {"enabled": False}}
    found = {}
    for job, cls in classes.items():
        parts = values.get(job, {}), sources.get(job, {}), getattr(cfg, job), shared
        found[job] = validate(cls, paper.merged(*parts)).model_dump(mode="json")
    if kind == "ldm":
        check_networks(*(found["evaluate_samples"][key] for key in NETWORKS))
    judged, units = found["evaluate"], _source(cfg, "val").units
    if "images" not in cfg.evaluate:  # a scale's number is at most
        judged["images"] = min(judged["images"], units)
    if judged["images"] > units:
        raise UserError(f"evaluate.images={judged['images']}, but {cfg.data.val.uri} has {units}; 0 takes all")
    judged["mmd_images"] = min(judged["mmd_images"], judged["images"] or units)
    return found


def _absolute(source: SourceConfig) -> SourceConfig:
    """The same, wherever it is read."""
    local = source.uri and not storage.remote(source.uri)
    return source.model_copy(update={"uri": os.path.abspath(source.uri)}) if local else source


def _source(cfg: Sweep, name: str) -> Source:
    """data.train or data.val, listed once."""
    return _listed(getattr(cfg.data, name).model_dump_json(), f"data.{name}")


@cache
def _listed(values: str, name: str) -> Source:
    return open_source(SourceConfig.model_validate_json(values), name)


def _digest(cfg: Sweep, name: str) -> str:
    return _source(cfg, name).digest


@cache
def _load(loss: str, net: str, weights: str) -> str:
    """What is said where a perceptual loss has no weights; empty where it has."""
    try:
        load_esrgan(weights) if loss == "esrgan" else load_lpips(net, weights)
    except WeightsMissing as error:
        return f"{error}: train_vae.loss.{loss}.weights=FILE"
    return ""


def _missing(values: dict[str, Any], loss: str) -> str:
    """Why what a row is about can't be trained here."""
    if not loss:
        return ""
    term = getattr(validate(TrainVAE, values).loss, loss)
    return _load(loss, getattr(term, "net", ""), term.weights)


def _fields(space: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted field, list of values or {kind of draw: arguments}).

    Raises:
        UserError: it is neither.
    """
    for key, value in space.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and value:
            yield name, [_number(item) for item in value]
        elif isinstance(value, dict) and len(value) == 1 and (draw := next(iter(value))) in DRAWS:
            arguments = value[draw]
            if isinstance(arguments, list):
                arguments = [_number(item) for item in arguments]
            if draw == "choice" and not (isinstance(arguments, list) and arguments):
                raise UserError(f"space.{name}: choice takes a list of values, not {arguments}")
            numbers = isinstance(arguments, list) and all(isinstance(item, int | float) for item in arguments)
            if draw != "choice" and not (numbers and len(arguments) == 2 and arguments[0] < arguments[1]):
                raise UserError(f"space.{name}: {draw} takes [least, largest], not {arguments}")
            if draw == "loguniform" and arguments[0] <= 0:
                raise UserError(f"space.{name}: loguniform takes numbers above 0, not {arguments}")
            yield name, {draw: arguments}
        elif isinstance(value, dict) and value:
            yield from _fields(value, f"{name}.")
        else:
            kinds = ", ".join(f"{{{draw}: [a, b]}}" for draw in DRAWS)
            raise UserError(f"space.{name}={value!r} is neither a list of values nor one of {kinds}")


def _number(value: Any) -> Any:
    """YAML takes 1e-4 for text."""
    exponent = isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)
    return float(value) if exponent else value


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        *parents, last = key.split(".")
        section = found
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return found


def _drawn(values: Any, generator: np.random.Generator) -> Any:
    """One value of a field, drawn."""
    kind, arguments = ("choice", values) if isinstance(values, list) else next(iter(values.items()))
    if kind == "choice":
        return arguments[generator.integers(len(arguments))]
    if kind == "randint":
        return int(generator.integers(arguments[0], arguments[1] + 1))
    low, high = np.log(arguments) if kind == "loguniform" else arguments
    value = generator.uniform(low, high)
    return float(np.exp(value) if kind == "loguniform" else value)


# --- on Ray Tune ------------------------------------------------------------------------------------------------


def _tune(cfg: Sweep, trials: list[Trial], share: cluster.Share, run: mlflow_run.RunHandle, folder: str) -> list[str]:
    """Run what is not done. Returns what is to be said of the trainings that failed.

    Of given trials those that are not done are run, which go on where they were; what Tune itself knows matters where
    it draws the points (optuna) or moves them (pbt), and only then its own state is restored.
    """
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output is not silent at verbose=0
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C is to end us, not only to end Tune's loop
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what fails is said below
    import ray.util
    from ray import tune

    setup = {
        "cfg": cfg.model_dump(mode="json"),
        "trials": [asdict(each) for each in trials],
        "parent": run.run_id or "",
        "folder": folder,
        "ray": cfg.ray.model_dump(mode="json")
        | {"cpus_per_worker": share.threads, "worker_labels": share.labels, "decode_labels": share.decode_labels},
        "cwd": os.getcwd(),
    }

    def one(values: dict[str, Any]) -> None:
        run_trial.run(values, setup)

    left = [
        number
        for number, each in enumerate(trials)
        if not all(row.done or os.path.exists(os.path.join(row.folder, STOPPED)) for row in each.rows)
    ]
    if trials and not left:
        return []
    # What trains asks for its resources itself, and is begun again elsewhere when its node dies; the process that waits
    # for it stays beside the driver, without which the sweep ends anyway.
    beside = f"node:{ray.util.get_node_ip_address()}"
    trainable = tune.with_resources(one, tune.PlacementGroupFactory([{beside: 0.001}]))
    path = os.path.join(folder, "tune")
    if not trials and tune.Tuner.can_restore(path):
        tuner = tune.Tuner.restore(path, trainable, resume_unfinished=True)
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={"trial": tune.grid_search(left)} if trials else _space(cfg),
            tune_config=_tune_config(cfg, share, bool(trials)),
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
    """A callback of Tune that notes which trainings the scheduler has stopped: they are not to go on."""
    from ray import tune

    class Stopped(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            mine = given[trial.config["trial"]]
            if os.path.exists(os.path.join(mine.folder, TRAINED)):
                return
            at = {key: trial.last_result.get(key) for key in ("images", "psnr", "ssim")}
            for row in mine.rows:
                os.makedirs(row.folder, exist_ok=True)
                tables.write(os.path.join(row.folder, STOPPED), json.dumps(at).encode())
                print(f"{row.label}: stopped after {at['images']:,} images, psnr {at['psnr']:.4g}", flush=True)

    given = trials
    return Stopped()


def _space(cfg: Sweep) -> dict[str, Any]:
    return {"seed": cfg.seeds[0]} | {key: _domain(values) for key, values in _fields(cfg.space)}


def _domain(values: Any) -> Any:
    """What Tune and Optuna draw a field from."""
    from ray import tune

    kind, arguments = ("choice", values) if isinstance(values, list) else next(iter(values.items()))
    if kind == "choice":
        return tune.choice(arguments)
    if kind == "randint":
        return tune.randint(arguments[0], arguments[1] + 1)
    return getattr(tune, kind)(*arguments)


def _tune_config(cfg: Sweep, share: cluster.Share, given: bool) -> Any:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining

    best: dict[str, Any] = {"metric": cfg.metric, "mode": "max"}
    total, every = _lengths(cfg, cfg.train_vae)
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
        # Values of a list stay in it; a drawn one is moved by a fifth, which is not to leave its range.
        fields = dict(_fields(cfg.space))
        scheduler = PopulationBasedTraining(
            time_attr="images",
            perturbation_interval=every,
            hyperparam_mutations={k: v if isinstance(v, list) else _domain(v) for k, v in fields.items()},
            custom_explore_fn=partial(_within, fields=fields),
            **best,
        )
    return tune.TuneConfig(
        search_alg=search,
        scheduler=scheduler,
        num_samples=1 if given else cfg.trials,
        max_concurrent_trials=share.jobs,
        **({} if scheduler else best),
    )


def _within(config: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Drawn values of a config, brought back into their ranges."""
    for key, values in fields.items():
        kind, arguments = ("choice", values) if isinstance(values, list) else next(iter(values.items()))
        if kind != "choice":
            value = min(max(config[key], arguments[0]), arguments[1])
            config[key] = round(value) if kind == "randint" else value
    return config


def _best(results: list[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """The first seed's result of the row that is best in the mean over its seeds."""
    values: dict[str, list[float]] = {}
    for result in results:
        values.setdefault(result["row"], []).append(result["metrics"][metric])
    means = {row: sum(found) / len(found) for row, found in values.items() if all(map(math.isfinite, found))}
    row = max(means, key=lambda name: means[name], default=None)
    return next((result for result in results if result["row"] == row), None)


def _shown(config: dict[str, Any] | None, trials: list[Trial]) -> str:
    if config and "trial" in config:
        return " and ".join(row.label for row in trials[config["trial"]].rows)
    return ", ".join(f"{key}={value}" for key, value in (config or {}).items())


# --- what comes of it -------------------------------------------------------------------------------------------


def _results(folder: str, trials: list[Trial], order: list[str]) -> list[dict[str, Any]]:
    """Of the rows that are done, in the table's order, else in that of the points or of their folders."""
    files = [os.path.join(row.folder, RESULT) for trial in trials for row in trial.rows]
    files = files or sorted(map(str, Path(folder, "rows").glob(f"*/{RESULT}")))
    found = [json.loads(Path(file).read_text()) for file in files if os.path.exists(file)]
    return sorted(found, key=lambda result: order.index(result["row"])) if order else found


def _report(cfg: Sweep, results: list[dict[str, Any]], folder: str) -> str:
    """For a person: the metrics of every row, unless the comparison shows them."""
    lines = [""]
    if not cfg.tracking.enabled:
        names = sorted({name for result in results for name in result["metrics"] if name.startswith(SHOWN)})
        rows = [["", *(name.removeprefix("eval/").removeprefix("reconstruction/") for name in names)]]
        for result in results:
            cells = [f"{result['metrics'][name]:.4g}" if name in result["metrics"] else "-" for name in names]
            rows.append([f"{result['row']}, seed {result['seed']}", *cells])
        lines += [tables.table(rows), ""]
    lines += sorted({remark for result in results for remark in result["remarks"]})
    lines.append(f"results  {folder}/results.json")
    if results:
        lines += [f"configs  {folder}/configs", f"best     {folder}/best.yaml (train_vae.py --config)"]
    return "\n".join([*lines, ""])


def _compare(cfg: Sweep, folder: str) -> None:
    if cfg.tracking.enabled:
        from pipelines.experiments.compare import compare

        out = os.path.join(folder, "comparison")
        where = {"root": cfg.root, "tracking": cfg.tracking.model_dump(), "out": out}
        try:
            compare(validate(Compare, where | {"sweep": cfg.name}))
        except UserError as error:  # all is done and in results.json
            print(f"warning: no comparison: {error}", flush=True)


def _slug(label: str) -> str:
    """A file's name. Two labels do not give one."""
    digest = hashlib.sha256(label.encode()).hexdigest()[:6]
    return f"{re.sub(r'[^A-Za-z0-9._=-]+', '-', label).strip('-')[:80]}-{digest}"
