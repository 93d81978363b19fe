"""The discriminators: sizes, their parts against networks written out, and the ways a GAN's training step uses them."""

import copy
import math
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scipy.signal import convolve2d
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from litevae import discriminators
from litevae.discriminators import (
    Discriminator,
    EqualizedConv2d,
    EqualizedLinear,
    PatchDiscriminator,
    SpectralConv2d,
    StyleGANDiscriminator,
    UNetDiscriminator,
    build_discriminator,
)
from litevae.errors import UserError
from litevae.losses import hinge_discriminator, hinge_generator, r1

KINDS = ["unet", "patch", "stylegan"]


def images(count: int, size: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def discriminator(channels: int = 4) -> UNetDiscriminator:
    torch.manual_seed(0)
    return UNetDiscriminator(channels)


def build(kind: str, channels: int = 4) -> Discriminator:
    torch.manual_seed(0)
    return build_discriminator(kind, channels)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, real: torch.Tensor, fake: torch.Tensor) -> None:
    """One discriminator step: two forward passes, then one backward through them and through R1's gradient."""
    optimizer.zero_grad(set_to_none=True)
    real = real.clone().requires_grad_()
    logits = model(real)
    (hinge_discriminator(logits, model(fake)) + 1e-5 * r1(logits, real)).backward()
    optimizer.step()


def parameters(network: type[nn.Module]) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in network().parameters())


class StyleGAN2At256(StyleGANDiscriminator):
    """As published for 256 pixels: a block more."""

    MULTIPLES = (2, 4, 8, 8, 8, 8, 8)


@pytest.mark.parametrize(
    ("network", "count"),
    [
        (UNetDiscriminator, 31_481_602),
        (PatchDiscriminator, 2_765_633),  # published
        (StyleGAN2At256, 28_864_129),  # published
        (StyleGANDiscriminator, 28_389_121),
    ],
)
def test_parameters_at_the_default_width(network, count):
    assert parameters(network) == count


def test_kinds():
    built = [build(kind) for kind in KINDS]
    assert [type(model) for model in built] == [UNetDiscriminator, PatchDiscriminator, StyleGANDiscriminator]
    assert all(isinstance(model, Discriminator) for model in built)
    with pytest.raises(UserError, match="'wgan'; choose one of unet, patch, stylegan"):
        build_discriminator("wgan", 64)


@pytest.mark.parametrize("kind", KINDS)
def test_says_whether_images_influence_each_other(kind):
    model, x = build(kind), images(4)
    other = torch.cat([x[:1], -x[1:]])
    alone = all(torch.allclose(a[0], b[0], rtol=1e-5) for a, b in zip(model(x), model(other), strict=True))
    assert alone != model.mixes_images


@pytest.mark.parametrize("size", [8, 64, 72, 96, 128, 160, 256])
def test_unet_takes_any_size(size):
    overall, per_pixel = discriminator()(images(2, size))
    assert overall.shape == (2, 1)
    assert per_pixel.shape == (2, 1, size, size)


@pytest.mark.parametrize(("count", "size"), [(2, 32), (3, 45), (8, 64)])  # few positions, odd sizes, many positions
def test_unet_is_the_network_written_out(count, size):
    model, x = discriminator().double().eval(), images(count, size).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

    def convolved(layer: SpectralConv2d, h: torch.Tensor) -> torch.Tensor:
        return F.conv2d(h, layer.normalized_weight(), layer.bias, padding=layer.padding)

    def block(part: nn.Module, h: torch.Tensor, first: bool) -> torch.Tensor:
        inner = convolved(part.conv1, h if first else h.relu())
        return convolved(part.conv2, inner.relu()) + convolved(part.skip, h)

    maps = [x]
    for n, part in enumerate(model.down):
        maps.append(F.avg_pool2d(block(part, maps[-1], n == 0), 2, ceil_mode=True))
    h = maps.pop()
    overall = convolved(model.global_head, 16 * h.relu().mean((2, 3), keepdim=True)).flatten(1)
    for part in model.up:
        skip = maps.pop()
        h = block(part, F.interpolate(h, size=skip.shape[-2:], mode="nearest"), False)
        h = torch.cat([h, skip], dim=1) if maps else h
    torch.testing.assert_close(model(x), (overall, model.pixel_head(h)))


def test_global_logit_keeps_its_scale_with_the_resolution():
    model = discriminator(16).eval()
    tile = torch.full((1, 3, 128, 128), 0.3)
    small, large = model(tile)[0], model(tile.repeat(1, 1, 2, 2))[0]
    torch.testing.assert_close(small, large, rtol=0.3, atol=0.02)


def test_each_head_trains_what_lies_before_it():
    model = discriminator()
    overall, per_pixel = model(images(2))
    overall.sum().backward(retain_graph=True)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith(("down", "global_head")), name
    model.zero_grad(set_to_none=True)
    per_pixel.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) != name.startswith("global_head"), name


def test_blocks_start_orthogonal_and_all_but_the_last_layer_are_normalised():
    model = discriminator()
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    plain = [module for module in convolutions if not isinstance(module, SpectralConv2d)]
    assert plain == [model.pixel_head]
    for convolution in convolutions:
        singular = torch.linalg.svdvals(convolution.weight.flatten(1))
        torch.testing.assert_close(singular, torch.ones_like(singular), rtol=1e-4, atol=0)


def test_normalised_weight_converges_to_spectral_norm_1():
    torch.manual_seed(0)
    layer = SpectralConv2d(6, 10, 3)
    nn.init.normal_(layer.weight)
    with torch.no_grad():
        for _ in range(200):
            layer(images(1, 8)[:, :1].expand(-1, 6, -1, -1))
    largest = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2)
    torch.testing.assert_close(layer.normalized_weight(), layer.weight / largest, rtol=1e-4, atol=1e-6)


def test_gradient_includes_that_of_the_norm():
    """Scaling the weight changes nothing, so the gradient is orthogonal to the weight."""
    torch.manual_seed(0)
    layer = SpectralConv2d(3, 5, 3)
    nn.init.normal_(layer.weight)
    for _ in range(200):
        layer.normalized_weight()
    (layer.normalized_weight() * torch.randn_like(layer.weight)).sum().backward()
    cosine = nn.functional.cosine_similarity(layer.weight.flatten(), layer.weight.grad.flatten(), dim=0)
    assert abs(cosine.item()) < 1e-5


def test_power_iteration_runs_in_training_only():
    model = discriminator()
    nn.init.normal_(model.down[1].conv1.weight)
    before = copy.deepcopy(model.state_dict())
    model.eval()(images(1))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.train()(images(1))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert "down.1.conv1.u" in changed
    assert all(key.endswith(".u") for key in changed)


@pytest.mark.parametrize("size", [24, 50, 64, 128])
def test_patch_is_the_network_written_out(size):
    model, x = build("patch"), images(3, size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms are not at their start
    state = dict(model.named_parameters())

    def normalized(h: torch.Tensor, n: int) -> torch.Tensor:
        mean = h.mean((0, 2, 3), keepdim=True)
        deviation = ((h - mean).square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        gain, bias = (state[f"layers.{n}.{name}"].view(1, -1, 1, 1) for name in ("weight", "bias"))
        return (h - mean) / deviation * gain + bias

    h = F.conv2d(x, state["layers.0.weight"], state["layers.0.bias"], stride=2, padding=1)
    for n, stride in ((2, 2), (5, 2), (8, 1)):
        h = F.conv2d(torch.where(h > 0, h, 0.2 * h), state[f"layers.{n}.weight"], stride=stride, padding=1)
        h = normalized(h, n + 1)
    h = F.conv2d(torch.where(h > 0, h, 0.2 * h), state["layers.11.weight"], state["layers.11.bias"], padding=1)
    (logits,) = model(x)
    torch.testing.assert_close(logits, h, rtol=1e-4, atol=1e-5)
    assert logits.shape == (3, 1, size // 8 - 2, size // 8 - 2)
    assert torch.equal(model.eval()(x)[0], logits)
    assert not [*model.buffers()]


def test_patch_starts_normal():
    model = PatchDiscriminator(32)
    for layer in model.layers:
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 1e5:
            assert abs(layer.weight.mean()) < 2e-4
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.01)
        elif isinstance(layer, nn.BatchNorm2d):
            assert layer.weight.mean().item() == pytest.approx(1, abs=0.01)
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.3)
            assert not layer.bias.any()


@pytest.mark.parametrize(("padding", "stride"), [(2, 1), (1, 2), (0, 2), (3, 1)])
@pytest.mark.parametrize("size", [8, 9])
def test_blur_is_scipys_convolution(padding, stride, size):
    x = images(1, size).double()
    taps = np.array([1, 3, 3, 1]) / 8
    planes = [convolve2d(np.pad(plane, padding), np.outer(taps, taps), mode="valid") for plane in x[0].numpy()]
    expected = torch.from_numpy(np.stack(planes))[None, :, ::stride, ::stride]
    torch.testing.assert_close(discriminators.binomial_blur(x, padding, stride), expected)


def deviation_by_loops(x: np.ndarray, most: int) -> np.ndarray:
    count = len(x)
    size = next(size for size in range(most, 0, -1) if count % size == 0)
    result = np.empty(count)
    for first in range(count // size):
        members = list(range(first, count, count // size))
        result[members] = np.mean(np.sqrt(np.var(x[members], axis=0) + 1e-8))
    return result


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 8, 9, 12])
def test_minibatch_deviation_by_loops(count):
    x = torch.randn(count, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = deviation_by_loops(x.double().numpy(), most=4)
    found = discriminators.minibatch_deviation(x)
    assert found.shape == (count, 1, 1, 1)
    np.testing.assert_allclose(found.flatten().numpy(), expected, rtol=1e-5)


def test_minibatch_deviation_by_hand():
    x = torch.tensor([1.0, 10.0, 3.0, 10.0, 5.0, 10.0, 7.0, 14.0]).view(8, 1, 1, 1)  # groups 0 2 4 6 and 1 3 5 7
    odd, even = math.sqrt(5), math.sqrt(3)
    assert discriminators.minibatch_deviation(x).flatten().tolist() == pytest.approx([odd, even] * 4)


@pytest.mark.parametrize("size", [32, 64, 100, 128, 256])
def test_stylegan_is_the_network_written_out(size):
    """With a dense blur kernel, StyleGAN2's paddings, runtime scales by hand and loops over groups."""
    model, x = build("stylegan", 2), images(6, size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    state = dict(model.named_parameters())

    def weight(name: str) -> torch.Tensor:
        w = state[f"{name}.weight"]
        return w * math.prod(w.shape[1:]) ** -0.5

    def act(h: torch.Tensor) -> torch.Tensor:
        return torch.where(h > 0, h, 0.2 * h) * 2**0.5

    def blur(h: torch.Tensor, before: int, after: int) -> torch.Tensor:
        kernel = torch.tensor([1.0, 3.0, 3.0, 1.0])
        kernel = (kernel[:, None] * kernel / kernel.sum() ** 2).expand(h.shape[1], 1, 4, 4)
        return F.conv2d(F.pad(h, (before, after, before, after)), kernel, groups=h.shape[1])

    def conv(h: torch.Tensor, name: str, **options) -> torch.Tensor:
        return F.conv2d(h, weight(name), state.get(f"{name}.bias"), **options)

    h = act(conv(x, "from_image"))
    for n in range(5):
        skip = conv(blur(h, 1, 1)[..., ::2, ::2], f"blocks.{n}.skip")
        h = act(conv(h, f"blocks.{n}.conv1", padding=1))
        h = act(conv(blur(h, 2, 2), f"blocks.{n}.conv2", stride=2))
        h = (h + skip) / 2**0.5
    assert h.shape[-1] == size // 32
    h = F.interpolate(h, size=(4, 4), mode="area")
    extra = torch.from_numpy(deviation_by_loops(h.detach().double().numpy(), most=4)).float()
    h = act(conv(torch.cat([h, extra.view(-1, 1, 1, 1).expand(-1, 1, 4, 4)], dim=1), "conv", padding=1))
    h = act(h.flatten(1) @ weight("linear1").T + state["linear1.bias"])
    (logits,) = model(x)
    assert logits.shape == (6, 1)
    torch.testing.assert_close(logits, h @ weight("linear2").T + state["linear2.bias"], rtol=1e-4, atol=1e-5)


def test_equalized_layers_keep_the_scale_and_start_from_the_unit_normal():
    torch.manual_seed(0)
    x = torch.randn(8, 64, 16, 16)
    for layer, output in (
        (conv := EqualizedConv2d(64, 64, 3), conv(x)),
        (linear := EqualizedLinear(64, 64), linear(x.movedim(1, -1))),
    ):
        assert layer.weight.std().item() == pytest.approx(1, rel=0.05)
        assert not layer.bias.any()
        assert output.std().item() == pytest.approx(1, rel=0.1)


def test_buffers_may_be_overwritten_between_forward_and_backward():
    """DDP broadcasts buffers in place at each forward."""
    gradients = []
    for overwrite in (False, True):
        model = discriminator()
        real = model(images(1))
        if overwrite:
            for buffer in model.buffers():
                buffer.copy_(buffer.clone())
        hinge_discriminator(real, model(images(1, seed=1))).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_normalisation_is_fp32_under_autocast():
    model = discriminator()
    layer = model.down[1].conv1
    plain = copy.deepcopy(layer).normalized_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(copy.deepcopy(layer).normalized_weight(), plain)
        overall, per_pixel = model(images(2))
        loss = hinge_generator((overall, per_pixel))
    assert overall.dtype == torch.bfloat16
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(buffer.dtype == torch.float32 for buffer in model.buffers())


@pytest.mark.parametrize("kind", KINDS)
def test_trains_under_autocast(kind):
    model = build(kind)
    x = images(4).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        real, fake = model(x), model(images(4, seed=1))
    assert all(head.dtype == torch.bfloat16 for head in real)
    (hinge_discriminator(real, fake) + 0.1 * r1(real, x)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    plain = torch.cat([head.flatten() for head in build(kind)(images(4))])
    torch.testing.assert_close(torch.cat([head.float().flatten() for head in real]), plain, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact(kind):
    def optimizer(model: nn.Module) -> torch.optim.Adam:
        return torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.5, 0.9))

    whole = build(kind)
    adam = optimizer(whole)
    for n in range(2):
        step(whole, adam, images(2, 32, n), images(2, 32, n + 10))
    saved = copy.deepcopy((whole.state_dict(), adam.state_dict()))
    resumed = build_discriminator(kind, 4)
    resumed.load_state_dict(saved[0])
    resumed_adam = optimizer(resumed)
    resumed_adam.load_state_dict(saved[1])
    for n in range(2, 5):
        step(whole, adam, images(2, 32, n), images(2, 32, n + 10))
        step(resumed, resumed_adam, images(2, 32, n), images(2, 32, n + 10))
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def train(kind: str, rank: int, workers: int) -> dict[str, torch.Tensor]:
    """Three GAN steps: the generator's through the bare, frozen discriminator, the discriminator's through DDP."""
    model = build(kind)
    wrapped = DistributedDataParallel(model) if workers > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for n in range(3):
        real, fake = (images(4, 32, seed).chunk(workers)[rank].clone() for seed in (n, n + 10))
        model.requires_grad_(False)
        hinge_generator(model(fake.requires_grad_())).backward()
        assert fake.grad is not None
        assert all(parameter.grad is None for parameter in model.parameters())
        model.requires_grad_(True)
        step(wrapped, optimizer, real, fake.detach())
        optimizer.zero_grad(set_to_none=True)
    return model.state_dict()


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    torch.save({kind: train(kind, rank, workers=2) for kind in KINDS}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory) -> list[dict[str, dict[str, torch.Tensor]]]:
    """What each of two workers has trained, by kind."""
    folder = tmp_path_factory.mktemp("workers")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_workers_stay_equal(kind, workers):
    first, second = (trained[kind] for trained in workers)
    start = build(kind).state_dict()
    assert first.keys() == start.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not any(torch.equal(first[key], start[key]) for key in first if key.endswith("weight"))


@pytest.mark.slow
def test_two_workers_train_as_one_where_images_do_not_mix(workers):
    for key, value in train("unet", 0, workers=1).items():
        torch.testing.assert_close(workers[0]["unet"][key], value, rtol=1e-4, atol=1e-6)
