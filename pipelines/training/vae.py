"""Train LiteVAE on Ray Train, in stages, with reconstruction, perceptual, KL, high-frequency and adversarial losses."""

import inspect
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from litevae import losses, order
from litevae.any_autoencoder import load_autoencoder
from litevae.autoencoder import LiteVAE, count_parameters
from litevae.convert import load_decoder
from litevae.diffusion import EMA
from litevae.discriminators import Discriminator, build_discriminator
from litevae.distilled import DistilledVAE
from litevae.equivariance import SpatialTransform, draw_scale, draw_transform
from litevae.errors import UserError
from litevae.images import ImageTransform, to_tensor
from litevae.loader import stream
from litevae.model_card import write_card
from litevae.model_folder import STATISTICS, model_config
from litevae.perceptual import SqueezeNetFeatures, WeightsMissing, load_esrgan, load_lpips
from litevae.posterior import Posterior
from litevae.precision import autocast
from pipelines.data.open_source import open_source
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
    ranks,
    run_folder,
    run_lock,
    step_metrics,
    vae_statistics,
    vae_validation,
)
from pipelines.training.card_facts import Validated, facts_of_vae
from pipelines.training.config import TrainVAE
from pipelines.training.image_feed import Images, Picture
from pipelines.training.may_change import VAE as MAY_CHANGE
from pipelines.training.teacher import Lessons, Student, TeacherValidation, build_student, closing_line
from pipelines.training.vae_loss import AdversarialLoss, AutoencoderLoss
from pipelines.training.vae_validation import Validation
from pipelines.training.worker_setup import VaeSetup


@run_lock.exclusive
def train_vae(config: TrainVAE, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Start or resume the run `config.name`, and write its model to root/name/model.

    Args:
        config: the run's config.
        callbacks: callbacks of Ray Train.

    Returns:
        The result of `launch.fit`.

    Raises:
        UserError: anything that the user can fix, raised before Ray starts where that is possible; or another process
            is working on this run.
    """
    folder = os.path.join(paths.output_path("root", config.root), config.name)
    given, config = config, first_look.train_vae(config)
    if run_folder.check_run(folder, config, MAY_CHANGE) == "same":
        _check_stages(folder, config)
    source = open_source(config.data.train, "data.train")
    val = open_source(config.data.val, "data.val") if config.data.val.uri else None
    for n, stage in enumerate(config.stages):
        launch.check_batch(
            f"stages.{n}.batch_size", stage.batch_size, source.units, config.ray, config.optim.accumulate
        )
    model = build_model(config)
    lpips = lpips_or_warning(config, first_look.lpips_is_required(config, folder))
    if config.loss.features.weight:
        SqueezeNetFeatures(config.loss.features.weights)
    if config.loss.esrgan.weight:
        load_esrgan(config.loss.esrgan.weights)
    _check_discriminator(config)
    begin = os.path.abspath(config.begin) if config.begin else ""
    images_look.check_images(source, transform_of(config, config.stages[0].resolution), "data.train")
    launch.check_room(folder, _checkpoint_size(config, model), config.loop)
    mlflow_run.check(config)
    total, begun = sum(stage.images for stage in config.stages), forecast.images_done(folder, begin)
    placement = forecast.start_ray(
        config, total, begun,
        lambda: forecast.vae_seconds(config, lambda changed: _measured_step(changed, lpips), begun, config.ray.workers),
    )  # fmt: skip
    paths.check_folders({"root": os.path.dirname(folder)}, {"data.train.uri": source.uri})
    resumed = run_folder.open_run(folder, config, MAY_CHANGE)
    if resumed:
        run_folder.write_config(folder, config)
    decoder = model.teacher if isinstance(model, DistilledVAE) else model.decoder
    for name, place in first_look.models(config).items():
        if (wanted := first_look.models(given)[name]) != place:
            say(f"{name}={wanted} is {place} in this run")
    say(
        f"train_vae {config.name}: {source.units:,} images, encoder {config.model.encoder} "
        f"{count_parameters(model.encoder):,} + {'teacher' * bool(config.teacher) or 'decoder'} "
        f"{count_parameters(decoder):,} parameters, {total:,} images to train on, {placement.text}",
    )
    with run_folder.kept_if_made(folder):
        params = config.model_dump(mode="json")
        handle = mlflow_run.start_run(
            config.tracking, config.root, "train_vae", config.name, params, folder, resume=resumed
        )
        setup = VaeSetup(
            config=values_to_keep(config), folder=folder, data=source.uri, begin=begin, handle=handle,
            source=source, val=val, lpips=lpips,
        )  # fmt: skip
        result = launch.fit(_worker, setup, placement, config.loop, callbacks)
    lines = [f"model: {result['model']}", *vae_validation.closing_lines(config, val, result)]
    lines += vae_statistics.closing_lines(config, source, result["model"])
    if config.teacher:
        lines.append(closing_line(config, result["model"]))
    say("\n".join(lines), **result)
    return result


def build_model(config: TrainVAE) -> LiteVAE | DistilledVAE:
    """Build the autoencoder of `config.model`: with the weights of `model.init`, or random ones from `config.seed`.

    With a teacher, it is an encoder with the teacher's decoder.

    Raises:
        UserError: if `model.init` is not a model folder, or its architecture differs from `config.model`.
    """
    if config.teacher:
        return build_student(config)
    wanted = config.model
    torch.manual_seed(config.seed)
    model = LiteVAE(
        size=wanted.encoder,
        latent_channels=wanted.latent_channels,
        wavelet=wanted.wavelet,
        downsample=wanted.downsample,
        extractor=wanted.extractor,
        shared_extractor=wanted.shared_extractor,
        levels=wanted.levels,
        aggregator=wanted.aggregator,
        vit_grid=wanted.vit_grid,
        conv1x1=wanted.conv1x1,
        block_out_channels=wanted.decoder.channels,
        layers_per_block=wanted.decoder.layers,
        decoder_norm=wanted.decoder.norm,
        output=wanted.decoder.output,
    )
    if wanted.init_decoder:
        _init_decoder(model, wanted.init_decoder)
    if not wanted.init:
        return model
    have = model_config(wanted.init)
    if (kind := have.get("_class_name")) != "LiteVAE":
        raise UserError(f"model.init={wanted.init} is a model of class {kind}, not LiteVAE")
    # A field that is missing in an older model folder counts as its default.
    have = {key: field.default for key, field in inspect.signature(LiteVAE.__init__).parameters.items()} | have
    before = {key: model.config[key] for key in STATISTICS}  # latents of the weights at the start don't count
    have |= before
    have, own = (
        {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
        for config in (have, model.config)
    )
    if different := [f"{k} {have.get(k)!r}, not {v!r}" for k, v in own.items() if k[0] != "_" and have.get(k) != v]:
        raise UserError(f"model.init={wanted.init} is another model: {'; '.join(different)}")
    model = load_autoencoder(wanted.init)
    model.register_to_config(**before)
    return model


def _init_decoder(model: LiteVAE, folder: str) -> None:
    """Put the decoder of the autoencoder in a folder into a model.

    Raises:
        UserError: if it is neither an AutoencoderKL nor a LiteVAE, or its decoder is another one.
    """
    source = load_autoencoder(folder)
    if not isinstance(source, AutoencoderKL | LiteVAE):
        raise UserError(f"model.init_decoder={folder} is a {type(source).__name__}, not an AutoencoderKL or LiteVAE")
    try:
        load_decoder(model, source)
    except UserError as error:
        raise UserError(f"model.init_decoder={folder}: {error}") from None


def _freeze(model: LiteVAE, parts: Sequence[str]) -> None:
    """Exclude parts of a model from training, each with the 1x1 convolution next to it."""
    for part in parts:
        for name in (part, {"encoder": "quant_conv", "decoder": "post_quant_conv"}[part]):
            getattr(model, name).requires_grad_(False)


def lpips_or_warning(config: TrainVAE, required: bool = True) -> bool:
    """Return whether the LPIPS term is on. If its backbone's weights are missing, it is off and a warning is logged.

    Args:
        config: the run's config.
        required: whether missing weights are an error.

    Raises:
        WeightsMissing: if the weights are missing, and `required`.
    """
    term = config.loss.lpips
    if not term.weight:
        return False
    try:
        load_lpips(term.net, term.weights)
    except WeightsMissing as missing:
        if required:
            raise
        say(f"warning: loss.lpips is off: {missing}", "WARNING")
        return False
    return True


def transform_of(config: TrainVAE, resolution: int) -> ImageTransform:
    """Return the transform of training images at a resolution."""
    data = config.data
    return ImageTransform(resolution, data.resize, data.crop, data.flip, decode=data.decode, max_pixels=data.max_pixels)


def _checkpoint_size(config: TrainVAE, model: LiteVAE) -> launch.CheckpointSize:
    """Estimate the bytes of a checkpoint: weights, their average, and the two moments of Adam, all in fp32."""
    copies = 3 + bool(config.loop.ema)
    adversarial, exported = config.loss.adversarial, 4 * count_parameters(model)
    state = copies * exported
    if adversarial.weight:
        with torch.device("meta"):
            state += 3 * 4 * count_parameters(build_discriminator(adversarial.kind, adversarial.channels))
    return launch.CheckpointSize(state, exported)


def _check_discriminator(config: TrainVAE) -> None:
    """Check that the discriminator can take the smallest stage's images.

    It may be used only late in a run, and the user should see this error at the start.

    Raises:
        UserError: if the images are too small for this kind of discriminator.
    """
    if not config.loss.adversarial.weight:
        return
    kind, resolution = config.loss.adversarial.kind, min(stage.resolution for stage in config.stages)
    side, what = resolution, f"a stage's resolution of {resolution}"
    if config.equivariance.share:
        side = min(side, 8 * math.ceil(config.equivariance.smallest * (resolution // 8)))
        what = f"the {side} px that equivariance.smallest makes of a stage's {resolution} px"
    try:
        build_discriminator(kind, 1)(torch.zeros(2, 3, side, side))
    except RuntimeError:
        raise UserError(
            f"loss.adversarial.kind={kind} needs larger images than {what}: raise it, or take kind=unet"
        ) from None


def _check_stages(folder: str, config: TrainVAE) -> None:
    """Check the stages of a resumed run: the last one may get longer and more may follow, all else must be the same.

    Raises:
        UserError: if a stage was changed, shortened or removed.
    """
    import yaml

    before = yaml.safe_load((Path(folder) / "config.yaml").read_text())["stages"]
    now = [stage.model_dump() for stage in config.stages]
    same = len(now) >= len(before) and now[: len(before) - 1] == before[:-1]
    last, other = before[-1], now[len(before) - 1] if same else {}
    if not same or {**other, "images": 0} != {**last, "images": 0} or other["images"] < last["images"]:
        raise UserError(f"stages of run {folder} may only grow; they were {before}, and are {now}")


def _measured_step(config: TrainVAE, lpips: bool) -> forecast.Step:
    """Return the training step of `config` on random images on the CPU, without Ray."""
    networks = Networks(config, lpips, torch.device("cpu"), prepare=lambda network: network)
    side = forecast.side_of(config)
    return lambda images, seen: networks.step(torch.randint(256, (images, side, side, 3), dtype=torch.uint8), seen)


# --- in the workers -------------------------------------------------------------------------------------------------


class Reconstruction(nn.Module):
    """The forward pass of a training step: images -> reconstruction and posterior.

    The step needs both from one call, because DDP hooks only into `forward`. With a transform the reconstruction is
    that of the transformed latents.
    """

    def __init__(self, model: LiteVAE):
        super().__init__()
        self.model = model

    def forward(
        self, x: Tensor, sample_posterior: bool = True, transform: SpatialTransform | None = None
    ) -> tuple[Tensor, Posterior]:
        posterior = self.model.encode(x, return_dict=False)[0]
        z = posterior.sample() if sample_posterior else posterior.mode()
        if transform is not None:
            z = transform.latents(z)
        return self.model.decode(z, return_dict=False)[0], posterior


class Networks:
    """Autoencoder, discriminator, their optimizers and the EMA: everything that a step updates and a checkpoint stores.

    Args:
        config: the run's config.
        lpips: whether the LPIPS term is on.
        device: the device of all networks.
        prepare: prepares a network for several ranks; None: Ray's function, which needs a worker of Ray Train.
    """

    def __init__(
        self,
        config: TrainVAE,
        lpips: bool,
        device: torch.device,
        prepare: Callable[[nn.Module], nn.Module] | None = None,
    ):
        if prepare is None:
            from ray.train.torch import prepare_model

            prepare = prepare_model
        self.config, self.device = config, device
        self.memory_format = compiling.memory_format(device, config.loop.compile)
        self.model = build_model(config).to(device).to(memory_format=self.memory_format)
        _freeze(self.model, config.model.freeze)
        if config.checkpointing:
            self.model.enable_gradient_checkpointing()
        student = isinstance(self.model, DistilledVAE)
        self.net = prepare(Student(self.model) if student else Reconstruction(self.model))
        self.objective = AutoencoderLoss(config, lpips).to(device).to(memory_format=self.memory_format)
        self.lessons = (
            Lessons(config, self.model, self.objective, device) if isinstance(self.model, DistilledVAE) else None
        )
        self.optimizer = optimizer.Adam(self.model, config.optim)
        self.ema = EMA(self.model, config.loop.ema) if config.loop.ema else None
        self.disc: Discriminator | None = None
        self.lecam: losses.LeCam | None = None
        self.adversarial: AdversarialLoss | None = None
        adversarial = config.loss.adversarial
        if adversarial.weight:
            torch.manual_seed(config.seed + 1)
            self.disc = build_discriminator(adversarial.kind, adversarial.channels)
            self.disc.to(device).to(memory_format=self.memory_format)
            self.disc_net = prepare(self.disc)
            self.disc_optimizer = optimizer.Adam(self.disc, config.optim, lr=adversarial.lr)
            self.lecam = losses.LeCam(ranks.average, device=device) if adversarial.lecam else None
            self.adversarial = AdversarialLoss(config, self.disc, self.disc_net, self.lecam)
        if config.loop.compile:  # but the posterior's draw between encoder and decoder stays eager
            decoder = self.model.teacher if isinstance(self.model, DistilledVAE) else self.model.decoder
            compiling.compile_parts(self.model.encoder, decoder, self.disc, *self.objective.children())
        self.total = sum(stage.images for stage in config.stages)
        self.seen = 0  # images, over all ranks
        self.latent_r2: float | None = None  # of the last validation with a teacher

    def step(self, pixels: Tensor, images: int) -> dict[str, Tensor]:
        """Do one optimizer step for each network.

        Args:
            pixels: this rank's images, uint8 (N, H, W, 3).
            images: images seen before this step, over all ranks.

        Returns:
            The unweighted loss terms, the total `loss`, and the optimizers' metrics, as scalars.
        """
        optim, adversarial = self.config.optim, self.config.loss.adversarial
        self.seen = images + len(pixels) * ranks.world()
        gan = self.adversarial if images >= adversarial.start else None
        factor = optimizer.learning_rate_factor(optim, images, self.total)
        values: list[dict[str, Tensor]] = []
        fakes: list[tuple[Tensor, Tensor]] = []
        parts = pixels.to(self.device, non_blocking=True).chunk(optim.accumulate)
        for n, part in enumerate(parts):
            x = to_tensor(part, self.memory_format)
            if self.lessons is not None:
                with compiling.synced(self.net, n == len(parts) - 1):
                    loss, terms = self.lessons.loss(self.net, x, images)
                    (loss / len(parts)).backward()
                values.append(terms | {"loss": loss})
                continue
            x, transform = self._equivariance(x, images, n)
            averaged = self._averaged_reconstruction(x, transform) if self.objective.wants_averaged(images) else None
            with compiling.synced(self.net, n == len(parts) - 1):
                with autocast(self.device, self.config.loop.precision):
                    reconstruction, posterior = self.net(x, transform=transform)
                reconstruction = reconstruction.float()
                x = x if transform is None else transform.images(x)
                loss, terms = self.objective(x, reconstruction, posterior, images, averaged)
                if gan is not None:
                    weight, more = gan.term(loss, reconstruction, self._last_layer(), images)
                    terms |= more
                    loss = loss + weight * terms["adversarial"]
                    fakes.append((x, reconstruction.detach()))
                (loss / len(parts)).backward()
            values.append(terms | {"loss": loss})
        found = step_metrics.mean_of(values) | self.optimizer.step(optim.lr * factor)
        _share_buffers(self.model)
        if self.ema is not None:
            self.ema.update(self.model)
        if gan is not None:
            found |= self._discriminator_step(fakes, images, adversarial.lr * factor)
        return found

    def _equivariance(self, x: Tensor, images: int, part: int) -> tuple[Tensor, SpatialTransform | None]:
        """Return micro-batch number `part`, smaller in some steps, and the transform of its latents in others.

        All ranks draw the same, so that their steps take equally long.
        """
        config, side = self.config.equivariance, x.shape[-1] // 8
        if not config.share:
            return x, None
        # The last entry keeps these draws apart from those of `AdversarialLoss.discriminator_loss`.
        random = np.random.default_rng(order.seed_for(self.config.seed, images, part, 2))
        if random.random() < config.share:
            return x, draw_transform(random, side, config.smallest)
        if random.random() < config.smaller:
            x = SpatialTransform(draw_scale(random, side, config.smallest)).images(x)
        return x, None

    def _last_layer(self) -> Tensor:
        """Return the weight at which gradients are compared: of the decoder's last layer; if frozen, the encoder's."""
        frozen = "decoder" in self.config.model.freeze
        part = getattr(self.model.encoder, "aggregator", self.model.encoder) if frozen else self.model.decoder
        return part.conv_out.weight

    def _discriminator_step(self, fakes: list[tuple[Tensor, Tensor]], images: int, lr: float) -> dict[str, Tensor]:
        """Do one optimizer step for the discriminator on each micro-batch's (images, reconstructions)."""
        assert self.disc is not None
        assert self.adversarial is not None
        self.disc.requires_grad_(True)
        values: list[dict[str, Tensor]] = []
        for n, (x, fake) in enumerate(fakes):
            with compiling.synced(self.disc_net, n == len(fakes) - 1):
                loss, terms = self.adversarial.discriminator_loss(x, fake, images, n)
                (loss / len(fakes)).backward()
            values.append(terms)
        stepped = {f"discriminator_{key}": value for key, value in self.disc_optimizer.step(lr).items()}
        return step_metrics.mean_of(values) | stepped

    @torch.no_grad()
    def _averaged_reconstruction(self, x: Tensor, transform: SpatialTransform | None = None) -> Tensor:
        """Reconstruct images with the EMA weights, in fp32 and from the posterior's mode."""
        assert self.ema is not None
        # The buffers are copied so that running means do not see the batch twice.
        state = self.ema.average | {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with compiling.uncompiled(), autocast(self.device, self.config.loop.precision):
            state = {f"model.{name}": value for name, value in state.items()}
            return torch.func.functional_call(Reconstruction(self.model), state, (x, False, transform))[0].float()

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the model has the weights to validate and export: the EMA's if there is an EMA."""
        return self.ema.swapped(self.model) if self.ema is not None else nullcontext()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores: the states of networks, optimizers, EMA and LeCam."""
        state: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        if self.disc is not None:
            state |= {"discriminator": self.disc.state_dict(), "disc_optimizer": self.disc_optimizer.state_dict()}
        if self.lecam is not None:
            state["lecam"] = self.lecam.state_dict()
        if self.lessons is not None:
            state["latent_r2"] = self.latent_r2
        return state

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.seen = state.get("images", 0)  # the loop adds it
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.disc is not None:
            self.disc.load_state_dict(state["discriminator"])
            self.disc_optimizer.load_state_dict(state["disc_optimizer"])
        if self.lecam is not None:
            self.lecam.load_state_dict(state["lecam"])
        if self.lessons is not None:
            self.lessons.measured = True  # mean and standard deviation are in the model's state
            self.latent_r2 = state["latent_r2"]


def _share_buffers(model: nn.Module) -> None:
    """Copy rank 0's running statistics (decoder.norm=batch) to all ranks after a step.

    DDP does so only before the next step. With this, the weights that are averaged and validated are the same on all
    ranks, and the same as in a checkpoint.
    """
    if torch.distributed.is_initialized():
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


class VaeTask(Networks):
    """The training task (see `loop.TrainingTask`): the networks, the images of the current stage, and validation."""

    def __init__(self, config: TrainVAE, setup: VaeSetup, rank: int, world: int, device: torch.device):
        super().__init__(config, setup.lpips, device)
        self.source = setup.source
        self.digest, self.order = self.source.digest, order.VERSION
        self.stages = [(stage.images, stage.batch_size) for stage in config.stages]
        self._val = setup.val
        self._rank, self._world = rank, world
        self.validated = ""
        self._setup, self._bad = setup, 0
        self._last_validation = Validated()  # what the last validation measured
        self._statistics: dict[str, Any] | None = None  # of the latents of the trained model

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores: also the last validation and, of a finished run, its latents' statistics."""
        own: dict[str, Any] = {"validation": [dict(self._last_validation.values), *self._last_validation[1:]]}
        return super().state() | own | ({} if self._statistics is None else {"statistics": self._statistics})

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned. Statistics and metrics of a training on other data are left out."""
        super().load(state)
        own = state.get("digest") == self.digest
        self._statistics = state.get("statistics") if own else None
        self._last_validation = Validated(*state.get("validation", ()) if own else ())

    def begin(self, stage: int) -> None:
        """Prepare images and validation at the stage's resolution, and put the model into training mode."""
        resolution = self.config.stages[stage].resolution
        data, transform = self.config.data, transform_of(self.config, resolution)
        self._images = Images(self.source, transform, self.config.seed, data.loaders, data.max_bad, self.order)
        view = (self._val, self.config, resolution, self._rank, self._world)
        if self.lessons is None:
            self._validation = Validation(*view)
        else:
            self.lessons.measure(self.source, resolution)
            self._validation = TeacherValidation(*view, self.lessons)
        self.validated = vae_validation.described(self._validation.images, resolution)
        self.model.train()

    def batches(self, start: int, end: int, batch_size: int) -> Iterator[Tensor]:
        """Yield this rank's batches, uint8 (N, H, W, 3); a thread puts each together while the previous step runs."""
        pictures = self._images.batches(start, end, batch_size, self._rank, self._world)
        for (batch,) in stream(self._stacked, ([batch] for batch in pictures), threads=1, ahead=1):
            yield batch

    def _stacked(self, pictures: Sequence[Picture]) -> Tensor:
        batch = torch.from_numpy(np.stack([picture.pixels for picture in pictures]))
        # Copies from unpinned memory would wait for the previous step.
        return batch.pin_memory() if self.device.type == "cuda" else batch

    def count(self) -> dict[str, Tensor]:
        """Return the number of unreadable images so far as a metric."""
        bad = self._images.count_bad(self._world)
        self._bad = max(self._bad, bad)  # a stage counts anew
        return {"bad_images": torch.tensor(float(bad))}

    def check(self, means: dict[str, float]) -> None:
        """Raise a UserError if there are more unreadable images than the config allows."""
        self._images.check(round(means["bad_images"]))

    def skipped(self) -> int:
        """Return the longest series of skipped steps, of either optimizer, since the last call."""
        return max(self.optimizer.skipped(), self.disc_optimizer.skipped() if self.disc is not None else 0)

    def validate(self) -> tuple[dict[str, float], np.ndarray | None]:
        """Return the metrics and the picture of the validation images, if there are any.

        At the end of the training this also measures the statistics of the latents.
        """
        if self._finished():
            with self.averaged(), compiling.uncompiled():
                self._statistics = self._measured(self._rank, self._world)
        if not self._validation.images:
            return {}, None
        values, picture = self._validation.run(self.model, self.averaged())
        assert self._val is not None
        self._last_validation = Validated(values, self._validation.measured(self.device), self._val.uri, self._val.kind)
        self.latent_r2 = values.get("latent_r2")
        return values, picture

    def exports(self) -> dict[str, Callable[[Path], None]]:
        """Return the writer of the run's only model folder."""
        return {"model": self._save}

    def _save(self, folder: Path) -> None:
        """Save the model, with the EMA weights if there is an EMA, as a model folder with a card."""
        if self.lessons is not None and self.latent_r2 is not None:
            self.model.rate(self.latent_r2, self.lessons.about)
        with self.averaged():
            if self._finished():
                if self._statistics is None:  # of a run that an older version finished, or with other data
                    self._statistics = self._measured()
                self.model.register_to_config(**self._statistics)
            self.model.save_pretrained(folder)
        unused = ("latent", "logvar") if self.lessons is None else ("logvar",) * self.model.deterministic
        facts = facts_of_vae(self.config, self._setup, self.seen, self._bad, unused, self._last_validation)
        write_card(folder, self.model, facts)

    def _finished(self) -> bool:
        """Return whether the model is trained and has statistics of its own. A student has those of its teacher."""
        return self.seen >= self.total and self.lessons is None

    def _measured(self, rank: int = 0, world: int = 1) -> dict[str, Any]:
        return vae_statistics.measured(self.model, self.source, self.config, rank, world)


def _worker(given: dict[str, Any]) -> dict[str, Any]:
    setup: VaeSetup = given["setup"]
    config = validate(TrainVAE, setup.config)
    return launch.work(VaeTask, config, f"train_vae {config.name}", setup)
