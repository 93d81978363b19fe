"""`python jobs/doctor.py`: its exit codes, its table and its report."""

import json

import pytest

from tests.commands import run, run_in_this_process
from tests.encoding import crops, save_model

JOB = "jobs/doctor.py"


def test_help():
    done = run_in_this_process(JOB, "--help")
    assert done.code == 0, done.output
    for words in ("usage: python jobs/doctor.py", "report=", "ray.workers=", "source.uri=", "[--config FILE]"):
        assert words in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["limt=5"], "error: unknown config key 'limt'; did you mean limit=5?"),
        (["root=s3://bucket/runs"], "error: root=s3://bucket/runs: only local paths"),
        (["report=/nowhere/report.json"], "error: report=/nowhere/report.json: its folder does not exist"),
    ],
)
def test_bad_input(words, message):
    done = run_in_this_process(JOB, *words)
    assert done.code == 2, done.output
    assert message in done.output


@pytest.mark.slow
def test_a_sound_machine(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, photo in enumerate(crops(6)):
        photo.save(photos / f"{number}.png")
    report = tmp_path / "report.json"
    done = run(
        JOB, f"root={tmp_path}/runs", f"out={tmp_path}/cache", f"source.uri={photos}", f"report={report}",
        f"model={save_model(tmp_path / 'model')}", "transform.resolution=32", "batch_size=2", "ray.cpus_per_worker=1",
        TORCH_HOME=str(tmp_path),
    )  # fmt: skip
    assert done.code == 0, done.output
    summary = json.loads(report.read_text())
    assert summary["counts"].get("failed", 0) == 0
    by_check = {}
    for finding in summary["findings"]:
        by_check.setdefault(finding["check"], set()).add(finding["state"])
    for check in ("ray", "versions", "kernels", "clock", "gloo", "mlflow", "model", "source", "estimate"):
        assert by_check[check] == {"ok"}, done.output
    assert by_check["root"] | by_check["out"] <= {"ok", "warning"}  # this machine's disk may be nearly full
    assert by_check["weights"] == {"warning"}  # there are none
    assert done.output.strip().splitlines()[-1].endswith("on 1 node")
    assert "6 images take about" in " ".join(done.output.split())
    assert not (tmp_path / "cache").exists()
