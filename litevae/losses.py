"""The loss terms, each a pure function of tensors (`LeCam` alone remembers something).

All but R1 are means over elements, so that one set of weights serves every resolution, and all are element-wise
arithmetic on fp32 copies of what they get: autocast has no convolution or product here to lower. Images are
(N, C, H, W) in [-1, 1]; every term of two images is symmetric in them.
"""

import math
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from litevae.wavelet import haar_dwt

Logits = tuple[Tensor, ...]  # one tensor per head of a discriminator
Adversarial = Literal["hinge", "logistic"]
Average = Callable[[Tensor], Tensor]  # over several workers: the mean of a tensor over them, the same on all


class Posterior(Protocol):
    """A diagonal Gaussian over latents."""

    mean: Tensor
    logvar: Tensor


def l1(x: Tensor, y: Tensor) -> Tensor:
    return (x.float() - y.float()).abs().mean()


def l2(x: Tensor, y: Tensor) -> Tensor:
    return (x.float() - y.float()).square().mean()


def kl(posterior: Posterior) -> Tensor:
    """KL divergence from the standard normal distribution, in nats per latent element."""
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def wavelet(x: Tensor, y: Tensor, eps: float = 1e-3) -> Tensor:
    """Charbonnier distance of the H, V and D bands of one Haar level (Section 4); `eps` where x equals y.

    The transform is linear, so one of the difference serves for both images. H and W are even. The paper leaves
    `eps` and the number of levels open.
    """
    details = haar_dwt(x.float() - y.float())[:, x.shape[1] :]
    return (details.square() + eps**2).sqrt().mean()


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    """L1 of the images' high frequencies, x - blur(x) (Section 4); linear, hence the blur of the difference.

    The paper leaves the filter open: 5x5, sigma 1, reflected borders, as Zamfir et al. (2023) whom it cites.
    """
    difference = x.float() - y.float()
    return (difference - blur(difference)).abs().mean()


def blur(x: Tensor, sigma: float = 1.0, radius: int = 2) -> Tensor:
    """Gaussian filter of 2 radius + 1 taps a side, borders mirrored, in the precision of `x`: (N, C, H, W) -> same.

    Sums of shifted images: exact where a GPU's convolutions round to TF32, and on CPUs faster in float64.
    """
    taps = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-radius, radius + 1)]
    x = F.pad(x, (radius,) * 4, mode="reflect")
    for axis in (-2, -1):
        size = x.shape[axis] - 2 * radius
        out = x.new_zeros(())
        for i, tap in enumerate(taps):
            out = out.add(x.narrow(axis, i, size), alpha=tap / sum(taps))
        x = out
    return x


def ldl(x: Tensor, y: Tensor, y_ema: Tensor) -> Tensor:
    """L1 of an image `x` and its reconstruction `y`, weighted by `artifact_map` (Liang et al. 2022; Table 15).

    `y_ema` is the averaged model's reconstruction, which has fewer artifacts. Gradients go past the map.
    """
    return (artifact_map(x, y, y_ema) * (x.float() - y.float()).abs()).mean()


@torch.no_grad()
def artifact_map(x: Tensor, y: Tensor, y_ema: Tensor, window: int = 7) -> Tensor:
    """How likely an artifact each pixel of the reconstruction `y` of `x` is: (N, C, H, W) thrice -> (N, 1, H, W).

    The fifth root of the residual's variance over the image times its variance in a window, borders mirrored (both
    unbiased; the residual is summed over channels), and 0 where `y` is closer to `x` than `y_ema`. Of images in
    [0, 1], whose units the published weights go with.
    """
    residual, averaged = ((x.float() - other.float()).abs().sum(1, keepdim=True) / 2 for other in (y, y_ema))
    windows = F.pad(residual, (window // 2,) * 4, mode="reflect").unfold(2, window, 1).unfold(3, window, 1)
    overall = residual.var((1, 2, 3), keepdim=True) ** 0.2
    return torch.where(residual < averaged, 0.0, overall * windows.var((-2, -1)))


def hinge_discriminator(real: Logits, fake: Logits) -> Tensor:
    """Half of each head's hinge on real (above 1) and fake (below -1) logits; heads count equally."""
    return _discriminator(real, fake, "hinge")


def hinge_generator(fake: Logits) -> Tensor:
    """Raises the logits of fakes; heads count equally."""
    return -torch.stack([logits.float().mean() for logits in fake]).mean()


def logistic_discriminator(real: Logits, fake: Logits) -> Tensor:
    """Half of each head's cross entropy of real and fake logits; heads count equally (Goodfellow et al. 2014)."""
    return _discriminator(real, fake, "logistic")


def logistic_generator(fake: Logits) -> Tensor:
    """The non-saturating counterpart: cross entropy of fakes taken for real; heads count equally."""
    return torch.stack([_miss(logits, "logistic").mean() for logits in fake]).mean()


def _discriminator(real: Logits, fake: Logits, loss: Adversarial) -> Tensor:
    terms = [_miss(r, loss).mean() + _miss(-f, loss).mean() for r, f in zip(real, fake, strict=True)]
    return 0.5 * torch.stack(terms).mean()


def _miss(logits: Tensor, loss: Adversarial) -> Tensor:
    """The discriminator's loss of each logit that should be high."""
    return F.relu(1 - logits.float()) if loss == "hinge" else F.softplus(-logits.float())


def r1(logits: Logits, x: Tensor) -> Tensor:
    """Squared norm of the logits' gradient at real images, averaged over images (Mescheder et al. 2018).

    Its weight is their gamma / 2: no half is in here. Every head's logits are summed, positions of a map too, so what
    suits a single logit is much for a map. The result can be differentiated with respect to the discriminator.

    Args:
        logits: the discriminator's of `x`.
        x: real images that require a gradient.
    """
    total = torch.stack([head.float().sum() for head in logits]).sum()
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    return gradient.float().square().sum((1, 2, 3)).mean()


class LeCam(nn.Module):
    """Keeps real and fake logits from drifting past each other's running mean (Tseng et al. 2021).

    (real, fake) logits -> mean relu(real - mean of fakes)^2 + mean relu(mean of reals - fake)^2, heads counting
    equally. The running means, one each of all heads' means, are those of before this call's logits, which they take
    in afterwards; the first call's are its own. They are the state: a buffer of two fp32 numbers, NaN before the
    first call.

    Args:
        average: as in `adaptive_weight`, so that all workers keep the same means.
        decay: of the running means per call.
        device: of the logits.
    """

    means: Tensor

    def __init__(
        self,
        average: Average = lambda means: means,
        decay: float = 0.99,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.average, self.decay = average, decay
        self.register_buffer("means", torch.full((2,), math.nan, device=device))

    def forward(self, real: Logits, fake: Logits) -> Tensor:
        with torch.no_grad():
            heads = [torch.stack([head.float().mean() for head in logits]).mean() for logits in (real, fake)]
            now = self.average(torch.stack(heads))
            before = torch.where(self.means.isnan(), now, self.means)
            # what is not finite belongs to a step that is skipped
            self.means.copy_(torch.where(now.isfinite(), before.lerp(now, 1 - self.decay), self.means))
        mean_real, mean_fake = before
        terms = [
            F.relu(r.float() - mean_fake).square().mean() + F.relu(mean_real - f.float()).square().mean()
            for r, f in zip(real, fake, strict=True)
        ]
        return torch.stack(terms).mean()


def cutmix_mask(count: int, height: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """Masks of CutMix (Yun et al. 2019), 1 where an image is real: (count, 1, height, width), on the CPU.

    A box about a uniform centre, cut at the borders, its share of the area uniform before that; what is real is
    inside or outside of it with equal chance (Schonfeld et al. 2020).

    Args:
        generator: of random numbers, on the CPU; none: torch's global one.
    """
    area, row, column, side = torch.rand(4, count, 1, generator=generator)
    rows, columns = (
        (torch.arange(size) + 0.5 - centre * size).abs() < area.sqrt() * size / 2
        for size, centre in ((height, row), (width, column))
    )
    box = rows[:, None, :, None] & columns[:, None, None, :]
    return (box ^ (side < 0.5).view(-1, 1, 1, 1)).float()


def cutmix(real: Tensor, fake: Tensor, mask: Tensor) -> Tensor:
    """`real` where the mask is 1 and `fake` where it is 0: images, or the logits of a pixel head."""
    return mask * real + (1 - mask) * fake


def cutmix_discriminator(
    real: Logits, fake: Logits, mixed: Logits, mask: Tensor, loss: Adversarial = "hinge", consistency: float = 0.5
) -> Tensor:
    """What CutMix adds to the loss of a discriminator with a global and a per-pixel head (Schonfeld et al. 2020).

    The mixed image is fake to the global head, and to the pixel head what the mask says of each pixel; heads count
    equally. To it comes the mean squared difference of the pixel head's logits of the mix and the mix of its logits.

    Args:
        real, fake, mixed: logits of the real images, of the made ones, and of `cutmix` of both.
        mask: (N, 1, H, W), of that mix.
        consistency: weight of the squared difference; theirs is 1 beside the sum of the heads, which is here a mean.
    """
    overall, per_pixel = mixed
    fooled = 0.5 * (_miss(-overall, loss).mean() + _miss((2 * mask - 1) * per_pixel.float(), loss).mean())
    return fooled + consistency * l2(per_pixel, cutmix(real[1].float(), fake[1].float(), mask))


def gradient_norms(
    reconstruction: Tensor,
    adversarial: Tensor,
    last_layer: Tensor,
    average: Average = lambda gradient: gradient,
) -> tuple[Tensor, Tensor]:
    """L2 norms of the two losses' gradients at the decoder's last layer (Eq. 2, Figure 7), as fp32 scalars.

    Both graphs stay alive, no `.grad` is touched, and no gradient flows through the norms. Over several workers,
    `average` takes the mean of a gradient over them, so that all get the norms of the whole batch.
    """

    def norm(loss: Tensor) -> Tensor:
        if not loss.requires_grad:  # no term but the adversarial one counts
            return last_layer.new_zeros(())
        (gradient,) = torch.autograd.grad(
            loss, [last_layer], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.linalg.vector_norm(average(gradient.float())).detach()

    return norm(reconstruction), norm(adversarial)


def balance(reconstruction: Tensor, adversarial: Tensor) -> Tensor:
    """Eq. 2 of two gradients' norms: ``0.5 * reconstruction / (adversarial + 1e-4)``, the ratio clamped to 1e4 as by
    Esser et al. (2021)."""
    return 0.5 * (reconstruction / (adversarial + 1e-4)).clamp(0, 1e4)


def adaptive_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    last_layer: Tensor,
    average: Average = lambda gradient: gradient,
) -> Tensor:
    """Adversarial weight that balances the two losses' gradients at the decoder's last layer (Eq. 2): `balance` of
    `gradient_norms`."""
    return balance(*gradient_norms(reconstruction, adversarial, last_layer, average))
