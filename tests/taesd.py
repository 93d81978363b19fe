"""TAESD, a small pretrained autoencoder of SD's and SD3's latents, where its weights lie beside the project."""

from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file

SHARED = Path(__file__).resolve().parents[2] / "shared"
WEIGHTS, KODAK = SHARED / "weights" / "taesd", SHARED / "data" / "kodak"
CHANNELS = {"taesd": 4, "taesd3": 16}


def taesd(name: str) -> AutoencoderTiny:
    """Return "taesd" or "taesd3" as diffusers knows it, in fp32.

    In the original files, layers have only numbers, and layer 0 of the decoder is the clamp, which diffusers does not
    count as a layer.
    """
    model = AutoencoderTiny(latent_channels=CHANNELS[name])
    state = {
        f"encoder.layers.{key}": value for key, value in load_file(WEIGHTS / f"{name}_encoder.safetensors").items()
    }
    for key, value in load_file(WEIGHTS / f"{name}_decoder.safetensors").items():
        number, rest = key.split(".", 1)
        state[f"decoder.layers.{int(number) - 1}.{rest}"] = value
    model.load_state_dict({key: value.to(torch.float32) for key, value in state.items()})
    return model.eval()
