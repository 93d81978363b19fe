"""The encode job on a real Ray cluster: what it stores against the model run by hand, faults, resuming, refusals."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from skimage import data as photos

from litevae.autoencoder import LiteVAE, fingerprint, load_autoencoder
from litevae.cache import LatentCache
from litevae.errors import UserError
from litevae.images import ImageTransform
from pipelines import cluster, encode
from pipelines.config import Encode, load
from pipelines.encode import encode_dataset
from pipelines.sources import open_source

SIDE = 32
MANY = ("rows_per_shard=1",)  # many shards, so that a kill comes in the middle
JOB = Path(__file__).parents[2] / "jobs" / "encode_dataset.py"


@pytest.fixture(scope="module", autouse=True)
def ray_ends_with_this_module():
    yield
    import ray

    ray.shutdown()


def save_model(folder, seed=0, change=lambda model: None):
    torch.manual_seed(seed)
    model = LiteVAE.from_preset("S", latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1)
    change(model)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model")


def crops(count):
    pictures = [photos.astronaut(), photos.chelsea(), photos.coffee()]
    for n in range(count):
        picture = pictures[n % 3]
        y, x = 7 * n % (picture.shape[0] - 60), 11 * n % (picture.shape[1] - 60)
        yield Image.fromarray(picture[y : y + 40 + n % 10, x : x + 60])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """45 photos in two classes, and 3 files that are none."""
    root = tmp_path_factory.mktemp("photos")
    for name in ("cats", "dogs"):
        (root / name).mkdir()
    for n, photo in enumerate(crops(45)):
        photo.save(root / ("cats" if n % 2 else "dogs") / f"{n:03d}.png")
    (root / "cats/empty.jpg").touch()
    (root / "dogs/text.jpg").write_text("not an image at all")
    whole = (root / "cats/001.png").read_bytes()
    (root / "cats/zcut.png").write_bytes(whole[: len(whole) // 2])
    return root


def config(source, model, out, *more):
    common = ["tracking.enabled=false", "ray.gpu='no'", "ray.cpus_per_worker=1", "error_budget=0.1", f"root={out}-runs"]
    sizes = [f"transform.resolution={SIDE}", "rows_per_shard=8", "batch_size=5", "precision=fp32"]
    return load(Encode, None, [f"source.uri={source}", f"model={model}", f"out={out}", *common, *sizes, *more])


def shard_bytes(out):
    manifest = json.loads((Path(out) / "manifest.json").read_text())
    return [(Path(out) / shard["file"]).read_bytes() if shard["rows"] else b"" for shard in manifest["shards"]]


@pytest.fixture(scope="module")
def encoded(folder, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("caches") / "cache"
    more = ("tracking.enabled=true", f"root={out.parent}/runs", *MANY)
    return out, encode_dataset(config(folder, model, out, *more))


def moments_by_hand(model, data):
    pixels = torch.tensor(ImageTransform(SIDE)(data).pixels)
    with torch.no_grad():
        return load_autoencoder(model).encode(pixels.permute(2, 0, 1)[None] / 127.5 - 1).latent_dist.parameters


def test_rows_are_what_the_model_says(encoded, folder, model):
    out, summary = encoded
    assert (summary["images"], summary["quarantined"], summary["encoded_now"]) == (45, 3, 45)
    latents = LatentCache(out)
    assert latents.shape == (8, SIDE // 8, SIDE // 8)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    good = [name for name in files if name not in ("cats/empty.jpg", "cats/zcut.png", "dogs/text.jpg")]
    rows = [latents.row(i) for i in range(45)]
    assert [row["id"] for row in rows] == good
    for index, row in enumerate(rows):
        assert (row["width"], row["height"]) == Image.open(folder / row["id"]).size
        assert (row["label_name"], row["label"]) == (row["id"][:4], 0 if row["id"].startswith("cats") else 1)
        if index % 9 == 0:
            expected = moments_by_hand(model, (folder / row["id"]).read_bytes())
            torch.testing.assert_close(latents.moments([index]).float(), expected, atol=2e-3, rtol=2e-3)


def test_quarantine_names_what_is_wrong(encoded, folder):
    out, summary = encoded
    assert summary["reasons"] == {"corrupt": 1, "empty": 1, "not_an_image": 1}
    records = [row for path in sorted((out / "quarantine").iterdir()) for row in pq.read_table(path).to_pylist()]
    found = {(r["id"], r["stage"], r["error"]) for r in records}
    bad = {"cats/empty.jpg": "empty", "cats/zcut.png": "corrupt", "dogs/text.jpg": "not_an_image"}
    assert found == {(name, "decode", reason) for name, reason in bad.items()}
    assert all(r["source"] == str(folder) and r["message"] for r in records)


def test_manifest_says_where_it_comes_from(encoded, folder, model):
    out, summary = encoded
    manifest = LatentCache(out).manifest
    assert manifest["model"]["path"] == model
    assert manifest["model"]["fingerprint"] == fingerprint(model)
    assert manifest["model"]["config"]["latent_channels"] == 4
    assert manifest["transform"] == ImageTransform(SIDE).identity
    assert (manifest["source"]["uri"], manifest["source"]["units"]) == (str(folder), 48)
    assert manifest["counts"]["input"] == manifest["counts"]["encoded"] + manifest["counts"]["quarantined"]
    assert manifest["run"]["config"]["rows_per_shard"] == 1
    assert {"torch", "pillow", "ray"} <= manifest["run"]["versions"].keys()
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
    again = encode_dataset(config(folder, model, out, *MANY))
    assert again["encoded_now"] == 0
    assert again["digest"] == summary["digest"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.*")} == before


def test_decoding_is_not_done_in_the_encoder(folder, model, tmp_path, capsys):
    """Ray fuses operators of equal resources; decoding would then run in the actor that holds the GPU."""
    settings = config(folder, model, tmp_path / "cache")
    source = open_source(settings.source)
    plan = encode._plan(settings, source, source.identity, None)
    share = cluster.start(settings.ray)
    shards = [encode.Planned([source], 8).shard(encode.Task(n)) for n in range(2)]
    encode._pipeline(plan, shards, settings.out, share, settings.ray).explain()
    physical = capsys.readouterr().out.rpartition("Physical Plan")[2]
    assert "TaskPoolMapOperator[Map(decode_shard)]" in physical
    assert "ActorPoolMapOperator[Map(Encoder)]" in physical


def start_job(source, model, out, *more):
    """`python jobs/encode_dataset.py` in a session of its own."""
    settings = config(source, model, out, *more)
    keys = ("source.uri", "model", "out", "root", "rows_per_shard", "batch_size", "precision", "error_budget")
    values = settings.model_dump()
    arguments = [f"{key}={settings.source.uri if key == 'source.uri' else values[key]}" for key in keys]
    arguments += [
        "tracking.enabled=false",
        "ray.gpu='no'",
        "ray.cpus_per_worker=1",
        f"transform.resolution={SIDE}",
        *more,
    ]
    return subprocess.Popen(
        [sys.executable, str(JOB), *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_commits(out, count, alive=lambda: True, seconds=120):
    commits, end = Path(out) / "commits", time.monotonic() + seconds
    while not commits.is_dir() or len(os.listdir(commits)) < count:
        assert time.monotonic() < end, "no commits"
        assert alive(), "the job ended before"
        time.sleep(0.002)


def test_killed_and_resumed_equals_undisturbed(encoded, folder, model, tmp_path):
    out = tmp_path / "cache"
    job = start_job(folder, model, out, *MANY)
    try:
        wait_for_commits(out, 5, alive=lambda: job.poll() is None)
    finally:
        job.send_signal(signal.SIGKILL)
        job.communicate()
    with pytest.raises(UserError, match="is unfinished"):
        LatentCache(out)
    time.sleep(3)  # the killed driver's workers go on for a moment
    finished = {path: path.stat().st_mtime_ns for path in (out / "commits").iterdir()}
    assert 5 <= len(finished) < 48
    summary = encode_dataset(config(folder, model, out, *MANY))
    assert (summary["images"], summary["encoded_now"] < 45) == (45, True)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert summary["digest"] == encoded[1]["digest"]
    assert shard_bytes(out) == shard_bytes(encoded[0])


def test_a_killed_encoder_is_replaced(encoded, folder, model, tmp_path):
    import ray
    from ray.util.state import list_actors

    out, killed = tmp_path / "cache", []

    def kill():
        wait_for_commits(out, 1)
        for actor in list_actors(ray.get_runtime_context().gcs_address, filters=[("state", "=", "ALIVE")]):
            if "Encoder" in actor.class_name:
                os.kill(actor.pid, signal.SIGKILL)
                killed.append(actor.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    encode_dataset(config(folder, model, out, *MANY))
    killer.join()
    assert killed
    assert shard_bytes(out) == shard_bytes(encoded[0])


def test_error_budget_stops_and_a_higher_one_goes_on(folder, model, tmp_path):
    with pytest.raises(
        UserError, match=r"of 48 images could not be encoded \(.*\), more than error_budget=0.02 allows"
    ):
        encode_dataset(config(folder, model, tmp_path / "cache", "error_budget=0.02"))
    assert encode_dataset(config(folder, model, tmp_path / "cache"))["quarantined"] == 3


def test_latents_that_fp16_can_not_hold(folder, tmp_path):
    spoiled = save_model(tmp_path / "model", change=lambda model: list(model.encoder.parameters())[-1].data.fill_(1e6))
    with pytest.raises(UserError, match="none of 48 images could be encoded"):
        encode_dataset(config(folder, spoiled, tmp_path / "cache", "error_budget=1", "rows_per_shard=48"))
    (record,) = (tmp_path / "cache/quarantine").iterdir()
    table = pq.read_table(record)
    assert table["error"].to_pylist().count("out_of_range") == 45
    assert table["stage"].to_pylist().count("encode") == 45


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
    expected = torch.cat([moments_by_hand(model, data) for data in images])  # one by one: batches change nothing
    torch.testing.assert_close(latents.moments(range(11)).float(), expected, atol=2e-3, rtol=2e-3)


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
        (config(folder, other, out, *MANY), "is a cache of something else(.|\n)*model.fingerprint: "),
        (config(folder, model, out, *MANY, "transform.resolution=64"), "transform.resolution: 32 in the cache, 64 now"),
        (config(few, model, out, *MANY), r"source.units: 48 in the cache, 1 now"),
        (config(folder, model, out, "rows_per_shard=9"), "rows_per_shard: 1 in the cache, 9 now"),
        (config(folder, model, out, *MANY, "precision=bf16"), 'precision: "fp32" in the cache, "bf16" now'),
        (config(folder, "", out), "model is empty"),
        (config(folder, tmp_path / "nothing", out), "does not exist"),
        (config(folder, tmp_path / "full", out), "is not a model folder"),
        (config(folder, model, folder / "cats/cache"), "lies within the source"),
        (config(folder, model, tmp_path / "full"), "holds other files and no latent cache"),
        (config(tmp_path / "full", model, out), "no images"),
        (config(folder, model, ""), "out: give a path"),
    ]
    for settings, message in refused:
        with pytest.raises(UserError, match=message):
            encode_dataset(settings)
    assert not (folder / "cats/cache").exists()
    assert os.listdir(tmp_path / "full") == ["thesis.txt"]


def test_job_prints_one_message_and_exits_with_2(model, tmp_path):
    job = start_job(tmp_path / "nowhere", model, tmp_path / "cache")
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 2
    assert output.strip() == f"error: source.uri={tmp_path}/nowhere does not exist"
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_two_drivers_on_one_cache_do_no_harm(encoded, folder, model, tmp_path):
    out = tmp_path / "cache"
    jobs = [start_job(folder, model, out, *MANY) for _ in range(2)]
    outputs = [job.communicate(timeout=400)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert LatentCache(out).manifest["digest"] == encoded[1]["digest"]
    assert shard_bytes(out) == shard_bytes(encoded[0])
