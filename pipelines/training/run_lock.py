"""One process at a time works on a run.

It holds a lock on `.driver` in the run's folder, which the system takes back however that process ends. A second
process is refused, and what a killed one left half-written is removed.
"""

import fcntl
import functools
import json
import os
import platform
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Concatenate, ParamSpec, TypeVar

from litevae import storage
from litevae.errors import UserError
from pipelines.runtime.logs import say
from pipelines.runtime.paths import output_path
from pipelines.runtime.schema import Tracked
from pipelines.training.checkpoint import STATE

DRIVER = ".driver"  # in the run's folder: who is at work on it
Config = TypeVar("Config", bound=Tracked)
Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def exclusive(job: Callable[Concatenate[Config, Rest], Result]) -> Callable[Concatenate[Config, Rest], Result]:
    """Decorator of a job that makes the run root/name: only one process at a time works on it; see `claimed`."""

    @functools.wraps(job)
    def run(config: Config, *rest: Rest.args, **more: Rest.kwargs) -> Result:
        with claimed(os.path.join(output_path("root", config.root), config.name)):  # type: ignore[attr-defined]
            return job(config, *rest, **more)

    return run


@contextmanager
def claimed(folder: str) -> Iterator[None]:
    """In the block this process alone works on a run. What is half-written there, before and afterwards, is removed.

    The lock holds over NFS (version 4, or 3 with its lock daemon), too, and for the life of the process: one that was
    killed leaves nothing that has to grow old first. A file system that knows no locks is warned of.

    Raises:
        UserError: another process is at work on it, and which; or there can be no such folder.
    """
    path = Path(folder)
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        file = _lock(path / DRIVER)
    except OSError as error:
        raise storage.unwritable(folder, error) from error
    try:
        _tidy(path)
        try:
            yield
        finally:
            _tidy(path)
    finally:
        (path / DRIVER).unlink(missing_ok=True)
        file.close()
        with suppress(OSError):  # not empty
            for each in (path, *made):
                each.rmdir()


@contextmanager
def in_turn(path: str) -> Iterator[None]:
    """Wait until no other process is in such a block of the same path. The turn ends with the block, or the process.

    Args:
        path: a file that is made for the lock, and stays.
    """
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock(path: Path) -> IO[str]:
    """The file, locked, with this process's name in it."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except FileNotFoundError:  # one that has ended takes its empty folder away
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            about = file.read().strip()
            file.close()
            raise UserError(
                f"another job is at work on {path.parent}: {about or 'it has just begun'}. Wait for it, stop it, or "
                f"choose another name"
            ) from None
        except OSError as error:
            say(f"warning: {path.parent}: no locks here ({error.strerror}); start no second job on it", "WARNING")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # or its owner has just removed it
                break
        file.close()
    file.truncate(0)
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    file.write(f"process {os.getpid()} on {platform.node()}, since {now}\n")
    file.flush()
    return file


def _tidy(folder: Path) -> None:
    """Remove what writers that were killed, or had no room, left: checkpoints that are not whole, of which Ray Train
    never heard, and temporary files."""
    known = folder / "checkpoint_manager_snapshot.json"
    told = ""
    if known.exists():
        try:
            json.loads(told := known.read_text())
        except ValueError as error:  # Ray Train writes it in place: a kill or a full disk cuts it
            known.unlink()
            told = ""
            say(f"warning: {known} was damaged ({error}); the run goes on from its newest checkpoint", "WARNING")
    for state in folder.glob("checkpoint-*"):
        if json.dumps(state.name) not in told and not zipfile.is_zipfile(state / STATE):
            shutil.rmtree(state)
    for left in (*folder.glob(".model*"), *folder.glob(".tmp-*"), *folder.glob("*.tmp")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
