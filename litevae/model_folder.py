"""The files of a model folder, which are looked at here without PyTorch."""

import json
from pathlib import Path
from typing import Any

from litevae.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"  # lists the files when the weights are split over several


def model_config(folder: str | Path) -> dict[str, Any]:
    """Read the config.json of a model folder.

    Raises:
        UserError: if the folder is not a model folder, or holds no safetensors weights.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist")
    if (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is a whole diffusers pipeline; give its autoencoder: {folder / 'vae'}")
    there = {path.name for path in folder.iterdir()}
    weights = not there.isdisjoint((WEIGHTS, INDEX))
    if missing := [name for name in ("config.json", *[WEIGHTS] * (not weights)) if name not in there]:
        hint = ""
        if pickles := sorted(name for name in there if name.endswith((".bin", ".ckpt", ".pt", ".pth"))):
            hint = f"; {pickles[0]} is a pickle, which can run any code and is never loaded: convert it to safetensors"
        elif others := sorted(name for name in there if name.endswith(".safetensors")):
            hint = f"; rename {others[0]} if it holds the weights"
        raise UserError(f"{folder} is not a model folder: it has no {' and no '.join(missing)}{hint}")
    return read_json(folder / "config.json")


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
