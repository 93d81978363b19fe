"""Scores of generated images against torch-fidelity, torchmetrics and sums by hand; networks against torchvision and
torch-fidelity on the same random weights. No test needs pretrained ones, and no number here means anything."""

import hashlib
import math
import pickle
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision import models

from litevae import generation
from litevae.errors import UserError
from litevae.generation import (
    Backbone,
    FrechetStatistics,
    Inception,
    SqueezeNetCaffe,
    frechet_distance,
    inception_score,
    mmd,
    precision_recall,
)
from litevae.images import to_tensor
from litevae.perceptual import WeightsMissing
from tests.networks import save_inception

MEAN, DEVIATION = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def features(count: int, dimension: int = 12, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    """Correlated, not Gaussian, like those after a ReLU."""
    draw = np.random.default_rng(seed)
    mixed = draw.standard_normal((count, dimension)) @ np.random.default_rng(9).standard_normal((dimension, dimension))
    return torch.from_numpy((scale * mixed + shift).clip(0)).float()


def statistics(values: torch.Tensor, batch: int = 7) -> FrechetStatistics:
    found = FrechetStatistics(values.shape[1])
    for part in values.split(batch):
        found.add(part)
    return found


# --- Frechet distance -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [200, 8])  # 8 images of 12 features: singular covariances
def test_frechet_distance_is_torch_fidelitys(count):
    a, b = features(count), features(count + 3, seed=1, scale=1.3, shift=0.4)
    reference = [fid_features_to_statistics(each.double()) for each in (a, b)]
    expected = fid_statistics_to_metric(*reference, verbose=False)["frechet_inception_distance"]
    assert expected > 1
    assert frechet_distance(statistics(a), statistics(b)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(statistics(b), statistics(a)) == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(statistics(a).mean, reference[0]["mu"], rtol=1e-12)
    np.testing.assert_allclose(statistics(a).covariance, reference[0]["sigma"], rtol=1e-9, atol=1e-12)


def test_frechet_distance_by_hand():
    """Independent coordinates: (m1 - m2)^2 + (s1 - s2)^2 each."""
    square = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])  # variance 4/3
    a, b = statistics(square), statistics(square * torch.tensor([2.0, 3.0]) + torch.tensor([5.0, 0.0]))
    assert frechet_distance(a, b) == pytest.approx(25 + 4 / 3 * (1 + 4))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    flat = statistics(square * torch.tensor([1.0, 0.0]))  # no variance in one coordinate
    assert frechet_distance(a, flat) == pytest.approx(4 / 3)
    assert frechet_distance(flat, flat) == pytest.approx(0, abs=1e-12)


def test_statistics_do_not_depend_on_batches():
    values = features(100)
    whole, parts = statistics(values, 100), statistics(values, 7)
    assert parts.count == 100
    torch.testing.assert_close(parts.sum, whole.sum)
    torch.testing.assert_close(parts.covariance, whole.covariance, rtol=1e-12, atol=1e-12)


def test_statistics_that_are_none():
    with pytest.raises(UserError, match="at least 2 images, not 1"):
        _ = statistics(features(1)).covariance
    with pytest.raises(UserError, match="NaN or infinite features"):
        statistics(torch.full((3, 4), math.nan))


# --- Inception Score, precision and recall --------------------------------------------------------------------


@pytest.mark.parametrize(("count", "splits"), [(200, 10), (57, 4)])
def test_inception_score_is_torch_fidelitys(count, splits):
    logits = 3 * features(count, 20)
    expected = isc_features_to_metric(logits, splits)
    mean, std = inception_score(logits, splits)
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert std == pytest.approx(expected["inception_score_std"], rel=1e-6)
    assert mean > 1.1


def test_inception_score_of_sure_and_of_unsure_networks():
    sure = 1000 * torch.eye(5).repeat(40, 1)
    assert inception_score(sure, splits=1)[0] == pytest.approx(5)  # as many classes as there are
    assert inception_score(torch.zeros(30, 5)) == (pytest.approx(1), pytest.approx(0))
    with pytest.raises(UserError, match="at least 10 images, not 9"):
        inception_score(sure[:9])


@pytest.mark.parametrize("chunk", [1024, 16])
def test_precision_and_recall_are_torch_fidelitys(chunk):
    real, fake = features(150), features(90, seed=1, scale=0.6, shift=0.5)
    expected = prc_features_to_metric(fake.double(), real.double(), prc_neighborhood=3, verbose=False)
    assert 0 < expected["precision"] < 1
    assert 0 < expected["recall"] < 1
    assert expected["precision"] != expected["recall"]
    found = precision_recall(real, fake, k=3, chunk=chunk)
    assert found == pytest.approx((expected["precision"], expected["recall"]))


def test_precision_and_recall_by_hand():
    """On a line, k = 1: references reach over -1..1, 0..2 and 1..7, generated ones over 4..6, 5..7 and 6..10."""
    real, fake = torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([[5.0], [6.0], [8.0]])
    assert precision_recall(real, fake, k=1) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert precision_recall(real, fake + 100, k=1) == (0, 0)
    assert precision_recall(real, real, k=2) == (1, 1)


def test_precision_and_recall_of_equal_images_and_of_too_few():
    same = features(1).repeat(5, 1) + 1000  # neighbourhoods of radius 0
    assert precision_recall(same, same, k=3) == (1, 1)
    with pytest.raises(UserError, match="at least 4 images in each set, not 5 and 3"):
        precision_recall(same, same[:3], k=3)


# --- MMD ------------------------------------------------------------------------------------------------------


def test_mmd_is_that_of_its_definition():
    """Two subsets of four latents, by loops over pairs."""
    latents = 0.7 * torch.randn(9, 2, 3, 3, generator=torch.Generator().manual_seed(5)) + 0.3
    found = mmd(latents, sigmas=(2.0, 5.0), subset=4, seed=3)
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(9, generator=generator)
    expected: dict[float, list[float]] = {2.0: [], 5.0: []}
    for start in (0, 4):
        x = [latents[n].flatten().double().numpy() for n in order[start : start + 4]]
        y = [*torch.randn(4, 18, generator=generator).double().numpy()]
        for sigma, values in expected.items():

            def k(a, b, sigma=sigma):
                return math.exp(-((a - b) ** 2).sum() / (2 * sigma**2))

            own = [k(s[i], s[j]) for s in (x, y) for i in range(4) for j in range(4) if i != j]
            values.append(sum(own) / 12 - 2 * sum(k(a, b) for a in x for b in y) / 16)
    for sigma, values in expected.items():
        assert found[sigma] == (pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)))


def test_mmd_is_that_of_two_gaussians():
    """Closed form: x of N(m, s^2), y of N(0, 1) in D dimensions; E k = (v / (v + t))^(D/2) exp(-|d|^2 / 2(v + t)) for
    v = sigma^2 and differences of mean d and variance t."""
    dimension, mean, s = 64, 0.2, 0.8
    latents = mean + s * torch.randn(4000, 4, 4, 4, generator=torch.Generator().manual_seed(0))

    def expected(v: float, t: float, d: float) -> float:
        return (v / (v + t)) ** (dimension / 2) * math.exp(-dimension * d**2 / (2 * (v + t)))

    for sigma, (value, deviation) in mmd(latents, sigmas=(4.0, 8.0, 20.0), subset=500).items():
        v = sigma**2
        truth = expected(v, 2 * s**2, 0) + expected(v, 2, 0) - 2 * expected(v, 1 + s**2, mean)
        assert deviation is not None
        assert deviation < 0.2 * truth
        assert value == pytest.approx(truth, abs=4 * deviation / math.sqrt(8))
    nothing = mmd(torch.randn(4000, 64, generator=torch.Generator().manual_seed(1)), sigmas=(8.0,), subset=500)[8.0]
    assert abs(nothing[0]) < 4 * nothing[1] / math.sqrt(8)


def test_mmd_depends_on_the_seed_alone():
    latents = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    one = mmd(latents, subset=20)
    torch.manual_seed(2)
    assert mmd(latents, subset=20) == one
    assert mmd(latents, subset=20, seed=1) != one
    assert [*one] == [25, 50, 100, 250, 500]
    assert mmd(latents, subset=30)[25][1] is None  # one subset
    assert mmd(latents, subset=999) == mmd(latents, subset=50)
    with pytest.raises(UserError, match="at least 2 latents"):
        mmd(latents[:1])
    with pytest.raises(UserError, match="NaN or infinite"):
        mmd(latents * math.inf)


# --- networks -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    return save_inception(tmp_path_factory.mktemp("weights") / "random.pth")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty torch hub cache, and no way to the network."""

    def refuse(*_):
        raise AssertionError("nothing may be fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def photos(side: int = 64) -> np.ndarray:
    pictures = [data.astronaut(), data.chelsea(), data.coffee()]
    return np.stack([picture[40 : 40 + side, 100 : 100 + side] for picture in pictures])


def test_inception_is_torch_fidelitys(inception_file, hub):
    pixels = photos()
    network = Inception(inception_file)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network(pixels)
    reference = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(inception_file))
    expected = reference(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert [*map(torch.Tensor.size, found)] == [(3, 2048), (3, 1008)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert theirs.std(0).mean() > 1e-3 * theirs.abs().mean()  # or images could be swapped, and nobody would know
    assert network.name == f"inception on other weights {network.sha256[:8]}"
    assert network.sha256 == hashlib.sha256(inception_file.read_bytes()).hexdigest()
    assert "torch-fidelity 0" in network.protocol


def test_fid_is_torchmetrics(inception_file, hub):
    """The same network under another's sums, of its first features: of all of them a root takes ten seconds."""
    network = Inception(inception_file)

    def features(pixels):
        return network(pixels)[0][:, :100]

    class Wrapped(torch.nn.Module):
        num_features = 100

        def forward(self, x):
            return features(x.permute(0, 2, 3, 1).numpy())

    real = np.stack([data.astronaut()[y : y + 40, y : y + 40] for y in range(0, 400, 100)])
    fake = np.stack([data.coffee()[y : y + 40, y : y + 40] for y in range(0, 300, 100)])
    metric = FrechetInceptionDistance(Wrapped(), normalize=False, input_img_size=(3, 40, 40)).set_dtype(torch.float64)
    sides = []
    for pixels, is_real in ((real, True), (fake, False)):
        metric.update(torch.from_numpy(pixels).permute(0, 3, 1, 2), real=is_real)
        sides.append(statistics(features(pixels)))
    expected = metric.compute().item()
    assert frechet_distance(*sides) == pytest.approx(expected, rel=1e-4)


def test_published_weights_are_known_by_their_hash(inception_file, hub, monkeypatch):
    digest = hashlib.sha256(inception_file.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(generation, "INCEPTION_FILES", ("absent.pth", f"pt_inception-{digest}.pth"))
    with pytest.raises(WeightsMissing):
        Inception()
    (hub / f"pt_inception-{digest}.pth").symlink_to(inception_file)
    assert Inception().name.startswith("inception on other weights")  # the first name's hash decides
    monkeypatch.setattr(
        generation, "INCEPTION_FILES", (f"weights-inception-{digest}.pth", f"pt_inception-{digest}.pth")
    )
    assert Inception().name == "inception"


def test_inception_without_or_with_wrong_weights(hub, tmp_path, inception_file):
    with pytest.raises(
        WeightsMissing, match=r"hub/checkpoints/weights-inception-2015-12-05-6726825d\.pth does not exist"
    ):
        Inception()
    with pytest.raises(UserError, match="no weights file at"):
        Inception(tmp_path / "no.pth")
    other = tmp_path / "other.pth"
    torch.save(models.squeezenet1_1(weights=None).state_dict(), other)
    with pytest.raises(UserError, match=r"other\.pth does not hold the weights of the FID Inception"):
        Inception(other)
    (tmp_path / "planted.pth").write_bytes(pickle.dumps(FeatureExtractorInceptionV3, protocol=2))
    with pytest.raises(UserError, match="not a PyTorch state dict"):
        Inception(tmp_path / "planted.pth")
    state = torch.load(inception_file, weights_only=True)
    state["fc.weight"][0, 0] = math.nan
    torch.save(state, other)
    with pytest.raises(UserError, match="NaN or infinite weights"):
        Inception(other)


def test_squeezenet_features_are_torchvisions(tmp_path):
    torch.manual_seed(0)
    reference = models.squeezenet1_1(weights=None).eval()
    torch.save(reference.state_dict(), tmp_path / "squeezenet.pth")
    network, pixels = SqueezeNetCaffe(tmp_path / "squeezenet.pth"), photos()
    found, logits = network(pixels)
    assert logits is None
    assert found.shape == (3, network.dimension)
    bgr = torch.from_numpy(pixels[..., ::-1].copy()).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        expected = reference.features(bgr - torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1)).mean((2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert "inception" not in network.name


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_any_backbones_features_are_torchvisions(tmp_path, name):
    torch.manual_seed(0)
    reference = models.get_model(name, weights=None).eval()
    torch.save(reference.state_dict(), tmp_path / "weights.pth")
    network, pixels = Backbone(name, tmp_path / "weights.pth"), photos()
    found, logits = network(pixels)
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - MEAN) / DEVIATION
    with torch.no_grad():
        if name == "resnet18":
            reference.fc = torch.nn.Identity()
            expected = reference(x)
        else:
            expected = reference.features(x).mean((2, 3))
    assert logits is None
    assert found.shape == (3, network.dimension)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert network.name == f"{name} {network.sha256[:8]}"
    a, b = to_tensor(pixels[:1]), to_tensor(pixels[1:2])
    torch.testing.assert_close(network.distance(a, b), network.distance(b, a))
    assert network.distance(a, b) > 0
    with pytest.raises(UserError, match="unknown backbone 'resnet'"):
        Backbone("resnet", tmp_path / "weights.pth")
