"""Settings that decide how networks run: memory format, torch.compile, and when ranks exchange gradients."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

RECOMPILE_LIMIT = 64  # the number of input shapes and ways of use that one network may be compiled for


def memory_format(device: torch.device, compiled: bool) -> torch.memory_format:
    """Return the memory format for images, features and convolution weights.

    It is channels-last for compiled networks on a GPU and contiguous otherwise. On GPUs without torch.compile, group
    normalisation would convert channels-last tensors back. On CPUs with AVX2, the gradients of channels-last
    convolutions take up to twice as long.
    """
    return torch.channels_last if device.type == "cuda" and compiled else torch.contiguous_format


def compile_parts(*parts: nn.Module | None) -> None:
    """Compile modules in place with torch.compile; the names of their weights do not change.

    Each module is compiled once for every input shape and every way of use. There are few shapes: a stage has a few,
    and all its batches have the same ones. An example of two ways of use is a discriminator with and without
    gradients of its weights. Kernels for dynamic sizes would be slower.

    Args:
        parts: the modules; None is skipped.
    """
    limits: dict[str, Any] = {"isolate_recompiles": True, "recompile_limit": RECOMPILE_LIMIT}
    if not limits.keys() <= inspect.signature(torch.compile).parameters.keys():  # before PyTorch 2.14: one global limit
        limits, torch._dynamo.config.recompile_limit = {}, RECOMPILE_LIMIT
    for part in parts:
        if part is not None:
            part.compile(dynamic=False, **limits)


def uncompiled() -> AbstractContextManager:
    """Return a context in which compiled modules run eagerly, for rare calls or calls with other shapes."""
    return torch.compiler.set_stance("force_eager")


def synced(net: Any, last: bool) -> AbstractContextManager:
    """Return the context for the forward and backward pass of one micro-batch.

    Under DDP, ranks exchange gradients only in the last micro-batch of a step.

    Args:
        net: the network, wrapped in DDP or not.
        last: whether this is the step's last micro-batch.
    """
    return nullcontext() if last or not hasattr(net, "no_sync") else net.no_sync()
