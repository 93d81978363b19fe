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
from pipelines.training import checkpoint
from pipelines.training.config import TrainLDM, TrainVAE
from pipelines.training.step_metrics import Totals, mean_over_ranks

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


def run(
    task: Task, name: str, config: TrainVAE | TrainLDM, setup: dict[str, Any], rank: int, world: int
) -> dict[str, Any]:
    """Train `task` from the latest checkpoint on: steps, metrics, validation, checkpoints, the final model.

    Returns the last metrics.
    """
    loop, total, folder = config.loop, sum(images for images, _ in task.stages), Path(setup["folder"])
    images = begun = _resume(task, name, setup, rank)
    tracker = mlflow_run.Tracker(setup["handle"]) if rank == 0 else None
    if tracker is not None:
        tracker.dataset(os.path.basename(setup["data"]), task.digest, setup["data"])
    progress = Progress(name, total, images, setup["live"]) if rank == 0 else None
    totals, rates, numbers, saved, end = Totals(), [0.0], dict[str, float](), images, 0
    watch, stop, notice = Watch(setup["folder"], rank, world), False, None
    shown = prometheus.Training(config.name) if rank == 0 else None
    try:
        for number, (length, batch_size) in enumerate(task.stages):
            begin, end = end, end + length
            if images >= end or stop:
                continue
            task.begin(number)
            clock, since, waited = time.monotonic(), images, 0.0
            # A stage's last batch is whole, so the next stage may begin some images late.
            batches = iter(task.batches(max(images, begin), end, batch_size))
            while not stop:
                asked = time.monotonic()
                if (batch := next(batches, None)) is None:
                    break
                waited += time.monotonic() - asked
                before, images = images, images + batch_size
                torch.manual_seed(seed_for(config.seed, before, rank))
                totals.add(task.step(batch, before))
                stop = watch.asked()
                save = due(before, images, loop.checkpoint_every) or images >= end or stop
                if due(before, images, loop.log_every * batch_size) and (found := _preempted(setup)) != notice:
                    notice, save = found, save or found is not None
                    if found is not None and progress is not None:
                        say(f"{name}: a node is to be taken away; checkpoint after {images:,} images", "WARNING")
                if save or due(before, images, loop.log_every * batch_size):
                    means = mean_over_ranks(totals.means() | task.count())
                    seconds = max(1e-9, time.monotonic() - clock)
                    rates.append((images - since) / seconds)
                    task.check(means)
                    if (skipped := task.skipped()) >= loop.max_skipped:
                        raise UserError(
                            f"{skipped} steps in a row, up to {images:,} images, had NaN or infinite gradients and "
                            f"were skipped; the checkpoint at {saved:,} is kept. Lower optim.lr, or set optim.clip=1 "
                            f"or loop.precision=fp32, and run again: it goes on from there"
                        )
                    speed = {"images_per_second": rates[-1], "waiting_for_data": waited / seconds}
                    if tracker is not None:
                        values = {f"train/{key}": value for key, value in means.items() if np.isfinite(value)}
                        tracker.metrics(values | {f"train/{key}": value for key, value in speed.items()}, images)
                    if shown is not None:
                        shown.show(images - since, (images - since) // batch_size, means | speed)
                    numbers["loss"] = means["loss"]
                    clock, since, waited = time.monotonic(), images, 0.0
                if progress is not None:
                    progress.update(min(images, total), **numbers)
                if due(before, images, loop.val_every) or images >= total:
                    if rank == 0:
                        for exported, write in task.exports().items():
                            checkpoint.publish(write, folder / exported)
                    values, picture = task.validate()
                    numbers |= values
                    if tracker is not None:
                        tracker.metrics({f"val/{key}": value for key, value in values.items()}, images)
                        if picture is not None:
                            tracker.image("val/picture", picture, images)
                    clock, since, waited = time.monotonic(), images, 0.0
                if save:  # what was just checked: a checkpoint never holds a broken run
                    extra = {"images": images, "digest": task.digest, "config": values_to_keep(config)}
                    state = checkpoint.save(task.state() | extra) if rank == 0 else None
                    _report({"images": images} | numbers, state, folder)
                    saved, clock, since, waited = images, time.monotonic(), images, 0.0
        stop = stop and images < total
        if tracker is not None and not stop:
            for exported, write in task.exports().items():
                if images == begun:  # nothing was left to train, and so nothing to validate
                    checkpoint.publish(write, folder / exported)
                tracker.artifacts(folder / exported, exported)
    finally:
        if progress is not None:
            progress.close()
        if tracker is not None:
            tracker.close()
    return {"images": images, "stopped": stop, "images_per_second": float(np.median(rates[1:] or rates)), **numbers}


def _resume(task: Task, name: str, setup: dict[str, Any], rank: int) -> int:
    """Images seen at the run's latest checkpoint, else at the one that it begins with, which `task` has then; or 0."""
    import ray.train

    found, begin = ray.train.get_checkpoint(), setup.get("begin", "")
    own = "" if found else checkpoint.newest(setup["folder"])  # Ray's list of them was lost
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
                f"the data are not those that run {setup['folder']} was trained on: something was added, removed or "
                f"changed. Start a new run (name=...), or bring the data back"
            )
        task.load(state)
    if rank == 0:
        say(f"{name}: goes on after {state['images']:,} images", images=state["images"])
    return state["images"]


def _preempted(setup: dict[str, Any]) -> Any:
    """What Ray was told of nodes of this run that are to be taken away (a spot notice, `ray drain-node`): the same on
    all ranks, which ask together; None where it was told nothing."""
    import ray.train

    return ray.train.get_preemption_info() if setup["nodes"] > 1 else None


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
