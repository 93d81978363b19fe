"""The requests of tracking to MLflow, and the files it writes into the run's folder, with a stand-in for the client."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipelines.runtime import mlflow_run, mlflow_server
from pipelines.runtime.mlflow_run import Tracker
from pipelines.runtime.mlflow_server import RunHandle
from pipelines.runtime.schema import Tracking

URI = "http://127.0.0.1:1"
PARAMS = {"seed": 3, "optim": {"lr": 0.1, "betas": [0.5, 0.9]}, "stages": [{"images": 8}], "uri": "http://me:pw@host"}


class Client:
    """A stand-in for MLflow's client with one experiment, which records its calls."""

    def __init__(self):
        self.calls, self.experiment, self.found, self.batches = [], None, [], []
        self.run = SimpleNamespace(
            info=SimpleNamespace(run_id="run 1", start_time=5_000),
            data=SimpleNamespace(params={"seed": "3", "optim.lr": "0.2"}, tags={}),
        )

    def get_experiment_by_name(self, name):
        self.calls.append(("experiment", name))
        return self.experiment and SimpleNamespace(experiment_id=self.experiment, name=name, lifecycle_stage="active")

    def create_experiment(self, name, artifact_location):
        self.calls.append(("create_experiment", name, artifact_location))
        return "new"

    def search_runs(self, experiments, filter_string, order_by, max_results):
        self.calls.append(("search", experiments, filter_string, order_by, max_results))
        return self.found

    def create_run(self, experiment, run_name, tags):
        self.calls.append(("create_run", experiment, run_name, tags))
        return SimpleNamespace(info=self.run.info, data=SimpleNamespace(params={}))

    def get_run(self, run_id):
        assert run_id == "run 1"
        return self.run

    def update_run(self, run_id, status):
        self.calls.append(("update_run", run_id, status))

    def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
        assert (run_id, synchronous) == ("run 1", True)
        self.batches.append((
            [(each.key, each.value, each.timestamp, each.step) for each in metrics],
            {each.key: each.value for each in params}, {each.key: each.value for each in tags},
        ))  # fmt: skip

    def __getattr__(self, name):
        return lambda *given, **more: self.calls.append((name, *given, *more.values()))


@pytest.fixture
def client(monkeypatch):
    client = Client()
    monkeypatch.setattr(mlflow_server, "client_of", lambda uri: client if uri == URI else None)
    monkeypatch.setattr(mlflow_server, "_warned", set())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return client


def start(folder, config=None, resume=True, **more):
    config = config or Tracking(uri=URI)
    return mlflow_run.start_run(
        config, str(folder.parent), "train_vae", "mine", PARAMS, str(folder), resume=resume, **more
    )


def test_a_new_run_has_its_parameters_and_tags(client, tmp_path):
    config = Tracking(uri=URI, experiment="mine", parent="above", tags={"a": "b"})
    handle = start(tmp_path / "run", config, resume=False, tags={"note": "s3://key:secret@bucket"})
    assert handle == RunHandle(URI, "run 1", "mine", str(tmp_path / "run"), "new", 5.0)
    assert client.calls[:2] == [("experiment", "mine"), ("create_experiment", "mine", None)]
    kind, experiment, name, tags = client.calls[2]
    assert (kind, experiment, name) == ("create_run", "new", "mine")
    assert tags == {
        "litevae.job": "train_vae", "litevae.folder": str(tmp_path / "run"), "mlflow.source.name": "jobs/train_vae.py",
        "a": "b", "note": "s3://***@bucket", "mlflow.parentRunId": "above",
    }  # fmt: skip
    ((metrics, params, tags),) = client.batches
    assert (metrics, tags) == ([], {})
    assert params == {
        "seed": "3", "optim.lr": "0.1", "optim.betas": "[0.5, 0.9]", "stages.0.images": "8", "uri": "http://***@host",
    }  # fmt: skip
    start(tmp_path / "run", Tracking(uri=URI, run="another name"), resume=False)
    assert [call[2] for call in client.calls if call[0] == "create_run"] == ["mine", "another name"]


def test_a_run_that_goes_on_is_found_by_its_folder_and_job(client, tmp_path):
    client.experiment, client.found = "7", [client.run]
    folder = tmp_path / "it's mine"
    handle = start(folder)
    assert (handle.run_id, handle.experiment_id) == ("run 1", "7")
    search, update = client.calls[1:]
    wanted = f"""tags.`litevae.folder` = "{folder}" and tags.`litevae.job` = 'train_vae'"""
    assert search == ("search", ["7"], wanted, ["attributes.start_time DESC"], 1)
    assert update == ("update_run", "run 1", "RUNNING")
    ((_, params, tags),) = client.batches
    assert params == {"optim.betas": "[0.5, 0.9]", "stages.0.images": "8", "uri": "http://***@host"}
    assert tags == {"changed.optim.lr": "0.1"}
    client.found = []
    start(folder)
    assert client.calls[-1][0] == "create_run"


def test_a_fresh_run_forgets_what_an_earlier_one_left(client, tmp_path):
    def left():
        (tmp_path / "images").mkdir(exist_ok=True)
        for path in ("metrics.jsonl", "images/grid-000000000008.png", "images/mine.png"):
            (tmp_path / path).write_text("x")

    left()
    start(tmp_path)
    assert (tmp_path / "metrics.jsonl").exists()
    start(tmp_path, resume=False)
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["mine.png"]


def test_without_mlflow_there_is_no_run(client, tmp_path):
    handle = start(tmp_path, Tracking(uri=URI, enabled=False))
    assert (handle.run_id, handle.uri, client.calls) == (None, "", [])
    mlflow_run.finish(handle)
    assert client.calls == []
    mlflow_run.finish(RunHandle(URI, "run 1", "mine", str(tmp_path)), "KILLED")
    assert client.calls == [("set_terminated", "run 1", "KILLED")]


def test_a_database_has_its_artifacts_beside_it(client, tmp_path):
    for uri, root, location in (
        (f"sqlite:///{tmp_path}/a/mlflow.db", "/r", f"{tmp_path}/a/mlartifacts"),
        ("postgresql://host/db", "/r", "/r/mlartifacts"),
        ("https://host", "/r", None),
    ):
        assert mlflow_server.experiment_of(client, RunHandle(uri, None, "mine", "/f"), root) == "new"
        assert client.calls[-1] == ("create_experiment", "mine", location)


def recorded(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_are_lines_and_reach_mlflow_once(client, tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_run, "time", SimpleNamespace(time=lambda: 12.3456, monotonic=lambda: 1e9))
    earlier = b'{"step": 8, "time": 3.5, "loss": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_bytes(earlier + b'{"step": 16, "ti')
    client.run.data.tags["litevae.metrics_sent"] = str(len(earlier))
    tracker = Tracker(RunHandle(URI, "run 1", "mine", str(tmp_path)), system=False)
    tracker.metrics({"loss": 9.0}, 8)  # it has that
    tracker.metrics({"loss": 0.25, "val/a=b": float("inf")}, 16)
    tracker.metrics({"loss": 7.0, "other": 1}, 16)
    tracker.metrics({"loss": 6.0}, 12)  # an earlier step
    tracker.close("FINISHED")
    lines = [{"step": 8, "time": 3.5, "loss": 0.5}, {"step": 16, "time": 12.346, "loss": 0.25, "val/a_b": "inf"},
             {"step": 16, "time": 12.346, "other": 1.0}]  # fmt: skip
    assert recorded(tmp_path) == lines
    sent = [metric for metrics, *_ in client.batches for metric in metrics]
    assert sent == [("loss", 0.25, 12346, 16), ("val/a_b", float("inf"), 12346, 16), ("other", 1.0, 12346, 16)]
    size = (tmp_path / "metrics.jsonl").stat().st_size
    assert client.batches[-1][2] == {"litevae.metrics_sent": str(size)}
    assert client.calls == [("set_terminated", "run 1", "FINISHED")]
    tracker.close("FAILED")  # a second time does nothing
    assert len(client.calls) == 1


def test_a_file_that_is_shorter_than_what_was_sent_is_another_one(client, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 8, "time": 3.5, "loss": 0.5}\n')
    client.run.data.tags["litevae.metrics_sent"] = "1000"
    Tracker(RunHandle(URI, "run 1", "mine", str(tmp_path)), system=False).close()
    assert [metrics for metrics, *_ in client.batches] == [[("loss", 0.5, 3500, 8)]]
    assert client.calls == []  # without a status it is not ended


def test_pictures_files_and_data_reach_mlflow(client, tmp_path):
    tracker = Tracker(RunHandle(URI, "run 1", "mine", str(tmp_path)), system=False)
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    tracker.image("val/picture", image, 8)
    (tmp_path / "model").mkdir()
    (tmp_path / "file").touch()
    tracker.artifacts(tmp_path / "model", "model")
    tracker.artifact(tmp_path / "file")
    tracker.artifact(tmp_path / "gone")
    tracker.dataset("photos", "ab" * 32, "s3://key:secret@bucket/photos", "evaluation")
    tracker.close()
    path = tmp_path / "images" / "val-picture-000000000008.png"
    assert np.array_equal(np.asarray(Image.open(path)), image)
    calls = {name: given for name, *given in client.calls}
    run, shown, key, step, synchronous = calls["log_image"]
    assert (run, key, step, synchronous) == ("run 1", "val/picture", 8, True)
    assert np.array_equal(np.asarray(shown), image)
    assert calls["log_artifacts"] == ["run 1", str(tmp_path / "model"), "model"]
    assert calls["log_artifact"] == ["run 1", str(tmp_path / "file"), None]
    run, (found,) = calls["log_inputs"]
    assert (found.dataset.name, found.dataset.digest, found.dataset.source_type) == ("photos", ("ab" * 32)[:36], "s3")
    assert json.loads(found.dataset.source) == {"uri": "s3://***@bucket/photos"}
    assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "evaluation")]
    assert len(client.calls) == 4
    again = Tracker(RunHandle(URI, "run 1", "mine", str(tmp_path)), system=False)
    again.image("val/picture", image + 1, 8)  # a resumed run repeats steps
    again.close()
    assert np.array_equal(np.asarray(Image.open(path)), image)
    assert len(client.calls) == 4


def test_a_client_that_fails_costs_one_warning_and_no_status(client, tmp_path, capsys):
    def fail(*given, **more):
        raise ConnectionError("refused: http://me:secret@host")

    client.log_batch = fail
    tracker = Tracker(RunHandle(URI, "run 1", "mine", str(tmp_path)), system=False)
    tracker.metrics({"loss": 1.0}, 1)
    tracker.close("FINISHED")
    (warning,) = capsys.readouterr().out.splitlines()
    assert warning.startswith(
        f"warning: tracking at {URI} fails; the run continues, and its metrics are in {tmp_path}/metrics"
    )
    assert "ConnectionError: refused" in warning
    assert "secret" not in warning
    assert client.calls == []
    assert [line["loss"] for line in recorded(tmp_path)] == [1.0]


def test_what_was_logged_elsewhere_is_logged_again(tmp_path):
    """A training's metrics and pictures, and not those of evaluations in its folder."""
    other, own = tmp_path / "other", tmp_path / "own"
    first = Tracker(RunHandle("", None, "mine", str(other)))
    first.metrics({"train/loss": 2.0, "eval/psnr": 20.0}, 0)
    first.metrics({"train/loss": 1.0}, 16)
    for n, key in enumerate(("val/picture", "grid")):
        first.image(key, np.full((2, 2, 3), n, np.uint8), 16 * n)
    first.close()
    for training, keys, pictures in (
        (True, {"train/loss": 1.0}, ["val-picture-000000000008.png"]),
        (False, {"train/loss": 1.0, "eval/psnr": 20.0}, ["grid-000000000016.png", "val-picture-000000000008.png"]),
    ):
        folder = own / str(training)
        second = Tracker(RunHandle("", None, "mine", str(folder)))
        assert mlflow_run.replay(str(other), second, 8, training) == keys
        second.close()
        lines = [{key: value for key, value in line.items() if key != "time"} for line in recorded(folder)]
        assert lines == [{"step": 8} | ({"eval/psnr": 20.0} if not training else {}) | {"train/loss": 2.0},
                         {"step": 16, "train/loss": 1.0}]  # fmt: skip
        assert sorted(path.name for path in (folder / "images").iterdir()) == pictures


def test_where_a_run_is_seen(tmp_path):
    assert mlflow_run.link(RunHandle("", None, "mine", "/runs/vae")) == "/runs/vae/metrics.jsonl"
    assert mlflow_run.link(RunHandle("https://me:pw@h/", "r", "mine", "/f", "7")) == "https://h/#/experiments/7/runs/r"
    command = mlflow_run.link(RunHandle("sqlite:////a b/m.db", "r", "mine", "/f"))
    assert command.endswith("mlflow ui --workers 1 --backend-store-uri 'sqlite:////a b/m.db'")
