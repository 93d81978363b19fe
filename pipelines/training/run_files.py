"""Names of the files in a run's folder, and which of them show that something was made there."""

from collections.abc import Sequence
from pathlib import Path

CONFIG = "config.yaml"  # what the run is
STATE = "state.pt"  # file in each checkpoint's folder
DRIVER = ".driver"  # names the process that works on the run, which holds a lock on it
ERROR = "error.txt"  # the error message of one of several workers

# What a training makes that is worth keeping.
TRAINED = (f"checkpoint-*/{STATE}", "model*/config.json", "model*/ldm.json")
# What a training leaves that failed before its first checkpoint: beside its config and its logs.
LEFT_BY_TRAINING = (ERROR, "stop", "checkpoint_manager_snapshot.json", ".validate_storage_marker", "checkpoint-*")
# The same of a sweep. What its trials have trained lies elsewhere, under <root>/trained.
SWEPT = ("rows/*/result.json", "rows/*/stopped.json", "complexity/metrics.json")
LEFT_BY_SWEEP = ("stop", "configs", "rows", "tune", "results.json", "best.yaml")


def found_of(folder: str, patterns: Sequence[str]) -> list[Path]:
    """Return what a folder holds of the patterns, in their order."""
    return [path for pattern in patterns for path in sorted(Path(folder).glob(pattern))]
