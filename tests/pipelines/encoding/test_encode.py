"""The encode job on a real Ray cluster: what it stores against the model run by hand, faults, resuming, refusals."""

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from skimage import data as photos

from litevae.any_autoencoder import fingerprint, load_autoencoder
from litevae.cache import LatentCache
from litevae.errors import UserError
from litevae.images import ImageError, ImageTransform, to_tensor
from litevae.latents import encode_latents
from pipelines.data import decode
from pipelines.data.config import Source, Views
from pipelines.data.open_source import open_source
from pipelines.encoding import auto, encode, preview, verify
from pipelines.encoding.encode import encode_dataset
from pipelines.encoding.encoder import ShardEncoder
from pipelines.encoding.partition import Partition, cut
from pipelines.encoding.plan import _content_of, make_plan
from pipelines.runtime import cluster, host, paths
from tests.commands import run_in_this_process
from tests.encoding import (
    BAD,
    SIDE,
    arguments,
    config,
    crops,
    moments_by_hand,
    photo_folder,
    save_model,
)
from tests.in_process import in_process
from tests.odd_images import odd_images, write_odd_images

SEVERAL = ("rows_per_shard=8",)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return photo_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def encoded(folder, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("caches") / "cache"
    more = ("tracking.enabled=true", f"root={out.parent}/runs", *SEVERAL)
    with in_process():
        return out, encode_dataset(config(folder, model, out, *more))


def test_rows_are_what_the_model_says(encoded, folder, model):
    """In the order of the files, in shards of 8, of which a batch has 5."""
    out, summary = encoded
    assert (summary["images"], summary["quarantined"], summary["encoded_now"]) == (45, 3, 45)
    latents = LatentCache(out)
    assert latents.shape == (8, SIDE // 8, SIDE // 8)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    good = [name for name in files if name not in BAD]
    rows = [latents.row(i) for i in range(45)]
    assert [row["id"] for row in rows] == good
    assert [row["unit"] for row in rows] == [files.index(name) for name in good]
    assert [(shard["units"], shard["rows"]) for shard in latents.manifest["shards"]] == [
        ([start, start + 8], sum(name not in BAD for name in files[start : start + 8])) for start in range(0, 48, 8)
    ]
    for row in rows:
        assert (row["width"], row["height"]) == Image.open(folder / row["id"]).size
        assert (row["label_name"], row["label"]) == (row["id"][:4], 0 if row["id"].startswith("cats") else 1)
    expected = torch.stack([moments_by_hand(model, (folder / name).read_bytes())[0] for name in good])
    torch.testing.assert_close(latents.moments(range(45)).float(), expected, atol=2e-3, rtol=2e-3)
    assert torch.cdist(expected.flatten(1), expected.flatten(1)).fill_diagonal_(1).min() > 0.1  # no two alike


def test_quarantine_names_what_is_wrong(encoded, folder):
    out, summary = encoded
    assert summary["reasons"] == {"corrupt": 1, "empty": 1, "not_an_image": 1}
    records = [row for path in sorted((out / "quarantine").iterdir()) for row in pq.read_table(path).to_pylist()]
    found = {(r["id"], r["stage"], r["error"]) for r in records}
    assert found == {(name, "decode", reason) for name, reason in BAD.items()}
    assert all(r["source"] == str(folder) and r["message"] for r in records)


def test_manifest_says_where_it_comes_from(encoded, folder, model):
    out, summary = encoded
    manifest = LatentCache(out).manifest
    assert manifest["model"]["path"] == model
    assert manifest["model"]["fingerprint"] == fingerprint(model)
    assert manifest["model"]["config"]["latent_channels"] == 4
    assert manifest["transform"] == ImageTransform(SIDE, decode="fast").identity
    assert (manifest["source"]["uri"], manifest["source"]["units"]) == (str(folder), 48)
    assert manifest["counts"]["input"] == manifest["counts"]["encoded"] + manifest["counts"]["quarantined"]
    assert manifest["run"]["config"]["rows_per_shard"] == 8
    assert {"torch", "pillow", "simplejpeg", "ray"} <= manifest["run"]["versions"].keys()
    stored = sum(path.stat().st_size for path in (out / "shards").iterdir())
    assert summary["bits_per_pixel"] == pytest.approx(8 * stored / 45 / SIDE**2, abs=1e-3)


def test_the_run_is_in_mlflow(encoded):
    from mlflow import MlflowClient

    out, summary = encoded
    client = MlflowClient(f"sqlite:///{out.parent}/runs/mlflow.db")
    run = client.get_run(LatentCache(out).manifest["run"]["tracking"]["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["encode/images"] == 45
    assert run.data.params["model"]
    manifest = LatentCache(out).manifest
    datasets = {item.tags[0].value: item.dataset.digest for item in run.inputs.dataset_inputs}
    assert datasets == {"encoding": manifest["source"]["digest"][:36], "latents": manifest["digest"][:36]}
    assert run.data.metrics["encode/latent_std_2"] == pytest.approx(manifest["latents"]["std"][2])
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["manifest.json"]
    assert "mlflow" in summary["link"]


def test_finished_cache_is_left_as_it_is(encoded, folder, model):
    out, summary = encoded
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    again = encode_dataset(config(folder, model, out, *SEVERAL))
    assert again["encoded_now"] == 0
    assert again["digest"] == summary["digest"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.*")} == before


@pytest.mark.slow
def test_decoding_brings_neither_diffusers_nor_torchs_compiler(folder):
    """A task that decodes is a process of its own, which takes seconds to import what it needs."""
    code = """if True:
        import pickle, sys
        shard, views = pickle.loads(sys.stdin.buffer.read())
        from pipelines.data.decode import decode_shard
        row = decode_shard({"shard": shard}, views)
        assert len(row["sizes"]), row["error"]
        print([name for name in ("diffusers", "torch._dynamo", "torch._inductor", "mlflow") if name in sys.modules])
    """
    shard = Partition([open_source(Source(uri=str(folder)))], 8).shard(decode.ShardTask(0))
    given = pickle.dumps((shard, Views(resolution=32)))
    done = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, check=True)
    assert done.stdout == b"[]\n"


@pytest.mark.slow
def test_decoding_is_not_done_in_the_encoder(folder, model, tmp_path, capsys):
    """Ray fuses operators of equal resources; decoding would then run in the actor that holds the GPU."""
    settings = config(folder, model, tmp_path / "cache")
    source = open_source(settings.source)
    plan = make_plan(settings, source, source.identity, None)
    placement = cluster.start(settings.ray)
    shards = [Partition([source], 8).shard(decode.ShardTask(n)) for n in range(2)]
    encode._pipeline(plan, shards, settings.out, placement).explain()
    physical = capsys.readouterr().out.rpartition("Physical Plan")[2]
    assert "TaskPoolMapOperator[Map(decode_shard)]" in physical
    assert "ActorPoolMapOperator[Map(ShardEncoder)]" in physical


@pytest.mark.usefixtures("wherever")
def test_error_budget_stops_and_a_higher_one_goes_on(folder, model, tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "IMAGES", 0)  # otherwise it is known before
    with pytest.raises(
        UserError, match=r"of 48 images could not be encoded \(.*\), more than error_budget=0.02 allows"
    ):
        encode_dataset(config(folder, model, tmp_path / "cache", "error_budget=0.02"))
    with in_process():
        assert encode_dataset(config(folder, model, tmp_path / "cache"))["quarantined"] == 3


@pytest.mark.usefixtures("in_process")
def test_latents_that_fp16_can_not_hold(folder, tmp_path):
    spoiled = save_model(tmp_path / "model", change=lambda model: list(model.encoder.parameters())[-1].data.fill_(1e6))
    with pytest.raises(UserError, match="none of 48 images could be encoded"):
        encode_dataset(config(folder, spoiled, tmp_path / "cache", "error_budget=1", "rows_per_shard=48"))
    (record,) = (tmp_path / "cache/quarantine").iterdir()
    table = pq.read_table(record)
    assert table["error"].to_pylist().count("out_of_range") == 45
    assert table["stage"].to_pylist().count("encode") == 45


@pytest.mark.usefixtures("in_process")
def test_parquet_source(model, tmp_path):
    images = []
    for photo in crops(11):
        buffer = io.BytesIO()
        photo.save(buffer, "JPEG")
        images.append(buffer.getvalue())
    table = pa.table({"id": [f"k{n}" for n in range(11)], "image": images, "score": np.arange(11) / 4})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    encode_dataset(config(tmp_path / "a.parquet", model, tmp_path / "cache", "source.columns=[score]"))
    latents = LatentCache(tmp_path / "cache")
    rows = [latents.row(i) for i in range(11)]
    assert [(row["id"], row["score"]) for row in rows] == [(f"k{n}", n / 4) for n in range(11)]
    expected = torch.stack([moments_by_hand(model, data)[0] for data in images])  # one by one: batches change nothing
    torch.testing.assert_close(latents.moments(range(11)).float(), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.usefixtures("in_process")
def test_a_damaged_parquet_file_is_one_message(model, tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [os.urandom(4000)] * 20}), file, compression="zstd", use_dictionary=False)
    content = bytearray(file.read_bytes())
    content[4:3000] = bytes(2996)
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"a.parquet: row group 0 can't be read") as error:
        encode_dataset(config(file, model, tmp_path / "cache"))
    assert "Traceback" not in str(error.value)


def test_refusals(encoded, folder, model, tmp_path):
    out, _ = encoded
    other = save_model(tmp_path / "other", seed=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").touch()
    few = tmp_path / "few"
    few.mkdir()
    next(crops(1)).save(few / "a.png")
    refused = [
        (config(folder, other, out, *SEVERAL), "holds another cache(.|\n)*model.fingerprint: "),
        (
            config(folder, model, out, *SEVERAL, "transform.resolution=64"),
            "transform.resolution: 32 in the cache, 64 now",
        ),
        (config(folder, model, out, *SEVERAL, "transform.decode=scaled"), 'decode: "fast" in the cache, "scaled" now'),
        (config(few, model, out, *SEVERAL), r"source.units: 48 in the cache, 1 now"),
        (config(folder, model, out, "rows_per_shard=9"), "rows_per_shard: 8 in the cache, 9 now"),
        (config(folder, model, out, *SEVERAL, "precision=bf16"), 'precision: "fp32" in the cache, "bf16" now'),
        (config(folder, "", out), "model is empty"),
        (config(folder, tmp_path / "nothing", out), "does not exist"),
        (config(folder, tmp_path / "full", out), "is not a model folder"),
        (config(folder, model, folder / "cats/cache"), "lies within the source"),
        (config(folder, model, tmp_path / "full"), "is not empty and holds no latent cache"),
        (config(tmp_path / "full", model, out), "no images"),
        (config(folder, model, ""), "out: give a path"),
    ]
    for settings, message in refused:
        with pytest.raises(UserError, match=message):
            encode_dataset(settings)
    assert not (folder / "cats/cache").exists()
    assert os.listdir(tmp_path / "full") == ["thesis.txt"]


def test_job_prints_one_message_and_exits_with_2(model, tmp_path):
    words = arguments(tmp_path / "nowhere", model, tmp_path / "cache")
    done = run_in_this_process("jobs/encode_dataset.py", *words)
    assert done.code == 2
    assert done.output.strip() == f"error: source.uri={tmp_path}/nowhere does not exist"
    assert not (tmp_path / "cache").exists()


# --- autoencoders, views, buckets -----------------------------------------------------------------------------


def small(kind, folder):
    """A small autoencoder of diffusers with random weights."""
    torch.manual_seed(0)
    if kind == "AutoencoderKL":
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
        model = diffusers.AutoencoderKL(**blocks, block_out_channels=[8, 8], norm_num_groups=4, latent_channels=3)
    elif kind == "AutoencoderTiny":
        channels = {"encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4}
        blocks = {"num_encoder_blocks": [1] * 4, "num_decoder_blocks": [1] * 4}
        model = diffusers.AutoencoderTiny(**channels, **blocks, latent_channels=4)
    else:
        kinds = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
        channels = {"encoder_block_out_channels": (8, 16), "decoder_block_out_channels": (8, 16)}
        layers = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
        model = diffusers.AutoencoderDC(latent_channels=8, **kinds, **channels, **layers)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """6 photos: 3 of 90 x 40 pixels, 3 of 50 x 60."""
    root = tmp_path_factory.mktemp("few")
    picture = Image.fromarray(photos.coffee())
    for n in range(6):
        width, height = (90, 40) if n % 2 else (50, 60)
        picture.crop((40 * n, 30 * n, 40 * n + width, 30 * n + height)).save(root / f"{n}.png")
    return root


def check_rows(out, source, model, transform, rtol=2e-3):
    """Every row is what the model, run by hand on that view of that image, says."""
    latents = LatentCache(out)
    column = "moments" if latents.content == "moments" else "latent"
    found = {}
    for shard in latents.manifest["shards"]:
        table = pq.read_table(Path(out) / shard["file"])
        sizes = latents.manifest["latents"]
        for row in table.to_pylist():
            shape = sizes["shape"] or [sizes["shapes"][0][1], row["latent_height"], row["latent_width"]]
            found[row["id"], row["view"]] = np.frombuffer(row[column], "<f2").reshape(shape)
    names = sorted(path.name for path in Path(source).iterdir())
    assert len(found) == len(names) * transform.views == len(latents)
    for name in names:
        data = (Path(source) / name).read_bytes()
        seed = decode.seed_of(Views(seed=0), name)
        images = transform.all(data, seed)
        vae = load_autoencoder(model)
        for view, image in enumerate(images):
            x = torch.tensor(image.pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
            with torch.no_grad():
                encoded = vae.encode(x, return_dict=False)[0]
            expected = getattr(encoded, "parameters", encoded)[0]
            torch.testing.assert_close(torch.tensor(found[name, view].copy()).float(), expected, atol=rtol, rtol=rtol)
    return latents


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("kind", "content", "channels"),
    [("AutoencoderKL", "moments", 6), ("AutoencoderTiny", "mean", 4), ("AutoencoderDC", "mean", 8)],
)
def test_autoencoders_of_diffusers(few, tmp_path, kind, content, channels):
    folder = small(kind, tmp_path / "model")
    done = encode_dataset(config(few, folder, tmp_path / "cache"))
    assert (done["latents"]["content"], done["shape"][0]) == (content, channels)
    latents = check_rows(tmp_path / "cache", few, folder, ImageTransform(SIDE, decode="fast"))
    assert latents.manifest["model"]["config"]["_class_name"] == kind
    z = latents.latents(range(6), epoch=0, seed=0, draw="mean")
    torch.testing.assert_close(z.std((0, 2, 3), correction=0) <= 1.001, torch.ones(len(latents.mean), dtype=bool))


@pytest.mark.usefixtures("in_process")
def test_only_the_mean_in_bf16(few, model, tmp_path):
    encode_dataset(config(few, model, tmp_path / "mean", "latents=mean", "dtype=bf16"))
    encode_dataset(config(few, model, tmp_path / "moments", "dtype=fp32"))
    mean, moments = LatentCache(tmp_path / "mean"), LatentCache(tmp_path / "moments")
    assert (mean.content, mean.shape, moments.moments([0]).dtype) == ("mean", (4, 4, 4), torch.float32)
    z = mean.latents(range(6), 0, 0, normalize=False)
    assert torch.equal(z, moments.moments(range(6))[:, :4].bfloat16().float())


@pytest.mark.usefixtures("in_process")
def test_random_crops_and_flips(few, model, tmp_path):
    more = ("transform.crop=random", "transform.crops=2", "transform.flips=true", "rows_per_shard=2")
    done = encode_dataset(config(few, model, tmp_path / "cache", *more))
    assert (done["images"], done["rows"]) == (6, 24)
    latents = check_rows(
        tmp_path / "cache", few, model, ImageTransform(SIDE, crop="random", crops=2, both=True, decode="fast")
    )
    rows = [latents.row(i) for i in range(4)]
    assert [(row["id"], row["view"], row["flip"]) for row in rows] == [("0.png", v, bool(v % 2)) for v in range(4)]
    assert verify.audit(str(tmp_path / "cache")).problems == {}
    with pytest.raises(UserError, match=r"transform.seed: 0 in the cache, 1 now"):
        encode_dataset(config(few, model, tmp_path / "cache", *more, "transform.seed=1"))


@pytest.mark.usefixtures("in_process")
def test_aspect_ratio_buckets(few, model, tmp_path):
    more = ("transform.buckets=true", "transform.bucket_step=16", "transform.resolution=48")
    done = encode_dataset(config(few, model, tmp_path / "cache", *more))
    transform = ImageTransform(48, buckets=True, bucket_step=16, decode="fast")
    latents = check_rows(tmp_path / "cache", few, model, transform)
    assert done["shape"] is None
    assert [count for count, *_ in latents.manifest["latents"]["shapes"]] == [3, 3]
    assert sorted(set(latents.group_shapes)) == [(8, 4, 8), (8, 6, 6)]
    assert verify.audit(str(tmp_path / "cache")).problems == {}


def test_a_size_the_model_can_not_take(few, tmp_path):
    folder = small("AutoencoderTiny", tmp_path / "model")
    more = ("transform.buckets=true", "transform.resolution=64", "transform.bucket_step=8")
    _content_of(folder, decode.transform_of(config(few, folder, "out", *more).transform))
    settings = config(few, folder, tmp_path / "cache").transform.model_copy(update={"resolution": 36})
    with pytest.raises(UserError, match="takes sides that are multiples of 8 pixels, not 36x36"):
        _content_of(folder, decode.transform_of(settings))


def test_a_batch_too_large_for_the_memory_is_halved(few, model, tmp_path):
    """As a GPU would: three images are too many."""
    settings = config(few, model, tmp_path / "cache", "batch_size=8")
    source = open_source(settings.source)
    plan = make_plan(settings, source, source.identity, None)
    encoder = ShardEncoder(str(tmp_path / "cache"), plan, False, 1)
    forward, sizes = encoder._forward, []

    def limited(batch):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(batch)

    encoder._forward = limited
    shard = Partition([source], 8).shard(decode.ShardTask(0))
    row = decode.decode_shard({"shard": shard}, settings.transform, plan.hashed)
    done = encoder(row)
    assert not done["error"]
    assert sizes == [8, 4, 2, 2, 2]
    commit = json.loads(done["commit"])
    assert (commit["rows"], commit["batch_size"]) == (6, 2)
    encoder.batch_size, encoder._forward = 4, lambda batch: (_ for _ in ()).throw(torch.OutOfMemoryError())
    assert "not even one image" in encoder(row | {"rows": row["rows"]})["error"]


def test_what_is_compiled_runs_channels_last_and_gives_the_same(few, model, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    source = open_source(config(few, model, tmp_path / "cache").source)
    images = [np.random.default_rng(n).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8) for n in range(3)]
    found = []
    for more in ([], ["compile=true"]):
        plan = make_plan(config(few, model, tmp_path / "cache", *more), source, source.identity, None)
        found.append(ShardEncoder(str(tmp_path / "cache"), plan, False, 1).encode(images))
    (function,) = compiled
    (used,) = (cell.cell_contents for cell in function.__closure__ if isinstance(cell.cell_contents, torch.nn.Module))
    convolutions = [m for m in used.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)
    assert any(not m.weight.is_contiguous() for m in convolutions)
    np.testing.assert_allclose(*found, atol=1e-5 * np.abs(found[0]).max())


def test_compiling_is_recommended_where_it_pays(few, model, tmp_path, monkeypatch, capsys):
    placement = cluster.Placement(workers=1, gpu=True, threads=1)
    monkeypatch.setattr(cluster, "start", lambda _: placement)
    monkeypatch.setattr(paths, "check_folders", lambda *_: None)
    monkeypatch.setattr(auto, "WORTH_COMPILING", 6)
    for name, more, said in (("plain", [], True), ("compiled", ["compile=true"], False)):
        encode.plan_cache(config(few, model, tmp_path / name, "precision=bf16", *more))
        assert ("compile=true takes a minute longer" in capsys.readouterr().out) == said
    monkeypatch.setattr(auto, "WORTH_COMPILING", 7)
    encode.plan_cache(config(few, model, tmp_path / "few", "precision=bf16"))
    assert "compile=true" not in capsys.readouterr().out


def test_versions_of_a_working_directory_that_is_not_installed(monkeypatch):
    def installed(name):
        if name == "litevae":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("pipelines.runtime.host.version", installed)
    assert host.versions(encode.LIBRARIES).keys() >= {"python", "torch", "ray"}
    assert "litevae" not in host.versions(encode.LIBRARIES)


def test_cuts():
    ones = np.ones(10, dtype=np.int64)
    assert cut(ones, 4).tolist() == [4, 8, 10]
    assert cut(ones, 5).tolist() == [5, 10]
    assert cut(np.array([3, 3, 3, 3]), 8).tolist() == [6, 12]
    assert cut(np.array([3, 20, 3, 3]), 8).tolist() == [3, 9, 16, 23, 29]  # a large group: evenly, by itself
    for groups in (ones, np.array([5, 1, 30, 7, 7, 2])):
        ends = cut(groups, 6)
        assert ends[-1] == groups.sum()
        assert np.diff(ends, prepend=0).max() <= 6
        assert np.diff(ends, prepend=0).min() >= 1


NASTY = Path(__file__).resolve().parents[4] / "shared" / "data" / "nasty"


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    "kind", ["made", *([pytest.param("collected", marks=pytest.mark.slow)] if NASTY.is_dir() else [])]
)
def test_ugly_images_do_not_stop_the_job(model, tmp_path, monkeypatch, kind):
    """A hundred odd and broken files and more: each is a row like Pillow reads it, or in quarantine; odd_images.py, and
    of the collection test_images.py, say which."""
    out, folder = tmp_path / "cache", NASTY
    if kind == "made":
        write_odd_images(folder := tmp_path / "odd")
    with pytest.raises(UserError, match=r"of the 32 images that were looked at .* error_budget=0.01 allows \d+ of"):
        encode_dataset(config(folder, model, out, "error_budget=0.01", "rows_per_shard=20"))
    monkeypatch.setattr(preview, "IMAGES", 0)
    with pytest.raises(UserError, match="more than error_budget=0.01 allows"):
        encode_dataset(config(folder, model, out, "error_budget=0.01", "rows_per_shard=20"))
    done = encode_dataset(config(folder, model, out, "error_budget=0.5", "rows_per_shard=20"))
    assert set(done["reasons"]) <= {"corrupt", "empty", "not_an_image", "too_large", "unsupported"}
    if kind == "made":
        assert done["reasons"] == Counter(odd.reason for odd in odd_images().values() if odd.reason)
    found = verify.audit(str(out))
    assert (found.problems, found.general) == ({}, [])
    readable = {}
    for name in os.listdir(folder):
        with contextlib.suppress(ImageError):
            readable[name] = ImageTransform(SIDE, decode="fast")((folder / name).read_bytes()).pixels
    latents = LatentCache(out)
    names = [latents.row(i)["id"] for i in range(len(latents))]
    missing = {name for name in readable if name not in names}
    assert all(name.endswith((".csv", ".psd", ".pgm", ".svg")) for name in missing)  # not listed: no suffix of an image
    assert sorted(names) == sorted({*readable} - missing)
    with torch.no_grad():
        expected = encode_latents(load_autoencoder(model), to_tensor(np.stack([readable[name] for name in names])))
    torch.testing.assert_close(latents.moments(range(len(names))).float(), expected, atol=5e-3, rtol=5e-3)
