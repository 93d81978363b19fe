"""Means of training metrics over steps and micro-batches, and the measurement of training speed."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


class Totals:
    """Means of metrics over steps; NaN and infinite values are left out.

    The sums stay on the device, so that no step waits for it. All metrics of a step are stacked into one tensor, since
    a GPU takes longer to start one kernel per metric than to compute them all.
    """

    def __init__(self) -> None:
        # For each set of metrics that steps returned: (2, metrics), the sums and the numbers of finite values.
        self._sums: dict[tuple[str, ...], Tensor] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Add the metrics of one step, scalar tensors by name."""
        if not values:
            return
        row = torch.stack([value.detach() for value in values.values()])
        finite = row.isfinite()
        row, names = torch.stack([row.where(finite, 0), finite]), tuple(values)
        self._sums[names] = self._sums[names] + row if names in self._sums else row

    def means(self) -> dict[str, Tensor]:
        """Return each metric's mean since the last call, and reset the sums; NaN where no value was finite."""
        found: dict[str, Tensor] = {}
        for names, sums in self._sums.items():
            for name, pair in zip(names, sums.unbind(1), strict=True):
                found[name] = found[name] + pair if name in found else pair
        self._sums.clear()
        return {name: total / count for name, (total, count) in found.items()}


def mean_of(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the means of metrics over the micro-batches of one step."""
    if len(parts) == 1:
        return {name: value.detach() for name, value in parts[0].items()}
    totals = Totals()
    for part in parts:
        totals.add(part)
    return totals.means()


def validation_text(metrics: dict[str, float], about: str) -> str:
    """Return a training's validation metrics for people, who should not take them for those of an evaluation.

    Args:
        metrics: the metrics by name; empty: there was no validation.
        about: what they were measured on.
    """
    # The numbers of single channels (latent_r2_0) are left to the tracked run.
    numbers = [f"{name} {value:.4g}" for name, value in metrics.items() if not name[-1].isdigit()]
    return f"val {', '.join(numbers)} ({about})" if numbers else ""


class Throughput:
    """Measurement of images per second, and of the share of time spent waiting for data, since the last `restart`.

    Args:
        images: images seen when the measurement begins.
    """

    def __init__(self, images: int):
        self._rates: list[float] = []
        self.restart(images)

    def restart(self, images: int) -> None:
        """Start a new measurement, so that time spent on validation or a checkpoint is left out."""
        self._since, self._start, self._waited = images, time.monotonic(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Return a context whose duration counts as waiting for data."""
        asked = time.monotonic()
        yield
        self._waited += time.monotonic() - asked

    def read(self, images: int) -> tuple[int, dict[str, float]]:
        """Take a reading.

        Args:
            images: images seen so far.

        Returns:
            The images since the last `restart`, and the metrics `images_per_second` and `waiting_for_data` (0 to 1).
        """
        seconds, done = max(1e-9, time.monotonic() - self._start), images - self._since
        self._rates.append(done / seconds)
        return done, {"images_per_second": self._rates[-1], "waiting_for_data": self._waited / seconds}

    @property
    def median(self) -> float:
        """The median images per second of all readings; 0 before the first one."""
        return float(np.median(self._rates)) if self._rates else 0.0
