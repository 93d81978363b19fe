"""What the autoencoders of this project have in common: `forward`, slicing, what `encode` and `decode` return."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

from litevae.model_card import ModelWithCard
from litevae.posterior import Posterior


def one_by_one(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function to each image of a batch, and concatenate the results."""
    return torch.cat([function(image) for image in x.split(1)]) if len(x) > 1 else function(x)


class AutoencoderBase(ModelWithCard, AutoencoderMixin, ConfigMixin):
    """The base of an autoencoder, which has `encode` and `decode` with the arguments of `AutoencoderKL`.

    Attributes:
        use_slicing: Whether the images of a batch are processed one by one (`enable_slicing`).
    """

    _supports_gradient_checkpointing = True  # the ResBlocks are checkpointed
    # `device_map` puts each of these as a whole on one device.
    _no_split_modules: ClassVar[list[str]] = [
        "ResBlock",
        "Attention",
        "Upsample",
        "NAFBlock",
        "TransformerEncoderLayer",
    ]
    # Normalisations are small, and PyTorch's transformer layers read weights without calling the layers that hold them.
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["norm", "aggregator.layers"]

    def __init__(self) -> None:
        super().__init__()
        self.use_slicing = False

    @property
    def deterministic(self) -> bool:
        """Whether the encoder gives one latent instead of a posterior."""
        raise NotImplementedError

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode images in one call.

        Args:
            sample: Images (N, C, H, W) in [-1, 1].
            sample_posterior: Whether to decode a sample of the posterior; False decodes its mean.
            return_dict: Whether to return a `DecoderOutput` instead of a tuple.
            generator: Random generator for the sample.

        Returns:
            The reconstruction (N, C, H, W).
        """
        z = self.encode(sample, return_dict=False)[0]
        if not isinstance(z, Tensor):
            z = z.sample(generator) if sample_posterior else z.mode()
        return self.decode(z, return_dict=return_dict)

    def _sliced(self, compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Compute a batch, image by image if slicing is enabled."""
        return one_by_one(compute, x) if self.use_slicing else compute(x)

    @property
    def _half(self) -> torch.dtype | None:
        """The dtype of the weights if it is fp16 or bf16, which latents have then too (see `Posterior`)."""
        return self.dtype if self.dtype in (torch.float16, torch.bfloat16) else None

    def _encoded(self, moments: Tensor, return_dict: bool) -> AutoencoderKLOutput | tuple[Posterior]:
        """Return what `encode` returns for moments (N, 2 n_z, h, w)."""
        posterior = Posterior(moments, self.deterministic, self._half)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def _decoded(self, sample: Tensor, return_dict: bool) -> DecoderOutput | tuple[Tensor]:
        """Return what `decode` returns for images (N, C, H, W)."""
        return DecoderOutput(sample=sample) if return_dict else (sample,)


class WrappingAutoencoder(AutoencoderBase):
    """The base of an autoencoder that holds another one in the attribute `_inside`, and leaves tiling to it."""

    _inside: ClassVar[str]

    @property
    def use_tiling(self) -> bool:
        """Whether large images are processed in tiles."""
        return getattr(getattr(self, self._inside), "use_tiling", False)

    def enable_tiling(self, *args: Any, **options: Any) -> None:
        """Process large images in tiles; arguments are those of the autoencoder inside (`LiteVAE.enable_tiling`)."""
        getattr(self, self._inside).enable_tiling(*args, **options)

    def disable_tiling(self) -> None:
        """Process images as a whole."""
        getattr(self, self._inside).disable_tiling()
