"""Folders and Parquet files as sources: listing, ids, labels, digests, and what is refused."""

import copy
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from litevae.errors import UserError
from litevae.images import ImageError
from litevae.order import EpochOrder
from pipelines.config import Source as SourceConfig
from pipelines.sources import open_source


def source_of(uri, **options):
    return open_source(SourceConfig(uri=str(uri), **options))


@pytest.fixture
def folder(tmp_path):
    for path in ("dog/b.jpg", "cat/a.PNG", "cat/tabby/c.webp", "top.jpeg", "notes.txt", ".hidden.jpg", ".git/x.jpg"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())
    return tmp_path


@pytest.fixture
def table():
    count = 50
    return pa.table(
        {
            "id": [f"key-{i}" for i in range(count)],
            "image": [b"image %d" % i for i in range(count)],
            "label": pa.array([i if i % 3 else None for i in range(count)], pa.int64()),
            "caption": [f"caption {i}" for i in range(count)],
            "scores": [[1.0, 2.0]] * count,
        }
    )


def test_folder(folder):
    source = source_of(folder)
    assert [source.id(i) for i in range(source.units)] == ["cat/a.PNG", "cat/tabby/c.webp", "dog/b.jpg", "top.jpeg"]
    items = [source.read(i) for i in range(source.units)]
    assert [item.data for item in items] == [item.id.encode() for item in items]
    assert [item.columns["label_name"] for item in items] == ["cat", "cat/tabby", "dog", None]
    assert [item.columns["label"] for item in items] == [1, 2, 3, None]
    assert source.schema == pa.schema([("label", pa.int64()), ("label_name", pa.string())])
    assert source.groups.tolist() == [1, 1, 1, 1]
    assert len(EpochOrder(source.groups, 0, source.window)) == 4


def test_folder_digest_changes_with_the_listing(folder):
    before = source_of(folder).digest
    assert source_of(folder).digest == before
    (folder / "notes.txt").write_text("not an image, so not part of it")
    assert source_of(folder).digest == before
    (folder / "dog/b.jpg").write_bytes(b"longer than it was before")
    resized = source_of(folder).digest
    (folder / "dog/b.jpg").rename(folder / "dog/c.jpg")
    assert len({before, resized, source_of(folder).digest}) == 3


def test_folder_links_and_odd_names(folder):
    (folder / "loop").symlink_to(folder)
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    with open(os.path.join(os.fsencode(folder), b"caf\xe9.jpg"), "wb") as file:
        file.write(b"latin-1 name")
    source = source_of(folder)
    ids = [source.id(i) for i in range(source.units)]
    assert ids == ["caf\\xe9.jpg", "cat/a.PNG", "cat/tabby/c.webp", "dog/b.jpg", "gone.jpg", "top.jpeg"]
    assert source.data(0) == b"latin-1 name"
    with pytest.raises(ImageError) as error:
        source.read(ids.index("gone.jpg"))
    assert error.value.reason == "missing"


def test_source_is_small_and_picklable(tmp_path):
    for i in range(2000):
        (tmp_path / f"photo-{i:06d}.jpg").touch()
    source = source_of(tmp_path)
    assert len(pickle.dumps(source)) < 2000 * 60
    assert copy.deepcopy(source).id(1999) == "photo-001999.jpg"


def write(table, folder, **options):
    folder.mkdir(exist_ok=True)
    pq.write_table(table.slice(0, 30), folder / "a.parquet", row_group_size=8, **options)
    pq.write_table(table.slice(30), folder / "b.parquet", row_group_size=8, **options)
    return folder


def test_parquet(tmp_path, table):
    source = source_of(write(table, tmp_path / "data"), columns=["label", "caption"])
    assert source.groups.tolist() == [8, 8, 8, 6, 8, 8, 4]
    assert source.schema == pa.schema([("label", pa.int64()), ("caption", pa.string())])
    order = [EpochOrder(source.groups, 0, source.window).index(i) for i in range(50)]
    source = copy.deepcopy(source)
    for unit in order:
        item = source.read(unit)
        assert (item.id, item.data) == (f"key-{unit}", b"image %d" % unit)
        assert item.columns == {"label": unit if unit % 3 else None, "caption": f"caption {unit}"}


def test_a_window_of_row_groups_is_read_once(tmp_path, table, monkeypatch):
    source = source_of(write(table, tmp_path / "data"))
    reads = []
    read_row_group = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *a, **k: reads.append(a[1]) or read_row_group(*a, **k))
    order = EpochOrder(source.groups, 0, source.window)
    for position in range(10 * 50):
        source.data(order.index(position))
    assert len(reads) <= 10 * len(source.groups)


def test_parquet_uris(tmp_path, table):
    folder = write(table, tmp_path / "data")
    assert source_of(folder / "a.parquet").units == 30
    assert source_of(folder / "*.parquet").units == 50
    assert source_of(folder).digest == source_of(f"{folder}/*.parquet").digest
    assert source_of(folder).digest != source_of(folder / "b.parquet").digest


def test_parquet_without_ids_and_with_struct_images(tmp_path, table):
    images = pa.array([{"bytes": b"x", "path": "p"}, {"bytes": None, "path": "q"}])
    pq.write_table(pa.table({"image": images}), tmp_path / "hf.parquet")
    source = source_of(tmp_path / "hf.parquet")
    assert source.data(0) == b"x"
    with pytest.raises(ImageError) as error:
        source.data(1)
    assert error.value.reason == "missing"
    source = source_of(write(table.drop(["id"]), tmp_path / "data"))
    ids = [source.id(i) for i in range(50)]
    assert (ids[8], ids[30]) == ("a.parquet/000000008", "b.parquet/000000000")
    assert len(set(ids)) == 50


def test_damaged_row_group_is_named(tmp_path, table):
    folder = write(table, tmp_path / "data", write_page_checksum=True, compression="zstd")
    source = source_of(folder)
    path = folder / "a.parquet"
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a.parquet: row group \d can't be read"):
        [source.read(unit) for unit in range(source.units)]


def refusals(tmp_path, table):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").touch()
    mixed = write(table, tmp_path / "mixed")
    (mixed / "a.jpg").touch()
    data = write(table, tmp_path / "data")
    other = write(table, tmp_path / "other")
    pq.write_table(table.drop(["label"]), other / "c.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing of the kind")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.jpg").touch()
    return [
        ("", {}, r"source.uri is empty; give a folder"),
        ("s3://bucket/x", {}, "only local paths"),
        (tmp_path / "nowhere", {}, "does not exist"),
        (tmp_path / "*.nothing", {}, "does not exist"),
        (tmp_path / "empty", {}, "empty is empty"),
        (tmp_path / "text", {}, "has no images"),
        (tmp_path / "text/a.txt", {}, "neither a folder nor a .parquet file"),
        (tmp_path / "mixed", {}, "both images .* and Parquet files"),
        (tmp_path / "none.parquet", {}, "no rows"),
        (tmp_path / "bad.parquet", {}, "not a readable Parquet file"),
        (tmp_path / "folder", {"columns": ["caption"]}, "not caption"),
        (data, {"image_column": "jpg"}, r"source.image_column: no column 'jpg' .*; it has id, image, label"),
        (data, {"image_column": "label"}, "is int64, not image bytes"),
        (data, {"id_column": "key"}, "source.id_column: no column 'key'"),
        (data, {"columns": ["nope"]}, "source.columns: no column 'nope'"),
        (data, {"columns": ["scores"]}, "only plain values"),
        (other, {"columns": ["label"]}, "c.parquet: column 'label': no such column"),
    ]


def test_refusals(tmp_path, table):
    for uri, options, message in refusals(tmp_path, table):
        with pytest.raises(UserError, match=message):
            source_of(uri, **options)


def test_missing_id_is_refused(tmp_path):
    pq.write_table(pa.table({"id": ["a", None], "image": [b"x", b"y"]}), tmp_path / "a.parquet")
    source = source_of(tmp_path / "a.parquet")
    assert source.id(0) == "a"
    with pytest.raises(UserError, match="row 1 has no value in 'id'"):
        source.id(1)
    assert np.array_equal(source.groups, [2])


def test_threads_share_a_source_and_an_order(tmp_path, table):
    source = source_of(write(table, tmp_path / "data"))
    order = EpochOrder(source.groups, 0, source.window)
    expected = [f"key-{EpochOrder(source.groups, 0, source.window).index(i)}" for i in range(500)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda i: source.read(order.index(i)).id, range(500))) == expected
