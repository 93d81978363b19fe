"""Types of carried columns: one plain Arrow type for each column, which holds its values without loss."""

import codecs
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

UNREADABLE = (ValueError, TypeError, OverflowError, RecursionError)  # errors that bad metadata of a sample can cause
DIGITS = {pa.int8(): 3, pa.int16(): 5, pa.int32(): 10, pa.int64(): 19} | {
    pa.uint8(): 3, pa.uint16(): 5, pa.uint32(): 10, pa.uint64(): 20
}  # fmt: skip
_WHOLE = "^(0|-?[1-9][0-9]{0,17})$"  # of which each fits into 64 bits
UNITS = ("s", "ms", "us", "ns")
INFINITE = (float("inf"), float("-inf"))
GROUPS = {bool: "booleans", int: "numbers", float: "numbers", str: "text", list: "lists", dict: "objects"}
BOMS = {  # those of UTF-32 come first, because one of them begins like one of UTF-16
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


@dataclass(frozen=True)
class NotCarried:
    """Stands for a value that its column can't hold unchanged. The cache has null instead.

    Attributes:
        reason: why, e.g. "not UTF-8".
    """

    reason: str


class NoCommonType(ValueError):
    """No type holds all values of a column unchanged.

    Attributes:
        place: index of the first value that doesn't fit.
    """

    def __init__(self, message: str, place: int):
        super().__init__(message)
        self.place = place


# --- types of Arrow -------------------------------------------------------------------------------------------


def plain(kind: pa.DataType) -> pa.DataType:
    """Return a type without what only concerns its storage: views, 64-bit offsets, dictionaries.

    Whoever wrote a file chose these, e.g. polars `string_view` where pyarrow chooses `string`. Parquet stores the same
    bytes in all of them.
    """
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if isinstance(kind, pa.Bool8Type):
        return pa.bool_()
    return plain(kind.storage_type) if isinstance(kind, pa.BaseExtensionType) else kind


def as_listed(schema: pa.Schema) -> pa.Schema:
    """Return the columns of a listing. Views, of which older versions made listings but never a cache, become plain."""
    views = (pa.string_view(), pa.binary_view())
    return pa.schema([each.with_type(plain(each.type)) if each.type in views else each for each in schema])


def widest(kinds: Iterable[pa.DataType]) -> pa.DataType | None:
    """Return the narrowest plain type that holds every value of columns of these types unchanged.

    Columns of type null decide nothing; if there are no others, the type is string.

    Returns:
        The type; None if there is none, or if it depends on the values (whole numbers of 64 bits together with
        fractions or with unsigned ones).
    """
    found = list(dict.fromkeys(kind for kind in map(plain, kinds) if not pa.types.is_null(kind)))
    if len(found) <= 1:
        return found[0] if found else pa.string()
    checks = pa.types
    if all(map(checks.is_integer, found)):
        return _widest_integer(found)
    if all(checks.is_integer(kind) or checks.is_floating(kind) for kind in found):
        return _widest_float(found)
    if all(checks.is_integer(kind) or checks.is_decimal(kind) for kind in found):
        return _widest_decimal(found)
    if all(checks.is_binary(kind) or checks.is_fixed_size_binary(kind) for kind in found):
        return pa.binary()
    if all(map(checks.is_timestamp, found)) and len({kind.tz for kind in found}) == 1:
        return pa.timestamp(_finest(found), found[0].tz)
    if all(map(checks.is_duration, found)):
        return pa.duration(_finest(found))
    if all(map(checks.is_time, found)):
        unit = _finest(found)
        return pa.time32(unit) if unit in ("s", "ms") else pa.time64(unit)
    return pa.date32() if all(map(checks.is_date, found)) else None


def _widest_integer(kinds: Sequence[pa.DataType]) -> pa.DataType | None:
    signed = [kind.bit_width for kind in kinds if pa.types.is_signed_integer(kind)]
    unsigned = [kind.bit_width for kind in kinds if pa.types.is_unsigned_integer(kind)]
    if not signed:
        return next(kind for kind in kinds if kind.bit_width == max(unsigned))
    bits = max([*signed, *(2 * width for width in unsigned)])
    return {8: pa.int8(), 16: pa.int16(), 32: pa.int32(), 64: pa.int64()}.get(bits)


def _widest_float(kinds: Sequence[pa.DataType]) -> pa.DataType | None:
    integers = [kind for kind in kinds if pa.types.is_integer(kind)]
    whole = max((kind.bit_width for kind in integers), default=0)
    width = max(kind.bit_width for kind in kinds if pa.types.is_floating(kind))
    for bits, exact, kind in ((16, 8, pa.float16()), (32, 16, pa.float32()), (64, 32, pa.float64())):
        if width <= bits and whole <= exact:
            return kind
    return None


def _widest_decimal(kinds: Sequence[pa.DataType]) -> pa.DataType | None:
    scale = max(kind.scale for kind in kinds if pa.types.is_decimal(kind))
    before = max(DIGITS[kind] if kind in DIGITS else kind.precision - kind.scale for kind in kinds)
    if before + scale > 76:
        return None
    return pa.decimal128(before + scale, scale) if before + scale <= 38 else pa.decimal256(before + scale, scale)


def _finest(kinds: Iterable[pa.DataType]) -> str:
    return max((kind.unit for kind in kinds), key=UNITS.index)


# --- values -----------------------------------------------------------------------------------------------------


def fit(value: Any, kind: pa.DataType) -> Any:
    """Return a value as a column of this type holds it, or a `NotCarried` if it would not be the same value."""
    if value is None:
        return None
    try:
        held = pa.scalar(value, plain(kind)).as_py()
    except UNREADABLE:
        held = None
    same = held is not None and (held == value or (held != held and value != value))  # NaN is not equal to itself
    if same and isinstance(held, bool) == isinstance(value, bool):
        return held
    shown = value if isinstance(value, bytes | int | float) else str(value)
    return NotCarried(f"{_short(repr(shown))} is no {kind}")


def stored(scalar: pa.Scalar, kind: pa.DataType) -> Any:
    """Return a value of a Parquet column as a column of type `kind` holds it, or a `NotCarried`."""
    try:
        if not scalar.is_valid:
            return None
        if isinstance(scalar, pa.ExtensionScalar):
            scalar = scalar.value
        value = scalar.as_py()
        if pa.types.is_temporal(scalar.type) and pa.scalar(value, scalar.type) != scalar:
            return NotCarried(f"{scalar} is finer than a microsecond")  # Python's times have no nanoseconds
    except UnicodeDecodeError as error:
        return NotCarried(not_utf8(error))
    except (KeyError, *UNREADABLE) as error:  # KeyError: a time zone that this system does not know
        return NotCarried(f"{scalar.type}: {error}")
    return fit(value, kind)


def kind_of(values: Sequence[Any]) -> pa.DataType:
    """Return the type that holds all of these values of JSON unchanged; None stands for no value.

    Raises:
        NoCommonType: there is none; the message says what the values are, e.g. "numbers and text".
    """
    kinds = set(map(type, values)) - {type(None)}
    groups = dict.fromkeys(GROUPS[type(value)] for value in values if value is not None) if len(kinds) > 1 else {}
    if len(groups) > 1:
        first, second = list(groups)[:2]
        place = next(n for n, value in enumerate(values) if value is not None and GROUPS[type(value)] == second)
        raise NoCommonType(f"{first} and {second}", place)
    if kinds & {list, dict}:
        place = next(n for n, value in enumerate(values) if value is not None)
        raise NoCommonType(GROUPS[type(values[place])], place)
    if kinds == {str}:
        return pa.string()
    if kinds == {bool}:
        return pa.bool_()
    return _kind_of_numbers(values, kinds) if kinds else pa.string()


def _kind_of_numbers(values: Sequence[Any], kinds: set[type]) -> pa.DataType:
    there = [value for value in values if value is not None]
    if kinds == {int}:
        for kind, least, largest in ((pa.int64(), -(2**63), 2**63 - 1), (pa.uint64(), 0, 2**64 - 1)):
            if least <= min(there) and max(there) <= largest:
                return kind
        place = next(n for n, value in enumerate(values) if value is not None and not -(2**63) <= value < 2**63)
        raise NoCommonType(f"whole numbers of more than 64 bits ({values[place]:.3e}); write them as text", place)
    for place, value in enumerate(values):
        if isinstance(value, int) and isinstance(fit(value, pa.float64()), NotCarried):
            raise NoCommonType(f"fractions and {value}, which no type holds both unchanged; write them as text", place)
        if value in INFINITE:
            raise NoCommonType("a number that is infinite or too large for 64 bits; write it as text", place)
    return pa.float64()


def column_of(values: Sequence[Any]) -> pa.Array | pa.ChunkedArray:
    """Return values of JSON as a column of the type that holds them.

    Raises:
        NoCommonType: there is no such type.
    """
    kind = kind_of(values)
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError as error:
        place = next(n for n, value in enumerate(values) if value is not None and not _is_valid(value))
        code = ord(error.object[error.start])  # a byte that is not UTF-8 was decoded as 0xDC00 more than it is
        shown = f"byte 0x{code - 0xDC00:02x}; save it as UTF-8" if code >= 0xDC80 else f"\\u{code:04x}"
        raise NoCommonType(f"text that is not UTF-8 ({shown})", place) from None


def _is_valid(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def column_of_csv(texts: pa.Array | pa.ChunkedArray) -> tuple[pa.Array | pa.ChunkedArray, str]:
    """Return a column of a CSV file: numbers if each is written exactly as its number is, else the text as it stands.

    So 7, -1, 0.5 and 1e-05 are numbers, while 007, 1e5, 5.50, NaN, true and 2020-01-02 stay text.

    Returns:
        The column; and the value that kept it from being numbers, if it looks like one, else "".
    """
    there = texts.drop_null()
    if not len(there):
        return texts, ""
    if (first := _number(there[0].as_py())) is None:  # as in most columns of text
        return texts, there[0].as_py() if _looks_like_a_number(there[0].as_py()) else ""
    if isinstance(first, int) and pc.all(pc.match_substring_regex(there, _WHOLE)).as_py():
        return texts.cast(pa.int64()), ""
    numbers: list[int | float | None] = []
    for text in texts.to_pylist():
        numbers.append(None if text is None else _number(text))
        if text is not None and numbers[-1] is None:
            return texts, text
    try:
        return column_of(numbers), ""
    except NoCommonType as error:
        return texts, texts[error.place].as_py()


def _number(text: str) -> int | float | None:
    for read, write in ((int, str), (float, repr)):
        try:
            number = read(text)
        except ValueError:
            continue
        if write(number) == text and math.isfinite(number):
            return number
    return None


def _looks_like_a_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# --- text -------------------------------------------------------------------------------------------------------


def to_utf8(data: bytes) -> bytes:
    """Return text as UTF-8 without a byte order mark.

    UTF-16 and UTF-32 are known by their mark, and UTF-16 without one by every other byte being zero. Other bytes are
    returned as they are.

    Raises:
        UnicodeDecodeError: if it is UTF-16 or UTF-32, but damaged.
    """
    for mark, encoding in BOMS.items():
        if data.startswith(mark):
            data = data[len(mark) :]
            return data if encoding == "utf-8" else data.decode(encoding).encode()
    head = data[:4096]
    if b"\0" in head:
        even, odd = head[::2].count(0), head[1::2].count(0)
        if even == 0 and odd > len(head) // 8:
            return data.decode("utf-16-le").encode()
        if odd == 0 and even > len(head) // 8:
            return data.decode("utf-16-be").encode()
    return data


def not_utf8(error: UnicodeDecodeError) -> str:
    """Return what is wrong with text, e.g. "not UTF-8 (byte 0xe9 at 3)"."""
    return f"not {error.encoding.upper()} (byte 0x{error.object[error.start]:02x} at {error.start})"


def parse_json(text: str, start: int = 0) -> tuple[dict[str, Any], int]:
    """Parse the JSON object at a position of a text.

    Returns:
        The object, with a `NotCarried` for a key that it has twice, and the position after it.

    Raises:
        ValueError: if there is no object.
    """
    found, end = _DECODER.raw_decode(text, start)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found, end


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        times = Counter(key for key, _ in pairs)
        found |= {key: NotCarried("there twice") for key in found if times[key] > 1}
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object_of)


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
