"""Starting or joining Ray, and how much of it a job takes: the one place that sizes CPUs.

Ray waits for ever when a job asks for more than there is, and a trainer, its workers and data tasks on two
logical CPUs starve each other. A cluster that we start ourselves therefore has logical CPUs to spare (threads
are set from the real ones), and a cluster that we join is checked first.
"""

import os
import secrets
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from litevae import storage
from litevae.errors import UserError
from pipelines.config import Ray as RayConfig

if TYPE_CHECKING:
    import torch

SPARE_CPUS = 2  # the training controller, and one data task beside the workers

# Set before `import ray`, in the driver and through it in every process of a cluster that we start.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the default, 2 s, delays every checkpoint's report by as much
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # or each line of a worker is printed twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "600",  # by default ranks that disagree wait for ever
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in workers
    "RAY_DEDUP_LOGS": "0",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    # OpenMP threads that spin long while they wait make some steps many times slower on cores that have other work too,
    # and ones that sleep at once make all of them slower (BENCHMARKS.md).
    "GOMP_SPINCOUNT": "20000",
}


@dataclass(frozen=True)
class Share:
    """What one worker gets."""

    workers: int
    gpu: bool
    threads: int
    gpus: float = 1.0  # of each worker, where there are GPUs
    decoders: int = 1  # decoding tasks at a time, a CPU each
    jobs: int = 1  # of this size at a time

    @property
    def resources(self) -> dict[str, float]:
        return {"CPU": 1.0, "GPU": self.gpus} if self.gpu else {"CPU": 1.0}

    def settle(self) -> "torch.device":
        """In a worker that measures: its threads and device, which computes in fp32 what is fp32 (not TF32), and the
        same each time."""
        import torch

        torch.set_num_threads(self.threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
        return torch.device("cuda" if self.gpu else "cpu")

    @property
    def text(self) -> str:
        where = (
            f"{self.gpus:g} GPU each"
            if self.gpu
            else f"{self.threads} CPU thread{'s' if self.threads > 1 else ''} each"
        )
        return f"{self.workers} worker{'s' if self.workers > 1 else ''}, {where}"


def in_ray_job() -> bool:
    """Whether this process was started by `ray job submit`: its working directory is a throw-away copy."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def output_path(field: str, path: str, remote: bool = False) -> str:
    """An absolute output path. Inside a submitted job a relative one is refused: it would vanish with the copy.

    Args:
        remote: whether it may be s3://.
    """
    if not path:
        raise UserError(f"{field}: give a path, e.g. {field}=/data/{field}")
    if storage.remote(path):
        if not remote:
            raise UserError(f"{field}={path}: only local paths can be written here")
        return storage.absolute(path)
    if in_ray_job() and not os.path.isabs(path):
        raise UserError(
            f"{field}={path} is relative; a submitted job runs in a temporary copy of its working directory, so what "
            f"it writes there is lost. Give an absolute path on storage that all nodes share."
        )
    return os.path.abspath(path)


def anywhere() -> Any:
    """Where a job's actors and tasks may run: wherever there is room. Of a trial of Ray Tune they would else wait for
    room within what is reserved for the trial, for ever where that is the trial's own process only."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return PlacementGroupSchedulingStrategy(placement_group=None)


def start(config: RayConfig, jobs: int = 1) -> Share:
    """Join the cluster of $RAY_ADDRESS or of the submitted job, else start one on this machine.

    Args:
        jobs: of this size at a time; 0: as many as GPUs hold, one without.

    Raises:
        UserError: the cluster can't hold the workers asked for.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    joining = in_ray_job() or "RAY_ADDRESS" in os.environ
    if not joining and "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
        # A token of this process alone: nothing is written to disk, and no neighbour can submit work. Ray reads this
        # when it is imported; where a program did that before, Ray's own default holds (a token in the home folder).
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))

    import ray

    if not ray.is_initialized():
        if joining:
            ray.init(logging_level="ERROR", log_to_driver=True)
        else:
            ray.init(
                address="local",  # or it joins whatever cluster was started last on this machine
                num_cpus=max(os.cpu_count() or 1, (config.workers + config.decode_tasks) * max(1, jobs)) + SPARE_CPUS,
                include_dashboard=True,  # without it Ray Train's controller logs an error a second
                dashboard_host="127.0.0.1",
                logging_level="ERROR",
                log_to_driver=True,
            )
    total = ray.cluster_resources()
    cpus, gpus = int(total.get("CPU", 0)), int(total.get("GPU", 0))
    gpu = gpus > 0 if config.gpu == "auto" else bool(config.gpu)
    if not jobs:  # as many as there is room for
        room = min(gpus / config.gpus_per_worker, cpus - SPARE_CPUS) / config.workers if gpu else 1
        jobs = max(1, int(room))
    asked = f"ray.workers={config.workers}" + (f" of {jobs} trials at a time" if jobs > 1 else "")
    if gpu and gpus < jobs * config.workers * config.gpus_per_worker:
        raise UserError(
            f"{asked} with {config.gpus_per_worker:g} GPU each, but the cluster has {gpus}; lower it or set ray.gpu=no"
        )
    needed = config.workers * jobs + SPARE_CPUS
    if cpus < needed:
        raise UserError(
            f"{asked} needs {needed} logical CPUs ({SPARE_CPUS} for the controller and data), but the cluster has "
            f"{cpus}; lower it, or start Ray with --num-cpus={needed}"
        )
    threads = config.cpus_per_worker or max(1, (os.cpu_count() or 1) // (config.workers * jobs))
    decoders = config.decode_tasks or (max(1, cpus - needed) if gpu else -(-cpus // 8))
    return Share(config.workers, gpu, threads, config.gpus_per_worker, decoders, jobs)
