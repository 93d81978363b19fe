"""Folders, Parquet, WebDataset tars and lists as sources, local and on S3: listing, ids, columns, digests, parts, what
a source has grown by, and what is refused."""

import copy
import csv
import io
import json
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from skimage import data as photos

from litevae import storage
from litevae.errors import UserError
from litevae.images import ImageError
from litevae.order import EpochOrder
from litevae.storage import Facts
from pipelines.data import discovery, tar_index
from pipelines.data.config import Source as SourceConfig
from pipelines.data.growth import compare
from pipelines.data.open_source import open_source, restore
from pipelines.data.source import Item

ORIGINALS = Path(__file__).resolve().parents[4] / "shared" / "data" / "originals"


def source_of(uri, labels=(), **options):
    return open_source(SourceConfig(uri=str(uri), **options), labels=labels)


def everything(source):
    """All that a source gives; of an image that can't be read, why."""
    items = []
    for unit in range(source.units):
        try:
            items.append(source.read(unit))
        except ImageError as error:
            items.append((source.id(unit), error.reason, str(error)))
    return items


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
    (tmp_path / "text/b.bin").touch()
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
        ("gs://bucket/x", {}, r"source.uri: .*only local paths and s3://"),
        (tmp_path / "{000..002}.tar", {}, "there is no .*000.tar"),
        (tmp_path / "nowhere", {}, "does not exist"),
        (tmp_path / "*.nothing", {}, "does not exist"),
        (tmp_path / "empty", {}, "empty is empty"),
        (tmp_path / "text", {}, "has no images"),
        (tmp_path / "text/a.txt", {}, "no paths in it"),
        (tmp_path / "text/b.bin", {}, "neither a folder nor an image, nor a .parquet, .tar"),
        (tmp_path / "*/?.parquet", {"split": "train"}, "no split 'train'"),
        (tmp_path / "**/*.*", {}, "several kinds"),
        (tmp_path / "mixed", {}, "both images and Parquet files"),
        (tmp_path / "none.parquet", {}, "no rows"),
        (tmp_path / "bad.parquet", {}, "not a readable Parquet file"),
        (tmp_path / "folder", {"columns": ["caption"]}, "has no caption. A folder carries label, label_name"),
        (tmp_path / "folder", {"split": "train"}, "no split 'train' .*no folder or file in it is named as a split"),
        (data, {"image_column": "jpg"}, r"source.image_column: no column 'jpg' .*; it has id, image, label"),
        (data, {"image_column": "label"}, "is int64, not image bytes or paths"),
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


# --- listings: parts, storing, growth ---------------------------------------------------------------------------


def save_tar(path, samples, format=tarfile.PAX_FORMAT):
    """samples: (key, {extension: bytes})"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for key, files in samples:
            for extension, data in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def numbered(first, count):
    return [
        (
            f"{n:06d}",
            {
                "jpg": b"image %d" % n,
                "cls": b"%d\n" % (n % 10),
                "txt": f"näme {n}".encode(),
                "json": json.dumps({"width": n, "ratio": n / 4, "tags": ["a"], "none": None}).encode(),
            },
        )
        for n in range(first, first + count)
    ]


@pytest.fixture
def kinds(tmp_path, table, monkeypatch):
    """A source of every kind with several groups, by name."""
    monkeypatch.setattr(tar_index, "RANGE_SAMPLES", 8)
    for n in range(20):
        path = tmp_path / f"folder/{'ab'[n % 2]}/{n:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"image %d" % n)
    rows = [{"path": f"folder/{'ab'[n % 2]}/{n:02d}.jpg", "caption": f"caption {n}"} for n in range(19)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for n in range(2):
        save_tar(tmp_path / f"tars/{n}.tar", numbered(20 * n, 20))
    paths = pa.table({"image": [f"../folder/a/{n:02d}.jpg" for n in range(0, 20, 2)], "n": range(10)})
    (tmp_path / "paths").mkdir()
    pq.write_table(paths, tmp_path / "paths/p.parquet", row_group_size=4)
    return {
        "folder": source_of(tmp_path / "folder"),
        "list": source_of(tmp_path / "list.jsonl", columns=["caption"]),
        "parquet": source_of(write(table, tmp_path / "parquet"), columns=["label", "caption"]),
        "parquet without ids": source_of(write(table.drop(["id"]), tmp_path / "bare")),
        "parquet of paths": source_of(tmp_path / "paths", columns=["n"]),
        "webdataset": source_of(tmp_path / "tars", columns=["cls", "json.width"]),
    }


def test_parts_are_the_same_units_from_0(kinds):
    for source in kinds.values():
        items, ids = everything(source), source.ids(0, source.units)
        assert ids == [item.id for item in items]
        assert len(set(ids)) == source.units
        for start, stop in [(0, source.units), (0, 1), (3, 9), (7, source.units), (source.units - 1, source.units)]:
            part = pickle.loads(pickle.dumps(source.part(start, stop)))
            assert everything(part) == items[start:stop]
            assert part.ids(0, part.units) == ids[start:stop] == source.ids(start, stop)
            assert (part.units, part.groups.sum()) == (stop - start, stop - start)
            assert (part.schema, part.digest, part.remote) == (source.schema, source.digest, False)
        part = source.part(2, 8).part(1, 4)
        assert everything(part) == items[3:6]
        for unit in (-1, 3):
            with pytest.raises(IndexError):
                part.id(unit)


def test_a_stored_listing_is_the_source(kinds, tmp_path):
    for name, source in kinds.items():
        pq.write_table(source.listing, tmp_path / "listing.parquet")
        stored = restore(pq.read_table(tmp_path / "listing.parquet"))
        assert (stored.identity, stored.schema, stored.labels) == (source.identity, source.schema, source.labels)
        assert stored.groups.tolist() == source.groups.tolist()
        assert stored.window == source.window
        assert everything(stored) == everything(source)
        assert json.loads(json.dumps(source.identity)) == source.identity
        assert (source.identity["kind"], source.identity["units"]) == (name.split()[0], source.units)


def test_a_listing_holds_where_files_were_moved_to(kinds, tmp_path):
    before = {name: everything(source) for name, source in kinds.items()}
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("folder", "list.jsonl", "parquet", "bare", "paths", "tars"):
        (tmp_path / name).rename(moved / name)
    for name, source in kinds.items():
        there = moved / Path(source.uri).relative_to(tmp_path)
        source = restore(source.listing, str(there))
        assert source.uri == str(there)
        assert everything(source) == before[name]
    source = restore(kinds["webdataset"].listing, f"{moved}/tars/*.tar")
    assert everything(source) == before["webdataset"]


def test_growth(kinds, tmp_path, table):
    def again(name):
        folder, columns = Path(kinds[name].uri), kinds[name].schema.names
        return source_of(folder, columns=columns if name != "folder" else [], labels=kinds[name].labels)

    for name in kinds:
        growth = compare([kinds[name].listing], again(name))
        assert (growth.new.num_rows, growth.changed, growth.gone, growth.examples) == (0, 0, 0, "")
    (tmp_path / "folder/A").mkdir()
    (tmp_path / "folder/A/new.jpg").write_bytes(b"new")
    (tmp_path / "folder/b/99.jpg").write_bytes(b"new, too")
    (tmp_path / "folder/a/00.jpg").write_bytes(b"longer than it was")
    (tmp_path / "folder/b/01.jpg").unlink()
    pq.write_table(table.slice(0, 20), tmp_path / "parquet/aa.parquet", row_group_size=8)
    save_tar(tmp_path / "tars/1.tar", numbered(20, 30))
    expected = {
        "folder": (["A/new.jpg", "b/99.jpg"], 1, 1, "a/00.jpg, b/01.jpg"),
        "parquet": ([f"key-{n}" for n in range(20)], 0, 0, ""),
        "webdataset": ([], 1, 0, "1.tar"),  # 40 ... 43 fill the last range up; 44 ... 49 are another one
    }
    for name, (ids, changed, gone, examples) in expected.items():
        new = again(name)
        growth = compare([kinds[name].listing], new)
        added = restore(growth.new)
        assert added.ids(0, added.units) == ids
        assert (growth.changed, growth.gone, growth.examples) == (changed, gone, examples)
        assert (growth.units, growth.grown) == (len(ids), 6 if name == "webdataset" else 0)
        assert len({added.digest, new.digest, kinds[name].digest}) == 3
        everything(added)
        growth = compare([kinds[name].listing, growth.new], new)
        assert (growth.new.num_rows, growth.changed, growth.gone) == (0, changed, gone)


def test_labels_keep_their_numbers(kinds, tmp_path):
    (tmp_path / "folder/A").mkdir()
    (tmp_path / "folder/A/new.jpg").write_bytes(b"new")
    before = {name: label for label, name in enumerate(kinds["folder"].labels)}
    assert before == {"a": 0, "b": 1}
    source = source_of(tmp_path / "folder", labels=kinds["folder"].labels)
    assert source.labels == ["a", "b", "A"]
    labels = {item.columns["label_name"]: item.columns["label"] for item in everything(source)}
    assert labels == before | {"A": 2}
    renumbered = source_of(tmp_path / "folder")
    assert renumbered.labels == ["A", "a", "b"]
    assert renumbered.digest == source.digest


@pytest.mark.parametrize("units", [10**5, pytest.param(10**6, marks=pytest.mark.slow)])
def test_parts_of_many_units_are_small(tmp_path, monkeypatch, units):
    """By class, of which there are a thousand: photo 70511 is the 71st of the 512th."""
    (tmp_path / "0511").mkdir()
    (tmp_path / "0511/photo-00070511.jpg").write_bytes(b"x")
    files = ((b"%04d/photo-%08d.jpg" % (n % 1000, n), "folder", Facts(n, 2 * n)) for n in range(units))
    monkeypatch.setattr(discovery, "_walk", lambda *_: files)
    source = source_of(tmp_path)
    assert (source.units, len(source.labels), source.labels[511]) == (units, 1000, "0511")
    place = 511 * units // 1000 + 70
    part = source.part(place - 20, place + 492)
    packed = pickle.dumps(part)
    assert len(packed) < 50_000
    part = pickle.loads(packed)
    assert part.ids(0, 512) == source.ids(place - 20, place + 492)
    assert part.read(20) == source.read(place)
    assert source.read(place) == Item("0511/photo-00070511.jpg", b"x", {"label": 511, "label_name": "0511"})


def test_order_is_not_the_file_systems(folder, monkeypatch):
    listing = source_of(folder).listing
    scandir = os.scandir

    class Backwards:
        def __init__(self, path):
            self.entries = scandir(path)

        def __enter__(self):
            return sorted(self.entries, key=lambda entry: entry.name, reverse=True)

        def __exit__(self, *_):
            self.entries.close()

    (folder / "link").symlink_to(folder / "cat")
    first = source_of(folder).listing
    monkeypatch.setattr(os, "scandir", Backwards)
    assert source_of(folder).listing.equals(first, check_metadata=True)
    assert first["file"].to_pylist()[:2] == listing["file"].to_pylist()[:2]


# --- Parquet as others write it ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoded():
    """Photos as JPEGs."""
    files = []
    for picture in (photos.astronaut(), photos.chelsea(), photos.coffee(), photos.rocket()):
        buffer = io.BytesIO()
        Image.fromarray(picture[:64, :80]).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    return files


def test_hugging_face_parquet(tmp_path, encoded):
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog", "moon"]),
            "n": datasets.Value("int32"),
        }
    )
    rows = {
        "image": [{"bytes": data, "path": f"{n}.jpg"} for n, data in enumerate(encoded)],
        "label": [2, 0, -1, 1],
        "n": range(4),
    }
    rows = {name: list(values) for name, values in rows.items()}
    whole = datasets.Dataset.from_dict(rows, features=features)
    for number in range(2):
        whole.select(range(2 * number, 2 * number + 2)).to_parquet(
            tmp_path / f"data/train-{number:05d}-of-00002.parquet"
        )
    whole.select([3]).to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    with pytest.raises(
        UserError,
        match=r"several splits: test \(1 file\), train \(2 files\); give source.split=test or source.split=train, or",
    ):
        source_of(tmp_path)
    with pytest.raises(UserError, match=r"no split 'val' .*there is test \(1 file\), train"):
        source_of(tmp_path, split="val")
    assert source_of(tmp_path, split="test").data(0) == encoded[3]
    source = source_of(tmp_path, split="train", columns=["label", "label_name", "n"])
    assert source.units == len(whole) == 4
    for n, row in enumerate(whole.cast_column("image", datasets.Image(decode=False))):
        item = source.read(n)
        assert item.data == row["image"]["bytes"] == encoded[n]
        name = features["label"].int2str(row["label"]) if row["label"] >= 0 else None
        assert item.columns == {"label": row["label"], "label_name": name, "n": row["n"]}
    assert source.schema == pa.schema([("label", pa.int64()), ("label_name", pa.string()), ("n", pa.int32())])
    assert source.id(3) == "data/train-00001-of-00002.parquet/000000001"
    assert source_of(f"{tmp_path}/data/train-*.parquet").ids(3, 4) == ["train-00001-of-00002.parquet/000000001"]


def test_parquet_of_paths(tmp_path):
    (tmp_path / "photos").mkdir()
    for n in range(3):
        (tmp_path / f"photos/{n} ü.jpg").write_bytes(b"%d" % n)
    paths = ["../photos/0 ü.jpg", str(tmp_path / "photos/1 ü.jpg"), f"file://{tmp_path}/photos/2%20%C3%BC.jpg"]
    odd = ["nowhere.jpg", "https://example.org/a.jpg", "../photos", "a\0b", None]
    (tmp_path / "tables").mkdir()
    pq.write_table(pa.table({"file": paths + odd, "key": range(8)}), tmp_path / "tables/a.parquet")
    source = source_of(tmp_path / "tables", image_column="file")
    assert [source.data(unit) for unit in range(3)] == [b"0", b"1", b"2"]
    reasons = [item[1] for item in everything(source)[3:]]
    assert reasons == ["missing", "unreadable", "unreadable", "unreadable", "missing"]
    assert source.ids(0, 8) == paths + odd[:-1] + ["a.parquet/000000007"]
    assert source_of(tmp_path / "tables", image_column="file", id_column="key").id(3) == "3"
    pq.write_table(pa.table({"image": odd[1:2]}), tmp_path / "tables/b.parquet")
    with pytest.raises(UserError, match=r"'image' has https://example.org/a.jpg: only local paths and s3://"):
        source_of(tmp_path / "tables/b.parquet")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": "../photos/0 ü.jpg"}], kind)
    pq.write_table(pa.table({"image": images}), tmp_path / "tables/c.parquet")
    assert source_of(tmp_path / "tables/c.parquet").data(0) == b"0"


def test_a_flipped_bit_in_a_checked_page_is_found(tmp_path, table):
    path = tmp_path / "a.parquet"
    pq.write_table(
        table.select(["id", "image"]), path, compression="none", write_page_checksum=True, use_dictionary=False
    )
    content = bytearray(path.read_bytes())
    content[content.index(b"image 25")] ^= 1
    path.write_bytes(content)
    source = source_of(path)
    with pytest.raises(UserError, match="row group 0 can't be read"):
        source.data(0)


def test_a_parquet_file_that_changed_is_named(tmp_path, table):
    source = source_of(write(table, tmp_path / "data"))
    pq.write_table(table.slice(0, 7), tmp_path / "data/a.parquet")
    with pytest.raises(UserError, match=r"a.parquet has changed since it was listed"):
        source.data(0)


# --- WebDataset -------------------------------------------------------------------------------------------------


def by_tarfile(path):
    """What Python's own reader finds in a tar: [(key, {extension: bytes})]"""
    samples = {}
    with tarfile.open(path) as tar:
        for member in tar:
            folder, base = os.path.split(member.name)
            if member.isreg() and base.find(".") > 0:
                key, _, extension = base.partition(".")
                samples.setdefault(os.path.join(folder, key), {})[extension] = tar.extractfile(member).read()
    return list(samples.items())


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars(tmp_path, encoded, form, monkeypatch):
    monkeypatch.setattr(tar_index, "RANGE_SAMPLES", 3)
    long = "folder/" * 13  # 91 characters: names beyond 100 take another header or another field
    names = ["a", f"{long}b", f"{long}some-longer-name", "with space/é", "./z"]
    samples = [(name, {"jpg": encoded[n % 4], "TXT": b"t%d" % n}) for n, name in enumerate(names)]
    save_tar(tmp_path / "0.tar", samples, form)
    with tarfile.open(tmp_path / "0.tar", "a", format=form) as tar:
        for name in ("folder", "no-extension", ".hidden.jpg"):
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if name == "folder" else tarfile.REGTYPE
            tar.addfile(member)
    reference = by_tarfile(tmp_path / "0.tar")
    source = source_of(tmp_path / "0.tar", columns=["txt"])
    assert source.groups.tolist() == [3, 2]
    assert [(item.id, item.data, item.columns["txt"]) for item in everything(source)] == [
        (f"0.tar/{key.removeprefix('./')}", files["jpg"], files["TXT"].decode()) for key, files in reference
    ]
    assert [key for key, _ in reference] == names
    assert source.ids(1, 5) == [source.id(unit) for unit in range(1, 5)]


def made_originals(root):
    """Photos one a class in a folder, named in a list, and again in three tars, as ImageNet's samples come."""
    rows, samples = [], []
    for n, (width, height) in enumerate([(90, 60), (64, 128), (50, 50)] * 4):
        wnid, name = f"n{1440764 + 9 * n:08d}", f"class_{'abc'[n % 3]}_{n}"
        buffer = io.BytesIO()
        Image.fromarray(photos.coffee()[n : n + height, :width]).convert("L" if n % 5 == 0 else "RGB").save(
            buffer, "JPEG"
        )
        path = root / "files" / f"{wnid}_{name}" / f"{wnid}_{name}.JPEG"
        path.parent.mkdir(parents=True)
        path.write_bytes(buffer.getvalue())
        row = {"wnid": wnid, "label_name": name, "width": width, "height": height}
        files = {"jpg": buffer.getvalue(), "cls": b"%d" % (83 * n), "json": json.dumps(row).encode()}
        rows.append(row | {"file": path.relative_to(root), "imagenet_index": 83 * n})
        samples.append((f"{wnid}_{name}", files))
    for part in range(3):
        save_tar(root / "wds" / f"originals-{part:06d}.tar", samples[part::3])
    with open(root / "originals.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return root


@pytest.mark.parametrize("kind", ["made", *(["collected"] if ORIGINALS.is_dir() else [])])
def test_tars_of_originals(tmp_path, kind):
    originals, count = (ORIGINALS, 300) if kind == "collected" else (made_originals(tmp_path), 12)
    with open(originals / "originals.csv") as file:
        rows = {row["wnid"]: row for row in csv.DictReader(file)}
    source = source_of(originals / "wds", columns=["cls", "json", "json.width", "json.label_name"])
    assert source.units == len(rows) == count
    strings = [(name, pa.string()) for name in ("json", "json.label_name")]
    assert set(source.schema) == set(pa.schema([("cls", pa.int64()), ("json.width", pa.int64()), *strings]))
    for item in everything(source):
        row = rows.pop(item.id.split("/")[1].split("_")[0])
        assert item.data == (originals / row["file"]).read_bytes()
        assert item.columns["cls"] == int(row["imagenet_index"])
        assert item.columns["json.width"] == int(row["width"])
        assert item.columns["json.label_name"] == row["label_name"]
        assert json.loads(item.columns["json"])["wnid"] == row["wnid"]
    assert not rows
    assert source_of(originals / "wds/originals-{000000..000002}.tar").digest == source_of(originals / "wds").digest


def test_ranges_end_where_they_are_full(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_index, "RANGE_BYTES", 2500)
    sizes = [1, 1, 5000, 1, 1, 1, 1]  # 1024, 1024, 5632 bytes with headers
    save_tar(tmp_path / "0.tar", [(f"{n}", {"jpg": bytes(size)}) for n, size in enumerate(sizes)])
    source = source_of(tmp_path / "0.tar")
    assert source.groups.tolist() == [3, 3, 1]
    assert source.listing["size"].to_pylist() == [2 * 1024 + 5632, 3 * 1024, 1024]
    assert [len(item.data) for item in everything(source)] == sizes


def test_a_range_is_one_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_index, "RANGE_SAMPLES", 8)
    save_tar(tmp_path / "0.tar", numbered(0, 20))
    source = source_of(tmp_path / "0.tar", columns=["cls"])
    reads, read = [], storage.read_range
    monkeypatch.setattr(storage, "read_range", lambda *place: reads.append(place) or read(*place))
    assert len(everything(source)) == 20
    assert [place[1:] for place in reads] == list(
        zip(source.listing["offset"].to_pylist(), source.listing["size"].to_pylist(), strict=True)
    )
    source.ids(0, 20)
    assert len(reads) == 3


def test_columns_of_samples(tmp_path):
    samples = numbered(0, 4)
    samples[1][1]["cls"] = b"\xff"
    samples[2][1]["json"] = b"{"
    del samples[3][1]["txt"], samples[3][1]["jpg"]
    save_tar(tmp_path / "0.tar", samples)
    columns = ["cls", "txt", "json.width", "json.ratio", "json.none"]
    source = source_of(tmp_path / "0.tar", columns=columns)
    kinds = [pa.int64(), pa.string(), pa.int64(), pa.float64(), pa.string()]
    assert source.schema == pa.schema(list(zip(columns, kinds, strict=True)))
    assert source.columns(0) == dict(zip(columns, [0, "näme 0", 0, 0.0, None], strict=True))
    assert source.columns(3) == dict(zip(columns, [3, None, 3, 0.75, None], strict=True))
    for unit, column, reason in ((1, "cls", "not UTF-8"), (2, "json.width", "the JSON can't be read")):
        item = source.read(unit)
        assert item.columns[column] is None
        assert reason in item.lost[column]
    with pytest.raises(ImageError, match="no image among cls, json") as error:
        source.data(3)
    assert error.value.reason == "missing"


def test_the_image_of_a_sample_can_be_named(tmp_path):
    files = {"json": b"{}", "seg.png": b"mask", "jpg": b"photo"}
    save_tar(tmp_path / "0.tar", [("a", files), ("b", {"jpg": b"alone"})])
    with pytest.raises(
        UserError, match=r"1 of 2 samples hold several images, e.g. 'a' of .*0.tar: jpg, seg.png"
    ) as why:
        source_of(tmp_path / "0.tar")
    assert "source.image_column=jpg" in str(why.value)  # as the next line does
    source = source_of(tmp_path / "0.tar", image_column="jpg")
    assert [source.data(unit) for unit in range(2)] == [b"photo", b"alone"]
    assert source.left_out.to_json() == {
        "further images of samples": {".seg.png": 1},
        "other files of samples": {".json": 1},
    }
    assert source.digest != source_of(tmp_path / "0.tar", image_column="seg.png").digest
    with pytest.raises(ImageError, match="no seg.png among jpg"):
        source_of(tmp_path / "0.tar", image_column="seg.png").data(1)


def test_links_in_tars_are_no_images(tmp_path):
    save_tar(tmp_path / "0.tar", [("a", {"jpg": b"photo"})])
    with tarfile.open(tmp_path / "0.tar", "a") as tar:
        for name, kind in (("b.jpg", tarfile.SYMTYPE), ("c.jpg", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.jpg"
            tar.addfile(member)
    items = everything(source_of(tmp_path / "0.tar"))
    assert items[0].data == b"photo"
    assert [item[:2] for item in items[1:]] == [("0.tar/b", "unreadable"), ("0.tar/c", "unreadable")]


def test_a_damaged_tar_is_refused(tmp_path):
    path = save_tar(tmp_path / "0.tar", numbered(0, 3))
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    end += -end % 512
    for cut in (0, 100, 512, 700, end - 512, end):  # also between members and before the end's zeros
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"0.tar (is truncated|can't be read at byte)"):
            source_of(path)
    path.write_bytes(whole[: end + 1024])
    assert source_of(path).units == 3
    path.write_bytes(whole + whole)
    with pytest.raises(UserError, match=r"0.tar has data after its end-of-archive marker"):
        source_of(path)
    path.write_bytes(whole[:1024] + b"x" + whole[1025:])
    with pytest.raises(UserError, match=r"0.tar can't be read at byte 1024: not a tar header"):
        source_of(path)


def test_a_tar_that_changed_is_named(tmp_path):
    path = save_tar(tmp_path / "0.tar", numbered(0, 3))
    source = source_of(path)
    save_tar(path, numbered(0, 2))
    for read in (source.read, source.id, lambda unit: source.ids(unit, unit + 1)):
        with pytest.raises(UserError, match=r"0.tar has changed since it was listed"):
            read(0)
    path.unlink()
    for read in (source.read, lambda unit: source.ids(unit, unit + 1)):
        with pytest.raises(UserError, match=r"0.tar can't be read: .*No such file"):
            read(0)


def test_refused_tars(tmp_path):
    apart = [("a", {"jpg": b"1"}), ("b", {"jpg": b"2"}), ("a", {"cls": b"3"})]
    cases = [
        (apart, {}, "sample 'a' is in the tar twice; the files of a sample must lie next to each other"),
        ([("a", {"jpg": b"1"}), ("a", {"jpg": b"2"})], {}, "'a.jpg' is in the tar twice"),
        ([], {}, "no samples in 1 tar"),
        ([("a", {"mp3": b"1", "json": b"{}"})], {}, "no image in the first samples of .*0.tar; they have json, mp3"),
        (numbered(0, 2), {"image_column": "png"}, "no png in the first samples .*; they have cls, jpg, json, txt"),
        (numbered(0, 2), {"columns": ["caption"]}, "no readable 'caption' in the first samples"),
        (numbered(0, 2), {"columns": ["json.nope"]}, "no readable 'json.nope' in the first samples"),
        (numbered(0, 2), {"columns": ["json.tags"]}, "only plain values"),
        (
            [("a", {"jpg": b"", "json": b'{"x": 1}'}), ("b", {"json": b'{"x": "s"}'})],
            {"columns": ["json.x"]},
            "'json.x' holds numbers and text: 0.tar/b",
        ),
    ]
    for samples, options, message in cases:
        save_tar(tmp_path / "0.tar", samples)
        with pytest.raises(UserError, match=message):
            source_of(tmp_path, **options)
    save_tar(tmp_path / "0.tar", numbered(0, 2))
    (tmp_path / "1.tar.gz").touch()
    for uri in (tmp_path, tmp_path / "1.tar.gz", tmp_path / "*.gz"):
        with pytest.raises(UserError, match=r"1.tar.gz is compressed.*unpack it"):
            source_of(uri)
    with pytest.raises(UserError, match=r"there is no .*/1.tar"):
        source_of(tmp_path / "{0..2}.tar")
    (tmp_path / "x.parquet").touch()
    with pytest.raises(UserError, match=r"holds both tars and Parquet files; name one kind, e.g. '.*/\*\*/\*.tar'"):
        source_of(tmp_path)
    assert source_of(tmp_path / "{0..0}.tar").units == source_of(tmp_path / "?.tar").units == 2


# --- lists ------------------------------------------------------------------------------------------------------


@pytest.fixture
def listed(tmp_path):
    """Images that lists can name: relative, absolute, with odd names."""
    names = ["photos/0.jpg", "photos/a, b.jpg", "photos/ü.jpg", "../elsewhere/3.jpg"]
    (tmp_path / "lists").mkdir()
    for name in names:
        path = tmp_path / "lists" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())
    return names


def test_lists(tmp_path, listed):
    root = tmp_path / "lists"
    rows = [{"key": f"0{n}", "file_name": name, "caption": f'say "{n}",\nagain'} for n, name in enumerate(listed)]
    rows = [row | {"score": n / 2, "label": n or None} for n, row in enumerate(rows)]
    (root / "a.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*listed, "", ""]).encode())
    with open(root / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (root / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    source = source_of(root / "a.txt")
    assert [(item.id, item.data) for item in everything(source)] == [(name, name.encode()) for name in listed]
    kinds = {"caption": pa.string(), "score": pa.float64(), "label": pa.int64()}
    for name in ("a.csv", "a.jsonl"):
        source = source_of(root / name, columns=list(kinds))
        assert source.schema == pa.schema(list(kinds.items()))
        assert everything(source) == [
            Item(row["file_name"], row["file_name"].encode(), {column: row[column] for column in kinds}) for row in rows
        ]
        source = source_of(root / name, id_column="key", image_column="file_name")
        assert source.ids(0, 4) == ["00", "01", "02", "03"]
        assert source.data(3) == listed[3].encode()


def test_list_entries_elsewhere(tmp_path, listed):
    root = tmp_path / "lists"
    entries = [str(root / listed[0]), f"file://{root}/photos/a%2C%20b.jpg", "nowhere.jpg", "photos"]
    (root / "a.txt").write_text("\n".join(entries))
    items = everything(source_of(root / "a.txt"))
    assert [(item.id, item.data) for item in items[:2]] == [(entries[n], listed[n].encode()) for n in range(2)]
    assert [item[:2] for item in items[2:]] == [("nowhere.jpg", "missing"), ("photos", "unreadable")]
    with open(os.path.join(os.fsencode(root), b"photos/caf\xe9.jpg"), "wb") as file:
        file.write(b"latin-1 name")
    (root / "a.txt").write_bytes(b"photos/caf\xe9.jpg\n")
    assert everything(source_of(root / "a.txt")) == [Item("photos/caf\\xe9.jpg", b"latin-1 name")]


def test_list_digest_changes_with_the_list(tmp_path, listed):
    path = tmp_path / "lists/a.csv"
    digests = set()
    for text in ("path,n\na,1\nb,2", "path,n\nb,2\na,1", "path,n\na,1\nb,3", "path,n\na,1\nb,", "path,n\na,1"):
        path.write_text(text)
        digests.add(source_of(path, columns=["n"]).digest)
    path.write_text("path,n\na,1\nb,2\n")
    digests.add(source_of(path, columns=["n"]).digest)
    assert len(digests) == 5
    assert source_of(path).digest not in digests


def test_refused_lists(tmp_path):
    cases = [
        ("a.txt", "\n\n", {}, "a.txt: no paths in it"),
        ("a.txt", "b.jpg\na.jpg\nb.jpg\na.jpg\n", {}, "b.jpg is in row 1 and again in row 3"),
        ("a.txt", "a.jpg\nhttps://example.org/b.jpg\n", {}, "https://example.org/b.jpg: only local paths and s3://"),
        ("a.txt", "a.jpg\n", {"columns": ["caption"]}, "no column 'caption' in .*a.txt; it has path"),
        ("a.csv", "", {}, "can't be read as a list"),
        ("a.csv", "path,n\na,1,2\n", {}, "can't be read as a list: .*Expected 2 columns"),
        ("a.csv", "photo\na.jpg\n", {}, "no column 'image' or 'file_name' or .*; it has photo"),
        ("a.csv", "path\na.jpg\n", {"image_column": "photo"}, "no column 'photo' in"),
        ("a.csv", "path\na.jpg\n", {"id_column": "key"}, "source.id_column: no column 'key'"),
        ("a.csv", "path,id\na,x\nb,y\nc,x\n", {}, "x is in row 1 and again in row 3"),
        ("a.csv", "path,path\na,b\n", {}, "several columns have one name: path"),
        ("a.csv", "path,size\na,1\n", {"columns": ["size"]}, "'size' can't be carried"),
        ("a.csv", "path,n\na,1\n,2\n", {}, "no path in row 2 of column 'path'"),
        ("a.jsonl", "{", {}, "can't be read as a list"),
        ("a.jsonl", '{"path": "a"}\n{"path": null}\n', {}, "no path in row 2"),
        ("a.jsonl", '{"path": "a", "id": null}\n', {}, "no value in row 1 of column 'id'"),
        ("a.jsonl", '{"path": "a", "tags": [1]}\n', {"columns": ["tags"]}, "only plain values of one kind are carried"),
        ("a.jsonl", '{"path": {"a": 1}}\n', {}, "'path' of .*a.jsonl holds objects, not paths"),
        ("a.jsonl", '{"path": "a", "id": [1]}\n', {}, "a.jsonl: column 'id' holds lists: row 1; only plain values"),
    ]
    for name, text, options, message in cases:
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            source_of(tmp_path / name, **options)
    (tmp_path / "b.csv").write_text("path\na\n")
    with pytest.raises(UserError, match="names 2 lists; join them into one"):
        source_of(tmp_path / "?.csv")


# --- S3 ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["s3", pytest.param("ceph", marks=pytest.mark.slow)])
def bucket(request):
    return request.getfixturevalue(request.param)


def upload(folder, bucket):
    """A folder tree to S3, past our own code; and what a bucket has besides: folder markers and hidden files."""
    import boto3

    client, name = boto3.client("s3"), bucket.removeprefix("s3://")
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    for path in files:
        client.put_object(Bucket=name, Key=f"data/{path.relative_to(folder)}", Body=path.read_bytes())
    for key in ("data/folder/", "data/folder/.hidden.jpg", "data/tars/.git/x.tar", "data/top.jpg"):
        client.put_object(Bucket=name, Key=key, Body=b"")
    return client, name


def test_sources_on_s3(kinds, tmp_path, bucket, monkeypatch):
    client, name = upload(tmp_path, bucket)
    for local in kinds.values():
        uri = f"{bucket}/data/{Path(local.uri).relative_to(tmp_path)}"
        columns = local.schema.names if local.kind != "folder" else []
        source = source_of(uri, columns=columns)
        assert (source.uri, source.remote) == (uri, True)
        assert source.identity | {"uri": local.uri} == local.identity  # the same images, so the same digest
        items = everything(local)
        assert everything(source) == items
        assert source.ids(0, source.units) == local.ids(0, local.units)
        part = pickle.loads(pickle.dumps(source.part(3, 7)))
        assert everything(part) == items[3:7]
        assert everything(restore(local.listing, uri)) == items
    source = source_of(f"{bucket}/data/folder")
    client.delete_object(Bucket=name, Key="data/folder/a/00.jpg")
    with pytest.raises(ImageError, match="the file does not exist any more") as error:
        source.data(0)
    assert error.value.reason == "missing"
    assert compare([source.listing], source_of(f"{bucket}/data/folder")).examples == "a/00.jpg"


def test_requests_to_s3(kinds, tmp_path, bucket, monkeypatch):
    upload(tmp_path, bucket)
    gets, read = [], storage.read_range

    def counted(path, offset, length):
        if length:  # of none no request is made
            gets.append((path, offset, length))
        return read(path, offset, length)

    monkeypatch.setattr(storage, "read_range", counted)
    source = source_of(f"{bucket}/data/tars")
    assert len(gets) == 2 + 1  # a small tar is read ahead as a whole; then the first samples are looked at
    size = source.listing["size"][0].as_py()
    for part in (source.part(0, 8), source.part(5, 8)):
        gets.clear()
        everything(part)
        assert gets == [(f"{bucket}/data/tars/0.tar", 0, size)]
    gets.clear()
    assert source.ids(8, 16) == kinds["webdataset"].ids(8, 16)
    assert len(gets) == 1
    gets.clear()
    source = source_of(f"{bucket}/data/parquet")
    assert 2 <= len(gets) <= 4  # two footers; Arrow asks for their length, too
    gets.clear()
    everything(source.part(0, 8))
    assert 2 <= len(gets) <= 4  # a footer, two columns


def test_patterns_on_s3(kinds, tmp_path, bucket):
    upload(tmp_path, bucket)
    digest = kinds["webdataset"].digest
    for pattern in ("tars/*.tar", "tars/?.tar", "tars/{0..1}.tar", "tars/[0-9].tar"):
        assert source_of(f"{bucket}/data/{pattern}").digest == digest
    assert source_of(f"{bucket}/**/*.tar").units == 40
    assert source_of(f"{bucket}/**/*.tar").id(0) == "data/tars/0.tar/000000"
    assert source_of(f"{bucket}/data/tars/1.tar").id(0) == "1.tar/000020"
    for pattern, message in [
        ("data/tars/{0..2}.tar", "there is no s3://.*/data/tars/2.tar"),
        ("data/*.tar", "does not exist"),
        ("nowhere", "does not exist"),
        ("data", "holds both images and tars and Parquet files"),
    ]:
        with pytest.raises(UserError, match=message):
            source_of(f"{bucket}/{pattern}")


def test_an_empty_bucket(bucket):
    for uri, message in [(bucket, "is empty"), (f"{bucket}/", "is empty"), (f"{bucket}/a", "does not exist")]:
        with pytest.raises(UserError, match=message):
            source_of(uri)
    with pytest.raises(UserError, match="no bucket"):
        source_of(f"{bucket}-other/folder")


def test_a_local_list_of_s3_uris(kinds, tmp_path, bucket):
    upload(tmp_path, bucket)
    entries = [f"{bucket}/data/folder/a/00.jpg", f"{bucket}/data/nowhere.jpg", str(tmp_path / "folder/b/01.jpg")]
    (tmp_path / "some.txt").write_text("\n".join(entries))
    source = source_of(tmp_path / "some.txt")
    assert source.remote
    assert [item.data if isinstance(item, Item) else item[1] for item in everything(source)] == [
        b"image 0",
        "missing",
        b"image 1",
    ]
    assert source.ids(0, 3) == entries
