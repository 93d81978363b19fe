"""The LiteVAE autoencoder as a diffusers model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from litevae.autoencoder_base import AutoencoderBase
from litevae.baselines import SD_SIZES, SDEncoder, WaveletEncoder
from litevae.decoder import Decoder
from litevae.encoder import AGGREGATORS, EXTRACTORS, SIZES, Encoder
from litevae.errors import UserError
from litevae.layers import NORMS, ExactConv2d, bake, compute_dtype
from litevae.model_card import LatentForm
from litevae.posterior import Posterior
from litevae.tiling import tiled
from litevae.wavelet import LEVELS, check_wavelet, pad_to_multiple

ENCODERS = (*SIZES, *SD_SIZES, "dwt", "dwt-2")
FACTOR = 2**LEVELS  # one latent element covers 8 x 8 pixels
_VARIANT_DEFAULTS: dict[str, Any] = {
    "shared_extractor": False,
    "levels": (1, 2, 3),
    "downsample": "conv",
    "extractor": "unet",
    "aggregator": "unet",
}


def _check_config(config: Mapping[str, Any]) -> None:
    """Check the arguments of `LiteVAE`.

    Raises:
        UserError: if a value is unknown, or two values do not go together. The message names the first problem.
    """
    for name, known in (
        ("size", ENCODERS),
        ("downsample", ("conv", "pool")),
        ("extractor", tuple(EXTRACTORS)),
        ("aggregator", AGGREGATORS),
        ("decoder_norm", NORMS),
        ("output", ("image", "wavelet")),
    ):
        if config[name] not in known:
            raise UserError(f"LiteVAE: {name}={config[name]!r} is not one of {', '.join(known)}")
    size, levels, widths = config["size"], list(config["levels"]), config["block_out_channels"]
    if not levels or levels != sorted(set(levels) & set(range(1, LEVELS + 1))):
        raise UserError(f"LiteVAE: levels={levels} must be some of 1, 2, 3, each at most once and in this order")
    if len(widths) != 4:
        raise UserError(f"LiteVAE: block_out_channels has {len(widths)} widths; f = 8 needs exactly 4")
    check_wavelet(config["wavelet"])
    variant = {name: config[name] for name in _VARIANT_DEFAULTS} | {"levels": tuple(levels)}
    if size not in SIZES and (other := [name for name, value in variant.items() if value != _VARIANT_DEFAULTS[name]]):
        raise UserError(f"LiteVAE: {other[0]} is for sizes {', '.join(SIZES)}, and size={size!r} has no such choice")
    if size in SIZES or size in SD_SIZES:
        return
    gives = WaveletEncoder(size == "dwt-2", config["wavelet"], config["in_channels"]).latent_channels
    if config["latent_channels"] != gives:
        raise UserError(
            f"LiteVAE: size={size!r} gives {gives} latent channels, not latent_channels={config['latent_channels']}; "
            f"set it to {gives}"
        )
    if config["conv1x1"]:
        raise UserError(f"LiteVAE: conv1x1 needs a learned encoder, and size={size!r} is not learned; leave it out")


def _build_encoder(
    size: str, latent_channels: int, wavelet: str, in_channels: int, vit_grid: int, variant: dict[str, Any]
) -> Encoder | SDEncoder | WaveletEncoder:
    """Build the encoder of a `LiteVAE`: LiteVAE's own, SD-VAE's, or a fixed wavelet transform."""
    if size in SIZES:
        return Encoder(latent_channels, SIZES[size], wavelet, in_channels=in_channels, vit_grid=vit_grid, **variant)
    if size in SD_SIZES:
        return SDEncoder(latent_channels, SD_SIZES[size], in_channels=in_channels)
    return WaveletEncoder(size == "dwt-2", wavelet, in_channels)


class LiteVAE(AutoencoderBase):
    """LiteVAE (arXiv 2405.14477): a wavelet encoder and the SD-VAE decoder, with a downsampling factor of f = 8.

    The model can be passed to diffusers pipelines as `vae=`. It also offers the encoders that the paper compares
    LiteVAE with, and the variants of encoder and decoder that the paper ablates.

    Args:
        size: Encoder. "S", "B", "M" or "L" are LiteVAE's (Tables 23 and 24); "sd-vae" and "vae-small" are the baselines
            of Table 2b (the widths of "vae-small" are our choice); "dwt" (n_z = 12) and "dwt-2" (n_z = 48) are fixed
            wavelet transforms without parameters (Appendix B).
        latent_channels: Number of latent channels, n_z.
        wavelet: "haar", or the name of any discrete wavelet of ptwt.
        downsample: How the features of wavelet levels 1 and 2 are brought down to f = 8: "conv" or "pool".
        extractor: Feature extractor, "unet" or "nafnet" (Table 18).
        shared_extractor: Whether all levels share one extractor (Table 19).
        levels: Wavelet levels that the encoder sees (Table 21).
        aggregator: "unet" or "vit" (Table 20).
        vit_grid: Side of the latents that the ViT is trained for. For other sides its position embedding is
            interpolated.
        conv1x1: Whether to add a 1x1 convolution on the moments and one on the latent before the decoder, both
            initialised to the identity (Table 17).
        block_out_channels: Widths of the decoder, finest level first, as in diffusers.
        layers_per_block: Depth of each decoder level, as in diffusers.
        decoder_norm: Normalisation in the decoder's ResBlocks: "group" (SD-VAE), "smc" (self-modulated convolution,
            Eq. 3), "batch", "instance", "layer", "rms", or "none" (an SMC decoder after `bake`).
        output: What the decoder network predicts: the "image", or its "wavelet" bands (Appendix G). `decode` returns
            images in both cases.
        scaling_factor: Factor by which diffusers pipelines multiply the latents, after they subtract `shift_factor`.
            `litevae.latent_statistics.scaling` computes this field and the next three.
        shift_factor: What SD3 and Flux pipelines subtract from the latents.
        latents_mean: Mean of each channel of the latents; None if it was not measured.
        latents_std: Standard deviation of each channel of the latents; None if it was not measured.
        force_upcast: Whether SDXL pipelines run the model in fp32 when its weights are fp16.

    Attributes:
        use_slicing: Whether the images of a batch are processed one by one (`enable_slicing`).
        use_tiling: Whether images larger than a tile are processed in tiles (`enable_tiling`).
        tile_sample_min_size: Side of a tile in pixels, a multiple of 8.
        tile_latent_min_size: The same in latent elements; it follows `tile_sample_min_size`.
        tile_overlap_factor: The part of a tile that it shares with the next one, at least.
    """

    @register_to_config
    def __init__(
        self,
        size: str = "B",
        latent_channels: int = 4,
        wavelet: str = "haar",
        downsample: str = "conv",
        extractor: str = "unet",
        shared_extractor: bool = False,
        levels: Sequence[int] = (1, 2, 3),
        aggregator: str = "unet",
        vit_grid: int = 16,
        conv1x1: bool = False,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        decoder_norm: str = "group",
        output: str = "image",
        in_channels: int = 3,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool = False,
    ):
        super().__init__()
        # diffusers takes positional arguments for defaults, which `from_config(model.config)` then leaves out.
        self.register_to_config(_use_default_values=[])
        _check_config(self.config)
        variant = {name: self.config[name] for name in _VARIANT_DEFAULTS} | {"levels": tuple(levels)}
        self.encoder = _build_encoder(size, latent_channels, wavelet, in_channels, vit_grid, variant)
        self.decoder = Decoder(
            latent_channels,
            tuple(block_out_channels),
            layers_per_block,
            decoder_norm,  # type: ignore[arg-type]
            in_channels,
            wavelet if output == "wavelet" else None,
        )
        # These two layers have the names that diffusers gives them.
        self.quant_conv = _identity_conv(2 * latent_channels, ExactConv2d) if conv1x1 else torch.nn.Identity()
        self.post_quant_conv = _identity_conv(latent_channels) if conv1x1 else _NoConv(self.decoder)
        self.use_tiling = False
        self.tile_sample_min_size, self.tile_overlap_factor = 512, 0.25

    @property
    def deterministic(self) -> bool:
        """Whether the encoder returns a latent instead of a posterior. This is so for "dwt" and "dwt-2"."""
        return isinstance(self.encoder, WaveletEncoder)

    def latent_form(self) -> LatentForm:
        """Return what the latents look like, for the model's card."""
        return LatentForm(FACTOR, self.config.latent_channels, self.deterministic)

    @classmethod
    def from_preset(cls, size: str, latent_channels: int = 4, **config: Any) -> "LiteVAE":
        """Build a randomly initialised model with the paper's encoder of this size and the SD-VAE decoder."""
        return cls(size=size, latent_channels=latent_channels, **config)

    @property
    def tile_latent_min_size(self) -> int:
        """Side of a tile in latent elements."""
        return self.tile_sample_min_size // FACTOR

    def enable_tiling(self, tile_sample_min_size: int | None = None, tile_overlap_factor: float | None = None) -> None:
        """Encode and decode images larger than a tile in tiles, blended where they overlap.

        Memory then depends on the tile and not on the image. Each tile has its own statistics of group normalisation
        and its own attention, so the result differs a little from that of the whole image (docs/autoencoder.md).

        Args:
            tile_sample_min_size: Side of a tile in pixels, a multiple of 8; None leaves it as it is (512 at first).
            tile_overlap_factor: The part of a tile that it shares with the next one, at least 0 and below 1; None
                leaves it as it is (0.25 at first).

        Raises:
            UserError: if one of them is out of its range.
        """
        tile = self.tile_sample_min_size if tile_sample_min_size is None else tile_sample_min_size
        overlap = self.tile_overlap_factor if tile_overlap_factor is None else tile_overlap_factor
        if tile < FACTOR or tile % FACTOR:
            raise UserError(f"enable_tiling: tile_sample_min_size={tile} is not a positive multiple of {FACTOR}")
        if not 0 <= overlap < 1:
            raise UserError(f"enable_tiling: tile_overlap_factor={overlap} is not in [0, 1)")
        self.tile_sample_min_size, self.tile_overlap_factor, self.use_tiling = tile, overlap, True

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True, pad: bool = False) -> AutoencoderKLOutput | tuple[Posterior]:
        """Encode a batch of images into posteriors.

        Args:
            x: Images (N, C, H, W) in [-1, 1]. H and W must be multiples of 8 unless `pad`.
            return_dict: Whether to return an `AutoencoderKLOutput` instead of a tuple.
            pad: Whether to repeat the last row and column up to the next multiples of 8. `decode(z, size=(H, W))`
                crops the image to its size again.

        Returns:
            The diagonal Gaussian posterior over latents (N, n_z, H/8, W/8), in fp32 whatever computes the network (see
            `Posterior`). For `dwt` and `dwt-2` the posterior has zero variance: `sample()` equals `mode()`.

        Raises:
            UserError: if H or W is not a multiple of 8, and `pad` is false.
        """
        height, width = x.shape[-2:]
        if pad:
            x = pad_to_multiple(x, FACTOR)
        elif height % FACTOR or width % FACTOR:
            raise UserError(
                f"image size {height}x{width} is not a multiple of {FACTOR}; resize or crop it, or use "
                f"encode(x, pad=True) and decode(z, size=({height}, {width}))"
            )
        moments = self._sliced(lambda part: self._in_tiles(self._moments, part, FACTOR, 1), x)
        if self.deterministic:
            moments = torch.cat([moments, torch.full_like(moments, -30)], dim=1)  # diffusers' lowest log-variance
        return self._encoded(moments, return_dict)

    @apply_forward_hook
    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        size: tuple[int, int] | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode latents (N, n_z, h, w) into images (N, C, 8h, 8w).

        Args:
            z: The latents.
            return_dict: Whether to return a `DecoderOutput` instead of a tuple.
            generator: Not used. It is accepted because diffusers pipelines pass one.
            size: Height and width that the images are cropped to, for latents from `encode(x, pad=True)`.
        """
        sample = self._sliced(lambda part: self._in_tiles(self._image, part, 1, FACTOR), z)
        if size is not None:
            sample = sample[..., : size[0], : size[1]]
        return self._decoded(sample, return_dict)

    def bake(self) -> "LiteVAE":
        """Replace self-modulated convolutions by plain ones with equal output, in place, for inference and export."""
        if self.config.decoder_norm == "smc":
            bake(self.decoder)
            self.register_to_config(decoder_norm="none")
        return self

    def _moments(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def _image(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z.to(compute_dtype(self.decoder.conv_in))))

    def _in_tiles(self, compute: Callable[[Tensor], Tensor], x: Tensor, a: int, b: int) -> Tensor:
        """Compute a network in tiles if tiling is enabled and `x` is larger than one.

        A latent element is `a` elements of `x` and `b` of the result, on each axis.
        """
        tile = self.tile_latent_min_size
        if not self.use_tiling or max(x.shape[-2:]) <= a * tile:
            return compute(x)
        return tiled(compute, x, tile, min(int(tile * self.tile_overlap_factor), tile - 1), (a, b))


class _NoConv(torch.nn.Identity):
    """Stands for the convolution before the decoder in models that have none.

    SDXL pipelines take the dtype that the decoder wants from the first parameter of this layer; so `parameters` gives
    an empty one with the dtype and device of the decoder. It is in no state dict, and no optimizer sees it.
    """

    def __init__(self, decoder: Decoder):
        super().__init__()
        self._decoder = (decoder,)  # in a tuple, so that it is not a submodule

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        weight = self._decoder[0].conv_in.weight
        yield torch.nn.Parameter(
            torch.empty(0, dtype=compute_dtype(self._decoder[0].conv_in), device=weight.device), requires_grad=False
        )


def _identity_conv(channels: int, kind: type[torch.nn.Conv2d] = torch.nn.Conv2d) -> torch.nn.Conv2d:
    conv = kind(channels, channels, 1)
    torch.nn.init.dirac_(conv.weight)
    torch.nn.init.zeros_(conv.get_parameter("bias"))
    return conv


def count_parameters(module: torch.nn.Module) -> int:
    """Return the number of parameters of a module, trainable or not."""
    return sum(parameter.numel() for parameter in module.parameters())
