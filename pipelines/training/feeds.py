"""The choice of the feed that gives a diffusion model its latents."""

import torch

from pipelines.training.config import TrainLDM
from pipelines.training.latent_feeds import Cached, Feed, Online
from pipelines.training.worker_setup import LdmSetup
from pipelines.training.write_through import WriteThrough


def make_feed(config: TrainLDM, setup: LdmSetup, rank: int, world: int, device: torch.device) -> Feed:
    """Make one rank's feed for `config.mode`: a cache, images encoded each time, or images that fill a cache."""
    if config.mode == "cache":
        return Cached(config, setup, rank, world, device)
    return (Online if config.mode == "online" else WriteThrough)(config, setup, rank, world, device)
