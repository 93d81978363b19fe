"""What the card of a model folder says of its training by train_vae or train_ldm."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from litevae import hub, metrics
from litevae.model_card import Metric, ModelFacts
from pipelines.training import first_look
from pipelines.training.config import Losses, Optimizer, Term, TrainLDM, TrainVAE
from pipelines.training.worker_setup import LatentData, VaeSetup

_R2 = (
    "1 - (squared errors of the mean) / (squared deviations of the teacher's mean from its average in each channel), "
    "both summed over all channels"
)
_TEACHERS = "the same with the teacher's own encoder, through the same decoder; "
METRICS = {  # metrics of a validation: their titles and protocols
    "psnr": ("PSNR", metrics.PROTOCOLS["psnr"]),
    "ssim": ("SSIM", metrics.PROTOCOLS["ssim"]),
    "latent_r2": ("R² of the teacher's latents", _R2),
    "teacher_psnr": ("PSNR of the teacher", _TEACHERS + metrics.PROTOCOLS["psnr"]),
    "teacher_ssim": ("SSIM of the teacher", _TEACHERS + metrics.PROTOCOLS["ssim"]),
}


class Validated(NamedTuple):
    """What a validation measured.

    Attributes:
        values: the metrics, by name; those that are not in `METRICS` are left out of a card.
        measured: what they were measured on and how, for people.
        data: URI of the images.
        kind: kind of that source.
    """

    values: Mapping[str, float] = MappingProxyType({})
    measured: str = ""
    data: str = ""
    kind: str = ""


NOTHING = Validated()


def facts_of_vae(
    config: TrainVAE,
    setup: VaeSetup,
    seen: int,
    bad: int = 0,
    unused: Sequence[str] = (),
    validated: Validated = NOTHING,
) -> ModelFacts:
    """Return what the card of an autoencoder says of its training.

    Args:
        config: the run's config.
        setup: what the driver gave to the worker.
        seen: images that were trained on so far.
        bad: images of the training data that could not be read, as far as they were met.
        unused: terms that are no part of the loss whatever their weights are.
        validated: the last validation.
    """
    source, data = setup.source, config.data
    begins = [sum(stage.images for stage in config.stages[:n]) for n in range(len(config.stages))]
    sides = sorted({stage.resolution for stage, begin in zip(config.stages, begins, strict=True) if begin < seen})
    stages = [f"{s.resolution} px: {s.images:,} images in batches of {s.batch_size}" for s in config.stages]
    crops = "shorter side resized to the resolution" if data.resize == "shorter" else "original pixels"
    training = {
        "stages": "; ".join(stages),
        "steps": _steps([(stage.images, stage.batch_size) for stage in config.stages], seen),
        "start": _start(config, setup.begin),
        "images": f"{crops}, {config.data.crop} crops" + ", half of them mirrored" * data.flip,
        "loss": _loss(config.loss, setup.lpips, unused),
        "optimizer": _optimizer(config.optim),
        "EMA": _average(f"{config.loop.ema:g}"),
        "seed": str(config.seed),
    }
    left = [str(source.left_out)] * bool(source.left_out.total)
    left += [f"at least {bad:,} that could not be read"] * bool(bad)
    if config.teacher:
        training["teacher"] = _named(config.teacher)
    if config.equivariance.share:
        training["equivariance"] = f"latents transformed in {config.equivariance.share:g} of the steps (EQ-VAE)"
    if config.model.freeze:
        training["not trained"] = " and ".join(config.model.freeze)
    return ModelFacts(
        name=config.name,
        data=source.uri,
        images=source.units,
        left_out=", ".join(left),
        training=training,
        validation=validated.data,
        validation_kind=validated.kind,
        measured=validated.measured,
        metrics=[
            Metric(name, title, validated.values[name], protocol)
            for name, (title, protocol) in METRICS.items()
            if name in validated.values
        ],
        limits=[f"It was trained at {' and '.join(map(str, sides))} px."] * bool(sides),
    )


def facts_of_ldm(config: TrainLDM, latents: LatentData, seen: int, decay: str) -> ModelFacts:
    """Return what the card of a latent diffusion model says of its training.

    Args:
        config: the run's config.
        latents: the origin of the latents.
        seen: images that were trained on so far.
        decay: decay of the average of the weights that the folder has; "0": the weights themselves.
    """
    training = {
        "images": f"{config.images:,} in batches of {config.batch_size}",
        "steps": _steps([(config.images, config.batch_size)], seen),
        "latents": "drawn from the posterior each time" if config.draw == "sample" else "means of the posterior",
        "optimizer": _optimizer(config.optim),
        "EMA": _average(decay),
        "seed": str(config.seed),
    }
    return ModelFacts(name=config.name, data=latents.data, images=latents.images, training=training)


def steps(stages: Sequence[tuple[int, int]], seen: int) -> int:
    """Return how many steps it takes to have seen a number of images.

    The last batch of a stage is whole, so the next stage may begin some images late, as in `loop.run`.

    Args:
        stages: (images, batch size) of each stage.
        seen: the number of images.
    """
    count = position = end = 0
    for images, batch_size in stages:
        end += images
        now = max(0, -(-(min(end, seen) - position) // batch_size))
        count, position = count + now, position + now * batch_size
    return count


def _steps(stages: Sequence[tuple[int, int]], seen: int) -> str:
    total = sum(images for images, _ in stages)
    return f"{steps(stages, seen):,}" + f" so far ({seen:,} of {total:,} images)" * (seen < total)


def _average(decay: str) -> str:
    return f"decay {decay} a step; these weights are the average" if decay != "0" else "none"


def _start(config: TrainVAE, begin: str) -> str:
    """Return the weights that the training began with."""
    if begin:
        return "a checkpoint of another training"
    named = first_look.models(config)
    if "model.init" in named:
        return f"the model {_named(named['model.init'])}"
    decoder = named.get("teacher") or named.get("model.init_decoder")
    return "random weights" + f", with the decoder of {_named(decoder)}" * bool(decoder)


def _named(model: str | None) -> str:
    """Return a model's name on the Hub, or the last part of its folder's path: the rest tells of the machine."""
    return f"`{model if hub.is_name(model or '') else Path(model or '').name}`"


def _loss(losses: Losses, lpips: bool, unused: Sequence[str]) -> str:
    """Return the terms of the loss with their weights."""
    parts = []
    for name in type(losses).model_fields:
        term: Term = getattr(losses, name)
        if not term.weight or name in unused:
            continue
        notes = [f"from {term.start:,} images on"] * bool(term.start)
        notes += ["off: its weights were missing"] * (name == "lpips" and not lpips)
        parts.append(f"{name} {term.weight:g}" + f" ({', '.join(notes)})" * bool(notes))
    return ", ".join(parts)


def _optimizer(optim: Optimizer) -> str:
    name = f"AdamW, weight decay {optim.weight_decay:g}" if optim.weight_decay else "Adam"
    low, high = optim.betas
    warm = f", warm-up over {optim.warmup:,} images" * bool(optim.warmup)
    return f"{name}, learning rate {optim.lr:g} ({optim.schedule}{warm}), betas {low:g} and {high:g}"
