"""Kill a job's driver, and wait until no process that it started is running."""

import contextlib
import subprocess
import time

import psutil


def kill_driver(process: subprocess.Popen) -> None:
    """SIGKILL for a driver that is alive, and then for what it started, which would end by itself but take its time;
    returns when none of it is left that could still write something."""
    assert process.poll() is None, f"it had ended before it was killed, with {process.returncode}"
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    end = time.monotonic() + 240
    while not all(map(_over, family)):
        assert time.monotonic() < end, "what it started lives on"
        time.sleep(0.02)


def _over(process: psutil.Process) -> bool:
    """Return whether a process has ended; it may be a zombie until its new parent collects it."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
