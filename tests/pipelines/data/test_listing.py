"""What a listing takes, leaves out and refuses: layouts as other tools leave them. Nothing is left out uncounted."""

import gzip
import io
import json
import os
import tarfile
import uuid
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from litevae import storage
from litevae.errors import UserError
from pipelines.data.config import Source as SourceConfig
from pipelines.data.growth import compare, with_types
from pipelines.data.left_out import LeftOut, suffix_of
from pipelines.data.open_source import open_source, restore
from pipelines.data.splits import split_of
from pipelines.data.unique_ids import check_ids
from pipelines.data.unusable import explain_uri


def source_of(uri, **options):
    return open_source(SourceConfig(uri=str(uri), **options))


def ids_of(source):
    return source.ids(0, source.units)


def parquet(rows=1, **columns):
    """The bytes of a Parquet file with so many images."""
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": [b"x"] * rows, **columns}), sink)
    return sink.getvalue()


def tar(*names, mode="w"):
    """The bytes of a tar with files of these names, of which each holds its name."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as file:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name.encode())
            file.addfile(member, io.BytesIO(name.encode()))
    return sink.getvalue()


@pytest.fixture(scope="module")
def bucket(_moto):
    """One for all tests here: making one takes longer than most of them."""
    boto3.session.Session().client("s3").create_bucket(Bucket="listings")
    return "s3://listings"


@pytest.fixture
def on_s3(bucket):
    """A new folder on S3."""
    return f"{bucket}/{uuid.uuid4().hex}"


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    """A folder to write a tree into: a local one, and one on S3."""
    return tmp_path if request.param == "local" else request.getfixturevalue("on_s3")


def tree(root, files):
    """Write files: their bytes, or None for files whose content is of no interest."""
    for name, content in files.items():
        if storage.is_remote(str(root)):
            storage.put(storage.join(root, name), b"x" if content is None else content)
            continue
        path = Path(os.fsdecode(os.path.join(os.fsencode(root), name if isinstance(name, bytes) else name.encode())))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" if content is None else content)
    return root


def names(*files):
    return dict.fromkeys(files)


# By layout: files, options, ids, and what is left out.
TAKEN = {
    "hidden files and folders": (
        names("a.jpg", ".b.jpg", ".git/c.png", ".git/d", ".snapshot/1/a.jpg"),
        {},
        ["a.jpg"],
        {"hidden": {".jpg": 1, ".png": 1, "no suffix": 1, "folder": 1}},
    ),
    "what systems leave behind": (
        names("a.jpg", "@eaDir/a.jpg", "__MACOSX/x/._a.jpg", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN/1/b.jpg"),
        {},
        ["a.jpg"],
        {"of the system": {".jpg": 3, ".db": 1, ".ini": 1}},
    ),
    "output that was never committed": (
        {"part-0.parquet": parquet(2)}
        | names("_temporary/0/part-0.parquet", "_SUCCESS", "_old/x.parquet", ".part-0.parquet.crc", "_metadata"),
        {},
        ["part-0.parquet/000000000", "part-0.parquet/000000001"],
        {"not committed output": {".parquet": 2, "no suffix": 2}, "hidden": {".crc": 1}},
    ),
    "photos that a camera names with _": (names("_DSC0001.jpg", "_x/a.jpg"), {}, ["_DSC0001.jpg", "_x/a.jpg"], {}),
    "other suffixes": (
        names("a.JPG", "b.jpg.1", "c", "d.mp4", "e.svg", "f.jpg_large", "g.cr2"),
        {},
        ["a.JPG"],
        {
            "with another suffix": {
                ".1": 1,
                "no suffix": 1,
                ".mp4": 1,
                ".svg": 1,
                ".jpg_large": 1,
                ".cr2": 1,
            }
        },
    ),
    "captions beside images": (
        names("1.png", "1.txt", "2.png", "2.caption", "2.json", "README.md", "LICENSE"),
        {},
        ["1.png", "2.png"],
        {"texts beside images": {".txt": 1, ".caption": 1, ".json": 1}, "metadata": {".md": 1, "no suffix": 1}},
    ),
    "a class that is named as a split, and photos of it": (
        names("bus/1.jpg", "car/1.jpg", "0.jpg", "train.png", "test.jpg"),
        {},
        ["0.jpg", "bus/1.jpg", "car/1.jpg", "test.jpg", "train.png"],
        {},
    ),
    "a split of a folder": (
        names("train/cat/1.jpg", "val/cat/1.jpg", "val/dog/2.jpg"),
        {"split": "val"},
        ["val/cat/1.jpg", "val/dog/2.jpg"],
        {"of other splits": {"train": 1}},
    ),
    "all splits of a folder": (
        names("train/cat/1.jpg", "val/cat/1.jpg"),
        {"split": "all"},
        ["train/cat/1.jpg", "val/cat/1.jpg"],
        {},
    ),
    "a split of tars": (
        {"x-train-000.tar": tar("a.jpg"), "x-val-000.tar": tar("b.jpg")},
        {"split": "train"},
        ["x-train-000.tar/a"],
        {"of other splits": {"validation": 1}},
    ),
    "one image of several": (
        {"0.tar": tar("1.depth.png", "1.jpg", "1.json", "2.depth.png", "2.jpg", "2.txt")},
        {"image_column": "jpg", "columns": ["txt"]},
        ["0.tar/1", "0.tar/2"],
        {"further images of samples": {".depth.png": 2}, "other files of samples": {".json": 1}},
    ),
    "names that hold dots": (
        {"0.tar": tar("e_0.25.jpg", "e_0.25.txt", "e_0.5.jpg", "e_0.5.txt", "notes.txt")},
        {"tar_rows": "images", "columns": ["txt"]},
        ["0.tar/e_0.25.jpg", "0.tar/e_0.5.jpg"],
        {"files without an image": {".txt": 1}},
    ),
    "twins": (
        {"0.tar": tar("a.JPG", "a.jpg", "a.txt", "c.JPEG", "c.jpg")},
        {"tar_rows": "images"},
        ["0.tar/a.JPG", "0.tar/a.jpg", "0.tar/c.JPEG", "0.tar/c.jpg"],
        {"other files of samples": {".txt": 2}},
    ),
    "one of twins": (
        {"0.tar": tar("a.JPG", "a.jpg")},
        {"image_column": "JPG"},
        ["0.tar/a"],
        {"further images of samples": {".jpg": 1}},
    ),
    "hidden members and members without a suffix": (
        {"0.tar": tar("._a.jpg", "a.jpg", "b/.c.png", "README")},
        {},
        ["0.tar/a"],
        {"hidden": {".jpg": 1, ".png": 1}, "without an extension": {"no suffix": 1}},
    ),
    "img2dataset's folder by the pattern that its refusal names": (
        {"00000.tar": tar("1.jpg"), "00000.parquet": parquet(), "00000_stats.json": b"{}"},
        {"uri": "**/*.tar"},
        ["00000.tar/1"],
        {},
    ),
    "repeated paths of a list, made unique": (
        {"a.csv": b"path,id\na.jpg,x\nb.jpg,x\na.jpg,y\n", "a.jpg": b"", "b.jpg": b""},
        {"uri": "a.csv", "ids": "unique"},
        ["a.csv/000000000", "a.csv/000000001", "a.csv/000000002"],
        {},
    ),
    "its files": (
        {"00000/1.jpg": b"", "00000/1.txt": b"", "00000.parquet": parquet()},
        {"uri": "**/*.jpg"},
        ["00000/1.jpg"],
        {},
    ),
    "repeated ids, made unique": (
        {"0.parquet": parquet(2, id=["a", "b"]), "1.parquet": parquet(id=["a"])},
        {"ids": "unique"},
        ["0.parquet/000000000", "0.parquet/000000001", "1.parquet/000000000"],
        {},
    ),
}


# What is left out on S3, where it is another count: a folder of snapshots is not walked into, but its keys are listed.
LEFT_OUT_ON_S3 = {"hidden files and folders": {"hidden": {".jpg": 2, ".png": 1, "no suffix": 1}}}


@pytest.mark.parametrize("layout", TAKEN)
def test_everything_is_accounted_for(root, layout, capsys):
    files, options, ids, left_out = TAKEN[layout]
    left_out = LEFT_OUT_ON_S3.get(layout, left_out) if storage.is_remote(str(root)) else left_out
    uri = storage.join(str(tree(root, files)), options.get("uri", "")).rstrip("/")
    source = source_of(uri, **{key: value for key, value in options.items() if key != "uri"})
    assert ids_of(source) == ids
    assert source.left_out.to_json() == {reason: dict(sorted(counts.items())) for reason, counts in left_out.items()}
    assert source.seen == len(ids) + sum(sum(counts.values()) for counts in left_out.values())
    said = capsys.readouterr().out
    assert (f"{source.seen:,} seen = {len(ids):,} image" in said) == bool(left_out)
    assert source.part(0, source.units).ids(0, source.units) == ids  # as a worker gets it
    assert restore(source.listing).left_out == source.left_out


# By layout: files, options, and what the refusal says. Each is followed by the options that it advises.
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"
REFUSED = {
    "splits as folders": (
        names("train/cat/1.jpg", "val/cat/1.jpg"),
        {},
        "several splits: train .1 file., validation",
        {"split": "train"},
    ),
    "splits as folders of another case": (
        names("Images/Train/1.jpg", "Images/Test/1.jpg"),
        {},
        "several splits: test .*, train",
        {"split": "test"},
    ),
    "splits with a year": (names("train2017/1.jpg", "val2017/1.jpg"), {}, "several splits", {"split": "all"}),
    "splits as files": (
        {"train.parquet": parquet(), "test.parquet": parquet()},
        {},
        "give source.split=test or",
        {"split": "test"},
    ),
    "splits as folders of files": (
        {"default/train/0.parquet": parquet(), "default/validation/0.parquet": parquet()},
        {},
        "or source.split=all for all of them",
        {"split": "all"},
    ),
    "a numbered split and another": (
        {"train-00000-of-00001.parquet": parquet(), "dev.parquet": parquet()},
        {},
        "several splits",
        {"split": "dev"},
    ),
    "Hive's splits": (
        {"split=train/0.parquet": parquet(), "split=eval/0.parquet": parquet()},
        {},
        "several",
        {"split": "train"},
    ),
    "splits as tars": (
        {"train-0001.tar": tar("a.jpg"), "test-0001.tar": tar("a.jpg")},
        {},
        "several splits",
        {"split": "train"},
    ),
    "no such split": (
        names("train/1.jpg", "test/1.jpg"),
        {"split": "val"},
        "no split 'val'.*there is test",
        {"split": "test"},
    ),
    "several images of a sample": (
        {"0.tar": tar("1.edited.jpg", "1.original.jpg")},
        {},
        r"1 of 1 samples hold several images, e.g. '1' of .*0.tar: edited.jpg, original.jpg",
        {"image_column": "edited.jpg"},
    ),
    "names that hold dots": (
        {"0.tar": tar("a_0.25.jpg", "a_0.5.jpg")},
        {},
        "source.tar_rows=images",
        {"tar_rows": "images"},
    ),
    "twins": ({"0.tar": tar("a.JPG", "a.jpg")}, {}, "differ in letter case only", {"image_column": "JPG"}),
    "repeated ids": (
        {"0.parquet": parquet(3, id=["a", "b", "c"]), "1.parquet": parquet(2, id=["d", "b"])},
        {},
        r"0.parquet, row 1 and .*1.parquet, row 1 have one id, 'b'; .*source.ids=unique",
        {"ids": "unique"},
    ),
    "a path that is twice in a list": (
        {"a.txt": b"a.jpg\nb.jpg\na.jpg\n"},
        {"uri": "a.txt"},
        "a.jpg is in row 1 and again in row 3; name every image once, or give source.ids=unique",
        {"uri": "a.txt", "ids": "unique"},
    ),
    "an id that is twice in a list": (
        {"a.csv": b"path,id\na.jpg,x\nb.jpg,x\n"},
        {"uri": "a.csv"},
        "x is in row 1 and again in row 2; name a column with unique ids by source.id_column=",
        {"uri": "a.csv", "ids": "unique"},
    ),
    "a row without an id": (
        {"0.parquet": parquet(2, id=["a", None])},
        {},
        "0.parquet: row 1 has no value in 'id'",
        {"ids": "unique"},
    ),
    "repeated numbers": (
        {"0.parquet": parquet(3, id=[1, 2, 1])},
        {},
        "row 0 and .*row 2 have one id, '1'",
        {"ids": "unique"},
    ),
    "images and tars": (
        {"0.tar": tar("a.jpg"), "b/c.PNG": b""},
        {},
        r"both images and tars; .*\*\*/\*.PNG",
        {"uri": "**/*.PNG"},
    ),
    "tars and Parquet files": (
        {"0.tar": tar("a.jpg"), "0.parquet": parquet()},
        {},
        r"both tars and Parquet .*\*\*/\*.tar",
        {"uri": "**/*.tar"},
    ),
    "a pattern of folders": (names("a/b/1.jpg"), {"uri": "a/*"}, "matches only folders", {"uri": "a/*/**/*.jpg"}),
    "a gzip-compressed tar": ({"0.tar": tar("a.jpg", mode="w:gz")}, {}, "0.tar is gzip-compressed.*unpack it", None),
    "an xz-compressed tar": ({"0.tar": tar("a.jpg", mode="w:xz")}, {}, "0.tar is xz-compressed", None),
    "a bzip2-compressed tar": ({"0.tar": tar("a.jpg", mode="w:bz2")}, {}, "0.tar is bzip2-compressed", None),
    "a tar.gz": (names("0.tar.gz"), {}, "0.tar.gz is compressed", None),
    "splits in one tar": (
        {"0.tar": tar("train/a/1.jpg", "val/a/1.jpg", "b/2.jpg")},
        {},
        r"folders in the tars are named as several splits: train \(1 samples\), validation \(1 samples\)",
        {"split": "all"},
    ),
    "splits in several tars": (
        {"0.tar": tar("train/1.jpg"), "1.tar": tar("test/1.jpg")},
        {},
        "several splits",
        {"uri": "0.tar"},
    ),
    "a zip named .tar": ({"0.tar": b"PK\3\4" + bytes(600)}, {}, "0.tar is a zip archive; unpack it", None),
    "an lz4-compressed tar": ({"0.tar": b"\x04\x22\x4d\x18" + bytes(600)}, {}, "0.tar is lz4-compressed", None),
    "a page named .tar": ({"0.tar": b"<!DOCTYPE html><html>" + bytes(600)}, {}, "0.tar is an HTML page, .*again", None),
    "a pointer named .tar": ({"0.tar": LFS}, {}, "0.tar is a pointer of Git LFS.*fetch it: git lfs pull", None),
    "a pointer named .parquet": ({"0.parquet": LFS}, {}, "0.parquet is a pointer of Git LFS", None),
    "a pointer named .csv": ({"0.csv": LFS}, {"uri": "0.csv"}, "0.csv is a pointer of Git LFS", None),
    "a compressed list": (
        {"a.csv": gzip.compress(b"path\na.jpg\n")},
        {"uri": "a.csv"},
        "gzip-compressed; unpack it to a plain .csv",
        None,
    ),
    "a zip in a folder": (names("a.zip"), {}, r"only 1 with another suffix \(.zip\); unpack the archives", None),
    "a zip": (names("a.zip"), {"uri": "a.zip"}, "is an archive; unpack it .unzip .*a.zip -d a.", None),
    "a video": (names("a.mp4"), {"uri": "a.mp4"}, "is a video; write its frames first", None),
    "a list in a folder": (names("a.jsonl"), {}, "a list of paths is given by its file name", None),
    "a JSON file": (names("a.json"), {"uri": "a.json"}, "a list of images is .jsonl", None),
}


# What the refusal says on S3, which has no folders that a pattern could match.
REFUSED_ON_S3 = {"a pattern of folders": "does not exist: no file matches"}


@pytest.mark.parametrize("layout", REFUSED)
def test_what_is_ambiguous_or_unusable_is_refused_with_a_way_out(root, layout):
    files, options, message, advised = REFUSED[layout]
    message = REFUSED_ON_S3.get(layout, message) if storage.is_remote(str(root)) else message
    tree(root, files)

    def listed(uri="", **given):
        source = source_of(storage.join(str(root), uri).rstrip("/"), **given)
        check_ids([source])
        return source

    with pytest.raises(UserError, match=f"(?s){message}"):
        listed(**options)
    if advised is not None:
        assert listed(**options | advised).units


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train/cat/1.jpg", "train"),
        ("data/train-00000-of-00002.parquet", "train"),
        ("data/unlabeled-00000-of-00002.parquet", "unlabeled"),
        ("default/validation/0000.parquet", "validation"),
        ("VAL/1.jpg", "validation"),
        ("testing_images/x/1.jpg", "test"),
        ("DIV2K_valid_HR/1.png", "validation"),
        ("a/eval.parquet", "eval"),
        ("dev-000.tar", "dev"),
        ("split=training/0.parquet", "train"),
        ("trainer/1.parquet", ""),
        ("contest/1.parquet", ""),
        ("latest.parquet", ""),
        ("0001.parquet", ""),
    ],
)
def test_splits_are_recognised(path, split):
    """By the rules of Hugging Face's `datasets`, of which the first two columns of its documentation are examples."""
    assert split_of(path) == split


def test_with_a_split_its_folder_is_no_part_of_a_class(root):
    tree(root, names("train/cat/1.jpg", "val/cat/2.jpg", "val/dog/3.jpg", "val/4.jpg"))
    source = source_of(root, split="all")
    labels = [source.columns(unit) for unit in range(source.units)]
    assert [label["label_name"] for label in labels] == ["cat", None, "cat", "dog"]
    assert source.labels == source_of(root, split="val").labels == ["", "cat", "dog"]  # "": the root


def test_one_split_among_others_is_said(tmp_path, capsys):
    source_of(tree(tmp_path, names("train/1.jpg", "more/2.jpg", "more/3.jpg")))
    assert "train (1 file) lies under a name of a split, 2 do not; all are read" in capsys.readouterr().out


def test_ids_are_different_for_different_names(tmp_path):
    """Bytes that are not UTF-8 beside names that look like their escapes."""
    files = [b"\xff.jpg", rb"\xff.jpg", rb"\x5cxff.jpg", rb"\x5c\xff.jpg", b"\\\xff.jpg", rb"a\b.jpg", rb"\x41.jpg"]
    source = source_of(tree(tmp_path, dict.fromkeys(files)))
    ids = ids_of(source)
    assert len(set(ids)) == len(files)
    assert {rb"a\b.jpg".decode(), rb"\x41.jpg".decode(), "\\xff.jpg"} <= set(ids)  # as before, where it is clear
    assert all(source.data(unit) == b"x" for unit in range(len(files)))


def test_hive_folders_carry_their_keys(root):
    files = {
        "label=cat/year=2020/0.parquet": parquet(),
        "label=d%20og/year=2021/0.parquet": parquet(2),
        "label=__HIVE_DEFAULT_PARTITION__/0.parquet": parquet(),
    }
    source = source_of(tree(f"{root}/packed", files), columns=["label", "year"])
    rows = [tuple(source.columns(unit).values()) for unit in range(source.units)]
    assert rows == [(None, None), ("cat", "2020"), ("d og", "2021"), ("d og", "2021")]
    source = source_of(tree(f"{root}/files", names("year=2020/a/1.jpg", "year=2021/2.jpg")), columns=["year"])
    assert [source.columns(unit)["year"] for unit in range(2)] == ["2020", "2021"]
    with pytest.raises(UserError, match="has no month. A folder carries label, label_name, year, and what"):
        source_of(f"{root}/files", columns=["month"])


def test_texts_beside_images_are_carried(root, capsys):
    """By the stem or by the whole name; the text of no image, or of another suffix, is left out and counted."""
    files = {
        "a/1.jpg": None, "a/1.txt": b"by stem", "a/2.png": None, "a/2.png.txt": "é, by name".encode(),
        "a/3.jpg": None, "a/3.json": b'{"score": 5}', "a/1.json": b'{"score": 5.5}', "a/4.txt": b"no image",
        "a/5.jpg": None, "a/5.txt": b"\xe9 is Latin-1", "a/6.JPG": None, "a/6.caption": b"not asked for",
    }  # fmt: skip
    source = source_of(tree(root, files), columns=["txt", "json.score"])
    items = [source.read(unit) for unit in range(source.units)]
    assert [item.columns["txt"] for item in items] == ["by stem", "é, by name", None, None, None]
    assert [item.columns["json.score"] for item in items] == [5.5, None, 5.0, None, None]
    assert [list(item.lost) for item in items] == [[], [], [], ["txt"], []]
    assert source.left_out.to_json() == {"texts beside images": {".caption": 1, ".txt": 1}}
    assert source.seen == 7  # five images, and the texts of none; all others belong to an image
    some = source_of(storage.join(str(root), "a/[1-3].*g"), columns=["txt", "json.score"])  # a pattern of images
    assert [some.columns(unit)["txt"] for unit in range(some.units)] == ["by stem", "é, by name", None]
    with pytest.raises(UserError, match=r"has no npy. A folder carries label, label_name, and what lies beside"):
        source_of(root, columns=["npy"])


def metadata(kind, rows):
    """The bytes of a metadata file."""
    if kind == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue()
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    return "\n".join([",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]).encode()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_of_image_folders_is_read(root, kind, capsys):
    """Names are relative to the folder of the metadata; rows of no image and images without a row are said."""
    rows = [{"file_name": name, "text": text, "n": n} for n, (name, text) in enumerate([
        ("1.jpg", "007"), ("b/2.jpg", "x"), ("gone.jpg", "y")
    ])]  # fmt: skip
    tree(root, names("a/1.jpg", "a/b/2.jpg", "3.jpg") | {f"a/metadata.{kind}": metadata(kind, rows)})
    source = source_of(root, columns=["text", "n"])
    assert ids_of(source) == ["3.jpg", "a/1.jpg", "a/b/2.jpg"]
    read = [source.columns(unit) for unit in range(3)]
    assert [(row["text"], row["n"]) for row in read] == [(None, None), ("007", 0), ("x", 1)]
    assert "1 images have no row there, and 1 rows name no image" in capsys.readouterr().out
    assert not source.left_out.total
    assert source_of(storage.join(str(root), "a/*.jpg"), columns=["text"]).columns(0)["text"] == "007"
    assert source_of(root).left_out.to_json() == {"metadata": {f".{kind}": 1}}
    twice = [*rows, {"file_name": "./1.jpg", "text": "again", "n": 3}]
    tree(root, {f"a/metadata.{kind}": metadata(kind, twice)})
    with pytest.raises(UserError, match="has several rows for a/1.jpg"):
        source_of(root, columns=["text"])


@pytest.mark.parametrize("column", ["id", "file", "rows", "offset", "size", "version"])
def test_columns_that_a_folders_listing_has_itself_are_refused(tmp_path, column):
    """They would stand where the facts of the files are, or be taken for them."""
    rows = [{"file_name": "1.jpg", column: 7, "other": 7}]
    tree(tmp_path, names("1.jpg") | {f"1.{column}": b"7", "metadata.jsonl": metadata("jsonl", rows)})
    with pytest.raises(UserError, match=f"source.columns: '{column}' can't be carried .* rename it"):
        source_of(tmp_path, columns=[column])
    assert source_of(tmp_path, columns=["other"]).columns(0)["other"] == 7


def test_a_list_may_have_a_column_of_versions(tmp_path):
    """It is a column as others are; its values are not taken for times of files."""
    tree(tmp_path, names("1.jpg", "2.jpg") | {"list.csv": b"path,version\n1.jpg,1.0\n2.jpg,1.1\n"})
    before = source_of(tmp_path / "list.csv", columns=["version"])
    (tmp_path / "list.csv").write_bytes(b"path,version\n1.jpg,1.0\n2.jpg,1.2\n")
    after = source_of(tmp_path / "list.csv", columns=["version"])
    assert after.digest != before.digest
    growth = compare([before.listing], after)
    assert (growth.new.num_rows, growth.changed, growth.gone) == (0, 1, 0)
    assert growth.examples == "2.jpg"
    (tmp_path / "list.csv").write_bytes(b"path,file version\n1.jpg,a\n")
    with pytest.raises(UserError, match="'file version' can't be carried from a list under this name; rename it"):
        source_of(tmp_path / "list.csv", columns=["file version"])


def test_labels_of_a_metadata_file_are_carried_where_they_are_asked_for(tmp_path, capsys):
    """As Hugging Face's ImageFolder has it: a folder's name is a label only where no metadata gives one."""
    rows = [{"file_name": "a/1.jpg", "label": 5}, {"file_name": "a/2.jpg", "label": 7}]
    tree(tmp_path, names("a/1.jpg", "a/2.jpg") | {"metadata.jsonl": metadata("jsonl", rows)})
    assert [source_of(tmp_path).columns(unit)["label"] for unit in range(2)] == [0, 0]
    assert "of metadata.jsonl" not in capsys.readouterr().out
    source = source_of(tmp_path, columns=["label"])
    assert [source.columns(unit) for unit in range(2)] == [{"label": n, "label_name": "a"} for n in (5, 7)]
    assert "source.columns: label of metadata.jsonl, not of the folders" in capsys.readouterr().out


def test_a_metadata_file_of_something_else_is_left_out(tmp_path):
    tree(tmp_path, names("a/1.jpg") | {"metadata.csv": b"key,value\nx,1\n"})
    source = source_of(tmp_path, columns=["label", "label_name"])
    assert source.columns(0) == {"label": 0, "label_name": "a"}
    assert source.left_out.to_json() == {"metadata": {".csv": 1}}


def test_a_type_beside_images_that_does_not_fit_what_is_new_is_refused(tmp_path):
    """The values are not in the listing, so none can be converted there."""
    tree(tmp_path, names("1.jpg") | {"1.json": b'{"score": 5}'})
    before = source_of(tmp_path, columns=["json.score"])
    tree(tmp_path, names("2.jpg") | {"2.json": b'{"score": 5.5}'})
    growth = compare([before.listing], source_of(tmp_path, columns=["json.score"]))
    with pytest.raises(UserError, match=r"'json.score' holds double with what is new .*, and int64 in the cache"):
        with_types(growth.new, before.schema)


def test_a_list_that_describes_no_files_is_no_metadata(tmp_path):
    """It gives none of the columns, so that it need not name images either."""
    tree(tmp_path, names("a/1.jpg") | {"metadata.csv": b"key,value\n1,2\n"})
    source = source_of(tmp_path, columns=["label"])
    assert source.left_out.to_json() == {"metadata": {".csv": 1}}
    with pytest.raises(UserError, match="metadata.csv has no column 'file_name'"):
        source_of(tmp_path, columns=["value"])


@pytest.mark.parametrize("column", ["id", "version", "file", "rows", "offset", "size"])
def test_what_a_listing_knows_of_files_is_never_a_column_of_theirs(tmp_path, column):
    """A column of metadata, a key of Hive's or a text of such a name has to be renamed, and can be then."""
    files = names(f"{column}=1/1.jpg", "new=1/2.jpg", f"3.{column}.jpg")
    rows = [{"file_name": "3.jpg", column: "7", "renamed": "8"}]
    tree(tmp_path, files | {"3.jpg": None, f"3.{column}": b"9", "metadata.jsonl": metadata("jsonl", rows)})
    with pytest.raises(UserError, match=f"'{column}' can't be carried from a folder under this name; rename it in .*"):
        source_of(tmp_path, columns=["renamed", column])
    source = source_of(tmp_path, columns=["renamed", "new"])
    by_id = {source.id(unit): source.columns(unit) for unit in range(source.units)}
    assert sorted(by_id) == sorted(["3.jpg", *files])
    assert (by_id["3.jpg"]["renamed"], by_id["new=1/2.jpg"]["new"]) == ("8", "1")


@pytest.mark.parametrize(
    "key",
    [
        *("a b/ü.jpg", "a%20b.jpg", "a+b.jpg", "a//b.jpg", "a=b/c&d;e.jpg", "'\"#?.jpg", "*[x]{0..1}.jpg", "日本.jpg"),
        *("a/./plain.jpg", "a/../plain.jpg", "./plain.jpg", "/plain.jpg"),  # each an object of its own
    ],
)
def test_odd_keys_on_s3_are_read(on_s3, key):
    tree(on_s3, {key: b"odd", "plain.jpg": b"plain"})
    source = source_of(on_s3)
    assert dict(zip(ids_of(source), map(source.data, range(2)), strict=True)) == {key: b"odd", "plain.jpg": b"plain"}


def test_an_object_that_was_written_again_is_seen(on_s3):
    """At equal size and within a second: S3 tells it by its tag."""
    tree(on_s3, names("1.bmp", "2.bmp"))
    before = source_of(on_s3)
    tree(on_s3, {"2.bmp": b"y"})
    growth = compare([before.listing], source_of(on_s3))
    assert (growth.units, growth.changed, growth.gone, growth.examples) == (0, 1, 0, "2.bmp")
    tree(on_s3, {"2.bmp": b"x"})
    assert compare([before.listing], source_of(on_s3)).changed == 0  # it is what it was


def test_a_file_that_was_written_again_is_seen(tmp_path):
    """At equal size, which a bitmap keeps; a copy of the whole source is no change."""
    tree(tmp_path / "a", names("1.bmp", "2.bmp", "3.bmp"))
    before = source_of(tmp_path / "a")
    (tmp_path / "a/2.bmp").write_bytes(b"y")
    os.utime(tmp_path / "a/2.bmp", ns=(1, 1))
    growth = compare([before.listing], source_of(tmp_path / "a"))
    assert (growth.new.num_rows, growth.changed, growth.gone, growth.examples) == (0, 1, 0, "2.bmp")
    assert source_of(tmp_path / "a").digest == before.digest
    tree(tmp_path / "b", names("1.bmp", "2.bmp", "3.bmp"))
    assert compare([before.listing], source_of(tmp_path / "b")).changed == 0
    older = restore(before.listing.drop_columns(["version"]))
    assert compare([older.listing], source_of(tmp_path / "a")).changed == 0


@pytest.mark.parametrize(
    ("uri", "advice"),
    [
        ("hf://datasets/org/name/data", "hf download --repo-type dataset org/name --local-dir name"),
        ("https://huggingface.co/datasets/org/name", "hf download --repo-type dataset org/name --local-dir name"),
        ("https://example.org/photos.tar", "download it first"),
        ("gs://bucket/photos", "copy it to a local folder or to S3"),
    ],
)
def test_what_is_elsewhere_is_refused_with_what_to_do(uri, advice):
    assert advice in explain_uri(uri)
    with pytest.raises(UserError, match="only local paths and s3:// can be used") as why:
        source_of(uri)
    assert advice in str(why.value)


def test_ids_of_data_sets_of_the_hub_are_recognised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("imagenet-1k", "org/name"):
        with pytest.raises(UserError, match=f"hf download --repo-type dataset {name}"):
            source_of(name)
    with pytest.raises(UserError, match="does not exist$"):
        source_of("photos/train.parquet")
    with pytest.raises(UserError, match="a path of Windows"):
        source_of(r"C:\photos")


def test_counts_of_what_is_left_out():
    left_out = LeftOut()
    for number in range(100):
        left_out.leave("with another suffix", f"photo.jpg.{number}")
    left_out.leave("hidden", b"a/.b")
    assert left_out.total == 101
    assert sum(left_out.to_json()["with another suffix"].values()) == 100
    assert len(left_out.counts["with another suffix"]) < 50  # suffixes can have no end
    assert LeftOut.from_json(left_out.to_json()) == left_out
    assert str(LeftOut()) == "nothing"
    assert str(left_out).endswith("1 hidden (no suffix)")
    assert [suffix_of(name) for name in ("a/b.JPG", b"a.b/c", ".hidden", "x.")] == [".jpg", *["no suffix"] * 3]
