"""The folder of a training run, and the check whether a run may be resumed.

A run is the folder root/name. Its `config.yaml` says what the run is. A run of the same name with another model or
other data is refused, so that the two are never mixed.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from litevae import storage
from litevae.errors import UserError
from pipelines.runtime import typed_text
from pipelines.runtime.schema import flatten, values_to_keep
from pipelines.training.run_lock import DRIVER

# Fields whose default differs from what runs did before the field existed, with that earlier behaviour.
EARLIER_DEFAULTS = {"data.decode": "pillow"}


def open_run(folder: str, config: BaseModel, may_change: Iterable[str]) -> bool:
    """Write the config of a new run into its folder, or compare it with the config of the earlier run there.

    Args:
        folder: the run's folder.
        config: the run's config.
        may_change: dotted names of fields or sections that may differ from the earlier run.

    Returns:
        True if an earlier run is resumed, False if the run is new.

    Raises:
        UserError: if the folder holds a run with another config (the message lists the differences), a damaged config,
            or something that is not a run.
    """
    path = Path(folder) / "config.yaml"
    if not path.exists():
        if holds_something(folder):
            raise UserError(
                f"{folder} exists, but is not a run of this project (no config.yaml); choose another name or root"
            )
        write_config(folder, config)
        return False
    try:
        # A field that did not exist when the run was started counts as its default or its value in EARLIER_DEFAULTS.
        default = flatten(values_to_keep(type(config)()))
        before = default | {key: value for key, value in EARLIER_DEFAULTS.items() if key in default}
        before |= flatten(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}; restore it, or choose another name") from None
    now = flatten(values_to_keep(config))
    free = tuple(may_change)
    different = [
        f"  {key}: was {before.get(key, 'not set')!r}, is {now.get(key, 'not set')!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) != _numbers(before.get(key))
        and not any(key == name or key.startswith(name + ".") for name in free)
    ]
    if different:
        raise UserError(
            f"run {folder} was started with another config; continue with that one, or choose another name:\n"
            + "\n".join(different)
        )
    return True


def _numbers(value: Any) -> Any:
    """Return a value with numbers for text that is one: earlier versions kept 1e-4 in a sweep's sections as text."""
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    found = typed_text.number(value) if isinstance(value, str) else None
    return value if found is None else found


def holds_something(folder: str) -> bool:
    """Return whether the folder exists and holds more than the lock file of the job that asks."""
    return os.path.isdir(folder) and bool({*os.listdir(folder)} - {DRIVER})


def check_longer(folder: str, field: str, now: int) -> None:
    """Check that a resumed run is at least as long as its config.yaml says.

    Args:
        folder: the run's folder.
        field: name of the config field that counts the images to train on.
        now: the field's new value.

    Raises:
        UserError: if the new value is smaller.
    """
    before = yaml.safe_load((Path(folder) / "config.yaml").read_text())[field]
    if now < before:
        raise UserError(f"{field} of run {folder} may only grow; it was {before}, and is {now}")


def write_config(folder: str, config: BaseModel) -> None:
    """Write `config.yaml` into the run's folder, which is made if missing."""
    os.makedirs(folder, exist_ok=True)
    text = yaml.safe_dump(values_to_keep(config), sort_keys=False)
    storage.put(str(Path(folder) / "config.yaml"), text.encode())
