"""How far a cache's latents are from a standard Gaussian."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from litevae import generation
from litevae.cache import LatentCache, Shape
from litevae.errors import UserError
from pipelines import cluster, config, scores, tracking
from pipelines.reading import spaced
from pipelines.scores import Score

PART = 256  # rows read at a time
MMD = generation.PROTOCOLS["mmd"]


def mmd(cfg: config.EvaluateLatents) -> dict[str, Any]:
    """Measure the MMD of a cache's latents, normalised and raw, print it, and leave metrics.json in `cfg.out`, which is
    returned.

    Raises:
        UserError: bad config or cache, NaN or infinite latents.
    """
    out = cluster.output_path("out", cfg.out)
    if not cfg.cache:
        raise UserError("cache is empty; give a latent cache: evaluate.py latents FOLDER")
    cache = LatentCache(cfg.cache)
    shape, rows = _largest_group(cache)
    chosen = spaced(rows, min(cfg.images or len(rows), len(rows)))
    parts = [chosen[start : start + PART] for start in range(0, len(chosen), PART)]
    raw = torch.cat([cache.latents(part, 0, cfg.seed, cfg.draw, normalize=False) for part in parts])

    os.makedirs(out, exist_ok=True)
    shown = cfg.model_dump(mode="json")
    run = tracking.start_run(cfg.tracking, cfg.root, "evaluate", os.path.basename(out), shown, out, resume=False)
    tracker = tracking.Tracker(run)
    status: tracking.Status = "FAILED"
    try:
        digest = cache.manifest["digest"]
        tracker.dataset(os.path.basename(cache.path), digest, cache.path, context="evaluation")
        size = "x".join(map(str, raw.shape[1:]))
        subset = min(cfg.subset, len(raw))
        count = len(raw) // subset
        drawn = "drawn from the moments" if cfg.draw == "sample" and cache.content == "moments" else "means"
        about = f"{len(raw):,} latents of {size}, {drawn}, in {count} subset{'s' if count > 1 else ''} of {subset:,}"
        kinds = {
            "normalised": (cache.normalize(raw), "to mean 0 and standard deviation 1 a channel over the cache"),
            "raw": (raw, "as the autoencoder gives them"),
        }
        found = [
            Score(f"mmd/{kind}/{sigma:g}", f"MMD², {kind}, sigma {sigma:g}", value, std, f"{about}, {scale}; {MMD}")
            for kind, (values, scale) in kinds.items()
            for sigma, (value, std) in generation.mmd(values, cfg.sigmas, cfg.subset, cfg.seed).items()
        ]
        remarks = []
        if len(rows) < len(cache):
            remarks.append(f"only rows of the most frequent shape {shape}: {len(rows):,} of {len(cache):,}")
        summary: dict[str, Any] = {
            "cache": {"path": cache.path, "digest": digest, "rows": len(cache), "shape": [*raw.shape[1:]]},
            "images": len(raw),
            "metrics": [score._asdict() for score in found],
            "remarks": remarks,
            "run": tracking.link(run),
        }
        scores.leave(summary, out, tracker)
        status = "FINISHED"
    finally:
        tracker.close(status)
    print(f"{len(raw):,} of {len(cache):,} latents of {cache.path}\n\n{scores.report(summary, out)}")
    return summary


def _largest_group(cache: LatentCache) -> tuple[Shape, Sequence[int]]:
    """The shape that most rows have, and these rows."""
    counts: dict[Shape, int] = {}
    for shape, rows in zip(cache.group_shapes, cache.groups.tolist(), strict=True):
        counts[shape] = counts.get(shape, 0) + rows
    most = max(counts, key=lambda shape: counts[shape])
    mine = np.repeat([shape == most for shape in cache.group_shapes], cache.groups)
    return most, np.flatnonzero(mine).tolist()
