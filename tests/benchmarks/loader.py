"""Rows/s of latents in random order: our loader beside safetensors, a .npy file a row, and `datasets`.

python tests/benchmarks/loader.py FOLDER [--rows 20000] [--repeats 3]

FOLDER is where the files are written, and removed again: it decides on the disk. Every run is a process of its own of
one thread: an epoch after all files were put out of the page cache (cold), then another (warm).
"""

import json
import os
import tempfile
import time
from pathlib import Path

import common
import datasets
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from litevae.cache import LatentCache
from litevae.loader import LatentLoader

BATCH, SHAPE, SHARD, PART = 64, (8, 32, 32), 500, 1000


def write(folder, rows):
    """The same rows in every format. `datasets` reads our Parquet shards, and makes an Arrow copy of them."""
    common.synthetic_cache(folder / "cache", rows, SHAPE, SHARD)
    for name in ("safetensors", "npy"):
        (folder / name).mkdir()
    for start in range(0, rows, PART):
        latents = LatentCache(folder / "cache").moments(range(start, min(start + PART, rows)))
        save_file({"latents": latents}, folder / "safetensors" / f"{start // PART:04d}.safetensors")
        for unit, value in enumerate(latents.numpy(), start):
            np.save(folder / "npy" / f"{unit:06d}.npy", value)
    hugging_face(folder)


# --- readers: a folder -> a function of an order of rows, which gives batches -----------------------------------


def ours(folder):
    latents = LatentCache(folder / "cache")
    return lambda order: (batch["latents"] for batch in loader(latents, order))


def moments(folder):
    latents = LatentCache(folder / "cache")
    return lambda order: (latents.moments(rows) for _, rows, _, _ in loader(latents, order)._places(0))


def loader(latents, order):
    return LatentLoader(latents, BATCH, seed=int(order[0]), threads=0, epochs=1)


def anywhere(folder):
    return in_order(LatentCache(folder / "cache").moments)


def safetensors(folder):
    def row(index):
        with safe_open(folder / "safetensors" / f"{index // PART:04d}.safetensors", "pt") as file:
            return file.get_slice("latents")[index % PART : index % PART + 1]

    return in_order(lambda rows: torch.cat([row(index) for index in rows.tolist()]))


def npy(folder):
    return in_order(lambda rows: torch.from_numpy(np.stack([np.load(folder / f"npy/{n:06d}.npy") for n in rows])))


def hugging_face(folder):
    datasets.disable_progress_bars()
    files = sorted(map(str, (folder / "cache" / "shards").iterdir()))
    table = datasets.Dataset.from_parquet(files, cache_dir=str(folder / "datasets")).select_columns(["moments"])

    def batch(rows):
        values = [np.frombuffer(value, np.float16).reshape(SHAPE) for value in table[rows]["moments"]]
        return torch.from_numpy(np.stack(values))

    return in_order(batch)


def in_order(batch):
    return lambda order: (batch(order[start : start + BATCH]) for start in range(0, len(order), BATCH))


READERS = {
    ours: ("**LatentLoader**", "verified; drawn from the posterior, normalised; shuffled in windows"),
    moments: ("LatentCache.moments", "verified; raw; the loader's order"),
    anywhere: ("LatentCache.moments", "verified; raw; any order (a tenth of the rows): what the loader's order saves"),
    safetensors: ("safetensors, 1,000 rows a file", "safe_open and get_slice a row; raw; any order; no checks"),
    npy: (".npy a row", "np.load; raw; any order; no checks"),
    hugging_face: ("datasets", "Parquet made into Arrow, memory-mapped; raw; any order; no checks"),
}


def read(reader, folder, rows):
    """Rows/s, cold and warm, and the MB that each pass took from the disk."""
    torch.set_num_threads(1)
    epoch, found = reader(folder), {}
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    length = rows // 10 if reader is anywhere else rows
    for seed, state in enumerate(("cold", "warm")):
        order, before, start = np.random.default_rng(seed).permutation(rows)[:length], from_disk(), time.perf_counter()
        count = sum(len(batch) for batch in epoch(order))
        found |= {state: count / (time.perf_counter() - start), f"{state} MB": (from_disk() - before) / 1e6}
        assert count == length
    expected = LatentCache(folder / "cache").moments(order[:BATCH])
    assert reader in (ours, moments) or torch.equal(next(epoch(order)), expected)
    return found


def from_disk():
    """Bytes that this process has had fetched so far; what is in the page cache already does not count."""
    return int(Path("/proc/self/io").read_text().split("read_bytes:")[1].split()[0])


def main(folder, rows, repeats):
    common.environment("pyarrow", "safetensors", "datasets", "torch", "numpy")
    found = {reader: [] for reader in READERS}
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        write(Path(temporary), rows)
        os.sync()  # what is not on the disk yet stays in the page cache
        for repeat in range(-1, repeats):
            for reader, runs in found.items():
                run = common.result(common.child(__file__, temporary, "--rows", rows, "--reader", reader.__name__))
                common.log(f"{repeat + 1} of {repeats}: {reader.__name__} {run}")
                runs += [run] if repeat >= 0 else []  # the first warms up
    print(f"{rows:,} rows of 8 x 32 x 32 fp16, batches of {BATCH}; {repeats} runs: median (range)\n")
    states = ("cold", "warm", "cold MB")
    table = [
        [*READERS[reader], *(common.spread([run[state] for run in runs], 0) for state in states)]
        for reader, runs in found.items()
    ]
    common.table(["", "what it does", "rows/s, cold", "rows/s, warm", "MB from the disk, cold"], table)


if __name__ == "__main__":
    parser = common.arguments(__doc__, "folder", rows=20_000, repeats=3)
    parser.add_argument("--reader", help="of the processes that it starts")
    given = vars(parser.parse_args())
    if reader := given.pop("reader"):
        print(json.dumps(read(globals()[reader], given["folder"], given["rows"])))
    else:
        main(**given)
