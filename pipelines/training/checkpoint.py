"""Write, read and find the checkpoints of a training run, and replace model folders atomically.

Ray Train keeps the checkpoints in the run's folder. It finds the latest one by itself, both after a worker died and
after the driver died.
"""

import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from litevae import storage
from litevae.errors import UserError
from pipelines.training.run_files import STATE


def newest(folder: str) -> str:
    """Return the path of the newest complete checkpoint in a run's folder, or "" if there is none.

    This is needed where Ray Train has lost its own list of checkpoints.
    """
    whole = (path for path in Path(folder).glob("checkpoint-*") if zipfile.is_zipfile(path / STATE))
    return str(max(whole, default=""))


def save(state: dict[str, Any]) -> str:
    """Write a training state into a new temporary folder, which Ray Train then moves into the run's folder.

    Args:
        state: nested containers of tensors, numbers and strings only, so that `load` can read them safely.

    Returns:
        The path of the temporary folder. The caller removes what is left of it.

    Raises:
        UserError: if the file cannot be written, for example because the disk is full.
    """
    folder = tempfile.mkdtemp(prefix="litevae-checkpoint-")
    path = os.path.join(folder, STATE)
    try:
        with open(path, "wb") as file:  # if PyTorch opens the file itself, its error does not say why writing failed
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        cause = error if isinstance(error, OSError) else error.__context__  # PyTorch's error hides the OSError
        if not isinstance(cause, OSError):
            raise
        raise storage.unwritable(path, cause) from error
    return folder


def load(folder: str) -> dict[str, Any]:
    """Read a checkpoint folder's state, with all tensors on the CPU.

    Raises:
        UserError: if the checkpoint is damaged, or holds anything other than tensors, numbers and strings. Arbitrary
            pickled objects are never loaded.
    """
    path = os.path.join(folder, STATE)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, LookupError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"checkpoint {path} can't be read ({type(error).__name__}: {str(error)[:200]}); remove the folder of that "
            f"checkpoint to continue from the one before, or choose another run name"
        ) from None


def publish(build: Callable[[Path], None], folder: Path) -> None:
    """Build a new version of `folder` beside it, then rename it into place.

    A reader sees either the complete old version or the complete new one.

    Args:
        build: fills the empty folder that it is given.
        folder: the folder to create or replace.

    Raises:
        UserError: if the disk is full.
    """
    fresh = None
    try:
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        fresh.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        build(fresh)
        old = fresh.with_name(fresh.name + "-old")
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        if not storage.is_disk_full(error):
            raise
        raise storage.unwritable(str(folder), error) from error
    finally:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
