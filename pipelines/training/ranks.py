"""What the workers of a training tell each other, apart from gradients."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def gathered(mine: list[Any], world: int) -> list[Any]:
    """The items of all ranks, in the order of ranks. All ranks call this together.

    Args:
        mine: this rank's items, which can be pickled.
        world: how many ranks there are; one alone takes no process group.
    """
    if world == 1:
        return mine
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, mine)
    return [item for part in parts for item in part]


def mean_over_ranks(tensors: dict[str, Tensor]) -> dict[str, float]:
    """The mean of each number over all ranks where it is finite, NaN where it is nowhere.

    All ranks call this together, with the same keys.
    """
    values = {key: float(value) for key, value in tensors.items()}
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return values
    everywhere = gathered([values], torch.distributed.get_world_size())
    found = {key: [one[key] for one in everywhere if np.isfinite(one[key])] for key in values}
    return {key: sum(numbers) / len(numbers) if numbers else float("nan") for key, numbers in found.items()}
