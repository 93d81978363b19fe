"""Limit the memory of a process, to test how much something needs.

A process's peak memory would say less: it also depends on what the allocator keeps for later, and on earlier use.
"""

import os
import re
import resource
from pathlib import Path

# For processes that call `allow`: large blocks are returned to the system when freed, so that they do not count.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "131072"}


def allow(size: float) -> None:
    """Let this process, a child of a test, allocate at most `size` bytes more than it has now."""
    has = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert has
    assert os.environ.items() >= EXACT.items()
    resource.setrlimit(resource.RLIMIT_DATA, (int(has[1]) * 1024 + int(size), resource.RLIM_INFINITY))
