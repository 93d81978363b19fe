"""infra/stop_jobs.py, a head's preStop hook, on a real cluster."""

import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.jobs.test_submit import Cluster

REPO = Path(__file__).resolve().parents[2]
JOB = """
import signal, sys, time
def leave(*_):
    time.sleep(5)  # more than Ray gives by itself
    open(sys.argv[1] + "/checkpoint", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, leave)
open(sys.argv[1] + "/running", "w").close()
time.sleep(600)
"""


@pytest.mark.chaos
def test_jobs_leave_with_their_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.job_submission import JobSubmissionClient

    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "60")
    cluster = Cluster()
    try:
        cluster.wait()
        client = JobSubmissionClient(cluster.address, headers={"Authorization": f"Bearer {cluster.token}"})
        done = client.submit_job(entrypoint="true")
        job = client.submit_job(entrypoint=shlex.join(["python", "-c", JOB, str(tmp_path)]))
        deadline = time.monotonic() + 120
        while not (tmp_path / "running").exists() or not client.get_job_status(done).is_terminal():
            assert time.monotonic() < deadline, client.get_job_logs(job)
            time.sleep(0.3)
        code = f"import runpy; runpy.run_path('infra/stop_jobs.py')['main']({cluster.address!r})"
        hook = subprocess.run(
            [sys.executable, "-c", code], cwd=REPO, env=cluster.environment, capture_output=True, text=True, timeout=120
        )
        assert hook.returncode == 0, hook.stderr
        assert hook.stdout == f"stopping {job}\n"
        assert (tmp_path / "checkpoint").exists()
        assert client.get_job_status(job) == "STOPPED"
        with pytest.raises(urllib.error.HTTPError, match="401"):  # and without the token nobody stops anything
            urllib.request.urlopen(urllib.request.Request(f"{cluster.address}/api/jobs/{job}/stop", method="POST"))
    finally:
        cluster.stop()
