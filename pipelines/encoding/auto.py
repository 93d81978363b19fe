"""What `auto` means on this machine: the precision, the batch size, and whether compiling pays."""

from typing import Any

import numpy as np
import torch

from litevae.precision import autocast
from pipelines.data.decode import transform_of, views_of
from pipelines.encoding.encoder import Encoder
from pipelines.runtime import cluster

AUTO_BATCH = {"cpu": 32, "cuda": 256}  # where batch_size=auto begins; beyond these nothing is gained
WORTH_COMPILING = 200_000  # images: on an H200 compiling took 50 s, and saved LiteVAE-B 0.8 ms an image


def fastest_precision(share: cluster.Share) -> str:
    import ray

    def probe(device: str) -> str:
        with autocast(device, "auto"):
            return "bf16" if torch.is_autocast_enabled(device) else "fp32"

    return ray.get(ray.remote(num_gpus=1, num_cpus=0)(probe).remote("cuda")) if share.gpu else probe("cpu")


def largest_batch(plan: dict[str, Any], share: cluster.Share) -> int:
    """The batch size that fits, found where the encoders will run; on CPUs 32."""
    import ray

    if not share.gpu:
        return AUTO_BATCH["cpu"]
    largest = max(transform_of(views_of(plan)).sizes, key=lambda size: size[0] * size[1])
    settings = plan["settings"] | {"batch_size": AUTO_BATCH["cuda"]}

    def probe() -> int:
        encoder = Encoder("", plan | {"settings": settings}, True, 1)
        encoder.encode([np.zeros((*largest, 3), dtype=np.uint8)])
        return encoder.batch_size

    return ray.get(ray.remote(num_gpus=share.resources["GPU"], num_cpus=0)(probe).remote())
