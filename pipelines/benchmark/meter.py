"""Measuring side by side: contenders in turn, medians and ranges, processes of their own, the machine's own limits."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from litevae.errors import UserError
from pipelines.benchmark.config import Benchmark
from pipelines.runtime import host

PACKAGES = (
    *("litevae", "torch", "torchvision", "diffusers", "ray", "pillow", "simplejpeg"),
    *("pyarrow", "numpy", "safetensors", "datasets"),
)


@dataclass
class Table:
    """A table of a report: cells are shown as they are; `samples` are what they were computed from, raw."""

    title: str
    how: str
    head: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    samples: dict[str, Any] = field(default_factory=dict)

    @property
    def markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        cells = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in lines)
        return f"### {self.title}\n\n{self.how}\n\n{cells}\n"


@dataclass(frozen=True)
class Setting:
    """Where a part measures.

    Attributes:
        place: a folder for files that are gone afterwards.
    """

    config: Benchmark
    device: torch.device
    threads: int
    place: Path

    def photos(self) -> list[Path]:
        """JPEGs: those of `source`, or scikit-image's photos, 400 to 640 pixels wide.

        Raises:
            UserError: the source holds none.
        """
        if self.config.source:
            found = sorted(p for p in Path(self.config.source).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
            if not found:
                raise UserError(f"source={self.config.source} holds no JPEGs")
            return found
        folder = self.place / "photos"
        if not folder.exists():
            from skimage import data

            folder.mkdir()
            for name in ("astronaut", "cat", "chelsea", "coffee", "rocket"):
                image = Image.fromarray(getattr(data, name)())
                for n, width in enumerate((400, 500, 640)):
                    size = (width, round(width * image.height / image.width))
                    image.resize(size, Image.Resampling.LANCZOS).save(folder / f"{name}-{n}.jpg", quality=90)
        return sorted(folder.iterdir())


def linked(files: Sequence[Path], count: int, folder: Path) -> Path:
    """A folder with so many of the files, again under other names: hard links, or copies where none can be."""
    folder.mkdir()
    for n in range(count):
        name, file = folder / f"{n:06d}.jpg", files[n % len(files)]
        try:
            os.link(file, name)
        except OSError:
            shutil.copyfile(file, name)
    return folder


def mosaics(
    files: Sequence[Path],
    count: int,
    folder: Path,
    tiles: tuple[int, int] = (12, 10),
    tile: tuple[int, int] = (500, 400),
) -> list[Path]:
    """JPEGs as large as cameras make them, 6000 x 4000 pixels, of 120 photos each; or of so many tiles of a size."""
    folder.mkdir()
    (across, down), (width, height) = tiles, tile
    for n in range(count):
        whole = Image.new("RGB", (across * width, down * height))
        for place in range(across * down):
            with Image.open(files[(across * down * n + place) % len(files)]) as photo:
                part = ImageOps.fit(photo.convert("RGB"), tile)
            whole.paste(part, (place % across * width, place // across * height))
        whole.save(folder / f"{n:03d}.jpg", quality=90)
    return sorted(folder.iterdir())


def rounds(
    contenders: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    device: str = "cpu",
    clock: Callable[[], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call, contenders in turn (A B C A B C ...), so that a machine that drifts drifts for all.

    Args:
        clock: seconds of what is measured; None: of the device's wall time.
    """
    clock = clock or partial(now, device)
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for n in range(warmup + repeats):
        for name, call in contenders.items():
            start = clock()
            call()
            seconds = clock() - start
            if n >= warmup:
                found[name].append(seconds)
    return found


def now(device: str | torch.device = "cpu") -> float:
    """Seconds, once the device has done all that it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def rates(seconds: Iterable[float], items: float) -> list[float]:
    return [items / value for value in seconds]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median and range, or the only one."""
    low, high = min(values), max(values)
    if len(values) == 1:
        return f"{low:,.{digits}f}"
    return f"{statistics.median(values):,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Of two contenders' samples of the same rounds: the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


# --- processes --------------------------------------------------------------------------------------------------


class Child:
    """A process that answers requests, one JSON object a line: `serve` is its other end. What one contender leaves in
    memory counts for no other, and all are there at the same time, to be measured in turn."""

    def __init__(self, module: str, *arguments: object, environment: Mapping[str, str | None] | None = None):
        """
        Args:
            environment: variables beside this process's; None: without that one.
        """
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(environment or {})}
        command = [sys.executable, "-m", module, *map(str, arguments)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={name: value for name, value in variables.items() if value is not None},
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """
        Raises:
            UserError: what the process says of a request that it can't do, or that it ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self._process.wait()
            why = "most likely memory did not suffice" if code < 0 else "what it says of that is above"
            raise UserError(f"a measuring process ended (exit code {code}); {why}")
        found = json.loads(answer)
        if "error" in found:
            raise UserError(found["error"])
        return found

    def close(self) -> None:
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # it has ended, and did not read all
                self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer a `Child`'s requests until it closes. What is printed meanwhile goes to stderr."""
    with _stdout_is_ours() as out:
        for line in sys.stdin:
            try:
                found = answer(json.loads(line))
            except UserError as error:
                found = {"error": str(error)}
            out.write(json.dumps(found) + "\n")
            out.flush()


@contextmanager
def _stdout_is_ours() -> Iterator[Any]:
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        yield out


# --- the machine --------------------------------------------------------------------------------------------------


def limits(device: torch.device, dtype: torch.dtype = torch.float32, seconds: float = 1.0) -> dict[str, float]:
    """What the machine can do at most, as measured: `copy`, bytes/s read and written by a copy that no cache holds, and
    `matrix`, FLOP/s of a product of square matrices."""
    large = torch.empty(2**28 // dtype.itemsize, dtype=dtype, device=device)  # 256 MiB
    other = torch.empty_like(large).copy_(large.normal_())  # not zeros, which take less power, and so less time
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    copy = min(_repeated(lambda: other.copy_(large), device, seconds))
    matrix = min(_repeated(lambda: torch.mm(a, b, out=out), device, seconds))
    return {"copy": 2 * large.nbytes / copy, "matrix": 2 * side**3 / matrix}


def _repeated(call: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    call()
    found: list[float] = []
    while sum(found) < seconds or len(found) < 3:
        start = now(device)
        call()
        found.append(now(device) - start)
    return found


def environment(device: torch.device, threads: int) -> dict[str, Any]:
    """The machine and the versions that a measurement holds for."""
    return {
        "processor": host.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "load": [round(value, 2) for value in os.getloadavg()],
        "versions": host.versions(PACKAGES),
    }
