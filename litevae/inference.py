"""Functions to run a trained model as fast as possible on its device: memory format, kernels and slicing."""

import copy
import time
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from litevae import native
from litevae.autoencoder_base import one_by_one
from litevae.latents import downsampling, encode_latents, latent_content
from litevae.precision import autocast, cpu_has_bf16

# "native": the kernels of litevae.native; "torch": PyTorch's; "sliced": PyTorch's, the images of a batch one by one
Kernels = Literal["native", "torch", "sliced"]

Model = TypeVar("Model", bound=ModelMixin)


def best_kernels(device: torch.device | str, precision: str = "auto") -> Kernels:
    """Return the fastest kernels for a device.

    The result is "native" (the kernels of `litevae.native`) in fp32 on CPUs if they can be compiled, otherwise "torch".

    Args:
        device: The device.
        precision: "fp32", "bf16" or "auto", as in `litevae.precision.autocast`.
    """
    kind = torch.device(device).type
    with autocast(kind, precision):
        reduced = torch.is_autocast_enabled(kind)
    return "native" if kind == "cpu" and not reduced and native.available() else "torch"


def memory_format(device: torch.device | str, compiled: bool) -> torch.memory_format:
    """Return the best memory format of images, features and convolution weights for inference.

    Tensor cores work best with channels last. But PyTorch's group normalisation on GPUs converts its input to channels
    first and back, so channels first is faster (docs/performance.md), unless the normalisation is compiled too.
    """
    first = torch.device(device).type == "cuda" and not compiled
    return torch.contiguous_format if first else torch.channels_last


def prepare_for_inference(model: Model, device: torch.device | str, kernels: Kernels, compiled: bool = False) -> Model:
    """Move a model to its device and prepare it for inference, in place: memory format, kernels, no gradients.

    With "native" and "sliced", an autoencoder that has slicing processes the images of a batch one by one. Then the
    tensors between layers stay in the CPU cache, and the result for an image does not depend on the other images of its
    batch.
    Models without slicing (VQModel, AsymmetricAutoencoderKL) take the batch as a whole: call them by `one_by_one`.

    Args:
        model: The model.
        device: The device.
        kernels: "native", "torch" or "sliced"; see `best_kernels` and `measure_paths`.
        compiled: Whether the model will be compiled by torch.compile.

    Returns:
        The same model.

    Raises:
        NoKernels: if `kernels` is "native", and they can't be compiled or loaded on this machine.
    """
    model.to(device=device, memory_format=memory_format(device, compiled)).requires_grad_(False)
    if kernels == "native":
        native.accelerate(model)
    if kernels != "torch":
        enable_slicing(model)
    return model


def enable_slicing(model: ModelMixin) -> bool:
    """Let an autoencoder, or the one that it wraps, process the images of a batch one by one.

    Every autoencoder of diffusers has the method `enable_slicing`, but for VQModel, AsymmetricAutoencoderKL and others
    it raises NotImplementedError. For them, `one_by_one` keeps the promise.

    Returns:
        Whether the model does so now.
    """
    able = [part for part in model.modules() if hasattr(part, "enable_slicing") and hasattr(part, "use_slicing")]
    for part in able:
        part.enable_slicing()
    return bool(able)


class FastPath(NamedTuple):
    """A way to compute an encoder on a CPU.

    Attributes:
        kernels: "native", "torch" or "sliced".
        precision: "fp32" or "bf16".
    """

    kernels: Kernels
    precision: Literal["fp32", "bf16"]

    def __str__(self) -> str:
        names = {"native": "native kernels", "torch": "PyTorch, whole batches", "sliced": "PyTorch, image by image"}
        return f"{names[self.kernels]} in {self.precision}"


class MeasuredPath(NamedTuple):
    """What was measured of a path.

    Attributes:
        path: The path.
        speed: Images/s.
        error: The error of the latents against PyTorch's in fp32; see `latents_error`.
        agrees: Whether the error is small enough to take this path.
    """

    path: FastPath
    speed: float
    error: float
    agrees: bool


# Largest error of a path that `auto` takes. fp32: in units of the largest value, which covers another order of sums.
# bf16: in units of the posterior's sigma (median over elements), so that the error stays below what the draw adds; in
# units of the latents' standard deviation where there is no posterior.
LARGEST_ERROR = {"fp32": 1e-4, "bf16": 0.5}
LARGEST_ERROR_WITHOUT_POSTERIOR = 0.01
SLOW = 0.5  # seconds; larger images are measured at half the side, as often as needed


def cpu_paths(precision: str = "auto") -> list[FastPath]:
    """Return the ways to compute an encoder that this machine's CPU has.

    Args:
        precision: "fp32", "bf16", or "auto": both, where the CPU has bf16 in hardware.
    """
    paths: list[FastPath] = []
    if precision != "bf16":
        paths += [FastPath("torch", "fp32"), FastPath("sliced", "fp32")]
        paths += [FastPath("native", "fp32")] if native.available() else []
    if precision == "bf16" or (precision == "auto" and cpu_has_bf16()):
        paths += [FastPath("torch", "bf16"), FastPath("sliced", "bf16")]
    return paths


def latents_error(found: Tensor, expected: Tensor, precision: str, posterior: bool) -> float:
    """Return the error of encoded latents, in the unit of `LARGEST_ERROR`.

    Args:
        found: Latents or moments (N, C, h, w) of the path.
        expected: Those of PyTorch in fp32.
        precision: The path's precision, "fp32" or "bf16".
        posterior: Whether these are moments, mean then log-variance, instead of latents.
    """
    if not found.isfinite().all():
        return float("inf")
    error = (found.float() - expected).abs()
    if precision == "fp32":
        return float(error.max() / expected.abs().max().clamp(min=1e-12))
    if not posterior:
        return float(error.median() / expected.std().clamp(min=1e-12))
    sigma = (0.5 * expected.chunk(2, dim=1)[1].clamp(-30, 20)).exp()
    return float((error.chunk(2, dim=1)[0] / sigma).median())


@torch.inference_mode()
def measure_paths(
    model: ModelMixin,
    size: tuple[int, int],
    batch_size: int,
    precision: str = "auto",
    seconds: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[MeasuredPath]:
    """Measure every way in which this CPU can compute an encoder, in turn, with PyTorch's present number of threads.

    Args:
        model: The autoencoder, in fp32 on the CPU. It is copied, not changed.
        size: Height and width of the images. If one of them takes long, smaller ones are measured.
        batch_size: Images a forward pass; fewer are measured if they take long, but at least two.
        precision: "fp32", "bf16" or "auto"; see `cpu_paths`.
        seconds: How long to measure in total, after each path was called once.
        clock: Gives the time in seconds.

    Returns:
        The paths, the fastest of those that agree first, then the others.
    """
    factor, content = downsampling(model), latent_content(model)
    noise = torch.Generator().manual_seed(0)

    def images(count: int) -> Tensor:
        x = torch.rand(count, 3, *size, generator=noise) * 2 - 1
        return x.contiguous(memory_format=torch.channels_last)

    def timed(path: FastPath, prepared: ModelMixin, x: Tensor) -> float:
        begun = clock()
        _encoded(path, prepared, x)
        return clock() - begun

    reference = prepare_for_inference(copy.deepcopy(model), "cpu", "torch")
    plain = FastPath("torch", "fp32")
    x = images(1)
    timed(plain, reference, x[..., : 8 * factor, : 8 * factor])  # the first call takes longer
    while (taken := timed(plain, reference, x)) > SLOW and min(size) >= 16 * factor:
        size = tuple(side // 2 // factor * factor for side in size)  # type: ignore[assignment]
        x = images(1)
    expected = _encoded(plain, reference, x)
    paths = cpu_paths(precision)
    count = max(2, min(batch_size, int(seconds / len(paths) / 2 / max(taken, 1e-6)))) if batch_size > 1 else 1
    batch = images(count)
    models: dict[FastPath, ModelMixin] = {}
    errors: dict[FastPath, float] = {}
    for path in paths:
        models[path] = prepare_for_inference(copy.deepcopy(model), "cpu", path.kernels)
        errors[path] = latents_error(_encoded(path, models[path], x), expected, path.precision, content == "moments")
    times: dict[FastPath, list[float]] = {path: [] for path in paths}
    begun = clock()
    while not times[paths[-1]] or clock() - begun < seconds:
        for path in paths:
            times[path].append(timed(path, models[path], batch))
    found = [
        MeasuredPath(path, count / max(min(times[path]), 1e-9), errors[path], _agrees(path, errors[path], content))
        for path in paths
    ]
    return sorted(found, key=lambda measured: (not measured.agrees, -measured.speed))


def _encoded(path: FastPath, model: ModelMixin, x: Tensor) -> Tensor:
    """Encode images with a model that was prepared for this path."""
    with autocast("cpu", path.precision):
        if path.kernels == "torch":
            return encode_latents(model, x).float()
        return one_by_one(lambda image: encode_latents(model, image), x).float()


def _agrees(path: FastPath, error: float, content: str) -> bool:
    if path.precision == "bf16" and content != "moments":
        return error <= LARGEST_ERROR_WITHOUT_POSTERIOR
    return error <= LARGEST_ERROR[path.precision]
