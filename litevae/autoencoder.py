"""The LiteVAE autoencoder as a diffusers model, and functions to load and use any image autoencoder of diffusers."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from torch import Tensor

from litevae.baselines import SD_SIZES, SDEncoder, WaveletEncoder
from litevae.decoder import Decoder
from litevae.encoder import AGGREGATORS, EXTRACTORS, SIZES, Encoder
from litevae.errors import UserError
from litevae.layers import NORMS, bake
from litevae.model_folder import INDEX, WEIGHTS, model_config, read_json
from litevae.wavelet import LEVELS, check_wavelet

ENCODERS = (*SIZES, *SD_SIZES, "dwt", "dwt-2")
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


class LiteVAE(ModelMixin, AutoencoderMixin, ConfigMixin):
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
        scaling_factor: Factor by which diffusers pipelines multiply the latents.
    """

    _supports_gradient_checkpointing = True  # the ResBlocks are checkpointed

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
        force_upcast: bool = False,
    ):
        super().__init__()
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
        self.quant_conv = _identity_conv(2 * latent_channels) if conv1x1 else torch.nn.Identity()
        self.post_quant_conv = _identity_conv(latent_channels) if conv1x1 else torch.nn.Identity()
        self.use_slicing = False

    @property
    def deterministic(self) -> bool:
        """Whether the encoder returns a latent instead of a posterior. This is so for "dwt" and "dwt-2"."""
        return isinstance(self.encoder, WaveletEncoder)

    @classmethod
    def from_preset(cls, size: str, latent_channels: int = 4, **config: Any) -> "LiteVAE":
        """Build a randomly initialised model with the paper's encoder of this size and the SD-VAE decoder."""
        return cls(size=size, latent_channels=latent_channels, **config)

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encode a batch of images into posteriors.

        Args:
            x: Images (N, C, H, W) in [-1, 1]. H and W must be multiples of 8.
            return_dict: Whether to return an `AutoencoderKLOutput` instead of a tuple.

        Returns:
            The diagonal Gaussian posterior over latents (N, n_z, H/8, W/8). For `dwt` and `dwt-2` the posterior has
            zero variance: `sample()` equals `mode()`.
        """
        moments = torch.cat([self.quant_conv(self.encoder(part)) for part in self._slices(x)])
        if self.deterministic:
            moments = torch.cat([moments, torch.full_like(moments, -30)], dim=1)  # diffusers' lowest log-variance
        posterior = DiagonalGaussianDistribution(moments, deterministic=self.deterministic)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode latents (N, n_z, h, w) into images (N, C, 8h, 8w).

        `generator` is not used. It is accepted because diffusers pipelines pass one.
        """
        sample = torch.cat([self.decoder(self.post_quant_conv(part)) for part in self._slices(z)])
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self, x: Tensor, sample_posterior: bool = True, generator: torch.Generator | None = None
    ) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Encode and decode images in one call. A training step needs this because DDP hooks only into `forward`.

        Args:
            x: Images (N, C, H, W) in [-1, 1].
            sample_posterior: Whether to decode a sample of the posterior; False decodes its mean.
            generator: Random generator for the sample.

        Returns:
            The reconstruction (N, C, H, W) and the posterior.
        """
        posterior = self.encode(x).latent_dist  # type: ignore[union-attr]
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z).sample, posterior  # type: ignore[union-attr]

    def bake(self) -> "LiteVAE":
        """Replace self-modulated convolutions by plain ones with equal output, in place, for inference and export."""
        if self.config.decoder_norm == "smc":
            bake(self.decoder)
            self.register_to_config(decoder_norm="none")
        return self

    def _slices(self, x: Tensor) -> tuple[Tensor, ...]:
        """Split a batch into single images if slicing is enabled (`enable_slicing` of diffusers)."""
        return x.split(1) if self.use_slicing else (x,)


def _identity_conv(channels: int) -> torch.nn.Conv2d:
    conv = torch.nn.Conv2d(channels, channels, 1)
    torch.nn.init.dirac_(conv.weight)
    torch.nn.init.zeros_(conv.get_parameter("bias"))
    return conv


def load_autoencoder(folder: str | Path) -> ModelMixin:
    """Load the autoencoder in a model folder, in eval mode and fp32.

    The model can be a LiteVAE or any image autoencoder of diffusers.

    Raises:
        UserError: if the folder does not exist or is not a model folder, if it holds its weights only as
            pickles, if its class is not an image autoencoder, or if its weights do not fit its config.
    """
    name = str(model_config(folder).get("_class_name", "model without a class name"))
    family = autoencoder_class(name)
    if family is None:
        raise UserError(
            f"{folder} holds a {name}, not a LiteVAE or an autoencoder of diffusers {diffusers.__version__}"
        )
    _weights(Path(folder))
    try:
        # The loading report is checked below, so that a missing or renamed tensor does not stay randomly initialised.
        model, report = family.from_pretrained(
            folder, output_loading_info=True, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32
        )
    except UserError:
        raise
    except (OSError, RuntimeError, TypeError, ValueError, LookupError, AttributeError, SafetensorError) as error:
        raise UserError(f"{folder} is damaged, its model can't be loaded: {error}") from error
    except (ImportError, NameError) as error:
        raise UserError(f"{folder} holds a {name} that needs a package which is not installed: {error}") from error
    if wrong := [key for keys in report.values() for key in keys]:
        raise UserError(f"{folder}: the weights do not fit config.json; e.g. {wrong[0]} ({len(wrong)} tensors)")
    other = any(isinstance(layer, torch.nn.Conv1d | torch.nn.Conv3d) for layer in model.modules())
    if other or (family is not LiteVAE and model.config.get("in_channels", 3) != 3):
        raise UserError(f"{folder} holds a {name}, which encodes video, sound or layers, not RGB images")
    return model.eval()


def autoencoder_class(name: str) -> type[ModelMixin] | None:
    """Return the class with this name, LiteVAE or an autoencoder of diffusers; None if there is no such class."""
    if name == "LiteVAE":
        return LiteVAE
    known = name.startswith(("Autoencoder", "AsymmetricAutoencoder", "VQModel"))
    return getattr(diffusers, name, None) if known else None


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
    if isinstance(model, LiteVAE):
        return "mean" if model.deterministic else "moments"
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


def fingerprint(folder: str | Path) -> str:
    """Return the sha256 over a model folder's config (without diffusers' own bookkeeping) and all its weight files.

    Raises:
        UserError: if the folder is not a model folder.
    """
    config = {key: value for key, value in model_config(folder).items() if key == "_class_name" or key[0] != "_"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in _weights(Path(folder)):
        with open(Path(folder) / name, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _weights(folder: Path) -> list[str]:
    """Return the names of the weight files. As in diffusers, an index counts before a single file.

    Raises:
        UserError: if the index names no files, or one that is not a safetensors file of this folder.
    """
    if not (folder / INDEX).is_file():
        return [WEIGHTS]
    files = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{folder}/{INDEX} names no files of weights")
    names = sorted(set(map(str, files.values())))
    for name in names:
        # Without this check diffusers would also load pickles, and files outside the folder.
        if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
            raise UserError(f"{folder}/{INDEX} names {name}, which is not a safetensors file of this folder")
    return names


def count_parameters(module: torch.nn.Module) -> int:
    """Return the number of parameters of a module, trainable or not."""
    return sum(parameter.numel() for parameter in module.parameters())
