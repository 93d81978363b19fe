"""Image quality under named protocols, one value per image, and their exact mean over a data set; marks that an
autoencoder leaves of its own."""

import math
from fractions import Fraction
from itertools import product

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
    "artefacts": "reconstructions of the RGB cube's 8 corners and of mid grey, clipped, not quantised, borders of a "
    "latent's element cropped away: RMS of the distance to each image's own mean colour, in levels of 0..255; and the "
    "period in pixels of the strongest frequency of their summed power spectra",
    "imbalance": "mean over images of the share of the squared magnitude of the decoder's last feature maps (before "
    "its last normalisation), summed over channels, that the strongest 1 % of positions hold; of even maps 0.01",
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


# --- an autoencoder's own marks -------------------------------------------------------------------------------


def constant_colours(side: int) -> Tensor:
    """The 8 corners of the RGB cube and mid grey: (9, 3, side, side) in [-1, 1]."""
    colours = [*product((-1.0, 1.0), repeat=3), (0.0, 0.0, 0.0)]
    return torch.tensor(colours)[:, :, None, None].expand(-1, -1, side, side).contiguous()


def artefacts(images: Tensor, border: int) -> tuple[float, float | None]:
    """What an autoencoder adds to images of constant colour, of which nothing is in the image.

    Args:
        images: reconstructions (N, 3, H, W) in [-1, 1] of images that are constant each.
        border: pixels of each side that are cropped away: padding makes borders different. Where it is a latent's
            element and H and W are multiples of it, patterns of that period fall on one frequency.

    Returns:
        RMS of what is not the image's mean colour (the spectrum without its DC part), in levels of 0..255, and the
        period in pixels of the strongest frequency; None where all is constant.

    Raises:
        UserError: NaN or infinite pixels; nothing is left within the borders.
    """
    height, width = (side - 2 * border for side in images.shape[-2:])
    if min(height, width) < 2:
        raise UserError(f"borders of {border} pixels leave nothing of {images.shape[-1]}x{images.shape[-2]}")
    if not images.isfinite().all():
        raise UserError("a reconstruction of constant colour has NaN or infinite pixels; the model's output is broken")
    inner = images[..., border : border + height, border : border + width].double() * 127.5
    waves = inner - inner.mean(dim=(2, 3), keepdim=True)
    rms = waves.square().mean().sqrt().item()
    power = torch.fft.rfft2(waves).abs().square().sum(dim=(0, 1))
    if rms < 1e-6:  # rounding
        return rms, None
    row, column = divmod(int(power.argmax()), power.shape[1])
    frequency = math.hypot(min(row, height - row) / height, column / width)
    return rms, 1 / frequency


def imbalance(maps: Tensor, share: float = 0.01) -> Tensor:
    """How much of feature maps is in few places (Section 4.2): (N, C, H, W) -> (N,) float64, the share of their squared
    magnitude, summed over channels, that the strongest `share` of positions (at least one) hold. Of even maps it is
    `share`; 1: there is nothing elsewhere, or nothing at all."""
    energy = maps.double().square().sum(1).flatten(1)
    count = max(1, round(share * energy.shape[1]))
    total = energy.sum(1)
    return torch.where(total > 0, energy.topk(count, dim=1).values.sum(1) / total, 1.0)
