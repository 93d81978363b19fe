"""LPIPS against the lpips package on the same random weights, other backbones' features against plain torchvision, and
what happens without weights. No test needs pretrained ones."""

import hashlib
import os
import pickle
import socket
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
from skimage import data
from torch import nn
from torchvision import models
from torchvision.transforms.functional import normalize

from litevae import perceptual
from litevae.errors import UserError
from litevae.perceptual import BackboneFeatures, SqueezeNetFeatures, WeightsMissing, load_esrgan, load_lpips

pytestmark = pytest.mark.filterwarnings("ignore:.*pretrained.*:UserWarning", "ignore:Arguments other than:UserWarning")


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Two photos and noisy copies, (2, 3, 64, 64) in [-1, 1]."""
    photos = np.stack([data.astronaut()[40:104, 180:244], data.coffee()[100:164, 200:264]])
    x = torch.from_numpy(photos).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x, x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch hub cache, and no way to the network."""

    def refuse(*_):
        raise AssertionError("nothing may be fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def squeezenet(hub: Path) -> Path:
    """A random SqueezeNet under the name that torch hub gives the pretrained one."""
    torch.manual_seed(1)
    path = hub / "squeezenet1_1-b8a52dc0.pth"
    torch.save(models.squeezenet1_1(weights=None).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def vgg19(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """torchvision's VGG19 with random weights, and its file; both without the classifier of 123 million weights."""
    with torch.device("meta"):
        model = models.vgg19(weights=None)
    del model.classifier
    model.to_empty(device="cpu").requires_grad_(False)
    torch.manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.normal_(module.bias, std=0.1)
    path = tmp_path_factory.mktemp("vgg19") / "vgg19.pth"
    torch.save(model.state_dict(), path)
    return path, model


def imagenet(x: torch.Tensor) -> torch.Tensor:
    return normalize((x + 1) / 2, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


def test_esrgan_is_l1_of_torchvisions_vgg19_before_the_last_relu(vgg19, pair):
    path, model = vgg19
    outputs = []
    hook = model.features[34].register_forward_hook(lambda _module, _inputs, output: outputs.append(output.clone()))
    for image in pair:
        model.features(imagenet(image))
    hook.remove()
    assert isinstance(model.features[35], nn.ReLU)
    assert (outputs[0] < 0).any()
    loss = load_esrgan(path)
    assert len(loss.features) == 35
    distance = loss(*pair)
    assert distance.shape == (2,)
    torch.testing.assert_close(distance, (outputs[0] - outputs[1]).abs().mean((1, 2, 3)), rtol=1e-4, atol=0)


def test_esrgans_name_tells_the_published_weights_from_others(vgg19, hub, monkeypatch):
    with pytest.raises(WeightsMissing, match=r"ESRGAN.*vgg19-dcbb9e9d\.pth does not exist.*TORCH_HOME"):
        load_esrgan()
    digest = hashlib.sha256(vgg19[0].read_bytes()).hexdigest()[:8]
    (hub / "vgg19-dcbb9e9d.pth").symlink_to(vgg19[0])
    assert load_esrgan().name == f"esrgan-vgg19 on other weights {digest}"
    monkeypatch.setattr(perceptual, "ESRGAN", perceptual.ESRGAN._replace(file=f"vgg19-{digest}.pth"))
    assert load_esrgan(vgg19[0]).name == "esrgan-vgg19"


@pytest.mark.parametrize("model", ["alexnet", "squeezenet1_0", "resnet18", "resnet50"])
def test_backbone_is_torchvisions_up_to_its_pooling(model, pair, tmp_path):
    torch.manual_seed(3)
    reference = models.get_model(model, weights=None, num_classes=7).requires_grad_(False)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    reference.eval()
    path = tmp_path / "weights.pth"
    torch.save(reference.state_dict(), path)
    pooled = reference.avgpool if hasattr(reference, "avgpool") else reference.classifier
    maps = []
    pooled.register_forward_pre_hook(lambda _module, inputs: maps.append(inputs[0].clone()))
    for image in pair:
        reference(imagenet(image))

    backbone = BackboneFeatures(model, path)
    assert backbone.name == f"{model} {hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"
    backbone.train()  # as part of a module that trains: batch norm goes on with its running statistics
    for image, expected in zip(pair, maps, strict=True):
        (found,) = backbone.maps(image)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    a, b = (found / found.square().sum(1, keepdim=True).sqrt().clamp_min(1e-10) for found in maps)
    expected = (a - b).square().sum(1).mean((1, 2))
    assert (expected > 0).all()
    torch.testing.assert_close(backbone.distance(*pair), expected, rtol=1e-3, atol=1e-6)


def test_every_backbone_loads(tmp_path):
    """What a file of its weights has is what the trunk takes; shapes tell, numbers are not needed."""
    for model in perceptual.MODELS:
        with torch.device("meta"):
            reference = models.get_model(model, weights=None)
        state = {key: torch.zeros(()).expand(value.shape) for key, value in reference.state_dict().items()}
        torch.save(state, tmp_path / "weights.pth")
        trunk = BackboneFeatures(model, tmp_path / "weights.pth")
        head = [key for key in state if key.startswith(("fc.", "classifier."))]
        assert len(trunk.features.state_dict()) == len(state) - len(head), model


def test_wrong_backbones_are_refused(squeezenet, pair, tmp_path):
    with pytest.raises(UserError, match="unknown backbone 'resnet'; choose one of vgg16, .*resnet152"):
        BackboneFeatures("resnet", squeezenet)
    with pytest.raises(UserError, match=r"no weights file at .*none\.pth"):
        BackboneFeatures("resnet18", tmp_path / "none.pth")
    for model in ("resnet18", "squeezenet1_0", "alexnet"):
        with pytest.raises(UserError, match=f"{squeezenet} does not hold the weights of {model}: "):
            BackboneFeatures(model, squeezenet)
    with pytest.raises(UserError, match="at least 32 pixels a side, not 64x16"):
        BackboneFeatures("squeezenet1_1", squeezenet).distance(*(image[..., :16] for image in pair))


def test_lpips_is_that_of_the_package(squeezenet, pair):
    reference = lpips.LPIPS(net="squeeze", verbose=False)  # takes the file in the hub cache
    distance = load_lpips("squeeze")(*pair)
    assert distance.shape == (2,)
    assert (distance > 0).all()
    torch.testing.assert_close(distance, reference(*pair).flatten(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_other_backbones_from_a_given_file(net, hub, pair, tmp_path):
    reference = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    layers = {key.partition(".")[2]: value for key, value in reference.net.state_dict().items()}
    torch.save({f"features.{key}": value for key, value in layers.items()}, tmp_path / "backbone.pth")
    distance = load_lpips(net, tmp_path / "backbone.pth")
    torch.testing.assert_close(distance(*pair), reference(*pair).flatten(), rtol=1e-5, atol=0)


def test_name_tells_the_published_weights_from_others(squeezenet, monkeypatch):
    digest = hashlib.sha256(squeezenet.read_bytes()).hexdigest()[:8]
    assert load_lpips("squeeze").name == f"lpips-squeeze on other weights {digest}"
    published = perceptual.SQUEEZENET._replace(file=f"squeezenet1_1-{digest}.pth")
    monkeypatch.setitem(perceptual.BACKBONES, "squeeze", published)
    assert load_lpips("squeeze", squeezenet).name == "lpips-squeeze"


def caffe_features(path: Path, x: torch.Tensor) -> list[torch.Tensor]:
    """Unit-length features where lpips takes them from a SqueezeNet, of an input prepared as for Caffe."""
    pixels = (x.permute(0, 2, 3, 1).numpy() + 1) * 127.5
    blob = pixels[..., ::-1] - np.array([103.939, 116.779, 123.68], dtype=np.float32)
    model = models.squeezenet1_1(weights=None).requires_grad_(False)
    model.load_state_dict(torch.load(path, weights_only=True))
    outputs = []
    for layer in (1, 4, 7, 9, 10, 11, 12):
        model.features[layer].register_forward_hook(lambda _module, _inputs, output: outputs.append(output.clone()))
    model.features(torch.from_numpy(blob.transpose(0, 3, 1, 2).copy()))
    return [output / output.square().sum(1, keepdim=True).sqrt() for output in outputs]


def test_squeezenet_features_are_torchvisions_on_caffes_input(squeezenet, pair):
    features = SqueezeNetFeatures(squeezenet)
    assert features.name == "squeezenet-caffe feature distance"
    layers = zip(*(caffe_features(squeezenet, image) for image in pair), strict=True)
    expected = torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in layers]).mean(0)
    torch.testing.assert_close(features(*pair), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "load",
    [
        lambda path: load_lpips("squeeze", path),
        SqueezeNetFeatures,
        lambda path: BackboneFeatures("squeezenet1_1", path),
        load_esrgan,
    ],
)
def test_frozen_and_fp32_and_moves_the_image_alone(load, squeezenet, vgg19, pair):
    state = torch.get_rng_state()
    distance = load(vgg19[0] if load is load_esrgan else squeezenet)
    assert torch.equal(torch.get_rng_state(), state)  # a run is the same with and without the term
    x, y = pair[1].clone().requires_grad_(), pair[0]
    plain = distance(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distance(x, y), plain)
    plain.mean().backward()
    assert x.grad.isfinite().all()
    assert x.grad.any()
    assert not any(parameter.requires_grad for parameter in distance.parameters())
    torch.testing.assert_close(torch.cat([distance(a[None], b[None]) for a, b in zip(x, y, strict=True)]), plain)
    assert distance(y, y).tolist() == [0, 0]


def test_gradients_stay_finite_where_features_are_dead(squeezenet, pair):
    state = torch.load(squeezenet, weights_only=True)
    state["features.0.bias"] -= 100  # no unit of the first layer ever fires: features of length 0
    torch.save(state, squeezenet)
    x = pair[1].clone().requires_grad_()
    distance = load_lpips("squeeze")(x, pair[0])
    distance.sum().backward()
    assert distance.tolist() == [0, 0]
    assert x.grad.isfinite().all()


def test_without_weights_it_says_which_and_where(hub):
    with pytest.raises(WeightsMissing, match=r"vgg16-397923af\.pth does not exist.*TORCH_HOME") as error:
        load_lpips()
    assert str(hub) in str(error.value)
    assert isinstance(error.value, UserError)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_wrong_file_is_refused(squeezenet, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = tmp_path / "wrong.pth"

    def refusal() -> str:
        with pytest.raises(UserError) as error:
            load_lpips("squeeze", wrong)
        assert not isinstance(error.value, WeightsMissing)  # a path was given: a mistake, not a term to leave out
        assert str(wrong) in str(error.value)
        return str(error.value)

    assert "no weights file" in refusal()
    wrong.write_text("not weights")
    assert "not a PyTorch state dict" in refusal()
    wrong.write_bytes(squeezenet.read_bytes()[:100_000])
    assert "damaged" in refusal()
    wrong.write_bytes(pickle.dumps(Payload(), protocol=2))
    refusal()
    torch.save({"features.0.weight": Payload()}, wrong)
    refusal()
    assert not (tmp_path / "executed").exists()
    torch.save(["a list"], wrong)
    assert "holds no state dict" in refusal()
    state = torch.load(squeezenet, weights_only=True)
    torch.save({key: value for key, value in state.items() if key != "features.12.squeeze.bias"}, wrong)
    assert '"12.squeeze.bias"' in refusal()
    state["features.12.squeeze.bias"][0] = float("nan")
    torch.save(state, wrong)
    assert "NaN" in refusal()


def test_unknown_backbone():
    with pytest.raises(UserError, match="vgg, alex, squeeze"):
        load_lpips("resnet")
