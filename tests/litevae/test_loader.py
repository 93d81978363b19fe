"""The loader: one global order for any number of workers, from any position on, at every row's own draw."""

import copy
import itertools
import json
import pickle
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pytest
import torch

from litevae import cache
from litevae import shards as shards_module
from litevae.cache import LatentCache
from litevae.commits import commit_shard
from litevae.errors import UserError
from litevae.loader import LatentLoader, stream
from litevae.order import EpochOrder
from litevae.shards import QUARANTINE, latent_layout, row_schema

ROWS = 150
ONE = [(60, [(60, 4, 2, 2)]), (20, [(20, 4, 2, 2)]), (70, [(70, 4, 2, 2)])]  # shards: rows of shapes
WIDE, TALL, RARE = (4, 2, 4), (4, 4, 2), (4, 2, 2)
SEVERAL = [(60, [(35, *WIDE), (25, *TALL)]), (20, [(3, *RARE), (17, *WIDE)]), (70, [(30, *TALL), (40, *WIDE)])]


def write(folder, shards):
    """A cache with row groups of 8 rows, 128 of which are a window."""
    one_shape = len({shape[1:] for _, shapes in shards for shape in shapes}) == 1
    how = latent_layout("moments", "float16", one_shape=one_shape)
    plan, start, draw = {"latents": how}, 0, np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "ROW_GROUP", 8)
        patch.setattr(shards_module, "ROW_GROUP", 8)
        for shard, (count, shapes) in enumerate(shards):
            numbers = range(start, start + count)
            columns = {"id": [f"img-{n}" for n in numbers], "unit": numbers, "view": [0] * count}
            columns |= {name: [0] * count for name in ("height", "width", "crop_top", "crop_left")}
            columns |= {"flip": [False] * count, "label": [n % 5 or None for n in numbers]}
            rows = pa.table(columns, schema=row_schema(pa.schema([("label", pa.int64())])))
            parts = [draw.normal(0, 1, shape).astype(np.float16) for shape in shapes]
            nothing = QUARANTINE.empty_table()
            commit_shard(str(folder), shard, (start, start + count), how, rows, parts, nothing)
            start += count
        cache.write_manifest(str(folder), plan, {"digest": "d", "units": start, "shards": len(shards)}, {})
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """150 rows of one shape."""
    return write(tmp_path_factory.mktemp("one"), ONE)


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """92 wide, 55 tall and 3 square rows."""
    return write(tmp_path_factory.mktemp("several"), SEVERAL)


@pytest.fixture(params=["one", "several"])
def folder(request):
    return request.getfixturevalue(request.param)


def make(folder, *args, **kwargs):
    return LatentLoader(LatentCache(folder), *args, **kwargs)


def take(loader, count):
    return list(itertools.islice(loader, count))


def same(a, b):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key, value in x.items():
            assert torch.equal(value, y[key]) if isinstance(value, torch.Tensor) else value == y[key], key
    return True


def indices(batches):
    return torch.cat([batch["index"] for batch in batches]).tolist()


# --- order ------------------------------------------------------------------------------------------------------------


def test_rows_of_one_shape_come_in_the_epoch_order(one):
    latents = LatentCache(one)
    order = EpochOrder(latents.groups, 3, latents.window)
    batches = take(LatentLoader(latents, 16, seed=3), 30)  # three epochs
    assert [len(batch["latents"]) for batch in batches] == [16] * 30
    assert indices(batches) == [order.index(p) for p in range(480)]
    assert torch.cat([batch["epoch"] for batch in batches]).tolist() == [p // ROWS for p in range(480)]


def test_every_epoch_is_another_permutation(folder):
    batches = list(make(folder, 16, seed=3, epochs=3))
    seen = [(e, i) for batch in batches for e, i in zip(*(batch[k].tolist() for k in ("epoch", "index")), strict=True)]
    epochs = [[index for epoch, index in seen if epoch == e] for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(ROWS))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert indices(list(make(folder, 16, seed=4, epochs=1))) != epochs[0]
    short = [len(batch["index"]) for batch in batches if len(batch["index"]) < 16]
    rest = [3 * ROWS % 16] if folder.name.startswith("one") else [3 * 92 % 16, 3 * 55 % 16, 3 * 3]
    assert sorted(short) == sorted(rest)


def test_it_ends_where_it_was_told_to(one):
    loader = make(one, 16, epochs=1)
    assert len(list(loader)) == 10
    assert loader.position == ROWS
    assert list(loader) == []
    longer = make(one, 16, epochs=2)  # goes on with the next epoch's first row
    longer.load_state_dict(loader.state_dict())
    assert sorted(indices(list(longer))) == list(range(ROWS))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_one_global_order(folder, world):
    settings = {"seed": 5, "columns": ["label"], "epochs": 2}
    whole = list(make(folder, 18, **settings))
    ranks = [list(make(folder, 18, rank=rank, world=world, **settings)) for rank in range(world)]
    assert [len(batches) for batches in ranks] == [len(whole)] * world
    for rank, batches in enumerate(ranks):
        for batch, share in zip(whole, batches, strict=True):
            assert share.keys() == batch.keys()
            assert share["label"] == batch["label"][rank::world]
            for key in ("latents", "index", "epoch"):
                assert torch.equal(share[key], batch[key][rank::world])


def test_a_rank_without_rows_in_a_short_batch(several):
    batches = list(make(several, 16, epochs=1, rank=15, world=16, columns=["label"]))
    shapes = [tuple(batch["latents"].shape) for batch in batches]
    # 92 and 55 rows are 5 and 3 whole batches, of which rank 15 has the last row, and a short one; 3 are a short one
    assert Counter(shapes) == {(1, 2, 2, 4): 5, (1, 2, 4, 2): 3, (0, 2, 2, 4): 1, (0, 2, 4, 2): 1, (0, 2, 2, 2): 1}
    assert [len(batch["label"]) for batch in batches] == [shape[0] for shape in shapes]


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_batches_have_one_shape_each_and_are_whole(several):
    latents = LatentCache(several)
    shape_of = np.repeat(np.array(latents.group_shapes), latents.groups, axis=0)
    batches = take(LatentLoader(latents, 8, seed=1), 200)
    for batch in batches:
        assert {tuple(shape) for shape in shape_of[batch["index"]]} == {(4, *batch["latents"].shape[2:])}
        assert len(batch["index"]) == 8
    # Of each shape, the batches that begin in an epoch, all of its rows, and at most the rest of a batch more
    rows = {WIDE: 92, TALL: 55, RARE: 3}
    begun = [{shape: -(-epoch * count // 8) for shape, count in rows.items()} for epoch in range(11)]
    for epoch in range(1, 11):
        upto = batches[: sum(begun[epoch].values())]
        found = Counter((4, *batch["latents"].shape[2:]) for batch in upto)
        assert found == Counter(begun[epoch])
        times = np.bincount(indices(upto), minlength=ROWS)
        for shape, count in rows.items():
            of_shape = times[(shape_of == shape).all(1)]
            assert of_shape.min() >= epoch
            assert of_shape.sum() < epoch * count + 8


def test_shapes_are_mixed_in_proportion(several):
    first = [batch["latents"].shape[2:] for batch in take(make(several, 2, draw="mean"), 75 + 1)]
    counts = {(2, 4): 46, (4, 2): 28, (2, 2): 2}
    assert Counter(map(tuple, first)) == counts
    for n in range(76):
        for shape, count in counts.items():
            assert abs(sum(tuple(s) == shape for s in first[:n]) - count * n / 76) <= 2
    other = [batch["latents"].shape[2:] for batch in take(make(several, 2, seed=1, draw="mean"), 76)]
    assert other != first


@pytest.mark.parametrize(
    ("version", "pinned"),
    [
        (1, [128, 108, 60, 6, 93, 143, 68, 81, 31, 87, 32, 110]),
        (2, [127, 107, 60, 123, 80, 71, 116, 59, 28, 57, 12, 12]),
    ],
)
def test_the_order_of_shapes_is_fixed_for_ever(several, version, pinned):
    """A resumed run must see the order of the version that started it."""
    loader = make(several, 32, seed=7)
    loader.use_order(version)
    assert [batch["index"][0].item() for batch in take(loader, 12)] == pinned


# --- draws and columns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", ["sample", "mean"])
@pytest.mark.parametrize("normalize", [True, False])
def test_draws_are_those_of_the_cache(folder, draw, normalize):
    latents = LatentCache(folder)
    batches = take(make(folder, 40, 9, draw=draw, normalize=normalize), 10)
    assert max(batch["epoch"].max().item() for batch in batches) >= 2
    for batch in batches:
        expected = latents.latents(batch["index"].tolist(), batch["epoch"].tolist(), 9, draw, normalize)
        assert batch["latents"].dtype == torch.float32
        assert torch.equal(batch["latents"], expected)


def test_columns_come_along(folder):
    for batch in make(folder, 16, columns=["id", "label"], epochs=1):
        rows = batch["index"].tolist()
        units = [int(name.removeprefix("img-")) for name in batch["id"]]
        assert batch["label"] == [unit % 5 or None for unit in units]
        assert batch["id"] == LatentCache(folder).columns(rows, ["id"])["id"]
    with pytest.raises(UserError, match="no column 'lable'"):
        next(iter(make(folder, 16, columns=["lable"])))
    with pytest.raises(UserError, match="column 'index' can't be loaded"):
        make(folder, 16, columns=["label", "index"])


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 3])
def test_it_goes_on_in_mid_epoch_with_any_number_of_workers(folder, world):
    whole = take(make(folder, 12, seed=2, columns=["label"]), 40)
    for stop in (0, 1, 7, 12, 13, 25):
        first = make(folder, 12, seed=2, columns=["label"])
        assert stop == 0 or same(take(first, stop), whole[:stop])
        state = json.loads(json.dumps(first.state_dict()))
        for rank in range(world):
            loader = make(folder, 12, seed=2, rank=rank, world=world, columns=["label"])
            loader.load_state_dict(state)
            rest = take(loader, 40 - stop)
            same(rest, [{key: value[rank::world] for key, value in batch.items()} for batch in whole[stop:]])
        rest = take(first, 40 - stop)  # the same loader, iterated again
        same(rest, whole[stop:])


def test_a_state_of_an_earlier_version_goes_on_in_its_order(one):
    earlier, now = make(one, 12, seed=2), make(one, 12, seed=2)
    earlier.use_order(1)
    whole = take(earlier, 8)
    assert not same_rows(whole, take(now, 8))
    state = {key: value for key, value in now.state_dict().items() if key != "order"} | {"position": 36}
    loader = make(one, 12, seed=2)
    loader.load_state_dict(state)
    assert same_rows(take(loader, 5), whole[3:])
    assert loader.state_dict()["order"] == 1  # also where it is saved again
    loader.load_state_dict(now.state_dict())
    assert loader.state_dict()["order"] == 2


def same_rows(batches, others):
    return all(torch.equal(a["index"], b["index"]) for a, b in zip(batches, others, strict=True))


def test_the_state_is_that_of_the_last_batch_handed_out(folder):
    latents, loaded = LatentCache(folder), threading.Semaphore(0)
    original = latents.latents

    def counted(*args):
        z = original(*args)
        loaded.release()
        return z

    latents.latents = counted
    loader = LatentLoader(latents, 12, threads=2, prefetch=5)
    assert loader.state_dict()["position"] == 0
    batches = iter(loader)
    for n in range(1, 4):
        next(batches)
        for _ in range(6 if n == 1 else 1):
            assert loaded.acquire(timeout=30)  # five more than were handed out are loaded
        assert loader.state_dict()["position"] == 12 * n
    time.sleep(0.1)
    assert not loaded.acquire(blocking=False)  # and no more than that
    batches.close()
    assert loader.state_dict()["position"] == 36


def test_one_shape_goes_on_with_another_batch_size(one):
    first = make(one, 12)
    rows = indices(take(first, 5))
    second = make(one, 20)
    second.load_state_dict(first.state_dict())
    assert rows + indices(take(second, 10)) == indices(take(make(one, 26), 10))


def test_a_state_of_something_else_is_refused(one, several, tmp_path):
    state = make(one, 12, seed=1).state_dict()
    with pytest.raises(UserError, match=r"seed=1, but now seed=2"):
        make(one, 12, seed=2).load_state_dict(state)
    with pytest.raises(UserError, match="has changed since"):
        make(several, 12, seed=1).load_state_dict(state)
    with pytest.raises(UserError, match=r"batch_size=12, but now batch_size=14"):
        make(several, 14).load_state_dict(make(several, 12).state_dict())
    moved = shutil.copytree(one, tmp_path / "moved")
    make(moved, 12, seed=1).load_state_dict(state)


def test_a_copy_goes_on_where_it_is(folder):
    loader = make(folder, 12)
    take(loader, 5)
    copies = [copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))]
    rest = take(loader, 20)
    for other in copies:
        same(take(other, 20), rest)


@pytest.mark.parametrize(("rank", "world", "batch"), [(2, 2, 8), (-1, 2, 8), (0, 9, 8), (0, 1, 0)])
def test_ranks_without_rows_are_refused(one, rank, world, batch):
    with pytest.raises(UserError, match=f"rank={rank} of world={world} gets no rows of batch_size={batch}"):
        make(one, batch, rank=rank, world=world)


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_damaged_shard_is_named_when_its_batch_comes(one, tmp_path, threads):
    folder = shutil.copytree(one, tmp_path / "damaged")
    shard = LatentCache(folder).manifest["shards"][1]["file"]
    data = bytearray((folder / shard).read_bytes())
    data[len(data) // 3] ^= 1
    (folder / shard).write_bytes(data)
    whole = take(make(one, 2, seed=9), 20)
    good = next(n for n, batch in enumerate(whole) if any(60 <= index < 80 for index in batch["index"]))
    assert good >= 4  # or the test could not tell an error that comes too early
    loader, batches = make(folder, 2, seed=9, threads=threads), []
    with pytest.raises(UserError, match=f"{shard} is damaged"):
        batches.extend(loader)
    same(batches, whole[:good])
    assert loader.position == 2 * good


@pytest.mark.parametrize("shapes", [[(60, 4, 1, 1)], [(30, *WIDE), (20, *TALL), (10, *RARE)]])
def test_row_groups_are_read_once_an_epoch(tmp_path, monkeypatch, shapes):
    latents, read = LatentCache(write(tmp_path, [(60, shapes)] * 10)), Counter()
    original = latents._read
    monkeypatch.setattr(latents, "_read", lambda group, columns: (read.update([group]), original(group, columns))[1])
    list(LatentLoader(latents, 4, epochs=4))
    assert set(read) == set(range(len(latents.groups)))
    # a few again where windows meet; a reader of random rows, which holds 136 of 600, would read them 6 times
    assert read.total() <= 1.1 * 4 * len(latents.groups)


@pytest.mark.parametrize("kept", [False, True])
def test_from_a_store(folder, s3, tmp_path, kept):
    client = boto3.session.Session().client("s3")
    for file in Path(folder).rglob("*.*"):
        client.upload_file(str(file), s3.removeprefix("s3://"), f"a/cache/{file.relative_to(folder)}")
    settings = {"seed": 4, "columns": ["label"], "epochs": 1}
    local = tmp_path / "kept"
    latents = LatentCache(f"{s3}/a/cache", local=local if kept else None)
    loader = LatentLoader(latents, 16, **settings)
    same(list(loader), list(make(folder, 16, **settings)))
    assert loader.state_dict() == make(folder, 16, seed=4).state_dict() | {"position": loader.position}
    assert len(list(local.glob("*"))) == (3 if kept else 0)

    shard = latents.manifest["shards"][0]["file"]
    client.delete_object(Bucket=s3.removeprefix("s3://"), Key=f"a/cache/{shard}")
    with pytest.raises(UserError, match=f"{shard} is missing"):
        list(make(f"{s3}/a/cache", 16))


# --- stream -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_a_stream_keeps_its_order(threads):
    def load(item):
        time.sleep(0.002 * (item % 3))
        return item * 10

    batches = [[1, 2, 3], [4, 5], [6], [7, 8]]
    assert list(stream(load, batches, threads)) == [[10 * i for i in batch] for batch in batches]


def test_a_stream_loads_ahead_but_not_without_end():
    seen, stop = [], threading.Event()

    def load(item):
        seen.append(item)
        return item

    loaded = stream(load, ([n] for n in iter(int, None) for n in [len(seen)] if not stop.is_set()), 1)
    next(loaded)
    time.sleep(0.1)
    assert 1 <= len(seen) <= 4
    stop.set()
    loaded.close()


def test_an_error_while_loading_arrives():
    def load(item):
        raise UserError(f"item {item}")

    with pytest.raises(UserError, match="item 3"):
        next(stream(load, [[3]], 2))
