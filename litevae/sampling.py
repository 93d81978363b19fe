"""Sampling latents by diffusers' schedulers: DDIM, DPM-Solver++, Euler and Heun for flow; classifier-free guidance."""

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

# The first is the default.
SAMPLERS = {"flow_prediction": ("euler", "heun", "dpm++")} | dict.fromkeys(
    ("epsilon", "v_prediction"), ("ddim", "dpm++")
)

# Below it the error of an image that is estimated from epsilon is that of epsilon times more than 160. Of the schedules
# here only the cosine one goes there (to 2e-9). The value is what diffusers advises for DPM-Solver++ on it.
LEAST_SNR = math.exp(2 * -5.1)

Seed = int | Sequence[int]


def sampler_of(scheduler: Scheduler, name: str = "", steps: int = 50, eta: float = 0.0) -> Any:
    """A diffusers scheduler that is ready to take `steps` steps, of equal length in time.

    Where the network predicts epsilon, they begin where `LEAST_SNR` is reached. On a cosine schedule with more than 250
    steps that leaves up to 4 out.

    Args:
        scheduler: the model's, of `Objective.scheduler`.
        name: "ddim" (arXiv 2010.02502) and "dpm++" (DPM-Solver++ 2M, arXiv 2211.01095) for epsilon and v; "euler",
            "heun" (two evaluations a step, but for the last) and "dpm++" for flow; empty: the first of them.
        eta: that its steps will be given. Only ddim has one.

    Raises:
        UserError: no such sampler for what the model predicts, or steps or eta that it can't take.
    """
    config = scheduler.config
    known = SAMPLERS[config.prediction_type]
    name = name or known[0]
    if name not in known:
        raise UserError(
            f"sampler={name}: a model of {config.prediction_type.removesuffix('_prediction')} takes {', '.join(known)}"
        )
    total = config.num_train_timesteps
    if name == "ddim":
        _check_divides(total, steps)
        sampler = DDIMScheduler.from_config(config, clip_sample=False)
        sampler.set_timesteps(steps)
        sampler.timesteps = torch.from_numpy(_levels(scheduler, steps))
        return sampler
    if eta:
        raise UserError(f"eta={eta:g} is for sampler=ddim alone; {name} adds no noise")
    if not 1 <= steps <= total:
        raise UserError(f"steps={steps} is not between 1 and {total}")
    if name == "dpm++":
        sampler = DPMSolverMultistepScheduler.from_config(config, final_sigmas_type="zero")
        if config.prediction_type == "flow_prediction":
            sampler.set_timesteps(steps)
        else:  # diffusers' own trailing levels are one too many for some numbers of steps, such as 61
            sampler.set_timesteps(timesteps=_levels(scheduler, steps).tolist())
    else:
        # Of `steps` levels, for the lowest of 1000 is 1/1000: their last step would be so short, and do nothing.
        sampler = {"euler": FlowMatchEulerDiscreteScheduler, "heun": FlowMatchHeunDiscreteScheduler}[name](steps)
        sampler.set_timesteps(steps)
    sampler.set_begin_index(0)
    return sampler


def _levels(scheduler: Scheduler, steps: int) -> np.ndarray:
    """Timesteps int64 of epsilon and v, from the noisiest: 1000 / steps apart, the last one above 0 by as much."""
    squared, total = scheduler.alphas_cumprod.double(), scheduler.config.num_train_timesteps
    first = total
    if scheduler.config.prediction_type == "epsilon":
        first = int((squared / (1 - squared) >= LEAST_SNR).sum())
    levels = np.round(first - total / steps * np.arange(steps)).astype(np.int64) - 1
    return levels[levels >= 0]


def _check_divides(total: int, steps: int) -> None:
    """DDIM's steps are equal, and diffusers rounds silently."""
    if steps < 1 or total % steps:
        fitting = [n for n in range(1, total + 1) if total % n == 0]
        near = [*[n for n in fitting if n < steps][-1:], *[n for n in fitting if n > steps][:1]]
        raise UserError(f"steps={steps} does not divide the schedule's {total}; take {' or '.join(map(str, near))}")


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
    """Normalised latents (len(seeds), *shape), on the network's device.

    All noise of image i comes from numpy.random.default_rng(seeds[i]) - a seed is a number or several, such as
    (seed of the job, number of the image) - so that its batch does not matter.

    Args:
        sampler: see `sampler_of`.
        eta: DDIM's; 0 is deterministic. Other samplers have none.
        labels: a class for each image, of a conditional network with so many `classes`.
        guidance: arXiv 2207.12598: 1 takes the conditional prediction, w the unconditional plus w times the difference.

    Raises:
        UserError: see `sampler_of`; labels that are missing, not wanted or of no class; eta or guidance where there is
            none.
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

    # Flow's are exact: diffusers has other units for some of its samplers, and rounds them down for others.
    flow = scheduler.config.prediction_type == "flow_prediction"
    times = stepper.sigmas[:-1] * scheduler.config.num_train_timesteps if flow else stepper.timesteps
    x = noise()
    for time, step in zip(times, stepper.timesteps, strict=True):
        # At 1, where there is next to nothing of the image, diffusers takes the root of what rounding made negative.
        more = {"eta": min(eta, 1 - 1e-6), "variance_noise": noise()} if eta else {}
        x = stepper.step(predict(x, time), step, x, **more).prev_sample
    return x


def label_numbers(labels: Sequence[int] | None, classes: int, images: int, guidance: float = 1.0) -> list[int] | None:
    """What `class_labels` a network is given: None for an unconditional one, and without labels that of "none".

    Raises:
        UserError: see `sample_latents`.
    """
    if not classes:
        if labels is not None or guidance != 1:
            raise UserError("the model knows no classes: neither classes nor guidance can be given")
        return None
    if labels is None:
        if guidance != 1:
            raise UserError(f"guidance={guidance:g} needs classes to be guided to")
        return [null_class(classes)] * images
    if len(labels) != images:
        raise UserError(f"{len(labels)} labels for {images} images")
    if wrong := [label for label in labels if not (0 <= label < classes or label == null_class(classes))]:
        raise UserError(
            f"class {wrong[0]}: the model knows 0 to {classes - 1}, and {null_class(classes)} for images of no class"
        )
    return list(labels)
