"""The library works with the oldest versions that pyproject.toml accepts, as far as pip can bring them within seconds.

PyTorch, NumPy and Ray are those of the tests' environment: other versions of them are gigabytes.
"""

import os
import re
import subprocess
import sys
import tomllib

import pytest

from tests.commands import REPO

pytestmark = pytest.mark.slow

OLDEST = ("diffusers", "accelerate", "safetensors", "pyarrow", "pillow", "pydantic")
# What the oldest ones need of other versions than the tests' environment has.
WITH_THEM = ("huggingface-hub==0.34.0", "httpx==0.27.0", "httpcore==1.0.5", "pydantic-core==2.14.1")

USE = """
import sys

sys.modules["transformers"] = sys.modules["peft"] = None  # those of the tests need a newer huggingface-hub
import tempfile
from importlib.metadata import version
from pathlib import Path
import numpy as np, pyarrow as pa, torch
from PIL import Image
import litevae
from diffusers import AutoencoderKL
from litevae.cache import LatentCache, write_manifest, write_plan
from litevae.commits import commit_shard
from litevae.denoiser import build_denoiser
from litevae.diffusion import Objective
from litevae.images import ImageTransform, to_tensor
from litevae.ldm import LDM, NormalizedAutoencoder, save_ldm
from litevae.model_card import write_card
from litevae.loader import LatentLoader
from litevae.shards import QUARANTINE, latent_layout, row_schema, to_stored

folder = tempfile.mkdtemp()
size = {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1}
model = litevae.LiteVAE(size="S", **size).eval()
model.save_pretrained(f"{folder}/vae")
write_card(f"{folder}/vae", model)
again = litevae.load_autoencoder(f"{folder}/vae")
Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(f"{folder}/a.jpg")
pixels = ImageTransform(32)(Path(f"{folder}/a.jpg").read_bytes()).pixels
x = to_tensor(pixels[None])
with torch.no_grad():
    moments = model.encode(x).latent_dist.parameters
    assert torch.equal(moments, again.encode(x).latent_dist.parameters)
    assert again.decode(moments[:, :4]).sample.shape == x.shape
AutoencoderKL(norm_num_groups=4, block_out_channels=(8,), latent_channels=4).save_pretrained(f"{folder}/kl")
assert isinstance(litevae.load_autoencoder(f"{folder}/kl"), AutoencoderKL)

how = latent_layout("moments", "float16")
plan = {"model": {"path": "m", "fingerprint": "f"}, "transform": {"resolution": 32}, "latents": how, "settings": {}}
values = moments.repeat(8, 1, 1, 1).numpy() + np.random.default_rng(1).normal(0, 1, (8, 8, 4, 4))
rows = {name: [0] * 8 for name in ("view", "height", "width", "crop_top", "crop_left")}
rows |= {"id": [f"{n}" for n in range(8)], "unit": [*range(8)], "flip": [False] * 8, "label": [*range(8)]}
schema = row_schema(pa.schema([("label", pa.int64())]))
table = pa.table({name: rows[name] for name in schema.names}, schema=schema)
write_plan(f"{folder}/cache", plan)
commit_shard(f"{folder}/cache", 0, (0, 8), how, table, [to_stored(values, "float16")], QUARANTINE.empty_table())
write_manifest(f"{folder}/cache", plan, {"uri": "p", "digest": "d", "units": 8, "shards": 1}, {})
cache = LatentCache(f"{folder}/cache")
batches = [batch["label"] for batch in LatentLoader(cache, 4, columns=["label"], epochs=1)]
assert sorted(label for batch in batches for label in batch) == [*range(8)]

network = build_denoiser("tiny", 4, 4)
objective = Objective("v", zero_snr=True)
z = cache.latents(range(4), 0, 0)
objective.loss(network, z, torch.randn_like(z), torch.rand(4)).weighted.sum().backward()
ldm = LDM(network.eval(), objective.scheduler(), NormalizedAutoencoder.of(model, cache.mean, cache.std))
save_ldm(f"{folder}/ldm", ldm)
assert litevae.load_ldm(f"{folder}/ldm").shape == (4, 4, 4)
print(*(f"{name}=={version(name)}" for name in sys.argv[1:]))
"""


def oldest(name: str) -> str:
    """The lower limit of a dependency in pyproject.toml, as `name==version`."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    every = [*project["dependencies"], *project["optional-dependencies"]["jobs"]]
    (limit,) = (found[1] for line in every if (found := re.match(rf"{name}>=([\d.]+)", line)))
    return f"{name}=={limit}" + ".0" * (2 - limit.count("."))


def test_the_library_works_with_the_oldest_versions(tmp_path):
    wanted = [oldest(name) for name in OLDEST]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run(
        [*pip, "--target", tmp_path, *wanted, *WITH_THEM], capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        pytest.skip(f"pip can't install them: {done.stderr.strip().splitlines()[-1]}")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPO)])}
    for words in (
        [sys.executable, "-c", USE, *OLDEST],
        [sys.executable, "-m", "litevae", "train-vae", "--print-config"],
    ):
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        if USE in words:
            assert done.stdout.split() == wanted
