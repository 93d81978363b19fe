"""What the trainers share: Ray Train's run, the stream of batches, the loop's clock, progress.

Everything random in training comes from (seed, position in the data, rank): crops, posterior draws, timesteps. So the
number of images seen is all the state that a resumed run needs besides weights and optimizers, and it goes on bit for
bit.
"""

import inspect
import logging
import os
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from litevae import storage
from litevae.errors import UserError
from pipelines.config import Loop, Optimizer, Ray, TrainLDM, TrainVAE, values_to_keep
from pipelines.runtime import mlflow_run, prometheus, shutdown, tables
from pipelines.runtime.cluster import Share
from pipelines.runtime.logs import say
from pipelines.training import checkpoint

ERROR = "error.txt"  # in the run's folder: what one of several workers has to tell
LOOK_EVERY = 0.5  # seconds between looks for a request to stop
RESIZE_EVERY = 30.0  # seconds between looks for nodes that an elastic run could use
RECOMPILE_LIMIT = 64  # shapes and uses that a network is compiled for


def fit(
    worker: Callable[[dict[str, Any]], dict[str, Any]],
    setup: dict[str, Any],
    handle: mlflow_run.RunHandle,
    share: Share,
    loop: Loop,
    callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Run `worker` on every rank under Ray Train and return rank 0's result, model folder and link.

    A worker's death is survived `loop.max_restarts` times; a dead driver's run goes on when started again. What workers
    get is `setup` (its `folder` is the run's, and takes the checkpoints; its `data` is where the images or latents are)
    and what `work` needs besides.

    Args:
        callbacks: of Ray Train; they hear of every checkpoint and the metrics at it.

    Raises:
        UserError: one that a worker returned as {"error": message}, since Ray Train tries again after what is raised.
        Stopped: the run was asked to leave, and did, with a checkpoint.
    """
    import ray.train
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig, TorchTrainer

    class Alone(TorchConfig):
        """Without a process group, whose rendezvous listens on every address."""

        backend_cls = Backend

    folder = setup["folder"]
    root, name = os.path.split(folder)
    say(f"run: {folder}\nMLflow: {mlflow_run.link(handle)}", folder=folder, run=mlflow_run.link(handle))
    told = Path(folder) / ERROR
    told.unlink(missing_ok=True)
    shutdown.withdraw(folder)  # of a run that ended before it heard of it
    trainer = TorchTrainer(
        worker,
        train_loop_config=setup
        | {"handle": handle, "threads": share.threads, "live": sys.stderr.isatty(), "nodes": len(ray.nodes())},
        scaling_config=ray.train.ScalingConfig(
            num_workers=share.elastic or share.workers,
            elastic_resize_monitor_interval_s=RESIZE_EVERY,
            use_gpu=share.gpu,
            resources_per_worker=share.resources,
            label_selector=share.labels or None,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=root,
            failure_config=ray.train.FailureConfig(max_failures=loop.max_restarts),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=loop.keep),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            callbacks=list(callbacks),
        ),
        torch_config=Alone() if (share.elastic or share.workers) == 1 else TorchConfig(timeout_s=600),
    )
    status: mlflow_run.Status = "FAILED"
    try:
        result = shutdown.patiently(trainer.fit, folder).return_value
        if "error" in result:
            raise UserError(result["error"])
        if result.pop("stopped"):
            raise shutdown.Stopped(
                shutdown.withdraw(folder),
                f"stopped after {result['images']:,} images; the checkpoint is in {folder}, and the same command goes "
                f"on from it",
            )
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except ray.train.TrainingFailedError as error:
        failures = getattr(error, "worker_failures", {})
        where = f" on rank {next(iter(failures))}" if failures else ""
        cause = str(next(iter(failures.values()), error)).strip().splitlines() or [repr(error)]
        raise UserError(
            f"training failed{where}: {cause[-1]}; the last checkpoint in {folder} is kept, and the same command "
            f"goes on from it"
        ) from error
    finally:
        shutdown.withdraw(folder)
        told.unlink(missing_ok=True)
        mlflow_run.finish(handle, status)
    return result | {"model": os.path.join(folder, "model"), "tracking": mlflow_run.link(handle)}


def work(task: Callable[..., "Task"], config: TrainVAE | TrainLDM, name: str, setup: dict[str, Any]) -> dict[str, Any]:
    """In a training worker: make the task (of config, setup, rank, world size, device) and run it."""
    import ray.train.torch

    logging.disable(logging.INFO)  # Ray Train announces every checkpoint
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata; what can't be read is named by us
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(setup["threads"])
    told = Path(setup["folder"]) / ERROR
    if told.exists():
        return {"error": told.read_text()}
    try:
        return run(task(config, setup, rank, world, device), name, config, setup, rank, world)
    except UserError as error:
        if world == 1:
            return {"error": str(error)}
        # The other ranks may wait for this one: so all are ended, and started once more to hear of it.
        tables.write(told, str(error).encode())
        raise RuntimeError(str(error)) from None


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


# --- randomness and data --------------------------------------------------------------------------------------


def seed_for(*key: int) -> int:
    """A seed from (seed of the run, position, rank ...), without correlation between neighbours."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def batch_positions(start: int, end: int, batch_size: int) -> Iterator[range]:
    """Global batches from position `start` on; the last one is whole too, so that every step has the same size."""
    return (range(position, position + batch_size) for position in range(start, end, batch_size))


def check_batch(name: str, batch_size: int, units: int, ray: Ray, accumulate: int) -> None:
    """
    Raises:
        UserError: the batch does not divide over workers, whatever their number may become, and micro-batches, or is
            larger than the data.
    """
    for workers in range(ray.min_workers or ray.workers, ray.workers + 1):
        if batch_size % (workers * accumulate):
            elastic = f" (any of ray.min_workers={ray.min_workers} to {ray.workers})" if ray.min_workers else ""
            raise UserError(
                f"{name}={batch_size} does not divide by ray.workers={workers}{elastic} x optim.accumulate={accumulate}"
            )
    if batch_size > units:
        raise UserError(f"{name}={batch_size} is larger than the data: {units} images; lower it or add images")


# --- the loop ---------------------------------------------------------------------------------------------------


def due(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]; never where it is 0."""
    return every > 0 and before // every != after // every


def learning_rate_factor(config: Optimizer, images: int, total: int) -> float:
    """Of the base rate at a step that begins after `images`: linear warm-up, then constant or a cosine to 0."""
    if images < config.warmup:
        return (images + 1) / (config.warmup + 1)
    if config.schedule == "constant":
        return 1.0
    progress = (images - config.warmup) / max(1, total - config.warmup)
    return 0.5 + 0.5 * float(np.cos(np.pi * min(1.0, progress)))


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


class Adam:
    """AdamW that leaves the weights, and its own state, as they are where a gradient is NaN or infinite.

    Nothing waits for the device to tell: the optimizer's kernel reads the verdict there, as it does from a GradScaler.
    Gradients are the same on all ranks, and so is the verdict.
    """

    def __init__(self, model: nn.Module, config: Optimizer, lr: float | None = None):
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._clip = config.clip
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=lr or config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        device = self._parameters[0].device
        self._streak, self._longest = torch.zeros(2, device=device).unbind()

    def step(self, lr: float) -> dict[str, Tensor]:
        """One update at this rate. Returns the norm of the gradient before clipping, and whether it was skipped."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        if self._clip:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._clip, norm, foreach=True)
        bad = (~norm.isfinite()).float()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.found_inf = bad  # type: ignore[attr-defined]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._streak = (self._streak + bad) * bad
        self._longest = torch.maximum(self._longest, self._streak)
        return {"gradient_norm": norm, "skipped_steps": bad}

    def skipped(self) -> int:
        """The longest run of skipped steps since the last call, and up to it."""
        longest, self._longest = int(self._longest), self._streak
        return longest

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moments only: rate, betas and decay stay this optimizer's, which may go on from another run's."""
        groups = zip(state["param_groups"], self._optimizer.param_groups, strict=True)
        state = state | {"param_groups": [own | {"params": theirs["params"]} for theirs, own in groups]}
        self._optimizer.load_state_dict(state)
        for parameter, moments in self._optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):  # the fused kernel takes them to lie in memory as the weights do
                moments[name] = torch.empty_like(parameter).copy_(moments[name])


def memory_format(device: torch.device, compiled: bool) -> torch.memory_format:
    """Of images, features and convolutions' weights: channels last for compiled networks on a GPU. Elsewhere group
    normalisation turns them round (GPUs), or gradients of convolutions take up to twice as long (CPUs with AVX2)."""
    return torch.channels_last if device.type == "cuda" and compiled else torch.contiguous_format


def compile_parts(*parts: nn.Module | None) -> None:
    """torch.compile these modules in place, names of their weights and all.

    Each is compiled once for every shape (stages have a few, and all their batches the same) and use (a discriminator
    with and without gradients of its weights). Kernels for any size would be slower.
    """
    limits: dict[str, Any] = {"isolate_recompiles": True, "recompile_limit": RECOMPILE_LIMIT}
    if not limits.keys() <= inspect.signature(torch.compile).parameters.keys():  # before PyTorch 2.14: one for all
        limits, torch._dynamo.config.recompile_limit = {}, RECOMPILE_LIMIT
    for part in parts:
        if part is not None:
            part.compile(dynamic=False, **limits)


def uncompiled() -> AbstractContextManager:
    """Context in which compiled modules run as they are, for what is seldom done or in other shapes."""
    return torch.compiler.set_stance("force_eager")


def synced(net: Any, last: bool) -> AbstractContextManager:
    """Around a micro-batch's forward and backward: gradients cross the network with the last one only."""
    return nullcontext() if last or not hasattr(net, "no_sync") else net.no_sync()


def mean_over_ranks(tensors: dict[str, Tensor]) -> dict[str, float]:
    """The mean of each number over all ranks that have it; every rank calls this with the same keys."""
    values = {key: float(value) for key, value in tensors.items()}
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return values
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, values)
    found = {key: [one[key] for one in gathered if np.isfinite(one[key])] for key in values}
    return {key: sum(numbers) / len(numbers) if numbers else float("nan") for key, numbers in found.items()}


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
