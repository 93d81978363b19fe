"""The log lines of a job: text for people, or one JSON object per line for log collectors. Tables are always text."""

import json
import math
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def without_stderr_lines(text: str) -> Iterator[None]:
    """Drop the lines with this text that the process writes to stderr inside the block, also those of native code.

    The block should be short: if the process is killed in it, the last lines may be lost.
    """
    sys.stderr.flush()
    before = os.dup(2)
    out, into = os.pipe()

    def pass_on() -> None:
        with open(out, "rb") as lines, open(before, "wb", buffering=0, closefd=False) as kept:
            for line in lines:
                if text.encode() not in line:
                    kept.write(line)

    reader = threading.Thread(target=pass_on, name="stderr", daemon=True)
    reader.start()
    os.dup2(into, 2)
    os.close(into)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)  # closes the pipe's last end, which ends the reader
        reader.join()
        os.close(before)
