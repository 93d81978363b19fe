"""How well an autoencoder reconstructs a source of images, beside bicubic down- and upsampling by its factor.

CPU tasks read and transform images, actors with the model measure them in batches, and the driver adds up one value
per image, exactly.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from litevae import metrics
from litevae.autoencoder import (
    count_parameters,
    downsampling,
    encode_latents,
    fingerprint,
    latent_content,
    load_autoencoder,
)
from litevae.errors import UserError
from litevae.images import ImageTransform, to_tensor
from litevae.perceptual import SqueezeNetFeatures, WeightsMissing, load_lpips
from litevae.pictures import reconstruction_picture
from litevae.precision import autocast
from pipelines import cluster, config, outputs, reading, tracking
from pipelines.actors import pool
from pipelines.reading import Bad, Read, named
from pipelines.sources import Source, open_source
from pipelines.training import Progress

SMALLEST = 32  # pixels; SSIM's window takes 11, perceptual backbones halve four times

METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": metrics.psnr, "ssim": metrics.ssim}


@dataclass
class Measured:
    """Of a batch or of many: values of "reconstruction/<metric>" and "bicubic/<metric>", and what else came of it."""

    images: int = 0
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    means: dict[str, metrics.Mean] = field(default_factory=dict)
    bad: list[Bad] = field(default_factory=list)
    pictures: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # input, reconstruction, latent

    def merge(self, other: "Measured") -> None:
        self.images += other.images
        self.encode_seconds += other.encode_seconds
        self.decode_seconds += other.decode_seconds
        for name, mean in other.means.items():
            self.means.setdefault(name, metrics.Mean()).merge(mean)
        self.bad += other.bad
        self.pictures += other.pictures

    def values(self, which: str) -> dict[str, float]:
        return {name.partition("/")[2]: mean.value() for name, mean in self.means.items() if name.startswith(which)}


def evaluate(cfg: config.Evaluate) -> dict[str, Any]:
    """Measure, print a table, and leave metrics.json and reconstructions.png in `cfg.out`. Returns metrics.json.

    Raises:
        UserError: bad config, model or source; no image could be read.
    """
    out = cluster.output_path("out", cfg.out)
    if not cfg.model:
        raise UserError("model is empty; give a model folder: model=runs/vae/model")
    if cfg.transform.resolution < SMALLEST:
        raise UserError(f"transform.resolution={cfg.transform.resolution}: images are measured from {SMALLEST} px on")
    model = load_autoencoder(cfg.model)
    factor = downsampling(model)
    if cfg.transform.resolution % factor:
        raise UserError(f"transform.resolution={cfg.transform.resolution}: {cfg.model} takes multiples of {factor} px")
    source = open_source(cfg.source)
    if cfg.images > source.units:
        raise UserError(f"images={cfg.images}, but {cfg.source.uri} has {source.units}; 0 takes all")
    cfg = cfg.model_copy(update={"model": os.path.abspath(cfg.model), "images": cfg.images or source.units})
    transform = ImageTransform(cfg.transform.resolution, cfg.transform.resize)
    perceptual, remarks = _perceptual(cfg)

    share = cluster.start(cfg.ray)
    os.makedirs(out, exist_ok=True)
    name = os.path.basename(out)
    run = tracking.start_run(cfg.tracking, cfg.root, "evaluate", name, cfg.model_dump(mode="json"), out, resume=False)
    tracker = tracking.Tracker(run)
    status: tracking.Status = "FAILED"
    try:
        tracker.dataset(os.path.basename(source.uri), source.digest, source.uri, context="evaluation")
        actors = pool(Evaluator, share, cfg, share, [*perceptual])
        started, total = time.monotonic(), Measured()
        progress = Progress("evaluate", cfg.images, 0, sys.stderr.isatty())
        for part in _measure(cfg, source, transform, actors, share.decoders):
            total.merge(part)
            progress.update(total.images + len(total.bad))
        progress.close()
        seconds = time.monotonic() - started
        if not total.images:
            raise UserError(f"{cfg.source.uri}: none of {len(total.bad)} images could be read: {named(total.bad)}")
        summary: dict[str, Any] = {
            "model": cfg.model,
            "fingerprint": fingerprint(cfg.model),
            "downsampling": factor,
            "parameters": {"encoder": count_parameters(model.encoder), "decoder": count_parameters(model.decoder)},
            "source": {"uri": source.uri, "digest": source.digest},
            "transform": transform.identity,
            "images": total.images,
            "unreadable": [bad._asdict() for bad in total.bad],
            "reconstruction": total.values("reconstruction"),
            "bicubic": total.values("bicubic"),
            "protocols": {"reconstruction": "decoded mean of the latent", **metrics.PROTOCOLS},
            "images_per_s": {
                "encoder": total.images / total.encode_seconds,
                "decoder": total.images / total.decode_seconds,
                "evaluation": total.images / seconds,
            },
            "remarks": remarks,
            "run": tracking.link(run),
        }
        for which in ("reconstruction", "bicubic"):
            tracker.metrics({f"eval/{which}/{metric}": value for metric, value in summary[which].items()}, step=0)
        if total.pictures:
            picture = reconstruction_picture(*(torch.cat(part) for part in zip(*total.pictures, strict=True)))
            outputs.write(os.path.join(out, "reconstructions.png"), outputs.png(picture))
            tracker.image("reconstructions", picture, step=0)
        outputs.write(os.path.join(out, "metrics.json"), json.dumps(summary, indent=2).encode() + b"\n")
        tracker.artifact(os.path.join(out, "metrics.json"))
        status = "FINISHED"
    finally:
        tracker.close(status)
    print(report(summary, out))
    return summary


def report(summary: dict[str, Any], out: str) -> str:
    """The summary for a person."""
    quality = [["", "reconstruction", f"bicubic by {summary['downsampling']}"]]
    for metric, value in summary["reconstruction"].items():
        quality.append(
            [
                {"psnr": "PSNR (dB)", "ssim": "SSIM"}.get(metric, metric),
                f"{value:.4f}",
                f"{summary['bicubic'][metric]:.4f}",
            ]
        )
    speed = summary["images_per_s"]
    model = [["", "encoder", "decoder"]]
    model.append(["parameters", *(f"{summary['parameters'][part]:,}" for part in model[0][1:])])
    model.append(["images/s, one worker", *(f"{speed[part]:.1f}" for part in model[0][1:])])
    lines = [
        f"{summary['images']} images at {summary['transform']['resolution']} px of {summary['source']['uri']}, "
        f"{speed['evaluation']:.1f} a second with reading and measuring",
        "",
        outputs.table(quality),
        "",
        outputs.table(model),
        "",
    ]
    if bad := [Bad(**entry) for entry in summary["unreadable"]]:
        lines.append(f"{len(bad)} unreadable left out: {named(bad)}")
    lines += summary["remarks"]
    lines += [f"metrics   {out}/metrics.json", f"pictures  {out}/reconstructions.png", f"run       {summary['run']}"]
    return "\n".join(lines)


def _perceptual(cfg: config.Evaluate) -> tuple[dict[str, torch.nn.Module], list[str]]:
    """The perceptual metrics that there are weights for, and a line about one that is missing."""
    found: list[Any] = []
    remarks = []
    try:
        found.append(load_lpips(cfg.lpips, cfg.lpips_weights))
    except WeightsMissing as error:
        remarks.append(f"no LPIPS: {error}")
    if cfg.squeezenet:
        found.append(SqueezeNetFeatures(cfg.squeezenet))
    return {module.name: module for module in found}, remarks


# --- measuring --------------------------------------------------------------------------------------------------


def _measure(
    cfg: config.Evaluate, source: Source, transform: ImageTransform, actors: list[Any], decoders: int
) -> Iterator[Measured]:
    shown = range(0, cfg.images, -(-cfg.images // cfg.pictures))

    def measure(actor: Any, read: Any, batches: list[Sequence[int]]) -> Any:
        return actor.measure.remote(read, [sum(unit in shown for unit in batch) for batch in batches])

    return reading.over(range(cfg.images), measure, source, transform, cfg.batch_size, actors, decoders)


class Evaluator:
    """A worker: the model and the metrics on one device."""

    def __init__(self, cfg: config.Evaluate, share: cluster.Share, perceptual: list[str]):
        torch.set_num_threads(share.threads)
        self.device = torch.device("cuda" if share.gpu else "cpu")
        self.model, self.precision = load_autoencoder(cfg.model).to(self.device), cfg.precision
        self.factor, self.posterior = downsampling(self.model), latent_content(self.model) == "moments"
        extra, remarks = _perceptual(cfg)
        if [*extra] != perceptual:
            raise UserError(f"the driver has weights of {perceptual}, this node of {[*extra]}. {' '.join(remarks)}")
        self.metrics = METRICS | {name: module.to(self.device) for name, module in extra.items()}
        side = cfg.transform.resolution
        self._reconstruct(torch.zeros(1, 3, side, side, device=self.device))  # what is slow the first time only

    def measure(self, batches: list[Read], pictures: list[int]) -> Measured:
        """
        Args:
            pictures: how many images of each batch to show.
        """
        total = Measured()
        for batch, shown in zip(batches, pictures, strict=True):
            total.merge(self._measure(batch, shown))
        return total

    @torch.no_grad()
    def _measure(self, batch: Read, pictures: int) -> Measured:
        if not len(batch.pixels):
            return Measured(bad=batch.bad)
        x = to_tensor(batch.pixels).to(self.device)
        reconstruction, latent, encode_seconds, decode_seconds = self._reconstruct(x)
        result = Measured(len(x), encode_seconds, decode_seconds, bad=batch.bad)
        for which, y in (("reconstruction", reconstruction), ("bicubic", metrics.bicubic_baseline(x, self.factor))):
            for name, metric in self.metrics.items():
                result.means[f"{which}/{name}"] = mean = metrics.Mean()
                mean.add(metric(x, y).cpu())
        if pictures:
            x, reconstruction, latent = (part[:pictures].cpu() for part in (x, reconstruction, latent))
            result.pictures.append((x, reconstruction, latent))
        return result

    @torch.no_grad()
    def _reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor, float, float]:
        """Decoded mean of the latent, that mean, and the seconds of encoder and decoder."""
        with autocast(self.device, self.precision):
            start = self._now()
            latent = encode_latents(self.model, x)
            latent = latent.chunk(2, dim=1)[0] if self.posterior else latent
            middle = self._now()
            reconstruction = self.model.decode(latent, return_dict=False)[0]
            end = self._now()
        return reconstruction.float().clamp(-1, 1), latent.float(), middle - start, end - middle

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
