"""Checkpoints of a training run, and when a run may go on from them.

A run is a folder, root/name. Ray Train keeps its checkpoints there and finds the latest by itself, after a worker died
as after the driver did. `config.yaml` beside them says what the run is: the same name with another model or other data
is refused, not mixed.
"""

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel

from litevae.errors import UserError
from pipelines import outputs
from pipelines.config import values_to_keep

STATE = "state.pt"


def open_run(folder: str, config: BaseModel, may_change: Iterable[str]) -> bool:
    """Note the run's config in its folder, or compare with what stands there. True: an earlier run goes on.

    Args:
        may_change: fields or sections (dotted) that may differ from the earlier start.

    Raises:
        UserError: the folder holds another run, with what differs.
    """
    path = Path(folder) / "config.yaml"
    if not path.exists():
        if os.path.isdir(folder) and os.listdir(folder):
            raise UserError(
                f"{folder} exists, but is no run of this project (no config.yaml); choose another name or root"
            )
        write_config(folder, config)
        return False
    try:
        # a field that is newer than the run had its default
        before = flatten(values_to_keep(type(config)())) | flatten(yaml.safe_load(path.read_text()))
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


def check_longer(folder: str, field: str, now: int) -> None:
    """A run that goes on may be longer than its config.yaml says, but not shorter."""
    before = yaml.safe_load((Path(folder) / "config.yaml").read_text())[field]
    if now < before:
        raise UserError(f"{field} of run {folder} may only grow; it was {before}, and is {now}")


def write_config(folder: str, config: BaseModel) -> None:
    os.makedirs(folder, exist_ok=True)
    text = yaml.safe_dump(values_to_keep(config), sort_keys=False)
    outputs.write(Path(folder) / "config.yaml", text.encode())


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
    torch.save(state, os.path.join(folder, STATE))
    return folder


def load(folder: str) -> dict[str, Any]:
    """
    Raises:
        UserError: the checkpoint is damaged, or holds more than tensors, numbers and strings: pickles are not run.
    """
    path = os.path.join(folder, STATE)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"checkpoint {path} can't be read ({type(error).__name__}: {str(error)[:200]}); remove the folder of that "
            f"checkpoint to go on from the one before, or choose another run name"
        ) from None


def publish(build: Callable[[Path], None], folder: Path) -> None:
    """Let `build` fill an empty folder, then put that in place of `folder`: a reader sees the old or the new, whole."""
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        fresh.chmod(0o755)  # mkdtemp's is for the owner only
        build(fresh)
        old = fresh.with_name(fresh.name + "-old")
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
