"""The files of a model folder, which are looked at here without PyTorch."""

import json
import re
from pathlib import Path
from typing import Any

from litevae import hub
from litevae.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"  # lists the files when the weights are split over several
# The same files of a variant, e.g. diffusion_pytorch_model.fp16.safetensors.
_VARIANT = re.compile(
    r"diffusion_pytorch_model\.(?:safetensors\.index\.(?P<index>\w+)\.json|(?P<file>\w+)\.safetensors)"
)
# Entries of a LiteVAE's config that do not change what it returns.
STATISTICS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def model_config(folder: str | Path, variant: str | None = None) -> dict[str, Any]:
    """Read the config.json of a model folder, or of a model on the Hugging Face Hub (see `litevae.hub`).

    Args:
        folder: The model folder, or the model's name on the Hub.
        variant: Variant of the weights that will be loaded; None as in `weight_files`.

    Raises:
        UserError: if the folder is not a model folder, or holds no safetensors weights.
    """
    folder = hub.local_folder(folder)
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist")
    if (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is a whole diffusers pipeline; give its autoencoder: {folder / 'vae'}")
    there = {path.name for path in folder.iterdir()}
    weights = variant or not there.isdisjoint((WEIGHTS, INDEX)) or only_variant(folder)
    if missing := [name for name in ("config.json", *[WEIGHTS] * (not weights)) if name not in there]:
        hint = ""
        if pickles := sorted(name for name in there if name.endswith((".bin", ".ckpt", ".pt", ".pth"))):
            hint = f"; {pickles[0]} is a pickle, which can run any code and is never loaded: convert it to safetensors"
        elif others := sorted(name for name in there if name.endswith(".safetensors")):
            hint = f"; rename {others[0]} if it holds the weights"
        raise UserError(f"{folder} is not a model folder: it has no {' and no '.join(missing)}{hint}")
    return read_json(folder / "config.json")


def only_variant(folder: Path) -> str | None:
    """Return the variant of the weights, such as "fp16", if a folder has them only in one; else None.

    Raises:
        UserError: if it has several variants and no weights without one.
    """
    there = {path.name for path in folder.iterdir()}
    found = {match["index"] or match["file"] for match in map(_VARIANT.fullmatch, there) if match}
    if not there.isdisjoint((WEIGHTS, INDEX)) or not found:
        return None
    if len(found) > 1:
        raise UserError(
            f"{folder} has its weights only as the variants {' and '.join(sorted(found))}; keep one of them, or copy "
            f"one to {WEIGHTS}"
        )
    return found.pop()


def weight_files(folder: Path, variant: str | None = None) -> list[str]:
    """Return the names of the weight files. As in diffusers, an index counts before a single file.

    Args:
        folder: The model folder.
        variant: Variant of the weights, such as "fp16"; None for the files without one, or, if there are none of
            these, for the only variant that is there.

    Raises:
        UserError: if the index names no files, or one that is not a safetensors file of this folder.
    """
    variant = variant or only_variant(folder)
    index = INDEX.removesuffix("json") + f"{variant}.json" if variant else INDEX
    single = WEIGHTS.removesuffix("safetensors") + f"{variant}.safetensors" if variant else WEIGHTS
    if not (folder / index).is_file():
        if not (folder / single).is_file():
            raise UserError(f"{folder} has no {single}")
        return [single]
    files = read_json(folder / index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{folder}/{index} names no files of weights")
    names = sorted(set(map(str, files.values())))
    for name in names:
        # Without this check diffusers would also load pickles, and files outside the folder.
        if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
            raise UserError(f"{folder}/{index} names {name}, which is not a safetensors file of this folder")
    return names


def described(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a model's config that its fingerprint covers.

    diffusers' own bookkeeping is left out. The statistics of the latents in a LiteVAE's config do not change what
    `encode` and `decode` return; they count as if they were at their defaults, as they were in models made before
    these entries existed. Configs of diffusers' own classes stay whole, so that fingerprints in older caches hold.
    """
    config = {key: value for key, value in config.items() if key == "_class_name" or key[0] != "_"}
    if isinstance(inner := config.get("autoencoder_config"), dict):
        config["autoencoder_config"] = described(inner)
    if config.get("_class_name") == "LiteVAE":
        older = {"scaling_factor": 1.0} if "scaling_factor" in config else {}  # the only one that older configs have
        config = {key: value for key, value in config.items() if key not in STATISTICS} | older
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a model folder.

    Raises:
        UserError: if it holds no JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not the JSON of a model: it does not hold an object")
    return value
