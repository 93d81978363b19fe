"""The loss terms. Each is a pure function of tensors; only `LeCam` has a state.

All terms except R1 are means over elements, so that one set of weights fits every resolution. All are element-wise
arithmetic on fp32 copies of their inputs, so autocast finds no convolution or matrix product here to compute in lower
precision. Images are (N, C, H, W) in [-1, 1]. Every term of two images is symmetric in them.
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
Average = Callable[[Tensor], Tensor]  # returns the mean of a tensor over all workers, the same on each of them


class Posterior(Protocol):
    """A diagonal Gaussian distribution over latents."""

    mean: Tensor
    logvar: Tensor


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean absolute difference of two tensors."""
    return (x.float() - y.float()).abs().mean()


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared difference of two tensors."""
    return (x.float() - y.float()).square().mean()


def kl(posterior: Posterior) -> Tensor:
    """Return the KL divergence of a posterior from the standard normal distribution, in nats per latent element."""
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def wavelet(x: Tensor, y: Tensor, eps: float = 1e-3) -> Tensor:
    """Return the Charbonnier distance of the H, V and D bands of one Haar level (Section 4).

    It is `eps`, its minimum, if x equals y. Because the transform is linear, one transform of the difference is enough.
    H and W must be even. The paper does not state `eps` and the number of levels.
    """
    details = haar_dwt(x.float() - y.float())[:, x.shape[1] :]
    return (details.square() + eps**2).sqrt().mean()


def gaussian(x: Tensor, y: Tensor) -> Tensor:
    """Return the L1 distance of the high frequencies, x - blur(x), of two images (Section 4).

    Because the blur is linear, one blur of the difference is enough. The paper does not state the filter. This one is
    5x5 with sigma 1 and reflected borders, as in Zamfir et al. (2023), whom the paper cites.
    """
    difference = x.float() - y.float()
    return (difference - blur(difference)).abs().mean()


def blur(x: Tensor, sigma: float = 1.0, radius: int = 2) -> Tensor:
    """Apply a Gaussian filter with 2 radius + 1 taps per axis and mirrored borders to (N, C, H, W).

    The result has the shape and precision of `x`. It is computed as a sum of shifted images: this is exact, where
    convolutions on a GPU round to TF32, and in float64 it is faster on CPUs.
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
    """Return the L1 distance of images and reconstructions, weighted by `artifact_map` (Liang et al. 2022; Table 15).

    Args:
        x: Images (N, C, H, W).
        y: Reconstructions of `x`.
        y_ema: Reconstructions of `x` by the EMA model, which have fewer artifacts. No gradient flows through the map.
    """
    return (artifact_map(x, y, y_ema) * (x.float() - y.float()).abs()).mean()


@torch.no_grad()
def artifact_map(x: Tensor, y: Tensor, y_ema: Tensor, window: int = 7) -> Tensor:
    """Return a map (N, 1, H, W) of how likely each pixel of the reconstruction `y` of `x` is an artifact.

    The value of a pixel is the fifth root of the variance of the residual over the image, times its variance in a
    window around the pixel, with mirrored borders. Both variances are unbiased, and the residual is summed over
    channels. The value is 0 where `y` is closer to `x` than `y_ema` is. Residuals are scaled as for images in [0, 1],
    because the published loss weights are for that range.
    """
    residual, averaged = ((x.float() - other.float()).abs().sum(1, keepdim=True) / 2 for other in (y, y_ema))
    windows = F.pad(residual, (window // 2,) * 4, mode="reflect").unfold(2, window, 1).unfold(3, window, 1)
    overall = residual.var((1, 2, 3), keepdim=True) ** 0.2
    return torch.where(residual < averaged, 0.0, overall * windows.var((-2, -1)))


def hinge_discriminator(real: Logits, fake: Logits) -> Tensor:
    """Return half the sum of the hinge losses of real logits (0 above 1) and fake logits (0 below -1).

    It is averaged over heads.
    """
    return _discriminator(real, fake, "hinge")


def hinge_generator(fake: Logits) -> Tensor:
    """Return the hinge loss of the generator: minus the mean of the fake logits, averaged over heads."""
    return -torch.stack([logits.float().mean() for logits in fake]).mean()


def logistic_discriminator(real: Logits, fake: Logits) -> Tensor:
    """Return half the sum of the cross entropies of real and fake logits (Goodfellow et al. 2014).

    It is averaged over heads.
    """
    return _discriminator(real, fake, "logistic")


def logistic_generator(fake: Logits) -> Tensor:
    """Return the non-saturating generator loss: the cross entropy of fakes labelled as real, averaged over heads."""
    return torch.stack([_miss(logits, "logistic").mean() for logits in fake]).mean()


def _discriminator(real: Logits, fake: Logits, loss: Adversarial) -> Tensor:
    terms = [_miss(r, loss).mean() + _miss(-f, loss).mean() for r, f in zip(real, fake, strict=True)]
    return 0.5 * torch.stack(terms).mean()


def _miss(logits: Tensor, loss: Adversarial) -> Tensor:
    """Return the discriminator loss of each logit that should be high."""
    return F.relu(1 - logits.float()) if loss == "hinge" else F.softplus(-logits.float())


def r1(logits: Logits, x: Tensor) -> Tensor:
    """Return the R1 penalty: the squared norm of the gradient of the logits at real images (Mescheder et al. 2018).

    It is averaged over images. Their factor gamma / 2 is not included: it is the weight of this term. The logits of all
    heads and of all positions of a map are summed, so a weight that suits a single logit is too large for a map. The
    result can be differentiated with respect to the weights of the discriminator.

    Args:
        logits: Logits of the discriminator for `x`.
        x: Real images that require a gradient.
    """
    total = torch.stack([head.float().sum() for head in logits]).sum()
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    return gradient.float().square().sum((1, 2, 3)).mean()


class LeCam(nn.Module):
    """LeCam regularisation (Tseng et al. 2021).

    It keeps real and fake logits from drifting past each other's running mean. The loss is mean relu(real - mean of
    fakes)^2 + mean relu(mean of reals - fake)^2, averaged over heads. There is one running mean for real and one for
    fake logits, each over all heads. A call uses the running means from before the call and updates them afterwards;
    the first call uses the means of its own logits. The state is a buffer of two fp32 numbers, which are NaN before
    the first call.

    Args:
        average: Function that averages over workers, as in `gradient_norms`, so that all workers keep the same means.
        decay: Decay of the running means per call.
        device: Device of the logits.
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
            # Means that are not finite are ignored: the training step that they belong to is skipped.
            self.means.copy_(torch.where(now.isfinite(), before.lerp(now, 1 - self.decay), self.means))
        mean_real, mean_fake = before
        terms = [
            F.relu(r.float() - mean_fake).square().mean() + F.relu(mean_real - f.float()).square().mean()
            for r, f in zip(real, fake, strict=True)
        ]
        return torch.stack(terms).mean()


def cutmix_mask(count: int, height: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw CutMix masks (Yun et al. 2019), which are 1 where the mixed image is real.

    Each mask has a box with a uniformly random centre. The share of the area that the box covers is uniform too, before
    the box is clipped at the borders. The real part is inside or outside the box with equal probability (Schonfeld et
    al. 2020).

    Args:
        count: Number of masks.
        height: Height in pixels.
        width: Width in pixels.
        generator: Random generator on the CPU. None uses torch's global one.

    Returns:
        Masks (count, 1, height, width), fp32, on the CPU.
    """
    area, row, column, side = torch.rand(4, count, 1, generator=generator)
    rows, columns = (
        (torch.arange(size) + 0.5 - centre * size).abs() < area.sqrt() * size / 2
        for size, centre in ((height, row), (width, column))
    )
    box = rows[:, None, :, None] & columns[:, None, None, :]
    return (box ^ (side < 0.5).view(-1, 1, 1, 1)).float()


def cutmix(real: Tensor, fake: Tensor, mask: Tensor) -> Tensor:
    """Mix two batches: `real` where the mask is 1, and `fake` where it is 0.

    The batches are images, or the logits of a pixel head.
    """
    return mask * real + (1 - mask) * fake


def cutmix_discriminator(
    real: Logits, fake: Logits, mixed: Logits, mask: Tensor, loss: Adversarial = "hinge", consistency: float = 0.5
) -> Tensor:
    """Return the CutMix loss of a discriminator with a global and a per-pixel head (Schonfeld et al. 2020).

    The global head should call the mixed image fake, and the pixel head should call each pixel what the mask says. The
    two heads count equally. A consistency term is added: the mean squared difference between the pixel logits of the
    mixed image and the mix of the pixel logits.

    Args:
        real: Logits of real images.
        fake: Logits of generated images.
        mixed: Logits of the `cutmix` of both.
        mask: Mask (N, 1, H, W) of the mix.
        loss: "hinge" or "logistic".
        consistency: Weight of the consistency term. In the paper by Schonfeld et al. the weight is 1, with the sum of
            the heads; here it is 0.5 with their mean.
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
    """Return the L2 norms of the gradients of two losses at the last layer of the decoder (Eq. 2, Figure 7).

    Both graphs are kept, no `.grad` is changed, and no gradient flows through the norms.

    Args:
        reconstruction: The reconstruction loss, a scalar.
        adversarial: The adversarial loss of the generator, a scalar.
        last_layer: Weight of the last layer of the decoder.
        average: Function that averages a gradient over all workers, so that all get the norms of the whole batch.

    Returns:
        The norm for the reconstruction loss and that for the adversarial loss, fp32 scalars.
    """

    def norm(loss: Tensor) -> Tensor:
        if not loss.requires_grad:  # the weights of all its terms are 0
            return last_layer.new_zeros(())
        (gradient,) = torch.autograd.grad(
            loss, [last_layer], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.linalg.vector_norm(average(gradient.float())).detach()

    return norm(reconstruction), norm(adversarial)


def balance(reconstruction: Tensor, adversarial: Tensor) -> Tensor:
    """Return the adversarial weight of Eq. 2 from two gradient norms: 0.5 * reconstruction / (adversarial + 1e-4).

    The ratio is clamped to at most 1e4, as in Esser et al. (2021).
    """
    return 0.5 * (reconstruction / (adversarial + 1e-4)).clamp(0, 1e4)
