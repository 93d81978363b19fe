"""The data of a comparison of runs.

A comparison has rows of runs that differ only in their seed, differences from a baseline with their significance, the
paper's numbers, and curves. This module does not depend on MLflow.
"""

import fnmatch
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from litevae.errors import UserError
from pipelines.experiments.statistics import mean_over_seeds, significance, std_over_seeds

# Names of metrics whose higher, or lower, value is better. For other metrics no value is marked as best.
HIGHER = re.compile(r"\b(psnr|ssim|precision|recall|inception_score|images_per_s(econd)?)\b")
LOWER = re.compile(
    r"\b(r?fid|lpips|frechet|distance|mmd|loss|l1|l2|params_m|memory_mb|gmacs|latency_ms|artefacts$)(?!\w)"
)
NO_COLUMN = re.compile(r"eval/(bicubic|scale)/|.*_std$")  # metrics that are columns only on request
NOT_A_CHOICE = re.compile(r"(name|seed|root|out|ray\..*|tracking\..*)$")  # parameters that do not change the result
FINISHED = "FINISHED"


@dataclass(frozen=True)
class Run:
    """A run as MLflow has it.

    Attributes:
        status: the status in MLflow: FINISHED, FAILED, KILLED or RUNNING.
        started: Unix time of the start, in seconds.
        metrics: the last value of each metric.
        history: points (images seen, value) of each metric that is drawn as a curve.
    """

    id: str
    name: str
    status: str = FINISHED
    started: float = 0.0
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    history: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)

    @property
    def seed(self) -> str:
        """The seed from the run's tag, or else from its parameters; "" if neither has one."""
        return self.tags.get("litevae.seed") or self.params.get("seed", "")

    def tag(self, name: str) -> str:
        """Return the tag `litevae.<name>`, or "" if the run does not have it."""
        return self.tags.get(f"litevae.{name}", "")


@dataclass
class Cell:
    """One metric of one row, compared with the baseline.

    Attributes:
        values: the metric by seed.
        mean: mean over the seeds.
        std: sample standard deviation (n - 1) over the seeds; None for fewer than two seeds.
        difference: the row's mean minus the baseline's mean.
        p: p-value of the t-test; None if the row or the baseline has fewer than two seeds, or nothing varies.
        tested: the numbers of seeds (row, baseline) in the t-test.
        best: whether this is the best mean of all finished rows.
        paper: the paper's value.
        paper_difference: the paper's value minus the paper's value for the baseline's row.
    """

    values: dict[str, float]
    mean: float | None = None
    std: float | None = None
    difference: float | None = None
    p: float | None = None
    tested: tuple[int, int] | None = None
    best: bool = False
    paper: float | None = None
    paper_difference: float | None = None


@dataclass(frozen=True)
class ComparedMetric:
    """A metric that rows are compared by.

    Attributes:
        name: its name in the runs; "" if only the paper has it.
        paper: its key in the paper's tables; "" if only the runs have it.
        higher: whether higher values are better; None: neither direction, or not known.
        digits: digits after the decimal point.
    """

    name: str
    paper: str
    higher: bool | None
    digits: int = 4

    @property
    def title(self) -> str:
        """A short name for tables, with acronyms in capitals."""
        short = re.sub(r"^eval/(reconstruction/)?", "", self.name or self.paper)
        return re.sub(r"\b(psnr|ssim|lpips|mmd|r?fid)\b", lambda word: word[0].upper().replace("RF", "rF"), short)

    @property
    def arrow(self) -> str:
        """An arrow that shows in which direction values are better, or ""."""
        return {True: " ↑", False: " ↓", None: ""}[self.higher]

    def text(self, value: float | None, sign: bool = False) -> str:
        """Format a value of this metric, with a sign if `sign` is set; None gives a dash."""
        if value is None:
            return "–"
        tiny = value and abs(value) < 10.0**-self.digits
        return f"{value:{'+' if sign else ''}{'.1e' if tiny else f',.{self.digits}f'}}".replace("-", "−")

    def better(self, difference: float | None) -> bool | None:
        """Return whether a difference is an improvement; None if there is no difference or no better direction."""
        return None if self.higher is None or not difference else (difference > 0) == self.higher


@dataclass
class ComparedRow:
    """Runs that differ only in their seed.

    Attributes:
        name: the row's name.
        runs: one run per seed; none for a row of the paper that was not run.
        state: "" if the runs finished, else what became of them: their status in MLflow, or "not run".
        cells: one per metric of the comparison.
        params: values of the parameters that differ between rows.
        paper: the paper's numbers, by the paper's key of the metric.
        baseline: whether other rows are compared with this one.
    """

    name: str
    runs: list[Run]
    state: str = ""
    cells: list[Cell] = field(default_factory=list)
    params: list[str] = field(default_factory=list)
    paper: Mapping[str, float] = field(default_factory=dict)
    baseline: bool = False

    def value(self, read: Callable[[Run], str]) -> str:
        """Return the different values that `read` finds in the runs, joined by commas."""
        return ", ".join(dict.fromkeys(filter(None, map(read, self.runs))))


@dataclass
class Comparison:
    """A comparison of runs as data.

    Attributes:
        title: the title, for example the paper's table.
        baseline: name of the row that the others are compared with.
        test: "welch" or "paired".
        metrics: the columns.
        rows: the rows.
        params: names of the parameters that differ between rows; the rows have their values.
        curves: for each metric, for each row, for each seed: points (images seen, value).
        remarks: what a reader must know about the numbers.
    """

    title: str
    baseline: str
    test: str
    metrics: list[ComparedMetric]
    rows: list[ComparedRow]
    params: list[str]
    curves: dict[str, list[list[list[tuple[int, float]]]]]
    remarks: list[str]

    def tags(self, name: str) -> str:
        """Return every value that the runs have for the tag `litevae.<name>`, joined by commas."""
        return tagged([run for row in self.rows for run in row.runs], name)


def tagged(runs: Sequence[Run], name: str) -> str:
    """Return every value that these runs have for the tag `litevae.<name>`, joined by commas."""
    return clean(", ".join(sorted({run.tag(name) for run in runs} - {""})))


def group(runs: Sequence[Run]) -> tuple[list[ComparedRow], int]:
    """Group runs that differ only in their seed into rows.

    Runs of a sweep name their row in a tag. Other runs belong to one row if their parameters are equal. Only the newest
    run of each seed is kept.

    Returns:
        The rows, and the number of older runs that were left out.
    """
    groups: dict[Any, dict[str, Run]] = {}
    for run in runs:
        if tag := run.tag("row"):
            key: Any = tag, *map(run.tag, ("sweep", "table", "scale"))
        else:
            key = frozenset(_choices(run).items()) if run.params else run.id
        groups.setdefault((key, run.status == FINISHED, run.tag("job")), {})[run.seed] = run
    rows = [ComparedRow(_name([*seeds.values()]), [*seeds.values()]) for seeds in groups.values()]
    taken, finished = ([row.name for row in rows if each or row.runs[0].status == FINISHED] for each in (True, False))
    for row in rows:
        if row.runs[0].status != FINISHED:
            row.state = row.value(lambda run: run.status.lower())
        if (taken if row.state else finished).count(row.name) > 1:
            row.name += f" ({row.state or row.runs[0].id[:8]})"
    return sorted(rows, key=lambda row: bool(row.state)), len(runs) - sum(len(row.runs) for row in rows)


def _choices(run: Run) -> dict[str, str]:
    """Return the parameters that distinguish runs; values that a resumed run changed are taken from its tags."""
    changed = {tag.removeprefix("changed."): value for tag, value in run.tags.items() if tag.startswith("changed.")}
    return {key: value for key, value in {**run.params, **changed}.items() if not NOT_A_CHOICE.match(key)}


def _choice(run: Run, name: str) -> str:
    return _choices(run).get(name, "")


def _name(runs: list[Run]) -> str:
    """Return the name of a row: the runs' tag, or the beginning that their names have in common."""
    name = runs[0].tag("row")
    if not name and len(runs) > 1:  # an ending such as "-seed" is cut off
        name = re.sub(r"[-_., ]+(seed|s)?[-_. ]*$", "", os.path.commonprefix([run.name for run in runs]))  # noqa: RUF071
    return clean(name or runs[0].name)


def clean(text: str) -> str:
    """Replace control characters by spaces, so that a name cannot send commands to a terminal or break a table."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


# --- what is compared -------------------------------------------------------------------------------------------


def comparison(
    runs: Sequence[Run],
    baseline: str = "",
    metrics: Sequence[str] = (),
    test: str = "welch",
    tables: Mapping[str, Any] | None = None,
) -> Comparison:
    """Compare runs with a baseline, and with the paper if all of them belong to one of its tables.

    Args:
        runs: the runs with their histories.
        baseline, metrics, test: as in the config `Compare`.
        tables: the paper's tables by name, as `pipelines.experiments.paper.tables` returns them.

    Raises:
        UserError: if no run has such metrics, or no row has the baseline's name.
    """
    rows, repeated = group(runs)
    tags = {run.tag("table") for run in runs}
    table = (tables or {}).get(next(iter(tags))) if len(tags) == 1 else None
    if table is not None:
        rows = _beside(rows, table)
    ran = [row for row in rows if row.runs]
    first = next((row for row in ran if (row.name == baseline if baseline else not row.state)), None)
    first = first or (None if baseline else ran[0])
    if first is None:
        raise UserError(f"baseline={baseline} is not a row; the rows are {listed((row.name for row in ran), 30)}")
    columns = _columns([run for row in ran for run in row.runs], metrics, table)
    for row in rows:
        # A table with several settings ("FFHQ 128: VAE", "ImageNet 256: VAE") has a baseline for each setting.
        alike = [other for other in (*ran, *rows) if table and not baseline and setting(other) == setting(row)]
        against = next((other for other in alike if setting(row) and other.state in ("", "not run")), first)
        row.baseline = row is against
        row.cells = [_cell(row, against, metric, test) for metric in columns]
    for number, metric in enumerate(columns):
        cells = [row.cells[number] for row in ran if not row.state]
        means = [cell.mean for cell in cells if cell.mean is not None and math.isfinite(cell.mean)]
        for cell in cells if metric.higher is not None and len({*means}) > 1 else []:
            cell.best = cell.mean == (max(means) if metric.higher else min(means))
        sizes = [abs(mean) for mean in means if mean]
        digits = min(6, max(0, 3 - math.floor(math.log10(max(sizes))))) if sizes else 4
        columns[number] = replace(metric, digits=digits)
    names = sorted({name for run in runs for name in _choices(run)})
    values = {name: [clean(row.value(partial(_choice, name=name))) for row in ran] for name in names}
    differ = [name for name in names if len({*values[name]}) > 1]
    for number, row in enumerate(ran):
        row.params = [values[name][number] for name in differ]
    # A metric that is 0 throughout gets no curve.
    told = {name for run in runs for name, points in run.history.items() if any(value for _, value in points)}
    drawn = sorted(told, key=lambda name: (name.startswith("train/"), name))
    curves = {name: [[[*run.history.get(name, ())] for run in row.runs] for row in rows] for name in drawn}
    scales, sweeps = tagged(runs, "scale"), tagged(runs, "sweep")
    title = f"{_title(table.name)}: {table.title}" if table else f"Sweep {sweeps}" if sweeps else "Comparison of runs"
    remarks = _remarks(rows, columns, test, repeated, table, scales)
    chosen = [row.name for row in rows if row.baseline]
    named = first.name if len(chosen) < 2 else "the first row of each setting"
    return Comparison(clean(title), named, test, columns, rows, differ, curves, remarks)


def setting(row: ComparedRow) -> str:
    """Return the setting of a paper's row, for example "FFHQ 128" for "FFHQ 128: VAE"; "" if it names none."""
    return row.name.rpartition(": ")[0]


def _title(table: str) -> str:
    return f"Table {table}" if table[:1].isdigit() else table.replace("-", " ").capitalize()


def _beside(rows: list[ComparedRow], table: Any) -> list[ComparedRow]:
    """Add the paper's numbers to the rows and sort them as in the paper; rows that were not run are added too."""
    order = [*table.rows]
    for row in rows:
        of_paper = table.rows.get(row.runs[0].tag("row"))
        row.paper = of_paper.paper if of_paper else {}
    ran = {row.runs[0].tag("row") for row in rows}
    absent = [name for name in order if name not in ran]
    rows = [*rows, *(ComparedRow(clean(name), [], "not run", paper=table.rows[name].paper) for name in absent)]
    place = {name: number for number, name in enumerate(order)}
    return sorted(rows, key=lambda row: place.get(row.runs[0].tag("row") if row.runs else row.name, len(order)))


def _columns(runs: Sequence[Run], patterns: Sequence[str], table: Any) -> list[ComparedMetric]:
    """Return the metrics to show, those of the paper's table first and in its order.

    Args:
        patterns: names of metrics, or patterns; with none, the runs' first kind of eval/, val/ and train/ is taken.

    Raises:
        UserError: if a pattern matches no metric, or the runs have none.
    """
    names = dict.fromkeys(name for run in runs for name in run.metrics if not name.startswith("system/"))
    ours: list[str] = []
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise UserError(f"metrics: no run has {pattern!r}; they have {listed(sorted(names), 40) or 'none'}")
        ours += matching
    for kind in () if patterns else ("eval/", "val/", "train/"):
        ours = ours or [name for name in names if name.startswith(kind) and not NO_COLUMN.match(name)]
    if not ours:
        raise UserError("these runs have logged no metrics")
    keys = dict.fromkeys(key for row in table.rows.values() for key in row.paper) if table else {}
    columns = [
        ComparedMetric(name, key if (key := paper_key(name)) in keys else "", _higher(name))
        for name in dict.fromkeys(ours)
    ]
    missing = [] if patterns else [key for key in keys if key not in {metric.paper for metric in columns}]
    columns += [ComparedMetric("", key, _higher(key)) for key in missing]
    return sorted(columns, key=lambda metric: [*keys].index(metric.paper) if metric.paper else len(keys))


def paper_key(name: str) -> str:
    """Return the paper's key for a metric of the runs."""
    short = re.sub(r"^(eval/reconstruction|eval|val)/", "", name)
    return {"lpips-vgg": "lpips"}.get(short, short.replace("mmd/raw/", "mmd/"))


def _higher(name: str) -> bool | None:
    """Return whether higher values of a metric are better; None if its name does not tell."""
    words = name.replace("-", " ").replace("/", " ").lower()
    return True if HIGHER.search(words) else False if LOWER.search(words) else None


def _cell(row: ComparedRow, baseline: ComparedRow, metric: ComparedMetric, test: str) -> Cell:
    """Compute one metric of a row, and compare it with the baseline's unless the row is the baseline."""
    values, others = (
        {run.seed: run.metrics[metric.name] for run in each.runs if metric.name in run.metrics}
        for each in (row, baseline)
    )
    cell = Cell(values, mean_over_seeds(values), std_over_seeds(values), paper=row.paper.get(metric.paper))
    if row is baseline:
        return cell
    if cell.paper is not None and metric.paper in baseline.paper:
        cell.paper_difference = cell.paper - baseline.paper[metric.paper]
    paired, shared = test == "paired", sorted({*values} & {*others})
    if paired and shared:
        values, others = ({seed: side[seed] for seed in shared} for side in (values, others))
    mean, other = mean_over_seeds(values), mean_over_seeds(others)
    if mean is not None and other is not None:
        cell.difference = mean - other
        cell.p = significance([*values.values()], [*others.values()], paired) if shared or not paired else None
        cell.tested = (len(values), len(others)) if cell.p is not None else None
    return cell


def _remarks(
    rows: list[ComparedRow], columns: list[ComparedMetric], test: str, repeated: int, table: Any, scales: str
) -> list[str]:
    remarks = []
    if any(cell.std is not None for row in rows for cell in row.cells):
        remarks.append("± is the standard deviation over seeds (n − 1).")
    if any(cell.p is not None for row in rows for cell in row.cells):
        kind = "a paired t-test over the seeds in common" if test == "paired" else "Welch's t-test over the seeds"
        remarks.append(f"p: {kind}, two-sided, with the numbers of seeds; not corrected for the number of comparisons.")
    elif any(row.runs for row in rows[1:]):
        remarks.append("No p: that takes two seeds and more of both rows.")
    if any(row.paper for row in rows):
        at = f" (ours: scale={scales})" if scales else ""
        remarks.append(f"The paper's values are of its own data, size and length of training{at}: compare differences.")
    for metric in columns:
        if not metric.name:
            why = ", which takes the FID Inception's weights" if metric.paper in ("rfid", "fid") else ""
            remarks.append(f"{metric.title}: the paper has it, these runs do not{why}.")
    if repeated:
        remarks.append(f"{repeated} older runs of a row and seed that were run again are left out.")
    return remarks


def listed(names: Any, most: int = 8) -> str:
    """Join names by commas; names after the first `most` are only counted."""
    names = [*names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
