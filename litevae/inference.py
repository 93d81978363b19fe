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


def prepared(model: Model, device: torch.device | str, kernels: Kernels) -> Model:
    """A model on its device, for inference: convolutions channels last, by these kernels; in place.

    With native kernels an autoencoder takes image by image: what passes from layer to layer then stays in the cache,
    and what an image gives does not depend on the others of its batch.

    Raises:
        NoKernels: kernels="native" can't be had here.
    """
    model.to(device=device, memory_format=torch.channels_last).requires_grad_(False)
    if kernels == "native":
        native.accelerate(model)
        if hasattr(model, "enable_slicing"):
            model.enable_slicing()
    return model
