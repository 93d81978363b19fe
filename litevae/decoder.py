"""The SD-VAE decoder, with GroupNorm as published, with self-modulated convolutions (paper, Section 4.2) or with other
normalisations; of an image, or of its wavelet bands (Appendix G)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litevae.layers import Norm, ResBlock, Upsample, group_norm, middle, variance_preserving_conv
from litevae.wavelet import idwt

# In a decoder narrower than SD-VAE's: with 32 groups of one channel, the last normalisation would take each channel's
# mean away, and with it the image's brightness and colour.
GROUP_WIDTH = 16


class Decoder(nn.Module):
    """Latent (N, n_z, h, w) -> image (N, C, 8h, 8w), unbounded, trained towards [-1, 1].

    conv -> ResBlock, attention, ResBlock -> per level `layers` + 1 ResBlocks and (but for the last) nearest x2 with a
    conv -> norm, SiLU, conv. `channels` are the widths, finest first. `norm` is that of the ResBlocks; attention and
    the last layer keep GroupNorm. With a `wavelet`, the network leaves out the last upsampling and gives bands
    (N, 4C, 4h, 4w), with LL on the image's scale, which the inverse transform makes the image of.
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
        x = self.mid(self.conv_in(z))
        for level in self.up:
            x = level(x)
        x = self.conv_out(F.silu(self.norm_out(x)))
        if self.wavelet is None:
            return x
        with torch.autocast(x.device.type, enabled=False):
            return (idwt(x.float(), self.wavelet) * 2).to(x.dtype)
