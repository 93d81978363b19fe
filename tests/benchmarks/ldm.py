"""Training a latent diffusion model: our loop beside a bare one, and a latent cache beside encoding on the way.

python tests/benchmarks/ldm.py loop [NETWORK:SIDE:BATCH:STEPS ...] [--repeats 3]
    `jobs/train_ldm.py` on a cache of synthetic latents, its loop without Ray around it, and the same network in a plain
    torch loop, in turn. Of a run's equal intervals the first one warms up, and the median of the others is its rate.

python tests/benchmarks/ldm.py modes PHOTOS [--images 32] [--batch 8] [--networks small] [--repeats 1]
    Training on images of a folder of JPEGs at 256 px, by three encoders of full size and random weights: online;
    write-through, all of its first epoch; from the cache that this filled.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import common

from pipelines import cluster

REPO = Path(__file__).resolve().parents[2]
INTERVALS = 6  # of a run of `loop`; the first one warms up
SHORT = {"LiteVAE-S": "S", "LiteVAE-B": "B", "SD-VAE": ""}
OPTIM = {"lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 0.01}
CLIP, DECAY = 1.0, 0.9999
FORWARD = 32  # images of a forward pass of write-through, which pads the last one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("loop")
    part.add_argument("settings", nargs="*", default=["small:32:8:12", "tiny:8:64:48"])
    part.add_argument("--repeats", type=int, default=3)
    part = parts.add_parser("modes")
    part.add_argument("photos", type=Path)
    part.add_argument("--images", type=int, default=32)
    part.add_argument("--batch", type=int, default=8)
    part.add_argument("--networks", nargs="+", default=["small"])
    part.add_argument("--encoders", nargs="+", choices=SHORT, default=[*SHORT])
    part.add_argument("--repeats", type=int, default=1)
    part = parts.add_parser("child", help="of the processes that this starts")
    part.add_argument("function", choices=("bare", "alone", "three_modes"))
    part.add_argument("values", type=json.loads)
    given = vars(parser.parse_args())
    name = given.pop("part")
    if name == "child":
        print(json.dumps(globals()[given["function"]](**given["values"])))
        return
    # What the job's worker has: few spins, one OpenMP thread until torch asks for more.
    os.environ.update(cluster._ENVIRONMENT, OMP_NUM_THREADS="1")
    common.environment("torch", "diffusers", "ray", "numpy")
    {"loop": loop, "modes": modes}[name](**given)


def child(function, **values):
    return common.result(common.child(__file__, "child", function, json.dumps(values)))


def shown(values, digits=1):
    """Median and range, or the only one."""
    return common.spread(values, digits) if len(values) > 1 else f"{values[0]:,.{digits}f}"


# --- the loop ---------------------------------------------------------------------------------------------------


def loop(settings, repeats):
    rows = []
    for setting in settings:
        network, *numbers = setting.split(":")
        side, batch, steps = map(int, numbers)
        steps = max(1, steps // INTERVALS) * INTERVALS
        found = {"bare": [], "alone": [], "ours": [], "waiting": []}
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_synthetic(folder, side, batch)
            for repeat in range(repeats):
                rate = child("bare", network=network, side=side, batch=batch, steps=steps)
                found["bare"].append(rate)
                words = words_of(folder, network, batch)
                found["alone"].append(child("alone", words=words, batch=batch, steps=steps))
                job = ours(folder, f"run{repeat}", network, batch, steps)
                found["ours"].append(job["rate"])
                found["waiting"].append(job["waiting"])
                rates = f"bare {rate:.2f}, without Ray {found['alone'][-1]:.2f}, job {job}"
                common.log(f"{setting}, {repeat + 1} of {repeats}: {rates}")
        row = [f"{network}, {side} x {side}, batch {batch}"]
        row += [shown([rate / batch for rate in found[name]], 3) for name in ("bare", "alone", "ours")]
        for name in ("alone", "ours"):
            row.append(f"{statistics.median(found[name]) / statistics.median(found['bare']):.3f}")
        rows.append([*row, f"{100 * max(found['waiting']):.2f} %"])
    print(f"{repeats} runs each, in turn; of each the median of {INTERVALS - 1} intervals; of those median (range)\n")
    common.table(
        ["", "bare loop, steps/s", "our loop without Ray", "**the job**", "our loop / bare", "the job / bare",
         "waiting for data, at most"],
        rows,
    )  # fmt: skip


def write_synthetic(folder, side, batch):
    """Latents and the autoencoder that they are said to be of."""
    from litevae.autoencoder import LiteVAE, fingerprint

    LiteVAE("S", block_out_channels=(8, 8, 8, 8), layers_per_block=1).save_pretrained(folder / "vae")
    model = {"path": str(folder / "vae"), "fingerprint": fingerprint(folder / "vae")}
    common.synthetic_cache(folder / "cache", max(4000, batch), (8, side, side), **model)


def bare(network, side, batch, steps):
    """images/s of what a trainer of ours does, in plain torch on latents made beforehand."""
    import torch
    import torch.nn.functional as F
    from diffusers import DDPMScheduler

    from litevae.denoiser import build_denoiser

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    net = build_denoiser(network, 4, side).to(device).train()
    parameters = list(net.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, **OPTIM, fused=True)
    scheduler = DDPMScheduler(1000, beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear")
    latents = torch.randn(batch, 4, side, side, device=device)
    rates, start, every = [], time.perf_counter(), steps // INTERVALS
    for step in range(1, steps + 1):
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (batch,), device=device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with torch.autocast(device.type, torch.bfloat16, enabled=fast):
            predicted = net(noisy, timesteps).sample
        loss = F.mse_loss(predicted.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - DECAY)
        if step % every == 0:
            assert loss.item() < 10  # and waits for a GPU
            rates.append(every * batch / (time.perf_counter() - start))
            start = time.perf_counter()
    return statistics.median(rates[1:])


def words_of(folder, network, batch):
    optim = [f"optim.{key}={list(value) if isinstance(value, tuple) else value}" for key, value in OPTIM.items()]
    return [
        f"cache={folder / 'cache'}", f"root={folder}", f"network={network}", f"batch_size={batch}", *optim,
        f"optim.clip={CLIP}", f"loop.ema={DECAY}", "sample_images=0",
    ]  # fmt: skip


def alone(words, batch, steps):
    """images/s of the job's loop in this process."""
    import ray.train.torch
    import torch

    from pipelines import train_ldm
    from pipelines.config import TrainLDM, load

    ray.train.torch.prepare_model = lambda model: model  # without Ray there is nothing to prepare for
    torch.set_num_threads(os.cpu_count())
    config = load(TrainLDM, None, words)
    data, shape, _ = train_ldm._cache(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = train_ldm.Diffusion(config, data | {"shape": shape}, 0, 1, device)
    task.begin(0)
    rates, start, every = [], time.perf_counter(), steps // INTERVALS
    for step, given in enumerate(task.batches(0, steps * batch, batch), 1):
        task.step(given, (step - 1) * batch)
        if step % every == 0:
            synchronize(device)
            rates.append(every * batch / (time.perf_counter() - start))
            start = time.perf_counter()
    return statistics.median(rates[1:])


def ours(folder, name, network, batch, steps):
    """images/s of the job, and the share of time in which it waited for data."""
    words = [
        *words_of(folder, network, batch), f"name={name}", f"images={steps * batch}", "loop.val_every=0",
        f"loop.log_every={steps // INTERVALS}", f"loop.checkpoint_every={steps * batch}",
    ]  # fmt: skip
    process = common.child(str(REPO / "jobs/train_ldm.py"), *words)
    out, problems = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(process.args)} failed:\n{out}{problems}")
    lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    logged = [line for line in lines if "train/images_per_second" in line][1:]
    assert len(logged) == INTERVALS - 1
    waiting = statistics.mean(line["train/waiting_for_data"] for line in logged)
    return {"rate": statistics.median(line["train/images_per_second"] for line in logged), "waiting": waiting}


# --- the modes --------------------------------------------------------------------------------------------------


def modes(photos, images, batch, networks, encoders, repeats):
    if images % FORWARD or images % batch:
        sys.exit(f"--images {images} is not a multiple of {FORWARD} and of --batch {batch}")
    files = common.jpegs(photos)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        linked = common.linked(files, images, folder / "photos")
        for network in networks:
            for encoder in encoders:
                runs = []
                for repeat in range(repeats):
                    place = str(folder / f"{network}-{encoder}-{repeat}".replace("/", ""))
                    values = {"encoder": encoder, "network": network, "photos": str(linked), "batch": batch}
                    runs.append(child("three_modes", folder=place, **values))
                    common.log(f"{network}, {encoder}, {repeat + 1} of {repeats}: {runs[-1]}")
                rows.append(row_of(encoder, network, runs))
    size = statistics.mean(path.stat().st_size for path in files[:images])
    print(
        f"{min(images, len(files))} JPEGs at 256 px ({size / 1000:,.1f} kB each), batch {batch}; "
        f"{f'{repeats} runs: median (range)' if repeats > 1 else 'one run'}\n"
    )
    common.table(
        ["encoder", "network", "online, images/s", "write-through's first epoch", "from the cache", "cache / online",
         "not training: online", "write-through", "cache", "cache, bytes an image", "ahead after"],
        rows,
    )  # fmt: skip
    print(
        '\n"Not training" is the share of time that reading, decoding, encoding and loading take from the step. "Ahead '
        'after": epochs after which write-through and then the cache have taken less time than online.'
    )


def row_of(encoder, network, runs):
    def of(mode, key):
        return [run[mode][key] for run in runs]

    seconds = {mode: statistics.median(of(mode, "seconds")) for mode in ("online", "write-through", "cache")}
    row = [encoder, network, *(shown([1 / value for value in of(mode, "seconds")]) for mode in seconds)]
    row.append(f"{seconds['online'] / seconds['cache']:.1f} x")
    row += [f"{100 * statistics.median(of(mode, 'feeding')):.1f} %" for mode in seconds]
    once, saved = seconds["write-through"] - seconds["cache"], seconds["online"] - seconds["cache"]
    return [*row, f"{runs[0]['bytes']:,.0f}", f"{once / saved:.2f} epochs" if saved > 0 else "never"]


def three_modes(encoder, network, photos, batch, folder):
    """Of each mode: seconds an image, and the share of them that is not the network's training."""
    import ray.train.torch
    import torch

    from pipelines.config import TrainLDM, load

    ray.train.torch.prepare_model = lambda model: model  # without Ray there is nothing to prepare for
    torch.set_num_threads(os.cpu_count())
    place = Path(folder)
    write_vae(encoder, place / "vae")
    count = len(common.jpegs(Path(photos)))
    words = [
        f"network={network}", f"batch_size={batch}", f"images={count}", f"vae={place / 'vae'}", f"root={place}",
        "optim.clip=1", f"data.source.uri={photos}", f"data.rows_per_shard={FORWARD}", f"data.calibrate={batch}",
        "tracking.enabled=false",
    ]  # fmt: skip
    found = {}
    for mode in ("write-through", "cache", "online"):
        of_mode = [*words, f"mode={mode}", *([f"cache={place / 'cache'}"] if mode != "online" else [])]
        found[mode] = timed(load(TrainLDM, None, of_mode), count)
    return found | {"bytes": sum(path.stat().st_size for path in (place / "cache" / "shards").iterdir()) / count}


def write_vae(encoder, folder):
    """Of full size, but for the decoder, which is not used."""
    import torch
    from diffusers import AutoencoderKL

    from litevae.autoencoder import LiteVAE

    torch.manual_seed(0)
    if SHORT[encoder]:
        model = LiteVAE(SHORT[encoder], block_out_channels=(8, 8, 8, 8), layers_per_block=1)
    else:  # as stabilityai/sd-vae-ft-mse's config.json
        levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        model = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **levels)
    model.save_pretrained(folder)


def timed(config, count):
    """An epoch after a step that warms up."""
    import torch

    from pipelines import train_ldm

    find = {"cache": train_ldm._cache, "online": train_ldm._online, "write-through": train_ldm._write_through}
    data, shape, _ = find[config.mode](config)
    if config.mode == "write-through":
        data |= train_ldm._begin_cache(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setup = data | {"shape": shape, "threads": os.cpu_count(), "handle": Handle}
    task = train_ldm.Diffusion(config, setup, 0, 1, device)
    task.begin(0)  # encoders warm up by calibrating
    encoding, raw = [], task.feed.raw

    def measured(batch):
        start = time.perf_counter()
        latents = raw(batch)
        synchronize(device)
        encoding.append(time.perf_counter() - start)
        return latents

    task.feed.raw = lambda batch: torch.randn(config.batch_size, *shape, device=device)
    for _ in range(2):
        task.step(task._with_noise({"positions": range(config.batch_size), "labels": None}), 0)
    synchronize(device)
    task.feed.raw = measured
    waited, start, position = 0.0, time.perf_counter(), 0
    batches = iter(task.batches(0, count, config.batch_size))
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)  # of write-through also the last time, when the manifest is written
        waited += time.perf_counter() - asked
        if batch is None:
            break
        task.step(batch, position)
        synchronize(device)
        position += config.batch_size
    seconds = time.perf_counter() - start
    return {"seconds": seconds / position, "feeding": (waited + sum(encoding)) / seconds}


class Handle:
    experiment, run_id = "benchmark", None


def synchronize(device):
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
