"""How train_vae is wired: what its config sets in networks, steps, images, validation and the export."""

import copy

import lpips
import numpy as np
import pytest
import ray.train.torch
import skimage.data
import torch
import yaml
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from litevae import losses, order
from litevae.any_autoencoder import load_autoencoder
from litevae.errors import UserError
from litevae.images import to_tensor
from litevae.perceptual import SqueezeNetFeatures
from litevae.pictures import reconstruction_picture
from pipelines.data.open_source import open_source
from pipelines.evaluation.config import Evaluate
from pipelines.evaluation.reconstruction import evaluate
from pipelines.runtime.cli import load
from pipelines.runtime.schema import validate, values_to_keep
from pipelines.training import checkpoint, ranks, run_folder, vae_validation
from pipelines.training import vae as module
from pipelines.training.config import TrainVAE
from pipelines.training.vae import (
    MAY_CHANGE,
    Networks,
    VaeTask,
    build_model,
    lpips_or_warning,
)
from pipelines.training.vae_loss import AutoencoderLoss
from pipelines.training.vae_validation import Validation
from tests.in_process import up_to_the_workers
from tests.networks import Noted, save_squeezenet
from tests.setups import leave_checkpoint, vae_setup

SMALL = [
    "model.encoder=S", "model.decoder.channels=[8, 8, 8, 8]", "model.decoder.layers=1", "loss.lpips.weight=0",
    "loss.adversarial.channels=2", "loop.precision=fp32", "ray.gpu=false", "tracking.enabled=false",
]  # fmt: skip
GAN = "loss.adversarial.start=0"
DWT2 = ["model.encoder=dwt-2", "model.latent_channels=48"]  # nothing to learn in it: quick
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """11 crops of 40 px, each another one in every window of 32."""
    folder = tmp_path_factory.mktemp("photos")
    for n in range(11):
        Image.fromarray(skimage.data.astronaut()[30 * n : 30 * n + 40, 40 * n : 40 * n + 40]).save(
            folder / f"{n:02}.png"
        )
    return folder


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.setattr(ray.train.torch, "prepare_model", lambda model: model)


def configured(photos, *more):
    stages = "stages=[{resolution: 32, images: 32, batch_size: 4}]"
    return load(TrainVAE, None, [*SMALL, f"data.train.uri={photos}", stages, *more])


@pytest.fixture
def networks(photos):
    return lambda *more: Networks(configured(photos, *more), lpips=False, device=CPU)


@pytest.fixture
def task(photos):
    def make(*more, rank=0, world=1, val=True):
        config = configured(photos, f"data.val.uri={photos}", *more)
        setup = vae_setup(open_source(config.data.train), open_source(config.data.val) if val else None)
        return VaeTask(config, setup, rank, world, CPU)

    return make


def pixels(seed=0, count=4):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))


def ready(nets):
    """Blocks add nothing at the start: let gradients through."""
    with torch.no_grad():
        for p in nets.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return nets


# --- a step -------------------------------------------------------------------------------------------------------


def test_the_schedule_reaches_both_optimizers(networks):
    stages = "stages=[{resolution: 32, images: 16, batch_size: 4}, {resolution: 32, images: 8, batch_size: 4}]"
    schedule = ["optim.lr=0.01", "loss.adversarial.lr=0.03", "optim.warmup=8", "optim.schedule=cosine"]
    nets, rates = networks(GAN, stages, *schedule), {"model": [], "disc": []}

    def noted(optimizer, name):
        step = optimizer._optimizer.step
        optimizer._optimizer.step = lambda: rates[name].append(optimizer._optimizer.param_groups[0]["lr"]) or step()

    noted(nets.optimizer, "model")
    noted(nets.disc_optimizer, "disc")
    for images in (0, 4, 8, 16, 24):
        nets.step(pixels(), images)
    factors = [1 / 9, 5 / 9, 1, 0.5, 0]  # of 24 images, 8 of them warm-up
    assert rates["model"] == pytest.approx([0.01 * factor for factor in factors])
    assert rates["disc"] == pytest.approx([0.03 * factor for factor in factors])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_networks_compute_in_the_precision_and_losses_in_fp32(networks, photos, precision):
    nets = networks(GAN, "loss.ldl.weight=1", "loop.ema=0.9", f"loop.precision={precision}", "val_images=2")
    wanted, seen = torch.bfloat16 if precision == "bf16" else torch.float32, {"model": [], "disc": [], "loss": []}
    nets.model.decoder.conv_out.register_forward_hook(lambda *given: seen["model"].append(given[2].dtype))
    first = next(m for m in nets.disc.modules() if isinstance(m, torch.nn.Conv2d))
    first.register_forward_hook(lambda *given: seen["disc"].append(given[2].dtype))
    nets.objective.register_forward_pre_hook(
        lambda _, given: seen["loss"].extend([given[0].dtype, given[1].dtype, given[4].dtype])
    )
    values = nets.step(pixels(), 0)
    assert seen["model"] == [wanted] * 2  # the average's reconstruction, and the model's own
    assert len(seen["disc"]) >= 2
    assert set(seen["disc"]) == {wanted}
    assert seen["loss"] == [torch.float32] * 3
    assert values["loss"].dtype == torch.float32
    assert {p.dtype for p in nets.model.parameters()} == {torch.float32}
    source = open_source(configured(photos, f"data.val.uri={photos}").data.val)
    Validation(source, nets.config, 32, 0, 1).run(nets.model, nets.averaged())
    assert seen["model"] == [wanted] * 3


def test_lpips_gets_images_in_minus_one_to_one(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    path = save_squeezenet(tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth")
    reference = lpips.LPIPS(net="squeeze", verbose=False)  # takes the file in the hub cache
    words = ["loss.lpips.net=squeeze", f"loss.lpips.weights={path}", "loss.lpips.weight=0.7"]
    features = ["loss.features.weight=0.3", f"loss.features.weights={path}"]
    config = configured(photos, *words, *features)
    assert lpips_or_warning(config)
    assert not lpips_or_warning(configured(photos, *words, "loss.lpips.weight=0"))
    nets = Networks(config, lpips=True, device=CPU)
    x = to_tensor(pixels())
    torch.manual_seed(7)
    with torch.no_grad():
        y, posterior = ready(nets).net(x)
        expected, distance = reference(x, y).mean(), SqueezeNetFeatures(path)(x, y).mean()
        total, terms = nets.objective(x, y, posterior, 0)
    torch.testing.assert_close(terms["lpips"], expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(terms["features"], distance)
    weights = {"l1": 1, "kl": 2.1e-8, "wavelet": 1, "gaussian": 0.5, "lpips": 0.7, "features": 0.3}
    torch.testing.assert_close(total, sum(weight * terms[name] for name, weight in weights.items()))
    assert weights.keys() == terms.keys()
    torch.manual_seed(7)
    values = nets.step(pixels(), 0)
    torch.testing.assert_close(values["lpips"], expected, rtol=1e-3, atol=0)
    assert "lpips" not in AutoencoderLoss(config, lpips=False)(x, y, posterior, 0)[1]


def test_the_average_is_updated_once_a_step(networks):
    nets = networks("loop.ema=0.9", "optim.accumulate=2", "optim.lr=0.01")
    before = {name: value.clone() for name, value in nets.model.state_dict().items()}
    nets.step(pixels(), 0)
    for name, value in nets.ema.average.items():  # the first update keeps a tenth
        torch.testing.assert_close(value, 0.1 * before[name] + 0.9 * nets.model.state_dict()[name])
    assert networks().ema is None


@pytest.mark.parametrize(("kind", "times"), [("patch", 2), ("unet", 1)])
def test_ddp_gets_each_pass_and_sends_the_last(networks, monkeypatch, kind, times):
    """PatchGAN's batch normalisation takes real images and fakes apart."""
    monkeypatch.setattr(ray.train.torch, "prepare_model", Noted)
    nets = networks(GAN, "optim.accumulate=4", f"loss.adversarial.kind={kind}", *DWT2)
    nets.step(pixels(), 0)
    assert nets.net.module.model is nets.model
    assert nets.disc_net.module is nets.disc
    assert nets.net.passes == [False, False, False, True]
    assert nets.disc_net.passes == [last for last in nets.net.passes for _ in range(times)]


def test_running_statistics_are_shared_before_they_are_averaged(networks, monkeypatch):
    nets, seen = networks("loop.ema=0.9", "loss.adversarial.weight=0", *DWT2), []
    monkeypatch.setattr(module, "_share_buffers", lambda model: seen.append((model is nets.model, nets.ema.updates)))
    nets.step(pixels(), 0)
    assert seen == [(True, 0)]


def test_cutmix_is_drawn_by_seed_position_and_micro_batch(networks, monkeypatch):
    x, drawn = to_tensor(pixels(count=1)), []
    mask = losses.cutmix_mask
    monkeypatch.setattr(losses, "cutmix_mask", lambda *size: drawn.append(True) or mask(*size))

    def mixed(nets, images, part):
        drawn.clear()
        nets.adversarial.discriminator_loss(x, x.clone(), images, part)
        return bool(drawn)

    one, other = (networks(GAN, "loss.adversarial.cutmix=0.5", f"seed={seed}", *DWT2) for seed in (0, 1))
    rows = [[mixed(nets, 4 * n, part) for n in range(12)] for nets in (one, other) for part in (0, 1)]
    assert len(set(map(tuple, rows))) == 4
    assert 12 < sum(map(sum, rows)) < 36
    assert [mixed(one, 4 * n, 0) for n in range(12)] == rows[0]
    # The crop of the image at a position has a stream of its own, whose first number is another.
    crops = [np.random.default_rng(order.seed_for(0, 4 * n)).random() < 0.5 for n in range(12)]
    assert rows[0] != crops
    rare = networks(GAN, "loss.adversarial.cutmix=0.05", *DWT2)
    assert sum(mixed(rare, 4 * n, 0) for n in range(12)) < 4


def test_the_discriminator_has_its_own_seed_size_and_rate(networks):
    nets, other = networks(), networks("seed=1")
    assert not torch.equal(*(next(each.disc.parameters()) for each in (nets, other)))
    assert not torch.equal(*(next(each.model.parameters()) for each in (nets, other)))
    beside = networks(*DWT2).disc  # whatever the autoencoder beside it draws
    assert all(torch.equal(a, b) for a, b in zip(nets.disc.parameters(), beside.parameters(), strict=True))
    sizes = [sum(p.numel() for p in networks(f"loss.adversarial.channels={n}").disc.parameters()) for n in (2, 4)]
    assert sizes[1] > 3 * sizes[0]
    assert networks("loss.adversarial.weight=0").disc is None


@pytest.mark.parametrize("kind", ["hinge", "logistic"])
def test_the_discriminators_step_is_the_mean_of_its_terms(networks, kind):
    """Gradients of the plain loss, with LeCam and CutMix, of what the generator made before it moved."""
    more = [GAN, f"loss.adversarial.loss={kind}", "loss.adversarial.lecam=0.5", "loss.adversarial.cutmix=1"]
    nets, by_hand = (ready(networks(*more)) for _ in range(2))
    found = {}
    for name, p in nets.disc.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: found.update({name: p.grad.clone()}))
    torch.manual_seed(3)
    values = nets.step(pixels(), 0)

    x = to_tensor(pixels())
    torch.manual_seed(3)
    fake = by_hand.net(x)[0].detach()
    mask = losses.cutmix_mask(4, 32, 32)
    real, made, mixed = (by_hand.disc(images) for images in (x, fake, losses.cutmix(x, fake, mask)))
    loss = {"hinge": losses.hinge_discriminator, "logistic": losses.logistic_discriminator}[kind](real, made)
    consistency = losses.cutmix_discriminator(real, made, mixed, mask, kind)
    lecam = losses.LeCam(lambda value: value, device=CPU)(real, made)
    torch.testing.assert_close(values["discriminator"], loss)
    torch.testing.assert_close(values["cutmix"], consistency)
    torch.testing.assert_close(values["lecam"], lecam)
    for name, logits in (("logits_real", real), ("logits_fake", made)):
        torch.testing.assert_close(values[name], torch.stack([head.mean() for head in logits]).mean())
    (loss + consistency + 0.5 * lecam).backward()
    for name, p in by_hand.disc.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-6)


def test_skipped_steps_are_those_of_either_network(task):
    one = task(GAN)
    one.optimizer.skipped, one.disc_optimizer.skipped = (lambda: 2), (lambda: 5)
    assert one.skipped() == 5
    one.optimizer.skipped = lambda: 7
    assert one.skipped() == 7
    alone = task("loss.adversarial.weight=0")
    assert alone.skipped() == 0


def test_what_crosses_ranks_is_averaged_and_buffers_are_rank_0s(monkeypatch):
    gradient = torch.tensor([3.0, 9.0])
    assert ranks.average(gradient) is gradient
    sent = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: sent.append((tensor, src)))
    model = torch.nn.BatchNorm2d(2)
    module._share_buffers(model)
    assert sent == []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(5))
    assert ranks.average(gradient).tolist() == [2.0, 3.5]
    module._share_buffers(model)
    assert [(tensor is buffer, src) for (tensor, src), buffer in zip(sent, model.buffers(), strict=True)] == [
        (True, 0)
    ] * 3


# --- the model ----------------------------------------------------------------------------------------------------


def test_every_field_of_the_model_reaches_it(photos):
    fields = {
        "latent_channels": 12, "wavelet": "db2", "downsample": "pool", "extractor": "nafnet", "shared_extractor": True,
        "levels": [2, 3], "aggregator": "vit", "vit_grid": 4, "conv1x1": True,
    }  # fmt: skip
    decoder = {"channels": [8, 16, 8, 24], "layers": 3, "norm": "rms", "output": "wavelet"}
    words = [f"model.{name}={value}" for name, value in fields.items()]
    words += [f"model.decoder.{name}={value}" for name, value in decoder.items()]
    model, plain = build_model(configured(photos, *words)), build_model(configured(photos))
    expected = fields | {"block_out_channels": [8, 16, 8, 24], "layers_per_block": 3, "decoder_norm": "rms"}
    expected |= {"output": "wavelet", "size": "S"}
    for name, value in expected.items():
        have = model.config[name]
        assert (list(have) if isinstance(have, tuple) else have) == value, name
        assert name == "size" or plain.config[name] != have, name
    assert build_model(configured(photos, "model.encoder=vae-small")).config["size"] == "vae-small"


def test_a_models_weights_are_the_seeds(photos):
    first, again, other = (build_model(configured(photos, f"seed={seed}")) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


# --- images -------------------------------------------------------------------------------------------------------


def originals(photos):
    return [np.asarray(Image.open(path)) for path in sorted(photos.glob("*.png"))]


def epochs(one, count=1, stage=0):
    """Images (11 each) of the first epochs; every batch is of one rank's."""
    one.begin(stage)
    rows = torch.cat(list(one.batches(0, 11 * count, 11)))
    assert rows.dtype == torch.uint8
    return rows.numpy().reshape(count, 11, *rows.shape[1:])


def places(one, photos, count=1):
    """Of each epoch: {number of the photo: (top, left, mirrored)} of its window of 32 px."""
    known = {
        np.ascontiguousarray(image[top : top + 32, left : left + 32][:, :: -1 if flip else 1]).tobytes(): (
            n,
            (top, left, flip),
        )
        for n, image in enumerate(originals(photos))
        for top in range(9)
        for left in range(9)
        for flip in (False, True)
    }
    found = [dict(known[row.tobytes()] for row in epoch) for epoch in epochs(one, count)]
    assert all(sorted(place) == list(range(11)) for place in found)  # every photo once an epoch
    return found


def test_crops_and_flips_are_the_configs_and_others_in_each_epoch(task, photos):
    plain = ["data.resize=none", "data.crop=center", "data.flip=false"]
    (centred,) = places(task(*plain), photos)
    assert set(centred.values()) == {(4, 4, False)}
    first, second = places(task(*plain, "data.flip=true"), photos, 2)
    assert {place[:2] for place in first.values()} == {(4, 4)}
    assert 0 < sum(place[2] for place in first.values()) < 11
    assert first != second
    first, second = places(task(*plain, "data.crop=random"), photos, 2)
    assert not any(place[2] for place in first.values())
    assert len(set(first.values())) > 5
    assert sum(first[n] == second[n] for n in first) < 4
    (other,) = places(task(*plain, "data.crop=random", "seed=1"), photos)
    assert sum(first[n] == other[n] for n in first) < 4
    assert places(task(*plain, "data.crop=random"), photos) == [first]


def test_images_come_in_another_order_with_another_seed(task):
    plain = ["data.resize=none", "data.crop=center", "data.flip=false"]
    orders = [[row.tobytes() for row in epochs(task(*plain, f"seed={seed}"))[0]] for seed in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_images_are_resized_to_the_stages_resolution(task, photos):
    stages = "stages=[{resolution: 32, images: 8, batch_size: 4}, {resolution: 24, images: 8, batch_size: 4}]"
    one = task(stages, "data.crop=center", "data.flip=false", "data.decode=pillow")
    for stage, side in ((0, 32), (1, 24)):
        wanted = {
            Image.open(path).resize((side, side), Image.Resampling.BICUBIC).tobytes() for path in photos.iterdir()
        }
        assert {row.tobytes() for row in epochs(one, stage=stage)[0]} == wanted
        assert one._validation._pixels.shape == (11, side, side, 3)
    assert one.stages == [(8, 4), (8, 4)]
    assert one.digest == one.source.digest


def test_what_else_the_config_says_of_images(task):
    one = task("data.decode=scaled", "data.loaders=3", "data.max_bad=0.25", "data.max_pixels=5000", "seed=4")
    one.model.eval()
    one.begin(0)
    assert one.model.training
    images = one._images
    assert images._transform.max_pixels == 5000
    assert (images._transform.decode, images._loaders, images._max_bad, images._seed) == ("scaled", 3, 0.25, 4)
    images.bad.update({"a": "broken", "b": "broken"})
    assert float(one.count()["bad_images"]) == 2
    one.check({"bad_images": 2.4})  # of 11; a mean over ranks is a number that all have
    with pytest.raises(UserError, match="3 of 11 images can't be read, more than data.max_bad=0.25"):
        one.check({"bad_images": 3.0})


def test_a_rank_gets_its_share_of_each_batch(task):
    whole = task()
    whole.begin(0)
    ranks = [task(rank=rank, world=2) for rank in (0, 1)]
    for one in ranks:
        one.begin(0)
    batches = [list(one.batches(4, 20, 4)) for one in (whole, *ranks)]
    assert [len(found) for found in batches] == [4, 4, 4]
    for together, *parts in zip(*batches, strict=True):
        assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), together)


# --- validation and export ----------------------------------------------------------------------------------------


def judged_by_hand(nets, x):
    """Reconstruction and latent of the averaged weights, in a model of its own."""
    model = copy.deepcopy(nets.model).eval()
    if nets.ema is not None:
        model.load_state_dict(model.state_dict() | nets.ema.average)
    with torch.no_grad():
        return model(x, sample_posterior=False)[0], model.encode(x).latent_dist.mode()


@pytest.mark.parametrize(
    ("more", "images"),
    [
        (["loop.ema=0.5"], 9),
        (["loop.ema=0.5", "model.decoder.norm=batch", *DWT2], 3),
        (DWT2, 2),
    ],
)
def test_validation_judges_the_mode_with_the_averaged_weights(networks, photos, more, images):
    nets = ready(networks(*more, f"val_images={images}", "optim.lr=0.01", f"data.val.uri={photos}"))
    for n in range(2):
        nets.step(pixels(n), 4 * n)
    before = copy.deepcopy(nets.model.state_dict())
    source = open_source(nets.config.data.val)
    values, picture = Validation(source, nets.config, 40, 0, 1).run(nets.model, nets.averaged())

    x = torch.from_numpy(np.stack(originals(photos)[:images])).permute(0, 3, 1, 2) / 127.5 - 1
    y, latents = judged_by_hand(nets, x)
    a, b = (((each + 1) * 127.5).round().clamp(0, 255) for each in (x, y))
    psnr = [peak_signal_noise_ratio(v[None], u[None], data_range=255.0) for u, v in zip(a, b, strict=True)]
    assert values == {
        "psnr": pytest.approx(np.mean(psnr), abs=0.02),
        "ssim": pytest.approx(float(structural_similarity_index_measure(b, a, data_range=255.0)), abs=1e-3),
    }
    wanted = reconstruction_picture(x[:8], y[:8], latents[:8])
    assert picture.shape == wanted.shape
    assert (picture != wanted).mean() < 0.02  # another batch rounds otherwise
    side, rows = 160, min(8, images)  # 40 px four times as large, with 2 px between and 16 of labels above
    shown = [picture[18 + 162 * n :][:side:4, 2 : 2 + side : 4] for n in range(rows)]
    assert np.array_equal(np.stack(shown), np.stack(originals(photos)[:rows]))
    assert nets.model.training
    assert all(torch.equal(value, nets.model.state_dict()[name]) for name, value in before.items())


def test_ranks_share_the_validation(networks, photos, monkeypatch):
    nets = ready(networks("model.encoder=dwt-2", "model.latent_channels=48", "val_images=5"))
    source, told = open_source(configured(photos, f"data.val.uri={photos}").data.val), []
    alone, _ = Validation(source, nets.config, 40, 0, 1).run(nets.model, nets.averaged())

    def all_gather_object(into, mine):
        told.append(mine)
        into[:] = [mine, told[0]]  # rank 1 comes first, and hears itself

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    monkeypatch.setattr("litevae.metrics.Mean.value", lambda mean: (float(mean.total / mean.count), mean.count))
    parts = [Validation(source, nets.config, 40, rank, 2) for rank in (1, 0)]
    assert [part._pixels.shape[0] for part in parts] == [2, 3]
    assert [part._batch for part in parts] == [2, 2]  # of 4 over both
    parts[0].run(nets.model, nets.averaged())
    values, _ = parts[1].run(nets.model, nets.averaged())
    assert values == {name: (pytest.approx(value, abs=0.01), 5) for name, value in alone.items()}


def test_validation_images_are_centred_and_as_many_as_there_are(photos, tmp_path, capsys):
    for n, path in enumerate(sorted(photos.iterdir())[:3]):
        (tmp_path / path.name).write_bytes(path.read_bytes() if n != 1 else b"\x89PNG broken")
    config = configured(photos, f"data.val.uri={tmp_path}", "data.resize=none", "val_images=20")
    found = Validation(open_source(config.data.val), config, 32, 0, 1)
    assert found.images == 3
    assert np.array_equal(found._pixels, np.stack([originals(photos)[n][4:36, 4:36] for n in (0, 2)]))
    assert "skipped unreadable validation image 01.png" in capsys.readouterr().out
    assert Validation(None, config, 32, 0, 1).images == 0
    assert Validation(open_source(config.data.val), config, 32, 5, 6)._pixels.shape == (0, 32, 32, 3)


@pytest.mark.parametrize(
    "words",
    [
        ["data.resize=none", "val_images=4", "stages=[{resolution: 32, images: 4, batch_size: 4}]"],
        ["loop.precision=bf16", "stages=[{resolution: 48, images: 4, batch_size: 4}]"],
    ],
    ids=["cropped", "resized"],
)
@pytest.mark.usefixtures("in_process")
def test_an_evaluation_with_the_options_that_are_named_measures_the_same(photos, tmp_path, capsys, words):
    config = configured(photos, f"data.val.uri={photos}", *words)
    source, side = open_source(config.data.val), config.stages[-1].resolution
    nets = Networks(config, lpips=False, device=CPU)
    values, _ = Validation(source, config, side, 0, 1).run(nets.model, nets.averaged())
    nets.model.save_pretrained(tmp_path / "model")
    text, advice = vae_validation.closing_lines(config, source, values | {"images": 4})
    assert text.startswith(f"val psnr {values['psnr']:.4g}, ssim {values['ssim']:.4g} (")
    options = advice.partition(" with ")[2].split()
    more = [f"model={tmp_path}/model", f"source.uri={photos}", f"out={tmp_path}/out", f"root={tmp_path}"]
    found = evaluate(load(Evaluate, None, [*options, *more, "tracking.enabled=false", "ray.gpu=false"]))
    assert found["images"] == (4 if "val_images=4" in words else 11)
    for name, value in values.items():
        assert found["reconstruction"][name] == pytest.approx(value, abs=0.005)
    more += ["overwrite=true", "tracking.enabled=false", "ray.gpu=false"]
    other = evaluate(load(Evaluate, None, ["transform.resolution=40", *more]))
    assert abs(other["reconstruction"]["psnr"] - values["psnr"]) > 0.01


def test_a_task_validates_where_there_are_images(task):
    one = task("val_images=3")
    one.begin(0)
    assert one.validated == "3 images at 32 px"
    values, picture = one.validate()
    assert values.keys() == {"psnr", "ssim"}
    assert picture.ndim == 3
    without = task(val=False)
    without.begin(0)
    assert without.validate() == ({}, None)


def test_the_exported_model_is_the_average(task, tmp_path):
    one, plain = task("loop.ema=0.5", "optim.lr=0.01"), task("optim.lr=0.01")
    for each in (one, plain):
        assert each.exports().keys() == {"model"}
        each.step(pixels(), 0)
        own = copy.deepcopy(each.model.state_dict())
        each.exports()["model"](tmp_path)
        wanted = own | (each.ema.average if each.ema else {})
        found = load_autoencoder(tmp_path).state_dict()
        assert all(torch.equal(value, found[name]) for name, value in wanted.items())
        assert all(torch.equal(value, own[name]) for name, value in each.model.state_dict().items())
    assert any(not torch.equal(value, one.model.state_dict()[name]) for name, value in one.ema.average.items())


# --- the job ------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(photos, tmp_path):
    """The job up to Ray Train: what workers would get, and how the run is tracked."""
    with up_to_the_workers({"model": "there", "psnr": 21.23456, "images": 32}) as noted:

        def run(*more):
            config = configured(photos, f"root={tmp_path}/runs", "name=mine", *more)
            return config, module.train_vae(config, ["callback"]), noted

        yield run


def test_what_workers_get_and_how_a_run_is_tracked(job, photos, tmp_path, capsys):
    config, result, noted = job(f"data.val.uri={photos}", "seed=3")
    folder = f"{tmp_path}/runs/mine"
    assert result == {"model": "there", "psnr": 21.23456, "images": 32}
    worker, setup, placement, loop, callbacks = noted.fitted
    assert (worker, placement.workers, loop, callbacks) == (module._worker, 1, config.loop, ["callback"])
    assert validate(TrainVAE, setup.config).model_copy(update={"tracking": config.tracking}) == config
    assert (setup.source.units, setup.val.units, setup.data) == (11, 11, str(photos))
    assert (setup.folder, setup.lpips, setup.begin, setup.handle) == (folder, False, "", "a handle")
    assert noted.checked == ({"root": f"{tmp_path}/runs"}, {"data.train.uri": str(photos)})
    given, more = noted.started
    assert given == (config.tracking, config.root, "train_vae", "mine", config.model_dump(mode="json"), folder)
    assert more == {"resume": False}
    shown = capsys.readouterr().out
    assert "train_vae mine: 11 images, encoder S " in shown
    assert "32 images to train on, 1 worker" in shown
    assert shown.endswith(
        "model: there\n"
        "val psnr 21.23 (11 images at 32 px, resized and cropped)\n"
        "jobs/evaluate.py takes all images, resized to 256 px, in fp32; it measures the same with "
        "transform.resolution=32\n"
    )
    assert noted.forecast[:3] == (config, 32, 0)
    assert yaml.safe_load((tmp_path / "runs/mine/config.yaml").read_text()) == values_to_keep(config)


def test_a_run_that_goes_on_says_so_and_may_be_longer(job, tmp_path):
    job("data.val.uri=")
    leave_checkpoint(tmp_path / "runs" / "mine")
    longer = "stages=[{resolution: 32, images: 48, batch_size: 4}]"
    _, _, noted = job(longer)
    assert noted.started[1] == {"resume": True}
    assert noted.fitted[1].val is None
    path = tmp_path / "runs" / "mine" / "config.yaml"
    assert yaml.safe_load(path.read_text())["stages"][0]["images"] == 48
    with pytest.raises(UserError, match="may only grow"):
        job()
    with pytest.raises(UserError, match="seed: was 0, is 1"):
        job(longer, "seed=1")


def test_workers_are_told_whether_there_is_lpips(job, tmp_path):
    path = save_squeezenet(tmp_path / "squeezenet.pth")
    _, _, noted = job("loss.lpips.weight=1", "loss.lpips.net=squeeze", f"loss.lpips.weights={path}")
    assert noted.fitted[1].lpips is True


def test_a_new_run_begins_with_a_folder_that_workers_find(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / checkpoint.STATE).touch()
    _, _, noted = job("begin=first")
    assert noted.fitted[1].begin == str(tmp_path / "first")


A, B, C = ({"resolution": side, "images": images, "batch_size": 4} for side, images in ((32, 8), (40, 8), (40, 16)))


@pytest.mark.parametrize(
    ("before", "now", "fits"),
    [
        ([A, B], [A, B], True),
        ([A, B], [A, C], True),
        ([A, B], [A, B, C], True),
        ([A, B], [A, C, C], True),
        ([A, C], [A, B], False),
        ([A, B], [A], False),
        ([A, B], [B, B], False),
        ([A, B], [A | {"images": 16}, B], False),  # only the last one may be longer
        ([A], [A | {"batch_size": 8}], False),
        ([A], [A | {"resolution": 64, "images": 16}], False),
    ],
)
def test_stages_may_only_grow(photos, tmp_path, before, now, fits):
    run_folder.write_config(str(tmp_path), configured(photos, f"stages={before}"))
    if fits:
        module._check_stages(str(tmp_path), configured(photos, f"stages={now}"))
    else:
        with pytest.raises(UserError, match="may only grow"):
            module._check_stages(str(tmp_path), configured(photos, f"stages={now}"))


MAY_DIFFER = [
    "root=/r", "ray.workers=2", "stages=[{resolution: 64, images: 8}]", "checkpointing=true", "val_images=3",
    "data.val.uri=/v", "data.loaders=9", "data.max_bad=0.5", "data.max_pixels=9", "loop.val_every=3",
    "loop.checkpoint_every=3", "loop.keep=9", "loop.log_every=9", "loop.max_restarts=9",
    "loss.lpips.required=false",
]  # fmt: skip
STAYS = [
    "name=other", "seed=1", "begin=/b", "data.train.uri=/t", "data.resize=none", "data.crop=center", "data.flip=false",
    "data.decode=pillow", "optim.lr=1", "optim.accumulate=2", "loss.l2.weight=1", "model.latent_channels=8",
    "loop.ema=0.5", "loop.precision=bf16", "loop.compile=true",
]  # fmt: skip


def test_what_may_differ_when_a_run_goes_on(photos, tmp_path):
    folder = str(tmp_path)
    run_folder.write_config(folder, configured(photos))
    leave_checkpoint(folder)
    for word in MAY_DIFFER:
        assert run_folder.open_run(folder, configured(photos, word), MAY_CHANGE), word
    for word in STAYS:
        with pytest.raises(UserError, match=f"  {word.partition('=')[0]}: was"):
            run_folder.open_run(folder, configured(photos, word), MAY_CHANGE)
