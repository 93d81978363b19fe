"""Functions to run a trained model as fast as possible on its device: memory format, kernels and slicing."""

from typing import Literal, TypeVar

import torch
from diffusers.models.modeling_utils import ModelMixin

from litevae import native
from litevae.precision import autocast

Kernels = Literal["native", "torch"]

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

    With native kernels an autoencoder processes the images of a batch one by one. Then the tensors between layers stay
    in the CPU cache, and the result for an image does not depend on the other images of its batch.

    Args:
        model: The model.
        device: The device.
        kernels: "native" or "torch"; see `best_kernels`.
        compiled: Whether the model will be compiled by torch.compile.

    Returns:
        The same model.

    Raises:
        NoKernels: if `kernels` is "native", and they can't be compiled or loaded on this machine.
    """
    model.to(device=device, memory_format=memory_format(device, compiled)).requires_grad_(False)
    if kernels == "native":
        native.accelerate(model)
        if hasattr(model, "enable_slicing"):
            model.enable_slicing()
    return model
