"""Choose what `auto` means on this machine: precision, kernels and batch size; and advise when compiling pays."""

from dataclasses import replace

import numpy as np
import torch

from litevae import native
from litevae.any_autoencoder import load_autoencoder
from litevae.errors import UserError
from litevae.inference import MeasuredPath, best_kernels, measure_paths
from litevae.precision import autocast
from pipelines.data.decode import transform_of
from pipelines.encoding.config import Encode
from pipelines.encoding.encoder import ShardEncoder
from pipelines.encoding.plan import CachePlan
from pipelines.runtime.cluster import Placement
from pipelines.runtime.logs import say

AUTO_BATCH = {"cpu": 32, "cuda": 256}  # what batch_size=auto tries first; larger batches gain nothing
WORTH_MEASURING = 64  # images; for fewer, what the CPU can do decides, without a measurement
WORTH_COMPILING = 200_000  # images; on an H200 compiling took 50 s and saved LiteVAE-B 0.8 ms per image


def settle(plan: CachePlan, config: Encode, placement: Placement, images: int) -> CachePlan:
    """Return the plan of a new cache with a number or a name in place of every "auto".

    Args:
        plan: the plan as `make_plan` returned it.
        config: the job's config.
        placement: the workers that will encode.
        images: how many images there are to encode, which decides whether to advise compiling.
    """
    free = config.kernels == "auto" and not config.compile
    if free and not placement.gpu and images >= WORTH_MEASURING:
        plan = fastest_path(plan, config.precision)
    if plan.precision == "auto":
        plan = replace(plan, precision="fp32" if plan.kernels == "native" else fastest_precision(placement))
    if free and (placement.gpu or images < WORTH_MEASURING):
        plan = replace(plan, kernels="torch" if placement.gpu else best_kernels("cpu", plan.precision))
    if free and placement.gpu and images >= WORTH_COMPILING:
        say("encode: compile=true takes a minute longer to start, and may then be twice as fast")
    if free and not placement.gpu and (reason := native.unavailable()):
        say(f"encode: without the native kernels, which are often twice as fast on CPUs: {reason}")
    if config.batch_size == "auto":
        plan = replace(plan, settings=replace(plan.settings, batch_size=largest_batch(plan, placement)))
    return plan


def fastest_path(plan: CachePlan, precision: str) -> CachePlan:
    """Return the plan with the kernels and the precision that are fastest on this machine's CPU, measured for a second.

    One thread is measured, which other work on the machine disturbs least.

    Args:
        plan: the plan of a new cache.
        precision: "auto", "fp32" or "bf16", of the config.

    Raises:
        UserError: if no path agrees with PyTorch in fp32; then the model's latents are not finite.
    """
    size = max(transform_of(plan.views).sizes, key=lambda size: size[0] * size[1])
    batch_size = plan.settings.batch_size
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = measure_paths(
            load_autoencoder(plan.model.path),
            size,
            AUTO_BATCH["cpu"] if batch_size == "auto" else batch_size,
            precision,
        )
    finally:
        torch.set_num_threads(threads)
    best = found[0]
    if not best.agrees and best.path.precision == "fp32":
        raise UserError(f"{plan.model.path}: the latents of an image of noise are not finite; is it trained?")
    say(f"encode: {best.path}: the fastest here ({', '.join(map(_described, found))})")
    return replace(plan, kernels=best.path.kernels, precision=best.path.precision)


def _described(measured: MeasuredPath) -> str:
    rejected = "" if measured.agrees else f", not taken: its error is {measured.error:.2g}"
    return f"{measured.path} {measured.speed:.3g} images/s a core{rejected}"


def fastest_precision(placement: Placement) -> str:
    """Return "bf16" if the workers' hardware multiplies in bf16, else "fp32"."""
    import ray

    def probe(device: str) -> str:
        with autocast(device, "auto"):
            return "bf16" if torch.is_autocast_enabled(device) else "fp32"

    return ray.get(ray.remote(num_gpus=1, num_cpus=0)(probe).remote("cuda")) if placement.gpu else probe("cpu")


def largest_batch(plan: CachePlan, placement: Placement) -> int:
    """Return the largest batch size, up to 256, that fits into the GPU of a worker, found by trying; on CPUs 32."""
    import ray

    if not placement.gpu:
        return AUTO_BATCH["cpu"]
    largest = max(transform_of(plan.views).sizes, key=lambda size: size[0] * size[1])
    tried = replace(plan, settings=replace(plan.settings, batch_size=AUTO_BATCH["cuda"]))

    def probe() -> int:
        encoder = ShardEncoder("", tried, gpu=True, threads=1)
        encoder.encode([np.zeros((*largest, 3), dtype=np.uint8)])
        return encoder.batch_size

    return ray.get(ray.remote(num_gpus=placement.gpus, num_cpus=0)(probe).remote())
