"""evaluate: numbers against Pillow and torchmetrics image by image, and the same whoever computes them."""

import json
import math

import numpy as np
import pytest
import skimage.data
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from litevae.autoencoder import LiteVAE
from litevae.errors import UserError
from litevae.perceptual import load_lpips
from pipelines.config import Evaluate, main, validate
from pipelines.evaluate import evaluate
from pipelines.reading import chunks

SIDE, GOOD = 64, 10


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Ten photos of different sizes, a text file with an image's name, and half a photo."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(GOOD):
        image = getattr(skimage.data, ("astronaut", "chelsea", "coffee")[number % 3])()
        crop = image[10 * number : 10 * number + 130 + 5 * number, 20 * number : 20 * number + 200]
        Image.fromarray(crop).save(folder / f"{number:02}.png")
    (folder / "03a.jpg").write_text("not a photo")
    half = (folder / "07.png").read_bytes()
    (folder / "07a.png").write_bytes(half[: len(half) // 2])
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    vae = LiteVAE.from_preset("S", latent_channels=4, block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


def config(model, photos, out, /, **more) -> Evaluate:
    values = {
        "model": str(model),
        "source": {"uri": str(photos)},
        "transform": {"resolution": SIDE},
        "batch_size": 4,
        "out": str(out),
        "root": str(out / "runs"),
        "tracking": {"enabled": False},
        "ray": {"gpu": "no", "cpus_per_worker": 1},
    }
    return validate(Evaluate, values | more)


@pytest.fixture(scope="module")
def summary(model, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    return evaluate(config(model, photos, out, tracking={"enabled": True})) | {"out": out}


def crops(photos) -> np.ndarray:
    """Shorter side to 64, centre crop, by Pillow alone."""
    found = []
    for path in sorted(photos.glob("[0-9][0-9].png")):
        image = Image.open(path).convert("RGB")
        scale = SIDE / min(image.size)
        width, height = (max(SIDE, round(side * scale)) for side in image.size)
        left, top = (width - SIDE) // 2, (height - SIDE) // 2
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        found.append(np.asarray(resized.crop((left, top, left + SIDE, top + SIDE))))
    return np.stack(found)


def bicubic(pixels: np.ndarray, factor: int = 8) -> np.ndarray:
    """Down by the factor and up again in Pillow's float mode, channel by channel, rounded at the end."""
    result = np.empty_like(pixels)
    for number, channel in np.ndindex(len(pixels), 3):
        image = Image.fromarray(pixels[number, :, :, channel].astype(np.float32))
        small = image.resize((SIDE // factor, SIDE // factor), Image.Resampling.BICUBIC)
        again = np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        result[number, :, :, channel] = again.round().clip(0, 255)
    return result


def reconstruct(model, pixels: np.ndarray) -> np.ndarray:
    vae = LiteVAE.from_pretrained(model).eval()
    with torch.no_grad():
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        y = vae.decode(vae.encode(x).latent_dist.mean).sample
    return ((y + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy().astype(np.uint8)


def test_values_are_those_of_each_image_measured_alone(summary, model, photos):
    pixels = crops(photos)
    for which, others in (("reconstruction", reconstruct(model, pixels)), ("bicubic", bicubic(pixels))):
        psnrs, ssims = [], []
        for a, b in zip(pixels, others, strict=True):
            pair = [torch.from_numpy(image).permute(2, 0, 1)[None].double() for image in (a, b)]
            psnrs.append(peak_signal_noise_ratio(*pair, data_range=255.0).item())
            ssims.append(structural_similarity_index_measure(*pair, data_range=255.0).item())
        assert summary[which]["psnr"] == pytest.approx(np.mean(psnrs), abs=0.01)
        assert summary[which]["ssim"] == pytest.approx(np.mean(ssims), abs=0.001)


def test_an_autoencoder_without_a_posterior_and_of_another_factor(photos, tmp_path, capsys):
    torch.manual_seed(0)
    three = {f"{side}_block_out_channels": (16,) * 3 for side in ("encoder", "decoder")}
    tiny = AutoencoderTiny(**three, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1)).eval()
    tiny.save_pretrained(tmp_path / "tiny")
    summary = evaluate(config(tmp_path / "tiny", photos, tmp_path / "out"))
    pixels = crops(photos)
    with torch.no_grad():
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        y = tiny.decode(tiny.encode(x).latents).sample
    own = ((y + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy().astype(np.uint8)
    for which, others in (("reconstruction", own), ("bicubic", bicubic(pixels, 4))):
        errors = ((pixels.astype(float) - others) ** 2).mean(axis=(1, 2, 3))
        assert summary[which]["psnr"] == pytest.approx((10 * np.log10(255**2 / errors)).mean(), abs=0.01)
    assert summary["downsampling"] == 4
    assert "bicubic by 4" in capsys.readouterr().out


def test_what_it_leaves(summary, model, photos):
    out = summary["out"]
    saved = json.loads((out / "metrics.json").read_text())
    assert saved == {key: value for key, value in summary.items() if key != "out"}
    assert saved["images"] == GOOD
    assert [(bad["id"], bad["reason"]) for bad in saved["unreadable"]] == [
        ("03a.jpg", "not_an_image"),
        ("07a.png", "corrupt"),
    ]
    vae = LiteVAE.from_pretrained(model)
    assert saved["parameters"]["encoder"] == 1_038_308
    assert saved["parameters"]["decoder"] == sum(p.numel() for p in vae.decoder.parameters())
    assert all(math.isfinite(value) and value > 0 for value in saved["images_per_s"].values())
    assert {"psnr", "ssim", "bicubic"} <= saved["protocols"].keys()
    rows = 6  # every other of 12 images gets one, up to 8
    assert Image.open(out / "reconstructions.png").size == (2 + 4 * 130, 16 + 2 + rows * 130)
    assert not list(out.glob("*.tmp"))


def test_it_is_logged_to_mlflow(summary):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{summary['out']}/runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("litevae").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["eval/reconstruction/psnr"] == summary["reconstruction"]["psnr"]
    assert run.data.metrics["eval/bicubic/ssim"] == summary["bicubic"]["ssim"]
    assert [dataset.dataset.digest for dataset in run.inputs.dataset_inputs] == [summary["source"]["digest"][:36]]
    assert "metrics.json" in [file.path for file in client.list_artifacts(run.info.run_id)]


def test_two_workers_give_the_same_and_lpips_goes_by_its_weights(summary, model, photos, tmp_path, capsys):
    import torchvision

    torch.manual_seed(0)
    weights = tmp_path / "squeezenet.pth"
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), weights)
    ray = {"gpu": "no", "cpus_per_worker": 1, "workers": 2, "decode_tasks": 1}
    more = {"lpips": "squeeze", "lpips_weights": str(weights), "ray": ray, "pictures": 1}
    two = evaluate(config(model, photos, tmp_path / "two", **more))
    for which in ("reconstruction", "bicubic"):
        for metric in ("psnr", "ssim"):
            assert two[which][metric] == summary[which][metric]  # to the last bit
    assert two["unreadable"] == summary["unreadable"]
    lpips = load_lpips("squeeze", weights)
    pixels = crops(photos)
    pair = [torch.from_numpy(each).permute(0, 3, 1, 2).float() / 127.5 - 1 for each in (pixels, bicubic(pixels))]
    assert lpips.name.startswith("lpips-squeeze on other weights")
    assert two["bicubic"][lpips.name] == pytest.approx(lpips(*pair).mean().item(), rel=0.01)

    printed = capsys.readouterr().out
    assert "PSNR (dB)" in printed
    assert f"{two['reconstruction']['ssim']:.4f}" in printed
    assert "2 unreadable left out: 03a.jpg (not_an_image), 07a.png (corrupt)" in printed
    assert "1,038,308" in printed
    assert str(tmp_path / "two" / "reconstructions.png") in printed


def test_lpips_without_weights_is_left_out_and_said(summary):
    if summary["remarks"]:  # the developer may have them
        assert summary["remarks"][0].startswith("no LPIPS: ")
        assert summary["reconstruction"].keys() == {"psnr", "ssim"}
    else:
        assert "lpips-vgg" in summary["reconstruction"]


def test_chunks_cover_every_image_once_in_the_same_batches():
    for images, batch_size, resolution, workers in (
        (1, 16, 64, 4),
        (103, 4, 64, 1),
        (5000, 16, 256, 2),
        (50, 64, 8192, 1),
    ):
        parts = chunks(range(images), batch_size, resolution, workers)
        batches = [batch for part in parts for batch in part]
        assert [unit for batch in batches for unit in batch] == list(range(images))
        assert all(batch.start % batch_size == 0 for batch in batches)
        assert len(parts) >= min(len(batches), 4 * workers)
        assert all(len(part) == 1 or sum(map(len, part)) * resolution**2 * 3 <= 64 * 2**20 for part in parts)


def test_mistakes_are_refused_with_nothing_written(model, photos, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_text("x")

    def refused(match: str, **more) -> None:
        with pytest.raises(UserError, match=match):
            evaluate(config(model, photos, tmp_path / "out", **more))

    refused("model is empty", model="")
    refused("does not exist", model=str(tmp_path / "no-model"))
    refused("does not exist", source={"uri": str(tmp_path / "no-photos")})
    refused("images=13, but .* has 12", images=13)
    refused("measured from 32 px", transform={"resolution": 16})
    five = {f"{side}_block_out_channels": (16,) * 5 for side in ("encoder", "decoder")}
    five |= {f"num_{side}_blocks": (1,) * 5 for side in ("encoder", "decoder")}
    AutoencoderTiny(**five).save_pretrained(tmp_path / "tiny")
    refused("resolution=72: .*tiny takes multiples of 16", model=str(tmp_path / "tiny"), transform={"resolution": 72})
    refused("no weights file", lpips_weights=str(tmp_path / "no.pth"))
    assert not (tmp_path / "out").exists()
    refused("none of 1 images could be read: a.png", source={"uri": str(broken)})
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert main(Evaluate, evaluate, ["model=nowhere", f"source.uri={photos}"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_broken_model_stops_it(photos, tmp_path):
    torch.manual_seed(0)
    vae = LiteVAE.from_preset("S", latent_channels=4, block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    torch.nn.init.constant_(next(vae.decoder.parameters()), float("nan"))
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="NaN"):
        evaluate(config(tmp_path / "vae", photos, tmp_path / "out", images=4))
