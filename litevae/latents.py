"""What the latents of any autoencoder are, and how images are encoded into them."""

from typing import Literal
from weakref import WeakKeyDictionary

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from litevae.autoencoder import LiteVAE
from litevae.errors import UserError


def encode_latents(model: ModelMixin, x: Tensor) -> Tensor:
    """Encode images into the raw output of the encoder, neither scaled nor shifted, on the scale that `decode` takes.

    Args:
        model: Autoencoder from `load_autoencoder`.
        x: Images (N, 3, H, W) in [-1, 1].

    Returns:
        The posterior's moments (N, 2 n_z, h, w), first the mean and then the log-variance; for a deterministic encoder,
        the latents (N, n_z, h, w). `latent_content` tells which.

    Raises:
        UserError: if H or W is not a multiple of the model's `downsampling`. Many encoders would silently drop the
            remaining pixels.
    """
    factor, (height, width) = downsampling(model), x.shape[-2:]
    if height % factor or width % factor:
        raise UserError(
            f"{type(model).__name__} takes images with sides that are multiples of {factor} pixels, not "
            f"{width}x{height}; choose another resolution"
        )
    return _encode(model, x)


def latent_content(model: ModelMixin) -> Literal["moments", "mean"]:
    """Return what `encode_latents` gives for this model: a posterior's "moments", or one latent, the "mean"."""
    if (deterministic := getattr(model, "deterministic", None)) is not None:  # LiteVAE and DistilledVAE
        return "mean" if deterministic else "moments"
    return "moments" if "KL" in type(model).__name__ else "mean"


_MEASURED: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()


def downsampling(model: ModelMixin) -> int:
    """Return the downsampling factor f of an autoencoder: one latent element covers f x f pixels.

    The height and width of images must be multiples of f.
    """
    ratio = getattr(model, "spatial_compression_ratio", None) or model.config.get("spatial_compression_ratio")
    widths = model.config.get("encoder_block_out_channels") or model.config.get("block_out_channels")
    if ratio or widths:
        return ratio or 2 ** (len(widths) - 1)
    if model not in _MEASURED:  # the config does not tell the factor, so it is measured on a blank image
        weight = next(model.parameters())
        with torch.inference_mode():
            _MEASURED[model] = 256 // _encode(model, weight.new_zeros(1, 3, 256, 256)).shape[-1]
    return _MEASURED[model]


def _encode(model: ModelMixin, x: Tensor) -> Tensor:
    encoded = model.encode(x, return_dict=False)[0]
    if isinstance(model, LiteVAE) and model.deterministic:
        return encoded.mode()
    return getattr(encoded, "parameters", encoded)
