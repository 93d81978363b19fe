"""How a training starts: on the driver Ray Train's run, in each worker the task and the loop that drives it."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from litevae import storage
from litevae.errors import UserError
from pipelines.runtime import mlflow_run, mlflow_server, shutdown
from pipelines.runtime.cluster import Placement
from pipelines.runtime.logs import say
from pipelines.runtime.schema import Ray
from pipelines.training.config import Loop, TrainLDM, TrainVAE
from pipelines.training.loop import Task, run
from pipelines.training.worker_setup import TrainSetup

ERROR = "error.txt"  # in the run's folder: what one of several workers has to tell
RESIZE_EVERY = 30.0  # seconds between looks for nodes that an elastic run could use


def fit(
    worker: Callable[[dict[str, Any]], dict[str, Any]],
    setup: TrainSetup,
    placement: Placement,
    loop: Loop,
    callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Run `worker` on every rank under Ray Train and return rank 0's result, model folder and link.

    A worker's death is survived `loop.max_restarts` times; a dead driver's run goes on when started again.

    Args:
        worker: what each rank runs; its argument is {"setup": setup}.
        setup: what workers get; threads, terminal and nodes are filled in here.
        callbacks: of Ray Train; they hear of every checkpoint and the metrics at it.

    Raises:
        UserError: one that a worker returned as {"error": message}, since Ray Train tries again after what is raised.
        Stopped: the run was asked to leave, and did, with a checkpoint.
    """
    import ray.train
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig, TorchTrainer

    class WithoutProcessGroup(TorchConfig):
        """Without a process group, whose rendezvous listens on every address."""

        backend_cls = Backend

    folder, handle = setup.folder, setup.handle
    root, name = os.path.split(folder)
    say(f"run: {folder}\nMLflow: {mlflow_run.link(handle)}", folder=folder, run=mlflow_run.link(handle))
    told = Path(folder) / ERROR
    told.unlink(missing_ok=True)
    shutdown.withdraw(folder)  # of a run that ended before it heard of it
    trainer = TorchTrainer(
        worker,
        train_loop_config={
            "setup": replace(setup, threads=placement.threads, live=sys.stderr.isatty(), nodes=len(ray.nodes()))
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


def work(task: Callable[..., "Task"], config: TrainVAE | TrainLDM, name: str, setup: TrainSetup) -> dict[str, Any]:
    """In a training worker: make the task (of config, setup, rank, world size, device) and run it."""
    import ray.train.torch

    logging.disable(logging.INFO)  # Ray Train announces every checkpoint
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata; what can't be read is named by us
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
        # The other ranks may wait for this one: so all are ended, and started once more to hear of it.
        storage.put(str(told), str(error).encode())
        raise RuntimeError(str(error)) from None


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
