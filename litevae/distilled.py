"""A LiteVAE encoder for the latents of another autoencoder: `DistilledVAE`. Building autoencoders from configs."""

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from litevae.autoencoder import FACTOR, LiteVAE
from litevae.autoencoder_base import WrappingAutoencoder
from litevae.errors import UserError
from litevae.latents import downsampling, latent_content
from litevae.model_card import LatentForm

# The least R² at which a folder says that its latents are the teacher's. What the encoder does not explain then is at
# most 5 % of the latents' variance: the error's standard deviation is at most 0.22 of the latents' own. Below it the
# error would be visible in what is decoded, and a model of the teacher's latents would see latents that it was not
# trained on. The folder always holds the R² that was measured, for whoever needs another limit.
LIMIT = 0.95
LOWEST, HIGHEST = -30.0, 20.0  # the limits of diffusers for a log-variance


class DistilledVAE(WrappingAutoencoder):
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

    _inside: ClassVar[str] = "teacher"

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
        if teacher_config.get("_class_name") == "DistilledVAE":
            raise UserError("DistilledVAE: the teacher is a DistilledVAE itself; give its own teacher")
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
        self.teacher = autoencoder_from(teacher_config)
        for part in ("encoder", "quant_conv"):  # what only encodes
            if hasattr(self.teacher, part):
                setattr(self.teacher, part, nn.Identity())
        self.teacher.requires_grad_(False)

    @classmethod
    def of(cls, teacher: ModelMixin, **config: Any) -> "DistilledVAE":
        """Build a model with a random encoder and a copy of the decoder of a teacher.

        Args:
            teacher: The teacher, an autoencoder of RGB images with a downsampling factor of 8.
            config: What differs from the defaults of the encoder: `size`, `wavelet` and so on.

        Raises:
            UserError: if the teacher has another downsampling factor, or its class cannot be a teacher.
        """
        if (factor := downsampling(teacher)) != FACTOR:
            name = type(teacher).__name__
            raise UserError(f"a teacher must have a downsampling factor of {FACTOR}; this {name} has {factor}")
        names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast", "latent_channels")
        taken = {key: value for key in names if (value := teacher.config.get(key)) is not None}
        model = cls(config_of(teacher), deterministic=latent_content(teacher) == "mean", **taken | config)
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

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Encode a batch of images as the teacher does.

        Args:
            x: Images (N, C, H, W) in [-1, 1]. H and W must be multiples of 8.
            return_dict: Whether to return an output of diffusers instead of a tuple.

        Returns:
            The posterior, as `latent_dist`; for a teacher without a posterior the latents, as `latents`. With
            `return_dict=False` a tuple with only this.
        """
        found = self._sliced(self.raw, x)
        if not self.deterministic:
            return self._encoded(found, return_dict)
        found = found.to(self._half or found.dtype)
        return AutoencoderTinyOutput(latents=found) if return_dict else (found,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode latents (N, n_z, h, w) into images (N, C, 8h, 8w) with the teacher's decoder.

        `generator` is not used. It is accepted because diffusers pipelines pass one.
        """
        sample = self._sliced(lambda part: self.teacher.decode(part, return_dict=False)[0], z)
        return self._decoded(sample, return_dict)

    def rate(self, r2: float, teacher: dict[str, str]) -> None:
        """Note in the config how much of the teacher's latents the encoder explains.

        Args:
            r2: The share of their variance, measured on validation images.
            teacher: Name and fingerprint of the teacher, which are noted where `r2` reaches `LIMIT`.
        """
        self.register_to_config(latent_r2=r2, latent_space=teacher if r2 >= LIMIT else None)


def limited(moments: Tensor) -> Tensor:
    """Limit the log-variances, which are the second half of moments (N, 2 n_z, h, w), as diffusers does."""
    mean, logvar = moments.chunk(2, dim=1)
    return torch.cat([mean, logvar.clamp(LOWEST, HIGHEST)], dim=1)


def autoencoder_class(name: str) -> type[ModelMixin] | None:
    """Return the class with this name: one of litevae or an autoencoder of diffusers; None if there is none."""
    if own := {"LiteVAE": LiteVAE, "DistilledVAE": DistilledVAE}.get(name):
        return own
    known = name.startswith(("Autoencoder", "AsymmetricAutoencoder", "VQModel"))
    return getattr(diffusers, name, None) if known else None


def autoencoder_from(config: dict[str, Any]) -> ModelMixin:
    """Build an autoencoder with random weights from its config (see `config_of`).

    Raises:
        UserError: if the class in the config is not an autoencoder.
    """
    name = str(config.get("_class_name"))
    family = autoencoder_class(name)
    if family is None:
        raise UserError(f"{name} is neither LiteVAE nor an autoencoder of diffusers {diffusers.__version__}")
    return family.from_config({key: value for key, value in config.items() if key[0] != "_"})


def config_of(model: ModelMixin) -> dict[str, Any]:
    """Return the config from which `autoencoder_from` builds such a model, with its class as `_class_name`."""
    known = inspect.signature(type(model)).parameters  # AutoencoderTiny adds entries that it does not take
    own = {key: value for key, value in model.config.items() if key in known}
    return own | {"_class_name": type(model).__name__}
