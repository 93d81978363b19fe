"""Loss terms against independent references, and where their gradients go."""

import numpy as np
import ptwt
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from scipy.ndimage import gaussian_filter
from skimage import data
from torch import nn

from litevae import losses
from litevae.discriminators import UNetDiscriminator

PAIR_TERMS = [losses.l1, losses.l2, losses.wavelet, losses.gaussian]


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Two photos and noisy copies, (2, 3, 64, 64) in [-1, 1]."""
    photos = np.stack([data.astronaut()[40:104, 180:244], data.coffee()[100:164, 200:264]])
    x = torch.from_numpy(photos).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x, (x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)


def test_l1_and_l2_by_hand():
    x, y = torch.tensor([0.0, 1.0, -1.0, 0.5]).view(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    assert losses.l1(x, y).item() == 2.5 / 4
    assert losses.l2(x, y).item() == 2.25 / 4


def test_kl_is_diffusers_per_element():
    moments = torch.randn(3, 8, 4, 5, generator=torch.Generator().manual_seed(0))
    posterior = DiagonalGaussianDistribution(moments)
    torch.testing.assert_close(losses.kl(posterior), posterior.kl().mean() / (4 * 4 * 5))
    assert losses.kl(DiagonalGaussianDistribution(torch.zeros(1, 8, 2, 2))).item() == 0


def test_wavelet_compares_ptwts_detail_bands(pair):
    details = [ptwt.wavedec2(image, "haar", level=1)[1] for image in pair]
    difference = torch.stack([a - b for a, b in zip(*details, strict=True)])
    expected = torch.sqrt(difference**2 + 1e-6).mean()
    torch.testing.assert_close(losses.wavelet(*pair), expected)


def test_wavelet_ignores_what_only_the_low_band_sees(pair):
    x, _ = pair
    assert losses.wavelet(x, x + 0.3).item() == pytest.approx(1e-3, rel=1e-3)
    assert losses.wavelet(x, x, eps=0.5).item() == 0.5


def test_gaussian_is_l1_of_scipys_high_pass(pair):
    def high_pass(image: torch.Tensor) -> np.ndarray:
        planes = image.double().numpy()
        return planes - gaussian_filter(planes, sigma=(0, 0, 1, 1), mode="mirror", truncate=2)

    expected = np.abs(high_pass(pair[0]) - high_pass(pair[1])).mean()
    assert losses.gaussian(*pair).item() == pytest.approx(expected, rel=1e-5)


def test_hinge_by_hand():
    real = torch.tensor([[2.0], [0.5]]), torch.tensor([-1.0, 3.0, 1.0, 0.0]).view(1, 1, 2, 2)
    fake = torch.tensor([[-2.0], [1.0]]), torch.tensor([0.0, -1.0, 2.0, -3.0]).view(1, 1, 2, 2)
    overall = (0 + 0.5) / 2 + (0 + 2) / 2
    per_pixel = (2 + 0 + 0 + 1) / 4 + (1 + 0 + 3 + 0) / 4
    assert losses.hinge_discriminator(real, fake).item() == 0.5 * (overall + per_pixel) / 2
    assert losses.hinge_generator(fake).item() == -(-0.5 + -0.5) / 2
    with pytest.raises(ValueError):
        losses.hinge_discriminator(real, fake[:1])


def test_adaptive_weight_by_hand():
    layer = nn.Parameter(torch.tensor([1.0, 1.0]))
    reconstruction, adversarial = 3 * layer[0] + 4 * layer[1], 2 * layer[0]
    weight = losses.adaptive_weight(reconstruction, adversarial, layer)
    assert weight.item() == pytest.approx(0.5 * 5 / (2 + 1e-4))
    assert not weight.requires_grad
    assert layer.grad is None
    (reconstruction + weight * adversarial).backward()  # both graphs are still there
    torch.testing.assert_close(layer.grad, torch.tensor([3 + 2 * weight.item(), 4.0]))


def test_adaptive_weight_stays_finite_without_an_adversarial_gradient():
    layer = nn.Parameter(torch.tensor([1.0]))
    assert losses.adaptive_weight(3 * layer[0], 0 * layer[0], layer).item() == 0.5e4


def test_adaptive_weight_of_two_workers_is_that_of_the_whole_batch():
    layer = nn.Parameter(torch.tensor([1.0, -2.0]))
    x = torch.tensor([[1.0, 2.0], [-3.0, 0.5]])
    shares = [((row * layer).sum(), (row.square() * layer).sum()) for row in x]
    whole = losses.adaptive_weight((shares[0][0] + shares[1][0]) / 2, (shares[0][1] + shares[1][1]) / 2, layer)
    other = iter(torch.autograd.grad(loss, layer, retain_graph=True)[0] for loss in shares[1])
    weight = losses.adaptive_weight(*shares[0], layer, average=lambda gradient: (gradient + next(other)) / 2)
    torch.testing.assert_close(weight, whole)


@pytest.mark.parametrize("loss", PAIR_TERMS)
def test_autocast_changes_nothing(loss, pair):
    with torch.autocast("cpu", torch.bfloat16):
        under = loss(*pair)
    assert under.dtype == torch.float32
    assert torch.equal(under, loss(*pair))
    half = tuple(image.bfloat16() for image in pair)
    assert torch.equal(loss(*half), loss(*(image.float() for image in half)))


@pytest.mark.parametrize("loss", PAIR_TERMS)
def test_means_do_not_change_with_the_resolution(loss):
    tile = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mirrored = torch.cat([tile, tile.flip(3)], dim=3)
    assert loss(mirrored, -mirrored).item() == pytest.approx(loss(tile, -tile).item(), rel=0.1)


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 8, 8, stride=8)
        self.decoder = nn.ConvTranspose2d(4, 3, 8, stride=8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, DiagonalGaussianDistribution]:
        posterior = DiagonalGaussianDistribution(self.encoder(x))
        return self.decoder(posterior.sample()), posterior


def reached(module: nn.Module) -> list[bool]:
    """For each parameter whether a gradient arrived; all are then finite, and some weight's is not zero."""
    gradients = [parameter.grad for parameter in module.parameters()]
    arrived = [gradient for gradient in gradients if gradient is not None]
    assert all(gradient.isfinite().all() for gradient in arrived)
    assert not arrived or any(gradient.any() for gradient in arrived)
    return [gradient is not None for gradient in gradients]


@pytest.mark.parametrize("loss", PAIR_TERMS)
def test_image_terms_reach_decoder_and_encoder(loss, pair):
    model = Autoencoder()
    reconstruction, _ = model(pair[0])
    reconstruction.retain_grad()
    loss(reconstruction, pair[0]).backward()
    assert reconstruction.grad.any()
    assert reconstruction.grad.isfinite().all()
    assert all(reached(model))


@pytest.mark.parametrize("loss", PAIR_TERMS)
def test_gradients_are_finite_where_the_images_are_equal(loss, pair):
    x = pair[0].clone().requires_grad_()
    loss(x, pair[0]).backward()
    assert not x.grad.any()


def test_kl_reaches_the_encoder_alone(pair):
    model = Autoencoder()
    _, posterior = model(pair[0])
    losses.kl(posterior).backward()
    assert all(reached(model.encoder))
    assert not any(reached(model.decoder))


def test_discriminator_and_generator_steps_leave_each_other_alone(pair):
    model, discriminator = Autoencoder(), UNetDiscriminator(channels=4)
    reconstruction, _ = model(pair[0])

    real, fake = discriminator(pair[0]), discriminator(reconstruction.detach())
    losses.hinge_discriminator(real, fake).backward()
    assert all(reached(discriminator))
    assert not any(reached(model))

    discriminator.zero_grad(set_to_none=True)
    discriminator.requires_grad_(False)
    losses.hinge_generator(discriminator(reconstruction)).backward()
    assert all(reached(model))
    assert not any(reached(discriminator))

    discriminator.requires_grad_(True)
    losses.hinge_discriminator(discriminator(pair[0]), discriminator(reconstruction.detach())).backward()
    assert all(reached(discriminator))
