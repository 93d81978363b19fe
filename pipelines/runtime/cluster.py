"""Start or join Ray, and decide how much of the cluster a job takes.

Only this module computes numbers of CPUs for Ray jobs.

Ray waits without end if a job asks for more than there is, and a trainer, its workers and data tasks on two logical
CPUs block each other. Therefore a cluster that this module starts has spare logical CPUs (numbers of threads come from
the real CPUs), and a cluster that it joins is checked first.
"""

import os
import re
import secrets
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from litevae.errors import UserError
from pipelines.runtime import shutdown
from pipelines.runtime.logs import say
from pipelines.runtime.paths import in_ray_job
from pipelines.runtime.schema import Ray as RayConfig

if TYPE_CHECKING:
    import torch

SPARE_CPUS = 2  # for the training controller and one data task, in addition to the workers
# Set before PyTorch and Ray are imported in the driver, and inherited by every process of a cluster that it starts.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the default of 2 s delays the report of each checkpoint by 2 s
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise each line of a worker is printed twice
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "600",  # by default ranks that disagree wait without end
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in workers
    "RAY_DEDUP_LOGS": "0",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    # OpenMP threads that spin for long while they wait make some steps many times slower on cores with other work.
    # Threads that sleep at once make all steps slower (docs/performance.md).
    "GOMP_SPINCOUNT": "20000",
    # By default glibc returns large freed blocks to the system, and gets them again in each step, zeroed page by page.
    # That takes a sixth of the time of LiteVAE-S's encoder on a CPU (docs/performance.md).
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}
# If this is 0, a cluster that is started here consists of this machine only and listens on loopback only. Otherwise
# most of its servers listen on every address, whatever address they are given. Ray reads it on import, on Linux too.
_MANY_MACHINES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# If this is 1, lines of workers are shown without "(name pid=123)" before them. With one machine it tells nothing. Ray
# reads it on import.
_NO_PREFIX = "RAY_DISABLE_WORKER_LOG_PREFIX"
# If this is 0, a training has no actor that waits for preemption notices of spot machines; a cluster on this machine
# gets none. Each training reads it again, and its workers hear of notices in pipelines/training/interruptions.py. A
# value that the user has set is kept.
PREEMPTION_NOTICES = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
_PREEMPTION_NOTICES_ASKED = os.environ.get(PREEMPTION_NOTICES)
# Lines of Ray about what is as it should be, which are not shown. The first comes where a training is stopped, and the
# actor that looks after its workers outlives Ray's list of actors; the second where encoding ends early.
_NOISE = (
    re.compile(r"Failed to query Ray Train Controller actor state"),
    re.compile(r"Task MapWorker\(.* failed\. .*killed by `ray\.kill`", re.S),
)
# The oldest Ray that is accepted. With older versions, web pages can delete a cluster's jobs (CVE-2026-27482, before
# 2.54), and Parquet files can run code where Ray Data is imported (CVE-2026-41486, before 2.55). Ray itself refuses to
# join a cluster of another version.
OLDEST = (2, 55)


@dataclass(frozen=True)
class Placement:
    """How many workers a job has, where they run, and what each gets.

    Attributes:
        workers: number of workers.
        gpu: whether each worker has a GPU or a share of one.
        threads: CPU threads per worker.
        gpus: GPUs per worker, if `gpu`; below 1, several workers share a GPU.
        decoders: number of decoding tasks at a time, with one CPU each.
        jobs: number of jobs of this size that run at a time.
        min_workers: fewest workers with which an elastic training continues; 0: the number of workers is fixed.
        labels: labels of the Ray nodes that workers run on; empty: any node.
        decode_labels: labels of the Ray nodes that decoding tasks run on; empty: any node.
    """

    workers: int
    gpu: bool
    threads: int
    gpus: float = 1.0
    decoders: int = 1
    jobs: int = 1
    min_workers: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    decode_labels: dict[str, str] = field(default_factory=dict)

    @property
    def elastic(self) -> tuple[int, int] | None:
        """The smallest and the largest number of workers for Ray Train; None if the number is fixed."""
        return (self.min_workers, self.workers) if self.min_workers else None

    @property
    def resources(self) -> dict[str, float]:
        """The Ray resources of one worker. Threads are not included, because Ray's CPUs only count processes here."""
        return {"CPU": 1.0, "GPU": self.gpus} if self.gpu else {"CPU": 1.0}

    def ray_options(self) -> dict[str, Any]:
        """Return the Ray options for an actor that is a worker."""
        return {
            "num_cpus": self.resources["CPU"],
            "num_gpus": self.resources.get("GPU", 0),
            **on_nodes(self.labels),
        }

    def decode_options(self) -> dict[str, Any]:
        """Return the Ray options for a decoding task."""
        return {"num_cpus": 1, **on_nodes(self.decode_labels)}

    def configure_torch(self) -> "torch.device":
        """Configure PyTorch in a worker that measures, and return the worker's device.

        Set the number of threads, turn off TF32 so that fp32 is computed in fp32, and make cuDNN deterministic.
        """
        import torch

        torch.set_num_threads(self.threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
        return torch.device("cuda" if self.gpu else "cpu")

    @property
    def text(self) -> str:
        """The number of workers and their resources, for people."""
        where = (
            f"{self.gpus:g} GPU each"
            if self.gpu
            else f"{self.threads} CPU thread{'s' if self.threads > 1 else ''} each"
        )
        return f"{self.workers} worker{'s' if self.workers > 1 else ''}, {where}"


def in_worker() -> bool:
    """Return whether this process is a Ray worker, e.g. the training of a trial. The driver has decided its labels."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE


def outside_placement_groups() -> Any:
    """Return the scheduling strategy that lets actors and tasks run on any node with room.

    Without it, actors and tasks of a Ray Tune trial wait for room within what is reserved for the trial. If that is
    only the trial's own process, they wait without end.
    """
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return PlacementGroupSchedulingStrategy(placement_group=None)


def on_nodes(labels: dict[str, str]) -> dict[str, Any]:
    """Return the Ray option that restricts a task or an actor to nodes with these labels; empty for no labels."""
    return {"label_selector": labels} if labels else {}


def set_environment() -> None:
    """Set what `ENVIRONMENT` holds, unless the user has. A command does so before it imports PyTorch and Ray."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def alone(config: RayConfig) -> Placement | None:
    """Return what a job will take if it starts Ray on this machine; None if it joins a cluster, or Ray is running."""
    ray = sys.modules.get("ray")
    if in_ray_job() or "RAY_ADDRESS" in os.environ or (ray is not None and ray.is_initialized()):
        return None
    import torch

    gpu = torch.cuda.is_available() if config.gpu == "auto" else bool(config.gpu)
    threads = config.cpus_per_worker or max(1, (os.cpu_count() or 1) // config.workers)
    return Placement(config.workers, gpu, threads)


def start(config: RayConfig, jobs: int = 1) -> Placement:
    """Join the cluster of $RAY_ADDRESS or of the submitted job, or else start one on this machine.

    Args:
        config: the `ray` section of the config.
        jobs: number of jobs of this size to run at a time; 0: as many as the GPUs hold, and one without GPUs.

    Returns:
        The resources that the job takes.

    Raises:
        UserError: if the cluster can't hold the workers asked for, or if Ray is older than `OLDEST`.
    """
    set_environment()
    joining = in_ray_job() or "RAY_ADDRESS" in os.environ
    os.environ[PREEMPTION_NOTICES] = _PREEMPTION_NOTICES_ASKED or str(int(joining))
    if not joining and not in_worker():
        config = config.model_copy(update={"worker_labels": {}, "decode_labels": {}})  # there is one machine only
    if not os.isatty(1):
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # otherwise Ray colours lines of workers in files, too
    if not joining:
        os.environ.setdefault(_MANY_MACHINES, "0")
        os.environ.setdefault(_NO_PREFIX, "1")
        if "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
            # A token that only this process knows: nothing is written to disk, and no other user of the machine can
            # submit work. Ray reads it on import. If a program imported Ray before, Ray's default is used (a token in
            # the home folder).
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))

    import ray

    _drop_noise()
    if tuple(map(int, ray.__version__.split(".")[:2])) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise UserError(
            f"Ray {ray.__version__} has known security vulnerabilities; install {needed} or newer, here and on the "
            f"cluster"
        )
    if not ray.is_initialized():
        with shutdown.keep_sigterm_handler():
            if joining:
                say(f"joining Ray{' at ' + os.environ['RAY_ADDRESS'] if os.environ.get('RAY_ADDRESS') else ''}")
                ray.init(logging_level="ERROR", log_to_driver=True)
            else:
                _start_here(config, jobs)
    if not joining:
        os.environ.pop(_MANY_MACHINES, None)  # Ray has read it; other programs started here must not inherit it
    deadline, waiting = time.monotonic() + config.wait * joining, False
    while True:
        try:
            placement = _placement(config, jobs)
        except UserError as error:
            if time.monotonic() >= deadline:
                if joining and not config.wait:
                    raise UserError(f"{error}; if the cluster grows by itself, ray.wait=600 waits for it") from None
                raise
            if not waiting:
                say(f"waiting up to {config.wait} s for the cluster to grow: {error}")
            waiting = True
            _ask_for(config, config.workers * max(1, jobs))
            time.sleep(min(5.0, config.wait))
        else:
            if waiting:
                _ask_for(config, 0)  # otherwise the cluster would never shrink
            return placement


def _drop_noise() -> None:
    """Make Ray leave out the lines of `_NOISE` from what it shows of its other processes."""
    from ray._private import worker

    show = getattr(worker, "print_worker_logs", None)  # not part of Ray's interface: without it the lines are shown
    if show is None or hasattr(show, "drops_noise"):
        return

    def print_worker_logs(data: dict[str, Any], *more: Any, **options: Any) -> None:
        lines = [line for line in data.get("lines", []) if not any(noise.search(line) for noise in _NOISE)]
        if lines:
            show({**data, "lines": lines}, *more, **options)

    print_worker_logs.drops_noise = True  # type: ignore[attr-defined]
    worker.print_worker_logs = print_worker_logs


def _placement(config: RayConfig, jobs: int) -> Placement:
    """Return what a job takes of the cluster in its present size.

    Raises:
        UserError: if the cluster is too small.
    """
    cpus, _ = _resources({})
    room, gpus = _resources(config.worker_labels)
    gpu = gpus > 0 if config.gpu == "auto" else bool(config.gpu)
    workers = config.min_workers or config.workers  # an elastic training can start with fewer
    if not jobs:  # as many as there is room for
        jobs = max(1, int(min(gpus / config.gpus_per_worker, cpus - SPARE_CPUS) / workers)) if gpu else 1
    asked = f"ray.workers={workers}" + (f" of {jobs} trials at a time" if jobs > 1 else "")
    has = "the nodes with ray.worker_labels have" if config.worker_labels else "the cluster has"
    if gpu and gpus < jobs * workers * config.gpus_per_worker:
        raise UserError(
            f"{asked} with {config.gpus_per_worker:g} GPU each, but {has} {gpus}; lower it or set ray.gpu=false"
        )
    if room < workers * jobs:
        raise UserError(f"{asked} needs a logical CPU for each, but {has} {room}; lower it")
    needed = workers * jobs + SPARE_CPUS
    if cpus < needed:
        raise UserError(
            f"{asked} needs {needed} logical CPUs ({SPARE_CPUS} for the controller and data), but the cluster has "
            f"{cpus}; lower it, or start Ray with --num-cpus={needed}"
        )
    threads = config.cpus_per_worker or max(1, (os.cpu_count() or 1) // (config.workers * jobs))
    for_data, _ = _resources(config.decode_labels)
    if not config.decode_labels and gpu:
        for_data -= needed
    decoders = config.decode_tasks or (max(1, for_data) if gpu or config.decode_labels else -(-for_data // 8))
    return Placement(
        config.workers, gpu, threads, config.gpus_per_worker, decoders, jobs, config.min_workers,
        config.worker_labels, config.decode_labels,
    )  # fmt: skip


def _start_here(config: RayConfig, jobs: int) -> None:
    """Start a cluster on this machine, with enough logical CPUs for the job."""
    import ray

    say("starting Ray on this machine, about 10 s")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    # For Ray's own actors: if another cluster runs on this machine, they would not know which one is theirs, and warn.
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    try:
        ray.init(
            address="local",  # otherwise it joins the cluster that was started last on this machine
            num_cpus=max(os.cpu_count() or 1, (config.workers + config.decode_tasks) * max(1, jobs)) + SPARE_CPUS,
            include_dashboard=True,  # without it Ray Train's controller logs an error every second
            dashboard_host="127.0.0.1",
            dashboard_port=port,
            logging_level="ERROR",
            log_to_driver=True,
        )
    finally:
        del os.environ["RAY_API_SERVER_ADDRESS"]


def _resources(labels: dict[str, str]) -> tuple[int, int]:
    """Return the number of CPUs and of GPUs of the nodes with these labels.

    Raises:
        UserError: if no node has them.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    chosen = [node["Resources"] for node in nodes if labels.items() <= node["Labels"].items()]
    if not chosen:
        known = {f"{key}: {value}" for node in nodes for key, value in node["Labels"].items() if "ray.io" not in key}
        there = f"there are {', '.join(sorted(known))}" if known else "no node has any"
        raise UserError(f"no node of the cluster has the labels {labels}; {there} (ray start --labels)")
    return int(sum(node.get("CPU", 0) for node in chosen)), int(sum(node.get("GPU", 0) for node in chosen))


def _ask_for(config: RayConfig, workers: int) -> None:
    """Ask the autoscaler, if there is one, for room for this many workers and for the decoding tasks with them."""
    from ray.autoscaler.sdk import request_resources

    gpus = {"GPU": config.gpus_per_worker} if config.gpu is True else {}
    decoders = [{"CPU": 1}] * (max(1, config.decode_tasks) if workers and config.decode_labels else 0)
    bundles = [{"CPU": 1, **gpus}] * workers + decoders
    labels = [config.worker_labels] * workers + [config.decode_labels] * len(decoders)
    request_resources(bundles=bundles, bundle_label_selectors=labels if any(labels) else None)
