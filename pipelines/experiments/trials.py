"""What a sweep trains and evaluates: trials and their rows, of a table of the paper or of points of a search space."""

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
from pipelines.data.source import Source
from pipelines.data.sources import open_source
from pipelines.encoding.config import Encode
from pipelines.evaluation.config import Evaluate, EvaluateSamples, Sample
from pipelines.evaluation.generated import check_networks
from pipelines.experiments import paper
from pipelines.experiments.config import Sweep
from pipelines.experiments.search_space import drawn_value, fields_of, nested
from pipelines.runtime.schema import Tracked, validate, values_to_keep
from pipelines.training import run_folder
from pipelines.training.config import TrainLDM, TrainVAE

TRAINED, RESULT = "trained.json", "result.json"  # in a training's and in a row's folder, when all of it is done


@dataclass
class Row:
    """One line of a sweep's result.

    Attributes:
        jobs: values of the jobs after the training.
        part: of the autoencoder, whose parameters are counted.
    """

    name: str
    seed: int
    folder: str
    jobs: dict[str, dict[str, Any]]
    part: str = "encoder"

    @property
    def label(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def done(self) -> bool:
        return os.path.exists(os.path.join(self.folder, RESULT))


@dataclass
class Trial:
    """
    Attributes:
        train: a complete TrainVAE's values; its name is a hash of them.
    """

    train: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    @property
    def folder(self) -> str:
        return os.path.join(self.train["root"], self.train["name"])


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
FEATURE_NETWORK_FIELDS = ("inception", "squeezenet", "backbone", "backbone_model")  # of the judge of samples


def trials_of_table(cfg: Sweep, table: paper.Table, folder: str) -> tuple[list[Trial], dict[str, str]]:
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
            where = os.path.join(folder, "rows", slug(f"{row.name}, seed {seed}"))
            _add(trials, Trial(_train(cfg, train, seed), [Row(row.name, seed, where, jobs, table.part)]))
    if not trials:
        raise UserError("; ".join(f"{row}: {reason}" for row, reason in left_out.items()))
    return list(trials.values()), left_out


def trials_of_space(cfg: Sweep, folder: str) -> list[Trial]:
    """The points of a grid or of a random search, with every seed; none where Tune draws them as it goes."""
    fields, by_tune = dict(fields_of(cfg.space)), cfg.search == "optuna" or cfg.scheduler == "pbt"
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
        points = [{key: drawn_value(values, generator) for key, values in fields.items()} for _ in range(cfg.trials)]
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
    train = _train(cfg, paper.merged(cfg.train_vae, nested(values)), seed, begin)
    if begin:  # the same values, come to from elsewhere
        name += f" ({train['name']})"
    jobs = _jobs(cfg, {"evaluate": {"transform": {"resolution": train["stages"][-1]["resolution"]}}}, "vae")
    return Trial(train, [Row(name, seed, os.path.join(folder, "rows", train["name"]), jobs)])


def _train(cfg: Sweep, values: dict[str, Any], seed: int, begin: str = "") -> dict[str, Any]:
    """A complete TrainVAE's values, named by the hash of what matters to the weights."""
    own: dict[str, Any] = {"seed": seed, "begin": begin}
    if cfg.scheduler != "none" or cfg.search == "optuna":
        total, every = training_lengths(cfg, values)
        own["loop"] = {"val_every": every, "checkpoint_every": every, "keep": 1 + total // every}
    config = validate(TrainVAE, paper.merged({"data": cfg.data.model_dump(mode="json")}, values, own))
    if config.loss.lpips.weight and _missing(values, "lpips"):  # as the training would; here it is part of the name
        values = paper.merged(values, {"loss": {"lpips": {"weight": 0.0}}})
        return _train(cfg, values, seed, begin)
    kept = values_to_keep(config)
    named = run_folder.flatten(kept) | {f"data.{name}": _digest(cfg, name) for name in ("train", "val")}
    fields = {  # without what a training from before there was the field had anyway
        k: v for k, v in sorted(named.items()) if not _is(k, NOT_WEIGHTS) and (k, v) not in run_folder.BEFORE.items()
    }
    digest = hashlib.sha256(json.dumps(fields).encode())
    return kept | {"name": f"vae-{digest.hexdigest()[:12]}", "root": os.path.join(cfg.root, "trained")}


def _is(field: str, names: Iterable[str]) -> bool:
    return any(field == name or field.startswith(name + ".") for name in names)


def check_fields(cfg: Sweep) -> None:
    """
    Raises:
        UserError: a section would be overwritten by what the sweep itself sets.
    """
    searched = cfg.scheduler != "none" or cfg.search == "optuna"
    for section, values in (("train_vae", cfg.train_vae), ("space", _leaves(cfg.space))):
        for name in run_folder.flatten(values):
            if _is(name, RESERVED):
                own = name.partition(".")[0]
                raise UserError(f"{section}.{name} is the sweep's own: set {'seeds' if own == 'seed' else own}")
            if searched and _is(name, ("loop.val_every", "loop.checkpoint_every", "loop.keep")):
                raise UserError(f"{section}.{name} follows from `every` where trials are looked at as they go")


def _leaves(space: dict[str, Any]) -> dict[str, Any]:
    return {key: 0 for key, _ in fields_of(space)}


def training_lengths(cfg: Sweep, values: dict[str, Any]) -> tuple[int, int]:
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
        check_networks(*(found["evaluate_samples"][key] for key in FEATURE_NETWORK_FIELDS))
    judged, units = found["evaluate"], _source(cfg, "val").units
    if "images" not in cfg.evaluate:  # a scale's number is at most
        judged["images"] = min(judged["images"], units)
    if judged["images"] > units:
        raise UserError(f"evaluate.images={judged['images']}, but {cfg.data.val.uri} has {units}; 0 takes all")
    judged["mmd_images"] = min(judged["mmd_images"], judged["images"] or units)
    return found


def _source(cfg: Sweep, name: str) -> Source:
    """data.train or data.val, listed once."""
    return _listed(getattr(cfg.data, name).model_dump_json(), f"data.{name}")


@cache
def _listed(values: str, name: str) -> Source:
    return open_source(SourceConfig.model_validate_json(values), name)


def _digest(cfg: Sweep, name: str) -> str:
    return _source(cfg, name).digest


@cache
def load_network(loss: str, net: str, weights: str) -> str:
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
    return load_network(loss, getattr(term, "net", ""), term.weights)


def slug(label: str) -> str:
    """A file's name. Two labels do not give one."""
    digest = hashlib.sha256(label.encode()).hexdigest()[:6]
    return f"{re.sub(r'[^A-Za-z0-9._=-]+', '-', label).strip('-')[:80]}-{digest}"
