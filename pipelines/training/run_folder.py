"""The folder of a training run, and the check whether a run may be resumed.

A run is the folder root/name. Its `config.yaml` says what the run is. A run of the same name with another model or
other data is refused, so that the two are never mixed. As long as there is neither a checkpoint nor a model, nothing
can be mixed: another config then takes the folder over.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel

from litevae import storage
from litevae.errors import UserError
from pipelines.runtime import typed_text
from pipelines.runtime.logs import say
from pipelines.runtime.metrics_log import clear_log
from pipelines.runtime.schema import flatten, values_to_keep
from pipelines.training.run_files import CONFIG, DRIVER, LEFT_BY_TRAINING, TRAINED, found_of

# Fields whose default differs from what runs did before the field existed, with that earlier behaviour.
EARLIER_DEFAULTS: dict[str, Any] = {"data.decode": "pillow", "loss.lpips.required": False}
# The first ones had nothing to do before; they are listed here since a trial of a sweep is named without them.
EARLIER_DEFAULTS |= {"teacher": "", "loss.latent.weight": 1.0, "loss.latent.start": 0}
EARLIER_DEFAULTS |= {"loss.logvar.weight": 0.1, "loss.logvar.start": 0, "model.init_decoder": "", "model.freeze": []}
EARLIER_DEFAULTS |= {"equivariance.share": 0.0, "equivariance.smaller": 0.25, "equivariance.smallest": 0.25}
LENGTHS = ("stages", "images")  # fields that may only grow once something was trained


def open_run(
    folder: str,
    config: BaseModel,
    may_change: Iterable[str],
    made: Sequence[str] = TRAINED,
    left: Sequence[str] = LEFT_BY_TRAINING,
) -> bool:
    """Write the config of a new run into its folder, or compare it with the config of the earlier run there.

    If the folder holds a run that made nothing, and its config is another one, the folder is cleared of what that run
    left, and the run is new.

    Args:
        folder: the run's folder.
        config: the run's config.
        may_change: dotted names of fields or sections that may differ from the earlier run.
        made: patterns of files; a run that has none of them has made nothing.
        left: patterns of what such a run leaves beside its config and its logs.

    Returns:
        True if an earlier run is resumed, False if the run is new.

    Raises:
        UserError: as `check_run`.
    """
    before = check_run(folder, config, may_change, made)
    if before == "same":
        return True
    if before == "void":
        clear(folder, left)
        say(f"nothing was made in {folder} before; it begins anew with this config", folder=folder)
    write_config(folder, config)
    return False


def check_run(
    folder: str, config: BaseModel, may_change: Iterable[str], made: Sequence[str] = TRAINED
) -> Literal["new", "same", "void"]:
    """Compare a config with that of the earlier run in a folder, and change nothing there; arguments as for `open_run`.

    Returns:
        "new": there is no run; "same": one with this config, which may be resumed; "void": one with another config
        that made nothing.

    Raises:
        UserError: if the folder holds a run with another config (the message lists the differences), a damaged config,
            or something that is not a run.
    """
    path, void = Path(folder) / CONFIG, not found_of(folder, made)
    if not path.exists():
        if holds_something(folder):
            raise UserError(
                f"{folder} exists, but is not a run of this project (no {CONFIG}); choose another name or root"
            )
        return "new"
    try:
        # A field that did not exist when the run was started counts as its default or its value in EARLIER_DEFAULTS.
        default = flatten(values_to_keep(type(config)()))
        before = default | {key: value for key, value in EARLIER_DEFAULTS.items() if key in default}
        before |= flatten(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, AttributeError) as error:
        if void:
            return "void"
        raise UserError(f"{path} is damaged: {error}; restore it, or choose another name") from None
    now = flatten(values_to_keep(config))
    free = tuple(may_change)
    different = [
        f"  {key}: was {before.get(key, 'not set')!r}, is {now.get(key, 'not set')!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) != _numbers(before.get(key))
        and not any(key == name or key.startswith(name + ".") for name in free)
    ]
    if void and (different or any(before.get(key) != now.get(key) for key in LENGTHS)):
        return "void"
    if different:
        raise UserError(
            f"run {folder} was started with another config; continue with that one, or choose another name:\n"
            + "\n".join(different)
        )
    return "same"


def stored(folder: str) -> dict[str, Any]:
    """Return the config of the run in a folder as it is written there, by dotted name; nothing if it can't be read."""
    try:
        return flatten(yaml.safe_load((Path(folder) / CONFIG).read_text()))
    except (OSError, yaml.YAMLError, AttributeError):
        return {}


@contextmanager
def kept_if_made(folder: str) -> Iterator[None]:
    """Return a context that empties a training's folder if the block fails before anything was made or logged there."""
    try:
        yield
    except BaseException:
        log = Path(folder, "metrics.jsonl")
        if not found_of(folder, TRAINED) and not (log.exists() and log.stat().st_size):
            clear(folder, LEFT_BY_TRAINING)
        raise


def clear(folder: str, left: Sequence[str]) -> None:
    """Remove the logs and the config of a run, and what its folder holds of the patterns.

    The config goes last: a folder that was cleared in part still is that of a run.
    """
    clear_log(folder)
    for path in found_of(folder, left):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    with suppress(OSError):  # raised where it does not exist or is not empty
        os.rmdir(os.path.join(folder, "images"))
    Path(folder, CONFIG).unlink(missing_ok=True)


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
    before = yaml.safe_load((Path(folder) / CONFIG).read_text())[field]
    if now < before:
        raise UserError(f"{field} of run {folder} may only grow; it was {before}, and is {now}")


def write_config(folder: str, config: BaseModel) -> None:
    """Write `config.yaml` into the run's folder, which is made if missing."""
    os.makedirs(folder, exist_ok=True)
    text = yaml.safe_dump(values_to_keep(config), sort_keys=False)
    storage.put(str(Path(folder) / CONFIG), text.encode())
