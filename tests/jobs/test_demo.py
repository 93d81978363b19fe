"""The README's first command, as it is, on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_demo_beats_bicubic_and_leaves_its_pictures(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    command = [sys.executable, "jobs/demo.py", f"root={tmp_path}"]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=2400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert metrics["images"] == 11
    assert metrics["reconstruction"]["psnr"] > metrics["bicubic"]["psnr"] + 1
    assert metrics["reconstruction"]["ssim"] > metrics["bicubic"]["ssim"]
    for name in ("reconstructions.png", "samples.png"):
        assert f"{tmp_path}/{name}" in done.stdout
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 256
    assert "mlflow ui" in done.stdout

    # run again, it has nothing to train and nothing to encode
    again = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stdout[-4000:] + again.stderr[-4000:]
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["fingerprint"] == metrics["fingerprint"]
