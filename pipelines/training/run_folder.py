"""A training run's folder: when a run may go on, and the config that says what the run is.

A run is a folder, root/name. `config.yaml` there says what the run is: the same name with another model or other data
is refused, not mixed.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from litevae import storage
from litevae.errors import UserError
from pipelines.runtime.schema import values_to_keep
from pipelines.training.run_lock import DRIVER

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
