"""Train a latent diffusion model on Ray Train, from a latent cache or from images encoded during training."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litevae import hub
from litevae.any_autoencoder import fingerprint, load_autoencoder
from litevae.autoencoder import count_parameters
from litevae.cache import LatentCache
from litevae.commits import constant_channels, constant_text
from litevae.denoiser import build_denoiser, null_class
from litevae.diffusion import EMA, Objective, random_numbers
from litevae.errors import UserError
from litevae.images import to_uint8
from litevae.latents import downsampling, encode_latents, latent_content
from litevae.ldm import LDM, NormalizedAutoencoder, save_ldm
from litevae.loader import stream
from litevae.model_card import write_ldm_card
from litevae.order import VERSION
from litevae.pictures import grid
from litevae.precision import autocast
from pipelines.data.config import Views
from pipelines.data.open_source import open_source
from pipelines.data.source import Source
from pipelines.data.unique_ids import check_ids
from pipelines.encoding import encode
from pipelines.encoding.config import Encode
from pipelines.runtime import mlflow_run, paths
from pipelines.runtime.logs import say
from pipelines.runtime.schema import validate, values_to_keep
from pipelines.training import (
    compiling,
    first_look,
    forecast,
    images_look,
    launch,
    optimizer,
    run_folder,
    run_lock,
    step_metrics,
)
from pipelines.training.card_facts import facts_of_ldm
from pipelines.training.config import TrainLDM
from pipelines.training.latent_feeds import CachedFeed, Feed, LatentBatch, OnlineFeed, training_transform
from pipelines.training.may_change import LDM as MAY_CHANGE
from pipelines.training.may_change import LDM_CACHED as MAY_CHANGE_CACHED
from pipelines.training.worker_setup import LatentData, LdmSetup
from pipelines.training.write_through import WriteThroughFeed

BUCKETS = 4  # ranges of noise levels whose losses are logged separately
PICTURES = 16  # images that validation samples at a time


@run_lock.exclusive
def train_ldm(config: TrainLDM) -> dict[str, Any]:
    """Start or resume the run `config.name`, and write its model to root/name/model.

    Returns:
        The result of `launch.fit`, and "parameters": how many the network has.

    Raises:
        UserError: anything that the user can fix, raised before Ray starts where that is possible; or another process
            is working on this run.
    """
    folder = os.path.join(paths.output_path("root", config.root), config.name)
    first_look.train_ldm(config)
    free = MAY_CHANGE_CACHED if config.mode == "cache" else MAY_CHANGE
    if run_folder.check_run(folder, config, free) == "same":  # refuse another run before a cache is started
        run_folder.check_longer(folder, "images", config.images)
    objective_of(config)
    latents = {"cache": cached_latents, "online": online_latents, "write-through": write_through_latents}[config.mode](
        config
    )
    channels, height, width = latents.shape
    if height != width:
        raise UserError(f"{latents.data} holds latents of {height}x{width}; train_ldm needs square ones")
    launch.check_batch("batch_size", config.batch_size, latents.images, config.ray, config.optim.accumulate)
    with torch.device("meta"):
        network = build_denoiser(config.network, channels, width, config.classes)
    launch.check_room(folder, _checkpoint_size(config, latents.vae, count_parameters(network)), config.loop)
    if config.mode == "write-through":
        latents = begin_cache(config, latents)
    mlflow_run.check(config)
    begun = forecast.images_done(folder)
    placement = forecast.start_ray(
        config, config.images, begun, lambda: forecast.ldm_seconds(config, latents, begun, config.ray.workers)
    )
    paths.check_folders({"root": os.path.dirname(folder)}, {"vae": latents.vae, "cache": latents.cache})
    resumed = run_folder.open_run(folder, config, free)
    if resumed:
        run_folder.write_config(folder, config)
    say(
        f"train_ldm {config.name}: {latents.about}, {config.network} {count_parameters(network):,} parameters, "
        f"{config.images:,} images to train on, {placement.text}",
    )
    with run_folder.kept_if_made(folder):
        params = config.model_dump(mode="json")
        handle = mlflow_run.start_run(
            config.tracking, config.root, "train_ldm", config.name, params, folder, resume=resumed
        )
        setup = LdmSetup(
            config=values_to_keep(config), folder=folder, data=latents.data, handle=handle, latents=latents
        )
        result = launch.fit(_worker, setup, placement, config.loop) | {"parameters": count_parameters(network)}
    numbers = f"   loss {result['loss']:.4g}" if "loss" in result else ""
    say(f"model: {result['model']}{numbers}", **result)
    return result


def objective_of(config: TrainLDM) -> Objective:
    """Return the diffusion objective that `config.objective` describes."""
    return Objective(**config.objective.model_dump())


# --- the latents of the three modes ---------------------------------------------------------------------------------


def cached_latents(config: TrainLDM) -> LatentData:
    """Describe the latents of mode=cache.

    Raises:
        UserError: if its latents differ in shape, the label column is unfit, or the autoencoder is missing or is not
            the one that encoded the cache.
    """
    cache = LatentCache(config.cache, version=config.cache_version or None)
    if cache.shape is None:
        raise UserError(
            f"{cache.path} holds latents of {len(set(cache.group_shapes))} shapes, and train_ldm needs one; encode "
            f"with transform.buckets=false"
        )
    if config.classes:
        _check_label(config, cache.manifest["columns"], cache.path)
        images_look.check_labels(config.classes, config.label, cache)
    vae = _vae(config.vae or cache.manifest["model"]["path"], "the cache's autoencoder ")
    wanted = cache.manifest["model"]["fingerprint"]
    if (found := fingerprint(vae)) != wanted:
        raise UserError(
            f"{vae} is not the autoencoder that encoded {cache.path} (fingerprint {found[:12]}, the cache's is "
            f"{wanted[:12]}); give that one with vae=FOLDER, or encode the images again"
        )
    return LatentData(
        data=cache.path, images=len(cache), shape=(len(cache.mean), *cache.shape[1:]), vae=vae, fingerprint=wanted,
        about=f"{len(cache):,} latents of {cache.shape} {cache.content}",
        cache=cache.path, version=cache.manifest["number"],
    )  # fmt: skip


def online_latents(config: TrainLDM) -> LatentData:
    """Describe the latents of mode=online, whose images are encoded again in every epoch.

    Raises:
        UserError: if the source cannot be opened, the label column is unfit, or there is no autoencoder.
    """
    source = open_source(config.data.source, "data.source")
    return replace(_latents_of(config, source), source=source)


def write_through_latents(config: TrainLDM) -> LatentData:
    """Describe the latents of mode=write-through, whose images are encoded once. `begin_cache` adds the cache.

    Raises:
        UserError: if the source, label column or autoencoder is unfit.
    """
    return _latents_of(config, open_source(config.data.source, "data.source"))


def _latents_of(config: TrainLDM, source: Source) -> LatentData:
    """Describe the latents of a source's images; their shape is found by encoding one image of zeros."""
    if config.classes:
        _check_label(config, {field.name: str(field.type) for field in source.schema}, source.uri)
    items = images_look.check_images(source, training_transform(config), "data.source")
    images_look.check_labels(config.classes, config.label, source, items)
    check_ids([source], "data.source")  # noise is drawn by id, so that two images of one id would get the same
    vae = _vae(config.vae)
    model, side = load_autoencoder(vae), config.data.resolution
    with torch.no_grad():
        _, channels, height, width = encode_latents(model, torch.zeros(1, 3, side, side)).shape
    shape = (channels // 2 if latent_content(model) == "moments" else channels, height, width)
    return LatentData(
        data=source.uri, images=source.units, shape=shape, vae=vae, fingerprint=fingerprint(vae),
        about=f"{source.units:,} images at {side} px, encoded by {config.vae} ({config.mode}, "
        f"f = {downsampling(model)})",
    )  # fmt: skip


def begin_cache(config: TrainLDM, latents: LatentData) -> LatentData:
    """Start the cache that this run fills: write the plan and the source's listing, as an encode job would.

    Returns:
        `latents` with the cache's path and plan.
    """
    data = config.data
    job = Encode(
        root=config.root,
        ray=config.ray,
        tracking=config.tracking,
        source=data.source,
        model=latents.vae,
        out=config.cache,
        transform=Views(resolution=data.resolution, resize=data.resize, decode=data.decode, max_pixels=data.max_pixels),
        rows_per_shard=data.rows_per_shard,
        precision=data.precision,
        error_budget=data.max_bad,
    )
    begun = encode.plan_cache(job)
    return replace(latents, cache=begun.out, plan=begun.plan)


def _check_label(config: TrainLDM, columns: dict[str, str], where: str) -> None:
    """Raise a UserError unless the label column exists and holds integers; `columns` maps names to Arrow types."""
    if config.label not in columns:
        raise UserError(
            f"{where} has no column {config.label!r} for classes={config.classes}; it has "
            f"{', '.join(columns) or 'none'}: set label=COLUMN, and carry it with the source's columns=[...]"
        )
    if not (kind := columns[config.label]).startswith(("int", "uint")):
        raise UserError(f"column {config.label!r} of {where} holds {kind}; classes are integers from 0 on")


def _checkpoint_size(config: TrainLDM, vae: str, parameters: int) -> launch.CheckpointSize:
    """Estimate the bytes of a checkpoint and of the exported models.

    A checkpoint holds the weights, their averages, and the two moments of Adam. Each model holds the network and the
    autoencoder. All are in fp32.
    """
    averages = bool(config.loop.ema) + len(config.more_ema)
    files = sum(path.stat().st_size for path in hub.local_folder(vae).glob("*.safetensors"))
    return launch.CheckpointSize(4 * parameters * (3 + averages), (4 * parameters + files) * (1 + len(config.more_ema)))


def _vae(folder: str, what: str = "") -> str:
    """Return where every node finds the autoencoder (see `hub.pinned`), or raise a UserError if it is missing."""
    folder = hub.pinned(folder)
    if not hub.is_name(folder) and not os.path.isdir(folder):
        raise UserError(f"{what}{folder} does not exist; say where it is now with vae=FOLDER")
    return folder


# --- in the workers ---------------------------------------------------------------------------------------------


def make_feed(config: TrainLDM, setup: LdmSetup, rank: int, world: int, device: torch.device) -> Feed:
    """Make one rank's feed for `config.mode`: a cache, images encoded each time, or images that fill a cache."""
    if config.mode == "cache":
        return CachedFeed(config, setup, rank, world, device)
    return (OnlineFeed if config.mode == "online" else WriteThroughFeed)(config, setup, rank, world, device)


class LdmTask:
    """The training task (see `loop.TrainingTask`): network, optimizer, weight averages, and the feed of latents."""

    def __init__(self, config: TrainLDM, setup: LdmSetup, rank: int, world: int, device: torch.device):
        from ray.train.torch import prepare_model

        self.config, self.device, self._rank = config, device, rank
        self._latents = latents = setup.latents
        self.seen = 0  # images, over all ranks
        self._vae, self._fingerprint, self._shape = latents.vae, latents.fingerprint, latents.shape
        self.feed = make_feed(config, setup, rank, world, device)
        self.digest, self.order = self.feed.digest, VERSION
        self.stages = [(config.images, config.batch_size)]
        self.validated = ""
        self.objective = objective_of(config)
        torch.manual_seed(config.seed)
        self.network = build_denoiser(config.network, self._shape[0], self._shape[-1], config.classes)
        self.network.to(device).to(memory_format=compiling.memory_format(device, config.loop.compile))
        if config.checkpointing:
            self.network.enable_gradient_checkpointing()
        self.net = prepare_model(self.network)
        self.optimizer = optimizer.Adam(self.network, config.optim)
        decays = [config.loop.ema] * bool(config.loop.ema) + config.more_ema
        self.averages = {f"{decay:g}": EMA(self.network, decay) for decay in decays}
        self._main = f"{config.loop.ema:g}"  # decay of the average to sample from; "0": the weights themselves
        if config.loop.compile:  # compile the DDP wrapper, so that its buckets are sent during the backward pass
            self.net = torch.compile(self.net, dynamic=False)

    def begin(self, stage: int) -> None:
        """Prepare the feed, and put the network into training mode."""
        self.feed.order = self.order
        self.feed.begin()
        if self.feed.rank == 0 and (constant := constant_channels(self.feed.mean, self.feed.std)):
            say(f"warning: {constant_text('the training data', constant)}", "WARNING")
        self.network.train()

    def batches(self, start: int, end: int, batch_size: int) -> Iterator[LatentBatch]:
        """Yield the feed's batches with their noise.

        A thread prepares each batch while the previous step runs. Only encoding (mode=online) is left to the step.
        """
        feed = self.feed.batches(start, end, batch_size)
        for (batch,) in stream(self.with_noise, ([batch] for batch in feed), threads=1, ahead=1):
            yield batch

    def with_noise(self, batch: LatentBatch) -> LatentBatch:
        """Add to a batch its noise, uniform numbers for the noise levels, and labels of which some are dropped."""
        noise, u, drop = random_numbers(self.config.seed, batch.positions, self._shape)
        labels = batch.labels
        if labels is not None:
            labels = torch.where(drop < self.config.label_dropout, null_class(self.config.classes), labels)
        batch = replace(batch, noise=noise, u=u, labels=labels)
        if self.device.type == "cuda":  # copies from unpinned memory would wait for the previous step
            pinned: dict[str, Any] = {
                name: value.pin_memory() for name, value in vars(batch).items() if isinstance(value, Tensor)
            }
            batch = replace(batch, **pinned)
        return batch

    def step(self, batch: LatentBatch, images: int) -> dict[str, Tensor]:
        """Do one optimizer step after `images` images, and return its metrics."""
        self.seen = images + self.config.batch_size
        optim, values = self.config.optim, []
        assert batch.noise is not None
        assert batch.u is not None
        noise, u = (value.to(self.device, non_blocking=True) for value in (batch.noise, batch.u))
        labels = None if batch.labels is None else batch.labels.to(self.device, non_blocking=True)
        parts = list(
            zip(*(_split(part, optim.accumulate) for part in (self.feed.latents(batch), noise, u, labels)), strict=True)
        )
        for n, part in enumerate(parts):
            with compiling.synced(self.net, n == len(parts) - 1):
                with autocast(self.device, self.config.loop.precision):
                    losses, errors, levels = self.objective.loss(self.net, *part)
                loss = losses.mean()
                (loss / len(parts)).backward()
            values.append({"loss": loss} | _by_level(errors.detach(), levels))
        rate = optim.lr * optimizer.learning_rate_factor(optim, images, self.config.images)
        found = step_metrics.mean_of(values) | self.optimizer.step(rate)
        for average in self.averages.values():
            average.update(self.network)
        return found

    def count(self) -> dict[str, Tensor]:
        """Return the number of unreadable images so far as a metric."""
        return {"bad_images": torch.tensor(float(self.feed.bad()))}

    def check(self, means: dict[str, float]) -> None:
        """Raise a UserError if there are more unreadable images than the config allows."""
        self.feed.check(round(means["bad_images"]))

    def skipped(self) -> int:
        """Return the longest series of skipped steps since the last call."""
        return self.optimizer.skipped()

    def validate(self) -> tuple[dict[str, float], np.ndarray | None]:
        """Sample images into one picture on rank 0, from the same noise each time; there are no metrics."""
        if self._rank or not self.config.sample_images:
            return {}, None
        count, classes = self.config.sample_images, self.config.classes
        options: dict[str, Any] = {"steps": self.config.sample_steps}
        if classes:
            options["guidance"] = self.config.sample_guidance
        self.network.eval()
        images = []
        with self._averaged(self._main), autocast(self.device, self.config.loop.precision):
            ldm = self._ldm()
            for part in torch.arange(count).split(PICTURES):
                labels = {"labels": [n * classes // count % classes for n in part.tolist()]} if classes else {}
                images.append(ldm.sample([(self.config.seed, n) for n in part.tolist()], **options, **labels))
        self.network.train()
        return {}, grid(to_uint8(torch.cat(images)), columns=max(1, round(count**0.5)))

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores: the states of the network, the optimizer, the averages and the feed."""
        averages = {decay: average.state_dict() for decay, average in self.averages.items()}
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "averages": averages}
        return state | {"feed": self.feed.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.seen = state.get("images", 0)  # the loop adds it
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        for decay, average in self.averages.items():
            average.load_state_dict(state["averages"][decay])
        self.feed.load(state["feed"])

    def exports(self) -> dict[str, Callable[[Path], None]]:
        """Return the writers of the model folders.

        "model" has the average of `loop.ema`, or the weights themselves where that is 0. Each decay in `more_ema` has
        a folder "model-ema-<decay>".
        """
        further = list(self.averages)[bool(self.config.loop.ema) :]
        names = {"model": self._main} | {f"model-ema-{decay}": decay for decay in further}
        return {name: partial(self._save, decay) for name, decay in names.items()}

    def _save(self, decay: str, folder: Path) -> None:
        ldm = self._ldm()
        with self._averaged(decay):
            save_ldm(folder, ldm)
        write_ldm_card(folder, ldm, facts_of_ldm(self.config, self._latents, self.seen, decay))

    def _averaged(self, decay: str) -> AbstractContextManager[None]:
        """Return a context in which the network has the average of this decay, if there is one."""
        average = self.averages.get(decay)
        return average.swapped(self.network) if average is not None else nullcontext()

    def _ldm(self) -> LDM:
        vae = NormalizedAutoencoder.of(load_autoencoder(self._vae), self.feed.mean, self.feed.std).to(self.device)
        about = {"data": self.digest, "vae": self._fingerprint, "config": values_to_keep(self.config)}
        return LDM(self.network, self.objective.scheduler(), vae, self.config.classes, about)


def _split(values: Tensor | None, parts: int) -> tuple[Any, ...]:
    """Split a batch's tensor into micro-batches; None gives one None for each."""
    return (None,) * parts if values is None else values.chunk(parts)


def _by_level(errors: Tensor, levels: Tensor) -> dict[str, Tensor]:
    """Return the mean unweighted error in each quarter of the noise levels.

    Args:
        errors: (n,), the unweighted error of each latent.
        levels: (n,), the noise level of each latent, 0 to 1.

    Returns:
        A scalar for each quarter, by metric name; NaN where the batch has no such noise level.
    """
    bucket = (levels * BUCKETS).long().clamp(max=BUCKETS - 1)
    inside = bucket == torch.arange(BUCKETS, device=bucket.device).unsqueeze(1)
    means = torch.where(inside, errors, 0).sum(1) / inside.sum(1)
    names = [f"loss_at_noise_{n / BUCKETS:.2f}-{(n + 1) / BUCKETS:.2f}" for n in range(BUCKETS)]
    return dict(zip(names, means.unbind(), strict=True))


def _worker(given: dict[str, Any]) -> dict[str, Any]:
    setup: LdmSetup = given["setup"]
    config = validate(TrainLDM, setup.config)
    return launch.work(LdmTask, config, f"train_ldm {config.name}", setup)
