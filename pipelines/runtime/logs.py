"""The log lines of a job: text for people, or one JSON object per line for log collectors. Tables are always text."""

import json
import math
import os
import sys
from datetime import datetime
from typing import Any


def structured() -> bool:
    """Return whether Ray itself logs JSON objects: RAY_LOGGING_CONFIG_ENCODING=JSON, which its workers inherit."""
    return os.environ.get("RAY_LOGGING_CONFIG_ENCODING", "").upper() == "JSON"


def say(text: str, level: str = "INFO", /, **fields: Any) -> None:
    """Print a log line, on stderr if it is an error.

    Args:
        text: the message.
        level: "INFO", "WARNING" or "ERROR".
        fields: further keys of the JSON object, next to Ray's own asctime, levelname and message. They are not shown in
            text lines.
    """
    if structured():
        now = datetime.now().isoformat(" ", "milliseconds").replace(".", ",")  # as Python's logging writes it
        line = {"asctime": now, "levelname": level, "message": text.strip(), **fields}
        for key, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[key] = str(value)  # JSON has no NaN
        text = json.dumps(line, default=str)
    print(text, file=sys.stderr if level == "ERROR" else sys.stdout, flush=True)
