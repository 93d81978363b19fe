"""Seconds of a training step of the demo's autoencoder on 2 CPU threads, by how long OpenMP threads spin.

GOMP_SPINCOUNT=20000 python tests/benchmarks/threads.py [processes that keep a core busy beside it]
"""

import multiprocessing
import os
import statistics
import sys
import time

import torch

from litevae.autoencoder import LiteVAE
from litevae.precision import autocast


def busy() -> None:
    while True:
        pass


def main(neighbours: int) -> None:
    others = [multiprocessing.Process(target=busy, daemon=True) for _ in range(neighbours)]
    for other in others:
        other.start()
    torch.set_num_threads(2)
    model = LiteVAE("S", 12, block_out_channels=(16, 32, 64, 64), layers_per_block=1)
    x = torch.rand(16, 3, 64, 64) * 2 - 1
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        with autocast("cpu", "auto"):
            reconstruction, _ = model(x)
        (reconstruction.float() - x).abs().mean().backward()
        model.zero_grad()
        seconds.append(time.perf_counter() - start)
    timed = seconds[2:]
    settings = " ".join(f"{name}={os.environ.get(name)}" for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"))
    spread = f"{statistics.median(timed):.2f} s, {min(timed):.2f} to {max(timed):.2f}"
    print(f"{settings} neighbours={neighbours}: median {spread}")
    for other in others:
        other.terminate()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
