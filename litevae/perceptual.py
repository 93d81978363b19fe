"""Perceptual distances of images on frozen backbones, whose weights come from local files and nowhere else."""

import hashlib
import importlib.util
import pickle
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from litevae.errors import UserError


class WeightsMissing(UserError):
    """No weights for a perceptual backbone where they are looked for. The term can be left out."""


class Backbone(NamedTuple):
    model: str  # torchvision's name
    file: str  # torch hub's name; its last part begins the file's SHA-256
    taps: tuple[int, ...]  # layers of `.features` whose outputs are compared


SQUEEZENET = Backbone("squeezenet1_1", "squeezenet1_1-b8a52dc0.pth", (1, 4, 7, 9, 10, 11, 12))
BACKBONES = {
    "vgg": Backbone("vgg16", "vgg16-397923af.pth", (3, 8, 15, 22, 29)),
    "alex": Backbone("alexnet", "alexnet-owt-7be5be79.pth", (1, 4, 7, 9, 11)),
    "squeeze": SQUEEZENET,
}


class FeatureDistance(nn.Module):
    """Squared distance of unit-length features, weighted over channels, averaged over positions, summed over layers
    (Zhang et al. 2018): (N, 3, H, W) twice, in [-1, 1], of at least 32 pixels a side -> (N,).

    In fp32 under autocast too. No parameter is trainable; gradients reach the images.

    Attributes:
        name: what the number may be called.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        name: str,
        features: nn.Sequential,
        taps: Sequence[int],
        shift: Sequence[float],
        scale: Sequence[float],
        heads: Sequence[Tensor] | None = None,
        bgr: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.taps, self.bgr = name, tuple(taps), bgr
        self.features = features[: self.taps[-1] + 1].requires_grad_(False).eval()
        self.register_buffer("shift", torch.tensor(shift).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(scale).view(1, 3, 1, 1))
        for n, head in enumerate(heads or [torch.tensor(1 / len(self.taps))] * len(self.taps)):
            self.register_buffer(f"head{n}", head)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            pairs = zip(self._units(x), self._units(y), strict=True)
            layers = [
                (self.get_buffer(f"head{n}") * (a - b).square()).sum(1).mean((1, 2)) for n, (a, b) in enumerate(pairs)
            ]
        return torch.stack(layers).sum(0)

    def standardized(self, x: Tensor) -> Tensor:
        """What the backbone takes: (N, 3, H, W) in [-1, 1] -> the same in its own scale and order of channels."""
        return ((x.flip(1) if self.bgr else x).float() - self.shift) / self.scale

    def _units(self, x: Tensor) -> list[Tensor]:
        h = self.standardized(x)
        units = []
        for n, layer in enumerate(self.features):
            h = layer(h)
            if n in self.taps:
                units.append(h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) + 1e-10))
        return units


def load_lpips(net: str = "vgg", weights: str | Path = "") -> FeatureDistance:
    """LPIPS 0.1 with the linear heads that the lpips package ships.

    Args:
        net: ``vgg``, ``alex`` or ``squeeze``.
        weights: the backbone's checkpoint from torchvision; empty: the file that torch hub keeps of it.

    Raises:
        WeightsMissing: `weights` is empty and torch hub has no such file. Nothing is fetched.
        UserError: the file at `weights` does not exist or holds something else; lpips is not installed.
    """
    if net not in BACKBONES:
        raise UserError(f"unknown LPIPS backbone {net!r}; one of {', '.join(BACKBONES)}")
    backbone = BACKBONES[net]
    package = importlib.util.find_spec("lpips")  # finds its files without importing it
    if package is None or package.origin is None:
        raise UserError("LPIPS needs the lpips package for its linear heads: pip install lpips")
    path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / backbone.file)
    if not weights and not path.is_file():
        raise WeightsMissing(
            f"LPIPS ({net}) has no backbone weights: {path} does not exist. Put torchvision's "
            f"{backbone.file} there (https://download.pytorch.org/models/{backbone.file}), set TORCH_HOME to the "
            f"folder above a hub/checkpoints that has it, or name the file in the config"
        )
    features = _load_features(backbone.model, path)
    heads = load_state(Path(package.origin).parent / "weights" / "v0.1" / f"{net}.pth")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    original = digest.startswith(backbone.file.removesuffix(".pth").rpartition("-")[2])
    return FeatureDistance(
        f"lpips-{net}" if original else f"lpips-{net} on other weights {digest[:8]}",
        features,
        backbone.taps,
        shift=(-0.030, -0.088, -0.188),
        scale=(0.458, 0.448, 0.450),
        heads=[heads[f"lin{n}.model.1.weight"] for n in range(len(backbone.taps))],
    )


class SqueezeNetFeatures(FeatureDistance):
    """Distance on the features of the original Caffe SqueezeNet 1.1 (torchvision's names, BGR in 0..255 less the
    ImageNet mean), all channels and layers weighted equally. Not LPIPS: its heads belong to other weights.

    Raises:
        UserError: `weights` does not exist or holds something else.
    """

    def __init__(self, weights: str | Path) -> None:
        super().__init__(
            "squeezenet-caffe feature distance",
            _load_features(SQUEEZENET.model, Path(weights)),
            SQUEEZENET.taps,
            shift=[mean / 127.5 - 1 for mean in (103.939, 116.779, 123.68)],
            scale=[1 / 127.5] * 3,
            bgr=True,
        )


def _load_features(model: str, path: Path) -> nn.Sequential:
    """The feature layers of a torchvision model; built without storage first, so nothing is drawn at random."""
    try:
        from torchvision import models
    except ImportError:
        raise UserError("perceptual backbones are built by torchvision: pip install torchvision") from None
    with torch.device("meta"):
        features = models.get_model(model, weights=None).features
    prefix = "features."
    state = {key.removeprefix(prefix): value for key, value in load_state(path).items() if key.startswith(prefix)}
    try:
        features.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error).partition("\n")[2], 160)  # line 1 says only that something differs
        raise UserError(f"{path} does not hold the weights of {model}: {reason}") from None
    if not all(value.isfinite().all() for value in state.values()):
        raise UserError(f"{path} holds NaN or infinite weights; fetch the file again")
    return features.float()


def load_state(path: Path) -> dict[str, Tensor]:
    """A PyTorch state dict, without running what else may be pickled in the file.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no weights file at {path}") from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is not a PyTorch state dict, or is damaged ({type(error).__name__})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict (names to tensors)")
    return state
