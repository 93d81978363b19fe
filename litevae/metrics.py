"""Image quality under named protocols, one value per image, and their exact mean over a data set."""

from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

from litevae.errors import UserError
from litevae.losses import blur

PROTOCOLS = {
    "psnr": "mean over images of 10 log10(255^2 / MSE) in dB; RGB quantised to uint8, MSE over pixels and channels, "
    "at most 100 dB an image",
    "ssim": "mean over images of SSIM, as torchmetrics has it: RGB quantised to uint8, Gaussian window 11x11 with "
    "sigma 1.5, K1 0.01, K2 0.03, borders mirrored and counted, mean over pixels and channels",
    "bicubic": "antialiased bicubic (a = -0.5, as Pillow) down by the model's factor and up again, not "
    "quantised in between",
}


def quantize(x: Tensor) -> Tensor:
    """Float images in [-1, 1] to uint8, rounded to the nearest level; uint8 passes.

    Raises:
        UserError: a value is NaN or infinite.
    """
    if x.dtype == torch.uint8:
        return x
    if not x.isfinite().all():
        raise UserError("an image to be measured has NaN or infinite pixels; the model's output is broken")
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """PSNR in dB of each pair of images: (N, C, H, W) in [-1, 1] or uint8 -> (N,) float64."""
    mse = (quantize(x).double() - quantize(y).double()).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(255**2 / mse)).clamp(max=100)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """SSIM (Wang et al. 2004) of each pair of images: (N, C, H, W) in [-1, 1] or uint8, at least 6x6 -> (N,) float64.

    torchmetrics' value without its fp32 convolutions, which on a GPU round to TF32 what is a difference of squares.
    """
    x, y = quantize(x).double(), quantize(y).double()
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (blur(z, 1.5, 5) for z in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    square, product = mean_x**2 + mean_y**2, mean_x * mean_y
    variance, covariance = mean_xx + mean_yy - square, mean_xy - product
    similarity = (2 * product + c1) * (2 * covariance + c2) / ((square + c1) * (variance + c2))
    return similarity.mean(dim=(1, 2, 3))


class Mean:
    """A mean that is the same to the last bit however the values are batched, ordered or spread over workers."""

    def __init__(self) -> None:
        self.total, self.count = Fraction(0), 0

    def add(self, values: Tensor) -> None:
        self.total += sum(map(Fraction, values.double().flatten().tolist()), Fraction(0))
        self.count += values.numel()

    def merge(self, other: "Mean") -> None:
        self.total += other.total
        self.count += other.count

    def value(self) -> float:
        """NaN where nothing was added."""
        return float(self.total / self.count) if self.count else float("nan")


def bicubic_baseline(x: Tensor, factor: int = 8) -> Tensor:
    """What is left of an image after bicubic down- and upsampling by `factor`: (N, C, H, W) in [-1, 1] -> same."""
    size = x.shape[-2:]
    small = (size[0] // factor, size[1] // factor)
    with torch.autocast(x.device.type, enabled=False):
        for target in (small, size):
            x = F.interpolate(x.float(), size=target, mode="bicubic", antialias=True)
    return x.clamp(-1, 1)
