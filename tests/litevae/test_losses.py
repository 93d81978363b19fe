"""Loss terms against independent references, and where their gradients go."""

import numpy as np
import ptwt
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from scipy.ndimage import gaussian_filter, generic_filter
from scipy.optimize import approx_fprime
from skimage import data
from torch import nn
from torch.nn import functional as F

from litevae import losses
from litevae.discriminators import UNetDiscriminator


def ldl(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """With an average that is no better anywhere."""
    return losses.ldl(x, y, y)


PAIR_TERMS = [losses.l1, losses.l2, losses.wavelet, losses.gaussian, ldl]


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


def heads(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(2, 1, generator=generator), 3 * torch.randn(2, 1, 4, 4, generator=generator)


def cross_entropy(logits: torch.Tensor, target: float) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def test_logistic_is_torchs_cross_entropy():
    real, fake = heads(0), heads(1)
    expected = [0.5 * (cross_entropy(r, 1) + cross_entropy(f, 0)) for r, f in zip(real, fake, strict=True)]
    torch.testing.assert_close(losses.logistic_discriminator(real, fake), sum(expected) / 2)
    torch.testing.assert_close(
        losses.logistic_generator(fake), (cross_entropy(fake[0], 1) + cross_entropy(fake[1], 1)) / 2
    )
    with pytest.raises(ValueError):
        losses.logistic_discriminator(real, fake[:1])


def test_logistic_generator_learns_most_where_the_discriminator_is_sure():
    logits = torch.tensor([[-1000.0], [0.0], [1000.0]], requires_grad=True)
    loss = losses.logistic_generator((logits,))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.flatten().tolist() == pytest.approx([-1 / 3, -1 / 6, 0])


def test_r1_is_the_square_of_the_numerical_gradient():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh()).double()
    pixel, overall = nn.Conv2d(4, 1, 1).double(), nn.Linear(4, 1).double()

    def logits(x: torch.Tensor) -> losses.Logits:
        h = body(x)
        return overall(h.square().mean((2, 3))), pixel(h)

    def total(flat: np.ndarray) -> float:
        with torch.no_grad():
            return float(sum(head.sum() for head in logits(torch.from_numpy(flat).view(3, 1, 4, 4))))

    x = torch.randn(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    expected = np.square(approx_fprime(x.detach().flatten().numpy(), total, 1e-6)).sum() / 3
    assert losses.r1(logits(x), x).item() == pytest.approx(expected, rel=1e-4)


def test_r1_can_be_differentiated():
    """Logits w x^2 / 2 have the gradient w x."""
    w = torch.tensor(3.0, requires_grad=True)
    x = torch.tensor([1.0, -2.0, 0.5, 4.0]).view(2, 1, 1, 2).requires_grad_()
    penalty = losses.r1((w * x.square() / 2,), x)
    squares = (1 + 4 + 0.25 + 16) / 2
    assert penalty.item() == 9 * squares
    penalty.backward()
    assert w.grad.item() == 2 * 3 * squares


def test_lecam_by_hand():
    lecam = losses.LeCam(decay=0.75)
    real, fake = (
        (torch.tensor([[1.0], [3.0]]), torch.tensor([4.0])),
        (torch.tensor([[-1.0], [0.0]]), torch.tensor([-1.5])),
    )
    # the first call knows only its own means, 3 and -1
    first = ((2**2 + 4**2) / 2 + (4**2 + 3**2) / 2 + 5**2 + 4.5**2) / 2
    assert lecam(real, fake).item() == first
    # before the second they are still those; afterwards 0.75 of them and 0.25 of 7 and -5
    second = lecam((torch.tensor([7.0]),), (torch.tensor([-5.0, -5.0]),))
    assert second.item() == 8**2 + 8**2
    assert lecam.means.tolist() == [0.75 * 3 + 0.25 * 7, 0.75 * -1 + 0.25 * -5]
    # logits within the other's mean cost nothing
    assert lecam((torch.tensor([-3.0]),), (torch.tensor([5.0]),)).item() == 0


def test_lecam_moves_logits_alone_and_its_state_goes_on():
    lecam = losses.LeCam()
    assert lecam(heads(0), heads(1)).isfinite()
    again = losses.LeCam()
    again.load_state_dict(lecam.state_dict())
    real, fake = ([head.requires_grad_() for head in heads(seed)] for seed in (2, 3))
    value = lecam(tuple(real), tuple(fake))
    value.backward()
    assert all(head.grad.any() for head in (*real, *fake))
    assert torch.equal(again(heads(2), heads(3)), value)
    assert torch.equal(again.means, lecam.means)
    assert not lecam.means.requires_grad
    assert [(key, tuple(value.shape)) for key, value in lecam.state_dict().items()] == [("means", (2,))]


def test_lecam_of_two_workers_keeps_the_means_of_the_whole_batch():
    shares = [(heads(seed), heads(seed + 2)) for seed in (0, 1)]
    whole = losses.LeCam()
    expected = whole(*(tuple(map(torch.cat, zip(*pair, strict=True))) for pair in zip(*shares, strict=True)))

    now = torch.stack(
        [torch.stack([torch.stack([h.mean() for h in logits]).mean() for logits in pair]) for pair in shares]
    )
    workers = [losses.LeCam(average=lambda _: now.mean(0)) for _ in shares]
    values = [worker(*share) for worker, share in zip(workers, shares, strict=True)]
    assert torch.equal(workers[0].means, workers[1].means)
    torch.testing.assert_close(workers[0].means, whole.means)
    torch.testing.assert_close(sum(values) / 2, expected)


def is_box(inside: np.ndarray) -> bool:
    rows, columns = np.nonzero(inside.any(1))[0], np.nonzero(inside.any(0))[0]
    if not len(rows):
        return True
    return bool(inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all())


def test_cutmix_masks_are_boxes_or_all_but_a_box():
    masks = losses.cutmix_mask(500, 24, 40, torch.Generator().manual_seed(0))
    assert masks.shape == (500, 1, 24, 40)
    assert set(masks.unique().tolist()) == {0, 1}
    planes = masks[:, 0].bool().numpy()
    assert all(is_box(plane) or is_box(~plane) for plane in planes)
    real = masks.mean((1, 2, 3))
    assert real.mean().item() == pytest.approx(0.5, abs=0.05)
    assert [bool((real < share).any()) for share in (0.05, 0.3)] == [True, True]
    assert [bool((real > share).any()) for share in (0.95, 0.7)] == [True, True]
    # cut at the borders, a box of share u covers (sqrt u - u / 4)^2 of the area on average over its places
    boxes = [plane.mean() if is_box(plane) else 1 - plane.mean() for plane in planes if is_box(plane) != is_box(~plane)]
    assert len(boxes) > 480  # of the rest both parts are boxes
    assert np.mean(boxes) == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=0.03)


def test_cutmix_masks_follow_the_generator_alone():
    masks = [losses.cutmix_mask(4, 16, 16, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    torch.manual_seed(0)
    assert torch.equal(losses.cutmix_mask(4, 16, 16), masks[0])


def test_cutmix_takes_each_pixel_from_one_of_both(pair):
    mask = losses.cutmix_mask(2, 64, 64, torch.Generator().manual_seed(0))
    mixed = losses.cutmix(*pair, mask)
    assert torch.equal(mixed, torch.where(mask.bool(), *pair))


def test_cutmix_discriminator_is_cross_entropy_with_the_mask_and_consistency():
    real, fake, mixed = heads(0), heads(1), heads(2)
    mask = losses.cutmix_mask(2, 4, 4, torch.Generator().manual_seed(3))
    assert 0 < mask.mean() < 1
    fooled = cross_entropy(mixed[0], 0), F.binary_cross_entropy_with_logits(mixed[1], mask)
    consistency = F.mse_loss(mixed[1], torch.where(mask.bool(), real[1], fake[1]))
    # half of Schonfeld's sum, as the heads' mean is of theirs
    loss = losses.cutmix_discriminator(real, fake, mixed, mask, "logistic")
    torch.testing.assert_close(loss, 0.5 * (sum(fooled) + consistency))
    loss = losses.cutmix_discriminator(real, fake, mixed, mask, "logistic", consistency=0)
    torch.testing.assert_close(loss, 0.5 * sum(fooled))


def test_cutmix_hinge_by_hand():
    mask = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    mixed = torch.tensor([[0.5]]), torch.tensor([-1.0, 0.0]).view(1, 1, 1, 2)
    real, fake = torch.tensor([4.0, 9.0]).view(1, 1, 1, 2), torch.tensor([9.0, -3.0]).view(1, 1, 1, 2)
    loss = losses.cutmix_discriminator((mixed[0], real), (mixed[0], fake), mixed, mask, consistency=2)
    assert loss.item() == 0.5 * (1.5 + (2 + 1) / 2) + 2 * (5**2 + 3**2) / 2
    one_head = (mixed[1],)
    with pytest.raises(ValueError):
        losses.cutmix_discriminator(one_head, one_head, one_head, mask)


def artifacts(x: torch.Tensor, y: torch.Tensor, y_ema: torch.Tensor) -> np.ndarray:
    """Liang et al.'s map of images in [0, 1], by scipy: (N, H, W)."""
    x, y, y_ema = ((image.double().numpy() + 1) / 2 for image in (x, y, y_ema))
    maps = []
    for one, other, averaged in zip(x, y, y_ema, strict=True):
        residual, residual_ema = np.abs(one - other).sum(0), np.abs(one - averaged).sum(0)
        local = generic_filter(residual, lambda window: np.var(window, ddof=1), size=7, mode="mirror")
        maps.append(np.where(residual < residual_ema, 0, np.var(residual, ddof=1) ** 0.2 * local))
    return np.stack(maps)


def test_ldl_is_l1_under_scipys_map(pair):
    x, y = (image[:, :, :20, :28] for image in pair)
    y_ema = y + 0.1 * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    expected = artifacts(x, y, y_ema)
    assert 0.1 < (expected == 0).mean() < 0.9
    found = losses.artifact_map(x, y, y_ema)
    np.testing.assert_allclose(found[:, 0].numpy(), expected, rtol=1e-4, atol=1e-7)
    y.requires_grad_()
    loss = losses.ldl(x, y, y_ema)
    assert loss.item() == pytest.approx((expected[:, None] * (x - y).abs().detach().numpy()).mean(), rel=1e-5)
    loss.backward()  # none through the map
    torch.testing.assert_close(y.grad, found * (y - x).sign().detach() / y.numel())


def test_ldl_is_nothing_where_the_average_is_worse(pair):
    x, y = pair
    assert losses.ldl(x, y, -x).item() < losses.ldl(x, y, x).item()
    assert losses.ldl(x, y, x + 4).item() == 0


def adaptive_weight(*given, **options):
    return losses.balance(*losses.gradient_norms(*given, **options))


def test_gradient_norms_by_hand():
    layer = nn.Parameter(torch.tensor([1.0, 1.0]))
    reconstruction, adversarial = 3 * layer[0] + 4 * layer[1], 2 * layer[0]
    norms = losses.gradient_norms(reconstruction, adversarial, layer)
    assert [norm.item() for norm in norms] == [5, 2]
    assert not any(norm.requires_grad for norm in norms)
    assert layer.grad is None
    halved = losses.gradient_norms(reconstruction, adversarial, layer, average=lambda gradient: gradient / 2)
    assert [norm.item() for norm in halved] == [2.5, 1]


def test_adaptive_weight_by_hand():
    layer = nn.Parameter(torch.tensor([1.0, 1.0]))
    reconstruction, adversarial = 3 * layer[0] + 4 * layer[1], 2 * layer[0]
    weight = adaptive_weight(reconstruction, adversarial, layer)
    assert weight.item() == pytest.approx(0.5 * 5 / (2 + 1e-4))
    assert not weight.requires_grad
    assert layer.grad is None
    (reconstruction + weight * adversarial).backward()  # both graphs are still there
    torch.testing.assert_close(layer.grad, torch.tensor([3 + 2 * weight.item(), 4.0]))


def test_adaptive_weight_stays_finite_without_an_adversarial_gradient():
    layer = nn.Parameter(torch.tensor([1.0]))
    assert adaptive_weight(3 * layer[0], 0 * layer[0], layer).item() == 0.5e4


def test_adaptive_weight_of_two_workers_is_that_of_the_whole_batch():
    layer = nn.Parameter(torch.tensor([1.0, -2.0]))
    x = torch.tensor([[1.0, 2.0], [-3.0, 0.5]])
    shares = [((row * layer).sum(), (row.square() * layer).sum()) for row in x]
    whole = adaptive_weight((shares[0][0] + shares[1][0]) / 2, (shares[0][1] + shares[1][1]) / 2, layer)
    other = iter(torch.autograd.grad(loss, layer, retain_graph=True)[0] for loss in shares[1])
    weight = adaptive_weight(*shares[0], layer, average=lambda gradient: (gradient + next(other)) / 2)
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
