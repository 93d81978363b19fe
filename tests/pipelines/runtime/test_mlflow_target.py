"""Where in MLflow a run goes: the config, MLflow's own variables, and what was deleted; on a real SQLite store."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pytest

from litevae.errors import UserError
from pipelines.experiments import run_trial
from pipelines.experiments.config import Sweep
from pipelines.experiments.sweep import _beside
from pipelines.experiments.trials import TrialRow
from pipelines.runtime import cluster, mlflow_run, mlflow_server, mlflow_target
from pipelines.runtime.mlflow_run import Tracker, check, start_run
from pipelines.runtime.mlflow_server import RunHandle
from pipelines.runtime.schema import Tracked, Tracking


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    """A store, and beside it an empty one, since making the tables takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/empty.db").search_experiments()
    shutil.copy(folder / "empty.db", folder / "mlflow.db")
    return f"sqlite:///{folder}/mlflow.db"


@pytest.fixture(scope="module")
def client(uri):
    return mlflow.MlflowClient(tracking_uri=uri)


@pytest.fixture(autouse=True)
def fresh(uri, monkeypatch):
    """A platform that has set the server alone; nothing was said yet."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(mlflow_target, "_said", set())
    monkeypatch.setattr(mlflow_server, "_warned", set())


@pytest.fixture
def experiment(client, request) -> SimpleNamespace:
    """A new one, with a run as a platform makes it."""
    number = client.create_experiment(request.node.name)
    run = client.create_run(number, run_name="platform's", tags={"mlflow.source.name": "project"})
    client.log_param(run.info.run_id, "seed", "9")
    return SimpleNamespace(name=request.node.name, id=number, run=run.info.run_id)


def begin(folder: Path, job: str = "train_vae", resume: bool = True, params=None, **tracking) -> RunHandle:
    return start_run(
        Tracking(**tracking), str(folder.parent), job, folder.name, params or {"seed": 3}, str(folder), resume=resume
    )


def checked(**tracking) -> None:
    check(Tracked(tracking=Tracking(**tracking)))


def log(handle: RunHandle, *steps: int) -> None:
    tracker = Tracker(handle, system=False)
    for step in steps:
        tracker.metrics({"loss": float(step)}, step)
    tracker.close("FINISHED")


def history(client, run_id: str) -> list[int]:
    return [metric.step for metric in client.get_metric_history(run_id, "loss")]


def lines(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("MLflow: ")]


# --- the experiment ---------------------------------------------------------------------------------------------


def test_the_default_is_litevae(client, tmp_path, capsys):
    handle = begin(tmp_path / "a")
    assert (handle.experiment, client.get_experiment(handle.experiment_id).name) == ("litevae", "litevae")
    assert lines(capsys) == []


def test_the_platforms_experiment_counts(client, experiment, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", experiment.name)
    for name in ("a", "b"):
        handle = begin(tmp_path / name)
        assert (handle.experiment, handle.experiment_id) == (experiment.name, experiment.id)
    assert lines(capsys) == [f"MLflow: experiment '{experiment.name}' ($MLFLOW_EXPERIMENT_NAME)"]  # once
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment.id)
    assert begin(tmp_path / "c").experiment_id == experiment.id
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "")  # as unset
    handle = begin(tmp_path / "d")
    assert (handle.experiment, handle.experiment_id) == (experiment.name, experiment.id)
    assert lines(capsys) == [f"MLflow: experiment '{experiment.name}' ($MLFLOW_EXPERIMENT_ID)"]
    handle = begin(tmp_path / "e", experiment="mine")
    assert (handle.experiment, client.get_experiment(handle.experiment_id).name) == ("mine", "mine")


def test_a_new_name_of_the_platform_is_made(client, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "1.10")
    checked()
    assert client.get_experiment_by_name("1.10") is None
    assert client.get_experiment(begin(tmp_path / "a").experiment_id).name == "1.10"


def test_the_config_wins_and_says_so(experiment, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "other")
    assert begin(tmp_path / "a", experiment=experiment.name).experiment_id == experiment.id
    assert lines(capsys) == [
        f"MLflow: experiment '{experiment.name}' (tracking.experiment), not $MLFLOW_EXPERIMENT_NAME=other"
    ]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"ID": "987654"},
            r"\$MLFLOW_EXPERIMENT_ID=987654: sqlite.* has no such experiment; .*tracking\.experiment=NAME",
        ),
        ({"ID": "abc"}, r"\$MLFLOW_EXPERIMENT_ID=abc: .* has no such experiment"),
        ({"ID": "987654", "NAME": "Default"}, r"MLFLOW_EXPERIMENT_NAME=Default has id 0 in .*: unset one of them"),
        ({"ID": "0", "NAME": "nowhere"}, r"MLFLOW_EXPERIMENT_NAME=nowhere does not exist in .*: unset one of them"),
    ],
)
def test_an_experiment_that_is_not_there(variables, message, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(f"MLFLOW_EXPERIMENT_{name}", value)
    for refuse in (checked, lambda: begin(tmp_path / "a")):
        with pytest.raises(UserError, match=message):
            refuse()
    checked(experiment="mine")  # what the message says
    assert begin(tmp_path / "a", experiment="mine").run_id


# --- what was deleted -------------------------------------------------------------------------------------------


def obey(message: str) -> None:
    """Run the command in the message."""
    from click.testing import CliRunner
    from mlflow.cli import cli

    command = re.search(r"restore it \((.*?)\), or ", message)
    assert command, message
    variable, program, *words = shlex.split(command[1])
    assert program == "mlflow"
    name, _, value = variable.partition("=")
    done = CliRunner(env={name: value}).invoke(cli, words)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("given", ["config", "NAME", "ID"])
def test_a_deleted_experiment_is_refused(given, client, experiment, tmp_path, monkeypatch):
    config = {"experiment": experiment.name} if given == "config" else {}
    if given != "config":
        monkeypatch.setenv(f"MLFLOW_EXPERIMENT_{given}", experiment.id if given == "ID" else experiment.name)
    before = begin(tmp_path / "a", **config)
    log(before, 1)
    client.delete_experiment(experiment.id)
    for refuse in (lambda: checked(**config), lambda: begin(tmp_path / "a", resume=False, **config)):
        with pytest.raises(UserError, match=rf"experiment '{re.escape(experiment.name)}'.* was deleted") as error:
            refuse()
    assert (tmp_path / "a" / "metrics.jsonl").exists()  # nothing is lost by what was refused
    assert "or give tracking.experiment=NAME of another" in str(error.value)
    checked(experiment="another")
    assert begin(tmp_path / "b", experiment="another").run_id
    obey(str(error.value))
    checked(**config)
    assert begin(tmp_path / "a", **config).run_id == before.run_id


def test_a_deleted_run_of_a_folder_is_replaced_by_one_that_has_it_all(client, experiment, tmp_path):
    first = begin(tmp_path / "a", experiment=experiment.name)
    log(first, 1, 2)
    client.delete_run(first.run_id)
    second = begin(tmp_path / "a", experiment=experiment.name)
    log(second, 3)
    assert second.run_id != first.run_id
    assert history(client, second.run_id) == [1, 2, 3]


def test_a_parent_that_is_not_there_is_refused(client, experiment):
    checked(parent=experiment.run)
    client.delete_run(experiment.run)
    with pytest.raises(UserError, match=rf"tracking\.parent={experiment.run}: the run was deleted") as error:
        checked(parent=experiment.run)
    obey(str(error.value))
    checked(parent=experiment.run)
    for wrong in ("0" * 32, "none"):
        with pytest.raises(UserError, match=rf"tracking\.parent={wrong}: .* has no such run"):
            checked(parent=wrong)


def test_what_is_not_there_yet_or_does_not_answer_is_no_reason_to_refuse(tmp_path, monkeypatch, closed_port):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    check(Tracked(root=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []  # no database either
    checked(uri=f"http://127.0.0.1:{closed_port}")
    checked(uri="databricks", enabled=False)
    monkeypatch.setattr(cluster, "in_worker", lambda: True)
    checked(uri="databricks")


# --- the run ----------------------------------------------------------------------------------------------------


def test_the_platforms_run_is_joined_and_resumed(client, experiment, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_RUN_ID", experiment.run)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "other")
    handle = begin(tmp_path / "a", params={"seed": 3, "lr": 0.1}, tags={"team": "vision"})
    assert (handle.run_id, handle.experiment, handle.experiment_id) == (experiment.run, experiment.name, experiment.id)
    run = client.get_run(experiment.run)
    assert handle.started == run.info.start_time / 1000
    assert (run.info.status, run.info.run_name) == ("RUNNING", "platform's")
    assert run.data.params == {"seed": "9", "lr": "0.1"}
    expected = {
        "mlflow.source.name": "project", "changed.seed": "3", "team": "vision", "litevae.job": "train_vae",
        "litevae.folder": str(tmp_path / "a"),
    }  # fmt: skip
    assert expected.items() <= run.data.tags.items()
    log(handle, 1, 2)
    assert client.get_run(experiment.run).info.status == "FINISHED"
    assert lines(capsys) == [
        f"MLflow: experiment '{experiment.name}' of $MLFLOW_RUN_ID={experiment.run}, not 'other' of "
        f"$MLFLOW_EXPERIMENT_NAME",
        f"MLflow: goes on in run {experiment.run} ($MLFLOW_RUN_ID), experiment '{experiment.name}'",
    ]
    again = begin(tmp_path / "a")  # the platform starts the job again
    log(again, 2, 3)
    assert again.run_id == experiment.run
    assert history(client, experiment.run) == [1, 2, 3]
    fresh = begin(tmp_path / "a", resume=False)
    log(fresh, *range(4, 12))  # a longer file than before
    assert fresh.run_id == experiment.run
    assert history(client, experiment.run) == [*range(1, 12)]  # it is sent from its start


def test_a_run_that_goes_on_elsewhere_is_whole_there(client, experiment, tmp_path, monkeypatch):
    """A run of the folder's own first, then the platform's, which gets all of it."""
    own = begin(tmp_path / "a", experiment=experiment.name)
    log(own, 1, 2)
    monkeypatch.setenv("MLFLOW_RUN_ID", experiment.run)
    log(begin(tmp_path / "a"), 3)
    assert (history(client, own.run_id), history(client, experiment.run)) == ([1, 2], [1, 2, 3])


def test_other_jobs_get_runs_below_the_platforms(client, experiment, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_RUN_ID", experiment.run)
    log(begin(tmp_path / "a"), 1)
    others = [begin(tmp_path / "b"), begin(tmp_path / "a", job="evaluate", resume=False)]
    for other in others:
        log(other, 5)
        assert history(client, other.run_id) == [5]
        assert other.experiment_id == experiment.id
        assert client.get_run(other.run_id).data.tags["mlflow.parentRunId"] == experiment.run
    assert len({experiment.run, *(other.run_id for other in others)}) == 3
    assert begin(tmp_path / "b").run_id == others[0].run_id  # a resume finds it
    assert history(client, experiment.run) == [1]
    assert f"MLflow: a run below {experiment.run} ($MLFLOW_RUN_ID), in which another job has logged" in lines(capsys)


def test_a_name_of_the_config_names_the_joined_run(client, experiment, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", experiment.run)
    begin(tmp_path / "a", run="2024-10-05")
    assert client.get_run(experiment.run).info.run_name == "2024-10-05"


def test_the_platforms_run_is_left_alone_where_the_config_says_otherwise(
    client, experiment, uri, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("MLFLOW_RUN_ID", experiment.run)
    for name, config in (
        ("a", {"join": False}),
        ("b", {"experiment": "mine"}),
        ("c", {"parent": experiment.run}),
        ("d", {"uri": uri.replace("mlflow.db", "empty.db")}),
    ):
        checked(**config)
        assert begin(tmp_path / name, **config).run_id not in (None, experiment.run)
    left = f"MLflow: $MLFLOW_RUN_ID={experiment.run} is left alone: "
    assert lines(capsys) == [
        f"{left}it is in experiment '{experiment.name}', and tracking.experiment=mine",
        f"{left}tracking.parent={experiment.run}",
        f"{left}tracking.uri is another server, which has no such run",
    ]
    assert begin(tmp_path / "e", uri=uri, experiment=experiment.name).run_id == experiment.run  # it says the same


def test_a_run_that_was_deleted_or_is_not_there_is_refused(client, experiment, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", experiment.run)
    for delete, what in (
        (lambda: client.delete_run(experiment.run), "the run was deleted"),
        (lambda: client.delete_experiment(experiment.id), "its experiment .* was deleted"),
    ):
        delete()
        for refuse in (checked, lambda: begin(tmp_path / "a")):
            with pytest.raises(UserError, match=rf"\$MLFLOW_RUN_ID={experiment.run}: {what}") as error:
                refuse()
        checked(join=False)
        obey(str(error.value))
        checked()
    for wrong in ("0" * 32, "none"):
        monkeypatch.setenv("MLFLOW_RUN_ID", wrong)
        for refuse in (checked, lambda: begin(tmp_path / "a")):
            with pytest.raises(UserError, match=rf"MLFLOW_RUN_ID={wrong}: .* has no such run; .*tracking\.join=false"):
                refuse()
        checked(join=False)


def test_rows_of_a_sweep_do_not_join_its_run(client, experiment, tmp_path, monkeypatch):
    """Nor where the sweep's own run could not be opened. Workers have another environment: all is in their config."""
    monkeypatch.setenv("MLFLOW_RUN_ID", experiment.run)
    sweep = begin(tmp_path / "sweep", job="sweep")
    assert sweep.run_id == experiment.run
    cfg = _beside(Sweep(), sweep)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the worker's node")
    found = []
    for seed, parent in ((0, sweep.run_id), (1, sweep.run_id), (2, "")):
        row = TrialRow("a", seed, str(tmp_path / f"row-{seed}"), {})
        config = run_trial.tracking_of(cfg, row, parent)
        handle = start_run(config, str(tmp_path), "train_vae", "vae-1", {}, row.folder)
        assert handle.experiment_id == experiment.id
        assert client.get_run(handle.run_id).data.tags.get("mlflow.parentRunId", "") == parent
        found.append(handle.run_id)
    assert len({experiment.run, *found}) == 4


# --- kinds of servers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("databricks", "tracking on Databricks is not supported; give tracking.uri=http"),
        ("databricks://profile", "tracking on Databricks is not supported"),
        ("databricks-uc", "tracking on Databricks is not supported"),
        ("uc:http://host", "tracking on Databricks is not supported"),
        ("azureml://region.api.azureml.ms/mlflow", "azureml is not supported: no package that adds it"),
        ("arn:aws:sagemaker:eu-west-1:1:mlflow-tracking-server/x", "arn is not supported: no package that adds it"),
        ("s3://bucket/mlruns", "s3 is not supported"),
        ("./mlruns", "not in a folder"),
        ("/data/mlruns", "not in a folder"),
        ("file:///tmp/mlruns", "not in a folder"),
        ("file:mlruns", "not in a folder"),
        ("mlflow.company.com:5000", "lacks its scheme; give tracking.uri=http://mlflow.company.com:5000,"),
        ("localhost:5000", "lacks its scheme; give tracking.uri=http://localhost:5000,"),
        ("http:/host:5000", "names no host; give tracking.uri=http://host:5000,"),
        ("https://", "names no host; give tracking.uri=https://host:port,"),
        ("postgres://me:secret@host/db", "postgresql; give tracking.uri=postgresql://***@host/db,"),
        ("sqlite://", "give the database's file"),
        ("sqlite:///:memory:", "give the database's file"),
        ("postgresql+psycopg2://me:secret@host/db", "install the driver"),
        ("mysql+nodriver://me:secret@host/db", "install the driver"),
    ],
)
def test_servers_of_another_kind_are_refused_by_name(given, message, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    for refuse, field in ((lambda: checked(uri=given), "tracking.uri"), (checked, "$MLFLOW_TRACKING_URI")):
        with pytest.raises(UserError) as error:
            refuse()
        assert str(error.value).startswith(f"{field}={given.replace('me:secret', '***')}: ")
        assert message in str(error.value)
        assert "tracking.enabled=false" in str(error.value) or message == "give the database's file"
        assert "secret" not in str(error.value)
    checked(enabled=False)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("http://host:1", "http://host:1"),
        ("HTTPS://host", "https://host"),
        ("mysql+pymysql://host/db", "mysql+pymysql://host/db"),
        ("sqlite:////data/m.db?timeout=9", None),
        ("azureml://region", "azureml://region"),
    ],
)
def test_servers_that_are_taken(given, taken, tmp_path, monkeypatch):
    if given.startswith("azureml"):  # as where its package is installed
        monkeypatch.setattr(mlflow_run, "entry_points", lambda group: [SimpleNamespace(name="azureml")])
    if taken is None:
        given = taken = given.replace("/data", str(tmp_path))
    assert mlflow_run.tracking_uri(Tracking(uri=given), str(tmp_path)) == taken
    assert not os.path.exists("/data/m.db")
