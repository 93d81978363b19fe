"""The trials of a sweep and their rows, from a table of the paper or from points of a search space."""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from litevae.errors import UserError
from litevae.perceptual import WeightsMissing, load_esrgan, load_lpips
from pipelines.data.config import Source as SourceConfig
from pipelines.data.open_source import open_source
from pipelines.data.source import Source
from pipelines.encoding.config import Encode
from pipelines.evaluation.config import Evaluate, EvaluateSamples, Sample
from pipelines.evaluation.generated import check_networks
from pipelines.experiments import paper
from pipelines.experiments.config import Sweep
from pipelines.experiments.search_space import drawn_value, nested, space_fields
from pipelines.runtime.schema import Tracked, merged, validate, values_to_keep
from pipelines.training import run_folder
from pipelines.training.config import TrainLDM, TrainVAE

TRAINED, RESULT = "trained.json", "result.json"  # in a training's, or a row's, folder when it is done


@dataclass(frozen=True)
class TrialRow:
    """One row of a sweep's results.

    Attributes:
        name: the row's name, without the seed.
        seed: the seed of the training.
        folder: the row's folder.
        jobs: the config values of each job after the training, by job.
        part: the part of the autoencoder whose parameters are counted.
    """

    name: str
    seed: int
    folder: str
    jobs: dict[str, dict[str, Any]]
    part: str = "encoder"

    @property
    def label(self) -> str:
        """The row's name with its seed."""
        return f"{self.name}, seed {self.seed}"

    @property
    def done(self) -> bool:
        """Whether the row's result has been written."""
        return os.path.exists(os.path.join(self.folder, RESULT))


@dataclass(frozen=True)
class Trial:
    """One training and the rows that use it.

    Attributes:
        train: all values of the training's config (TrainVAE); its `name` contains a hash of them.
        rows: the rows that evaluate this training.
    """

    train: dict[str, Any]
    rows: list[TrialRow] = field(default_factory=list)

    @property
    def folder(self) -> str:
        """The training's run folder."""
        return os.path.join(self.train["root"], self.train["name"])


@dataclass(frozen=True)
class TrainedModel:
    """A training that is done, as its file `TRAINED` stores it.

    Attributes:
        folder: the training's run folder.
        model: the model folder.
        metrics: the training's last metrics.
        row: the folder of the row that trained it.
    """

    folder: str
    model: str
    metrics: dict[str, float]
    row: str


@dataclass(frozen=True)
class SweepSetup:
    """What all trials of a sweep share, as the driver gives it to them.

    Attributes:
        cfg: all values of the sweep's config.
        trials: the trials that are known beforehand; none if Tune draws the points.
        parent: id of the sweep's MLflow run; "": none.
        folder: the sweep's folder.
        ray: values of the `ray` section of each trial's jobs.
        cwd: the driver's working folder, where relative paths begin.
    """

    cfg: dict[str, Any]
    trials: list[Trial]
    parent: str
    folder: str
    ray: dict[str, Any]
    cwd: str


# Fields that `train_vae` and `space` may not set.
RESERVED = (
    "seed",
    "name",
    "root",
    "ray",
    "begin",
    "tracking",
    "data.train",
    "data.val",
)
# Fields that do not change the trained weights; they are not part of a training's hash.
NOT_WEIGHTS = (
    "name", "root", "ray", "yes", "data.loaders", "data.max_bad", "loss.lpips.required", "loop.log_every", "loop.keep",
    "loop.max_restarts", "loop.max_skipped", "loop.checkpoint_every",
)  # fmt: skip
# Fields of evaluate_samples that name feature networks.
FEATURE_NETWORK_FIELDS = ("inception", "squeezenet", "backbone", "backbone_model")


def trials_of_table(cfg: Sweep, table: paper.PaperTable, folder: str) -> tuple[list[Trial], dict[str, str]]:
    """Make the trials of a table; rows that share a training are in one trial.

    Returns:
        The trials, and the rows that cannot be run on this machine with the reason for each.

    Raises:
        UserError: if no row can be run.
    """
    left_out: dict[str, str] = {}
    trials: dict[str, Trial] = {}
    for row in paper.chosen(table, cfg.rows):
        values = paper.scaled(table, row, cfg.scale)
        train = merged(values["train_vae"], cfg.train_vae)
        if reason := _missing(train, row.needs):
            left_out[row.name] = reason
            continue
        jobs = _jobs(cfg, values, table.kind)
        for seed in cfg.seeds:
            where = os.path.join(folder, "rows", slug(f"{row.name}, seed {seed}"))
            _add(trials, Trial(_train(cfg, train, seed), [TrialRow(row.name, seed, where, jobs, table.part)]))
    if not trials:
        raise UserError("; ".join(f"{row}: {reason}" for row, reason in left_out.items()))
    return list(trials.values()), left_out


def trials_of_space(cfg: Sweep, folder: str) -> list[Trial]:
    """Make the trials of a grid or a random search, each point with every seed.

    Returns:
        The trials; none if Tune draws the points during the sweep (optuna, pbt).

    Raises:
        UserError: if a field or a value is wrong, or the space or the seeds do not fit the search.
    """
    fields, by_tune = dict(space_fields(cfg.space)), cfg.search == "optuna" or cfg.scheduler == "pbt"
    drawn = [key for key, values in fields.items() if isinstance(values, dict)]
    if cfg.search == "grid" and drawn and not by_tune:
        raise UserError(f"space.{drawn[0]} is a distribution: set search=random or optuna, or give a list of values")
    if by_tune and len(cfg.seeds) > 1:
        raise UserError(f"seeds={cfg.seeds}: optuna and pbt need exactly one seed")
    for key, values in fields.items():  # find wrong fields and values before anything is trained
        for value in values if isinstance(values, list) else next(iter(values.values())):
            point(cfg, {key: value}, cfg.seeds[0], folder)
    if by_tune:
        return []
    if cfg.search == "grid":
        points = [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]
    else:
        generator = np.random.default_rng(cfg.seeds[0])
        points = [{key: drawn_value(values, generator) for key, values in fields.items()} for _ in range(cfg.trials)]
    trials: dict[str, Trial] = {}
    for values in points:
        for seed in cfg.seeds:
            _add(trials, point(cfg, values, seed, folder))
    return list(trials.values())


def _add(trials: dict[str, Trial], new: Trial) -> None:
    """Add a trial; rows with the same training share one trial, and a point that is drawn twice is one row."""
    known = trials.setdefault(new.train["name"], Trial(new.train))
    known.rows.extend(row for row in new.rows if row.folder not in [other.folder for other in known.rows])


def point(cfg: Sweep, values: dict[str, Any], seed: int, folder: str, begin: str = "") -> Trial:
    """Make the trial of one point of a search space.

    Args:
        cfg: the sweep's config.
        values: values of train_vae's fields by dotted name; they override `cfg.train_vae`.
        seed: the training's seed.
        folder: the sweep's folder.
        begin: checkpoint of another training from which this one continues; "": none.

    Raises:
        UserError: if the values are not a valid config of train_vae, or if LPIPS is required and has no weights.
    """
    shown = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in values.items()}
    name = ", ".join(f"{key}={value}" for key, value in shown.items())
    train = _train(cfg, merged(cfg.train_vae, nested(values)), seed, begin)
    if begin:  # other trials may have the same values but another checkpoint to begin with
        name += f" ({train['name']})"
    jobs = _jobs(cfg, {"evaluate": {"transform": {"resolution": train["stages"][-1]["resolution"]}}}, "vae")
    return Trial(train, [TrialRow(name, seed, os.path.join(folder, "rows", train["name"]), jobs)])


def _train(cfg: Sweep, values: dict[str, Any], seed: int, begin: str = "") -> dict[str, Any]:
    """Return all values of a TrainVAE, named by a hash of the data and of the fields that change the weights."""
    own: dict[str, Any] = {"seed": seed, "begin": begin}
    if cfg.scheduler != "none" or cfg.search == "optuna":
        total, every = training_lengths(cfg, values)
        own["loop"] = {"val_every": every, "checkpoint_every": every, "keep": 1 + total // every}
    config = validate(TrainVAE, merged({"data": cfg.data.model_dump(mode="json")}, values, own))
    # Without LPIPS weights the training would switch the term off. It is done here so that the name's hash shows it.
    if config.loss.lpips.weight and (reason := _missing(values, "lpips")):
        if config.loss.lpips.required:
            raise UserError(
                f"the trainings use LPIPS: {reason}. Fetch the weights with `make weights`, or train all without "
                f"LPIPS, which gives other results: train_vae.loss.lpips.required=false"
            )
        values = merged(values, {"loss": {"lpips": {"weight": 0.0}}})
        return _train(cfg, values, seed, begin)
    kept = values_to_keep(config)
    named = run_folder.flatten(kept) | {f"data.{name}": _digest(cfg, name) for name in ("train", "val")}
    fields = {  # without values that a training had before the field existed, so that its hash stays the same
        k: v
        for k, v in sorted(named.items())
        if not _is(k, NOT_WEIGHTS) and (k, v) not in run_folder.EARLIER_DEFAULTS.items()
    }
    digest = hashlib.sha256(json.dumps(fields).encode())
    return kept | {"name": f"vae-{digest.hexdigest()[:12]}", "root": os.path.join(cfg.root, "trained")}


def _is(field: str, names: Iterable[str]) -> bool:
    """Return whether a dotted field is, or lies in, one of the named fields or sections."""
    return any(field == name or field.startswith(name + ".") for name in names)


def check_fields(cfg: Sweep) -> None:
    """Check that `train_vae` and `space` set no field that the sweep itself sets.

    Raises:
        UserError: if they set such a field.
    """
    searched = cfg.scheduler != "none" or cfg.search == "optuna"
    for section, values in (("train_vae", cfg.train_vae), ("space", _leaves(cfg.space))):
        for name in run_folder.flatten(values):
            if _is(name, RESERVED):
                own = name.partition(".")[0]
                raise UserError(
                    f"{section}.{name} is set by the sweep; set the sweep's {'seeds' if own == 'seed' else own} instead"
                )
            if searched and _is(name, ("loop.val_every", "loop.checkpoint_every", "loop.keep")):
                raise UserError(
                    f"{section}.{name} is set by the sweep (from `every`) when search=optuna or a scheduler is used; "
                    f"leave it out"
                )


def _leaves(space: dict[str, Any]) -> dict[str, Any]:
    """Return the dotted names of a space's fields as keys, each with the value 0."""
    return {key: 0 for key, _ in space_fields(space)}


def training_lengths(cfg: Sweep, values: dict[str, Any]) -> tuple[int, int]:
    """Return the number of images of a training, and the number of images between its validations."""
    total = sum(stage.images for stage in validate(TrainVAE, values).stages)
    return total, cfg.every or -(-total // 8)


def _jobs(cfg: Sweep, values: dict[str, Any], kind: paper.Kind) -> dict[str, dict[str, Any]]:
    """Return the validated config values of each job after the training.

    Values that only the trial knows, such as the model's folder, are not set yet.

    Raises:
        UserError: if a config is wrong, or a network's weights are missing.
    """
    val, train = (source.model_dump(mode="json") for source in (cfg.data.val, cfg.data.train))
    classes: dict[str, type[Tracked]] = {"evaluate": Evaluate}
    sources: dict[str, Any] = {"evaluate": {"source": val}}
    if kind == "ldm":
        classes["encode_dataset"], classes["train_ldm"] = Encode, TrainLDM
        classes["sample"], classes["evaluate_samples"] = Sample, EvaluateSamples
        sources |= {"encode_dataset": {"source": train}, "evaluate_samples": {"source": train}}
    shared = {"root": cfg.root, "tracking": {"enabled": False}}
    found = {}
    for job, cls in classes.items():
        parts = values.get(job, {}), sources.get(job, {}), getattr(cfg, job), shared
        found[job] = validate(cls, merged(*parts)).model_dump(mode="json")
    if kind == "ldm":
        check_networks(*(found["evaluate_samples"][key] for key in FEATURE_NETWORK_FIELDS))
    judged, units = found["evaluate"], _source(cfg, "val").units
    if "images" not in cfg.evaluate:  # the number that a scale sets is only an upper limit
        judged["images"] = min(judged["images"], units)
    if judged["images"] > units:
        raise UserError(f"evaluate.images={judged['images']}, but {cfg.data.val.uri} has {units}; 0 takes all")
    judged["mmd_images"] = min(judged["mmd_images"], judged["images"] or units)
    return found


def _source(cfg: Sweep, name: str) -> Source:
    """Open data.train or data.val; the source is listed only once."""
    return _listed(getattr(cfg.data, name).model_dump_json(), f"data.{name}")


@cache
def _listed(values: str, name: str) -> Source:
    return open_source(SourceConfig.model_validate_json(values), name)


def _digest(cfg: Sweep, name: str) -> str:
    return _source(cfg, name).digest


@cache
def load_network(loss: str, net: str, weights: str) -> str:
    """Return the message for a perceptual loss whose weights are missing; "" if they are present.

    Args:
        loss: "esrgan" or "lpips".
        net: the backbone of LPIPS.
        weights: path of the backbone's weights; "": torch hub's cache.
    """
    try:
        load_esrgan(weights) if loss == "esrgan" else load_lpips(net, weights)
    except WeightsMissing as error:
        return f"{error}: train_vae.loss.{loss}.weights=FILE"
    return ""


def _missing(values: dict[str, Any], loss: str) -> str:
    """Return why a perceptual loss cannot be used on this machine; "" if it can, or if `loss` is ""."""
    if not loss:
        return ""
    term = getattr(validate(TrainVAE, values).loss, loss)
    return load_network(loss, getattr(term, "net", ""), term.weights)


def slug(label: str) -> str:
    """Turn a label into a file name; a hash keeps the names of different labels apart."""
    digest = hashlib.sha256(label.encode()).hexdigest()[:6]
    return f"{re.sub(r'[^A-Za-z0-9._=-]+', '-', label).strip('-')[:80]}-{digest}"
