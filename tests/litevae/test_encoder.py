"""The encoder: the paper's exact sizes, shapes, reach of gradients."""

import pytest
import torch

from litevae.encoder import SIZES, Encoder
from litevae.errors import UserError

# ../paper: Tables 2 and 3; worked out to the last digit from Appendix G, for n_z = 4 and 12
PARAMETERS = {
    "S": (1_038_308, 1_040_628),
    "B": (6_753_252, 6_757_876),
    "M": (32_752_740, 32_757_364),
    "L": (41_424_996, 41_434_228),
}


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_the_papers(size):
    with torch.device("meta"):
        counts = [sum(p.numel() for p in Encoder(n_z, SIZES[size]).parameters()) for n_z in (4, 12)]
    assert counts == list(PARAMETERS[size])


@pytest.mark.parametrize("downsample", ["conv", "pool"])
@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_moments_are_an_eighth_of_the_image(downsample, wavelet):
    encoder = Encoder(4, SIZES["S"], wavelet, downsample)
    assert encoder(torch.randn(2, 3, 64, 40)).shape == (2, 8, 8, 5)


def test_pooling_has_no_parameters():
    """Two 3x3 convolutions 12 -> 12 less."""
    conv, pool = (sum(p.numel() for p in Encoder(4, SIZES["S"], downsample=d).parameters()) for d in ("conv", "pool"))
    assert conv - pool == 2 * (12 * 12 * 9 + 12)


def test_every_level_and_every_parameter_is_used():
    torch.manual_seed(0)
    encoder = Encoder(4, SIZES["S"])
    for p in encoder.parameters():  # blocks add nothing at the start, so gradients stop at their last convolution
        torch.nn.init.normal_(p, std=0.1)
    encoder(torch.randn(1, 3, 32, 32)).square().sum().backward()
    silent = [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


def test_the_transform_of_the_input_has_no_gradient():
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    Encoder(4, SIZES["S"])(x).sum().backward()
    assert x.grad is None


def test_the_transform_stays_in_fp32_under_autocast(monkeypatch):
    import litevae.encoder

    seen = []
    pyramid = litevae.encoder.wavelet_pyramid
    monkeypatch.setattr(litevae.encoder, "wavelet_pyramid", lambda x, w: seen.extend(pyramid(x, w)) or pyramid(x, w))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Encoder(4, SIZES["S"])(torch.randn(1, 3, 32, 32))
    assert {bands.dtype for bands in seen} == {torch.float32}


def test_starts_with_a_small_posterior():
    torch.manual_seed(0)
    logvar = Encoder(4, SIZES["S"])(torch.randn(1, 3, 64, 64).clamp(-1, 1)).chunk(2, dim=1)[1]
    assert -8 < logvar.mean() < -4


def test_a_bad_size_is_refused():
    with pytest.raises(UserError, match="multiple of 8"):
        Encoder(4, SIZES["S"])(torch.zeros(1, 3, 36, 32))
