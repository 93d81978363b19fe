"""The statistics of the latents that train_vae measures at its end and writes into the model's config."""

import json

import numpy as np
import pytest
import ray.train.torch
import skimage.data
import torch
from PIL import Image

from litevae.any_autoencoder import load_autoencoder
from pipelines.data.open_source import open_source
from pipelines.runtime.cli import load
from pipelines.training import ranks, vae_statistics
from pipelines.training.config import TrainVAE
from pipelines.training.vae import VaeTask, build_model
from pipelines.training.vae_statistics import closing_lines, images, measured
from tests.setups import vae_setup

CPU = torch.device("cpu")
SMALL = [
    "model.encoder=S", "model.levels=[3]", "model.decoder.channels=[8, 8, 8, 8]", "model.decoder.layers=1",
    "loss.lpips.weight=0", "loss.adversarial.weight=0", "loop.precision=fp32", "ray.gpu=false",
    "tracking.enabled=false", "stages=[{resolution: 32, images: 8, batch_size: 4}]",
]  # fmt: skip
FIELDS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Nine photos of 32 px, and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    for n in range(9):
        Image.fromarray(skimage.data.astronaut()[40 * n : 40 * n + 32, 200:232]).save(folder / f"{n}.png")
    (folder / "5.broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def task(photos, monkeypatch):
    monkeypatch.setattr(ray.train.torch, "prepare_model", lambda model: model)

    def make(*more):
        config = configured(photos, *more)
        return VaeTask(config, vae_setup(open_source(config.data.train)), 0, 1, CPU)

    return make


def configured(photos, *more):
    return load(TrainVAE, None, [*SMALL, f"data.train.uri={photos}", *more])


def by_hand(model, photos):
    """Mean and standard deviation of each channel, from 2,000 draws of every photo's posterior."""
    pixels = np.stack([np.asarray(Image.open(photos / f"{n}.png")) for n in range(9)])
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(pixels).movedim(-1, 1).float() / 127.5 - 1).latent_dist
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([posterior.sample(generator) for _ in range(2000)]).double()
    return draws.mean(dim=(0, 1, 3, 4)), draws.std(dim=(0, 1, 3, 4), unbiased=False)


def test_statistics_are_those_of_draws(photos):
    config = configured(photos)
    model = build_model(config).train()
    found = measured(model, open_source(config.data.train), config)
    mean, std = by_hand(model, photos)
    torch.testing.assert_close(torch.tensor(found["latents_mean"]).double(), mean, rtol=0, atol=0.02 * float(std.min()))
    torch.testing.assert_close(torch.tensor(found["latents_std"]).double(), std, rtol=0.01, atol=0)
    alone = model.eval().encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean.std()
    assert std.min() > 2 * alone  # the posterior's own variance is most of it at the start
    assert found["shift_factor"] == pytest.approx(np.mean(found["latents_mean"]))
    overall = np.sqrt(np.mean(np.square(found["latents_std"])) + np.var(found["latents_mean"]))
    assert found["scaling_factor"] == pytest.approx(1 / overall)


def test_measuring_draws_nothing_and_leaves_the_mode(photos):
    config = configured(photos)
    model, source = build_model(config).train(), open_source(config.data.train)
    state = torch.get_rng_state()
    assert measured(model, source, config) == measured(model, source, config)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_ranks_share_the_images(photos, monkeypatch):
    config = configured(photos)
    model, source, kept = build_model(config), open_source(config.data.train), []
    whole = measured(model, source, config)
    monkeypatch.setattr(ranks, "gathered", lambda mine, world: kept.extend(mine) or mine)
    measured(model, source, config, rank=1, world=2)
    monkeypatch.setattr(ranks, "gathered", lambda mine, world: kept.extend(mine) or kept)
    both = measured(model, source, config, rank=0, world=2)
    assert sorted(count // 16 for count, _, _ in kept) == [4, 5]
    for name in FIELDS:
        assert both[name] == pytest.approx(whole[name], rel=1e-9)


def test_the_number_of_images_follows_the_training(photos):
    class Source:
        units = 1_000_000

    for trained, wanted in ((100, 64), (10_000, 200), (10**6, 2048)):
        assert images(Source, configured(photos, f"stages=[{{resolution: 32, images: {trained}}}]")) == wanted
    assert images(open_source(configured(photos).data.train), configured(photos)) == 10


def test_a_model_without_latents_has_no_statistics(photos, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    config = configured(photos, f"data.train.uri={tmp_path}")
    assert measured(build_model(config), open_source(config.data.train), config) == {}


def test_only_the_trained_model_gets_them_and_only_once(task, tmp_path, photos, monkeypatch):
    calls = []
    monkeypatch.setattr(vae_statistics, "measured", lambda *given: calls.append(given) or measured(*given))
    one = task()
    one.begin(0)
    for start, pixels in zip((0, 4), one.batches(0, 8, 4), strict=True):
        one.step(pixels, start)
        one.validate()
        one.exports()["model"](tmp_path / str(start))
    assert len(calls) == 1
    first, last = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("0", "4"))
    assert [first[name] for name in FIELDS] == [1.0, 0.0, None, None]
    model = load_autoencoder(tmp_path / "4")
    mean, std = by_hand(model, photos)
    torch.testing.assert_close(torch.tensor(last["latents_mean"]).double(), mean, rtol=0, atol=0.02 * float(std.min()))
    torch.testing.assert_close(torch.tensor(last["latents_std"]).double(), std, rtol=0.02, atol=0)
    (said,) = closing_lines(one.config, one.source, str(tmp_path / "4"))
    assert f"scaling_factor {last['scaling_factor']:.4g} " in said
    assert "over 10 training images" in said
    assert closing_lines(one.config, one.source, str(tmp_path / "0")) == []

    # A finished run that is started again exports once more, from the checkpoint's statistics.
    about = {"images": 8, "digest": one.digest}
    again = task()
    again.load(one.state() | about)
    again.exports()["model"](tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["latents_std"] == last["latents_std"]
    assert len(calls) == 1
    older = {key: value for key, value in one.state().items() if key != "statistics"}
    for state in (older | about, one.state() | about | {"digest": "of other data"}):
        task_of = task()
        task_of.load(state)
        task_of.exports()["model"](tmp_path / "measured")
        assert json.loads((tmp_path / "measured" / "config.json").read_text())["latents_std"] == last["latents_std"]
    assert len(calls) == 3


def test_statistics_of_the_weights_at_the_start_do_not_stay(photos, tmp_path):
    model = build_model(configured(photos))
    model.register_to_config(scaling_factor=0.5, shift_factor=1.0, latents_mean=[1.0] * 4, latents_std=[2.0] * 4)
    model.save_pretrained(tmp_path)
    found = build_model(configured(photos, f"model.init={tmp_path}"))
    assert [found.config[name] for name in FIELDS] == [1.0, 0.0, None, None]
