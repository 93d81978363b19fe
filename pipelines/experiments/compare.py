"""Compare runs of an MLflow experiment, as text, Markdown, one HTML page, and JSON (jobs/compare_runs.py)."""

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
from litevae.errors import UserError, redact
from pipelines.experiments import first_look, paper
from pipelines.experiments.comparison import FINISHED, Run, clean, comparison, listed
from pipelines.experiments.config import Compare
from pipelines.experiments.page import as_json, markdown, page, report
from pipelines.runtime import mlflow_run, mlflow_server, mlflow_target
from pipelines.runtime.logs import say

STORED = re.compile(r"images/(.+?)[+%]step[+%](\d+)[+%]timestamp[+%]\d+[+%][^+%]*\.png$")  # path of a picture in MLflow
SAVED = re.compile(r"(.+)-(\d{12})\.png$")  # name of a picture in the run's folder


def compare(cfg: Compare) -> dict[str, Any]:
    """Print the comparison, and write it to `cfg.out` as HTML, Markdown and JSON.

    Returns:
        The content of comparison.json.

    Raises:
        UserError: if there are no such runs, MLflow does not answer, or the config is wrong.
    """
    out = Path(first_look.compare(cfg))
    if (out / "comparison.json").exists():
        say(f"the comparison in {out} will be replaced", folder=str(out))
    client, found, experiment = _read(cfg)
    runs, remarks = select(found, cfg.sweep, cfg.runs, cfg.unfinished, experiment)
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
    """Select the runs to compare.

    Of runs that were started again in the same folder, only the newest counts.

    Args:
        found: all runs of the experiment.
        sweep, runs, unfinished: as in the config `Compare`.
        experiment: the experiment's name, for messages.

    Returns:
        The runs, oldest first, and remarks about runs that were left out.

    Raises:
        UserError: if no run is left.
    """
    where = f"experiment {experiment!r}" if experiment else "there"
    found = sorted((run for run in found if run.tag("job") != "sweep"), key=lambda run: run.started)
    names = listed(dict.fromkeys(run.name for run in reversed(found)))
    if not found:
        raise UserError(f"{where} has no runs; root=FOLDER, tracking.uri and tracking.experiment say where to look")
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


def _read(cfg: Compare) -> tuple[Any, list[Run], str]:
    """Return an MLflow client, all runs of the experiment without their histories, and the experiment's name."""
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    uri = mlflow_run.tracking_uri(cfg.tracking, cfg.root)
    target = mlflow_run.target_of(cfg.tracking)
    where = f"{redact(uri)}, experiment {target.shown}"
    if uri.startswith("sqlite:///") and not os.path.isfile(uri.removeprefix("sqlite:///")):
        raise UserError(f"{where}: the database does not exist; root=FOLDER or tracking.uri says where the runs are")

    def read() -> tuple[Any, list[Run], str]:
        client = mlflow_server.client_of(uri)
        experiment = mlflow_target.find_experiment(client, uri, target)
        if experiment is None:
            known = listed(each.name for each in client.search_experiments())
            raise UserError(f"{where}: no such experiment exists (there are: {known}); give tracking.experiment=NAME")
        runs, token = [], None
        while True:
            part = client.search_runs([experiment.experiment_id], max_results=1000, page_token=token)
            runs += [_run(run) for run in part]
            token = part.token
            if not token:
                return client, runs, experiment.name

    return _asked(where, read)


def _asked(where: str, ask: Callable[[], Any]) -> Any:
    """Call `ask`, and turn whatever MLflow raises into a UserError."""
    try:
        return ask()
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever MLflow raises means that it can't be read
        raise UserError(f"{where}: MLflow can't be read ({_problem(error)})") from None


def _problem(error: Exception) -> str:
    """Return the error's cause in one line of at most 200 characters, without passwords."""
    return redact(" ".join(mlflow_server.cause_of(error).split()))[:200]


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
    """Return the points (step, value) of each of the run's metrics that `cfg.curves` names."""

    def read() -> dict[str, list[tuple[int, float]]]:
        points = {name: client.get_metric_history(run.id, name) for name in names}
        return {name: sorted({point.step: point.value for point in found}.items()) for name, found in points.items()}

    names = [name for name in run.metrics if any(fnmatch.fnmatchcase(name, pattern) for pattern in cfg.curves)]
    return _asked(f"run {run.name!r} ({run.id})", read)


def _picture(client: Any, run: Run, side: int, scratch: str) -> tuple[tuple[str, str] | None, str]:
    """Find a run's last picture, and prefer pictures of reconstructions.

    It is read from MLflow, or else from the run's folder if this machine has it.

    Args:
        side: the longer side of the picture in pixels, at most.
        scratch: a temporary folder for downloads.

    Returns:
        (caption, data URI) and "", or None and the reason.
    """
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
        except Exception as error:  # noqa: BLE001 - MLflow, its store and damaged files can raise anything
            problems.append(_problem(error))
    return None, "; ".join(problems) or "none was logged"


def _rank(found: tuple[re.Match[str], str]) -> tuple[int, int]:
    """Return the sort key of a picture: reconstructions above other pictures, then the later step."""
    name, step = found[0].groups()
    return (name == "reconstructions") * 2 + ("picture" in name), int(step)


def _embedded(path: str, match: re.Match[str], run: Run, side: int) -> tuple[str, str]:
    """Return the caption and the data URI (WebP) of a picture, whose longer side is reduced to `side` pixels."""
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
