"""The README's first command, with a sixtieth of its training: CI has an hour."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_demo_runs_every_job_and_leaves_its_pictures(tmp_path):
    preset = yaml.safe_load((REPO / "jobs" / "configs" / "demo.yaml").read_text())
    preset["train_vae"]["stages"][0]["images"] //= 60
    preset["train_ldm"]["images"] //= 60
    preset["sample"]["steps"] = 10
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(preset))
    # a thread a worker: two of them wait for each other wherever another test has a core
    more = [f"root={tmp_path}", f"preset={tmp_path}/short.yaml", "ray.cpus_per_worker=1"]
    command = [sys.executable, "jobs/demo.py", *more]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert metrics["images"] == 11
    assert metrics["reconstruction"]["psnr"] > 10  # dB; `make demo` shows what the whole training comes to
    for name in ("reconstructions.png", "samples.png"):
        assert f"{tmp_path}/{name}" in done.stdout
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 256
    assert "mlflow ui" in done.stdout
