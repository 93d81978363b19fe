"""Sampling of latents with diffusers' schedulers and classifier-free guidance.

The samplers are DDIM and DPM-Solver++; for flow models, they are Euler, Heun and DPM-Solver++.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from torch import Tensor, nn

from litevae.denoiser import null_class
from litevae.diffusion import Scheduler
from litevae.errors import UserError

# Prediction type -> samplers; the first one is the default.
SAMPLERS = {"flow_prediction": ("euler", "heun", "dpm++")} | dict.fromkeys(
    ("epsilon", "v_prediction"), ("ddim", "dpm++")
)

# At a lower signal-to-noise ratio, the error of an image that is estimated from epsilon is more than 160 times that of
# epsilon. Of the schedules here only the cosine one goes lower (to 2e-9). diffusers advises this value for DPM-Solver++
# with the cosine schedule.
LEAST_SNR = math.exp(2 * -5.1)

Seed = int | Sequence[int]


def sampler_of(scheduler: Scheduler, name: str = "", steps: int = 50, eta: float = 0.0) -> Any:
    """Return a diffusers scheduler that is ready to take `steps` steps of equal length in time.

    If the network predicts epsilon, sampling begins at the level where `LEAST_SNR` is reached. With the cosine schedule
    and more than 250 steps, this leaves out up to 4 steps.

    Args:
        scheduler: The scheduler of the model, from `Objective.scheduler`.
        name: Sampler. For epsilon and v: "ddim" (arXiv 2010.02502) or "dpm++" (DPM-Solver++ 2M, arXiv 2211.01095). For
            flow: "euler", "heun" (two evaluations per step, one in the last) or "dpm++". Empty takes the first of them.
        steps: Number of steps.
        eta: The eta that will be passed to the steps. Only ddim supports values other than 0.

    Raises:
        UserError: if there is no such sampler for the prediction of the model, or it does not support `steps` or `eta`.
    """
    config = scheduler.config
    known = SAMPLERS[config.prediction_type]
    name = name or known[0]
    if name not in known:
        raise UserError(
            f"sampler={name} does not fit a model of {config.prediction_type.removesuffix('_prediction')}; choose one "
            f"of {', '.join(known)}"
        )
    total = config.num_train_timesteps
    if name == "ddim":
        _check_divides(total, steps)
        sampler = DDIMScheduler.from_config(config, clip_sample=False)
        sampler.set_timesteps(steps)
        sampler.timesteps = torch.from_numpy(_levels(scheduler, steps))
        return sampler
    if eta:
        raise UserError(f"eta={eta:g} works only with sampler=ddim; {name} adds no noise")
    if not 1 <= steps <= total:
        raise UserError(f"steps={steps} is not between 1 and {total}")
    if name == "dpm++":
        sampler = DPMSolverMultistepScheduler.from_config(config, final_sigmas_type="zero")
        if config.prediction_type == "flow_prediction":
            sampler.set_timesteps(steps)
        else:  # for some numbers of steps, such as 61, diffusers' own trailing levels are one too many
            sampler.set_timesteps(timesteps=_levels(scheduler, steps).tolist())
    else:
        # Built with `steps` levels instead of 1000: the lowest of 1000 levels is 1/1000, so the last step would be so
        # short that it does nothing.
        sampler = {"euler": FlowMatchEulerDiscreteScheduler, "heun": FlowMatchHeunDiscreteScheduler}[name](steps)
        sampler.set_timesteps(steps)
    sampler.set_begin_index(0)
    return sampler


def _levels(scheduler: Scheduler, steps: int) -> np.ndarray:
    """Return the timesteps for epsilon and v, int64, from the noisiest on.

    They are 1000 / steps apart, and the last one is as far above 0.
    """
    squared, total = scheduler.alphas_cumprod.double(), scheduler.config.num_train_timesteps
    first = total
    if scheduler.config.prediction_type == "epsilon":
        first = int((squared / (1 - squared) >= LEAST_SNR).sum())
    levels = np.round(first - total / steps * np.arange(steps)).astype(np.int64) - 1
    return levels[levels >= 0]


def _check_divides(total: int, steps: int) -> None:
    """Check that `steps` divides the schedule: DDIM's steps are equal, and diffusers would round silently."""
    if steps < 1 or total % steps:
        fitting = [n for n in range(1, total + 1) if total % n == 0]
        near = [*[n for n in fitting if n < steps][-1:], *[n for n in fitting if n > steps][:1]]
        raise UserError(
            f"steps={steps} does not divide the schedule's {total} levels; take {' or '.join(map(str, near))}"
        )


@torch.no_grad()
def sample_latents(
    network: nn.Module,
    scheduler: Scheduler,
    shape: tuple[int, int, int],
    seeds: Sequence[Seed],
    steps: int = 50,
    sampler: str = "",
    eta: float = 0.0,
    labels: Sequence[int] | None = None,
    classes: int = 0,
    guidance: float = 1.0,
) -> Tensor:
    """Sample normalised latents, one per seed.

    All noise of image i comes from numpy.random.default_rng(seeds[i]), so an image does not depend on the other images
    of its batch.

    Args:
        network: The denoising network.
        scheduler: The scheduler of the model, from `Objective.scheduler`.
        shape: Shape (C, h, w) of a latent.
        seeds: A seed per image. A seed is one number or several, such as (seed of the job, number of the image).
        steps: Number of steps.
        sampler: Name of the sampler; see `sampler_of`.
        eta: The eta of DDIM; 0 is deterministic. Other samplers have none.
        labels: A class per image, for a class-conditional network.
        classes: Number of classes of the network; 0 if it is unconditional.
        guidance: Scale w of classifier-free guidance (arXiv 2207.12598). 1 uses the conditional prediction; w uses the
            unconditional prediction plus w times the difference of the two.

    Returns:
        Latents (len(seeds), *shape), on the device of the network.

    Raises:
        UserError: if `sampler_of` or `label_numbers` refuses the arguments.
    """
    stepper = sampler_of(scheduler, sampler, steps, eta)
    device = next(network.parameters()).device
    numbers = label_numbers(labels, classes, len(seeds), guidance)
    own = None if numbers is None else torch.tensor(numbers, device=device)
    generators = [np.random.default_rng(seed) for seed in seeds]

    def noise() -> Tensor:
        return torch.from_numpy(np.stack([g.standard_normal(shape, np.float32) for g in generators])).to(device)

    def predict(x: Tensor, time: Tensor) -> Tensor:
        if own is None:
            return network(x, time).sample.float()
        if guidance == 1:
            return network(x, time, class_labels=own).sample.float()
        both = torch.cat([own, torch.full_like(own, null_class(classes))])
        given, free = network(torch.cat([x, x]), time, class_labels=both).sample.float().chunk(2)
        return free + guidance * (given - free)

    # The times for flow are computed from the sigmas: diffusers uses other units for some samplers, and rounds down for
    # others.
    flow = scheduler.config.prediction_type == "flow_prediction"
    times = stepper.sigmas[:-1] * scheduler.config.num_train_timesteps if flow else stepper.timesteps
    x = noise()
    for time, step in zip(times, stepper.timesteps, strict=True):
        # With eta = 1, at levels with almost no signal, diffusers takes the root of a number that rounding made
        # negative.
        more = {"eta": min(eta, 1 - 1e-6), "variance_noise": noise()} if eta else {}
        x = stepper.step(predict(x, time), step, x, **more).prev_sample
    return x


def label_numbers(labels: Sequence[int] | None, classes: int, images: int, guidance: float = 1.0) -> list[int] | None:
    """Return the class labels to pass to a network.

    Returns:
        None for an unconditional network; the given labels; or, if none are given, the label of "no class" for every
        image.

    Raises:
        UserError: if the number of labels is not that of images, a label is not a class, labels or guidance are given
            for an unconditional network, or guidance is given without labels.
    """
    if not classes:
        if labels is not None or guidance != 1:
            raise UserError("the model is unconditional: neither classes nor guidance can be given")
        return None
    if labels is None:
        if guidance != 1:
            raise UserError(f"guidance={guidance:g} needs classes")
        return [null_class(classes)] * images
    if len(labels) != images:
        raise UserError(f"there are {len(labels)} labels for {images} images; give one for each")
    if wrong := [label for label in labels if not (0 <= label < classes or label == null_class(classes))]:
        raise UserError(
            f"class {wrong[0]} does not exist: the model knows 0 to {classes - 1}, and {null_class(classes)} for "
            f"images without a class"
        )
    return list(labels)
