"""The loss terms, each a pure function of tensors.

All are means over elements, so that one set of weights serves every resolution, and all are element-wise
arithmetic on fp32 copies of what they get: autocast has no convolution or product here to lower. Images are
(N, C, H, W) in [-1, 1]; every term of two images is symmetric in them.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from litevae.wavelet import haar_dwt

Logits = tuple[Tensor, ...]  # one tensor per head of a discriminator


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


def hinge_discriminator(real: Logits, fake: Logits) -> Tensor:
    """Half of each head's hinge on real (above 1) and fake (below -1) logits; heads count equally."""
    heads = zip(real, fake, strict=True)
    terms = [F.relu(1 - r.float()).mean() + F.relu(1 + f.float()).mean() for r, f in heads]
    return 0.5 * torch.stack(terms).mean()


def hinge_generator(fake: Logits) -> Tensor:
    """Raises the logits of fakes; heads count equally."""
    return -torch.stack([logits.float().mean() for logits in fake]).mean()


def adaptive_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    last_layer: Tensor,
    average: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Tensor:
    """Adversarial weight that balances the two losses' gradients at the decoder's last layer (Eq. 2).

    ``0.5 * |d reconstruction| / (|d adversarial| + 1e-4)``, the ratio clamped to 1e4 as by Esser et al. (2021).
    Both graphs stay alive, no `.grad` is touched, and no gradient flows through the weight. Over several workers,
    `average` takes the mean of a gradient over them, so that all get the weight of the whole batch.
    """
    norms = []
    for loss in (reconstruction, adversarial):
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        norms.append(torch.linalg.vector_norm(average(gradient.float())))
    return 0.5 * (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()
