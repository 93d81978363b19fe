"""The LiteVAE autoencoder as a diffusers model; folders of it and of any other autoencoder; what an encoder gives."""

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
from litevae.wavelet import LEVELS, check_wavelet

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"  # of weights in several files


ENCODERS = (*SIZES, *SD_SIZES, "dwt", "dwt-2")
_USUAL: dict[str, Any] = {
    "shared_extractor": False,
    "levels": (1, 2, 3),
    "downsample": "conv",
    "extractor": "unet",
    "aggregator": "unet",
}


def _check_config(config: Mapping[str, Any]) -> None:
    """Refuse values of `LiteVAE` that it does not know, or that do not go together.

    Raises:
        UserError: the message names the first.
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
        raise UserError(f"LiteVAE: levels={levels} are not some of 1, 2, 3, each once and in this order")
    if len(widths) != 4:
        raise UserError(f"LiteVAE: block_out_channels has {len(widths)} widths; f = 8 takes exactly 4")
    check_wavelet(config["wavelet"])
    variant = {name: config[name] for name in _USUAL} | {"levels": tuple(levels)}
    if size not in SIZES and (other := [name for name, value in variant.items() if value != _USUAL[name]]):
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
        raise UserError(f"LiteVAE: conv1x1 is for encoders that learn, and size={size!r} does not; leave it out")


def _build_encoder(
    size: str, latent_channels: int, wavelet: str, in_channels: int, vit_grid: int, variant: dict[str, Any]
) -> Encoder | SDEncoder | WaveletEncoder:
    """The encoder of a `LiteVAE`: its own, SD-VAE's, or wavelet bands as they are."""
    if size in SIZES:
        return Encoder(latent_channels, SIZES[size], wavelet, in_channels=in_channels, vit_grid=vit_grid, **variant)
    if size in SD_SIZES:
        return SDEncoder(latent_channels, SD_SIZES[size], in_channels=in_channels)
    return WaveletEncoder(size == "dwt-2", wavelet, in_channels)


class LiteVAE(ModelMixin, AutoencoderMixin, ConfigMixin):
    """LiteVAE (arXiv 2405.14477): wavelet encoder and SD-VAE decoder, f = 8. Drops into diffusers pipelines as `vae=`.
    With the encoders that the paper compares it with, and the variants of both halves that it ablates.

    Args:
        size: encoder "S", "B", "M" or "L" (Tables 23 and 24), or one of another kind: "sd-vae", "vae-small" (Table 2b;
            its widths are ours), or wavelet bands as they are, "dwt" (n_z = 12) and "dwt-2" (n_z = 48) (Appendix B).
        latent_channels: n_z.
        wavelet: "haar", or any discrete wavelet of ptwt.
        downsample: how levels 1 and 2 come to f = 8, "conv" or "pool".
        extractor: "unet", or "nafnet" (Table 18).
        shared_extractor: one extractor for all levels (Table 19).
        levels: the wavelet levels that the encoder sees (Table 21).
        aggregator: "unet", or "vit" (Table 20).
        vit_grid: the side of the latents that the ViT is trained for; at others its positions are interpolated.
        conv1x1: a 1x1 convolution on the moments and one on the latent before the decoder, identities at the start
            (Table 17).
        block_out_channels, layers_per_block: the decoder's widths, finest first, and depth, as in diffusers.
        decoder_norm: of the decoder's ResBlocks: "group" (SD-VAE), "smc" (Eq. 3), "batch", "instance", "layer", "rms",
            or "none" (an SMC decoder after `bake`).
        output: what the decoder's network gives, the "image", or its "wavelet" bands (Appendix G). `decode` gives
            images either way.
        scaling_factor: for diffusers pipelines, which multiply latents by it.
    """

    _supports_gradient_checkpointing = True  # of ResBlocks

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
        variant = {name: self.config[name] for name in _USUAL} | {"levels": tuple(levels)}
        self.encoder = _build_encoder(size, latent_channels, wavelet, in_channels, vit_grid, variant)
        self.decoder = Decoder(
            latent_channels,
            tuple(block_out_channels),
            layers_per_block,
            decoder_norm,  # type: ignore[arg-type]
            in_channels,
            wavelet if output == "wavelet" else None,
        )
        # diffusers' names
        self.quant_conv = _identity_conv(2 * latent_channels) if conv1x1 else torch.nn.Identity()
        self.post_quant_conv = _identity_conv(latent_channels) if conv1x1 else torch.nn.Identity()
        self.use_slicing = False

    @property
    def deterministic(self) -> bool:
        """Whether the encoder gives a latent instead of a posterior: that of "dwt" and "dwt-2" does."""
        return isinstance(self.encoder, WaveletEncoder)

    @classmethod
    def from_preset(cls, size: str, latent_channels: int = 4, **config: Any) -> "LiteVAE":
        """A randomly initialised model with the paper's encoder of this size and SD-VAE's decoder."""
        return cls(size=size, latent_channels=latent_channels, **config)

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Image (N, C, H, W) in [-1, 1], H and W multiples of 8 -> posterior over (N, n_z, H/8, W/8).

        For `dwt` and `dwt-2` the posterior has zero variance: `sample()` equals `mode()`.
        """
        moments = torch.cat([self.quant_conv(self.encoder(part)) for part in self._slices(x)])
        if self.deterministic:
            moments = torch.cat([moments, torch.full_like(moments, -30)], dim=1)  # the least log-variance of diffusers
        posterior = DiagonalGaussianDistribution(moments, deterministic=self.deterministic)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latent (N, n_z, h, w) -> image (N, C, 8h, 8w). `generator` is unused; diffusers pipelines pass one."""
        sample = torch.cat([self.decoder(self.post_quant_conv(part)) for part in self._slices(z)])
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self, x: Tensor, sample_posterior: bool = True, generator: torch.Generator | None = None
    ) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Reconstruction and posterior in one call, as a training step needs it (DDP sees only `forward`).

        Args:
            x: image in [-1, 1].
            sample_posterior: False decodes the mean.
            generator: of the posterior's draw.
        """
        posterior = self.encode(x).latent_dist  # type: ignore[union-attr]
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z).sample, posterior  # type: ignore[union-attr]

    def bake(self) -> "LiteVAE":
        """Turns self-modulated convolutions into plain ones of equal output, in place, for inference and export."""
        if self.config.decoder_norm == "smc":
            bake(self.decoder)
            self.register_to_config(decoder_norm="none")
        return self

    def _slices(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(1) if self.use_slicing else (x,)


def _identity_conv(channels: int) -> torch.nn.Conv2d:
    conv = torch.nn.Conv2d(channels, channels, 1)
    torch.nn.init.dirac_(conv.weight)
    torch.nn.init.zeros_(conv.get_parameter("bias"))
    return conv


def load_autoencoder(folder: str | Path) -> ModelMixin:
    """The autoencoder in a model folder, in eval mode, fp32: a LiteVAE, or any of diffusers' autoencoders of images.

    Raises:
        UserError: no such folder, not a model folder, weights as pickles only, a class that is no autoencoder of
            images, or weights that do not fit its config.
    """
    name = str(model_config(folder).get("_class_name", "model without a class name"))
    family = autoencoder_class(name)
    if family is None:
        raise UserError(
            f"{folder} holds a {name}, not a LiteVAE or an autoencoder of diffusers {diffusers.__version__}"
        )
    _weights(Path(folder))
    try:
        # strict: a missing or renamed tensor must not become a random one
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
    """LiteVAE, or the autoencoder of diffusers of this name, if it is one."""
    if name == "LiteVAE":
        return LiteVAE
    known = name.startswith(("Autoencoder", "AsymmetricAutoencoder", "VQModel"))
    return getattr(diffusers, name, None) if known else None


def encode_latents(model: ModelMixin, x: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1] -> what the encoder gives, raw: neither scaled nor shifted, as `decode` takes it.

    The posterior's moments (N, 2 n_z, h, w), mean then log-variance, or of a deterministic encoder the latents
    (N, n_z, h, w): see `latent_content`.

    Raises:
        UserError: H or W is not a multiple of the model's `downsampling`; many encoders would round it away.
    """
    factor, (height, width) = downsampling(model), x.shape[-2:]
    if height % factor or width % factor:
        raise UserError(
            f"{type(model).__name__} takes images with sides that are multiples of {factor} pixels, not "
            f"{width}x{height}; choose another resolution"
        )
    return _encode(model, x)


def latent_content(model: ModelMixin) -> Literal["moments", "mean"]:
    """What `encode_latents` gives: a posterior's "moments", or one latent, the "mean"."""
    if isinstance(model, LiteVAE):
        return "mean" if model.deterministic else "moments"
    return "moments" if "KL" in type(model).__name__ else "mean"


_MEASURED: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()


def downsampling(model: ModelMixin) -> int:
    """f: the pixels that the side of a latent's element stands for. Images' sides are multiples of it."""
    ratio = getattr(model, "spatial_compression_ratio", None) or model.config.get("spatial_compression_ratio")
    widths = model.config.get("encoder_block_out_channels") or model.config.get("block_out_channels")
    if ratio or widths:
        return ratio or 2 ** (len(widths) - 1)
    if model not in _MEASURED:  # nothing in its config tells
        weight = next(model.parameters())
        with torch.inference_mode():
            _MEASURED[model] = 256 // _encode(model, weight.new_zeros(1, 3, 256, 256)).shape[-1]
    return _MEASURED[model]


def _encode(model: ModelMixin, x: Tensor) -> Tensor:
    encoded = model.encode(x, return_dict=False)[0]
    if isinstance(model, LiteVAE) and model.deterministic:
        return encoded.mode()
    return getattr(encoded, "parameters", encoded)


def model_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        UserError: it is not a model folder, or has no safetensors.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist")
    if (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is a whole diffusers pipeline; give its autoencoder: {folder / 'vae'}")
    there = {path.name for path in folder.iterdir()}
    weights = not there.isdisjoint((WEIGHTS, INDEX))
    if missing := [name for name in ("config.json", *[WEIGHTS] * (not weights)) if name not in there]:
        hint = ""
        if pickles := sorted(name for name in there if name.endswith((".bin", ".ckpt", ".pt", ".pth"))):
            hint = f"; {pickles[0]} is a pickle, which can run any code and is never loaded: convert it to safetensors"
        elif others := sorted(name for name in there if name.endswith(".safetensors")):
            hint = f"; rename {others[0]} if it holds the weights"
        raise UserError(f"{folder} is not a model folder: it has no {' and no '.join(missing)}{hint}")
    return _json(folder / "config.json")


def fingerprint(folder: str | Path) -> str:
    """sha256 over a model folder's config (without diffusers' own bookkeeping) and weights, all files of them.

    Raises:
        UserError: it is not a model folder.
    """
    config = {key: value for key, value in model_config(folder).items() if key == "_class_name" or key[0] != "_"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in _weights(Path(folder)):
        with open(Path(folder) / name, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _weights(folder: Path) -> list[str]:
    """Names of the files that hold the weights. An index goes before a single file, as in diffusers."""
    if not (folder / INDEX).is_file():
        return [WEIGHTS]
    files = _json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{folder}/{INDEX} names no files of weights")
    names = sorted(set(map(str, files.values())))
    for name in names:
        # Of any other name, diffusers would load pickles, and files elsewhere.
        if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
            raise UserError(f"{folder}/{INDEX} names {name}, which is no safetensors file of this folder")
    return names


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not valid JSON of a model: not an object")
    return value


def count_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
