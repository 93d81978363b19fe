"""Parts of what judges images by themselves, with stand-ins for models and networks: which set is which, what is a mean
of what, which images are shown, and what is said of a number."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.functional.image import peak_signal_noise_ratio

from litevae import generation, metrics
from litevae.images import ImageError, ImageTransform, to_tensor
from pipelines.evaluation import cost, generated, image_batches, latent_mmd, reconstruction, report
from pipelines.evaluation.config import Evaluate
from pipelines.evaluation.image_batches import PixelBatch, UnreadableImage
from pipelines.evaluation.report import Score
from pipelines.runtime import tables
from pipelines.runtime.schema import validate

DRAW = np.random.default_rng(0)


class Network:
    """Features of an image are its mean colours; there are logits, too."""

    name, dimension, sha256, protocol = "colours", 3, "5" * 64, "colours' protocol"

    def __init__(self, name="colours", logits=True):
        self.name, self.logits, self.seen = name, logits, []

    def __call__(self, pixels):
        self.seen.append(pixels)
        features = torch.tensor(pixels.mean(axis=(1, 2)))
        return features, features.repeat(1, 2) if self.logits else None


class Photos:
    """Images of one colour each, of which some can't be read."""

    uri, digest, units, kind, bad = "/photos", "d", 40, "folder", (5, 9)

    def id(self, unit):
        return f"{unit}.png"

    def data(self, unit):
        if unit in self.bad:
            raise ImageError("empty", f"no {unit}")
        return unit


def transform(unit):
    return SimpleNamespace(pixels=np.full((4, 4, 3), (unit, 2 * unit, 255 - unit), np.uint8))


transform.resolution, transform.resize = 4, "shorter"


# --- reading ------------------------------------------------------------------------------------------------------


def test_a_batch_is_what_can_be_read():
    whole, none = image_batches._read(Photos(), transform, [range(3, 7), [9]])
    assert whole.units == [3, 4, 6]
    assert whole.pixels[:, 0, 0].tolist() == [[3, 6, 252], [4, 8, 251], [6, 12, 249]]
    assert whole.bad == [UnreadableImage("5.png", "empty", "no 5")]
    assert (none.pixels.shape, none.units, none.bad) == ((0, 4, 4, 3), [], [UnreadableImage("9.png", "empty", "no 9")])


def test_images_are_taken_evenly():
    assert image_batches.evenly_spaced(range(10), 4) == [0, 2, 5, 7]
    assert image_batches.evenly_spaced([3, 5, 8], 3) == [3, 5, 8]
    assert image_batches.evenly_spaced([3, 5, 8], 2) == [3, 5]


def test_a_few_names_are_given():
    bad = [UnreadableImage(f"{n}.png", "empty", "") for n in range(7)]
    assert image_batches.describe_unreadable(bad[:2]) == "0.png (empty), 1.png (empty)"
    assert image_batches.describe_unreadable(bad[:5]).endswith("4.png (empty)")
    assert image_batches.describe_unreadable(bad).endswith("4.png (empty) and 2 more")


def test_chunks_hold_64_megabytes_and_give_each_worker_four():
    assert [len(part) for part in image_batches.chunks(range(1000), 10, 64, 5)] == [5] * 20
    assert [len(part) for part in image_batches.chunks(range(1000), 16, 512, 1)] == [5] * 12 + [3]  # 12.6 MB a batch
    assert [len(part) for part in image_batches.chunks(range(30), 10, 64, 5)] == [1, 1, 1]


# --- scores -------------------------------------------------------------------------------------------------------


def test_few_images_are_warned_of():
    network = SimpleNamespace(dimension=512)
    assert report.small_sample_warning(513, network) == []
    for count in (512, 3):
        (said,) = report.small_sample_warning(count, network)
        assert said.startswith(f"CAUTION: {count} images give a singular covariance of 512 features")


def test_how_images_were_brought_to_their_size():
    assert report.describe_transform(ImageTransform(64, "none")) == "centre crop of 64 px, not resized"
    assert report.describe_transform(ImageTransform(64)).startswith("shorter side to 64 px (Pillow ")


def test_scores_are_written_and_logged(tmp_path):
    logged, kept = {}, []
    tracker = SimpleNamespace(metrics=lambda values, step: logged.update({step: values} | values), artifact=kept.append)
    marks = [Score("fid", "FID", 1.5, None, "p"), Score("is", "IS", 2.0, 0.25, "p"), Score("x", "Long", 3.0, None, "q")]
    summary = {"metrics": [mark._asdict() for mark in marks], "remarks": ["no LPIPS"], "run": "link"}
    report.write_scores(summary, str(tmp_path), tracker)
    assert json.loads((tmp_path / "metrics.json").read_text()) == summary
    assert kept == [f"{tmp_path}/metrics.json"]
    assert {k: v for k, v in logged.items() if k} == {
        "eval/fid": 1.5,
        "eval/is": 2.0,
        "eval/is_std": 0.25,
        "eval/x": 3.0,
    }
    assert 0 in logged
    scores = ["         value", "FID        1.5", "IS    2 ± 0.25", "Long         3", ""]
    assert report.report(summary, "out", verbose=True).split("\n") == [
        *scores, "FID, IS: p", "Long: q", "", "no LPIPS", "metrics   out/metrics.json", "run       link",
    ]  # fmt: skip
    assert report.report(summary, "out", verbose=False).split("\n") == [
        *scores, "no LPIPS", "metrics   out/metrics.json   (also how each number was measured)", "run       link",
    ]  # fmt: skip


NUMBERS = {
    "psnr": 22.21,
    "a distance of features with a very long name, as some backbones have it": 0.001,
    "rfid": 99.5,
}
SCORES = [
    Score(f"s{n}", f"a score of images whose title says all that can be said of it, number {n}", n / 7, n and 0.1,
          f"protocol {n}: " + "a long sentence about how it was measured, and why; " * 3)
    for n in range(3)
]  # fmt: skip
LONG = "/data/a folder with a long name/" + "and/another/one/" * 6
ABOUT = {
    "images": 12,
    "uri": LONG,
    "unreadable": [{"id": f"{n}.png", "reason": "corrupt", "message": ""} for n in range(9)],
}
OF_IMAGES = f"1,000 images, shorter side to 256 px, centre crop {'and more ' * 9}"
SUMMARIES = {
    "reconstruction": (reconstruction.summary_text, {
        "reconstruction": NUMBERS, "bicubic": {"psnr": 19.9}, "downsampling": 8, "unreadable": ABOUT["unreadable"],
        "source": {"uri": LONG},
        "scales": {str(32 * n): {"images": 9, "reconstruction": NUMBERS} for n in range(1, 15)},
        "protocols": {"images": OF_IMAGES, "reconstruction": "decoded mean of the latent",
                      **dict.fromkeys(NUMBERS, f"measured so; CAUTION: few images; {OF_IMAGES}")},
        "images_per_s": {"encoder": 1234.5, "decoder": 99.1, "evaluation": 3.25},
        "parameters": {"encoder": 34_160_000, "decoder": 49_490_000}, "pictures": ["reconstructions.png"],
    }),
    "samples": (generated.summary_text, {"samples": ABOUT, "reference": ABOUT}),
    "latents": (report.report, {}),
    "complexity": (cost.summary_text, {
        "batch_size": 32, "resolution": 256, "precision": "fp32", "compile": True, "repeats": 10, "warmup": 2,
        "machine": "2 threads of a processor with a name that is long enough to be wrapped, torch 2.14.1+cu130",
        "part": "encoder", "baseline": LONG, "protocols": {name: each.protocol for name, each in cost.COLUMNS.items()},
        "complexity": {LONG: {f"{name}{end}": 123456.789 for name in cost.COLUMNS for end in ("", "_low", "_high")}},
        "against": {LONG: dict.fromkeys(cost.COLUMNS, 1.0)},
    }),
}  # fmt: skip


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("kind", SUMMARIES)
def test_results_fit_onto_a_page_and_say_how_they_were_measured_if_asked(kind, verbose):
    text, summary = SUMMARIES[kind]
    shared = {
        "metrics": [each._asdict() for each in SCORES],
        "remarks": [f"no LPIPS: {LONG} is missing"],
        "run": "link",
    }
    shown = text(shared | summary, "out", verbose)
    whole = LONG.split()[-1]  # paths are not broken
    assert max(len(line) for line in shown.splitlines() if whole not in line) <= tables.WIDTH
    flat = " ".join(shown.split())
    protocols = {"complexity": cost.COLUMNS["memory_mb"].protocol, "reconstruction": "measured so"}
    assert (protocols.get(kind, SCORES[1].protocol.strip()) in flat) is verbose
    assert "out/metrics.json" in shown
    if kind == "reconstruction":
        assert "CAUTION: few images" in flat  # what misleads is said without being asked for
        assert "99.5000" in shown
        assert "19.9000" in shown
    if kind != "complexity":
        assert all(f"{each.value:.5g}" in shown for each in SCORES)


def test_networks_are_those_with_weights(monkeypatch):
    monkeypatch.setattr(report, "Inception", lambda file: f"inception {file}")
    monkeypatch.setattr(report, "SqueezeNetCaffe", lambda file: f"squeezenet {file}")
    monkeypatch.setattr(report, "Backbone", lambda model, file: f"{model} {file}")
    assert report.networks("a", "b", "c", "m") == (["inception a", "squeezenet b", "m c"], [])
    assert report.networks("") == (["inception "], [])

    def missing(file):
        raise report.WeightsMissing("no weights")

    monkeypatch.setattr(report, "Inception", missing)
    assert report.networks("", "b") == (["squeezenet b"], ["no weights"])


def test_tables_have_columns():
    assert tables.table([["", "one"], ["long", "2"]]) == "      one\nlong    2"


# --- evaluate -----------------------------------------------------------------------------------------------------


def test_means_are_of_images_not_of_batches():
    total = reconstruction.Total([Network()])
    batches = [DRAW.random(size) for size in (5, 1, 3)]
    pairs = [(DRAW.random((size, 3)), DRAW.random((size, 3))) for size in (5, 1, 3)]
    for number, (values, pair) in enumerate(zip(batches, pairs, strict=True)):
        named = {"reconstruction/psnr": values, "bicubic/psnr": values + 1, "imbalance": values * 2}
        part = reconstruction.Measured(
            len(values), 1.0, 2.0, named, {"colours": pair}, [UnreadableImage(str(number), "r", "m")]
        )
        part.latents = np.full((len(values), 2), number) if number else None
        part.pictures, part.maps = ((f"p{number}",), ()) if number == 1 else ((), (f"m{number}",))
        total.add(part)
    every = np.concatenate(batches)
    assert (total.images, total.encode_seconds, total.decode_seconds) == (9, 3, 6)
    assert total.numbers["reconstruction"]["psnr"] == pytest.approx(every.mean())
    assert total.numbers["bicubic"] == {"psnr": pytest.approx(every.mean() + 1)}
    assert total.means["imbalance"].value() == pytest.approx(2 * every.mean())
    sides = [fid_features_to_statistics(torch.tensor(np.concatenate(side))) for side in zip(*pairs, strict=True)]
    expected = fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]
    assert total.numbers["reconstruction"]["frechet/colours"] == pytest.approx(expected, rel=1e-6)
    assert [bad.id for bad in total.bad] == ["0", "1", "2"]
    assert [part.tolist() for part in total.latents] == [[[1, 1]], [[2, 2]] * 3]
    assert (total.pictures, total.maps) == ([("p1",)], [("m0",), ("m2",)])
    one = reconstruction.Total([Network()])
    one.add(reconstruction.Measured(1, features={"colours": (pairs[1][0], pairs[1][1])}))
    assert one.numbers == {"reconstruction": {}, "bicubic": {}}
    assert (reconstruction._frechet("inception"), reconstruction._frechet("x")) == ("rfid", "frechet/x")


def evaluator(monkeypatch, posterior=True, networks=(), **more):
    """A worker whose autoencoder has f = 2: a latent is the means of 2 x 2 pixels, with log-variances of 9, and what is
    decoded is twice as far from gray."""
    found = reconstruction.Evaluator.__new__(reconstruction.Evaluator)
    found.cfg = validate(Evaluate, {"precision": "fp32", "mmd_images": 6, "transform": {"resolution": 8}} | more)
    found.device, found.factor, found.posterior, found.maps = torch.device("cpu"), 2, posterior, None

    def encode(model, x):
        mean = torch.nn.functional.avg_pool2d(x, 2)
        return torch.cat([mean, torch.full_like(mean, 9)], dim=1) if posterior else mean

    def decode(z, return_dict):
        assert not return_dict
        found.maps = z.repeat(1, 4, 1, 1) if networks else None
        return (torch.nn.functional.interpolate(z, scale_factor=2) * 2,)

    monkeypatch.setattr(reconstruction, "encode_latents", encode)
    found.model = SimpleNamespace(decode=decode)
    measures = {
        "psnr": reconstruction.METRICS["psnr"],
        "first": reconstruction.QualityMetric("", "", lambda x, y: x[:, 0, 0, 0]),
    }
    found.judges = SimpleNamespace(metrics=measures, networks=list(networks))
    return found


def batch_of(units):
    smooth = np.add.outer(np.arange(8), np.arange(8))[..., None] * np.array([9, 5, 1])
    pixels = np.stack([(smooth + 11 * unit) % 256 for unit in units]).astype(np.uint8)
    return PixelBatch(pixels, list(units), [UnreadableImage("x", "r", "m")])


@pytest.mark.parametrize("posterior", [True, False])
def test_a_batch_is_measured_beside_bicubic(monkeypatch, posterior):
    network = Network()
    worker, batch = evaluator(monkeypatch, posterior, [network]), batch_of([2, 3, 5, 6])
    (found,) = worker.measure([batch], [3], True)
    x = to_tensor(batch.pixels)
    mean = torch.nn.functional.avg_pool2d(x, 2)
    y = (torch.nn.functional.interpolate(mean, scale_factor=2) * 2).clamp(-1, 1)
    rounded = ((y + 1) * 127.5).round()
    for which, other in (("reconstruction", y), ("bicubic", metrics.bicubic_baseline(x, 2))):
        sides = [((each + 1) * 127.5).round().double() for each in (x, other)]
        expected = [peak_signal_noise_ratio(a, b, data_range=255.0).item() for a, b in zip(*sides, strict=True)]
        np.testing.assert_allclose(found.values[f"{which}/psnr"], expected, rtol=1e-4)
        np.testing.assert_allclose(found.values[f"{which}/first"], x[:, 0, 0, 0])  # originals come first
    assert (found.images, found.bad) == (4, batch.bad)
    assert found.encode_seconds > 0 < found.decode_seconds
    before, after = found.features["colours"]
    np.testing.assert_allclose(before, batch.pixels.mean((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(after, rounded.mean((2, 3)), rtol=1e-6)
    assert network.seen[1].dtype == np.uint8
    shown, reconstructed, latent = found.pictures
    assert torch.equal(shown, x[:3])
    assert torch.equal(reconstructed, y[:3])
    assert torch.equal(latent, mean[:3])
    assert found.latents.shape == ((3, 6, 4, 4) if posterior else (3, 3, 4, 4))  # of images 2, 3 and 5: before 6
    np.testing.assert_array_equal(found.latents[:, :3], mean[:3])
    maps = mean.repeat(1, 4, 1, 1)
    np.testing.assert_allclose(found.values["imbalance"], metrics.imbalance(maps), rtol=1e-6)
    assert torch.equal(found.maps[0], x[:2])  # images 2 and 3 of the first 4
    assert worker.maps is None


@pytest.mark.parametrize("posterior", [True, False])
def test_equivariance_is_measured_of_the_first_images(monkeypatch, posterior):
    worker, batch = evaluator(monkeypatch, posterior, [Network()], equivariance_images=4), batch_of([2, 3, 5, 6])
    (found,) = worker.measure([batch], [0], True)
    x = to_tensor(batch.pixels)[:2]  # images 2 and 3
    pool, resize = torch.nn.functional.avg_pool2d, torch.nn.functional.interpolate
    half = {"size": (4, 4), "mode": "bilinear", "antialias": True}
    smaller = {"size": (2, 2), "mode": "bilinear", "antialias": True}
    cases = {
        "turn": (x.rot90(1, (2, 3)), pool(x, 2).rot90(1, (2, 3))),
        "half": (resize(x, **half), resize(pool(x, 2), **smaller)),
        "both": (resize(x, **half).rot90(1, (2, 3)), resize(pool(x, 2), **smaller).rot90(1, (2, 3))),
    }
    for name, (target, z) in cases.items():
        for which, latents in (("latents", z), ("images", pool(target, 2))):
            decoded = (resize(latents, scale_factor=2) * 2).clamp(-1, 1)
            expected = metrics.psnr(target, decoded)
            np.testing.assert_allclose(found.values[f"equivariance/{name}/{which}"], expected, rtol=1e-5)
    maps = pool(to_tensor(batch.pixels), 2).repeat(1, 4, 1, 1)
    np.testing.assert_allclose(found.values["imbalance"], metrics.imbalance(maps), rtol=1e-6)  # of whole images
    total = reconstruction.Total([Network()])
    total.add(found)
    scores = reconstruction._equivariance_scores(total, 8)
    assert [score.name for score in scores] == [
        f"equivariance/{name}/{which}" for name in ("half", "turn", "both") for which in ("latents", "images")
    ]
    assert scores[0].value == pytest.approx(found.values["equivariance/half/latents"].mean())
    assert "2 images of 8 px" in scores[0].protocol
    (none,) = evaluator(monkeypatch).measure([batch], [0], True)
    assert not any(name.startswith("equivariance") for name in none.values)


def test_only_at_the_jobs_resolution_latents_and_maps_are_looked_at(monkeypatch):
    worker = evaluator(monkeypatch, networks=[Network()])
    (found,) = worker.measure([batch_of([0, 1])], [0], False)
    assert (found.latents, found.pictures, found.maps) == (None, (), ())
    assert "imbalance" not in found.values
    (empty,) = worker.measure(
        [PixelBatch(np.empty((0, 8, 8, 3), np.uint8), [], [UnreadableImage("x", "r", "m")])], [0], True
    )
    assert (empty.images, empty.values, empty.bad) == (0, {}, [UnreadableImage("x", "r", "m")])


def test_what_constant_colours_come_out_as(monkeypatch):
    """Colours of all corners and gray, in batches; clipped, they come back as they are."""
    worker = evaluator(monkeypatch, batch_size=4, transform={"resolution": 32})
    rms, period = worker.artefacts()
    assert (rms, period) == (pytest.approx(0, abs=1e-6), None)


@pytest.mark.parametrize(
    ("images", "pictures", "shown"),
    [(12, 5, [[0, 3], [6, 9], []]), (12, 12, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]), (3, 8, [[0, 1, 2]])],
)
def test_pictures_are_evenly_spaced(monkeypatch, images, pictures, shown):
    asked = []
    actor = SimpleNamespace(measure=SimpleNamespace(remote=lambda read, counts, whole: asked.append((counts, whole))))

    def over(units, call, source, transform, batch_size, actors, decoders):
        assert (transform.resolution, batch_size, actors, decoders) == (32, 5, [actor], 7)
        for start in range(0, len(units), 5):
            call(actor, "read", [units[start : start + 5]])
            yield [reconstruction.Measured(len(units[start : start + 5]))]

    monkeypatch.setattr(image_batches, "process_batches", over)
    values = {"transform": {"resolution": 32}, "batch_size": 5, "images": images, "pictures": pictures}
    cfg, judges = validate(Evaluate, values), SimpleNamespace(networks=[])
    total = reconstruction._measure(cfg, Photos(), 32, [actor], 7, judges)
    assert total.images == images
    assert asked == [([len(part)], True) for part in shown]
    asked.clear()
    other = validate(Evaluate, values | {"transform": {"resolution": 64}})
    reconstruction._measure(other, Photos(), 32, [actor], 7, judges)
    assert asked == [([0], False)] * len(shown)


@pytest.mark.parametrize("moments", [True, False])
def test_mmd_is_of_all_latents_normalised_by_their_own_channels(moments):
    generator = torch.Generator().manual_seed(1)
    raw = torch.randn(6, 2, 4, 4, generator=generator) * torch.tensor([3.0, 0.5]).view(1, 2, 1, 1) + 2
    log = torch.full_like(raw, -1.5)
    total = SimpleNamespace(latents=[*(torch.cat([raw, log], 1) if moments else raw).split(4)])
    if moments:
        raw = raw + np.exp(-0.75) * torch.randn(raw.shape, generator=torch.Generator().manual_seed(5))
    channels = raw.transpose(0, 1).flatten(1)
    normalised = (raw - channels.mean(1).view(1, 2, 1, 1)) / channels.std(1, correction=0).view(1, 2, 1, 1)
    found = reconstruction._mmd(validate(Evaluate, {"seed": 5}), total, moments)
    for kind, values in (("raw", raw), ("normalised", normalised)):
        for sigma, (value, _) in generation.mmd(values, seed=5).items():
            (score,) = [score for score in found if score.name == f"mmd/{kind}/{sigma:g}"]
            assert score.value == pytest.approx(value, rel=1e-4, abs=1e-9)
            said = "drawn from the posterior" if moments else "as the encoder gives them"
            assert f"6 latents of 2x4x4, {said}, in 1 subset of 6" in score.protocol


def test_subsets_of_an_mmd_are_told():
    values = torch.randn(50, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    found = latent_mmd.mmd_scores(values, values / 2, "the cache", "means", [2.0, 5.0], 20, 3)
    assert [score.name for score in found] == [f"mmd/{kind}/{s}" for kind in ("normalised", "raw") for s in (2, 5)]
    for scores_of, given in ((found[:2], values / 2), (found[2:], values)):
        expected = generation.mmd(given, [2.0, 5.0], 20, 3)
        assert [(score.value, score.std) for score in scores_of] == [*expected.values()]
    assert "50 latents of 3x2x2, means, in 2 subsets of 20" in found[0].protocol
    assert "to mean 0 and standard deviation 1 a channel over the cache" in found[0].protocol


@pytest.mark.parametrize(("side", "measured"), [(32, True), (31, False)])
def test_artefacts_are_looked_for_within_borders(monkeypatch, side, measured):
    monkeypatch.setattr(reconstruction, "spread", lambda actors, call, items: [(0.5, 8.0)])
    means = {"imbalance": SimpleNamespace(value=lambda: 0.25)}
    cfg = SimpleNamespace(transform=SimpleNamespace(resolution=side))
    remarks = []
    found = reconstruction._artefact_and_imbalance_scores(cfg, SimpleNamespace(means=means, images=7), 8, None, remarks)
    values = {score.name: score.value for score in found}
    assert values == ({"artefacts": 0.5, "artefacts/period": 8.0} if measured else {}) | {"imbalance": 0.25}
    assert [remark.split(":")[0] for remark in remarks] == ([] if measured else ["artefacts are left out"])
    monkeypatch.setattr(reconstruction, "spread", lambda actors, call, items: [(0.5, None)])
    found = reconstruction._artefact_and_imbalance_scores(cfg, SimpleNamespace(means={}, images=7), 8, None, remarks)
    assert [score.name for score in found] == (["artefacts"] if measured else [])


# --- judge --------------------------------------------------------------------------------------------------------


def set_of(features, logits=None, kept=slice(None)):
    statistics = generation.FrechetStatistics(features.shape[1])
    statistics.add(features)
    found = generated.Features(statistics, [features[kept]], [] if logits is None else [logits])
    transform = ImageTransform(64)
    result = generated.ImageSet(Photos(), transform, range(len(features)), frozenset(), {})
    return result, found


@pytest.mark.parametrize("name", ["inception", "colours"])
def test_generated_images_are_judged_by_the_reference(name):
    """Precision is the share of generated ones, and recall that of the reference: here they differ."""
    generator = torch.Generator().manual_seed(0)
    drawn, real = torch.randn(40, 3, generator=generator) * 0.3, torch.randn(60, 3, generator=generator)
    logits = torch.randn(40, 7, generator=generator)
    network = Network(name)
    (mine, own), (theirs, others) = set_of(drawn, logits, slice(0, 30)), set_of(real, kept=slice(0, 25))
    mine.features[name], theirs.features[name] = own, others
    found = {score.name: score for score in generated._scores(network, mine, theirs)}
    suffix = "" if name == "inception" else f"/{name}"
    distance = found["fid" if name == "inception" else f"frechet{suffix}"]
    sides = [fid_features_to_statistics(each.double()) for each in (drawn, real)]
    expected = fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]
    assert distance.value == pytest.approx(expected, rel=1e-5)
    prc = prc_features_to_metric(drawn[:30].double(), real[:25].double(), verbose=False)
    assert prc["precision"] > prc["recall"] + 0.1
    assert found[f"precision/{name}"].value == pytest.approx(prc["precision"])
    assert found[f"recall/{name}"].value == pytest.approx(prc["recall"])
    isc = isc_features_to_metric(logits)
    score = found[f"inception_score{suffix}"]
    assert score.value == pytest.approx(isc["inception_score_mean"], rel=1e-5)
    assert score.std == pytest.approx(isc["inception_score_std"], rel=1e-4)
    assert len(found) == 4
    assert "40 generated images of 64 px, as they are, against 60 of /photos" in distance.protocol
    assert "30 generated images of 64 px, as they are, against 25 of /photos" in found[f"recall/{name}"].protocol
    assert "CAUTION" not in distance.protocol
    network.dimension = 50  # more than there are generated images, though not than there are real ones
    assert "CAUTION: 40 images" in generated._scores(network, mine, theirs)[0].protocol
    own.logits.clear()
    assert len(generated._scores(network, mine, theirs)) == 3


def test_features_are_of_the_images_that_can_be_read(monkeypatch):
    network = Network(logits=False)
    worker = generated.Extractor.__new__(generated.Extractor)
    worker.networks = {"colours": network, "unwanted": None}
    actor = SimpleNamespace(extract=SimpleNamespace(remote=worker.extract))

    def over(units, call, source, transform, batch_size, actors, decoders):
        assert (batch_size, actors, decoders) == (6, [actor], 2)
        for part in image_batches.chunks(units, 3, 4, 1):
            yield call(actor, image_batches._read(source, transform, part), part)

    monkeypatch.setattr(image_batches, "process_batches", over)
    images = generated.ImageSet(Photos(), transform, range(2, 18), frozenset([2, 5, 7, 17]))
    generated._extract(images, [network], 6, [actor], 2, "samples")
    found, units = images.features["colours"], [unit for unit in range(2, 18) if unit not in (5, 9)]
    expected = np.array([[unit, 2 * unit, 255 - unit] for unit in units])
    assert found.statistics.count == images.images == 14
    np.testing.assert_allclose(found.statistics.mean, expected.mean(0))
    np.testing.assert_allclose(found.statistics.covariance, np.cov(expected.T), rtol=1e-6)
    assert torch.cat(found.kept)[:, 0].tolist() == [2, 7, 17]
    assert found.logits == []
    assert [bad.id for bad in images.bad] == ["5.png", "9.png"]
    assert images.about == {
        "uri": "/photos", "digest": "d", "images": 14,
        "unreadable": [{"id": f"{n}.png", "reason": "empty", "message": f"no {n}"} for n in (5, 9)],
    }  # fmt: skip
    few = generated.ImageSet(Photos(), transform, range(11), frozenset())
    with pytest.raises(generated.UserError, match=r"9 of 11 images could be read: 5.png \(empty\), 9.png \(empty\)"):
        generated._extract(few, [network], 6, [actor], 2, "samples")
    generated._extract(
        generated.ImageSet(Photos(), transform, range(12), frozenset()), [network], 6, [actor], 2, "samples"
    )


def test_a_set_takes_its_images_evenly():
    found = generated._set(Photos(), transform, 8, 3, "images")
    assert found.units == [0, 5, 10, 15, 20, 25, 30, 35]
    assert found.kept == {0, 10, 25}
    every = generated._set(Photos(), transform, 0, 100, "images", [3, 4, 5])
    assert (every.units, every.kept) == ([3, 4, 5], {3, 4, 5})
    with pytest.raises(generated.UserError, match="images=4, but /photos has 3"):
        generated._set(Photos(), transform, 4, 3, "images", [3, 4, 5])


def test_generated_images_are_not_resized(tmp_path):
    for size in ((48, 48), (48, 64), (32, 32)):
        Image.new("RGB", size).save(tmp_path / "a.png")
        data = (tmp_path / "a.png").read_bytes()
        if size == (48, 48):
            assert generated.ExactSizeTransform(48)(data).pixels.shape == (48, 48, 3)
            continue
        with pytest.raises(ImageError, match=f"{size[0]}x{size[1]} pixels") as error:
            generated.ExactSizeTransform(48)(data)
        assert error.value.reason == "other_size"
