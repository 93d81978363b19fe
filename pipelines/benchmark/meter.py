"""Tools to compare contenders: rounds in turn, medians and ranges, separate processes, and the machine's limits."""

import json
import os
import shutil
import statistics
import subprocess
import sys
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
from pipelines.runtime.host import now

PACKAGES = (
    *("litevae", "torch", "torchvision", "diffusers", "ray", "pillow", "simplejpeg"),
    *("pyarrow", "numpy", "safetensors", "datasets"),
)


@dataclass
class ReportTable:
    """A table of the report.

    Attributes:
        title: the title.
        how: how it was measured.
        head: the columns' titles.
        rows: the cells, as they are shown.
        samples: the raw measurements from which the cells were computed.
    """

    title: str
    how: str
    head: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    samples: dict[str, Any] = field(default_factory=dict)

    @property
    def markdown(self) -> str:
        """The table with its title in Markdown."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        cells = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in lines)
        return f"### {self.title}\n\n{self.how}\n\n{cells}\n"


@dataclass(frozen=True)
class Setting:
    """What each part of the benchmark gets.

    Attributes:
        config: the job's config.
        device: the device to measure.
        threads: CPU threads.
        place: a folder for temporary files.
    """

    config: Benchmark
    device: torch.device
    threads: int
    place: Path

    def photos(self) -> list[Path]:
        """Return the JPEGs of `source`, or scikit-image's photos at widths from 400 to 640 pixels.

        Raises:
            UserError: if the source holds no JPEGs.
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
    """Make a folder with `count` files by repeating the given ones: as hard links, or as copies if links fail."""
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
    """Make JPEGs of a camera's size (by default 6000 x 4000 pixels), each a mosaic of photos.

    Args:
        files: the photos.
        count: the number of mosaics.
        folder: where they are made.
        tiles: columns and rows of photos.
        tile: width and height of each photo in the mosaic, in pixels.
    """
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
    """Time the calls of contenders in turn (A B C A B C ...), so that a drift of the machine affects all of them.

    Args:
        contenders: the calls by name.
        repeats: timed rounds.
        warmup: rounds before them that are not timed.
        device: the device to wait for before the clock is read.
        clock: returns the seconds to measure; None: wall time, read when the device has finished its work.

    Returns:
        The seconds of each call, by contender.
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


def rates(seconds: Iterable[float], items: float) -> list[float]:
    """Convert the seconds of calls that each handle `items` items to items per second."""
    return [items / value for value in seconds]


def median_and_range(values: Sequence[float], digits: int = 1) -> str:
    """Format values as their median and range; a single value is shown as it is."""
    low, high = min(values), max(values)
    if len(values) == 1:
        return f"{low:,.{digits}f}"
    return f"{statistics.median(values):,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of the ratios ours / theirs, where both have one sample from each round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


# --- processes --------------------------------------------------------------------------------------------------


class Child:
    """A process that answers requests as lines of JSON; `serve` is its other end.

    Each contender has its own process. So memory that one of them leaves behind does not count for another, and all of
    them exist at the same time and can be measured in turn.
    """

    def __init__(self, module: str, *arguments: object, environment: Mapping[str, str | None] | None = None):
        """Start the process as `python -m module arguments...`.

        Args:
            module: the module to run, which calls `serve`.
            arguments: its arguments.
            environment: variables that are added to this process's; a value of None removes the variable.
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
        """Send a request and return the answer.

        Raises:
            UserError: if the process answered with an error, or it has ended.
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
            why = "it probably ran out of memory" if code < 0 else "see its output above"
            raise UserError(f"a measuring process ended (exit code {code}); {why}")
        found = json.loads(answer)
        if "error" in found:
            raise UserError(found["error"])
        return found

    def close(self) -> None:
        """Let the process end; it is killed if it does not end within 30 seconds."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # the process has ended without reading everything
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
    """Answer a `Child`'s requests until it closes. Anything that is printed in between goes to stderr."""
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
    """Yield a file for the real stdout, and redirect stdout itself to stderr, also for native code."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        yield out


# --- the machine --------------------------------------------------------------------------------------------------


def limits(device: torch.device, dtype: torch.dtype = torch.float32, seconds: float = 1.0) -> dict[str, float]:
    """Measure the limits of the machine.

    Args:
        device: the device to measure.
        dtype: type of the numbers.
        seconds: how long each limit is measured.

    Returns:
        `copy`: bytes/s read and written by a copy that is too large for caches. `matrix`: FLOP/s of a product of square
        matrices.
    """
    large = torch.empty(2**28 // dtype.itemsize, dtype=dtype, device=device)  # 256 MiB
    other = torch.empty_like(large).copy_(large.normal_())  # not zeros, which need less power and so less time
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    copy = min(_repeated(lambda: other.copy_(large), device, seconds))
    matrix = min(_repeated(lambda: torch.mm(a, b, out=out), device, seconds))
    return {"copy": 2 * large.nbytes / copy, "matrix": 2 * side**3 / matrix}


def _repeated(call: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Time a call again and again, after one warm-up, for this many seconds but at least three times."""
    call()
    found: list[float] = []
    while sum(found) < seconds or len(found) < 3:
        start = now(device)
        call()
        found.append(now(device) - start)
    return found


def environment(device: torch.device, threads: int) -> dict[str, Any]:
    """Describe the machine and the package versions for which a measurement is valid."""
    return {
        "processor": host.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "load": [round(value, 2) for value in os.getloadavg()],
        "versions": host.versions(PACKAGES),
    }
