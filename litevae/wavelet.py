"""Discrete wavelet transforms of images, and their inverses: Haar, and any other wavelet of ptwt.

Bands are stacked on the channel axis as [LL, H, V, D], each with all image channels, in the order and with the signs of
ptwt.
"""

import torch
from torch import Tensor

from litevae.errors import UserError

LEVELS = 3  # three levels give a downsampling factor of f = 8


def haar_dwt(x: Tensor) -> Tensor:
    """Apply one level of the orthonormal Haar transform: (N, C, H, W) -> (N, 4C, H/2, W/2).

    H and W must be even. The transform is differentiable.
    """
    top, bottom = x[..., 0::2, :], x[..., 1::2, :]
    low, high = top + bottom, top - bottom
    return torch.cat(
        [
            low[..., 0::2] + low[..., 1::2],
            high[..., 0::2] + high[..., 1::2],
            low[..., 0::2] - low[..., 1::2],
            high[..., 0::2] - high[..., 1::2],
        ],
        dim=1,
    ).mul(0.5)


def haar_idwt(bands: Tensor) -> Tensor:
    """Invert `haar_dwt`: (N, 4C, H, W) -> (N, C, 2H, 2W)."""
    ll, h, v, d = bands.chunk(4, dim=1)
    rows = [torch.stack([a + b, a - b], dim=-1).flatten(-2) for a, b in ((ll + h, v + d), (ll - h, v - d))]
    return torch.stack(rows, dim=-2).flatten(-3, -2).mul(0.5)


def dwt(x: Tensor, wavelet: str = "haar") -> Tensor:
    """Apply one level of a wavelet transform: (N, C, H, W) -> (N, 4C, H/2, W/2).

    For wavelets longer than Haar the image is continued periodically, and one period of ptwt's coefficients is kept. So
    the bands have exactly half the size, and `idwt` is exact, also for biorthogonal wavelets.

    Args:
        x: Images (N, C, H, W), H and W even.
        wavelet: "haar", or the name of any discrete wavelet of ptwt.

    Raises:
        UserError: if the wavelet is unknown, or has more taps than the image has rows or columns.
    """
    if wavelet == "haar":
        return haar_dwt(x)
    import ptwt

    bank = _bank(wavelet)
    height, width, start = x.shape[-2] // 2, x.shape[-1] // 2, _offset(bank)
    if min(x.shape[-2:]) < bank.dec_len:
        raise UserError(
            f"wavelet {wavelet!r} has {bank.dec_len} taps, longer than the {x.shape[-2]}x{x.shape[-1]} pixels that it "
            f"would transform at its coarsest level; use a larger image or a shorter wavelet"
        )
    low, details = ptwt.wavedec2(x, bank, level=1, mode="periodic")
    return torch.cat([band[..., start : start + height, start : start + width] for band in (low, *details)], dim=1)


def idwt(bands: Tensor, wavelet: str = "haar") -> Tensor:
    """Invert `dwt`: (N, 4C, H, W) -> (N, C, 2H, 2W)."""
    if wavelet == "haar":
        return haar_idwt(bands)
    import ptwt

    bank = _bank(wavelet)
    for axis in (-2, -1):  # restore all coefficients that ptwt computes from the periodic image
        size = bands.shape[axis]
        run = torch.arange((2 * size + bank.dec_len - 1) // 2, device=bands.device) - _offset(bank)
        bands = bands.index_select(axis % bands.ndim, run % size)
    low, *details = bands.chunk(4, dim=1)
    return ptwt.waverec2([low.contiguous(), tuple(d.contiguous() for d in details)], bank)


def wavelet_pyramid(x: Tensor, wavelet: str = "haar", levels: int = LEVELS) -> list[Tensor]:
    """Return the wavelet bands of levels 1 to `levels`, each on the scale of the image.

    Level l + 1 is the transform of the LL band of level l, which equals separate transforms of x (paper, Appendix G).
    The bands of level l are divided by 2^l, so that each LL has the value range of the image.

    Args:
        x: Images (N, C, H, W).
        wavelet: "haar", or the name of any discrete wavelet of ptwt.
        levels: Number of levels.

    Returns:
        [(N, 4C, H/2, W/2), (N, 4C, H/4, W/4), ...]

    Raises:
        UserError: if H or W is not a multiple of 2^levels.
    """
    factor = 2**levels
    if x.shape[-2] % factor or x.shape[-1] % factor:
        raise UserError(
            f"image size {x.shape[-2]}x{x.shape[-1]} is not a multiple of {factor}; resize or crop it, or pad it first "
            f"with litevae.wavelet.pad_to_multiple"
        )
    pyramid, channels = [], x.shape[1]
    for level in range(1, levels + 1):
        bands = dwt(x, wavelet)
        pyramid.append(bands / 2**level)
        x = bands[:, :channels]
    return pyramid


def pad_to_multiple(x: Tensor, factor: int = 2**LEVELS) -> Tensor:
    """Repeat the last row and column until H and W are multiples of `factor`. Crop a reconstruction to undo it."""
    bottom, right = -x.shape[-2] % factor, -x.shape[-1] % factor
    return torch.nn.functional.pad(x, (0, right, 0, bottom), mode="replicate")


def check_wavelet(name: str) -> None:
    """Check the name of a wavelet.

    Raises:
        UserError: if ptwt has no discrete wavelet of this name.
    """
    if name != "haar":
        _bank(name)


def _bank(name: str):
    """Return the filter bank of a wavelet."""
    import pywt

    if name not in pywt.wavelist(kind="discrete"):
        raise UserError(
            f"unknown wavelet {name!r}; choose `haar` or one of {', '.join(pywt.wavelist(kind='discrete'))}"
        )
    return pywt.Wavelet(name)


def _offset(bank) -> int:
    """Return the index of the first coefficient that `dwt` keeps."""
    return (bank.dec_len // 2 - 1) // 2
