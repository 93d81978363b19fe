"""Metrics of generated images, on features of frozen networks, and the distance of latents to a Gaussian.

Weights are read only from local files. Each number carries the name of the network that it was computed with: only the
Inception of the FID literature gives an FID.
"""

import importlib.metadata
import importlib.util
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from litevae import weight_files
from litevae.errors import UserError
from litevae.images import to_tensor
from litevae.perceptual import BackboneFeatures, SqueezeNetFeatures, WeightsMissing, load_state, sha256_of

# The same file under the names of torch-fidelity and pytorch-fid. The last part of a name is the beginning of the
# file's SHA-256.
INCEPTION_FILES = weight_files.INCEPTION
INCEPTION_URL = weight_files.url_of(INCEPTION_FILES[0])
SPLITS, NEIGHBOURS, SUBSET = 10, 3, 1000
SIGMAS = (25.0, 50.0, 100.0, 250.0, 500.0)

PROTOCOLS = {
    "frechet": "|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the features' means and covariances (N - 1), in float64",
    "inception_score": "exp of the mean KL divergence of each image's class probabilities (1,008 logits without bias) "
    f"from their mean; mean and standard deviation over {SPLITS} parts, shuffled by NumPy's RandomState(2020)",
    "precision_recall": "Kynkaanniemi et al. 2019: the share of generated images that lie no farther from some "
    f"reference image than its neighbour number {NEIGHBOURS} among the reference does; for recall with roles exchanged",
    "mmd": "squared MMD, k(x, y) = exp(-|x - y|^2 / (2 sigma^2)) on flattened latents, unbiased (pairs i != j); mean "
    "and standard deviation over disjoint random subsets, each against as many new draws of a standard Gaussian. Ours: "
    "the paper (Table 6) states neither the kernel's factor, estimator, N nor the scale of latents and of its numbers",
}


# --- networks -------------------------------------------------------------------------------------------------


class FeatureNetwork(nn.Module, ABC):
    """Base class of networks that map images to feature vectors, in fp32, under autocast too. Nothing is trainable.

    Attributes:
        name: Name of the network, which is part of the name of every number computed with it. "inception" is used only
            for the weights of the FID literature.
        protocol: Description of library, weights and resizing, for people.
        sha256: SHA-256 of the file of the weights.
        dimension: Number of features, D.
    """

    name: str
    protocol: str
    sha256: str
    dimension: int

    @abstractmethod
    def forward(self, pixels: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Compute the features of images.

        Args:
            pixels: Images (N, H, W, 3), uint8.

        Returns:
            Features (N, D), float32, and class logits (N, K), or None if the network has no classes.
        """

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device


class Inception(FeatureNetwork):
    """The Inception v3 of FID and Inception Score (2015-12-05, converted from TensorFlow), from torch-fidelity.

    It gives the 2,048 features of the last pooling layer, and 1,008 logits without bias.

    Args:
        weights: The checkpoint. Empty uses the file in the folder of torch hub.

    Raises:
        WeightsMissing: if `weights` is empty, and torch hub has no such file. Nothing is downloaded.
        UserError: if the file at `weights` does not exist or holds something else, or torch-fidelity is not installed.
    """

    dimension = 2048

    def __init__(self, weights: str | Path = "") -> None:
        super().__init__()
        path = Path(weights) if weights else _inception_in_hub()
        if importlib.util.find_spec("torch_fidelity") is None:
            raise UserError("FID and Inception Score need torch-fidelity: pip install torch-fidelity")
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        state = io.BytesIO()
        torch.save(load_state(path), state)  # saved again, because torch-fidelity would unpickle the original file
        state.seek(0)
        try:
            self.network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], state)
        except RuntimeError:
            raise UserError(f"{path} does not hold the weights of the FID Inception: {INCEPTION_URL}") from None
        if not all(parameter.isfinite().all() for parameter in self.network.state_dict().values()):
            raise UserError(f"{path} holds NaN or infinite weights; fetch the file again")
        self.sha256 = sha256_of(path)
        published = self.sha256.startswith(INCEPTION_FILES[0].removesuffix(".pth").rpartition("-")[2])
        self.name = "inception" if published else f"inception on other weights {self.sha256[:8]}"
        version = importlib.metadata.version("torch-fidelity")
        self.protocol = f"torch-fidelity {version} {self.name}, resized to 299 px as TensorFlow 1 does (bilinear)"

    @torch.no_grad()
    def forward(self, pixels: np.ndarray) -> tuple[Tensor, Tensor | None]:
        x = torch.tensor(pixels, device=self.device).permute(0, 3, 1, 2)
        with torch.autocast(x.device.type, enabled=False):
            features, logits = self.network(x)
        return features, logits


def _inception_in_hub() -> Path:
    """Return the path of the Inception weights in the folder of torch hub."""
    for name in INCEPTION_FILES:
        if (path := weight_files.in_hub(name)).is_file():
            return path
    raise WeightsMissing(
        f"no Inception weights: {weight_files.how_to_get(INCEPTION_FILES[0])}, or name it: inception=FILE"
    )


class SqueezeNetCaffe(FeatureNetwork):
    """The original Caffe SqueezeNet 1.1. The features are its last 512 feature maps, averaged over positions.

    Args:
        weights: State dict with the names of torchvision's model.

    Raises:
        UserError: if `weights` does not exist or holds something else.
    """

    name, dimension = "squeezenet-caffe", 512

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        self.network = SqueezeNetFeatures(weights)
        self.sha256 = sha256_of(Path(weights))
        self.protocol = f"SqueezeNet 1.1 (Caffe, {self.sha256[:8]}), last feature maps averaged, images not resized"

    @torch.no_grad()
    def forward(self, pixels: np.ndarray) -> tuple[Tensor, Tensor | None]:
        x = to_tensor(torch.tensor(pixels, device=self.device))
        with torch.autocast(x.device.type, enabled=False):
            return self.network.features(self.network.standardized(x)).mean((2, 3)), None

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distances (N,) of `SqueezeNetFeatures` between images (N, 3, H, W) in [-1, 1]."""
        return self.network(x, y)


class Backbone(FeatureNetwork):
    """A torchvision classifier. The features are its last feature maps, averaged over positions.

    Args:
        model: Name of a model, as `BackboneFeatures` takes it.
        weights: State dict of the model.

    Raises:
        UserError: if `weights` does not exist or holds something else, or the model is unknown.
    """

    def __init__(self, model: str, weights: str | Path) -> None:
        super().__init__()
        self.network = BackboneFeatures(model, weights)
        self.name = self.network.name
        self.sha256 = sha256_of(Path(weights))
        side = self.network.smallest
        self.dimension = self.network.maps(torch.zeros(1, 3, side, side))[-1].shape[1]
        self.protocol = f"torchvision's {model} ({self.sha256[:8]}), last feature maps averaged, images not resized"

    @torch.no_grad()
    def forward(self, pixels: np.ndarray) -> tuple[Tensor, Tensor | None]:
        x = to_tensor(torch.tensor(pixels, device=self.device))
        with torch.autocast(x.device.type, enabled=False):
            return self.network.maps(x)[-1].mean((2, 3)), None

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distances (N,) of `BackboneFeatures` between images (N, 3, H, W) in [-1, 1]."""
        return self.network.distance(x, y)


# --- features -------------------------------------------------------------------------------------------------


class FrechetStatistics:
    """The statistics of features (N, D) that a Frechet distance needs, in float64.

    They are the count, the sum (D,) and the sum of outer products (D, D). So the memory does not grow with N.

    Args:
        dimension: Number of features, D.
    """

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self.sum = torch.zeros(dimension, dtype=torch.float64)
        self.outer = torch.zeros(dimension, dimension, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Add a batch of features (N, D).

        Raises:
            UserError: if a feature is NaN or infinite.
        """
        values = features.detach().cpu().double()
        if not values.isfinite().all():
            raise UserError("a network gives NaN or infinite features; its weights are broken")
        self.count += len(values)
        self.sum += values.sum(0)
        self.outer += values.T @ values

    @property
    def mean(self) -> Tensor:
        """The mean (D,) of the features."""
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """The covariance (D, D) of the features, with N - 1 degrees of freedom.

        Raises:
            UserError: if there are fewer than two images.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, not {self.count}")
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(a: FrechetStatistics, b: FrechetStatistics) -> float:
    """Return the squared Frechet distance of two Gaussians (Heusel et al. 2017). Covariances may be singular.

    The eigenvalues of C1 C2 are those of C1^(1/2) C2 C1^(1/2). This matrix is symmetric, so there are no complex or
    unstable square roots.
    """
    first, second = a.covariance, b.covariance
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt()
    cross = torch.linalg.eigvalsh(root.T @ second @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + first.trace() + second.trace() - 2 * cross
    return max(0.0, distance.item())


def inception_score(logits: Tensor, splits: int = SPLITS) -> tuple[float, float]:
    """Return the Inception Score (Salimans et al. 2016).

    Args:
        logits: Class logits (N, K) of the images.
        splits: Number of parts. The images are shuffled and divided as in torch-fidelity.

    Returns:
        Mean and population standard deviation of the scores of the parts.

    Raises:
        UserError: if there are fewer images than parts.
    """
    if len(logits) < splits:
        raise UserError(f"an Inception Score of {splits} parts needs at least {splits} images, not {len(logits)}")
    order = torch.from_numpy(np.random.RandomState(2020).permutation(len(logits)))
    edges = [part * len(logits) // splits for part in range(splits + 1)]
    scores = []
    for start, end in pairwise(edges):
        log = logits[order[start:end]].double().log_softmax(1)
        own = log.exp()
        scores.append((own * (log - own.mean(0).log())).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(
    reference: Tensor, generated: Tensor, k: int = NEIGHBOURS, chunk: int = 1024
) -> tuple[float, float]:
    """Return improved precision and recall (Kynkaanniemi et al. 2019).

    Args:
        reference: Features (M, D) of the reference images.
        generated: Features (N, D) of the generated images.
        k: The neighbourhood of an image reaches to its k-th nearest other image in the same set.
        chunk: Number of images whose distances to all others are in memory at a time.

    Raises:
        UserError: if a set has too few images for a k-th neighbour.
    """
    if min(len(reference), len(generated)) <= k:
        raise UserError(
            f"neighbour number {k} needs at least {k + 1} images in each set, not {len(reference)} and {len(generated)}"
        )

    def radii(features: Tensor) -> Tensor:
        """Return the squared distance of each image to its k-th neighbour."""
        parts = (_squared_distances(part, features) for part in features.split(chunk))
        return torch.cat([part.kthvalue(k + 1, dim=1).values for part in parts])  # the nearest is the image itself

    def covered(points: Tensor, centres: Tensor) -> float:
        """Return the share of points that lie in the neighbourhood of some centre."""
        reach = radii(centres)
        within = [(_squared_distances(part, centres) <= reach).any(1) for part in points.split(chunk)]
        return torch.cat(within).double().mean().item()

    reference, generated = reference.double(), generated.double()
    return covered(generated, reference), covered(reference, generated)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return the squared distances (N, M) of (N, D) and (M, D), float64. Rounding errors of equal rows are set to 0."""
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    distances = norms - 2 * x @ y.T
    return distances.where(distances > 1e-12 * norms, 0)


# --- latents --------------------------------------------------------------------------------------------------


def mmd(
    latents: Tensor, sigmas: Sequence[float] = SIGMAS, subset: int = SUBSET, seed: int = 0
) -> dict[float, tuple[float, float | None]]:
    """Return the squared maximum mean discrepancy (Gretton et al. 2012) between latents and a standard Gaussian.

    `PROTOCOLS` has the exact definition. The paper leaves some choices open. Its Table 6 supports those made here: from
    bandwidth 250 to 500 its values fall by a factor of 3.9 (LiteVAE) and 4.0 (SD-VAE), as a squared MMD does for wide
    kernels if the means differ. The table has values up to 28.9, but a squared MMD is at most 2, so its values are
    multiplied by a factor, which may be 100.

    Args:
        latents: Latents (N, ...) with N >= 2. They are flattened.
        sigmas: Bandwidths of the kernel.
        subset: Number of latents in a subset, at most N.
        seed: Seed of the subsets and of the Gaussian samples.

    Returns:
        Bandwidth -> (mean, standard deviation) over the N // subset subsets. With only one subset, the standard
        deviation is None.

    Raises:
        UserError: if there are fewer than 2 latents, or some are NaN or infinite.
    """
    x = latents.flatten(1)
    size = min(subset, len(x))
    if size < 2:
        raise UserError(f"an MMD needs at least 2 latents, not {size}")
    if not x.isfinite().all():
        raise UserError("latents are NaN or infinite")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    found: dict[float, list[float]] = {sigma: [] for sigma in sigmas}
    for start in range(0, len(x) - size + 1, size):
        part = x[order[start : start + size]].double()
        noise = torch.randn(part.shape, generator=generator).double()
        own, other, cross = (_squared_distances(*pair) for pair in ((part, part), (noise, noise), (part, noise)))
        for sigma, values in found.items():
            within = sum((torch.exp(d / (-2 * sigma**2)).sum() - size) / (size * (size - 1)) for d in (own, other))
            values.append((within - 2 * torch.exp(cross / (-2 * sigma**2)).mean()).item())
    return {
        sigma: (float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)
        for sigma, values in found.items()
    }
