"""The SD-VAE decoder, with a choice of normalisations and outputs.

It has GroupNorm as published, self-modulated convolutions (paper, Section 4.2), or another normalisation. It predicts
an image, or the wavelet bands of an image (Appendix G).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litevae.layers import Norm, ResBlock, Upsample, compute_dtype, group_norm, middle, variance_preserving_conv
from litevae.wavelet import idwt

# Smallest width of a group in decoders narrower than SD-VAE's. With 32 groups of one channel, the last normalisation
# would remove the mean of each channel, and with it the brightness and colour of the image.
GROUP_WIDTH = 16


class Decoder(nn.Module):
    """The decoder: latents (N, n_z, h, w) -> images (N, C, 8h, 8w), trained towards [-1, 1] but not clipped.

    Its layers are: conv -> ResBlock, attention, ResBlock -> per level `layers` + 1 ResBlocks, followed (except in the
    last level) by nearest-neighbour upsampling by 2 and a conv -> norm, SiLU, conv.

    Args:
        latent_channels: Number of latent channels, n_z.
        channels: Width of each level, finest level first.
        layers: Depth; each level has `layers` + 1 ResBlocks.
        norm: Normalisation of the ResBlocks. Attention and the last layer always have GroupNorm.
        out_channels: Number of image channels, C.
        wavelet: None to predict images. With the name of a wavelet, the network has one upsampling less and predicts
            bands (N, 4C, 4h, 4w), with LL on the scale of the image; the inverse transform turns them into the image.
    """

    def __init__(
        self,
        latent_channels: int,
        channels: tuple[int, ...] = (128, 256, 512, 512),
        layers: int = 2,
        norm: Norm = "group",
        out_channels: int = 3,
        wavelet: str | None = None,
    ):
        super().__init__()
        self.wavelet = wavelet
        ups = len(channels) - (1 if wavelet is None else 2)
        width = channels[-1]
        self.conv_in = variance_preserving_conv(latent_channels, width, 3)
        self.mid = middle(width, norm, GROUP_WIDTH)
        self.up = nn.ModuleList()
        for level, out in enumerate(reversed(channels)):
            blocks: list[nn.Module] = []
            for _ in range(layers + 1):
                blocks.append(ResBlock(width, out, norm, GROUP_WIDTH))
                width = out
            if level < ups:
                blocks.append(Upsample(width))
            self.up.append(nn.Sequential(*blocks))
        self.norm_out = group_norm(width, GROUP_WIDTH)
        self.conv_out = variance_preserving_conv(width, out_channels if wavelet is None else 4 * out_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z.to(compute_dtype(self.conv_in))))
        for level in self.up:
            x = level(x)
        x = self.conv_out(F.silu(self.norm_out(x)))
        if self.wavelet is None:
            return x
        with torch.autocast(x.device.type, enabled=False):
            return (idwt(x.float(), self.wavelet) * 2).to(x.dtype)
