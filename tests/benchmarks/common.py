"""What the benchmarks share: photos, repeats, and tables in Markdown."""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps

from litevae import cache


def arguments(text: str, place: str, **numbers: int) -> argparse.ArgumentParser:
    """A parser of a folder and of --options with these defaults."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(place, type=Path)
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser


def jpegs(folder: Path) -> list[Path]:
    """Every JPEG below a folder, in order."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not found:
        sys.exit(f"{folder} holds no JPEGs")
    return found


def linked(files: Sequence[Path], count: int, folder: Path) -> Path:
    """A folder with so many of the files, again under other names: hard links, or copies where none can be."""
    folder.mkdir()
    for n in range(count):
        name = folder / f"{n:06d}.jpg"
        try:
            os.link(files[n % len(files)], name)
        except OSError:
            shutil.copyfile(files[n % len(files)], name)
    return folder


def mosaics(files: Sequence[Path], count: int, folder: Path) -> list[Path]:
    """JPEGs of 6000 x 4000 pixels, as cameras make them, each of 120 photos."""
    folder.mkdir()
    for n in range(count):
        whole = Image.new("RGB", (6000, 4000))
        for tile in range(120):
            with Image.open(files[(120 * n + tile) % len(files)]) as photo:
                part = ImageOps.fit(photo.convert("RGB"), (500, 400))
            whole.paste(part, (tile % 12 * 500, tile // 12 * 400))
        whole.save(folder / f"{n:03d}.jpg", quality=90)
    return jpegs(folder)


def synthetic_cache(folder: Path, rows: int, shape: Sequence[int], shard: int = 500, **model: str) -> None:
    """A cache of so many moments (C, h, w), normal numbers in fp16; `model` is what its manifest says of one."""
    how = cache.layout("moments", "float16")
    plan = {"model": model, "transform": {}, "latents": how, "precision": "fp32", "columns": {}}
    schema = cache.row_schema(pa.schema([]))
    same, none = dict.fromkeys(schema.names, 0) | {"flip": False}, cache.QUARANTINE.empty_table()
    for number, start in enumerate(range(0, rows, shard)):
        units = range(start, min(start + shard, rows))
        values = np.random.default_rng(start).standard_normal((len(units), *shape)).astype(np.float16)
        table = pa.Table.from_pylist([same | {"id": f"{unit:06d}", "unit": unit} for unit in units], schema=schema)
        cache.commit_shard(str(folder), number, (units.start, units.stop), how, table, [values], none)
    source = {"uri": "", "digest": "", "units": rows, "shards": -(-rows // shard)}
    cache.write_manifest(str(folder), plan, source, {})


def child(script: str, *arguments: object) -> subprocess.Popen:
    """A script as a process of its own, which prints a JSON object on its last line."""
    command = [sys.executable, script, *map(str, arguments)]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def result(process: subprocess.Popen) -> dict[str, Any]:
    out, problems = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(process.args)} failed:\n{out}{problems}")
    return json.loads(out.splitlines()[-1])


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median and range."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |", flush=True)


def environment(*packages: str) -> None:
    """One line: the machine, its load (a benchmark wants nothing else to run), and versions."""
    cpu, cpus = platform.machine(), Path("/proc/cpuinfo")
    if cpus.exists():
        names = [line.partition(":")[2].strip() for line in cpus.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{os.cpu_count()} x {cpu}; load {load}; Python {platform.python_version()}, {versions}\n", flush=True)


def log(text: str) -> None:
    """To stderr: what is printed is the table."""
    print(text, file=sys.stderr, flush=True)
