"""Where in MLflow a run goes: the experiment and the run that the config or MLflow's environment variables ask for."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from litevae.errors import UserError, redact
from pipelines.runtime.logs import say

DATABASES = ("postgresql", "mysql", "mssql")  # which MLflow knows beside SQLite
Result = TypeVar("Result")


@dataclass(frozen=True)
class Target:
    """Where in MLflow the config and MLflow's environment variables want a run.

    Attributes:
        experiment: name of the experiment; empty if only its id is given.
        experiment_id: what $MLFLOW_EXPERIMENT_ID says, unless the config names an experiment.
        given_by: the field or variable that names the experiment; empty for the default.
        instead_of: the variable and its value that the config overrides; empty for none.
        run_id: what $MLFLOW_RUN_ID says, unless the config wants another run.
        elsewhere: whether the config names another server than the environment, which may not have that run.
    """

    experiment: str
    experiment_id: str = ""
    given_by: str = ""
    instead_of: str = ""
    run_id: str = ""
    elsewhere: bool = False

    @property
    def shown(self) -> str:
        """The experiment's name or id, for messages."""
        return repr(self.experiment) if self.experiment else f"of id {self.experiment_id}"


def run_to_join(client: Any, uri: str, target: Target) -> Any:
    """Return the run that $MLFLOW_RUN_ID names, or None if there is none to join.

    Raises:
        UserError: if it was deleted, or is not on this server.
    """
    if not target.run_id:
        return None
    where = f"$MLFLOW_RUN_ID={target.run_id}"
    way_out = "unset the variable, or give tracking.join=false for a run of its own"
    run = _lookup(lambda: client.get_run(target.run_id))
    if run is None and target.elsewhere:
        say_once(f"MLflow: {where} is left alone: tracking.uri is another server, which has no such run")
        return None
    if run is None:
        raise UserError(f"{where}: {redact(uri)} has no such run; {way_out}")
    experiment = client.get_experiment(run.info.experiment_id)
    if target.given_by == "tracking.experiment" and experiment.name != target.experiment:
        say_once(
            f"MLflow: {where} is left alone: it is in experiment {experiment.name!r}, and "
            f"tracking.experiment={target.experiment}"
        )
        return None
    if _deleted(experiment):
        raise UserError(
            f"{where}: its experiment {experiment.name!r} was deleted in MLflow: restore it "
            f"({_restore_experiment(uri, experiment)}), or {way_out}"
        )
    if _deleted(run.info):
        raise UserError(
            f"{where}: the run was deleted in MLflow: restore it ({_restore_run(uri, target.run_id)}), or {way_out}"
        )
    if target.given_by and target.experiment not in ("", experiment.name):
        say_once(f"MLflow: experiment {experiment.name!r} of {where}, not {target.experiment!r} of {target.given_by}")
    return run


def find_experiment(client: Any, uri: str, target: Target) -> Any:
    """Return the experiment that is asked for, or None if it is still to be made.

    Raises:
        UserError: if it was deleted, or if its id is not on this server or belongs to another name.
    """
    if target.experiment:
        experiment = client.get_experiment_by_name(target.experiment)
        if target.experiment_id and (experiment is None or experiment.experiment_id != target.experiment_id):
            other = "does not exist" if experiment is None else f"has id {experiment.experiment_id}"
            raise UserError(
                f"$MLFLOW_EXPERIMENT_ID={target.experiment_id}, but $MLFLOW_EXPERIMENT_NAME={target.experiment} "
                f"{other} in {redact(uri)}: unset one of them, or give tracking.experiment=NAME"
            )
    else:
        experiment = _lookup(lambda: client.get_experiment(target.experiment_id))
        if experiment is None:
            raise UserError(
                f"$MLFLOW_EXPERIMENT_ID={target.experiment_id}: {redact(uri)} has no such experiment; set it to one "
                f"that is there, or give tracking.experiment=NAME"
            )
    if experiment is not None and _deleted(experiment):
        by = f" ({target.given_by})" if target.given_by else ""
        raise UserError(
            f"experiment {experiment.name!r}{by} was deleted in MLflow: restore it "
            f"({_restore_experiment(uri, experiment)}), or give tracking.experiment=NAME of another"
        )
    if target.given_by.startswith("$") or target.instead_of:
        name = experiment.name if experiment is not None else target.experiment
        other = f", not {target.instead_of}" if target.instead_of else ""
        say_once(f"MLflow: experiment {name!r} ({target.given_by}){other}")
    return experiment


def check_parent(client: Any, uri: str, run_id: str) -> None:
    """Check that the run which `tracking.parent` names is there.

    Raises:
        UserError: if it is not there, or was deleted.
    """
    run = _lookup(lambda: client.get_run(run_id))
    if run is None:
        raise UserError(
            f"tracking.parent={run_id}: {redact(uri)} has no such run; give the id of one, or leave it empty"
        )
    if _deleted(run.info):
        raise UserError(
            f"tracking.parent={run_id}: the run was deleted in MLflow: restore it ({_restore_run(uri, run_id)}), or "
            f"give another"
        )


def _restore_experiment(uri: str, experiment: Any) -> str:
    """Return the command that takes an experiment out of MLflow's bin."""
    return (
        f"MLFLOW_TRACKING_URI={shlex.quote(uri)} mlflow experiments restore --experiment-id {experiment.experiment_id}"
    )


def _restore_run(uri: str, run_id: str) -> str:
    """Return the command that takes a run out of MLflow's bin."""
    return f"MLFLOW_TRACKING_URI={shlex.quote(uri)} mlflow runs restore --run-id {run_id}"


def _lookup(ask: Callable[[], Result]) -> Result | None:
    """Return what `ask` returns, or None if MLflow says that there is no such thing."""
    from mlflow.exceptions import MlflowException

    try:
        return ask()
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _deleted(entity: Any) -> bool:
    """Return whether an experiment, or the info of a run, is in MLflow's bin."""
    return entity.lifecycle_stage == "deleted"


def has_another_job(run: Any, tags: dict[str, str]) -> bool:
    """Return whether another job, or the same job in another folder, logs to this run."""
    theirs = run.data.tags
    return any(theirs.get(tag, tags[tag]) != tags[tag] for tag in ("litevae.folder", "litevae.job"))


_said: set[str] = set()


def say_once(text: str) -> None:
    """Print a line, once per process."""
    if text not in _said:
        _said.add(text)
        say(text)
