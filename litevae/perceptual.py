"""Perceptual distances between images, on features of frozen backbones. Weights are read only from local files."""

import hashlib
import importlib.util
import pickle
import textwrap
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from litevae import weight_files
from litevae.errors import UserError


class WeightsMissing(UserError):
    """The weights of a perceptual backbone are not where they are looked for. The loss term can be left out."""


class BackboneSpec(NamedTuple):
    """A backbone, the file of its published weights, and the layers that are compared."""

    model: str  # name of the model in torchvision
    file: str  # name of the file in torch hub; its last part is the beginning of the file's SHA-256
    taps: tuple[int, ...]  # indices of the layers of `.features` whose outputs are compared


SQUEEZENET = BackboneSpec("squeezenet1_1", weight_files.LPIPS["squeeze"], (1, 4, 7, 9, 10, 11, 12))
BACKBONES = {
    "vgg": BackboneSpec("vgg16", weight_files.LPIPS["vgg"], (3, 8, 15, 22, 29)),
    "alex": BackboneSpec("alexnet", weight_files.LPIPS["alex"], (1, 4, 7, 9, 11)),
    "squeeze": SQUEEZENET,
}
ESRGAN = BackboneSpec("vgg19", weight_files.VGG19, (34,))  # conv5_4, before its ReLU

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
MODELS = ("vgg16", "vgg19", "alexnet", "squeezenet1_0", "squeezenet1_1", *RESNETS)  # for `BackboneFeatures`
# Mean and standard deviation of ImageNet for images in [-1, 1]; torchvision's backbones are trained with them.
MEAN = [2 * mean - 1 for mean in (0.485, 0.456, 0.406)]
DEVIATION = [2 * deviation for deviation in (0.229, 0.224, 0.225)]


class FeatureDistance(nn.Module):
    """Perceptual distance of image pairs on the features of a frozen backbone (Zhang et al. 2018).

    It is the squared distance of unit-length features, weighted over channels, averaged over positions, and summed over
    layers. It maps two batches (N, 3, H, W) in [-1, 1], with sides of at least 32 pixels, to distances (N,). It is
    computed in fp32, under autocast too, and always in eval mode. No parameter is trainable; gradients reach the
    images.

    Args:
        name: Name of the distance.
        features: Layers of the backbone.
        taps: Indices of the layers whose outputs are compared.
        shift: Mean of each input channel, which is subtracted from the image.
        scale: Standard deviation of each input channel, by which the image is then divided.
        heads: Channel weights of each compared layer. None weights all layers and channels equally.
        bgr: Whether the backbone takes the channels in the order BGR.

    Attributes:
        name: Name to report the distance under.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        name: str,
        features: nn.Sequential,
        taps: Sequence[int],
        shift: Sequence[float] = MEAN,
        scale: Sequence[float] = DEVIATION,
        heads: Sequence[Tensor] | None = None,
        bgr: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.taps, self.bgr = name, tuple(taps), bgr
        self.features = features[: self.taps[-1] + 1].requires_grad_(False)
        self.register_buffer("shift", torch.tensor(shift).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(scale).view(1, 3, 1, 1))
        for n, head in enumerate(heads or [torch.tensor(1 / len(self.taps))] * len(self.taps)):
            self.register_buffer(f"head{n}", head)
        self.eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(map(_unit, self.maps(x)), map(_unit, self.maps(y)), strict=True)
        layers = [
            (self.get_buffer(f"head{n}") * (a - b).square()).sum(1).mean((1, 2)) for n, (a, b) in enumerate(pairs)
        ]
        return torch.stack(layers).sum(0)

    def train(self, mode: bool = True) -> "FeatureDistance":
        """Stay in eval mode: batch normalisation of the backbone must not change when a parent module trains."""
        return super().train(False)

    def standardized(self, x: Tensor) -> Tensor:
        """Convert images (N, 3, H, W) in [-1, 1] to the scale and the channel order of the backbone."""
        return ((x.flip(1) if self.bgr else x).float() - self.shift) / self.scale

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the features of images (N, 3, H, W) in [-1, 1] that are compared: one fp32 (N, C, h, w) per layer."""
        found = []
        with torch.autocast(x.device.type, enabled=False):
            h = self.standardized(x)
            for n, layer in enumerate(self.features):
                h = layer(h)
                if n in self.taps:
                    found.append(h)
        return found


def _unit(h: Tensor) -> Tensor:
    """Scale the features of each position to unit length."""
    return h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) + 1e-10)


def load_lpips(net: str = "vgg", weights: str | Path = "") -> FeatureDistance:
    """Load LPIPS 0.1 with the linear heads that come with the lpips package.

    Args:
        net: Backbone: "vgg", "alex" or "squeeze".
        weights: Checkpoint of the backbone from torchvision. Empty uses the file in the folder of torch hub.

    Raises:
        WeightsMissing: if `weights` is empty, and torch hub has no such file. Nothing is downloaded.
        UserError: if the file at `weights` does not exist or holds something else, or lpips is not installed.
    """
    if net not in BACKBONES:
        raise UserError(f"unknown LPIPS backbone {net!r}; choose one of {', '.join(BACKBONES)}")
    backbone = BACKBONES[net]
    package = importlib.util.find_spec("lpips")  # finds its files without importing it
    if package is None or package.origin is None:
        raise UserError("LPIPS needs the lpips package for its linear heads: pip install lpips")
    path = _checkpoint(f"LPIPS ({net})", backbone, weights)
    features = _load_features(backbone.model, path)
    heads = load_state(Path(package.origin).parent / "weights" / "v0.1" / f"{net}.pth")
    return FeatureDistance(
        _name(f"lpips-{net}", backbone, path),
        features,
        backbone.taps,
        shift=(-0.030, -0.088, -0.188),
        scale=(0.458, 0.448, 0.450),
        heads=[heads[f"lin{n}.model.1.weight"] for n in range(len(backbone.taps))],
    )


class SqueezeNetFeatures(FeatureDistance):
    """Distance on the features of the original Caffe SqueezeNet 1.1, with all channels and layers weighted equally.

    The input is BGR in 0..255 minus the ImageNet mean. This is not LPIPS, whose heads belong to other weights.

    Args:
        weights: State dict with the names of torchvision's model.

    Raises:
        UserError: if `weights` does not exist or holds something else.
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


class EsrganFeatures(FeatureDistance):
    """ESRGAN's perceptual loss (Wang et al. 2018; Table 14).

    It is the L1 distance of VGG19's conv5_4 features before their ReLU, averaged over channels and positions. It maps
    two batches (N, 3, H, W) in [-1, 1], with sides of at least 16 pixels, to distances (N,).

    Args:
        name: Name of the distance.
        features: Layers of torchvision's VGG19.
    """

    def __init__(self, name: str, features: nn.Sequential) -> None:
        super().__init__(name, features, ESRGAN.taps)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        (a,), (b,) = self.maps(x), self.maps(y)
        return (a - b).abs().mean((1, 2, 3))


def load_esrgan(weights: str | Path = "") -> EsrganFeatures:
    """Load ESRGAN's perceptual loss.

    Args:
        weights: torchvision's checkpoint of VGG19. Empty uses the file in the folder of torch hub.

    Raises:
        WeightsMissing: if `weights` is empty, and torch hub has no such file. Nothing is downloaded.
        UserError: if the file at `weights` does not exist or holds something else.
    """
    path = _checkpoint("ESRGAN's loss", ESRGAN, weights)
    features = _load_features(ESRGAN.model, path)
    return EsrganFeatures(_name("esrgan-vgg19", ESRGAN, path), features)


class BackboneFeatures(FeatureDistance):
    """Distance on the last feature maps, before pooling and classifier, of a torchvision model with any weights.

    It is for evaluation when the weights of the published metrics are missing. It is not LPIPS, and distances with
    different weights cannot be compared. Its `name` is that of the model with the first digits of the file's SHA-256.
    `maps` returns one map.

    Args:
        model: One of `MODELS`. Images are standardised by the mean and standard deviation of ImageNet.
        weights: State dict of the model. The entries of the classifier may have any size, or be missing.

    Raises:
        UserError: if the model is unknown, or `weights` does not exist or holds something else.
    """

    def __init__(self, model: str, weights: str | Path) -> None:
        if model not in MODELS:
            raise UserError(f"unknown backbone {model!r}; choose one of {', '.join(MODELS)}")
        path = Path(weights)
        features = _load_features(model, path)
        super().__init__(f"{model} {sha256_of(path)[:8]}", features, [len(features) - 1])
        self.smallest = 63 if model == "alexnet" else 32

    def maps(self, x: Tensor) -> list[Tensor]:
        if min(x.shape[-2:]) < self.smallest:
            size = "x".join(map(str, x.shape[-2:]))
            raise UserError(f"{self.name} takes images of at least {self.smallest} pixels a side, not {size}")
        return super().maps(x)

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the squared distance (N,) of unit-length features, averaged over positions.

        `x` and `y` are images (N, 3, H, W) in [-1, 1].
        """
        return self(x, y)


def _checkpoint(what: str, backbone: BackboneSpec, weights: str | Path) -> Path:
    """Return the path of the weights of a published backbone: the given file, or the one in the folder of torch hub."""
    path = Path(weights or weight_files.in_hub(backbone.file))
    if not weights and not path.is_file():
        raise WeightsMissing(
            f"{what} has no backbone weights: {weight_files.how_to_get(backbone.file)}, or name the file in the config"
        )
    return path


def _name(name: str, backbone: BackboneSpec, path: Path) -> str:
    """Return `name` if the file holds the published weights; otherwise a name that says that they are others."""
    digest = sha256_of(path)
    published = digest.startswith(backbone.file.removesuffix(".pth").rpartition("-")[2])
    return name if published else f"{name} on other weights {digest[:8]}"


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_features(model: str, path: Path) -> nn.Sequential:
    """Load the feature layers of a torchvision model.

    The model is built on the meta device, without storage, so that no random numbers are drawn.
    """
    try:
        from torchvision import models
    except ImportError:
        raise UserError("perceptual backbones are built by torchvision: pip install torchvision") from None
    with torch.device("meta"):
        network = models.get_model(model, weights=None)
    state = load_state(path)
    if model in RESNETS:
        features = nn.Sequential(OrderedDict([*network.named_children()][:-2]))  # all but avgpool and fc
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    else:
        features, prefix = network.features, "features."
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    try:
        features.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error).partition("\n")[2], 160)  # the first line says only that something differs
        raise UserError(f"{path} does not hold the weights of {model}: {reason}") from None
    if not all(value.isfinite().all() for value in state.values()):
        raise UserError(f"{path} holds NaN or infinite weights; fetch the file again")
    return features.float()


def load_state(path: Path) -> dict[str, Tensor]:
    """Load a PyTorch state dict, without running code that may be pickled in the file.

    Raises:
        UserError: if there is no such file, or it holds something else.
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
