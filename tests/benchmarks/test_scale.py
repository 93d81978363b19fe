"""Large data sets made up: what is made is what the job makes, and the model is what a store and hands count."""

import json
import math
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import boto3
import numpy as np
import pytest

from litevae import cache, storage
from litevae.cache import LatentCache
from litevae.commits import committed_shards, read_commit, read_commits
from pipelines.data.config import Source as SourceConfig
from pipelines.data.decode import ShardTask, decode_shard
from pipelines.data.open_source import open_source
from pipelines.encoding.encoder import ShardEncoder
from pipelines.encoding.partition import Partition
from pipelines.encoding.plan import make_plan
from tests.benchmarks import scale
from tests.benchmarks.scale import Node, Store, Work
from tests.encoding import config, save_model

# --- what is made -------------------------------------------------------------------------------------------------


def test_a_made_up_store_lists_what_a_folder_would(tmp_path):
    """The same listing, digest and shards as of real files of these names."""
    count = 2500  # three pages
    bucket = scale.Bucket(count)
    with mock.patch.object(storage, "_listing", bucket.listing):
        made = open_source(SourceConfig(uri=bucket.uri))
    assert bucket.requests == 1 + 3  # whether there is such a folder, and its pages
    root = tmp_path / "images"
    for file in made.listing["file"].to_pylist():
        path = root / file.decode()
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as empty:
            empty.truncate(57_800)
    real = open_source(SourceConfig(uri=str(root)))
    assert made.listing.drop_columns(["version"]).equals(real.listing.drop_columns(["version"]))
    assert made.digest == real.digest
    assert len(real.labels) == 1000
    plans = [Partition([source], 512) for source in (made, real)]
    assert [plan.sizes.tolist() for plan in plans] == [[512, 512, 512, 512, 452]] * 2


@pytest.mark.parametrize(("kind", "groups"), [("parquet", 40), ("webdataset", 80)])
def test_linked_files_are_sources(kind, groups, tmp_path):
    """Ranges of tars have up to 256 samples: 39 and a rest in each of two."""
    uri = scale.make_source(kind, tmp_path, 20_000)
    found = scale.plan(uri, 20_000, str(tmp_path / "out"))
    assert (found["units"], found["groups"], found["requests"]) == (20_000, groups, 0)
    partition = Partition([open_source(SourceConfig(uri=uri))], scale.SHARD)
    assert found["shards"] == len(partition)
    assert partition.units == partition.sizes.sum() == 20_000
    (listing,) = cache.read_listings(str(tmp_path / "out"))
    assert listing.num_rows == groups


def test_a_made_commit_log_is_one_of_real_commits(tmp_path):
    real, made = tmp_path / "real", tmp_path / "made"
    for shard in range(3):
        scale.commit(real, shard, rows=4)
    scale.commit_log(made, 3, rows=4)
    assert committed_shards(str(made)) == committed_shards(str(real)) == {0: 0, 1: 0, 2: 0}
    for shard in range(3):
        one, other = (read_commit(str(folder), shard) for folder in (real, made))
        assert one.keys() == other.keys()
        same = ("shard", "units", "rows", "shapes", "quarantined")
        assert [one[name] for name in same] == [other[name] for name in same]
        assert len(json.dumps(one)) == pytest.approx(len(json.dumps(other)), rel=0.02)
    manifests = [scale.merge(folder, 3, rows=4) for folder in (real, made)]
    assert manifests[0]["counts"] == manifests[1]["counts"]
    assert len(json.dumps(manifests[0])) == pytest.approx(len(json.dumps(manifests[1])), rel=0.02)
    for folder in (real, made):
        assert len(LatentCache(folder).moments(range(12))) == 12  # verified: each shard's sha256 is checked


def test_steps_on_a_made_cache(tmp_path):
    scale.commit_log(tmp_path, 130, rows=4)
    assert scale.resume(str(tmp_path))["done"] == 520
    with mock.patch.object(scale, "merge", lambda folder, shards: merge(folder, shards, 4)):
        found = scale.finish(str(tmp_path), 130)
    assert found["manifest"] == (tmp_path / "manifest.json").stat().st_size
    assert scale.reader(str(tmp_path))["rows"] == 520


merge = scale.merge


# --- the model, by hand -------------------------------------------------------------------------------------------


def test_cores_share_decoding_and_encoding():
    """1/100 s and 1/25 s of a core: 20 images/s each; the link carries 2e6 bytes in and 1e3 out."""
    work = Work(decode=100, encode=25, read=2e6, write=1e3, gets=0, puts=0)
    assert scale.limits({Node(4, 0, 0.5, 1.0): 2}, work) == {"cores": 8 * 20, "network": 2 * 0.5e9 / 2e6}


def test_gpus_encode_what_cores_decode():
    work = Work(decode=100, encode=700, read=50e3, write=10e3, gets=0, puts=0)
    found = scale.limits({Node(cores=8, gpus=1, network=1.0, price=1.0): 3}, work)
    assert found == {"decode": 2400, "encode": 2100, "network": 3e9 / 50e3}
    assert scale.break_even(cores=24, decode=100, gpus=3) == 800  # at 800 images/s a GPU both are equal


def test_pixels_go_to_the_nodes_with_gpus():
    gpu, cpu = Node(10, 2, 2.0, 1.0), Node(30, 0, 1.0, 1.0)
    work = Work(decode=10, encode=500, read=100.0, write=50.0, pixels=200.0, gets=0, puts=0)
    found = scale.limits({gpu: 1, cpu: 1}, work)
    assert found["decode"] == 400
    assert found["encode"] == 1000
    assert found["network"] == pytest.approx(2e9 / (0.25 * 100 + 0.75 * 200))
    assert found["network of CPU nodes"] == pytest.approx(1e9 / (0.75 * 200))


def test_a_prefix_is_full():
    work = Work(decode=1e6, encode=1e6, read=1.0, write=1.0, gets=1.0, puts=2 / 500)
    store = Store(gets=5500, puts=3500, prefixes=2)
    found = scale.limits({Node(64, 8, 100.0, 1.0): 1000}, work, store)
    assert (found["GETs"], found["PUTs"]) == (11_000, pytest.approx(2 * 3500 * 250))


def test_hours_and_dollars():
    work = Work(decode=100, encode=1000, read=1.0, write=1.0, gets=1.0, puts=0.004)
    store = Store(gets=10_000, get_price=0.0004, put_price=0.005)
    found = scale.estimate(36 * 10**6, {Node(50, 5, 10.0, 3.0): 2}, work, store)
    assert (found["rate"], found["first"]) == (10_000, "GETs")  # decode is as much, and the first counts
    assert found["hours"] == 1.0
    assert found["nodes"] == 6.0
    assert found["requests"] == pytest.approx(36_000 * (0.0004 + 0.004 * 0.005))


def test_laws_are_lines_from_zero_on():
    assert scale.law([1, 10, 100], [7, 25, 205]) == pytest.approx((5, 2))
    fixed, each = scale.law([10, 100], [1, 50])  # a line through both would begin below zero
    assert fixed == 0
    assert 0.1 < each < 0.5


def test_a_table_of_costs():
    table = scale.costs(decode=600, encode=10, gpu=1000)
    assert [row[0] for row in table.rows] == list(scale.EXAMPLES)
    eight = table.rows[list(scale.EXAMPLES).index("100 nodes of 96 cores, 8 GPUs")]
    assert eight[1] == "7,200"
    for sample in table.samples.values():
        hours = [sample["estimates"][name]["hours"] for name in scale.SIZES]
        assert hours == pytest.approx([hours[0], 100 * hours[0], 1000 * hours[0]])
        assert sample["estimates"]["1 B"]["rate"] == min(sample["limits"].values())
        assert all(math.isfinite(value) and value > 0 for value in sample["limits"].values())


# --- requests -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model")


def requests_by_operation(call) -> Counter:
    """What botocore sends meanwhile: another count than the server's log, on which the benchmark relies."""
    found: Counter[str] = Counter()

    def note(event_name, **_):
        found[event_name.rpartition(".")[2]] += 1

    events = storage._store().s3.meta.events
    events.register("before-send.s3", note)
    try:
        call()
    finally:
        events.unregister("before-send.s3", note)
    return found


@pytest.mark.parametrize(("kind", "groups"), [("folder", 0), ("parquet", 2), ("webdataset", 1)])
def test_requests_of_a_shard_are_the_models(kind, groups, s3, model, tmp_path):
    served = SimpleNamespace(client=boto3.session.Session().client("s3"), bucket=s3.removeprefix("s3://"))
    uri, out = scale.put_images(served, kind, tmp_path, images=24, group=4), f"{s3}/cache"
    settings = config(uri, model, out, "kernels=torch")
    source = open_source(settings.source)
    plan = make_plan(settings, source, source.identity, None)
    plan.write(out)
    partition = Partition([source], 8)
    encoder = ShardEncoder(out, plan, gpu=False, threads=1)
    encoder.encode([np.zeros((32, 32, 3), np.uint8)])

    def work():
        row = encoder(decode_shard({"shard": partition.shard(ShardTask(1))}, plan.views, plan.hashed))
        assert row["error"] == ""
        (commit,) = read_commits(out, {1: 0})
        assert (commit["rows"], commit["quarantined"]) == (8, 0)

    found = requests_by_operation(work)
    expected = scale.requests_of_shard(kind, 8, groups)
    assert found == {"HeadObject": expected["HEAD"], "GetObject": expected["GET"], "PutObject": expected["PUT"]}


def test_the_servers_log_is_read(tmp_path):
    lines = [
        '127.0.0.1 - - [24/Nov/2026 13:28:01] "GET /b?list-type=2&prefix=c/commits/&delimiter=/ HTTP/1.1" 200 -',
        '127.0.0.1 - - [24/Nov/2026 13:28:01] "\x1b[33mHEAD /b/c/commits/000000.json HTTP/1.1\x1b[0m" 404 -',
        '127.0.0.1 - - [24/Nov/2026 13:28:01] "PUT /b/c/commits/000000.json HTTP/1.1" 200 -',
    ]
    served = scale.Served.__new__(scale.Served)
    served.bucket, served._log, served._read = "b", tmp_path / "log", 0
    served._log.write_text("\n".join(lines[:2]) + "\n")
    assert served.new() == {("LIST", "c/commits"): 1, ("HEAD", "c/commits"): 1}
    served._log.write_text("\n".join(lines) + "\n")
    assert served.new() == {("PUT", "c/commits"): 1}


@pytest.mark.chaos
def test_requests_of_the_job_are_the_models(model, tmp_path):
    with scale.Served(tmp_path) as served:
        found = scale.requests_of_job(served, "webdataset", tmp_path, model, shards=2, rows=16, group=16)
        assert found["each shard"] == scale.requests_of_shard("webdataset", 16, groups=1)
        assert found["once"]["LIST"] > 0
        keys = [
            item["Key"] for item in served.client.list_objects_v2(Bucket=served.bucket, Prefix="cache-")["Contents"]
        ]
        read = served.client.get_object(Bucket=served.bucket, Key="cache-webdataset/manifest.json")["Body"].read()
    planned = [shard["units"] for shard in json.loads(read)["shards"]]
    assert planned == [[0, 16], [16, 32]]
    assert sum(key.startswith("cache-webdataset/commits/") for key in keys) == 2
