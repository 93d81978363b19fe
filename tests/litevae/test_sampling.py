"""Samplers against steps computed by hand in float64, diffusers' schedulers made apart, and closed forms."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from litevae.denoiser import build_denoiser, null_class
from litevae.diffusion import Objective
from litevae.errors import UserError
from litevae.sampling import SAMPLERS, sample_latents, sampler_of

SHAPE = (4, 8, 8)
OBJECTIVES = {
    "epsilon": Objective(),
    "epsilon-cosine": Objective(schedule="cosine"),
    "v": Objective("v"),
    "v-zero": Objective("v", zero_snr=True),
    "v-cosine": Objective("v", "cosine"),
    "v-cosine-zero": Objective("v", "cosine", zero_snr=True),
    "flow": Objective("flow"),
}
EVERY = [
    (name, sampler)
    for name, objective in OBJECTIVES.items()
    for sampler in SAMPLERS[objective.scheduler().config.prediction_type]
]


def levels(objective: Objective) -> tuple[np.ndarray, np.ndarray]:
    """Signal a and noise s at the timesteps 0 ... 999 of epsilon and v, apart from diffusers."""
    if objective.schedule == "cosine":
        bar = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    else:
        betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    a = np.cumprod(1 - betas) ** 0.5
    if objective.zero_snr:
        a = (a - a[-1]) * a[0] / (a[0] - a[-1])  # arXiv 2305.08891, Algorithm 1
    return a, (1 - a**2) ** 0.5


class Exact(nn.Module):
    """The best prediction where every value of the latents is N(mean, std^2); with `error`, as much noise on it."""

    def __init__(self, objective: Objective, mean: float = 2.0, std: float = 0.5, error: float = 0.0):
        super().__init__()
        self.objective, self.mean, self.std, self.error = objective, mean, std, error
        self.levels = levels(objective)
        self.generator = torch.Generator().manual_seed(0)
        self.device_of = nn.Parameter(torch.zeros(()))

    def forward(self, x, t):
        flow = self.objective.prediction == "flow"
        a, s = (1 - t.item() / 1000, t.item() / 1000) if flow else (level[int(t)] for level in self.levels)
        x = x.double()
        z = self.mean + a * self.std**2 / (a**2 * self.std**2 + s**2) * (x - a * self.mean)
        noise = (x - a * z) / s
        best = {"epsilon": noise, "v": a * noise - s * z, "flow": noise - z}[self.objective.prediction]
        best = best + self.error * torch.randn(best.shape, generator=self.generator)
        return type("Output", (), {"sample": best.float()})


@pytest.fixture(scope="module")
def network():
    """Random, of small output."""
    torch.manual_seed(0)
    unet = build_denoiser("tiny", *SHAPE[:2])
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return unet.eval()


def noises(seed, count: int) -> list[torch.Tensor]:
    generator = np.random.default_rng(seed)
    return [torch.from_numpy(generator.standard_normal(SHAPE, np.float32))[None] for _ in range(count)]


@torch.no_grad()
def call(network, x: torch.Tensor, t: float) -> torch.Tensor:
    return network(x.float(), torch.tensor(t)).sample.double()


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-3, atol=1e-3 * expected.abs().max().item())


# --- by hand


def split(objective: Objective, x, predicted, a: float, s: float):
    """(image, noise) that follow from a prediction."""
    if objective.prediction == "epsilon":
        return (x - s * predicted) / a, predicted
    if objective.prediction == "v":
        return a * x - s * predicted, s * x + a * predicted
    return x - s * predicted, x + (1 - s) * predicted


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("name", [name for name, sampler in EVERY if sampler == "ddim"])
def test_ddim_by_hand(network, name, eta):
    objective, steps, seed = OBJECTIVES[name], 8, (5, 2)
    a, s = (np.append(level, end) for level, end in zip(levels(objective), (1, 0), strict=True))  # [-1]: no noise
    first = 995 if name == "epsilon-cosine" else 999  # 996 has less than exp(-10.2) of the image
    times = [*(first - 125 * k for k in range(steps)), -1]
    noise = noises(seed, steps + 1)
    x = noise[0].double()
    for k, (now, then) in enumerate(pairwise(times)):
        image, predicted = split(objective, x, call(network, x, now), a[now], s[now])
        sigma = eta * s[then] / s[now] * (1 - (a[now] / a[then]) ** 2) ** 0.5  # DDIM, Eq. 16
        direction = max(0, s[then] ** 2 - sigma**2) ** 0.5
        x = a[then] * image + direction * predicted + sigma * noise[k + 1].double()  # Eq. 12
    close(sample_latents(network, objective.scheduler(), SHAPE, [seed], steps, "ddim", eta), x)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_dpm_by_hand(network, name):
    """DPM-Solver++(2M), arXiv 2211.01095, Algorithm 2; the last step, to no noise, is of first order."""
    objective, steps = OBJECTIVES[name], 8
    if objective.prediction == "flow":
        s = np.append(np.linspace(0.999, 0, steps, endpoint=False), 0)
        a, times = 1 - s, 1000 * s
    else:
        times = np.array([(995 if name == "epsilon-cosine" else 999) - 125 * k for k in range(steps)])
        a, s = (np.append(level[times], end) for level, end in zip(levels(objective), (1, 0), strict=True))
        a[0] = max(a[0], 2**-12)  # diffusers' stand-in for zero, which has no logarithm
        s[0] = (1 - a[0] ** 2) ** 0.5
    with np.errstate(divide="ignore"):
        lamb = np.log(a) - np.log(s)
    x, before = noises(3, 1)[0].double(), None
    for k in range(steps):
        image, _ = split(objective, x, call(network, x, times[k]), a[k], s[k])
        h, d = lamb[k + 1] - lamb[k], image
        if k and k < steps - 1:
            r = (lamb[k] - lamb[k - 1]) / h
            d = (1 + 1 / (2 * r)) * image - 1 / (2 * r) * before
        x, before = s[k + 1] / s[k] * x - a[k + 1] * np.expm1(-h) * d, image
    close(sample_latents(network, objective.scheduler(), SHAPE, [3], steps, "dpm++"), x)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_euler_by_hand(network, steps):
    x = noises(3, 1)[0].double()
    for k in range(steps, 0, -1):
        x = x - call(network, x, 1000 * k / steps) / steps
    close(sample_latents(network, Objective("flow").scheduler(), SHAPE, [3], steps, "euler"), x)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_heun_by_hand(network, steps):
    x = noises(3, 1)[0].double()
    for k in range(steps, 0, -1):
        slope = call(network, x, 1000 * k / steps)
        if k > 1:
            slope = (slope + call(network, x - slope / steps, 1000 * (k - 1) / steps)) / 2
        x = x - slope / steps
    close(sample_latents(network, Objective("flow").scheduler(), SHAPE, [3], steps, "heun"), x)


# --- against diffusers


def levels_of(objective: Objective) -> dict:
    return {
        "beta_start": 0.0015,
        "beta_end": 0.0195,
        "beta_schedule": {"sqrt-linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}[objective.schedule],
        "prediction_type": {"epsilon": "epsilon", "v": "v_prediction"}[objective.prediction],
        "rescale_betas_zero_snr": objective.zero_snr,
        "timestep_spacing": "trailing",
    }


@pytest.mark.parametrize("name", ["epsilon", "v", "v-zero", "v-cosine", "v-cosine-zero"])
def test_ddim_is_diffusers(network, name):
    scheduler = DDIMScheduler(1000, clip_sample=False, **levels_of(OBJECTIVES[name]))
    scheduler.set_timesteps(10)
    x = torch.cat([noises(seed, 1)[0] for seed in (3, 4)])
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x).prev_sample
    assert torch.equal(sample_latents(network, OBJECTIVES[name].scheduler(), SHAPE, [3, 4], 10, "ddim"), x)


@pytest.mark.parametrize("steps", [1, 10, 25, pytest.param(50, marks=pytest.mark.chaos)])
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "flow"])
def test_dpm_is_diffusers(network, name, steps):
    clip = {"lambda_min_clipped": -5.1} if name == "epsilon-cosine" else {}
    scheduler = DPMSolverMultistepScheduler(1000, solver_order=2, **levels_of(OBJECTIVES[name]), **clip)
    scheduler.set_timesteps(steps)
    x = noises(3, 1)[0]
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x).prev_sample
    assert torch.equal(sample_latents(network, OBJECTIVES[name].scheduler(), SHAPE, [3], steps, "dpm++"), x)


def test_euler_is_diffusers(network):
    scheduler = FlowMatchEulerDiscreteScheduler(1000)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 7, 7))
    x = noises(3, 1)[0]
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x).prev_sample
    torch.testing.assert_close(sample_latents(network, Objective("flow").scheduler(), SHAPE, [3], 7), x)


# --- what comes out


@pytest.mark.parametrize(("name", "sampler"), EVERY)
def test_a_known_distribution_is_reached(name, sampler):
    objective = OBJECTIVES[name]
    steps = {"ddim": 250, "euler": 250}.get(sampler, 100)  # first order; second
    for eta in (0.0, 1.0) if sampler == "ddim" else (0.0,):
        x = sample_latents(Exact(objective), objective.scheduler(), SHAPE, range(64), steps, sampler, eta)
        assert x.mean().item() == pytest.approx(2.0, abs=0.02)
        assert x.std().item() == pytest.approx(0.5, abs=0.025)


@pytest.mark.parametrize(("name", "sampler"), EVERY)
def test_a_network_may_err(name, sampler):
    """By 2 %. An error of epsilon where there is next to nothing of the image would be multiplied by 20,000."""
    objective = OBJECTIVES[name]
    x = sample_latents(Exact(objective, error=0.02), objective.scheduler(), SHAPE, range(16), 50, sampler)
    assert x.mean().item() == pytest.approx(2.0, abs=0.03)
    assert x.std().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_exported_scheduler_itself_samples_well(name):
    """What a pipeline of diffusers does, which knows nothing of `sampler_of`."""
    objective = OBJECTIVES[name]
    scheduler, network = objective.scheduler(), Exact(objective, error=0.02)
    scheduler.set_timesteps(50)
    x = torch.cat([noises(seed, 1)[0] for seed in range(16)]) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
    assert x.mean().item() == pytest.approx(2.0, abs=0.03)
    assert x.std().item() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(("name", "sampler"), EVERY)
def test_any_number_of_steps_is_finite(name, sampler):
    _check_steps(name, sampler, (1, 2, 4, 5, 8, 10) if sampler == "ddim" else (1, 2, 3, 7, 15, 61), (0.0, 0.5, 1.0))
    _check_steps(name, sampler, (20, 25, 40, 50, 1000) if sampler == "ddim" else (998,), (0.0,))


@pytest.mark.chaos
@pytest.mark.parametrize(("name", "sampler"), EVERY)
def test_any_large_number_of_steps_is_finite(name, sampler):
    if sampler == "ddim":
        _check_steps(name, sampler, (20, 25, 40, 50, 100, 125, 200, 250, 500, 1000), (0.0, 0.5, 1.0))
    else:
        _check_steps(name, sampler, (100, 103, 500, 998, 1000), (0.0,))


def _check_steps(name, sampler, numbers, etas):
    objective = OBJECTIVES[name]
    for steps in numbers:
        for eta in etas if sampler == "ddim" else (0.0,):
            x = sample_latents(Exact(objective), objective.scheduler(), (1, 2, 2), range(4), steps, sampler, eta)
            assert x.isfinite().all(), (steps, eta)
            assert 1 < x.mean() < 3, (steps, eta)


def test_steps_are_as_many_as_asked_for_and_equal():
    for steps in (1, 2, 3, 61, 103, 999, 1000):  # with 61, diffusers' own levels would be 62
        times = sampler_of(Objective().scheduler(), "dpm++", steps).timesteps.numpy()
        assert len(times) == steps
        assert times[0] == 999
        assert np.allclose(np.diff(times), -1000 / steps, atol=1)
        assert times[-1] == pytest.approx(1000 / steps - 1, abs=0.51)
        for name, evaluations in (("euler", steps), ("heun", 2 * steps - 1), ("dpm++", steps)):
            assert len(sampler_of(Objective("flow").scheduler(), name, steps).timesteps) == evaluations


# --- seeds, classes, guidance


@pytest.mark.parametrize(
    ("name", "sampler", "eta"), [("epsilon", "ddim", 1.0), ("v", "dpm++", 0.0), ("flow", "heun", 0.0)]
)
def test_an_image_depends_on_its_seed_only(network, name, sampler, eta):
    seeds, scheduler = [(0, i) for i in range(5)], OBJECTIVES[name].scheduler()
    exact = Exact(OBJECTIVES[name])  # element by element, so a batch can't matter by rounding
    for model, tolerance in ((exact, 0), (network, 2e-4)):  # convolutions block their sums by the batch's size
        together = sample_latents(model, scheduler, SHAPE, seeds, 10, sampler, eta)
        parts = [sample_latents(model, scheduler, SHAPE, part, 10, sampler, eta) for part in (seeds[:3], seeds[3:])]
        assert (together - torch.cat(parts)).abs().max() <= tolerance * together.abs().max()
    assert not torch.allclose(together[0], together[1])


class Classes(nn.Module):
    """Flow towards each class's own number, which is known of the null class as well."""

    def __init__(self, classes: int = 3):
        super().__init__()
        self.towards, self.asked = nn.Parameter(torch.zeros(null_class(classes) + 1)), []
        with torch.no_grad():
            self.towards[: classes + 1] = torch.tensor([1.0, 2.0, 5.0, 0.0])
            self.towards[null_class(classes)] = -1.0

    def forward(self, x, t, class_labels):
        self.asked.append(class_labels.tolist())
        return type("Output", (), {"sample": self.towards[class_labels].view(-1, 1, 1, 1).expand_as(x)})


@pytest.mark.parametrize(
    ("labels", "guidance", "speeds", "asked"),
    [
        ([2, 0], 1.0, [5, 1], [2, 0]),
        ([2, 0], 3.0, [-1 + 3 * 6, -1 + 3 * 2], [2, 0, 1000, 1000]),
        ([2, 0], 0.0, [-1, -1], [2, 0, 1000, 1000]),
        (None, 1.0, [-1, -1], [1000, 1000]),
        ([1, 1000], 1.0, [2, -1], [1, 1000]),
    ],
)
def test_guidance_by_hand(labels, guidance, speeds, asked):
    network = Classes()
    x = sample_latents(
        network, Objective("flow").scheduler(), SHAPE, [3, 4], 4, labels=labels, classes=3, guidance=guidance
    )
    start = torch.cat([noises(seed, 1)[0] for seed in (3, 4)])
    torch.testing.assert_close(x, start - torch.tensor(speeds, dtype=torch.float32).view(2, 1, 1, 1))
    assert network.asked == [asked] * 4


def test_guidance_of_a_real_network_is_two_calls():
    torch.manual_seed(0)
    network = build_denoiser("tiny", *SHAPE[:2], classes=3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    scheduler = DDIMScheduler(1000, clip_sample=False, **levels_of(Objective()))
    scheduler.set_timesteps(4)
    x = torch.cat([noises(seed, 1)[0] for seed in (3, 4)])
    with torch.no_grad():
        for t in scheduler.timesteps:
            given = network(x, t, class_labels=torch.tensor([0, 2])).sample
            free = network(x, t, class_labels=torch.tensor([1000, 1000])).sample
            x = scheduler.step(free + 3 * (given - free), t, x).prev_sample
    got = sample_latents(
        network.eval(), Objective().scheduler(), SHAPE, [3, 4], 4, labels=[0, 2], classes=3, guidance=3.0
    )
    close(got, x)


def test_mistakes_are_refused(network):
    def refused(match: str, objective=OBJECTIVES["epsilon"], steps=10, **more) -> None:
        with pytest.raises(UserError, match=match):
            sample_latents(network, objective.scheduler(), SHAPE, [0], steps, **more)

    for steps, take in ((30, "25 or 40"), (600, "500 or 1000"), (2000, "1000"), (0, "1")):
        refused(f"steps={steps} does not divide the schedule's 1000 levels; take {take}$", steps=steps)
    flow = Objective("flow")
    for steps in (0, 1001):
        refused(f"steps={steps} is not between 1 and 1000", steps=steps, sampler="dpm++")
        refused(f"steps={steps} is not between 1 and 1000", flow, steps=steps)
    refused("sampler=euler does not fit a model of epsilon; choose one of ddim, dpm", sampler="euler")
    refused("sampler=ddim does not fit a model of flow; choose one of euler, heun, dpm", flow, sampler="ddim")
    refused(r"eta=0.5 works only with sampler=ddim; dpm\+\+ adds no noise", sampler="dpm++", eta=0.5)
    refused("is unconditional", labels=[1])
    refused("is unconditional", guidance=2.0)
    refused("guidance=2 needs classes", classes=3, guidance=2.0)
    refused("there are 2 labels for 1 images", classes=3, labels=[1, 2])
    refused("class 3 does not exist: the model knows 0 to 2, and 1000 for images without", classes=3, labels=[3])
    refused("class -1 does not exist: the model knows 0 to 1999, and 2000", classes=2000, labels=[-1])
