"""Checkpoints of a training run: written, read, and found; and model folders that appear whole.

Ray Train keeps them in the run's folder and finds the latest by itself, after a worker died as after the driver did.
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

STATE = "state.pt"


def newest(folder: str) -> str:
    """A run's newest whole checkpoint, or "": for where Ray Train has no list of them."""
    whole = (path for path in Path(folder).glob("checkpoint-*") if zipfile.is_zipfile(path / STATE))
    return str(max(whole, default=""))


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
