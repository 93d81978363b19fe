"""train_ldm on a real cache: it learns, goes on bit for bit, exports what `sample` takes, and refuses what is wrong."""

import json
import shutil

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from litevae.autoencoder import LiteVAE
from litevae.cache import LatentCache
from litevae.diffusion import build_unet, load_ldm, noise_schedule
from pipelines.config import Encode, TrainLDM, load, main, validate
from pipelines.encode import encode_dataset
from pipelines.train_ldm import Diffusion, train_ldm

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = [
    "unet=tiny", "batch_size=8", "images=32", "optim.lr=1e-3", "loop.precision=fp32", "loop.ema=0.9",
    "loop.log_every=2", "loop.checkpoint_every=16", "loop.val_every=0", "sample_images=2", "sample_steps=2",
    "ray.gpu=false", "ray.cpus_per_worker=1", "tracking.enabled=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(cache, model folder): 24 photos, encoded."""
    root = tmp_path_factory.mktemp("made")
    (root / "photos").mkdir()
    coffee = skimage.data.coffee()
    for n in range(24):
        Image.fromarray(coffee[10 * n : 10 * n + 64, 20 * n : 20 * n + 64]).save(root / "photos" / f"{n:02}.png")
    torch.manual_seed(0)
    LiteVAE("S", block_out_channels=(8, 8, 8, 8), layers_per_block=1).save_pretrained(root / "vae")
    values = {
        "source": {"uri": str(root / "photos")}, "model": str(root / "vae"), "out": str(root / "cache"),
        "root": str(root), "transform": {"resolution": 64}, "precision": "fp32", "rows_per_shard": 10,
        "ray": {"gpu": False, "cpus_per_worker": 1}, "tracking": {"enabled": False},
    }  # fmt: skip
    encode_dataset(validate(Encode, values))
    return root / "cache", root / "vae"


def configured(made, root, *more) -> TrainLDM:
    return load(TrainLDM, None, [*CONFIG, f"cache={made[0]}", f"root={root}", "name=run", *more])


@pytest.fixture
def task(made, tmp_path, monkeypatch):
    """The task as in worker `rank` of `world`, without Ray."""
    import ray.train.torch

    monkeypatch.setattr(ray.train.torch, "prepare_model", lambda model: model)

    def make(*more, rank=0, world=1):
        config = configured(made, tmp_path, *more)
        setup = {"cache": str(made[0]), "vae": str(made[1])}
        return Diffusion(config, setup, rank, world, torch.device("cpu"))

    return make


def test_batches_are_normalised_draws_of_the_cache_in_a_global_order(task, made):
    cache = LatentCache(made[0])
    whole = list(task().batches(0, 48, 8))
    assert [tuple(batch.shape) for batch in whole] == [(8, 4, 8, 8)] * 6
    epochs = torch.cat(whole).chunk(2)
    means = cache.latents(range(24), 0, 0, draw="mean")
    for epoch in epochs:  # every row once an epoch, near its posterior's mean
        nearest = torch.cdist(epoch.flatten(1), means.flatten(1)).argmin(dim=1)
        assert sorted(nearest.tolist()) == list(range(24))
    assert not torch.equal(*(e[e.flatten(1).sum(1).argsort()] for e in epochs))  # drawn anew
    ranks = [list(task(rank=r, world=2).batches(0, 48, 8)) for r in (0, 1)]
    for batch, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        assert torch.equal(batch, torch.stack(parts, dim=1).flatten(0, 1))
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], task().batches(24, 48, 8), strict=True))
    assert torch.equal(next(task("draw=mean").batches(0, 8, 8))[:1], next(task("draw=mean").batches(0, 8, 8))[:1])


def test_a_step_is_adam_on_the_mean_squared_error_of_the_noise(task):
    from pipelines.training import seed_for

    one = task("loop.ema=0")
    z = next(one.batches(0, 8, 8))
    torch.manual_seed(0)
    reference = build_unet("tiny", 4, 8)
    assert all(torch.equal(a, b) for a, b in zip(one.unet.parameters(), reference.parameters(), strict=True))
    value = one.step(z, 0)["loss"]

    generator = torch.Generator().manual_seed(seed_for(0, 0, 0, 1))
    t = torch.randint(1000, (8,), generator=generator)
    noise = torch.randn(z.shape, generator=generator)
    a = noise_schedule().alphas_cumprod[t].view(-1, 1, 1, 1)
    loss = (reference(a.sqrt() * z + (1 - a).sqrt() * noise, t).sample - noise).square().mean()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01)
    loss.backward()
    optimizer.step()
    assert torch.allclose(value, loss, rtol=1e-5)
    for a, b in zip(one.unet.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_it_learns(task):
    one = task()
    losses = [float(one.step(batch, 8 * n)["loss"]) for n, batch in enumerate(one.batches(0, 480, 8))]
    assert np.mean(losses[-15:]) < 0.8 * np.mean(losses[:5])


def test_a_run_that_goes_on_ends_like_one_that_was_not_interrupted(made, tmp_path, capsys):
    whole = train_ldm(configured(made, tmp_path / "whole"))
    train_ldm(configured(made, tmp_path / "parts", "images=16"))
    parts = train_ldm(configured(made, tmp_path / "parts"))
    assert whole["images"] == parts["images"] == 32
    a, b = (tmp_path / part / "run" / "model" / "unet" / WEIGHTS for part in ("whole", "parts"))
    assert a.read_bytes() == b.read_bytes()

    ldm = load_ldm(tmp_path / "whole" / "run" / "model")
    cache = LatentCache(made[0])
    assert torch.equal(ldm.latent_mean, cache.mean)
    assert torch.equal(ldm.latent_std, cache.std)
    assert ldm.info["cache_digest"] == cache.manifest["digest"]
    assert ldm.sample([0, 1], steps=2).shape == (2, 3, 64, 64)

    root = tmp_path / "parts"
    for more, message in (["images=16"], "was 32, and is 16"), (["seed=4"], "seed: was 0, is 4"):
        words = [*CONFIG, f"cache={made[0]}", f"root={root}", "name=run", *more]
        assert main(TrainLDM, train_ldm, words) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["cache="], "cache is empty"),
        (["cache=/nowhere"], "/nowhere"),
        (["batch_size=64"], "larger than the data: 24 images"),
        (["vae={other}"], "is not the autoencoder that encoded"),
        (["vae=/nowhere"], "is not there; say where it is now with vae=FOLDER"),
        (["unet=huge"], "unet"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(made, tmp_path, capsys, more, message):
    other = tmp_path / "other"
    LiteVAE("S", block_out_channels=(8, 8, 8, 8), layers_per_block=1).save_pretrained(other)
    words = [
        *CONFIG,
        f"cache={made[0]}",
        f"root={tmp_path / 'runs'}",
        *(w.replace("{other}", str(other)) for w in more),
    ]
    assert main(TrainLDM, train_ldm, words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert not (tmp_path / "runs").exists()


def test_a_cache_of_several_shapes_is_refused(made, tmp_path, capsys):
    buckets = shutil.copytree(made[0], tmp_path / "cache")
    manifest = json.loads((buckets / "manifest.json").read_text())
    manifest["latents"]["shape"] = None
    manifest["shards"][0]["shapes"] = [[4, 8, 8, 8], [6, 8, 4, 16]]
    (buckets / "manifest.json").write_text(json.dumps(manifest))
    assert main(TrainLDM, train_ldm, [*CONFIG, f"cache={buckets}", f"root={tmp_path / 'runs'}"]) == 2
    assert "latents of 2 shapes" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_an_unfinished_cache_is_refused(made, tmp_path, capsys):
    unfinished = tmp_path / "cache"
    shutil.copytree(made[0], unfinished)
    manifest = json.loads((unfinished / "manifest.json").read_text())
    assert manifest["model"]["path"] == str(made[1])
    (unfinished / "manifest.json").unlink()
    assert main(TrainLDM, train_ldm, [*CONFIG, f"cache={unfinished}", f"root={tmp_path / 'runs'}"]) == 2
    assert "unfinished" in capsys.readouterr().err
