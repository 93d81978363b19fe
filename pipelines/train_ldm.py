"""Training a latent diffusion model on a latent cache, on Ray Train."""

import itertools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litevae.autoencoder import count_parameters, fingerprint, load_autoencoder
from litevae.cache import LatentCache, Shape
from litevae.diffusion import EMA, LDM, build_unet, noise_schedule, save_ldm, training_loss
from litevae.errors import UserError
from litevae.images import to_uint8
from litevae.loader import LatentLoader
from litevae.pictures import grid
from litevae.precision import autocast
from pipelines import checkpoint, cluster, tracking, training
from pipelines.config import TrainLDM, validate, values_to_keep

# What may differ when a run goes on. `images` may only grow.
FREE = (
    "root", "ray", "images", "vae", "cache_version", "sample_images", "sample_steps",
    "loop.val_every", "loop.checkpoint_every", "loop.keep", "loop.log_every", "loop.max_restarts",
)  # fmt: skip


def train_ldm(config: TrainLDM) -> dict[str, Any]:
    """Train, or go on with, the run `config.name`; its model is in root/name/model.

    Raises:
        UserError: anything the user can mend, before Ray starts where it can be known then.
    """
    folder = os.path.join(cluster.output_path("root", config.root), config.name)
    if not config.cache:
        raise UserError("cache is empty; give a latent cache: cache=/data/cache (jobs/encode_dataset.py writes one)")
    cache = LatentCache(config.cache, version=config.cache_version or None)
    training.check_batch("batch_size", config.batch_size, len(cache), config.ray.workers, config.optim.accumulate)
    unet = build_unet(config.unet, len(cache.mean), _shape(cache)[-1])
    vae = _autoencoder(config, cache)
    share = cluster.start(config.ray)
    resumed = checkpoint.open_run(folder, config, FREE)
    if resumed:
        checkpoint.check_longer(folder, "images", config.images)
        checkpoint.write_config(folder, config)
    print(
        f"train_ldm {config.name}: {len(cache):,} latents of {_shape(cache)} {cache.content}, UNet {config.unet} "
        f"{count_parameters(unet):,} parameters, {config.images:,} images to see, {share.text}",
        flush=True,
    )
    handle = tracking.start_run(
        config.tracking, config.root, "train_ldm", config.name, config.model_dump(mode="json"), folder, resume=resumed
    )
    setup = {"config": values_to_keep(config), "cache": cache.path, "vae": vae, "folder": folder}
    result = training.fit(_worker, setup, handle, share, config.loop) | {"parameters": count_parameters(unet)}
    numbers = f"   loss {result['loss']:.4g}" if "loss" in result else ""
    print(f"model: {result['model']}{numbers}\nMLflow: {result['tracking']}", flush=True)
    return result


def _shape(cache: LatentCache) -> Shape:
    """
    Raises:
        UserError: rows differ in it.
    """
    if cache.shape is None:
        raise UserError(
            f"{cache.path} holds latents of {len(set(cache.group_shapes))} shapes, and train_ldm learns images of one; "
            f"encode with transform.buckets=false"
        )
    return cache.shape


def _autoencoder(config: TrainLDM, cache: LatentCache) -> str:
    """Folder of the autoencoder that the cache was made with.

    Raises:
        UserError: it is not there, or is another one.
    """
    model = cache.manifest["model"]
    folder = os.path.abspath(config.vae or model["path"])
    if not os.path.isdir(folder):
        raise UserError(f"the cache's autoencoder {folder} is not there; say where it is now with vae=FOLDER")
    if fingerprint(folder) != model["fingerprint"]:
        raise UserError(
            f"{folder} is not the autoencoder that encoded {cache.path} (fingerprint {fingerprint(folder)[:12]}, the "
            f"cache's is {model['fingerprint'][:12]}); give that one with vae=FOLDER, or encode the images again"
        )
    return folder


class Diffusion:
    """The training task: UNet, its average, and latents drawn from the cache."""

    def __init__(self, config: TrainLDM, setup: dict[str, Any], rank: int, world: int, device: torch.device):
        from ray.train.torch import prepare_model

        self.config, self.device, self._rank, self._world = config, device, rank, world
        self.cache = LatentCache(setup["cache"], version=config.cache_version or None)
        self.digest = self.cache.manifest["digest"]
        self.stages = [(config.images, config.batch_size)]
        torch.manual_seed(config.seed)
        self.unet = build_unet(config.unet, len(self.cache.mean), _shape(self.cache)[-1]).to(device)
        self.net = prepare_model(self.unet)
        self.scheduler = noise_schedule()
        self.optimizer = training.adam(self.unet.parameters(), config.optim)
        self.ema = EMA(self.unet, config.loop.ema) if config.loop.ema else None
        self._vae = setup["vae"]
        if config.loop.compile:
            self.net = torch.compile(self.net)

    def begin(self, stage: int) -> None:
        self.unet.train()

    def batches(self, start: int, end: int, batch_size: int) -> Iterator[Tensor]:
        config = self.config
        loader = LatentLoader(self.cache, batch_size, config.seed, self._rank, self._world, config.draw)
        loader.position = start
        count = -(-(end - start) // batch_size)  # the last one is whole too, so that every step has the same size
        return (batch["latents"] for batch in itertools.islice(loader, count))

    def step(self, batch: Tensor, images: int) -> dict[str, Tensor]:
        optim = self.config.optim
        generator = torch.Generator().manual_seed(training.seed_for(self.config.seed, images, self._rank, 1))
        values = training.Totals()
        parts = batch.to(self.device, non_blocking=True).chunk(optim.accumulate)
        for n, latents in enumerate(parts):
            with training.synced(self.net, n == len(parts) - 1):
                with autocast(self.device, self.config.loop.precision):
                    loss = training_loss(self.net, self.scheduler, latents, generator).mean()
                (loss / len(parts)).backward()
            values.add({"loss": loss})
        rate = optim.lr * training.learning_rate_factor(optim, images, self.config.images)
        values.add(training.update(self.optimizer, self.unet, rate, optim.clip))
        if self.ema is not None:
            self.ema.update(self.unet)
        return values.means()

    def count(self) -> dict[str, Tensor]:
        return {}

    def check(self, means: dict[str, float]) -> None:
        """Nothing besides the loss can go wrong here."""

    def validate(self) -> tuple[dict[str, float], np.ndarray | None]:
        """Rank 0 draws a picture, of the same noise each time."""
        if self._rank or not self.config.sample_images:
            return {}, None
        seeds = [(self.config.seed, n) for n in range(self.config.sample_images)]
        self.unet.eval()
        with self._averaged(), autocast(self.device, self.config.loop.precision):
            images = self._ldm().sample(seeds, self.config.sample_steps)
        self.unet.train()
        return {}, grid(to_uint8(images), columns=max(1, round(len(seeds) ** 0.5)))

    def state(self) -> dict[str, Any]:
        state = {"unet": self.unet.state_dict(), "optimizer": self.optimizer.state_dict()}
        return state | ({"ema": self.ema.state_dict()} if self.ema is not None else {})

    def load(self, state: dict[str, Any]) -> None:
        self.unet.load_state_dict(state["unet"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])

    def export(self, folder: Path) -> None:
        with self._averaged():
            save_ldm(folder, self._ldm())

    def _averaged(self) -> AbstractContextManager[None]:
        return self.ema.swapped(self.unet) if self.ema is not None else nullcontext()

    def _ldm(self) -> LDM:
        vae = load_autoencoder(self._vae).to(self.device)
        about = {"cache": self.cache.path, "cache_digest": self.digest, "config": values_to_keep(self.config)}
        return LDM(self.unet, self.scheduler, vae, self.cache.mean, self.cache.std, about)


def _worker(setup: dict[str, Any]) -> dict[str, Any]:
    config = validate(TrainLDM, setup["config"])
    return training.work(Diffusion, config, f"train_ldm {config.name}", setup)
