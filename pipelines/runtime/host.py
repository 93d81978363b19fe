"""Facts about this machine and process: processor, versions of libraries, and peak memory."""

import platform
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def processor() -> str:
    """Return the name of the processor, or its architecture if the system does not report a name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python and of these packages. Packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def now(device: "str | torch.device" = "cpu") -> float:
    """Return a time in seconds, once the device has finished all work that it was given."""
    if str(device).startswith("cuda"):
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


class PeakMemory:
    """A meter of peak memory: the most that was in use since it was created, minus what was in use then.

    On a GPU it measures the memory that PyTorch has allocated, on a CPU the resident memory of this process.

    Args:
        device: the device to measure.

    Attributes:
        before: bytes in use when the meter was created.

    Raises:
        OSError: if the system does not report the peak of a process, or can't reset it (Linux can).
    """

    def __init__(self, device: "torch.device"):
        self._cuda = device.type == "cuda"
        if self._cuda:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            self.before = process_memory("VmRSS")

    def bytes(self) -> int:
        """Return the peak so far, in bytes."""
        if not self._cuda:
            return max(0, process_memory("VmHWM") - self.before)
        import torch

        return max(0, torch.cuda.max_memory_allocated() - self.before)


def process_memory(line: str, process: int | str = "self") -> int:
    """Return the memory of a process in bytes, as /proc/<process>/status reports it.

    Args:
        line: "VmRSS" for the present resident memory, or "VmHWM" for its peak.
        process: a process id, or "self" for this process.

    Raises:
        OSError: if the system has no such process or line.
    """
    file = Path(f"/proc/{process}/status")
    for text in file.read_text().splitlines():
        if text.startswith(f"{line}:"):
            return 1024 * int(text.split()[1])
    raise OSError(f"{file} has no {line}")
