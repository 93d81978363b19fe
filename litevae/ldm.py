"""A latent diffusion model with everything that sampling needs, saved in a folder as a diffusers pipeline."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from safetensors import SafetensorError
from torch import Tensor

from litevae.any_autoencoder import fingerprint
from litevae.autoencoder_base import WrappingAutoencoder
from litevae.diffusion import Scheduler
from litevae.distilled import autoencoder_from, config_of
from litevae.dit import DiT
from litevae.errors import UserError
from litevae.latents import downsampling, latent_content
from litevae.model_card import LatentForm
from litevae.sampling import Seed, sample_latents

FORMAT = 2
NETWORK_CLASSES = {"UNet2DModel": UNet2DModel, "DiT": DiT}
SCHEDULERS = {"DDIMScheduler": DDIMScheduler, "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler}
# Whether the model has classes -> pipeline class of diffusers, and its names for the network and the autoencoder.
PIPELINES = {False: ("LDMPipeline", "unet", "vqvae"), True: ("DiTPipeline", "transformer", "vae")}


class NormalizedAutoencoder(WrappingAutoencoder):
    """An autoencoder of normalised latents, which have mean 0 and standard deviation 1 in each channel.

    Diffusion models learn latents that are normalised over the data set. diffusers pipelines know only one scaling
    factor for all channels. With this class as their autoencoder, that factor is 1. Slicing, tiling and gradient
    checkpointing are those of the autoencoder inside.

    Args:
        autoencoder_config: Config of a LiteVAE or of a diffusers autoencoder, including `_class_name`.
        latents_mean: Mean of each channel of the raw latents.
        latents_std: Standard deviation of each channel of the raw latents.
        scaling_factor: Factor by which diffusers pipelines divide the latents before decoding.

    Raises:
        UserError: if the class in the config is not an autoencoder.
    """

    _inside: ClassVar[str] = "autoencoder"

    @register_to_config
    def __init__(
        self,
        autoencoder_config: dict[str, Any],
        latents_mean: Sequence[float],
        latents_std: Sequence[float],
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        self.register_to_config(_use_default_values=[])  # see LiteVAE
        self.autoencoder = autoencoder_from(autoencoder_config)

    @classmethod
    def of(cls, autoencoder: ModelMixin, mean: Tensor, std: Tensor) -> "NormalizedAutoencoder":
        """Wrap an existing autoencoder.

        Args:
            autoencoder: The autoencoder. It is used as it is, not copied.
            mean: Mean of each channel of its raw latents.
            std: Standard deviation of each channel of its raw latents.
        """
        with torch.device("meta"):
            model = cls(config_of(autoencoder), mean.tolist(), std.tolist())
        model.autoencoder = autoencoder
        return model.eval()

    @property
    def mean(self) -> Tensor:
        """The mean of the raw latents, (1, C, 1, 1)."""
        return torch.tensor(self.config.latents_mean).view(1, -1, 1, 1)

    @property
    def std(self) -> Tensor:
        """The standard deviation of the raw latents, (1, C, 1, 1)."""
        return torch.tensor(self.config.latents_std).view(1, -1, 1, 1)

    def latent_form(self) -> LatentForm:
        """Return what the latents look like, for the model's card."""
        inner = self.autoencoder
        return LatentForm(downsampling(inner), len(self.config.latents_mean), latent_content(inner) == "mean")

    @property
    def deterministic(self) -> bool:
        """Whether the posterior has zero variance, because the autoencoder inside gives one latent."""
        return latent_content(self.autoencoder) == "mean"

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True, **options: Any) -> AutoencoderKLOutput | tuple[Any]:
        """Encode images (N, 3, H, W) in [-1, 1] into the posterior over normalised latents.

        `options` go to the autoencoder inside, e.g. `pad=True` of LiteVAE. An autoencoder that gives one latent instead
        of a posterior has a posterior of zero variance here.
        """

        def moments(part: Tensor) -> Tensor:
            raw = self.autoencoder.encode(part, return_dict=False, **options)[0]
            mean, logvar = (raw, torch.full_like(raw, -30)) if isinstance(raw, Tensor) else (raw.mean, raw.logvar)
            mean = (mean - self.mean.to(mean)) / self.std.to(mean)
            return torch.cat([mean, logvar - 2 * self.std.to(logvar).log()], dim=1)

        return self._encoded(self._sliced(moments, x), return_dict)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None, **options: Any
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode normalised latents (N, C, h, w) into images (N, 3, f h, f w).

        `generator` is not used. It is accepted because diffusers pipelines may pass one. `options` go to the
        autoencoder inside, e.g. `size` of LiteVAE.
        """

        def image(part: Tensor) -> Tensor:
            return self.autoencoder.decode(part * self.std.to(z) + self.mean.to(z), return_dict=False, **options)[0]

        return self._decoded(self._sliced(image, z), return_dict)


@dataclass
class LDM:
    """A latent diffusion model with everything that sampling needs.

    Attributes:
        network: The denoising network.
        scheduler: The noise levels of the objective that the network was trained with.
        vae: The autoencoder of the latents.
        classes: Number of classes; 0 for an unconditional model.
        info: Where the model comes from: digest of the data, config of the run and so on.
    """

    network: UNet2DModel | DiT
    scheduler: Scheduler
    vae: NormalizedAutoencoder
    classes: int = 0
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (C, h, w) of one latent."""
        config = self.network.config
        return config.in_channels, config.sample_size, config.sample_size

    def to(self, device: torch.device | str) -> "LDM":
        """Move the network and the autoencoder to a device, in place."""
        self.network.to(device)
        self.vae.to(device)
        return self

    def sample(self, seeds: Sequence[Seed], **options: Any) -> Tensor:
        """Sample images (N, 3, f h, f w) in [-1, 1], one per seed. `options` are those of `sample_latents`."""
        return self.decode(
            sample_latents(self.network, self.scheduler, self.shape, seeds, classes=self.classes, **options)
        )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents (N, C, h, w) into images (N, 3, f h, f w), clipped to [-1, 1]."""
        return self.vae.decode(latents, return_dict=False)[0].float().clamp(-1, 1)


def save_ldm(folder: str | Path, ldm: LDM) -> None:
    """Save a model as the folder of a diffusers pipeline: `LDMPipeline`, or `DiTPipeline` if it has classes.

    The folder has `model_index.json`, a folder for each part, and `ldm.json`, which is written last and marks a
    complete model. A process must import litevae before it loads the folder with `DiffusionPipeline.from_pretrained`.

    DiTPipeline always uses class 1000 as "no class" for guidance, so guidance there needs a model with at most 1000
    classes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / "ldm.json"
    marker.unlink(missing_ok=True)
    pipeline, network, vae = PIPELINES[ldm.classes > 0]
    parts = {network: ldm.network, "scheduler": ldm.scheduler, vae: ldm.vae}
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    text = {"format": FORMAT, "classes": ldm.classes, "vae": fingerprint(folder / vae), "info": ldm.info}
    unfinished = marker.with_suffix(".json.tmp")
    unfinished.write_text(json.dumps(text, indent=2) + "\n")
    os.replace(unfinished, marker)


def load_ldm(folder: str | Path) -> LDM:
    """Load a model that `save_ldm` wrote, in eval mode, on the CPU.

    Raises:
        UserError: if the folder does not exist, is incomplete or damaged, has another format, or its autoencoder was
            changed.
    """
    folder = Path(folder)
    marker = folder / "ldm.json"
    if not marker.is_file():
        raise UserError(f"{folder} holds no latent diffusion model: it has no ldm.json (train_ldm writes it last)")
    try:
        about = json.loads(marker.read_text())
        if (version := about["format"]) != FORMAT:
            raise UserError(f"{marker} has format {version}; this version of litevae reads {FORMAT}")
        classes, print_of_vae, info = int(about["classes"]), about["vae"], about["info"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{marker} is damaged ({error!r}); export the model again") from None
    _, network, vae = PIPELINES[classes > 0]
    if fingerprint(folder / vae) != print_of_vae:
        raise UserError(f"{folder}/{vae} is not the autoencoder that this model was saved with")
    scheduler_config = folder / "scheduler" / "scheduler_config.json"
    scheduler = _class(scheduler_config, SCHEDULERS).from_pretrained(folder / "scheduler", local_files_only=True)
    return LDM(
        _load(_class(folder / network / "config.json", NETWORK_CLASSES), folder / network),
        scheduler,
        _load(NormalizedAutoencoder, folder / vae),
        classes,
        info,
    )


def ldm_fingerprint(folder: str | Path) -> str:
    """Return the sha256 over everything that samples depend on.

    These are the network, the noise levels, the autoencoder with its normalisation, and the number of classes.

    Raises:
        UserError: if the folder is incomplete or damaged.
    """
    folder = Path(folder)
    try:
        classes = int(json.loads((folder / "ldm.json").read_text())["classes"])
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is incomplete or damaged: {error!r}") from None
    levels = {key: value for key, value in scheduler.items() if key == "_class_name" or key[0] != "_"}
    parts = [classes, levels, *(fingerprint(folder / part) for part in PIPELINES[classes > 0][1:])]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _class(config: Path, known: dict[str, Any]) -> Any:
    """Return the class that a config file names, which must be one of `known`."""
    try:
        name = json.loads(config.read_text())["_class_name"]
        return known[name]
    except OSError as error:
        raise UserError(f"{config.parent.parent} is incomplete or damaged: {error}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{config} is not of a {' or a '.join(known)}") from None


def _load(family: Any, folder: Path) -> Any:
    """Load a model of a class from its folder, in eval mode and fp32."""
    try:
        model, report = family.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, torch_dtype=torch.float32
        )
    except UserError:
        raise
    except (OSError, RuntimeError, TypeError, ValueError, LookupError, AttributeError, SafetensorError) as error:
        raise UserError(f"{folder} is incomplete or damaged: {error}") from error
    if wrong := [key for keys in report.values() for key in keys]:  # otherwise diffusers leaves them random
        raise UserError(f"{folder}: the weights do not fit config.json, e.g. {wrong[0]} ({len(wrong)} tensors)")
    return model.eval()
