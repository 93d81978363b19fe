"""Building blocks of the encoders and the decoder: ResBlock, normalisations, self-modulated convolution, attention."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from diffusers.models.modeling_utils import get_parameter_dtype
from torch import Tensor, nn

Norm = Literal["group", "smc", "batch", "instance", "layer", "rms", "none"]
NORMS: tuple[str, ...] = get_args(Norm)


class SMC(nn.Module):
    """Self-modulated convolution (paper, Eq. 3).

    The weights are scaled by a learned s per input map, then demodulated to unit norm per output map, and multiplied by
    one learned gain. The scales do not depend on the data, so the whole batch uses the same weight. The weight is
    computed in fp32.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.scales = nn.Parameter(torch.ones(in_channels))
        self.gain = nn.Parameter(torch.ones(1))

    def weight(self) -> Tensor:
        """Return the modulated and demodulated weight in fp32."""
        with torch.autocast(self.conv.weight.device.type, enabled=False):
            w = self.conv.weight.float() * self.scales.float().view(1, -1, 1, 1)
            return w * torch.rsqrt(w.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8) * self.gain.float()

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.conv.bias is None else self.conv.bias.to(x.dtype)
        return F.conv2d(x, self.weight().to(x.dtype), bias, padding=self.conv.padding)

    @torch.no_grad()
    def bake(self) -> nn.Conv2d:
        """Return a plain convolution with equal output."""
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


class ExactConv2d(nn.Conv2d):
    """A convolution that is computed in fp32, outside autocast, whatever the dtype of its input and weights.

    It is for the layers that output moments. It converts its weights itself, so that what wraps its `forward`
    (layerwise casting, offloading) works.
    """

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            return self._conv_forward(x.to(dtype), self.weight.to(dtype), bias)


def compute_dtype(layer: nn.Conv2d) -> torch.dtype:
    """Return the dtype that a layer computes in: that of its weights, or what layerwise casting turns them into."""
    dtype = layer.weight.dtype
    return dtype if dtype.itemsize > 1 else get_parameter_dtype(layer)


def variance_preserving_conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    padding: int | None = None,
    kind: type[nn.Conv2d] = nn.Conv2d,
) -> nn.Conv2d:
    """Build a convolution that keeps the variance of its input at initialisation.

    It is for the main path, outside the residual branches. PyTorch's default initialisation divides the variance by
    three, and there are a dozen such convolutions in a row between the input image and its reconstruction.
    """
    conv = kind(in_channels, out_channels, kernel_size, stride, kernel_size // 2 if padding is None else padding)
    nn.init.normal_(conv.weight, std=(in_channels * kernel_size**2) ** -0.5)
    nn.init.zeros_(conv.get_parameter("bias"))
    return conv


def small_posterior(conv: nn.Conv2d) -> None:
    """Initialise the bias of a layer that outputs moments, so that the posterior starts with std e^-3.

    With std 1, noise would hide the mean until training has learned to reduce it.
    """
    nn.init.constant_(conv.get_parameter("bias")[conv.out_channels // 2 :], -6.0)


# With fewer positions in a batch (of the smaller map), summing the weights of a convolution takes longer than it saves.
# Measured on a CPU, the limit lies between 128 and 512.
MIN_POSITIONS_FOR_FUSION = 256


def upsampled_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply nearest-neighbour upsampling by 2 and a 3x3 convolution: (N, C, h, w) -> (N, out, 2h, 2w).

    It takes 4/9 of the multiplications. An output pixel sees only 2x2 pixels of `x`, so the weights that apply to the
    same pixel can be summed. The result is a transposed 4x4 convolution of stride 2.
    """
    # An exported program serves all sizes, so it must not depend on this one.
    if not torch.compiler.is_exporting() and x.shape[0] * x.shape[2] * x.shape[3] < MIN_POSITIONS_FOR_FUSION:
        return F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)
    return F.conv_transpose2d(x, _neighbours(weight.flip(2, 3).transpose(0, 1)), bias, stride=2, padding=1)


def pooled_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a 3x3 convolution and 2x2 average pooling: (N, C, 2h, 2w) -> (N, out, h, w).

    It takes 4/9 of the multiplications, because both together are a 4x4 convolution of stride 2. The height and width
    of `x` must be even.
    """
    if not torch.compiler.is_exporting() and x.shape[0] * x.shape[2] * x.shape[3] < 4 * MIN_POSITIONS_FOR_FUSION:
        return F.avg_pool2d(F.conv2d(x, weight, bias, padding=1), 2)
    return F.conv2d(x, _neighbours(weight) / 4, bias, stride=2, padding=1)


def _neighbours(weight: Tensor) -> Tensor:
    """Sum each 2x2 neighbourhood of a kernel that is padded with zeros: 3x3 -> 4x4."""
    weight = F.pad(weight, (1, 1, 1, 1))
    weight = weight[:, :, 1:] + weight[:, :, :-1]
    return weight[..., 1:] + weight[..., :-1]


class Upsample(nn.Sequential):
    """Nearest-neighbour upsampling by 2 and a 3x3 convolution: (N, C, h, w) -> (N, C, 2h, 2w)."""

    def __init__(self, width: int):
        super().__init__(nn.Upsample(scale_factor=2), variance_preserving_conv(width, width, 3))

    def forward(self, x: Tensor) -> Tensor:
        conv = self[1]
        replaced = type(conv) is not nn.Conv2d  # e.g. by a faster kernel
        # Layerwise casting and offloading bring the weights only while the layer's own `forward` runs.
        if replaced or hasattr(conv, "_diffusers_hook") or hasattr(conv, "_hf_hook"):
            return super().forward(x)
        assert isinstance(conv, nn.Conv2d)
        return upsampled_conv(x, conv.weight, conv.bias)


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of each position of (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class RMSNorm2d(nn.RMSNorm):
    """RMS normalisation over the channels of each position of (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        exact = x.to(self.weight.dtype)  # autocast runs the other normalisations in fp32, but not this one
        return super().forward(exact.movedim(1, -1)).movedim(-1, 1).to(x.dtype)


def group_norm(channels: int, group_width: int = 1, eps: float = 1e-6) -> nn.GroupNorm:
    """Build a group normalisation with 32 groups, as in SD-VAE and ADM.

    There are fewer groups if the channels do not divide evenly; or if there are fewer than 128 channels (the least in
    SD-VAE) and 32 groups would be narrower than `group_width`.
    """
    return nn.GroupNorm(math.gcd(32, channels if channels >= 128 else max(1, channels // group_width)), channels, eps)


def normalisation(norm: Norm, channels: int, group_width: int = 1, eps: float = 1e-6) -> nn.Module:
    """Build a normalisation of (N, C, H, W) with learned scales and, except for "rms", learned shifts.

    For "smc" and "none" it is the identity.
    """
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
    """Residual block: twice (norm -> SiLU -> 3x3 convolution), plus the input (Appendix G).

    If the number of channels changes, the input is passed through a 1x1 convolution.

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        norm: Normalisation. "smc" uses none and makes both convolutions self-modulated; "none" is the same block after
            `bake`.
        group_width: Smallest width of a group of the group normalisation.
    """

    gradient_checkpointing = False  # set by diffusers: keep only the input, and compute the block again in backward
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
        # As in ADM, a block adds zero at initialisation. For SMC this needs a gain of zero, because demodulation
        # removes the scale of the weight.
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
    """Single-head self-attention over positions, with a residual connection, as in SD-VAE's mid block."""

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
    """Build the middle of SD-VAE's encoder and decoder: ResBlock, attention, ResBlock."""
    return nn.Sequential(
        ResBlock(width, width, norm, group_width),
        Attention(width, group_width),
        ResBlock(width, width, norm, group_width),
    )


def bake(module: nn.Module) -> None:
    """Replace every `SMC` within `module` by a plain convolution with equal output, in place."""
    for name, child in module.named_children():
        if isinstance(child, SMC):
            setattr(module, name, child.bake())
        else:
            bake(child)
