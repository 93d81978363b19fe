"""Show the progress of a job: a live bar on a terminal, otherwise a line every ten seconds."""

import time

from pipelines.runtime.logs import say


class Progress:
    """A progress display with images per second and remaining time. Use it on the driver, or in rank 0 of the workers.

    Args:
        what: name of the work.
        total: number of images in total.
        done: number of images that are done already; they do not count for the speed.
        live: whether to show a live bar instead of lines.
        every: seconds between lines.
    """

    def __init__(self, what: str, total: int, done: int, live: bool, every: float = 10.0):
        self._what, self._total, self._done, self._every = what, total, done, every
        self._first, self._start, self._last = done, time.monotonic(), time.monotonic()
        self._bar = None
        if live:
            from ray.experimental import tqdm_ray

            self._bar = tqdm_ray.tqdm(desc=what, total=total, unit="images")
            self._bar.update(done)

    def update(self, done: int, **numbers: float) -> None:
        """Show that `done` images are done in total. Lines also show `numbers`."""
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
