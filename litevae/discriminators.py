"""Discriminators: an image batch to a tuple of logits, one tensor per head."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SpectralConv2d(nn.Conv2d):
    """A convolution whose weight is divided by its spectral norm (Miyato et al. 2018), orthogonal at the start.

    Each training forward takes one step of power iteration on the buffer `u`, the only state. The division is in
    fp32 under autocast too, and graphs hold copies of `u`, so several forwards may precede one backward and DDP
    may broadcast the buffer in between.
    """

    u: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        nn.init.orthogonal_(self.weight)
        self.register_buffer("u", F.normalize(torch.randn(out_channels), dim=0))

    def normalized_weight(self) -> Tensor:
        with torch.autocast(self.weight.device.type, enabled=False):
            matrix = self.weight.flatten(1)
            with torch.no_grad():
                v = F.normalize(matrix.T @ self.u, dim=0)
                u = F.normalize(matrix @ v, dim=0)
                if self.training:
                    self.u.copy_(u)
            return self.weight / (u @ matrix @ v)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.normalized_weight(), self.bias, padding=self.padding)


class Block(nn.Module):
    """BigGAN's residual block without its resampling: two 3x3 convolutions, 1x1 on the skip, ReLU before each
    convolution except, in the network's first block, before the first."""

    def __init__(self, in_channels: int, out_channels: int, first: bool = False) -> None:
        super().__init__()
        self.first = first
        self.conv1 = SpectralConv2d(in_channels, out_channels, 3)
        self.conv2 = SpectralConv2d(out_channels, out_channels, 3)
        self.skip = SpectralConv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x if self.first else F.relu(x))
        return self.conv2(F.relu(h)) + self.skip(x)


class UNetDiscriminator(nn.Module):
    """UNet discriminator with a global and a per-pixel head: our fixed-depth variant of Schonfeld et al. (2020).

    (N, in_channels, H, W) -> logits ((N, 1), (N, 1, H, W)).

    Their 128-pixel network (five levels of 1, 2, 4, 8 and 16 times `channels`, BigGAN's blocks, average pooling,
    nearest upsampling, concatenated skips, spectral norm on all but the last 1x1 convolution, orthogonal start)
    serves every resolution here, where theirs grows a level at 256; the global head takes 16 times the mean of the
    features instead of their sum, which is the same at 128 pixels and no larger elsewhere. Any size works;
    multiples of 32 pool evenly. 31,481,602 parameters at 64 channels.
    """

    MULTIPLES = (1, 2, 4, 8, 16)

    def __init__(self, channels: int = 64, in_channels: int = 3) -> None:
        super().__init__()
        widths = [channels * multiple for multiple in self.MULTIPLES]
        inputs = [in_channels, *widths[:-1]]
        self.down = nn.ModuleList(
            Block(*width, first=not n) for n, width in enumerate(zip(inputs, widths, strict=True))
        )
        outputs = [*widths[-2::-1], channels]
        inputs = [widths[-1], *(2 * width for width in outputs[:-1])]  # with the skips
        self.up = nn.ModuleList(Block(*width) for width in zip(inputs, outputs, strict=True))
        self.global_head = SpectralConv2d(widths[-1], 1, 1)
        self.pixel_head = nn.Conv2d(channels, 1, 1)
        nn.init.orthogonal_(self.pixel_head.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        skips = [x]
        for block in self.down:
            skips.append(F.avg_pool2d(block(skips[-1]), 2, ceil_mode=True))
        h = skips.pop()
        features = 16 * F.relu(h).mean((2, 3), keepdim=True)  # 16 positions at 128 pixels
        for block in self.up:
            skip = skips.pop()
            h = block(F.interpolate(h, size=skip.shape[-2:], mode="nearest"))
            if skips:  # the image itself is not one
                h = torch.cat([h, skip], dim=1)
        return self.global_head(features).flatten(1), self.pixel_head(h)
