"""Measure how close generated images are to a reference set: FID, Inception Score, precision and recall.

CPU tasks read images, actors compute their features, and the driver adds them up in order, so that the numbers are the
same for any number of workers. The features of a reference set are kept in <root>/references.
"""

import hashlib
import io
import json
import os
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litevae import generation, storage
from litevae.errors import UserError
from litevae.generation import FeatureNetwork, FrechetStatistics
from litevae.images import ImageError, ImageTransform, View
from pipelines.data.open_source import open_source
from pipelines.data.source import Source
from pipelines.evaluation import config, first_look, image_batches, report
from pipelines.evaluation.image_batches import PixelBatch, UnreadableImage, describe_unreadable, evenly_spaced
from pipelines.evaluation.report import Score
from pipelines.runtime import cluster, mlflow_run, outputs, paths
from pipelines.runtime.actor_pool import pool
from pipelines.runtime.progress import Progress

SMALLEST = 32  # pixels, because SqueezeNet halves the size four times
FEWEST = generation.SPLITS  # images; with fewer, a part of the Inception Score would be empty
DAMAGE = (  # the exceptions that NumPy and zipfile raise for a damaged file
    *(OSError, EOFError, ValueError, KeyError, TypeError, NotImplementedError, RuntimeError),
    *(struct.error, zipfile.BadZipFile, zlib.error),
)


class ExactSizeTransform(ImageTransform):
    """A transform that takes only images of its resolution, because scores of resized samples would be different."""

    def __call__(self, data: bytes, seed: int | None = None) -> View:
        """Decode an image.

        Raises:
            ImageError: if it can't be decoded; with the reason "other_size" if it does not have the resolution.
        """
        image = super().__call__(data, seed)
        if (image.height, image.width) != (self.resolution, self.resolution):
            size = f"{image.width}x{image.height}"
            raise ImageError("other_size", f"{size} pixels, and generated images are not resized")
        return image


@dataclass
class Features:
    """The features of a set of images in one network.

    Attributes:
        statistics: what a Frechet distance needs, of all images.
        kept: batches of features (n, D) of the images for precision and recall.
        logits: batches of logits (n, K), if the network has logits.
    """

    statistics: FrechetStatistics
    kept: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


@dataclass
class ImageSet:
    """A set of images and its features.

    Attributes:
        source: where the images come from.
        transform: how they become pixels.
        units: which units of the source are in the set.
        kept: which of these units precision and recall are computed of.
        features: the features in each network, by name.
        bad: images that could not be read.
    """

    source: Source
    transform: ImageTransform
    units: Sequence[int]
    kept: frozenset[int]
    features: dict[str, Features] = field(default_factory=dict)
    bad: list[UnreadableImage] = field(default_factory=list)

    @property
    def images(self) -> int:
        """The number of images that could be read."""
        return len(self.units) - len(self.bad)

    @property
    def about(self) -> dict[str, Any]:
        """The description of the set in metrics.json."""
        return {"uri": self.source.uri, "digest": self.source.digest, "images": self.images} | {
            "unreadable": [bad._asdict() for bad in self.bad]
        }


# --- generated images -------------------------------------------------------------------------------------------


def samples(cfg: config.EvaluateSamples) -> dict[str, Any]:
    """Judge generated images, print the scores with their protocols, and write metrics.json into `cfg.out`.

    Returns:
        The content of metrics.json.

    Raises:
        UserError: if the config or a source is wrong, if no network has weights, or if too few images could be read.
    """
    out = first_look.samples(cfg).announce("evaluate samples")
    root = paths.output_path("root", cfg.root)
    if cfg.transform.resolution < SMALLEST:
        raise UserError(f"transform.resolution={cfg.transform.resolution} is too small: it must be at least {SMALLEST}")
    files = [path and os.path.abspath(path) for path in (cfg.inception, cfg.squeezenet, cfg.backbone)]
    weights = [*files, cfg.backbone_model]
    networks, remarks = check_networks(*weights)
    drawn = _drawn(cfg)
    reference = _set(
        open_source(cfg.source),
        ImageTransform(cfg.transform.resolution, cfg.transform.resize, max_pixels=cfg.transform.max_pixels),
        cfg.reference_images,
        cfg.pr_images,
        "reference_images",
    )

    mlflow_run.check(cfg)
    placement = cluster.start(cfg.ray)
    with mlflow_run.tracked_run(cfg, "evaluate", os.path.basename(out), out) as (tracker, run):
        uri = reference.source.uri
        tracker.dataset(os.path.basename(uri), reference.source.digest, uri, context="reference")
        known = {network.name: network.sha256 for network in networks}
        actors = pool(Extractor, placement, placement, weights, known)
        kept = {
            network.name: FeatureCache(os.path.join(root, "references"), reference, network) for network in networks
        }
        remarks += [remark for each in kept.values() if (remark := each.load())]
        if unknown := [network for network in networks if network.name not in reference.features]:
            _extract(reference, unknown, cfg.batch_size, actors, placement.decoders, "reference")
            for network in unknown:
                kept[network.name].save()
        started = time.monotonic()
        _extract(drawn, networks, cfg.batch_size, actors, placement.decoders, "samples")
        seconds = time.monotonic() - started
        summary: dict[str, Any] = {
            "samples": drawn.about,
            "reference": reference.about | {"kept": [each.path for each in kept.values()]},
            "transform": reference.transform.identity,
            "metrics": [score._asdict() for network in networks for score in _scores(network, drawn, reference)],
            "images_per_s": drawn.images / seconds,
            "remarks": remarks,
            "run": mlflow_run.link(run),
            "config": outputs.measured(cfg),
        }
        report.write_scores(summary, out, tracker)
    print(summary_text(summary, out, cfg.verbose))
    return summary


def check_networks(*weights: str) -> tuple[list[FeatureNetwork], list[str]]:
    """Load the networks that have weights; arguments as for `report.networks`.

    Returns:
        The networks, and a remark about what is left out.

    Raises:
        UserError: if no network has weights, or if a file that is named does not exist or holds something else.
    """
    found, missing = report.networks(*weights)
    if not found:
        raise UserError(
            f"no network has weights: {missing[0]}. Or give squeezenet=FILE, the features of the Caffe SqueezeNet 1.1 "
            f"under torchvision's names, or backbone=FILE, for a Frechet distance under its own name"
        )
    return found, [f"FID and Inception Score are left out: {line}" for line in missing]


def _drawn(cfg: config.EvaluateSamples) -> ImageSet:
    """Return the set of generated images: of a source, or of the folder of a sample job, without its grid.png."""
    where, side = cfg.samples, cfg.transform.resolution
    folder = storage.absolute(where.uri)
    files = storage.names(folder)
    if "sampling.json" in files:
        if "samples.json" not in files:
            raise UserError(f"samples.uri={where.uri}: the sample job is not finished; run the same command again")
        parts = [part for name in ("png", "parquet") if storage.folder_exists(part := storage.join(folder, name))]
        if len(parts) == 1:  # if both exist, `open_source` asks to name one
            where = where.model_copy(update={"uri": parts[0]})
    source = open_source(where, "samples")
    units: Sequence[int] = range(source.units)
    if source.kind == "folder":
        units = [unit for unit, name in enumerate(source.ids(0, source.units)) if name != "grid.png"]
    if not units:
        raise UserError(f"samples.uri={where.uri} holds no images except grid.png")
    try:
        ExactSizeTransform(side)(source.data(units[0]))
    except ImageError as error:
        if error.reason == "other_size":
            raise UserError(
                f"samples.uri={where.uri}: {source.id(units[0])} has {error}; set transform.resolution to their "
                f"size (now {side})"
            ) from None
    return _set(source, ExactSizeTransform(side), cfg.images, cfg.pr_images, "images", units)


def _set(
    source: Source, transform: ImageTransform, images: int, kept: int, name: str, units: Sequence[int] | None = None
) -> ImageSet:
    """Return a set of `images` units (0: all), of which `kept` are for precision and recall, both evenly spaced.

    Args:
        source: where the images come from.
        transform: how they become pixels.
        images: number of images.
        kept: largest number of images for precision and recall.
        name: the config field that sets `images`, for error messages.
        units: the units to choose from; None: all of the source.

    Raises:
        UserError: if there are fewer units than `images`.
    """
    units = range(source.units) if units is None else units
    if images > len(units):
        raise UserError(f"{name}={images}, but {source.uri} has {len(units)}; 0 takes all")
    units = evenly_spaced(units, images or len(units))
    return ImageSet(source, transform, units, frozenset(evenly_spaced(units, min(kept, len(units)))))


# --- features ---------------------------------------------------------------------------------------------------


def _extract(
    images: ImageSet, networks: list[FeatureNetwork], batch_size: int, actors: list[Any], decoders: int, what: str
) -> None:
    """Compute the features of a set in these networks, and store them and the unreadable images in the set.

    Args:
        images: the set.
        networks: the networks.
        batch_size: images per forward pass.
        actors: the pool of `Extractor` actors.
        decoders: number of reading tasks at a time.
        what: name of the set, for the progress display.

    Raises:
        UserError: if fewer than `FEWEST` images could be read.
    """
    names = [network.name for network in networks]
    found = {network.name: Features(FrechetStatistics(network.dimension)) for network in networks}
    bad: list[UnreadableImage] = []

    def extract(actor: Any, read: Any, batches: list[Sequence[int]]) -> Any:
        return actor.extract.remote(read, names)

    done, progress = 0, Progress(what, len(images.units), 0, sys.stderr.isatty())
    for part in image_batches.process_batches(
        images.units, extract, images.source, images.transform, batch_size, actors, decoders
    ):
        for units, unreadable, computed in part:
            bad += unreadable
            done += len(units) + len(unreadable)
            mask = torch.tensor([unit in images.kept for unit in units])
            for name, (features, logits) in computed.items():
                values = torch.tensor(features)
                found[name].statistics.add(values)
                found[name].kept.append(values[mask])
                if logits is not None:
                    found[name].logits.append(torch.tensor(logits))
        progress.update(done)
    progress.close()
    images.features |= found
    images.bad = bad
    if images.images < FEWEST:
        missing = f": {describe_unreadable(bad)}" if bad else ""
        raise UserError(
            f"{images.source.uri}: {images.images} of {len(images.units)} images could be read{missing}; judging needs "
            f"at least {FEWEST}"
        )


class Extractor:
    """A Ray actor that holds the networks on one device.

    Raises:
        UserError: if the weights on its node are not those of the driver.
    """

    def __init__(self, placement: cluster.Placement, weights: list[str], known: dict[str, str]):
        device = placement.configure_torch()
        networks, remarks = check_networks(*weights)
        if (here := {network.name: network.sha256 for network in networks}) != known:
            raise UserError(f"the driver has weights {known}, but this node has {here}. {' '.join(remarks)}")
        self.networks = {network.name: network.to(device) for network in networks}

    def extract(
        self, batches: list[PixelBatch], names: list[str]
    ) -> list[tuple[list[int], list[UnreadableImage], dict[str, tuple[np.ndarray, np.ndarray | None]]]]:
        """Return, for each batch, its units, its unreadable images, and the features and logits by network."""
        return [(batch.units, batch.bad, self._of(batch.pixels, names)) for batch in batches]

    def _of(self, pixels: np.ndarray, names: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
        found: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
        for name in names if len(pixels) else []:
            features, logits = self.networks[name](pixels)
            found[name] = features.cpu().numpy(), None if logits is None else logits.cpu().numpy()
        return found


# --- reference sets, kept ---------------------------------------------------------------------------------------


class FeatureCache:
    """The file that keeps the features of a reference set in one network. Its name is a hash of all they depend on."""

    def __init__(self, folder: str, reference: ImageSet, network: FeatureNetwork):
        self._set, self._network = reference, network
        about = {
            "format": 1,
            "source": [reference.source.digest, reference.source.units],
            "images": [len(reference.units), len(reference.kept)],
            "transform": reference.transform.identity,
            "network": [network.protocol, network.sha256],
        }
        self._key = json.dumps(about, sort_keys=True)
        self.path = os.path.join(folder, f"{hashlib.sha256(self._key.encode()).hexdigest()[:32]}.npz")

    def save(self) -> None:
        """Write the features of the set to the file."""
        found = self._set.features[self._network.name]
        file = io.BytesIO()
        np.savez(
            file,
            key=self._key,
            bad=json.dumps(self._set.bad),
            count=found.statistics.count,
            sum=found.statistics.sum.numpy(),
            outer=found.statistics.outer.numpy(),
            kept=torch.cat(found.kept).numpy(),
        )
        storage.put(self.path, file.getvalue())

    def load(self) -> str:
        """Read the features into the set if there is a sound file.

        Returns:
            A remark if there is a damaged file, else an empty string.
        """
        try:
            with np.load(self.path, allow_pickle=False) as file:  # reading checks the checksums of the zip
                values = {name: file[name] for name in ("key", "bad", "count", "sum", "outer", "kept")}
            if str(values["key"]) != self._key:
                raise ValueError("it belongs to other images or another network")
            statistics = FrechetStatistics(self._network.dimension)
            statistics.count = int(values["count"])
            statistics.sum.copy_(torch.from_numpy(values["sum"]))
            statistics.outer.copy_(torch.from_numpy(values["outer"]))
            bad = [UnreadableImage(*each) for each in json.loads(str(values["bad"]))]
        except FileNotFoundError:
            return ""
        except DAMAGE as error:
            return f"{self.path} can't be used ({error}); its features were computed again"
        self._set.features[self._network.name] = Features(statistics, [torch.from_numpy(values["kept"])])
        self._set.bad = bad
        return ""


# --- numbers ----------------------------------------------------------------------------------------------------


def _scores(network: FeatureNetwork, drawn: ImageSet, reference: ImageSet) -> list[Score]:
    """Return all scores that the features in one network give."""
    mine, theirs = drawn.features[network.name], reference.features[network.name]
    own = network.name == "inception"
    suffix = "" if own else f"/{network.name}"
    by = "" if own else f" ({network.name})"
    side, how = drawn.transform.resolution, report.describe_transform(reference.transform)

    def sets(count: int, of: int) -> str:
        return f"{count:,} generated images of {side} px, as they are, against {of:,} of {reference.source.uri}, {how}"

    counts = mine.statistics.count, theirs.statistics.count
    distance = generation.frechet_distance(mine.statistics, theirs.statistics)
    found = [
        Score(
            "fid" if own else f"frechet{suffix}",
            "FID" if own else f"Frechet distance on {network.name} features",
            distance,
            None,
            "; ".join(
                [
                    network.protocol,
                    sets(*counts),
                    generation.PROTOCOLS["frechet"],
                    *report.small_sample_warning(min(counts), network),
                ]
            ),
        )
    ]
    if mine.logits:
        mean, std = generation.inception_score(torch.cat(mine.logits))
        images = f"{counts[0]:,} generated images of {side} px, as they are"
        protocol = "; ".join([network.protocol, images, generation.PROTOCOLS["inception_score"]])
        found.append(Score(f"inception_score{suffix}", f"Inception Score{by}", mean, std, protocol))
    kept, of = torch.cat(mine.kept), torch.cat(theirs.kept)
    protocol = "; ".join([network.protocol, sets(len(kept), len(of)), generation.PROTOCOLS["precision_recall"]])
    for name, value in zip(("precision", "recall"), generation.precision_recall(of, kept), strict=True):
        found.append(Score(f"{name}/{network.name}", f"{name} ({network.name})", value, None, protocol))
    return found


def summary_text(summary: dict[str, Any], out: str, verbose: bool) -> str:
    """Format the summary for people; see `report.report`."""
    lines = []
    for name in ("samples", "reference"):
        about = summary[name]
        lines.append(f"{name:10}{about['images']:,} images of {about['uri']}")
        if bad := [UnreadableImage(**entry) for entry in about["unreadable"]]:
            lines += report.wrapped(f"          {len(bad)} unreadable left out: {describe_unreadable(bad)}")
    return "\n".join([*lines, "", report.report(summary, out, verbose)])
