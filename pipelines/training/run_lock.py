"""A lock that lets only one process at a time work on a run.

The process holds a lock on the file `.driver` in the run's folder. The system releases it however that process ends.
A second process is refused. Files that a killed process left half-written are removed.
"""

import fcntl
import functools
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Concatenate, ParamSpec, TypeVar

from litevae import storage
from litevae.errors import UserError
from pipelines.runtime import file_lock
from pipelines.runtime.logs import say
from pipelines.runtime.paths import output_path
from pipelines.runtime.schema import Tracked
from pipelines.training.run_files import DRIVER, STATE

Config = TypeVar("Config", bound=Tracked)
Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def exclusive(job: Callable[Concatenate[Config, Rest], Result]) -> Callable[Concatenate[Config, Rest], Result]:
    """Decorate a job that works on the run root/name, so that only one process at a time does; see `claimed`."""

    @functools.wraps(job)
    def run(config: Config, *rest: Rest.args, **more: Rest.kwargs) -> Result:
        with claimed(os.path.join(output_path("root", config.root), config.name)):  # type: ignore[attr-defined]
            return job(config, *rest, **more)

    return run


@contextmanager
def claimed(folder: str) -> Iterator[None]:
    """Return a context in which this process is the only one that works on a run.

    Half-written files in the run's folder are removed on entry and on exit. If the folder is empty on exit, it and the
    parents that were made for it are removed.

    The lock also works over NFS (version 4, or 3 with its lock daemon). It lasts at most as long as the process, so
    that a killed process leaves no lock that must first expire. On a file system without locks a warning is logged.

    Args:
        folder: the run's folder, which is made if missing.

    Raises:
        UserError: if another process is working on the run (the message says which), or the folder cannot be made.
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
        with suppress(OSError):  # raised where the folder is not empty
            for each in (path, *made):
                each.rmdir()


@contextmanager
def in_turn(path: str) -> Iterator[None]:
    """Return a context that only one process at a time can be in; others wait on entry.

    The lock is released at the end of the block, or when the process ends.

    Args:
        path: the lock file, which is created and is not removed.
    """
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _lock(path: Path) -> IO[str]:
    """Open and lock the file of a run; see `file_lock.hold`.

    Raises:
        UserError: if another process holds the lock.
        OSError: if the file cannot be made.
    """
    try:
        return file_lock.hold(path)
    except file_lock.Held as held:
        raise UserError(
            f"another job is working on {path.parent}: {held}. Wait for it, stop it, or choose another name"
        ) from None


def _tidy(folder: Path) -> None:
    """Remove what writers left that were killed or found the disk full.

    This covers temporary files and incomplete checkpoints that Ray Train does not list.
    """
    known = folder / "checkpoint_manager_snapshot.json"
    told = ""
    if known.exists():
        try:
            json.loads(told := known.read_text())
        except ValueError as error:  # Ray Train writes it in place, so a kill or a full disk can truncate it
            known.unlink()
            told = ""
            say(f"warning: {known} was damaged ({error}); the run continues from its newest checkpoint", "WARNING")
    for state in folder.glob("checkpoint-*"):
        if json.dumps(state.name) not in told and not zipfile.is_zipfile(state / STATE):
            shutil.rmtree(state)
    for left in (*folder.glob(".model*"), *folder.glob(".tmp-*"), *folder.glob("*.tmp")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
