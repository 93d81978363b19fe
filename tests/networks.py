"""Files of random weights for the networks of metrics, for tests that check no numbers; and a stand-in for DDP."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision import models


def save_inception(path: Path) -> Path:
    """Save weights for the FID Inception, scaled so that features differ between images."""
    torch.save({}, path)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("inception", ["2048"], str(path))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


def save_squeezenet(path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(models.squeezenet1_1(weights=None).state_dict(), path)
    return path


def save_resnet(path: Path) -> Path:
    """Save random weights of a ResNet-18."""
    torch.manual_seed(0)
    torch.save(models.resnet18(weights=None).state_dict(), path)
    return path


def save_vgg19(path: Path) -> Path:
    """Save random weights of the convolutions of a VGG19, without its unused classifier of half a gigabyte."""
    torch.manual_seed(0)
    features = models.vgg.make_layers(models.vgg.cfgs["E"], batch_norm=False)
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, path)
    return path


class Noted(torch.nn.Module):
    """A stand-in for DDP. `passes` records for each forward pass whether its gradients would be sent to other ranks."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module, self.passes, self._sync = module, [], True

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self._sync = False
        yield
        self._sync = True

    def forward(self, *inputs, **options):
        self.passes.append(self._sync)
        return self.module(*inputs, **options)
