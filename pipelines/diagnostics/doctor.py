"""What may spoil a long run, found before it: every check is a function that gives findings.

The driver has a process of its own on every node (`Nodes`) and asks all of them the same at a time. What raises is a
finding too, and so is what takes too long; no check stops the others.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import psutil
import torch
import torch.distributed as dist

from litevae import native, storage
from litevae.autoencoder import encode_latents, fingerprint, load_autoencoder
from litevae.errors import UserError, redact
from litevae.generation import Inception
from litevae.images import ImageError, ImageTransform, to_tensor
from litevae.inference import best_kernels, prepared
from litevae.perceptual import WeightsMissing, load_lpips
from litevae.precision import autocast
from pipelines.data.source import Source
from pipelines.data.sources import open_source
from pipelines.diagnostics.config import Doctor
from pipelines.diagnostics.probe import DRIVER, Ask, Finding, Findings, Nodes, State, alone, answered, failure
from pipelines.evaluation import image_batches
from pipelines.runtime import cluster, mlflow_run, tables
from pipelines.runtime.schema import Ray, Tracked

PACKAGES = ("torch", "ray", "litevae", "numpy", "pyarrow", "diffusers", "pillow", "simplejpeg", "s3fs", "mlflow")
GB = 10**9
LITTLE_DISK, LITTLE_SHM = 20 * GB, 0.9  # free space; /dev/shm against Ray's object store
OPEN_FILES = 4096  # Ray takes some per worker, and recommends 65536
SKEW = (2.0, 300.0)  # seconds between clocks that are told, and that S3 and tokens may take offence at
ROUNDS, THREADS = 4, 8  # of the race for one name, and threads of each node in it
LINK = 10.0  # MB/s between nodes, below which training waits for gradients more than it computes


def run(config: Doctor) -> int:
    """The `doctor` job: prints a table, and returns the exit code."""
    findings = doctor(config)
    print(f"\n{table(findings)}\n")
    counts = Counter(finding.state for finding in findings)
    nodes = len({finding.node for finding in findings} - {DRIVER})
    words: dict[State, str] = {"ok": "ok", "warning": "warnings", "failed": "failed", "skipped": "skipped"}
    print(
        f"doctor: {', '.join(f'{counts[state]} {word}' for state, word in words.items())}, on {_count(nodes, 'node')}"
    )
    if config.report:
        summary = {"counts": dict(counts), "findings": [finding._asdict() for finding in findings]}
        tables.write(config.report, json.dumps(summary, indent=2).encode() + b"\n")
    return 1 if counts["failed"] else 0


def doctor(config: Doctor) -> list[Finding]:
    """All checks.

    Raises:
        UserError: paths that no job would take.
    """
    root = cluster.output_path("root", config.root)
    out = cluster.output_path("out", config.out, remote=True) if config.out else ""
    if config.report and not os.path.isdir(os.path.dirname(os.path.abspath(config.report))):
        raise UserError(f"report={config.report}: there is no such folder")
    findings: list[Finding] = []

    def check(name: str, function: Callable[..., Findings], *arguments: Any) -> None:
        print(f"doctor: {name} ...", file=sys.stderr, flush=True)
        findings.extend(found._replace(check=name) for found in examined(function, *arguments))

    started = start(config.ray)
    check("ray", lambda: started.findings)
    nodes = Nodes(config.limit) if started.up else None
    ask: Ask = nodes.ask if nodes else alone
    try:
        check("versions", lambda: versions(_versions(), ask(_versions)))
        check("cpus", cpus, ask, nodes.resources if nodes else {})
        check("gpus", gpus, ask, nodes.resources if nodes else {})
        check("kernels", kernels, ask)
        check("memory, disk", limits, ask, nodes.resources if nodes else {})
        check("clock", clock, ask, out)
        check("gloo", collectives, nodes, "gloo")
        check("nccl", collectives, nodes, "nccl")
        check("root", folder, ask, root)
        check("out", folder, ask, out)
        check("mlflow", mlflow, ask, config)
        check("weights", weights, ask)
        speeds = Speeds()
        check("model", model, ask, config, started.share, speeds)
        check("source", source, ask, config, speeds)
        check("estimate", estimate, started.share, speeds)
    finally:
        if nodes:
            nodes.close()
    return findings


def examined(function: Callable[..., Findings], *arguments: Any) -> list[Finding]:
    """What a check finds; that it breaks off is a finding, too."""
    findings: list[Finding] = []
    try:
        for finding in function(*arguments):
            findings.append(finding._replace(found=redact(finding.found)))
    except Exception as error:  # noqa: BLE001 - the boundary: whatever goes wrong is what is looked for
        findings.append(failure(DRIVER, error))
    return findings


def table(findings: Sequence[Finding], width: int = 0) -> str:
    """Aligned columns, texts wrapped; nodes of which the same is to be said have one row."""
    every = {finding.node for finding in findings} - {DRIVER}
    same: dict[Finding, list[str]] = {}
    for finding in findings:
        same.setdefault(finding._replace(node=""), []).append(finding.node)
    rows = [("check", "node", "state", "found", "what to do")]
    for finding, nodes in same.items():
        where = f"all {len(nodes)}" if len(nodes) > 1 and set(nodes) == every else ", ".join(nodes)
        rows.append((finding.check, where, finding.state, finding.found, finding.advice))
    narrow = [max(len(row[column]) for row in rows) for column in range(3)]
    narrow[1] = min(narrow[1], 32)
    rest = (width or max(100, shutil.get_terminal_size((160, 24)).columns)) - sum(narrow) - 8
    widths = [*narrow, rest * 3 // 5, rest * 2 // 5]
    lines = []
    for row in rows:
        # paths, addresses and commands are not to be broken, or nobody could copy them
        cells = [
            textwrap.wrap(cell, limit, break_long_words=False, break_on_hyphens=False) or [""]
            for cell, limit in zip(row, widths, strict=True)
        ]
        for number in range(max(map(len, cells))):
            parts = [cell[number] if number < len(cell) else "" for cell in cells]
            lines.append("  ".join(part.ljust(limit) for part, limit in zip(parts, widths, strict=True)).rstrip())
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


# --- Ray ------------------------------------------------------------------------------------------


class Started(NamedTuple):
    up: bool
    share: cluster.Share | None
    findings: list[Finding]


def start(config: Ray) -> Started:
    """Join or start Ray as every job does."""
    import ray

    share, problems = None, []
    host, _, port = os.environ.get("RAY_ADDRESS", "").rpartition(":")
    try:
        if host and port.isdigit() and "//" not in host:  # Ray itself would try for some four minutes
            _reach(host, int(port))
        share = cluster.start(config)
    except Exception as error:  # noqa: BLE001 - the boundary: the other checks go on without Ray, or without a share
        advice = "see that $RAY_ADDRESS is that of a running cluster, with the same RAY_AUTH_MODE and token"
        advice = "" if isinstance(error, UserError) else advice
        problems.append(failure(DRIVER, error, advice))
    if not ray.is_initialized():
        return Started(False, None, problems)
    alive = [node for node in ray.nodes() if node["Alive"]]
    joined = "joined" if "RAY_ADDRESS" in os.environ or cluster.in_ray_job() else "started here"
    found = f"Ray {ray.__version__}, {joined}, {_count(len(alive), 'node')}"
    if share:
        problems.append(Finding(DRIVER, "ok", f"{found}; a job gets {share.text}"))
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    outside = sorted({node["NodeName"] for node in alive if not _loopback(node["NodeManagerAddress"])})
    if is_token_auth_enabled():
        problems.append(Finding(DRIVER, "ok", "token authentication is on"))
    elif joined == "started here" or not outside:
        problems.append(Finding(DRIVER, "ok", "no token authentication, on loopback alone"))
    else:
        advice = "ray get-auth-token --generate, and RAY_AUTH_MODE=token on every node before ray start"
        text = f"no token authentication: whoever reaches {', '.join(outside[:3])} can run code there"
        problems.append(Finding(DRIVER, "warning", text, advice))
    return Started(True, share, problems)


def _reach(host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        advice = "start Ray there (ray start --head), open the port, or unset RAY_ADDRESS"
        raise UserError(f"$RAY_ADDRESS={host}:{port} can't be reached ({error}); {advice}") from None


def _loopback(address: str) -> bool:
    return address.startswith("127.") or address in ("::1", "localhost")


# --- the machine ------------------------------------------------------------------------------------------------


def versions(mine: dict[str, str], theirs: dict[str, Any]) -> Iterator[Finding]:
    """Whether nodes have what the driver has."""
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
            yield Finding(node, "ok", "as the driver's")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    digest = hashlib.sha256()
    for part in (native.SOURCE.parent, Path(__file__).parents[1]):
        for path in sorted(part.rglob("*.py")):
            digest.update(str(path.relative_to(part)).encode() + path.read_bytes())
    return found | {"code": digest.hexdigest()[:8]}


def cpus(ask: Ask, resources: dict[str, dict[str, float]]) -> Iterator[Finding]:
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
    """Logical, physical, and those that this process may use, by its affinity and its cgroup."""
    logical = os.cpu_count() or 1
    usable = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical)
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file() and (words := quota.read_text().split())[0] != "max":
        usable = min(usable, int(words[0]) / int(words[1]))
    return logical, psutil.cpu_count(logical=False) or logical, usable


def gpus(ask: Ask, resources: dict[str, dict[str, float]]) -> Iterator[Finding]:
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
    """What nvidia-smi tells, the CUDA that PyTorch was built for, and the GPUs that it sees, each with an error."""
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
    for node, error in ask(_kernels).items():
        if isinstance(error, native.NoKernels):
            yield failure(node, error, "install g++: encoding on CPUs is two to three times as fast")._replace(
                state="warning"
            )
        elif isinstance(error, BaseException):
            yield failure(node, error)
        elif error > 1e-4:
            advice = "kernels=torch does without; remove ~/.cache/litevae or try another compiler in CXX"
            yield Finding(node, "failed", f"own CPU kernels are off by {error:.1g} of the largest value", advice)
        else:
            yield Finding(node, "ok", f"own CPU kernels, equal to PyTorch's to {error:.1g} of the largest value")


@torch.no_grad()
def _kernels() -> float:
    """The error of the native kernels, relative to the largest value."""
    generator = torch.Generator().manual_seed(0)
    conv, norm = torch.nn.Conv2d(32, 32, 3, padding=1), torch.nn.GroupNorm(8, 32)
    x = torch.randn(2, 32, 25, 31, generator=generator).contiguous(memory_format=torch.channels_last)
    exact = conv(torch.nn.functional.silu(norm(x)))
    ours = native.FastConv2d(conv)(native.norm_silu(x, norm))
    return float((ours - exact).abs().max() / exact.abs().max())


def limits(ask: Ask, resources: dict[str, dict[str, float]]) -> Iterator[Finding]:
    nodes, lost = answered(ask(_limits))
    yield from lost
    for node, (memory, files, temp, free, shm) in nodes.items():
        store = resources.get(node, {}).get("object_store_memory", 0)
        about = f"{memory / GB:.0f} GB of memory free, {free / GB:.0f} GB in {temp}, {files} open files"
        problems = []
        if free < LITTLE_DISK:
            problems.append((f"{free / GB:.1f} GB free in {temp}, Ray's folder", "make room, or ray start --temp-dir"))
        if files < OPEN_FILES:
            problems.append((f"only {files} open files a process", "ulimit -n 65536 before ray start"))
        if shm < LITTLE_SHM * store:
            text = f"/dev/shm has {shm / GB:.1f} GB, Ray's object store is to have {store / GB:.1f}"
            problems.append((text, "a larger one (docker run --shm-size), or ray start --object-store-memory"))
        for text, advice in problems:
            yield Finding(node, "warning", text, advice)
        if not problems:
            yield Finding(node, "ok", about)


def _limits() -> tuple[int, int, str, int, int]:
    """Free memory, open files, Ray's folder and what is free there, the size of /dev/shm."""
    import resource

    import ray

    node = ray._private.worker._global_node  # Ray has no public way to ask
    temp = node.get_session_dir_path() if node else tempfile.gettempdir()
    shm = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return psutil.virtual_memory().available, files, temp, shutil.disk_usage(temp).free, shm


def clock(ask: Ask, out: str) -> Iterator[Finding]:
    """Clocks against the driver's: of several exchanges the tightest bounds count."""
    bounds: dict[str, list[tuple[float, float]]] = {}
    for _ in range(5):
        before = time.time()
        nodes, lost = answered(ask(time.time))
        after = time.time()
        for node, there in nodes.items():
            bounds.setdefault(node, []).append((there - after, there - before))
    yield from lost
    yield from skews({node: (max(b[0] for b in found), min(b[1] for b in found)) for node, found in bounds.items()})
    if storage.remote(out):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        request = urllib.request.Request(endpoint or "https://s3.amazonaws.com", method="HEAD")
        before = time.time()
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                date = answer.headers["Date"]
        except urllib.error.HTTPError as error:  # it may well refuse; it tells the time
            date = error.headers["Date"]
        except OSError as error:
            raise UserError(f"{request.full_url} can't be reached ({error}); check AWS_ENDPOINT_URL") from None
        if date:
            there = parsedate_to_datetime(date).timestamp()  # a whole second, cut off
            yield from skews({"S3": (there - time.time(), there + 1 - before)})


def skews(bounds: dict[str, tuple[float, float]]) -> Iterator[Finding]:
    """
    Args:
        bounds: of how much a clock is ahead of the driver's, in seconds.
    """
    for node, (low, high) in bounds.items():
        sure = max(0.0, low, -high)  # what it is off at least
        text = f"{(low + high) / 2:+.2f} s from the driver's, within {(high - low) / 2:.2f} s"
        state: State = "failed" if sure > SKEW[1] else "warning" if sure > SKEW[0] else "ok"
        yield Finding(node, state, text, "set it by NTP (chronyd, timedatectl)" if sure > SKEW[0] else "")


# --- processes that compute together ----------------------------------------------------------------------------


def collectives(nodes: Nodes | None, backend: Literal["gloo", "nccl"]) -> Iterator[Finding]:
    """A process group over all nodes, as Ray Train makes one: on CPUs, or with a GPU of each node that has one."""
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
        text = f"all_reduce over {len(found)} processes on {_count(len(names), 'node')}, {speed:,.0f} MB/s"
        if wrong:
            yield Finding(", ".join(wrong), "failed", "all_reduce gave a wrong sum", "see memory and network cards")
        elif speed < LINK:
            yield Finding(DRIVER, "warning", text, "training over these nodes waits for gradients: a faster network")
        else:
            yield Finding(DRIVER, "ok", text)


def rank(number: int, ranks: int, address: str, backend: str, apart: bool, seconds: float) -> tuple[bool, float]:
    """One process of a group: whether an all_reduce was right, and its bus bandwidth in MB/s.

    Args:
        apart: whether ranks take GPUs of one machine, each its own.
        seconds: how long others are waited for.
    """
    device = torch.device("cuda", number if apart else 0) if backend == "nccl" else torch.device("cpu")
    size, times = 4 * 2**20, []  # 16 MB
    limit = timedelta(seconds=seconds)
    try:
        dist.init_process_group(backend, f"tcp://{address}", timeout=limit, world_size=ranks, rank=number)
    except dist.DistError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"not all of {ranks} processes reach the first one at {address} ({reason})") from None
    try:
        right = True
        for _ in range(4):
            # small: sums over a thousand ranks are exact in fp32
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


# --- storage ----------------------------------------------------------------------------------------------------


def folder(ask: Ask, path: str) -> Iterator[Finding]:
    """Whether all nodes write there, see each other's files, and find one winner when they race for a name."""
    if not path:
        yield Finding(DRIVER, "skipped", "not given")
        return
    made = not storage.remote(path) and not os.path.isdir(path)
    mark, nonce = storage.join(path, f".doctor-{secrets.token_hex(8)}"), secrets.token_hex(8)
    try:
        storage.put(storage.join(mark, DRIVER), nonce.encode())
        answers, lost = answered(ask(_reply, mark, nonce))
        yield from lost
        advice = "give a folder that all nodes share (NFS, EFS ...)" + (
            ", or s3:// for a cache" if not storage.remote(path) else ""
        )
        apart = [node for node, name in answers.items() if not name or _missing(storage.join(mark, name), nonce)]
        for node in apart:
            what = "sees nothing of what the driver wrote" if not answers[node] else "writes what the driver can't see"
            yield Finding(node, "failed", f"{path} is not shared: this node {what}", advice)
        if apart or lost:
            yield Finding(DRIVER, "skipped", f"{path}: the race for a name, as not all nodes are in it")
            return
        yield Finding(DRIVER, "ok", f"{path} is seen and written by the driver and {_count(len(answers), 'node')}")
        yield from _raced(ask, mark, path)
        yield from _speeds(ask, mark, path)
    finally:
        _clear(mark)
        if made and os.path.isdir(path) and not os.listdir(path):
            os.rmdir(path)


def _missing(path: str, nonce: str) -> bool:
    try:
        return storage.read(path) != nonce.encode()
    except FileNotFoundError:
        return True


def _clear(mark: str) -> None:
    if storage.remote(mark):
        try:
            for name in storage.names(mark):
                storage.remove(storage.join(mark, name))
        except UserError as error:  # a store that fails has been told of
            print(f"doctor: {mark} may have been left ({error})", file=sys.stderr)
    else:
        shutil.rmtree(mark, ignore_errors=True)


def _reply(mark: str, nonce: str) -> str:
    """On a node: the name of a file that it wrote; empty where it does not see the driver's."""
    if _missing(storage.join(mark, DRIVER), nonce):
        return ""
    name = f"node-{secrets.token_hex(8)}"
    storage.put(storage.join(mark, name), nonce.encode())
    return name


def _raced(ask: Ask, mark: str, path: str) -> Iterator[Finding]:
    nodes, lost = answered(ask(_race, mark))
    yield from lost
    wins = [[winner for found in nodes.values() for winner in found[number]] for number in range(ROUNDS)]
    held = [storage.read(storage.join(mark, f"race-{number}")).decode() for number in range(ROUNDS)]
    racers = len(nodes) * THREADS
    if any(winners != [holder] for winners, holder in zip(wins, held, strict=True)):
        text = f"of {racers} writers of one new name in {path} {', '.join(str(len(w)) for w in wins)} won, not one each"
        advice = "writers of a cache may overwrite each other: take a store that knows If-None-Match (S3, Ceph, MinIO)"
        if not storage.remote(path):
            advice = "take a file system on which hard links are exclusive among nodes (NFS from version 3 on)"
        yield Finding(DRIVER, "failed", text, advice)
    elif not lost:
        yield Finding(DRIVER, "ok", f"of {racers} writers of one new name exactly one wins, {ROUNDS} times")


def _race(mark: str) -> list[list[str]]:
    """On a node: the threads that won each name."""
    wins: list[list[str]] = []
    problems: list[BaseException] = []
    for number in range(ROUNDS):
        won: list[str] = []
        together = threading.Barrier(THREADS)

        def enter(name: str, won: list[str], together: threading.Barrier) -> None:
            writer = secrets.token_hex(8)
            try:
                together.wait()
                if storage.put_new(name, writer.encode()):
                    won.append(writer)
            except Exception as error:  # noqa: BLE001 - raised again below
                problems.append(error)

        arguments = (storage.join(mark, f"race-{number}"), won, together)
        threads = [threading.Thread(target=enter, args=arguments) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if problems:
            raise problems[0]
        wins.append(won)
    return wins


def _speeds(ask: Ask, mark: str, path: str) -> Iterator[Finding]:
    nodes, lost = answered(ask(_throughput, mark))
    yield from lost
    for node, (write, read, torn) in nodes.items():
        text = f"{write:,.0f} MB/s written" + (f", {read:,.0f} read" if storage.remote(path) else ", to the disk")
        if torn:
            advice = "take a file system with atomic renames"
            yield Finding(node, "failed", f"{torn} readers of {path} saw a file in part while it was replaced", advice)
        if not storage.remote(path):
            free = shutil.disk_usage(path).free
            text += f", {free / GB:,.0f} GB free"
            if free < LITTLE_DISK:
                yield Finding(node, "warning", text, f"make room in {path}, or take another folder")
                continue
        yield Finding(node, "ok", text)


def _throughput(mark: str) -> tuple[float, float, int]:
    """On a node: MB/s of a 16 MB file written and read, and how often one that is being replaced was seen in part."""
    path = storage.join(mark, f"speed-{secrets.token_hex(8)}")
    data = os.urandom(16 * 2**20)
    begun = time.perf_counter()
    storage.put(path, data)
    written = time.perf_counter()
    if storage.read(path) != data:
        raise UserError(f"{path} does not hold what was written; look for damage of this storage")
    read = time.perf_counter()
    whole = [bytes([letter]) * 2**18 for letter in b"ab"]
    storage.put(path, whole[0])
    torn: list[bytes] = []
    end = threading.Event()

    def look() -> None:
        while not end.is_set():
            if (seen := storage.read(path)) not in whole:
                torn.append(seen)

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for number in range(10):
            storage.put(path, whole[number % 2])
    finally:
        end.set()
        reader.join()
        storage.remove(path)
    return len(data) / (written - begun) / 1e6, len(data) / (read - written) / 1e6, len(torn)


# --- MLflow -----------------------------------------------------------------------------------------------------


def mlflow(ask: Ask, config: Tracked) -> Iterator[Finding]:
    """A run in the experiment litevae-doctor: made here, logged to by every node, read, and deleted."""
    if not config.tracking.enabled:
        yield Finding(DRIVER, "skipped", "tracking.enabled=false")
        return
    uri = mlflow_run.tracking_uri(config.tracking, config.root)
    begun = time.monotonic()

    def asked(what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except Exception as error:  # noqa: BLE001 - the boundary: whatever MLflow raises
            reason = textwrap.shorten(redact(mlflow_run._cause(error)), 200)
            advice = "is the server up, and may this user write there? tracking.uri=..., or tracking.enabled=false"
            raise UserError(f"{redact(uri)}: {what} fails ({reason.replace('; ', ', ')}); {advice}") from None

    def open_run() -> tuple[Any, str]:
        client = mlflow_run._client(uri)
        handle = mlflow_run.RunHandle(uri, None, "litevae-doctor", config.root)
        experiment = mlflow_run._experiment(client, handle, config.root)
        return client, client.create_run(experiment, run_name="doctor").info.run_id

    client, run_id = asked("making a run", open_run)
    try:
        nodes, lost = answered(ask(_log, uri, run_id), "each node has to reach it: rank 0 may be there")
        yield from lost
        arrived = asked("reading it", client.get_run, run_id).data.metrics
        for node, key in nodes.items():
            if key not in arrived:
                advice = (
                    "SQLite has to lie on a folder that all nodes share; or start a server, tracking.uri=http://..."
                )
                yield Finding(node, "failed", f"{redact(uri)}: what this node logs does not arrive", advice)
        asked("keeping a file", client.log_text, run_id, "written by the doctor", "doctor.txt")
    finally:
        asked("deleting it", client.delete_run, run_id)
    text = f"{redact(uri)}: a run was made, logged to, read and deleted in {time.monotonic() - begun:.1f} s"
    yield Finding(DRIVER, "ok", text)


def _log(uri: str, run_id: str) -> str:
    """On a node: the name of a metric that it logged."""
    key = f"doctor-{secrets.token_hex(8)}"
    try:
        mlflow_run._client(uri).log_metric(run_id, key, 1.0)
    except Exception as error:  # noqa: BLE001 - the boundary: whatever MLflow raises
        raise UserError(
            f"{redact(uri)}: logging fails ({textwrap.shorten(redact(mlflow_run._cause(error)), 200)})"
        ) from None
    return key


# --- weights, images and how fast they are ----------------------------------------------------------------------


class Speeds:
    """What the estimate takes: images of the source, and images/s of each node."""

    def __init__(self) -> None:
        self.images = 0
        self.decode: list[float] = []  # by one core
        self.encode: list[float] = []  # by one worker


def weights(ask: Ask) -> Iterator[Finding]:
    """What LPIPS and FID are computed with, where the jobs look for it."""
    nodes, lost = answered(ask(_weights))
    yield from lost
    for node, found in nodes.items():
        for what, name, missing in found:
            if missing:
                problem = failure(node, UserError(missing))
                yield problem._replace(state="warning", found=f"{problem.found} ({what} is left out)")
            elif "on other weights" in name:
                yield Finding(node, "warning", f"{name}: not the published file", "fetch it again")
            else:
                yield Finding(node, "ok", f"{name}: the published weights")


def _weights() -> list[tuple[str, str, str]]:
    found = []
    for what, load in (("LPIPS", load_lpips), ("FID", Inception)):
        try:
            found.append((what, load().name, ""))
        except WeightsMissing as error:
            found.append((what, "", str(error)))
    return found


def model(ask: Ask, config: Doctor, share: cluster.Share | None, speeds: Speeds) -> Iterator[Finding]:
    """Whether all nodes have the same model, and how fast a worker encodes with it there."""
    if not config.model:
        yield Finding(DRIVER, "skipped", "not given")
        return
    path = os.path.abspath(config.model)
    mine = fingerprint(path)
    nodes, lost = answered(ask(fingerprint, path), "give a model folder that all nodes share")
    yield from lost
    for node, theirs in nodes.items():
        if theirs != mine:
            text = f"{path} there is another model ({theirs[:8]}) than the driver's ({mine[:8]})"
            yield Finding(node, "failed", text, "copy the driver's there, or give a folder that all nodes share")
    if lost or any(theirs != mine for theirs in nodes.values()):
        return
    yield Finding(DRIVER, "ok", f"{path} ({mine[:8]}), the same on {_count(len(nodes), 'node')}")
    threads = share.threads if share else os.cpu_count() or 1
    timed, lost = answered(ask(_encode, path, config.transform.resolution, config.batch_size, threads))
    yield from lost
    for node, (speed, how) in timed.items():
        speeds.encode.append(speed)
        yield Finding(node, "ok", f"{speed:,.1f} images/s a worker at {config.transform.resolution} px, {how}")


@torch.inference_mode()
def _encode(path: str, resolution: int, batch_size: int, threads: int) -> tuple[float, str]:
    """On a node: images/s of an encoder, and how."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(threads)
    by = best_kernels(device)
    vae = prepared(load_autoencoder(path), device, by)
    pixels = np.random.default_rng(0).integers(0, 256, (batch_size, resolution, resolution, 3), dtype=np.uint8)
    x = to_tensor(pixels).to(device)
    times: list[float] = []
    with autocast(device, "auto"):
        how = "bf16" if torch.is_autocast_enabled(device.type) else "fp32"
        encode_latents(vae, x if device.type == "cuda" else x[:1])  # the first one takes longer
        while len(times) < 2 or (sum(times) < 2 and len(times) < 20):
            begun = time.perf_counter()
            encode_latents(vae, x).cpu()
            times.append(time.perf_counter() - begun)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{threads} CPU threads"
    return batch_size / sorted(times)[len(times) // 2], f"{where}, {how}, {by} kernels"


def source(ask: Ask, config: Doctor, speeds: Speeds) -> Iterator[Finding]:
    """Whether all nodes can read the images, and how fast a core decodes them."""
    if not config.source.uri:
        yield Finding(DRIVER, "skipped", "not given")
        return
    begun = time.monotonic()
    found = open_source(config.source)
    speeds.images = found.units
    text = f"{found.uri}: {found.units:,} images ({found.kind}), listed in {time.monotonic() - begun:.1f} s"
    yield Finding(DRIVER, "ok", text)
    sample = image_batches.spaced(range(found.units), min(config.images, found.units))
    parts = [found.part(unit, unit + 1) for unit in sample]
    transform = ImageTransform(config.transform.resolution, config.transform.resize, decode="fast")
    nodes, lost = answered(ask(_decode, parts, transform))
    yield from lost
    for node, (good, bad, example, read, decode) in nodes.items():
        count = sum(bad.values())
        reasons = ", ".join(f"{number} {reason}" for reason, number in bad.items())
        if not good:
            advice = "give a path that all nodes share, or s3://; else see the message"
            yield Finding(node, "failed", f"none of {count} images can be read: {reasons}; {example}", advice)
            continue
        speeds.decode.append(good / (read + decode))
        text = f"{good / decode:,.0f} images/s decoded by a core, {good / read:,.0f} read by one thread"
        if count:
            advice = "mend or remove them, or raise error_budget (encode, 0.01) or data.max_bad (training)"
            text = f"{count} of {good + count} images can't be read: {reasons}; {example}; else {text}"
            yield Finding(node, "warning", text, advice)
        else:
            yield Finding(node, "ok", text)


def _decode(parts: list[Source], transform: ImageTransform) -> tuple[int, dict[str, int], str, float, float]:
    """On a node: images decoded, reasons of the others and an example, seconds of reading and of decoding."""
    torch.set_num_threads(1)
    bad: Counter[str] = Counter()
    example, good, read, decode = "", 0, 0.0, 0.0
    for part in parts:
        begun = between = time.perf_counter()
        try:
            data = part.data(0)
            between = time.perf_counter()
            transform(data)
            good += 1
        except ImageError as error:
            bad[error.reason] += 1
            example = example or f"{part.id(0)}: {error}"
            continue
        read, decode = read + between - begun, decode + time.perf_counter() - between
    return good, dict(bad), example, read, decode


def estimate(share: cluster.Share | None, speeds: Speeds) -> Iterator[Finding]:
    """How long encoding the source takes: on CPUs decoding and encoding share the cores, on GPUs they overlap."""
    if not (share and speeds.images and speeds.encode and speeds.decode):
        yield Finding(DRIVER, "skipped", "takes Ray, a source and a model")
        return
    encode = share.workers * sum(speeds.encode) / len(speeds.encode)
    core = sum(speeds.decode) / len(speeds.decode)
    decode = core * (share.decoders if share.gpu else share.workers * share.threads)
    rate = min(encode, decode) if share.gpu else 1 / (1 / encode + 1 / decode)
    seconds = speeds.images / rate
    shown = f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:,.1f} minutes"
    slower = "encoding" if encode <= decode else "decoding"
    text = (
        f"{speeds.images:,} images take about {shown} with {share.text} (encoding {encode:,.1f} and decoding "
        f"{decode:,.0f} a second); {slower} is the bottleneck"
    )
    advice = "more ray.workers" if slower == "encoding" else "more CPUs or ray.decode_tasks, or transform.decode=scaled"
    yield Finding(DRIVER, "ok", text, advice if seconds >= 3600 else "")
