"""Measure how far the latents of a cache are from a standard Gaussian, as a maximum mean discrepancy (MMD)."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litevae import generation
from litevae.cache import LatentCache, Shape
from pipelines.evaluation import config, first_look, report
from pipelines.evaluation.image_batches import evenly_spaced
from pipelines.evaluation.report import Score
from pipelines.runtime import mlflow_run, outputs

PART = 256  # rows read at a time
MMD = generation.PROTOCOLS["mmd"]


def mmd(cfg: config.EvaluateLatents) -> dict[str, Any]:
    """Measure the MMD of a cache's latents, normalised and raw, print it, and write metrics.json into `cfg.out`.

    Returns:
        The content of metrics.json.

    Raises:
        UserError: if the config or the cache is wrong, or if latents are NaN or infinite.
    """
    out = first_look.latents(cfg).announce("evaluate latents")
    cache = LatentCache(cfg.cache)
    shape, rows = _largest_group(cache)
    chosen = evenly_spaced(rows, min(cfg.images or len(rows), len(rows)))
    parts = [chosen[start : start + PART] for start in range(0, len(chosen), PART)]
    raw = torch.cat([cache.latents(part, 0, cfg.seed, cfg.draw, normalize=False) for part in parts])

    with mlflow_run.tracked_run(cfg, "evaluate", os.path.basename(out), out) as (tracker, run):
        digest = cache.manifest["digest"]
        tracker.dataset(os.path.basename(cache.path), digest, cache.path, context="evaluation")
        drawn = "drawn from the moments" if cfg.draw == "sample" and cache.content == "moments" else "means"
        found = mmd_scores(raw, cache.normalize(raw), "the cache", drawn, cfg.sigmas, cfg.subset, cfg.seed)
        remarks = []
        if len(rows) < len(cache):
            remarks.append(f"only rows of the most frequent shape {shape}: {len(rows):,} of {len(cache):,}")
        summary: dict[str, Any] = {
            "cache": {"path": cache.path, "digest": digest, "rows": len(cache), "shape": [*raw.shape[1:]]},
            "images": len(raw),
            "metrics": [score._asdict() for score in found],
            "remarks": remarks,
            "run": mlflow_run.link(run),
            "config": outputs.measured(cfg),
        }
        report.write_scores(summary, out, tracker)
    print(f"{len(raw):,} of {len(cache):,} latents of {cache.path}\n\n{report.report(summary, out, cfg.verbose)}")
    return summary


def mmd_scores(
    raw: Tensor,
    normalised: Tensor,
    over: str,
    drawn: str,
    sigmas: Sequence[float] = generation.SIGMAS,
    subset: int = generation.SUBSET,
    seed: int = 0,
) -> list[Score]:
    """Return the MMD of latents, normalised and raw, at each bandwidth, as scores mmd/<normalised|raw>/<bandwidth>.

    Args:
        raw: latents (N, C, h, w) as the autoencoder gives them.
        normalised: the same latents, each channel with mean 0 and standard deviation 1.
        over: what they were normalised over, for people.
        drawn: how they were made from the encoder's output, for people.
        sigmas: bandwidths of the kernel.
        subset: number of latents per subset.
        seed: seed of the subsets and of the Gaussian's draws.

    Raises:
        UserError: for the same reasons as `generation.mmd`.
    """
    size, subset = "x".join(map(str, raw.shape[1:])), min(subset, len(raw))
    count = len(raw) // subset
    about = f"{len(raw):,} latents of {size}, {drawn}, in {count} subset{'s' if count > 1 else ''} of {subset:,}"
    kinds = {
        "normalised": (normalised, f"to mean 0 and standard deviation 1 a channel over {over}"),
        "raw": (raw, "as the autoencoder gives them"),
    }
    return [
        Score(f"mmd/{kind}/{sigma:g}", f"MMD², {kind}, sigma {sigma:g}", value, std, f"{about}, {scale}; {MMD}")
        for kind, (values, scale) in kinds.items()
        for sigma, (value, std) in generation.mmd(values, sigmas, subset, seed).items()
    ]


def _largest_group(cache: LatentCache) -> tuple[Shape, Sequence[int]]:
    """Return the most frequent shape of the rows, and the rows of this shape."""
    counts: dict[Shape, int] = {}
    for shape, rows in zip(cache.group_shapes, cache.groups.tolist(), strict=True):
        counts[shape] = counts.get(shape, 0) + rows
    most = max(counts, key=lambda shape: counts[shape])
    mine = np.repeat([shape == most for shape in cache.group_shapes], cache.groups)
    return most, np.flatnonzero(mine).tolist()
