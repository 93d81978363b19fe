"""What this machine and process are: processor, versions of libraries, memory that something takes."""

import platform
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def processor() -> str:
    """The processor's name, or its architecture where the system does not tell the name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of these packages; those that are not installed as packages are left out."""
    found = {"python": platform.python_version()}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


class PeakMemory:
    """The most memory that was taken since this was made, beyond what was taken then.

    Of a GPU it is what PyTorch has allocated, of a process its resident memory.

    Attributes:
        before: bytes that were taken when this was made.

    Raises:
        OSError: the system does not tell a process's peak, or does not let it begin anew (Linux does).
    """

    def __init__(self, device: "torch.device"):
        self._cuda = device.type == "cuda"
        if self._cuda:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            self.before = process_memory("VmRSS")

    def bytes(self) -> int:
        """The peak so far."""
        if not self._cuda:
            return max(0, process_memory("VmHWM") - self.before)
        import torch

        return max(0, torch.cuda.max_memory_allocated() - self.before)


def process_memory(line: str, process: int | str = "self") -> int:
    """Bytes in a line of a process's /proc status.

    Args:
        line: "VmRSS", the resident memory now, or "VmHWM", its peak.
        process: its id; "self": this one.

    Raises:
        OSError: the system has no such process or line.
    """
    file = Path(f"/proc/{process}/status")
    for text in file.read_text().splitlines():
        if text.startswith(f"{line}:"):
            return 1024 * int(text.split()[1])
    raise OSError(f"{file} has no {line}")
