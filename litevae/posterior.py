"""The posterior over latents, in fp32 whatever computes the network."""

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor


class Posterior(DiagonalGaussianDistribution):
    """A diagonal Gaussian over latents whose parameters and draws are computed in fp32.

    bf16 has 8 significant bits, so that noise times a small standard deviation can be lost when it is added to a mean.
    The error that the rest of a network makes in bf16 stays: this class does not remove it.

    Args:
        parameters: Moments (N, 2 n_z, h, w), mean then log-variance. They are converted to fp32 (fp64 stays).
        deterministic: Whether the standard deviation is zero.
        dtype: The dtype of what `sample` and `mode` return, converted after the draw; None for that of the parameters.
            It is fp16 or bf16 where the weights of the model are, because diffusers pipelines feed latents to a
            denoiser of that dtype without a conversion.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False, dtype: torch.dtype | None = None):
        super().__init__(parameters.to(torch.promote_types(parameters.dtype, torch.float32)), deterministic)
        self.dtype = dtype or self.parameters.dtype

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw latents (N, n_z, h, w)."""
        return super().sample(generator).to(self.dtype)

    def mode(self) -> Tensor:
        """Return the mean (N, n_z, h, w)."""
        return super().mode().to(self.dtype)
