"""Show what a cache holds: its facts, some of its rows, and the images that the model decodes from their latents."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from litevae import cache, hub, metrics, storage
from litevae.any_autoencoder import fingerprint, load_autoencoder
from litevae.errors import UserError
from litevae.images import to_tensor
from litevae.latents import encode_latents
from litevae.pictures import png, reconstruction_picture
from litevae.precision import autocast
from litevae.shards import from_stored, read_shard
from pipelines.data.decode import Shard, ShardTask, seed_of, transform_of
from pipelines.data.left_out import LeftOut
from pipelines.encoding.config import Inspect
from pipelines.encoding.listings import open_listings
from pipelines.encoding.model_statistics import disagreement
from pipelines.encoding.partition import Partition
from pipelines.encoding.plan import CachePlan
from pipelines.encoding.totals import listed_losses
from pipelines.runtime import paths, tables
from pipelines.runtime.logs import say


def inspect(config: Inspect) -> dict[str, Any]:
    """Print what a cache holds and how it was made, and check some of its rows against the model and the source.

    For each of these rows the latent is decoded and the source image is encoded again; inspection.png shows the
    decoded images next to their sources.

    Returns:
        The content of inspection.json: the digest, and for each shard the mean PSNR of the decoded images in dB and
        the drift (the largest absolute difference between latents that are stored and latents that are encoded now).

    Raises:
        UserError: if the cache is not finished, or the model or the source is not where it was.
    """
    if not config.cache:
        raise UserError("give a cache folder")
    out = Path(paths.check_local("out", config.out))
    latents = cache.LatentCache(config.cache)
    manifest, plan = latents.manifest, CachePlan.from_json(latents.manifest, f"{latents.path}/manifest.json")
    _print_facts(latents)
    about: dict[str, Any] = {"digest": manifest["digest"], "shards": []}
    if not config.shards:
        return about
    folder = hub.pinned(config.model or plan.model.path)
    if fingerprint(folder) != plan.model.fingerprint:
        raise UserError(f"{folder} is not the model that encoded {latents.path}; give that one with model=FOLDER")
    model = load_autoencoder(folder)
    partition = Partition(open_listings(latents.path, config.source), plan.rows_per_shard)
    shown = []
    for number in _spread([shard["shard"] for shard in manifest["shards"] if shard["rows"]], config.shards):
        pixels, stored = _rows_of(latents, partition.shard(ShardTask(number)), plan, config.rows)
        seen = [_look(model, image, values, plan) for image, values in zip(pixels, stored, strict=True)]
        psnr = float(np.mean([one["psnr"] for one in seen]))
        drift = max(one["drift"] for one in seen)
        about["shards"].append({"shard": number, "rows": len(seen), "psnr": round(psnr, 3), "drift": drift})
        shown += [(one["image"], one["reconstruction"], one["latent"]) for one in seen]
    rows = [["shard", "rows", "PSNR (dB)", "drift"]]
    rows += [[f"{s['shard']:,}", str(s["rows"]), f"{s['psnr']:.2f}", f"{s['drift']:.2g}"] for s in about["shards"]]
    print(f"\n{tables.table(rows)}\n")
    print("drift: largest absolute difference between stored latents and latents encoded now")
    out.mkdir(parents=True, exist_ok=True)
    same = [one for one in shown if one[0].shape == shown[0][0].shape]  # all rows of a picture have one shape
    picture = reconstruction_picture(*(torch.cat(column) for column in zip(*same, strict=True)))
    storage.put(str(out / "inspection.png"), png(picture))
    storage.put(str(out / "inspection.json"), json.dumps(about, indent=1).encode())
    print(f"\npicture  {out}/inspection.png")
    return about


def _print_facts(latents: cache.LatentCache) -> None:
    manifest = latents.manifest
    counts, kept, run = manifest["counts"], manifest["latents"], manifest["run"]
    size = sum(shard.get("bytes", 0) for shard in manifest["shards"])
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts["reasons"].items())
    shapes = ", ".join(f"{' x '.join(map(str, shape))} ({count:,})" for count, *shape in kept["shapes"])
    source, model = manifest["source"], manifest["model"]
    facts = {
        "cache": f"{latents.path}, version {manifest['number']}, digest {manifest['digest'][:12]}",
        "images": f"{counts['input']:,} = {counts['encoded']:,} encoded + {counts['quarantined']:,} in quarantine",
        "quarantine": reasons or "empty",
        "rows": f"{counts['rows']:,} in {len(manifest['shards']):,} shards, {size / 1e6:,.1f} MB",
        "latents": f"{kept['content']}, {kept['dtype']}: {shapes}",
        "model": f"{model['config'].get('_class_name')} {model['path']}, fingerprint {model['fingerprint'][:12]}",
        "transform": ", ".join(f"{key} {value}" for key, value in manifest["transform"].items()),
        "source": f"{source['kind']} {source['uri']}, {source['units']:,} inputs, digest {source['digest'][:12]}",
        "left out": str(LeftOut.from_json(source["left_out"])) if "left_out" in source else "not counted",
        "made": f"{run.get('created')} by {run.get('job')} on {', '.join(run.get('devices', []))}, MLflow run "
        f"{run.get('tracking', {}).get('run_id')}",
    }
    print(
        "\n".join([f"{name:<12}{text}" for name, text in facts.items()] + listed_losses(counts.get("lost_values", {})))
    )
    rows = [["channel", *map(str, range(len(kept["mean"])))]]
    rows += [[name, *(f"{value:.4f}" for value in kept[name])] for name in ("mean", "std")]
    print(f"\n{tables.table(rows)}")
    if other := disagreement(model["config"], kept["mean"], kept["std"]):
        print(f"model's statistics: {other}")


def _spread(items: list[int], count: int) -> list[int]:
    """Return `count` of the items, evenly spaced, or all of them if there are fewer."""
    return [
        items[index] for index in np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int))
    ]


def _rows_of(
    latents: cache.LatentCache, shard: Shard, plan: CachePlan, count: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the pixels (H, W, 3) of some rows, made from the source again, and their stored latents (C, h, w)."""
    transform = transform_of(plan.views)
    if (now := transform.identity) != {key: plan.transform.get(key) for key in now}:
        text = f"shard {shard.task.shard}: images are decoded differently here than when the cache was made: {now}"
        say(f"note: {text}", "WARNING")
    commit = next(entry for entry in latents.manifest["shards"] if entry["shard"] == shard.task.shard)
    table, parts = read_shard(latents.path, commit, plan.latents)
    stored = [values for part in parts for values in part]
    pixels, kept = [], []
    for index in _spread(list(range(table.num_rows)), count):
        row = table.slice(index, 1).to_pylist()[0]
        item = shard.source.read(row["unit"] - shard.first)
        # It was read before, with a limit that a retry may have raised.
        transform = replace(transform, max_pixels=max(transform.max_pixels, row["height"] * row["width"]))
        pixels.append(transform.all(item.data, seed_of(plan.views, item.id))[row["view"]].pixels)
        kept.append(stored[index])
    return pixels, kept


@torch.inference_mode()
def _look(model: Any, pixels: np.ndarray, stored: np.ndarray, plan: CachePlan) -> dict[str, Any]:
    """Decode the latent of a row, and encode its image again."""
    how = plan.latents
    x = to_tensor(pixels[None])
    kept = from_stored(stored[None].copy(), how["dtype"]).float()
    with autocast(x.device, plan.precision):
        fresh = encode_latents(model, x).float()
    fresh = fresh[:, : kept.shape[1]]
    latent = kept.chunk(2, dim=1)[0] if how["content"] == "moments" else kept
    reconstruction = model.decode(latent, return_dict=False)[0].float()
    return {
        "image": x,
        "reconstruction": reconstruction,
        "latent": latent,
        "psnr": float(metrics.psnr(reconstruction.clamp(-1, 1), x)),
        "drift": float((fresh - kept).abs().max()),
    }
