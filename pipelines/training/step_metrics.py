"""Means of the metrics that training steps return, over steps and micro-batches; and how fast steps are."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


class Totals:
    """Means of metrics, kept on the device, so that no step waits for it. What is NaN or infinite does not count.

    A step's numbers are one tensor: a GPU takes longer to start a kernel for each of them than to compute them all.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}  # of steps with the same metrics: sums, and how many counted

    def add(self, values: dict[str, Tensor]) -> None:
        if not values:
            return
        row = torch.stack([value.detach() for value in values.values()])
        finite = row.isfinite()
        row, names = torch.stack([row.where(finite, 0), finite]), tuple(values)
        self._sums[names] = self._sums[names] + row if names in self._sums else row

    def means(self) -> dict[str, Tensor]:
        """Since the last call; NaN where nothing counts."""
        found: dict[str, Tensor] = {}
        for names, sums in self._sums.items():
            for name, pair in zip(names, sums.unbind(1), strict=True):
                found[name] = found[name] + pair if name in found else pair
        self._sums.clear()
        return {name: total / count for name, (total, count) in found.items()}


def mean_of(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of a step's micro-batches."""
    if len(parts) == 1:
        return {name: value.detach() for name, value in parts[0].items()}
    totals = Totals()
    for part in parts:
        totals.add(part)
    return totals.means()


class Throughput:
    """Images per second, and the share of the time in which the loop waited for data, since the last `restart`.

    Args:
        images: images seen so far.
    """

    def __init__(self, images: int):
        self._rates: list[float] = []
        self.restart(images)

    def restart(self, images: int) -> None:
        """Begin anew, so that what was done since the last reading (validation, a checkpoint) does not count."""
        self._since, self._start, self._waited = images, time.monotonic(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time within as time waited for data."""
        asked = time.monotonic()
        yield
        self._waited += time.monotonic() - asked

    def read(self, images: int) -> tuple[int, dict[str, float]]:
        """Images since the restart; and `images_per_second` and `waiting_for_data` (0 to 1) as metrics."""
        seconds, done = max(1e-9, time.monotonic() - self._start), images - self._since
        self._rates.append(done / seconds)
        return done, {"images_per_second": self._rates[-1], "waiting_for_data": self._waited / seconds}

    @property
    def median(self) -> float:
        """Images per second: the median of all readings, 0 where there was none."""
        return float(np.median(self._rates)) if self._rates else 0.0
