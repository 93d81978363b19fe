"""A lock on a file, which the system releases however the process that holds it ends.

It also works over NFS (version 4, or 3 with its lock daemon). A killed process leaves no lock that must first expire.
"""

import fcntl
import os
import platform
import weakref
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from pipelines.runtime.logs import say

_held: weakref.WeakSet[IO[str]] = weakref.WeakSet()


class Held(Exception):
    """Another process holds the lock. The message is what that process wrote about itself."""


def hold(path: Path) -> IO[str]:
    """Open and lock a file, and write this process's id and host into it. Missing folders are made.

    On a file system without locks a warning is logged.

    Returns:
        The file. The lock ends when it is closed, or with the process.

    Raises:
        Held: if another process holds the lock.
        OSError: if the file cannot be made.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        except FileNotFoundError:  # another process has just ended and removed its empty folder
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            about = file.read().strip()
            file.close()
            raise Held(about or "it has just begun") from None
        except OSError as error:
            text = f"{path.parent} can't be locked ({error.strerror}); do not start a second job on it"
            say(f"warning: {text}", "WARNING")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # else its owner has just removed it: try again
                break
        file.close()
    file.truncate(0)
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    file.write(f"process {os.getpid()} on {platform.node()}, since {now}\n")
    file.flush()
    _held.add(file)
    return file


def _close_in_fork() -> None:
    """Close the copies that a forked process has of the locked files: they would hold the locks of a killed parent."""
    for file in [*_held]:
        file.close()


os.register_at_fork(after_in_child=_close_in_fork)
