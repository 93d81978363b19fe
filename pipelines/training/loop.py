"""The loop that trains a task in a worker: steps, metrics, validation, checkpoints and the final model.

Everything random in training comes from (seed, position in the data, rank): crops, posterior draws, timesteps. So the
number of images seen is all the state that a resumed run needs besides weights and optimizers, and it goes on bit for
bit.
"""

import os
import shutil
import textwrap
import time
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
from pipelines.runtime import mlflow_run, prometheus, shutdown
from pipelines.runtime.logs import say
from pipelines.runtime.progress import Progress
from pipelines.runtime.schema import values_to_keep
from pipelines.training import checkpoint, ranks
from pipelines.training.config import TrainLDM, TrainVAE
from pipelines.training.step_metrics import Throughput, Totals
from pipelines.training.worker_setup import TrainSetup

LOOK_EVERY = 0.5  # seconds between looks for a request to stop


class Task(Protocol):
    """What is trained. Every rank has one; `run` drives it."""

    digest: str  # of the data: a checkpoint goes on with the same only
    stages: list[tuple[int, int]]  # (images, batch size over all ranks)

    def begin(self, stage: int) -> None:
        """Get a stage's data ready."""

    def batches(self, start: int, end: int, batch_size: int) -> Iterator[Any]:
        """This rank's part of every batch from position `start` on, up to `end`."""

    def step(self, batch: Any, images: int) -> dict[str, Tensor]:
        """One update after `images`; its metrics, `loss` among them."""

    def count(self) -> dict[str, Tensor]:
        """Further metrics, as they stand when metrics are logged."""

    def check(self, means: dict[str, float]) -> None:
        """Raise a UserError where logged metrics, the same on all ranks, show that it can't go on."""

    def skipped(self) -> int:
        """The longest run of steps since the last call that were skipped, as their gradients were not finite."""

    def validate(self) -> tuple[dict[str, float], np.ndarray | None]:
        """Metrics, the same on all ranks, and a picture (rank 0's is kept)."""

    def state(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any]) -> None: ...

    def exports(self) -> dict[str, Callable[[Path], None]]:
        """What the run is for: names of folders, and what writes each, `model` among them."""


def run(task: Task, name: str, config: TrainVAE | TrainLDM, setup: TrainSetup, rank: int, world: int) -> dict[str, Any]:
    """Train `task` from the latest checkpoint on: steps, metrics, validation, checkpoints, the final model.

    Args:
        name: of the run, for people.

    Returns:
        `images` seen, whether the run was `stopped` before its end, the median `images_per_second`, and the last
        metrics.

    Raises:
        UserError: the checkpoint is of other data or another model; too many steps in a row were skipped; or what the
            task raises.
    """
    return _Run(task, name, config, setup, rank, world).run()


class _Run:
    """One rank's part of a training run, from the latest checkpoint on."""

    def __init__(self, task: Task, name: str, config: TrainVAE | TrainLDM, setup: TrainSetup, rank: int, world: int):
        self.task, self.name, self.config, self.setup, self.rank = task, name, config, setup, rank
        self.total = sum(images for images, _ in task.stages)
        self.images = self.begun = self.saved = _resume(task, name, setup, rank)
        self.totals, self.throughput = Totals(), Throughput(self.images)
        self.numbers: dict[str, float] = {}  # the loss and the last validation's metrics: what people are shown
        self.watch, self.stop = Watch(setup.folder, rank, world), False
        self.notice: Any = None  # of nodes that are to be taken away, when it was last looked
        self.tracker: mlflow_run.Tracker | None = None  # these three are rank 0's
        self.progress: Progress | None = None
        self.exported: prometheus.Training | None = None
        if rank == 0:
            self.tracker = mlflow_run.Tracker(setup.handle)
            self.tracker.dataset(os.path.basename(setup.data), task.digest, setup.data)
            self.progress = Progress(name, self.total, self.images, setup.live)
            self.exported = prometheus.Training(config.name)

    def run(self) -> dict[str, Any]:
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
        """The steps of a stage, which is positions `begin` to `end` of the run."""
        loop = self.config.loop
        self.throughput.restart(self.images)
        # A stage's last batch is whole, so the next stage may begin some images late.
        batches = iter(self.task.batches(max(self.images, begin), end, batch_size))
        while not self.stop:
            with self.throughput.waiting():
                batch = next(batches, None)
            if batch is None:
                break
            before, self.images = self.images, self.images + batch_size
            torch.manual_seed(seed_for(self.config.seed, before, self.rank))
            self.totals.add(self.task.step(batch, before))
            self.stop = self.watch.asked()
            log = due(before, self.images, loop.log_every * batch_size)
            save = due(before, self.images, loop.checkpoint_every) or self.images >= end or self.stop
            if log and self._heard_notice():
                save = True
            if log or save:
                self._log(batch_size)
            if self.progress is not None:
                self.progress.update(min(self.images, self.total), **self.numbers)
            if due(before, self.images, loop.val_every) or self.images >= self.total:
                self._validate()
            if save:
                self._save()

    def _heard_notice(self) -> bool:
        """Whether a node of this run is to be taken away, of which nothing was known before."""
        found = _preempted(self.setup)
        if found == self.notice:
            return False
        self.notice = found
        if found is not None and self.progress is not None:
            say(f"{self.name}: a node is to be taken away; checkpoint after {self.images:,} images", "WARNING")
        return found is not None

    def _log(self, batch_size: int) -> None:
        """Metrics since the last time: their means over steps and ranks, checked, then shown everywhere."""
        means = ranks.mean_over_ranks(self.totals.means() | self.task.count())
        done, speed = self.throughput.read(self.images)
        self.task.check(means)
        if (skipped := self.task.skipped()) >= self.config.loop.max_skipped:
            raise UserError(
                f"{skipped} steps in a row, up to {self.images:,} images, had NaN or infinite gradients and "
                f"were skipped; the checkpoint at {self.saved:,} is kept. Lower optim.lr, or set optim.clip=1 "
                f"or loop.precision=fp32, and run again: it goes on from there"
            )
        if self.tracker is not None:
            values = {key: value for key, value in means.items() if np.isfinite(value)} | speed
            self.tracker.metrics({f"train/{key}": value for key, value in values.items()}, self.images)
        if self.exported is not None:
            self.exported.show(done, done // batch_size, means | speed)
        self.numbers["loss"] = means["loss"]
        self.throughput.restart(self.images)

    def _validate(self) -> None:
        """Write the model folders, then validate."""
        if self.rank == 0:
            for folder, write in self.task.exports().items():
                checkpoint.publish(write, Path(self.setup.folder, folder))
        values, picture = self.task.validate()
        self.numbers |= values
        if self.tracker is not None:
            self.tracker.metrics({f"val/{key}": value for key, value in values.items()}, self.images)
            if picture is not None:
                self.tracker.image("val/picture", picture, self.images)
        self.throughput.restart(self.images)

    def _save(self) -> None:
        """Write a checkpoint, of what `_log` has just checked: a checkpoint never holds a broken run."""
        about = {"images": self.images, "digest": self.task.digest, "config": values_to_keep(self.config)}
        state = checkpoint.save(self.task.state() | about) if self.rank == 0 else None
        _report({"images": self.images} | self.numbers, state, Path(self.setup.folder))
        self.saved = self.images
        self.throughput.restart(self.images)

    def _publish(self, written: bool) -> None:
        """Give the tracked run the final model folders.

        Args:
            written: whether the last validation wrote them; else nothing was left to train, and so to validate.
        """
        if self.tracker is None:
            return
        for exported, write in self.task.exports().items():
            folder = Path(self.setup.folder, exported)
            if not written:
                checkpoint.publish(write, folder)
            self.tracker.artifacts(folder, exported)


def _resume(task: Task, name: str, setup: TrainSetup, rank: int) -> int:
    """Images seen at the run's latest checkpoint, else at the one that it begins with, which `task` has then; or 0."""
    import ray.train

    found, begin = ray.train.get_checkpoint(), setup.begin
    own = "" if found else checkpoint.newest(setup.folder)  # Ray's list of them was lost
    if not (found or own or begin):
        return 0
    if not (found or own):
        state = checkpoint.load(begin)
        try:
            task.load(state)
        except (RuntimeError, ValueError, KeyError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else textwrap.shorten(str(error), 200)
            raise UserError(
                f"begin={begin} is a checkpoint of another model or of other networks beside it: {reason}"
            ) from None
    else:
        with found.as_directory() if found else nullcontext(own) as path:
            state = checkpoint.load(path)
        if state["digest"] != task.digest:
            raise UserError(
                f"the data are not those that run {setup.folder} was trained on: something was added, removed or "
                f"changed. Start a new run (name=...), or bring the data back"
            )
        task.load(state)
    if rank == 0:
        say(f"{name}: goes on after {state['images']:,} images", images=state["images"])
    return state["images"]


def _preempted(setup: TrainSetup) -> Any:
    """What Ray was told of nodes of this run that are to be taken away (a spot notice, `ray drain-node`): the same on
    all ranks, which ask together; None where it was told nothing."""
    import ray.train

    return ray.train.get_preemption_info() if setup.nodes > 1 else None


def _report(metrics: dict[str, Any], folder: str | None, run: Path) -> None:
    """Hand a checkpoint folder (rank 0's; None elsewhere) to Ray Train; all ranks call this together.

    Raises:
        UserError: it can't be written into the run's folder.
    """
    import ray.train

    found = ray.train.Checkpoint.from_directory(folder) if folder else None
    name = f"checkpoint-{metrics['images']:012d}"
    try:
        ray.train.report(metrics, checkpoint=found, checkpoint_dir_name=name)
    except OSError as error:
        raise storage.unwritable(str(run / name), error) from error
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


# --- the loop ---------------------------------------------------------------------------------------------------


def due(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]; never where it is 0."""
    return every > 0 and before // every != after // every


class Watch:
    """In a training worker: whether the run was asked to stop. All ranks, which ask once a step, hear of it at the same
    one: rank 0 looks, and tells the others beside the step's own work, on CPUs."""

    def __init__(self, folder: str, rank: int, world: int):
        self._file, self._rank = Path(folder, shutdown.FILE), rank
        self._looked, self._seen = 0.0, False
        self._group: Any = torch.distributed.new_group(backend="gloo") if world > 1 else None
        self._told = torch.zeros(1)
        self._telling: Any = None

    def asked(self) -> bool:
        if self._group is None:
            return self._look()
        told = False
        if self._telling is not None:
            self._telling.wait()
            told = bool(self._told)
        if self._rank == 0:
            self._told.fill_(self._look())
        self._telling = torch.distributed.broadcast(self._told, src=0, group=self._group, async_op=True)
        return told

    def _look(self) -> bool:
        if not self._seen and time.monotonic() - self._looked >= LOOK_EVERY:
            self._looked, self._seen = time.monotonic(), os.path.exists(self._file)
        return self._seen
