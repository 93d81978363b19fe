"""Comparing runs: numbers against scipy and NumPy, MLflow runs of the real client, the page as a browser reads it."""

import base64
import io
import json
import math
import re
import shutil
import socket
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from litevae.errors import UserError
from pipelines.experiments import paper
from pipelines.experiments.charts import chart, mean, thinned
from pipelines.experiments.compare import compare, select
from pipelines.experiments.comparison import ComparedMetric, Run, comparison, paper_key, tagged
from pipelines.experiments.config import Compare
from pipelines.experiments.page import as_json, markdown, page, report
from pipelines.experiments.statistics import significance
from pipelines.runtime.cli import load

PSNR = "eval/reconstruction/psnr"
HOSTILE = "<script>alert('x')</script> | **b** \"q\" & \x1b[31m\n</title>{{ 7 * 7 }}"
VALUES = {"Baseline": (26.0, 26.3, 26.1), "+ Gaussian loss": (26.4, 26.2, 26.9), "+ wavelet loss": (27.0, 27.4, 26.9)}


def run(name: str, value: float = 1.0, seed: int = 0, metric: str = PSNR, **kwargs) -> Run:
    params = {"seed": str(seed), "name": name} | kwargs.pop("params", {})
    return Run(kwargs.pop("id", f"{name}-{seed}"), name, params=params, metrics={metric: value}, **kwargs)


def table_runs(values: dict[str, tuple[float, ...]] = VALUES, metric: str = PSNR, **tags: str) -> list[Run]:
    tags = {"litevae.sweep": "t9", "litevae.table": "9", "litevae.scale": "smoke"} | tags
    return [
        run(f"{row}-{seed}", value, seed, metric, started=number, tags=tags | {"litevae.row": row})
        for number, row in enumerate(values)
        for seed, value in enumerate(values[row])
    ]


# --- the numbers ------------------------------------------------------------------------------------------------


def test_seeds_are_one_row_with_mean_deviation_and_welchs_p() -> None:
    result = comparison(table_runs(), tables=paper.tables())
    assert [row.name for row in result.rows] == [*VALUES]
    assert result.baseline == "Baseline"
    column = [metric.name for metric in result.metrics].index(PSNR)
    for row in result.rows:
        cell, values = row.cells[column], VALUES[row.name]
        assert cell.mean == pytest.approx(np.mean(values))
        assert cell.std == pytest.approx(np.std(values, ddof=1))
        if row.name == "Baseline":
            assert (cell.difference, cell.p) == (None, None)
            continue
        assert cell.difference == pytest.approx(np.mean(values) - np.mean(VALUES["Baseline"]))
        assert cell.p == pytest.approx(stats.ttest_ind(values, VALUES["Baseline"], equal_var=False).pvalue)
        assert cell.tested == (3, 3)
    assert [row.cells[column].best for row in result.rows] == [False, False, True]


def test_paired_test_takes_the_seeds_that_both_have() -> None:
    runs = [run("a", value, seed, params={"x": "1"}) for seed, value in enumerate((1.0, 2.0, 4.0, 9.0))]
    runs += [run("b", value, seed, params={"x": "2"}) for seed, value in ((2, 4.5), (1, 2.6), (0, 1.1), (7, 70.0))]
    cell = comparison(runs, test="paired").rows[1].cells[0]
    assert cell.p == pytest.approx(stats.ttest_rel([1.1, 2.6, 4.5], [1.0, 2.0, 4.0]).pvalue)
    assert cell.tested == (3, 3)
    assert cell.difference == pytest.approx(np.mean([0.1, 0.6, 0.5]))
    assert cell.mean == pytest.approx(np.mean([4.5, 2.6, 1.1, 70.0]))


def test_paired_test_pairs_no_others() -> None:
    runs = [run("a", value, seed, params={"x": "1"}) for seed, value in enumerate((1.0, 2.0))]
    runs += [run("b", value, seed, params={"x": "2"}) for seed, value in enumerate((3.0, 5.0), start=5)]
    cell = comparison(runs, test="paired").rows[1].cells[0]
    assert (cell.p, cell.difference) == (None, 2.5)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("sides", [([1.0], [2.0]), ([1.0, 1.0], [2.0, 2.0]), ([1.0, math.nan], [1.0, 2.0]), ([], [])])
def test_no_p_of_one_seed_of_constants_or_of_nan(sides, paired: bool) -> None:
    assert significance(*sides, paired=paired) is None


def test_one_seed_has_neither_deviation_nor_p() -> None:
    result = comparison([run("a", 1.0, params={"x": "1"}), run("b", 2.0, params={"x": "2"})])
    cell = result.rows[1].cells[0]
    assert (cell.std, cell.p, cell.tested, cell.difference) == (None, None, None, 1.0)
    assert any(remark.startswith("No p") for remark in result.remarks)


@pytest.mark.parametrize(
    ("metric", "best"),
    [
        ("eval/reconstruction/lpips-vgg", 1),
        ("eval/rfid", 1),
        ("eval/mmd/raw/25", 1),
        ("val/ssim", 2),
        ("eval/what", None),
    ],
)
def test_direction_is_the_metrics(metric: str, best: int | None) -> None:
    runs = [run(name, value, metric=metric, params={"x": name}) for name, value in (("a", 2.0), ("b", 1.0), ("c", 3.0))]
    assert [row.cells[0].best for row in comparison(runs).rows] == [number == best for number in range(3)]


def test_a_value_that_is_nan_is_shown_and_never_best() -> None:
    runs = [run(name, value, params={"x": name}) for name, value in (("a", math.nan), ("b", 2.0), ("c", 1.0))]
    result = comparison(runs)
    assert [row.cells[0].best for row in result.rows] == [False, True, False]
    assert "nan" in report(result)
    assert json.loads(json.dumps(as_json(result), allow_nan=False))["rows"][0]["metrics"][PSNR]["mean"] == "nan"


def test_rows_are_params_but_the_seed_and_only_what_differs_is_shown() -> None:
    runs = [run(f"vae-s{seed}", seed, seed, params={"optim.lr": "0.1", "same": "1"}) for seed in range(3)]
    runs += [run("other", 5.0, 0, params={"optim.lr": "0.2", "same": "1"}, tags={"changed.same": "2"})]
    runs += [run("vae-s1", 7.0, 1, id="again", started=9, params={"optim.lr": "0.1", "same": "1", "root": "elsewhere"})]
    result = comparison(runs, metrics=["eval/*"])
    assert [(row.name, [each.id for each in row.runs]) for row in result.rows] == [
        ("vae", ["vae-s0-0", "again", "vae-s2-2"]),
        ("other", ["other-0"]),
    ]
    assert result.params == ["optim.lr", "same"]
    assert [row.params for row in result.rows] == [["0.1", "1"], ["0.2", "2"]]
    assert any(remark.startswith("1 older run") for remark in result.remarks)


def test_rows_are_named_by_what_their_runs_names_have_in_common() -> None:
    def names(*runs: Run) -> list[str]:
        return [row.name for row in comparison(runs).rows]

    assert names(run("mine-s", params={"x": "1"})) == ["mine-s"]  # of one run: its own
    assert names(*(run(f"mine-s{n}", seed=n) for n in range(2))) == ["mine"]
    assert names(*(run(f"mine, seed {n}", seed=n) for n in range(2))) == ["mine"]
    assert names(*(run(name, seed=n) for n, name in enumerate(("one", "two")))) == ["one"]


@pytest.mark.parametrize(
    ("values", "shown"),
    [((1234.5, 1.0), "1,234"), ((123.456, 1.0), "123.5"), ((12.3456, 1.0), "12.35"), ((0.0123456, 0), "0.01235")],
)
def test_numbers_have_four_digits_of_the_largest(values: tuple[float, float], shown: str) -> None:
    result = comparison([run(f"r{n}", value, params={"x": str(n)}) for n, value in enumerate(values)])
    (metric,) = result.metrics
    assert metric.text(values[0]) == shown


def test_signs_and_numbers_that_are_next_to_nothing() -> None:
    metric = ComparedMetric("eval/lpips", "", False, 3)
    assert (metric.text(None), metric.text(0.0), metric.text(-0.5, sign=True)) == ("–", "0.000", "−0.500")
    assert (metric.text(0.25, sign=True), metric.text(0.0001), metric.text(0.001)) == ("+0.250", "1.0e−04", "0.001")
    assert [metric.better(value) for value in (1.0, -1.0, 0.0, None)] == [False, True, None, None]
    assert replace(metric, higher=True).better(1.0) is True
    assert replace(metric, higher=None).better(1.0) is None
    assert [replace(metric, higher=way).arrow for way in (True, False, None)] == [" ↑", " ↓", ""]
    assert (metric.title, ComparedMetric("", "rfid", False).title) == ("LPIPS", "rFID")


def test_remarks_say_what_the_numbers_are() -> None:
    welch = comparison(table_runs(), tables=paper.tables()).remarks
    assert welch[0] == "± is the standard deviation over seeds (n − 1)."
    assert welch[1].startswith("p: Welch's t-test over the seeds, two-sided, with the numbers of seeds; not corrected")
    assert welch[2].startswith(
        "The paper's values are of its own data, size and length of training (ours: scale=smoke)"
    )
    assert "rFID: the paper has it, these runs do not, which takes the FID Inception's weights." in welch
    assert "LPIPS: the paper has it, these runs do not." in welch
    assert len(welch) == 6  # and of SSIM
    paired = comparison(table_runs(), test="paired").remarks
    assert paired[1].startswith("p: a paired t-test over the seeds in common, two-sided")
    assert len(paired) == 2
    alone = [run(f"r{n}", n, params={"x": str(n)}) for n in range(2)]
    assert comparison(alone).remarks == ["No p: that takes two seeds and more of both rows."]
    assert comparison(alone[:1]).remarks == []
    again = [*alone[:1], replace(alone[0], id="later", metrics={PSNR: 5.0})]
    found = comparison(again)
    assert found.remarks == ["1 older runs of a row and seed that were run again are left out."]
    assert found.rows[0].cells[0].values == {"0": 5.0}


def test_one_row_is_the_baseline_or_one_of_each_setting() -> None:
    runs = [run(f"r{n}", n, params={"x": str(n)}) for n in range(3)]
    assert [row.baseline for row in comparison(runs).rows] == [True, False, False]
    assert [row.baseline for row in comparison(runs, "r1").rows] == [False, True, False]
    pairs = {name: (float(n),) for n, name in enumerate(paper.table("7").rows)}
    result = comparison(table_runs(pairs, **{"litevae.table": "7"}), tables=paper.tables())
    assert [row.baseline for row in result.rows] == [True, False, True, False]
    assert result.baseline == "the first row of each setting"
    assert [row.cells[-1].difference for row in result.rows] == [None, 1.0, None, 1.0]


def test_curves_of_validation_come_first_and_those_of_zeros_not_at_all() -> None:
    history = {"train/loss": [(1, 2.0)], "val/b": [(1, 0.0), (2, 1.0)], "val/a": [(1, 3.0)], "val/zero": [(1, 0.0)]}
    result = comparison([run("a", history=history)])
    assert [*result.curves] == ["val/a", "val/b", "train/loss"]
    assert result.curves["val/b"] == [[[(1, 0.0), (2, 1.0)]]]


def test_tags_of_all_runs_are_listed_in_order() -> None:
    runs = [run(name, params={"x": name}, tags={"litevae.commit": name}) for name in ("cd", "ab", "cd", "ef")]
    assert tagged([*runs, run("none")], "commit") == "ab, cd, ef"


def test_the_papers_numbers_stand_beside_ours() -> None:
    printed = paper.tables()["9"].rows
    runs = table_runs({row: VALUES[row] for row in ("+ wavelet loss", "Baseline")})
    result = comparison(runs, tables=paper.tables())
    assert [(row.name, row.state) for row in result.rows] == [
        ("Baseline", ""),
        ("+ Gaussian loss", "not run"),
        ("+ wavelet loss", ""),
    ]
    ours = {metric.paper: number for number, metric in enumerate(result.metrics)}
    for row in result.rows:
        assert {key: row.cells[number].paper for key, number in ours.items()} == printed[row.name].paper
    cell = result.rows[2].cells[ours["psnr"]]
    assert cell.paper_difference == pytest.approx(
        printed["+ wavelet loss"].paper["psnr"] - printed["Baseline"].paper["psnr"]
    )
    assert result.metrics[ours["psnr"]].name == PSNR
    assert result.metrics[ours["rfid"]].name == ""
    assert any("rFID" in remark and "Inception" in remark for remark in result.remarks)


@pytest.mark.parametrize(
    ("ours", "papers"),
    [
        (PSNR, "psnr"),
        ("eval/reconstruction/lpips-vgg", "lpips"),
        ("eval/reconstruction/rfid", "rfid"),
        ("eval/mmd/raw/250", "mmd/250"),
        ("eval/params_m", "params_m"),
    ],
)
def test_names_of_the_papers_metrics(ours: str, papers: str) -> None:
    assert paper_key(ours) == papers
    assert any(papers in table.metrics for table in paper.tables().values())


@pytest.mark.parametrize("ours", ["eval/reconstruction/frechet/squeezenet-caffe", "eval/reconstruction/lpips-alex"])
def test_what_stands_in_for_a_metric_is_not_called_by_its_name(ours: str) -> None:
    assert not any(paper_key(ours) in table.metrics for table in paper.tables().values())


# --- which runs -------------------------------------------------------------------------------------------------


def test_selection() -> None:
    old = [run("a", tags={"litevae.sweep": "old"}, started=1), run("b", tags={"litevae.sweep": "old"}, started=2)]
    new = [run("c", tags={"litevae.sweep": "new"}, started=3), run("d", tags={"litevae.sweep": "new"}, started=4)]
    parent = run("new", tags={"litevae.job": "sweep", "litevae.sweep": "new"}, started=9)
    begun = [run("e", id=f"e{n}", tags={"litevae.folder": "/e"}, started=5 + n) for n in range(2)]
    failed = run("f", status="FAILED", started=8)
    found = [failed, *new, parent, *old, *begun]

    def names(**kwargs) -> list[str]:
        return [each.id for each in select(found, **kwargs)[0]]

    assert names() == ["c-0", "d-0"]
    assert names(sweep="old") == ["a-0", "b-0"]
    assert names(runs=["d", "a-0"]) == ["a-0", "d-0"]
    assert names(runs=["*"]) == ["a-0", "b-0", "c-0", "d-0", "e1"]
    assert names(runs=["e0", "e"]) == ["e0", "e1"]
    assert names(runs=["[de]", "f"], unfinished=True) == ["d-0", "e1", "f-0"]
    assert select(found, runs=["*"])[1] == ["Left out, with unfinished=false: f (failed)."]
    for wrong, says in [({"runs": ["x"]}, "'x'"), ({"sweep": "x"}, "new, old"), ({"runs": ["f"]}, "unfinished=true")]:
        with pytest.raises(UserError, match=says):
            names(**wrong)
    with pytest.raises(UserError, match="no sweep"):
        select(begun)
    with pytest.raises(UserError, match="has no runs"):
        select([])


def test_runs_that_failed_are_rows_of_their_own_and_never_best_nor_baseline() -> None:
    runs = [run("a", 9.0, status="FAILED"), run("a", 1.0, 1), run("a", 2.0, 2), run("b", 1.0, params={"x": "1"})]
    result = comparison(runs)
    assert [(row.name, row.state, row.cells[0].best) for row in result.rows] == [
        ("a", "", True),
        ("b", "", False),
        ("a (failed)", "failed", False),
    ]
    assert result.baseline == "a"
    of_table = [replace(each, status="FAILED") if "Baseline" in each.name else each for each in table_runs()]
    result = comparison(of_table, tables=paper.tables())
    assert [row.state for row in result.rows] == ["failed", "", ""]
    assert result.baseline == "+ Gaussian loss"


@pytest.mark.parametrize(("wrong", "says"), [({"baseline": "x"}, "the rows are a"), ({"metrics": ["x*"]}, PSNR)])
def test_a_baseline_or_a_metric_that_is_not_there(wrong, says: str) -> None:
    with pytest.raises(UserError, match=says):
        comparison([run("a")], **wrong)


# --- curves -----------------------------------------------------------------------------------------------------


def test_a_curve_is_the_mean_of_its_seeds_where_all_of_them_are() -> None:
    assert mean([[(0, 1.0), (2, 3.0), (4, 9.0)], [(0, 3.0), (4, 1.0)]]) == [(0, 2.0), (4, 5.0)]


def test_long_curves_are_drawn_as_means_of_their_parts() -> None:
    points = [(x, float(x % 7)) for x in range(1600)]
    few = thinned(points)
    assert len(few) == 160
    assert few[-1][0] == 1599
    assert few[3] == (39, np.mean([y for _, y in points[30:40]]))


def test_chart_places_points_on_its_scales() -> None:
    made = chart("train/loss", ["a"], [[[(0, 0.001), (50, 0.1), (100, 10.0), (150, math.nan)]]])
    assert made is not None
    svg, pointer = made
    left, top, right, bottom = pointer["frame"]
    (x0, y0), (x1, y1), (x2, y2) = [(x, y) for x, y, *_ in pointer["rows"][0]["points"]]
    assert (x0, x1, x2) == pytest.approx((left, (left + right) / 2, right), abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert bottom > y0 > y2 > top
    assert "logarithmic" in svg
    assert "images seen" in svg
    assert ">0.01<" in svg
    assert chart("one point", ["a"], [[[(0, 1.0)]]]) is None


def test_an_evaluation_at_several_sizes_is_drawn_over_pixels_and_no_column() -> None:
    runs = [run("a", params={"x": "1"}, history={"eval/scale/psnr": [(32, 20.0), (64, 22.0)]})]
    runs[0].metrics["eval/scale/psnr"] = 22.0  # type: ignore[index]
    result = comparison(runs)
    assert [metric.name for metric in result.metrics] == [PSNR]
    assert ">pixels<" in page(result)
    assert "images seen" not in page(result)


# --- for people -------------------------------------------------------------------------------------------------

VOID = {"meta", "img", "br", "wbr", "link", "input", "hr"}


class Page(HTMLParser):
    """Well-formed, and what in it can reach the network or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self, tag: str) -> str:
        return "".join(data for where, data in self.texts if where == tag)


def hostile() -> str:
    history = {HOSTILE: [(0, 1.0), (8, 2.0)]}
    runs = [
        run(HOSTILE, 1.0, params={HOSTILE: "a" + HOSTILE}, history=history),
        run("b", 2.0, params={HOSTILE: "https://x.org"}),
    ]
    return page(comparison(runs), [(HOSTILE, HOSTILE, "data:image/webp;base64,AA==")])


def test_hostile_names_stay_text() -> None:
    found = Page(hostile())
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert "alert" not in found.text("script")
    assert found.text("title") == "Comparison of runs"
    assert "<script>alert('x')</script>" in "".join(data for _, data in found.texts)
    assert "49" not in found.text("th")
    for tag, attributes in found.tags:
        assert not {name for name in attributes if name.startswith("on")}
        assert tag not in ("link", "iframe", "base")
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert not re.search(r"url\(|@import|https?:", found.text("style") + found.text("script"))
    pointers = [
        json.loads(attributes["data-pointer"] or "") for _, attributes in found.tags if "data-pointer" in attributes
    ]
    assert pointers[0]["rows"][0]["name"].startswith("<script>alert('x')</script>")
    assert [attributes["aria-label"] for _, attributes in found.tags if "aria-label" in attributes] == [HOSTILE]


def test_hostile_names_neither_break_markdown_nor_steer_a_terminal() -> None:
    result = comparison([run(HOSTILE, 1.0, params={"x": "1"}), run("b", 2.0, params={"x": "a|b"})])
    rows = [line for line in markdown(result).splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {5, 3}  # four columns, and two
    assert "\\<script\\>" in markdown(result)
    assert "\x1b" not in markdown(result) + report(result)
    assert "**2.000**" in markdown(result)


# --- MLflow -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A sweep of the paper's Table 9 with three seeds a row, a run that failed, and one whose picture is in its folder
    alone, in a real SQLite database."""
    import mlflow
    from mlflow.entities import Metric, Param

    root = tmp_path_factory.mktemp("tracked")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    client.create_experiment("empty")
    experiment = client.create_experiment("litevae", artifact_location=str(root / "mlartifacts"))
    parent = client.create_run(experiment, run_name="t9", tags={"litevae.job": "sweep"}).info.run_id
    picture = np.random.default_rng(0).integers(0, 256, (40, 80, 3), dtype=np.uint8)

    def add(name: str, row: str, seed: int, values: list[float], status: str = "FINISHED") -> str:
        folder = root / "folders" / name
        tags = {"litevae.job": "train_vae", "litevae.folder": str(folder), "mlflow.parentRunId": parent}
        tags |= {"litevae.sweep": "t9", "litevae.table": "9", "litevae.row": row, "litevae.seed": str(seed)}
        run = client.create_run(experiment, run_name=name, tags=tags).info.run_id
        metrics = [Metric("val/psnr", value, 1000 + n, 100 * n) for n, value in enumerate(values)]
        metrics += [Metric(PSNR, values[-1], 2000, 200), Metric("eval/bicubic/psnr", 1.0, 2000, 200)]
        client.log_batch(run, metrics, [Param("seed", str(seed)), Param("loss.wavelet.weight", str(len(row)))])
        if row == "Baseline":
            client.log_image(run, np.zeros_like(picture), key="val/picture", step=200, synchronous=True)
            client.log_image(run, picture, key="reconstructions", step=100, synchronous=True)
        else:
            (folder / "images").mkdir(parents=True)
            for step in (100, 200):
                Image.fromarray(picture * (step == 200)).save(folder / "images" / f"val-picture-{step:012d}.png")
        client.set_terminated(run, status)
        return run

    for row, values in VALUES.items():
        for seed, value in enumerate(values):
            add(f"{row}-{seed}", row, seed, [10.0 + seed, 20.0, value])
    add("gone", "Baseline", 3, [1.0, 2.0, 3.0], "FAILED")
    return SimpleNamespace(root=root, picture=picture)


def settings(tracked: SimpleNamespace, out: Path, *overrides: str) -> Compare:
    return load(Compare, None, [f"root={tracked.root}", f"out={out}", *overrides])


def test_the_newest_sweep_of_a_database(tracked: SimpleNamespace, tmp_path: Path, capsys) -> None:
    data = compare(settings(tracked, tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == data
    assert [row["name"] for row in data["rows"]] == [*VALUES]
    assert data["title"].startswith("Table 9")
    for row in data["rows"]:
        assert row["metrics"][PSNR]["mean"] == pytest.approx(np.mean(VALUES[row["name"]]))
        assert sorted(each["seed"] for each in row["runs"]) == ["0", "1", "2"]
        finals = [points[-1] for points in row["curves"]["val/psnr"]]
        assert finals == [[200, pytest.approx(value)] for value in VALUES[row["name"]]]
    assert "eval/bicubic/psnr" not in data["rows"][0]["metrics"]
    assert any("gone (failed)" in remark for remark in data["remarks"])
    printed, written = capsys.readouterr().out, (tmp_path / "out" / "comparison.md").read_text()
    p = stats.ttest_ind(VALUES["+ wavelet loss"], VALUES["Baseline"], equal_var=False).pvalue
    for text in (printed, written, found := (tmp_path / "out" / "comparison.html").read_text()):
        assert "27.10" in text
        assert "+0.97" in text
        assert f"{p:.3f} (3, 3)" in text
        assert "29.73" in text
    assert re.search(r"27\.10 \*", printed)
    assert "**27.10**" in written
    assert "<b>27.10</b>" in found


def test_pictures_are_the_last_reconstructions_embedded(tracked: SimpleNamespace, tmp_path: Path) -> None:
    compare(settings(tracked, tmp_path / "out", "pictures=40"))
    found = Page((tmp_path / "out" / "comparison.html").read_text())
    images = [attributes for tag, attributes in found.tags if tag == "img"]
    assert [(image["alt"] or "").partition(" at ")[0] for image in images] == [
        "Baseline: reconstructions",  # of MLflow, and rather than the later val/picture
        "+ Gaussian loss: val-picture",  # of the run's folder
        "+ wavelet loss: val-picture",
    ]
    for image in images:
        kind, _, data = (image["src"] or "").partition(",")
        shown = Image.open(io.BytesIO(base64.b64decode(data)))
        assert kind == "data:image/webp;base64"
        assert shown.size == (40, 20)
        expected = np.asarray(Image.fromarray(tracked.picture).resize((40, 20), Image.Resampling.LANCZOS), float)
        assert np.abs(np.asarray(shown, float) - expected).mean() < 25  # lossy; black would be 128 off


def test_unfinished_runs_when_asked_for(tracked: SimpleNamespace, tmp_path: Path) -> None:
    data = compare(settings(tracked, tmp_path / "out", "unfinished=true", "pictures=0", "sweep=t9"))
    assert [row["state"] for row in data["rows"] if row["name"].startswith("Baseline")] == ["finished", "failed"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("tracking.experiment=empty", "'empty' has no runs"),
        ("tracking.experiment=none", "there are: .*litevae"),
        ("tracking.enabled=false", "reads MLflow"),
        ("root={}/none", "the database does not exist"),
        ("sweep=none", "it has: t9"),
    ],
)
def test_nothing_to_compare_is_one_message(tracked: SimpleNamespace, tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        compare(settings(tracked, tmp_path / "out", override.format(tmp_path)))
    assert not (tmp_path / "out").exists()


def test_a_dead_server_is_one_message_without_the_password(tracked: SimpleNamespace, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(UserError, match="can't be read .*refused") as error:
        compare(settings(tracked, tmp_path / "out", f"tracking.uri=http://me:secret@127.0.0.1:{port}"))
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_browser_opens_the_page(tracked: SimpleNamespace, tmp_path: Path) -> None:
    if (browser := shutil.which("chromium")) is None:
        pytest.skip("needs a browser: apt-get install chromium")
    compare(settings(tracked, tmp_path / "out"))
    (tmp_path / "out" / "hostile.html").write_text(hostile())
    for name, title in (("comparison", "Table 9"), ("hostile", "Comparison of runs")):
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/chromium"]
        options += ["--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom"]
        done = subprocess.run(
            [browser, *options, f"file://{tmp_path}/out/{name}.html"], capture_output=True, text=True, timeout=120
        )
        assert f"<title>{title}" in done.stdout
        # the script adds a tip to every chart
        assert done.stdout.count('class="tip"') == done.stdout.count("data-pointer=") > 0
        assert not [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
