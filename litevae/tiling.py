"""Encode and decode in tiles that overlap, so that memory does not grow with the size of the image."""

from collections.abc import Callable

import torch
from torch import Tensor


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Return where tiles begin on an axis. All have the full length: the last one is moved back to end with the axis.

    Args:
        size: Length of the axis, longer than `tile`.
        tile: Length of a tile.
        overlap: The least that two neighbours have in common.
    """
    return [*range(0, size - tile, tile - overlap), size - tile]


def tile_weights(size: int, starts: list[int], tile: int, overlap: int) -> list[Tensor]:
    """Return the share (tile,) that each tile has in the result, in fp64; at each position the shares add up to 1.

    Within an overlap, the quarter next to a tile's inner end counts nothing, because there the network sees the padding
    instead of the image; then the share rises linearly over half the overlap.
    """
    ramp = ((torch.arange(tile, dtype=torch.float64) + 0.5 - overlap / 4) / max(overlap / 2, 0.5)).clamp(1e-12, 1)
    weights, total = [], torch.zeros(size, dtype=torch.float64)
    for start in starts:
        weight = torch.ones(tile, dtype=torch.float64)
        if start > 0:
            weight = weight * ramp
        if start + tile < size:
            weight = weight * ramp.flip(0)
        weights.append(weight)
        total[start : start + tile] += weight
    return [weight / total[start : start + tile] for start, weight in zip(starts, weights, strict=True)]


def tiled(compute: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, unit: tuple[int, int]) -> Tensor:
    """Compute a network tile by tile and blend what it gives.

    Args:
        compute: The network: (N, C, a h, a w) -> (N, D, b h, b w).
        x: Input (N, C, a H, a W). An axis not longer than a tile is not cut.
        tile: Side of a tile, in units: `tile` * a elements of the input.
        overlap: The least overlap of neighbours, in units, smaller than `tile`.
        unit: a and b, the elements of input and output in a unit.
    """
    a, b = unit
    sizes = [side // a for side in x.shape[-2:]]
    tiles = [min(tile, size) for size in sizes]
    starts = [tile_starts(size, side, overlap) if side < size else [0] for size, side in zip(sizes, tiles, strict=True)]
    rows, columns = (
        tile_weights(b * size, [b * start for start in begins], b * side, b * overlap)
        for size, side, begins in zip(sizes, tiles, starts, strict=True)
    )
    result: Tensor | None = None
    for top, down in zip(starts[0], rows, strict=True):
        for left, across in zip(starts[1], columns, strict=True):
            part = compute(x[..., a * top : a * (top + tiles[0]), a * left : a * (left + tiles[1])])
            if result is None:
                result = part.new_zeros(*part.shape[:2], b * sizes[0], b * sizes[1])
            place = result[..., b * top : b * (top + tiles[0]), b * left : b * (left + tiles[1])]
            place += part * (down[:, None] * across).to(part)
    assert result is not None
    return result
