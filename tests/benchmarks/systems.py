"""What encode.py measures, each a process of its own: DATA, --model FOLDER, --out FOLDER -> a JSON object.

python tests/benchmarks/systems.py DATA decode|encode|job|loop|ray_data --model FOLDER --out FOLDER [--begin TIME]
"""

import json
import os
import secrets
import time
from pathlib import Path

import common
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from litevae.autoencoder import encode_latents, fingerprint, latent_content, load_autoencoder
from litevae.images import ImageTransform, to_tensor
from litevae.precision import autocast

SIDE, BATCH = 256, 16  # a shard is a batch, so that all systems finish their files equally often
ALONE = 15.0  # seconds that each half is measured alone
TRANSFORM = ImageTransform(SIDE)


def pixels_of(file):
    return TRANSFORM(Path(file).read_bytes()).pixels


def decode(folder, model, out, begin):
    files = common.jpegs(folder)
    return rate(lambda n: pixels_of(files[n % len(files)]), 1, begin)


def encode(folder, model, out, begin):
    from pipelines.encode import Encoder

    content = {"content": latent_content(load_autoencoder(model))}
    plan = {"model": {"path": str(model), "fingerprint": fingerprint(model)}, "precision": "bf16", "compile": False}
    encoder = Encoder("", plan | {"latents": content, "settings": {"batch_size": BATCH}}, gpu=False, threads=1)
    batch = np.stack([pixels_of(file) for file in common.jpegs(folder)[:BATCH]])
    encoder._forward(batch)
    return rate(lambda n: encoder._forward(batch), BATCH, begin)


def rate(work, images, begin):
    torch.set_num_threads(1)
    time.sleep(max(0.0, begin - time.time()))
    start, done = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < ALONE:
        work(done)
        done += 1
    return {"rate": images * done / seconds}


def job(folder, model, out, begin):
    from pipelines.config import Encode, load
    from pipelines.encode import encode_dataset

    sizes = [f"rows_per_shard={BATCH}", f"batch_size={BATCH}", f"transform.resolution={SIDE}", "precision=bf16"]
    shares = ["ray.workers=1", "ray.decode_tasks=1", "ray.cpus_per_worker=1", "ray.gpu=false", "tracking.enabled=false"]
    places = [f"source.uri={folder}", f"model={model}", f"out={out}", f"root={out}-runs"]
    return encode_dataset(load(Encode, None, [*places, *sizes, *shares]))


class Photos(torch.utils.data.Dataset):
    def __init__(self, folder):
        self.files = common.jpegs(folder)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return pixels_of(self.files[index]), self.files[index].name


@torch.inference_mode()
def loop(folder, model, out, begin):
    torch.set_num_threads(1)
    out.mkdir()
    vae = load_autoencoder(model)
    for number, (pixels, names) in enumerate(torch.utils.data.DataLoader(Photos(folder), BATCH, num_workers=1)):
        with autocast("cpu", "bf16"):
            latents = encode_latents(vae, to_tensor(pixels)).half().numpy()
        data = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(latents[0].nbytes), len(names), [None, pa.py_buffer(latents)]
        )
        pq.write_table(pa.table({"id": names, "moments": data}), out / f"{number:06d}.parquet", compression="none")
    return {}


class Latents:
    """An actor of plain Ray Data."""

    def __init__(self, model):
        torch.set_num_threads(1)
        self.vae = load_autoencoder(model)

    @torch.inference_mode()
    def __call__(self, batch):
        with autocast("cpu", "bf16"):
            latents = encode_latents(self.vae, to_tensor(batch["pixels"])).half().numpy()
        return {"id": batch["id"], "moments": latents}


def ray_data(folder, model, out, begin):
    # Or Ray leaves a token in the home folder.
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray.data

    ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR")  # as many as the job gives itself on 2
    rows = ray.data.read_binary_files(str(folder), include_paths=True)
    pixels = rows.map(
        lambda row: {"id": Path(row["path"]).name, "pixels": TRANSFORM(row["bytes"]).pixels},
        compute=ray.data.TaskPoolStrategy(size=1),
    )
    actor = ray.data.ActorPoolStrategy(size=1)  # of other resources than decoding: or Ray puts both into the actor
    latents = pixels.map_batches(Latents, fn_constructor_args=(model,), batch_size=BATCH, compute=actor, num_cpus=0.9)
    latents.write_parquet(str(out))
    return {}


if __name__ == "__main__":
    parser = common.arguments(__doc__, "data")
    parser.add_argument("system", choices=("decode", "encode", "job", "loop", "ray_data"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--begin", type=float, default=0.0, help="when decode and encode begin, by the clock")
    given = parser.parse_args()
    print("\n" + json.dumps(globals()[given.system](given.data, given.model, given.out, given.begin)))
