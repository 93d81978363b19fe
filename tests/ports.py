"""Ports on loopback that nobody else takes between the moment they are found and the moment they are used."""

import fcntl
import random
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_BELOW_THOSE_OF_CONNECTIONS = range(20000, 30000)  # which the system gives out, from 32768 up
_held: list[IO[str]] = []


def reserve() -> int:
    """A port for a server that can't be given 0, which would be the way without any of this.

    It is this process's until it ends: other processes of tests see its lock, and no connection is given one so low.
    """
    folder = Path(tempfile.gettempdir(), "litevae-ports")
    folder.mkdir(exist_ok=True)
    for port in random.sample(_BELOW_THOSE_OF_CONNECTIONS, 200):
        lock = open(folder / str(port), "w")  # noqa: SIM115 - held until the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:  # somebody's who knows of no locks
                probe.bind(("127.0.0.1", port))
        except OSError:
            lock.close()
            continue
        _held.append(lock)
        return port
    raise RuntimeError(f"no free port among 200 of {_BELOW_THOSE_OF_CONNECTIONS}")


@contextmanager
def closed() -> Iterator[int]:
    """A port on which nobody listens: bound, so that nobody else can, and not listening, so that it refuses."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]
