"""Starting or joining Ray, and how much of it a job takes: the one place that sizes CPUs.

Ray waits for ever when a job asks for more than there is, and a trainer, its workers and data tasks on two
logical CPUs starve each other. A cluster that we start ourselves therefore has logical CPUs to spare (threads
are set from the real ones), and a cluster that we join is checked first.
"""

import os
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

SPARE_CPUS = 2  # the training controller, and one data task beside the workers
# Set before `import ray`, in the driver and through it in every process of a cluster that we start.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the default, 2 s, delays every checkpoint's report by as much
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # or each line of a worker is printed twice
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "600",  # by default ranks that disagree wait for ever
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in workers
    "RAY_DEDUP_LOGS": "0",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    # OpenMP threads that spin long while they wait make some steps many times slower on cores that have other work too,
    # and ones that sleep at once make all of them slower (BENCHMARKS.md).
    "GOMP_SPINCOUNT": "20000",
    # glibc gives large blocks back to the system as they are freed, and gets them anew, zeroed page by page, in each
    # step: a sixth of the time of LiteVAE-S's encoder on a CPU (BENCHMARKS.md).
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}
# Set to 0, a cluster that we start is of this machine alone and listens on loopback alone; else most of its servers
# listen on every address, whatever they are told. Ray reads it when it is imported, and on Linux too.
_MANY_MACHINES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# Set to 0, a training has no actor that waits for spot notices: on a machine of our own there are none. Read anew by
# each training; what the user said about it holds.
_NOTICES = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
_NOTICES_ASKED = os.environ.get(_NOTICES)
# With an older Ray web pages can delete a cluster's jobs (CVE-2026-27482, before 2.54), and Parquet files can run code
# where Ray Data is imported (CVE-2026-41486, before 2.55). Ray itself refuses to join a cluster of another version.
OLDEST = (2, 55)


@dataclass(frozen=True)
class Placement:
    """How many workers a job has, where they run, and what each gets.

    Attributes:
        workers: how many.
        gpu: whether each has a GPU, or a part of one.
        threads: CPU threads of each.
        gpus: GPUs of each, where there are any; below 1, several share one.
        decoders: decoding tasks at a time, each with a CPU.
        jobs: jobs of this size at a time.
        min_workers: an elastic training goes on with so few workers; 0: with all of them or not at all.
        labels: of Ray's nodes that workers run on; empty: any.
        decode_labels: of Ray's nodes that decoding tasks run on; empty: any.
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
        """Ray Train's least and largest number of workers; None where the number is fixed."""
        return (self.min_workers, self.workers) if self.min_workers else None

    @property
    def resources(self) -> dict[str, float]:
        """Ray's resources of one worker. Its threads are not among them: Ray's CPUs only count processes."""
        return {"CPU": 1.0, "GPU": self.gpus} if self.gpu else {"CPU": 1.0}

    def ray_options(self) -> dict[str, Any]:
        """Ray's options of an actor that is one of the workers."""
        return {
            "num_cpus": self.resources["CPU"],
            "num_gpus": self.resources.get("GPU", 0),
            **on_nodes(self.labels),
        }

    def decode_options(self) -> dict[str, Any]:
        """Ray's options of a decoding task."""
        return {"num_cpus": 1, **on_nodes(self.decode_labels)}

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


def _in_worker() -> bool:
    """Whether this is a process of Ray's, as a trial's training is: what labels it has the driver has decided."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE


def anywhere() -> Any:
    """Where a job's actors and tasks may run: wherever there is room. Of a trial of Ray Tune they would else wait for
    room within what is reserved for the trial, for ever where that is the trial's own process only."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return PlacementGroupSchedulingStrategy(placement_group=None)


def on_nodes(labels: dict[str, str]) -> dict[str, Any]:
    """Ray's argument for running on nodes with these labels only; none for none."""
    return {"label_selector": labels} if labels else {}


def start(config: RayConfig, jobs: int = 1) -> Placement:
    """Join the cluster of $RAY_ADDRESS or of the submitted job, else start one on this machine.

    Args:
        jobs: of this size at a time; 0: as many as GPUs hold, one without.

    Raises:
        UserError: the cluster can't hold the workers asked for.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    joining = in_ray_job() or "RAY_ADDRESS" in os.environ
    os.environ[_NOTICES] = _NOTICES_ASKED or str(int(joining))
    if not joining and not _in_worker():
        config = config.model_copy(update={"worker_labels": {}, "decode_labels": {}})  # one machine, whatever it is
    if not joining:
        os.environ.setdefault(_MANY_MACHINES, "0")
        if "RAY_AUTH_MODE" not in os.environ and "ray" not in sys.modules:
            # A token of this process alone: nothing is written to disk, and no neighbour can submit work. Ray reads
            # this when it is imported; where a program did that before, Ray's own default holds (a token in the home
            # folder).
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))

    import ray

    if tuple(map(int, ray.__version__.split(".")[:2])) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise UserError(f"Ray {ray.__version__} has known holes; install {needed} or newer, here and on the cluster")
    if not ray.is_initialized():
        with shutdown.kept():
            if joining:
                ray.init(logging_level="ERROR", log_to_driver=True)
            else:
                _start_here(config, jobs)
    if not joining:
        os.environ.pop(_MANY_MACHINES, None)  # Ray has read it; it is not for what this process may start besides
    deadline, waiting = time.monotonic() + config.wait * joining, False
    while True:
        try:
            placement = _placement(config, jobs)
        except UserError as error:
            if time.monotonic() >= deadline:
                if joining and not config.wait:
                    raise UserError(f"{error}; where the cluster grows by itself, ray.wait=600 waits for it") from None
                raise
            if not waiting:
                say(f"waiting up to {config.wait} s for the cluster to grow: {error}")
            waiting = True
            _ask_for(config, config.workers * max(1, jobs))
            time.sleep(min(5.0, config.wait))
        else:
            if waiting:
                _ask_for(config, 0)  # or the cluster would stay as large for ever
            return placement


def _placement(config: RayConfig, jobs: int) -> Placement:
    """What a job takes of the cluster as it is."""
    cpus, _ = _resources({})
    room, gpus = _resources(config.worker_labels)
    gpu = gpus > 0 if config.gpu == "auto" else bool(config.gpu)
    workers = config.min_workers or config.workers  # an elastic training begins with fewer
    if not jobs:  # as many as there is room for
        jobs = max(1, int(min(gpus / config.gpus_per_worker, cpus - SPARE_CPUS) / workers)) if gpu else 1
    asked = f"ray.workers={workers}" + (f" of {jobs} trials at a time" if jobs > 1 else "")
    has = "the nodes with ray.worker_labels have" if config.worker_labels else "the cluster has"
    if gpu and gpus < jobs * workers * config.gpus_per_worker:
        raise UserError(
            f"{asked} with {config.gpus_per_worker:g} GPU each, but {has} {gpus}; lower it or set ray.gpu=no"
        )
    if room < workers * jobs:
        raise UserError(f"{asked} takes a logical CPU each, but {has} {room}; lower it")
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
    import ray

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    # For Ray's own actors: beside another cluster on this machine they would not know which is theirs, and say so.
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    try:
        ray.init(
            address="local",  # or it joins whatever cluster was started last on this machine
            num_cpus=max(os.cpu_count() or 1, (config.workers + config.decode_tasks) * max(1, jobs)) + SPARE_CPUS,
            include_dashboard=True,  # without it Ray Train's controller logs an error a second
            dashboard_host="127.0.0.1",
            dashboard_port=port,
            logging_level="ERROR",
            log_to_driver=True,
        )
    finally:
        del os.environ["RAY_API_SERVER_ADDRESS"]


def _resources(labels: dict[str, str]) -> tuple[int, int]:
    """CPUs and GPUs of the nodes with these labels.

    Raises:
        UserError: no node has them.
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
    """Tell the autoscaler, where there is one, to have room for so many workers, and with them for decoding."""
    from ray.autoscaler.sdk import request_resources

    gpus = {"GPU": config.gpus_per_worker} if config.gpu is True else {}
    decoders = [{"CPU": 1}] * (max(1, config.decode_tasks) if workers and config.decode_labels else 0)
    bundles = [{"CPU": 1, **gpus}] * workers + decoders
    labels = [config.worker_labels] * workers + [config.decode_labels] * len(decoders)
    request_resources(bundles=bundles, bundle_label_selectors=labels if any(labels) else None)
