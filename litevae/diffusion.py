"""What a denoising network learns: objective, noise levels, weights of the loss, averaged weights.

It sees *normalised* latents: per channel zero mean and unit variance over the whole data set.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor, nn

from litevae.errors import UserError

STEPS = 1000  # noise levels; a network's timestep runs from 0, no noise, to 1000

Scheduler: TypeAlias = DDIMScheduler | DPMSolverMultistepScheduler


@dataclass(frozen=True)
class NoisedBatch:
    """Latents with noise added, and what a network should make of them.

    Attributes:
        noisy: (N, C, h, w), what the network sees.
        timesteps: (N,), its noise levels: 0, no noise, to 1000.
        target: (N, C, h, w), what it should predict.
        weights: (N,), those of the squared errors.
    """

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Objective:
    """What is predicted, at which noise levels, and with which weight.

    Args:
        prediction: "epsilon", the noise (Rombach's, and the paper's); "v" = a epsilon - s z (arXiv 2202.00512); "flow",
            rectified flow's epsilon - z on straight lines x = (1 - t) z + t epsilon (arXiv 2209.03003).
        schedule: of epsilon and v: "sqrt-linear", betas 0.0015 to 0.0195 linear in the square root (Rombach), or
            "cosine" (arXiv 2102.09672).
        zero_snr: the schedule is moved so that its last level is noise alone (arXiv 2305.08891).
        weighting: "none", or "min-snr": as if the error of z had the weight min(SNR, gamma) (arXiv 2303.09556).
        times: of flow: "uniform", or "logit-normal", more often in the middle (arXiv 2403.03206).

    Raises:
        UserError: these do not go together.
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
                f"zero_snr needs prediction=v: of noise alone, {self.prediction} "
                + ("has such a level anyway" if self.prediction == "flow" else "says nothing about the image")
            )
        if self.weighting == "min-snr" and self.prediction == "flow":
            raise UserError("weighting=min-snr is for prediction=epsilon and v; flow takes times=logit-normal")
        if self.times == "logit-normal" and self.prediction != "flow":
            raise UserError("times=logit-normal is for prediction=flow; epsilon and v take weighting=min-snr")

    def scheduler(self) -> Scheduler:
        """diffusers' scheduler of these noise levels, which samplers start from.

        Sampling begins at the noisiest level and ends without noise ("trailing" spacing, arXiv 2305.08891); Rombach's
        sampler begins up to 1000/steps below it.
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
            # Its noisiest level multiplies an error of epsilon by 20,000, and diffusers' DDIM can't begin below it.
            return DPMSolverMultistepScheduler(STEPS, final_sigmas_type="zero", lambda_min_clipped=-5.1, **levels)
        return DDIMScheduler(
            STEPS,
            rescale_betas_zero_snr=self.zero_snr,
            clip_sample=False,  # latents have no bound
            set_alpha_to_one=True,
            **levels,
        )

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        return {}

    def _alphas(self, device: torch.device) -> Tensor:
        """Copied to a device once: a step that copies from the host waits for all that the device has to do."""
        if device not in self._copies:
            self._copies[device] = self.scheduler().alphas_cumprod.to(device)
        return self._copies[device]

    def noised(self, z: Tensor, noise: Tensor, u: Tensor) -> NoisedBatch:
        """Add noise to latents.

        Args:
            z: normalised latents (N, C, h, w).
            noise: standard normal, (N, C, h, w).
            u: uniform numbers (N,) in [0, 1), which choose the noise levels.
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
        """An error of epsilon is one of z times the SNR; of v, times SNR + 1."""
        if self.weighting == "none":
            return torch.ones_like(snr)
        return snr.clamp(max=self.gamma) / (snr + 1 if self.prediction == "v" else snr)

    def loss(
        self, network: nn.Module, z: Tensor, noise: Tensor, u: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of each image (N,), in fp32: the weighted squared error of the prediction, the error without its weight, and
        the noise level in [0, 1].

        Args:
            z: normalised latents (N, C, h, w).
            noise, u: as `draws` gives them.
            labels: int64 (N,), of a class-conditional network.
        """
        batch = self.noised(z, noise, u)
        predicted = network(batch.noisy, batch.timesteps, **({} if labels is None else {"class_labels": labels})).sample
        error = F.mse_loss(predicted.float(), batch.target, reduction="none").mean(dim=(1, 2, 3))
        return batch.weights * error, error, batch.timesteps / STEPS


def draws(seed: int, positions: Sequence[int], shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """What chance adds to images at these positions of a run: noise (n, *shape) and two uniform numbers in [0, 1), for
    the noise level (n,) and for dropping the label (n,). Each depends on (seed, position) alone, so that neither the
    number of workers nor of micro-batches changes what is learned from an image."""
    noise, numbers = np.empty((len(positions), *shape), np.float32), np.empty((len(positions), 2), np.float32)
    for n, position in enumerate(positions):
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, position, 2))))
        generator.random(out=numbers[n], dtype=np.float32)
        generator.standard_normal(out=noise[n], dtype=np.float32)
    u, drop = torch.from_numpy(numbers).unbind(1)
    return torch.from_numpy(noise), u, drop


class EMA:
    """Exponential moving average of a module's weights: parameters, and the running statistics of batch normalisation,
    which go with them.

    The n-th update (from 0) keeps min(decay, (1 + n) / (10 + n)) of the average, so that a young average is not
    held back by the random start.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        weights = model.state_dict().items()
        self.average = {name: value.clone() for name, value in weights if value.is_floating_point()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Call once after each optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.average.values()), self._weights(model), 1 - decay)
        self.updates += 1

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """The averaged weights in `model`; its own come back on leaving, also by an exception."""
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
        return {"updates": self.updates, "average": dict(self.average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["average"].keys() != self.average.keys():
            raise UserError("the averaged weights are those of another model")
        for name, value in state["average"].items():
            self.average[name].copy_(value)
        self.updates = state["updates"]

    def _weights(self, model: nn.Module) -> list[Tensor]:
        weights = model.state_dict()
        return [weights[name] for name in self.average]
