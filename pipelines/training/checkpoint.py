"""Checkpoints of a training run, and when a run may go on from them.

A run is a folder, root/name. Ray Train keeps its checkpoints there and finds the latest by itself, after a worker died
as after the driver did. `config.yaml` beside them says what the run is: the same name with another model or other data
is refused, not mixed. So is a second driver while one is at work: it holds a lock on `.driver` there, which the system
takes back however that process ends.
"""

import fcntl
import functools
import json
import os
import pickle
import platform
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Concatenate, ParamSpec, TypeVar

import torch
import yaml
from pydantic import BaseModel

from litevae import storage
from litevae.errors import UserError
from pipelines.runtime.cluster import output_path
from pipelines.runtime.logs import say
from pipelines.runtime.schema import Tracked, values_to_keep

STATE = "state.pt"
DRIVER = ".driver"  # in the run's folder: who is at work on it
# Fields whose default is not what runs did before there was the field.
BEFORE = {"data.decode": "pillow"}


def open_run(folder: str, config: BaseModel, may_change: Iterable[str]) -> bool:
    """Note the run's config in its folder, or compare with what stands there. True: an earlier run goes on.

    Args:
        may_change: fields or sections (dotted) that may differ from the earlier start.

    Raises:
        UserError: the folder holds another run, with what differs.
    """
    path = Path(folder) / "config.yaml"
    if not path.exists():
        if holds_something(folder):
            raise UserError(
                f"{folder} exists, but is no run of this project (no config.yaml); choose another name or root"
            )
        write_config(folder, config)
        return False
    try:
        # a field that is newer than the run had its default, or what it has in BEFORE
        default = flatten(values_to_keep(type(config)()))
        before = default | {key: value for key, value in BEFORE.items() if key in default}
        before |= flatten(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}; restore it, or choose another name") from None
    now = flatten(values_to_keep(config))
    free = tuple(may_change)
    different = [
        f"  {key}: was {before.get(key, 'not set')!r}, is {now.get(key, 'not set')!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == name or key.startswith(name + ".") for name in free)
    ]
    if different:
        raise UserError(
            f"run {folder} was started with another config; go on with that one, or choose another name:\n"
            + "\n".join(different)
        )
    return True


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


def newest(folder: str) -> str:
    """A run's newest whole checkpoint, or "": for where Ray Train has no list of them."""
    whole = (path for path in Path(folder).glob("checkpoint-*") if zipfile.is_zipfile(path / STATE))
    return str(max(whole, default=""))


def holds_something(folder: str) -> bool:
    """Whether there is such a folder, with more in it than the claim of the job that asks."""
    return os.path.isdir(folder) and bool({*os.listdir(folder)} - {DRIVER})


def check_longer(folder: str, field: str, now: int) -> None:
    """A run that goes on may be longer than its config.yaml says, but not shorter."""
    before = yaml.safe_load((Path(folder) / "config.yaml").read_text())[field]
    if now < before:
        raise UserError(f"{field} of run {folder} may only grow; it was {before}, and is {now}")


def write_config(folder: str, config: BaseModel) -> None:
    os.makedirs(folder, exist_ok=True)
    text = yaml.safe_dump(values_to_keep(config), sort_keys=False)
    storage.put(str(Path(folder) / "config.yaml"), text.encode())


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested sections as {dotted name: value}; lists are values."""
    return {
        name: item
        for key, child in value.items()
        for name, item in (
            flatten(child, f"{prefix}{key}.").items() if isinstance(child, dict) else [(f"{prefix}{key}", child)]
        )
    }


def save(state: dict[str, Any]) -> str:
    """State as a folder of its own, to hand to Ray Train (which moves it into the run): tensors, numbers, strings."""
    folder = tempfile.mkdtemp(prefix="litevae-checkpoint-")
    path = os.path.join(folder, STATE)
    try:
        with open(path, "wb") as file:  # given a name, PyTorch would not say why it can't write
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        cause = error if isinstance(error, OSError) else error.__context__  # PyTorch's own comes on top of it
        if not isinstance(cause, OSError):
            raise
        raise storage.unwritable(path, cause) from error
    return folder


def load(folder: str) -> dict[str, Any]:
    """
    Raises:
        UserError: the checkpoint is damaged, or holds more than tensors, numbers and strings: pickles are not run.
    """
    path = os.path.join(folder, STATE)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, LookupError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"checkpoint {path} can't be read ({type(error).__name__}: {str(error)[:200]}); remove the folder of that "
            f"checkpoint to go on from the one before, or choose another run name"
        ) from None


def publish(build: Callable[[Path], None], folder: Path) -> None:
    """Let `build` fill an empty folder, then put that in place of `folder`: a reader sees the old or the new, whole.

    Raises:
        UserError: it can't be written, to a full disk for example.
    """
    fresh = None
    try:
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        fresh.chmod(0o755)  # mkdtemp's is for the owner only
        build(fresh)
        old = fresh.with_name(fresh.name + "-old")
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        if not storage.full(error):
            raise
        raise storage.unwritable(str(folder), error) from error
    finally:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
