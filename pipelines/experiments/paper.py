"""The paper's tables as data (paper.yaml): the printed numbers, and the configs of the runs behind them."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from litevae.errors import UserError
from pipelines.runtime.schema import merged

DATA = Path(__file__).with_name("paper.yaml")
STEP = 16  # images per step in the paper (Appendix F)
JOBS = ("train_vae", "evaluate", "encode_dataset", "train_ldm", "sample", "evaluate_samples")

Kind = Literal["vae", "ldm", "complexity"]
Values = dict[str, Any]  # nested values of a config


@dataclass(frozen=True)
class PaperRow:
    """One row of a table.

    Attributes:
        name: the row's name.
        paper: the printed numbers, by metric.
        schedule: (resolution in pixels, steps of 16 images) of each training stage.
        at: resolution of the evaluation in pixels.
        values: values of each job's config, by job.
        model: the encoder, in a complexity table.
        needs: the loss that the row is about, whose weights must be present; "": none.
    """

    name: str
    paper: dict[str, float]
    schedule: list[tuple[int, int]] = field(default_factory=list)
    at: int = 256
    values: dict[str, Values] = field(default_factory=dict)
    model: str = ""
    needs: str = ""


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        name: the table's number or name.
        title: what the table shows.
        kind: "vae": autoencoders are trained and evaluated; "ldm": for each of them a diffusion model too;
            "complexity": nothing is trained.
        metrics: keys of the printed metrics.
        rows: the rows by name.
        scales: factors of the evaluation's resolution at which the evaluation is repeated.
        part: the part of the autoencoder whose parameters `params_m` counts.
    """

    name: str
    title: str
    kind: Kind
    metrics: list[str]
    rows: dict[str, PaperRow]
    scales: list[float] = field(default_factory=list)
    part: str = "encoder"


@cache
def tables() -> dict[str, PaperTable]:
    """Return the paper's tables by name."""
    data = _data()
    return {name: _table(name, table, data["settings"]) for name, table in data["tables"].items()}


def table(name: str) -> PaperTable:
    """Return a table of the paper; "9", "t9" and "table-9" name the same one.

    Raises:
        UserError: if the paper has no such table of results.
    """
    found = tables().get(name.lower().removeprefix("table-").removeprefix("t") if name else "")
    if found is None:
        raise UserError(f"table={name} does not exist; there are {', '.join(tables())}")
    return found


def chosen(table: PaperTable, patterns: list[str]) -> list[PaperRow]:
    """Return the rows whose names match one of the patterns (with * and ?), or all rows if there are no patterns.

    Raises:
        UserError: if a pattern matches no row.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in table.rows):
            raise UserError(f"rows: table {table.name} has no {pattern!r}; it has {', '.join(table.rows)}")
    return [row for name, row in table.rows.items() if not patterns or any(fnmatchcase(name, p) for p in patterns)]


def scaled(table: PaperTable, row: PaperRow, scale: str) -> dict[str, Values]:
    """Return the values of each job's config for a row at a scale.

    They give architecture, losses, stages and sizes, but no data and no names.

    Args:
        table: the row's table.
        row: the row.
        scale: "paper", "small" or "smoke", as in the config `Sweep`.
    """
    how = _data()["scales"][scale]
    size = how["resolution"]

    def pixels(resolution: float) -> int:
        return max(32, round(resolution * size) // 8 * 8)

    batch = how["batch"]
    stages = []
    for resolution, steps in row.schedule:
        # At least two steps, so that the second one uses the result of the first.
        count = max(2, round(steps * how["steps"] * STEP / batch))
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
    """Return the values of a job's config that a scale sets."""
    return _data()["scales"][scale].get(job, {})


@cache
def _data() -> dict[str, Any]:
    return yaml.safe_load(DATA.read_text())


def _table(name: str, data: dict[str, Any], settings: dict[str, Any]) -> PaperTable:
    """Make a table from its entry in paper.yaml; its rows inherit the named settings and the table's own values."""
    metrics = data["metrics"]
    rows = {}
    for row, own in data["rows"].items():
        parts = [settings[setting] for setting in [*data.get("is", []), *own.get("is", [])]]
        whole = merged(*parts, {job: data[job] for job in JOBS if job in data}, own)
        rows[row] = PaperRow(
            row,
            dict(zip(metrics, own.get("paper", []), strict=True)),
            [(resolution, steps) for resolution, steps in whole.get("schedule", [])],
            whole.get("at", 256),
            {job: whole[job] for job in JOBS if job in whole},
            own.get("model", ""),
            own.get("needs", ""),
        )
    more = {key: data[key] for key in ("scales", "part") if key in data}
    return PaperTable(name, data["title"], data.get("kind", "vae"), metrics, rows, **more)
