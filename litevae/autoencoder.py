"""The LiteVAE autoencoder as a diffusers model, and what a model folder is."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from torch import Tensor

from litevae.decoder import Decoder
from litevae.encoder import SIZES, Encoder
from litevae.errors import UserError
from litevae.layers import bake

WEIGHTS = "diffusion_pytorch_model.safetensors"


class LiteVAE(ModelMixin, AutoencoderMixin, ConfigMixin):
    """LiteVAE (arXiv 2405.14477): wavelet encoder and SD-VAE decoder, f = 8. Drops into diffusers pipelines as `vae=`.

    Args:
        size: encoder "S", "B", "M" or "L" (Tables 23 and 24).
        latent_channels: n_z.
        wavelet: "haar", or any discrete wavelet of ptwt.
        downsample: how levels 1 and 2 come to f = 8, "conv" or "pool".
        block_out_channels, layers_per_block: the decoder's widths, finest first, and depth, as in diffusers.
        decoder_norm: "group" (SD-VAE), "smc" (Eq. 3), or "none" (an SMC decoder after `bake`).
        scaling_factor: for diffusers pipelines, which multiply latents by it.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        size: str = "B",
        latent_channels: int = 4,
        wavelet: str = "haar",
        downsample: str = "conv",
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        decoder_norm: str = "group",
        in_channels: int = 3,
        scaling_factor: float = 1.0,
        force_upcast: bool = False,
    ):
        super().__init__()
        for name, value, known in (
            ("size", size, tuple(SIZES)),
            ("downsample", downsample, ("conv", "pool")),
            ("decoder_norm", decoder_norm, ("group", "smc", "none")),
        ):
            if value not in known:
                raise UserError(f"LiteVAE: {name}={value!r} is not one of {', '.join(known)}")
        if len(block_out_channels) != 4:
            raise UserError(f"LiteVAE: block_out_channels has {len(block_out_channels)} widths; f = 8 takes exactly 4")
        self.encoder = Encoder(latent_channels, SIZES[size], wavelet, downsample, in_channels)  # type: ignore[arg-type]
        self.decoder = Decoder(
            latent_channels,
            tuple(block_out_channels),
            layers_per_block,
            decoder_norm,  # type: ignore[arg-type]
            in_channels,
        )
        self.use_slicing = False

    @classmethod
    def from_preset(cls, size: str, latent_channels: int = 4, **config: Any) -> "LiteVAE":
        """A randomly initialised model with the paper's encoder of this size and SD-VAE's decoder."""
        return cls(size=size, latent_channels=latent_channels, **config)

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Image (N, C, H, W) in [-1, 1], H and W multiples of 8 -> posterior over (N, n_z, H/8, W/8)."""
        moments = torch.cat([self.encoder(part) for part in self._slices(x)])
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latent (N, n_z, h, w) -> image (N, C, 8h, 8w). `generator` is unused; diffusers pipelines pass one."""
        sample = torch.cat([self.decoder(part) for part in self._slices(z)])
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


def load_autoencoder(folder: str | Path) -> LiteVAE:
    """The LiteVAE in a model folder, in eval mode, fp32.

    Raises:
        UserError: no such folder, not a model folder, another class, or weights that do not fit its config.
    """
    config = model_config(folder)
    if config.get("_class_name") != "LiteVAE":
        raise UserError(f"{folder} holds a {config.get('_class_name', 'model without a class name')}, not a LiteVAE")
    try:
        # strict: a missing or renamed tensor must not become a random one
        model, report = LiteVAE.from_pretrained(folder, output_loading_info=True, use_safetensors=True)
    except UserError:
        raise
    except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is damaged, its model can't be loaded: {error}") from error
    if wrong := [key for keys in report.values() for key in keys]:
        raise UserError(f"{folder}: the weights do not fit config.json; e.g. {wrong[0]} ({len(wrong)} tensors)")
    return model.eval()


def model_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        UserError: it is not a model folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist")
    missing = [name for name in ("config.json", WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} is not a model folder: it has no {' and no '.join(missing)}")
    try:
        return json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{folder}/config.json is not valid JSON: {error}") from None


def fingerprint(folder: str | Path) -> str:
    """sha256 over a model folder's config (without diffusers' own bookkeeping) and weights."""
    config = {key: value for key, value in model_config(folder).items() if key == "_class_name" or key[0] != "_"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    with open(Path(folder) / WEIGHTS, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def count_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
