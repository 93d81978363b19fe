"""Metrics for Prometheus, exported by Ray, for the dashboard of a running cluster (infra/monitoring).

Ray exports them on each node with the prefix `ray_`. Every metric has the tag `run`. Metrics that are to be kept go to
MLflow.
"""

from typing import Any


class TrainingGauges:
    """The metrics of a training run, set in the process of rank 0."""

    def __init__(self, run: str):
        self._loss = _gauge("litevae_train_loss", "the training loss", run)
        self._speed = _gauge("litevae_train_images_per_second", "training images a second, over all workers", run)
        self._waiting = _gauge("litevae_train_waiting_for_data", "share of time spent waiting for data", run)
        self._images = _counter("litevae_images_trained", "images trained on since this process began", run)
        self._skipped = _counter("litevae_steps_skipped", "steps with NaN or infinite gradients", run)

    def show(self, images: int, steps: int, metrics: dict[str, float]) -> None:
        """Update the metrics after further steps.

        Args:
            images: number of images since the last call.
            steps: number of steps since the last call.
            metrics: means over these steps.
        """
        self._loss.set(metrics["loss"])
        self._speed.set(metrics["images_per_second"])
        self._waiting.set(metrics["waiting_for_data"])
        self._images.inc(images)
        if (skipped := round(steps * metrics.get("skipped_steps", 0.0))) > 0:
            self._skipped.inc(skipped)


class EncodingGauges:
    """The metrics of an encode job, set on its driver."""

    def __init__(self, run: str):
        self._images = _counter("litevae_images_encoded", "images encoded since this process began", run)
        self._shards = _counter("litevae_shards_committed", "shards committed since this process began", run)
        self._lost = _counter("litevae_images_quarantined", "images that could not be encoded", run, "reason")
        self._busy = _gauge("litevae_encode_busy", "share of their time that workers are busy", run, "stage")

    def show(self, images: int, reasons: dict[str, int], busy: dict[str, float]) -> None:
        """Update the metrics after one more shard.

        Args:
            images: number of images that were encoded.
            reasons: number of images that were quarantined, by reason.
            busy: share of time, 0 to 1, that the workers of each stage were busy.
        """
        self._shards.inc()
        if images:
            self._images.inc(images)
        for reason, count in reasons.items():
            self._lost.inc(count, tags={"reason": reason})
        for stage, share in busy.items():
            self._busy.set(share, tags={"stage": stage})


def _ascii(run: str) -> str:
    """Return the name of a run as Ray takes tags: é as \\xe9."""
    return run.encode("ascii", "backslashreplace").decode()


def _gauge(name: str, text: str, run: str, *tags: str) -> Any:
    from ray.util.metrics import Gauge

    gauge = Gauge(name, text, ("run", *tags))
    gauge.set_default_tags({"run": _ascii(run)})
    return gauge


def _counter(name: str, text: str, run: str, *tags: str) -> Any:
    from ray.util.metrics import Counter

    counter = Counter(name, text, ("run", *tags))
    counter.set_default_tags({"run": _ascii(run)})
    return counter
