"""Latent diffusion against hand-computed steps, closed forms and diffusers' own schedulers."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from litevae.autoencoder import LiteVAE
from litevae.diffusion import (
    EMA,
    LDM,
    build_unet,
    load_ldm,
    noise_schedule,
    sample_latents,
    save_ldm,
    training_loss,
)
from litevae.errors import UserError


def noisy(module: nn.Module, scale: float = 0.05) -> nn.Module:
    """Away from the zeros of the initialisation."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module.eval()


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return noisy(build_unet("tiny", latent_channels=4, size=8))


# --- the network


def rombach_unet_parameters(latent: int, width: int, multiples: tuple[int, ...], blocks: int) -> int:
    """Parameters of latent-diffusion's UNetModel with attention at every level, counted layer by layer."""
    time = 4 * width

    def conv(i, o, k=3):
        return k * k * i * o + o

    def res(i, o):
        skip = conv(i, o, 1) if i != o else 0
        return 2 * i + conv(i, o) + conv(time, o, 1) + 2 * o + conv(o, o) + skip

    def attention(c):
        return 2 * c + conv(c, 3 * c, 1) + conv(c, c, 1)

    total = conv(width, time, 1) + conv(time, time, 1) + conv(latent, width)
    skips, c = [width], width
    for level, multiple in enumerate(multiples):
        for _ in range(blocks):
            total += res(c, width * multiple) + attention(width * multiple)
            c = width * multiple
            skips.append(c)
        if level + 1 < len(multiples):
            total += conv(c, c)
            skips.append(c)
    total += 2 * res(c, c) + attention(c)
    for level, multiple in reversed(list(enumerate(multiples))):
        for _ in range(blocks + 1):
            total += res(c + skips.pop(), width * multiple) + attention(width * multiple)
            c = width * multiple
        if level:
            total += conv(c, c)
    return total + 2 * c + conv(c, latent)


@pytest.mark.parametrize(("latent", "expected"), [(4, 257_733_124), (12, 257_769_996)])
def test_ldm_8_has_the_published_size_and_structure(latent, expected):
    with torch.device("meta"):
        unet = build_unet("ldm-8", latent, 32)
    assert sum(p.numel() for p in unet.parameters()) == expected
    assert expected == rombach_unet_parameters(latent, 256, (1, 2, 4), 2)
    attentions = [m for m in unet.modules() if type(m).__name__ == "Attention"]
    assert len(attentions) == 6 + 1 + 9  # after each ResBlock of each level, and between the two in the middle
    assert all(a.to_q.out_features // a.heads == 32 for a in attentions)


@pytest.mark.parametrize(("preset", "expected"), [("small", 16_141_444), ("tiny", 1_896_740)])
def test_smaller_presets(preset, expected):
    with torch.device("meta"):
        unet = build_unet(preset, 4, 16)
    assert sum(p.numel() for p in unet.parameters()) == expected


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_latents_of_8_pixels_fit(preset):
    assert build_unet(preset, 12, 8)(torch.randn(2, 12, 8, 8), 3).sample.shape == (2, 12, 8, 8)


def test_sizes_that_can_not_be_halved_are_refused():
    with pytest.raises(UserError, match="multiple of 4, and it is 10; encode at a resolution that is a multiple of 32"):
        build_unet("small", 4, 10)
    with pytest.raises(UserError, match="ldm-8, small, tiny"):
        build_unet("ldm-9", 4, 8)


def test_a_fresh_unet_predicts_zero():
    latents = torch.randn(64, 4, 8, 8)
    fresh = build_unet("tiny", 4, 8)
    assert not fresh(latents, 7).sample.any()
    loss = training_loss(fresh, noise_schedule(), latents, torch.Generator().manual_seed(0))
    assert loss.mean().item() == pytest.approx(1, abs=0.05)  # the variance of the noise


# --- training


def test_schedule_is_linear_in_the_square_root():
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    torch.testing.assert_close(
        noise_schedule().alphas_cumprod.double(), torch.from_numpy(np.cumprod(1 - betas)), rtol=1e-4, atol=1e-7
    )


def test_training_loss_is_the_error_of_the_noise(unet):
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    loss = training_loss(unet, noise_schedule(), latents, torch.Generator().manual_seed(7))

    draw = torch.Generator().manual_seed(7)
    timesteps = torch.randint(0, 1000, (5,), generator=draw)
    noise = torch.randn(5, 4, 8, 8, generator=draw)
    reference = DDPMScheduler(1000, 0.0015, 0.0195, "scaled_linear", prediction_type="epsilon")
    predicted = unet(reference.add_noise(latents, noise, timesteps), timesteps).sample
    assert loss.shape == (5,)
    torch.testing.assert_close(loss, ((predicted - noise) ** 2).flatten(1).mean(1))


def test_training_loss_is_fp32_under_autocast(unet):
    with torch.autocast("cpu", torch.bfloat16):
        loss = training_loss(unet, noise_schedule(), torch.randn(2, 4, 8, 8), torch.Generator().manual_seed(0))
    assert loss.dtype == torch.float32


def test_training_learns():
    torch.manual_seed(0)
    model, scheduler, generator = build_unet("tiny", 4, 8), noise_schedule(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    latents = torch.randn(1, 4, 8, 8).expand(16, -1, -1, -1)
    losses = []
    for _ in range(30):
        loss = training_loss(model, scheduler, latents, generator).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


# --- averaged weights


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


# --- sampling


def draws(seed, count, shape):
    generator = np.random.default_rng(seed)
    return [torch.from_numpy(generator.standard_normal(shape, np.float32)) for _ in range(count)]


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_sampler_equals_ddim_by_hand(unet, eta):
    steps, shape, seed = 8, (4, 8, 8), (5, 2)
    bars = np.append(np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2), 1.0)  # [-1] is "no noise"
    noises = draws(seed, steps + 1, shape)
    x = noises[0][None].double()
    times = [999 - 125 * k for k in range(steps)] + [-1]
    for k in range(steps):
        now, then = bars[times[k]], bars[times[k + 1]]
        with torch.no_grad():
            predicted = unet(x.float(), times[k]).sample.double()
        sigma = eta * ((1 - then) / (1 - now)) ** 0.5 * (1 - now / then) ** 0.5  # DDIM, Eq. 16
        clean = (x - (1 - now) ** 0.5 * predicted) / now**0.5
        x = then**0.5 * clean + (1 - then - sigma**2) ** 0.5 * predicted + sigma * noises[k + 1].double()  # Eq. 12
    got = sample_latents(unet, noise_schedule(), shape, [seed], steps, eta)
    torch.testing.assert_close(got.double(), x, rtol=1e-3, atol=1e-3 * x.abs().max().item())


def test_sampler_equals_diffusers_loop(unet):
    scheduler = DDIMScheduler.from_config(noise_schedule().config)
    scheduler.set_timesteps(10)
    x = torch.stack([draws(seed, 1, (4, 8, 8))[0] for seed in (3, 4)])
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    assert torch.equal(sample_latents(unet, noise_schedule(), (4, 8, 8), [3, 4], 10), x)


class Gaussian(nn.Module):
    """The exact noise predictor where every latent value is N(mean, std^2)."""

    def __init__(self, mean: float, std: float):
        super().__init__()
        self.mean, self.std, self.bars = mean, std, noise_schedule().alphas_cumprod
        self.device_of = nn.Parameter(torch.zeros(()))

    def forward(self, x, t):
        bar = self.bars[t]
        noise = (1 - bar).sqrt() * (x - bar.sqrt() * self.mean) / (bar * self.std**2 + 1 - bar)
        return type("Output", (), {"sample": noise})


@pytest.mark.parametrize(("eta", "steps"), [(0.0, 250), (1.0, 1000)])
def test_sampler_reaches_a_known_distribution(eta, steps):
    x = sample_latents(Gaussian(2.0, 0.5), noise_schedule(), (4, 8, 8), range(64), steps, eta)
    assert x.mean().item() == pytest.approx(2.0, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_image_depends_on_its_seed_only(unet, eta):
    seeds = [(0, i) for i in range(5)]
    exact = Gaussian(0.0, 1.0)  # element by element, so a batch can't matter by rounding
    for model, tolerance in ((exact, 0), (unet, 2e-4)):  # convolutions block their sums by the batch's size
        together = sample_latents(model, noise_schedule(), (4, 8, 8), seeds, 10, eta)
        pairs = [sample_latents(model, noise_schedule(), (4, 8, 8), part, 10, eta) for part in (seeds[3:], seeds[:3])]
        parts = torch.cat(pairs[::-1])
        assert (together - parts).abs().max() <= tolerance * together.abs().max()
    assert not torch.allclose(together[0], together[1])


def test_steps_that_do_not_divide_the_schedule_are_refused(unet):
    for steps, take in ((30, "25 or 40"), (600, "500 or 1000"), (2000, "1000"), (0, "1")):
        with pytest.raises(UserError, match=f"steps={steps} does not divide the schedule's 1000; take {take}$"):
            sample_latents(unet, noise_schedule(), (4, 8, 8), [0], steps)


# --- the folder


@pytest.fixture(scope="module")
def ldm(unet):
    torch.manual_seed(2)
    vae = LiteVAE.from_preset("S", latent_channels=4, block_out_channels=(32, 32, 32, 32), layers_per_block=1).eval()
    mean, std = torch.tensor([0.5, -1.0, 0.1, 3.0]), torch.tensor([2.0, 0.5, 1.25, 0.3])
    return LDM(unet, noise_schedule(), vae, mean, std, {"cache": "abc", "config": {"seed": 0}})


@pytest.fixture
def folder(ldm, tmp_path):
    save_ldm(tmp_path / "model", ldm)
    return tmp_path / "model"


def test_decoding_denormalises(ldm):
    z = torch.randn(2, 4, 8, 8)
    raw = torch.stack([z[:, c] * ldm.latent_std[c] + ldm.latent_mean[c] for c in range(4)], dim=1)
    with torch.no_grad():
        expected = ldm.vae.decode(raw).sample.clamp(-1, 1)
    torch.testing.assert_close(ldm.decode(z), expected)


def test_save_and_load_give_the_same_images(ldm, folder):
    loaded = load_ldm(folder)
    assert loaded.info == ldm.info
    assert loaded.shape == (4, 8, 8)
    assert not loaded.unet.training
    assert not loaded.vae.training
    images = loaded.sample([1, 2], steps=2)
    assert images.shape == (2, 3, 64, 64)
    assert torch.equal(images, ldm.sample([1, 2], steps=2))
    assert not list(folder.rglob("*.bin"))
    assert UNet2DModel.from_pretrained(folder / "unet").config.sample_size == 8


def test_the_autoencoder_may_be_any_of_diffusers(ldm, tmp_path):
    vae = AutoencoderTiny(encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4).eval()
    other = LDM(ldm.unet, ldm.scheduler, vae, ldm.latent_mean, ldm.latent_std)
    save_ldm(tmp_path, other)
    images = load_ldm(tmp_path).sample([1], steps=2)
    assert images.shape == (1, 3, 64, 64)
    assert torch.equal(images, other.sample([1], steps=2))


def test_saving_again_replaces_the_model(ldm, folder):
    other = LDM(ldm.unet, ldm.scheduler, ldm.vae, ldm.latent_mean + 1, ldm.latent_std)
    save_ldm(folder, other)
    assert torch.equal(load_ldm(folder).latent_mean, ldm.latent_mean + 1)


def test_an_unfinished_folder_is_refused(ldm, folder, monkeypatch):
    monkeypatch.setattr(DDIMScheduler, "save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_ldm(folder, ldm)
    with pytest.raises(UserError, match=r"no ldm\.json"):
        load_ldm(folder)


def test_damaged_folders_are_refused(folder):
    def refused(match):
        with pytest.raises(UserError, match=match):
            load_ldm(folder)

    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused("incomplete or damaged")
    weights.write_bytes(whole)
    tensors = load_file(weights)
    tensors.pop("conv_out.bias")
    save_file(tensors, weights, metadata={"format": "pt"})
    refused("do not fit")
    weights.unlink()
    refused("incomplete or damaged")
    weights.write_bytes(whole)
    assert load_ldm(folder)

    marker = folder / "ldm.json"
    about = json.loads(marker.read_text())
    marker.write_text(json.dumps(about | {"format": 99}))
    refused("format 99")
    marker.write_text(json.dumps(about)[:40])
    refused("damaged")
    marker.write_text(json.dumps(about))

    shutil.rmtree(folder / "vae")
    LiteVAE.from_preset("S", latent_channels=4, block_out_channels=(32, 32, 32, 64)).save_pretrained(folder / "vae")
    refused("not the autoencoder")
