"""Kill a job's driver, and wait until no process that it started is running."""

import contextlib
import subprocess
import time

import psutil


def kill_driver(process: subprocess.Popen) -> None:
    """Send SIGKILL to a driver that is alive, then to the processes that it started, and wait until all have ended.

    The processes would end by themselves, but only after some time, and could write files until then.
    """
    assert process.poll() is None, f"the driver had ended with {process.returncode} before it was killed"
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    end = time.monotonic() + 240
    while not all(map(_over, family)):
        assert time.monotonic() < end, "processes that the driver started are still running"
        time.sleep(0.02)


def _over(process: psutil.Process) -> bool:
    """Return whether a process has ended; it may be a zombie until its new parent collects it."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
