"""train_vae: what each loss moves, bad images and configs, and runs that are killed and go on to the same weights."""

import copy
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray.train.torch
import skimage.data
import torch
import yaml
from diffusers import AutoencoderTiny
from mlflow import MlflowClient
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchvision import models

from litevae import losses, order
from litevae.any_autoencoder import load_autoencoder
from litevae.autoencoder import LiteVAE
from litevae.equivariance import SpatialTransform
from litevae.errors import UserError
from litevae.images import ImageTransform, to_tensor
from litevae.layers import ResBlock
from litevae.model_folder import WEIGHTS
from pipelines.data.open_source import open_source
from pipelines.runtime import cluster
from pipelines.runtime.cli import load, main
from pipelines.training import checkpoint, compiling, loop, run_folder, vae
from pipelines.training.config import TrainVAE
from pipelines.training.image_feed import Images
from pipelines.training.vae import MAY_CHANGE, Networks, build_model, lpips_or_warning, train_vae
from pipelines.training.vae_loss import AutoencoderLoss
from pipelines.training.worker_setup import TrainSetup
from tests.setups import leave_checkpoint, untracked

REPO = Path(__file__).resolve().parents[3]
SMALL = [
    "model.encoder=S", "model.levels=[3]", "model.decoder.channels=[8, 8, 8, 8]", "model.decoder.layers=1",
    "loss.lpips.weight=0", "loss.adversarial.channels=2", "loop.precision=fp32", "ray.gpu=false",
    "tracking.enabled=false",
]  # fmt: skip
WHOLE = "model.levels=[1, 2, 3]"  # as the paper's, which takes three times as long


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
    monkeypatch.setattr(ray.train.torch, "prepare_model", lambda model: model)

    def make(*more):
        return Networks(configured(photos, *more), lpips=False, device=torch.device("cpu"))

    return make


def batch(seed=0):
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8))


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


def test_terms_start_when_they_are_due(networks):
    nets = networks("loss.kl.start=100", "loss.adversarial.start=200", "loss.adversarial.weight=1")
    assert [sorted({"kl", "adversarial"} & set(nets.step(batch(), seen))) for seen in (0, 100, 200)] == [
        [], ["kl"], ["adversarial", "kl"],
    ]  # fmt: skip


def test_the_objective_is_the_weighted_sum(networks, photos):
    config = configured(photos, "loss.l1.weight=2", "loss.l2.weight=3", "loss.kl.weight=0.5")
    x, y = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    posterior = LiteVAE("S", block_out_channels=(8,) * 4).encode(x).latent_dist
    total, terms = AutoencoderLoss(config, lpips=False)(x, y, posterior, images=0)
    weights = {"l1": 2, "l2": 3, "kl": 0.5, "wavelet": 1, "gaussian": 0.5}
    assert set(terms) == set(weights)
    assert torch.allclose(total, sum(weights[name] * value for name, value in terms.items()))
    assert torch.allclose(terms["l1"], (x - y).abs().mean())
    kl = posterior.kl() / posterior.mean[0].numel()  # diffusers sums over the latent
    assert torch.allclose(terms["kl"], kl.mean(), rtol=1e-4)


def ready(nets):
    """Blocks add nothing at the start: let gradients through."""
    with torch.no_grad():
        for p in nets.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return nets


def gradients(nets, pixels, images=0):
    """A step's, and its values."""
    found = {}
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p, key=(part, name): found.update({key: p.grad.clone()}))
        for part in ("model", "disc")
        for name, p in getattr(nets, part).named_parameters()
    ]
    torch.manual_seed(images)
    values = nets.step(pixels, images)
    for hook in hooks:
        hook.remove()
    assert len(found) == len(hooks)
    return found, values


def close(ours, theirs):
    """Two steps' gradients and values: Adam would make rounding errors of small gradients large."""
    for (_, name), gradient in ours[0].items():
        difference = (gradient - theirs[0][_, name]).norm()
        assert difference <= 1e-3 * gradient.norm() + 1e-6, (name, float(difference), float(gradient.norm()))
    for name, value in ours[1].items():
        torch.testing.assert_close(
            value, theirs[1][name], rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


FAIR = ["loss.adversarial.start=0", "optim.betas=[0.9, 0.999]"]


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_micro_batches_are_one_batch(networks, parts):
    """Gradients: Adam's first step is the same for any multiple of them. Without noise: a posterior's draw depends on
    the micro-batch."""
    steps = []
    for accumulate in (1, parts):
        nets = ready(networks(*FAIR, f"optim.accumulate={accumulate}"))
        forward = nets.net.forward
        nets.net.forward = lambda x, transform, forward=forward: forward(x, False, transform)
        steps.append(gradients(nets, batch()))
    close(*steps)


def test_checkpointing_computes_blocks_twice_and_the_same_step(networks, monkeypatch):
    runs, compute = [], ResBlock._compute
    monkeypatch.setattr(ResBlock, "_compute", lambda self, x: runs.append(self) or compute(self, x))
    plain, checkpointed = (ready(networks(*FAIR, *more)) for more in ([], ["checkpointing=true"]))
    blocks = sum(isinstance(module, ResBlock) for module in plain.model.modules())
    values = []
    for nets, times in ((plain, 1), (checkpointed, 2)):
        runs.clear()
        torch.manual_seed(0)
        values.append(nets.step(batch(), 0))
        assert len(runs) == times * blocks
    assert_same(*values)
    assert_same(plain.state(), checkpointed.state())


def test_a_step_with_channels_last_is_the_same_and_keeps_them_so(networks, monkeypatch):
    """As on GPUs, compiled; and a CPU goes on from there."""
    more = [*FAIR, WHOLE, "loss.l2.weight=1", "loop.ema=0.9", "model.conv1x1=true"]
    plain = ready(networks(*more))
    monkeypatch.setattr(compiling, "memory_format", lambda *_: torch.channels_last)
    last = ready(networks(*more))
    monkeypatch.undo()
    reached = set()

    def look(module, inputs, output):
        reached.add(module)
        for tensor in (*inputs, output):
            assert tensor.is_contiguous(memory_format=torch.channels_last), module

    hooks = [
        module.register_forward_hook(look)
        for network in (last.model, last.disc)
        for module in network.modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.GroupNorm)
    ]
    close(gradients(plain, batch()), gradients(last, batch()))
    assert len(reached) > 100
    for hook in hooks:
        hook.remove()

    plain.load(copy.deepcopy(last.state()))
    before = [p.clone() for p in plain.model.parameters()]
    steps = [gradients(nets, batch(1), 4) for nets in (plain, last)]
    close(*steps)
    moved = [torch.cat([(b - p).flatten() for b, p in zip(before, nets.model.parameters(), strict=True)])
             for nets in (plain, last)]  # fmt: skip
    assert (moved[0] - moved[1]).abs().mean() < 0.01 * moved[1].abs().mean()
    assert all(p.is_contiguous() for p in plain.model.parameters())


@pytest.mark.chaos
def test_compiled_a_step_is_the_same_and_stages_compile_once(networks, monkeypatch):
    """All of torch.compile but its last stage, kernels: for CPUs it takes three seconds for each of hundreds."""
    more, sides = ["checkpointing=true"], (32, 32, 48, 32)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    counts = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    counts.clear()
    plain, compiled = (ready(networks(*FAIR, *more, *compile)) for compile in ([], ["loop.compile=true"]))
    graphs = []
    for n, side in enumerate(sides):
        pixels = torch.from_numpy(np.random.default_rng(n).integers(0, 256, (4, side, side, 3), dtype=np.uint8))
        close(*(gradients(nets, pixels, 4 * n) for nets in (plain, compiled)))
        compiled.load(copy.deepcopy(plain.state()))
        graphs.append(counts["unique_graphs"])
    # encoder, decoder, discriminator with and without gradients of its weights; once for each size
    assert graphs == [4 * len(set(sides[: n + 1])) for n in range(len(sides))]
    with torch.no_grad(), compiling.uncompiled():
        compiled.model(torch.zeros(1, 3, 16, 16))
    assert counts["unique_graphs"] == graphs[-1]
    torch._dynamo.reset()


# --- systems ---------------------------------------------------------------------------------------------------------

DWT = [WHOLE, "model.encoder=dwt", "model.latent_channels=12"]
DWT2 = [WHOLE, "model.encoder=dwt-2", "model.latent_channels=48"]


@pytest.mark.parametrize(
    "more",
    [
        [WHOLE, "model.encoder=B"],
        *(
            pytest.param([WHOLE, f"model.encoder={size}", "optim.lr=3e-4"], marks=pytest.mark.slow)  # else too far
            for size in ("M", "L", "sd-vae")
        ),
        [WHOLE, "model.encoder=vae-small"],
        DWT,
        DWT2,
        ["model.extractor=nafnet"],
        ["model.shared_extractor=true", "model.levels=[2, 3]"],
        [WHOLE],
        ["model.aggregator=vit", "model.vit_grid=4"],
        ["model.downsample=pool"],
        ["model.conv1x1=true"],
        ["model.wavelet=db2"],
        *([f"model.decoder.norm={norm}"] for norm in ("smc", "batch", "instance", "layer", "rms")),
        ["model.decoder.output=wavelet"],
        ["model.decoder.output=wavelet", "model.wavelet=db2", "model.decoder.norm=smc", *DWT],
        ["loop.precision=bf16", "model.aggregator=vit", "model.vit_grid=4", "model.decoder.norm=rms"],
    ],
    ids=" ".join,
)
def test_every_system_trains(networks, more):
    """Its losses are those of its own reconstruction and posterior, and on the same batch they fall."""
    nets = ready(networks("loss.l2.weight=1", "loss.adversarial.start=0", "loss.adversarial.adaptive=true",
                          "optim.lr=3e-3", *more))  # fmt: skip
    by_hand, reached = copy.deepcopy(nets.model), set()
    for name, p in nets.model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: reached.add(name))
    values = one_step(nets)
    terms = {"l1", "l2", "wavelet", "gaussian", "adversarial", "adversarial_weight", "gradient_ratio", "discriminator"}
    assert terms <= set(values)
    assert values["skipped_steps"] == 0
    assert reached == {name for name, _ in nets.model.named_parameters()}  # DDP waits for those that get no gradient

    x = batch().permute(0, 3, 1, 2) / 127.5 - 1
    torch.manual_seed(7)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled="loop.precision=bf16" in more):
        posterior = by_hand.encode(x).latent_dist
        y = by_hand.decode(posterior.sample()).sample
    close = {"rtol": 1e-2 if "loop.precision=bf16" in more else 1e-3, "atol": 1e-6}
    torch.testing.assert_close(values["l1"], torch.nn.functional.l1_loss(y.float(), x), **close)
    torch.testing.assert_close(values["l2"], torch.nn.functional.mse_loss(y.float(), x), **close)
    assert ("kl" in values) == (not nets.model.deterministic)
    if "kl" in values:
        divergence = posterior.kl().float().mean() / posterior.mean[0].numel()  # diffusers sums over the latent
        torch.testing.assert_close(
            values["kl"], divergence, rtol=1e-2 if "loop.precision=bf16" in more else 1e-3, atol=0
        )
    names = ("l1", "l2", "wavelet", "gaussian")
    total = values["adversarial_weight"] * values["adversarial"]
    total = total + sum(getattr(nets.config.loss, name).weight * values[name] for name in names)
    torch.testing.assert_close(values["loss"], total + 2.1e-8 * values.get("kl", 0), **close)

    later = one_step(nets, images=4)
    assert later["l1"] < values["l1"]
    assert later["l2"] < values["l2"]


# --- GANs ------------------------------------------------------------------------------------------------------------

KINDS = [(kind, loss) for kind in ("unet", "patch", "stylegan") for loss in ("hinge", "logistic")]


def gan(kind="unet", loss="hinge", *more):
    return [f"loss.adversarial.kind={kind}", f"loss.adversarial.loss={loss}", "loss.adversarial.start=0", *more]


def one_step(nets, seed=7, images=0, of=0):
    torch.manual_seed(seed)
    return nets.step(batch(of), images)


@pytest.mark.parametrize(("kind", "loss"), KINDS)
def test_the_two_gan_steps_do_not_touch_each_other(networks, kind, loss):
    fresh = networks(*gan(kind, loss))
    both, made, judged = (networks(*gan(kind, loss)) for _ in range(3))
    made.disc_optimizer.step = lambda lr: made.disc.zero_grad() or {}  # only the generator moves
    judged.optimizer.step = lambda lr: judged.model.zero_grad() or {}  # only the discriminator
    for nets in (both, made, judged):
        one_step(nets)
        assert all(p.grad is None for p in [*nets.model.parameters(), *nets.disc.parameters()])

    def same(one, other):
        return [torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)]

    assert all(same(made.model, both.model))
    assert all(same(judged.disc, both.disc))
    assert all(same(judged.model, fresh.model))
    assert all(same(made.disc, fresh.disc))
    assert not all(same(both.disc, fresh.disc))
    assert not all(same(both.model, fresh.model))


@pytest.mark.parametrize(("kind", "loss"), KINDS)
def test_the_discriminator_learns_to_tell_real_from_fake(networks, kind, loss):
    nets = networks(*gan(kind, loss))
    x = to_tensor(torch.from_numpy(np.stack(batch())))
    with torch.no_grad():
        fake = nets.net(x)[0]
    for _ in range(25):
        values = nets._discriminator_step([(x, fake)], 0, lr=0.005)
    assert values["logits_real"] > values["logits_fake"] + 0.5


@pytest.mark.parametrize("loss", ["hinge", "logistic"])
def test_adaptive_weight_and_gradient_ratio_are_autograds(networks, loss):
    """Of a UNet discriminator, in which nothing is drawn."""
    nets, by_hand = (networks(*gan("unet", loss), "loss.adversarial.adaptive=true") for _ in range(2))
    values = one_step(nets)
    x = to_tensor(torch.from_numpy(np.stack(batch())))
    torch.manual_seed(7)
    y, posterior = by_hand.net(x)
    others, _ = by_hand.objective(x, y, posterior, 0)
    made = by_hand.disc(y)
    per_head = [-head.mean() if loss == "hinge" else -torch.nn.functional.logsigmoid(head).mean() for head in made]
    last = by_hand.model.decoder.conv_out.weight
    a, b = (torch.autograd.grad(t, last, retain_graph=True)[0].norm() for t in (others, sum(per_head) / 2))
    weight = 0.1 * 0.5 * a / (b + 1e-4)
    torch.testing.assert_close(values["adversarial"], sum(per_head) / 2)
    torch.testing.assert_close(values["adversarial_weight"], weight, rtol=1e-4, atol=0)
    torch.testing.assert_close(values["gradient_ratio"], weight * b / a, rtol=1e-4, atol=0)
    torch.testing.assert_close(values["loss"], others + weight * values["adversarial"], rtol=1e-4, atol=0)

    constant = one_step(networks(*gan("unet", loss), "loss.adversarial.ratio_every=1"))
    assert "adversarial_weight" not in constant
    torch.testing.assert_close(constant["gradient_ratio"], 0.1 * b / a, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("option", "key"),
    [("ratio_every=2", "gradient_ratio"), ("r1=1 loss.adversarial.r1_every=2", "r1")],
    ids=["ratio", "r1"],
)
def test_what_is_due_every_so_many_steps_of_each_stage(networks, option, key):
    stages = "stages=[{resolution: 32, images: 18, batch_size: 4}, {resolution: 32, images: 40, batch_size: 8}]"
    nets = networks(*gan(), stages, *f"loss.adversarial.{option}".split())
    positions = [0, 4, 8, 12, 16, 20, 28, 36]  # the first stage's last batch goes beyond it
    assert [at for at in positions if key in one_step(nets, images=at)] == [0, 8, 16, 20, 36]


def test_r1_is_autograds_and_moves_the_discriminator_alone(networks):
    more = [*gan("stylegan", "logistic"), "optim.accumulate=2"]
    penalty = ["loss.adversarial.r1=3", "loss.adversarial.r1_every=4"]
    nets, by_hand, without = networks(*more, *penalty), networks(*more), networks(*more)
    gradients = {}
    for name, p in nets.disc.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: gradients.update({name: p.grad.clone()}))
    values = one_step(nets)
    one_step(without)
    for a, b in zip(nets.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(a, b)

    x = to_tensor(torch.from_numpy(np.stack(batch())))
    torch.manual_seed(7)
    fake = torch.cat([by_hand.model(part, sample_posterior=True).sample.detach() for part in x.chunk(2)])
    total, norms = torch.zeros(()), []
    for real, made in zip(x.chunk(2), fake.chunk(2), strict=True):
        real.requires_grad_()
        (logits,), (lies,) = by_hand.disc(real), by_hand.disc(made)
        softplus = torch.nn.functional.softplus
        (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
        norms.append(slope.square().sum() / 2)
        total = total + (softplus(-logits).mean() + softplus(lies).mean()) / 2 + 3 * 4 * norms[-1]
    (total / 2).backward()
    torch.testing.assert_close(values["r1"], (norms[0] + norms[1]) / 2, rtol=1e-4, atol=0)
    assert values["r1"] > 0
    for name, p in by_hand.disc.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-6)


def test_lecam_adds_to_the_discriminators_loss_and_remembers(networks):
    nets, without = networks(*gan("patch"), "loss.adversarial.lecam=0.5"), networks(*gan("patch"))
    assert "lecam" not in without.state()
    assert nets.state()["lecam"]["means"].isnan().all()
    values, plain = one_step(nets), one_step(without)
    means = torch.stack([values["logits_real"], values["logits_fake"]])
    torch.testing.assert_close(nets.state()["lecam"]["means"], means)  # the first step's are its own
    assert values["lecam"] > 0
    assert "lecam" not in plain
    torch.testing.assert_close(values["discriminator"], plain["discriminator"])
    changed = zip(nets.disc.parameters(), without.disc.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in changed)
    later = one_step(nets, images=4)
    now = torch.stack([later["logits_real"], later["logits_fake"]])
    torch.testing.assert_close(nets.state()["lecam"]["means"], 0.99 * means + 0.01 * now)


def test_cutmix_is_drawn_alike_on_all_ranks_and_not_at_all_at_zero(networks, monkeypatch):
    ranks = [networks(*gan(), "loss.adversarial.cutmix=0.5") for _ in range(2)]
    keys = [[set(one_step(nets, rank, at, rank)) for rank, nets in enumerate(ranks)] for at in range(0, 20, 4)]
    assert all(one == other for one, other in keys)
    assert len({"cutmix" in one for one, _ in keys}) == 2

    plain, always = networks(*gan()), networks(*gan(), "loss.adversarial.cutmix=1")
    with_it = one_step(always)
    draw = losses.cutmix_mask
    monkeypatch.setattr(losses, "cutmix_mask", None)
    without = one_step(plain)
    monkeypatch.setattr(losses, "cutmix_mask", draw)
    assert set(with_it) - set(without) == {"cutmix"}
    assert with_it["cutmix"] > 0
    torch.testing.assert_close(with_it["discriminator"], without["discriminator"])  # of whole images
    assert with_it["discriminator_gradient_norm"] != without["discriminator_gradient_norm"]


# --- equivariance ---------------------------------------------------------------------------------------------------

EQUIVARIANT = ["stages=[{resolution: 32, images: 32, batch_size: 4}]", "equivariance.share=1"]


def test_transformed_latents_are_compared_with_transformed_images(networks, monkeypatch):
    nets = networks(*EQUIVARIANT, *gan(), "loss.ldl.weight=1", "loop.ema=0.9")
    monkeypatch.setattr(vae, "draw_transform", lambda random, side, smallest: SpatialTransform(0.5, 1))
    seen = {}
    compare, judge = nets.objective.forward, nets.adversarial.discriminator_loss
    monkeypatch.setattr(nets.objective, "forward", lambda *a: seen.update(compared=a) or compare(*a))
    monkeypatch.setattr(nets.adversarial, "discriminator_loss", lambda *a: seen.update(judged=a) or judge(*a))
    values = nets.step(batch(), 4)
    x = to_tensor(batch()).to(memory_format=torch.channels_last)
    expected = torch.nn.functional.interpolate(x, size=(16, 16), mode="bilinear", antialias=True).rot90(1, (2, 3))
    target, reconstruction, _, _, averaged = seen["compared"]
    torch.testing.assert_close(target, expected)
    assert reconstruction.shape == averaged.shape == expected.shape
    assert torch.equal(seen["judged"][0], target)
    assert torch.equal(seen["judged"][1], reconstruction)
    assert torch.isfinite(values["loss"])


def test_the_decoder_is_given_the_transformed_latents(networks):
    nets = networks()
    model, x = ready(nets).model, to_tensor(batch())
    transform = SpatialTransform(0.5, 2)
    with torch.no_grad():
        found, posterior = nets.net(x, False, transform)
        z = torch.nn.functional.interpolate(model.encode(x).latent_dist.mode(), (2, 2), mode="bilinear", antialias=True)
        expected = model.decode(z.rot90(2, (2, 3))).sample
    torch.testing.assert_close(found, expected)
    assert posterior.mean.shape[-2:] == (4, 4)


def test_transforms_are_drawn_alike_on_all_ranks_and_not_at_all_at_zero(networks):
    more = ["equivariance.share=0.5", "equivariance.smaller=0.5"]
    ranks = [networks(*more) for _ in range(2)]
    drawn = []
    for at in range(0, 160, 4):
        found = [nets._equivariance(torch.rand(2, 3, 32, 32), at, 0) for nets in ranks]
        (x, transform), (other, same) = found
        assert (x.shape, transform) == (other.shape, same)
        drawn.append("latents" if transform else "images" if x.shape[-1] < 32 else "neither")
    assert 10 < drawn.count("latents") < 30
    assert 4 < drawn.count("images") < 18
    assert drawn.count("neither") > 3
    x = torch.rand(2, 3, 32, 32)
    assert networks()._equivariance(x, 0, 0) == (x, None)


# --- LDL and ESRGAN --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_ldl_is_of_the_averaged_models_reconstruction(networks, norm):
    nets = networks("loss.ldl.weight=2", "loop.ema=0.9", "optim.lr=0.01", f"model.decoder.norm={norm}")
    for n in range(3):
        one_step(nets, images=4 * n, of=n)
    x = to_tensor(torch.from_numpy(np.stack(batch())))
    buffers = {name: buffer.clone() for name, buffer in nets.model.named_buffers()}
    with torch.no_grad():
        torch.manual_seed(7)
        y = nets.net(x)[0]
        with nets.averaged():
            averaged = nets.model(x, sample_posterior=False)[0]
    for name, buffer in nets.model.named_buffers():
        buffer.copy_(buffers[name])
    expected = losses.ldl(x, y, averaged)
    assert expected > 0
    assert not torch.allclose(expected, losses.ldl(x, y, y))
    weights = {name: p.clone() for name, p in nets.ema.average.items()}
    steps = nets.ema.updates
    values = one_step(nets, images=12)
    torch.testing.assert_close(values["ldl"], expected)
    terms = {"l1": 1, "kl": 2.1e-8, "wavelet": 1, "gaussian": 0.5, "ldl": 2}
    torch.testing.assert_close(values["loss"], sum(weight * values[name] for name, weight in terms.items()))
    assert nets.ema.updates == steps + 1
    assert any(not torch.equal(p, nets.ema.average[name]) for name, p in weights.items())
    counted = [int(b) for name, b in nets.model.named_buffers() if name.endswith("num_batches_tracked")]
    assert counted == [4] * len(counted)  # once a step, not twice
    assert bool(counted) == (norm == "batch")


@pytest.fixture(scope="module")
def vgg19(tmp_path_factory):
    """Random weights of its convolutions, in torchvision's names."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    network = models.vgg19(weights=None).features
    torch.save({f"features.{name}": value for name, value in network.state_dict().items()}, path)
    return path, network


def test_esrgans_loss_is_l1_of_vgg19s_last_convolution(networks, vgg19):
    path, network = vgg19
    nets = networks("loss.esrgan.weight=0.7", f"loss.esrgan.weights={path}")
    torch.manual_seed(7)
    x = to_tensor(torch.from_numpy(np.stack(batch())))
    with torch.no_grad():
        torch.manual_seed(7)
        y = nets.net(x)[0]
        mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        a, b = (network[:35](((image + 1) / 2 - mean) / deviation) for image in (x, y))
    values = one_step(nets)
    torch.testing.assert_close(values["esrgan"], (a - b).abs().mean(), rtol=1e-4, atol=0)
    terms = {"l1": 1, "kl": 2.1e-8, "wavelet": 1, "gaussian": 0.5, "esrgan": 0.7}
    torch.testing.assert_close(values["loss"], sum(weight * values[name] for name, weight in terms.items()))
    assert all(p.grad is None for p in nets.objective.parameters())


# --- state -----------------------------------------------------------------------------------------------------------

R1 = ["loss.adversarial.r1=0.1", "loss.adversarial.r1_every=2"]
VARIANTS = {
    "patch": [*gan("patch", "logistic"), "loss.adversarial.lecam=0.1", "loop.ema=0.9"],
    "stylegan": [*gan("stylegan", "logistic"), *R1],
    "unet": [*gan(), "loss.adversarial.cutmix=0.5", "loss.adversarial.adaptive=true", "loss.adversarial.ratio_every=3"],
    "late": [*gan("patch"), "loss.adversarial.start=8", "loss.adversarial.lecam=0.1", "optim.accumulate=2"],
    "ldl": ["loss.ldl.weight=1", "loss.adversarial.weight=0", "loop.ema=0.9"],
    "equivariance": [*gan(), "equivariance.share=0.5"],
    "batch": ["loss.ldl.weight=1", "loop.ema=0.9", "model.decoder.norm=batch", *gan("patch")],
}


def assert_same(one, other, path=""):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for n, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}.{n}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one.nan_to_num(), other.nan_to_num()), path  # NaN: LeCam's means before the first step
    else:
        assert one == other, path


def advance(nets, start, end=16, rank=0):
    for at in range(start, end, 4):
        one_step(nets, order.seed_for(0, at, rank), at, at + rank)


# "late" and "unet" keep what most others do
@pytest.mark.parametrize(
    "variant", [pytest.param(each, marks=[pytest.mark.slow] * (each in ("patch", "ldl", "batch"))) for each in VARIANTS]
)
def test_what_goes_on_ends_with_the_same_bits(networks, variant):
    more = [*VARIANTS[variant], "stages=[{resolution: 32, images: 16, batch_size: 4}]"]
    nets = networks(*more)
    folders = {}
    for at in (4, 12, 16):
        advance(nets, at - 8 if at == 12 else at - 4, at)
        folders[at] = checkpoint.save(nets.state())
    again = networks(*more)  # from the first turn on in a state that has to be overwritten, all of it
    for at, folder in folders.items():
        state = checkpoint.load(folder)
        again.load(copy.deepcopy(state))
        assert_same(again.state(), state)
        advance(again, at)
        assert_same(again.state(), nets.state())


JOINT = {name: VARIANTS[name] for name in ("stylegan", "unet", "batch")}
JOINT["patch"] = [*gan("patch"), *R1, "loss.adversarial.lecam=0.1", "optim.accumulate=2"]


def as_rank(rank, folder, uri):
    """One of two processes: each variant's steps on other images, and its state into `folder`."""
    ray.train.torch.prepare_model = DistributedDataParallel
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    for name, more in JOINT.items():
        stages = "stages=[{resolution: 32, images: 16, batch_size: 4}]"
        nets = Networks(configured(uri, *more, stages), lpips=False, device=torch.device("cpu"))
        advance(nets, 0, 12, rank)
        with nets.averaged():
            judged = {key: value.clone() for key, value in nets.model.state_dict().items()}
        torch.save({"all": nets.state(), "judged": judged}, f"{folder}/{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_stay_alike(networks, photos, tmp_path):
    torch.multiprocessing.spawn(as_rank, (str(tmp_path), str(photos)), nprocs=2)
    for name in JOINT:
        one, other = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1))
        assert_same(one, other, name)
    alone = networks(*JOINT["patch"])
    advance(alone, 0, 12)
    joint = torch.load(tmp_path / "patch-0.pt")["all"]["discriminator"]
    assert not all(torch.equal(joint[name], value) for name, value in alone.disc.state_dict().items())


# --- runs that begin with another's checkpoint, and runs of older versions ------------------------------------------


@pytest.fixture
def begin(networks, tmp_path, monkeypatch):
    """What a worker of a new run does with a checkpoint of another: (networks, images seen)."""
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)

    def resume(folder, *more):
        nets = networks(*more)
        nets.digest = "of other data"
        setup = TrainSetup(config={}, folder=str(tmp_path), data="", begin=str(folder), handle=untracked())
        return nets, loop._resume(nets, "train_vae new", setup, rank=0)

    return resume


def saved(nets, images=8):
    advance(nets, 0, images)
    return checkpoint.save(nets.state() | {"images": images, "digest": "of its data"})


def test_a_run_begins_with_anothers_checkpoint(networks, begin, capsys):
    nets = networks(*VARIANTS["patch"])
    nets_again, images = begin(saved(nets), *VARIANTS["patch"], "loss.l1.weight=3", "optim.lr=0.01")
    assert images == 8
    assert "train_vae new: continues after 8 images" in capsys.readouterr().out
    assert_same(nets_again.state()["model"], nets.state()["model"])
    assert_same(nets_again.state()["discriminator"], nets.state()["discriminator"])
    assert_same(nets_again.state()["lecam"], nets.state()["lecam"])
    assert begin("")[1] == 0


def test_what_the_new_run_sets_of_the_optimizer_counts(networks, begin):
    folder = saved(networks(*VARIANTS["ldl"], "optim.betas=[0.5, 0.9]"))
    nets, _ = begin(folder, *VARIANTS["ldl"], "optim.betas=[0.8, 0.95]", "optim.weight_decay=0.1")
    state = nets.state()["optimizer"]
    assert state["param_groups"][0]["betas"] == (0.8, 0.95)
    assert state["param_groups"][0]["weight_decay"] == 0.1
    assert_same(state["state"], checkpoint.load(folder)["optimizer"]["state"])


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["model.conv1x1=true"], "LiteVAE"),
        ([WHOLE, "model.encoder=dwt", "model.latent_channels=12"], "LiteVAE"),
        (["loop.ema=0.9"], "it has no 'ema'"),
        (["loss.adversarial.weight=0.1"], "it has no 'discriminator'"),
    ],
)
def test_a_checkpoint_of_another_model_is_one_message(networks, begin, more, reason):
    folder = saved(networks("loss.adversarial.weight=0"), 4)
    with pytest.raises(UserError) as error:
        begin(folder, "loss.adversarial.weight=0", *more)
    assert str(error.value).startswith(f"begin={folder} is a checkpoint of another model")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_run_with_checkpoints_of_its_own_no_longer_needs_what_it_began_with(photos, tmp_path, monkeypatch):
    def started(_):
        raise UserError("started")

    monkeypatch.setattr(cluster, "start", started)
    config = configured(photos, f"root={tmp_path}", "name=new", "begin=/gone")
    with pytest.raises(UserError, match="begin=/gone is not a checkpoint folder"):
        train_vae(config)
    own = tmp_path / "new" / "checkpoint-000000000008"
    own.mkdir(parents=True)
    torch.save({}, own / checkpoint.STATE)
    run_folder.write_config(str(own.parent), config)
    with pytest.raises(UserError, match="^started$"):
        train_vae(config)


def test_a_run_from_before_a_field_was_there_had_its_default(photos, tmp_path):
    folder = tmp_path / "run"
    assert not run_folder.open_run(str(folder), configured(photos, WHOLE), MAY_CHANGE)
    leave_checkpoint(folder)
    values = yaml.safe_load((folder / "config.yaml").read_text())
    newer = {"": ["begin"], "model": ["extractor", "levels"], "loss": ["esrgan", "ldl"]}
    for section, names in newer.items():
        for name in names:
            del (values[section] if section else values)[name]
    del values["loss"]["adversarial"]["r1"], values["model"]["decoder"]["output"]
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    assert run_folder.open_run(str(folder), configured(photos, WHOLE), MAY_CHANGE)
    for other, message in (
        ("loss.adversarial.r1=1", "loss.adversarial.r1: was 0.0, is 1.0"),
        ("model.levels=[2, 3]", r"model.levels: was \[1, 2, 3\], is \[2, 3\]"),
        ("model.encoder=B", "model.encoder: was 'S', is 'B'"),
        ("begin=/elsewhere", "begin: was '', is '/elsewhere'"),
    ):
        with pytest.raises(UserError, match=message):
            run_folder.open_run(str(folder), configured(photos, other), MAY_CHANGE)


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
        (["modell.encoder=S"], "unknown config key 'modell.encoder'; did you mean model.encoder=S?"),
        (["model.encoder=dwt"], "model.encoder=dwt has 12 latent channels: model.latent_channels=12"),
        (["model.encoder=dwt", "model.latent_channels=12", "model.levels=[2, 3]"], "levels is for sizes S, B, M, L"),
        (["model.levels=[]"], "model.levels: "),
        (["model.levels=[4]"], "model.levels.0: "),
        (["model.levels=[3, 2]"], "levels=[3, 2] must be some of 1, 2, 3"),
        (["loss.adversarial.cutmix=0.5", "loss.adversarial.kind=patch"], "cutmix needs a discriminator with a head"),
        (["loss.ldl.weight=1"], "set loop.ema"),
        (["checkpointing=true", "model.decoder.norm=batch"], "count each batch twice in batch norm's statistics"),
        (
            ["loss.adversarial.kind=stylegan", "stages=[{resolution: 16, images: 8, batch_size: 8}]"],
            "needs larger images than a stage's resolution of 16",
        ),
        (
            ["loss.adversarial.kind=stylegan", "equivariance.share=0.5"],
            "needs larger images than the 8 px that equivariance.smallest makes of a stage's 32 px",
        ),
        (["loss.esrgan.weight=1", "loss.esrgan.weights=/nowhere.pth"], "no weights file at /nowhere.pth"),
        (["loss.esrgan.weight=1"], "vgg19-dcbb9e9d.pth does not exist. Put the file there"),
        (["begin=/nowhere"], "begin=/nowhere is not a checkpoint folder of a run"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(photos, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    init = tmp_path / "other"
    LiteVAE("S", latent_channels=12, block_out_channels=(8, 8, 8, 8)).save_pretrained(init)
    root = tmp_path / "runs"
    words = [*SMALL, f"data.train.uri={photos}", f"root={root}", "stages=[{resolution: 32, images: 8, batch_size: 8}]"]
    assert main(TrainVAE, train_vae, [*words, *(word.replace("{init}", str(init)) for word in more)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message.replace("{init}", str(init)) in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert not root.exists()


def test_missing_lpips_weights_turn_the_term_off_and_say_so(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert not lpips_or_warning(configured(photos, "loss.lpips.weight=1"), required=False)
    assert "warning: loss.lpips is off" in capsys.readouterr().out
    with pytest.raises(UserError, match="no weights file"):  # one that was named must be there
        lpips_or_warning(configured(photos, "loss.lpips.weight=1", "loss.lpips.weights=/nowhere.pth"))


def test_init_takes_the_weights_of_a_model_folder(photos, tmp_path):
    model = build_model(configured(photos, "seed=9"))
    model.save_pretrained(tmp_path)
    again = build_model(configured(photos, f"model.init={tmp_path}"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    AutoencoderTiny().save_pretrained(tmp_path / "tiny")
    with pytest.raises(UserError, match="of class AutoencoderTiny, not LiteVAE"):
        build_model(configured(photos, f"model.init={tmp_path}/tiny"))


def test_init_takes_a_folder_from_before_a_field_was_there(photos, tmp_path):
    build_model(configured(photos, WHOLE, "seed=9")).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for name in ("levels", "extractor", "shared_extractor", "aggregator", "vit_grid", "conv1x1", "output"):
        del values[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    build_model(configured(photos, WHOLE, f"model.init={tmp_path}"))
    with pytest.raises(UserError, match=r"is another model: levels \[1, 2, 3\], not \[2, 3\]"):
        build_model(configured(photos, f"model.init={tmp_path}", "model.levels=[2, 3]"))


# --- whole runs -----------------------------------------------------------------------------------------------------


def words(photos, root, *more):
    return [
        *SMALL, f"data.train.uri={photos}", f"data.val.uri={photos}", f"root={root}", "name=run", "ray.workers=2",
        "ray.cpus_per_worker=1", "loop.ema=0.9",
        "stages=[{resolution: 32, images: 80, batch_size: 8}, {resolution: 40, images: 240, batch_size: 8}]",
        "loop.checkpoint_every=16", "loop.val_every=160", "loop.log_every=5", "loss.adversarial.start=40", *more,
    ]  # fmt: skip


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
    root, shown = tmp_path_factory.mktemp("undisturbed"), io.StringIO()
    with redirect_stdout(shown):
        train_vae(load(TrainVAE, None, words(photos, root)))
    return root, shown.getvalue()


@pytest.mark.slow
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
    (psnr,) = [line["val/psnr"] for line in logged if line["step"] == 320 and "val/psnr" in line]
    assert psnr == pytest.approx(expected, abs=1e-3)  # over both ranks' images; another batch rounds otherwise
    assert f"psnr {psnr:.4g}" in shown
    assert (root / "run" / "images").is_dir()
    assert sorted(p.name for p in (root / "run").glob("checkpoint-*"))[-1] == "checkpoint-000000000320"


@pytest.mark.chaos
def test_a_run_that_is_stopped_and_loses_a_worker_ends_with_the_same_weights(undisturbed, photos, tmp_path):
    """SIGTERM, then SIGKILL for one of two workers."""
    run, log = tmp_path / "run", tmp_path / "log.txt"
    metrics = run / "metrics.jsonl"

    def start(*more):
        job = [sys.executable, str(REPO / "jobs" / "train_vae.py")]
        with log.open("w") as file:
            return subprocess.Popen(
                [*job, *words(photos, tmp_path, "tracking.enabled=true", *more)], stdout=file, stderr=subprocess.STDOUT
            )

    def newest():
        return max((int(path.parent.name[-12:]) for path in run.glob("checkpoint-*/state.pt")), default=0)

    process = start("loop.checkpoint_every=1000")
    wait_for(lambda: metrics.exists() and metrics.stat().st_size, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(400) == 143, log.read_text()
    shown = log.read_text()
    assert "Traceback" not in shown
    (images,) = re.findall(r"stopped after ([\d,]+) images; the checkpoint is in .*continues", shown)
    assert 0 < newest() == int(images) < 240
    assert not (run / "stop").exists()
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (tracked,) = client.search_runs([client.get_experiment_by_name("litevae").experiment_id])
    assert tracked.info.status == "KILLED"

    process = start()
    wait_for(lambda: newest() > int(images), process)
    assert f"continues after {images} images" in log.read_text()
    family = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in family if "ray::RayTrainWorker" in " ".join(child.cmdline())]
    assert len(workers) == 2
    os.kill(workers[1].pid, signal.SIGKILL)
    assert process.wait(400) == 0, log.read_text()
    assert log.read_text().count("continues after") >= 2  # the driver's, and then the workers'
    assert weights(tmp_path) == weights(undisturbed[0])


@pytest.mark.slow
def test_a_new_run_goes_on_from_anothers_checkpoint(undisturbed, photos, tmp_path, capsys):
    begin = undisturbed[0] / "run" / "checkpoint-000000000320"
    train_vae(load(TrainVAE, None, words(photos, tmp_path, f"begin={begin}", "loop.val_every=0")))
    assert "continues after 320 images" in capsys.readouterr().out
    assert weights(tmp_path) == weights(undisturbed[0])  # nothing was left to train
