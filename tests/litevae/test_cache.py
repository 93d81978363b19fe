"""The latent cache: what is written, by whom it can be read, what a reader refuses, and that draws are reproducible."""

import copy
import hashlib
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from litevae import cache, storage
from litevae.cache import LatentCache
from litevae.commits import (
    commit_shard,
    committed_shards,
    constant_channels,
    divisor,
    latent_statistics,
    mean_and_std,
)
from litevae.errors import UserError
from litevae.order import EpochOrder
from litevae.shards import DTYPES, QUARANTINE, finite_rows, latent_layout, row_schema, storage_errors, to_stored

ROOT = Path(__file__).parents[2]
SHAPE = (6, 4, 5)  # n_z = 3
CARRIED = pa.schema([("label", pa.int64()), ("caption", pa.string())])
SIZES = (300, 0, 150)  # shard 1: nothing but quarantine
BAD = ["lost", "broken"]
HOW = latent_layout("moments", "float16")
SOURCE = {"uri": "/photos", "digest": "d" * 64, "units": 452, "shards": len(SIZES)}
UNITS = {0: (0, 300), 1: (300, 302), 2: (302, 452)}


def plan_of(**changes):
    return {
        "model": {"path": "/models/a", "fingerprint": "f" * 64},
        "transform": {"resolution": 32},
        "latents": HOW,
        "settings": {"batch_size": 8},
    } | changes


def random_moments(count, seed=0):
    generator = np.random.default_rng(seed)
    mean = generator.normal([[[3.0]], [[-1.0]], [[0.0]]], 2.0, (count, 3, 4, 5))
    logvar = generator.normal(-1.0, 1.0, (count, 3, 4, 5))
    return np.concatenate([mean, logvar], axis=1).astype(np.float16)


def rows_of(start, count, unit=None):
    numbers = list(range(start, start + count))
    columns = {
        "id": [f"img-{n}" for n in numbers],
        "unit": [n - start + (start if unit is None else unit) for n in numbers],
        "view": [0] * count,
        "height": [480] * count,
        "width": numbers,
        "crop_top": [0] * count,
        "crop_left": [7] * count,
        "flip": [False] * count,
        "label": [n if n % 2 else None for n in numbers],
        "caption": [f"ünïcode {n}" for n in numbers],
    }
    return pa.table(columns, schema=row_schema(CARRIED))


def quarantine_of(ids):
    common = {"source": "/photos", "stage": "decode", "error": "corrupt", "message": "cut"}
    rows = [{"unit": 300 + n, "id": i} | common for n, i in enumerate(ids)]
    return pa.Table.from_pylist(rows, schema=QUARANTINE)


def write(folder, finish=True):
    """A cache of 450 rows and 2 quarantined images; its moments."""
    folder = str(folder)
    cache.write_plan(folder, plan_of())
    moments = random_moments(450)
    start = 0
    for shard, size in enumerate(SIZES):
        part = moments[start : start + size]
        rows = rows_of(start, size, UNITS[shard][0])
        commit_shard(folder, shard, UNITS[shard], HOW, rows, [part], quarantine_of([] if size else BAD))
        start += size
    if finish:
        cache.write_manifest(folder, plan_of(), SOURCE, {"job": "test"})
    return moments


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    return folder, write(folder)


def test_rows_come_back(made):
    folder, moments = made
    latents = LatentCache(folder)
    assert len(latents) == 450
    assert latents.shape == SHAPE
    assert latents.groups.tolist() == [128, 128, 44, 128, 22]
    indices = np.random.default_rng(0).permutation(450)[:99]
    found = latents.moments(indices)
    assert found.dtype == torch.float16
    np.testing.assert_array_equal(found.numpy(), moments[indices])
    expected = {"id": "img-301", "unit": 303, "view": 0, "height": 480, "width": 301, "crop_top": 0, "crop_left": 7}
    assert latents.row(301) == expected | {"flip": False, "label": 301, "caption": "ünïcode 301"}
    assert latents.row(300)["label"] is None
    columns = latents.columns([301, 5, 300], ["label", "id"])
    assert columns == {"label": [301, 5, None], "id": ["img-301", "img-5", "img-300"]}
    with pytest.raises(UserError, match="no column 'lable'; it has id, moments, unit"):
        latents.columns([0], ["lable"])
    with pytest.raises(IndexError):
        latents.moments([450])
    order = EpochOrder(latents.groups, seed=0, window=latents.window)
    assert sorted(order.index(i) for i in range(450)) == list(range(450))


def test_statistics_are_those_of_drawn_latents(made):
    folder, moments = made
    latents = LatentCache(folder)
    distribution = DiagonalGaussianDistribution(torch.from_numpy(moments).double())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40, *distribution.mean.shape, generator=generator)
    draws = distribution.mean + distribution.std * noise
    torch.testing.assert_close(latents.mean, draws.mean((0, 1, 3, 4)).float(), atol=0.01, rtol=0)
    torch.testing.assert_close(latents.std, draws.std((0, 1, 3, 4)).float(), atol=0.01, rtol=0)
    # exactly: over the whole cache at once, not shard by shard
    mean, logvar = np.split(moments.astype(np.float64), 2, axis=1)
    np.testing.assert_allclose(latents.manifest["latents"]["mean"], mean.mean((0, 2, 3)), rtol=1e-12)
    variance = mean.var((0, 2, 3)) + np.exp(logvar).mean((0, 2, 3))
    np.testing.assert_allclose(latents.manifest["latents"]["std"], np.sqrt(variance), rtol=1e-12)
    z = torch.cat([latents.latents(range(450), epoch=e, seed=0) for e in range(20)])
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=0.01, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(3), atol=0.01, rtol=0)


def test_draws_depend_on_seed_epoch_and_id_only(made, tmp_path):
    folder, moments = made
    latents = LatentCache(folder)
    z = latents.latents([5, 200, 449], epoch=1, seed=7)
    assert z.shape == (3, 3, 4, 5)
    assert z.dtype == torch.float32
    assert torch.equal(z[1:2], LatentCache(folder).latents([200], epoch=1, seed=7))
    assert torch.equal(latents.latents([200, 200], epoch=[1, 2], seed=7)[0], z[1])
    others = [latents.latents([200], epoch=e, seed=s)[0] for e, s in ((2, 7), (1, 8), (7, 1))]
    assert all(not torch.equal(a, b) for n, a in enumerate([z[1], *others]) for b in others[n:])
    # The same image in a cache cut up otherwise: same id, same draw.
    commit_shard(str(tmp_path), 0, (0, 10), HOW, rows_of(195, 10, 0), [moments[195:205]], quarantine_of([]))
    cache.write_manifest(str(tmp_path), plan_of(), SOURCE | {"units": 10, "shards": 1}, {})
    raw = LatentCache(tmp_path).latents([5], epoch=1, seed=7, normalize=False)
    torch.testing.assert_close(raw, latents.denormalize(z[1:2]), atol=1e-5, rtol=1e-5)


def test_draws_are_of_the_posterior(made):
    folder, moments = made
    latents = LatentCache(folder)
    reference = DiagonalGaussianDistribution(torch.from_numpy(moments[:2]).float())
    draws = torch.stack([latents.latents([0, 1], epoch=e, seed=0, normalize=False) for e in range(800)])
    noise = (draws - reference.mean) / reference.std
    assert noise.mean().abs() < 0.02
    assert (noise.std() - 1).abs() < 0.02
    mean = latents.latents([0, 1], epoch=0, seed=0, draw="mean", normalize=False)
    assert torch.equal(mean, reference.mode())
    torch.testing.assert_close(latents.denormalize(latents.normalize(mean)), mean, atol=1e-6, rtol=1e-6)


def test_manifest(made):
    folder, _ = made
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == "litevae-latents"
    assert manifest["model"] == {"path": "/models/a", "fingerprint": "f" * 64}
    assert manifest["run"] == {"job": "test"}
    counts = {"input": 452, "encoded": 450, "rows": 450, "quarantined": 2, "reasons": {"corrupt": 2}}
    assert manifest["counts"] == counts
    assert manifest["latents"]["shape"] == list(SHAPE)
    assert manifest["latents"]["shapes"] == [[450, *SHAPE]]
    assert manifest == json.loads((folder / "manifests/000001.json").read_text())
    for shard in manifest["shards"]:
        for record in filter(None, [shard if shard["rows"] else None, shard.get("quarantine")]):
            data = (folder / record["file"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (record["bytes"], record["sha256"])
    lost = pq.read_table(folder / manifest["shards"][1]["quarantine"]["file"])
    assert lost["id"].to_pylist() == BAD
    assert lost["error"].to_pylist() == ["corrupt", "corrupt"]


def test_same_content_same_bytes_and_digest(made, tmp_path):
    folder, _ = made
    write(tmp_path)
    a, b = (json.loads((path / "manifest.json").read_text()) for path in (folder, tmp_path))
    assert a["digest"] == b["digest"]
    assert [shard.get("sha256") for shard in a["shards"]] == [shard.get("sha256") for shard in b["shards"]]


def test_the_first_commit_counts(tmp_path):
    folder = str(tmp_path)
    commits, barrier = [], threading.Barrier(8)

    def attempt():
        barrier.wait()
        commits.append(commit_shard(folder, 0, (0, 3), HOW, rows_of(0, 3), [random_moments(3)], quarantine_of([])))

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len({commit["file"] for commit in commits}) == 1
    assert len(os.listdir(tmp_path / "shards")) == 8  # seven that nobody reads
    assert committed_shards(folder) == {0: 0}
    assert (tmp_path / commits[0]["file"]).stat().st_size == commits[0]["bytes"]


def test_put_new_is_all_or_nothing(tmp_path):
    path = str(tmp_path / "a" / "file")
    assert storage.put_new(path, b"one")
    assert not storage.put_new(path, b"two")
    assert storage.read(path) == b"one"
    assert os.listdir(tmp_path / "a") == ["file"]
    (tmp_path / "not-a-folder").touch()
    with pytest.raises(UserError, match="can't be written"):
        storage.put_new(str(tmp_path / "not-a-folder" / "file"), b"")


def test_another_plan_is_refused(tmp_path):
    cache.write_plan(str(tmp_path), plan_of())
    cache.write_plan(str(tmp_path), plan_of())
    moved = plan_of(model={"path": "/elsewhere", "fingerprint": "f" * 64})
    cache.write_plan(str(tmp_path), moved)  # the same model in another place
    with pytest.raises(UserError) as error:
        cache.write_plan(
            str(tmp_path), plan_of(model={"path": "", "fingerprint": "e" * 64}, transform={"resolution": 64})
        )
    assert f'model.fingerprint: "{"f" * 64}" in the cache, "{"e" * 64}" now' in str(error.value)
    assert "transform.resolution: 32 in the cache, 64 now" in str(error.value)
    assert str(error.value).count("\n") == 2


def test_a_plan_that_does_not_say_how_images_were_decoded_means_pillow(tmp_path):
    cache.write_plan(str(tmp_path), plan_of())
    now = plan_of()["transform"] | {"decode": "fast"}
    with pytest.raises(UserError, match='transform.decode: "pillow" in the cache, "fast" now'):
        cache.write_plan(str(tmp_path), plan_of(transform=now))


def test_unfinished_or_wrong_caches_are_refused(tmp_path, made):
    with pytest.raises(UserError, match="does not exist"):
        LatentCache(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a latent cache"):
        LatentCache(tmp_path)
    write(tmp_path, finish=False)
    with pytest.raises(UserError, match="unfinished: 3 shards are done"):
        LatentCache(tmp_path)
    manifest = json.loads((made[0] / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(UserError, match="format version 99; this library reads 2"):
        LatentCache(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        LatentCache(tmp_path)


def test_damaged_shards_are_refused(tmp_path):
    write(tmp_path)
    shard = tmp_path / LatentCache(tmp_path).manifest["shards"][2]["file"]
    data = shard.read_bytes()

    shard.write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"has {len(data) - 1} bytes; the manifest says {len(data)}"):
        LatentCache(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match="is missing"):
        LatentCache(tmp_path)

    flipped = bytearray(data)
    flipped[len(data) // 3] ^= 1  # one bit of a latent
    shard.write_bytes(flipped)
    latents = LatentCache(tmp_path)
    assert latents.moments([0]).shape == (1, *SHAPE)  # other shards stay readable
    with pytest.raises(UserError, match="its sha256 differs from the manifest's"):
        latents.moments([300])
    with pytest.raises(UserError, match="is damaged"):  # the page checksum, without the shard's
        LatentCache(tmp_path, verify=False).moments(range(300, 450))


def test_everything_quarantined_is_no_cache(tmp_path):
    commit_shard(str(tmp_path), 0, (0, 2), HOW, rows_of(0, 0), [random_moments(0)], quarantine_of(BAD))
    with pytest.raises(UserError, match="none of 2 images could be encoded"):
        cache.write_manifest(str(tmp_path), plan_of(), SOURCE | {"units": 2, "shards": 1}, {})


def test_lost_rows_are_no_cache(tmp_path):
    commit_shard(str(tmp_path), 0, (0, 4), HOW, rows_of(0, 3), [random_moments(3)], quarantine_of([]))
    with pytest.raises(RuntimeError, match="3 rows"):
        cache.write_manifest(str(tmp_path), plan_of(), SOURCE | {"units": 4, "shards": 1}, {})
    with pytest.raises(UserError, match="unfinished: 1 of 2 shards have no commit"):
        cache.write_manifest(str(tmp_path), plan_of(), SOURCE | {"units": 8, "shards": 2}, {})


def test_a_shard_encoded_again_is_a_new_version(tmp_path):
    moments = write(tmp_path)
    first = LatentCache(tmp_path)
    folder, again = str(tmp_path), random_moments(150, seed=1)
    assert cache.write_manifest(folder, plan_of(), SOURCE, {})["number"] == 1  # nothing new
    commit_shard(folder, 2, UNITS[2], HOW, rows_of(300, 150, 302), [again], quarantine_of([]), generation=1)
    assert committed_shards(folder) == {0: 0, 1: 0, 2: 1}
    manifest = cache.write_manifest(folder, plan_of(), SOURCE, {})
    assert (manifest["number"], manifest["digest"] != first.manifest["digest"]) == (2, True)
    assert torch.equal(LatentCache(tmp_path).moments([300, 449]), torch.from_numpy(again[[0, 149]]))
    assert torch.equal(LatentCache(tmp_path, version=1).moments([300]), torch.from_numpy(moments[[300]]))
    with pytest.raises(UserError, match=r"no manifest 3; it has 000001.json, 000002.json"):
        LatentCache(tmp_path, version=3)
    # The same content once more, as a repair on the same machine makes it: another file, the same digest.
    commit_shard(folder, 2, UNITS[2], HOW, rows_of(300, 150, 302), [again], quarantine_of([]), generation=2)
    repaired = cache.write_manifest(folder, plan_of(), SOURCE, {})
    assert (repaired["number"], repaired["digest"]) == (3, manifest["digest"])


def write_one(folder, how, parts, rows=None):
    count = sum(map(len, parts))
    rows = rows_of(0, count) if rows is None else rows
    commit_shard(folder, 0, (0, count), how, rows, parts, quarantine_of([]))
    cache.write_manifest(folder, plan_of(latents=how), SOURCE | {"units": count, "shards": 1}, {})
    return LatentCache(folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_dtype(tmp_path, dtype):
    values = np.random.default_rng(0).normal(0, 3, (140, 6, 4, 5)).astype(np.float32)
    how = latent_layout("moments", dtype)
    latents = write_one(str(tmp_path), how, [to_stored(values, dtype)])
    expected = torch.from_numpy(values).to(getattr(torch, dtype))
    found = latents.moments(range(140))
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    np.testing.assert_allclose(latents.manifest["latents"]["mean"], expected[:, :3].double().mean((0, 2, 3)), rtol=1e-9)
    assert latents.latents([3], 0, 0, "mean", normalize=False).equal(expected[3:4, :3].float())


def test_latents_without_a_posterior(tmp_path):
    values = np.random.default_rng(0).normal(1, 3, (140, 3, 4, 5)).astype(np.float16)
    latents = write_one(str(tmp_path), latent_layout("mean", "float16"), [values])
    assert (latents.content, latents.shape, len(latents.mean)) == ("mean", (3, 4, 5), 3)
    z = latents.latents(range(140), epoch=0, seed=0)
    torch.testing.assert_close(latents.denormalize(z), torch.from_numpy(values).float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="without a log-variance"):
        latents.moments([0])
    assert pq.read_schema(tmp_path / latents.manifest["shards"][0]["file"]).field("latent").type == pa.binary(120)


def test_rows_of_several_shapes(tmp_path):
    draw = np.random.default_rng(0)
    parts = [draw.normal(0, 1, (n, 6, h, w)).astype(np.float16) for n, h, w in ((150, 4, 8), (20, 6, 6))]
    latents = write_one(str(tmp_path), latent_layout("moments", "float16", one_shape=False), parts)
    assert latents.shape is None
    assert latents.groups.tolist() == [128, 22, 20]
    assert latents.group_shapes == [(6, 4, 8), (6, 4, 8), (6, 6, 6)]
    assert latents.manifest["latents"]["shapes"] == [[150, 6, 4, 8], [20, 6, 6, 6]]
    assert torch.equal(latents.moments([149, 3]), torch.from_numpy(parts[0][[149, 3]]))
    assert torch.equal(latents.moments([169]), torch.from_numpy(parts[1][[19]]))
    assert latents.row(169)["latent_height"] == 6
    with pytest.raises(UserError, match="rows of 2 shapes can't form one batch"):
        latents.moments([0, 169])
    pooled = np.concatenate([part[:, :3].transpose(1, 0, 2, 3).reshape(3, -1) for part in parts], 1).astype(np.float64)
    np.testing.assert_allclose(latents.manifest["latents"]["mean"], pooled.mean(1), rtol=1e-9)


def test_views_of_an_image_are_drawn_apart(tmp_path):
    rows = rows_of(0, 4).to_pydict() | {"id": ["a", "a", "b", "b"], "unit": [0, 0, 1, 1], "view": [0, 1, 0, 1]}
    moments = np.repeat(random_moments(1), 4, axis=0)
    how = latent_layout("moments", "float16", views=2)
    folder = str(tmp_path)
    rows = pa.table(rows, schema=row_schema(CARRIED))
    commit_shard(folder, 0, (0, 2), how, rows, [moments], quarantine_of([]))
    manifest = cache.write_manifest(folder, plan_of(latents=how), SOURCE | {"units": 2, "shards": 1}, {})
    assert (manifest["counts"]["input"], manifest["counts"]["rows"]) == (2, 4)
    z = LatentCache(tmp_path).latents(range(4), epoch=0, seed=0)
    assert all(not torch.equal(z[i], z[j]) for i in range(4) for j in range(i))


def test_a_listing_comes_back(tmp_path):
    table = pa.table({"file": pa.array([b"a", b"b"]), "rows": [1, 1]}).replace_schema_metadata({"source": "{}"})
    cache.write_listing(str(tmp_path), 1, table)
    cache.write_listing(str(tmp_path), 1, table.slice(1))  # the first counts
    cache.write_listing(str(tmp_path), 2, table.slice(0, 1))
    first, second = cache.read_listings(str(tmp_path))
    assert first.equals(table, check_metadata=True)
    assert second.num_rows == 1


def test_what_fp16_can_not_hold():
    moments = np.zeros((4, 6, 2, 2), dtype=np.float32)
    moments[1, 2, 0, 0] = np.nan
    moments[2, 5, 1, 1] = -70000
    moments[3, 0, 0, 0] = 65504
    assert storage_errors(moments) == [None, "not_finite", "out_of_range", None]
    moments[1, 2, 0, 0] = np.inf
    assert storage_errors(moments)[1] == "not_finite"
    assert storage_errors(moments[:0]) == []


def test_reserved_columns_are_refused():
    with pytest.raises(UserError, match="'width' can't be carried"):
        row_schema(pa.schema([("width", pa.int32())]))


def test_a_copy_in_another_process_reads_the_same(made):
    latents = LatentCache(made[0])
    latents.moments([3])
    again = copy.deepcopy(latents)  # as pickle would
    assert torch.equal(again.moments([3, 449]), latents.moments([3, 449]))


@pytest.mark.slow
def test_a_process_that_has_read_ends_cleanly(made):
    """Reading through a Python file left threads of Arrow's that aborted the process as it ended, one time in three."""
    script = f"from litevae.cache import LatentCache; LatentCache({str(made[0])!r}).row(7)"
    running = [
        subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(4)
    ]
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0] * 4, errors


# --- log-variances that no model means


WILD = [[-100.0, -30.5], [30.0, 20.5], [0.0, 1.0]]  # of three channels of 1 x 2


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_statistics_clip_log_variances_as_diffusers_does(dtype):
    how = latent_layout("moments", dtype)
    moments = np.array([[[[1.0, 2.0]], [[0.0, 0.0]], [[-1.0, 1.0]], *([row] for row in WILD)]], np.float32)
    posterior = DiagonalGaussianDistribution(torch.from_numpy(moments).double())
    found = latent_statistics([to_stored(moments, dtype)], how)
    np.testing.assert_allclose(found["variance"], posterior.var.sum((0, 2, 3)), rtol=1e-6)
    assert found["variance"][1] == pytest.approx(2 * np.exp(20))
    assert found["elements"] == 2
    assert (found["mean"], found["square"]) == ([3, 0, 0], [5, 0, 2])
    assert latent_statistics([to_stored(moments, dtype)], latent_layout("mean", dtype))["variance"] == [0] * 6


def test_draws_clip_log_variances_as_diffusers_does():
    moments = torch.tensor([[*([[0.0, 0.0]] for _ in WILD), *([row] for row in WILD)]])
    mean, logvar = moments.chunk(2, dim=1)
    noise = np.stack([cache._noise(mean.shape[1:], 7, 2, "a")])
    expected = DiagonalGaussianDistribution(moments).std.numpy() * noise
    found = cache.sample_posteriors(mean, logvar, 7, [(2, "a")])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.abs(found[0, 1]).max() < 5 * np.exp(10)
    meta = cache.sample_posteriors(mean.to("meta"), logvar.to("meta"), 7, [(2, "a")])
    assert meta.shape == mean.shape


def test_what_can_not_be_stored_by_type():
    values = np.zeros((4, 2, 1, 1), np.float32)
    values[1, 1], values[2, 0], values[3, 1] = 65_505, np.inf, -70_000
    assert storage_errors(values) == [None, "out_of_range", "not_finite", "out_of_range"]
    assert storage_errors(values, "bfloat16") == storage_errors(values, "float32") == [None, None, "not_finite", None]
    for dtype in DTYPES:
        assert finite_rows(to_stored(values[:3], dtype), dtype).tolist()[::2] == [True, False]
    assert not finite_rows(to_stored(values, "float16"), "float16")[3]


def test_mean_and_std_of_parts_of_different_sizes():
    parts = [
        {"elements": 1, "mean": [1.0], "square": [1.0], "variance": [0.5]},
        {"elements": 3, "mean": [15.0], "square": [75.0], "variance": [1.5]},
    ]
    mean, std = mean_and_std(parts)  # of 1, 5, 5, 5, each with a variance of 0.5
    assert (mean, std) == ([4.0], [pytest.approx((3 + 0.5) ** 0.5)])


def test_noise_is_that_of_seed_epoch_and_id(made):
    """By hand: NumPy's Philox under the BLAKE2b of the three. Of another view than the first the id has its number."""
    folder, moments = made
    key = hashlib.blake2b(b"7\x003\x00img-5", digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key, np.uint64)))
    mean, logvar = np.split(moments[5].astype(np.float32), 2)
    expected = mean + np.exp(logvar / 2) * generator.standard_normal(mean.shape, np.float32)
    found = LatentCache(folder).latents([9, 5], epoch=[0, 3], seed=7, normalize=False)[1]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_threads_read_different_row_groups_at_the_same_time(made, monkeypatch):
    folder, moments = made
    latents = LatentCache(folder)
    hashed, together = [], threading.Barrier(4)  # broken, after a minute, where they do not read at the same time
    read_group, read_checked = storage.read_row_group, cache.read_checked

    def read(*args):
        together.wait(60)
        return read_group(*args)

    def checked(file, shard):
        hashed.append(file)
        return read_checked(file, shard)

    monkeypatch.setattr(storage, "read_row_group", read)
    monkeypatch.setattr(cache, "read_checked", checked)
    rows = [0, 128, 256, 300]  # of four row groups, three of them in one shard
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda row: latents.moments([row]), rows))
    np.testing.assert_array_equal(torch.cat(found).numpy(), moments[rows])
    assert sorted(hashed) == sorted(latents.files)  # each file was hashed once


def append(folder):
    """Another driver appends two images, as shard 3, and finishes the cache."""
    rows = rows_of(450, 2)
    commit_shard(folder, 3, (452, 454), HOW, rows, [random_moments(2, seed=2)], quarantine_of([]))
    return cache.write_manifest(folder, plan_of(), SOURCE | {"units": 454, "shards": 4}, {"job": "other"})


def repair(folder):
    """Another driver encodes shard 2 again, and finishes the cache."""
    again = [random_moments(150, seed=1)]
    commit_shard(folder, 2, UNITS[2], HOW, rows_of(300, 150, 302), again, quarantine_of([]), generation=1)
    return cache.write_manifest(folder, plan_of(), SOURCE, {"job": "other"})


class Meanwhile:
    """Does something once, just before a driver writes a file."""

    def __init__(self, monkeypatch, act, at):
        self.act, self.at, self.made = act, at, None
        for name in ("replace", "put_new", "put"):
            monkeypatch.setattr(storage, name, partial(self, getattr(storage, name)))

    def __call__(self, do, path, *more):
        if self.act and path.endswith(self.at):
            act, self.act = self.act, None
            self.made = act()
        return do(path, *more)


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    """A folder for a cache, in each kind of storage."""
    return storage.join(request.getfixturevalue("s3"), "cache") if request.param == "s3" else str(tmp_path / "cache")


@pytest.mark.parametrize("at", ["manifests/000001.json", "/manifest.json"])
@pytest.mark.parametrize("act", [append, repair])
def test_a_late_driver_does_not_put_an_older_manifest_over_a_newer_one(place, monkeypatch, act, at):
    write(place, finish=False)
    other = Meanwhile(monkeypatch, lambda: act(place), at)
    late = cache.write_manifest(place, plan_of(), SOURCE, {"job": "late"})
    newest = cache.read_manifest(place)
    assert newest == other.made
    assert newest["run"] == {"job": "other"}
    assert newest["counts"]["rows"] == 452 if act is append else newest["shards"][2]["generation"] == 1
    names = storage.names(storage.join(place, "manifests"))
    assert newest == cache.read_manifest(place, len(names))
    # Where the late one had not written yet, it takes over what the other has made.
    assert late["number"] == 1
    assert names == (["000001.json"] if at.startswith("manifests") else ["000001.json", "000002.json"])


def test_what_another_driver_has_appended_stays_in(place):
    write(place)
    append(place)
    assert cache.write_manifest(place, plan_of(), SOURCE, {})["number"] == 2  # by one that knows of three shards
    repair(place)
    newest = cache.read_manifest(place)
    assert (newest["number"], newest["counts"]["rows"], newest["source"]["units"]) == (3, 452, 454)
    assert newest["shards"][2]["generation"] == 1


def test_a_manifest_that_is_damaged_or_lost_is_written_again(place):
    write(place)
    newest = cache.read_manifest(place)
    path = storage.join(place, "manifest.json")
    for damage in (lambda: storage.put(path, b"{"), lambda: storage.remove(path)):
        damage()
        assert cache.write_manifest(place, plan_of(), SOURCE, {}) == newest
        assert cache.read_manifest(place) == newest
    storage.remove(storage.join(place, "manifests", "000001.json"))  # the numbers go on after that of manifest.json
    assert cache.write_manifest(place, plan_of(), SOURCE, {})["number"] == 2
    assert cache.read_manifest(place)["number"] == 2


@pytest.fixture(params=["moments", "mean"])
def with_a_constant_channel(request, tmp_path):
    """A cache whose channel 1 has one value everywhere, of which fp32 sums are not exact; and the values."""
    values = np.random.default_rng(0).normal(1, 3, (140, 3, 4, 5)).astype(np.float32)
    values[:, 1] = 0.1
    stored = values
    if request.param == "moments":
        logvar = np.full_like(values, -1.0)
        logvar[:, 1] = -30.0  # its standard deviation is 3e-7
        stored = np.concatenate([values, logvar], axis=1)
    return write_one(str(tmp_path), latent_layout(request.param, "float32"), [stored]), torch.from_numpy(values)


def test_a_constant_channel_is_named_and_is_0_when_normalised(with_a_constant_channel):
    latents, values = with_a_constant_channel
    assert latents.constant == ([1] if latents.content == "mean" else [])
    if latents.content == "moments":  # as small as it is, it can be told from rounding: draws have deviation 1
        z = latents.latents(range(140), 0, 0)
        assert 0.9 < z[:, 1].std() < 1.1
        return
    with pytest.warns(UserWarning, match="constant channels of the latents, counted from 0: 1; normalised, they are 0"):
        z = latents.latents(range(140), 0, 0)
    assert torch.equal(z[:, 1], torch.zeros(140, 4, 5))
    torch.testing.assert_close(z[:, ::2].std((0, 2, 3), correction=0), torch.ones(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.normalize(values), z)
    torch.testing.assert_close(latents.denormalize(z), values, atol=1e-5, rtol=1e-5)


def test_constant_channels_by_hand():
    mean, std = torch.tensor([0.0, 2.0, 2.0, 0.0]), torch.tensor([0.0, 1e-6, 1e-5, 1e-9])
    assert constant_channels(mean, std) == [0, 1]
    assert divisor(mean, std).tolist() == [torch.inf, torch.inf, std[2], std[3]]
