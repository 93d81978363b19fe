"""Load any image autoencoder of diffusers, LiteVAE included; `litevae.latents` encodes with it."""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError

from litevae import hub
from litevae.autoencoder import LiteVAE
from litevae.distilled import autoencoder_class
from litevae.errors import UserError
from litevae.model_folder import described, model_config, only_variant, weight_files


def load_autoencoder(
    folder: str | Path,
    subfolder: str | None = None,
    variant: str | None = None,
    torch_dtype: torch.dtype = torch.float32,
) -> ModelMixin:
    """Load the autoencoder in a model folder, in eval mode.

    The model can be a LiteVAE or any image autoencoder of diffusers. Its weights may be split over several files.

    Args:
        folder: Model folder, or the name of a model on the Hugging Face Hub (see `litevae.hub`).
        subfolder: Folder below it that holds the model, e.g. "vae".
        variant: Variant of the weights, e.g. "fp16" for `diffusion_pytorch_model.fp16.safetensors`. None takes the
            files without a variant or, if there are none, the only variant there is.
        torch_dtype: Data type that the weights are converted to.

    Raises:
        UserError: if the folder does not exist or is not a model folder, if it holds its weights only as
            pickles, if its class is not an image autoencoder, or if its weights do not fit its config.
    """
    folder = hub.local_folder(folder)
    folder = folder / (subfolder or "")
    name = str(model_config(folder, variant).get("_class_name", "model without a class name"))
    family = autoencoder_class(name)
    if family is None:
        raise UserError(
            f"{folder} holds a {name}, not a LiteVAE or an autoencoder of diffusers {diffusers.__version__}"
        )
    weight_files(folder, variant)
    try:
        # The loading report is checked below, so that a missing or renamed tensor does not stay randomly initialised.
        with _own_entries_expected():
            model, report = family.from_pretrained(
                folder,
                output_loading_info=True,
                use_safetensors=True,
                local_files_only=True,
                torch_dtype=torch_dtype,
                variant=variant or only_variant(folder),
            )
    except UserError:
        raise
    except (OSError, RuntimeError, TypeError, ValueError, LookupError, AttributeError, SafetensorError) as error:
        raise UserError(f"{folder} is damaged, its model can't be loaded: {error}") from error
    except (ImportError, NameError) as error:
        raise UserError(f"{folder} holds a {name} that needs a package which is not installed: {error}") from error
    if wrong := [key for keys in report.values() for key in keys]:
        raise UserError(f"{folder}: the weights do not fit config.json; e.g. {wrong[0]} ({len(wrong)} tensors)")
    other = any(isinstance(layer, torch.nn.Conv1d | torch.nn.Conv3d) for layer in model.modules())
    if other or (family is not LiteVAE and model.config.get("in_channels", 3) != 3):
        raise UserError(f"{folder} holds a {name}, which encodes video, sound or layers, not RGB images")
    return model.eval()


@contextmanager
def _own_entries_expected() -> Iterator[None]:
    """Leave out diffusers' warning of the entry that AutoencoderTiny writes into its config but does not take."""
    own = re.compile(
        r"The config attributes \{'block_out_channels': [^:]*\} were passed to AutoencoderTiny, but are not"
    )
    logger = logging.getLogger("diffusers.configuration_utils")

    def wanted(record: logging.LogRecord) -> bool:
        return not own.match(record.getMessage())

    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def fingerprint(folder: str | Path) -> str:
    """Return the sha256 over a model folder's config (see `described`) and all its weight files.

    `folder` can also be the name of a model on the Hugging Face Hub.

    Raises:
        UserError: if the folder is not a model folder.
    """
    folder = hub.local_folder(folder)
    digest = hashlib.sha256(json.dumps(described(model_config(folder)), sort_keys=True).encode())
    for name in weight_files(folder):
        with open(folder / name, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
