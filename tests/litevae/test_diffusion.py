"""What a denoising network learns, against hand-computed values, diffusers' own schedulers and SciPy."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from scipy.special import expit
from scipy.stats import kstest, norm
from torch import nn

from litevae.denoiser import build_denoiser
from litevae.diffusion import EMA, Objective, random_numbers
from litevae.errors import UserError

SCHEDULES = {"sqrt-linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
DISCRETE = [
    Objective(prediction, schedule, zero_snr)
    for prediction in ("epsilon", "v")
    for schedule in SCHEDULES
    for zero_snr in (False, True)
    if prediction == "v" or not zero_snr
]


def named(objective: Objective) -> str:
    return f"{objective.prediction}-{objective.schedule}" + "-zero" * objective.zero_snr


def reference(objective: Objective) -> DDPMScheduler:
    return DDPMScheduler(1000, 0.0015, 0.0195, SCHEDULES[objective.schedule], rescale_betas_zero_snr=objective.zero_snr)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Answers(nn.Module):
    """Says what it is told to, and notes what it was asked."""

    def __init__(self, answer: torch.Tensor):
        super().__init__()
        self.answer, self.asked = answer, []

    def forward(self, sample, timestep, **more):
        self.asked.append((sample, timestep, more))
        return type("Output", (), {"sample": self.answer})


# --- noise levels, targets


def test_sqrt_linear_levels_by_hand():
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    expected = torch.from_numpy(np.cumprod(1 - betas))
    torch.testing.assert_close(Objective().scheduler().alphas_cumprod.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("objective", DISCRETE, ids=named)
def test_epsilon_and_v_are_those_of_diffusers(objective):
    z, noise = normal(6, 4, 8, 8), normal(6, 4, 8, 8, seed=1)
    u = torch.tensor([0.0, 0.0004, 0.25, 0.5009, 0.9989, 1 - 2**-24])
    batch = objective.noised(z, noise, u)
    noisy, timesteps, target, weights = batch.noisy, batch.timesteps, batch.target, batch.weights
    assert timesteps.tolist() == [0, 0, 250, 500, 998, 999]
    torch.testing.assert_close(noisy, reference(objective).add_noise(z, noise, timesteps))
    velocity = reference(objective).get_velocity(z, noise, timesteps)
    torch.testing.assert_close(target, noise if objective.prediction == "epsilon" else velocity)
    assert weights.tolist() == [1] * 6


def test_zero_snr_ends_in_noise_alone():
    z, noise = normal(1, 4, 8, 8), normal(1, 4, 8, 8, seed=1)
    batch = Objective("v", zero_snr=True).noised(z, noise, torch.tensor([0.9999]))
    noisy, timesteps, target = batch.noisy, batch.timesteps, batch.target
    assert timesteps.item() == 999
    assert torch.equal(noisy, noise)
    assert torch.equal(target, -z)


def test_flow_is_that_of_diffusers():
    z, noise, u = normal(4, 4, 8, 8), normal(4, 4, 8, 8, seed=1), torch.tensor([0.125, 0.25, 0.5, 0.75])
    batch = Objective("flow").noised(z, noise, u)
    noisy, timesteps, target = batch.noisy, batch.timesteps, batch.target
    assert timesteps.tolist() == [125, 250, 500, 750]
    torch.testing.assert_close(noisy, FlowMatchEulerDiscreteScheduler(1000).scale_noise(z, timesteps, noise))
    for n, t in enumerate(timesteps):  # one step of Euler's along the target leads to the image
        euler = FlowMatchEulerDiscreteScheduler(1000)
        euler.set_timesteps(sigmas=[t.item() / 1000])
        torch.testing.assert_close(euler.step(target[n], euler.timesteps[0], noisy[n]).prev_sample, z[n])


def test_flow_goes_from_the_image_to_noise():
    z, noise = normal(2, 4, 8, 8), normal(2, 4, 8, 8, seed=1)
    for times in ("uniform", "logit-normal"):
        batch = Objective("flow", times=times).noised(z, noise, torch.tensor([0.0, 1 - 2**-24]))
        noisy, timesteps = batch.noisy, batch.timesteps
        assert torch.equal(noisy[0], z[0])
        torch.testing.assert_close(noisy[1], noise[1], atol=0.05, rtol=0)
        assert timesteps[0] == 0
        assert 990 < timesteps[1] <= 1000


def test_logit_normal_times_are_scipys():
    u = torch.rand(2000, generator=torch.Generator().manual_seed(0))
    z = torch.zeros(2000, 1, 1, 1)
    times = Objective("flow", times="logit-normal").noised(z, z, u).timesteps / 1000
    np.testing.assert_allclose(times, expit(norm.ppf(u.double().numpy())), rtol=1e-5)
    assert kstest(np.log(times / (1 - times)).numpy(), "norm").pvalue > 0.01


# --- weights and the loss


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_min_snr_weighs_the_error_of_the_image(prediction, schedule):
    """By its definition: as if the network predicted z, with weight min(SNR, gamma)."""
    objective = Objective(prediction, schedule, weighting="min-snr", gamma=5.0)
    z, noise = normal(5, 4, 8, 8).double(), normal(5, 4, 8, 8, seed=1).double()
    u = torch.tensor([0.0003, 0.1, 0.3, 0.6, 0.95])
    bars = reference(objective).alphas_cumprod.double()[(u * 1000).long()].view(-1, 1, 1, 1)
    a, s, snr = bars.sqrt(), (1 - bars).sqrt(), (bars / (1 - bars)).flatten()
    assert snr[0] > 5 > snr[-1]  # both sides of gamma

    wrong = noise + 0.1 * normal(5, 4, 8, 8, seed=2)  # a network's noise, and the image that follows from it
    x = a * z + s * noise
    image = (x - s * wrong) / a
    answer = wrong if prediction == "epsilon" else a * wrong - s * image
    weighted, plain, _ = objective.loss(Answers(answer.float()), z.float(), noise.float(), u)
    torch.testing.assert_close(
        weighted.double(), snr.clamp(max=5) * ((image - z) ** 2).mean((1, 2, 3)), rtol=1e-3, atol=1e-9
    )
    assert torch.equal(
        plain, replace(objective, weighting="none").loss(Answers(answer.float()), z.float(), noise.float(), u)[0]
    )


@pytest.mark.parametrize(("prediction", "expected"), [("epsilon", [5 / 9, 1.0]), ("v", [5 / 10, 0.25 / 1.25])])
def test_min_snr_weights_by_hand(prediction, expected):
    weights = Objective(prediction, weighting="min-snr", gamma=5.0)._weights(torch.tensor([9.0, 0.25]))
    torch.testing.assert_close(weights, torch.tensor(expected))


@pytest.mark.parametrize(("gamma", "expected"), [(5.0, [1, 1 / 1, 5 / 5, 5 / 10]), (1.0, [1, 1 / 1.25, 1 / 5, 1 / 10])])
def test_min_snr_weights_of_zero_snr_by_hand(gamma, expected):
    objective = Objective("v", zero_snr=True, weighting="min-snr", gamma=gamma)
    weights = objective._weights(torch.tensor([0.0, 0.25, 4.0, 9.0]))
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_level_that_sampling_begins_at_is_trained(schedule):
    objective = Objective("v", schedule, zero_snr=True, weighting="min-snr")
    sampler = objective.scheduler()
    sampler.set_timesteps(20)
    z, noise = normal(1, 4, 8, 8), normal(1, 4, 8, 8, seed=1)
    answer = torch.zeros_like(z, requires_grad=True)
    losses = objective.loss(Answers(answer), z, noise, torch.tensor([0.9999]))
    assert losses.level.item() * 1000 == sampler.timesteps[0] == 999
    losses.weighted.sum().backward()
    torch.testing.assert_close(answer.grad, 2 * z / z.numel())  # v of pure noise is -z, and its weight is 1


def test_a_loss_by_hand():
    """z = 1, epsilon = -1, and a network that always says 1/2."""
    z, noise, u = torch.ones(2, 1, 2, 2), -torch.ones(2, 1, 2, 2), torch.tensor([0.25, 0.75])
    half = torch.full((2, 1, 2, 2), 0.5)
    network = Answers(half)
    loss, error, level = Objective("flow").loss(network, z, noise, u)
    assert loss.tolist() == error.tolist() == [6.25, 6.25]  # the target is -2
    assert level.tolist() == [0.25, 0.75]
    assert [t.item() for t in network.asked[0][0][:, 0, 0, 0]] == [0.5, -0.5]
    loss, _, level = Objective("epsilon").loss(Answers(half), z, noise, u)
    assert level.tolist() == [0.25, 0.75]
    assert loss.tolist() == [2.25, 2.25]
    bars = np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2)[[250, 750]]
    loss, *_ = Objective("v").loss(Answers(half), z, noise, u)
    np.testing.assert_allclose(loss, (0.5 + bars**0.5 + (1 - bars) ** 0.5) ** 2, rtol=1e-4)


def test_the_loss_is_one_value_an_image():
    z, noise, u = normal(3, 4, 8, 8), normal(3, 4, 8, 8, seed=1), torch.tensor([0.1, 0.5, 0.9])
    answer = normal(3, 4, 8, 8, seed=2)
    loss, *_ = Objective().loss(Answers(answer), z, noise, u)
    torch.testing.assert_close(loss, torch.stack([((a - b) ** 2).mean() for a, b in zip(answer, noise, strict=True)]))


def test_the_loss_is_fp32_under_autocast():
    network = build_denoiser("tiny", 4, 8)
    for objective in (Objective(weighting="min-snr"), Objective("v"), Objective("flow", times="logit-normal")):
        with torch.autocast("cpu", torch.bfloat16):
            losses = objective.loss(network, normal(2, 4, 8, 8), normal(2, 4, 8, 8), torch.tensor([0.2, 0.7]))
        assert [loss.dtype for loss in losses] == [torch.float32] * 3


def test_labels_reach_the_network():
    network = Answers(torch.zeros(2, 4, 8, 8))
    z, u = normal(2, 4, 8, 8), torch.tensor([0.2, 0.7])
    Objective().loss(network, z, z, u)
    Objective().loss(network, z, z, u, torch.tensor([3, 1]))
    assert network.asked[0][2] == {}
    assert network.asked[1][2]["class_labels"].tolist() == [3, 1]


@pytest.mark.parametrize(("objective", "expected"), [(Objective(), 1), (Objective("v"), 1), (Objective("flow"), 2)])
def test_who_predicts_zero_errs_by_the_targets_variance(objective, expected):
    z, (noise, u, _) = normal(200, 4, 8, 8), random_numbers(0, range(200), (4, 8, 8))
    loss, *_ = objective.loss(Answers(torch.zeros_like(z)), z, noise, u)
    assert loss.mean().item() == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize("prediction", ["epsilon", *(pytest.param(p, marks=pytest.mark.slow) for p in ("v", "flow"))])
def test_training_learns(prediction):
    torch.manual_seed(0)
    model, objective = build_denoiser("tiny", 4, 8), Objective(prediction)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    z = normal(1, 4, 8, 8).expand(16, -1, -1, -1)
    losses = []
    for step in range(25):
        noise, u, _ = random_numbers(0, range(16 * step, 16 * step + 16), (4, 8, 8))
        loss = objective.loss(model, z, noise, u)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_what_does_not_go_together_is_refused():
    for words, match in (
        (
            {"zero_snr": True},
            "zero_snr needs prediction=v: at a level of pure noise, predicting epsilon says nothing about the image",
        ),
        ({"prediction": "flow", "zero_snr": True}, "flow always has a level of pure noise"),
        ({"prediction": "flow", "weighting": "min-snr"}, "flow takes times=logit-normal"),
        ({"times": "logit-normal"}, "epsilon and v take weighting=min-snr"),
    ):
        with pytest.raises(UserError, match=match):
            Objective(**words)


# --- chance


def test_draws_depend_on_seed_and_position_alone():
    noise, u, dropped = random_numbers(7, [5, 0, 2**40], (4, 8, 8))
    assert noise.dtype == u.dtype == dropped.dtype == torch.float32
    for n, position in enumerate((5, 0, 2**40)):
        alone = random_numbers(7, [position], (4, 8, 8))
        assert all(torch.equal(a[0], b[n]) for a, b in zip(alone, (noise, u, dropped), strict=True))
    for other in (random_numbers(8, [5], (4, 8, 8)), random_numbers(7, [6], (4, 8, 8))):
        assert not torch.isclose(other[0][0], noise[0]).any()
        assert other[1][0] != u[0]


def test_draws_are_normal_and_uniform():
    noise, u, dropped = (values.double().numpy() for values in random_numbers(0, range(2000), (2, 2, 2)))
    assert kstest(noise.ravel(), "norm").pvalue > 0.01
    assert kstest(u, "uniform").pvalue > 0.01
    assert kstest(dropped, "uniform").pvalue > 0.01
    correlations = np.corrcoef(np.column_stack([u, dropped, noise.reshape(2000, -1)]).T)
    assert np.abs(correlations - np.eye(10)).max() < 0.1


# --- averaged weights


def noisy(module: nn.Module, scale: float = 0.05) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def test_ema_follows_its_recurrence():
    model = nn.Linear(1, 1, bias=False)
    values = [2.0, -1.0, 4.0, 0.5, 3.0, 8.0]
    nn.init.constant_(model.weight, values[0])
    ema, expected = EMA(model, decay=0.25), values[0]
    for n, value in enumerate(values[1:]):
        nn.init.constant_(model.weight, value)
        ema.update(model)
        decay = min(0.25, (1 + n) / (10 + n))  # .1, .1818, .25, .25, ...
        expected = decay * expected + (1 - decay) * value
        assert ema.average["weight"].item() == pytest.approx(expected)


def test_ema_swaps_in_and_back_even_after_an_error():
    model = nn.Linear(3, 2)
    ema = EMA(model, decay=0.5)
    averaged = {name: value.clone() for name, value in ema.average.items()}
    noisy(model)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    inside = []

    def evaluate():
        with ema.swapped(model):
            inside.extend(torch.equal(value, averaged[name]) for name, value in model.state_dict().items())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        evaluate()
    assert inside == [True, True]
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, averaged[name]) for name, value in ema.average.items())


def test_ema_keeps_batch_normalisations_statistics_with_its_weights():
    model = nn.Sequential(nn.BatchNorm1d(2))
    ema, mean = EMA(model, decay=0.25), torch.zeros(2)
    for n in range(3):
        model(torch.randn(8, 2) + n)
        ema.update(model)
        decay = (0.1, 2 / 11, 0.25)[n]
        mean = decay * mean + (1 - decay) * model[0].running_mean
    own = model[0].running_mean.clone()
    with ema.swapped(model):
        assert torch.allclose(model[0].running_mean, mean)
        assert model[0].num_batches_tracked == 3
    assert torch.equal(model[0].running_mean, own)


def test_ema_goes_on_from_its_state(tmp_path):
    model = nn.Linear(3, 2)
    ema = EMA(model, decay=0.9)
    ema.update(noisy(model))
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    other = EMA(nn.Linear(3, 2), decay=0.9)
    other.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    noisy(model, 0.3)
    for each in (ema, other):
        each.update(model)
    assert all(torch.equal(value, other.average[name]) for name, value in ema.average.items())
    with pytest.raises(UserError, match="another model"):
        EMA(nn.Conv1d(1, 1, 1, bias=False), 0.9).load_state_dict(ema.state_dict())
