"""Peak memory of the encode job on 1, 4 and 16 times the images.

python tests/benchmarks/memory.py DATA [--images 300] [--repeats 3]

DATA holds JPEGs. The job runs as its command does; all of its processes are looked at ten times a second.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import psutil
import torch

from litevae.autoencoder import LiteVAE

JOB = Path(__file__).parents[2] / "jobs" / "encode_dataset.py"
TIMES = (1, 4, 16)
KINDS = {"ray::Map(": "decode task", "ray::MapWorker": "encoder", "raylet": "raylet", "gcs_server": "GCS"}


def kind_of(process, driver):
    """By its title: Ray's workers name what they do."""
    if process.pid == driver:
        return "driver"
    title = " ".join(process.cmdline())
    return next((kind for start, kind in KINDS.items() if start in title), "others")


def most_so_far(pid):
    """Bytes of resident memory: Linux keeps the peak itself, so none is missed between two looks."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def peaks(command):
    """Of each kind of process: the largest resident memory of one, and how much of it was not shared, in MB."""
    found = {}
    with tempfile.TemporaryFile("w+") as log:
        job = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        watch(job, found)
        if job.returncode:
            log.seek(0)
            sys.exit(log.read())
    return {kind: tuple(value / 2**20 for value in values) for kind, values in found.items()}


def watch(job, found):
    while job.poll() is None:
        for process in [job, *job.children(recursive=True)]:
            try:
                kind, memory = kind_of(process, job.pid), process.memory_info()
                rss = most_so_far(process.pid)
            except (psutil.Error, OSError, StopIteration):
                continue  # it ended meanwhile
            own = memory.rss - memory.shared
            now = found.get(kind, (0, 0))
            found[kind] = max(now[0], rss), max(now[1], own)
        try:
            job.wait(0.1)
        except psutil.TimeoutExpired:
            continue


def main(data, images, repeats):
    common.environment("ray", "torch", "pyarrow", "psutil")
    os.environ.update(RAY_USAGE_STATS_ENABLED="0")
    files = common.jpegs(data)
    found = {times: [] for times in TIMES}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        torch.manual_seed(0)
        LiteVAE.from_preset("S", latent_channels=4).save_pretrained(place / "vae")
        folders = {times: common.linked(files, times * images, place / f"{times}") for times in TIMES}
        for repeat in range(repeats):
            for times, folder in folders.items():
                out = place / f"latents-{repeat}-{times}"
                sizes = ["transform.resolution=128", "rows_per_shard=64", "ray.cpus_per_worker=1", "ray.gpu=false"]
                places = [f"source.uri={folder}", f"model={place / 'vae'}", f"out={out}", f"root={place / 'runs'}"]
                found[times].append(peaks([sys.executable, JOB, *places, *sizes, "tracking.enabled=false"]))
                text = [f"{kind} {rss:.0f} ({own:.0f})" for kind, (rss, own) in found[times][-1].items()]
                common.log(f"{times} x {images}: MB of RSS (of its own): " + ", ".join(text))
    kinds = ["driver", "encoder", "decode task", "raylet", "GCS"]
    for n, text in enumerate(("peak RSS", "of which its own: neither libraries nor Ray's object store")):
        print(f"{text}, of the largest process of a kind, MB; {repeats} runs: median (range)\n")
        rows = [
            [f"{times * images:,} images", *(common.spread([run[kind][n] for run in runs], 0) for kind in kinds)]
            for times, runs in found.items()
        ]
        common.table(["", *kinds], rows)
        print(flush=True)


if __name__ == "__main__":
    main(**vars(common.arguments(__doc__, "data", images=300, repeats=3).parse_args()))
