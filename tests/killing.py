"""Killing a job's driver, and knowing that what it had at work is at work no more."""

import subprocess

import psutil

from tests.nodes import title_of


def kill_driver(process: subprocess.Popen, patience: float = 240) -> None:
    """SIGKILL for a driver that is alive; returns when its workers, which end with its cluster, write nothing more."""
    assert process.poll() is None, f"it had ended before it was killed, with {process.returncode}"
    family = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in family if title_of(child).startswith("ray::")]
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=patience)
    assert not alive, "its workers live on"
