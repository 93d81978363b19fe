"""Seconds of a training step of the demo's autoencoder, by how long OpenMP's threads wait awake (GOMP_SPINCOUNT).

Each setting is a process of its own (`python -m tests.benchmarks.threads`): OpenMP reads it once.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from litevae.autoencoder import LiteVAE
from litevae.precision import autocast
from pipelines.benchmark import meter

THREADS = 2
SPINS = (None, 1000, 5000, 20000, 100000)
NEIGHBOURS = 2
STEPS = 2  # timed ones of each, a repeat


def threads(setting: meter.Setting) -> Iterator[meter.ReportTable]:
    """Seconds of a step, alone and beside two busy processes."""
    steps = STEPS * setting.config.repeats
    table = meter.ReportTable(
        "How long OpenMP threads wait awake",
        f"Seconds of a training step of the demo's autoencoder, batch 16 at 64 px, {THREADS} threads; {steps} steps of "
        f"each in turn: median (range). What counts is the worst of them. Jobs set 20000.",
        ["GOMP_SPINCOUNT", "alone", f"beside {NEIGHBOURS} busy processes"],
    )
    with ExitStack() as stack:
        calls = {}
        for spins in SPINS:
            variables = {"GOMP_SPINCOUNT": None if spins is None else str(spins), "OMP_WAIT_POLICY": None}
            child = stack.enter_context(meter.Child("tests.benchmarks.threads", environment=variables))
            calls["not set" if spins is None else str(spins)] = child.ask
        alone = meter.rounds(calls, steps, warmup=2)
        with _busy():
            beside = meter.rounds(calls, steps)
    for name in calls:
        table.rows.append([name, meter.median_and_range(alone[name], 2), meter.median_and_range(beside[name], 2)])
        table.samples[name] = {"alone": alone[name], "beside": beside[name]}
    yield table


@contextmanager
def _busy() -> Iterator[None]:
    """Other processes that keep a core busy each, no longer than this one lives."""
    code = f"import os\nwhile os.getppid() == {os.getpid()}: sum(range(10**5))"
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(NEIGHBOURS)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


class Step:
    """A contender's process."""

    def __init__(self) -> None:
        torch.set_num_threads(THREADS)
        self.model = LiteVAE("S", 12, block_out_channels=(16, 32, 64, 64), layers_per_block=1)
        self.images = torch.rand(16, 3, 64, 64) * 2 - 1

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        with autocast("cpu", "auto"):
            reconstruction, _ = self.model(self.images)
        (reconstruction.float() - self.images).abs().mean().backward()
        self.model.zero_grad()
        return {}


if __name__ == "__main__":
    meter.serve(Step())
