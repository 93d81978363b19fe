"""The file metrics.jsonl of a run: what a killed process left of it, and what it holds."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def mend_log(path: str) -> dict[str, int]:
    """The last step of each metric in the file. A last line without its end (a full disk, a power cut) is cut off."""
    last: dict[str, int] = {}
    with open(path, "a+b") as file:
        file.seek(0)
        end = 0
        for line in file:
            if not line.endswith(b"\n"):
                file.truncate(end)
                break
            end += len(line)
            step, _, values = parse_line(line)
            last.update(dict.fromkeys(values, step))
    return last


def parse_line(line: bytes) -> tuple[int, float, dict[str, float]]:
    """Step, Unix time and metrics of a line; no metrics where it is damaged."""
    try:
        values = json.loads(line)
        return values.pop("step"), values.pop("time"), {key: float(value) for key, value in values.items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        return 0, 0.0, {}


def clear_log(folder: str) -> None:
    Path(folder, "metrics.jsonl").unlink(missing_ok=True)
    for picture in Path(folder, "images").glob("*-" + "[0-9]" * 12 + ".png"):
        picture.unlink()


def metric_name(key: str) -> str:
    """A name that MLflow takes for metrics and pictures alike."""
    return re.sub(r"[^A-Za-z0-9_\-./ ]", "_", key)


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, text) of every value; lists of sections are numbered."""
    if isinstance(value, dict):
        pairs: Any = value.items()
    elif isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        pairs = enumerate(value)
    else:
        yield prefix, str(value)
        return
    for key, item in pairs:
        yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
