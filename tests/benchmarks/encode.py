"""Images/s of the encode job beside its two halves alone, a hand-written DataLoader loop, and plain Ray Data.

python tests/benchmarks/encode.py DATA --taesd FOLDER [--images 256] [--repeats 3]

DATA holds JPEGs, FOLDER taesd_encoder.safetensors and taesd_decoder.safetensors. Everything gets one decoding process
and one encoding process of one thread. The rates of whole systems are steady: by the times at which their files were
finished, a quarter of them left out first. Every run is a process of its own, and its whole time is the process's.
"""

import tempfile
import time
from pathlib import Path

import common
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from systems import BATCH, SIDE

from litevae.autoencoder import WEIGHTS, LiteVAE

SYSTEMS = str(Path(__file__).with_name("systems.py"))


def steady(out):
    """Images/s by the times at which files of latents were finished, from a quarter of them on: every process has
    started by then."""
    files = [path for path in out.rglob("*.parquet") if path.parent in (out, out / "shards")]
    done = sorted((path.stat().st_mtime_ns / 1e9, pq.read_metadata(path).num_rows) for path in files)
    first = len(done) // 4
    seconds = done[-1][0] - done[first][0]
    return sum(rows for _, rows in done[first + 1 :]) / seconds if seconds else 0.0, sum(rows for _, rows in done)


def measure(folder, model, out):
    """Every system once: its rate, and the seconds of a whole run."""
    found = {}

    def start(name, begin=0.0):
        return common.child(SYSTEMS, folder, name, "--model", model, "--out", out / name, "--begin", begin)

    for name in ("decode", "encode"):
        found[name] = common.result(start(name))["rate"]
    begin = time.time() + 15  # when both have their libraries and models
    both = [start(name, begin) for name in ("decode", "encode")]
    found["both"] = min(common.result(process)["rate"] for process in both)
    for name in ("job", "loop", "ray_data"):
        began = time.perf_counter()
        common.result(start(name))
        found[f"{name} whole"] = time.perf_counter() - began
        found[name], rows = steady(out / name)
        if rows != len(common.jpegs(folder)):
            raise SystemExit(f"{name}: {rows} rows of {len(common.jpegs(folder))} images")
    found["share"] = found["job"] / min(found["decode"], found["encode"])
    common.log("  " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))
    return found


ROWS = {
    "decode": "decode alone, one core",
    "encode": "encode alone, one core",
    "both": "both alone at the same time, unconnected: the slower",
    "job": "**the job**",
    "share": "the job / the slower of the two alone",
    "loop": "DataLoader + loop + pyarrow",
    "ray_data": "Ray Data, write_parquet",
    "job whole": "whole run, s: the job",
    "loop whole": "DataLoader + loop + pyarrow",
    "ray_data whole": "Ray Data",
}


def main(data, taesd, images, repeats):
    common.environment("torch", "ray", "pillow", "pyarrow")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        files = common.jpegs(data)
        photos = common.linked(files, images, place / "photos")
        large = common.linked(common.mosaics(files, 16, place / "mosaics"), images, place / "large")
        vae, tiny = models(place, taesd)
        settings = {"LiteVAE-S": (photos, vae), "TAESD": (photos, tiny), "LiteVAE-S, 24-megapixel JPEGs": (large, vae)}
        small = common.linked(files, BATCH, place / "small")
        for number, model in enumerate((vae, tiny)):
            common.log("warm-up")
            measure(small, model, place / f"warm-up-{number}")
        found = {name: [] for name in settings}
        for repeat in range(repeats):
            for number, (name, (folder, model)) in enumerate(settings.items()):
                common.log(f"{name}, repeat {repeat + 1} of {repeats}")
                found[name].append(measure(folder, model, place / f"{repeat}-{number}"))
    print(f"images/s at {SIDE} px, bf16; {images} images a run, {repeats} runs: median (range)\n")
    rows = [
        [text, *(common.spread([run[key] for run in runs], 2 if key == "share" else 1) for runs in found.values())]
        for key, text in ROWS.items()
    ]
    common.table(["", *found], rows)


def models(place, taesd):
    torch.manual_seed(0)
    LiteVAE.from_preset("S", latent_channels=4).save_pretrained(place / "vae")
    state = {f"encoder.layers.{key}": value for key, value in load_file(taesd / "taesd_encoder.safetensors").items()}
    for key, value in load_file(taesd / "taesd_decoder.safetensors").items():
        number, rest = key.split(".", 1)
        state[f"decoder.layers.{int(number) - 1}.{rest}"] = value  # diffusers clamps outside its layers
    AutoencoderTiny().save_config(place / "taesd")
    save_file(state, place / "taesd" / WEIGHTS, metadata={"format": "pt"})
    return place / "vae", place / "taesd"


if __name__ == "__main__":
    parser = common.arguments(__doc__, "data", images=256, repeats=3)
    parser.add_argument("--taesd", type=Path, required=True)
    main(**vars(parser.parse_args()))
