"""`python jobs/doctor.py`: its exit codes, its table and its report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.encoding import crops, save_model

REPO = Path(__file__).resolve().parents[2]


def run(*words, **environment):
    return subprocess.run(
        [sys.executable, "jobs/doctor.py", *words],
        cwd=REPO, env=os.environ | environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_help():
    done = run("--help")
    assert done.returncode == 0, done.stderr
    for words in ("usage: python jobs/doctor.py", "report = ''", "ray.workers = 1", "source.uri"):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["limt=5"], "error: unknown config key 'limt'; did you mean 'limit'?"),
        (["root=s3://bucket/runs"], "error: root=s3://bucket/runs: only local paths"),
        (["report=/nowhere/report.json"], "error: report=/nowhere/report.json: there is no such folder"),
    ],
)
def test_bad_input(words, message):
    done = run(*words)
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_sound_machine(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, photo in enumerate(crops(6)):
        photo.save(photos / f"{number}.png")
    report = tmp_path / "report.json"
    done = run(
        f"root={tmp_path}/runs", f"out={tmp_path}/cache", f"source.uri={photos}", f"report={report}", "batch_size=2",
        f"model={save_model(tmp_path / 'model')}", "transform.resolution=32", TORCH_HOME=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(report.read_text())
    assert summary["counts"].get("failed", 0) == 0
    by_check = {}
    for finding in summary["findings"]:
        by_check.setdefault(finding["check"], set()).add(finding["state"])
    for check in ("ray", "versions", "kernels", "clock", "gloo", "mlflow", "model", "source", "estimate"):
        assert by_check[check] == {"ok"}, done.stdout
    assert by_check["root"] | by_check["out"] <= {"ok", "warning"}  # this machine's disk may be nearly full
    assert by_check["weights"] == {"warning"}  # there are none
    assert done.stdout.strip().splitlines()[-1].endswith("on 1 node")
    assert "6 images take about" in " ".join(done.stdout.split())
    assert not (tmp_path / "cache").exists()
