"""Compare the latent loader with safetensors, one .npy file per row, and `datasets`, in rows/s in random order.

Every run is a process of its own with one thread (`python -m pipelines.benchmark.loader READER FOLDER ROWS`). It reads
one epoch after all files were removed from the page cache (cold), then another epoch (warm).
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from litevae import cache
from litevae.cache import LatentCache
from litevae.commits import commit_shard
from litevae.errors import UserError
from litevae.loader import LatentLoader
from litevae.shards import QUARANTINE, latent_layout, row_schema
from pipelines.benchmark import meter

BATCH, SHAPE, SHARD, PART = 64, (8, 32, 32), 500, 1000

Epoch = Callable[[np.ndarray], Iterator[Tensor]]  # takes an order of rows, and yields its batches


def loader(setting: meter.Setting) -> Iterator[meter.ReportTable]:
    """Measure rows/s of each reader, cold and warm, and how much it read from the disk."""
    import datasets  # only developers have this package, and jobs.py uses this module without it

    datasets.disable_progress_bars()
    rows, folder = setting.config.loader_rows, setting.place / "loader"
    write(folder, rows)
    os.sync()  # pages that are not on the disk yet cannot be removed from the page cache
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in READERS}
    for n in range(-1, setting.config.repeats):
        for name in READERS:
            with meter.Child("pipelines.benchmark.loader", name, folder, rows) as child:
                run = child.ask()
            if n >= 0:  # the first round is warm-up
                runs[name].append(run)
    table = meter.ReportTable(
        "The latent loader",
        f"{rows:,} rows of 8 x 32 x 32 fp16, batches of {BATCH}, in random order; one thread; each run a process of "
        f"its own, {setting.config.repeats} of each in turn: median (range). Cold: the files put out of the page cache "
        f"first, which takes a folder for temporary files (TMPDIR) on a disk. Times: warm rows/s against the first "
        f"row, the median of the ratios of the same round.",
        ["", "what it does", "rows/s, cold", "rows/s, warm", "times", "MB from the disk, cold"],
        samples=dict(runs),
    )
    first = [run["warm"] for run in runs[next(iter(READERS))]]
    for name, (_, title, what) in READERS.items():
        cold, warm, read = ([run[key] for run in runs[name]] for key in ("cold", "warm", "cold MB"))
        times = f"{meter.ratio(warm, first):.2f}"
        table.rows.append(
            [
                title,
                what,
                meter.median_and_range(cold, 0),
                meter.median_and_range(warm, 0),
                times,
                meter.median_and_range(read, 0),
            ]
        )
    yield table


def write(folder: Path, rows: int) -> None:
    """Write the same rows in every format. `datasets` makes an Arrow copy of the cache's Parquet shards."""
    synthetic_cache(folder / "cache", rows, SHAPE)
    for name in ("safetensors", "npy"):
        (folder / name).mkdir()
    for start in range(0, rows, PART):
        latents = LatentCache(str(folder / "cache")).moments(range(start, min(start + PART, rows)))
        save_file({"latents": latents}, folder / "safetensors" / f"{start // PART:04d}.safetensors")
        for unit, value in enumerate(latents.numpy(), start):
            np.save(folder / "npy" / f"{unit:06d}.npy", value)
    hugging_face(folder)


def synthetic_cache(folder: Path, rows: int, shape: Sequence[int], **model: str) -> None:
    """Write a latent cache of random moments.

    Args:
        folder: the cache.
        rows: the number of rows.
        shape: shape of the moments (C, h, w), which are standard normal numbers in fp16.
        model: the manifest's entry about the model.
    """
    how = latent_layout("moments", "float16")
    plan = {"model": model, "transform": {}, "latents": how, "precision": "fp32", "columns": {}}
    schema = row_schema(pa.schema([]))
    same, none = dict.fromkeys(schema.names, 0) | {"flip": False}, QUARANTINE.empty_table()
    for number, start in enumerate(range(0, rows, SHARD)):
        units = range(start, min(start + SHARD, rows))
        values = np.random.default_rng(start).standard_normal((len(units), *shape)).astype(np.float16)
        table = pa.Table.from_pylist([same | {"id": f"{unit:06d}", "unit": unit} for unit in units], schema=schema)
        commit_shard(str(folder), number, (units.start, units.stop), how, table, [values], none)
    source = {"uri": "", "digest": "", "units": rows, "shards": -(-rows // SHARD)}
    cache.write_manifest(str(folder), plan, source, {})


# --- readers ------------------------------------------------------------------------------------------------------


def ours(folder: Path) -> Epoch:
    """Read with the latent loader; the order gives only its seed."""
    latents = LatentCache(str(folder / "cache"))
    return lambda order: (batch["latents"] for batch in _loader(latents, order))


def moments(folder: Path) -> Epoch:
    """Read raw moments in the latent loader's order; the given order gives only its seed."""
    latents = LatentCache(str(folder / "cache"))
    return lambda order: (latents.moments(rows) for _, rows, _, _ in _loader(latents, order).places(0))


def _loader(latents: LatentCache, order: np.ndarray) -> LatentLoader:
    return LatentLoader(latents, BATCH, seed=int(order[0]), threads=0, epochs=1)


def anywhere(folder: Path) -> Epoch:
    """Read raw moments from the cache in the given order."""
    return _in_order(LatentCache(str(folder / "cache")).moments)


def safetensors(folder: Path) -> Epoch:
    """Read slices of safetensors files in the given order."""

    def row(index: int) -> Tensor:
        with safe_open(folder / "safetensors" / f"{index // PART:04d}.safetensors", "pt") as file:
            return file.get_slice("latents")[index % PART : index % PART + 1]

    return _in_order(lambda rows: torch.cat([row(index) for index in rows.tolist()]))


def npy(folder: Path) -> Epoch:
    """Read one .npy file per row in the given order."""
    return _in_order(lambda rows: torch.from_numpy(np.stack([np.load(folder / f"npy/{n:06d}.npy") for n in rows])))


def hugging_face(folder: Path) -> Epoch:
    """Read with `datasets` in the given order."""
    import datasets

    datasets.disable_progress_bars()
    files = sorted(map(str, (folder / "cache" / "shards").iterdir()))
    table: Any = datasets.Dataset.from_parquet(files, cache_dir=str(folder / "datasets"))
    table = table.select_columns(["moments"])

    def batch(rows: np.ndarray) -> Tensor:
        values = [np.frombuffer(value, np.float16).reshape(SHAPE) for value in table[rows]["moments"]]
        return torch.from_numpy(np.stack(values))

    return _in_order(batch)


def _in_order(batch: Callable[[Any], Tensor]) -> Epoch:
    """Make an epoch from a function that reads one batch of rows."""
    return lambda order: (batch(order[start : start + BATCH]) for start in range(0, len(order), BATCH))


READERS: dict[str, tuple[Callable[[Path], Epoch], str, str]] = {
    "ours": (ours, "**LatentLoader**", "verified; drawn from the posterior, normalised; shuffled in windows"),
    "moments": (moments, "LatentCache.moments", "verified; raw; the loader's order"),
    "anywhere": (
        anywhere,
        "LatentCache.moments",
        "verified; raw; any order (a tenth of the rows): what the loader's order saves",
    ),
    "safetensors": (
        safetensors,
        f"safetensors, {PART:,} rows a file",
        "safe_open and get_slice a row; raw; any order; no checks",
    ),
    "npy": (npy, ".npy a row", "np.load; raw; any order; no checks"),
    "datasets": (hugging_face, "datasets", "Parquet made into Arrow, memory-mapped; raw; any order; no checks"),
}


def read(name: str, folder: Path, rows: int) -> dict[str, float]:
    """Read a cold and a warm epoch.

    Args:
        name: the reader, a key of `READERS`.
        folder: the folder that `write` filled.
        rows: the number of rows there.

    Returns:
        Rows/s ("cold", "warm"), and the MB that each epoch read from the disk ("cold MB", "warm MB").

    Raises:
        UserError: if the reader returned too few rows, or other rows than were written.
    """
    torch.set_num_threads(1)
    epoch = READERS[name][0](folder)
    found: dict[str, float] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    length = rows // 10 if name == "anywhere" else rows
    for seed, state in enumerate(("cold", "warm")):
        order, before, start = np.random.default_rng(seed).permutation(rows)[:length], _from_disk(), time.perf_counter()
        count = sum(len(batch) for batch in epoch(order))
        found |= {state: count / (time.perf_counter() - start), f"{state} MB": (_from_disk() - before) / 1e6}
        if count != length:
            raise UserError(f"{name} read {count} rows of {length}")
    if name not in ("ours", "moments"):  # these two have an order of their own
        expected = LatentCache(str(folder / "cache")).moments(order[:BATCH].tolist())
        if not torch.equal(next(epoch(order)), expected):
            raise UserError(f"{name} reads other rows than were written")
    return found


def _from_disk() -> int:
    """Return the bytes that this process has read from the disk so far, without reads from the page cache."""
    return int(Path("/proc/self/io").read_text().split("read_bytes:")[1].split()[0])


if __name__ == "__main__":
    meter.serve(lambda request: read(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
