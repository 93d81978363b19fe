"""Parts of the encode job by themselves, without Ray and mostly without a model: how inputs are cut, batches filled,
shards committed and retried, what is counted, and what stops a job."""

import hashlib
import io
import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from litevae import cache
from litevae.any_autoencoder import fingerprint
from litevae.commits import commit_shard, committed_shards
from litevae.errors import UserError
from litevae.images import ImageError, to_tensor
from litevae.inference import FastPath, MeasuredPath
from litevae.shards import QUARANTINE, latent_layout, read_quarantine, read_shard, row_schema
from pipelines.data import decode
from pipelines.data.config import Views
from pipelines.data.decode import Lost, Shard, ShardTask, transform_of
from pipelines.data.left_out import LeftOut
from pipelines.data.source import Item
from pipelines.encoding import auto, encode, maintenance, totals
from pipelines.encoding.config import Encode, Retry
from pipelines.encoding.encoder import ShardEncoder, _merged_rows, deterministic_fp32, load_encoder
from pipelines.encoding.listings import source_of
from pipelines.encoding.partition import Partition
from pipelines.encoding.plan import CachePlan, PlannedModel, make_plan
from pipelines.runtime import cluster, paths
from pipelines.runtime.schema import validate
from tests.encoding import cache_plan, plan_settings, save_model

HOW = latent_layout("moments", "float16")
ROWS = row_schema(pa.schema([("label", pa.int64())]))
PLACEMENT = cluster.Placement(workers=2, gpu=False, threads=1, decoders=4)


class Listed:
    """A source of so many images, which are bytes of one number each, in groups."""

    uri, remote, schema, digest = "/photos", False, pa.schema([("label", pa.int64())]), "d1"

    def __init__(self, groups, first=0):
        self.groups, self.first = np.array(groups), first
        self.left_out = LeftOut.from_json({"hidden": {".jpg": 2}})
        self.units = int(self.groups.sum())
        self.identity = {"kind": "folder", "uri": "/photos", "digest": "d1", "units": self.units}

    def part(self, start, stop):
        return Listed([1] * (stop - start), self.first + start)

    def id(self, unit):
        return f"i{self.first + unit}"

    def read(self, unit):
        number = self.first + unit
        if number in (3, 4):
            raise ImageError("missing", f"no {number}")
        picture = io.BytesIO()
        Image.fromarray(np.full((8 + number, 12, 3), 10 * number, np.uint8)).save(picture, "png")
        data = b"text" if number == 5 else picture.getvalue()
        return Item(self.id(unit), data, {"label": 100 + number})


def encoder_of(out="", batch_size=4, how=HOW, native=False):
    """An encoder with a model whose latents are the means of an image's colours, at 1 x 1, and the shapes that it was
    given."""
    plan = cache_plan(latents=how, settings=plan_settings(batch_size=batch_size), kernels="native" if native else "")
    encoder = ShardEncoder(str(out), plan, False, 1)
    seen = []

    def model(x):
        seen.append(tuple(x.shape))
        return x.mean((2, 3), keepdim=True)

    encoder._model = model
    return encoder, seen


def colours(count, height=2, width=3):
    return [np.full((height, width, 3), (5 * n, n, 2 * n), np.uint8) for n in range(count)]


# --- what is in a shard -------------------------------------------------------------------------------------------


def test_shards_are_cut_within_each_listing_and_count_units_on():
    partition = Partition([Listed([1] * 5), Listed([2, 2, 1], first=5)], 2)
    assert (len(partition), partition.units) == (6, 10)
    assert partition.sizes.tolist() == [2, 2, 1, 2, 2, 1]
    shards = [partition.shard(ShardTask(number)) for number in range(6)]
    assert [(shard.first, shard.source.units, shard.source.first) for shard in shards] == [
        (0, 2, 0), (2, 2, 2), (4, 1, 4), (5, 2, 5), (7, 2, 7), (9, 1, 9),
    ]  # fmt: skip
    assert partition.shard(ShardTask(3, 2, (6,))).task == ShardTask(3, 2, (6,))


def test_what_is_listed_is_one_source():
    one, two = Listed([1] * 5), Listed([1] * 3)
    two.digest = "d2"
    assert source_of(Partition([one], 2)) == {
        "kind": "folder", "uri": "/photos", "digest": "d1", "units": 5, "shards": 3,
        "listings": [{"uri": "/photos", "digest": "d1", "units": 5}],
        "seen": 7, "left_out": {"hidden": {".jpg": 2}},
    }  # fmt: skip
    one.left_out.add("hidden", ".jpg", 9)
    two.left_out.add("hidden", ".jpg", 4)  # of each listing it is all that is left out by then
    both = source_of(Partition([one, two], 2))
    assert (both["units"], both["shards"]) == (8, 5)
    assert (both["seen"], both["left_out"]) == (14, {"hidden": {".jpg": 6}})
    assert both["digest"] == hashlib.sha256(b"d1\nd2").hexdigest()
    assert [(listing["digest"], listing["units"]) for listing in both["listings"]] == [("d1", 5), ("d2", 3)]


# --- decoding -----------------------------------------------------------------------------------------------------


def decoded(units=8, first=20, only=(), **views):
    shard = Shard(ShardTask(3, 1 if only else 0, only), Listed([1] * units), first)
    return decode.decode_shard({"shard": shard}, Views(resolution=8, decode="pillow", **views))


def test_a_shard_is_decoded_in_order():
    row = decoded()
    rows, lost = decode.unpack(row["rows"]), decode.unpack(row["quarantine"])
    assert rows["id"].to_pylist() == ["i0", "i1", "i2", "i6", "i7"]
    assert rows["unit"].to_pylist() == [20, 21, 22, 26, 27]
    assert rows["label"].to_pylist() == [100, 101, 102, 106, 107]
    assert rows["height"].to_pylist() == [8, 9, 10, 14, 15]
    assert rows["width"].to_pylist() == [12] * 5
    assert rows["crop_left"].to_pylist() == [2, 1, 1, 0, 0]  # half of what is left of 12, 11, 10, 8 pixels
    assert rows["flip"].to_pylist() == [False] * 5
    assert row["sizes"].tolist() == [[8, 8]] * 5
    assert row["pixels"].reshape(5, -1).tolist() == [[10 * n] * 192 for n in (0, 1, 2, 6, 7)]
    assert row["error"] == ""
    expected = [(23, "i3", "read", "missing"), (24, "i4", "read", "missing"), (25, "i5", "decode", "not_an_image")]
    assert [(r["unit"], r["id"], r["stage"], r["error"]) for r in lost.to_pylist()] == expected
    assert {r["source"] for r in lost.to_pylist()} == {"/photos"}
    assert lost["message"][0].as_py() == "no 3"


def test_only_some_units_of_a_shard():
    row = decoded(only=(25, 21, 27))
    assert decode.unpack(row["rows"])["unit"].to_pylist() == [21, 27]
    assert decode.unpack(row["quarantine"])["unit"].to_pylist() == [25]


def test_views_of_an_image_are_rows():
    rows = decode.unpack(decoded(2, crop="random", crops=2, flips=True)["rows"])
    assert rows["view"].to_pylist() == [0, 1, 2, 3] * 2
    assert rows["flip"].to_pylist() == [False, True] * 4
    assert rows["unit"].to_pylist() == [20] * 4 + [21] * 4


def test_random_crops_are_by_seed_and_id():
    expected = hashlib.blake2b(b"7\0cats/1.png", digest_size=8).digest()
    assert decode.seed_of(Views(seed=7), "cats/1.png") == int.from_bytes(expected, "big")


@pytest.mark.parametrize(("deaths", "memory"), [(0, None), (1, 2**31), (2, 2**29), (3, 2**28), (9, 2**28)])
def test_a_task_that_died_decodes_in_children_with_less_memory(deaths, memory, monkeypatch):
    given = []

    def carefully(source, views, units, memory):
        given.append(memory)
        return decode.decode_units(source, views, units)

    monkeypatch.setattr(decode, "_deaths", lambda: deaths)
    monkeypatch.setattr(decode, "decode_carefully", carefully)
    assert decode.unpack(decoded()["rows"])["unit"].to_pylist() == [20, 21, 22, 26, 27]
    assert given == ([] if memory is None else [memory])


def test_what_ends_a_shard_is_returned(monkeypatch):
    def stop(source, views, units):
        yield from [*decode.decode_carefully(source, views, units[:1])]
        raise UserError("the store is gone")

    monkeypatch.setattr(decode, "decode_units", stop)
    monkeypatch.setattr(decode, "decode_carefully", lambda source, views, units: [])
    row = decoded()
    assert row["error"] == "the store is gone"
    assert (row["pixels"].size, row["sizes"].shape, decode.unpack(row["quarantine"]).num_rows) == (0, (0, 2), 0)


def test_many_images_are_asked_for_at_a_time_over_a_network():
    source = Listed([1] * 8)
    source.remote = True
    found = list(decode._items(source, [7, 3, 0]))
    assert [unit for unit, _ in found] == [7, 3, 0]
    assert [getattr(item, "id", "lost") for _, item in found] == ["i7", "lost", "i0"]


def test_views_of_a_plan_from_before_there_was_a_choice_of_decoders():
    written = cache_plan().to_json()
    assert CachePlan.from_json(written, "plan.json").views.decode == "fast"
    del written["settings"]["transform"]["decode"]
    assert CachePlan.from_json(written, "plan.json").views.decode == "pillow"


def test_a_plan_is_read_as_it_was_written(tmp_path):
    for plan in (cache_plan(kernels="native"), cache_plan()):
        out = str(tmp_path / (plan.kernels or "none"))
        plan.write(out)
        assert CachePlan.read(out) == plan
        assert ("kernels" in cache.read_plan(out)) == bool(plan.kernels)
    lacking = cache_plan().to_json()
    del lacking["columns"]
    with pytest.raises(UserError, match=r"^/c/plan\.json is damaged: 'columns'; restore it from a copy"):
        CachePlan.from_json(lacking, "/c/plan.json")


# --- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("native", "sizes"), [(False, [4, 4, 4]), (True, [4, 4, 2])])
def test_batches_are_full_and_rows_in_order(native, sizes):
    encoder, seen = encoder_of(native=native)
    found = encoder.encode(colours(10))
    assert seen == [(size, 3, 2, 3) for size in sizes]
    assert (found.shape, found.dtype) == ((10, 3, 1, 1), np.float32)
    expected = np.array([[5 * n, n, 2 * n] for n in range(10)]) / 127.5 - 1
    np.testing.assert_allclose(found[:, :, 0, 0], expected, atol=1e-6)


def test_images_of_each_size_are_encoded_together():
    encoder, seen = encoder_of()
    images = [*colours(5), *colours(5, 4, 3)]
    mixed = [images[n] for n in (5, 0, 1, 6, 2, 7, 3, 4)]
    pixels = np.concatenate([image.reshape(-1) for image in mixed])
    found = list(encoder._latents(pixels, np.array([image.shape[:2] for image in mixed])))
    assert [places.tolist() for places, _ in found] == [[1, 2, 4, 6, 7], [0, 3, 5]]
    assert seen == [(4, 3, 2, 3), (4, 3, 2, 3), (4, 3, 4, 3)]
    for (_, values), numbers in zip(found, ([0, 1, 2, 3, 4], [0, 1, 2]), strict=True):
        np.testing.assert_allclose(values[:, 0, 0, 0], np.array(numbers) * 5 / 127.5 - 1, atol=1e-6)


def test_a_shard_comes_out_as_its_commit(tmp_path):
    encoder, _ = encoder_of(tmp_path, how=latent_layout("mean", "float32"))
    done = encoder(decoded())
    commit = json.loads(done["commit"])
    assert (done["error"], done["device"]) == ("", encoder.name)
    assert done["encode_seconds"] > 0
    assert (commit["shard"], commit["units"], commit["rows"], commit["quarantined"]) == (3, [20, 28], 5, 3)
    assert commit["reasons"] == {"missing": 2, "not_an_image": 1}
    assert "generation" not in commit
    assert "batch_size" not in commit
    rows, (latents,) = read_shard(str(tmp_path), commit, encoder.how)
    assert rows["unit"].to_pylist() == [20, 21, 22, 26, 27]
    np.testing.assert_allclose(latents[:, 0, 0, 0], np.array([0, 10, 20, 60, 70]) / 127.5 - 1, atol=1e-6)


def test_what_goes_wrong_in_a_shard_is_told(tmp_path):
    encoder, _ = encoder_of(tmp_path)
    assert encoder(decoded() | {"error": "the store is gone"})["error"] == "the store is gone"

    def refuse(x):
        raise UserError("another model")

    encoder._model = refuse
    done = encoder(decoded())
    assert (done["error"], json.loads(done["commit"])) == ("another model", {})
    assert committed_shards(str(tmp_path)) == {}


# --- commits ------------------------------------------------------------------------------------------------------


def numbered(first, count, **changes):
    """Rows of units, as they come from decoding."""
    units = list(range(first, first + count))
    own = {"unit": units, "view": [0] * count, "height": [9] * count, "width": [9] * count, "label": units}
    own |= {"crop_top": [0] * count, "crop_left": [0] * count, "flip": [False] * count, "id": [f"i{n}" for n in units]}
    return pa.table({name: (own | changes)[name] for name in ROWS.names}, schema=ROWS)


def lost(*pairs, first=20):
    shard = Shard(ShardTask(3), Listed([1] * 8), first)
    rows = [decode.quarantined(shard, unit, f"i{unit}", Lost("decode", why, why)) for unit, why in pairs]
    return pa.Table.from_pylist(rows, schema=QUARANTINE)


def row_of(rows, quarantine, task=None, values=(), enlarged=0):
    """`values`: (unit, column, reason) of each value that could not be carried"""
    shard = Shard(task or ShardTask(3), Listed([1] * 8), 20)
    listed = [{"unit": unit, "id": f"i{unit}", "column": column, "reason": why} for unit, column, why in values]
    tables = {
        "rows": rows,
        "quarantine": quarantine,
        "lost_values": pa.Table.from_pylist(listed, schema=decode.LOST_VALUES),
    }
    return {"shard": shard, "enlarged": enlarged, **{name: decode.pack(table) for name, table in tables.items()}}


def latents(count, start=0.0, channels=2, side=1):
    return np.arange(start, start + count, dtype=np.float32)[:, None, None, None] * np.ones(
        (1, channels, side, side), np.float32
    )


def test_latents_that_can_not_be_stored_are_quarantined(tmp_path):
    encoder, _ = encoder_of(tmp_path)
    values = latents(6)
    values[1, 1], values[4, 0], values[5, 0] = np.nan, 70_000, -65_504
    commit = encoder._commit(row_of(numbered(20, 6), lost((26, "corrupt"), (27, "empty"))), [(np.arange(6), values)])
    rows, (stored,) = read_shard(str(tmp_path), commit, HOW)
    assert rows["unit"].to_pylist() == [20, 22, 23, 25]
    assert stored[:, 0, 0, 0].tolist() == [0, 2, 3, -65_504]
    found = read_quarantine(str(tmp_path), commit).to_pylist()
    assert [(r["unit"], r["id"], r["stage"], r["error"]) for r in found] == [
        (21, "i21", "encode", "not_finite"), (24, "i24", "encode", "out_of_range"),
        (26, "i26", "decode", "corrupt"), (27, "i27", "decode", "empty"),
    ]  # fmt: skip
    assert found[1]["message"] == "the model's latents are out_of_range for float16"
    assert commit["units"] == [20, 28]


def test_a_smaller_batch_is_noted(tmp_path):
    encoder, _ = encoder_of(tmp_path)
    encoder.batch_size = 2
    assert encoder._commit(row_of(numbered(20, 8), lost()), [(np.arange(8), latents(8))])["batch_size"] == 2


def test_a_retry_keeps_rows_and_the_rest_of_the_quarantine(tmp_path):
    encoder, _ = encoder_of(tmp_path)
    rows = numbered(20, 8).take([0, 2, 5, 7])  # of these shapes: 22 is of another size
    parts = [(np.array([0, 2, 3]), latents(3)), (np.array([1]), latents(1, 9, side=2))]
    quarantine = lost((21, "corrupt"), (23, "missing"), (24, "missing"), (26, "empty"))
    how = encoder.how = latent_layout("moments", "float16", one_shape=False)
    first = encoder._commit(row_of(rows, quarantine, enlarged=2), parts)
    again = ShardTask(3, 1, (23, 24))
    same = encoder._commit(row_of(numbered(20, 0), lost((23, "missing"), (24, "missing")), again), [])
    assert same == first
    assert committed_shards(str(tmp_path)) == {3: 0}
    retried = row_of(numbered(23, 1), lost((24, "empty")), again, enlarged=1)
    second = encoder._commit(retried, [(np.array([0]), latents(1, 50))])
    assert (second["generation"], second["rows"], second["quarantined"]) == (1, 5, 3)
    assert (first["enlarged"], second["enlarged"]) == (2, 3)
    assert second["reasons"] == {"corrupt": 1, "empty": 2}
    kept, stored = read_shard(str(tmp_path), second, how)
    assert kept["unit"].to_pylist() == [20, 23, 25, 27, 22]
    assert [part[:, 0, 0, 0].tolist() for part in stored] == [[0, 50, 1, 2], [9]]
    assert read_quarantine(str(tmp_path), second)["unit"].to_pylist() == [21, 24, 26]


def test_values_that_could_not_be_carried_are_counted_over_generations(tmp_path):
    encoder, _ = encoder_of(tmp_path)
    moments = latents(7)
    moments[6, 0] = np.nan  # unit 27 has no row, so nothing of it counts
    values = [(unit, "text", f"why {unit}") for unit in range(20, 28)] + [(22, "cls", "other")]
    first = encoder._commit(row_of(numbered(21, 7), lost((20, "missing")), values=values), [(np.arange(7), moments)])
    assert first["lost_values"] == {
        "text": {"count": 6, "examples": [[f"i{unit}", f"why {unit}"] for unit in range(21, 26)]},
        "cls": {"count": 1, "examples": [["i22", "other"]]},
    }
    again = row_of(numbered(20, 1), lost(), ShardTask(3, 1, (20,)), [(20, "cls", "new")])
    second = encoder._commit(again, [(np.array([0]), latents(1))])
    assert second["lost_values"]["text"] == first["lost_values"]["text"]
    assert second["lost_values"]["cls"] == {"count": 2, "examples": [["i20", "new"], ["i22", "other"]]}
    whole = encoder._commit(row_of(numbered(20, 8), lost(), ShardTask(3, 2)), [(np.arange(8), latents(8))])
    assert "lost_values" not in whole


def test_rows_are_in_the_order_of_units_and_views():
    rows = numbered(0, 6, unit=[5, 3, 3, 5, 4, 1], view=[1, 1, 0, 0, 0, 0])
    table, (values,) = _merged_rows([(rows.slice(0, 4), latents(4)), (rows.slice(4), latents(2, 4))], ROWS)
    assert [*zip(table["unit"].to_pylist(), table["view"].to_pylist(), strict=True)] == [
        (1, 0), (3, 0), (3, 1), (4, 0), (5, 0), (5, 1),
    ]  # fmt: skip
    assert values[:, 0, 0, 0].tolist() == [5, 2, 1, 4, 3, 0]
    table, found = _merged_rows([], ROWS)
    assert (table.num_rows, found) == (0, [])


# --- the model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "vae")


def plan_for(model, content="moments", **more):
    return cache_plan(
        model=PlannedModel(model, fingerprint(model), {}), latents=latent_layout(content, "float16"), **more
    )


def test_a_model_that_was_exchanged_is_noticed_where_it_encodes(model, tmp_path):
    plan = plan_for(model)
    load_encoder(plan, torch.device("cpu"))
    other = save_model(tmp_path / "other", seed=1)
    plan = replace(plan, model=replace(plan.model, path=other))
    with pytest.raises(UserError, match=f"{other} on .* is not the model that the job was started with"):
        load_encoder(plan, torch.device("cpu"))


def test_of_moments_the_mean_is_the_first_half(model):
    x = to_tensor(np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8))
    with torch.no_grad():
        moments, mean = (
            load_encoder(plan_for(model, content), torch.device("cpu"))(x) for content in ("moments", "mean")
        )
    assert (moments.shape, mean.shape) == ((2, 8, 2, 2), (2, 4, 2, 2))
    assert torch.equal(moments[:, :4], mean)
    assert not torch.equal(moments[:, 4:], mean)


def test_an_encoder_loads_its_model_once_and_again_after_it_was_closed(model, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        "pipelines.encoding.encoder.load_encoder", lambda plan, device: loaded.append(device.type) or (lambda x: x)
    )
    encoder = ShardEncoder("", plan_for(model, settings=plan_settings(batch_size=2)), False, 1)
    encoder.encode(colours(3))
    assert loaded == ["cpu"]
    encoder.close()
    encoder.encode(colours(1))
    assert loaded == ["cpu"] * 2


def test_a_gpu_computes_the_same_each_time_and_in_fp32():
    before = torch.backends.cudnn.flags(enabled=False, benchmark=True, deterministic=False, allow_tf32=True)
    with before, deterministic_fp32():
        cudnn = torch.backends.cudnn
        assert (cudnn.enabled, cudnn.deterministic, cudnn.allow_tf32) == (True, True, False)


def planned(photos, model, before=None, **more):
    config = validate(Encode, {"source": {"uri": str(photos)}, "model": model, "precision": "fp32"} | more)
    source = Listed([1] * 3)
    return make_plan(config, source, source.identity, before), config


def test_a_plan_says_all_that_decides_on_bytes(model, tmp_path):
    values = {"transform": {"resolution": 64, "crop": "random", "crops": 2, "flips": True, "seed": 9}}
    values |= {"latents": "mean", "dtype": "bf16", "rows_per_shard": 7, "batch_size": 3, "error_budget": 0.25}
    plan, config = planned("/photos", model, **values)
    assert plan.model.path == model
    assert plan.model.fingerprint == fingerprint(model)
    assert plan.model.config["_class_name"] == "LiteVAE"
    assert not [key for key in plan.model.config if key[0] == "_" and key != "_class_name"]
    assert plan.transform == decode.transform_of(config.transform).identity | {"seed": 9}
    assert plan.latents == latent_layout("mean", "bfloat16", 4)
    assert (plan.precision, plan.compile, plan.kernels, plan.rows_per_shard) == ("fp32", False, "torch", 7)
    assert plan.columns == {field.name: str(field.type) for field in ROWS} | {"source_sha256": "fixed_size_binary[32]"}
    assert asdict(plan.settings) == {
        "source": config.source.model_dump(mode="json") | {"uri": "/photos"},
        "batch_size": 3, "error_budget": 0.25, "transform": config.transform.model_dump(mode="json"),
        "left_out": {"hidden": {".jpg": 2}},
    }  # fmt: skip
    buckets = {"resolution": 64, "buckets": True, "bucket_step": 32}
    plan, _ = planned("/photos", model, transform=buckets, kernels="native", dtype="fp32")
    assert plan.latents == latent_layout("moments", "float32", one_shape=False)
    assert "seed" not in plan.transform
    assert plan.kernels == "native"


def test_what_a_started_cache_has_settled_stays(model):
    auto = {"precision": "auto", "batch_size": "auto", "kernels": "auto"}
    before = cache_plan(precision="bf16", settings=plan_settings(batch_size=11), kernels="native")
    plan, _ = planned("/photos", model, before, **auto)
    assert (plan.precision, plan.settings.batch_size, plan.kernels) == ("bf16", 11, "native")
    plan, _ = planned("/photos", model, before, kernels="torch", batch_size=5)
    assert (plan.precision, plan.settings.batch_size, plan.kernels) == ("fp32", 5, "torch")
    before = replace(before, kernels="")  # a plan from before there were any
    assert planned("/photos", model, before, kernels="torch")[0].kernels == ""
    plan, _ = planned("/photos", model, None, **auto)
    assert (plan.precision, plan.settings.batch_size, plan.kernels) == ("auto", "auto", "torch")


def test_a_plan_settles_what_is_auto(model, tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(photos / "a.png")
    values = {"source": {"uri": str(photos)}, "model": model, "transform": {"resolution": 32}, "root": str(tmp_path)}
    auto = {"precision": "auto", "batch_size": "auto"}
    monkeypatch.setattr(cluster, "start", lambda ray: PLACEMENT)
    monkeypatch.setattr(paths, "check_folders", lambda written, read: None)
    monkeypatch.setattr("pipelines.encoding.auto.fastest_precision", lambda placement: "fp32")
    monkeypatch.setattr(
        "pipelines.encoding.auto.best_kernels", lambda device, precision: f"best for {precision} on {device}"
    )
    out = str(tmp_path / "auto")
    job = encode.plan_cache(validate(Encode, values | auto | {"out": out}))
    plan = job.plan
    assert (plan.precision, plan.kernels, plan.settings.batch_size) == ("fp32", "best for fp32 on cpu", 32)
    assert (job.out, len(job.partition), job.placement, job.finished) == (out, 1, PLACEMENT, False)
    assert CachePlan.read(out) == plan
    assert [len(listing) for listing in cache.read_listings(out)] == [1]
    given = {"precision": "bf16", "batch_size": 3, "kernels": "torch", "out": str(tmp_path / "given")}
    plan = encode.plan_cache(validate(Encode, values | given)).plan
    assert (plan.precision, plan.kernels, plan.settings.batch_size) == ("bf16", "torch", 3)
    plan = encode.plan_cache(validate(Encode, values | {"compile": True, "out": str(tmp_path / "compiled")})).plan
    assert (plan.compile, plan.kernels) == (True, "torch")


def test_auto_takes_the_fastest_path_of_the_cpu(model, monkeypatch):
    said = []
    slow = MeasuredPath(FastPath("torch", "bf16"), 9.0, 0.7, False)
    best = MeasuredPath(FastPath("sliced", "fp32"), 4.5, 0.0, True)
    given = []
    monkeypatch.setattr(auto, "measure_paths", lambda *values: given.append(values[1:]) or [best, slow])
    monkeypatch.setattr(auto, "say", lambda text: said.append(text))
    monkeypatch.setattr(auto.native, "unavailable", lambda: "there is no C++ compiler: install g++")
    config = validate(Encode, {"source": {"uri": "/photos"}, "model": model, "out": "/out", "batch_size": 5})
    plan, _ = planned("/photos", model, None, precision="auto", kernels="auto", batch_size=5)
    threads = torch.get_num_threads()
    settled = auto.settle(plan, config, PLACEMENT, auto.WORTH_MEASURING)
    assert (settled.kernels, settled.precision) == ("sliced", "fp32")
    assert torch.get_num_threads() == threads
    ((size, batch_size, allowed),) = given
    assert (size, batch_size, allowed) == (transform_of(plan.views).sizes[0], 5, "auto")
    assert said == [
        "encode: PyTorch, image by image in fp32: the fastest here "
        "(PyTorch, image by image in fp32 4.5 images/s a core, "
        "PyTorch, whole batches in bf16 9 images/s a core, not taken: its error is 0.7)",
        "encode: without the native kernels, which are often twice as fast on CPUs: "
        "there is no C++ compiler: install g++",
    ]


# --- what is left to do -------------------------------------------------------------------------------------------


def commit(out, number, reasons=(), generation=0):
    """A shard of 8 inputs, of which those at the end could not be encoded for these reasons."""
    first = 8 * number
    count = 8 - len(reasons)
    quarantine = lost(*((first + count + n, why) for n, why in enumerate(reasons)), first=first)
    rows = numbered(first, count)
    return commit_shard(
        str(out), number, (first, first + 8), HOW, rows, [latents(count).astype(np.float16)], quarantine, generation
    )


def test_shards_without_a_commit_are_done(tmp_path, monkeypatch):
    commit(tmp_path, 0)
    commit(tmp_path, 2)
    job = encode.CacheJob(str(tmp_path), cache_plan(), Partition([Listed([1] * 40)], 8), False, PLACEMENT)
    monkeypatch.setattr(encode, "plan_cache", lambda *given, **more: job)
    monkeypatch.setattr(encode, "encode_and_track", lambda *given: given)
    found = encode.encode_dataset(validate(Encode, {"out": str(tmp_path)}))
    assert found[2:] == (job, [ShardTask(1), ShardTask(3), ShardTask(4)])


def test_a_retry_is_of_the_quarantined_for_these_reasons(tmp_path, monkeypatch):
    commit(tmp_path, 0, ["empty", "missing"])
    commit(tmp_path, 1)
    commit(tmp_path, 2, ["missing"])
    commit(tmp_path, 2, ["missing", "missing"], generation=1)
    plan, partition = cache_plan(settings=plan_settings(batch_size=3)), Partition([Listed([1] * 24)], 8)
    counts = {"encoded": 10, "reasons": {"missing": 3, "empty": 1}}
    monkeypatch.setattr(maintenance, "_open", lambda config: (str(tmp_path), plan, partition))
    monkeypatch.setattr(encode.cache, "read_manifest", lambda out: {"counts": counts, "source": {"shards": 3}})
    monkeypatch.setattr(encode.cluster, "start", lambda ray: PLACEMENT)
    given = []
    monkeypatch.setattr(maintenance, "encode_and_track", lambda *values: given.append(values) or {"images": 12})
    monkeypatch.setattr(maintenance, "print_summary", lambda done: done)
    (tmp_path / "plan.json").touch()
    own = {"cache": str(tmp_path)}
    assert maintenance.retry(Retry(reasons=["missing"], **own)) == {"images": 12, "encoded_now": 2, "recovered": 2}
    assert given[0][3] == [ShardTask(0, 1, (7,)), ShardTask(2, 2, (22, 23))]
    maintenance.retry(Retry(**own))
    assert given[1][3] == [ShardTask(0, 1, (6, 7)), ShardTask(2, 2, (22, 23))]
    assert given[1][1]["batch_size"] == 3
    with pytest.raises(UserError, match="no image is in quarantine as burnt; the quarantine has 1 empty, 3 missing"):
        maintenance.retry(Retry(reasons=["missing", "burnt"], **own))


# --- running ------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds that go by when they are asked for."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        self.now += 1
        return self.now


class Shown:
    def __init__(self, *arguments, **options):
        self.made, self.seen, self.closed, self.texts = arguments, [], False, []
        type(self).last = self

    def update(self, done, text, **numbers):
        self.texts.append(text)
        self.seen.append((done, numbers["quarantined"]))

    def show(self, *arguments):
        self.seen.append(arguments)

    def close(self):
        self.closed = True


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Encode shards of 8 by a stand-in for Ray's pipeline: `run(numbers, budget)`, the batches of shards that it was
    given, the progress and what is shown."""
    given, progress, shown = [], type("Progress", (Shown,), {}), type("EncodingGauges", (Shown,), {})

    def pipeline(plan, shards, out, placement):
        given.append([shard.task.shard for shard in shards])

        def rows():
            for shard in shards:
                number = shard.task.shard
                done = commit(tmp_path, number, ["empty"] * (number % 2))
                error = "the node is full" if number == 4 else ""
                seconds = {"decode_seconds": 2.0, "encode_seconds": 3.0, "finished": 50.0 + number}
                yield {"error": error, "commit": json.dumps(done), "device": f"d{number % 2}", **seconds}

        return SimpleNamespace(iter_rows=rows)

    monkeypatch.setattr(encode, "_pipeline", pipeline)
    monkeypatch.setattr(encode, "Progress", progress)
    monkeypatch.setattr(encode.prometheus, "EncodingGauges", shown)
    clock = Clock()
    monkeypatch.setattr(encode, "time", clock)
    monkeypatch.setattr(totals, "time", clock)

    def run(numbers, budget=1.0, total=4):
        plan = cache_plan(settings=plan_settings(error_budget=budget))
        job = encode.CacheJob(str(tmp_path), plan, Partition([Listed([1] * 8 * total)], 8), False, PLACEMENT)
        return encode._encode(job, [ShardTask(number) for number in numbers])

    return SimpleNamespace(run=run, given=given, progress=progress, shown=shown, out=tmp_path)


def test_what_a_run_has_done_is_counted(runs, monkeypatch):
    monkeypatch.setattr(encode, "WAVE", 1)
    commit(runs.out, 0, ["missing"] * 2)
    found = runs.run([1, 2, 3])
    assert runs.given == [[1, 2], [3]]  # as many as there are workers, a wave
    assert runs.progress.last.made[:3] == ("encode", 32, 8)
    assert runs.progress.last.seen == [(16, 3), (24, 3), (32, 4)]
    assert runs.progress.last.closed
    assert [(images, reasons) for images, reasons, _ in runs.shown.last.seen] == [
        (7, {"empty": 1}), (8, {}), (7, {"empty": 1}),
    ]  # fmt: skip
    # after 1 second the first of them: 3 tasks decode (4 could), 2 workers encode
    assert runs.shown.last.seen[0][2] == {"decode": 2 / 3, "encode": 3 / 2}
    assert found == {
        "encoded_now": 22, "seconds": 4.0, "images_per_s": 5.5,
        "steady_images_per_s": 7.5,  # 8 + 7 images in the 2 seconds after the first shard
        "decode_busy": 0.5, "encode_busy": 1.125, "devices": ["d0", "d1"],
    }  # fmt: skip
    assert runs.progress.last.texts[-1] == "decoding 67% busy, encoding 100% busy, 4 in quarantine"


def test_one_shard_has_no_steady_rate(runs):
    found = runs.run([2])
    assert (found["steady_images_per_s"], found["encoded_now"], found["devices"]) == (0.0, 8, ["d0"])


def test_shards_that_are_done_again_do_not_count_twice(runs):
    commit(runs.out, 1, ["missing"] * 8)
    runs.run([1])
    assert runs.progress.last.made[2] == 0
    assert runs.progress.last.seen == [(8, 8)]  # of what is there now


def test_an_error_of_a_shard_stops_the_job(runs):
    with pytest.raises(UserError, match="encoding stopped after 8 of 40 images: the node is full"):
        runs.run([2, 4], total=5)
    assert runs.progress.last.closed


def test_the_budget_is_of_what_was_and_of_what_comes(runs):
    commit(runs.out, 0, ["missing"])
    with pytest.raises(UserError, match=r"2 of 32 images .*\(1 empty, 1 missing\), more than error_budget=0.05"):
        runs.run([1, 2], budget=0.05)
    assert committed_shards(str(runs.out)).keys() == {0, 1}
    runs.given.clear()
    with pytest.raises(UserError, match="2 of 32 images"):
        runs.run([2], budget=0.05)  # before anything more is done
    assert runs.given == []
    runs.run([2], budget=2 / 32)


def test_a_budget_is_exceeded_by_more_than_its_share():
    totals.check_budget({"empty": 3, "corrupt": 2}, 0.05, "out", 100)
    with pytest.raises(UserError) as error:
        totals.check_budget({"empty": 3, "corrupt": 3}, 0.05, "out", 100, "limit")
    assert str(error.value).startswith(
        "6 of 100 images could not be encoded (3 corrupt, 3 empty), more than limit=0.05 allows; they are listed in "
        "out/quarantine."
    )


def test_a_summary_is_of_the_manifest():
    shards = [{"bytes": 600}, {"rows": 0}, {"bytes": 400}]
    latents = {"shape": [8, 4, 4], "dtype": "float16", "mean": [1.0, 3.0], "std": [2.0, 2.0]}
    model = {"config": {"latents_mean": [1.0, 3.0], "latents_std": [2.0, 4.0]}}
    counts = {"encoded": 5, "rows": 10, "quarantined": 2, "reasons": {"empty": 2}}
    manifest = {"counts": counts, "shards": shards, "transform": {"resolution": 20}, "latents": latents}
    found = encode._summary("/c/out", manifest | {"digest": "abc", "number": 3, "model": model}, "runs")
    assert "most in channel 1 (from 0)" in found.pop("disagreement")
    assert found == {
        "images": 5, "rows": 10, "quarantined": 2, "reasons": {"empty": 2}, "encoded_now": 0, "seconds": 0.0,
        "lost_values": {}, "enlarged": 0,
        "images_per_s": 0.0, "steady_images_per_s": 0.0, "bits_per_pixel": 2.0, "shape": [8, 4, 4], "latents": latents,
        "digest": "abc", "number": 3, "manifest": "/c/out/manifest.json", "link": "/c/out/metrics.jsonl",
    }  # fmt: skip


def test_what_is_printed_of_a_run(capsys):
    done = {
        "images": 5, "rows": 10, "quarantined": 2, "reasons": {"empty": 2}, "encoded_now": 4, "images_per_s": 12.34,
        "enlarged": 1_001,
        "lost_values": {"text": {"count": 1_002, "examples": [["i3", "not UTF-8"]]}},
        "steady_images_per_s": 23.45, "decode_busy": 0.25, "encode_busy": 0.5, "bits_per_pixel": 2.0,
        "shape": [8, 4, 4],
        "latents": {"content": "moments", "dtype": "float16", "mean": [0.0, 2.0, 3.0], "std": [1.0, 0.0, 1e-9]},
        "manifest": "m.json", "number": 3, "link": "run", "disagreement": "they are others",
    }  # fmt: skip
    encode.print_summary(done)
    shown = capsys.readouterr().out
    for line in (
        "images encoded        5  (4 in this run)",
        "quarantined           2  (2 empty)",
        "enlarged              1,001 images, which are smaller than transform.resolution on a side",
        "images/s              12.3, once started 23.4  (decoding busy 25%, encoding 50%)",
        "latents               8 x 4 x 4 moments, float16, 2.00 bits per pixel",
        "constant channels     1, 2 (from 0): the same value in all latents",
        "model's statistics    they are others",
        "manifest              m.json, version 3",
        "run                   run",
        "column 'text': 1,002 values could not be carried (i3: not UTF-8) and are null",
    ):
        assert line in shown
    assert "out of quarantine" not in shown
    encode.print_summary(done | {"steady_images_per_s": 0.0})  # one shard alone
    assert "images/s              12.3  (decoding busy 25%, encoding 50%)" in capsys.readouterr().out
    encode.print_summary(
        done
        | {
            "recovered": 3,
            "encoded_now": 0,
            "shape": None,
            "disagreement": "",
            "latents": done["latents"] | {"shapes": [1, 2]},
        }
    )
    shown = capsys.readouterr().out
    assert "out of quarantine     3" in shown
    assert "2 shapes of moments" in shown
    assert "images/s" not in shown
