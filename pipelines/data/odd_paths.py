"""Recognise what stands where a list or a table should have paths: images as text, Windows paths, paths in quotes."""

import base64
import binascii
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from litevae import storage
from litevae.errors import UserError
from litevae.images import ImageError
from pipelines.data.source import decode_path, encode_path, locate

FIRST = 16  # paths that are looked at
_LONGEST = 4095  # bytes of a path that Linux takes
_HEX = re.compile(r"(?:\\x|0x)?((?:[0-9A-Fa-f]{2}\s*){8,})")
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]{24,}={0,2}\s*")
_WINDOWS = re.compile(r"^(file:///?)?[A-Za-z]:[\\/]|\\")
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|BM|II\*\0|MM\0\*|....ftyp|\xff\x0a|\0\0\0\x0c(JXL|jP)|P[1-7]\s", re.DOTALL
)


def refuse_odd_paths(paths: Sequence[bytes], folder: str, where: str, column: str) -> None:
    """Raise a UserError if most of the first paths are no paths of this system, and none of these exists.

    Args:
        paths: paths, as the file system has them; only the first ones are looked at.
        folder: the folder that relative paths start from.
        where: the column and its file, for the error message.
        column: the name of the column.
    """
    kinds: dict[str, list[str]] = {}
    first = [decode_path(path) for path in paths[:FIRST]]
    for path in first:
        kinds.setdefault(_kind(path), []).append(path)
    kind, count = Counter({kind: len(found) for kind, found in kinds.items()}).most_common(1)[0] if kinds else ("", 0)
    if not kind or 2 * count <= len(first) or any(_exists(folder, path) for path in kinds[kind][:4]):
        return
    example = kinds[kind][0]
    shown = example if len(example) <= 80 else example[:40] + "..."
    decoder = "urlsafe_b64decode" if re.search("[-_]", example[22:]) else "b64decode"
    words: dict[str, Any] = {"shown": shown, "slashes": _slashes(shown), "column": column, "decoder": decoder}
    words["start"] = 2 if example[:2] in ("\\x", "0x") else 0
    raise UserError(f"{where} holds {_ADVICE[kind].format(**words)}")


_ADVICE = {
    "data": "images as base64 text (data: URIs), not paths: {shown}; write their bytes to Parquet, by pandas: "
    "frame[{column!r}] = frame[{column!r}].str.partition(',')[2].map(base64.{decoder}); frame.to_parquet(...)",
    "base64": "images as base64 text, not paths: {shown}; write their bytes to Parquet, by pandas: "
    "frame[{column!r}] = frame[{column!r}].map(base64.{decoder}); frame.to_parquet(...)",
    "windows": "paths of Windows, and none of the first ones exists here: {shown}; write them as this machine has "
    "them, with / and without a drive, e.g. {slashes}",
    "quoted": "paths in quotes, and none of the first ones exists here: {shown}; write them without",
    "spaces": "paths with spaces around them, and none of the first ones exists here: {shown!r}; write them without",
    "hex": "images as hexadecimal text, not paths: {shown}; write their bytes to Parquet, by pandas: "
    "frame[{column!r}] = frame[{column!r}].str[{start}:].map(bytes.fromhex); frame.to_parquet(...)",
    "bytes": "bytes as Python prints them, not paths: {shown}; write the bytes to Parquet, by pandas: "
    "frame[{column!r}] = frame[{column!r}].map(ast.literal_eval); frame.to_parquet(...)",
    "long": "text that is too long for a path: {shown}; name the column with the paths, or write the images as bytes",
}


def _kind(path: str) -> str:
    """Return a key of `_ADVICE`, or "" for what may be a path of this system."""
    if path[:5].lower() == "data:":
        return "data"
    if path[:2] in ("b'", 'b"') and path[-1] == path[1]:
        return "bytes"
    if (digits := _HEX.match(path[:256])) and _MAGIC.match(bytes.fromhex(digits[1])):
        return "hex"
    if len(path) > 2 and path[0] == path[-1] and path[0] in "\"'":
        return "quoted"
    if _WINDOWS.search(path):
        return "windows"
    long = len(encode_path(path)) > _LONGEST
    if _BASE64.fullmatch(path) and (long or _holds_an_image(path)):
        return "base64"
    return "long" if long else "spaces" if path != path.strip() else ""


def _holds_an_image(text: str) -> bool:
    """Return whether text that may be base64 is that of an image."""
    letters = "".join(text[:256].split()).replace("-", "+").replace("_", "/")
    try:
        return bool(_MAGIC.match(base64.b64decode(letters[: len(letters) // 4 * 4])))
    except binascii.Error:
        return False


def _exists(folder: str, path: str) -> bool:
    try:
        return storage.size(locate(folder, path)) is not None
    except (ImageError, OSError, ValueError):  # a foreign URI, a name that is too long, or one with NUL in it
        return False


def _slashes(path: str) -> str:
    return re.sub(r"^[A-Za-z]:/+|^//[^/]+/", "", re.sub("^file:///?", "", path).replace("\\", "/"))
