"""Render a comparison as text, Markdown, JSON, or one HTML page that needs neither a server nor a network."""

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2

from pipelines.experiments.charts import IMAGES, chart, style, thinned
from pipelines.experiments.comparison import Cell, Comparison
from pipelines.runtime import tables

BEST = " *"


def report(result: Comparison) -> str:
    """Return the comparison as text for a terminal."""
    head = [result.title, f"baseline: {result.baseline}"]
    blocks = [f"{title}\n{tables.fitted(rows)}" for title, rows in _tables(result)]
    return "\n\n".join(
        ["\n".join(head), *blocks, "\n".join(textwrap.fill(remark, tables.WIDTH) for remark in result.remarks)]
    )


def markdown(result: Comparison) -> str:
    """Return the comparison as Markdown, with the best values in bold."""

    def escaped(text: str) -> str:
        return re.sub(r"([\\`*_\[\]|<>])", r"\\\1", text)

    def lines(rows: list[list[str]]) -> str:
        cells = [
            [f"**{cell[:-2]}**" if cell.endswith(BEST) else escaped(cell.rstrip()) for cell in row] for row in rows
        ]
        cells.insert(1, [":--", *["--:"] * (len(cells[0]) - 1)])
        return "\n".join(f"| {' | '.join(row)} |" for row in cells)

    blocks = [f"## {escaped(title)}\n\n{lines(rows)}" for title, rows in _tables(result)]
    notes = "\n".join(f"- {escaped(remark)}" for remark in result.remarks)
    return "\n\n".join([f"# {escaped(result.title)}", f"Baseline: {escaped(result.baseline)}", *blocks, notes]) + "\n"


def _tables(result: Comparison) -> list[tuple[str, list[list[str]]]]:
    """Return (title, rows) of a table for each metric, and of one table for the parameters that differ."""
    found, states = [], [f" ({row.state})" if row.state and row.state not in row.name else "" for row in result.rows]
    names = [row.name + state for row, state in zip(result.rows, states, strict=True)]
    for number, metric in enumerate(result.metrics):
        cells = [row.cells[number] for row in result.rows]
        columns = {
            "value": [metric.text(cell.mean) + (BEST if cell.best else "  ") for cell in cells],
            "±": [_spread(cell.std) for cell in cells],
            "n": [str(len(cell.values)) for cell in cells],
            "difference": [metric.text(cell.difference, sign=True) for cell in cells],
            "p": [_p(cell) for cell in cells],
            "paper": [printed(cell.paper) for cell in cells],
            "paper's difference": [printed(cell.paper_difference, sign=True) for cell in cells],
        }
        shown = {title: column for title, column in columns.items() if {*column} != {"–"} or title == "value"}
        about = f" ({metric.name})" if metric.name not in ("", metric.title) else ""
        lines = [["", *shown], *map(list, zip(names, *shown.values(), strict=True))]
        found.append((metric.title + metric.arrow + about, lines))
    if result.params:
        ran = [row for row in result.rows if row.runs]
        found.append(("Parameters that differ", [["", *result.params], *([row.name, *row.params] for row in ran)]))
    return found


def printed(value: float | None, sign: bool = False) -> str:
    """Format a number of the paper with the digits that the paper prints; None gives a dash."""
    return "–" if value is None else f"{value:{'+' if sign and value else ''},.6g}".replace("-", "−")


def _spread(std: float | None) -> str:
    return "–" if std is None else f"{std:.2g}".replace("-", "−")


def _p(cell: Cell) -> str:
    if cell.p is None or cell.tested is None:
        return "–"
    value = f"{cell.p:.3f}" if cell.p >= 0.001 else f"{cell.p:.0e}"
    return f"{value} ({cell.tested[0]}, {cell.tested[1]})"


def as_json(result: Comparison) -> dict[str, Any]:
    """Return the comparison as plain values for JSON; numbers that are not finite become text."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    rows = [
        {
            "name": row.name,
            "state": row.state or "finished",
            "runs": [{"id": run.id, "name": run.name, "seed": run.seed, "status": run.status} for run in row.runs],
            "metrics": {m.name or m.paper: asdict(cell) for m, cell in zip(result.metrics, row.cells, strict=True)},
            "params": dict(zip(result.params, row.params, strict=False)),
            "curves": {name: [*map(thinned, curves[number])] for name, curves in result.curves.items()},
        }
        for number, row in enumerate(result.rows)
    ]
    metrics = [asdict(metric) for metric in result.metrics]
    return plain(
        {
            **{key: getattr(result, key) for key in ("title", "baseline", "test", "remarks")},
            "metrics": metrics,
            "rows": rows,
        }
    )


def page(result: Comparison, pictures: Sequence[tuple[str, str, str]] = ()) -> str:
    """Return the comparison as one HTML page that needs no server and no network.

    Args:
        result: the comparison.
        pictures: (row's name, caption, data URI) of each picture.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    names, drawn = [row.name for row in result.rows], []
    for title, curves in result.curves.items():
        unit = "pixels" if title.startswith("eval/scale/") else IMAGES
        if made := chart(title, names, curves, unit):
            drawn.append((title, *made))
    runs, rows = (sum(len(row.runs) for row in result.rows), sum(bool(row.runs) for row in result.rows))
    facts = [f"{name} {found}" for name in ("sweep", "scale") if (found := result.tags(name))]
    facts.append(f"{runs} run{'s' * (runs > 1)} in {rows} row{'s' * (rows > 1)}")
    return environment.get_template("compare.html").render(
        result=result, charts=drawn, pictures=pictures, facts=facts, p=_p, style=style, printed=printed, spread=_spread
    )
