"""The statistics of a trained model's latents, measured at the end of train_vae for the model's config."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from litevae.images import ImageError, ImageTransform, to_tensor
from litevae.latent_statistics import scaling
from litevae.latents import encode_latents, latent_content
from litevae.model_folder import read_json
from pipelines.data.source import Source
from pipelines.training import ranks
from pipelines.training.config import TrainVAE

# Training images that are encoded. To encode an image costs less than a third of a training step on it, so one image in
# 50 of those trained on costs less than 1 % of the training.
LEAST, MOST, SHARE = 64, 2048, 50


def images(source: Source, config: TrainVAE) -> int:
    """Return the number of training images whose latents are measured."""
    trained = sum(stage.images for stage in config.stages)
    return min(source.units, MOST, max(LEAST, trained // SHARE))


@torch.no_grad()
def measured(model: Any, source: Source, config: TrainVAE, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Return the config's statistics of the latents of training images; nothing if they have no scale.

    The statistics are those of latents that are drawn from the posteriors, which are computed from mean and variance
    without a draw. The images are evenly spaced over the source, and centre-cropped at the last stage's resolution. No
    random number is used. With several ranks each encodes its share, and all must call this together.

    Args:
        model: the trained autoencoder.
        source: the training images.
        config: the run's config.
        rank: this worker's rank.
        world: the number of ranks.
    """
    transform = ImageTransform(config.stages[-1].resolution, config.data.resize, max_pixels=config.data.max_pixels)
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    training = model.training
    model.eval()
    units = np.linspace(0, source.units - 1, images(source, config)).round().astype(int).tolist()
    for unit in units[rank::world]:
        try:
            pixels = np.array(transform(source.data(unit)).pixels)
        except ImageError:
            continue  # training says which images can't be read
        found = encode_latents(model, to_tensor(torch.from_numpy(pixels)[None].to(model.device))).double().cpu()
        mean, variance = found, torch.zeros_like(found)
        if latent_content(model) == "moments":
            mean, logvar = found.chunk(2, dim=1)
            variance = logvar.clamp(-30, 20).exp()
        count += mean.shape[-2] * mean.shape[-1]
        total = total + mean.sum(dim=(0, 2, 3))
        squares = squares + (mean.square() + variance).sum(dim=(0, 2, 3))
    model.train(training)
    parts = ranks.gathered([(count, total, squares)], world)
    count, total, squares = (sum(column) for column in zip(*parts, strict=True))
    if not count:
        return {}
    mean = total / count
    try:
        return scaling(mean, (squares / count - mean.square()).clamp(min=0).sqrt())
    except ValueError:
        return {}


def closing_lines(config: TrainVAE, source: Source, model: str) -> list[str]:
    """Return the line that says which statistics the config in a model folder has, if it has any of its own.

    Args:
        config: the run's config.
        source: the training images.
        model: the model folder.
    """
    path = Path(model, "config.json")
    about = read_json(path) if path.is_file() else {}
    if config.teacher or not about.get("latents_std"):
        return []
    return [
        f"its latents have scaling_factor {about['scaling_factor']:.4g} and shift_factor {about['shift_factor']:.4g} "
        f"over {images(source, config):,} training images (latents_mean and latents_std by channel are in config.json)"
    ]
