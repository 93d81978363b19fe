"""The encoder or the decoder of an autoencoder, fed and timed without the other half."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from litevae.autoencoder import count_parameters
from litevae.latents import downsampling, encode_latents
from litevae.precision import autocast
from pipelines.runtime import host


class TimedHalf:
    """One half of an autoencoder on a device, with random input for it.

    The other half is removed from the model, so that its weights neither take memory nor count.

    Args:
        model: an autoencoder of this project or of diffusers.
        part: "encoder" or "decoder", the half that is kept.
        device: where it runs.
        precision: "fp32", "bf16" or "auto", as `litevae.precision.autocast` takes it.

    Attributes:
        model: the autoencoder without the other half.
        parameters: how many parameters the half has.
        forward: what `seconds` times; `run`, unless it is set to a compiled function.
    """

    def __init__(self, model: Any, part: str, device: torch.device, precision: str):
        self.part, self.device, self.precision = part, device, precision
        self._factor, self._channels = downsampling(model), model.config["latent_channels"]
        self.parameters = count_parameters(getattr(model, part))
        setattr(model, "decoder" if part == "encoder" else "encoder", nn.Identity())
        self.model = model.requires_grad_(False).to(device)
        self.forward: Callable[[Tensor], Tensor] = self.run

    def run(self, x: Tensor) -> Tensor:
        """Encode images (N, 3, H, W) in [-1, 1], or decode latents (N, C, h, w)."""
        if self.part == "encoder":
            return encode_latents(self.model, x)
        return self.model.decode(x, return_dict=False)[0]

    def input(self, count: int, resolution: int) -> Tensor:
        """Return input on the device, the same each time.

        Args:
            count: images of the batch.
            resolution: sides of the images in pixels; latents for a decoder are those of such images.

        Returns:
            Images (count, 3, resolution, resolution), uniform in [-1, 1], or standard normal latents.
        """
        generator = torch.Generator().manual_seed(0)
        if self.part == "encoder":
            return (torch.rand(count, 3, resolution, resolution, generator=generator) * 2 - 1).to(self.device)
        side = resolution // self._factor
        return torch.randn(count, self._channels, side, side, generator=generator).to(self.device)

    def seconds(self, x: Tensor, passes: int = 1) -> float:
        """Return the mean seconds of one forward pass.

        Args:
            x: the input.
            passes: how many passes are timed as one.
        """
        start = host.now(self.device)
        with torch.inference_mode(), autocast(self.device, self.precision):
            for _ in range(passes):
                self.forward(x)
        return (host.now(self.device) - start) / passes
