"""The time of a training that is said before it starts: by a clock that moves with each step."""

from types import SimpleNamespace

import pytest
import torch

from litevae.errors import UserError
from pipelines.runtime.cli import load
from pipelines.runtime.cluster import Placement
from pipelines.training import forecast, vae
from pipelines.training.config import TrainLDM, TrainVAE
from pipelines.training.forecast import step_time
from pipelines.training.worker_setup import LatentData

CPUS = Placement(workers=1, gpu=False, threads=3)


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0, waited=0.0)
    times = {"perf_counter": lambda: clock.now + clock.waited, "process_time": lambda: 2 * clock.now}  # two threads
    monkeypatch.setattr(forecast, "time", SimpleNamespace(**times))
    return clock


def taking(clock, seconds):
    """Return a step that takes `seconds(images)`, and the list of its numbers of images."""
    asked = []

    def step(images, seen=0):
        asked.append(images)
        clock.now += seconds(images)

    return step, asked


def test_a_step_has_a_fixed_part_and_one_of_each_image(clock):
    step, asked = taking(clock, lambda images: 0.02 + 0.03 * images + 0.5 * (not asked))
    found = step_time(step, 16)
    assert asked == [1, 1, 16, 16]  # the first is slow, and one after another may be
    assert found == pytest.approx((0.02, 0.03))
    assert found.of(16) == pytest.approx(0.5)
    assert found.of(4, scale=4.0) == pytest.approx(0.5)


def test_waiting_for_other_processes_counts_at_most_as_much_as_all_threads_compute(clock):
    def step(images):
        clock.now += 0.1 + 0.1 * images
        clock.waited += 100

    assert step_time(step, 2) == pytest.approx((0.2, 0.2))


def test_no_more_images_than_there_is_time_for(clock):
    step, asked = taking(clock, lambda images: 0.9 * images)
    assert step_time(step, 16) == pytest.approx((0.0, 0.9))
    assert asked == [1, 1, 3]
    step, asked = taking(clock, lambda images: 2.0 + images)
    assert step_time(step, 16) == pytest.approx((2.0, 1.0))  # on a busy machine small steps are slow, too
    assert asked == [1, 1, 2]
    step, asked = taking(clock, lambda images: 4.0 * images)
    assert step_time(step, 1) == pytest.approx((0.0, 4.0))
    assert asked == [1, 1]
    step, asked = taking(clock, lambda images: 40.0)
    assert step_time(step, 16) == pytest.approx((0.0, 40.0))
    assert asked == [1]


def test_a_step_that_does_not_grow_has_no_part_of_an_image(clock):
    seconds = iter([0.2, 0.2, 0.1, 0.15])
    step, _ = taking(clock, lambda images: next(seconds))
    assert step_time(step, 4) == pytest.approx((0.1, 0.0))


STAGES = (
    "stages=[{resolution: 128, images: 1000, batch_size: 10}, {resolution: 256, images: 400, batch_size: 20}]",
    "loss.adversarial.start=1200", "optim.accumulate=2", "loop.compile=true",
)  # fmt: skip


@pytest.mark.parametrize(
    ("words", "begun", "workers", "expected"),
    [
        # 64 px take 0.01 s an image and 0.05 s a step, so 128 px 0.04 s an image, 256 px 0.16 s
        (["loss.adversarial.weight=0"], 0, 1, 100 * (0.05 + 10 * 0.04) + 20 * (0.05 + 20 * 0.16)),
        (["loss.adversarial.weight=0"], 500, 1, 50 * (0.05 + 10 * 0.04) + 20 * (0.05 + 20 * 0.16)),
        (["loss.adversarial.weight=0"], 1200, 2, 10 * (0.05 + 10 * 0.16)),
        # with the discriminator twice as long, from image 1,200 on
        ([], 0, 1, 100 * (0.05 + 10 * 0.04) + 10 * (0.05 + 20 * 0.16) * (1 + 2)),
        ([], 1300, 1, 5 * (0.05 + 20 * 0.16) * 2),
        ([], 1400, 1, 0),
    ],
    ids=["whole", "resumed", "two workers", "adversarial", "adversarial, resumed", "done"],
)
def test_the_stages_of_an_autoencoder(clock, words, begun, workers, expected):
    made = []

    def networks(config):
        made.append(config)
        assert forecast.side_of(config) == 64

        def step(images, seen):
            clock.now += (0.05 + 0.01 * images) * (2 if seen >= 1200 and config.loss.adversarial.weight else 1)

        return step

    config = load(TrainVAE, None, [*STAGES, *words])
    assert forecast.vae_seconds(config, networks, begun, workers) == pytest.approx(expected)
    assert (made[0].loop.compile, made[0].optim.accumulate) == (False, 1)


def test_small_images_are_measured_as_they_are():
    assert forecast.side_of(load(TrainVAE, None, ["stages=[{resolution: 32, images: 8, batch_size: 4}]"])) == 32


@pytest.mark.parametrize("kind", ["unet", "patch", "stylegan"])
def test_the_measured_step_is_that_of_the_training(kind):
    words = [
        "model.encoder=S", "model.decoder.channels=[16, 16, 16, 16]", "model.decoder.layers=1", "loop.ema=0.9",
        f"loss.adversarial.kind={kind}", "loss.adversarial.channels=8", "loss.adversarial.start=100",
        "stages=[{resolution: 128, images: 200, batch_size: 2}]",
    ]  # fmt: skip
    step = vae._measured_step(load(TrainVAE, None, words), False)
    before, after = step(1, 0), step(2, 100)
    assert "discriminator" not in before
    assert {"l1", "kl", "wavelet", "gaussian", "loss", "gradient_norm"} <= before.keys() < after.keys()
    assert all(value.isfinite() for value in after.values())


LATENTS = LatentData(data="d", images=60, shape=(4, 8, 8), vae="v", fingerprint="f", about="a")


@pytest.mark.parametrize(
    ("mode", "begun", "encoded"),
    [("cache", 0, 0), ("online", 20, 180), ("write-through", 20, 40), ("write-through", 80, 0)],
)
def test_a_diffusion_model_with_its_encoding(clock, monkeypatch, mode, begun, encoded):
    step, asked = taking(clock, lambda images: 0.05 + 0.01 * images)
    monkeypatch.setattr(forecast, "_ldm_step", lambda config, latents: step)
    monkeypatch.setattr(forecast, "load_autoencoder", lambda folder: folder)

    def encode(model, images):
        assert (model, images.shape) == ("v", (1, 3, 64, 64))
        clock.now += 0.2

    monkeypatch.setattr(forecast, "encode_latents", encode)
    config = load(TrainLDM, None, [f"mode={mode}", "images=200", "batch_size=20", "data.resolution=64"])
    found = forecast.ldm_seconds(config, LATENTS, begun, workers=2)
    assert found == pytest.approx((200 - begun) / 20 * (0.05 + 10 * 0.01) + encoded / 2 * 0.2)
    assert max(asked) == 10


@pytest.mark.parametrize("classes", [0, 3])
def test_the_measured_step_of_a_diffusion_model(classes):
    config = load(TrainLDM, None, ["network=tiny", f"classes={classes}", "loop.ema=0.9", "more_ema=[0.99]"])
    torch.manual_seed(0)
    forecast._ldm_step(config, LATENTS)(2)


def test_where_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(forecast.checkpoint, "newest", lambda folder: "")
    assert forecast.images_done("run") == 0
    assert forecast.images_done("run", "runs/other/checkpoint-000000800000/") == 800_000
    assert forecast.images_done("run", "a folder of another name") == 0
    monkeypatch.setattr(forecast.checkpoint, "newest", lambda folder: f"{folder}/checkpoint-000000000640")
    assert forecast.images_done("run", "runs/other/checkpoint-000000800000") == 640


@pytest.fixture
def say(monkeypatch):
    """Say the duration of a training of 1,000 images, and note the threads with which it was measured."""

    def call(seconds, begun=0, placement=CPUS, *words):
        def measure():
            call.threads = torch.get_num_threads()
            return seconds

        forecast.say_duration(load(TrainVAE, None, [*words]), 1000, begun, placement, measure)

    call.threads = None
    return call


def test_it_is_said_before_the_start_with_the_workers_threads(say, capsys):
    before = torch.get_num_threads()
    say(3600)
    assert say.threads == 3
    assert torch.get_num_threads() == before
    assert capsys.readouterr().out.splitlines() == [
        "measuring a few training steps, to say how long it will take",
        "training on 1,000 images will take about 1 h 0 min on this machine",
    ]
    say(9_322_500, 400, CPUS, "yes=true")
    assert capsys.readouterr().out.splitlines()[1] == (
        "training on 600 of 1,000 images will take about 108 days on this machine; --config small takes about 20 "
        "minutes on two cores"
    )


@pytest.mark.parametrize(
    ("job", "words", "hint"),
    [
        (TrainVAE, [], True), (TrainLDM, ["network=small"], True), (TrainLDM, ["network=tiny"], False),
        (TrainVAE, ["model.encoder=S", "loss.lpips.weight=0", "loss.adversarial.weight=0",
                    "stages=[{resolution: 64, images: 9600, batch_size: 8}]"], False),
    ],
    ids=["default", "network", "tiny network", "small"],
)  # fmt: skip
def test_a_smaller_preset_is_recommended_to_what_is_larger(capsys, job, words, hint):
    forecast.say_duration(load(job, None, words), 1000, 0, CPUS, lambda: 7500.0)
    assert ("--config small takes about 20 minutes on two cores" in capsys.readouterr().out) is hint
    forecast.say_duration(load(job, None, words), 1000, 0, CPUS, lambda: 7000.0)
    assert "--config small" not in capsys.readouterr().out


def test_days_are_asked_about(say, monkeypatch):
    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    with pytest.raises(UserError, match="yes=true begins without asking"):
        say(9_322_500)


@pytest.mark.parametrize("alone", [True, False])
def test_it_is_measured_before_ray_starts_unless_it_runs(monkeypatch, capsys, alone):
    there = Placement(workers=2, gpu=False, threads=5)
    monkeypatch.setattr(forecast.cluster, "alone", lambda ray: CPUS if alone else None)
    monkeypatch.setattr(forecast.cluster, "start", lambda ray: print("Ray starts") or there)
    assert forecast.start_ray(load(TrainVAE, None, []), 10, 0, lambda: float(torch.get_num_threads())) is there
    shown = capsys.readouterr().out.splitlines()
    assert shown.index("Ray starts") == (2 if alone else 0)
    assert f"training on 10 images will take about {3 if alone else 5} s on this machine" in shown


@pytest.mark.parametrize(
    ("begun", "placement", "inside"),
    [(0, Placement(workers=1, gpu=True, threads=3), False), (1000, CPUS, False), (0, CPUS, True)],
    ids=["on a GPU", "nothing left", "in a trial"],
)
def test_where_nothing_is_said(say, capsys, monkeypatch, begun, placement, inside):
    monkeypatch.setattr(forecast.cluster, "in_worker", lambda: inside)
    say(9_322_500, begun, placement)
    assert say.threads is None
    assert capsys.readouterr().out == ""
