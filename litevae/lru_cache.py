"""A store of recently used values."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class LRUCache(Generic[K, T]):
    """A store of the most recently used values (LRU), up to a total size.

    It is thread-safe. It is pickled without its values.

    Args:
        load: Function that returns (value, size) for a key. It is called by one thread at a time.
        limit: Upper limit of the total size. The newest value is kept in any case.
    """

    def __init__(self, load: Callable[[K], tuple[T, int]], limit: int):
        self._load, self._limit = load, limit
        self._start()

    def _start(self) -> None:
        self._held: OrderedDict[K, tuple[T, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, key: K) -> T:
        """Return the value of a key, and load it if it is not in the store."""
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
