"""The LiteVAE encoder: wavelet bands -> a feature extractor per level -> aggregation to moments (Section 4.1)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from litevae.layers import ResBlock, carrier
from litevae.wavelet import LEVELS, check_wavelet, wavelet_pyramid


@dataclass(frozen=True)
class EncoderSize:
    """Widths of the UNets (paper, Tables 23 and 24)."""

    extractor_channels: int
    extractor_mults: tuple[int, ...]
    aggregator_channels: int
    aggregator_mults: tuple[int, ...]


SIZES = {
    "S": EncoderSize(16, (1, 2, 2), 16, (1, 2, 2)),
    "B": EncoderSize(32, (1, 2, 3), 32, (1, 2, 3)),
    "M": EncoderSize(64, (1, 2, 4), 32, (1, 2, 3)),
    "L": EncoderSize(64, (1, 2, 4), 64, (1, 2, 4)),
}


class FlatUNet(nn.Module):
    """ADM's UNet without down- or upsampling (Appendix G): the width follows channels * mults down and up again, with
    skips by concatenation. (N, in, H, W) -> (N, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, channels: int, mults: tuple[int, ...], blocks: int = 2):
        super().__init__()
        self.conv_in = carrier(in_channels, channels, 3)
        widths, width = [], channels
        self.down = nn.ModuleList()
        for mult in mults:
            for _ in range(blocks):
                self.down.append(ResBlock(width, channels * mult))
                width = channels * mult
                widths.append(width)
        self.mid = nn.Sequential(ResBlock(width, width), ResBlock(width, width))
        self.up = nn.ModuleList()
        for mult in reversed(mults):
            for _ in range(blocks):
                self.up.append(ResBlock(width + widths.pop(), channels * mult))
                width = channels * mult
        self.conv_out = carrier(width, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        skips = []  # conv_in's own output is no skip: two blocks a level pop what two blocks pushed
        for block in self.down:
            x = block(x)
            skips.append(x)
        x = self.mid(x)
        for block in self.up:
            x = block(torch.cat([x, skips.pop()], dim=1))
        return self.conv_out(x)


class Encoder(nn.Module):
    """Image (N, C, H, W) in [-1, 1] -> moments (N, 2 n_z, H/8, W/8): mean, then log-variance.

    H and W must be multiples of 8. Three separate extractors see the bands of levels 1, 2, 3; levels 1 and 2 come
    down to f = 8 by a learned 3x3 convolution of stride 4 and 2 ("conv") or by average pooling ("pool").
    """

    def __init__(
        self,
        latent_channels: int,
        size: EncoderSize,
        wavelet: str = "haar",
        downsample: Literal["conv", "pool"] = "conv",
        in_channels: int = 3,
    ):
        super().__init__()
        check_wavelet(wavelet)
        self.wavelet = wavelet
        bands = 4 * in_channels
        self.extractors = nn.ModuleList(
            FlatUNet(bands, bands, size.extractor_channels, size.extractor_mults) for _ in range(LEVELS)
        )
        self.downsamplers = nn.ModuleList(
            carrier(bands, bands, 3, stride) if downsample == "conv" else nn.AvgPool2d(stride) for stride in (4, 2)
        )
        self.aggregator = FlatUNet(LEVELS * bands, 2 * latent_channels, size.aggregator_channels, size.aggregator_mults)
        # Starts with a posterior of std e^-3: at 1, noise drowns the mean until training has found that out.
        nn.init.constant_(self.aggregator.conv_out.get_parameter("bias")[latent_channels:], -6.0)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            pyramid = wavelet_pyramid(x.float(), self.wavelet)
        dtype = self.aggregator.conv_in.weight.dtype
        features = [extract(bands.to(dtype)) for extract, bands in zip(self.extractors, pyramid, strict=True)]
        features[:-1] = [down(f) for down, f in zip(self.downsamplers, features[:-1], strict=True)]
        return self.aggregator(torch.cat(features, dim=1))
