"""Lines of a job's log: for people, or one JSON object each, for what collects a cluster's logs. Tables stay text."""

import json
import math
import os
import sys
from datetime import datetime
from typing import Any


def structured() -> bool:
    """Whether Ray's own lines are objects: its RAY_LOGGING_CONFIG_ENCODING=JSON, which its workers inherit."""
    return os.environ.get("RAY_LOGGING_CONFIG_ENCODING", "").upper() == "JSON"


def say(text: str, level: str = "INFO", /, **fields: Any) -> None:
    """Print `text`, or an object with Ray's names (asctime, levelname, message) and these fields; errors on stderr."""
    if structured():
        now = datetime.now().isoformat(" ", "milliseconds").replace(".", ",")  # as Python's logging writes it
        line = {"asctime": now, "levelname": level, "message": text.strip(), **fields}
        for key, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[key] = str(value)  # JSON has no NaN
        text = json.dumps(line, default=str)
    print(text, file=sys.stderr if level == "ERROR" else sys.stdout, flush=True)
