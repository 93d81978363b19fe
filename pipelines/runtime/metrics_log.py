"""Read and repair the file metrics.jsonl of a run."""

import json
import re
from pathlib import Path


def repair_log(path: str) -> dict[str, int]:
    """Return the last step of each metric in the file, and remove an incomplete last line (full disk, power cut)."""
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
    """Return the step, the Unix time and the metrics of a line; no metrics if the line is damaged."""
    try:
        values = json.loads(line)
        return values.pop("step"), values.pop("time"), {key: float(value) for key, value in values.items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        return 0, 0.0, {}


def clear_log(folder: str) -> None:
    """Delete metrics.jsonl and the logged pictures of a run folder."""
    Path(folder, "metrics.jsonl").unlink(missing_ok=True)
    for picture in Path(folder, "images").glob("*-" + "[0-9]" * 12 + ".png"):
        picture.unlink()


def metric_name(key: str) -> str:
    """Return a name that MLflow accepts for metrics and for pictures."""
    return re.sub(r"[^A-Za-z0-9_\-./ ]", "_", key)
