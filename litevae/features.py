"""The networks of the encoder, for feature extraction and aggregation. None of them changes the resolution."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litevae.layers import ExactConv2d, LayerNorm2d, ResBlock, variance_preserving_conv


class FlatUNet(nn.Module):
    """ADM's UNet without down- or upsampling (Appendix G): (N, in, H, W) -> (N, out, H, W).

    Its width goes through `channels` * `mults` and back. Skip connections are concatenated.

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        channels: Base width.
        mults: Multiples of the base width, one per level.
        blocks: Number of ResBlocks per level.
        last: Class of the last convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int,
        mults: tuple[int, ...],
        blocks: int = 2,
        last: type[nn.Conv2d] = nn.Conv2d,
    ):
        super().__init__()
        self.conv_in = variance_preserving_conv(in_channels, channels, 3)
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
        self.conv_out = variance_preserving_conv(width, out_channels, 3, kind=last)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        skips = []  # the output of conv_in is no skip, so the blocks of `up` pop exactly what those of `down` push
        for block in self.down:
            x = block(x)
            skips.append(x)
        x = self.mid(x)
        for block in self.up:
            x = block(torch.cat([x, skips.pop()], dim=1))
        return self.conv_out(x)


class NAFNet(nn.Module):
    """A row of NAFNet blocks that replaces `FlatUNet` (Appendix D.3): (N, in, H, W) -> (N, out, H, W).

    The paper names the network but gives no sizes. Here it has the largest width of the `FlatUNet` with the same
    arguments, and as many blocks as that has ResBlocks.
    """

    def __init__(self, in_channels: int, out_channels: int, channels: int, mults: tuple[int, ...], blocks: int = 2):
        super().__init__()
        width, depth = channels * max(mults), 2 * len(mults) * blocks + 2
        self.conv_in = variance_preserving_conv(in_channels, width, 3)
        self.blocks = nn.Sequential(*(NAFBlock(width) for _ in range(depth)))
        self.conv_out = variance_preserving_conv(width, out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.blocks(self.conv_in(x)))


class NAFBlock(nn.Module):
    """The block of NAFNet (Chen et al. 2022), which has gates instead of activations.

    A gate is the product of the two halves of the channels. The block has two residual branches: norm -> 1x1 ->
    depthwise 3x3 -> gate -> scale by a function of the channel means -> 1x1, and norm -> 1x1 -> gate -> 1x1. As in
    Chen et al., each branch starts at zero.
    """

    def __init__(self, channels: int):
        super().__init__()
        double = 2 * channels
        self.norm1 = LayerNorm2d(channels, eps=1e-6)
        self.expand1 = nn.Conv2d(channels, double, 1)
        self.depthwise = nn.Conv2d(double, double, 3, padding=1, groups=double)
        self.scale = nn.Conv2d(channels, channels, 1)
        self.project1 = nn.Conv2d(channels, channels, 1)
        self.norm2 = LayerNorm2d(channels, eps=1e-6)
        self.expand2 = nn.Conv2d(channels, double, 1)
        self.project2 = nn.Conv2d(channels, channels, 1)
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = _gate(self.depthwise(self.expand1(self.norm1(x))))
        x = x + self.beta * self.project1(h * self.scale(h.mean(dim=(2, 3), keepdim=True)))
        return x + self.gamma * self.project2(_gate(self.expand2(self.norm2(x))))


def _gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=1)
    return a * b


class ViT(nn.Module):
    """A vision transformer on patches of one element (Appendix D.5): (N, in, H, W) -> (N, out, H, W).

    The position embedding is learned on a `grid` x `grid` and interpolated for other sizes. So the network runs at any
    size, but it is trained for one; therefore the paper calls it resolution-dependent. The paper states only the number
    of parameters, 0.84 M at 24 outputs. 4 layers of width 128 with a 3x3 convolution at the end, as in U-ViT, have this
    number.

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        width: Width of the tokens. Attention heads have width 32.
        grid: Side of the map that the position embedding is learned for.
        depth: Number of layers.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int, grid: int = 16, depth: int = 4):
        super().__init__()
        self.embed = nn.Linear(in_channels, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, width, grid, grid))
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, width // 32, 4 * width, dropout=0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, out_channels)
        self.conv_out = variance_preserving_conv(out_channels, out_channels, 3, kind=ExactConv2d)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        positions: Tensor = self.positions
        if positions.shape[-2:] != (h, w):
            positions = F.interpolate(positions, size=(h, w), mode="bicubic")
        tokens = self.embed(x.flatten(2).mT)
        tokens = tokens + positions.flatten(2).mT.to(tokens.dtype)
        return self.conv_out(self.project(self.norm(self.layers(tokens))).mT.reshape(n, -1, h, w))
