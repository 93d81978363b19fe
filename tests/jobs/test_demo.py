"""The README's first command, with a sixtieth of its training and an eighth of its photos: CI has an hour."""

import json

import pytest
import yaml
from PIL import Image

from pipelines.diagnostics import demo
from tests.commands import REPO, run_in_this_process


@pytest.mark.slow
def test_the_demo_runs_every_job_and_leaves_its_pictures(tmp_path, monkeypatch):
    preset = yaml.safe_load((REPO / "jobs" / "configs" / "demo.yaml").read_text())
    preset["train_vae"]["stages"][0]["images"] //= 60
    preset["train_ldm"]["images"] //= 60
    preset["sample"]["steps"] = 10
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(preset))
    # a thread a worker: two of them wait for each other wherever another test has a core
    more = [f"root={tmp_path}", f"preset={tmp_path}/short.yaml", "ray.cpus_per_worker=1"]
    monkeypatch.setattr(demo, "TILES", demo.TILES // 8)
    done = run_in_this_process("jobs/demo.py", *more)
    assert done.code == 0, done.output[-4000:]
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert metrics["images"] == 11
    assert metrics["reconstruction"]["psnr"] > 10  # dB; `make demo` shows what the whole training comes to
    for name in ("reconstructions.png", "samples.png"):
        assert f"{tmp_path}/{name}" in done.output
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 256
    assert "mlflow ui" in done.output
