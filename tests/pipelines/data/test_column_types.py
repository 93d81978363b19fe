"""Column values and their types: what is carried is what was stored, whoever wrote it; what can't be is refused or
named."""

import ast
import base64
import datetime
import io
import json
import os
import re
import tarfile
from decimal import Decimal

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from skimage import data as photos

from litevae import cache
from litevae.errors import UserError
from pipelines.data import parquet, tar_index, webdataset
from pipelines.data.column_types import NoCommonType, NotCarried, column_of, fit, kind_of, widest
from pipelines.data.config import Source as SourceConfig
from pipelines.data.growth import with_types
from pipelines.data.open_source import open_source, restore
from pipelines.data.text_fields import read_field
from pipelines.encoding import inspect, verify
from pipelines.encoding.config import Inspect
from pipelines.encoding.encode import encode_dataset, print_summary
from tests.encoding import config, save_model
from tests.in_process import in_process


def jpeg(n=0):
    buffer = io.BytesIO()
    Image.fromarray(photos.coffee()[40 * n : 40 * n + 48, :60]).save(buffer, "JPEG")
    return buffer.getvalue()


def source_of(uri, **options):
    return open_source(SourceConfig(uri=str(uri), **options))


def values_of(source, column):
    """What a column holds, and of what is lost, why."""
    items = [source.read(unit) for unit in range(source.units)]
    assert all(item.columns[column] is None for item in items if column in item.lost)
    return [item.lost.get(column, item.columns[column]) for item in items]


def same(found, expected):
    """Equal, in type too; NaN equals itself."""
    return [(type(value), str(value)) for value in found] == [(type(value), str(value)) for value in expected]


# --- types and values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([pa.int8(), pa.int32()], pa.int32()),
        ([pa.uint8(), pa.uint16()], pa.uint16()),
        ([pa.uint8(), pa.int8()], pa.int16()),
        ([pa.uint32(), pa.int8()], pa.int64()),
        ([pa.uint64(), pa.int8()], None),
        ([pa.float32(), pa.float64()], pa.float64()),
        ([pa.float16(), pa.int8()], pa.float16()),
        ([pa.float16(), pa.int16()], pa.float32()),
        ([pa.float32(), pa.int32()], pa.float64()),
        ([pa.float64(), pa.int64()], None),
        ([pa.float32(), pa.uint64()], None),
        ([pa.decimal128(5, 2), pa.decimal128(6, 4)], pa.decimal128(7, 4)),
        ([pa.decimal128(5, 2), pa.int64()], pa.decimal128(21, 2)),
        ([pa.decimal128(38, 0), pa.decimal128(38, 20)], pa.decimal256(58, 20)),
        ([pa.decimal256(76, 0), pa.decimal128(5, 2)], None),
        ([pa.decimal128(5, 2), pa.float64()], None),
        ([pa.string(), pa.large_string(), pa.string_view()], pa.string()),
        ([pa.dictionary(pa.uint32(), pa.large_string()), pa.string()], pa.string()),
        ([pa.binary(), pa.large_binary(), pa.binary_view()], pa.binary()),
        ([pa.binary(3), pa.binary(4)], pa.binary()),
        ([pa.binary(3)], pa.binary(3)),
        ([pa.string(), pa.binary()], None),
        ([pa.string(), pa.int64()], None),
        ([pa.bool_(), pa.int8()], None),
        ([pa.null(), pa.int8()], pa.int8()),
        ([pa.null()], pa.string()),
        ([pa.timestamp("ms"), pa.timestamp("us")], pa.timestamp("us")),
        ([pa.timestamp("ms", "UTC"), pa.timestamp("us")], None),
        ([pa.duration("s"), pa.duration("ns")], pa.duration("ns")),
        ([pa.time32("ms"), pa.time64("us")], pa.time64("us")),
        ([pa.date32(), pa.date64()], pa.date32()),
        ([pa.date32(), pa.timestamp("ms")], None),
        ([pa.json_(pa.large_string())], pa.string()),
        ([pa.uuid()], pa.binary(16)),
    ],
)
def test_the_widest_type_of_columns(kinds, expected):
    assert widest(kinds) == expected
    assert widest(kinds[::-1]) == expected


@pytest.mark.parametrize(
    ("value", "kind", "held"),
    [
        (5, pa.float64(), True),
        (5.0, pa.int64(), True),
        (5.5, pa.int64(), False),
        (float("nan"), pa.float64(), True),
        (float("nan"), pa.int64(), False),
        (2**53 + 1, pa.float64(), False),
        (2**63, pa.int64(), False),
        (300, pa.int8(), False),
        (0.1, pa.float32(), False),
        (1e300, pa.float32(), False),
        (True, pa.int64(), False),
        (True, pa.float64(), False),
        (1, pa.bool_(), False),
        (1.0, pa.bool_(), False),
        ("5", pa.int64(), False),
        (5, pa.string(), False),
        (b"abc", pa.string(), False),
        ("abc", pa.binary(), False),
        ("\ud83d", pa.string(), False),
        (Decimal("1.5"), pa.decimal128(5, 2), True),
        (Decimal("1.255"), pa.decimal128(5, 2), False),
        (datetime.datetime(2020, 1, 1, 5), pa.date32(), False),
        (datetime.date(2020, 1, 1), pa.timestamp("us"), False),
        (5, pa.timestamp("us"), False),
        (datetime.datetime(3000, 1, 1), pa.timestamp("ns"), False),
        ({"a": 1}, pa.string(), False),
        ([1], pa.int64(), False),
        (None, pa.int64(), True),
    ],
)
def test_a_value_is_held_unchanged_or_not_at_all(value, kind, held):
    found = fit(value, kind)
    assert isinstance(found, NotCarried) != held
    if held:
        assert found == value or (found != found and value != value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([None, 1, 2], pa.int64()),
        ([2**63, 0], pa.uint64()),
        ([1, 2.5], pa.float64()),
        ([float("nan"), 1], pa.float64()),
        ([True, None], pa.bool_()),
        (["2020-01-02", None], pa.string()),
        ([None], pa.string()),
        ([], pa.string()),
        ([1, "2"], ("numbers and text", 1)),
        ([None, True, 1], ("booleans and numbers", 2)),
        (["a", {"b": 1}], ("text and objects", 1)),
        ([None, [1]], ("lists", 1)),
        ([1, 2**64], ("more than 64 bits", 1)),
        ([-1, 2**63], ("more than 64 bits", 1)),
        ([0.5, 2**53 + 1], ("fractions and 9007199254740993", 1)),
        ([0.5, float("inf")], ("infinite or too large", 1)),
        (["a", "\ud83d"], (r"not UTF-8 \(\\ud83d\)", 1)),
        (["a", "caf\udce9"], ("byte 0xe9", 1)),
    ],
)
def test_the_type_of_values_of_json(values, expected):
    if not isinstance(expected, tuple):
        assert kind_of(values) == expected
        assert same(column_of(values).to_pylist(), pa.array(values, expected).to_pylist())
        return
    with pytest.raises(NoCommonType, match=expected[0]) as error:
        column_of(values)
    assert error.value.place == expected[1]


# --- Parquet ----------------------------------------------------------------------------------------------------


def files(folder, columns, name="c", **options):
    """A Parquet file with images for each of the columns."""
    folder.mkdir(exist_ok=True)
    for number, column in enumerate(columns):
        rows = len(column)
        table = pa.table({"image": pa.array([jpeg()] * rows, pa.binary()), name: column})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=2, **options)
    return folder


DAY = datetime.datetime(2020, 1, 1)
BAD_TEXT = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"\xe9a"))
TWO_TO_53 = 2**53


@pytest.mark.parametrize(
    ("columns", "kind", "values"),
    [
        ([pa.array(["a"]), pa.array(["b"], pa.large_string())], "string", ["a", "b"]),
        ([pa.array(["a"], pa.large_string()), pa.array(["b"], pa.string_view())], "string", ["a", "b"]),
        ([pa.array(["a", None]).dictionary_encode(), pa.array(["b"])], "string", ["a", None, "b"]),
        ([pa.array(["a"]).cast(pa.dictionary(pa.uint32(), pa.large_string()))], "string", ["a"]),
        ([pa.array(["a"], pa.string_view())], "string", ["a"]),
        ([pa.array([b"a"], pa.binary_view()), pa.array([b"b"], pa.large_binary())], "binary", [b"a", b"b"]),
        ([pa.nulls(2), pa.array(["b"]), pa.nulls(0)], "string", [None, None, "b"]),
        ([pa.nulls(0, pa.bool_()), pa.array([3, None])], "int64", [3, None]),
        ([pa.nulls(1), pa.nulls(1)], "string", [None, None]),
        ([pa.array([1]), pa.array([3.0, None]), pa.array([5], pa.int32())], "int64", [1, 3, None, 5]),
        ([pa.array([1, 2, TWO_TO_53]), pa.array([0.5])], "double", [1.0, 2.0, float(TWO_TO_53), 0.5]),
        ([pa.array([2.0]), pa.array([TWO_TO_53 + 1])], "int64", [2, TWO_TO_53 + 1]),
        ([pa.array([1, 2]), pa.array([-3], pa.int8()), pa.array([4], pa.uint64())], "int64", [1, 2, -3, 4]),
        ([pa.array([2**64 - 1], pa.uint64()), pa.array([1])], "uint64", [2**64 - 1, 1]),
        ([pa.array([1], pa.int32()), pa.array([1.5], pa.float32())], "double", [1.0, 1.5]),
        ([pa.array([1.5], pa.float32()), pa.array([0.1])], "double", [1.5, 0.1]),
        ([pa.array([1]).dictionary_encode(), pa.array([300], pa.int16())], "int64", [1, 300]),
        ([pa.array([Decimal("1.25")]), pa.array([7], pa.int32())], "decimal128(12, 2)",
         [Decimal("1.25"), Decimal("7.00")]),
        ([pa.array([DAY], pa.timestamp("ms")), pa.array([DAY], pa.timestamp("us"))], "timestamp[us]", [DAY, DAY]),
        ([pa.array(['{"a": 1}'], pa.json_(pa.string()))], "string", ['{"a": 1}']),
        ([pa.array([bytes(range(16))], pa.uuid())], "fixed_size_binary[16]", [bytes(range(16))]),
        ([pa.array([bytes(range(16)), None], pa.uuid())], "fixed_size_binary[16]", [bytes(range(16)), None]),
        ([BAD_TEXT], "string", ["not UTF-8 (byte 0xe9 at 0)", "a"]),
        ([pa.array([5, 2000], pa.time64("ns"))], "time64[ns]", ["finer", datetime.time(0, 0, 0, 2)]),
        ([pa.array([datetime.datetime(3000, 1, 1)], pa.timestamp("ms")), pa.array([DAY], pa.timestamp("ns"))],
         "timestamp[ns]", ["3000-01-01 00:00:00' is no timestamp[ns]", pandas.Timestamp(DAY)]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("statistics", [True, False])
def test_columns_of_parquet_are_carried_unchanged(tmp_path, columns, kind, values, statistics):
    source = source_of(files(tmp_path / "data", columns, write_statistics=statistics), columns=["c"])
    assert str(source.schema.field("c").type) == kind
    found = values_of(source, "c")
    lost = [unit for unit in range(source.units) if source.read(unit).lost]
    for unit in lost:
        assert values[unit] in found[unit]
    kept = [unit for unit in range(source.units) if unit not in lost]
    assert same([found[unit] for unit in kept], [values[unit] for unit in kept])
    stored = pa.Table.from_pylist([source.read(unit).columns for unit in range(source.units)], schema=source.schema)
    file = io.BytesIO()
    pq.write_table(stored, file)
    assert pq.read_table(file).equals(stored)  # also its type


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([pa.array(["a"]), pa.array([1])], r"1.parquet: column 'c': int64; .*0.parquet has string, and no type"),
        ([pa.array([True]), pa.array([1])], r"1.parquet: column 'c': int64; .*0.parquet has bool"),
        ([pa.array([TWO_TO_53 + 1]), pa.array([0.5])], r"1.parquet: column 'c': double; .*0.parquet has int64"),
        ([pa.array([TWO_TO_53 + 1]), pa.array([float("nan")])], r"'c': double; .*0.parquet has int64"),
        ([pa.array([2**63], pa.uint64()), pa.array([1.0])], r"1.parquet: column 'c': double; .*0.parquet has uint64"),
        ([pa.array([2**63], pa.uint64()), pa.array([-1])], r"1.parquet: column 'c': int64; .*0.parquet has uint64"),
        ([pa.array([b"a"]), pa.nulls(1), pa.array(["a"])], r"2.parquet: column 'c': string; .*0.parquet has binary"),
        ([pa.array([[1]])], r"'c' is list.*; only plain values"),
        ([pa.array([1]), pa.array([{"a": 1}])], r"'c' is struct.*; only plain values"),
    ],
)  # fmt: skip
def test_columns_that_no_type_holds_are_refused(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        source_of(files(tmp_path / "data", columns), columns=["c"])
    assert source_of(tmp_path / "data").units == sum(map(len, columns))  # if nobody asks for it, it does not matter


@pytest.mark.parametrize("columns", [[pa.array([1, 2])], [pa.array([1, 2]), pa.array([2.5])]])
def test_names_of_columns_may_hold_dots(tmp_path, columns):
    source = source_of(files(tmp_path / "data", columns, name="a.b"), columns=["a.b"])
    assert values_of(source, "a.b") == [value for column in columns for value in column.to_pylist()]


def test_columns_of_one_name_are_refused_if_asked_for(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([pa.array([jpeg()]), pa.array(["a"]), pa.array(["b"])], ["image", "c", "c"]), path)
    with pytest.raises(UserError, match=r"a.parquet has 2 columns 'c'; give each a name"):
        source_of(path, columns=["c"])
    assert source_of(path).data(0) == jpeg()


BYTES, PATH = ("bytes", pa.binary()), ("path", pa.string())


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.binary_view(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.binary()),
        pa.struct([BYTES, PATH]),
        pa.struct([PATH, BYTES]),
        pa.struct([BYTES]),
        pa.struct([("more", pa.int8()), ("path", pa.large_string()), ("bytes", pa.large_binary())]),
        pa.struct([("path", pa.string_view()), ("bytes", pa.binary_view())]),
    ],
)
def test_images_are_read_whoever_wrote_them(tmp_path, kind):
    """Beside files of the usual kind, and without rows."""
    given = [{"bytes": jpeg(1)}, None] if pa.types.is_struct(kind) else [jpeg(1), None]
    column = pa.array([jpeg(1), None]).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(given, kind)
    for name, images in (("0", pa.nulls(0)), ("1", column), ("2", pa.nulls(1)), ("3", pa.array([jpeg(2)]))):
        pq.write_table(pa.table({"image": images}), tmp_path / f"{name}.parquet")
    source = source_of(tmp_path)
    assert (source.units, source.data(0), source.data(3)) == (4, jpeg(1), jpeg(2))
    for unit in (1, 2):
        with pytest.raises(Exception, match="column 'image' is null"):
            source.data(unit)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.string_view(), pa.large_string(), pa.struct([PATH, ("bytes", pa.null())])]
)
def test_paths_are_read_whoever_wrote_them(tmp_path, kind):
    (tmp_path / "0.jpg").write_bytes(jpeg())
    values = pa.array([{"path": "0.jpg"}] if pa.types.is_struct(kind) else ["0.jpg"], kind)
    pq.write_table(pa.table({"image": values}), tmp_path / "a.parquet")
    assert source_of(tmp_path / "a.parquet").data(0) == jpeg()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([pa.array([[jpeg()]])], "is list.*not image bytes or paths: it is a list of them"),
        ([pa.array([1])], "is int64, not image bytes or paths"),
        ([pa.nulls(1)], "is null in every file"),
        ([pa.array([{"bytes": "YWJj"}])], "its bytes are text; if that is base64"),
        ([pa.array([jpeg()]), pa.array(["0.jpg"])], r"1.parquet: column 'c': string; .*0.parquet has binary"),
    ],
)
def test_what_is_no_image_column_is_refused(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        source_of(files(tmp_path / "data", columns), image_column="c")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ([pa.array([b"\x01\xff"]), pa.array([b"abc"], pa.binary_view())], ["01ff", "616263"]),
        ([pa.array([b"ab"], pa.binary(2))], ["6162"]),
        ([pa.array([1], pa.int8()), pa.array([300])], ["1", "300"]),
        ([pa.array(["a"], pa.string_view()), pa.array(["b"]).dictionary_encode()], ["a", "b"]),
        ([pa.array(["2020-01-02"]), pa.nulls(0)], ["2020-01-02"]),
        ([pa.array([[1]])], "column 'c' of .*0.parquet is list.*; only plain values are ids"),
        ([pa.array([1]), pa.array([2.0])], r"1.parquet: column 'c': double; .*0.parquet has int64"),
        ([pa.array(["a"]), pa.nulls(1)], "column 'c' of .*1.parquet is null"),
    ],
)
def test_ids_of_parquet(tmp_path, columns, expected):
    folder = files(tmp_path / "data", columns)
    if isinstance(expected, list):
        source = source_of(folder, id_column="c")
        assert source.ids(0, source.units) == [source.id(unit) for unit in range(source.units)] == expected
        return
    with pytest.raises(UserError, match=expected):
        source_of(folder, id_column="c")


def test_an_id_that_is_no_text_is_named(tmp_path):
    source = source_of(files(tmp_path / "data", [BAD_TEXT]), id_column="c")
    assert source.id(1) == "a"
    with pytest.raises(UserError, match=r"0.parquet: row 0 has bad text in 'c'"):
        source.id(0)


def test_class_names_that_differ_between_files_are_refused(tmp_path):
    def write(name, *names):
        about = {"info": {"features": {"label": {"names": [*names], "_type": "ClassLabel"}}}}
        table = pa.table({"image": [jpeg()], "label": [0]}).replace_schema_metadata({"huggingface": json.dumps(about)})
        pq.write_table(table, tmp_path / name)

    write("a.parquet", "cat", "dog")
    write("b.parquet", "cat", "dog")
    assert values_of(source_of(tmp_path, columns=["label_name"]), "label_name") == ["cat", "cat"]
    write("b.parquet", "dog", "cat")
    with pytest.raises(UserError, match=r"b.parquet: the class names of 'label' are not those of .*a.parquet"):
        source_of(tmp_path, columns=["label_name"])


# --- WebDataset -------------------------------------------------------------------------------------------------


def tar_of(path, samples):
    """samples: {extension: bytes, or None for a link} each"""
    with tarfile.open(path, "w") as tar:
        for number, files in enumerate(samples):
            for extension, data in ({"jpg": jpeg()} | files).items():
                member = tarfile.TarInfo(f"{number:04d}.{extension}")
                member.type, member.linkname = (tarfile.REGTYPE, "") if data is not None else (tarfile.LNKTYPE, "0.txt")
                member.size = len(data or b"")
                tar.addfile(member, io.BytesIO(data or b""))
    return path


def of_json(*values):
    return [{"json": json.dumps({"x": value}).encode()} for value in values]


@pytest.mark.parametrize(
    ("samples", "column", "kind", "values"),
    [
        (of_json(5, 5, 5, 5.5), "json.x", "double", [5.0, 5.0, 5.0, 5.5]),
        (of_json(5, None, 2**40), "json.x", "int64", [5, None, 2**40]),
        (of_json(None, None, None, "x"), "json.x", "string", [None, None, None, "x"]),
        (of_json(True, None), "json.x", "bool", [True, None]),
        ([*of_json(1), {"json": b"{"}, {}], "json.x", "int64", [1, "the JSON can't be read", None]),
        ([*of_json(1), {"json": b"[1]"}], "json.x", "int64", [1, "no JSON object"]),
        ([*of_json(1), {"json": b'{"x": 1, "x": 2}'}], "json.x", "int64", [1, "there twice"]),
        ([*of_json(1), {"json": "\ufeff{\"x\": 2}".encode("utf-16-le")}], "json.x", "int64", [1, 2]),
        ([{"cls": b"1\n"}, {"cls": b"007"}], "cls", "int64", [1, 7]),
        ([{"cls": b"n01440764\n"}, {"cls": b"12"}], "cls", "string", ["n01440764", "12"]),
        ([{"cls": b"1"}, {"cls": b""}], "cls", "int64", [1, "'' is no int64"]),
        ([{"txt": "ü".encode()}, {"txt": b"caf\xe9"}], "txt", "string", ["ü", "not UTF-8 (byte 0xe9 at 3)"]),
        ([{"txt": b"\xef\xbb\xbfa"}, {"txt": "ü".encode("utf-16")}], "txt", "string", ["a", "ü"]),
        ([{"txt": b"2020-01-02"}, {"txt": None}, {}], "txt", "string", ["2020-01-02", "a link", None]),
    ],
)  # fmt: skip
def test_columns_of_samples_are_carried_unchanged(tmp_path, monkeypatch, samples, column, kind, values):
    monkeypatch.setattr(tar_index, "RANGE_SAMPLES", 2)
    source = source_of(tar_of(tmp_path / "0.tar", samples), columns=[column])
    assert str(source.schema.field(column).type) == kind
    for unit, expected in enumerate(values):
        item = source.read(unit)
        assert item.data == jpeg()
        if item.lost:
            assert expected in item.lost[column]
        else:
            assert same([item.columns[column]], [expected])


@pytest.mark.parametrize(
    ("seen", "later", "column", "reason"),
    [
        (of_json(5), of_json(5.5), "json.x", "5.5 is no int64"),
        (of_json(5), of_json(5.0), "json.x", ""),
        (of_json(0.5), of_json(2**53 + 1), "json.x", "9007199254740993 is no double"),
        (of_json(0.5), of_json(float("inf")), "json.x", "infinite"),
        (of_json(5), of_json(True), "json.x", "True is no int64"),
        (of_json("a"), of_json(5), "json.x", "5 is no string"),
        (of_json("a"), of_json(["b"]), "json.x", r"\['b'\].* is no string"),
        ([{"cls": b"5"}], [{"cls": b"cat"}], "cls", "'cat' is no int64"),
        ([{"cls": b"5"}], [{"cls": b"1_0"}], "cls", "'1_0' is no int64"),
    ],
)
def test_a_value_of_another_type_than_those_that_were_seen(tmp_path, monkeypatch, seen, later, column, reason):
    monkeypatch.setattr(tar_index, "RANGE_SAMPLES", 1)
    monkeypatch.setattr(webdataset, "TYPED_RANGES", 1)
    source = source_of(tar_of(tmp_path / "0.tar", seen + later), columns=[column])
    item = source.read(1)
    if not reason:
        assert item.columns[column] == 5
        return
    assert re.search(reason, item.lost[column])
    assert item.columns[column] is None


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b'{"x": 1}', 1),
        (b' {"x": 1}\n', 1),
        (b'{"x": 1} {"x": 2}', "the JSON goes on after its end, at 8"),
        (b'{"x": 1}]', "the JSON goes on after its end"),
        (b'{"x": 1, "x": 2}', "there twice"),
        (b"[1]", "can't be read: it is no JSON object"),
    ],
)
def test_a_file_of_json_holds_one_object_and_no_more(content, value):
    found = read_field(content, "json.x")
    assert value in found.reason if isinstance(value, str) else found == value


def test_values_of_several_types_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"'json.x' holds numbers and text: 0.tar/0001; only plain values"):
        source_of(tar_of(tmp_path / "0.tar", of_json(1, "a")), columns=["json.x"])


# --- lists ------------------------------------------------------------------------------------------------------


@pytest.fixture
def listed(tmp_path):
    """Writes a list beside three images, and returns its path."""
    for n in range(3):
        (tmp_path / f"{n}.jpg").write_bytes(jpeg(n))

    def write(name, text):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / name

    return write


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\n\r\n"])
def test_encodings_and_ends_of_lines(listed, encoding, end):
    rows = [("0.jpg", "ü, \U0001f431"), ("1.jpg", 'sagt "er"')]
    texts = {
        "a.txt": [path for path, _ in rows],
        "a.csv": ["path,c", *('{},"{}"'.format(path, text.replace('"', '""')) for path, text in rows)],
        "a.jsonl": [json.dumps({"path": path, "c": text}, ensure_ascii=False) for path, text in rows],
    }
    for name, lines in texts.items():
        path = listed(name, "".join(line + end for line in lines).encode(encoding))
        source = source_of(path, columns=[] if name == "a.txt" else ["c"])
        assert source.ids(0, source.units) == [path for path, _ in rows]
        assert [source.data(unit) for unit in range(2)] == [jpeg(0), jpeg(1)]
        if name != "a.txt":
            assert values_of(source, "c") == [text for _, text in rows]


@pytest.mark.parametrize(
    ("texts", "kind", "values"),
    [
        (["3", "", "5"], "int64", [3, None, 5]),
        (["-1", "0", "9223372036854775807"], "int64", [-1, 0, 2**63 - 1]),
        (["18446744073709551615"], "uint64", [2**64 - 1]),
        (["0.5", "2", "1e-05"], "double", [0.5, 2.0, 1e-05]),
        (["007", "8"], "string", ["007", "8"]),
        (["8", "007"], "string", ["8", "007"]),
        (["-0", "1"], "string", ["-0", "1"]),
        (["+1", "1"], "string", ["+1", "1"]),
        (["5.50", "0.5"], "string", ["5.50", "0.5"]),
        (["1e5"], "string", ["1e5"]),
        (["0.5", "9007199254740993"], "string", ["0.5", "9007199254740993"]),
        (["18446744073709551616"], "string", ["18446744073709551616"]),
        (["1_000", "12:30"], "string", ["1_000", "12:30"]),
        (["NaN", "1.5"], "string", ["NaN", "1.5"]),
        (["1", "NA"], "string", ["1", "NA"]),
        (["inf"], "string", ["inf"]),
        (["null", "None", ""], "string", ["null", "None", None]),
        (['""', "", "a"], "string", ["", None, "a"]),
        (["true", "False"], "string", ["true", "False"]),
        (["2020-01-02", "2020-01-02 03:04:05"], "string", ["2020-01-02", "2020-01-02 03:04:05"]),
        (["", ""], "string", [None, None]),
    ],
)  # fmt: skip
def test_values_of_csv(listed, capsys, texts, kind, values):
    path = listed("a.csv", "path,c\n" + "".join(f"{n}.jpg,{text}\n" for n, text in enumerate(texts)))
    source = source_of(path, columns=["c"])
    assert str(source.schema.field("c").type) == kind
    assert same(values_of(source, "c"), values)
    assert f"a.csv: read as {'text' if kind == 'string' else 'numbers'}: c" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["007", "true", "2020-01-02"], "string"),
        (["1e5", "NA", ""], "string"),
        (["null", None, "2020-01-02T03:04:05Z"], "string"),
        ([1, 2, 3], "int64"),
        ([1, 2.5, None], "double"),
        ([2**63, 1, 2], "uint64"),
        ([True, False, None], "bool"),
        ([None, None, None], "string"),
    ],
)
def test_values_of_json(listed, values, kind):
    rows = ({"path": f"{n}.jpg", "c": value, "odd": [1, "a", {"b": 2}][n]} for n, value in enumerate(values))
    source = source_of(listed("a.jsonl", "\n\n".join(map(json.dumps, rows))), columns=["c"])
    assert str(source.schema.field("c").type) == kind
    expected = [float(value) if kind == "double" and value is not None else value for value in values]
    assert same(values_of(source, "c"), expected)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_ids_of_lists_are_text_as_it_stands(listed, name):
    ids = ["2020-01-02", "007", "true"]
    rows = [{"path": f"{n}.jpg", "id": each} for n, each in enumerate(ids)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if name == "a.csv":
        text = "path,id\n" + "".join(f"{row['path']},{row['id']}\n" for row in rows)
    assert source_of(listed(name, text)).ids(0, 3) == ids


def test_objects_need_no_lines_of_their_own(listed):
    source = source_of(listed("a.jsonl", '{"path": "0.jpg"\n}\n\n{"path": "1.jpg"} {"path": "2.jpg"}'))
    assert [source.data(unit) for unit in range(source.units)] == [jpeg(0), jpeg(1), jpeg(2)]


def test_a_column_that_some_rows_lack(listed):
    source = source_of(
        listed("a.jsonl", '{"path": "0.jpg"}\n{"c": 7, "path": "1.jpg"}\n{"path": "2.jpg"}'), columns=["c"]
    )
    assert values_of(source, "c") == [None, 7, None]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", b"path,c\n0.jpg,a\n1.jpg,caf\xe9\n", r"column 'c' is not UTF-8: row 2, byte 0xe9 after 'caf'"),
        ("a.jsonl", b'{"path": "0.jpg", "c": "caf\xe9"}', r"column 'c' holds text that is not UTF-8 \(byte 0xe9"),
        ("a.csv", b"path,\xe9\n0.jpg,\n", r"no column 'c' in .*has path, \\xe9 \(not UTF-8: byte 0xe9 .*; save"),
        ("a.txt", b"0.jpg\ncaf\xe9.jpg\n", r"caf\\xe9.jpg in row 2 is not UTF-8 \(byte 0xe9 after 'caf'\)"),
        ("a.csv", b"path,c\ncaf\xe9.jpg,\n", r"caf\\xe9.jpg in row 1 is not UTF-8"),
        ("a.jsonl", b'{"path": "caf\xe9.jpg", "c": 1}', r"caf\\xe9.jpg in row 1 is not UTF-8"),
        ("a.csv", "path,c\n0.jpg,ü".encode("utf-16")[:-1], r"begins as UTF-16-LE, and byte \d+ is none; save it"),
        ("a.csv", "path\tc\n0.jpg\tx, y\n", "a.csv has tabs between its columns; write it with commas: path,c"),
        ("a.csv", '"path";"c"\n0.jpg;x, y\n', "a.csv has ';' between its columns; write it with commas: path,c"),
        ("a.csv", "path,c,c\n0.jpg,1,2\n", "several columns have one name: c"),
        ("a.jsonl", '{"path": "0.jpg", "c": 1, "c": 2}', "column 'c' is there twice in row 1"),
        ("a.jsonl", '[{"path": "0.jpg"}]', "line 1: it is no JSON object; it has to hold one JSON object a line"),
        ("a.jsonl", '{"path": "0.jpg"}\n\n{"path":', "line 3: Expecting value"),
        ("a.jsonl", '{"path": "0.jpg", "c": ' + "[" * 10**5, "line 1: maximum recursion depth"),
        ("a.jsonl", '{"path": "0.jpg", "c": 1}\n{"path": "1.jpg", "c": "2"}', "'c' holds numbers and text: row 2;"),
        ("a.jsonl", '{"path": "0.jpg", "c": 1e400}', "column 'c' holds a number that is infinite or too large"),
        ("a.jsonl", '{"path": 5, "c": 1}', "column 'path' of .*a.jsonl holds int64, not paths"),
        ("a.jsonl", '{"path": "\\ud83d.jpg", "c": 1}', r"holds '\\ud83d.jpg', which is no path"),
    ],
)  # fmt: skip
def test_refused_text(listed, name, text, message):
    path = listed(name, text)
    with pytest.raises(UserError, match=message):
        source_of(path, columns=[] if name == "a.txt" else ["c"])


def test_paths_of_any_bytes_that_exist_are_taken_as_they_are(listed, tmp_path):
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg"), "wb") as file:
        file.write(jpeg(1))
    for name, text in (
        ("a.txt", b"0.jpg\ncaf\xe9.jpg"),
        ("a.csv", b"path,other\n0.jpg,caf\xe9\ncaf\xe9.jpg,\n"),
        ("a.jsonl", b'{"path": "0.jpg", "other": "caf\xe9"}\n{"path": "caf\xe9.jpg"}'),
    ):
        source = source_of(listed(name, text))
        assert source.data(1) == jpeg(1)
        assert source.id(1) == "caf\\xe9.jpg"


ENCODED = base64.b64encode(jpeg()).decode()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("cats\\0.jpg", r"paths of Windows, and none of the first ones exists here: cats\\0.jpg; .* e.g. cats/0.jpg"),
        ("C:\\data\\0.jpg", "paths of Windows, .*e.g. data/0.jpg"),
        ("D:/data/0.jpg", "paths of Windows, .*e.g. data/0.jpg"),
        ("\\\\server\\share\\0.jpg", "paths of Windows, .*e.g. share/0.jpg"),
        ("file:///C:/data/0.jpg", "paths of Windows, .*e.g. data/0.jpg"),
        ("'0.jpg'", "paths in quotes, .*'0.jpg'; write them without"),
        (ENCODED, r"images as base64 text, not paths: /9j/\S*\.\.\.; .*frame\['image'\].map\(base64.b64decode\)"),
        (base64.urlsafe_b64encode(jpeg()).decode(), "images as base64 text, .*base64.urlsafe_b64decode"),
        (base64.encodebytes(jpeg()).decode(), "images as base64 text"),
        ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII=", "base64 text"),
        (jpeg().hex(), r"images as hexadecimal text, not paths: ffd8\S*\.\.\.; .*map\(bytes.fromhex\)"),
        (f"\\x{jpeg().hex().upper()}", r"images as hexadecimal text, .*str\[2:\]"),
        (str(jpeg()), r"bytes as Python prints them, not paths: b.\\xff\\xd8.*map\(ast.literal_eval\)"),
        ("a photo of a cat, " * 300, "text that is too long for a path: a photo"),
        (" 0.jpg ", "paths with spaces around them, .*' 0.jpg '; write them without"),
        (f"data:image/jpeg;base64,{ENCODED}", r"base64 text \(data: URIs\), .*str.partition\(','\)\[2\]"),
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_what_stands_where_paths_should(listed, tmp_path, path, message):
    pq.write_table(pa.table({"image": [path, None], "id": ["a", "b"]}), tmp_path / "a.parquet")
    made = [listed("a.jsonl", json.dumps({"image": path})), tmp_path / "a.parquet"]
    if "\n" not in path:
        quoted = path.replace('"', '""')
        made.append(listed("a.csv", f'image\n"{quoted}"\n'))
    for each in made:
        with pytest.raises(UserError, match=message):
            source_of(each)
    (tmp_path / "a").mkdir()
    pq.write_table(pa.table({"image": [path, *("0.jpg", "1.jpg")]}), tmp_path / "a/b.parquet")
    assert source_of(tmp_path / "a/b.parquet").units == 3  # one path of three costs itself only


@pytest.mark.parametrize("path", ["a\\b.jpg", "C:/0.jpg", "'0.jpg'", " 0.jpg", "b'0'", "/9j/4AAQSkZJRgABAQAAAQABAAD/x"])
def test_odd_names_that_exist_are_paths(listed, tmp_path, path):
    file = tmp_path / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(jpeg(1))
    name = str(file) if path[0] == "/" else path
    assert source_of(listed("a.csv", f"path\n{name}\n")).data(0) == jpeg(1)


@pytest.mark.parametrize(
    "written",
    [
        lambda data: base64.b64encode(data).decode(),
        lambda data: "data:image/jpeg;base64," + base64.b64encode(data).decode(),
        bytes.hex,
        lambda data: "0x" + data.hex(),
        str,
    ],
    ids=["base64", "data URI", "hex", "0x", "repr"],
)
def test_what_the_messages_about_images_as_text_advise(tmp_path, written):
    frame = pandas.DataFrame({"image": [written(jpeg(0)), written(jpeg(1))]})
    frame.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError) as error:
        source_of(tmp_path / "a.parquet")
    code = str(error.value).partition("by pandas: ")[2].replace("...", "path")
    exec(code, {"frame": frame, "base64": base64, "ast": ast, "path": tmp_path / "a.parquet"})
    source = source_of(tmp_path / "a.parquet")
    assert [source.data(0), source.data(1)] == [jpeg(0), jpeg(1)]


# --- through the job --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def encoded(source, model, out, *more):
    with in_process():
        return encode_dataset(config(source, model, out, *more))


def test_lost_values_are_counted_named_and_shown(tmp_path, model, capsys):
    samples = [{"txt": b"a", **of_json(n)[0]} for n in range(10)]
    samples[3]["txt"], samples[9]["txt"], samples[8]["json"] = b"caf\xe9", b"\xff\xff", b"{"
    tar_of(tmp_path / "0.tar", samples)
    out = str(tmp_path / "cache")
    print_summary(encoded(tmp_path / "0.tar", model, out, "source.columns=[txt,json.x]", "rows_per_shard=3"))
    told = "column 'txt': 2 values could not be carried (0.tar/0003: not UTF-8 (byte 0xe9 at 3)) and are null"
    assert told in capsys.readouterr().out
    latents = cache.LatentCache(out)
    assert latents.row(3)["txt"] is None
    assert [latents.row(n)["json.x"] for n in (7, 8, 9)] == [7, None, 9]
    counts = latents.manifest["counts"]
    assert (counts["encoded"], counts["quarantined"]) == (10, 0)
    assert {name: found["count"] for name, found in counts["lost_values"].items()} == {"txt": 2, "json.x": 1}
    assert counts["lost_values"]["txt"]["examples"][1][0] == "0.tar/0009"
    assert not verify.audit(out).general
    inspect.inspect(Inspect(cache=out, shards=0))
    assert told in capsys.readouterr().out
    manifest = json.loads((tmp_path / "cache/manifest.json").read_text())
    manifest["counts"]["lost_values"]["txt"]["count"] = 1
    (tmp_path / "cache/manifest.json").write_text(json.dumps(manifest))
    assert "could not be carried" in verify.audit(out).general[0]


def test_files_of_several_writers_are_one_cache(tmp_path, model):
    columns = [pa.array(["a"], pa.string_view()), pa.array(["b", None]).dictionary_encode(), pa.nulls(1)]
    files(tmp_path / "data", columns)
    out = str(tmp_path / "cache")
    encoded(tmp_path / "data", model, out, "source.columns=[c]")
    latents = cache.LatentCache(out)
    assert [latents.row(n)["c"] for n in range(4)] == ["a", "b", None, None]
    assert verify.audit(out).general == []


def test_what_is_appended_has_the_types_of_the_cache(tmp_path, model, monkeypatch):
    """Also where an earlier version carried another type than would be chosen now."""
    folder = files(tmp_path / "data", [pa.array(["a"], pa.large_string())])
    out = str(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "_one_type", lambda *given: pa.large_string())
        encoded(folder, model, out, "source.columns=[c]")
    assert encoded(folder, model, out, "source.columns=[c]")["images"] == 1
    files(tmp_path / "more", [pa.array(["b"])])
    os.rename(tmp_path / "more/0.parquet", folder / "1.parquet")
    encoded(folder, model, out, "source.columns=[c]", "append=true")
    latents = cache.LatentCache(out)
    assert [latents.row(n)["c"] for n in range(2)] == ["a", "b"]
    found = verify.audit(out)
    assert (found.problems, found.general) == ({}, [])


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        (["1"], ["1", "2"], "int64"),
        (["0.5"], ["0.5", "2"], "double"),
        (["a"], ["1", "2"], "string"),
        (["1"], ["1", "2.5"], "column 'c' holds double with what is new in .*, and int64 in the cache"),
        (["1"], ["1", "x"], "column 'c' holds string with what is new"),
        (["1"], ["1", "007"], "column 'c' holds string with what is new"),  # 7 would be another text
    ],
)
def test_a_list_that_grows_keeps_its_types(listed, before, after, kind):
    def write(texts):
        return listed("a.csv", "path,c\n" + "".join(f"{n}.jpg,{text}\n" for n, text in enumerate(texts)))

    earlier = source_of(write(before), columns=["c"])
    now = source_of(write(after), columns=["c"])
    if "column" in kind:
        with pytest.raises(UserError, match=kind):
            with_types(now.listing, earlier.schema)
        return
    kept = restore(with_types(now.listing, earlier.schema))
    assert str(kept.schema.field("c").type) == kind == str(earlier.schema.field("c").type)
    assert same(values_of(kept, "c"), [{"int64": int, "double": float, "string": str}[kind](text) for text in after])


def test_dates_that_an_earlier_version_read_as_dates_stay_dates(listed):
    now = source_of(listed("a.csv", "path,c\n0.jpg,2020-01-02\n1.jpg,\n"), columns=["c"])
    kept = restore(with_types(now.listing, pa.schema([("c", pa.date32())])))
    assert values_of(kept, "c") == [datetime.date(2020, 1, 2), None]


def test_a_listing_of_views_that_an_earlier_version_left_is_read(tmp_path):
    source = source_of(files(tmp_path / "data", [pa.array(["a"], pa.string_view())]), columns=["c"])
    old = restore(with_types(source.listing, pa.schema([("c", pa.string_view())])))
    assert old.schema == pa.schema([("c", pa.string())])
