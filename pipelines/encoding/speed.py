"""How fast an encoder is on this machine, and how long it takes to encode a source."""

import time
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch

from litevae.any_autoencoder import load_autoencoder
from litevae.images import to_tensor
from litevae.inference import Kernels, best_kernels, prepare_for_inference
from litevae.latents import encode_latents
from litevae.precision import autocast
from pipelines.data.decode import transform_of
from pipelines.encoding.plan import CachePlan
from pipelines.encoding.preview import Preview
from pipelines.runtime import estimate
from pipelines.runtime.cluster import Placement
from pipelines.runtime.logs import say

FEW = 64  # images; nothing is measured for fewer
SIDE = 64  # largest side of the small images that are measured first, in pixels
SHORT = 60.0  # seconds; a job that takes less by its first image is not announced


@torch.inference_mode()
def encoder_speed(
    path: str,
    size: tuple[int, int],
    batch_size: int,
    threads: int,
    precision: str = "auto",
    kernels: Kernels | Literal[""] = "",
) -> tuple[float, str]:
    """Measure an encoder in this process, on the GPU if there is one.

    Args:
        path: the model folder.
        size: height and width of the images.
        batch_size: images a forward pass; fewer if one of so many would take more than about two seconds on a CPU.
        threads: CPU threads of PyTorch.
        precision: "auto", "fp32" or "bf16".
        kernels: "native", "torch" or "sliced"; "": the best for the device.

    Returns:
        The median images/s, and a description of device, precision and kernels.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(threads)
    by = kernels or best_kernels(device)
    vae = prepare_for_inference(load_autoencoder(path), device, by)
    pixels = np.random.default_rng(0).integers(0, 256, (batch_size, *size, 3), dtype=np.uint8)
    x = to_tensor(pixels).to(device)
    times: list[float] = []
    with autocast(device, precision):
        how = "bf16" if torch.is_autocast_enabled(device.type) else "fp32"
        begun = time.perf_counter()
        encode_latents(vae, x if device.type == "cuda" else x[:1])  # the first call takes longer
        first = time.perf_counter() - begun
        if device.type == "cpu":
            x = x[: max(1, int(2 / first))]
        while len(times) < 2 or (sum(times) < 2 and len(times) < 20):
            begun = time.perf_counter()
            encode_latents(vae, x).cpu()
            times.append(time.perf_counter() - begun)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{threads} CPU threads"
    return len(x) / sorted(times)[len(times) // 2], f"{where}, {how}, {by} kernels"


def rates(placement: Placement, encode: float, decode: float) -> tuple[float, float, float]:
    """Return images/s of all workers that encode, of all cores that decode, and of both together.

    On CPUs decoding and encoding share the cores, so their times add up. On GPUs they overlap, and the slower counts.

    Args:
        placement: the workers.
        encode: images/s of a worker.
        decode: images/s of a core.
    """
    encode *= placement.workers
    decode *= placement.decoders if placement.gpu else placement.workers * placement.threads
    return encode, decode, min(encode, decode) if placement.gpu else 1 / (1 / encode + 1 / decode)


def announce(plan: CachePlan, placement: Placement, preview: Preview, yes: bool) -> None:
    """Say how long a job without a GPU will take, and ask if that is more than a day; see `estimate.announce`.

    Nothing is said of a job that is over in a minute.

    Args:
        plan: the plan, with a number or a name in place of every "auto".
        placement: the workers.
        preview: what was seen of the images.
        yes: whether to begin without asking.

    Raises:
        UserError: if the answer is not yes.
    """
    if placement.gpu or preview.todo < FEW or not preview.seen:
        return
    say("measuring a few images, to say how long it will take")
    transform, threads = transform_of(plan.views), torch.get_num_threads()
    decode = preview.seen / max(preview.seconds, 1e-9)

    def seconds(encode: float) -> float:
        return preview.todo / rates(placement, encode / transform.views, decode)[2]

    try:
        speed = _quick_speed(plan, placement.threads, lambda speed: seconds(speed) < SHORT)
    finally:
        torch.set_num_threads(threads)
    if (left := seconds(speed)) >= SHORT:
        estimate.announce(f"encoding {preview.todo:,} images", left, gpu=False, yes=yes)


def _quick_speed(plan: CachePlan, threads: int, is_enough: Callable[[float], bool]) -> float:
    """Return images/s of the plan's encoder, measured within a few seconds also where an image takes as long.

    Small images are measured first, from which the time of the plan's largest ones follows by the number of pixels.
    Those are measured themselves only if they are quick, and if that is not enough. One thread is measured, and threads
    are taken to add up: on cores with other work, several threads in this process, whose OpenMP spins while it waits,
    were measured 20 times slower than those of the workers.
    """
    batch_size = plan.settings.batch_size
    assert batch_size != "auto", "the plan was not settled"
    size = max(transform_of(plan.views).sizes, key=lambda size: size[0] * size[1])
    small = min(SIDE, size[0]), min(SIDE, size[1])
    own = 1, plan.precision, plan.kernels
    speed = encoder_speed(plan.model.path, small, 1, *own)[0] * small[0] * small[1] / (size[0] * size[1])
    if not is_enough(threads * speed) and speed >= 0.5:
        speed = encoder_speed(plan.model.path, size, batch_size, *own)[0]
    return threads * speed
