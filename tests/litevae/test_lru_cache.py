import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from litevae.lru_cache import LRUCache

SOON = 20  # seconds after which a thread that should have come counts as hung


class Loader:
    """Loads key -> (key, size 1), once `may_end` is set, and notes what it has loaded."""

    def __init__(self):
        self.loaded, self.began, self.may_end = [], threading.Semaphore(0), threading.Event()

    def __call__(self, key):
        self.loaded.append(key)
        self.began.release()
        assert self.may_end.wait(SOON)
        if key == "bad":
            raise ValueError(f"failure {len(self.loaded)}")
        return [key], 1


def in_wait(cache, count):
    """Wait until `count` threads wait for a value that another thread loads."""
    future = next(iter(cache._loading.values()))
    arrived = threading.Semaphore(0)
    condition = future._condition

    class Seen:
        def __getattr__(self, name):
            return getattr(condition, name)

        def __enter__(self):
            return condition.__enter__()

        def __exit__(self, *error):
            return condition.__exit__(*error)

        def wait(self, timeout=None):
            arrived.release()
            return condition.wait(timeout)

    future._condition = Seen()
    return lambda: [arrived.acquire(timeout=SOON) for _ in range(count)]


def test_threads_load_different_keys_at_the_same_time():
    loader = Loader()
    cache = LRUCache(loader, limit=8)
    with ThreadPoolExecutor(8) as threads:
        values = [threads.submit(cache, key) for key in range(8)]
        assert all(loader.began.acquire(timeout=SOON) for _ in values)  # all eight are within `load`
        loader.may_end.set()
        assert [value.result() for value in values] == [[key] for key in range(8)]
    assert sorted(loader.loaded) == list(range(8))


def test_threads_that_want_one_key_load_it_once_and_get_the_same_value():
    loader = Loader()
    cache = LRUCache(loader, limit=8)
    with ThreadPoolExecutor(4) as threads:
        first = threads.submit(cache, "a")
        assert loader.began.acquire(timeout=SOON)
        all_wait = in_wait(cache, 3)
        others = [threads.submit(cache, "a") for _ in range(3)]
        all_wait()
        loader.may_end.set()
        assert {id(value.result()) for value in [first, *others]} == {id(cache("a"))}
    assert loader.loaded == ["a"]


def test_an_error_goes_to_all_who_wait_for_it_and_is_not_kept():
    loader = Loader()
    cache = LRUCache(loader, limit=8)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cache, "bad")
        assert loader.began.acquire(timeout=SOON)
        all_wait = in_wait(cache, 1)
        second = threads.submit(cache, "bad")
        all_wait()
        loader.may_end.set()
        for call in (first, second):
            with pytest.raises(ValueError, match="failure 1"):
                call.result()
    with pytest.raises(ValueError, match="failure 2"):
        cache("bad")
    assert cache("good") == ["good"]


def test_what_was_used_longest_ago_goes_when_the_limit_is_passed():
    loaded = []

    def load(key):
        loaded.append(key)
        return key, key  # a value as large as its key says

    cache = LRUCache(load, limit=10)
    for key in (3, 4, 3, 2, 5):  # 3 + 4 + 2 = 9; 5 more, and 4, used longest ago, goes: 3 + 2 + 5 = 10
        cache(key)
    assert loaded == [3, 4, 2, 5]
    for key in (3, 2, 5):
        cache(key)
    assert loaded == [3, 4, 2, 5]
    assert cache(20) == 20  # larger than the limit: the only one that is left
    cache(20)
    cache(5)
    assert loaded == [3, 4, 2, 5, 20, 5]


def test_a_copy_begins_empty():
    cache = LRUCache(_sized, limit=2)
    cache("ab")
    copy = pickle.loads(pickle.dumps(cache))
    assert not copy._held
    assert copy("ab") == "AB"


def _sized(key):
    return key.upper(), 1
