"""A store of recently used values."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class LRUCache(Generic[K, T]):
    """A store of the most recently used values (LRU), up to a total size.

    It is thread-safe: threads load different keys at the same time, and one key only once. It is pickled without its
    values.

    Args:
        load: Function that returns (value, size) for a key. Several threads may call it at a time, with different keys.
        limit: Upper limit of the total size of the values in the store. The newest value is kept in any case. Values
            that are being loaded do not count yet.
    """

    def __init__(self, load: Callable[[K], tuple[T, int]], limit: int):
        self._load, self._limit = load, limit
        self._start()

    def _start(self) -> None:
        self._held: OrderedDict[K, tuple[T, int]] = OrderedDict()
        self._size = 0
        self._loading: dict[K, Future[T]] = {}
        self._lock = threading.Lock()

    def __call__(self, key: K) -> T:
        """Return the value of a key, and load it if it is not in the store.

        Threads that ask for a key while another thread loads it wait for that value, or get that thread's error. The
        next call after an error loads again.
        """
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key][0]
            if waiting := self._loading.get(key):
                loaded = waiting
            else:
                loaded = self._loading[key] = Future()
        if waiting:
            return loaded.result()
        try:
            value, size = self._load(key)
        except BaseException as error:
            with self._lock:
                del self._loading[key]
            loaded.set_exception(error)
            raise
        with self._lock:
            del self._loading[key]
            self._held[key] = value, size
            self._size += size
            while len(self._held) > 1 and self._size > self._limit:
                self._size -= self._held.popitem(last=False)[1][1]
        loaded.set_result(value)
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {"_load": self._load, "_limit": self._limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._start()
