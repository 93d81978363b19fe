"""Training LiteVAE on Ray Train: reconstruction, perceptual, KL, high-frequency and adversarial losses, in stages."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from litevae import losses, metrics
from litevae.autoencoder import LiteVAE, count_parameters, load_autoencoder, model_config
from litevae.diffusion import EMA
from litevae.discriminators import UNetDiscriminator
from litevae.errors import UserError
from litevae.images import ImageError, ImageTransform, to_tensor
from litevae.perceptual import SqueezeNetFeatures, WeightsMissing, load_lpips
from litevae.pictures import reconstruction_picture
from litevae.precision import autocast
from pipelines import checkpoint, cluster, tracking, training
from pipelines.batches import Images
from pipelines.config import TrainVAE, validate, values_to_keep
from pipelines.sources import Source, open_source

# What may differ when a run goes on. Stages may only grow; see _check_stages.
FREE = (
    "root", "ray", "stages", "val_images", "data.val", "data.loaders", "data.max_bad",
    "loop.val_every", "loop.checkpoint_every", "loop.keep", "loop.log_every", "loop.max_restarts",
)  # fmt: skip
PICTURES = 8  # validation images shown


def train_vae(config: TrainVAE) -> dict[str, Any]:
    """Train, or go on with, the run `config.name`; its model folder is root/name/model.

    Raises:
        UserError: anything the user can mend, before Ray starts where it can be known then.
    """
    folder = os.path.join(cluster.output_path("root", config.root), config.name)
    source = open_source(config.data.train, "data.train")
    val = open_source(config.data.val, "data.val") if config.data.val.uri else None
    for n, stage in enumerate(config.stages):
        training.check_batch(
            f"stages.{n}.batch_size", stage.batch_size, source.units, config.ray.workers, config.optim.accumulate
        )
    model = build_model(config)
    lpips = _lpips_or_warning(config)
    if config.loss.features.weight:
        SqueezeNetFeatures(config.loss.features.weights)
    share = cluster.start(config.ray)
    resumed = checkpoint.open_run(folder, config, FREE)
    if resumed:
        _check_stages(folder, config)
        checkpoint.write_config(folder, config)
    total = sum(stage.images for stage in config.stages)
    print(
        f"train_vae {config.name}: {source.units:,} images, encoder {config.model.encoder} "
        f"{count_parameters(model.encoder):,} + decoder {count_parameters(model.decoder):,} parameters, {total:,} "
        f"images to see, {share.text}",
        flush=True,
    )
    handle = tracking.start_run(
        config.tracking, config.root, "train_vae", config.name, config.model_dump(mode="json"), folder, resume=resumed
    )
    setup = {
        "config": values_to_keep(config), "source": source, "data": source.uri, "val": val, "folder": folder,
        "lpips": lpips,
    }  # fmt: skip
    result = training.fit(_worker, setup, handle, share, config.loop)
    numbers = "   ".join(f"{key} {result[key]:.4g}" for key in ("psnr", "ssim") if key in result)
    print(f"model: {result['model']}   {numbers}\nMLflow: {result['tracking']}", flush=True)
    return result


def build_model(config: TrainVAE) -> LiteVAE:
    """
    Raises:
        UserError: `model.init` is no model folder, or of another architecture.
    """
    wanted = config.model
    torch.manual_seed(config.seed)
    model = LiteVAE(
        size=wanted.encoder,
        latent_channels=wanted.latent_channels,
        wavelet=wanted.wavelet,
        downsample=wanted.downsample,
        block_out_channels=wanted.decoder.channels,
        layers_per_block=wanted.decoder.layers,
        decoder_norm=wanted.decoder.norm,
    )
    if not wanted.init:
        return model
    have = model_config(wanted.init)
    if (kind := have.get("_class_name")) != "LiteVAE":
        raise UserError(f"model.init={wanted.init} is a model of class {kind}, not LiteVAE")
    own = {key: list(value) if isinstance(value, tuple) else value for key, value in model.config.items()}
    if different := [f"{k} {have.get(k)!r}, not {v!r}" for k, v in own.items() if k[0] != "_" and have.get(k) != v]:
        raise UserError(f"model.init={wanted.init} is another model: {'; '.join(different)}")
    return load_autoencoder(wanted.init)


def _lpips_or_warning(config: TrainVAE) -> bool:
    """Whether LPIPS is on: without its backbone's weights the term is off, and said to be."""
    term = config.loss.lpips
    if not term.weight:
        return False
    try:
        load_lpips(term.net, term.weights)
    except WeightsMissing as missing:
        print(f"warning: loss.lpips is off: {missing}", flush=True)
        return False
    return True


def _check_stages(folder: str, config: TrainVAE) -> None:
    """A run that goes on may be longer, but what it has been through stays."""
    import yaml

    before = yaml.safe_load((Path(folder) / "config.yaml").read_text())["stages"]
    now = [stage.model_dump() for stage in config.stages]
    same = len(now) >= len(before) and now[: len(before) - 1] == before[:-1]
    last, other = before[-1], now[len(before) - 1] if same else {}
    if not same or {**other, "images": 0} != {**last, "images": 0} or other["images"] < last["images"]:
        raise UserError(f"stages of run {folder} may only grow; they were {before}, and are {now}")


# --- in the workers -------------------------------------------------------------------------------------------------


class Objective(nn.Module):
    """The weighted sum of the generator's loss terms. Frozen backbones only: nothing here is trained."""

    def __init__(self, config: TrainVAE, lpips: bool):
        super().__init__()
        self.config = config.loss
        self.lpips = load_lpips(self.config.lpips.net, self.config.lpips.weights) if lpips else None
        features = self.config.features
        self.features = SqueezeNetFeatures(features.weights) if features.weight else None

    def forward(
        self, x: Tensor, reconstruction: Tensor, posterior: DiagonalGaussianDistribution, images: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(total but for the adversarial term, each term unweighted)."""
        terms = {
            "l1": lambda: losses.l1(reconstruction, x),
            "l2": lambda: losses.l2(reconstruction, x),
            "wavelet": lambda: losses.wavelet(reconstruction, x),
            "gaussian": lambda: losses.gaussian(reconstruction, x),
            "kl": lambda: losses.kl(posterior),
        }
        if self.lpips is not None:
            terms["lpips"] = lambda: self.lpips(reconstruction, x).mean()  # type: ignore[misc]
        if self.features is not None:
            terms["features"] = lambda: self.features(reconstruction, x).mean()  # type: ignore[misc]
        values = {
            name: term()
            for name, term in terms.items()
            if getattr(self.config, name).weight and images >= getattr(self.config, name).start
        }
        total = torch.zeros((), device=x.device)
        for name, value in values.items():
            total = total + getattr(self.config, name).weight * value
        return total, values


class Networks:
    """Autoencoder and discriminator with their optimizers and average: what steps, and what a checkpoint holds."""

    def __init__(self, config: TrainVAE, lpips: bool, device: torch.device):
        from ray.train.torch import prepare_model

        self.config, self.device = config, device
        self.model = build_model(config).to(device)
        self.net = prepare_model(self.model)
        self.objective = Objective(config, lpips).to(device)
        self.optimizer = training.Adam(self.model, config.optim)
        self.ema = EMA(self.model, config.loop.ema) if config.loop.ema else None
        self.disc: UNetDiscriminator | None = None
        adversarial = config.loss.adversarial
        if adversarial.weight:
            torch.manual_seed(config.seed + 1)
            self.disc = UNetDiscriminator(adversarial.channels).to(device)
            self.disc_net = prepare_model(self.disc)
            self.disc_optimizer = training.Adam(self.disc, config.optim, lr=adversarial.lr)
        if config.loop.compile:
            self.net = torch.compile(self.net)
        self.total = sum(stage.images for stage in config.stages)

    def step(self, pixels: list[np.ndarray], images: int) -> dict[str, Tensor]:
        """One update of each network from this rank's uint8 (H, W, 3) images; returns the terms' values."""
        optim, adversarial = self.config.optim, self.config.loss.adversarial
        gan = self.disc is not None and images >= adversarial.start
        factor = training.learning_rate_factor(optim, images, self.total)
        values = training.Totals()
        fakes: list[tuple[Tensor, Tensor]] = []
        parts = np.split(np.stack(pixels), optim.accumulate)
        for n, part in enumerate(parts):
            x = to_tensor(torch.from_numpy(part).to(self.device, non_blocking=True))
            with training.synced(self.net, n == len(parts) - 1):
                with autocast(self.device, self.config.loop.precision):
                    reconstruction, posterior = self.net(x)
                reconstruction = reconstruction.float()
                loss, terms = self.objective(x, reconstruction, posterior, images)
                if gan:
                    assert self.disc is not None
                    self.disc.requires_grad_(False)
                    with autocast(self.device, self.config.loop.precision):
                        logits = self.disc(reconstruction)
                    terms["adversarial"] = losses.hinge_generator(logits)
                    weight = torch.tensor(adversarial.weight, device=self.device)
                    if adversarial.adaptive:
                        weight = weight * losses.adaptive_weight(
                            loss, terms["adversarial"], self.model.decoder.conv_out.weight, _average
                        )
                        terms["adversarial_weight"] = weight
                    loss = loss + weight * terms["adversarial"]
                    fakes.append((x, reconstruction.detach()))
                (loss / len(parts)).backward()
            values.add(terms | {"loss": loss})
        values.add(self.optimizer.step(optim.lr * factor))
        if self.ema is not None:
            self.ema.update(self.model)
        if gan:
            values.add(self._discriminator_step(fakes, adversarial.lr * factor))
        return values.means()

    def _discriminator_step(self, fakes: list[tuple[Tensor, Tensor]], lr: float) -> dict[str, Tensor]:
        assert self.disc is not None
        self.disc.requires_grad_(True)
        values = training.Totals()
        for n, (x, fake) in enumerate(fakes):
            with training.synced(self.disc_net, n == len(fakes) - 1):
                # one forward for both: DDP wants one forward per backward, and nothing in it mixes images
                with autocast(self.device, self.config.loop.precision):
                    logits = self.disc_net(torch.cat([x, fake]))
                real, made = zip(*(head.chunk(2) for head in logits), strict=True)
                loss = losses.hinge_discriminator(real, made)
                (loss / len(fakes)).backward()
            values.add({"discriminator": loss, "logits_real": _mean(real), "logits_fake": _mean(made)})
        values.add({f"discriminator_{key}": value for key, value in self.disc_optimizer.step(lr).items()})
        return values.means()

    def averaged(self) -> AbstractContextManager[None]:
        """Context with the weights to judge and to keep: the average where there is one."""
        return self.ema.swapped(self.model) if self.ema is not None else nullcontext()

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        if self.disc is not None:
            state |= {"discriminator": self.disc.state_dict(), "disc_optimizer": self.disc_optimizer.state_dict()}
        return state

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.disc is not None:
            self.disc.load_state_dict(state["discriminator"])
            self.disc_optimizer.load_state_dict(state["disc_optimizer"])


def _mean(logits: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([head.float().mean() for head in logits]).mean()


def _average(gradient: Tensor) -> Tensor:
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(gradient)
        gradient = gradient / torch.distributed.get_world_size()
    return gradient


class Autoencoder(Networks):
    """The training task: networks, the stage's images, validation."""

    def __init__(self, config: TrainVAE, setup: dict[str, Any], rank: int, world: int, device: torch.device):
        super().__init__(config, setup["lpips"], device)
        self.source: Source = setup["source"]
        self.digest = self.source.digest
        self.stages = [(stage.images, stage.batch_size) for stage in config.stages]
        self._val: Source | None = setup["val"]
        self._rank, self._world = rank, world

    def begin(self, stage: int) -> None:
        resolution = self.config.stages[stage].resolution
        data = self.config.data
        transform = ImageTransform(resolution, data.resize, data.crop, data.flip)
        self._images = Images(self.source, transform, self.config.seed, data.loaders, data.max_bad)
        self._validation = Validation(self._val, self.config, resolution, self._rank, self._world)
        self.model.train()

    def batches(self, start: int, end: int, batch_size: int) -> Iterator[list[np.ndarray]]:
        for batch in self._images.batches(start, end, batch_size, self._rank, self._world):
            yield [picture.pixels for picture in batch]

    def count(self) -> dict[str, Tensor]:
        return {"bad_images": torch.tensor(float(self._images.count_bad(self._world)))}

    def check(self, means: dict[str, float]) -> None:
        self._images.check(round(means["bad_images"]))

    def skipped(self) -> int:
        return max(self.optimizer.skipped(), self.disc_optimizer.skipped() if self.disc is not None else 0)

    def validate(self) -> tuple[dict[str, float], np.ndarray | None]:
        return self._validation.run(self) if self._validation.images else ({}, None)

    def exports(self) -> dict[str, Callable[[Path], None]]:
        return {"model": self._save}

    def _save(self, folder: Path) -> None:
        """The trained model, averaged where there is an average, as a model folder."""
        with self.averaged():
            self.model.save_pretrained(folder)


def _worker(setup: dict[str, Any]) -> dict[str, Any]:
    config = validate(TrainVAE, setup["config"])
    return training.work(Autoencoder, config, f"train_vae {config.name}", setup)


class Validation:
    """The first images of the validation source, centre-cropped, spread over ranks; metrics are exact over them."""

    def __init__(self, source: Source | None, config: TrainVAE, resolution: int, rank: int, world: int):
        self.images = min(config.val_images, source.units) if source is not None else 0
        self._batch = max(1, config.stages[-1].batch_size // world)
        self._precision = config.loop.precision
        self._world = world
        transform = ImageTransform(resolution, config.data.resize)
        pixels = []
        for unit in range(rank, self.images, world):
            assert source is not None
            try:
                pixels.append(transform(source.data(unit)).pixels)
            except ImageError as error:
                print(f"skipped unreadable validation image {source.id(unit)} ({error.reason}: {error})", flush=True)
        self._pixels = np.stack(pixels) if pixels else np.empty((0, resolution, resolution, 3), np.uint8)

    @torch.no_grad()
    def run(self, networks: Networks) -> tuple[dict[str, float], np.ndarray | None]:
        """(metrics over all ranks, a picture of this rank's first images where it has any)."""
        values: dict[str, list[float]] = {"psnr": [], "ssim": []}
        shown: list[list[Tensor]] = [[], [], []]
        networks.model.eval()
        with networks.averaged():
            for start in range(0, len(self._pixels), self._batch):
                x = to_tensor(torch.from_numpy(self._pixels[start : start + self._batch]).to(networks.device))
                with autocast(networks.device, self._precision):
                    reconstruction, posterior = networks.model(x, sample_posterior=False)
                reconstruction = reconstruction.float()
                values["psnr"] += metrics.psnr(reconstruction, x).tolist()
                values["ssim"] += metrics.ssim(reconstruction, x).tolist()
                if start < PICTURES:
                    for column, tensor in zip(shown, (x, reconstruction, posterior.mode().float()), strict=True):
                        column.append(tensor[: PICTURES - start])
        networks.model.train()
        gathered = [values]
        if self._world > 1:
            gathered = [values] * self._world
            torch.distributed.all_gather_object(gathered, values)
        means = {}
        for name in values:
            mean = metrics.Mean()
            for part in gathered:
                mean.add(torch.tensor(part[name], dtype=torch.float64))
            means[name] = mean.value()
        return means, reconstruction_picture(*map(torch.cat, shown)) if shown[0] else None
