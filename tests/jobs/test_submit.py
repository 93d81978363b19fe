"""Every job, as `python jobs/X.py` and through `ray job submit` to a real cluster on loopback: the same config, the
same exit code, the same result."""

import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import skimage.data
from PIL import Image

from tests import ports
from tests.commands import REPO, Result, run_in_this_process
from tests.encoding import save_model

JOBS = ["train_vae", "encode_dataset", "train_ldm", "sample", "evaluate", "doctor"]


class Cluster:
    """`ray start --head` with ports, a token and a folder of its own; ended by its pid."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # short: Unix sockets lie in it
        self.token = secrets.token_hex(32)
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # a job's `python` is the head's
        }
        dashboard = ports.reserve()
        self.address = f"http://127.0.0.1:{dashboard}"
        options = {
            "--dashboard-port": dashboard,
            "--port": ports.reserve(),
            "--dashboard-agent-listen-port": ports.reserve(),
            "--dashboard-agent-grpc-port": ports.reserve(),
            "--runtime-env-agent-port": ports.reserve(),
            "--metrics-export-port": ports.reserve(),
            "--node-manager-port": ports.reserve(),
            "--object-manager-port": ports.reserve(),
            "--min-worker-port": 0,  # any that is free
            "--max-worker-port": 0,
            "--node-ip-address": "127.0.0.1",
            "--dashboard-host": "127.0.0.1",
            "--num-cpus": 4,  # logical: a worker, the controller and data
            "--object-store-memory": 300 * 2**20,
            "--temp-dir": self.folder,
        }
        with open(self.folder / "head.log", "wb") as log:
            self.head = subprocess.Popen(
                [self._ray, "start", "--head", "--block", "--disable-usage-stats"]
                + [str(word) for pair in options.items() for word in pair],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def _ray(self) -> str:
        return str(Path(sys.executable).with_name("ray"))

    def wait(self) -> None:
        """Until a job has ended well: the head answers before there is an agent that starts jobs."""
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            assert self.head.poll() is None, (self.folder / "head.log").read_text()
            with contextlib.suppress(OSError):
                name = self.get("/api/jobs/", {"entrypoint": "true"})["submission_id"]
                assert self.result(name).code == 0
                return
            time.sleep(0.3)
        raise AssertionError("Ray did not come up:\n" + (self.folder / "head.log").read_text())

    def get(self, path: str, posted: dict | None = None) -> dict:
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        data = None if posted is None else json.dumps(posted).encode()
        with urllib.request.urlopen(urllib.request.Request(self.address + path, data, headers), timeout=30) as answer:
            return json.load(answer)

    def submit(self, *words: str) -> Result:
        """`ray job submit ... -- python jobs/X.py ...`; the exit code is the job's own."""
        name = f"test-{secrets.token_hex(4)}"
        command = [self._ray, "job", "submit", "--address", self.address, "--working-dir", ".", "--submission-id", name]
        done = subprocess.run(
            [*command, "--", "python", *words],
            cwd=REPO, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
        )  # fmt: skip
        result = self.result(name)
        assert done.returncode == (1 if result.code else 0), done.stdout
        assert result.output.strip().splitlines()[-1] in done.stdout
        return result

    def submit_without_waiting(self, *words: str, env_vars: dict[str, str] | None = None) -> str:
        """What `ray job submit --no-wait` does, without starting a Python for it."""
        from ray.job_submission import JobSubmissionClient

        client = JobSubmissionClient(self.address, headers={"Authorization": f"Bearer {self.token}"})
        environment = {"working_dir": str(REPO), "env_vars": env_vars or {}}
        return client.submit_job(entrypoint=shlex.join(["python", *words]), runtime_env=environment)

    def result(self, name: str) -> Result:
        deadline = time.monotonic() + 300
        while (job := self.get(f"/api/jobs/{name}"))["status"] not in ("SUCCEEDED", "FAILED", "STOPPED"):
            assert time.monotonic() < deadline, job
            time.sleep(0.3)
        return Result(job["driver_exit_code"], self.get(f"/api/jobs/{name}/logs")["logs"])

    def stop_job(self, name: str) -> None:
        """`ray job stop`."""
        command = [self._ray, "job", "stop", "--address", self.address, "--no-wait", name]
        subprocess.run(command, env=self.environment, capture_output=True, check=True, timeout=120)

    def stop(self) -> None:
        """Ask the head to end, and do not give it the 30 s that it likes to take for its processes."""
        family = [psutil.Process(self.head.pid), *psutil.Process(self.head.pid).children(recursive=True)]
        self.head.terminate()
        _, alive = psutil.wait_procs(family, timeout=5)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.head.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    try:
        cluster.wait()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        (folder / name).mkdir()
        image = Image.fromarray(getattr(skimage.data, name)())
        for part in range(3):
            image.crop((64 * part, 64, 64 * part + 96, 160)).save(folder / name / f"{part}.png")
    return folder


@pytest.mark.slow
def test_every_job_has_the_same_config_both_ways(cluster: Cluster) -> None:
    settings = ["ray.workers=1", "root=/data/runs", "tracking.uri=http://host:5000"]
    good = [[f"jobs/{job}.py", "--print-config", *settings] for job in JOBS]
    submitted = [cluster.submit_without_waiting(*words) for words in good]
    for words, name in zip(good, submitted, strict=True):
        here, there = run_in_this_process(*words), cluster.result(name)
        assert (here.code, there.code) == (0, 0), f"{words}\n{here.output}\n{there.output}"
        assert "root: /data/runs\n" in here.output
        assert here.output in there.output


@pytest.mark.slow
def test_bad_input_both_ways(cluster: Cluster) -> None:
    words = ["jobs/train_vae.py", "tracking.enabld=false"]
    for result in (run_in_this_process(*words), cluster.submit(*words)):
        assert result.code == 2, result.output
        assert one_error(result).startswith("error: unknown config key 'tracking.enabld'; did you mean")


def one_error(result: Result) -> str:
    assert "Traceback" not in result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.chaos
def test_a_training_that_is_stopped_leaves_with_a_checkpoint(cluster: Cluster, photos: Path, tmp_path: Path) -> None:
    words = [
        "jobs/train_vae.py", f"root={tmp_path}", "ray.cpus_per_worker=1", "loop.log_every=1",
        f"data.train.uri={photos}", "model.encoder=S", "model.decoder.channels=[8,8,8,8]", "model.decoder.layers=1",
        "loss.lpips.weight=0", "loss.adversarial.weight=0", "loop.precision=fp32",
        "stages=[{resolution: 32, images: 800000, batch_size: 8}]",
    ]  # fmt: skip
    name = cluster.submit_without_waiting(*words, env_vars={"RAY_JOB_STOP_WAIT_TIME_S": "120"})
    metrics = tmp_path / "vae" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not metrics.exists() or not metrics.stat().st_size:
        assert time.monotonic() < deadline, cluster.get(f"/api/jobs/{name}/logs")["logs"]
        time.sleep(0.3)
    cluster.stop_job(name)
    output = cluster.result(name).output
    assert cluster.get(f"/api/jobs/{name}")["status"] == "STOPPED"
    (images,) = re.findall(r"stopped after ([\d,]+) images; the checkpoint is in", output)
    assert (tmp_path / "vae" / f"checkpoint-{int(images.replace(',', '')):012d}" / "state.pt").is_file()
    assert f"run: {tmp_path}/vae\nMLflow: " in output
    ours = [line for line in output.splitlines() if "PlacementGroupCleaner" not in line]  # Ray's own
    assert "Traceback" not in "\n".join(ours)


@pytest.mark.slow
def test_an_encoding_submitted(cluster: Cluster, photos: Path, tmp_path: Path) -> None:
    common = [f"root={tmp_path / 'runs'}", "ray.cpus_per_worker=1"]
    vae, cache = save_model(tmp_path / "vae"), tmp_path / "cache"
    words = ["jobs/encode_dataset.py", *common, f"source.uri={photos}", f"model={vae}", "transform.resolution=64"]
    result = cluster.submit(*words, f"out={cache}", "rows_per_shard=6", "batch_size=4")
    assert result.code == 0, result.output
    assert (cache / "manifest.json").is_file()
    assert (tmp_path / "runs" / "mlflow.db").is_file()

    lost = cluster.submit(*words, "out=cache")
    assert lost.code == 2, lost.output
    assert "out=cache is relative" in one_error(lost)
    copies = [*cluster.folder.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")]
    assert copies
    for copy in copies:
        assert (copy / "jobs" / "encode_dataset.py").is_file()
        stays_here = {".venv", ".git", "runs", "demo", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache"}
        assert not stays_here & {path.name for path in copy.iterdir()}
        assert sum(path.stat().st_size for path in copy.rglob("*")) < 20 * 2**20  # Ray's limit is 100 MiB
