"""Measure how well an autoencoder reconstructs images, compared with bicubic down- and upsampling by its factor.

CPU tasks read and transform images, actors with the model measure them in batches, and the driver adds up the results
in order. Means of one value per image are exact, and features in frozen networks become the sums that a Frechet
distance needs. The numbers are the same for any number of workers, and memory does not grow with the number of images.

To add a metric, add a line to METRICS: a title, a protocol, and a function of originals and reconstructions, both
(N, 3, H, W) in [-1, 1], that returns (N,).
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from litevae import generation, hub, metrics, storage
from litevae.any_autoencoder import fingerprint, load_autoencoder
from litevae.autoencoder import count_parameters
from litevae.commits import divisor
from litevae.equivariance import SpatialTransform
from litevae.errors import UserError
from litevae.generation import Backbone, FeatureNetwork, FrechetStatistics, SqueezeNetCaffe
from litevae.images import ImageTransform, to_tensor, to_uint8
from litevae.latents import downsampling, encode_latents, latent_content
from litevae.perceptual import WeightsMissing, load_lpips
from litevae.pictures import feature_map_picture, png, reconstruction_picture, strongest_maps
from litevae.precision import autocast
from pipelines.data.open_source import open_source
from pipelines.data.source import Source
from pipelines.evaluation import config, first_look, image_batches, latent_mmd, report
from pipelines.evaluation.image_batches import PixelBatch, UnreadableImage, describe_unreadable
from pipelines.evaluation.report import Score
from pipelines.runtime import cluster, host, mlflow_run, outputs, paths, tables
from pipelines.runtime.actor_pool import pool, spread
from pipelines.runtime.progress import Progress

SMALLEST = 32  # pixels: the window of SSIM has 11, and perceptual backbones halve the size four times
TRANSFORMS = {  # of latents and images, for the equivariance of an autoencoder
    "half": ("half the size", SpatialTransform(0.5)),
    "turn": ("a quarter turn", SpatialTransform(turns=1)),
    "both": ("half the size and a quarter turn", SpatialTransform(0.5, 1)),
}
MAPS = 4  # rows of feature_maps.png
DISTANCE = "mean over images of squared distances of unit-length features, averaged over positions, summed over layers"


class QualityMetric(NamedTuple):
    """A measure of reconstruction quality.

    Attributes:
        title: the title for people.
        protocol: everything that distinguishes this number from others with the same title.
        measure: a function of originals and reconstructions, both (N, 3, H, W) in [-1, 1], that returns one value per
            image (N,). The reported number is the mean over images.
    """

    title: str
    protocol: str
    measure: Callable[[Tensor, Tensor], Tensor]


METRICS = {
    "psnr": QualityMetric("PSNR (dB)", metrics.PROTOCOLS["psnr"], metrics.psnr),
    "ssim": QualityMetric("SSIM", metrics.PROTOCOLS["ssim"], metrics.ssim),
}


class MetricSuite:
    """The metrics, and the feature networks for which there are weights.

    Args:
        cfg: the config, which names the files of weights.

    Attributes:
        metrics: the metrics, by name.
        networks: the networks for Frechet distances.
        remarks: a line about each metric that is left out because its weights are missing.

    Raises:
        UserError: if a file that is named does not exist or holds something else.
    """

    def __init__(self, cfg: config.Evaluate) -> None:
        self.metrics, modules = dict(METRICS), list[nn.Module]()
        self.remarks = []
        try:
            lpips = load_lpips(cfg.lpips, cfg.lpips_weights)
            protocol = f"{DISTANCE}, with the heads of LPIPS 0.1 (Zhang et al. 2018); images not resized"
            self.metrics[lpips.name] = QualityMetric(lpips.name, protocol, lpips)
            modules.append(lpips)
        except WeightsMissing as error:
            self.remarks.append(f"no LPIPS: {error}")
        self.networks, missing = report.networks(cfg.inception, cfg.squeezenet, cfg.backbone, cfg.backbone_model)
        self.remarks += [f"no rFID: {line}" for line in missing]
        for network in self.networks:
            if isinstance(network, SqueezeNetCaffe | Backbone):
                name = f"{network.name} feature distance"
                protocol = f"{DISTANCE}, all weighted equally; weights {network.sha256[:8]}; images not resized"
                self.metrics[name] = QualityMetric(name, protocol, network.distance)
        self._modules = [*modules, *self.networks]

    @property
    def identity(self) -> dict[str, str]:
        """The metrics and the digests of the weights, which must be the same on all nodes."""
        return dict.fromkeys(self.metrics, "") | {network.name: network.sha256 for network in self.networks}

    def to(self, device: torch.device) -> "MetricSuite":
        """Move all networks to a device."""
        for module in self._modules:
            module.to(device)
        return self


@dataclass
class Measured:
    """The measurements of a batch.

    Attributes:
        images: number of images that were measured.
        encode_seconds: seconds of the encoder.
        decode_seconds: seconds of the decoder.
        values: one value per image, by "reconstruction/<metric>", "bicubic/<metric>" and "imbalance".
        features: features of originals and of reconstructions, by network.
        bad: images that could not be read.
        latents: output of the encoder for the images that the MMD is computed of.
        pictures: inputs, reconstructions and latents to show.
        maps: inputs, and their strongest feature maps, to show.
    """

    images: int = 0
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    values: dict[str, np.ndarray] = field(default_factory=dict)
    features: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    bad: list[UnreadableImage] = field(default_factory=list)
    latents: np.ndarray | None = None
    pictures: tuple[Tensor, ...] = ()
    maps: tuple[Tensor, ...] = ()


class Total:
    """The measurements of one pass over the images, added up in order."""

    def __init__(self, networks: Sequence[FeatureNetwork]) -> None:
        self.images, self.encode_seconds, self.decode_seconds = 0, 0.0, 0.0
        self.means: dict[str, metrics.Mean] = {}
        self.statistics = {each.name: [FrechetStatistics(each.dimension) for _ in range(2)] for each in networks}
        self.bad: list[UnreadableImage] = []
        self.latents: list[Tensor] = []
        self.pictures: list[tuple[Tensor, ...]] = []
        self.maps: list[tuple[Tensor, ...]] = []

    def add(self, part: Measured) -> None:
        """Add the measurements of the next batch."""
        self.images += part.images
        self.encode_seconds += part.encode_seconds
        self.decode_seconds += part.decode_seconds
        for name, values in part.values.items():
            self.means.setdefault(name, metrics.Mean()).add(torch.tensor(values))
        for name, pair in part.features.items():
            for statistics, features in zip(self.statistics[name], pair, strict=True):
                statistics.add(torch.tensor(features))
        self.bad += part.bad
        self.latents += [] if part.latents is None else [torch.tensor(part.latents)]
        self.pictures += [part.pictures] if part.pictures else []
        self.maps += [part.maps] if part.maps else []

    @property
    def numbers(self) -> dict[str, dict[str, float]]:
        """The means by metric, for "reconstruction" and for "bicubic". Only "reconstruction" has Frechet distances."""
        found = {
            which: {name.partition("/")[2]: mean.value() for name, mean in self.means.items() if name.startswith(which)}
            for which in ("reconstruction", "bicubic")
        }
        for name, sides in self.statistics.items():
            if self.images > 1:
                found["reconstruction"][_frechet(name)] = generation.frechet_distance(*sides)
        return found


def evaluate(cfg: config.Evaluate) -> dict[str, Any]:
    """Measure the reconstructions of an autoencoder, and print a table.

    Write metrics.json, reconstructions.png and feature_maps.png into `cfg.out`. This also works in a task or an actor
    of a running cluster.

    Returns:
        The content of metrics.json.

    Raises:
        UserError: if the config, the model or the source is wrong, or if no image could be read.
    """
    out, asked = first_look.evaluate(cfg).announce("evaluate"), outputs.measured(cfg)
    side = cfg.transform.resolution
    if side < SMALLEST:
        raise UserError(f"transform.resolution={side} is too small: it must be at least {SMALLEST}")
    cfg = cfg.model_copy(update={"model": hub.pinned(cfg.model)})
    model = load_autoencoder(cfg.model)
    factor = downsampling(model)
    for name, pixels in (("transform.resolution", side), *(("resolutions", each) for each in cfg.resolutions)):
        if pixels % factor:
            raise UserError(f"{name}={pixels}: {cfg.model} takes multiples of {factor} px")
    source = open_source(cfg.source)
    if cfg.images > source.units:
        raise UserError(f"images={cfg.images}, but {cfg.source.uri} has {source.units}; 0 takes all")
    files = ("lpips_weights", "inception", "squeezenet", "backbone")
    known = {name: os.path.abspath(path) for name in files if (path := getattr(cfg, name))}
    cfg = cfg.model_copy(update=known | {"images": cfg.images or source.units})
    for name in ("mmd_images", "equivariance_images"):
        if (asked_for := getattr(cfg, name)) > cfg.images:
            raise UserError(f"{name}={asked_for}, but {cfg.images} images are measured")
    judges = MetricSuite(cfg)
    remarks = list(judges.remarks)

    mlflow_run.check(cfg)
    placement = cluster.start(cfg.ray)
    paths.check_folders({}, {"source.uri": source.uri, "model": cfg.model})
    with mlflow_run.tracked_run(cfg, "evaluate", os.path.basename(out), out) as (tracker, run):
        tracker.dataset(os.path.basename(source.uri), source.digest, source.uri, context="evaluation")
        actors = pool(Evaluator, placement, cfg, placement, judges.identity)
        started = time.monotonic()
        total = _measure(cfg, source, side, actors, placement.decoders, judges)
        seconds = time.monotonic() - started
        passes = {side: total} | {
            pixels: _measure(cfg, source, pixels, actors, placement.decoders, judges)
            for pixels in sorted({*cfg.resolutions} - {side})
        }
        pictures = {
            name: draw(*(torch.cat(part) for part in zip(*parts, strict=True)))
            for name, draw, parts in (
                ("reconstructions", reconstruction_picture, total.pictures),
                ("feature_maps", feature_map_picture, total.maps),
            )
            if parts
        }
        if total.images < 2 and judges.networks:
            remarks.append("no Frechet distance: it takes at least 2 images")
        found = _artefact_and_imbalance_scores(cfg, total, factor, actors[0], remarks)
        found += _equivariance_scores(total, side)
        if cfg.mmd_images:
            found += _mmd(cfg, total, latent_content(model) == "moments")
        transform = ImageTransform(side, cfg.transform.resize, max_pixels=cfg.transform.max_pixels)
        summary: dict[str, Any] = {
            "model": cfg.model,
            "fingerprint": fingerprint(cfg.model),
            "downsampling": factor,
            "parameters": {"encoder": count_parameters(model.encoder), "decoder": count_parameters(model.decoder)},
            "source": {"uri": source.uri, "digest": source.digest},
            "transform": transform.identity,
            "images": total.images,
            "unreadable": [bad._asdict() for bad in total.bad],
            **total.numbers,
            "protocols": _protocols(judges, total.images, transform),
            "scales": {
                str(pixels): {"images": each.images, **each.numbers}
                for pixels, each in sorted(passes.items() if cfg.resolutions else ())
            },
            "metrics": [score._asdict() for score in found],
            "pictures": [f"{name}.png" for name in pictures],
            "images_per_s": {
                "encoder": total.images / total.encode_seconds,
                "decoder": total.images / total.decode_seconds,
                "evaluation": total.images / seconds,
            },
            "remarks": remarks,
            "run": mlflow_run.link(run),
            "config": asked,
        }
        for which in ("reconstruction", "bicubic"):
            tracker.metrics({f"eval/{which}/{metric}": value for metric, value in summary[which].items()}, step=0)
        for pixels, each in summary["scales"].items():
            values = {f"eval/scale/{metric}": value for metric, value in each["reconstruction"].items()}
            tracker.metrics(values, step=int(pixels))
        for name, picture in pictures.items():
            storage.put(os.path.join(out, f"{name}.png"), png(picture))
            tracker.image(name, picture, step=0)
        report.write_scores(summary, out, tracker)
    print(summary_text(summary, out, cfg.verbose))
    return summary


def summary_text(summary: dict[str, Any], out: str, verbose: bool) -> str:
    """Format the summary for people; `verbose` adds how each number was measured."""
    titles = {name: metric.title for name, metric in METRICS.items()} | {"rfid": "rFID"}
    protocols, images = summary["protocols"], summary["protocols"]["images"]
    quality = [["", "reconstruction", f"bicubic by {summary['downsampling']}"]]
    how = {}
    for metric, value in summary["reconstruction"].items():
        other = summary["bicubic"].get(metric)
        quality.append([titles.get(metric, metric), f"{value:.4f}", "" if other is None else f"{other:.4f}"])
        how[titles.get(metric, metric)] = protocols[metric].removesuffix(f"; {images}")
    for score in (Score(**score) for score in summary["metrics"]):
        quality.append([score.title, report.cell(score), ""])
        how[score.title.strip()] = score.protocol
    speed = summary["images_per_s"]
    model = [["", "encoder", "decoder"]]
    model.append(["parameters", *(f"{summary['parameters'][part]:,}" for part in model[0][1:])])
    model.append(["images/s, one worker", *(f"{speed[part]:.1f}" for part in model[0][1:])])
    lines = [
        f"source    {summary['source']['uri']}",
        *report.wrapped(f"{images}; {protocols['reconstruction']}"),
        "",
        tables.fitted(quality),
        "",
    ]
    if scales := summary["scales"]:
        rows = [["reconstruction at", *(f"{pixels} px" for pixels in scales)]]
        for metric in summary["reconstruction"]:
            values = (each["reconstruction"].get(metric) for each in scales.values())
            rows.append([titles.get(metric, metric), *("" if value is None else f"{value:.4f}" for value in values)])
        lines += [tables.fitted(rows), ""]
    lines += [tables.fitted(model), ""]
    if bad := [UnreadableImage(**entry) for entry in summary["unreadable"]]:
        lines += report.wrapped(f"{len(bad)} unreadable left out: {describe_unreadable(bad)}")
    return "\n".join([*lines, *report.closing_lines(how, summary, out, verbose, summary["pictures"])])


# --- numbers ----------------------------------------------------------------------------------------------------


def _frechet(network: str) -> str:
    return "rfid" if network == "inception" else f"frechet/{network}"


def _protocols(judges: MetricSuite, images: int, transform: ImageTransform) -> dict[str, str]:
    """Return the protocol of each number of "reconstruction" and "bicubic", by name. "images" is their common part."""
    of = f"{images:,} images, {report.describe_transform(transform)}"
    found = {name: metric.protocol for name, metric in judges.metrics.items()}
    for network in judges.networks:
        parts = ["reconstructions in uint8 against their originals", network.protocol, generation.PROTOCOLS["frechet"]]
        found[_frechet(network.name)] = "; ".join([*parts, *report.small_sample_warning(images, network)])
    return {
        "images": of,
        "reconstruction": "decoded mean of the latent",
        "bicubic": metrics.PROTOCOLS["bicubic"],
        **{name: f"{protocol}; {of}" for name, protocol in found.items()},
    }


def _artefact_and_imbalance_scores(
    cfg: config.Evaluate, total: Total, factor: int, actor: Any, remarks: list[str]
) -> list[Score]:
    """Return scores of the autoencoder without bicubic counterparts, and add a remark about each that is left out.

    They are the artefacts that it adds to images of constant colour, and the imbalance of its feature maps.
    """
    found, side = [], cfg.transform.resolution
    if side >= 4 * factor:
        ((rms, period),) = spread([actor], lambda actor, _: actor.artefacts.remote(), [None])
        protocol = f"{metrics.PROTOCOLS['artefacts']}; {side} px, {factor} px of border"
        found.append(Score("artefacts", "artefacts in constant colour (RMS, levels)", rms, None, protocol))
        if period is not None:
            found.append(Score("artefacts/period", "  strongest period (px)", period, None, protocol))
    else:
        remarks.append(f"artefacts are left out: {side} px is too small for borders of {factor} px")
    if "imbalance" in total.means:
        protocol = f"{metrics.PROTOCOLS['imbalance']}; {total.images:,} images of {side} px"
        value = total.means["imbalance"].value()
        found.append(Score("imbalance", "imbalance of the last feature maps", value, None, protocol))
    else:
        remarks.append("feature maps are left out: the decoder has no norm_out or conv_norm_out")
    return found


def _equivariance_scores(total: Total, side: int) -> list[Score]:
    """Return how well images are decoded from transformed latents, beside encoding the transformed image."""
    found = []
    for name, (title, transform) in TRANSFORMS.items():
        for which, how in (("latents", "latents transformed"), ("images", "image transformed and then encoded")):
            if mean := total.means.get(f"equivariance/{name}/{which}"):
                protocol = (
                    f"PSNR of the decoding against the transformed image; {how}, bilinear with antialiasing; "
                    f"scale {transform.scale:g}, {transform.turns} quarter turns; {mean.count:,} images of {side} px"
                )
                found.append(
                    Score(f"equivariance/{name}/{which}", f"{title}: {how} (dB)", mean.value(), None, protocol)
                )
    return found


def _mmd(cfg: config.Evaluate, total: Total, moments: bool) -> list[Score]:
    """Return the MMD of the latents to a standard Gaussian."""
    raw = torch.cat(total.latents) if total.latents else torch.empty(0, 1, 1, 1)
    if moments:
        raw = DiagonalGaussianDistribution(raw).sample(torch.Generator().manual_seed(cfg.seed))
    std, mean = torch.std_mean(raw, dim=(0, 2, 3), keepdim=True, correction=0)
    normalised = (raw - mean) / divisor(mean, std)
    drawn = "drawn from the posterior" if moments else "as the encoder gives them"
    return latent_mmd.mmd_scores(raw, normalised, "these", drawn, seed=cfg.seed)


# --- measuring --------------------------------------------------------------------------------------------------


def _measure(
    cfg: config.Evaluate, source: Source, pixels: int, actors: list[Any], decoders: int, judges: MetricSuite
) -> Total:
    """Measure all images once at a resolution of `pixels`.

    Pictures, latents and feature maps are collected only at the resolution of the job itself.

    Raises:
        UserError: if no image could be read.
    """
    whole = pixels == cfg.transform.resolution
    shown = range(0, cfg.images, -(-cfg.images // cfg.pictures)) if whole else range(0)

    def measure(actor: Any, read: Any, batches: list[Sequence[int]]) -> Any:
        return actor.measure.remote(read, [sum(unit in shown for unit in batch) for batch in batches], whole)

    transform = ImageTransform(pixels, cfg.transform.resize, max_pixels=cfg.transform.max_pixels)
    total = Total(judges.networks)
    progress = Progress("evaluate" if whole else f"evaluate at {pixels} px", cfg.images, 0, sys.stderr.isatty())
    for parts in image_batches.process_batches(
        range(cfg.images), measure, source, transform, cfg.batch_size, actors, decoders
    ):
        for part in parts:
            total.add(part)
        progress.update(total.images + len(total.bad))
    progress.close()
    if not total.images:
        at = "" if whole else f" at {pixels} px"
        raise UserError(
            f"{source.uri}: none of {len(total.bad)} images could be read{at}: {describe_unreadable(total.bad)}"
        )
    return total


class Evaluator:
    """A Ray actor that holds the model, the metrics and the networks on one device.

    Args:
        cfg: the config.
        placement: the resources of the worker.
        known: `MetricSuite.identity` on the driver.

    Raises:
        UserError: if the weights on its node are not those of the driver.
    """

    def __init__(self, cfg: config.Evaluate, placement: cluster.Placement, known: dict[str, str]):
        self.cfg, self.device = cfg, placement.configure_torch()
        self.model = load_autoencoder(cfg.model).to(self.device)
        self.factor, self.posterior = downsampling(self.model), latent_content(self.model) == "moments"
        judges = MetricSuite(cfg)
        if (here := judges.identity) != known:
            raise UserError(f"the driver has weights {known}, but this node has {here}. {' '.join(judges.remarks)}")
        self.judges = judges.to(self.device)
        self.maps: Tensor | None = None  # the last feature maps of the decoder's latest call
        for name in ("norm_out", "conv_norm_out"):  # the names in this project and in diffusers
            if isinstance(last := getattr(self.model.decoder, name, None), nn.Module):
                last.register_forward_pre_hook(lambda _, inputs: setattr(self, "maps", inputs[0]))
        side = cfg.transform.resolution
        self._reconstruct(torch.zeros(1, 3, side, side, device=self.device))  # warm-up: the first call is slow

    def measure(self, batches: list[PixelBatch], pictures: list[int], whole: bool) -> list[Measured]:
        """Measure batches.

        Args:
            batches: the images.
            pictures: number of images of each batch to show.
            whole: whether to collect latents and feature maps too.
        """
        return [self._measure(batch, shown, whole) for batch, shown in zip(batches, pictures, strict=True)]

    @torch.no_grad()
    def artefacts(self) -> tuple[float, float | None]:
        """Return `metrics.artefacts` of the model's reconstructions of images of constant colour."""
        parts = metrics.constant_colours(self.cfg.transform.resolution).split(self.cfg.batch_size)
        return metrics.artefacts(
            torch.cat([self._reconstruct(part.to(self.device))[0].cpu() for part in parts]), self.factor
        )

    @torch.no_grad()
    def _measure(self, batch: PixelBatch, pictures: int, whole: bool) -> Measured:
        if not len(batch.pixels):
            return Measured(bad=batch.bad)
        x = to_tensor(batch.pixels).to(self.device)
        y, encoded, encode_seconds, decode_seconds = self._reconstruct(x)
        result = Measured(len(x), encode_seconds, decode_seconds, bad=batch.bad)
        for which, other in (("reconstruction", y), ("bicubic", metrics.bicubic_baseline(x, self.factor))):
            for name, metric in self.judges.metrics.items():
                result.values[f"{which}/{name}"] = metric.measure(x, other).double().cpu().numpy()
        sides = [batch.pixels, to_uint8(y)] if self.judges.networks else []
        for network in self.judges.networks:
            before, after = (network(side)[0].float().cpu().numpy() for side in sides)
            result.features[network.name] = before, after
        if pictures:
            latent = encoded.chunk(2, dim=1)[0] if self.posterior else encoded
            result.pictures = tuple(part[:pictures].cpu() for part in (x, y, latent))
        if whole:
            self._measure_equivariance(batch, x, encoded, result)
            self._collect_latents_and_maps(batch, x, encoded, result)
        self.maps = None
        return result

    def _measure_equivariance(self, batch: PixelBatch, x: Tensor, encoded: Tensor, result: Measured) -> None:
        """Add PSNR after transforms of latents, and after those of images, to a batch's measurements."""
        wanted = (torch.tensor(batch.units) < self.cfg.equivariance_images).to(self.device)
        if not wanted.any():
            return
        x, latent = x[wanted], (encoded.chunk(2, dim=1)[0] if self.posterior else encoded)[wanted]
        maps = self.maps  # those of the images themselves
        for name, (_, transform) in TRANSFORMS.items():
            target = transform.images(x, self.factor)
            with autocast(self.device, self.cfg.precision):
                decoded = self.model.decode(transform.latents(latent), return_dict=False)[0]
            for which, other in (("latents", decoded.float().clamp(-1, 1)), ("images", self._reconstruct(target)[0])):
                values = metrics.psnr(target, other).double().cpu().numpy()
                result.values[f"equivariance/{name}/{which}"] = values
        self.maps = maps

    def _collect_latents_and_maps(self, batch: PixelBatch, x: Tensor, encoded: Tensor, result: Measured) -> None:
        """Add latents and feature maps of a batch to its measurements."""
        units = torch.tensor(batch.units)
        if (wanted := units < self.cfg.mmd_images).any():
            result.latents = encoded.cpu()[wanted].numpy()
        if self.maps is not None:
            each = [metrics.imbalance(image[None]) for image in self.maps]  # one by one, because maps are large
            result.values["imbalance"] = torch.cat(each).cpu().numpy()
            if (first := (units < MAPS).to(self.device)).any():
                result.maps = x[first].cpu(), strongest_maps(self.maps[first]).cpu()

    @torch.no_grad()
    def _reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor, float, float]:
        """Encode and decode images (N, 3, H, W).

        Returns:
            The decoded mean of the latents, (N, 3, H, W) in [-1, 1]; the output of the encoder; and the seconds of the
            encoder and of the decoder.
        """
        with autocast(self.device, self.cfg.precision):
            start = host.now(self.device)
            encoded = encode_latents(self.model, x)
            latent = encoded.chunk(2, dim=1)[0] if self.posterior else encoded
            middle = host.now(self.device)
            reconstruction = self.model.decode(latent, return_dict=False)[0]
            end = host.now(self.device)
        return reconstruction.float().clamp(-1, 1), encoded.float(), middle - start, end - middle
