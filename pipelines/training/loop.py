"""The loop that trains a task in a worker: steps, metrics, validation, checkpoints and the final model.

All randomness in training (crops, posterior draws, timesteps) comes from (seed, position in the data, rank). So a
resumed run needs only the number of images seen, besides weights and optimizers, and continues bit for bit.
"""

import os
import shutil
import textwrap
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from litevae import storage
from litevae.errors import UserError
from litevae.order import seed_for
from pipelines.runtime import estimate, mlflow_run, prometheus
from pipelines.runtime.logs import say
from pipelines.runtime.progress import Progress
from pipelines.runtime.schema import values_to_keep
from pipelines.training import checkpoint, ranks
from pipelines.training.config import TrainLDM, TrainVAE
from pipelines.training.interruptions import PreemptionNotices, StopRequest
from pipelines.training.step_metrics import Throughput, Totals, validation_text
from pipelines.training.worker_setup import TrainSetup


class TrainingTask(Protocol):
    """What `run` trains: networks, optimizers and data. Every rank has one.

    Attributes:
        digest: hash of the data. A run resumes from its checkpoint only with the same data.
        stages: (images, batch size over all ranks) of each stage.
        validated: what `validate` measures its metrics on, for people; "": it has none.
        order: how the data are shuffled; see `litevae.order.VERSION`. A resumed run sets this before `begin`.
    """

    digest: str
    order: int
    stages: list[tuple[int, int]]
    validated: str

    def begin(self, stage: int) -> None:
        """Prepare the data of a stage."""

    def batches(self, start: int, end: int, batch_size: int) -> Iterator[Any]:
        """Yield this rank's part of every batch from position `start` up to `end`; the last batch is whole too."""

    def step(self, batch: Any, images: int) -> dict[str, Tensor]:
        """Do one optimizer step on `batch`.

        Args:
            batch: this rank's part of a batch.
            images: images seen before this step, over all ranks.

        Returns:
            The step's metrics as scalars, one of them `loss`.
        """

    def count(self) -> dict[str, Tensor]:
        """Return metrics that are logged at their current value, not as a mean over steps."""

    def check(self, means: dict[str, float]) -> None:
        """Raise a UserError if the logged metrics, which are the same on all ranks, show that training must stop."""

    def skipped(self) -> int:
        """Return the longest series of steps since the last call that were skipped, for gradients that were not finite.

        See `optimizer.Adam.skipped`.
        """

    def validate(self) -> tuple[dict[str, float], np.ndarray | None]:
        """Return metrics, which are the same on all ranks, and a picture or None; rank 0's picture is kept."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores of this task."""

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned.

        Raises:
            RuntimeError, ValueError, KeyError: if the state is of other networks.
        """

    def exports(self) -> dict[str, Callable[[Path], None]]:
        """Return the model folders of the run: each folder's name, with the function that writes it.

        One of the names is `model`.
        """


def run(
    task: TrainingTask, name: str, config: TrainVAE | TrainLDM, setup: TrainSetup, rank: int, world: int
) -> dict[str, Any]:
    """Train `task` from the latest checkpoint: steps, metrics, validation, checkpoints, and the final model.

    Args:
        task: this rank's task.
        name: the run's name in messages.
        config: the run's config.
        setup: what the driver gave to the worker.
        rank: this worker's rank.
        world: the number of ranks.

    Returns:
        `images` (images seen), `stopped` (whether the run was stopped before its end), `images_per_second` (the
        median), and the last metrics.

    Raises:
        UserError: if the checkpoint belongs to other data or another model, if too many steps in a row were skipped, or
            if the task raised it.
    """
    return _Run(task, name, config, setup, rank, world).run()


class _Run:
    """One rank's part of a training run, starting from the latest checkpoint."""

    def __init__(
        self, task: TrainingTask, name: str, config: TrainVAE | TrainLDM, setup: TrainSetup, rank: int, world: int
    ):
        self.task, self.name, self.config, self.setup, self.rank = task, name, config, setup, rank
        self.total = sum(images for images, _ in task.stages)
        self.images = self.begun = self.saved = _resume(task, name, setup, rank)
        self.totals, self.throughput = Totals(), Throughput(self.images)
        self.numbers: dict[str, float] = {}  # the last loss and validation metrics
        self.validated = ""  # the last validation metrics, for people
        self.stop_request, self.stop = StopRequest(setup.folder, rank, world), False
        self.preemption_notices = PreemptionNotices(setup)
        self.tracker: mlflow_run.Tracker | None = None  # only rank 0 has these three
        self.progress: Progress | None = None
        self.readings = 0  # how often the speed was measured
        self.exported: prometheus.TrainingGauges | None = None
        if rank == 0:
            self.tracker = mlflow_run.Tracker(setup.handle)
            self.tracker.dataset(os.path.basename(setup.data), task.digest, setup.data)
            self.progress = Progress(name, self.total, self.images, setup.live)
            self.exported = prometheus.TrainingGauges(config.name)

    def run(self) -> dict[str, Any]:
        """Train the stages that are left, then publish the final model; see `run` of this module."""
        end = 0
        try:
            for number, (length, batch_size) in enumerate(self.task.stages):
                begin, end = end, end + length
                if self.images < end and not self.stop:
                    self.task.begin(number)
                    self._train(begin, end, batch_size)
            stopped = self.stop and self.images < self.total
            if not stopped:
                self._publish(written=self.images > self.begun)
        finally:
            if self.progress is not None:
                self.progress.close()
            if self.tracker is not None:
                self.tracker.close()
        rate = self.throughput.median
        return {"images": self.images, "stopped": stopped, "images_per_second": rate, **self.numbers}

    def _train(self, begin: int, end: int, batch_size: int) -> None:
        """Do the steps of one stage, which covers positions `begin` to `end` of the run."""
        loop = self.config.loop
        self.throughput.restart(self.images)
        # A stage's last batch is whole, so it may pass `end`, and the next stage then begins some images late.
        batches = iter(self.task.batches(max(self.images, begin), end, batch_size))
        while not self.stop:
            with self.throughput.waiting():
                batch = next(batches, None)
            if batch is None:
                break
            before, self.images = self.images, self.images + batch_size
            torch.manual_seed(seed_for(self.config.seed, before, self.rank))
            self.totals.add(self.task.step(batch, before))
            self.stop = self.stop_request.heard()
            log = due(before, self.images, loop.log_every * batch_size)
            save = due(before, self.images, loop.checkpoint_every) or self.images >= end or self.stop
            if log and self.preemption_notices.new():
                save = True
                if self.progress is not None:
                    say(
                        f"{self.name}: a node will be taken away; writing a checkpoint after {self.images:,} images",
                        "WARNING",
                    )
            if log or save:
                self._log(batch_size)
            if self.progress is not None:
                self.progress.update(min(self.images, self.total), self._text(), **self.numbers)
            if due(before, self.images, loop.val_every) or self.images >= self.total:
                self._validate()
            if save:
                self._save()

    def _text(self) -> str:
        """Return the last loss and validation metrics for people."""
        loss = [f"loss {self.numbers['loss']:.4g}"] if "loss" in self.numbers else []
        return ", ".join([*loss, *([self.validated] if self.validated else [])])

    def _log(self, batch_size: int) -> None:
        """Average the metrics since the last call over steps and ranks, check them, and log them everywhere."""
        means = ranks.mean_over_ranks(self.totals.means() | self.task.count())
        done, speed = self.throughput.read(self.images)
        self.task.check(means)
        if (skipped := self.task.skipped()) >= self.config.loop.max_skipped:
            raise UserError(
                f"{skipped} steps in a row, up to {self.images:,} images, had NaN or infinite gradients and "
                f"were skipped; {self._kept()} Lower optim.lr, or set optim.clip=1 or loop.precision=fp32, and "
                f"{self._again()}"
            )
        if self.tracker is not None:
            values = {key: value for key, value in means.items() if np.isfinite(value)} | speed
            self.tracker.metrics({f"train/{key}": value for key, value in values.items()}, self.images)
        if self.exported is not None:
            self.exported.show(done, done // batch_size, means | speed)
        self.numbers["loss"] = means["loss"]
        self.throughput.restart(self.images)
        self._say_duration(speed["images_per_second"])

    def _say_duration(self, rate: float) -> None:
        """Say on GPUs how long the training will take, at the second reading: the first has the start of the device.

        On CPUs the driver has said so before the start.
        """
        self.readings += 1
        left = self.total - self.images
        if self.rank == 0 and self.setup.gpu and self.readings == 2 and rate > 0 and left > 0:
            estimate.announce(f"training on the {left:,} images that are left", left / rate, gpu=True, yes=True)

    def _kept(self) -> str:
        """Return what is kept of a run that ends now."""
        return f"the checkpoint at {self.saved:,} is kept." if self.saved else "there is no checkpoint yet."

    def _again(self) -> str:
        """Return how to train further with another learning rate, clipping or precision."""
        if not self.saved:
            return "run the same command again: it begins anew"
        if isinstance(self.config, TrainLDM):
            return "run the same command again: it continues from there"
        # A run of train_vae keeps these fields; a new one may have others.
        state = os.path.join(self.setup.folder, checkpoint_name(self.saved))
        return f"continue from there in a new run: name=NEW begin={state}"

    def _validate(self) -> None:
        """Validate, write the model folders, which may say what was measured, and log the results."""
        values, picture = self.task.validate()
        if self.rank == 0:
            for folder, write in self.task.exports().items():
                checkpoint.publish(write, Path(self.setup.folder, folder))
        self.numbers |= values
        self.validated = validation_text(values, self.task.validated)
        if self.tracker is not None:
            self.tracker.metrics({f"val/{key}": value for key, value in values.items()}, self.images)
            if picture is not None:
                self.tracker.image("val/picture", picture, self.images)
        self._leave_out()

    def _save(self) -> None:
        """Write a checkpoint. `_log` has just checked the metrics, so a checkpoint never holds a broken run."""
        about = {"images": self.images, "digest": self.task.digest, "config": values_to_keep(self.config)}
        about["order"] = self.task.order
        state = checkpoint.save(self.task.state() | about) if self.rank == 0 else None
        _report({"images": self.images} | self.numbers, state, Path(self.setup.folder))
        self.saved = self.images
        self._leave_out()

    def _leave_out(self) -> None:
        """Leave out of all rates the time since the last step, which a validation or a checkpoint took."""
        self.throughput.restart(self.images)
        if self.progress is not None:
            self.progress.leave_out()

    def _publish(self, written: bool) -> None:
        """Give the final model folders to the tracked run in MLflow.

        Args:
            written: whether the last validation wrote them. If not, nothing was left to train or to validate, and
                they are written here.
        """
        if self.tracker is None:
            return
        for exported, write in self.task.exports().items():
            folder = Path(self.setup.folder, exported)
            if not written:
                checkpoint.publish(write, folder)
            self.tracker.artifacts(folder, exported)


def _resume(task: TrainingTask, name: str, setup: TrainSetup, rank: int) -> int:
    """Load a checkpoint into `task`: the run's latest one, or else the one that `setup.begin` names.

    Returns:
        The number of images seen at that checkpoint; 0 where there is none.

    Raises:
        UserError: if the checkpoint is damaged, or belongs to other data or another model.
    """
    import ray.train

    found, begin = ray.train.get_checkpoint(), setup.begin
    own = "" if found else checkpoint.newest(setup.folder)  # there may be one although Ray's list of them was lost
    if not (found or own or begin):
        return 0
    if not (found or own):
        state = checkpoint.load(begin)
        try:
            task.load(state)
        except (RuntimeError, ValueError, KeyError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else textwrap.shorten(str(error), 200)
            raise UserError(
                f"begin={begin} is a checkpoint of another model, or of other networks trained with it: {reason}"
            ) from None
    else:
        with found.as_directory() if found else nullcontext(own) as path:
            state = checkpoint.load(path)
        if state["digest"] != task.digest:
            raise UserError(
                f"the data are not those that run {setup.folder} was trained on: something was added, removed or "
                f"changed. Start a new run (name=...), or restore the data"
            )
        task.load(state)
        task.order = state.get("order", 1)
    if rank == 0:
        say(f"{name}: continues after {state['images']:,} images", images=state["images"])
    return state["images"]


def _report(metrics: dict[str, Any], folder: str | None, run: Path) -> None:
    """Hand a checkpoint folder to Ray Train. All ranks must call this together.

    Args:
        metrics: the metrics to keep with the checkpoint; "images" gives it its name.
        folder: rank 0's checkpoint folder, which is removed afterwards; None on the other ranks.
        run: the run's folder.

    Raises:
        UserError: if the checkpoint cannot be written into the run's folder.
    """
    import ray.train

    found = ray.train.Checkpoint.from_directory(folder) if folder else None
    name = checkpoint_name(metrics["images"])
    try:
        ray.train.report(metrics, checkpoint=found, checkpoint_dir_name=name)
    except OSError as error:
        raise storage.unwritable(str(run / name), error) from error
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def checkpoint_name(images: int) -> str:
    """Return the name of the checkpoint folder after a number of images."""
    return f"checkpoint-{images:012d}"


def due(before: int, after: int, every: int) -> bool:
    """Return whether a multiple of `every` lies in (before, after]. With `every` = 0 the result is False."""
    return every > 0 and before // every != after // every
