"""LiteVAE: wavelet-based autoencoders for latent diffusion (arXiv 2405.14477). It needs neither Ray nor MLflow.

This module exports the models and the functions to load them. diffusers looks the models up here by name when it loads
the folder of a pipeline.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from litevae.errors import UserError

if TYPE_CHECKING:
    from litevae.any_autoencoder import load_autoencoder
    from litevae.autoencoder import LiteVAE
    from litevae.distilled import DistilledVAE
    from litevae.dit import DiT
    from litevae.ldm import NormalizedAutoencoder, load_ldm
    from litevae.pipeline import LatentDiffusionPipeline

__all__ = [
    "DiT",
    "DistilledVAE",
    "LatentDiffusionPipeline",
    "LiteVAE",
    "NormalizedAutoencoder",
    "UserError",
    "load_autoencoder",
    "load_ldm",
]

_MODULES = {"LiteVAE": "autoencoder", "load_autoencoder": "any_autoencoder", "DiT": "dit"}
_MODULES["DistilledVAE"] = "distilled"
_MODULES |= {"NormalizedAutoencoder": "ldm", "load_ldm": "ldm"}
_MODULES["LatentDiffusionPipeline"] = "pipeline"
_MODULES["ModelMixin"] = "model_card"  # diffusers looks for this in a library whose models it loads


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used.

    torch and diffusers take seconds to import, and `--help` of a job or a typo in its config does not need them.
    """
    if name in _MODULES:
        return getattr(import_module(f"litevae.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'litevae' has no attribute {name!r}")
