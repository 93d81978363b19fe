"""How much memory something takes, by a limit that the system keeps: what a process has at its peak depends on what the
allocator keeps for later, and on what it was given before."""

import os
import re
import resource
from pathlib import Path

# For processes that call `allow`: large blocks that are freed are given back at once, so that no freed one counts.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "131072"}


def allow(size: float) -> None:
    """From now on this process, a child of a test, may have so many bytes more than it has; asking for more fails."""
    has = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert has
    assert os.environ.items() >= EXACT.items()
    resource.setrlimit(resource.RLIMIT_DATA, (int(has[1]) * 1024 + int(size), resource.RLIM_INFINITY))
