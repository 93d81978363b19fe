"""The LiteVAE encoder: wavelet transform, one feature extractor per level, and aggregation to moments (Section 4.1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

import torch
from torch import Tensor, nn

from litevae.features import FlatUNet, NAFNet, ViT
from litevae.layers import ExactConv2d, compute_dtype, small_posterior, variance_preserving_conv
from litevae.wavelet import LEVELS, check_wavelet, wavelet_pyramid


@dataclass(frozen=True)
class EncoderSize:
    """The widths of the UNets of an encoder (paper, Tables 23 and 24).

    Attributes:
        extractor_channels: Base width of the feature extractors.
        extractor_mults: Multiples of the base width, one per level of an extractor.
        aggregator_channels: Base width of the aggregator.
        aggregator_mults: Multiples of the base width, one per level of the aggregator.
    """

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

EXTRACTORS: dict[str, type[FlatUNet | NAFNet]] = {"unet": FlatUNet, "nafnet": NAFNet}
AGGREGATORS = ("unet", "vit")


class Encoder(nn.Module):
    """The LiteVAE encoder: images (N, C, H, W) in [-1, 1] -> moments (N, 2 n_z, H/8, W/8), mean then log-variance.

    H and W must be multiples of 8. By default three separate extractors see the wavelet bands of levels 1, 2 and 3.

    Args:
        latent_channels: Number of latent channels, n_z.
        size: Widths of the networks.
        wavelet: "haar", or the name of any discrete wavelet of ptwt.
        downsample: How the features of levels 1 and 2 are brought down to f = 8: "conv", a learned 3x3 convolution of
            stride 4 and 2; or "pool", average pooling.
        in_channels: Number of image channels, C.
        extractor: "unet", or "nafnet" (Table 18).
        shared_extractor: Whether all levels share one extractor (Table 19).
        levels: Levels that the encoder sees: some of 1, 2, 3, in this order (Table 21).
        aggregator: "unet", or "vit" (Table 20), which is 4 times as wide as the base width of the UNet.
        vit_grid: Side of the latents for which the ViT has a position embedding.
    """

    def __init__(
        self,
        latent_channels: int,
        size: EncoderSize,
        wavelet: str = "haar",
        downsample: Literal["conv", "pool"] = "conv",
        in_channels: int = 3,
        extractor: str = "unet",
        shared_extractor: bool = False,
        levels: Sequence[int] = (1, 2, 3),
        aggregator: str = "unet",
        vit_grid: int = 16,
    ):
        super().__init__()
        check_wavelet(wavelet)
        self.wavelet, self.levels = wavelet, tuple(levels)
        bands = 4 * in_channels
        self.extractors = nn.ModuleList(
            EXTRACTORS[extractor](bands, bands, size.extractor_channels, size.extractor_mults)
            for _ in (self.levels[:1] if shared_extractor else self.levels)
        )
        self.downsamplers = nn.ModuleList(_downsampler(bands, 2 ** (LEVELS - n), downsample) for n in self.levels)
        seen, moments = len(self.levels) * bands, 2 * latent_channels
        self.aggregator: FlatUNet | ViT = (
            ViT(seen, moments, 4 * size.aggregator_channels, vit_grid)
            if aggregator == "vit"
            else FlatUNet(seen, moments, size.aggregator_channels, size.aggregator_mults, last=ExactConv2d)
        )
        small_posterior(self.aggregator.conv_out)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            pyramid = wavelet_pyramid(x.float(), self.wavelet)
        dtype = compute_dtype(self.aggregator.conv_out)
        features = [
            down(extract(pyramid[level - 1].to(dtype)))
            for level, extract, down in zip(self.levels, cycle(self.extractors), self.downsamplers, strict=False)
        ]
        return self.aggregator(torch.cat(features, dim=1))


def _downsampler(channels: int, stride: int, kind: str) -> nn.Module:
    """Build the layer that brings the features of a level down to f = 8."""
    if stride == 1:
        return nn.Identity()
    return variance_preserving_conv(channels, channels, 3, stride) if kind == "conv" else nn.AvgPool2d(stride)
