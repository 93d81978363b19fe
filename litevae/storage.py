"""Files that appear whole or not at all, and what was read of them last: what the latent cache is built on.

`put_new` is the protocol's core: of several writers of one name exactly one wins, and no reader ever sees a part.
"""

import errno
import os
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from litevae.errors import UserError

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def size(path: str) -> int | None:
    """Bytes of a file; None where there is none."""
    return os.path.getsize(path) if os.path.isfile(path) else None


def put_new(path: str, data: bytes) -> bool:
    """Write a file unless the name is taken: temporary file, fsync, no-replace link. Folders are made.

    Returns:
        False where the name was taken; that file is left as it is.

    Raises:
        UserError: it can't be written: no permission, a full disk, a file system without hard links.
    """
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, f".tmp-{uuid.uuid4().hex}")
    try:
        os.makedirs(folder, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
    except OSError as error:
        hint = "; the file system must have hard links" if error.errno in _NO_LINKS else ""
        raise UserError(f"{path} can't be written: {error.strerror}{hint}") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    _sync(folder)
    return True


def names(folder: str) -> list[str]:
    """File names in a folder, sorted; none where there is no such folder. Unfinished files are left out."""
    if not os.path.isdir(folder):
        return []
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def _sync(folder: str) -> None:
    """Make the new name itself survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Recent(Generic[K, T]):
    """The values used last, up to a total size. Safe among threads; pickled without its values.

    Args:
        load: key -> (value, size). One call at a time.
        limit: of the sizes; the newest value is held in any case.
    """

    def __init__(self, load: Callable[[K], tuple[T, int]], limit: int):
        self._load, self._limit = load, limit
        self._start()

    def _start(self) -> None:
        self._held: OrderedDict[K, tuple[T, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, key: K) -> T:
        with self._lock:
            if key not in self._held:
                self._held[key] = self._load(key)
                while len(self._held) > 1 and sum(size for _, size in self._held.values()) > self._limit:
                    self._held.popitem(last=False)
            self._held.move_to_end(key)
            return self._held[key][0]

    def __getstate__(self) -> dict[str, Any]:
        return {"_load": self._load, "_limit": self._limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._start()
