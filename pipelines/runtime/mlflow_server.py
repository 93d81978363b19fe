"""Requests to an MLflow server. Each has a time limit, and one that fails causes a warning but does not end the job.

Only what the user has to mend ends it: an experiment or a run that was deleted, or an id that is not there.
"""

import os
import queue
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from litevae.errors import UserError, redact
from pipelines.runtime.logs import say
from pipelines.runtime.mlflow_target import DATABASES, Target, find_experiment, has_another_job, run_to_join, say_once
from pipelines.runtime.schema import flatten

# Seconds. MLflow's own defaults (120 s per request, 7 retries) block for 4 minutes if a server refuses connections and
# for 20 minutes if it hangs. Here a request is tried once, and what failed is tried again later.
REQUEST_TIMEOUT = int(os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", 5))
UPLOAD_TIMEOUT = 120  # seconds for an artifact: a server answers only after its own store has accepted the file
Status = Literal["FINISHED", "FAILED", "KILLED"]
Result = TypeVar("Result")


@dataclass(frozen=True)
class RunHandle:
    """Where a run is tracked. It is plain data, so that it can be sent to workers.

    Attributes:
        uri: tracking URI; empty if MLflow is off.
        run_id: id of the MLflow run; None if MLflow is off or did not answer.
        experiment: name of the MLflow experiment.
        folder: absolute path of the run folder.
        experiment_id: id of the experiment; empty if there is no MLflow run.
        started: Unix time of the first start of the run.
    """

    uri: str = field(repr=False)  # may hold a password
    run_id: str | None
    experiment: str
    folder: str
    experiment_id: str = ""
    started: float = 0.0


SENT = "litevae.metrics_sent"  # tag of the run: bytes of metrics.jsonl that have arrived


def client_of(uri: str) -> Any:
    """Return an MLflow client with short time limits, no retries and no output of its own."""
    os.environ.update(
        MLFLOW_DISABLE_TELEMETRY="true",  # by default MLflow reports its use to its developers
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
        MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true",  # the URL may hold a password
    )
    set_timeout(REQUEST_TIMEOUT)
    import logging

    import mlflow

    for name in ("mlflow", "alembic", "urllib3"):  # all that matters is also raised, once
        logging.getLogger(name).setLevel(logging.ERROR)
    return mlflow.MlflowClient(tracking_uri=uri)


def set_timeout(seconds: int) -> None:
    """Set the time limit of the requests that follow."""
    # MLflow reads the variable at each request; it has no argument for this.
    if os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT") != str(seconds):
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(seconds)


def open_run(
    handle: RunHandle,
    target: Target,
    root: str,
    name: str,
    params: dict[str, Any],
    tags: dict[str, str],
    resume: bool,
    rename: bool,
) -> RunHandle:
    """Create the MLflow run of a handle, or go on in the one that is there, and record its parameters.

    Args:
        handle: the handle, as yet without a run.
        target: experiment and run that are asked for.
        root: folder of the artifacts of a database that is no file.
        name: name of a new run.
        params: config values.
        tags: tags of the run.
        resume: whether to go on in the run that this job had in this folder.
        rename: whether a run that is joined gets the name, too.

    Raises:
        UserError: see `run_to_join` and `find_experiment`.
    """
    client = client_of(handle.uri)
    from mlflow.entities import Param, RunTag

    new_tags: dict[str, str] = {}
    run = given = run_to_join(client, handle.uri, target)
    if given is not None:
        experiment_id = given.info.experiment_id
        handle = replace(handle, experiment=client.get_experiment(experiment_id).name)
        if has_another_job(given, tags):
            tags, run = tags | {"mlflow.parentRunId": given.info.run_id}, None
            say_once(f"MLflow: a run below {target.run_id} ($MLFLOW_RUN_ID), in which another job has logged")
        else:
            new_tags = {key: value for key, value in tags.items() if not key.startswith("mlflow.")}
            new_tags |= {"mlflow.runName": name} if rename else {}
            new_tags |= {} if resume else {SENT: "0"}
            say_once(f"MLflow: goes on in run {target.run_id} ($MLFLOW_RUN_ID), experiment {handle.experiment!r}")
    elif (found := find_experiment(client, handle.uri, target)) is not None:
        experiment_id, handle = found.experiment_id, replace(handle, experiment=found.name)
    else:
        experiment_id = _create_experiment(client, handle, root)
    if run is None and resume:
        run = find_run(client, experiment_id, tags)
    if run is None:
        run = client.create_run(experiment_id, run_name=name, tags=tags)
    else:
        client.update_run(run.info.run_id, status="RUNNING")
    values = {key: redact(str(value))[:6000] for key, value in flatten(params, number_sections=True).items()}
    known = run.data.params  # MLflow does not let a parameter change; a changed one becomes a tag
    new_tags |= {f"changed.{key}": value for key, value in values.items() if known.get(key, value) != value}
    client.log_batch(
        run.info.run_id,
        params=[Param(key, value) for key, value in values.items() if key not in known],
        tags=[RunTag(key, value) for key, value in new_tags.items()],
        synchronous=True,
    )
    return replace(handle, run_id=run.info.run_id, experiment_id=experiment_id, started=run.info.start_time / 1000)


def experiment_of(client: Any, handle: RunHandle, root: str) -> str:
    """Return the id of the handle's experiment, and create the experiment if it does not exist.

    Raises:
        UserError: if it was deleted.
    """
    found = find_experiment(client, handle.uri, Target(handle.experiment))
    return _create_experiment(client, handle, root) if found is None else found.experiment_id


def _create_experiment(client: Any, handle: RunHandle, root: str) -> str:
    """Create the handle's experiment, and return its id."""
    from mlflow.exceptions import MlflowException

    # A server knows where to store artifacts. A database does not: its default is relative to the working directory.
    location = None
    if handle.uri.startswith("sqlite"):
        location = os.path.join(os.path.dirname(handle.uri.partition(":///")[2]), "mlartifacts")
    elif re.split("[:+]", handle.uri)[0] in DATABASES:
        location = os.path.join(os.path.abspath(root), "mlartifacts")
    try:
        return client.create_experiment(handle.experiment, artifact_location=location)
    except MlflowException:  # another job created it first
        experiment = find_experiment(client, handle.uri, Target(handle.experiment))
        if experiment is None:
            raise
        return experiment.experiment_id


def find_run(client: Any, experiment_id: str, tags: dict[str, str]) -> Any:
    """Return the latest run with the same folder and job in its tags, or None."""

    def equals(tag: str) -> str:
        quote = '"' if "'" in tags[tag] else "'"
        return f"tags.`{tag}` = {quote}{tags[tag]}{quote}"

    found = client.search_runs(
        [experiment_id],
        filter_string=f"{equals('litevae.folder')} and {equals('litevae.job')}",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return found[0] if found else None


def attempt(handle: RunHandle, seconds: float, call: Callable[[], Result]) -> Result | None:
    """Return what `call` returns. If it fails or takes longer than `seconds`, warn and return None.

    Raises:
        UserError: if `call` raises it.
    """
    result, error = ask(seconds, call)
    if error is not None:
        warn_once(handle, error)
    return result


def ask(seconds: float, call: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    """Return what `call` returns, or how it fails, which includes that it takes longer than `seconds`.

    Raises:
        UserError: if `call` raises it.
    """
    outcome: queue.SimpleQueue[tuple[Result | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((call(), None))
        except Exception as error:  # noqa: BLE001 - reported below, and training continues
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = outcome.get(timeout=seconds)
    except queue.Empty:
        result, error = None, TimeoutError(f"no answer within {seconds:g} s")
    if isinstance(error, UserError):
        raise error
    return result, error


_warned: set[str] = set()


def warn_once(handle: RunHandle, reason: Exception | str) -> None:
    """Print one line that MLflow fails, once per process and tracking URI."""
    if handle.uri not in _warned:
        _warned.add(handle.uri)
        text = redact(" ".join(cause_of(reason).split()))
        say(
            f"warning: tracking at {redact(handle.uri) or handle.folder} fails; the run continues, and its metrics are "
            f"in {handle.folder}/metrics.jsonl ({text[:200]})",
            "WARNING",
        )


def cause_of(reason: BaseException | str) -> str:
    """Return the text of the first exception in a chain, such as "Connection refused": the others only pass it on."""
    if isinstance(reason, str):
        return reason
    while earlier := reason.__cause__ or reason.__context__:
        reason = earlier
    return f"{type(reason).__name__}: {reason}"


def is_server(uri: str) -> bool:
    """Return whether a tracking URI is that of a server, not of a database."""
    return uri.startswith(("http://", "https://"))
