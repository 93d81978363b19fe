"""Choose what `auto` means on this machine: precision, kernels and batch size; and advise when compiling pays."""

from dataclasses import replace

import numpy as np
import torch

from litevae.inference import best_kernels
from litevae.precision import autocast
from pipelines.data.decode import transform_of
from pipelines.encoding.config import Encode
from pipelines.encoding.encoder import ShardEncoder
from pipelines.encoding.plan import CachePlan
from pipelines.runtime.cluster import Placement
from pipelines.runtime.logs import say

AUTO_BATCH = {"cpu": 32, "cuda": 256}  # what batch_size=auto tries first; larger batches gain nothing
WORTH_COMPILING = 200_000  # images; on an H200 compiling took 50 s and saved LiteVAE-B 0.8 ms per image


def settle(plan: CachePlan, config: Encode, placement: Placement, images: int) -> CachePlan:
    """Return the plan of a new cache with a number or a name in place of every "auto".

    Args:
        plan: the plan as `make_plan` returned it.
        config: the job's config.
        placement: the workers that will encode.
        images: how many images there are to encode, which decides whether to advise compiling.
    """
    if config.precision == "auto":
        plan = replace(plan, precision=fastest_precision(placement))
    if config.kernels == "auto" and not config.compile:
        plan = replace(plan, kernels="torch" if placement.gpu else best_kernels("cpu", plan.precision))
        if placement.gpu and images >= WORTH_COMPILING:
            say("encode: compile=true takes a minute longer to start, and may then be twice as fast")
        if not placement.gpu and plan.precision == "fp32" and plan.kernels == "torch":
            say("encode: there is no C++ compiler, so PyTorch's kernels are used; g++ makes it 2 to 3 times as fast")
    if config.batch_size == "auto":
        plan = replace(plan, settings=replace(plan.settings, batch_size=largest_batch(plan, placement)))
    return plan


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
