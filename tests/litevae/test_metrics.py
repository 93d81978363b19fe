"""PSNR, SSIM and their mean against torchmetrics, scikit-image and a plain computation; the baseline against Pillow;
an autoencoder's marks against waves and maps made by hand."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage import data
from skimage.metrics import peak_signal_noise_ratio
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from litevae import metrics
from litevae.errors import UserError


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Seven crops of photos and copies with more and more noise, (7, 3, 48, 64) in [-1, 1]."""
    photo = data.chelsea()
    x = torch.from_numpy(np.stack([photo[i * 40 : i * 40 + 48, i * 50 : i * 50 + 64] for i in range(6)]))
    x = torch.cat([x, torch.from_numpy(data.rocket()[:48, :64])[None]]).permute(0, 3, 1, 2).float() / 127.5 - 1
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return x, (x + noise * torch.linspace(0.02, 0.4, 7).view(7, 1, 1, 1)).clamp(-1, 1)


def test_quantize_returns_every_level():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(metrics.quantize(levels.float() / 127.5 - 1), levels)
    assert torch.equal(metrics.quantize(levels), levels)
    assert metrics.quantize(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_output_is_refused(bad):
    image = torch.zeros(1, 3, 16, 16)
    image[0, 0, 0, 0] = bad
    with pytest.raises(UserError, match="NaN"):
        metrics.psnr(image, torch.zeros(1, 3, 16, 16))


def ssim_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. (2004) on the planes of one pair, the window mirrored at the borders."""
    a, b = a.astype(float), b.astype(float)

    def local_mean(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, sigma=(0, 1.5, 1.5), truncate=3.5, mode="mirror")

    mean_a, mean_b = local_mean(a), local_mean(b)
    variances = local_mean(a * a) - mean_a**2 + local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return float(np.mean(luminance * (2 * covariance + c2) / (variances + c2)))


def test_values_of_each_image(pair):
    x, y = (metrics.quantize(image).numpy() for image in pair)
    for a, b, psnr, ssim in zip(x, y, metrics.psnr(*pair), metrics.ssim(*pair), strict=True):
        assert psnr.item() == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), abs=1e-10)
        assert ssim.item() == pytest.approx(ssim_by_hand(a, b), abs=1e-10)


def test_identical_images():
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    assert metrics.psnr(image, image).tolist() == [100, 100]
    torch.testing.assert_close(metrics.ssim(image, image), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_means_are_torchmetrics_whatever_the_batch(pair, batch):
    psnr, ssim = metrics.Mean(), metrics.Mean()
    for x, y in zip(*(image.split(batch) for image in pair), strict=True):
        psnr.add(metrics.psnr(x, y))
        ssim.add(metrics.ssim(x, y))
    x, y = (metrics.quantize(image).double() for image in pair)
    assert psnr.count == ssim.count == 7
    # torchmetrics' own sums are fp32
    reference = PeakSignalNoiseRatio(data_range=255.0, dim=(1, 2, 3))
    assert psnr.value() == pytest.approx(reference(x, y).item(), rel=1e-6)
    assert ssim.value() == pytest.approx(StructuralSimilarityIndexMeasure(data_range=255.0)(x, y).item(), rel=1e-6)


def test_an_image_alone_or_in_a_batch_is_the_same(pair):
    for metric in (metrics.psnr, metrics.ssim):
        alone = torch.cat([metric(x[None], y[None]) for x, y in zip(*pair, strict=True)])
        torch.testing.assert_close(metric(*pair), alone, rtol=1e-12, atol=0)


def test_mean_does_not_depend_on_order_or_batches():
    values = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e3
    values[::7] *= 1e-9
    whole = metrics.Mean()
    whole.add(values)
    other = metrics.Mean()
    for part in values.flip(0).split(7):
        other.add(part)
    assert other.value() == whole.value() == math.fsum(values.tolist()) / 1000
    assert other.count == 1000
    assert math.isnan(metrics.Mean().value())


def test_bicubic_baseline_is_pillows():
    photo = data.astronaut()[:96, 100:228]
    x = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 127.5 - 1
    planes = [Image.fromarray(plane) for plane in x[0].numpy()]  # Pillow's float mode: no rounding in between
    small = [plane.resize((16, 12), Image.Resampling.BICUBIC) for plane in planes]
    expected = np.stack([np.asarray(plane.resize((128, 96), Image.Resampling.BICUBIC)) for plane in small])
    np.testing.assert_allclose(metrics.bicubic_baseline(x)[0], expected.clip(-1, 1), atol=1e-5)
    assert 15 < metrics.psnr(metrics.bicubic_baseline(x), x).item() < 30


# --- an autoencoder's own marks -------------------------------------------------------------------------------


def waves(row: float, column: float, height: int = 64, width: int = 80) -> torch.Tensor:
    """Unit sine of so many periods a pixel down and to the right."""
    y, x = torch.arange(height, dtype=torch.float64)[:, None], torch.arange(width, dtype=torch.float64)
    return torch.sin(2 * math.pi * (row * y + column * x))


@pytest.mark.parametrize(
    ("row", "column", "period"), [(0, 1 / 8, 8), (1 / 4, 0, 4), (1 / 8, -1 / 16, 64 / 80**0.5), (1 / 2, 1 / 2, 2**0.5)]
)
def test_artefacts_are_stripes_amplitude_and_period(row, column, period):
    wave = waves(row, column) if row < 1 / 2 else checkerboard()
    images = torch.tensor([[-0.5, 0.0, 0.5], [0.9, -0.9, 0.1]], dtype=torch.float64)[:, :, None, None].repeat(
        1, 1, 64, 80
    )
    images[0, 1] += 3 / 127.5 * wave  # 3 levels in one of six planes
    found = metrics.artefacts(images, border=8)
    power = 1 / 2 if row < 1 / 2 else 1
    assert found == (pytest.approx(3 * math.sqrt(power / 6)), pytest.approx(period))


def checkerboard(height: int = 64, width: int = 80) -> torch.Tensor:
    return 1.0 - 2 * ((torch.arange(height)[:, None] + torch.arange(width)) % 2)


def test_artefacts_of_several_waves_and_of_borders():
    images = torch.zeros(1, 3, 64, 80, dtype=torch.float64)
    images += (2 * waves(1 / 16, 0) + 1 * waves(0, 1 / 4)) / 127.5
    assert metrics.artefacts(images, 8) == (pytest.approx(math.sqrt((4 + 1) / 2)), pytest.approx(16))
    images[..., :8, :] = 1  # padding
    images[..., -8:] = -1
    assert metrics.artefacts(images, 8) == (pytest.approx(math.sqrt((4 + 1) / 2)), pytest.approx(16))
    assert metrics.artefacts(images, 4)[0] > 10


def test_constant_colours_have_no_artefacts():
    colours = metrics.constant_colours(24)
    assert colours.shape == (9, 3, 24, 24)
    assert len({tuple(image[:, 5, 7].tolist()) for image in colours}) == 9
    assert (colours[-1] == 0).all()
    assert metrics.artefacts(colours, 8) == (0, None)
    with pytest.raises(UserError, match="leave nothing of an image of 24x24"):
        metrics.artefacts(colours, 12)
    colours[3, 0, 9, 9] = math.nan
    with pytest.raises(UserError, match="NaN"):
        metrics.artefacts(colours, 8)


def test_imbalance_by_hand():
    even = torch.full((1, 2, 10, 10), -0.5)
    strong = torch.full((1, 2, 10, 10), 0.5)
    strong[0, :, 3, 4] = torch.tensor([3.0, -4.0])  # 25 beside 99 times 1/2
    alone = torch.zeros(1, 2, 10, 10)
    alone[0, 1, 0, 9] = 7
    expected = [0.01, 25 / (25 + 99 / 2), 1, 1]
    assert metrics.imbalance(torch.cat([even, strong, alone, 0 * even])).tolist() == pytest.approx(expected)
    two = torch.arange(1.0, 201.0).sqrt().view(1, 1, 20, 10)  # 1 % of 200 positions are two
    assert metrics.imbalance(two).item() == pytest.approx((200 + 199) / (200 * 201 / 2))
    assert metrics.imbalance(two, 0.5).item() == pytest.approx(sum(range(101, 201)) / (200 * 201 / 2))


def test_every_metric_has_a_protocol():
    assert {"psnr", "ssim", "bicubic", "artefacts", "imbalance"} <= metrics.PROTOCOLS.keys()
