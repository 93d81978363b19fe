"""train_vae: what each loss moves, bad images and configs, and runs that are killed and go on to the same weights."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import skimage.data
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio

from litevae.autoencoder import WEIGHTS, LiteVAE, load_autoencoder
from litevae.errors import UserError
from litevae.images import ImageTransform, to_tensor
from pipelines import checkpoint
from pipelines.batches import Images
from pipelines.config import TrainVAE, load, main
from pipelines.sources import open_source
from pipelines.train_vae import Networks, Objective, build_model, train_vae

REPO = Path(__file__).resolve().parents[2]
SMALL = [
    "model.encoder=S", "model.decoder.channels=[8, 8, 8, 8]", "model.decoder.layers=1", "loss.lpips.weight=0",
    "loss.adversarial.channels=2", "loop.precision=fp32", "ray.gpu=false", "tracking.enabled=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """40 crops of 40 px."""
    folder = tmp_path_factory.mktemp("photos")
    astronaut = skimage.data.astronaut()
    for n in range(40):
        top, left = 12 * (n // 8), 20 * (n % 8)
        Image.fromarray(astronaut[top * 5 : top * 5 + 40, left * 2 : left * 2 + 40]).save(folder / f"{n:02}.png")
    return folder


def configured(photos, *more) -> TrainVAE:
    stages = "stages=[{resolution: 32, images: 32, batch_size: 8}]"
    return load(TrainVAE, None, [*SMALL, f"data.train.uri={photos}", stages, *more])


@pytest.fixture
def networks(photos, monkeypatch):
    """Networks as in a worker of one, without Ray."""
    import ray.train.torch

    monkeypatch.setattr(ray.train.torch, "prepare_model", lambda model: model)

    def make(*more):
        return Networks(configured(photos, *more), lpips=False, device=torch.device("cpu"))

    return make


def batch(seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(4)]


def only(term, weight=1.0):
    off = [f"loss.{name}.weight=0" for name in ("l1", "l2", "kl", "wavelet", "gaussian", "adversarial")]
    return [*off, f"loss.{term}.weight={weight}", "loss.adversarial.start=0"]


# --- one step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", ["l1", "l2", "kl", "wavelet", "gaussian", "adversarial"])
def test_each_term_alone_moves_what_it_should(networks, term):
    nets = networks(*only(term))
    with torch.no_grad():  # blocks add nothing at the start: let gradients through
        for p in nets.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    gradients = {}
    for name, p in nets.model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: gradients.update({name: p.grad.norm()}))
    values = nets.step(batch(), 0)
    assert torch.isfinite(values["loss"])
    assert all(torch.isfinite(norm) for norm in gradients.values())
    encoder, decoder = ([v for k, v in gradients.items() if k.startswith(part)] for part in ("encoder", "decoder"))
    assert max(encoder) > 0
    assert (max(decoder) > 0) if term != "kl" else not decoder
    steps = {"gradient_norm", "skipped_steps"}
    discriminator = {
        "adversarial",
        "discriminator",
        "logits_real",
        "logits_fake",
        *(f"discriminator_{s}" for s in steps),
    }
    assert set(values) == {"loss", term, *steps} | (discriminator if term == "adversarial" else set())


def test_the_two_gan_steps_do_not_touch_each_other(networks):
    nets = networks(*only("adversarial"))
    fresh = networks(*only("adversarial"))
    nets.optimizer.step = lambda lr: nets.model.zero_grad() or {}  # the generator stands still
    nets.step(batch(), 0)
    same = [torch.equal(a, b) for a, b in zip(nets.model.parameters(), fresh.model.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(nets.disc.pixel_head.weight, fresh.disc.pixel_head.weight)
    assert all(p.grad is None for p in [*nets.model.parameters(), *nets.disc.parameters()])


def test_terms_start_when_they_are_due(networks):
    nets = networks("loss.kl.start=100", "loss.adversarial.start=200", "loss.adversarial.weight=1")
    assert [sorted({"kl", "adversarial"} & set(nets.step(batch(), seen))) for seen in (0, 100, 200)] == [
        [], ["kl"], ["adversarial", "kl"],
    ]  # fmt: skip


def test_the_objective_is_the_weighted_sum(networks, photos):
    config = configured(photos, "loss.l1.weight=2", "loss.l2.weight=3", "loss.kl.weight=0.5")
    x, y = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    posterior = LiteVAE("S", block_out_channels=(8,) * 4).encode(x).latent_dist
    total, terms = Objective(config, lpips=False)(x, y, posterior, images=0)
    weights = {"l1": 2, "l2": 3, "kl": 0.5, "wavelet": 1, "gaussian": 0.5}
    assert set(terms) == set(weights)
    assert torch.allclose(total, sum(weights[name] * value for name, value in terms.items()))
    assert torch.allclose(terms["l1"], (x - y).abs().mean())
    kl = posterior.kl() / posterior.mean[0].numel()  # diffusers sums over the latent
    assert torch.allclose(terms["kl"], kl.mean(), rtol=1e-4)


def test_accumulated_micro_batches_are_one_batch(networks):
    """Without noise: a posterior's draw depends on the micro-batch."""
    weights = []
    for accumulate in (1, 2):
        nets = networks(f"optim.accumulate={accumulate}", "loss.adversarial.weight=0")
        forward = nets.model.forward
        nets.model.forward = lambda x, forward=forward: forward(x, sample_posterior=False)
        nets.step(batch(), 0)
        weights.append(nets.model.decoder.conv_out.weight.detach())
    assert torch.allclose(*weights, atol=1e-6)


def test_adaptive_weight_is_reported_and_bounded(networks):
    values = networks("loss.adversarial.adaptive=true", "loss.adversarial.start=0").step(batch(), 0)
    assert 0 < values["adversarial_weight"] <= 0.5 * 1e4 * 0.1


def test_state_restores_every_network_and_optimizer(networks):
    more = ["loss.adversarial.start=0", "loop.ema=0.9"]
    nets, again = networks(*more), networks(*more, "seed=5")
    nets.step(batch(0), 0)
    again.load(checkpoint.load(checkpoint.save(nets.state())))
    for one in (nets, again):
        torch.manual_seed(3)
        one.step(batch(1), 8)
    for key, value in nets.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
    for key, value in nets.disc.state_dict().items():
        assert torch.equal(value, again.disc.state_dict()[key]), key
    assert all(torch.equal(v, again.ema.average[k]) for k, v in nets.ema.average.items())


# --- images ---------------------------------------------------------------------------------------------------------


def test_batches_of_ranks_make_up_the_global_batch(photos):
    config = configured(photos)
    images = Images(open_source(config.data.train), ImageTransform(32, crop="random", flip=True), 0, 2, 0.01)
    whole = [picture.pixels for step in images.batches(8, 40, 8, rank=0, world=1) for picture in step]
    halves = [list(images.batches(8, 40, 8, rank, 2)) for rank in (0, 1)]
    pairs = (pair for a, b in zip(*halves, strict=True) for pair in zip(a, b, strict=True))
    interleaved = [picture.pixels for pair in pairs for picture in pair]
    assert all(np.array_equal(a, b) for a, b in zip(whole, interleaved, strict=True))
    assert len({pixels.tobytes() for pixels in whole}) == len(whole)


def test_an_unreadable_image_is_named_counted_and_replaced(photos, tmp_path, capsys):
    for n in range(8):
        (tmp_path / f"{n}.png").write_bytes((photos / f"{n:02}.png").read_bytes())
    (tmp_path / "5.png").write_bytes(b"\x89PNG broken")
    images = Images(open_source(configured(tmp_path).data.train), ImageTransform(32), 0, 0, 0.5)
    (step,) = images.batches(0, 8, 8, rank=0, world=1)
    assert len(step) == 8
    assert len({picture.pixels.tobytes() for picture in step}) == 7  # 6.png stands in
    assert list(images.bad) == ["5.png"]
    assert "skipped unreadable image 5.png" in capsys.readouterr().out
    images.check(4)
    with pytest.raises(UserError, match=r"5 of 8 images can't be read.*5\.png"):
        images.check(5)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.train.uri=/nowhere"], "data.train.uri=/nowhere does not exist"),
        (["stages=[{resolution: 32, images: 8, batch_size: 64}]"], "larger than the data: 40 images"),
        (["ray.workers=3"], "does not divide by ray.workers=3"),
        (["model.wavelet=hair"], "unknown wavelet 'hair'"),
        (["loss.features.weight=1", "loss.features.weights=/nowhere.pth"], "no weights file at /nowhere.pth"),
        (["model.init={init}"], "model.init={init} is another model: "),
        (["modell.encoder=S"], "unknown config key 'modell'"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(photos, tmp_path, capsys, more, message):
    init = tmp_path / "other"
    LiteVAE("S", latent_channels=12, block_out_channels=(8, 8, 8, 8)).save_pretrained(init)
    root = tmp_path / "runs"
    words = [*SMALL, f"data.train.uri={photos}", f"root={root}", "stages=[{resolution: 32, images: 8, batch_size: 8}]"]
    assert main(TrainVAE, train_vae, [*words, *(word.replace("{init}", str(init)) for word in more)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message.replace("{init}", str(init)) in err
    assert "Traceback" not in err
    assert not root.exists()


def test_missing_lpips_weights_turn_the_term_off_and_say_so(photos, tmp_path, monkeypatch, capsys):
    from pipelines.train_vae import _lpips_or_warning

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert not _lpips_or_warning(configured(photos, "loss.lpips.weight=1"))
    assert "warning: loss.lpips is off" in capsys.readouterr().out
    with pytest.raises(UserError, match="no weights file"):  # one that was named must be there
        _lpips_or_warning(configured(photos, "loss.lpips.weight=1", "loss.lpips.weights=/nowhere.pth"))


def test_init_takes_the_weights_of_a_model_folder(photos, tmp_path):
    model = build_model(configured(photos, "seed=9"))
    model.save_pretrained(tmp_path)
    again = build_model(configured(photos, f"model.init={tmp_path}"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    AutoencoderTiny().save_pretrained(tmp_path / "tiny")
    with pytest.raises(UserError, match="of class AutoencoderTiny, not LiteVAE"):
        build_model(configured(photos, f"model.init={tmp_path}/tiny"))


# --- whole runs -----------------------------------------------------------------------------------------------------


def command(photos, root, *more):
    words = [
        *SMALL, f"data.train.uri={photos}", f"data.val.uri={photos}", f"root={root}", "name=run", "ray.workers=2",
        "ray.cpus_per_worker=1", "loop.ema=0.9",
        "stages=[{resolution: 32, images: 80, batch_size: 8}, {resolution: 40, images: 80, batch_size: 8}]",
        "loop.checkpoint_every=16", "loop.val_every=80", "loop.log_every=5", "loss.adversarial.start=40",
    ]  # fmt: skip
    return [sys.executable, str(REPO / "jobs" / "train_vae.py"), *words, *more]


def weights(root) -> bytes:
    return (root / "run" / "model" / WEIGHTS).read_bytes()


def wait_for(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def undisturbed(photos, tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    done = subprocess.run(command(photos, root), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return root, done.stdout


def test_two_ranks_train_validate_and_export(undisturbed, photos):
    root, shown = undisturbed
    model = load_autoencoder(root / "run" / "model")
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(photos.glob("*.png"))])  # the last stage's 40 px
    x = to_tensor(pixels)
    with torch.no_grad():
        y = model(x, sample_posterior=False)[0]
    x, y = (((image + 1) * 127.5).round().clamp(0, 255) for image in (x, y))
    expected = np.mean([peak_signal_noise_ratio(b, a, data_range=255.0) for a, b in zip(x, y, strict=True)])
    logged = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    (psnr,) = [line["val/psnr"] for line in logged if line["step"] == 160 and "val/psnr" in line]
    assert psnr == pytest.approx(expected, abs=1e-3)  # over both ranks' images; another batch rounds otherwise
    assert f"psnr {psnr:.4g}" in shown
    assert (root / "run" / "images").is_dir()
    assert sorted(p.name for p in (root / "run").glob("checkpoint-*"))[-1] == "checkpoint-000000000160"


@pytest.mark.slow
def test_a_killed_driver_goes_on_to_the_same_weights(undisturbed, photos, tmp_path):
    process = subprocess.Popen(
        command(photos, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_for(lambda: list((tmp_path / "run").glob("checkpoint-*/state.pt")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "model").exists()
    done = subprocess.run(command(photos, tmp_path), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "goes on after" in done.stdout
    assert weights(tmp_path) == weights(undisturbed[0])

    # finished: the same command has nothing to do, another config is refused, more images are more training
    refused = subprocess.run(command(photos, tmp_path, "seed=3"), capture_output=True, text=True, timeout=400)
    assert refused.returncode == 2
    assert "seed: was 0, is 3" in refused.stderr
    assert weights(tmp_path) == weights(undisturbed[0])


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_ends_with_the_same_weights(undisturbed, photos, tmp_path):
    process = subprocess.Popen(command(photos, tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: (tmp_path / "run" / "checkpoint-000000000048" / "state.pt").exists(), process)
    workers = [
        p
        for p in psutil.Process(process.pid).children(recursive=True)
        if "ray::RayTrainWorker" in " ".join(p.cmdline())
    ]
    assert len(workers) == 2
    os.kill(workers[1].pid, signal.SIGKILL)
    shown, _ = process.communicate(timeout=400)
    assert process.returncode == 0, shown
    assert "goes on after" in shown
    assert weights(tmp_path) == weights(undisturbed[0])
