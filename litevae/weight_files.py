"""Where the published weights of perceptual backbones lie, which is found here without PyTorch."""

import os
import sys
from pathlib import Path

# The file of each backbone of LPIPS, as torchvision publishes it; its last part is the beginning of its SHA-256.
LPIPS = {
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
VGG19 = "vgg19-dcbb9e9d.pth"


def in_hub(file: str) -> Path:
    """Return where a file of weights lies in torch hub's folder, which $TORCH_HOME moves; it may not be there."""
    if torch := sys.modules.get("torch"):  # a program can have set another folder
        return Path(torch.hub.get_dir()) / "checkpoints" / file
    home = os.getenv("TORCH_HOME", os.path.join(os.getenv("XDG_CACHE_HOME", "~/.cache"), "torch"))  # as PyTorch has it
    return Path(os.path.expanduser(home)) / "hub" / "checkpoints" / file


# The Inception of FID, as torch-fidelity publishes it; the second name is an older one of the same file.
INCEPTION = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
_TORCHVISION = "https://download.pytorch.org/models"
_FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"


def url_of(file: str) -> str:
    """Return where a published file of weights can be downloaded."""
    return f"{_FIDELITY if file == INCEPTION[0] else _TORCHVISION}/{file}"


def digits_of(file: str) -> str:
    """Return the first digits of a published file's SHA-256, which are the last part of its name."""
    return file.removesuffix(".pth").rpartition("-")[2]


def how_to_get(file: str) -> str:
    """Return what to do where a published file is missing, for messages."""
    fetched = file in (LPIPS["vgg"], INCEPTION[0])
    return (
        f"{in_hub(file)} does not exist. "
        + ("Fetch it with `make weights` or `litevae weights`, or put" if fetched else "Put")
        + f" the file there ({url_of(file)}; its SHA-256 begins with {digits_of(file)}), or set TORCH_HOME to the "
        f"folder above a hub/checkpoints that has it"
    )
