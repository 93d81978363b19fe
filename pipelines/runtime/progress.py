"""Show that a job works: a first line at its start, then a live bar on a terminal, or else a line now and then."""

import time
from collections import deque

from pydantic import BaseModel

from pipelines.runtime.estimate import duration
from pipelines.runtime.logs import say
from pipelines.runtime.schema import Job

RECENT = 60.0  # seconds over which the rate is measured
SLOWEST = 60.0  # seconds between lines once a job has worked for half an hour


class RecentRate:
    """Images per second over the last minute, measured from the first images on: the start-up does not count."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()  # (time, images done), at most one per second, oldest first
        self._last: tuple[float, int] | None = None

    def add(self, now: float, done: int) -> None:
        """Note that `done` images are done at the time `now`, in seconds."""
        self._last = now, done
        if not self._seen or now - self._seen[-1][0] >= 1:
            self._seen.append(self._last)
        while len(self._seen) > 2 and now - self._seen[1][0] >= RECENT:
            self._seen.popleft()

    def leave_out(self, now: float) -> None:
        """Leave out the time from the last note until `now`, which was spent on something else than images."""
        if self._last is not None:
            gap = now - self._last[0]
            self._seen = deque((when + gap, done) for when, done in self._seen)
            self._last = now, self._last[1]

    @property
    def value(self) -> float:
        """Images per second; 0 as long as it is not known."""
        if self._last is None or self._last[0] <= self._seen[0][0]:
            return 0.0
        return (self._last[1] - self._seen[0][1]) / (self._last[0] - self._seen[0][0])


class Progress:
    """A progress display with images per second and remaining time. Use it on the driver, or in rank 0 of the workers.

    Args:
        what: name of the work.
        total: number of images in total.
        done: number of images that are done already; they do not count for the speed.
        live: whether to show a live bar instead of lines.
        every: seconds between lines in the first minutes; later lines come once a minute.
    """

    def __init__(self, what: str, total: int, done: int, live: bool, every: float = 10.0):
        self._what, self._total, self._done, self._every = what, total, done, every
        self._last = time.monotonic()
        self._begun: float | None = None  # time of the first update
        self._recent = RecentRate()
        self._bar = None
        if live:
            from ray.experimental import tqdm_ray

            # The bar counts what this process does: earlier images would count for its speed.
            self._name = what if not done else f"{what}, from {done:,} on"
            self._bar = tqdm_ray.tqdm(desc=self._name, total=total - done, unit=" images")

    def update(self, done: int, text: str = "", **numbers: float) -> None:
        """Show that `done` images are done in total.

        Args:
            done: images that are done, with those of earlier processes.
            text: what else people should see.
            numbers: further keys of the JSON object, for log collectors.
        """
        now = time.monotonic()
        self._recent.add(now, done)
        if self._bar is not None:
            if text:
                self._bar.set_description(f"{self._name}, {text}")
            self._bar.update(done - self._done)
        self._done = done
        self._begun = now if self._begun is None else self._begun
        every = max(self._every, min(SLOWEST, (now - self._begun) / 30))
        if self._bar is None and (now - self._last >= every or done >= self._total):
            self._last, rate = now, self._recent.value
            parts = [f"{self._what}: {done:,} of {self._total:,} images"]
            if rate:
                numbers["images_per_second"] = rate
                parts.append(f"{rounded(rate)} images/s")
            if rate and done < self._total:
                parts.append(f"about {duration((self._total - done) / rate)} left")
            if text:
                parts.append(text)
            say(", ".join(parts), **numbers | {"job": self._what, "images": done, "total": self._total})

    def leave_out(self) -> None:
        """Leave out the time since the last update, for example that of a validation, from the rate."""
        self._recent.leave_out(time.monotonic())

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def first_line(job: str, config: BaseModel) -> str:
    """Return what a job says at its start, before it imports what takes seconds.

    Args:
        job: the job's name.
        config: its config.
    """
    name = f"{job} {run}" if (run := getattr(config, "name", "")) else job
    what = "PyTorch and Ray, about 10 s" if isinstance(config, Job) else "what it needs, a few seconds"
    return f"{name}: loading {what}"


def rounded(rate: float) -> str:
    """Return a number of images per second with three digits, and whole from 100 on: 0.0257, 2.41, 31.8, 1,824."""
    return f"{rate:,.0f}" if rate >= 99.95 else f"{rate:#.3g}"
