"""Small file systems in memory, which a test can fill to see what happens on a full disk."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a file system of a size such as 100k or 8m (see `mount`) at a new folder. Skip the test if that fails."""
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield folder
    finally:
        # lazily: a process that is about to end may still have a file open there
        subprocess.run(["umount", "--lazy", folder], check=True)


def resize(folder: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)


def fill(folder: Path, left: int) -> Path:
    """Write a file that leaves so many bytes free, and return its path."""
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(max(0, free(folder) - left)))
    return ballast


def free(folder: Path) -> int:
    about = os.statvfs(folder)
    return about.f_bavail * about.f_frsize
