"""The start of a training: `fit` runs Ray Train on the driver, and `work` runs the task's loop in each worker."""

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from litevae import storage
from litevae.errors import UserError
from pipelines.runtime import mlflow_run, mlflow_server, paths, shutdown
from pipelines.runtime.cluster import Placement
from pipelines.runtime.logs import say
from pipelines.runtime.schema import Ray
from pipelines.training.config import Loop, TrainLDM, TrainVAE
from pipelines.training.loop import TrainingTask, run
from pipelines.training.run_files import ERROR, TRAINED, found_of
from pipelines.training.worker_setup import TrainSetup

RESIZE_EVERY = 30.0  # seconds between checks for new nodes that an elastic run could use


def fit(
    worker: Callable[[dict[str, Any]], dict[str, Any]],
    setup: TrainSetup,
    placement: Placement,
    loop: Loop,
    callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Run `worker` on every rank under Ray Train.

    Ray Train restarts dead workers up to `loop.max_restarts` times. If the driver died, the run resumes when the same
    command is started again.

    Args:
        worker: the function that each rank runs; its argument is {"setup": setup}.
        setup: what the workers get; `threads`, `live`, `gpu` and `nodes` are filled in here.
        placement: number and resources of the workers.
        loop: restarts, and checkpoints to keep.
        callbacks: callbacks of Ray Train, which are told of every checkpoint and of the metrics at it.

    Returns:
        What rank 0's worker returned, without "stopped", and with "model" (the model folder) and "tracking" (the link
        to the MLflow run).

    Raises:
        UserError: if a worker returned {"error": message}, or training failed more often than `loop.max_restarts`.
            Workers return an error that the user must fix, because Ray Train would try again if they raised it.
        Stopped: if the run was asked to stop, and stopped after writing a checkpoint.
    """
    import ray.train
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig, TorchTrainer

    class WithoutProcessGroup(TorchConfig):
        """Config for a single worker: it sets up no process group, whose rendezvous would listen on every address."""

        backend_cls = Backend

    folder, handle = setup.folder, setup.handle
    root, name = os.path.split(folder)
    say(f"run: {folder}\nMLflow: {mlflow_run.link(handle)}", folder=folder, run=mlflow_run.link(handle))
    count = f"{placement.workers} workers" if placement.workers > 1 else "a worker"
    say(f"starting {count}, about 20 s")
    told = Path(folder) / ERROR
    told.unlink(missing_ok=True)
    shutdown.clear_stop_request(folder)  # a request to stop that an earlier run did not see before it ended
    trainer = TorchTrainer(
        worker,
        train_loop_config={
            "setup": replace(
                setup,
                threads=placement.threads,
                live=sys.stderr.isatty(),
                gpu=placement.gpu,
                nodes=len(ray.nodes()),
            )
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=placement.elastic or placement.workers,
            elastic_resize_monitor_interval_s=RESIZE_EVERY,
            use_gpu=placement.gpu,
            resources_per_worker=placement.resources,
            label_selector=placement.labels or None,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=root,
            failure_config=ray.train.FailureConfig(max_failures=loop.max_restarts),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=loop.keep),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            callbacks=list(callbacks),
        ),
        torch_config=WithoutProcessGroup()
        if (placement.elastic or placement.workers) == 1
        else TorchConfig(timeout_s=600),
    )
    status: mlflow_server.Status = "FAILED"
    try:
        result = shutdown.call_stoppable(trainer.fit, folder).return_value
        if "error" in result:
            raise UserError(result["error"])
        if result.pop("stopped"):
            raise shutdown.Stopped(
                shutdown.clear_stop_request(folder),
                f"stopped after {result['images']:,} images; the checkpoint is in {folder}, and the same command "
                f"continues from it",
            )
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except ray.train.TrainingFailedError as error:
        failures = getattr(error, "worker_failures", {})
        where = f" on rank {next(iter(failures))}" if failures else ""
        cause = str(next(iter(failures.values()), error)).strip().splitlines() or [repr(error)]
        kept = f"the last checkpoint in {folder} is kept, and the same command continues from it"
        if not found_of(folder, TRAINED):
            kept = "there is no checkpoint yet, so the same command begins anew, as one with another config would"
        raise UserError(f"training failed{where}: {cause[-1]}; {kept}") from error
    finally:
        shutdown.clear_stop_request(folder)
        told.unlink(missing_ok=True)
        mlflow_run.finish(handle, status)
    return result | {"model": os.path.join(folder, "model"), "tracking": mlflow_run.link(handle)}


def work(
    task: Callable[..., TrainingTask], config: TrainVAE | TrainLDM, name: str, setup: TrainSetup
) -> dict[str, Any]:
    """Make the task and run it, in a training worker.

    Args:
        task: makes the task from (config, setup, rank, world size, device).
        config: the run's config.
        name: the run's name in messages.
        setup: what the driver gave to the worker.

    Returns:
        The result of `loop.run`, or {"error": message} for an error that the user must fix.

    Raises:
        RuntimeError: if one of several workers has such an error; Ray Train then restarts all, and they return it.
    """
    import ray.train.torch

    logging.disable(logging.INFO)  # Ray Train would log every checkpoint
    # Pillow warns of unusual metadata. Images that cannot be read are reported by this project itself.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(setup.threads)
    told = Path(setup.folder) / ERROR
    if told.exists():
        return {"error": told.read_text()}
    try:
        return run(task(config, setup, rank, world, device), name, config, setup, rank, world)
    except UserError as error:
        if world == 1:
            return {"error": str(error)}
        # The other ranks may be waiting for this one. So all are ended and started once more; then each finds the
        # file, and returns the error.
        storage.put(str(told), str(error).encode())
        raise RuntimeError(str(error)) from None


def check_batch(name: str, batch_size: int, units: int, ray: Ray, accumulate: int) -> None:
    """Check that a batch size fits the workers, the micro-batches and the data.

    Args:
        name: the batch size's field, for messages.
        batch_size: images per step over all workers.
        units: images in the data.
        ray: the number of workers; for an elastic run every number that it allows is checked.
        accumulate: micro-batches per step.

    Raises:
        UserError: if the batch size is not a multiple of workers x micro-batches, or is larger than the data.
    """
    for workers in range(ray.min_workers or ray.workers, ray.workers + 1):
        if batch_size % (workers * accumulate):
            elastic = f" (any of ray.min_workers={ray.min_workers} to {ray.workers})" if ray.min_workers else ""
            raise UserError(
                f"{name}={batch_size} does not divide by ray.workers={workers}{elastic} x optim.accumulate={accumulate}"
            )
    if batch_size > units:
        raise UserError(f"{name}={batch_size} is larger than the data: {units} images; lower it or add images")


class CheckpointSize(NamedTuple):
    """The estimated size in bytes of what a training writes.

    Attributes:
        state: a checkpoint.
        exported: all model folders together.
    """

    state: int
    exported: int


def check_room(folder: str, size: CheckpointSize, loop: Loop) -> None:
    """Check that there is room for the checkpoints and the models of a run.

    A checkpoint is first written to the temporary folder. `loop.keep` of them and the newest are in the run's folder at
    the same time, and so are the old and the new model.

    Args:
        folder: the run's folder; what it holds already needs no more room.
        size: the estimated sizes.
        loop: how many checkpoints are kept.

    Raises:
        UserError: if there is less room.
    """
    there = len(found_of(folder, TRAINED[:1]))
    count = max(1, loop.keep + 1 - there)
    needed = count * size.state + 2 * size.exported
    about = f"{count} checkpoint{'s' if count > 1 else ''} (loop.keep={loop.keep}, and the newest) with the model"
    paths.check_free("root", folder, needed, about)
    if not paths.in_ray_job() and "RAY_ADDRESS" not in os.environ:  # else workers have other temporary folders
        paths.check_free("TMPDIR", tempfile.gettempdir(), size.state, "a checkpoint, which is first written there")
