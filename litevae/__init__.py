"""LiteVAE: wavelet-based autoencoders for latent diffusion (arXiv 2405.14477). Needs neither Ray nor MLflow."""

from litevae.autoencoder import LiteVAE, load_autoencoder
from litevae.errors import UserError

__all__ = ["LiteVAE", "UserError", "load_autoencoder"]
