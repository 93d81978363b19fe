"""Discrete wavelet transforms of images: the Haar cascade of the encoder, its inverse, and any other wavelet of ptwt.

Bands are stacked on the channel axis as [LL, H, V, D], each with all image channels, in ptwt's order and signs.
"""

import torch
from torch import Tensor

from litevae.errors import UserError

LEVELS = 3  # f = 8


def haar_dwt(x: Tensor) -> Tensor:
    """One orthonormal Haar level: (N, C, H, W) with even H, W -> (N, 4C, H/2, W/2). Differentiable."""
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
    """Inverse of `haar_dwt`: (N, 4C, H, W) -> (N, C, 2H, 2W)."""
    ll, h, v, d = bands.chunk(4, dim=1)
    rows = [torch.stack([a + b, a - b], dim=-1).flatten(-2) for a, b in ((ll + h, v + d), (ll - h, v - d))]
    return torch.stack(rows, dim=-2).flatten(-3, -2).mul(0.5)


def dwt(x: Tensor, wavelet: str = "haar") -> Tensor:
    """One level of any wavelet: (N, C, H, W) -> (N, 4C, H/2, W/2).

    Wavelets longer than Haar see the image as periodic, and one period of ptwt's coefficients is kept, so that
    the bands have exactly half the size and `idwt` is exact, for biorthogonal wavelets too.
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
    """Inverse of `dwt`: (N, 4C, H, W) -> (N, C, 2H, 2W)."""
    if wavelet == "haar":
        return haar_idwt(bands)
    import ptwt

    bank = _bank(wavelet)
    for axis in (-2, -1):  # the whole run of coefficients that ptwt computes from the periodic image
        size = bands.shape[axis]
        run = torch.arange((2 * size + bank.dec_len - 1) // 2, device=bands.device) - _offset(bank)
        bands = bands.index_select(axis % bands.ndim, run % size)
    low, *details = bands.chunk(4, dim=1)
    return ptwt.waverec2([low.contiguous(), tuple(d.contiguous() for d in details)], bank)


def wavelet_pyramid(x: Tensor, wavelet: str = "haar", levels: int = LEVELS) -> list[Tensor]:
    """Bands of levels 1..levels, level l divided by 2^l, so that each LL is on the image's own scale.

    One cascade: level l + 1 transforms level l's LL, which equals separate transforms of x (paper, Appendix G).
    (N, C, H, W) -> [(N, 4C, H/2, W/2), (N, 4C, H/4, W/4), ...]

    Raises:
        UserError: H or W is no multiple of 2^levels.
    """
    factor = 2**levels
    if x.shape[-2] % factor or x.shape[-1] % factor:
        raise UserError(
            f"image size {x.shape[-2]}x{x.shape[-1]} is no multiple of {factor}; resize or crop it, or pad it first "
            f"with litevae.wavelet.pad_to_multiple"
        )
    pyramid, channels = [], x.shape[1]
    for level in range(1, levels + 1):
        bands = dwt(x, wavelet)
        pyramid.append(bands / 2**level)
        x = bands[:, :channels]
    return pyramid


def pad_to_multiple(x: Tensor, factor: int = 2**LEVELS) -> Tensor:
    """Repeats the last row and column until H and W are multiples of `factor`; crop the result to undo it."""
    bottom, right = -x.shape[-2] % factor, -x.shape[-1] % factor
    return torch.nn.functional.pad(x, (0, right, 0, bottom), mode="replicate")


def check_wavelet(name: str) -> None:
    """Raises UserError where ptwt has no discrete wavelet of this name."""
    if name != "haar":
        _bank(name)


def _bank(name: str):
    import pywt

    if name not in pywt.wavelist(kind="discrete"):
        raise UserError(f"unknown wavelet {name!r}; `haar`, or one of {', '.join(pywt.wavelist(kind='discrete'))}")
    return pywt.Wavelet(name)


def _offset(bank) -> int:
    return (bank.dec_len // 2 - 1) // 2
