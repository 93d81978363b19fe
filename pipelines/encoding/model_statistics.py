"""Compare the statistics of a cache's latents with those that the model's config carries for diffusers pipelines."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from litevae.commits import constant_channels
from litevae.latent_statistics import scaling

LIMIT = 0.05  # relative difference of standard deviations, and shift of means in units of them, from which it is said


def disagreement(config: Mapping[str, Any], mean: Sequence[float], std: Sequence[float]) -> str:
    """Return what to tell the user if the model's own statistics are not those of a cache; "" if they agree.

    By channel, the ratio of the standard deviations and the shift of the mean in units of the model's standard
    deviation are compared with the model's `latents_std` and `latents_mean`. For a model that has only a
    `scaling_factor`, the standard deviation over all channels is compared with its inverse. Channels that are constant
    in the cache are left out.

    Args:
        config: the model's config.
        mean: mean of each channel of the cache's latents.
        std: standard deviation of each channel of the cache's latents.
    """
    try:
        own = scaling(mean, std)
    except ValueError:  # all latents are equal
        return ""
    factors = f"scaling_factor={own['scaling_factor']:.4g} shift_factor={own['shift_factor']:.4g}"
    factor = config.get("scaling_factor") or 1.0
    if config.get("latents_std") and config.get("latents_mean"):
        found = _by_channel(config, mean, std)
    elif factor != 1:
        ratio = factor / own["scaling_factor"]
        found = f"the standard deviation is {ratio:.3g} times 1 / scaling_factor" if abs(ratio - 1) > LIMIT else ""
    elif config.get("_class_name") == "LiteVAE":
        return (
            f"the model's config has none, so pipelines of diffusers do not scale its latents; those of this cache are "
            f"{factors}. train_ldm uses the cache's own"
        )
    else:
        return ""
    if not found:
        return ""
    return (
        f"those in the model's config are not those of this cache: {found}. train_ldm uses the cache's own; scripts "
        f"and pipelines of diffusers take the model's, and need {factors} for these images"
    )


def _by_channel(config: Mapping[str, Any], mean: Sequence[float], std: Sequence[float]) -> str:
    """Return how the channel that differs most differs; "" if none differs by more than the limit."""
    theirs, stds = (np.asarray(config[key], np.float64) for key in ("latents_mean", "latents_std"))
    if theirs.shape != np.shape(mean) or stds.shape != np.shape(std):
        return f"the config has statistics of {len(stds)} channels, the cache has {len(std)}"
    with np.errstate(divide="ignore", invalid="ignore"):  # a channel may be constant
        ratio, shift = np.asarray(std) / stds, (np.asarray(mean) - theirs) / stds
    wrong = np.maximum(np.abs(ratio - 1), np.abs(shift))
    wrong[constant_channels(mean, std)] = 0
    if wrong.max() <= LIMIT:
        return ""
    worst = int(wrong.argmax())
    return (
        f"in {np.sum(wrong > LIMIT)} of {len(wrong)} channels by more than {LIMIT:.0%}, most in channel {worst} (from "
        f"0), whose standard deviation is {ratio[worst]:.3g} times the model's and whose mean is off by "
        f"{shift[worst]:.2g} of it"
    )
