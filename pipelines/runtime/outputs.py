"""Output folders of jobs that measure. Each holds one result, which another one does not overwrite unless asked to."""

import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from litevae import storage
from litevae.errors import UserError
from pipelines.runtime import paths
from pipelines.runtime.logs import say
from pipelines.runtime.schema import flatten

# Fields that decide where and how a job runs, and not what it measures.
NEUTRAL = ("root", "ray", "tracking", "out", "overwrite", "verbose")
# Fields that name files or folders, which are the same however they are written.
PATHS = ("model", "cache", "source.uri", "samples.uri", "lpips_weights", "inception", "squeezenet", "backbone")


class Output(NamedTuple):
    """The folder of a result.

    Attributes:
        folder: its absolute path.
        replaced: what is said about the result that is there and will be replaced; "": there is none.
    """

    folder: str
    replaced: str

    def announce(self, what: str) -> str:
        """Say where the result will be, and what it replaces; return the folder."""
        say(f"{what}: results go to {self.folder}{self.replaced}", folder=self.folder)
        return self.folder


def check_output(config: Any, default: str, file: str) -> Output:
    """Check that the output folder of a job can be written, and holds no result of another config.

    Args:
        config: the job's config, with the fields `out` and `overwrite`.
        default: the folder where `out` is empty.
        file: the JSON file of the result, whose "config" is what `measured` returned.

    Returns:
        The folder.

    Raises:
        UserError: if it can't be written, or holds another result and `overwrite` is false. The message lists what
            differs.
    """
    folder = paths.check_local("out" if config.out else "root", config.out or default)
    path = Path(folder, file)
    if not path.exists():
        return Output(folder, "")
    when = f" of {datetime.fromtimestamp(path.stat().st_mtime, UTC):%Y-%m-%d %H:%M} UTC"
    try:
        held = json.loads(path.read_bytes())
    except (OSError, ValueError):
        held = None
    before = held.get("config") if isinstance(held, dict) else None
    now = measured(config)
    if isinstance(before, dict):
        before = flatten(measured(type(config)())) | flatten(before)
        different = [
            f"  {key}: was {before.get(key, 'not set')!r}, is {value!r}"
            for key, value in flatten(now).items()
            if before.get(key, "not set") != value
        ]
        if not different:
            return Output(folder, f"; they replace those of the same config{when}")
        reason = f"the result of another config{when}. The differences are:\n" + "\n".join(different)
    else:
        reason = f"{file}{when}, which does not say how it was measured"
    if config.overwrite:
        return Output(folder, f"; they replace those of another config{when}, since overwrite=true")
    raise UserError(f"{folder} holds {reason}\nGive another folder with out=..., or replace it with overwrite=true")


def measured(config: BaseModel) -> dict[str, Any]:
    """Return what a config says about what is measured, as the file of the result keeps it."""
    values = config.model_dump(mode="json", exclude={*NEUTRAL})
    for name in PATHS:
        section, _, field = name.rpartition(".")
        part = values.get(section) if section else values
        if isinstance(part, dict) and isinstance(part.get(field), str) and part[field]:
            part[field] = _absolute(part[field])
    return values


def _absolute(path: str) -> str:
    return path if storage.is_remote(path) else os.path.abspath(path)


def name_of(path: str) -> str:
    """Return a short name for a model, a cache or images: of runs/vae/model it is "vae", of other paths the last part.

    It has no characters that a folder's name should not have.
    """
    *before, last = [part for part in path.rstrip("/").split("/") if part] or ["nothing"]
    if before and last.startswith("model"):
        last = before[-1] + last.removeprefix("model")
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", last).strip("-.") or "nothing"
