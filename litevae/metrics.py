"""Image quality metrics with named protocols, their exact mean over a data set, and artefacts of an autoencoder."""

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
    """Convert float images in [-1, 1] to uint8, rounded to the nearest level. uint8 images are returned unchanged.

    Raises:
        UserError: if a value is NaN or infinite.
    """
    if x.dtype == torch.uint8:
        return x
    if not x.isfinite().all():
        raise UserError("an image to be measured has NaN or infinite pixels; the model's output is broken")
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Return the PSNR (N,) of each pair of images, in dB and float64, at most 100.

    Args:
        x: Images (N, C, H, W), float in [-1, 1] or uint8.
        y: Images of the same shape, float in [-1, 1] or uint8.
    """
    mse = (quantize(x).double() - quantize(y).double()).square().mean(dim=(1, 2, 3))
    return (10 * torch.log10(255**2 / mse)).clamp(max=100)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Return the SSIM (N,) of each pair of images (Wang et al. 2004), in float64.

    The value is that of torchmetrics, but without its fp32 convolutions: on a GPU they round to TF32, which is too
    coarse for variances, because these are differences of squares.

    Args:
        x: Images (N, C, H, W), float in [-1, 1] or uint8, of at least 6x6 pixels.
        y: Images of the same shape, float in [-1, 1] or uint8.
    """
    x, y = quantize(x).double(), quantize(y).double()
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (blur(z, 1.5, 5) for z in (x, y, x * x, y * y, x * y))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    square, product = mean_x**2 + mean_y**2, mean_x * mean_y
    variance, covariance = mean_xx + mean_yy - square, mean_xy - product
    similarity = (2 * product + c1) * (2 * covariance + c2) / ((square + c1) * (variance + c2))
    return similarity.mean(dim=(1, 2, 3))


class Mean:
    """An exact mean: it does not depend on how the values are batched or ordered."""

    def __init__(self) -> None:
        self.total, self.count = Fraction(0), 0

    def add(self, values: Tensor) -> None:
        """Add all elements of a tensor."""
        self.total += sum(map(Fraction, values.double().flatten().tolist()), Fraction(0))
        self.count += values.numel()

    def value(self) -> float:
        """Return the mean; NaN if nothing was added."""
        return float(self.total / self.count) if self.count else float("nan")


def bicubic_baseline(x: Tensor, factor: int = 8) -> Tensor:
    """Downsample images (N, C, H, W) in [-1, 1] by `factor` and upsample them again, both bicubic."""
    size = x.shape[-2:]
    small = (size[0] // factor, size[1] // factor)
    with torch.autocast(x.device.type, enabled=False):
        for target in (small, size):
            x = F.interpolate(x.float(), size=target, mode="bicubic", antialias=True)
    return x.clamp(-1, 1)


# --- artefacts of an autoencoder ------------------------------------------------------------------------------


def constant_colours(side: int) -> Tensor:
    """Return images (9, 3, side, side) in [-1, 1] of constant colour: the 8 corners of the RGB cube, and mid grey."""
    colours = [*product((-1.0, 1.0), repeat=3), (0.0, 0.0, 0.0)]
    return torch.tensor(colours)[:, :, None, None].expand(-1, -1, side, side).contiguous()


def artefacts(images: Tensor, border: int) -> tuple[float, float | None]:
    """Measure the patterns that an autoencoder adds to images of constant colour.

    Args:
        images: Reconstructions (N, 3, H, W) in [-1, 1] of images of constant colour.
        border: Number of pixels to crop at each side, because padding makes borders different. If it is the side of a
            latent element and H and W are multiples of it, patterns with this period fall on exactly one frequency.

    Returns:
        The RMS of the difference to the mean colour of each image (the spectrum without its DC part), in levels of
        0..255; and the period in pixels of the strongest frequency, or None if the images are constant.

    Raises:
        UserError: if pixels are NaN or infinite, or nothing is left within the borders.
    """
    height, width = (side - 2 * border for side in images.shape[-2:])
    if min(height, width) < 2:
        raise UserError(
            f"borders of {border} pixels leave nothing of an image of {images.shape[-1]}x{images.shape[-2]}"
        )
    if not images.isfinite().all():
        raise UserError("a reconstruction of constant colour has NaN or infinite pixels; the model's output is broken")
    inner = images[..., border : border + height, border : border + width].double() * 127.5
    waves = inner - inner.mean(dim=(2, 3), keepdim=True)
    rms = waves.square().mean().sqrt().item()
    power = torch.fft.rfft2(waves).abs().square().sum(dim=(0, 1))
    if rms < 1e-6:  # only rounding errors
        return rms, None
    row, column = divmod(int(power.argmax()), power.shape[1])
    frequency = math.hypot(min(row, height - row) / height, column / width)
    return rms, 1 / frequency


def imbalance(maps: Tensor, share: float = 0.01) -> Tensor:
    """Return how much feature maps are concentrated in a few positions (Section 4.2).

    It is the share of the squared magnitude, summed over channels, that lies in the strongest positions. It equals
    `share` for even maps, and 1 if all other positions, or all positions, are zero.

    Args:
        maps: Feature maps (N, C, H, W).
        share: Share of positions that count as the strongest, but at least one position.

    Returns:
        The imbalance (N,) of each image, float64.
    """
    energy = maps.double().square().sum(1).flatten(1)
    count = max(1, round(share * energy.shape[1]))
    total = energy.sum(1)
    return torch.where(total > 0, energy.topk(count, dim=1).values.sum(1) / total, 1.0)
