"""Wavelets against ptwt: values, order and signs of the bands, exact inverses."""

import ptwt
import pytest
import pywt
import torch

from litevae.errors import UserError
from litevae.wavelet import dwt, haar_dwt, haar_idwt, idwt, pad_to_multiple, wavelet_pyramid

WAVELETS = ["haar", "db2", "db4", "sym4", "coif1", "bior2.2", "rbio1.3"]


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_haar_is_ptwts(x):
    low, (h, v, d) = ptwt.wavedec2(x, pywt.Wavelet("haar"), level=1, mode="symmetric")
    assert torch.allclose(haar_dwt(x), torch.cat([low, h, v, d], dim=1), atol=1e-12)


def test_haar_keeps_energy_and_inverts(x):
    bands = haar_dwt(x)
    assert torch.allclose(bands.square().sum(), x.square().sum())
    assert torch.allclose(haar_idwt(bands), x, atol=1e-12)


def test_the_pyramid_is_the_papers_three_transforms(x):
    """Appendix G: `dwt(image, level=l) / 2^l`, each from scratch."""
    for level, bands in enumerate(wavelet_pyramid(x), start=1):
        low, (h, v, d), *_ = ptwt.wavedec2(x, pywt.Wavelet("haar"), level=level, mode="symmetric")
        assert torch.allclose(bands, torch.cat([low, h, v, d], dim=1) / 2**level, atol=1e-12)


def test_each_levels_ll_is_the_local_mean(x):
    for level, bands in enumerate(wavelet_pyramid(x), start=1):
        assert torch.allclose(bands[:, :3], torch.nn.functional.avg_pool2d(x, 2**level), atol=1e-12)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_any_wavelet_halves_and_inverts(x, wavelet):
    bands = dwt(x, wavelet)
    assert bands.shape == (2, 12, 32, 24)
    assert torch.allclose(idwt(bands, wavelet), x, atol=1e-9)


@pytest.mark.parametrize("wavelet", WAVELETS[1:])
def test_other_wavelets_are_one_period_of_pywts(x, wavelet):
    mine = dwt(x, wavelet)[0, ::3]  # one image channel: LL, H, V, D
    low, (h, v, d) = pywt.dwt2(x[0, 0].numpy(), wavelet, mode="periodic")
    theirs = torch.stack([torch.from_numpy(band) for band in (low, h, v, d)])
    starts = range(theirs.shape[1] - 32 + 1)
    assert any(torch.allclose(mine, theirs[:, i : i + 32, i : i + 24], atol=1e-9) for i in starts)


def test_gradients_pass_through():
    x = torch.randn(1, 3, 8, 8, requires_grad=True, dtype=torch.float64)
    assert torch.autograd.gradcheck(haar_dwt, x)


@pytest.mark.parametrize("size", [(60, 64), (64, 60)])
def test_sizes_that_are_no_multiple_of_8_are_refused(size):
    with pytest.raises(UserError, match=rf"{size[0]}x{size[1]} is not a multiple of 8.*pad_to_multiple"):
        wavelet_pyramid(torch.zeros(1, 3, *size))


def test_padding_repeats_the_border_up_to_a_multiple():
    x = torch.randn(1, 3, 61, 64)
    padded = pad_to_multiple(x)
    assert padded.shape == (1, 3, 64, 64)
    assert torch.equal(padded[..., :61, :], x)
    assert torch.equal(padded[..., 63, :], x[..., 60, :])


def test_unknown_and_too_long_wavelets_are_named(x):
    with pytest.raises(UserError, match=r"unknown wavelet 'hair'.*haar"):
        dwt(x, "hair")
    with pytest.raises(UserError, match=r"db20.* 40 taps"):
        dwt(x[..., :32, :32], "db20")
