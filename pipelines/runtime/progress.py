"""How far a job is: a live bar on a terminal, otherwise a line every ten seconds."""

import time

from pipelines.runtime.logs import say


class Progress:
    """Images/s and time left: a live bar on a terminal, else a line now and then. Rank 0 of a worker, or the driver."""

    def __init__(self, what: str, total: int, done: int, live: bool, every: float = 10.0):
        self._what, self._total, self._done, self._every = what, total, done, every
        self._first, self._start, self._last = done, time.monotonic(), time.monotonic()
        self._bar = None
        if live:
            from ray.experimental import tqdm_ray

            self._bar = tqdm_ray.tqdm(desc=what, total=total, unit="images")
            self._bar.update(done)

    def update(self, done: int, **numbers: float) -> None:
        if self._bar is not None:
            self._bar.update(done - self._done)
        self._done, now = done, time.monotonic()
        if self._bar is None and (now - self._last >= self._every or done >= self._total):
            self._last = now
            rate = (done - self._first) / max(1e-9, now - self._start)
            left = int((self._total - done) / max(1e-9, rate))
            shown = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
            say(
                f"{self._what}: {done:,}/{self._total:,} images  {shown}  {rate:.1f} images/s  "
                f"{left // 60}:{left % 60:02d} left",
                **numbers | {"job": self._what, "images": done, "total": self._total, "images_per_second": rate},
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
