"""Latent diffusion: UNets, noise schedule, objective, averaged weights, sampler, and the folder they are kept in.

The UNet sees *normalised* latents: per channel zero mean and unit variance over the whole cache.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from torch import Tensor, nn

from litevae.autoencoder import fingerprint, load_autoencoder
from litevae.errors import UserError

# --- the network ----------------------------------------------------------------------------------------------

# Width per level and ResBlocks a level. Attention follows every ResBlock, with heads 32 wide.
UNETS: dict[str, tuple[tuple[int, ...], int]] = {
    "ldm-8": ((256, 512, 1024), 2),  # Rombach et al. 2022, Table 14, LDM-8 (CelebA-HQ): 257,733,124 at n_z = 4
    "small": ((64, 128, 256), 2),  # the same at a quarter of the width: 16.1 M
    "tiny": ((64, 96), 1),  # 1.9 M: minutes on a CPU, latents of 8x8 and a little more
}


def build_unet(preset: str, latent_channels: int, size: int) -> UNet2DModel:
    """A UNet for latents (N, latent_channels, size, size); predicts the noise.

    Initialised as Rombach's: what a ResBlock, an attention block and the output convolution add starts at zero.

    Raises:
        UserError: an unknown preset, or a size that can't be halved once per level.
    """
    if preset not in UNETS:
        raise UserError(f"unet={preset}: no such preset; there are {', '.join(UNETS)}")
    channels, layers = UNETS[preset]
    factor = 2 ** (len(channels) - 1)
    if size < factor or size % factor:
        raise UserError(
            f"unet={preset} halves latents {len(channels) - 1} times, so their size must be a multiple of {factor}, "
            f"and it is {size}; encode at a resolution that is a multiple of {8 * factor} px, or take another preset"
        )
    unet = UNet2DModel(
        sample_size=size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=channels,
        layers_per_block=layers,
        down_block_types=("AttnDownBlock2D",) * len(channels),
        up_block_types=("AttnUpBlock2D",) * len(channels),
        attention_head_dim=32,
    )
    for name, module in unet.named_modules():
        if name == "conv_out" or name.endswith((".conv2", ".to_out.0")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return unet


# --- training -------------------------------------------------------------------------------------------------


def noise_schedule() -> DDIMScheduler:
    """Rombach's schedule: 1000 steps, betas 0.0015 to 0.0195 linear in the square root, epsilon objective.

    `add_noise` serves training. Sampling starts at the noisiest step and ends without noise ("trailing" spacing,
    arXiv 2305.08891); Rombach's sampler starts up to 1000/steps below it.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="trailing",
        clip_sample=False,  # latents have no bound
        set_alpha_to_one=True,
    )


def training_loss(unet: nn.Module, scheduler: DDIMScheduler, latents: Tensor, generator: torch.Generator) -> Tensor:
    """Mean squared error of the predicted noise, one value per image: (N,), fp32.

    Args:
        latents: (N, C, h, w), normalised.
        generator: gives timesteps and noise, on its own device: a CPU generator gives the same ones everywhere.
    """
    steps = scheduler.config.num_train_timesteps
    timesteps = torch.randint(steps, (len(latents),), generator=generator, device=generator.device)
    noise = torch.randn(latents.shape, generator=generator, device=generator.device)
    timesteps, noise = timesteps.to(latents.device), noise.to(latents.device)
    predicted = unet(scheduler.add_noise(latents, noise, timesteps), timesteps).sample
    return F.mse_loss(predicted.float(), noise, reduction="none").mean(dim=(1, 2, 3))


class EMA:
    """Exponential moving average of a module's parameters.

    The n-th update (from 0) keeps min(decay, (1 + n) / (10 + n)) of the average, so that a young average is not
    held back by the random start.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Call once after each optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.average.values()), self._parameters(model), 1 - decay)
        self.updates += 1

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """The averaged weights in `model`; its own come back on leaving, also by an exception."""
        parameters = self._parameters(model)
        own = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            torch._foreach_copy_(parameters, list(self.average.values()))
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, own)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": dict(self.average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["average"].keys() != self.average.keys():
            raise UserError("the averaged weights are those of another model")
        for name, value in state["average"].items():
            self.average[name].copy_(value)
        self.updates = state["updates"]

    def _parameters(self, model: nn.Module) -> list[Tensor]:
        parameters = dict(model.named_parameters())
        return [parameters[name] for name in self.average]


# --- sampling -------------------------------------------------------------------------------------------------

Seed = int | Sequence[int]


@torch.no_grad()
def sample_latents(
    unet: nn.Module,
    scheduler: DDIMScheduler,
    shape: tuple[int, int, int],
    seeds: Sequence[Seed],
    steps: int = 50,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (arXiv 2010.02502): normalised latents (len(seeds), *shape), on the UNet's device.

    All noise of image i comes from numpy.random.default_rng(seeds[i]) - a seed is a number or several, such as
    (seed of the job, number of the image) - so that its batch does not matter.

    Raises:
        UserError: see `check_steps`.
    """
    check_steps(scheduler, steps)
    device = next(unet.parameters()).device
    generators = [np.random.default_rng(seed) for seed in seeds]

    def noise() -> Tensor:
        return torch.from_numpy(np.stack([g.standard_normal(shape, np.float32) for g in generators])).to(device)

    scheduler = DDIMScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(steps)
    x = noise()
    for t in scheduler.timesteps:
        predicted = unet(x, t).sample.float()
        x = scheduler.step(predicted, t, x, eta=eta, variance_noise=noise() if eta else None).prev_sample
    return x


def check_steps(scheduler: DDIMScheduler, steps: int) -> None:
    """
    Raises:
        UserError: `steps` does not divide the schedule's: DDIM's steps are equal, and diffusers rounds silently.
    """
    total = scheduler.config.num_train_timesteps
    if steps < 1 or total % steps:
        fitting = [n for n in range(1, total + 1) if total % n == 0]
        near = [*[n for n in fitting if n < steps][-1:], *[n for n in fitting if n > steps][:1]]
        raise UserError(f"steps={steps} does not divide the schedule's {total}; take {' or '.join(map(str, near))}")


# --- the folder -----------------------------------------------------------------------------------------------

_FORMAT = 1


@dataclass
class LDM:
    """A latent diffusion model with all that sampling needs."""

    unet: UNet2DModel
    scheduler: DDIMScheduler
    vae: ModelMixin  # a LiteVAE, or another autoencoder of diffusers
    latent_mean: Tensor  # (C,), over the whole cache
    latent_std: Tensor
    info: dict[str, Any] = field(default_factory=dict)  # whence it comes: digest of the cache, config of the run, ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one latent."""
        config = self.unet.config
        return config.in_channels, config.sample_size, config.sample_size

    def to(self, device: torch.device | str) -> "LDM":
        self.unet.to(device)
        self.vae.to(device)
        return self

    def sample(self, seeds: Sequence[Seed], steps: int = 50, eta: float = 0.0) -> Tensor:
        """Images (N, 3, f h, f w) in [-1, 1]; see `sample_latents`."""
        return self.decode(sample_latents(self.unet, self.scheduler, self.shape, seeds, steps, eta))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents to images (N, 3, f h, f w) in [-1, 1]."""
        mean, std = (value.to(latents).view(1, -1, 1, 1) for value in (self.latent_mean, self.latent_std))
        return self.vae.decode(latents * std + mean, return_dict=False)[0].float().clamp(-1, 1)


def save_ldm(folder: str | Path, ldm: LDM) -> None:
    """Write `unet/`, `scheduler/`, `vae/` as diffusers does, and `ldm.json` last: without it there is no model."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / "ldm.json"
    marker.unlink(missing_ok=True)
    for name, part in (("unet", ldm.unet), ("scheduler", ldm.scheduler), ("vae", ldm.vae)):
        part.save_pretrained(folder / name)
    text = {
        "format": _FORMAT,
        "vae": fingerprint(folder / "vae"),
        "latent_mean": ldm.latent_mean.tolist(),
        "latent_std": ldm.latent_std.tolist(),
        "info": ldm.info,
    }
    unfinished = marker.with_suffix(".json.tmp")
    unfinished.write_text(json.dumps(text, indent=2) + "\n")
    os.replace(unfinished, marker)


def load_ldm(folder: str | Path) -> LDM:
    """The model of `save_ldm`, in eval mode, on the CPU.

    Raises:
        UserError: no such folder, one not written to its end, of another format, or with another autoencoder.
    """
    folder = Path(folder)
    marker = folder / "ldm.json"
    if not marker.is_file():
        raise UserError(f"{folder} holds no latent diffusion model: it has no ldm.json (train_ldm writes it last)")
    try:
        about = json.loads(marker.read_text())
        version, vae, info = about["format"], about["vae"], about["info"]
        mean, std = torch.tensor(about["latent_mean"]), torch.tensor(about["latent_std"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{marker} is damaged ({error!r}); export the model again") from None
    if version != _FORMAT:
        raise UserError(f"{marker} has format {version}; this version of litevae reads {_FORMAT}")
    if fingerprint(folder / "vae") != vae:
        raise UserError(f"{folder}/vae is not the autoencoder that this model was trained on")
    try:
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
        unet, report = UNet2DModel.from_pretrained(
            folder / "unet", local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} is incomplete or damaged: {error}") from error
    if wrong := [key for keys in report.values() for key in keys]:  # else diffusers leaves such tensors random
        raise UserError(f"{folder}/unet: the weights do not fit config.json, e.g. {wrong[0]} ({len(wrong)} tensors)")
    return LDM(unet.eval(), scheduler, load_autoencoder(folder / "vae"), mean, std, info)
