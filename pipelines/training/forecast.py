"""How long a training will take on CPUs, from a few steps that the driver measures before it starts the workers.

Reading images is not counted: it is done while the step before is computed. On GPUs, which the driver may not have,
rank 0 says the time after its first steps (`pipelines.training.loop`).
"""

import gc
import re
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from litevae.any_autoencoder import load_autoencoder
from litevae.denoiser import build_denoiser
from litevae.diffusion import EMA, Objective
from litevae.latents import encode_latents
from litevae.precision import autocast
from pipelines.runtime import cluster, estimate
from pipelines.runtime.cluster import Placement
from pipelines.runtime.logs import say
from pipelines.training import checkpoint, optimizer
from pipelines.training.config import TrainLDM, TrainVAE
from pipelines.training.worker_setup import LatentData

BUDGET = 3.0  # seconds that a measured step should take; one of two images may take longer
QUICK = 1.0  # seconds of a step up to which it is measured twice
PATIENCE = 5.0  # seconds of a step on one image after which nothing else is measured
SIDE = 64  # largest side of the measured images in pixels; the time of a step grows with the number of pixels
LONG = 2 * 3600.0  # seconds after which a smaller preset is recommended
SMALL = "--config small takes about 20 minutes on two cores"

Step = Callable[[int, int], object]  # a training step: (images of the step, images seen before it)


class StepTime(NamedTuple):
    """The time of a training step in seconds.

    Attributes:
        fixed: seconds that do not depend on the images: those of the optimizer, for example.
        each: seconds for every image.
    """

    fixed: float
    each: float

    def of(self, images: float, scale: float = 1.0) -> float:
        """Return the seconds of a step on this many images, each with `scale` times the pixels of the measured ones."""
        return self.fixed + self.each * scale * images


def start_ray(config: TrainVAE | TrainLDM, total: int, begun: int, seconds: Callable[[], float]) -> Placement:
    """Start or join Ray, and say how long a training on CPUs will take.

    That is measured before Ray starts on this machine, since its processes take the processor for some seconds.

    Args:
        config: the run's config.
        total: images to train on.
        begun: images that are done already.
        seconds: measures how long the rest takes.

    Returns:
        The resources that the job takes.

    Raises:
        UserError: if the user does not want to begin, or the cluster can't hold the workers asked for.
    """
    expected = cluster.alone(config.ray)
    if expected is not None:
        say_duration(config, total, begun, expected, seconds)
    placement = cluster.start(config.ray)
    if expected is None:
        say_duration(config, total, begun, placement, seconds)
    return placement


def say_duration(
    config: TrainVAE | TrainLDM, total: int, begun: int, placement: Placement, seconds: Callable[[], float]
) -> None:
    """Say how long a training on CPUs will take, and ask if that is more than a day; see `estimate.announce`.

    Nothing is said about a trial of a sweep, and on GPUs.

    Args:
        config: the run's config.
        total: images to train on.
        begun: images that are done already.
        placement: the workers.
        seconds: measures how long the rest takes.

    Raises:
        UserError: if the user does not want to begin.
    """
    if placement.gpu or cluster.in_worker() or begun >= total:
        return
    say("measuring a few training steps, to say how long it will take")
    threads = torch.get_num_threads()
    torch.set_num_threads(placement.threads)
    try:
        found = seconds()
    finally:
        torch.set_num_threads(threads)
        gc.collect()
    left = f"{total - begun:,} of {total:,}" if begun else f"{total:,}"
    hints = [SMALL] if found > LONG and not _is_small(config) else []
    estimate.announce(f"training on {left} images", found, gpu=False, yes=config.yes, hints=hints)


def _is_small(config: TrainVAE | TrainLDM) -> bool:
    """Return whether a training is about as small as that of the preset `small` already."""
    if isinstance(config, TrainLDM):
        return config.network == "tiny"
    terms = config.loss.lpips, config.loss.adversarial
    sides = [stage.resolution for stage in config.stages]
    return config.model.encoder == "S" and max(sides) <= SIDE and not any(term.weight for term in terms)


def images_done(folder: str, begin: str = "") -> int:
    """Return how many images were seen at the checkpoint that a run continues from, by its name; 0: it is new.

    Args:
        folder: the run's folder.
        begin: the checkpoint of another run with which a new run begins.
    """
    named = re.search(r"checkpoint-(\d+)/*$", checkpoint.newest(folder) or begin)
    return int(named[1]) if named else 0


def step_time(step: Callable[[int], object], most: int) -> StepTime:
    """Measure a step on one image, and on as many images as fit into `BUDGET`, but at least on two.

    Args:
        step: does a step on a number of images.
        most: images of a real step, on one worker.
    """

    def seconds(images: int) -> float:
        start, used = time.perf_counter(), time.process_time()
        step(images)
        # Beside other processes a step waits for them, many times as long as it computes, which is not for long.
        return min(time.perf_counter() - start, time.process_time() - used)

    one = seconds(1)
    if one < PATIENCE:
        one = min(one, seconds(1))  # the very first step also allocates memory and chooses kernels
    if most < 2 or one >= PATIENCE:
        return StepTime(0.0, one)
    count = min(most, max(2, int(BUDGET / max(one, 1e-6))))
    many = seconds(count)
    if many < QUICK:
        many = min(many, seconds(count))
    each = max(0.0, many - one) / (count - 1)
    return StepTime(max(0.0, many - each * count), each)


def vae_seconds(config: TrainVAE, networks: Callable[[TrainVAE], Step], begun: int, workers: int) -> float:
    """Return how many seconds the rest of a training of train_vae takes.

    It is measured without the adversarial loss and with it, as far as there are images left for either.

    Args:
        config: the run's config.
        networks: builds the networks of a config, and returns the training step on random images of `SIDE` or less.
        begun: images that are done already.
        workers: number of workers, among which each step is divided.
    """
    eager = config.loop.model_copy(update={"compile": False})
    whole = config.optim.model_copy(update={"accumulate": 1})
    step = networks(config.model_copy(update={"loop": eager, "optim": whole}))
    side, adversarial = side_of(config), config.loss.adversarial
    total = sum(stage.images for stage in config.stages)
    start = min(total, adversarial.start) if adversarial.weight else total
    most = max(stage.batch_size for stage in config.stages) // workers
    seconds = 0.0
    for first, last in ((begun, start), (max(begun, start), total)):
        if first >= last:
            continue
        measured = step_time(lambda images, first=first: step(images, first), most)  # type: ignore[misc]
        end = 0
        for stage in config.stages:
            begin, end = end, end + stage.images
            images = max(0, min(end, last) - max(begin, first))
            scale = (stage.resolution / side) ** 2
            seconds += images / stage.batch_size * measured.of(stage.batch_size / workers, scale)
    return seconds


def side_of(config: TrainVAE) -> int:
    """Return the side in pixels of the images with which a training of train_vae is measured."""
    return min(SIDE, *(stage.resolution for stage in config.stages))


def ldm_seconds(config: TrainLDM, latents: LatentData, begun: int, workers: int) -> float:
    """Return how many seconds the rest of a training of train_ldm takes, with the encoding of images.

    Args:
        config: the run's config.
        latents: the origin of the latents.
        begun: images that are done already.
        workers: number of workers, among which each step is divided.
    """
    step, left = _ldm_step(config, latents), config.images - begun
    measured = step_time(step, config.batch_size // workers)
    seconds = left / config.batch_size * measured.of(config.batch_size / workers)
    # A cache that the run fills has all images after the first epoch.
    encoded = {"cache": 0, "online": left, "write-through": min(config.images, latents.images) - begun}[config.mode]
    if encoded > 0:
        model, side = load_autoencoder(latents.vae), config.data.resolution

        @torch.no_grad()
        def encode(images: int) -> None:
            with autocast(torch.device("cpu"), config.data.precision):
                encode_latents(model, torch.zeros(images, 3, side, side))

        seconds += encoded / workers * step_time(encode, 1).each
    return seconds


def _ldm_step(config: TrainLDM, latents: LatentData) -> Callable[[int], None]:
    """Return the training step of train_ldm on a number of random latents, without Ray."""
    network = build_denoiser(config.network, latents.shape[0], latents.shape[-1], config.classes)
    if config.checkpointing:
        network.enable_gradient_checkpointing()
    adam, objective = optimizer.Adam(network, config.optim), Objective(**config.objective.model_dump())
    averages = [EMA(network, decay) for decay in ([config.loop.ema] * bool(config.loop.ema) + config.more_ema)]

    def step(images: int) -> None:
        z, noise = (torch.randn(images, *latents.shape) for _ in range(2))
        labels = torch.zeros(images, dtype=torch.long) if config.classes else None
        with autocast(torch.device("cpu"), config.loop.precision):
            losses, *_ = objective.loss(network, z, noise, torch.rand(images), labels)
        losses.mean().backward()
        adam.step(config.optim.lr)
        for average in averages:
            average.update(network)

    return step
