"""train_ldm in its three modes: what it is fed, what a step does, runs that go on bit for bit, and what it refuses."""

import json
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from litevae.autoencoder import LiteVAE
from litevae.cache import LatentCache
from litevae.denoiser import build_denoiser
from litevae.diffusion import random_numbers
from litevae.errors import UserError
from litevae.ldm import load_ldm
from pipelines.encoding import verify
from pipelines.encoding.config import Encode
from pipelines.encoding.encode import encode_dataset
from pipelines.encoding.plan import CachePlan
from pipelines.runtime.cli import load, main
from pipelines.training import checkpoint, images_look
from pipelines.training.config import TrainLDM
from pipelines.training.latent_feeds import OnlineFeed
from pipelines.training.ldm import LdmTask, train_ldm
from tests.encoding import encoded_crops
from tests.in_process import as_worker
from tests.killing import kill_driver
from tests.setups import ldm_setup

REPO = Path(__file__).resolve().parents[3]
WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = [
    "network=tiny", "batch_size=8", "images=32", "optim.lr=1e-3", "loop.precision=fp32", "loop.ema=0.9",
    "loop.log_every=2", "loop.checkpoint_every=16", "loop.val_every=0", "sample_images=2", "sample_steps=2",
    "data.resolution=64", "data.precision=fp32", "data.rows_per_shard=4", "data.loaders=1",
    "ray.gpu=false", "ray.cpus_per_worker=1", "tracking.enabled=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return encoded_crops(tmp_path_factory.mktemp("made"), rows_per_shard=10)


def configured(made, root, *more) -> TrainLDM:
    return load(TrainLDM, None, [*CONFIG, f"cache={made[0]}", f"root={root}", "name=run", *more])


def encoding(made, mode, *more):
    """Words of a config that encodes."""
    return [f"mode={mode}", f"vae={made[1]}", f"data.source.uri={made[2]}", *more]


@pytest.fixture
def task(made, tmp_path, monkeypatch, in_process):
    """The task as in worker `rank` of `world`, without Ray Train; of several, none waits for the others."""
    import ray.train.torch

    monkeypatch.setattr(ray.train.torch, "prepare_model", lambda model: model)

    def make(*more, rank=0, world=1):
        config = configured(made, tmp_path, *more)
        return LdmTask(config, ldm_setup(config), rank, world, torch.device("cpu"))

    return make


def fed(one, start, end, batch_size=8):
    """Latents and the batches they are of."""
    one.begin(0)
    return [(one.feed.latents(batch), batch) for batch in one.batches(start, end, batch_size)]


@pytest.fixture
def ranks(task, monkeypatch):
    """`fed` of two ranks, each in a thread; what they tell each other goes through memory."""

    def feed_both(words, start, end, batch_size=8):
        barrier, told, own = threading.Barrier(2, timeout=60), {}, threading.local()

        def gathered(mine, world):
            if world == 1:
                return mine
            told[own.rank] = mine
            barrier.wait()
            everything = [item for rank in range(world) for item in told[rank]]
            barrier.wait()
            return everything

        def run(rank):
            own.rank = rank
            try:
                return fed(ones[rank], start, end, batch_size)
            except Exception:
                barrier.abort()
                raise

        monkeypatch.setattr("pipelines.training.ranks.gathered", gathered)
        ones = [task(*words, rank=rank, world=2) for rank in (0, 1)]
        with ThreadPoolExecutor(2) as threads:
            results = [threads.submit(run, rank) for rank in (0, 1)]
        errors = [error for result in results if (error := result.exception())]
        if errors:  # the one that broke the barrier first
            raise min(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError))
        return [result.result() for result in results]

    return feed_both


# --- batches ------------------------------------------------------------------------------------------------------


def test_batches_are_normalised_draws_of_the_cache_in_a_global_order(task, made):
    cache = LatentCache(made[0])
    whole = [latents for latents, _ in fed(task(), 0, 48)]
    assert [tuple(batch.shape) for batch in whole] == [(8, 4, 8, 8)] * 6
    epochs = torch.cat(whole).chunk(2)
    means = cache.latents(range(24), 0, 0, draw="mean")
    for epoch in epochs:  # every row once an epoch, near its posterior's mean
        nearest = torch.cdist(epoch.flatten(1), means.flatten(1)).argmin(dim=1)
        assert sorted(nearest.tolist()) == list(range(24))
    assert not torch.equal(*(e[e.flatten(1).sum(1).argsort()] for e in epochs))  # drawn anew
    assert all(torch.equal(a, b) for a, (b, _) in zip(whole[3:], fed(task(), 24, 48), strict=True))
    mean = fed(task("draw=mean"), 0, 8)[0][0]
    assert torch.allclose(torch.cdist(mean.flatten(1), means.flatten(1)).amin(dim=1), torch.zeros(8), atol=1e-3)


@pytest.mark.parametrize("mode", ["cache", "online", "write-through"])
def test_ranks_make_up_the_global_batch_with_its_noise(task, ranks, made, tmp_path, mode):
    words = ["classes=2", "label_dropout=0.3"]
    if mode != "cache":
        words += encoding(made, mode, "data.flip=true" if mode == "online" else f"cache={tmp_path / 'filled'}")
    whole = fed(task(*words), 8, 24)
    halves = ranks(words, 8, 24)
    for (latents, batch), *parts in zip(whole, *halves, strict=True):
        together = torch.stack([part for part, _ in parts], dim=1).flatten(0, 1)
        torch.testing.assert_close(together, latents, rtol=0, atol=2e-5)
        for name in ("noise", "u", "labels"):
            assert torch.equal(
                torch.stack([getattr(part, name) for _, part in parts], dim=1).flatten(0, 1), getattr(batch, name)
            )
        assert set(batch.labels.tolist()) <= {0, 1, 1000}
        assert torch.equal(batch.noise[3], random_numbers(0, [batch.positions[3]], (4, 8, 8))[0][0])


def test_labels_are_the_rows_and_are_dropped_as_often_as_asked(task, made, monkeypatch):
    names = {row["id"]: row["label"] for n in range(24) if (row := LatentCache(made[0]).row(n))}
    assert set(names.values()) == {0, 1}
    labels = torch.cat([batch.labels for _, batch in fed(task("classes=2", "label_dropout=0"), 0, 24)])
    assert labels.bincount().tolist() == [12, 12]
    for _, batch in fed(task("classes=2", "label_dropout=0.25"), 0, 48):
        assert torch.equal(batch.labels == 1000, random_numbers(0, batch.positions, (1,))[2] < 0.25)
    assert all(batch.labels is None for _, batch in fed(task(), 0, 16))
    monkeypatch.setattr(images_look, "check_labels", lambda *given: None)  # the driver's look, which comes before
    with pytest.raises(UserError, match="holds 1; with classes=1 it may hold 0 to 0"):
        fed(task("classes=1"), 0, 24)


def test_online_gives_the_latents_of_the_cache(task, made):
    """Row by row: the same draws of the same moments but for fp16, and nearly the same statistics."""
    cache = LatentCache(made[0])
    rows = {cache.row(n)["id"]: n for n in range(len(cache))}
    one = task(*encoding(made, "online"))
    for latents, batch in fed(one, 0, 48):
        epochs, ids = zip(*batch.rows, strict=True)
        expected = cache.latents([rows[name] for name in ids], epochs, seed=0)
        torch.testing.assert_close(latents, expected, rtol=2e-3, atol=4e-3)
    torch.testing.assert_close(one.feed.mean, cache.mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one.feed.std, cache.std, rtol=1e-3, atol=1e-4)
    augmented = [latents for latents, _ in fed(task(*encoding(made, "online", "data.flip=true")), 0, 24)]
    assert not torch.allclose(torch.cat(augmented), torch.cat([latents for latents, _ in fed(one, 0, 24)]), atol=0.1)


def test_calibration_does_not_depend_on_the_number_of_workers(task, ranks, made, monkeypatch):
    monkeypatch.setattr("pipelines.training.latent_feeds.CHUNK", 3)
    seen = []
    original = OnlineFeed.encoded
    monkeypatch.setattr(
        OnlineFeed, "encoded", lambda self, pixels: seen.append((self, len(pixels))) or original(self, pixels)
    )
    words = encoding(made, "online", "data.calibrate=13")
    ranks(words, 0, 8)
    feeds = {id(feed): feed for feed, _ in seen}.values()
    assert sorted(size for _, size in seen) == [3] * 5  # 13 images in runs of 3
    alone = task(*words).feed
    alone.begin()
    for feed in feeds:
        assert torch.equal(feed.mean, alone.mean)
        assert torch.equal(feed.std, alone.std)


def test_unreadable_images_count_once_whoever_meets_them(ranks, made, tmp_path):
    photos = shutil.copytree(made[2], tmp_path / "photos")
    (photos / "a" / "00.png").write_bytes(b"no image")
    words = [f"vae={made[1]}", f"data.source.uri={photos}", "mode=online", "data.max_bad=0.05"]
    kept = []

    class Spy(OnlineFeed):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            kept.append(self)

        def batches(self, *arguments):
            yield from super().batches(*arguments)
            assert self.bad() == 1
            self.check(self.bad())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.training.ldm.OnlineFeed", Spy)
        ranks(words, 0, 96)
    assert [len(feed._images.bad) for feed in kept] == [1, 1]  # both have met it


# --- write-through ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_process")
def test_the_first_epoch_fills_the_cache_that_the_encode_job_would(task, made, tmp_path):
    filled = tmp_path / "filled"
    one = task(*encoding(made, "write-through", f"cache={filled}"))
    seen = fed(one, 0, 72)
    reference = encode_dataset(
        load(Encode, None, [f"source.uri={made[2]}", f"model={made[1]}", f"out={tmp_path / 'reference'}",
             "transform.resolution=64", "precision=fp32", "rows_per_shard=4", f"root={tmp_path}", "error_budget=0.01",
             "ray.gpu=false", "ray.cpus_per_worker=1", "tracking.enabled=false"])
    )  # fmt: skip
    cache, other = LatentCache(filled), LatentCache(tmp_path / "reference")
    assert [s["sha256"] for s in cache.manifest["shards"]] == [s["sha256"] for s in other.manifest["shards"]]
    assert cache.manifest["digest"] == reference["digest"]
    assert cache.manifest["run"]["job"] == "train_ldm"
    assert verify.audit(str(filled)).problems == {}

    means = cache.normalize(cache.moments(range(24)).float().chunk(2, dim=1)[0])
    for epoch in torch.cat([latents for latents, _ in seen]).chunk(3):
        nearest = torch.cdist(epoch.flatten(1), means.flatten(1)).argmin(dim=1)
        assert sorted(nearest.tolist()) == list(range(24))
    epochs = [e[torch.cdist(e.flatten(1), means.flatten(1)).argmin(dim=1).argsort()] for e in
              torch.cat([latents for latents, _ in seen]).chunk(3)]  # fmt: skip
    for a, b in ((0, 1), (1, 2), (0, 2)):  # drawn anew also where the cache takes over
        assert (epochs[a] - epochs[b]).abs().mean() > 1e-3


def test_images_are_decoded_as_the_config_says(task, made, tmp_path):
    online = task(*encoding(made, "online", "data.decode=scaled"))
    assert online.feed._images._transform.decode == "scaled"
    task(*encoding(made, "write-through", f"cache={tmp_path}/filled", "data.decode=pillow"))
    assert CachePlan.read(str(tmp_path / "filled")).views.decode == "pillow"


@pytest.mark.usefixtures("in_process")
def test_write_through_takes_up_what_is_there_and_leaves_what_an_encode_job_can_finish(
    task, made, tmp_path, monkeypatch
):
    filled = tmp_path / "filled"
    words = encoding(made, "write-through", f"cache={filled}")
    whole = fed(task(*words), 0, 24)
    dates = {path: path.stat().st_mtime_ns for path in (filled / "shards").iterdir()}
    again = fed(task(*words), 0, 24)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(whole, again, strict=True))
    assert {path: path.stat().st_mtime_ns for path in (filled / "shards").iterdir()} == dates

    half = tmp_path / "half"
    monkeypatch.setattr("pipelines.training.write_through.WINDOW", 1)
    fed(task(*encoding(made, "write-through", f"cache={half}"), "images=8"), 0, 8)
    with pytest.raises(UserError, match="unfinished"):
        LatentCache(half)
    commits = len(list((half / "commits").iterdir()))
    assert 0 < commits < 6
    words = [f"source.uri={made[2]}", f"model={made[1]}", f"out={half}", "transform.resolution=64", "precision=fp32"]
    more = ["rows_per_shard=4", f"root={tmp_path}", "ray.gpu=false", "ray.cpus_per_worker=1", "tracking.enabled=false"]
    assert encode_dataset(load(Encode, None, [*words, *more]))["encoded_now"] == 24 - 4 * commits
    assert verify.audit(str(half)).problems == {}


@pytest.mark.parametrize(
    "window", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(8, marks=pytest.mark.slow)]
)
def test_the_first_epoch_ends_anywhere_for_any_number_of_workers(task, ranks, made, tmp_path, monkeypatch, window):
    """24 images in batches of 10: the third batch reaches into the second epoch's windows."""
    monkeypatch.setattr("pipelines.training.write_through.WINDOW", window)
    words = encoding(made, "write-through", "draw=mean")
    whole = fed(task(*words, f"cache={tmp_path / 'one'}"), 0, 70, 10)
    halves = ranks([*words, f"cache={tmp_path / 'two'}"], 0, 70, 10)
    assert LatentCache(tmp_path / "one").manifest["digest"] == LatentCache(tmp_path / "two").manifest["digest"]
    for (latents, _), *parts in zip(whole, *halves, strict=True):
        together = torch.stack([part for part, _ in parts], dim=1).flatten(0, 1)
        torch.testing.assert_close(together, latents, rtol=0, atol=1e-6)
    later = fed(task(*words, f"cache={tmp_path / 'one'}"), 20, 70, 10)  # with everything there
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(whole[2:], later, strict=True))


def test_an_epoch_to_the_last_image_completes_the_cache(task, made, tmp_path):
    fed(task(*encoding(made, "write-through", f"cache={tmp_path / 'filled'}")), 0, 24, 10)
    assert len(LatentCache(tmp_path / "filled")) == 24


@pytest.mark.usefixtures("in_process")
def test_what_is_appended_to_the_cache_is_not_for_a_run_that_goes_on(task, made, tmp_path):
    photos = shutil.copytree(made[2], tmp_path / "photos")
    filled = tmp_path / "filled"
    words = [f"vae={made[1]}", f"data.source.uri={photos}", "mode=write-through", f"cache={filled}"]
    one = task(*words)
    whole = fed(one, 0, 48)
    shutil.copy(photos / "a" / "00.png", photos / "a" / "99.png")
    more = ["transform.resolution=64", "precision=fp32", "rows_per_shard=4", f"root={tmp_path}", "append=true"]
    common = ["ray.gpu=false", "ray.cpus_per_worker=1", "tracking.enabled=false"]
    encode_dataset(load(Encode, None, [f"source.uri={photos}", f"model={made[1]}", f"out={filled}", *more, *common]))
    assert len(LatentCache(filled)) == 25
    for start, state in ((8, one.feed.state() | {"version": None}), (24, one.feed.state())):
        again = task(*words)
        assert again.digest == one.digest
        again.feed.load(state)
        for (a, _), (b, _) in zip(whole[start // 8 : 3 if start == 8 else 6], fed(again, start, 48), strict=False):
            assert torch.equal(a, b)


def test_an_image_in_quarantine_is_stood_in_for(task, made, tmp_path):
    photos = shutil.copytree(made[2], tmp_path / "photos")
    (photos / "a" / "00.png").write_bytes(b"no image")
    words = [f"vae={made[1]}", f"data.source.uri={photos}", "mode=write-through", f"cache={tmp_path / 'filled'}"]
    seen = fed(task(*words, "data.max_bad=0.05"), 0, 50, 10)  # also where an epoch's windows come into the next one
    assert [len(latents) for latents, _ in seen] == [10] * 5
    cache = LatentCache(tmp_path / "filled")
    assert cache.manifest["counts"]["reasons"] == {"not_an_image": 1}
    shutil.rmtree(tmp_path / "filled")
    with pytest.raises(UserError, match=r"1 not_an_image.*data.max_bad=0 "):
        fed(task(*words, "data.max_bad=0"), 0, 48)


# --- a step -------------------------------------------------------------------------------------------------------


def test_a_step_is_adam_on_the_mean_squared_error_of_the_noise(task):
    one = task("loop.ema=0")
    ((z, batch),) = fed(one, 0, 8)
    torch.manual_seed(0)
    reference = build_denoiser("tiny", 4, 8)
    assert all(torch.equal(a, b) for a, b in zip(one.network.parameters(), reference.parameters(), strict=True))
    value = one.step(batch, 0)["loss"]

    noise, u, _ = random_numbers(0, range(8), z.shape[1:])
    t = (u * 1000).long()
    schedule = DDPMScheduler(1000, 0.0015, 0.0195, "scaled_linear")
    loss = (reference(schedule.add_noise(z, noise, t), t).sample - noise).square().mean()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01)
    loss.backward()
    optimizer.step()
    assert torch.allclose(value, loss, rtol=1e-5)
    for a, b in zip(one.network.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "words",
    [
        ["objective.prediction=v", "objective.weighting=min-snr", "objective.schedule=cosine"],
        ["objective.prediction=v", "objective.zero_snr=true", "classes=2"],
        ["objective.weighting=min-snr", "checkpointing=true"],
        ["objective.prediction=flow", "objective.times=logit-normal", "classes=2", "network=dit-s/2"],
    ],
)
def test_micro_batches_change_nothing_but_rounding(task, words):
    """Gradients: Adam's first step is the same for any multiple of them."""
    steps = []
    for more in ([], ["optim.accumulate=4"]):
        one, found = task(*words, "loop.ema=0", *more), {}
        for name, p in one.network.named_parameters():
            p.register_post_accumulate_grad_hook(lambda p, name=name, found=found: found.update({name: p.grad.clone()}))
        ((_, batch),) = fed(one, 0, 8)
        values = one.step(batch, 0)
        assert values["skipped_steps"] == 0
        steps.append((found, values))
    (whole, values), (parts, others) = steps
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        assert (gradient - parts[name]).norm() <= 1e-3 * gradient.norm() + 1e-6, name
    assert float(values["loss"]) == pytest.approx(float(others["loss"]), rel=1e-4)


def test_losses_of_noise_levels_make_up_the_loss(task):
    one = task("batch_size=24")
    ((_, batch),) = fed(one, 0, 24, 24)
    values = one.step(batch, 0)
    counts = (batch.u * 4).long().bincount(minlength=4)
    levels = [values[f"loss_at_noise_{n / 4:.2f}-{(n + 1) / 4:.2f}"] for n in range(4)]
    total = sum(count * level for count, level in zip(counts, levels, strict=True) if count) / 24
    assert total.item() == pytest.approx(values["loss"].item(), rel=1e-4)


@pytest.mark.slow
def test_it_learns(task):
    one = task()
    one.begin(0)
    losses = [float(one.step(batch, 8 * n)["loss"]) for n, batch in enumerate(one.batches(0, 480, 8))]
    assert np.mean(losses[-15:]) < 0.8 * np.mean(losses[:5])


def test_a_poisoned_batch_is_skipped_and_many_of_them_stop_the_run(made, tmp_path, monkeypatch, capsys):
    from pipelines.training import loop

    poison, folder = {16}, tmp_path / "run"
    original = LdmTask.with_noise

    def poisoned(self, batch):
        batch = original(self, batch)
        if batch.positions[0] in poison:
            batch.noise[0] = float("nan")
        return batch

    monkeypatch.setattr(LdmTask, "with_noise", poisoned)
    config = configured(made, tmp_path, "images=64", "loop.max_skipped=3", "loop.checkpoint_every=24")
    setup = ldm_setup(config, folder)

    def run():
        folder.mkdir()
        with as_worker():
            task = LdmTask(config, setup, 0, 1, torch.device("cpu"))
            return loop.run(task, "ldm", config, setup, 0, 1)

    def saved():
        return sorted(int(path.name[11:]) for path in folder.glob("checkpoint-*"))

    assert np.isfinite(run()["loss"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/skipped_steps"] for line in lines] == [0, 1, 0, 0, 0]  # steps 1-2, 3 (saved), 4, 5-6, 7-8
    assert ["train/loss" in line for line in lines] == [True, False, True, True, True]
    assert saved() == [24, 48, 64]

    poison.update(range(32, 64))
    shutil.rmtree(folder)
    with pytest.raises(
        UserError,
        match=r"4 steps in a row, up to 64 images.*checkpoint at 48 is kept.*run the same command again: it continues",
    ):
        run()
    assert saved() == [24, 48]


def test_a_model_has_the_caches_mean_and_deviation_and_names_it(task, made, tmp_path):
    task().exports()["model"](tmp_path / "model")
    ldm, cache = load_ldm(tmp_path / "model"), LatentCache(made[0])
    assert torch.equal(ldm.vae.mean.flatten(), cache.mean)
    assert torch.equal(ldm.vae.std.flatten(), cache.std)
    assert ldm.info["data"] == cache.manifest["digest"]


# --- whole runs ---------------------------------------------------------------------------------------------------


@pytest.mark.chaos
def test_a_run_that_is_killed_ends_like_one_that_was_not(made, tmp_path, capsys):
    """The driver, by SIGKILL in the middle of an epoch, with two workers. Of write-through, whose first epoch encodes
    and whose later ones read a cache."""

    def words(root, *more):
        mode = encoding(made, "write-through", f"cache={tmp_path / root / 'filled'}")
        run = [*CONFIG, *mode, f"root={tmp_path / root}", "name=run", "images=160", "classes=2", "more_ema=[0.1]"]
        return [*run, "loop.checkpoint_every=20", "ray.workers=2", "tracking.enabled=true", *more]

    whole = train_ldm(load(TrainLDM, None, words("whole", "loop.checkpoint_every=80")))
    folder, log = tmp_path / "killed" / "run", tmp_path / "log"
    with log.open("w") as file:
        driver = subprocess.Popen(
            [sys.executable, str(REPO / "jobs" / "train_ldm.py"), *words("killed")], stdout=file, stderr=file
        )
    end = time.monotonic() + 240
    while not [*folder.glob("checkpoint-*")]:
        assert time.monotonic() < end, log.read_text()
        assert driver.poll() is None, log.read_text()
        time.sleep(0.05)
    kill_driver(driver)
    assert not (folder / "checkpoint-000000000160").exists(), "it had ended before it was killed"
    capsys.readouterr()
    killed = train_ldm(load(TrainLDM, None, words("killed")))
    assert "continues after" in capsys.readouterr().out
    assert whole["images"] == killed["images"] == 160
    states = [checkpoint.load(tmp_path / root / "run" / "checkpoint-000000000160") for root in ("whole", "killed")]
    for part in ("network", "averages"):
        torch.testing.assert_close(*(state[part] for state in states), rtol=0, atol=0)
    for name in ("model", "model-ema-0.1"):
        a, b = (tmp_path / root / "run" / name / "transformer" / WEIGHTS for root in ("whole", "killed"))
        assert a.read_bytes() == b.read_bytes()
    plain, more_ema = (folder / name / "transformer" / WEIGHTS for name in ("model", "model-ema-0.1"))
    assert plain.read_bytes() != more_ema.read_bytes()

    ldm, cache = load_ldm(folder / "model"), LatentCache(tmp_path / "killed" / "filled")
    torch.testing.assert_close(ldm.vae.mean.flatten(), cache.mean)  # calibrated on all, and summed in another order
    torch.testing.assert_close(ldm.vae.std.flatten(), cache.std)
    assert ldm.classes == 2
    assert ldm.sample([0, 1], steps=2, labels=[0, 1], guidance=2.0).shape == (2, 3, 64, 64)
    (run,) = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'whole' / 'mlflow.db'}").search_runs(["1"])
    assert [item.dataset.digest for item in run.inputs.dataset_inputs] == [ldm.info["data"][:36]]
    logged = {"loss", "gradient_norm", "skipped_steps", "images_per_second", "waiting_for_data"}
    assert {f"train/{name}" for name in logged} <= run.data.metrics.keys()
    assert run.data.metrics.keys() & {f"train/loss_at_noise_{n / 4:.2f}-{(n + 1) / 4:.2f}" for n in range(4)}

    for wrong, message in (["images=16"], "was 160, and is 16"), (["seed=4"], "seed: was 0, is 4"):
        assert main(TrainLDM, train_ldm, words("killed", *wrong)) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_what_one_worker_alone_finds_ends_the_run_with_its_message(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(images_look, "check_labels", lambda *given: None)  # the driver would find it before
    cache = shutil.copytree(made[0], tmp_path / "cache")
    words = [*CONFIG, f"cache={cache}", f"root={tmp_path / 'runs'}", "classes=1", "batch_size=2", "ray.workers=2"]
    assert main(TrainLDM, train_ldm, [*words, "name=run"]) == 2
    assert "column 'label' holds 1; with classes=1 it may hold 0 to 0" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "run").exists()  # it made nothing, and so it leaves nothing


@pytest.mark.slow
def test_compiled_and_recomputed_a_step_is_the_same(task, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # kernels for CPUs take minutes
    plain, compiled = task("loop.ema=0"), task("loop.ema=0", "loop.compile=true", "checkpointing=true")
    for one in (plain, compiled):
        one.begin(0)
        for n, batch in enumerate(one.batches(0, 16, 8)):
            one.step(batch, 8 * n)
    for a, b in zip(plain.network.parameters(), compiled.network.parameters(), strict=True):
        assert (a - b).abs().mean() < 1e-5


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["cache="], "cache is empty"),
        (["cache=/nowhere"], "/nowhere"),
        (["batch_size=64"], "larger than the data: 24 images"),
        (["vae={other}"], "is not the autoencoder that encoded"),
        (["vae=/nowhere"], "vae=/nowhere does not exist; models are folders on disk"),
        (["network=huge"], "network"),
        (["more_ema=[0.5, 0.9]"], "must not repeat a decay, nor that of loop.ema=0.9"),
        (["classes=2", "label=kind"], "has no column 'kind' for classes=2"),
        (["classes=2", "label=id"], "classes are integers"),
        (["objective.zero_snr=true"], "zero_snr needs prediction=v"),
        (["mode=online"], "data.source"),
        (["mode=online", "data.source.uri={photos}"], "vae is empty; mode=online needs an autoencoder"),
        (["mode=online", "data.source.uri={photos}", "vae={other}", "data.resolution=24"], "multiple of 2"),
        (["mode=write-through", "data.source.uri={photos}", "vae={vae}", "data.flip=true"], "one row an image"),
        (["mode=write-through", "data.source.uri={photos}", "vae={vae}", "cache="], "write-through fills: cache="),
        (["mode=write-through", "data.source.uri={photos}", "vae={other}"], "holds another cache"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(made, tmp_path, capsys, more, message):
    other = tmp_path / "other"
    LiteVAE("S", block_out_channels=(8, 8, 8, 8), layers_per_block=1).save_pretrained(other)
    places = {"{other}": other, "{vae}": made[1], "{photos}": made[2]}
    for place, path in places.items():
        more = [word.replace(place, str(path)) for word in more]
    assert main(TrainLDM, train_ldm, [*CONFIG, f"cache={made[0]}", f"root={tmp_path / 'runs'}", *more]) == 2
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
