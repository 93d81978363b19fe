"""train_vae with a teacher: the encoder learns the latents of another autoencoder, which decodes them."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from litevae import hub
from litevae.any_autoencoder import fingerprint, load_autoencoder
from litevae.autoencoder import FACTOR
from litevae.distilled import LIMIT, DistilledVAE, limited
from litevae.errors import UserError
from litevae.images import ImageError, ImageTransform, to_tensor
from litevae.inference import best_kernels, prepare_for_inference
from litevae.latents import downsampling, encode_latents, latent_content
from litevae.model_folder import model_config
from litevae.precision import autocast
from pipelines.data.source import Source
from pipelines.training import ranks
from pipelines.training.config import TrainVAE
from pipelines.training.vae_loss import AutoencoderLoss
from pipelines.training.vae_validation import Validation

MEASURED = 64  # training images, evenly spaced, that give the mean and the standard deviation of the teacher's latents
# The least standard deviation by which a channel is divided. Log-variances that hardly differ from a constant would
# otherwise outweigh all else, and a channel that is constant would be divided by 0.
LEAST_STD = {"mean": 1e-3, "logvar": 0.1}


def load_teacher(config: TrainVAE) -> ModelMixin:
    """Load the autoencoder of `config.teacher`, frozen.

    Raises:
        UserError: if it has no downsampling factor of 8, or another number of latent channels than the config says.
    """
    teacher = load_autoencoder(config.teacher).requires_grad_(False)
    if isinstance(teacher, DistilledVAE):
        raise UserError(
            f"teacher={config.teacher} has learned the latents of another autoencoder; give that one as the teacher"
        )
    if (factor := downsampling(teacher)) != FACTOR:
        raise UserError(
            f"teacher={config.teacher} has a downsampling factor of {factor}; the encoders here have {FACTOR}"
        )
    return teacher


def build_student(config: TrainVAE, teacher: ModelMixin | None = None) -> DistilledVAE:
    """Build the model that learns from `config.teacher`, with an encoder of random weights from `config.seed`."""
    teacher = load_teacher(config) if teacher is None else teacher
    wanted = config.model
    torch.manual_seed(config.seed)
    model = DistilledVAE.of(
        teacher,
        size=wanted.encoder,
        wavelet=wanted.wavelet,
        downsample=wanted.downsample,
        extractor=wanted.extractor,
        shared_extractor=wanted.shared_extractor,
        levels=list(wanted.levels),
        aggregator=wanted.aggregator,
        vit_grid=wanted.vit_grid,
    )
    default = type(wanted).model_fields["latent_channels"].default
    if wanted.latent_channels not in (default, model.config.latent_channels):
        raise UserError(
            f"teacher={config.teacher} has {model.config.latent_channels} latent channels, not "
            f"model.latent_channels={wanted.latent_channels}; leave it out"
        )
    return model


class Student(nn.Module):
    """What is trained: images (N, 3, H, W) -> the student's raw encoding. DDP hooks into this `forward`."""

    def __init__(self, model: DistilledVAE):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.raw(x)


class Lessons:
    """The teacher, and the loss of its student.

    Args:
        config: the run's config.
        model: the student.
        objective: the terms on pixels.
        device: where the teacher computes.
    """

    def __init__(self, config: TrainVAE, model: DistilledVAE, objective: AutoencoderLoss, device: torch.device):
        self.config, self.model, self.objective, self.device = config, model, objective, device
        # The teacher only computes its latents, in fp32; on CPUs with the native kernels, about twice as fast.
        self.teacher = prepare_for_inference(load_teacher(config), device, best_kernels(device, "fp32"))
        name = config.teacher if hub.is_name(config.teacher) else Path(config.teacher).resolve().name
        self.about = {"name": name, "fingerprint": fingerprint(config.teacher)}
        self.measured = False

    @torch.no_grad()
    def measure(self, source: Source, resolution: int) -> None:
        """Set the mean and standard deviation by which latents are normalised, unless a checkpoint has set them.

        All ranks do this on the same images, so that all have the same values.

        Args:
            source: the training images.
            resolution: side of the images in pixels.
        """
        if self.measured:
            return
        transform = ImageTransform(resolution, self.config.data.resize, max_pixels=self.config.data.max_pixels)
        parts = []
        for unit in np.linspace(0, source.units - 1, min(MEASURED, source.units)).round().astype(int).tolist():
            try:
                pixels = torch.from_numpy(np.array(transform(source.data(unit)).pixels))
            except ImageError:
                continue  # training says which images can't be read
            latents = self.latents(to_tensor(pixels[None].to(self.device)))
            parts.append(latents.double().cpu().movedim(1, -1).reshape(-1, latents.shape[1]))
        if not parts:
            raise UserError(f"none of the images of {source.uri} that the teacher was shown can be read")
        values = torch.cat(parts)
        std, channels = values.std(dim=0, unbiased=False), self.model.config.latent_channels
        std[:channels] = std[:channels].clamp(min=LEAST_STD["mean"])
        std[channels:] = std[channels:].clamp(min=LEAST_STD["logvar"])
        self.model.latent_mean.copy_(values.mean(dim=0))
        self.model.latent_std.copy_(std)
        self.measured = True

    @torch.no_grad()
    def latents(self, x: Tensor) -> Tensor:
        """Return the teacher's moments (N, 2 n_z, h, w), or latents (N, n_z, h, w), in fp32."""
        with torch.autocast(x.device.type, enabled=False):
            found = encode_latents(self.teacher, x).float()
        return found if latent_content(self.teacher) == "mean" else limited(found)

    def loss(self, net: nn.Module, x: Tensor, images: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the student's loss on images (N, 3, H, W) in [-1, 1].

        Args:
            net: the student as it is trained: under DDP where there are several ranks.
            x: the images.
            images: images seen before this step.

        Returns:
            The weighted sum, and each term unweighted, as scalars.
        """
        target = self.latents(x)
        with autocast(self.device, self.config.loop.precision):
            found = net(x)
        channels, std = self.model.config.latent_channels, self.model.latent_std.view(1, -1, 1, 1)
        errors = ((found - target) / std).square()
        terms = {"latent": errors[:, :channels].mean()}
        if errors.shape[1] > channels:
            terms["logvar"] = errors[:, channels:].mean()
        total = torch.zeros((), device=x.device)
        for name, value in terms.items():
            term = getattr(self.config.loss, name)
            total = total + term.weight * (images >= term.start) * value
        if self.objective.needs_reconstruction(images):
            mean = found[:, :channels]
            with autocast(self.device, self.config.loop.precision):
                reconstruction = self.model.decode(mean, return_dict=False)[0]
            point = DiagonalGaussianDistribution(torch.cat([mean, mean], dim=1), deterministic=True)
            more, values = self.objective(x, reconstruction.float(), point, images)
            total, terms = total + more, terms | values
        return total, terms


class TeacherValidation(Validation):
    """Validation of a student: how much of the teacher's latents it explains, and both through the teacher's decoder.

    R² is 1 - (sum of squared errors of the mean) / (sum of squared deviations of the teacher's mean from its average in
    each channel), over all channels (`latent_r2`) and for each (`latent_r2_0`, ...).

    Args:
        source, config, resolution, rank, world: as `Validation` takes them.
        lessons: the teacher.
    """

    _whose: ClassVar[tuple[str, ...]] = ("", "teacher_")

    def __init__(
        self, source: Source | None, config: TrainVAE, resolution: int, rank: int, world: int, lessons: Lessons
    ):
        super().__init__(source, config, resolution, rank, world)
        self._lessons = lessons

    @torch.no_grad()
    def run(self, model: Any, averaged: AbstractContextManager[None]) -> tuple[dict[str, float], np.ndarray | None]:
        """Encode the images with student and teacher, and decode both. All ranks must call this together.

        Args:
            model: the student in training mode, to which it returns.
            averaged: context in which the model has the weights to validate.

        Returns:
            `latent_r2`, `psnr` and `ssim` of the student, `teacher_psnr` and `teacher_ssim`, and R² of each channel,
            over all ranks; and a picture of this rank's first images, or None if it has no images.
        """
        channels = model.config.latent_channels
        self._sums = torch.zeros(4, channels, dtype=torch.float64)  # elements, values, squares, squared errors
        means, picture = super().run(model, averaged)
        count, value, square, error = torch.stack(ranks.gathered([self._sums], self._world)).sum(dim=0)
        spread = square - value**2 / count
        each = {f"latent_r2_{n}": float(1 - error[n] / spread[n]) for n in range(channels)}
        return {"latent_r2": float(1 - error.sum() / spread.sum())} | means | each, picture

    def _reconstruct(self, model: Any, x: Tensor) -> tuple[list[Tensor], Tensor]:
        channels = model.config.latent_channels
        target = self._lessons.latents(x)[:, :channels]
        with autocast(model.device, self._precision):
            mean = model.raw(x)[:, :channels]
            decoded = [model.decode(latents, return_dict=False)[0] for latents in (mean, target)]
        wide = target.double().cpu()
        error = (mean.double().cpu() - wide).square()
        self._sums += torch.stack([t.sum(dim=(0, 2, 3)) for t in (torch.ones_like(wide), wide, wide.square(), error)])
        return [images.float().clamp(-1, 1) for images in decoded], mean


def closing_line(config: TrainVAE, model: str) -> str:
    """Return the line that says whether the model in a folder has the teacher's latents."""
    r2 = model_config(model).get("latent_r2")
    if r2 is None:
        return (
            f"{model} does not say that its latents are those of {config.teacher}: without data.val.uri it was not "
            f"measured how near they are"
        )
    if r2 >= LIMIT:
        return f"its latents are those of {config.teacher}: R² is {r2:.3f} on validation images (limit: {LIMIT:g})"
    return (
        f"its latents are not yet those of {config.teacher}: R² is {r2:.3f} on validation images, and {LIMIT:g} is "
        f"needed. Train longer (a further stage), with a larger model.encoder, or on more images"
    )
