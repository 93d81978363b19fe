"""Ports on loopback that no other process takes between the time they are found and the time they are used."""

import fcntl
import random
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_BELOW_THOSE_OF_CONNECTIONS = range(20000, 30000)  # the system gives ports from 32768 up to connections
_held: list[IO[str]] = []


def reserve() -> int:
    """Return a free port, for a server that does not accept port 0 ("choose any free port").

    The port stays reserved until this process ends: other test processes see its lock, and the system gives no
    connection a port in this range.
    """
    folder = Path(tempfile.gettempdir(), "litevae-ports")
    folder.mkdir(exist_ok=True)
    for port in random.sample(_BELOW_THOSE_OF_CONNECTIONS, 200):
        lock = open(folder / str(port), "w")  # noqa: SIM115 - held until the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:  # fails if a program that does not use these locks has the port
                probe.bind(("127.0.0.1", port))
        except OSError:
            lock.close()
            continue
        _held.append(lock)
        return port
    raise RuntimeError(f"no free port among 200 of {_BELOW_THOSE_OF_CONNECTIONS}")


@contextmanager
def closed() -> Iterator[int]:
    """Yield a port that refuses connections: it is bound, so that no one else can use it, but nothing listens on it."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]
