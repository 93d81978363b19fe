"""MLflow tracking, checked through MLflow's own client, against real servers: one that works, one that is killed and
comes back, one that refuses and one that hangs."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from litevae.errors import UserError
from pipelines.runtime import mlflow_run, mlflow_server
from pipelines.runtime.mlflow_run import Tracker, finish, link, redact, start_run, tracked_run
from pipelines.runtime.mlflow_server import RunHandle
from pipelines.runtime.schema import Tracked, Tracking
from tests import ports
from tests.commands import REPO

PARAMS = {"seed": 3, "optim": {"lr": 1e-4, "betas": [0.5, 0.9]}, "stages": [{"images": 8}, {"images": 4}], "init": ""}


def begin(folder: Path, uri: str = "", **kwargs) -> RunHandle:
    defaults = {"job": "train_vae", "name": folder.name, "params": PARAMS, "folder": str(folder), "resume": True}
    return start_run(Tracking(uri=uri), str(folder.parent), **(defaults | kwargs))


def client(uri: str):
    import mlflow

    return mlflow.MlflowClient(tracking_uri=uri)


def history(handle: RunHandle, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client(handle.uri).get_metric_history(handle.run_id, key)]


def recorded(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (24, 40, 3), dtype=np.uint8)


class Server:
    """A real `mlflow server` on loopback, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, ports.reserve()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        options = {
            "--backend-store-uri": f"sqlite:///{self.folder}/server.db",
            "--artifacts-destination": str(self.folder / "server-artifacts"),
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--workers": "1",
        }
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *(word for pair in options.items() for word in pair)],
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            time.sleep(0.2)
        raise AssertionError("the MLflow server did not come up:\n" + (self.folder / "server.log").read_text())

    def kill(self) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def hanging() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


# --- a server that works ----------------------------------------------------------------------------------------


def test_all_of_a_run_is_on_the_server(server: Server, tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "deep").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "deep" / "weights").write_bytes(b"w" * 1000)
    handle = begin(tmp_path / "vae", server.uri, tags={"note": "s3://me:pw@bucket"})
    tracker = Tracker(handle)
    for step in range(16, 161, 16):
        tracker.metrics({"train/l1": 1 / step, "train/kl": step}, step)
    tracker.metrics({"val/psnr": float("nan"), "val/a=b": float("inf")}, 160)
    tracker.image("val/reconstructions", picture(), 160)
    tracker.artifact(model / "config.json")
    tracker.artifacts(model, "model")
    tracker.dataset("photos", "ab" * 32, "s3://key:secret@bucket/photos")
    tracker.close()
    assert client(server.uri).get_run(handle.run_id).info.status == "RUNNING"
    finish(handle)

    mlflow = client(server.uri)
    run = mlflow.get_run(handle.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "vae")
    assert run.data.params == {
        "seed": "3",
        "optim.lr": "0.0001",
        "optim.betas": "[0.5, 0.9]",
        "stages.0.images": "8",
        "stages.1.images": "4",
        "init": "",
    }
    assert run.data.tags["litevae.job"] == "train_vae"
    assert run.data.tags["note"] == "s3://***@bucket"
    assert history(handle, "train/l1") == [(step, 1 / step) for step in range(16, 161, 16)]
    assert np.isnan(history(handle, "val/psnr")[0][1])
    assert history(handle, "val/a_b") == [(160, sys.float_info.max)]  # MLflow's databases store infinity so
    assert any(key.startswith("system/cpu") for key in run.data.metrics)

    images = [file.path for file in mlflow.list_artifacts(handle.run_id, "images")]
    (full,) = (path for path in images if path.endswith(".png"))
    assert full.startswith("images/val~reconstructions+step+160+")
    arrived = mlflow.download_artifacts(handle.run_id, full, str(tmp_path))
    assert np.array_equal(np.asarray(Image.open(arrived)), picture())
    arrived = mlflow.download_artifacts(handle.run_id, "model/deep/weights", str(tmp_path))
    assert Path(arrived).read_bytes() == b"w" * 1000
    assert "config.json" in [file.path for file in mlflow.list_artifacts(handle.run_id)]

    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("photos", ("ab" * 32)[:36])
    assert json.loads(dataset.dataset.profile) == {"digest": "ab" * 32}
    assert json.loads(dataset.dataset.source) == {"uri": "s3://***@bucket/photos"}
    assert link(handle) == f"{server.uri}/#/experiments/{handle.experiment_id}/runs/{handle.run_id}"
    assert len(recorded(tmp_path / "vae")) == 11


@pytest.mark.chaos
def test_server_killed_in_the_middle_and_back(
    server: Server, tmp_path: Path, capfd, monkeypatch, asked: list["Request"]
) -> None:
    monkeypatch.setattr(mlflow_run, "FLUSH_EVERY", 0.05)
    monkeypatch.setattr(mlflow_run, "BACKOFF", (0.1, 0.5))
    folder = tmp_path / "vae"
    handle = begin(folder, server.uri)
    tracker = Tracker(handle)
    tracker.metrics({"loss": 0.0}, 0)
    wait_for(lambda: history(handle, "loss") == [(0, 0.0)])
    server.kill()
    asked.clear()
    for step in range(1, 50):
        tracker.metrics({"loss": float(step)}, step)
    tracker.image("grid", picture(), 49)
    assert threading.current_thread() not in {request.thread for request in asked}
    wait_for(lambda: tracker._failing)
    server.start()
    tracker.close("FINISHED")
    warnings = capfd.readouterr().out.splitlines()
    assert len(warnings) == 1
    assert str(folder / "metrics.jsonl") in warnings[0]
    assert history(handle, "loss") == [(step, float(step)) for step in range(50)]
    assert client(server.uri).get_run(handle.run_id).info.status == "FINISHED"
    assert len(client(server.uri).list_artifacts(handle.run_id, "images")) == 2  # full size and preview


class Request(NamedTuple):
    """What was sent to a server: by which thread, how long it may take, how often it is repeated by itself."""

    thread: threading.Thread
    timeout: float
    retries: int


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Every request that this process makes of an HTTP server, in order."""
    import requests

    found: list[Request] = []
    send = requests.adapters.HTTPAdapter.send

    def spy(adapter, request, **options):
        found.append(Request(threading.current_thread(), options["timeout"], adapter.max_retries.total))
        return send(adapter, request, **options)

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", spy)
    return found


def wait_for(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


# --- servers that do not ----------------------------------------------------------------------------------------


def log_on_a_dead_server(handle: RunHandle, asked: list[Request]) -> None:
    """Every call leaves the asking to another thread, and close() does not wait until it would ask again."""
    folder = Path(handle.folder)
    (folder / "file").write_text("x")
    tracker = Tracker(handle)
    for step in range(100):
        tracker.metrics({"loss": step / 2}, step)
    tracker.image("grid", picture(), 99)
    tracker.artifact(folder / "file")
    tracker.artifacts(folder)
    tracker.dataset("photos", "ab", "/photos")
    tracker.close("FINISHED")
    assert not tracker._thread.is_alive()
    finish(handle, "FAILED")
    assert threading.current_thread() not in {request.thread for request in asked}
    assert {(request.timeout, request.retries) for request in asked} == {(mlflow_server.REQUEST_TIMEOUT, 0)}
    assert [(line["step"], line["loss"]) for line in recorded(folder)] == [(step, step / 2) for step in range(100)]
    assert np.array_equal(np.asarray(Image.open(folder / "images" / "grid-000000000099.png")), picture())


@pytest.fixture
def dead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A server that refuses, or one that hangs; what failed is not tried again for hours."""
    monkeypatch.setattr(mlflow_server, "REQUEST_TIMEOUT", 1)
    monkeypatch.setattr(mlflow_run, "BACKOFF", (9999.0, 9999.0))
    if request.param == "hanging":
        return request.getfixturevalue("hanging")
    return f"http://me:secret@127.0.0.1:{request.getfixturevalue('closed_port')}"


@pytest.mark.parametrize(("dead", "cause"), [("refusing", "refused"), ("hanging", "timed out")], indirect=["dead"])
def test_a_dead_server_costs_one_request_and_one_warning(
    dead: str, cause: str, tmp_path: Path, capfd, asked: list[Request]
) -> None:
    handle = begin(tmp_path / "vae", dead)
    assert handle.run_id is None
    log_on_a_dead_server(handle, asked)
    assert link(handle) == str(tmp_path / "vae" / "metrics.jsonl")
    assert len(asked) == 1
    (warning,) = capfd.readouterr().out.splitlines()
    assert "secret" not in warning
    assert cause in warning


@pytest.mark.parametrize("dead", ["refusing", "hanging"], indirect=True)
def test_a_server_that_dies_after_the_start_holds_nothing_up(
    dead: str, tmp_path: Path, capfd, asked: list[Request]
) -> None:
    (tmp_path / "vae").mkdir()
    log_on_a_dead_server(RunHandle(dead, "0" * 32, "litevae", str(tmp_path / "vae")), asked)
    of_tracker = [request for request in asked if request.thread.name == "tracking"]
    assert 1 <= len(of_tracker) <= 2  # when something is logged, and when it ends
    assert len(asked) - len(of_tracker) <= 1  # when the run is said to have failed
    assert len(capfd.readouterr().out.splitlines()) == 1


def test_a_start_that_does_not_end_is_not_waited_for(tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_server, "REQUEST_TIMEOUT", 0.05)
    ended = threading.Event()
    monkeypatch.setattr(mlflow_server, "open_run", lambda *_: ended.wait(120))
    try:
        assert begin(tmp_path / "vae", "http://nowhere.invalid").run_id is None
    finally:
        ended.set()
    assert "no answer within 0.15 s" in capfd.readouterr().out


# --- the default store, and resuming ----------------------------------------------------------------------------


@pytest.mark.slow
def test_sqlite_beside_the_runs_and_a_run_killed_and_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "it's vae"
    first = f"""
import os, signal, time, numpy
from tests.pipelines.runtime.test_mlflow_server import *
handle = begin(Path({str(folder)!r}))
tracker = Tracker(handle)
for step in range(10):
    tracker.metrics({{"loss": float(step)}}, step)
    if step == 4:
        wait_for(lambda: history(handle, "loss"))  # some have arrived, the others have not
tracker._file.write(b'{{"step": 10, "lo')
print(handle.run_id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", first], capture_output=True, text=True, cwd=REPO)
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    handle = begin(folder, params=PARAMS | {"seed": 4, "new": True})
    assert handle.run_id == killed.stdout.strip()
    assert handle.uri == f"sqlite:///{tmp_path}/mlflow.db"
    tracker = Tracker(handle, system=False)
    for step in range(6, 15):  # from the last checkpoint
        tracker.metrics({"loss": float(step), "late": 1.0}, step)
    tracker.image("grid", picture(), 14)
    tracker.close("FINISHED")

    assert [line["step"] for line in recorded(folder) if "loss" in line] == list(range(15))
    assert history(handle, "loss") == [(step, float(step)) for step in range(15)]
    assert history(handle, "late") == [(step, 1.0) for step in range(6, 15)]
    run = client(handle.uri).get_run(handle.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["seed"] == "3"
    assert run.data.params["new"] == "True"
    assert run.data.tags["changed.seed"] == "4"
    assert Path(run.info.artifact_uri).is_relative_to(tmp_path / "mlartifacts")
    assert len(list((tmp_path / "mlartifacts").rglob("*.png"))) == 1
    assert f"--backend-store-uri sqlite:///{tmp_path}/mlflow.db" in link(handle)

    fresh = begin(folder, resume=False)
    assert fresh.run_id != handle.run_id
    assert not (folder / "metrics.jsonl").exists()
    assert not list((folder / "images").iterdir())
    assert begin(folder).run_id == fresh.run_id
    assert begin(folder, job="evaluate").run_id not in (handle.run_id, fresh.run_id)


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (UserError("no"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_a_tracked_job_ends_its_run_however_it_ends(tmp_path: Path, error: BaseException | None, status: str) -> None:
    cfg = Tracked(root=str(tmp_path))
    with contextlib.nullcontext() if error is None else pytest.raises(type(error)):  # noqa: SIM117
        with tracked_run(cfg, "evaluate", "mine", str(tmp_path / "out")) as (tracker, handle):
            tracker.metrics({"eval/psnr": 3.0}, 0)
            if error is not None:
                raise error
    assert client(handle.uri).get_run(handle.run_id).info.status == status
    assert history(handle, "eval/psnr") == [(0, 3.0)]
    run = client(handle.uri).get_run(handle.run_id)
    assert (run.info.run_name, run.data.tags["litevae.job"], run.data.params["root"]) == (
        "mine",
        "evaluate",
        str(tmp_path),
    )


def test_what_was_logged_without_mlflow_arrives_when_a_run_is_opened(tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    off = start_run(Tracking(enabled=False), str(tmp_path), "train_vae", "vae", {}, str(folder))
    assert off.run_id is None
    tracker = Tracker(off)
    tracker.metrics({"loss": 1.0}, 1)
    tracker.close("FINISHED")
    assert not (tmp_path / "mlflow.db").exists()

    handle = begin(folder)
    tracker = Tracker(handle, system=False)
    tracker.metrics({"loss": 2.0}, 2)
    tracker.close("FAILED")
    assert history(handle, "loss") == [(1, 1.0), (2, 2.0)]
    assert client(handle.uri).get_run(handle.run_id).info.status == "FAILED"


def test_damaged_lines_are_skipped(tmp_path: Path) -> None:
    good = '{"step": 1, "time": 5.0, "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(good + "\0\0\0\n" + '[1, 2]\n{"step": 2, "ti')
    tracker = Tracker(RunHandle("", None, "litevae", str(tmp_path)))
    tracker.metrics({"loss": 1.0}, 1)
    tracker.metrics({"loss": 2.0}, 2)
    tracker.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert lines[:3] == [good, "\0\0\0\n", "[1, 2]\n"]
    assert [json.loads(line)["step"] for line in lines[3:]] == [2]


# --- small things -----------------------------------------------------------------------------------------------


def test_importing_is_cheap() -> None:
    code = "import sys, pipelines.runtime.mlflow_run; print([m for m in ('mlflow', 'ray') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "mlflow:5000"])
def test_a_store_that_mlflow_has_given_up_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tracking\.uri"):
        begin(tmp_path / "vae", uri)


def test_where_the_server_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://a:1")
    assert mlflow_run.tracking_uri(Tracking(), "runs") == "http://a:1"
    assert mlflow_run.tracking_uri(Tracking(uri="http://b:1"), "runs") == "http://b:1"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert mlflow_run.tracking_uri(Tracking(), "runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert mlflow_run.tracking_uri(Tracking(uri="sqlite:///x/m.db"), "runs") == f"sqlite:///{tmp_path}/x/m.db"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://me:pa@ss@host:5000/x", "http://***@host:5000/x"),
        ("s3://bucket/a@b?endpoint_override=h", "s3://bucket/a@b?endpoint_override=h"),
        ("s3://b/x?access_key=AB&secret_key=CD&scheme=http", "s3://b/x?access_key=***&secret_key=***&scheme=http"),
        ("sqlite:////a/b@c.db", "sqlite:////a/b@c.db"),
        ("me@example.org", "me@example.org"),
        ({"a": ["http://t@h", 3]}, {"a": ["http://***@h", 3]}),
    ],
)
def test_secrets_are_redacted(text, expected) -> None:
    assert redact(text) == expected


def test_a_handle_does_not_show_its_password() -> None:
    assert "secret" not in repr(RunHandle("http://me:secret@host", "1", "litevae", "/runs/vae"))
    assert link(RunHandle("http://me:secret@host", "1", "litevae", "/r", "2")) == "http://host/#/experiments/2/runs/1"
