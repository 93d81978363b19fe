"""sample: the same image from the same seed, whoever draws it and however many there are."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from litevae.autoencoder import LiteVAE
from litevae.diffusion import LDM, build_unet, load_ldm, noise_schedule, save_ldm
from litevae.errors import UserError
from litevae.images import to_uint8
from pipelines.config import Sample, main, validate
from pipelines.sample import sample


def make_ldm(poison: bool = False) -> LDM:
    torch.manual_seed(0)
    unet = build_unet("tiny", latent_channels=4, size=8)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    if poison:
        torch.nn.init.constant_(unet.conv_out.bias, float("nan"))
    vae = LiteVAE.from_preset("S", latent_channels=4, block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    return LDM(unet, noise_schedule(), vae, torch.zeros(4), torch.ones(4))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_ldm(folder, make_ldm())
    return folder


def config(model, out, /, **more) -> Sample:
    values = {
        "model": str(model),
        "out": str(out),
        "root": str(out / "runs"),
        "images": 5,
        "batch_size": 4,
        "steps": 4,
        "eta": 1.0,
        "seed": 11,
        "precision": "fp32",
        "tracking": {"enabled": False},
        "ray": {"gpu": "no", "cpus_per_worker": 1},
    }
    return validate(Sample, values | more)


def pixels(folder, count: int) -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / f"{number:06}.png")) for number in range(count)])


@pytest.fixture(scope="module")
def five(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("five")
    sample(config(model, out))
    return out


def test_images_are_those_of_their_seeds(five, model):
    ldm = load_ldm(model)
    expected = torch.cat([ldm.sample([(11, n)], steps=4, eta=1.0) for n in range(5)])
    got = pixels(five, 5)
    assert got.shape == (5, 64, 64, 3)
    assert np.abs(got.astype(int) - to_uint8(expected)).max() <= 1  # batches of 1 and of 4 sum in another order
    assert len(np.unique(got, axis=0)) == 5
    grid = np.asarray(Image.open(five / "grid.png"))
    assert grid.shape == (2 + 66, 2 + 5 * 66, 3)
    assert np.array_equal(grid[2:66, 2 + 66 : 2 + 66 + 64], got[1])
    about = json.loads((five / "samples.json").read_text())
    assert about["images"] == 5
    assert about["sampler"] == {"name": "DDIM", "steps": 4, "eta": 1.0, "seed": 11}
    assert sorted(path.name for path in five.glob("*.png")) == [*(f"{n:06}.png" for n in range(5)), "grid.png"]


def test_more_images_and_workers_change_no_bit(five, model, tmp_path):
    ray = {"gpu": "no", "cpus_per_worker": 1, "workers": 2}
    summary = sample(config(model, tmp_path, images=11, ray=ray))
    assert summary["images"] == 11
    for number in range(5):
        name = f"{number:06}.png"
        assert (tmp_path / name).read_bytes() == (five / name).read_bytes()
    assert len(np.unique(pixels(tmp_path, 11), axis=0)) == 11
    with pytest.raises(UserError, match="holds more than images=10, from another job"):
        sample(config(model, tmp_path, images=10))


def test_mistakes_are_refused_with_nothing_written(model, tmp_path, capsys):
    def refused(match: str, **more) -> None:
        with pytest.raises(UserError, match=match):
            sample(config(model, tmp_path / "out", **more))

    refused("model is empty", model="")
    refused("no latent diffusion model", model=str(tmp_path / "nowhere"))
    refused("no latent diffusion model", model=str(model / "vae"))
    refused("take 2 or 4", steps=3)
    assert not (tmp_path / "out").exists()
    assert main(Sample, sample, ["model=nowhere", "images=2"]) == 2
    assert capsys.readouterr().err.startswith("error: nowhere holds no latent diffusion model")


def test_a_diverged_model_stops_it(tmp_path):
    save_ldm(tmp_path / "model", make_ldm(poison=True))
    with pytest.raises(UserError, match="NaN or infinite pixels: its training has diverged"):
        sample(config(tmp_path / "model", tmp_path / "out", images=1, batch_size=1))
    assert not list((tmp_path / "out").glob("*.png"))
