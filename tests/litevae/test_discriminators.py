"""The UNet discriminator: size, spectral norm, and the ways a GAN's training step uses it."""

import copy
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from litevae.discriminators import SpectralConv2d, UNetDiscriminator
from litevae.losses import hinge_discriminator, hinge_generator


def images(count: int, size: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def discriminator(channels: int = 4) -> UNetDiscriminator:
    torch.manual_seed(0)
    return UNetDiscriminator(channels)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, real: torch.Tensor, fake: torch.Tensor) -> None:
    """One discriminator step: two forward passes, then one backward."""
    optimizer.zero_grad(set_to_none=True)
    hinge_discriminator(model(real), model(fake)).backward()
    optimizer.step()


def test_parameters_at_the_default_width():
    assert sum(parameter.numel() for parameter in UNetDiscriminator().parameters()) == 31_481_602


@pytest.mark.parametrize("size", [8, 64, 72, 96, 128, 160, 256])
def test_any_size(size):
    overall, per_pixel = discriminator()(images(2, size))
    assert overall.shape == (2, 1)
    assert per_pixel.shape == (2, 1, size, size)


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


def test_resume_is_exact():
    def optimizer(model: nn.Module) -> torch.optim.Adam:
        return torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.5, 0.9))

    whole = discriminator()
    adam = optimizer(whole)
    for n in range(2):
        step(whole, adam, images(2, 32, n), images(2, 32, n + 10))
    saved = copy.deepcopy((whole.state_dict(), adam.state_dict()))
    resumed = UNetDiscriminator(4)
    resumed.load_state_dict(saved[0])
    resumed_adam = optimizer(resumed)
    resumed_adam.load_state_dict(saved[1])
    for n in range(2, 5):
        step(whole, adam, images(2, 32, n), images(2, 32, n + 10))
        step(resumed, resumed_adam, images(2, 32, n), images(2, 32, n + 10))
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


def train(rank: int, workers: int) -> dict[str, torch.Tensor]:
    """Three GAN steps: the generator's through the bare, frozen discriminator, the discriminator's through DDP."""
    model = discriminator()
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
    torch.save(train(rank, workers=2), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_train_as_one(tmp_path):
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for key, value in train(0, workers=1).items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-6)
