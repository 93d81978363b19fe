"""The scaling of latents that a model's config carries for diffusers pipelines, from statistics of its latents."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def scaling(mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> dict[str, Any]:
    """Return the fields of a model's config that scale its latents.

    Args:
        mean: Mean of each channel of the raw latents, (C,).
        std: Standard deviation of each channel of the raw latents, (C,).

    Returns:
        `latents_mean` and `latents_std`, the channels' own; `shift_factor`, the mean over channels; and
        `scaling_factor`, 1 / the standard deviation over all channels together. By the law of total variance, that
        variance is the mean of the channels' variances plus the variance of their means. With these two numbers,
        (z - shift_factor) * scaling_factor has mean 0 and standard deviation 1 over all channels.

    Raises:
        ValueError: if the statistics are not finite, differ in length, or all latents are equal.
    """
    means, stds = (torch.as_tensor(values, dtype=torch.float64, device="cpu").flatten() for values in (mean, std))
    if means.shape != stds.shape or not len(means):
        raise ValueError(f"{len(means)} means and {len(stds)} standard deviations of latent channels")
    shift = means.mean()
    overall = (stds.square().mean() + (means - shift).square().mean()).sqrt()
    if not (means.isfinite().all() and stds.isfinite().all() and overall > 0):
        raise ValueError(f"latents with means {means.tolist()} and standard deviations {stds.tolist()} have no scale")
    return {
        "scaling_factor": float(1 / overall),
        "shift_factor": float(shift),
        "latents_mean": means.tolist(),
        "latents_std": stds.tolist(),
    }
