"""Building blocks of the encoders and the decoder: ResBlock and its normalisations, self-modulated convolution,
attention."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["group", "smc", "batch", "instance", "layer", "rms", "none"]
NORMS: tuple[str, ...] = get_args(Norm)


class SMC(nn.Module):
    """Self-modulated convolution (paper, Eq. 3): weights scaled per input map by a learned s, then demodulated to unit
    norm per output map, with one learned gain. Nothing depends on the data: one weight serves the batch. In fp32."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.scales = nn.Parameter(torch.ones(in_channels))
        self.gain = nn.Parameter(torch.ones(1))

    def weight(self) -> Tensor:
        with torch.autocast(self.conv.weight.device.type, enabled=False):
            w = self.conv.weight.float() * self.scales.float().view(1, -1, 1, 1)
            return w * torch.rsqrt(w.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8) * self.gain.float()

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight().to(self.conv.weight.dtype), self.conv.bias, padding=self.conv.padding)

    @torch.no_grad()
    def bake(self) -> nn.Conv2d:
        """A plain convolution with equal output."""
        plain = nn.utils.skip_init(
            nn.Conv2d,
            self.conv.in_channels,
            self.conv.out_channels,
            self.conv.kernel_size,
            padding=self.conv.padding,
            device=self.conv.weight.device,
            dtype=self.conv.weight.dtype,
        )
        plain.weight.copy_(self.weight())
        plain.bias.copy_(self.conv.bias)
        return plain.train(self.training)


def variance_preserving_conv(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int | None = None
) -> nn.Conv2d:
    """A convolution outside the residual branches, on the path that carries the signal. It starts out keeping the
    variance; PyTorch's default shrinks it threefold, and there are a dozen in a row between image and image."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2 if padding is None else padding)
    nn.init.normal_(conv.weight, std=(in_channels * kernel_size**2) ** -0.5)
    nn.init.zeros_(conv.get_parameter("bias"))
    return conv


def small_posterior(conv: nn.Conv2d) -> None:
    """Lets a layer that gives moments start with a posterior of std e^-3: at 1, noise drowns the mean until training
    has found that out."""
    nn.init.constant_(conv.get_parameter("bias")[conv.out_channels // 2 :], -6.0)


# Positions of a batch (of the smaller map) below which summing a convolution's weights takes longer than it saves; on
# a CPU, where it was measured, from 128 to 512.
MIN_POSITIONS_FOR_FUSION = 256


def upsampled_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution of nearest x2: (N, C, h, w) -> (N, out, 2h, 2w), with 4/9 of its products.

    An output pixel sees but 2x2 pixels of `x`. With the weights that meet the same one summed, it is a transposed 4x4
    convolution of stride 2.
    """
    if x.shape[0] * x.shape[2] * x.shape[3] < MIN_POSITIONS_FOR_FUSION:
        return F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)
    return F.conv_transpose2d(x, _neighbours(weight.flip(2, 3).transpose(0, 1)), bias, stride=2, padding=1)


def pooled_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """2x2 means of a 3x3 convolution: (N, C, 2h, 2w) -> (N, out, h, w), with 4/9 of its products: a 4x4 convolution of
    stride 2. H and W are even."""
    if x.shape[0] * x.shape[2] * x.shape[3] < 4 * MIN_POSITIONS_FOR_FUSION:
        return F.avg_pool2d(F.conv2d(x, weight, bias, padding=1), 2)
    return F.conv2d(x, _neighbours(weight) / 4, bias, stride=2, padding=1)


def _neighbours(weight: Tensor) -> Tensor:
    """Sums of neighbours, borders among them: 3x3 -> 4x4."""
    weight = F.pad(weight, (1, 1, 1, 1))
    weight = weight[:, :, 1:] + weight[:, :, :-1]
    return weight[..., 1:] + weight[..., :-1]


class Upsample(nn.Sequential):
    """Nearest x2, then a convolution that keeps the width: (N, C, h, w) -> (N, C, 2h, 2w)."""

    def __init__(self, width: int):
        super().__init__(nn.Upsample(scale_factor=2), variance_preserving_conv(width, width, 3))

    def forward(self, x: Tensor) -> Tensor:
        conv = self[1]
        if type(conv) is not nn.Conv2d:  # another kernel took its place
            return super().forward(x)
        return upsampled_conv(x, conv.weight, conv.bias)


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of each position of (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class RMSNorm2d(nn.RMSNorm):
    """Over the channels of each position of (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)  # autocast brings the other normalisations to fp32, and not this one
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def group_norm(channels: int, group_width: int = 1, eps: float = 1e-6) -> nn.GroupNorm:
    """32 groups as in SD-VAE and ADM; fewer where they would be uneven or, below SD-VAE's 128 channels, narrower than
    `group_width`."""
    return nn.GroupNorm(math.gcd(32, channels if channels >= 128 else max(1, channels // group_width)), channels, eps)


def normalisation(norm: Norm, channels: int, group_width: int = 1, eps: float = 1e-6) -> nn.Module:
    """Over (N, C, H, W), with learned scales, and shifts but for RMS. Nothing for "smc" and "none"."""
    if norm == "group":
        return group_norm(channels, group_width, eps)
    if norm == "batch":
        return nn.BatchNorm2d(channels, eps)
    if norm == "instance":
        return nn.InstanceNorm2d(channels, eps, affine=True)
    if norm == "layer":
        return LayerNorm2d(channels, eps)
    return RMSNorm2d(channels, eps) if norm == "rms" else nn.Identity()


class ResBlock(nn.Module):
    """(norm) -> SiLU -> conv3x3, twice, plus the input, through a 1x1 conv where the width changes (Appendix G).

    norm="smc": no normalisation, both convolutions self-modulated; norm="none": what bake() makes of it.
    `group_width` is the least width of a normalisation group.
    """

    gradient_checkpointing = False  # diffusers' switch: keep the input alone, and compute the block again to go back
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, in_channels: int, out_channels: int, norm: Norm = "group", group_width: int = 1):
        super().__init__()
        conv: Callable[[int, int], SMC | nn.Conv2d] = (
            SMC if norm == "smc" else partial(nn.Conv2d, kernel_size=3, padding=1)
        )
        self.norm1 = normalisation(norm, in_channels, group_width)
        self.conv1 = conv(in_channels, out_channels)
        self.norm2 = normalisation(norm, out_channels, group_width)
        self.conv2 = conv(out_channels, out_channels)
        self.skip = (
            nn.Identity() if in_channels == out_channels else variance_preserving_conv(in_channels, out_channels, 1)
        )
        # As in ADM, a block adds nothing at the start. (A demodulated weight has no size of its own; its gain has.)
        start = (self.conv2.gain, self.conv2.conv.bias) if isinstance(self.conv2, SMC) else self.conv2.parameters()
        for parameter in start:
            nn.init.zeros_(parameter)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(self._compute, x)
        return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.skip(x) + h


class Attention(nn.Module):
    """Single-head self-attention over positions, with a residual (SD-VAE's mid block)."""

    def __init__(self, channels: int, group_width: int = 1):
        super().__init__()
        self.norm = group_norm(channels, group_width)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (project(tokens).unsqueeze(1) for project in (self.to_q, self.to_k, self.to_v))
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.to_out(out).transpose(1, 2).reshape(n, c, h, w)


def middle(width: int, norm: Norm = "group", group_width: int = 1) -> nn.Sequential:
    """ResBlock, attention, ResBlock: the middle of SD-VAE's encoder and decoder."""
    return nn.Sequential(
        ResBlock(width, width, norm, group_width),
        Attention(width, group_width),
        ResBlock(width, width, norm, group_width),
    )


def bake(module: nn.Module) -> None:
    """Replaces every SMC below `module` by a plain convolution of equal output, in place."""
    for name, child in module.named_children():
        if isinstance(child, SMC):
            setattr(module, name, child.bake())
        else:
            bake(child)
