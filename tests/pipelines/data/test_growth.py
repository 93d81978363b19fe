"""A source compared with its earlier listings: what was written again, what came to it, and which units that is."""

import io
import os
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from litevae.errors import UserError
from pipelines.data import tar_index
from pipelines.data.config import Source as SourceConfig
from pipelines.data.growth import compare, update, with_types
from pipelines.data.open_source import open_source, restore

LATER = 2_000_000_000  # nanoseconds


def source_of(uri, **options):
    return open_source(SourceConfig(uri=str(uri), **options))


def tar_of(images):
    """The bytes of a tar with a sample for each of the images, given as (key, bytes)."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as file:
        for key, data in images:
            member = tarfile.TarInfo(f"{key}.jpg")
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return sink.getvalue()


def parquet_of(images, row_group_size=2):
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": images}), sink, row_group_size=row_group_size, compression="none")
    return sink.getvalue()


@pytest.fixture(autouse=True)
def _short_ranges(monkeypatch):
    """Two samples in each range of a tar, as two rows in each row group."""
    monkeypatch.setattr(tar_index, "RANGE_SAMPLES", 2)


def write(path, data, later=0):
    """Write a file whose time is `later` ns after the beginning of time."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    os.utime(path, ns=(later, later))


# Three files of each kind: what one holds, of a letter; the second time its bytes are others, but not their number.
CONTENTS = {
    "folder": (".jpg", lambda letter: letter),
    "webdataset": (".tar", lambda letter: tar_of([(n, letter) for n in range(4)])),
    "parquet": (".parquet", lambda letter: parquet_of([letter] * 4)),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_file_of_other_bytes_but_equal_size_is_seen_where_it_was_listed(kind, tmp_path):
    suffix, content = CONTENTS[kind]
    for name in "abc":
        write(tmp_path / f"here/{name}{suffix}", content(b"x"))
    before = source_of(tmp_path / "here").listing
    shutil.copytree(tmp_path / "here", tmp_path / "copy")
    for name in "abc":
        os.utime(tmp_path / f"copy/{name}{suffix}", ns=(LATER, LATER))
    write(tmp_path / f"here/b{suffix}", content(b"y"), LATER)
    now = source_of(tmp_path / "here")
    growth = compare([before], now)
    assert (growth.units, growth.grown, growth.changed, growth.gone) == (0, 0, 1, 0)
    assert growth.examples == f"b{suffix}"
    growth = compare([before], source_of(tmp_path / "copy"))
    assert (growth.units, growth.changed, growth.gone, growth.examples) == (0, 0, 0, "")
    without = before.drop_columns(["version"])  # as older versions listed
    assert compare([without], now).changed == 0


@pytest.mark.parametrize("kind", CONTENTS)
def test_the_units_of_changed_files_are_counted_over_all_listings(kind, tmp_path):
    """Files a and c were listed first, b and d later; c and d are written again."""
    suffix, content = CONTENTS[kind]
    each = 1 if kind == "folder" else 4  # images in a file
    for name in "ac":
        write(tmp_path / f"here/{name}{suffix}", content(b"x"))
    first = source_of(tmp_path / "here").listing
    for name in "bd":
        write(tmp_path / f"here/{name}{suffix}", content(b"x"))
    second = compare([first], source_of(tmp_path / "here")).new
    for name in "cd":
        write(tmp_path / f"here/{name}{suffix}", content(b"y"), LATER)
    now = source_of(tmp_path / "here")
    assert compare([first, second], now).examples == f"c{suffix}, d{suffix}"
    listings, units = update([first, second], now)
    assert units.tolist() == [*range(each, 2 * each), *range(3 * each, 4 * each)]
    after = [restore(listing) for listing in listings]
    assert [source.ids(0, source.units) for source in after] == [
        [identity for identity in now.ids(0, now.units) if identity[0] in letters] for letters in ("ac", "bd")
    ]
    versions = [listing["version"].to_pylist() for listing in listings]
    groups = len(first) // 2
    assert versions == [[0] * groups + [LATER] * groups] * 2
    assert [source.data(0) for source in after] == [b"x"] * 2
    assert [source.data(source.units - 1) for source in after] == [b"y"] * 2
    assert compare(listings, now).changed == 0
    listings, units = update(listings, now)
    assert (len(units), [len(listing) for listing in listings]) == (0, [2 * groups] * 2)


def test_listings_that_older_versions_made_get_versions_of_what_has_changed(tmp_path):
    for name in "ab":
        write(tmp_path / f"here/{name}.jpg", b"x")
    old = source_of(tmp_path / "here").listing.drop_columns(["version"])
    write(tmp_path / "here/b.jpg", b"longer", LATER)
    (listing,), units = update([old], source_of(tmp_path / "here"))
    assert units.tolist() == [1]
    assert listing["version"].to_pylist() == [None, LATER]
    assert listing["size"].to_pylist() == [1, 6]


@pytest.mark.parametrize(
    ("name", "before", "after", "grown"),
    [
        ("0.parquet", parquet_of([b"x"] * 4), parquet_of([b"x"] * 6), 2),
        ("0.parquet", parquet_of([b"x"] * 4), parquet_of([b"x"] * 4, row_group_size=1), 2),
        ("0.parquet", parquet_of([b"x"] * 4), parquet_of([b"x"] * 3), 0),
        ("0.parquet", parquet_of([b"x"] * 4), parquet_of([b"x"] * 2), 0),
        ("0.parquet", parquet_of([b"x"] * 4), parquet_of([b"x"] * 4, row_group_size=4), 0),
        # the second range begins elsewhere
        ("0.tar", tar_of([(n, b"x") for n in range(4)]), tar_of([(n, b"x" * 600) for n in range(4)]), 2),
        ("0.tar", tar_of([(n, b"x") for n in range(4)]), tar_of([(n, b"x") for n in range(6)]), 2),
    ],
)
def test_other_images_in_a_file_are_neither_new_ones_nor_put_in_their_place(tmp_path, name, before, after, grown):
    """They may be images that were listed: added, they would be in the cache twice."""
    write(tmp_path / f"here/{name}", before)
    old = source_of(tmp_path / "here").listing
    write(tmp_path / f"here/{name}", after, LATER)
    write(tmp_path / f"here/z{name}", before)
    now = source_of(tmp_path / "here")
    growth = compare([old], now)
    assert (growth.units, growth.grown, growth.changed) == (4, grown, 1)
    added = restore(growth.new)
    assert {identity.partition("/")[0] for identity in added.ids(0, added.units)} == {f"z{name}"}
    with pytest.raises(UserError, match=f"{name} and perhaps others hold another number .* Encode into a new folder"):
        update([old], now)


def test_only_what_the_digest_covers_decides_it(tmp_path):
    """Times do not; sizes do."""
    for name in "ab":
        write(tmp_path / f"here/{name}.jpg", b"x")
    before = source_of(tmp_path / "here")
    write(tmp_path / "here/b.jpg", b"y", LATER)
    now = source_of(tmp_path / "here")
    (listing,), _ = update([before.listing], now)
    assert restore(listing).digest == before.digest == now.digest
    write(tmp_path / "here/b.jpg", b"longer", LATER)
    longer = source_of(tmp_path / "here")
    (listing,), _ = update([listing], longer)
    assert restore(listing).digest == longer.digest != before.digest


@pytest.mark.parametrize(
    ("held", "now", "fits"),
    [
        (pa.float64(), pa.int32(), True),
        (pa.int64(), pa.int32(), True),
        (pa.string(), pa.large_string(), True),
        (pa.int32(), pa.int64(), False),
        (pa.string(), pa.int64(), False),
        (pa.int64(), pa.float64(), False),
    ],
)
def test_new_files_take_the_types_of_the_cache_if_their_values_fit(tmp_path, held, now, fits):
    table = pa.table({"image": [b"x"], "c": pa.array([7] if pa.types.is_integer(now) else ["7"]).cast(now)})
    (tmp_path / "here").mkdir()
    pq.write_table(table, tmp_path / "here/0.parquet")
    source = source_of(tmp_path / "here", columns=["c"])
    if not fits:
        with pytest.raises(UserError, match=f"'c' holds {now} with what is new in .*, and {held} in the cache; encode"):
            with_types(source.listing, pa.schema([("c", held)]))
        return
    found = restore(with_types(source.listing, pa.schema([("c", held)])))
    assert found.schema == pa.schema([("c", held)])
    assert found.columns(0) == {"c": "7" if held == pa.string() else 7}
    assert type(found.columns(0)["c"]) is {pa.float64(): float, pa.int64(): int}.get(held, str)
    other = pa.schema([("d", held)])  # another plan, which is refused elsewhere
    assert with_types(source.listing, other) is source.listing
    assert np.array_equal(found.groups, source.groups)


# What belongs to the second of three images, and is not in its file: the uri, the columns, and files before and after.
BELONGINGS = {
    "a text beside it": ("", ["txt"], {"2.txt": "a cat"}, {"2.txt": "a dog"}),
    "a text by its whole name": ("", ["txt"], {"2.jpg.txt": "a cat"}, {"2.jpg.txt": "a dog"}),
    "a number in a JSON beside it": ("", ["json.n"], {"2.json": '{"n": 1}'}, {"2.json": '{"n": 2}'}),
    "a text that came to it": ("", ["txt"], {"1.txt": "a cat"}, {"2.txt": "a dog"}),
    "its row of metadata": (
        "",
        ["text"],
        {"metadata.jsonl": '{"file_name": "2.jpg", "text": "a"}'},
        {"metadata.jsonl": '{"file_name": "2.jpg", "text": "b"}'},
    ),
    "its label of metadata": (
        "",
        ["label"],
        {"metadata.csv": "file_name,label\n1.jpg,4\n2.jpg,5"},
        {"metadata.csv": "file_name,label\n1.jpg,4\n2.jpg,6"},
    ),
    "its file, which a list names": ("list.txt", [], {"list.txt": "1.jpg\n2.jpg\n3.jpg"}, {"2.jpg": "z"}),
    "its caption in a list": (
        "list.csv",
        ["caption"],
        {"list.csv": "path,caption\n1.jpg,a\n2.jpg,\n3.jpg,a"},
        {"list.csv": 'path,caption\n1.jpg,a\n2.jpg,""\n3.jpg,a'},
    ),
    "its id in a list": (
        "list.csv",
        [],
        {"list.csv": "path,id\n1.jpg,a\n2.jpg,b\n3.jpg,c"},
        {"list.csv": "path,id\n1.jpg,a\n2.jpg,d\n3.jpg,c"},
    ),
}


@pytest.mark.parametrize("what", BELONGINGS)
def test_a_change_of_what_belongs_to_an_image_is_seen(tmp_path, what):
    uri, columns, before, after = BELONGINGS[what]
    for name, content in ({"1.jpg": "x", "2.jpg": "x", "3.jpg": "x"} | before).items():
        write(tmp_path / name, content.encode())
    first = source_of(tmp_path / uri, columns=columns)
    again = source_of(tmp_path / uri, columns=columns)
    assert compare([first.listing], again).changed == 0
    for name, content in after.items():
        write(tmp_path / name, content.encode(), LATER)
    now = source_of(tmp_path / uri, columns=columns)
    growth = compare([first.listing], now)
    assert (growth.units, growth.changed, growth.gone, growth.examples) == (0, 1, 0, "2.jpg")
    listings, units = update([first.listing], now)
    assert units.tolist() == [1]
    assert restore(listings[0]).columns(1) == now.columns(1)
    assert compare(listings, now).changed == 0


def test_a_whole_number_is_the_same_in_a_column_of_fractions(tmp_path):
    write(tmp_path / "1.jpg", b"x")
    write(tmp_path / "list.jsonl", b'{"path": "1.jpg", "n": 5}')
    before = source_of(tmp_path / "list.jsonl", columns=["n"]).listing
    write(tmp_path / "list.jsonl", b'{"path": "1.jpg", "n": 5}\n{"path": "2.jpg", "n": 5.5}')
    growth = compare([before], source_of(tmp_path / "list.jsonl", columns=["n"]))
    assert (growth.units, growth.changed) == (1, 0)


def test_a_changed_value_that_no_longer_fits_is_refused(tmp_path):
    write(tmp_path / "1.jpg", b"x")
    write(tmp_path / "list.jsonl", b'{"path": "1.jpg", "n": 5}')
    before = source_of(tmp_path / "list.jsonl", columns=["n"]).listing
    write(tmp_path / "list.jsonl", b'{"path": "1.jpg", "n": 5.5}')
    with pytest.raises(UserError, match="no longer fit the type .*encode into a new folder"):
        update([before], source_of(tmp_path / "list.jsonl", columns=["n"]))
