"""The encoders that the paper compares LiteVAE with: SD-VAE's, a smaller one, and fixed wavelet transforms."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litevae.errors import UserError
from litevae.layers import (
    ExactConv2d,
    ResBlock,
    compute_dtype,
    group_norm,
    middle,
    small_posterior,
    variance_preserving_conv,
)
from litevae.wavelet import LEVELS, wavelet_pyramid

# Widths, finest level first. For VAE-Small the paper states only the number of parameters, 6.75 M (Table 2b). The
# widths are our choice: among the multiples of 8 (for even groups) that give this number at n_z = 4 (6,752,464), those
# nearest to SD-VAE's ratios 1:2:4:4.
SD_SIZES = {"sd-vae": (128, 256, 512, 512), "vae-small": (56, 104, 208, 240)}


class SDEncoder(nn.Module):
    """SD-VAE's encoder: images (N, C, H, W) in [-1, 1] -> moments (N, 2 n_z, H/8, W/8), mean then log-variance.

    Its layers are: conv -> per level `layers` ResBlocks, followed (except in the last level) by a convolution of stride
    2 -> ResBlock, attention, ResBlock -> norm, SiLU, conv. There is no 1x1 convolution on the moments (Appendix D.2).

    Args:
        latent_channels: Number of latent channels, n_z.
        channels: Width of each level, finest level first.
        layers: Number of ResBlocks per level.
        in_channels: Number of image channels, C.

    Raises:
        UserError: if H or W is not a multiple of 8 (raised by `forward`).
    """

    def __init__(self, latent_channels: int, channels: tuple[int, ...], layers: int = 2, in_channels: int = 3):
        super().__init__()
        width = channels[0]
        self.conv_in = variance_preserving_conv(in_channels, width, 3)
        self.down = nn.ModuleList()
        for level, out in enumerate(channels):
            blocks: list[nn.Module] = []
            for _ in range(layers):
                blocks.append(ResBlock(width, out))
                width = out
            if level < len(channels) - 1:  # as in SD-VAE, zeros are padded only below and to the right
                blocks.append(
                    nn.Sequential(
                        nn.ZeroPad2d((0, 1, 0, 1)), variance_preserving_conv(width, width, 3, stride=2, padding=0)
                    )
                )
            self.down.append(nn.Sequential(*blocks))
        self.mid = middle(width)
        self.norm_out = group_norm(width)
        self.conv_out = variance_preserving_conv(width, 2 * latent_channels, 3, kind=ExactConv2d)
        small_posterior(self.conv_out)
        self.factor = 2 ** (len(channels) - 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            raise UserError(
                f"image size {x.shape[-2]}x{x.shape[-1]} is not a multiple of {self.factor}; resize or crop it first"
            )
        x = self.conv_in(x.to(compute_dtype(self.conv_in)))
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class WaveletEncoder(nn.Module):
    """An encoder without parameters (Appendix B): images (N, C, H, W) in [-1, 1] -> latents (N, n_z, H/8, W/8).

    The latents are the wavelet bands of level 3, divided by 8 (DWT of Table 11, n_z = 4C).

    Args:
        details: Whether to add the bands of level 2 except LL, divided by 4, with 2x2 positions stacked as channels
            (DWT-2 of Table 12, n_z = 16C).
        wavelet: "haar", or the name of any discrete wavelet of ptwt.
        in_channels: Number of image channels, C.
    """

    def __init__(self, details: bool, wavelet: str = "haar", in_channels: int = 3):
        super().__init__()
        self.details, self.wavelet, self.in_channels = details, wavelet, in_channels
        self.latent_channels = (16 if details else 4) * in_channels

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            *_, finer, latent = wavelet_pyramid(x.float(), self.wavelet, LEVELS)
        if self.details:
            latent = torch.cat([latent, F.pixel_unshuffle(finer[:, self.in_channels :], 2)], dim=1)
        return latent
