"""Drivers that are at work on a cache: one tells the next, so that two do not encode the same images unawares.

Two drivers do no harm, because of each shard the first commit counts; but half of their work is thrown away. A driver
therefore leaves a mark in the cache, which belongs to no reader and is removed at the end. On a disk it is the locked
file `.driver`, whose lock ends with the process. A store has no locks: there it is an object in `.drivers/` that is
written again from time to time. A driver that was killed hinders nobody, and nobody waits for it: its mark is ignored
if its process is gone, and if that can't be known, because it ran on another host, there is only a warning.
"""

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from litevae import storage
from litevae.errors import UserError
from pipelines.runtime import file_lock
from pipelines.runtime.logs import say

FILE, FOLDER = ".driver", ".drivers"
BEAT = 15.0  # seconds between two writes of an object
SILENCE = 60.0  # seconds without one after which a driver on another host counts as gone


@contextmanager
def claimed(out: str, takeover: bool = False) -> Iterator[Callable[[], bool]]:
    """Return a context in which this process is marked as at work on a cache.

    Folders that were made for the mark, and that are empty on exit, are removed.

    Args:
        out: the cache folder, local or s3://.
        takeover: whether to begin beside a driver that is at work, with a warning.

    Yields:
        A function that returns whether no other driver is known to be at work.

    Raises:
        UserError: if another driver is at work and `takeover` is false, or if the mark can't be written.
    """
    with (_object if storage.is_remote(out) else _lock)(out, takeover) as alone:
        yield alone


def check(out: str, takeover: bool) -> None:
    """Check that no other driver is at work on a cache on a disk. On S3 only `claimed` does so.

    Raises:
        UserError: if one is, and `takeover` is false.
    """
    if not takeover and not storage.is_remote(out) and Path(out, FILE).exists():
        with _lock(out, takeover):  # the mark may be of a driver that was killed
            pass


def is_mark(name: str) -> bool:
    """Return whether a path within a cache folder is a driver's mark, which is no part of the cache."""
    return name == FILE or name.partition("/")[0] == FOLDER


def _refuse(out: str, about: str, takeover: bool) -> None:
    """Raise a UserError, or warn if the user has said that the job should begin nevertheless."""
    text = f"another driver is at work on {out}: {about}"
    if not takeover:
        raise UserError(
            f"{text}. Wait for it or stop it, then run the same command; or begin beside it with takeover=true, which "
            f"does no harm, but what both encode counts once"
        )
    say(f"{text}; what both encode counts once", "WARNING")


@contextmanager
def _lock(out: str, takeover: bool) -> Iterator[Callable[[], bool]]:
    """Do `claimed` on a disk."""
    path = Path(out)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        file = file_lock.hold(path / FILE)
    except file_lock.Held as held:
        _refuse(out, str(held), takeover)
        yield lambda: False
        return
    except OSError as error:
        raise storage.unwritable(out, error) from error
    try:
        yield lambda: True
    finally:
        (path / FILE).unlink(missing_ok=True)
        file.close()
        with suppress(OSError):  # raised where the folder is not empty
            for folder in made:
                folder.rmdir()


@contextmanager
def _object(out: str, takeover: bool) -> Iterator[Callable[[], bool]]:
    """Do `claimed` on S3."""
    mine, since, over = f"{uuid.uuid4().hex}.json", time.time(), threading.Event()
    path = storage.join(out, FOLDER, mine)

    def beat() -> None:
        while not over.wait(BEAT):
            with suppress(UserError):  # the store is away: the job itself will say so
                storage.put(path, _mark(since))

    thread = threading.Thread(target=beat, name="at work", daemon=True)
    storage.put(path, _mark(since))  # before the look at others: of two that begin at once, one sees the other
    try:
        for about, certain, first in _others(out, mine, since):
            if certain and first:
                _refuse(out, about, takeover)
            elif not certain:
                say(
                    f"another driver may be at work on {out}: {about}. If it is, what both encode counts once; the end "
                    f"says how much that was",
                    "WARNING",
                )
        thread.start()
        yield lambda: not [*_others(out, mine, since)]
    finally:
        over.set()
        if thread.ident is not None:
            thread.join()
        with suppress(UserError):
            storage.remove(path)


def _mark(since: float) -> bytes:
    """Return what an object says about this process, which has been at work since a Unix time."""
    process = psutil.Process()
    mark = {"host": platform.node(), "pid": process.pid, "started": process.create_time()}
    mark |= {"since": since, "time": time.time()}
    return json.dumps(mark).encode()


def _others(out: str, mine: str, since: float) -> Iterator[tuple[str, bool, bool]]:
    """Yield the other drivers on S3 that are, or may be, at work. Marks of drivers that are gone are removed.

    Yields:
        A description, whether it is certain that the driver is at work, and whether it began before this one.
    """
    for name in storage.names(storage.join(out, FOLDER)):
        path = storage.join(out, FOLDER, name)
        if name == mine:
            continue
        try:
            mark: dict[str, Any] = json.loads(storage.read(path))
            host, pid, started, begun = (mark[key] for key in ("host", "pid", "started", "since"))
            silence = time.time() - mark["time"]
        except FileNotFoundError:
            continue  # it has just ended
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            continue
        here = host == platform.node()
        if (here and not _runs(pid, started)) or (not here and silence > SILENCE):
            storage.remove(path)
            continue
        shown = datetime.fromtimestamp(begun, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        about = f"process {pid} on {host}, since {shown}" + ("" if here else f", last seen {silence:.0f} s ago")
        yield about, here, (begun, name) < (since, mine)


def _runs(pid: int, started: float) -> bool:
    """Return whether a process of this host still runs; another one may have got its number."""
    if pid == os.getpid() and started != psutil.Process().create_time():
        return False
    with suppress(psutil.Error):
        return abs(psutil.Process(pid).create_time() - started) < 1
    return False
