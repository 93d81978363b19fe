"""LiteVAE: wavelet-based autoencoders for latent diffusion (arXiv 2405.14477). Needs neither Ray nor MLflow."""

from typing import TYPE_CHECKING, Any

from litevae.errors import UserError

if TYPE_CHECKING:
    from litevae.autoencoder import LiteVAE, load_autoencoder

__all__ = ["LiteVAE", "UserError", "load_autoencoder"]


def __getattr__(name: str) -> Any:
    """torch and diffusers take seconds to import, and a job's --help or a typo in its config does not need them."""
    if name in ("LiteVAE", "load_autoencoder"):
        from litevae import autoencoder

        return getattr(autoencoder, name)
    raise AttributeError(f"module 'litevae' has no attribute {name!r}")
