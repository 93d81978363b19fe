"""Compare training steps with the same networks in a plain torch loop: by part, compiled, and with recomputation.

The plain loop does what trainers in the style of diffusers' and CompVis' scripts do. It runs eagerly in NCHW with
torch's default AdamW, with one forward pass of the autoencoder per step, and three forward passes of the discriminator
per step. Every metric is read from the device at once. Losses and precision are the same as in this project.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from litevae import layers, losses
from litevae.discriminators import Block, UNetDiscriminator
from litevae.errors import UserError
from litevae.images import to_tensor
from litevae.perceptual import WeightsMissing, load_lpips
from litevae.precision import autocast
from pipelines.benchmark import meter
from pipelines.runtime.cli import load
from pipelines.runtime.host import PeakMemory
from pipelines.runtime.mlflow_server import RunHandle
from pipelines.training import ldm, vae
from pipelines.training.config import TrainLDM, TrainVAE
from pipelines.training.latent_feeds import LatentBatch
from pipelines.training.worker_setup import LatentData, LdmSetup

PARTS = {
    "encoder": "encoder",
    "decoder": "decoder",
    "perceptual": "LPIPS",
    "terms": "other losses",
    "judged": "discriminator, the generator's step",
    "judging": "discriminator, its own step",
    "optimize": "optimizers",
    "images": "pixels to images",
}


# --- the autoencoder ------------------------------------------------------------------------------------------------


def vae_step(setting: meter.Setting) -> Iterator[meter.ReportTable]:
    """Measure the autoencoder's training step, its parts, and what recomputing activations saves and costs.

    Raises:
        UserError: if the losses of the loops differ, so that a comparison would be wrong.
    """
    config = setting.config
    shape, words = (config.step_resolution, config.step_batch), _backbone(setting.place)
    yield from steps_of_vae(setting, *shape, words)
    yield checkpointing(setting, *shape, words)


def _backbone(folder: Path) -> list[str]:
    """Return the config words for LPIPS: none if torch hub has its weights, else those of a file of random weights.

    Random weights take the same time.
    """
    try:
        load_lpips("vgg")
    except WeightsMissing:
        from torchvision import models

        torch.manual_seed(0)
        file = folder / "vgg16-random.pth"
        torch.save(models.vgg16(weights=None).features.state_dict(prefix="features."), file)
        return [f"loss.lpips.weights={file}"]
    return []


def steps_of_vae(setting: meter.Setting, resolution: int, batch: int, words: list[str]) -> Iterator[meter.ReportTable]:
    """Measure whole training steps of the autoencoder and their parts; also compiled ones if `modes` names them.

    Args:
        setting: device and number of rounds.
        resolution: side of the images in pixels.
        batch: images per step.
        words: words of the job's config, for example ["model.encoder=B", "loop.precision=bf16"].

    Raises:
        UserError: if the losses of the loops differ.
    """
    device, repeats = setting.device, setting.config.repeats
    where = f"{resolution} px, batch {batch}, {device.type}"
    made: dict[str, Plain | Ours] = {
        "plain loop": Plain(words, resolution, batch, device),
        "plain loop, discriminator frozen": Plain(words, resolution, batch, device, frozen=True),
        "ours": Ours(words, resolution, batch, device),
    }
    if "compiled" in setting.config.modes:
        made["ours, compiled"] = Ours([*words, "loop.compile=true"], resolution, batch, device)
    pixels = torch.randint(0, 256, (batch, resolution, resolution, 3), dtype=torch.uint8)
    first: dict[str, dict[str, float]] = {}
    warm: dict[str, float] = {}
    for name, one in made.items():
        torch.manual_seed(1)
        start = meter.now(device)
        first[name] = {key: float(value) for key, value in one.step(pixels).items()}
        warm[name] = meter.now(device) - start
    bf16 = device.type == "cuda" or "loop.precision=bf16" in words
    _check_same(first, rtol=2e-2 if bf16 else 1e-3)
    calls: dict[str, Callable[[], object]] = {name: partial(one.step, pixels) for name, one in made.items()}
    seconds = meter.rounds(calls, repeats, device=device.type)
    base = seconds["plain loop"]
    title = f"VAE training step, {where}"
    backbone = made["ours"].nets.objective.lpips
    about = f"{backbone.name if backbone is not None else 'no LPIPS'}; losses of the first step agree"
    yield meter.ReportTable(
        title,
        f"Contenders in turn, {repeats} rounds: median (range). {about}.",
        ["", "images/s", "x plain (median of rounds)", "first step, s"],
        [
            [name, meter.median_and_range(meter.rates(s, batch), 3), f"{meter.ratio(base, s):.2f}", f"{warm[name]:.1f}"]
            for name, s in seconds.items()
        ],
        {"seconds": seconds, "first": first, "warm": warm},
    )
    parts = {name: words for name, words in PARTS.items() if name != "perceptual" or backbone is not None}
    split = {
        f"{part} {name}": call
        for part in parts
        for name, one in made.items()
        if name != "plain loop, discriminator frozen"
        for call in [one.part(part, pixels)]
    }
    found = meter.rounds(split, repeats, device=device.type)
    shown = [name for name in made if name != "plain loop, discriminator frozen"]
    rows: list[Sequence[str]] = []
    for part, words_of in parts.items():
        times = [found[f"{part} {name}"] for name in shown]
        cells = [meter.median_and_range([1e3 * s for s in samples], 1) for samples in times]
        rows.append([words_of, *cells, *(f"{meter.ratio(times[0], samples):.2f}" for samples in times[1:])])
    heads = [*(f"{name}, ms" for name in shown), *(f"x plain, {name}" for name in shown[1:])]
    how = f"Forward and backward pass of each part alone, in turn, {repeats} rounds: median (range)."
    yield meter.ReportTable(f"{title}, by part", how, ["", *heads], rows, {"seconds": found})


def _check_same(first: dict[str, dict[str, float]], rtol: float) -> None:
    """Raise a UserError unless all contenders had the plain loop's losses in the first step."""
    wanted = first["plain loop"]
    for name, values in first.items():
        for key, value in wanted.items():
            if abs(values[key] - value) > rtol * abs(value) + 1e-4:
                raise UserError(
                    f"{name} and the plain loop do not compute the same: {key} is {values[key]} and {value}"
                )


@contextmanager
def _without_ray() -> Iterator[None]:
    """Return a context in which Ray's `prepare_model` does nothing, since there is no process group."""
    with mock.patch("ray.train.torch.prepare_model", lambda model: model):
        yield


def vae_config(words: Sequence[str], resolution: int, batch: int) -> TrainVAE:
    """Return a config of train_vae with one stage, and with the adversarial loss from the start."""
    stage = f"stages=[{{resolution: {resolution}, images: {10**9}, batch_size: {batch}}}]"
    off = ["loss.adversarial.start=0", "tracking.enabled=false"]
    return load(TrainVAE, None, [*off, *words, stage])


class Ours:
    """This project's training step of the autoencoder (`Networks` of train_vae), and its parts.

    Args:
        words: words of the job's config.
        resolution: side of the images in pixels.
        batch: images per step.
        device: the device.

    Raises:
        UserError: if the config has no UNet discriminator.
    """

    def __init__(self, words: Sequence[str], resolution: int, batch: int, device: torch.device):
        self.config, self.device = vae_config(words, resolution, batch), device
        with _without_ray():
            self.nets = vae.Networks(self.config, bool(self.config.loss.lpips.weight), device)
        if not isinstance(self.nets.disc, UNetDiscriminator):
            raise UserError("the plain loop supports only loss.adversarial.kind=unet with a weight above 0")
        self.model, self.objective = self.nets.model, self.nets.objective
        self.disc: nn.Module = self.nets.disc

    def step(self, pixels: Tensor) -> dict[str, Tensor]:
        """Do one training step on uint8 images (N, H, W, 3), and return its losses."""
        return self.nets.step(pixels, 0)

    # The parts of a step, each with its forward and backward pass.

    def part(self, name: str, pixels: Tensor) -> Callable[[], object]:
        """Return the call that runs one part of the step.

        Args:
            name: a key of `PARTS`.
            pixels: uint8 images (N, H, W, 3).
        """
        torch.manual_seed(2)
        x = self.images(pixels)
        with self._autocast(), torch.no_grad():
            posterior = self.model.encode(x).latent_dist
            y = self.model.decode(posterior.sample()).sample
        y, z = y.float().requires_grad_(), posterior.mode().requires_grad_()
        gradients = {p: torch.zeros_like(p) for p in (*self.model.parameters(), *self.disc.parameters())}
        calls: dict[str, Callable[[], object]] = {
            "encoder": lambda: self._both(lambda: self.model.encoder(x)),
            "decoder": lambda: self._both(lambda: self.model.decoder(z)),
            "perceptual": lambda: self._both(lambda: self.objective.lpips(y, x)),  # type: ignore[misc]
            "terms": lambda: self._both(lambda: self._terms(x, y, posterior)),
            "judged": lambda: self._both(lambda: self.judged(y)),
            "judging": lambda: self._both(lambda: self.judging(x, y.detach())),
            "optimize": lambda: self.optimize(gradients),
            "images": lambda: self.images(pixels),
        }
        return calls[name]

    def _autocast(self):
        return autocast(self.device, self.config.loop.precision)

    def _both(self, forward: Callable[[], Tensor]) -> None:
        """Run a forward and a backward pass, then drop the gradients."""
        with self._autocast():
            out = forward()
        out.float().mean().backward()
        for module in (self.model, self.disc):
            module.zero_grad(set_to_none=True)

    def _terms(self, x: Tensor, y: Tensor, posterior: Any) -> Tensor:
        """Return the weighted sum of the loss terms that need no network."""
        weights = self.config.loss
        return (
            weights.l1.weight * losses.l1(y, x)
            + weights.kl.weight * losses.kl(posterior)
            + weights.wavelet.weight * losses.wavelet(y, x)
            + weights.gaussian.weight * losses.gaussian(y, x)
        )

    def images(self, pixels: Tensor) -> Tensor:
        """Convert uint8 images (N, H, W, 3) to (N, 3, H, W) in [-1, 1] on the device."""
        return to_tensor(pixels.to(self.device, non_blocking=True), self.nets.memory_format)

    def judged(self, y: Tensor) -> Tensor:
        """Return the adversarial loss of reconstructions, for the autoencoder's step."""
        self.disc.requires_grad_(False)
        return losses.hinge_generator(self.disc(y))

    def judging(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the discriminator's loss on images and reconstructions."""
        self.disc.requires_grad_(True)
        assert self.nets.adversarial is not None
        return self.nets.adversarial.discriminator_loss(x, y, 0, 0)[0]

    def optimize(self, gradients: dict[Tensor, Tensor]) -> None:
        """Do one step of both optimizers with the given gradients."""
        for p, gradient in gradients.items():
            p.grad = gradient
        for optimizer in (self.nets.optimizer, self.nets.disc_optimizer):
            optimizer.step(0.0)


class Plain(Ours):
    """The plain loop on networks with the same weights.

    Args:
        frozen: compute no gradients of the discriminator's weights in the autoencoder's step. Lightning does so for
            CompVis' code; diffusers' script does not.
    """

    def __init__(self, words: Sequence[str], resolution: int, batch: int, device: torch.device, frozen: bool = False):
        super().__init__(words, resolution, batch, device)
        self.frozen = frozen
        self.model, self.disc = _plain(self.model), PlainUNet(self.nets.disc)  # type: ignore[arg-type]
        for module in (self.model, self.disc, self.objective):
            module.to(memory_format=torch.contiguous_format)
        optim, lr = self.config.optim, self.config.loss.adversarial.lr
        options: dict[str, Any] = {"betas": optim.betas, "weight_decay": optim.weight_decay}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=optim.lr, **options)
        self.disc_optimizer = torch.optim.AdamW(self.disc.parameters(), lr=lr, **options)

    def step(self, pixels: Tensor) -> dict[str, Any]:
        weights = self.config.loss
        x = self.images(pixels)
        with self._autocast():
            posterior = self.model.encode(x).latent_dist
            y = self.model.decode(posterior.sample()).sample
        y = y.float()
        loss = self._terms(x, y, posterior)
        if self.objective.lpips is not None:
            loss = loss + weights.lpips.weight * self.objective.lpips(y, x).mean()
        with self._autocast():
            adversarial = self.judged(y)
        loss = loss + weights.adversarial.weight * adversarial
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with self._autocast():
            discriminator = self.judging(x, y.detach())
        self.disc_optimizer.zero_grad()
        discriminator.backward()
        self.disc_optimizer.step()
        values = {"loss": loss, "adversarial": adversarial, "discriminator": discriminator}
        return {name: value.item() for name, value in values.items()}

    def images(self, pixels: Tensor) -> Tensor:
        return (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous().to(self.device)

    def judged(self, y: Tensor) -> Tensor:
        if self.frozen:
            self.disc.requires_grad_(False)
        return losses.hinge_generator(self.disc(y))

    def judging(self, x: Tensor, y: Tensor) -> Tensor:
        self.disc.requires_grad_(True)
        return losses.hinge_discriminator(self.disc(x), self.disc(y))

    def optimize(self, gradients: dict[Tensor, Tensor]) -> None:
        for p, gradient in gradients.items():
            p.grad = gradient
        for optimizer in (self.optimizer, self.disc_optimizer):
            optimizer.step()
            optimizer.zero_grad()


def _plain(module: nn.Module) -> Any:
    """Replace this project's fast upsampling layers by their plain modules, in place."""
    for name, child in module.named_children():
        setattr(module, name, nn.Sequential(*child) if isinstance(child, layers.Upsample) else _plain(child))
    return module


class PlainUNet(nn.Module):
    """The UNet discriminator with its layers in BigGAN's order: pooling after convolutions, upsampling before them."""

    def __init__(self, network: UNetDiscriminator):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        skips = [x]
        for block in self.network.down:
            skips.append(F.avg_pool2d(_block(block, skips[-1]), 2))
        h = skips.pop()
        features = 16 * F.relu(h).mean((2, 3), keepdim=True)
        for block in self.network.up:
            skip = skips.pop()
            h = _block(block, F.interpolate(h, scale_factor=2.0))
            h = torch.cat([h, skip], dim=1) if skips else h
        return self.network.global_head(features).flatten(1), self.network.pixel_head(h)


def _block(block: Any, x: Tensor) -> Tensor:
    assert isinstance(block, Block)
    h = block.conv1(x if block.first else F.relu(x))
    return block.conv2(F.relu(h)) + block.skip(x)


# --- memory against speed -------------------------------------------------------------------------------------------


def checkpointing(setting: meter.Setting, resolution: int, batch: int, words: list[str]) -> meter.ReportTable:
    """Measure peak memory and speed with activations kept, and with activations recomputed."""
    repeats, device = setting.config.repeats, setting.device.type
    where = f"{resolution} px, batch {batch}, {device}"
    rows: list[Sequence[str]] = []
    with meter.Child(__name__) as kept, meter.Child(__name__) as recomputed:
        children = {"kept": (kept, []), "recomputed": (recomputed, ["checkpointing=true"])}
        peaks = {}
        for name, (child, more) in children.items():
            request = {"words": [*words, *more], "resolution": resolution, "batch": batch, "device": device}
            peaks[name] = child.ask(**request, threads=setting.threads)["peak"]
        seconds: dict[str, list[float]] = {name: [] for name in children}
        for _ in range(repeats):
            for name, (child, _more) in children.items():
                seconds[name].append(child.ask(step=True)["seconds"])
    for name in children:
        rate = meter.median_and_range(meter.rates(seconds[name], batch), 3)
        cost = f"{meter.ratio(seconds['kept'], seconds[name]):.2f}"
        rows.append([name, f"{peaks[name] / 2**20:,.0f}", rate, cost])
    return meter.ReportTable(
        f"Activations kept or recomputed, {where}",
        "Peak memory of two steps beyond weights and code (with gradients and optimizers' moments), a process each; "
        f"then steps in turn, {repeats} rounds: median (range).",
        ["activations of ResBlocks", "peak, MiB", "images/s", "x kept"],
        rows,
        {"peak": peaks, "seconds": seconds},
    )


_STEPPING: list[Callable[[], Any]] = []


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """Answer requests in a process of its own: the first sets up and measures memory, further ones time a step."""
    if not _STEPPING:
        torch.set_num_threads(request["threads"])
        device, batch, resolution = torch.device(request["device"]), request["batch"], request["resolution"]
        ours = Ours(request["words"], resolution, batch, device)
        pixels = torch.randint(0, 256, (batch, resolution, resolution, 3), dtype=torch.uint8)
        memory = PeakMemory(device)
        for _ in range(2):
            ours.step(pixels)
        _STEPPING.extend((lambda: ours.step(pixels), lambda: meter.now(device)))
        return {"peak": memory.bytes()}
    step, now = _STEPPING
    start = now()
    step()
    return {"seconds": now() - start}


# --- the diffusion model --------------------------------------------------------------------------------------------


LDM = (("small", 32, 8), ("tiny", 8, 64))  # network, side of its latents, batch size


def ldm_step(setting: meter.Setting) -> Iterator[meter.ReportTable]:
    """Measure the diffusion model's training step, with noise, clipping, optimizer and EMA."""
    return steps_of_ldm(setting, LDM)


def steps_of_ldm(
    setting: meter.Setting, networks: Sequence[tuple[str, int, int]], words: Sequence[str] = ()
) -> Iterator[meter.ReportTable]:
    """Measure training steps of diffusion models; yield one table per network.

    Args:
        setting: device and number of rounds.
        networks: (network, side of its latents, batch size) of each table.
        words: words of the job's config.

    Raises:
        UserError: if the losses of the loops differ, so that a comparison would be wrong.
    """
    repeats, where = setting.config.repeats, setting.device
    for network, side, batch in networks:
        given = [f"network={network}", f"batch_size={batch}", "optim.clip=1", "sample_images=0", *words]
        made: dict[str, PlainDiffusion | OurDiffusion] = {
            "plain loop": PlainDiffusion(given, side, where),
            "ours": OurDiffusion(given, side, where),
        }
        if "compiled" in setting.config.modes:
            made["ours, compiled"] = OurDiffusion([*given, "loop.compile=true"], side, where)
        warm, first = {}, {}
        for name, one in made.items():
            start = meter.now(where)
            first[name] = float(one.step(0))
            warm[name] = meter.now(where) - start
        bf16 = where.type == "cuda" or "loop.precision=bf16" in words
        if max(first.values()) > (1.01 if bf16 else 1.0001) * min(first.values()):
            raise UserError(f"these loops do not compute the same; their first losses are {first}")
        calls: dict[str, Callable[[], object]] = {name: one.step for name, one in made.items()}
        seconds = meter.rounds(calls, repeats, device=where.type)
        base = seconds["plain loop"]
        yield meter.ReportTable(
            f"Diffusion model's training step, {network}, {side}x{side}, batch {batch}, {where.type}",
            f"Contenders in turn, {repeats} rounds: median (range). {given}; losses of the first step agree.",
            ["", "steps/s", "x plain (median of rounds)", "first step, s"],
            [
                [name, meter.median_and_range(meter.rates(s, 1), 3), f"{meter.ratio(base, s):.2f}", f"{warm[name]:.1f}"]
                for name, s in seconds.items()
            ],
            {"seconds": seconds, "first": first, "warm": warm},
        )


class _Latents:
    """A feed that always gives the same latents."""

    digest = ""

    def __init__(self, latents: Tensor):
        self._latents = latents

    def latents(self, batch: dict[str, Any]) -> Tensor:
        return self._latents


class OurDiffusion:
    """This project's training step of a diffusion model (`LdmTask` of train_ldm), on random latents.

    Args:
        words: words of the job's config.
        side: side of the latents.
        device: the device.
    """

    def __init__(self, words: Sequence[str], side: int, device: torch.device):
        config = load(TrainLDM, None, ["tracking.enabled=false", *words])
        torch.manual_seed(0)
        self.latents = torch.randn(config.batch_size, 4, side, side, device=device)
        latents = LatentData(data="", images=0, shape=(4, side, side), vae="", fingerprint="", about="")
        untracked = RunHandle("", None, "benchmark", config.root)
        setup = LdmSetup(config={}, folder="", data="", handle=untracked, latents=latents)
        with _without_ray(), mock.patch.object(ldm, "make_feed", return_value=_Latents(self.latents)):
            self.task = ldm.LdmTask(config, setup, 0, 1, device)
        self.config, self.device, self.taken = config, device, 0
        self.task.network.train()

    def step(self, taken: int | None = None) -> Tensor:
        """Do one training step and return its loss.

        Args:
            taken: number of the step, from which its noise follows; None: the next one.
        """
        taken = self.taken = self.taken + 1 if taken is None else taken
        positions = range(taken * self.config.batch_size, (taken + 1) * self.config.batch_size)
        return self.task.step(self.task.with_noise(LatentBatch(positions)), 0)["loss"]


class PlainDiffusion(OurDiffusion):
    """The plain loop on a network with the same weights and latents, and with the same noise in the first step."""

    def __init__(self, words: Sequence[str], side: int, device: torch.device):
        super().__init__(words, side, device)
        self.net = self.task.network.to(memory_format=torch.contiguous_format)
        self.parameters = list(self.net.parameters())
        optim = self.config.optim
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay
        )
        self.average = [p.detach().clone() for p in self.parameters]
        self.scheduler = DDPMScheduler(1000, beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")

    def step(self, taken: int | None = None) -> Any:
        taken = self.taken = self.taken + 1 if taken is None else taken
        size, device = self.config.batch_size, self.device
        if taken:
            noise = torch.randn_like(self.latents)
            timesteps = torch.randint(0, 1000, (size,), device=device)
        else:  # the first step gets the same noise as the other loop's, so that the losses can be compared
            given = self.task.with_noise(LatentBatch(range(size)))
            assert given.noise is not None
            assert given.u is not None
            noise, timesteps = given.noise.to(device), (given.u * 1000).long().to(device)
        noisy = self.scheduler.add_noise(self.latents, noise, timesteps)
        with autocast(device, self.config.loop.precision):
            predicted = self.net(noisy, timesteps).sample
        loss = F.mse_loss(predicted.float(), noise)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optim.clip)
        self.optimizer.step()
        with torch.no_grad():
            for average, p in zip(self.average, self.parameters, strict=True):
                average.lerp_(p, 1 - self.config.loop.ema)
        return loss.item()


if __name__ == "__main__":
    meter.serve(_answer)
