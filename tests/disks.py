"""Disks that are full when a test wants them to be: file systems in memory, of a few pages."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of that size (as `mount` takes it: 100k, 8m) at a new folder; skips where none can be."""
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]).returncode:
        pytest.skip("to mount a file system takes root")
    try:
        yield folder
    finally:
        # lazily: a process that is about to end may still have a file open there
        subprocess.run(["umount", "--lazy", folder], check=True)


def resize(folder: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)


def fill(folder: Path, left: int) -> Path:
    """A file that leaves so many bytes."""
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(max(0, free(folder) - left)))
    return ballast


def free(folder: Path) -> int:
    about = os.statvfs(folder)
    return about.f_bavail * about.f_frsize
