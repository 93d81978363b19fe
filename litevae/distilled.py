"""A LiteVAE encoder for the latents of another autoencoder, which decodes them: `DistilledVAE`."""

import inspect
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import (
    AutoencoderMixin,
    DecoderOutput,
)
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from litevae.autoencoder import LiteVAE
from litevae.errors import UserError
from litevae.latents import downsampling, latent_content, teacher_class
from litevae.model_card import LatentForm, ModelWithCard
from litevae.posterior import Posterior

FACTOR = 8  # downsampling factor of LiteVAE's encoders
# The least R² at which a folder says that its latents are the teacher's. What the encoder does not explain then is at
# most 5 % of the latents' variance: the error's standard deviation is at most 0.22 of the latents' own. Below it the
# error would be visible in what is decoded, and a model of the teacher's latents would see latents that it was not
# trained on. The folder always holds the R² that was measured, for whoever needs another limit.
LIMIT = 0.95
LOWEST, HIGHEST = -30.0, 20.0  # the limits of diffusers for a log-variance


class DistilledVAE(ModelWithCard, AutoencoderMixin, ConfigMixin):
    """An autoencoder with a LiteVAE encoder and the decoder of another autoencoder, the teacher.

    The encoder has learned the latents of the teacher, so the model stands where the teacher stands, and encodes with
    1 to 7 M parameters. `encode` returns what the teacher's `encode` returns: a posterior (`latent_dist`) for a KL
    autoencoder, and `latents` for one without a posterior.

    Args:
        teacher_config: Config of the teacher, including `_class_name`.
        size: Encoder, one of LiteVAE's sizes or one of the baselines with learned weights; see `LiteVAE`.
        wavelet, downsample, extractor, shared_extractor, levels, aggregator, vit_grid: As in `LiteVAE`.
        latent_channels: Number of latent channels of the teacher.
        deterministic: Whether the teacher has no posterior.
        block_out_channels: Four widths; diffusers pipelines compute the downsampling factor from their number.
        in_channels: Number of image channels.
        scaling_factor, shift_factor, latents_mean, latents_std: Statistics of the latents, as in the teacher's config.
        force_upcast: As in the teacher's config.
        latent_space: The teacher's name and fingerprint, where the encoder reaches `LIMIT`; otherwise None.
        latent_r2: Share of the variance of the teacher's latents that the encoder explains on validation images; None
            if it was not measured.

    Raises:
        UserError: if the teacher's class is not an autoencoder, or the encoder's config is wrong.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        teacher_config: dict[str, Any],
        size: str = "S",
        wavelet: str = "haar",
        downsample: str = "conv",
        extractor: str = "unet",
        shared_extractor: bool = False,
        levels: Sequence[int] = (1, 2, 3),
        aggregator: str = "unet",
        vit_grid: int = 16,
        latent_channels: int = 4,
        deterministic: bool = False,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        in_channels: int = 3,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool = False,
        latent_space: dict[str, str] | None = None,
        latent_r2: float | None = None,
    ):
        super().__init__()
        name = str(teacher_config.get("_class_name"))
        family = teacher_class(name)
        if family is None:
            raise UserError(f"{name} is neither LiteVAE nor an autoencoder of diffusers {diffusers.__version__}")
        self.encoder = LiteVAE(  # only its encoder is kept, so its decoder is as small as can be
            size=size, latent_channels=latent_channels, wavelet=wavelet, downsample=downsample, extractor=extractor,
            shared_extractor=shared_extractor, levels=tuple(levels), aggregator=aggregator, vit_grid=vit_grid,
            in_channels=in_channels, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
        ).encoder  # fmt: skip
        # The network predicts latents that are normalised by channel, so at the start it predicts the mean of each.
        nn.init.zeros_(getattr(self.encoder, "aggregator", self.encoder).conv_out.bias)
        channels = latent_channels if deterministic else 2 * latent_channels
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))
        self.teacher = family.from_config({key: value for key, value in teacher_config.items() if key[0] != "_"})
        for part in ("encoder", "quant_conv"):  # what only encodes
            if hasattr(self.teacher, part):
                setattr(self.teacher, part, nn.Identity())
        self.teacher.requires_grad_(False)
        self.use_slicing = False

    @classmethod
    def of(cls, teacher: ModelMixin, **config: Any) -> "DistilledVAE":
        """Build a model with a random encoder and a copy of the decoder of a teacher.

        Args:
            teacher: The teacher, an autoencoder of RGB images with a downsampling factor of 8.
            config: What differs from the defaults of the encoder: `size`, `wavelet` and so on.

        Raises:
            UserError: if the teacher has another downsampling factor, or its class cannot be a teacher.
        """
        name = type(teacher).__name__
        if (factor := downsampling(teacher)) != FACTOR:
            raise UserError(f"a teacher must have a downsampling factor of {FACTOR}; this {name} has {factor}")
        known = inspect.signature(type(teacher)).parameters  # AutoencoderTiny adds entries that it does not take
        own = {key: value for key, value in teacher.config.items() if key in known} | {"_class_name": name}
        names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast", "latent_channels")
        taken = {key: value for key in names if (value := teacher.config.get(key)) is not None}
        model = cls(own, deterministic=latent_content(teacher) == "mean", **taken | config)
        kept = model.teacher.state_dict().keys()
        model.teacher.load_state_dict({key: value for key, value in teacher.state_dict().items() if key in kept})
        return model

    @property
    def deterministic(self) -> bool:
        """Whether the encoder returns a latent instead of a posterior, as the teacher's does."""
        return self.config.deterministic

    @property
    def spatial_compression_ratio(self) -> int:
        """The downsampling factor, under the name that diffusers gives it."""
        return FACTOR

    def latent_form(self) -> LatentForm:
        """Return what the latents look like, for the model's card."""
        return LatentForm(FACTOR, self.config.latent_channels, self.deterministic)

    def raw(self, x: Tensor) -> Tensor:
        """Encode images (N, C, H, W) in [-1, 1] into fp32 moments (N, 2 n_z, H/8, W/8), or latents (N, n_z, H/8, W/8).

        This is on the scale of the teacher's latents; log-variances are not limited.
        """
        found = self.encoder(x)[:, : len(self.latent_std)].float()
        return found * self.latent_std.float().view(1, -1, 1, 1) + self.latent_mean.float().view(1, -1, 1, 1)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Encode a batch of images as the teacher does.

        Args:
            x: Images (N, C, H, W) in [-1, 1]. H and W must be multiples of 8.
            return_dict: Whether to return an output of diffusers instead of a tuple.

        Returns:
            The posterior, as `latent_dist`; for a teacher without a posterior the latents, as `latents`. With
            `return_dict=False` a tuple with only this.
        """
        found = torch.cat([self.raw(part) for part in self._slices(x)])
        if self.deterministic:
            weights = next(self.encoder.parameters()).dtype
            found = found.to(weights if weights != torch.float32 else found.dtype)
            return AutoencoderTinyOutput(latents=found) if return_dict else (found,)
        posterior = Posterior(found, dtype=next(self.encoder.parameters()).dtype)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode latents (N, n_z, h, w) into images (N, C, 8h, 8w) with the teacher's decoder.

        `generator` is not used. It is accepted because diffusers pipelines pass one.
        """
        sample = torch.cat([self.teacher.decode(part, return_dict=False)[0] for part in self._slices(z)])
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode images (N, C, H, W) in [-1, 1].

        Args:
            sample: The images.
            sample_posterior: Whether to decode a sample of the posterior; False decodes its mean.
            return_dict: Whether to return a `DecoderOutput` instead of a tuple.
            generator: Random generator for the sample.
        """
        (encoded,) = self.encode(sample, return_dict=False)
        if not self.deterministic:
            encoded = encoded.sample(generator) if sample_posterior else encoded.mode()
        return self.decode(encoded, return_dict=return_dict)

    def enable_tiling(self) -> None:
        """Let the teacher decode in tiles. The encoder needs little memory and always sees the whole image."""
        self.teacher.enable_tiling()

    def disable_tiling(self) -> None:
        """Let the teacher decode whole latents again."""
        self.teacher.disable_tiling()

    def rate(self, r2: float, teacher: dict[str, str]) -> None:
        """Note in the config how much of the teacher's latents the encoder explains.

        Args:
            r2: The share of their variance, measured on validation images.
            teacher: Name and fingerprint of the teacher, which are noted where `r2` reaches `LIMIT`.
        """
        self.register_to_config(latent_r2=r2, latent_space=teacher if r2 >= LIMIT else None)

    def _slices(self, x: Tensor) -> tuple[Tensor, ...]:
        """Split a batch into single images if slicing is enabled."""
        return x.split(1) if self.use_slicing else (x,)


def limited(moments: Tensor) -> Tensor:
    """Limit the log-variances, which are the second half of moments (N, 2 n_z, h, w), as diffusers does."""
    mean, logvar = moments.chunk(2, dim=1)
    return torch.cat([mean, logvar.clamp(LOWEST, HIGHEST)], dim=1)
