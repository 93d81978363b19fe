"""Exchange of values between the workers of a training, besides the gradients that DDP averages."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def world() -> int:
    """Return the number of ranks."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def gathered(mine: list[Any], world: int) -> list[Any]:
    """Gather the items of all ranks, in the order of ranks. All ranks must call this together.

    Args:
        mine: this rank's items, which must be picklable.
        world: the number of ranks; with 1, no process group is needed.

    Returns:
        One list with the items of rank 0, then those of rank 1, and so on.
    """
    if world == 1:
        return mine
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, mine)
    return [item for part in parts for item in part]


def mean_over_ranks(tensors: dict[str, Tensor]) -> dict[str, float]:
    """Return the mean of each number over the ranks on which it is finite; NaN if it is finite on none.

    All ranks must call this together, with the same keys.
    """
    values = {key: float(value) for key, value in tensors.items()}
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return values
    everywhere = gathered([values], torch.distributed.get_world_size())
    found = {key: [one[key] for one in everywhere if np.isfinite(one[key])] for key in values}
    return {key: sum(numbers) / len(numbers) if numbers else float("nan") for key, numbers in found.items()}


def average(tensor: Tensor) -> Tensor:
    """Average a tensor over all ranks. All ranks must call this together."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
        tensor = tensor / torch.distributed.get_world_size()
    return tensor
