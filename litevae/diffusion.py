"""The training objective of diffusion models: prediction target, noise levels, loss weights, and EMA of the weights.

The networks see *normalised* latents: each channel has zero mean and unit variance over the whole data set.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor, nn

from litevae.errors import UserError

STEPS = 1000  # number of noise levels; timesteps run from 0 (no noise) to 1000

Scheduler: TypeAlias = DDIMScheduler | DPMSolverMultistepScheduler


@dataclass(frozen=True)
class NoisedBatch:
    """A batch of noisy latents, and the target that the network should predict for them.

    Attributes:
        noisy: Noisy latents (N, C, h, w), the input of the network.
        timesteps: Noise levels (N,), from 0 (no noise) to 1000.
        target: Target (N, C, h, w) of the prediction.
        weights: Weights (N,) of the squared errors.
    """

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Objective:
    """The training objective: what the network predicts, at which noise levels, and how errors are weighted.

    For "epsilon" and "v" the noisy latent is x = a z + s epsilon, with a^2 + s^2 = 1.

    Args:
        prediction: "epsilon", the noise (Rombach et al., and the LiteVAE paper); "v", a epsilon - s z
            (arXiv 2202.00512); or "flow", rectified flow's epsilon - z on straight lines x = (1 - t) z + t epsilon
            (arXiv 2209.03003).
        schedule: Noise schedule for epsilon and v: "sqrt-linear", whose betas go from 0.0015 to 0.0195, linear in the
            square root (Rombach et al.), or "cosine" (arXiv 2102.09672).
        zero_snr: Whether to rescale the schedule so that its last level is pure noise (arXiv 2305.08891).
        weighting: "none", or "min-snr", which weights the error of z by min(SNR, gamma) (arXiv 2303.09556); with
            `zero_snr` by min(SNR + 1, gamma), because min(SNR, gamma) is 0 at the level of pure noise, at which
            sampling begins, and the network would never learn it.
        gamma: Upper limit of the weight for "min-snr".
        times: Distribution of t for flow: "uniform", or "logit-normal", which samples the middle more often
            (arXiv 2403.03206).

    Raises:
        UserError: if two of the values do not go together.
    """

    prediction: Literal["epsilon", "v", "flow"] = "epsilon"
    schedule: Literal["sqrt-linear", "cosine"] = "sqrt-linear"
    zero_snr: bool = False
    weighting: Literal["none", "min-snr"] = "none"
    gamma: float = 5.0
    times: Literal["uniform", "logit-normal"] = "uniform"

    def __post_init__(self) -> None:
        if self.zero_snr and self.prediction != "v":
            raise UserError(
                "zero_snr needs prediction=v: "
                + (
                    "prediction=flow always has a level of pure noise"
                    if self.prediction == "flow"
                    else "at a level of pure noise, predicting epsilon says nothing about the image"
                )
            )
        if self.weighting == "min-snr" and self.prediction == "flow":
            raise UserError("weighting=min-snr is for prediction=epsilon and v; flow takes times=logit-normal")
        if self.times == "logit-normal" and self.prediction != "flow":
            raise UserError("times=logit-normal is for prediction=flow; epsilon and v take weighting=min-snr")

    def scheduler(self) -> Scheduler:
        """Return the diffusers scheduler with these noise levels. Samplers are built from it.

        Sampling begins at the noisiest level and ends without noise ("trailing" spacing, arXiv 2305.08891). The sampler
        of Rombach et al. begins up to 1000/steps timesteps below the noisiest level.
        """
        if self.prediction == "flow":
            return DPMSolverMultistepScheduler(
                STEPS, prediction_type="flow_prediction", use_flow_sigmas=True, final_sigmas_type="zero"
            )
        levels: dict[str, Any] = {
            "beta_start": 0.0015,
            "beta_end": 0.0195,
            "beta_schedule": {"sqrt-linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}[self.schedule],
            "prediction_type": {"epsilon": "epsilon", "v": "v_prediction"}[self.prediction],
            "timestep_spacing": "trailing",
        }
        if self.prediction == "epsilon" and self.schedule == "cosine":
            # The noisiest level of this schedule multiplies an error of epsilon by 20,000, and diffusers' DDIM can't
            # begin at a lower level.
            return DPMSolverMultistepScheduler(STEPS, final_sigmas_type="zero", lambda_min_clipped=-5.1, **levels)
        return DDIMScheduler(
            STEPS,
            rescale_betas_zero_snr=self.zero_snr,
            clip_sample=False,  # latents are unbounded
            set_alpha_to_one=True,
            **levels,
        )

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        """The copies that `_alphas` has made, by device."""
        return {}

    def _alphas(self, device: torch.device) -> Tensor:
        """Return the cumulative alphas (a^2 of each level) on a device.

        They are copied to each device only once, because a copy from the host makes the training step wait until the
        device has finished all its work.
        """
        if device not in self._copies:
            self._copies[device] = self.scheduler().alphas_cumprod.to(device)
        return self._copies[device]

    def noised(self, z: Tensor, noise: Tensor, u: Tensor) -> NoisedBatch:
        """Add noise to latents.

        Args:
            z: Normalised latents (N, C, h, w).
            noise: Standard normal noise (N, C, h, w).
            u: Uniform random numbers (N,) in [0, 1), which choose the noise levels.
        """
        if self.prediction == "flow":
            t = torch.special.ndtri(u.double()).sigmoid().float() if self.times == "logit-normal" else u
            level = t.view(-1, 1, 1, 1)
            return NoisedBatch((1 - level) * z + level * noise, t * STEPS, noise - z, torch.ones_like(t))
        timesteps = (u * STEPS).long().clamp(max=STEPS - 1)
        squared = self._alphas(z.device)[timesteps]
        a, s = squared.sqrt().view(-1, 1, 1, 1), (1 - squared).sqrt().view(-1, 1, 1, 1)
        target = noise if self.prediction == "epsilon" else a * noise - s * z
        return NoisedBatch(a * z + s * noise, timesteps, target, self._weights(squared / (1 - squared)))

    def _weights(self, snr: Tensor) -> Tensor:
        """Return the weights (N,) of the squared errors for these signal-to-noise ratios.

        The squared error of epsilon is that of z times the SNR; the squared error of v is that of z times SNR + 1.
        With `zero_snr`, what gamma limits is therefore SNR + 1, the weight of z in the unweighted loss of v ("SNR+1
        weighting", section 4 of arXiv 2202.00512), as in diffusers' train_pixart_controlnet_hf.py: noisy levels have
        weight 1, also where the SNR is 0.
        """
        if self.weighting == "none":
            return torch.ones_like(snr)
        if self.zero_snr:
            return (snr + 1).clamp(max=self.gamma) / (snr + 1)
        return snr.clamp(max=self.gamma) / (snr + 1 if self.prediction == "v" else snr)

    def loss(
        self, network: nn.Module, z: Tensor, noise: Tensor, u: Tensor, labels: Tensor | None = None
    ) -> "ImageLosses":
        """Return the loss of each image.

        Args:
            network: The denoising network; see `litevae.denoiser.build_denoiser` for how it is called.
            z: Normalised latents (N, C, h, w).
            noise: Standard normal noise (N, C, h, w), from `random_numbers`.
            u: Uniform random numbers (N,) in [0, 1), from `random_numbers`.
            labels: Class labels (N,), int64, for a class-conditional network.
        """
        batch = self.noised(z, noise, u)
        predicted = network(batch.noisy, batch.timesteps, **({} if labels is None else {"class_labels": labels})).sample
        error = F.mse_loss(predicted.float(), batch.target, reduction="none").mean(dim=(1, 2, 3))
        return ImageLosses(batch.weights * error, error, batch.timesteps / STEPS)


class ImageLosses(NamedTuple):
    """The losses of the n images of a batch, tensors (n,) in fp32.

    Attributes:
        weighted: The weighted squared error of the prediction.
        error: The squared error without its weight.
        level: The noise level in [0, 1].
    """

    weighted: Tensor
    error: Tensor
    level: Tensor


class RandomNumbers(NamedTuple):
    """The random numbers of a training step for n images.

    Attributes:
        noise: Standard normal noise (n, C, h, w).
        u: Uniform numbers (n,) in [0, 1) for the noise level.
        drop: Uniform numbers (n,) in [0, 1) for dropping the label.
    """

    noise: Tensor
    u: Tensor
    drop: Tensor


def random_numbers(seed: int, positions: Sequence[int], shape: Sequence[int]) -> RandomNumbers:
    """Draw the random numbers of a training step for the images at these positions of a run.

    All numbers of an image depend only on (seed, position). So what is learned from an image depends neither on the
    number of workers nor on the number of micro-batches.

    Args:
        seed: Seed of the run.
        positions: Positions of the n images in the order of the run.
        shape: Shape (C, h, w) of a latent.
    """
    noise, numbers = np.empty((len(positions), *shape), np.float32), np.empty((len(positions), 2), np.float32)
    for n, position in enumerate(positions):
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, position, 2))))
        generator.random(out=numbers[n], dtype=np.float32)
        generator.standard_normal(out=noise[n], dtype=np.float32)
    u, drop = torch.from_numpy(numbers).unbind(1)
    return RandomNumbers(torch.from_numpy(noise), u, drop)


class EMA:
    """Exponential moving average of a module's weights, and of the running statistics of its batch normalisation.

    Update n (counted from 0) keeps min(decay, (1 + n) / (10 + n)) of the average, so that the random initial weights
    are soon forgotten.

    Args:
        model: The module.
        decay: Upper limit of the share of the average that an update keeps.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        weights = model.state_dict().items()
        self.average = {name: value.clone() for name, value in weights if value.is_floating_point()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average with the current weights. Call this once after each optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.average.values()), self._weights(model), 1 - decay)
        self.updates += 1

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Put the averaged weights into `model` within a `with` block, and restore its own weights at the end.

        The weights are restored after an exception too.
        """
        weights = self._weights(model)
        own = [value.clone() for value in weights]
        with torch.no_grad():
            torch._foreach_copy_(weights, list(self.average.values()))
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(weights, own)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates and the averaged weights."""
        return {"updates": self.updates, "average": dict(self.average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`.

        Raises:
            UserError: if the state is of another model.
        """
        if state["average"].keys() != self.average.keys():
            raise UserError("the averaged weights belong to another model")
        for name, value in state["average"].items():
            self.average[name].copy_(value)
        self.updates = state["updates"]

    def _weights(self, model: nn.Module) -> list[Tensor]:
        """Return the weights of `model` in the order of the average."""
        weights = model.state_dict()
        return [weights[name] for name in self.average]
