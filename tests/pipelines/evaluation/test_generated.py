"""evaluate samples and latents: numbers against torch-fidelity on features computed apart, kept references, mistakes.
Networks have random weights, so no number means anything."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage.data
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from jobs.evaluate import ACTIONS
from litevae.cache import LatentCache
from litevae.errors import UserError
from litevae.generation import Backbone, Inception, SqueezeNetCaffe, mmd
from pipelines.encoding import encode
from pipelines.evaluation import generated, latent_mmd
from pipelines.evaluation.config import Evaluate, EvaluateLatents, EvaluateSamples
from pipelines.runtime.cli import main
from pipelines.runtime.schema import validate
from tests import encoding
from tests.in_process import in_process
from tests.networks import save_inception, save_resnet, save_squeezenet

SIDE, REAL, FAKE = 48, 18, 15


def tiles(count: int, picture: np.ndarray, step: int) -> list[np.ndarray]:
    return [
        picture[y : y + SIDE, x : x + SIDE]
        for y, x in (
            (step * n % (picture.shape[0] - SIDE), 3 * step * n % (picture.shape[1] - SIDE)) for n in range(count)
        )
    ]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return {
        "inception": str(save_inception(folder / "inception.pth")),
        "squeezenet": str(save_squeezenet(folder / "squeezenet.pth")),
        "backbone": str(save_resnet(folder / "resnet.pth")),
        "backbone_model": "resnet18",
    }


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Photos, one of them larger and one of them broken, in two classes."""
    folder = tmp_path_factory.mktemp("real")
    for number, pixels in enumerate(tiles(REAL, skimage.data.astronaut(), 17)):
        (folder / f"class{number // 9}").mkdir(exist_ok=True)
        image = Image.fromarray(pixels)
        if number == 3:
            image = image.resize((2 * SIDE, 3 * SIDE))
        image.save(folder / f"class{number // 9}" / f"{number:02}.png")
    (folder / "class0" / "05a.jpg").write_text("not a photo")
    return folder


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """Images and a picture of them."""
    folder = tmp_path_factory.mktemp("fake")
    for number, pixels in enumerate(tiles(FAKE, skimage.data.coffee(), 13)):
        Image.fromarray(pixels).save(folder / f"{number:06d}.png")
    Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(folder / "grid.png")
    return folder


def config(fake, real, out, /, **more) -> EvaluateSamples:
    values = {
        "samples": {"uri": str(fake)},
        "source": {"uri": str(real)},
        "transform": {"resolution": SIDE},
        "batch_size": 4,
        "out": str(out / "out"),
        "root": str(out / "runs"),
        "overwrite": True,
        "tracking": {"enabled": False},
        "ray": {"gpu": False, "cpus_per_worker": 1},
    }
    return validate(EvaluateSamples, values | more)


def values(summary) -> dict[str, float]:
    return {score["name"]: score["value"] for score in summary["metrics"]}


def pixels_of(folder) -> np.ndarray:
    """Shorter side to the resolution, centre crop, by Pillow alone."""
    found = []
    for path in sorted(folder.rglob("*.png")):
        image = Image.open(path)
        scale = SIDE / min(image.size)
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        left, top = ((side - SIDE) // 2 for side in image.size)
        if path.name != "grid.png":
            found.append(np.asarray(image.crop((left, top, left + SIDE, top + SIDE))))
    return np.stack(found)


@pytest.fixture(scope="module", autouse=True)
def _small_images_for_inception():
    """It resizes what it gets, to 299 pixels (tested beside the network itself); an eighth of the work will do here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 107)
        yield


@pytest.fixture(scope="module")
def summary(fake, real, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    with in_process():
        return generated.samples(config(fake, real, out, tracking={"enabled": True}, **weights)) | {"at": out}


def frechet_of_few(a: torch.Tensor, b: torch.Tensor) -> float:
    """By hand: with C = X'X of each side, the root of C_a C_b has the singular values of X_a X_b' as its trace."""
    x, y = ((side - side.mean(0)) / (len(side) - 1) ** 0.5 for side in (a, b))
    spread = x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + spread).item()


def test_numbers_are_torch_fidelitys(summary, fake, real, weights):
    found = values(summary)
    resnet = Backbone(weights["backbone_model"], weights["backbone"])
    for network in (Inception(weights["inception"]), SqueezeNetCaffe(weights["squeezenet"]), resnet):
        (drawn, logits), (reference, _) = (network(pixels_of(folder)) for folder in (fake, real))
        if logits is None:
            both = [fid_features_to_statistics(each.double()) for each in (drawn, reference)]
            expected = fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"]
        else:  # whose root of 2048 x 2048 takes ten seconds
            expected = frechet_of_few(drawn.double(), reference.double())
        assert found[f"frechet/{network.name}"] == pytest.approx(expected, rel=1e-3)
        prc = prc_features_to_metric(drawn.double(), reference.double(), verbose=False)
        assert found[f"precision/{network.name}"] == pytest.approx(prc["precision"])
        assert found[f"recall/{network.name}"] == pytest.approx(prc["recall"])
        if logits is not None:
            isc = isc_features_to_metric(logits)
            assert found[f"inception_score/{network.name}"] == pytest.approx(isc["inception_score_mean"], rel=1e-3)
    assert len(found) == 10
    assert "fid" not in found  # these weights make none
    assert (summary["samples"]["images"], summary["reference"]["images"]) == (FAKE, REAL)
    assert [bad["id"] for bad in summary["reference"]["unreadable"]] == ["class0/05a.jpg"]


def test_protocols_name_what_the_numbers_depend_on(summary, fake, real, capsys):
    for score in summary["metrics"]:
        sets = f"{FAKE} generated images of {SIDE} px, as they are"
        assert sets in score["protocol"]
        if not score["name"].startswith("inception_score"):
            assert f"against {REAL} of {real}, shorter side to {SIDE} px (Pillow" in score["protocol"]
        assert (f"CAUTION: {FAKE} images" in score["protocol"]) == score["name"].startswith("frechet")
        libraries = {
            "inception": "torch-fidelity 0",
            "squeezenet": "SqueezeNet 1.1 (Caffe",
            "resnet18": "torchvision's",
        }
        (library,) = (text for name, text in libraries.items() if name in score["name"])
        assert library in score["protocol"]
    text = generated.summary_text(summary, "out", verbose=True)
    assert "Frechet distance on squeezenet-caffe features" in text
    assert "1 unreadable left out: class0/05a.jpg (not_an_image)" in text
    for score in summary["metrics"]:
        assert f"{score['value']:.5g}" in text
    flat = " ".join(text.split())
    assert all(score["protocol"] in flat for score in summary["metrics"])


def test_it_is_written_and_logged(summary):
    from mlflow import MlflowClient

    saved = json.loads((summary["at"] / "out" / "metrics.json").read_text())
    assert saved == {key: value for key, value in summary.items() if key != "at"}
    client = MlflowClient(f"sqlite:///{summary['at']}/runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("litevae").experiment_id])
    assert run.info.status == "FINISHED"
    for name, value in values(summary).items():
        assert run.data.metrics[f"eval/{name}"] == value


@pytest.mark.slow
def test_two_workers_parquet_and_a_kept_reference_give_the_same(fake, real, weights, tmp_path, monkeypatch):
    """The same samples in Parquet, in a folder as a sample job leaves it; the reference set is not read again."""
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 299)  # as in Ray's workers
    with in_process():
        one = generated.samples(config(fake, real, tmp_path, **weights))
    drawn = tmp_path / "drawn"
    parquet = drawn / "parquet"
    parquet.mkdir(parents=True)
    rows = [{"id": path.stem, "image": path.read_bytes()} for path in sorted(fake.glob("0*.png"))]
    pq.write_table(pa.Table.from_pylist(rows), parquet / "part-000000.parquet")
    shutil.copy(fake / "grid.png", drawn)
    (drawn / "sampling.json").write_text("{}")
    read = []
    over = generated.image_batches.process_batches
    monkeypatch.setattr(generated.image_batches, "process_batches", lambda *a: read.append(a[2].uri) or over(*a))
    ray = {"gpu": False, "cpus_per_worker": 1, "workers": 2, "decode_tasks": 1}
    with pytest.raises(UserError, match="the sample job is not finished"):
        generated.samples(config(drawn, real, tmp_path, ray=ray, **weights))
    (drawn / "samples.json").write_text("{}")
    two = generated.samples(config(drawn, real, tmp_path, ray=ray, **weights))
    assert values(two) == values(one)  # to the last bit
    assert read == [str(parquet)]
    assert two["reference"]["unreadable"] == one["reference"]["unreadable"]
    assert not two["remarks"]


@pytest.mark.usefixtures("in_process")
def test_a_set_against_itself(real, weights, tmp_path):
    same = tmp_path / "same"
    same.mkdir()
    for number, pixels in enumerate(tiles(REAL, skimage.data.astronaut(), 17)):
        Image.fromarray(pixels).save(same / f"{number:06d}.png")
    found = values(
        generated.samples(config(same, same, tmp_path, squeezenet=weights["squeezenet"], **missing(tmp_path)))
    )
    assert found["frechet/squeezenet-caffe"] == pytest.approx(0, abs=1e-3)
    assert (found["precision/squeezenet-caffe"], found["recall/squeezenet-caffe"]) == (1, 1)


def missing(folder) -> dict[str, str]:
    """No weights of Inception, also where the developer has them."""
    torch.hub.set_dir(str(folder))
    return {"inception": ""}


@pytest.fixture(autouse=True)
def _hub():
    before = torch.hub._hub_dir
    yield
    torch.hub.set_dir(before) if before else setattr(torch.hub, "_hub_dir", None)


def kept(cfg):
    source = generated.open_source(cfg.source)
    images = generated._set(
        source, generated.ImageTransform(SIDE), cfg.reference_images, cfg.pr_images, "reference_images"
    )
    network = SqueezeNetCaffe(cfg.squeezenet)
    return generated.FeatureCache(cfg.root + "/references", images, network), images


@pytest.fixture
def reference(real, fake, weights, tmp_path):
    """A kept file of SqueezeNet's features, made up."""
    cfg = config(fake, real, tmp_path, squeezenet=weights["squeezenet"])
    file, images = kept(cfg)
    found = generated.Features(generated.FrechetStatistics(512), [torch.randn(9, 512), torch.randn(2, 512)])
    found.statistics.add(torch.cat(found.kept))
    images.features["squeezenet-caffe"] = found
    images.bad = [generated.UnreadableImage("a", "b", "c")]
    file.save()
    return cfg, file, found


def test_what_is_kept_comes_back_for_the_same_set_only(reference, real, fake, tmp_path):
    cfg, file, found = reference
    again, images = kept(cfg)
    assert again.load() == ""
    assert images.bad == [generated.UnreadableImage("a", "b", "c")]
    loaded = images.features["squeezenet-caffe"]
    assert loaded.statistics.count == 11
    assert torch.equal(loaded.statistics.outer, found.statistics.outer)
    assert torch.equal(torch.cat(loaded.kept), torch.cat(found.kept))
    other = save_squeezenet(tmp_path / "other.pth")
    state = torch.load(other)
    torch.save({key: value + 1 for key, value in state.items()}, other)
    moved = shutil.copytree(real, tmp_path / "moved")
    grown = shutil.copytree(real, tmp_path / "grown")
    shutil.copy(real / "class0" / "00.png", grown)
    assert (
        kept(cfg.model_copy(update={"source": cfg.source.model_copy(update={"uri": str(moved)})}))[0].path == file.path
    )
    for update in (
        {"reference_images": 12},
        {"pr_images": 12},
        {"squeezenet": str(other)},
        {"source": cfg.source.model_copy(update={"uri": str(grown)})},
    ):
        another, images = kept(cfg.model_copy(update=update))
        assert another.path != file.path
        assert another.load() == ""
        assert not images.features


def test_a_damaged_or_foreign_file_is_not_believed(reference, tmp_path):
    cfg, file, _ = reference
    whole = Path(file.path).read_bytes()
    draw = np.random.default_rng(0)
    cases = [b"", b"text", whole[:1000], whole[:-30], whole.replace(b'"format": 1', b'"format": 2')]
    for place in draw.integers(len(whole), size=40):
        cases.append(whole[:place] + bytes([whole[place] ^ 1 << int(draw.integers(8))]) + whole[place + 1 :])
    refused = 0
    for data in cases:
        Path(file.path).write_bytes(data)
        again, images = kept(cfg)
        remark = again.load()
        if remark:
            assert file.path in remark
            assert "computed again" in remark
            assert not images.features
            refused += 1
        else:  # a bit that says nothing, such as a time stamp's in the zip's directory
            assert torch.equal(images.features["squeezenet-caffe"].statistics.outer, reference[2].statistics.outer)
    assert refused >= 40


@pytest.mark.usefixtures("in_process")
def test_images_are_taken_evenly_and_as_many_as_said(fake, real, weights, tmp_path, capsys):
    more = {"images": 12, "reference_images": 13, "pr_images": 10, "squeezenet": weights["squeezenet"], "verbose": True}
    summary = generated.samples(config(fake, real, tmp_path, **more, **missing(tmp_path)))
    assert (summary["samples"]["images"], summary["reference"]["images"]) == (12, 13)
    assert {score["name"] for score in summary["metrics"]} == {
        f"{name}/squeezenet-caffe" for name in ("frechet", "precision", "recall")
    }
    printed = " ".join(capsys.readouterr().out.split())  # lines are wrapped
    assert "12 generated images" in printed
    assert "10 generated images" in printed
    assert "FID and Inception Score are left out: no Inception weights: " in printed
    assert "weights-inception-2015-12-05-6726825d.pth" in printed
    network = SqueezeNetCaffe(weights["squeezenet"])
    whole = sorted([*real.rglob("*.png"), real / "class0" / "05a.jpg"])
    paths = [whole[n * 19 // 13] for n in range(13)]  # two of three, from both classes, and not the broken one
    stats = []
    for pixels in (pixels_of(fake)[[n * FAKE // 12 for n in range(12)]], None):
        if pixels is None:
            everything = dict(zip(sorted(real.rglob("*.png")), pixels_of(real), strict=True))
            pixels = np.stack([everything[path] for path in paths])
        stats.append(fid_features_to_statistics(network(pixels)[0].double()))
    expected = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert values(summary)["frechet/squeezenet-caffe"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.usefixtures("in_process")
def test_mistakes_are_refused_with_nothing_written(fake, real, weights, tmp_path, capsys):
    squeezenet = {"squeezenet": weights["squeezenet"]}

    def refused(match: str, where=fake, **more) -> None:
        with pytest.raises(UserError, match=match):
            generated.samples(config(where, real, tmp_path, **missing(tmp_path) | more))

    refused(r"no network has weights: no Inception weights.*weights-inception.*does not exist.*squeezenet=FILE")
    refused("no weights file at", inception=str(tmp_path / "no.pth"))
    refused("samples.uri is empty", where="", **squeezenet)
    refused(r"samples\.uri=.* does not exist", where=tmp_path / "no", **squeezenet)
    refused("source.uri is empty", source={"uri": ""}, **squeezenet)
    refused(f"images={FAKE + 1}, but .* has {FAKE}", images=FAKE + 1, **squeezenet)
    refused("reference_images=99, but .* has 19", reference_images=99, **squeezenet)
    refused("must be at least 32", transform={"resolution": 16}, **squeezenet)
    refused(
        r"000000\.png has 48x48 pixels.*not resized; set transform\.resolution to their size \(now 64\)",
        transform={"resolution": 64},
        **squeezenet,
    )
    only_grid = tmp_path / "grid"
    only_grid.mkdir()
    shutil.copy(fake / "grid.png", only_grid)
    refused("no images except grid.png", where=only_grid, **squeezenet)
    assert not (tmp_path / "out").exists()
    refused(r"9 of 9 images could be read; judging needs at least 10", images=9, **squeezenet)
    assert not (tmp_path / "out" / "metrics.json").exists()
    words = ["--print-config", "/data/samples", "source.uri=/data/photos"]
    assert main(Evaluate, generated.samples, ["samples", *words], actions=ACTIONS) == 0
    assert "samples:\n  uri: /data/samples\n" in capsys.readouterr().out


# --- latents ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    (root / "photos").mkdir()
    out = root / "cache"
    with in_process():
        encode.run(encoding.config(encoding.photo_folder(root / "photos"), encoding.save_model(root / "vae"), out))
    return out


def about(cache, out, **more) -> EvaluateLatents:
    fixed = {"cache": str(cache), "out": str(out / "out"), "root": str(out / "runs"), "tracking": {"enabled": False}}
    return validate(EvaluateLatents, fixed | more)


def test_mmd_of_a_cache(cache, tmp_path, capsys):
    summary = latent_mmd.mmd(about(cache, tmp_path, subset=20, seed=3, tracking={"enabled": True}, verbose=True))
    rows = LatentCache(cache)
    found = values(summary)
    for kind, normalize in (("normalised", True), ("raw", False)):
        expected = mmd(rows.latents(range(45), 0, 3, normalize=normalize), subset=20, seed=3)
        for sigma, (value, std) in expected.items():
            (score,) = (each for each in summary["metrics"] if each["name"] == f"mmd/{kind}/{sigma:g}")
            assert found[score["name"]] == pytest.approx(value, rel=1e-9)
            assert score["std"] == pytest.approx(std, rel=1e-9)
            assert "45 latents of 4x4x4, drawn from the moments, in 2 subsets of 20" in score["protocol"]
    assert len(found) == 10
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == summary
    printed = capsys.readouterr().out
    assert "MMD², raw, sigma 250" in printed
    assert "unbiased" in printed

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("litevae").experiment_id])
    assert run.data.metrics["eval/mmd/raw/25"] == found["mmd/raw/25"]


def test_mmd_options_and_mistakes(cache, tmp_path):
    few = latent_mmd.mmd(about(cache, tmp_path, images=15, sigmas=[2, 2.5], draw="mean"))
    rows = [n * 45 // 15 for n in range(15)]
    expected = mmd(LatentCache(cache).latents(rows, 0, 0, "mean"), (2.0, 2.5), subset=15)
    assert values(few)["mmd/normalised/2.5"] == pytest.approx(expected[2.5][0], rel=1e-9)
    assert few["metrics"][0]["std"] is None
    assert "15 latents of 4x4x4, means, in 1 subset of 15" in few["metrics"][0]["protocol"]
    with pytest.raises(UserError, match="cache is empty"):
        latent_mmd.mmd(about("", tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        latent_mmd.mmd(about(tmp_path / "no", tmp_path))
    with pytest.raises(UserError, match="sigmas"):
        about(cache, tmp_path, sigmas=[0])


@pytest.mark.usefixtures("in_process")
def test_mmd_of_buckets_is_of_the_most_frequent_shape(tmp_path):
    (tmp_path / "photos").mkdir()
    photos = encoding.photo_folder(tmp_path / "photos", 20)
    for number in range(30):
        Image.fromarray(skimage.data.coffee()[: 90 + number, :45]).save(photos / "dogs" / f"tall{number}.png")
    more = ("transform.buckets=true", "transform.bucket_step=8", "transform.resolution=32", "error_budget=0.5")
    encode.run(encoding.config(photos, encoding.save_model(tmp_path / "vae"), tmp_path / "cache", *more))
    summary = latent_mmd.mmd(about(tmp_path / "cache", tmp_path))
    assert (summary["images"], summary["cache"]["rows"]) == (30, 50)
    assert summary["cache"]["shape"] == [4, 5, 3]
    assert "30 of 50" in summary["remarks"][0]
    cache = LatentCache(tmp_path / "cache")
    tall = [row for row in range(50) if "tall" in cache.row(row)["id"]]
    expected = mmd(cache.latents(tall, 0, 0), subset=30)
    assert values(summary)["mmd/normalised/25"] == pytest.approx(expected[25][0], rel=1e-9)
