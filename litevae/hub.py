"""Models named as on the Hugging Face Hub (org/name), wherever a model folder is named. Needs no PyTorch."""

import logging
import os
import re
from functools import lru_cache, partial
from pathlib import Path

from litevae.errors import UserError

logger = logging.getLogger(__name__)

_PART = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_NAME = re.compile(rf"(?P<repo>{_PART}/{_PART})(?P<subfolder>(?:/\w[\w.-]*)*)(?:@(?P<revision>\w[\w./-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REFUSED = {  # what the Hub's answers mean
    401: "does not exist, or is private or gated and needs `hf auth login`",
    403: "is private or gated: accept its terms on its page, and run `hf auth login`",
    404: "does not exist, or has no such revision",
}
# Only the config and safetensors weights, never pickles; model_index.json tells a whole pipeline from a model.
_FILES = ("config.json", "model_index.json", "diffusion_pytorch_model*.safetensors", "*.safetensors.index*.json")


def is_name(place: str | Path) -> bool:
    """Return whether a place is the name of a model on the Hub, not a local path.

    Names are org/name, org/name/subfolder, and either with @revision. Whatever exists locally is local, and so is a
    path that begins with "/", "./", "../" or "~", or whose first folder exists here: "runs/vae/modle" is a
    misspelt folder if there is a folder `runs`.
    """
    text = str(place)
    if not _NAME.fullmatch(text) or os.path.lexists(text):
        return False
    # A pinned name means the same on a node where a folder has the organisation's name.
    return is_pinned(text) or not os.path.lexists(text.partition("/")[0])


def is_pinned(place: str | Path) -> bool:
    """Return whether a name on the Hub says the commit, as `pinned` returns it."""
    return bool(_COMMIT.fullmatch(str(place).partition("@")[2]))


def local_folder(place: str | Path) -> Path:
    """Return the local folder of a model: the place itself, or for a name on the Hub the folder it is downloaded to.

    Raises:
        UserError: if it can't be downloaded and is not in the cache of downloads; it says what is needed.
    """
    return Path(_download(str(place))[1]) if is_name(place) else Path(place)


def pinned(place: str | Path) -> str:
    """Return where every node finds the same model: an absolute path, or a name on the Hub with its commit.

    Raises:
        UserError: as `local_folder`.
    """
    if not is_name(place):
        return os.path.abspath(place)
    return f"{str(place).partition('@')[0]}@{_download(str(place))[0]}"


@lru_cache(maxsize=64)  # a job must not see two commits of one branch
def _download(name: str) -> tuple[str, str]:
    """Download a model into the cache of huggingface_hub; return its commit and its folder."""
    from huggingface_hub import HfApi, constants, snapshot_download

    match = _NAME.fullmatch(name)
    assert match
    repo, subfolder, asked = match["repo"], match["subfolder"].strip("/"), match["revision"] or "main"
    prefix = f"{subfolder}/" if subfolder else ""
    snapshot = partial(snapshot_download, repo, allow_patterns=[prefix + pattern for pattern in _FILES])
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    try:
        if not reason:
            if not _COMMIT.fullmatch(asked):  # of a commit a whole copy is used without asking the Hub
                HfApi().model_info(repo, revision=asked)  # raises where `snapshot` would silently use a copy
            folder = snapshot(revision=asked)
    except Exception as error:  # noqa: BLE001 - which classes there are depends on the version's HTTP client
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in _REFUSED:
            raise UserError(_unknown(name, f"on the Hugging Face Hub {repo} {_REFUSED[status]}")) from None
        reason = f"{constants.ENDPOINT} can't be reached ({type(error).__name__})"
    if reason:
        try:
            folder = snapshot(revision=asked, local_files_only=True)
        except (OSError, ValueError):  # what huggingface_hub raises when its cache has not all of it
            options = f" --revision {asked}" * (asked != "main") + f' --include "{prefix}*"' * bool(prefix)
            raise UserError(_unknown(
                name,
                f"as a model of the Hugging Face Hub it is not in the cache {constants.HF_HUB_CACHE}, and {reason}. "
                f"It needs {prefix}config.json and {prefix}diffusion_pytorch_model.safetensors: where there is a "
                f"connection, run `hf download {repo}{options}` and copy the cache here (HF_HOME says where it is), or "
                f"add `--local-dir FOLDER` and give that folder; a gated one needs `hf auth login` before",
            )) from None  # fmt: skip
        if not _COMMIT.fullmatch(asked):
            logger.warning("%s: %s; the copy in %s is used", name, reason, folder)
    commit, place = Path(folder).name, Path(folder) / subfolder
    if (place / "model_index.json").is_file():
        raise UserError(f"{name} is a whole diffusers pipeline; give its autoencoder: {_below(name, 'vae')}")
    if not (place / "config.json").is_file():
        raise UserError(f"{name} is no model: {repo} on the Hugging Face Hub has no {prefix}config.json")
    return commit, str(place)


def _below(name: str, folder: str) -> str:
    """Return the name of a folder below a model's name."""
    place, at, revision = name.partition("@")
    return f"{place}/{folder}{at}{revision}"


def _unknown(name: str, more: str) -> str:
    """Return the message for what is neither a folder here nor a model of the Hub."""
    return (
        f"{name} does not exist; models are folders on disk, as a training writes them (runs/vae/model), or names on "
        f"the Hugging Face Hub (org/name, org/name/subfolder, org/name@revision), and {more}"
    )
