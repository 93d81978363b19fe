"""Fields that small files give an image: captions, classes and JSON, in a tar's sample or beside an image in a folder.

A column is named by the extension of its file, such as `txt`; `json.key` is what the file `.json` has for a key.
"""

import re
from typing import Any

import pyarrow as pa

from litevae.errors import UserError
from pipelines.data.column_types import (
    INFINITE,
    UNREADABLE,
    NoCommonType,
    NotCarried,
    fit,
    kind_of,
    not_utf8,
    parse_json,
    to_utf8,
)
from pipelines.runtime.logs import say

MISSING = object()  # stands for a value that an image does not have
_INTEGER = re.compile(r"[+-]?[0-9]+")


def extension_of(column: str) -> str:
    """Return the extension of the file that a column is read from."""
    return "json" if column.startswith("json.") else column


def read_field(content: bytes, column: str) -> Any:
    """Return what a file gives for a column: for `json.key` the key's JSON value, else the file's text.

    Returns:
        The value; `MISSING` if the JSON has no such key; a `NotCarried` if it can't be read.
    """
    try:
        text = to_utf8(content).decode()
        if column.startswith("json."):
            found, end = parse_json(text, len(text) - len(text.lstrip()))
            if text[end:].strip():
                return NotCarried(f"the JSON goes on after its end, at {end}")
            return found.get(column.removeprefix("json."), MISSING)
    except UnicodeDecodeError as error:
        return NotCarried(not_utf8(error))
    except UNREADABLE as error:
        return NotCarried(f"the JSON can't be read: {error}")
    return text.strip() if column == "cls" else text


def type_of_field(seen: dict[str, Any], column: str, name: str, where: str) -> pa.DataType:
    """Return the type of a column that holds the values that were seen.

    Args:
        seen: values that `read_field` returned, by the id of their image.
        column: the column.
        name: the name of the source's config section, for error messages.
        where: what was looked at, for error messages.

    Raises:
        UserError: if there are no values, or no type holds them all.
    """
    if not seen:
        raise UserError(f"{name}.columns: no readable {column!r} in {where}")
    values = list(seen.values())
    if column == "cls":
        numbers = [int(value) if _INTEGER.fullmatch(value) else None for value in values if value]
        if numbers and None not in numbers:
            values = numbers
        else:
            odd = next((value for value in values if not _INTEGER.fullmatch(value)), "")
            say(f"{name}.columns: 'cls' is text, not whole numbers, e.g. {odd[:40]!r}")
    try:
        return kind_of(values)
    except NoCommonType as error:
        place = list(seen)[error.place]
        raise UserError(
            f"{name}.columns: {column!r} holds {error}: {place}; only plain values of one kind are carried"
        ) from None


def fit_field(value: Any, field: pa.Field) -> Any:
    """Return a value as its column holds it, None if there is none, or a `NotCarried` if it is not of that type.

    Args:
        value: what `read_field` returned.
        field: name and type of the column.
    """
    if field.name == "cls" and isinstance(value, str) and field.type != pa.string():
        value = int(value) if _INTEGER.fullmatch(value) else NotCarried(f"{value[:40]!r} is no {field.type}")
    if isinstance(value, float) and value in INFINITE:
        value = NotCarried("a number that is infinite or too large for 64 bits")
    if value is None or value is MISSING:
        return None
    return value if isinstance(value, NotCarried) else fit(value, field.type)
