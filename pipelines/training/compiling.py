"""How networks run: the layout of their memory, torch.compile, and when ranks exchange gradients."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

RECOMPILE_LIMIT = 64  # shapes and uses that a network is compiled for


def memory_format(device: torch.device, compiled: bool) -> torch.memory_format:
    """Of images, features and convolutions' weights: channels last for compiled networks on a GPU. Elsewhere group
    normalisation turns them round (GPUs), or gradients of convolutions take up to twice as long (CPUs with AVX2)."""
    return torch.channels_last if device.type == "cuda" and compiled else torch.contiguous_format


def compile_parts(*parts: nn.Module | None) -> None:
    """torch.compile these modules in place, names of their weights and all.

    Each is compiled once for every shape (stages have a few, and all their batches the same) and use (a discriminator
    with and without gradients of its weights). Kernels for any size would be slower.
    """
    limits: dict[str, Any] = {"isolate_recompiles": True, "recompile_limit": RECOMPILE_LIMIT}
    if not limits.keys() <= inspect.signature(torch.compile).parameters.keys():  # before PyTorch 2.14: one for all
        limits, torch._dynamo.config.recompile_limit = {}, RECOMPILE_LIMIT
    for part in parts:
        if part is not None:
            part.compile(dynamic=False, **limits)


def uncompiled() -> AbstractContextManager:
    """Context in which compiled modules run as they are, for what is seldom done or in other shapes."""
    return torch.compiler.set_stance("force_eager")


def synced(net: Any, last: bool) -> AbstractContextManager:
    """Around a micro-batch's forward and backward: gradients cross the network with the last one only."""
    return nullcontext() if last or not hasattr(net, "no_sync") else net.no_sync()
