"""evaluate: numbers against Pillow and torchmetrics image by image, and the same whoever computes them."""

import json
import math
import pickle
import re
import sys

import numpy as np
import pytest
import skimage.data
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from litevae.autoencoder import LiteVAE
from litevae.errors import UserError
from litevae.generation import Backbone, SqueezeNetCaffe, mmd
from litevae.images import to_tensor
from litevae.perceptual import load_lpips
from pipelines.evaluation.config import Evaluate
from pipelines.evaluation.image_batches import chunks
from pipelines.evaluation.reconstruction import Measured, Total, _frechet, evaluate
from pipelines.runtime.cli import main
from pipelines.runtime.cluster import start
from pipelines.runtime.schema import validate
from tests.in_process import in_process
from tests.networks import save_resnet, save_squeezenet

SIDE, GOOD, MMD = 64, 10, 7


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
        "ray": {"gpu": False, "cpus_per_worker": 1},
    }
    return validate(Evaluate, values | more)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random ones of two backbones, which judge in three ways."""
    folder = tmp_path_factory.mktemp("weights")
    squeezenet = str(save_squeezenet(folder / "squeezenet.pth"))
    named = {"backbone": str(save_resnet(folder / "resnet.pth")), "backbone_model": "resnet18"}
    return {"lpips": "squeeze", "lpips_weights": squeezenet, "squeezenet": squeezenet, **named}


@pytest.fixture(scope="module")
def summary(model, photos, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    more = {"tracking": {"enabled": True}, "resolutions": [96, 32], "mmd_images": MMD}
    with in_process():
        return evaluate(config(model, photos, out, **weights, **more)) | {"out": out}


def crops(photos, pixels: int = SIDE) -> np.ndarray:
    """Shorter side to that, centre crop, by Pillow alone."""
    found = []
    for path in sorted(photos.glob("[0-9][0-9].png")):
        image = Image.open(path).convert("RGB")
        scale = pixels / min(image.size)
        width, height = (max(pixels, round(side * scale)) for side in image.size)
        left, top = (width - pixels) // 2, (height - pixels) // 2
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        found.append(np.asarray(resized.crop((left, top, left + pixels, top + pixels))))
    return np.stack(found)


def bicubic(pixels: np.ndarray, factor: int = 8) -> np.ndarray:
    """Down by the factor and up again in Pillow's float mode, channel by channel, rounded at the end."""
    result = np.empty_like(pixels)
    for number, channel in np.ndindex(len(pixels), 3):
        image = Image.fromarray(pixels[number, :, :, channel].astype(np.float32))
        small = image.resize([side // factor for side in image.size], Image.Resampling.BICUBIC)
        again = np.asarray(small.resize(image.size, Image.Resampling.BICUBIC))
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


def test_distances_on_features_are_those_of_all_images_at_once(summary, model, photos, weights):
    """Sums by torch-fidelity."""
    pixels = crops(photos)
    other = reconstruct(model, pixels)
    pair = [to_tensor(each) for each in (pixels, other)]
    networks = (SqueezeNetCaffe(weights["squeezenet"]), Backbone("resnet18", weights["backbone"]))
    for network in networks:
        sides = [fid_features_to_statistics(network(each)[0].double()) for each in (pixels, other)]
        expected = fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]
        name = f"frechet/{network.name}"
        assert expected > 1e-3
        assert summary["reconstruction"][name] == pytest.approx(expected, rel=5e-3)
        assert "CAUTION: 10 images give a singular covariance of 512 features" in summary["protocols"][name]
        assert f"10 images, shorter side to {SIDE} px (Pillow" in summary["protocols"][name]
        assert name not in summary["bicubic"]
        distance = summary["reconstruction"][f"{network.name} feature distance"]
        assert distance == pytest.approx(network.distance(*pair).mean().item(), rel=1e-3)
    lpips = load_lpips("squeeze", weights["lpips_weights"])
    assert lpips.name.startswith("lpips-squeeze on other weights")
    with torch.no_grad():
        bicubics = to_tensor(bicubic(pixels))
        assert summary["bicubic"][lpips.name] == pytest.approx(lpips(pair[0], bicubics).mean().item(), rel=0.01)
    assert _frechet("inception") == "rfid"
    assert summary["reconstruction"].keys() <= summary["protocols"].keys()


def test_scales_are_measured_at_each_resolution(summary, photos):
    scales = summary["scales"]
    assert [*scales] == ["32", "64", "96"]
    assert scales["64"] == {key: summary[key] for key in ("images", "reconstruction", "bicubic")}
    for pixels in (32, 96):
        images = crops(photos, pixels)
        errors = ((images.astype(float) - bicubic(images)) ** 2).mean(axis=(1, 2, 3))
        found = scales[str(pixels)]
        assert found["bicubic"]["psnr"] == pytest.approx((10 * np.log10(255**2 / errors)).mean(), abs=0.01)
        assert found["reconstruction"].keys() == summary["reconstruction"].keys()


def scored(summary) -> dict[str, float]:
    return {score["name"]: score["value"] for score in summary["metrics"]}


def test_mmd_is_of_the_first_images_latents(summary, model, photos):
    """Drawn by hand; the fifth of these images can't be read."""
    vae = LiteVAE.from_pretrained(model).eval()
    with torch.no_grad():
        mean, log = vae.encode(to_tensor(crops(photos)[: MMD - 1])).latent_dist.parameters.chunk(2, dim=1)
    raw = mean + (0.5 * log).exp() * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    channels = raw.transpose(0, 1).flatten(1)
    shape = (1, -1, 1, 1)
    normalised = (raw - channels.mean(1).view(shape)) / channels.std(1, correction=0).view(shape)
    for kind, latents in (("raw", raw), ("normalised", normalised)):
        for sigma, (value, _) in mmd(latents).items():
            assert scored(summary)[f"mmd/{kind}/{sigma:g}"] == pytest.approx(value, rel=1e-3, abs=1e-7)
    (protocol,) = {score["protocol"] for score in summary["metrics"] if score["name"].startswith("mmd/raw")}
    assert "6 latents of 4x8x8, drawn from the posterior" in protocol


def test_the_models_own_marks(summary, model, photos):
    vae = LiteVAE.from_pretrained(model).eval()
    maps = []
    vae.decoder.norm_out.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    colours = np.array([[r, g, b] for r in (-1, 1) for g in (-1, 1) for b in (-1, 1)] + [[0, 0, 0]], np.float32)
    flat = torch.from_numpy(colours)[:, :, None, None].expand(-1, -1, SIDE, SIDE)
    with torch.no_grad():
        for x in (flat, to_tensor(crops(photos))):
            y = vae.decode(vae.encode(x).latent_dist.mean).sample
            if x is flat:
                inner = y.clamp(-1, 1)[..., 8:-8, 8:-8].numpy() * 127.5
    expected = np.sqrt(np.mean([[channel.var() for channel in image] for image in inner]))
    assert expected > 0.01
    assert scored(summary)["artefacts"] == pytest.approx(expected, rel=1e-3)
    assert 2**0.5 <= scored(summary)["artefacts/period"] <= SIDE - 16
    energy = np.sort((maps[1].numpy().astype(float) ** 2).sum(1).reshape(GOOD, -1))[:, ::-1]
    expected = (energy[:, :41].sum(1) / energy.sum(1)).mean()  # 1 % of 64 x 64
    assert expected > 0.012
    assert scored(summary)["imbalance"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("in_process")
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
    printed = capsys.readouterr().out
    assert "bicubic by 4" in printed
    assert "feature maps are left out: the decoder has no norm_out or conv_norm_out" in printed
    assert scored(summary).keys() == {"artefacts", "artefacts/period"}
    assert not (tmp_path / "out" / "feature_maps.png").exists()


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
    assert Image.open(out / "feature_maps.png").size == (2 + 6 * 130, 16 + 2 + 4 * 130)
    assert saved["pictures"] == ["reconstructions.png", "feature_maps.png"]
    assert not list(out.glob(".tmp-*"))


def test_it_is_logged_to_mlflow(summary):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{summary['out']}/runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("litevae").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["eval/reconstruction/psnr"] == summary["reconstruction"]["psnr"]
    assert run.data.metrics["eval/bicubic/ssim"] == summary["bicubic"]["ssim"]
    assert run.data.metrics["eval/mmd/raw/25"] == scored(summary)["mmd/raw/25"]
    assert [each.step for each in client.get_metric_history(run.info.run_id, "eval/reconstruction/psnr")] == [0]
    curve = client.get_metric_history(run.info.run_id, "eval/scale/psnr")
    assert [(each.step, each.value) for each in curve] == [
        (int(pixels), each["reconstruction"]["psnr"]) for pixels, each in summary["scales"].items()
    ]
    assert [dataset.dataset.digest for dataset in run.inputs.dataset_inputs] == [summary["source"]["digest"][:36]]
    assert "metrics.json" in [file.path for file in client.list_artifacts(run.info.run_id)]


@pytest.mark.usefixtures("wherever")
def test_two_workers_give_the_same_to_the_last_bit(summary, model, photos, weights, tmp_path, capsys):
    ray = {"gpu": False, "cpus_per_worker": 1, "workers": 2, "decode_tasks": 1}
    more = {"ray": ray, "pictures": 1, "resolutions": [32], "mmd_images": MMD, "verbose": True}
    two = evaluate(config(model, photos, tmp_path / "two", **weights, **more))
    for key in ("reconstruction", "bicubic", "metrics", "unreadable", "protocols"):
        assert two[key] == summary[key]
    assert two["scales"]["32"] == summary["scales"]["32"]

    printed = capsys.readouterr().out
    assert "PSNR (dB)" in printed
    assert f"{two['reconstruction']['ssim']:.4f}" in printed
    assert "2 unreadable left out: 03a.jpg (not_an_image), 07a.png (corrupt)" in printed
    assert "1,038,308" in printed
    assert str(tmp_path / "two" / "reconstructions.png") in printed
    for score in two["metrics"]:
        assert re.search(rf"^{re.escape(score['title'])} +{re.escape(format(score['value'], '.5g'))}\b", printed, re.M)
    flat = " ".join(printed.split())
    for metric in two["reconstruction"]:
        assert two["protocols"][metric].removesuffix(f"; {two['protocols']['images']}") in flat


@pytest.mark.slow
def test_within_a_trial_of_tune(photos, tmp_path):
    """An actor whose children Ray would place in what is reserved for itself; no MLflow, no weights, a model of
    diffusers."""
    import ray

    torch.manual_seed(0)
    blocks = {
        f"{side}_block_types": [f"{name}Block2D"] * 2 for side, name in (("down", "DownEncoder"), ("up", "UpDecoder"))
    }
    kl = AutoencoderKL(block_out_channels=(32, 32), **blocks, layers_per_block=1, norm_num_groups=8)
    kl.save_pretrained(tmp_path / "kl")
    cfg = config(tmp_path / "kl", photos, tmp_path / "out", images=4)
    start(cfg.ray)

    class Trial:
        def run(self):
            return evaluate(cfg), "mlflow" in sys.modules

    group = ray.util.placement_group([{"CPU": 0.01}])
    within = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
        group, placement_group_capture_child_tasks=True
    )
    trial = ray.remote(Trial).options(num_cpus=0.01, scheduling_strategy=within).remote()
    try:
        found, imported = ray.get(trial.run.remote(), timeout=300)
    finally:
        ray.kill(trial)
        ray.util.remove_placement_group(group)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == found
    assert (tmp_path / "out" / "feature_maps.png").is_file()
    assert not imported
    assert scored(found).keys() == {"artefacts", "artefacts/period", "imbalance"}
    assert found["scales"] == {}
    for name, remark in (("lpips-vgg", "no LPIPS: "), ("rfid", "no rFID: ")):  # the developer may have the weights
        said = any(line.startswith(remark) for line in found["remarks"])
        assert (name in found["reconstruction"]) != said
    assert {"psnr", "ssim"} <= found["reconstruction"].keys()


def test_what_is_kept_does_not_grow_with_the_images(weights):
    total, sizes = Total([SqueezeNetCaffe(weights["squeezenet"])]), []
    draw = np.random.default_rng(0)
    for number in range(300):
        values = {"reconstruction/psnr": draw.random(16), "bicubic/psnr": draw.random(16), "imbalance": draw.random(16)}
        pair = draw.random((2, 16, 512), dtype=np.float32)
        total.add(Measured(16, 1.0, 1.0, values, {"squeezenet-caffe": (pair[0], pair[1])}))
        if number in (9, 299):
            sizes.append(len(pickle.dumps(total)))
    assert total.images == 4800
    assert sizes[1] < sizes[0] + 100
    assert total.numbers["reconstruction"].keys() == {"psnr", "frechet/squeezenet-caffe"}


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


@pytest.mark.usefixtures("in_process")
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
    refused("must be at least 32", transform={"resolution": 16})
    five = {f"{side}_block_out_channels": (16,) * 5 for side in ("encoder", "decoder")}
    five |= {f"num_{side}_blocks": (1,) * 5 for side in ("encoder", "decoder")}
    AutoencoderTiny(**five).save_pretrained(tmp_path / "tiny")
    refused("resolution=72: .*tiny takes multiples of 16", model=str(tmp_path / "tiny"), transform={"resolution": 72})
    refused("no weights file", lpips_weights=str(tmp_path / "no.pth"))
    refused("no weights file", backbone=str(tmp_path / "no.pth"))
    refused("resolutions=100: .* takes multiples of 8 px", resolutions=[96, 100])
    refused("mmd_images=5, but 4 images are measured", images=4, mmd_images=5)
    refused("equivariance_images=5, but 4 images are measured", images=4, equivariance_images=5)
    assert not (tmp_path / "out").exists()
    refused("none of 1 images could be read: a.png", source={"uri": str(broken)})
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert main(Evaluate, evaluate, ["model=nowhere", f"source.uri={photos}"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.usefixtures("in_process")
def test_a_broken_model_stops_it(photos, tmp_path):
    torch.manual_seed(0)
    vae = LiteVAE.from_preset("S", latent_channels=4, block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    torch.nn.init.constant_(next(vae.decoder.parameters()), float("nan"))
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="NaN"):
        evaluate(config(tmp_path / "vae", photos, tmp_path / "out", images=4))
