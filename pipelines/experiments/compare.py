"""jobs/compare_runs.py: runs of MLflow beside each other, as text, Markdown, one HTML page, and data."""

import base64
import fnmatch
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from litevae import storage
from litevae.errors import UserError
from pipelines.experiments import paper
from pipelines.experiments.comparison import FINISHED, Run, clean, comparison, listed
from pipelines.experiments.config import Compare
from pipelines.experiments.page import as_json, markdown, page, report
from pipelines.runtime import mlflow_run, mlflow_server
from pipelines.runtime.paths import output_path

STORED = re.compile(r"images/(.+?)[+%]step[+%](\d+)[+%]timestamp[+%]\d+[+%][^+%]*\.png$")  # a picture in MLflow ...
SAVED = re.compile(r"(.+)-(\d{12})\.png$")  # ... and in the run's folder


def compare(cfg: Compare) -> dict[str, Any]:
    """Print the comparison and leave it in `cfg.out`; returns what comparison.json has.

    Raises:
        UserError: no such runs; MLflow does not answer; a bad config.
    """
    out = Path(output_path("out", cfg.out))
    client, found = _read(cfg)
    runs, remarks = select(found, cfg.sweep, cfg.runs, cfg.unfinished, cfg.tracking.experiment)
    runs = [replace(run, history=_histories(client, run, cfg)) for run in runs]
    result = comparison(runs, cfg.baseline, cfg.metrics, cfg.test, paper.tables())
    result.remarks += remarks
    pictures, without = list[tuple[str, str, str]](), dict[str, list[str]]()
    if cfg.pictures:
        with tempfile.TemporaryDirectory() as scratch:
            for row in result.rows:
                shown, problem = _picture(client, row.runs[0], cfg.pictures, scratch) if row.runs else (None, "")
                pictures += [(row.name, *shown)] if shown else []
                if problem:
                    without.setdefault(problem, []).append(row.name)
    result.remarks += [f"No picture ({problem}): {listed(names)}." for problem, names in without.items()]
    data = as_json(result)
    out.mkdir(parents=True, exist_ok=True)
    storage.put(str(out / "comparison.html"), page(result, pictures).encode())
    storage.put(str(out / "comparison.md"), markdown(result).encode())
    storage.put(str(out / "comparison.json"), json.dumps(data, allow_nan=False).encode() + b"\n")
    print(report(result), "", *(f"{kind:9} {out}/comparison.{kind}" for kind in ("html", "md", "json")), sep="\n")
    return data


# --- which runs -------------------------------------------------------------------------------------------------


def select(
    found: Sequence[Run], sweep: str = "", runs: Sequence[str] = (), unfinished: bool = False, experiment: str = ""
) -> tuple[list[Run], list[str]]:
    """The runs to compare, oldest first, and remarks about those left out. As in Compare; a run that was begun anew in
    the same folder counts once, as its newest.

    Raises:
        UserError: there are none.
    """
    where = f"experiment {experiment!r}" if experiment else "there"
    found = sorted((run for run in found if run.tag("job") != "sweep"), key=lambda run: run.started)
    names = listed(dict.fromkeys(run.name for run in reversed(found)))
    if not found:
        raise UserError(f"{where} has no runs; root=FOLDER, mlflow_run.uri and mlflow_run.experiment say where to look")
    sweeps = dict.fromkeys(filter(None, (run.tag("sweep") for run in reversed(found))))
    if not runs and not sweeps:
        raise UserError(f"{where} has no sweep; say which runs: runs=[a,b] or runs=['*'] (newest: {names})")
    if sweep and sweep not in sweeps:
        raise UserError(f"sweep={sweep}: {where} has no such sweep (it has: {listed(sweeps) or 'none'})")
    if not runs or sweep:
        sweep = sweep or next(iter(sweeps))
        found = [run for run in found if run.tag("sweep") == sweep]
    chosen: dict[Any, Run] = {}
    for pattern in runs or ["*"]:
        matching = [run for run in found if pattern in (run.id, run.name) or fnmatch.fnmatchcase(run.name, pattern)]
        if not matching:
            raise UserError(f"runs: nothing in {where} is named {pattern!r} or has that id (newest: {names})")
        for run in matching:
            chosen[run.id if run.id == pattern else (run.tag("job"), run.tag("folder") or run.id)] = run
    kept = sorted({run.id: run for run in chosen.values()}.values(), key=lambda run: run.started)
    if unfinished:
        return kept, []
    left = [f"{run.name} ({run.status.lower()})" for run in kept if run.status != FINISHED]
    kept = [run for run in kept if run.status == FINISHED]
    if not kept:
        raise UserError(f"none of these runs has finished: {listed(left)}; unfinished=true compares them as they are")
    return kept, [f"Left out, with unfinished=false: {listed(left)}."] if left else []


# --- MLflow -----------------------------------------------------------------------------------------------------


def _read(cfg: Compare) -> tuple[Any, list[Run]]:
    """The client, and all runs of the experiment without their history."""
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    if not cfg.tracking.enabled:
        raise UserError("tracking.enabled=false, and a comparison reads MLflow")
    uri = mlflow_run.tracking_uri(cfg.tracking, cfg.root)
    where = f"{mlflow_run.redact(uri)}, experiment {cfg.tracking.experiment!r}"
    if uri.startswith("sqlite:///") and not os.path.isfile(uri.removeprefix("sqlite:///")):
        raise UserError(f"{where}: no such database; root=FOLDER or mlflow_run.uri says where the runs are")

    def read() -> tuple[Any, list[Run]]:
        client = mlflow_server.client_of(uri)
        experiment = client.get_experiment_by_name(cfg.tracking.experiment)
        if experiment is None:
            known = listed(each.name for each in client.search_experiments())
            raise UserError(f"{where}: no such experiment (there are: {known}); mlflow_run.experiment=NAME")
        runs, token = [], None
        while True:
            part = client.search_runs([experiment.experiment_id], max_results=1000, page_token=token)
            runs += [_run(run) for run in part]
            token = part.token
            if not token:
                return client, runs

    return _asked(where, read)


def _asked(where: str, ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - the boundary: whatever MLflow raises means that it can't be read
        raise UserError(f"{where}: MLflow can't be read ({_problem(error)})") from None


def _problem(error: Exception) -> str:
    return mlflow_run.redact(" ".join(mlflow_server.cause_of(error).split()))[:200]


def _run(run: Any) -> Run:
    info, data = run.info, run.data
    return Run(
        info.run_id,
        info.run_name or info.run_id,
        info.status,
        info.start_time / 1000,
        data.params,
        data.tags,
        data.metrics,
    )


def _histories(client: Any, run: Run, cfg: Compare) -> dict[str, list[tuple[int, float]]]:
    def read() -> dict[str, list[tuple[int, float]]]:
        points = {name: client.get_metric_history(run.id, name) for name in names}
        return {name: sorted({point.step: point.value for point in found}.items()) for name, found in points.items()}

    names = [name for name in run.metrics if any(fnmatch.fnmatchcase(name, pattern) for pattern in cfg.curves)]
    return _asked(f"run {run.name!r} ({run.id})", read)


def _picture(client: Any, run: Run, side: int, scratch: str) -> tuple[tuple[str, str] | None, str]:
    """((caption, data URI) of a run's last picture, of reconstructions rather than another), or None and the reason.
    From MLflow; else from the run's folder, where this machine has it."""
    folder = Path(run.tag("folder") or scratch, "images")

    def of_mlflow() -> tuple[str, str] | None:
        paths = [item.path for item in client.list_artifacts(run.id, "images")]
        found = [(match, path) for path in paths if (match := STORED.match(path))]
        if not found:
            return None
        match, path = max(found, key=_rank)
        return _embedded(client.download_artifacts(run.id, path, scratch), match, run, side)

    def of_folder() -> tuple[str, str] | None:
        found = [(match, str(file)) for file in folder.glob("*.png") if (match := SAVED.match(file.name))]
        match, path = max(found, key=_rank, default=(None, ""))
        return _embedded(path, match, run, side) if match else None

    problems = []
    for read in (of_mlflow, of_folder):
        try:
            if picture := read():
                return picture, ""
        except Exception as error:  # noqa: BLE001 - the boundary: whatever MLflow, its store and a damaged file raise
            problems.append(_problem(error))
    return None, "; ".join(problems) or "none was logged"


def _rank(found: tuple[re.Match[str], str]) -> tuple[int, int]:
    name, step = found[0].groups()
    return (name == "reconstructions") * 2 + ("picture" in name), int(step)


def _embedded(path: str, match: re.Match[str], run: Run, side: int) -> tuple[str, str]:
    with Image.open(path) as image:
        image.load()
        picture = image.convert("RGB")
    name, step, width = re.sub("[~#]", "/", match[1]), int(match[2]), picture.width
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.save(data, format="webp", quality=90)
    scaled = f", shown at {picture.width / width:.0%}" if picture.width < width else ""
    caption = f"{name}" + (f" at {step:,} images" if step else "") + (f", seed {run.seed}" if run.seed else "") + scaled
    return clean(caption), f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
