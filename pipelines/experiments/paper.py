"""The paper's tables as data: the numbers that it prints, and the configs of the runs behind them (paper.yaml)."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from litevae.errors import UserError

DATA = Path(__file__).with_name("paper.yaml")
STEP = 16  # images a step of the paper's (Appendix F)
JOBS = ("train_vae", "evaluate", "encode_dataset", "train_ldm", "sample", "evaluate_samples")

Kind = Literal["vae", "ldm", "complexity"]
Values = dict[str, Any]  # of a config, nested


@dataclass(frozen=True)
class Row:
    """
    Attributes:
        paper: the printed numbers, by metric.
        schedule: (resolution, steps of 16 images) of each stage.
        at: resolution of the evaluation.
        values: of each job's config.
        model: of a complexity table: the encoder.
        needs: the loss whose weights have to be there, as the row is about it.
    """

    name: str
    paper: dict[str, float]
    schedule: list[tuple[int, int]] = field(default_factory=list)
    at: int = 256
    values: dict[str, Values] = field(default_factory=dict)
    model: str = ""
    needs: str = ""


@dataclass(frozen=True)
class Table:
    """
    Attributes:
        kind: vae: autoencoders are trained and evaluated; ldm: and a diffusion model each; complexity: nothing is
            trained.
        scales: factors of the evaluation's resolution that it is repeated at.
        part: of the autoencoder, whose parameters `params_m` counts.
    """

    name: str
    title: str
    kind: Kind
    metrics: list[str]
    rows: dict[str, Row]
    scales: list[float] = field(default_factory=list)
    part: str = "encoder"


@cache
def tables() -> dict[str, Table]:
    data = _data()
    return {name: _table(name, table, data["settings"]) for name, table in data["tables"].items()}


def table(name: str) -> Table:
    """
    Raises:
        UserError: the paper has no such table of results.
    """
    found = tables().get(name.lower().removeprefix("table-").removeprefix("t") if name else "")
    if found is None:
        raise UserError(f"table={name}: there are {', '.join(tables())}")
    return found


def chosen(table: Table, patterns: list[str]) -> list[Row]:
    """Rows whose name is, or matches (*, ?), one of the patterns; all where there are none.

    Raises:
        UserError: a pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in table.rows):
            raise UserError(f"rows: table {table.name} has no {pattern!r}; it has {', '.join(table.rows)}")
    return [row for name, row in table.rows.items() if not patterns or any(fnmatchcase(name, p) for p in patterns)]


def scaled(table: Table, row: Row, scale: str) -> dict[str, Values]:
    """Values of each job's config for a row at a scale: architecture, losses, stages, sizes; no data, no names."""
    how = _data()["scales"][scale]
    size = how["resolution"]

    def pixels(resolution: float) -> int:
        return max(32, round(resolution * size) // 8 * 8)

    batch = how["batch"]
    stages = []
    for resolution, steps in row.schedule:
        count = max(2, round(steps * how["steps"] * STEP / batch))  # so that what the first one gives is used
        stages.append({"resolution": pixels(resolution), "images": count * batch, "batch_size": batch})
    total = sum(stage["images"] for stage in stages)
    evaluate: Values = {"transform": {"resolution": pixels(row.at)}}
    if table.scales:
        evaluate["resolutions"] = sorted({pixels(row.at * factor) for factor in table.scales} - {pixels(row.at)})
    train: Values = {"stages": stages}
    if how["discriminator"] is not None:
        train["loss"] = {"adversarial": {"start": round(total * how["discriminator"])}}
    if row.values.get("train_vae", {}).get("model", {}).get("aggregator") == "vit":
        train["model"] = {"vit_grid": stages[0]["resolution"] // 8}
    mine: dict[str, Values] = {
        "train_vae": train,
        "evaluate": evaluate,
        "encode_dataset": {"transform": {"resolution": pixels(row.at)}},
        "evaluate_samples": {"transform": {"resolution": pixels(row.at)}},
    }
    return {job: merged(row.values.get(job, {}), at_scale(scale, job), mine.get(job, {})) for job in JOBS}


def at_scale(scale: str, job: str) -> Values:
    """What a scale sets of a job's config."""
    return _data()["scales"][scale].get(job, {})


def merged(*parts: Values) -> Values:
    """Nested values, later ones before earlier ones."""
    found: Values = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, dict) and isinstance(found.get(key), dict)
            found[key] = merged(found[key], value) if both else value
    return found


@cache
def _data() -> dict[str, Any]:
    return yaml.safe_load(DATA.read_text())


def _table(name: str, data: dict[str, Any], settings: dict[str, Any]) -> Table:
    metrics = data["metrics"]
    rows = {}
    for row, own in data["rows"].items():
        parts = [settings[setting] for setting in [*data.get("is", []), *own.get("is", [])]]
        whole = merged(*parts, {job: data[job] for job in JOBS if job in data}, own)
        rows[row] = Row(
            row,
            dict(zip(metrics, own.get("paper", []), strict=True)),
            [(resolution, steps) for resolution, steps in whole.get("schedule", [])],
            whole.get("at", 256),
            {job: whole[job] for job in JOBS if job in whole},
            own.get("model", ""),
            own.get("needs", ""),
        )
    more = {key: data[key] for key in ("scales", "part") if key in data}
    return Table(name, data["title"], data.get("kind", "vae"), metrics, rows, **more)
