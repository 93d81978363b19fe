"""The losses of train_vae: the autoencoder's terms, the weight of the adversarial one, and the discriminator's loss."""

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from litevae import losses, order
from litevae.discriminators import Discriminator
from litevae.perceptual import SqueezeNetFeatures, load_esrgan, load_lpips
from litevae.precision import autocast
from pipelines.training import ranks
from pipelines.training.config import TrainVAE


class AutoencoderLoss(nn.Module):
    """The weighted sum of the autoencoder's loss terms, except the adversarial one.

    Its modules are frozen backbones; nothing in it is trained.

    Args:
        config: the run's config, whose `loss` gives weights and starts of the terms.
        lpips: whether the LPIPS term is on.
    """

    def __init__(self, config: TrainVAE, lpips: bool):
        super().__init__()
        self.config = config.loss
        self.lpips = load_lpips(self.config.lpips.net, self.config.lpips.weights) if lpips else None
        features = self.config.features
        self.features = SqueezeNetFeatures(features.weights) if features.weight else None
        self.esrgan = load_esrgan(self.config.esrgan.weights) if self.config.esrgan.weight else None

    def forward(
        self,
        x: Tensor,
        reconstruction: Tensor,
        posterior: DiagonalGaussianDistribution,
        images: int,
        averaged: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss terms that are on after `images` images.

        Args:
            x: images (N, 3, H, W) in [-1, 1].
            reconstruction: the model's reconstruction of `x`, of the same shape.
            posterior: the encoder's posterior; where it is deterministic there is no KL term.
            images: images seen before this step.
            averaged: the averaged model's reconstruction, if LDL needs it (`wants_averaged`).

        Returns:
            The weighted sum without the adversarial term, and each term unweighted, as scalars.
        """
        terms = {
            "l1": lambda: losses.l1(reconstruction, x),
            "l2": lambda: losses.l2(reconstruction, x),
            "wavelet": lambda: losses.wavelet(reconstruction, x),
            "gaussian": lambda: losses.gaussian(reconstruction, x),
        }
        if not posterior.deterministic:
            terms["kl"] = lambda: losses.kl(posterior)
        if self.lpips is not None:
            terms["lpips"] = lambda: self.lpips(reconstruction, x).mean()  # type: ignore[misc]
        if self.features is not None:
            terms["features"] = lambda: self.features(reconstruction, x).mean()  # type: ignore[misc]
        if self.esrgan is not None:
            terms["esrgan"] = lambda: self.esrgan(reconstruction, x).mean()  # type: ignore[misc]
        if averaged is not None:
            terms["ldl"] = lambda: losses.ldl(x, reconstruction, averaged)
        values = {name: term() for name, term in terms.items() if self._counts(name, images)}
        total = torch.zeros((), device=x.device)
        for name, value in values.items():
            total = total + getattr(self.config, name).weight * value
        return total, values

    def needs_reconstruction(self, images: int) -> bool:
        """Return whether a term that compares pixels is on in the step after `images` images."""
        names = ("l1", "l2", "wavelet", "gaussian", "lpips", "features", "esrgan")
        return any(self._counts(name, images) for name in names)

    def wants_averaged(self, images: int) -> bool:
        """Return whether the step after `images` images needs the averaged model's reconstruction (for LDL)."""
        return self._counts("ldl", images)

    def _counts(self, name: str, images: int) -> bool:
        """Return whether the term has a weight and has started."""
        term = getattr(self.config, name)
        return bool(term.weight) and images >= term.start


class AdversarialLoss:
    """The two losses of the GAN: the autoencoder's adversarial term with its weight, and the discriminator's own loss.

    Args:
        config: the run's config.
        disc: the discriminator.
        disc_net: the discriminator as it is trained: under DDP where there are several ranks.
        lecam: the LeCam regularizer of the discriminator, if it is on.
    """

    def __init__(self, config: TrainVAE, disc: Discriminator, disc_net: nn.Module, lecam: losses.LeCam | None):
        self.config, self.disc, self.disc_net, self.lecam = config, disc, disc_net, lecam

    def term(
        self, loss: Tensor, reconstruction: Tensor, last_layer: Tensor, images: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weight of the adversarial term, and the term with its metrics.

        `gradient_ratio` (Figure 7) is the norm of the weighted term's gradient over that of all other terms, at the
        decoder's last layer.

        Args:
            loss: the weighted sum of all other terms.
            reconstruction: the model's reconstruction (N, 3, H, W) in [-1, 1].
            last_layer: weight of the decoder's last layer.
            images: images seen before this step.
        """
        config = self.config.loss.adversarial
        self.disc.requires_grad_(False)
        with autocast(loss.device, self.config.loop.precision):
            logits = self.disc(reconstruction)
        term = losses.hinge_generator(logits) if config.loss == "hinge" else losses.logistic_generator(logits)
        values = {"adversarial": term}
        weight = torch.full((), config.weight, device=loss.device)  # copying it from the host would wait for the device
        if config.adaptive or self._due(config.ratio_every, images):
            norms = losses.gradient_norms(loss, term, last_layer, ranks.average)
            if config.adaptive:
                values["adversarial_weight"] = weight = weight * losses.balance(*norms)
            values["gradient_ratio"] = weight * norms[1] / norms[0]
        return weight, values

    def discriminator_loss(self, x: Tensor, fake: Tensor, images: int, part: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the discriminator's loss on micro-batch number `part`, and its terms."""
        config = self.config.loss.adversarial
        penalized = config.r1 > 0 and self._due(config.r1_every, images)
        # All ranks decide the same, because each forward pass under DDP is a collective operation.
        # The last entry keeps this apart from (seed, position), which seeds the crop of an image; see `order.seed_for`.
        mixed = np.random.default_rng(order.seed_for(self.config.seed, images, part, 1)).random() < config.cutmix
        mask = losses.cutmix_mask(len(x), *x.shape[-2:]).to(x.device) if mixed else None
        batches = [x.requires_grad_(penalized), fake]
        if mask is not None:
            batches.append(losses.cutmix(x, fake, mask))
        with autocast(x.device, self.config.loop.precision):
            if self.disc.mixes_images:
                outputs = [self.disc_net(batch) for batch in batches]
            else:  # one forward pass for all batches, since DDP expects one forward per backward
                heads = [head.chunk(len(batches)) for head in self.disc_net(torch.cat(batches))]
                outputs = [tuple(head[n] for head in heads) for n in range(len(batches))]
        real, made, *mixture = outputs
        hinge = config.loss == "hinge"
        loss = (losses.hinge_discriminator if hinge else losses.logistic_discriminator)(real, made)
        values = {"discriminator": loss, "logits_real": _mean(real), "logits_fake": _mean(made)}
        if mask is not None:
            values["cutmix"] = losses.cutmix_discriminator(real, made, mixture[0], mask, config.loss)
            loss = loss + values["cutmix"]
        if self.lecam is not None:
            values["lecam"] = self.lecam(real, made)
            loss = loss + config.lecam * values["lecam"]
        if penalized:
            values["r1"] = losses.r1(real, x)
            loss = loss + config.r1 * config.r1_every * values["r1"]
            x.requires_grad_(False)
        return loss, values

    def _due(self, every: int, images: int) -> bool:
        """Return whether the step after `images` images is one of every `every` steps of its stage; False for 0."""
        begin = 0
        for stage in self.config.stages:
            if images < begin + stage.images or stage is self.config.stages[-1]:
                return every > 0 and (images - begin) // stage.batch_size % every == 0
            begin += stage.images
        return False


def _mean(logits: tuple[Tensor, ...]) -> Tensor:
    """Return the mean logit over the discriminator's heads, each head with the same weight."""
    return torch.stack([head.float().mean() for head in logits]).mean()
