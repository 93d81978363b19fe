"""Running a trained model as fast as its device can: memory format, kernels, slices."""

from typing import Literal, TypeVar

import torch
from diffusers.models.modeling_utils import ModelMixin

from litevae import native
from litevae.precision import autocast

Kernels = Literal["native", "torch"]

Model = TypeVar("Model", bound=ModelMixin)


def best_kernels(device: torch.device | str, precision: str = "auto") -> Kernels:
    """ "native", the project's own, where they are of use, in fp32 on CPUs, and can be compiled; else "torch"."""
    kind = torch.device(device).type
    with autocast(kind, precision):
        reduced = torch.is_autocast_enabled(kind)
    return "native" if kind == "cpu" and not reduced and native.available() else "torch"


def memory_format(device: torch.device | str, compiled: bool) -> torch.memory_format:
    """Of images, features and convolutions' weights, for inference.

    Tensor cores want channels last; but PyTorch's group normalisation for GPUs turns them round, and back, so that
    channels first are faster (BENCHMARKS.md) unless the normalisation is compiled, too.
    """
    first = torch.device(device).type == "cuda" and not compiled
    return torch.contiguous_format if first else torch.channels_last


def prepared(model: Model, device: torch.device | str, kernels: Kernels, compiled: bool = False) -> Model:
    """A model on its device, for inference: in the memory format that suits it, by these kernels; in place.

    With native kernels an autoencoder takes image by image: what passes from layer to layer then stays in the cache,
    and what an image gives does not depend on the others of its batch.

    Args:
        compiled: it is going to be run by torch.compile.

    Raises:
        NoKernels: kernels="native" can't be had here.
    """
    model.to(device=device, memory_format=memory_format(device, compiled)).requires_grad_(False)
    if kernels == "native":
        native.accelerate(model)
        if hasattr(model, "enable_slicing"):
            model.enable_slicing()
    return model
