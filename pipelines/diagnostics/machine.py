"""Doctor's checks of nodes: versions, CPUs, GPUs, kernels, limits, clocks, and the network between nodes."""

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist

from litevae import native, storage
from litevae.errors import UserError
from pipelines.diagnostics.probe import DRIVER, Ask, Finding, Nodes, State, answered, counted, failure
from pipelines.runtime import cluster, host

PACKAGES = ("torch", "ray", "litevae", "numpy", "pyarrow", "diffusers", "pillow", "simplejpeg", "s3fs", "mlflow")
GB = 10**9
# Less free disk space than this, or a smaller ratio of /dev/shm to Ray's object store, is a warning.
LITTLE_DISK, LITTLE_SHM = 20 * GB, 0.9
OPEN_FILES = 4096  # a lower limit is a warning: Ray needs some files per worker, and recommends 65536
SKEW = (2.0, 300.0)  # seconds between clocks: above the first a warning; above the second S3 and tokens may fail
LINK = 10.0  # MB/s between nodes, below which training waits longer for gradients than it computes


def versions(mine: dict[str, str], theirs: dict[str, Any]) -> Iterator[Finding]:
    """Check that every node has the driver's versions.

    Args:
        mine: what `versions_here` returned on the driver.
        theirs: what `versions_here` returned on each node.
    """
    yield Finding(DRIVER, "ok", ", ".join(f"{name} {version}" for name, version in mine.items()))
    nodes, lost = answered(theirs, "install this project and its dependencies there, as constraints.txt has them")
    yield from lost
    for node, found in nodes.items():
        other = [f"{name} {found.get(name)}, not {mine[name]}" for name in mine if found.get(name) != mine[name]]
        if other:
            yield Finding(
                node, "failed", "; ".join(other), "install what the driver has: pip install -c constraints.txt"
            )
        else:
            yield Finding(node, "ok", "the same as on the driver")


def versions_here() -> dict[str, str]:
    """Return the versions of `PACKAGES` ("none" if not installed), and a digest of this project's code as "code"."""
    found = dict.fromkeys(PACKAGES, "none") | host.versions(PACKAGES)
    digest = hashlib.sha256()
    for part in (native.SOURCE.parent, Path(__file__).parents[1]):
        for path in sorted(part.rglob("*.py")):
            digest.update(str(path.relative_to(part)).encode() + path.read_bytes())
    return found | {"code": digest.hexdigest()[:8]}


def cpus(ask: Ask, resources: dict[str, dict[str, float]]) -> Iterator[Finding]:
    """Check that Ray has as many CPUs on each node as there are, and that processes may use them all."""
    nodes, lost = answered(ask(_cpus))
    yield from lost
    for node, (logical, physical, usable) in nodes.items():
        given = resources.get(node, {}).get("CPU", usable)
        text = f"{logical} CPUs ({physical} cores)" + (f"; Ray has {given:g} logical ones there" if resources else "")
        if usable < logical:
            advice = f"jobs count {logical} and would start as many threads: give ray.cpus_per_worker"
            yield Finding(node, "warning", f"{text}; this process may use {usable:g} of them", advice)
        elif not given:
            yield Finding(node, "skipped", f"{text}: it takes no work")
        elif given < logical:
            yield Finding(node, "warning", f"{text}: the others stay idle", f"ray start --num-cpus={logical}")
        elif given > logical + cluster.SPARE_CPUS:
            advice = f"fewer ray.workers, or ray start --num-cpus={logical + cluster.SPARE_CPUS}"
            yield Finding(node, "warning", f"{text}: processes will share them", advice)
        else:
            yield Finding(node, "ok", text)


def _cpus() -> tuple[int, int, float]:
    """Return the number of logical CPUs, of cores, and of CPUs that affinity and cgroup let this process use."""
    logical = os.cpu_count() or 1
    usable = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical)
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file() and (words := quota.read_text().split())[0] != "max":
        usable = min(usable, int(words[0]) / int(words[1]))
    return logical, psutil.cpu_count(logical=False) or logical, usable


def gpus(ask: Ask, resources: dict[str, dict[str, float]]) -> Iterator[Finding]:
    """Check that PyTorch and Ray see every GPU, that its memory is free, and that it computes correctly."""
    nodes, lost = answered(ask(_gpus), "see the driver's log: dmesg, nvidia-smi")
    yield from lost
    for node, (there, built, devices) in nodes.items():
        given = resources.get(node, {}).get("GPU", 0)
        if not devices and (there or given):
            what = f"nvidia-smi shows {there}" if there else f"Ray has {given:g} GPUs there"
            advice = "install a PyTorch build for this driver's CUDA or newer drivers; see CUDA_VISIBLE_DEVICES"
            yield Finding(node, "failed", f"{what}, but PyTorch (built for CUDA {built}) sees none", advice)
        elif not devices:
            yield Finding(node, "skipped", "no GPU")
        elif resources and given < len(devices):
            text = f"PyTorch sees {len(devices)} GPUs, Ray has {given:g} there"
            yield Finding(node, "warning", text, f"ray start --num-gpus={len(devices)}")
        for name, free, total, bf16, error in devices:
            text = f"{name}, {free / GB:.0f} of {total / GB:.0f} GB free, {'bf16' if bf16 else 'no bf16'}, CUDA {built}"
            if error > 1e-3:
                text = f"{name}: a product of matrices is off by {error:.1g}"
                yield Finding(node, "failed", text, "the GPU or its driver is broken: take the node out")
            elif free < total / 2:
                yield Finding(node, "warning", text, "something else uses it: see nvidia-smi")
            else:
                yield Finding(node, "ok", text)


def _gpus() -> tuple[str, str, list[tuple[str, int, int, bool, float]]]:
    """Return the output of nvidia-smi, the CUDA version that PyTorch was built for, and the GPUs that PyTorch sees.

    Each GPU is (name, free bytes, total bytes, whether it has bf16, relative error of a matrix product in fp32).
    """
    there = ""
    if smi := shutil.which("nvidia-smi"):
        query = [smi, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
        there = "; ".join((done.stdout or done.stderr).strip().splitlines())
    devices = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name = torch.cuda.get_device_name(number)
        free, total = torch.cuda.mem_get_info(number)
        a = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
        with torch.cuda.device(number):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            torch.backends.cuda.matmul.allow_tf32 = False
            product, exact = (a.cuda() @ a.cuda()).cpu().double(), a.double() @ a.double()
        devices.append((name, free, total, bf16, float((product - exact).abs().max() / exact.abs().max())))
    return there, torch.version.cuda or "none", devices


def kernels(ask: Ask) -> Iterator[Finding]:
    """Check that the project's own CPU kernels can be built on each node, and that they compute correctly."""
    for node, error in ask(_kernels).items():
        if isinstance(error, native.NoKernels):
            yield failure(node, error, "install g++: encoding on CPUs is two to three times as fast")._replace(
                state="warning"
            )
        elif isinstance(error, BaseException):
            yield failure(node, error)
        elif error > 1e-4:
            advice = "kernels=torch does not use them; remove ~/.cache/litevae or try another compiler in CXX"
            text = f"the project's CPU kernels are off by {error:.1g} of the largest value"
            yield Finding(node, "failed", text, advice)
        else:
            text = f"the project's CPU kernels differ from PyTorch's by {error:.1g} of the largest value"
            yield Finding(node, "ok", text)


@torch.no_grad()
def _kernels() -> float:
    """Return the largest error of the project's own CPU kernels, relative to the largest value."""
    generator = torch.Generator().manual_seed(0)
    conv, norm = torch.nn.Conv2d(32, 32, 3, padding=1), torch.nn.GroupNorm(8, 32)
    x = torch.randn(2, 32, 25, 31, generator=generator).contiguous(memory_format=torch.channels_last)
    exact = conv(torch.nn.functional.silu(norm(x)))
    ours = native.FastConv2d(conv)(native.norm_silu(x, norm))
    return float((ours - exact).abs().max() / exact.abs().max())


def limits(ask: Ask, resources: dict[str, dict[str, float]]) -> Iterator[Finding]:
    """Check each node's free disk space, its limit of open files, and the size of /dev/shm."""
    nodes, lost = answered(ask(_limits))
    yield from lost
    for node, (memory, files, temp, free, shm) in nodes.items():
        store = resources.get(node, {}).get("object_store_memory", 0)
        about = f"{memory / GB:.0f} GB of memory free, {free / GB:.0f} GB in {temp}, {files} open files"
        problems = []
        if free < LITTLE_DISK:
            problems.append((f"{free / GB:.1f} GB free in {temp}, Ray's folder", "make room, or ray start --temp-dir"))
        if files < OPEN_FILES:
            problems.append((f"only {files} open files are allowed per process", "ulimit -n 65536 before ray start"))
        if shm < LITTLE_SHM * store:
            text = f"/dev/shm has {shm / GB:.1f} GB, Ray's object store needs {store / GB:.1f}"
            problems.append((text, "a larger one (docker run --shm-size), or ray start --object-store-memory"))
        for text, advice in problems:
            yield Finding(node, "warning", text, advice)
        if not problems:
            yield Finding(node, "ok", about)


def _limits() -> tuple[int, int, str, int, int]:
    """Return free memory, the limit of open files, Ray's folder, free space there, and the size of /dev/shm.

    Sizes are in bytes.
    """
    import resource

    import ray

    node = ray._private.worker._global_node  # Ray has no public API for it
    temp = node.get_session_dir_path() if node else tempfile.gettempdir()
    shm = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return psutil.virtual_memory().available, files, temp, shutil.disk_usage(temp).free, shm


def clock(ask: Ask, out: str) -> Iterator[Finding]:
    """Compare each node's clock, and S3's if `out` is there, with the driver's.

    Each exchange gives bounds on the difference; the tightest bounds of five exchanges count.
    """
    bounds: dict[str, list[tuple[float, float]]] = {}
    for _ in range(5):
        before = time.time()
        nodes, lost = answered(ask(time.time))
        after = time.time()
        for node, there in nodes.items():
            bounds.setdefault(node, []).append((there - after, there - before))
    yield from lost
    yield from skews({node: (max(b[0] for b in found), min(b[1] for b in found)) for node, found in bounds.items()})
    if storage.is_remote(out):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        request = urllib.request.Request(endpoint or "https://s3.amazonaws.com", method="HEAD")
        before = time.time()
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                date = answer.headers["Date"]
        except urllib.error.HTTPError as error:  # also a refusal has the time in its header
            date = error.headers["Date"]
        except OSError as error:
            raise UserError(f"{request.full_url} can't be reached ({error}); check AWS_ENDPOINT_URL") from None
        if date:
            there = parsedate_to_datetime(date).timestamp()  # rounded down to a whole second
            yield from skews({"S3": (there - time.time(), there + 1 - before)})


def skews(bounds: dict[str, tuple[float, float]]) -> Iterator[Finding]:
    """Judge the differences between clocks.

    Args:
        bounds: for each clock, bounds (low, high) of how far it is ahead of the driver's, in seconds.
    """
    for node, (low, high) in bounds.items():
        sure = max(0.0, low, -high)  # the smallest difference that the bounds allow
        text = f"{(low + high) / 2:+.2f} s from the driver's, within {(high - low) / 2:.2f} s"
        state: State = "failed" if sure > SKEW[1] else "warning" if sure > SKEW[0] else "ok"
        yield Finding(node, state, text, "set it with NTP (chronyd, timedatectl)" if sure > SKEW[0] else "")


def collectives(nodes: Nodes | None, backend: Literal["gloo", "nccl"]) -> Iterator[Finding]:
    """Check a process group over all nodes, such as Ray Train makes.

    Args:
        nodes: the nodes; None if Ray is not running.
        backend: "gloo" runs on CPUs, "nccl" on one GPU of each node that has one (two if there is only one node).
    """
    if nodes is None:
        yield Finding(DRIVER, "skipped", "Ray is not running")
        return
    names = [name for name, has in nodes.resources.items() if has.get("GPU" if backend == "nccl" else "CPU", 0) >= 1]
    if not names or (backend == "nccl" and len(names) == 1 and nodes.resources[names[0]]["GPU"] < 2):
        yield Finding(DRIVER, "skipped", "fewer than two GPUs" if backend == "nccl" else "no node takes work")
        return
    advice = (
        "open all ports between nodes; where they have several networks, name one: "
        f"{'GLOO' if backend == 'gloo' else 'NCCL'}_SOCKET_IFNAME=eth0"
    )
    found, lost = answered(nodes.ranks(names, rank, backend, len(names) == 1, min(60.0, nodes.limit / 2)), advice)
    yield from lost
    if found and not lost:
        speed = min(speed for _, speed in found.values())
        wrong = [name for name, (right, _) in found.items() if not right]
        text = f"all_reduce over {len(found)} processes on {counted(len(names), 'node')}, {speed:,.0f} MB/s"
        if wrong:
            yield Finding(", ".join(wrong), "failed", "all_reduce gave a wrong sum", "see memory and network cards")
        elif speed < LINK:
            yield Finding(DRIVER, "warning", text, "training on these nodes waits for gradients: use a faster network")
        else:
            yield Finding(DRIVER, "ok", text)


def rank(number: int, ranks: int, address: str, backend: str, apart: bool, seconds: float) -> tuple[bool, float]:
    """Run one process of the group.

    Args:
        number: this process's rank.
        ranks: the number of processes.
        address: host:port on which rank 0 listens.
        backend: "gloo" or "nccl".
        apart: whether the ranks are on one machine, so that each takes another GPU.
        seconds: how long to wait for the other processes.

    Returns:
        Whether all_reduce gave the right sums, and its bus bandwidth in MB/s.

    Raises:
        UserError: if not all processes reach rank 0.
    """
    device = torch.device("cuda", number if apart else 0) if backend == "nccl" else torch.device("cpu")
    size, times = 4 * 2**20, []  # 16 MiB of fp32
    limit = timedelta(seconds=seconds)
    try:
        dist.init_process_group(backend, f"tcp://{address}", timeout=limit, world_size=ranks, rank=number)
    except dist.DistError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"not all of the {ranks} processes reach the first one at {address} ({reason})") from None
    try:
        right = True
        for _ in range(4):
            # The values are small, so that sums over a thousand ranks are exact in fp32.
            x = (torch.arange(size, device=device) % 16 * (number + 1)).float()
            dist.barrier(device_ids=None if device.index is None else [device.index])
            begun = time.perf_counter()
            dist.all_reduce(x)
            if backend == "nccl":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - begun)
            exact = (torch.arange(size) % 16 * (ranks * (ranks + 1) // 2)).float()
            right &= torch.equal(x.cpu(), exact)
        return right, 2 * (ranks - 1) / ranks * 4 * size / min(times) / 1e6
    finally:
        dist.destroy_process_group()
