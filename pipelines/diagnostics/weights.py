"""Fetch the published weights that LPIPS and FID are computed with (`make weights`).

PyTorch is not imported: what a file is, is told by its name and its SHA-256.
"""

import hashlib
import os
import urllib.request
import uuid
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path

from litevae import storage, weight_files
from litevae.errors import UserError
from pipelines.diagnostics.config import Weights
from pipelines.runtime.logs import say

FILES = {weight_files.LPIPS["vgg"]: "LPIPS", weight_files.INCEPTION[0]: "FID and Inception Score"}  # file -> its use
SILENCE = 60  # seconds without a byte from a server after which a download is given up
_BLOCK = 2**20


def fetch(config: Weights, files: Mapping[str, str] | None = None) -> None:
    """Fetch the files that are missing.

    Args:
        config: the job's config.
        files: which files, by name, each with what it is for; None: `FILES`.

    Raises:
        UserError: if a file could not be fetched, or another one is in its place; the message names all of them, with
            what to do. The others were fetched.
    """
    problems = []
    for file, use in (FILES if files is None else files).items():
        path = weight_files.in_hub(file)
        try:
            _fetch(file, path, config.force)
            say(f"{use}: {path}")
        except UserError as error:
            problems.append(f"{use}: {error}")
    if problems:
        raise UserError("\n".join(problems))


def _fetch(file: str, path: Path, force: bool) -> None:
    """Fetch a file unless it is there. It is written whole or not at all."""
    if path.parts[0] == "~":
        raise UserError("there is no home folder to put it in; set TORCH_HOME or HOME")
    digits = weight_files.digits_of(file)
    if path.exists():
        found = _sha256(path)
        if found.startswith(digits):
            return
        if not force:
            raise UserError(
                f"{path} is not the published file: its SHA-256 begins with {found[:8]}, not with {digits}. Fetch it "
                f"again with force=true, which replaces it"
            )
    url = weight_files.url_of(file)
    by_hand = f"Download it on another machine and copy it: {url} -> {path} (its SHA-256 begins with {digits})"
    temporary = path.parent / f".tmp-{uuid.uuid4().hex}"
    say(f"fetching {url}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with temporary.open("wb") as out:
            try:
                with urllib.request.urlopen(url, timeout=SILENCE) as answer:
                    while block := answer.read(_BLOCK):
                        digest.update(block)
                        try:
                            out.write(block)
                        except OSError as error:
                            raise storage.unwritable(str(path), error) from error
            except UserError:
                raise
            except (OSError, HTTPException, ValueError) as error:  # URLError is an OSError
                reason = getattr(error, "reason", None) or error
                raise UserError(f"{url} can't be fetched: {reason}. {by_hand}") from None
            out.flush()
            os.fsync(out.fileno())
        if not digest.hexdigest().startswith(digits):
            raise UserError(
                f"{url} gave another file, or a part of it: its SHA-256 begins with {digest.hexdigest()[:8]}, not with "
                f"{digits}; nothing was written. {by_hand}"
            )
        os.replace(temporary, path)
    except UserError:
        raise
    except OSError as error:
        raise storage.unwritable(str(path), error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
