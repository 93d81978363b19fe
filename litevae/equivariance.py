"""Transforms that images and their latents undergo together, which train an autoencoder to be equivariant, or test it.

After EQ-VAE (Kouzelis et al. 2025, arXiv 2502.09509): an autoencoder is equivariant to a transform t if its decoder
makes t(x) of t(z), where z is the latent of the image x.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class SpatialTransform:
    """A change of size, then a rotation by quarter turns.

    Attributes:
        scale: Height and width of the latents after the change, as shares of those before, in (0, 1].
        turns: Counter-clockwise quarter turns, 0 to 3.
    """

    scale: float = 1.0
    turns: int = 0

    def latents(self, z: Tensor) -> Tensor:
        """Transform latents (N, C, h, w) into (N, C, h', w'), where h' is `scale` times h, rounded, at least 1."""
        return self._applied(z, self._sides(z, 1))

    def images(self, x: Tensor, factor: int = 8) -> Tensor:
        """Transform images (N, C, H, W) as `latents` transforms their latents.

        Args:
            x: The images.
            factor: The autoencoder's downsampling factor, by which H and W can be divided.

        Returns:
            Images whose sides are `factor` times those of the transformed latents.
        """
        return self._applied(x, self._sides(x, factor))

    def _sides(self, x: Tensor, factor: int) -> tuple[int, int]:
        """Return height and width after the change of size."""
        height, width = (factor * max(1, round(side // factor * self.scale)) for side in x.shape[-2:])
        return height, width

    def _applied(self, x: Tensor, sides: tuple[int, int]) -> Tensor:
        # EQ-VAE interpolates without antialiasing; with it, fine structures do not turn into coarse ones.
        if sides != tuple(x.shape[-2:]):
            x = F.interpolate(x, size=sides, mode="bilinear", antialias=True)
        return x.rot90(self.turns, dims=(-2, -1)) if self.turns else x


def draw_transform(random: np.random.Generator, side: int, smallest: float = 0.25) -> SpatialTransform:
    """Draw a transform as EQ-VAE's training does: smaller, and rotated by one to three quarter turns.

    Args:
        random: Source of randomness.
        side: Height and width of the latents. The scale is one of k / side, so that nothing has to be rounded.
        smallest: Smallest scale, in (0, 1]. Latents that are too small to be made smaller are only rotated.
    """
    return SpatialTransform(draw_scale(random, side, smallest), int(random.integers(1, 4)))


def draw_scale(random: np.random.Generator, side: int, smallest: float = 0.25) -> float:
    """Draw k / side for k from ceil(`smallest` * side) to side - 1, all equally likely; 1.0 if there is no such k."""
    least = max(1, math.ceil(smallest * side))
    return int(random.integers(least, side)) / side if least < side else 1.0
