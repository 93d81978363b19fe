"""Discriminators, which map a batch of images to a tuple of logits, one tensor per head."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from litevae.errors import UserError
from litevae.layers import pooled_conv, upsampled_conv


class Discriminator(nn.Module):
    """Base class of discriminators: images (N, in_channels, H, W) in [-1, 1] -> logits, a tuple of one tensor per head.

    Attributes:
        mixes_images: Whether the images of a batch influence each other's logits. If so, real and generated images must
            go through separate forward passes; in one batch, one kind would reveal the other.
    """

    mixes_images: ClassVar[bool]


class SpectralConv2d(nn.Conv2d):
    """A convolution whose weight is divided by its spectral norm (Miyato et al. 2018), with orthogonal initialisation.

    Each forward pass in training mode does one step of power iteration on the buffer `u`, the only state. The division
    is done in fp32, under autocast too. Graphs hold copies of `u`, so there may be several forward passes before one
    backward pass, and DDP may broadcast the buffer in between.
    """

    u: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        nn.init.orthogonal_(self.weight)
        self.register_buffer("u", F.normalize(torch.randn(out_channels), dim=0))

    def normalized_weight(self) -> Tensor:
        """Return the weight divided by its spectral norm; in training mode, also update `u`."""
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
    """BigGAN's residual block: two 3x3 convolutions, and a 1x1 convolution on the skip connection.

    Both 3x3 convolutions have a ReLU before them, except the first one in the first block of the network.
    """

    def __init__(self, in_channels: int, out_channels: int, first: bool = False) -> None:
        super().__init__()
        self.first = first
        self.conv1 = SpectralConv2d(in_channels, out_channels, 3)
        self.conv2 = SpectralConv2d(out_channels, out_channels, 3)
        self.skip = SpectralConv2d(in_channels, out_channels, 1)


class DownBlock(Block):
    """A `Block` followed by 2x2 average pooling: (N, C, H, W) -> (N, out, H / 2, W / 2), rounded up.

    The 1x1 convolution of the skip connection is applied after pooling: the result is the same, and it is cheaper.
    """

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv1(x if self.first else F.relu(x)))
        if x.shape[-2] % 2 or x.shape[-1] % 2:
            h = F.avg_pool2d(self.conv2(h), 2, ceil_mode=True)
        else:
            h = pooled_conv(h, self.conv2.normalized_weight(), self.conv2.bias)
        return h + self.skip(F.avg_pool2d(x, 2, ceil_mode=True))


class UpBlock(Block):
    """A `Block` after nearest-neighbour upsampling: (N, C, h, w) -> (N, out, *size).

    Each side in `size` is twice that of x, or one less. The 1x1 convolution of the skip connection is applied before
    upsampling: the result is the same, and it is cheaper.
    """

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        if size[0] % 2 or size[1] % 2:
            h = self.conv1(F.interpolate(F.relu(x), size=size, mode="nearest"))
        else:
            h = upsampled_conv(F.relu(x), self.conv1.normalized_weight(), self.conv1.bias)
        return self.conv2(F.relu(h)) + F.interpolate(self.skip(x), size=size, mode="nearest")


class UNetDiscriminator(Discriminator):
    """UNet discriminator with a global and a per-pixel head: our fixed-depth variant of Schonfeld et al. (2020).

    It maps images (N, in_channels, H, W) to logits ((N, 1), (N, 1, H, W)).

    It is their network for 128 pixels, used at every resolution, while theirs has one more level at 256. It has five
    levels of 1, 2, 4, 8 and 16 times `channels`, BigGAN's blocks, average pooling, nearest-neighbour upsampling,
    concatenated skips, spectral norm on all but the last 1x1 convolution, and orthogonal initialisation. The global
    head takes 16 times the mean of the features instead of their sum. The two are equal at 128 pixels, and the mean
    does not grow with the size of the image. Any size works; multiples of 32 pool evenly. At 64 channels it has
    31,481,602 parameters.
    """

    mixes_images = False
    MULTIPLES = (1, 2, 4, 8, 16)

    def __init__(self, channels: int = 64, in_channels: int = 3) -> None:
        super().__init__()
        widths = [channels * multiple for multiple in self.MULTIPLES]
        inputs = [in_channels, *widths[:-1]]
        self.down = nn.ModuleList(
            DownBlock(*width, first=not n) for n, width in enumerate(zip(inputs, widths, strict=True))
        )
        outputs = [*widths[-2::-1], channels]
        inputs = [widths[-1], *(2 * width for width in outputs[:-1])]  # twice the width, because skips are concatenated
        self.up = nn.ModuleList(UpBlock(*width) for width in zip(inputs, outputs, strict=True))
        self.global_head = SpectralConv2d(widths[-1], 1, 1)
        self.pixel_head = nn.Conv2d(channels, 1, 1)
        nn.init.orthogonal_(self.pixel_head.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        skips = [x]
        for block in self.down:
            skips.append(block(skips[-1]))
        h = skips.pop()
        features = 16 * F.relu(h).mean((2, 3), keepdim=True)  # 16 is the number of positions at 128 pixels
        for block in self.up:
            skip = skips.pop()
            h = block(h, skip.shape[-2:])
            if skips:  # the last one is the image itself, which is not concatenated
                h = torch.cat([h, skip], dim=1)
        return self.global_head(features).flatten(1), self.pixel_head(h)


class PatchDiscriminator(Discriminator):
    """PatchGAN discriminator of Isola et al. (2017) with three strided layers, as Esser et al. (2021) use it.

    It maps images (N, in_channels, H, W) to logits ((N, 1, h, w),), each for a patch with a side of 70 pixels. H must
    be at least 24; if it is a multiple of 8, h is H / 8 - 2. The network has 4x4 convolutions of 1, 2, 4 and 8 times
    `channels`, batch normalisation on all but the first and the last layer, leaky ReLU of slope 0.2, and weights that
    are initialised from N(0, 0.02). At 64 channels it has 2,765,633 parameters.

    Batch normalisation uses only the statistics of the current batch on one worker, in eval mode too. The network of
    Esser et al. keeps running statistics, but no training step reads them, and DDP would overwrite them between a
    forward pass and its backward pass.
    """

    mixes_images = True

    def __init__(self, channels: int = 64, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for multiple, stride in ((2, 2), (4, 2), (8, 1)):
            layers += [
                nn.Conv2d(width, multiple * channels, 4, stride, 1, bias=False),
                nn.BatchNorm2d(width := multiple * channels, track_running_stats=False),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1, 0.02)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.layers(x),)


class EqualizedConv2d(nn.Conv2d):
    """A convolution with equalised learning rate (Karras et al. 2018).

    Weights are initialised from N(0, 1) and divided by the square root of their fan-in at run time. Biases start at 0.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        _start_equalized(self)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, _equalized(self.weight), self.bias, self.stride, self.padding)


class EqualizedLinear(nn.Linear):
    """A fully connected layer with equalised learning rate, as `EqualizedConv2d`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        _start_equalized(self)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _equalized(self.weight), self.bias)


def _start_equalized(layer: nn.Conv2d | nn.Linear) -> None:
    nn.init.normal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _equalized(weight: Tensor) -> Tensor:
    return weight / math.sqrt(weight[0].numel())


class ResidualBlock(nn.Module):
    """The residual block of StyleGAN2's discriminator. It halves the size, with a blur before each strided layer."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = EqualizedConv2d(in_channels, in_channels, 3, padding=1)
        self.conv2 = EqualizedConv2d(in_channels, out_channels, 3, stride=2)
        self.skip = EqualizedConv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = leaky(self.conv1(x))
        h = leaky(self.conv2(binomial_blur(h, padding=2)))
        return (h + self.skip(binomial_blur(x, padding=1, stride=2))) * math.sqrt(0.5)


def leaky(x: Tensor) -> Tensor:
    """Apply leaky ReLU with slope 0.2 and StyleGAN2's gain of sqrt(2)."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


def binomial_blur(x: Tensor, padding: int, stride: int = 1) -> Tensor:
    """Apply the filter [1, 3, 3, 1] / 8 along both axes, after padding with `padding` (at most 3) zeros on every side.

    The filter is computed as the mean of two neighbours, three times in a row. So no kernel must be kept as a buffer,
    which DDP would overwrite between a forward pass and its backward pass.
    """
    for n in range(3):
        x = F.avg_pool2d(x, 2, stride if n == 2 else 1, padding=int(n < padding))
    return x


def minibatch_deviation(x: Tensor, most: int = 4) -> Tensor:
    """Return the mean standard deviation of features over groups of images (Karras et al. 2018), in fp32.

    Args:
        x: Features (N, C, H, W).
        most: Largest size of a group. The size is the largest divisor of N up to this number. As in StyleGAN2, a group
            takes its images from the batch at equal distances.

    Returns:
        The deviation (N, 1, 1, 1) of the group of each image.
    """
    size = max(size for size in range(1, most + 1) if len(x) % size == 0)
    groups = x.float().unflatten(0, (size, -1))
    deviation = (groups.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3))
    return deviation.repeat(size).view(-1, 1, 1, 1)


class StyleGANDiscriminator(Discriminator):
    """The residual discriminator of StyleGAN2 (Karras et al. 2020): our fixed-depth variant.

    It maps images (N, in_channels, H, W) with sides of at least 32 pixels to logits ((N, 1),).

    It is their network for 128 pixels, used at every resolution, while theirs has one more block at 256. It has five
    residual blocks of 4, then 8 times `channels`, blurred downsampling, leaky ReLU, equalised learning rate, and the
    minibatch standard deviation at 4x4. For other sizes the last feature map is averaged to 4x4 (below 128 pixels its
    values are repeated). At 64 channels it has 28,389,121 parameters.
    """

    mixes_images = True
    MULTIPLES: ClassVar[tuple[int, ...]] = (4, 8, 8, 8, 8, 8)
    SIDE = 4  # side of the feature map that the head takes

    def __init__(self, channels: int = 64, in_channels: int = 3) -> None:
        super().__init__()
        widths = [channels * multiple for multiple in self.MULTIPLES]
        last = widths[-1]
        self.from_image = EqualizedConv2d(in_channels, widths[0], 1)
        self.blocks = nn.Sequential(*map(ResidualBlock, widths[:-1], widths[1:]))
        self.conv = EqualizedConv2d(last + 1, last, 3, padding=1)
        self.linear1 = EqualizedLinear(last * self.SIDE**2, last)
        self.linear2 = EqualizedLinear(last, 1)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        h = F.adaptive_avg_pool2d(self.blocks(leaky(self.from_image(x))), self.SIDE)
        deviation = minibatch_deviation(h).to(h.dtype).expand(-1, 1, self.SIDE, self.SIDE)
        h = leaky(self.conv(torch.cat([h, deviation], dim=1)))
        return (self.linear2(leaky(self.linear1(h.flatten(1)))),)


KINDS: dict[str, type[UNetDiscriminator | PatchDiscriminator | StyleGANDiscriminator]] = {
    "unet": UNetDiscriminator,
    "patch": PatchDiscriminator,
    "stylegan": StyleGANDiscriminator,
}


def build_discriminator(kind: str, channels: int = 64) -> Discriminator:
    """Build a discriminator of RGB images. Its weights are drawn from torch's global generator.

    Args:
        kind: "unet" (Schonfeld et al. 2020), "patch" (Isola et al. 2017) or "stylegan" (Karras et al. 2020).
        channels: Base width; 64 in the published networks.

    Raises:
        UserError: if there is no such kind.
    """
    if kind not in KINDS:
        raise UserError(f"unknown discriminator {kind!r}; choose one of {', '.join(KINDS)}")
    return KINDS[kind](channels)
