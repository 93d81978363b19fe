"""What can be known about the inputs of a job without PyTorch and Ray, so that mistakes are answered at once.

Only existence is checked. Whatever passes is looked at again, and more closely, by the code that reads it.
"""

import os
import re

from litevae import hub, storage
from litevae.errors import UserError
from litevae.model_folder import model_config
from pipelines.data.config import Source
from pipelines.data.unusable import explain_missing, explain_uri

_PATTERN = re.compile(r"[*?\[{]")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def check_source(config: Source, name: str = "source") -> None:
    """Check that a source's local path exists. A pattern and a path on S3 are left to `open_source`.

    Args:
        config: the source's config section.
        name: the name of that section, for error messages.

    Raises:
        UserError: if no uri is given, or it is of no kind that can be read, or there is nothing.
    """
    if not config.uri:
        raise UserError(f"{name}.uri is empty; give a folder of images or Parquet file(s): {name}.uri=/data/photos")
    try:
        path = storage.absolute(config.uri)
    except UserError as error:
        raise UserError(f"{name}.uri: {error}{explain_uri(config.uri)}") from None
    if not storage.is_remote(path) and not os.path.lexists(path) and not _PATTERN.search(path):
        raise UserError(explain_missing(f"{name}.uri={config.uri}", path))


def check_model(field: str, path: str) -> None:
    """Check that an autoencoder's folder is there, and holds a config and weights.

    A model of the Hugging Face Hub is downloaded here, so that a wrong name is answered at once.

    Args:
        field: the config field that names it, for error messages.
        path: the folder, or a name on the Hub (see `litevae.hub`).

    Raises:
        UserError: if no folder is given, it is no model folder, or the Hub's model can't be had.
    """
    if hub.is_name(path):
        try:
            hub.local_folder(path)
        except UserError as error:
            raise UserError(f"{field}={error}") from None
    else:
        check_folder(field, path, "runs/vae/model")
    try:
        model_config(path)
    except UserError as error:
        raise UserError(f"{field}: {error}") from None


def check_folder(field: str, path: str, example: str) -> None:
    """Check that a folder is there.

    Args:
        field: the config field that names it, for error messages.
        path: the folder.
        example: where such a folder may be, for error messages.

    Raises:
        UserError: if no folder is given or there is none.
    """
    if not path:
        raise UserError(f"{field} is empty; give a model folder: {field}={example}")
    if os.path.isdir(path):
        return
    if os.path.lexists(path):
        raise UserError(f"{field}={path} is not a folder; give one such as {example}")
    advice = f"models are folders on disk, as a training writes them ({example})"
    if _HUB_ID.fullmatch(path) and not os.path.isdir(path.partition("/")[0]):
        name = path.partition("/")[2]
        advice = (
            f"models are folders on disk. If it is a model of the Hugging Face Hub, download it first: "
            f"hf download {path} --local-dir {name}, then {field}={name} (a gated one needs `hf auth login` before)"
        )
    raise UserError(f"{field}={path} does not exist; {advice}")


def check_file(field: str, path: str) -> None:
    """Check that a file of weights is there, if one is named.

    Raises:
        UserError: if there is none.
    """
    if path and not os.path.isfile(path):
        raise UserError(f"{field}: no weights file at {path}")
