"""Index the tars of a WebDataset: which bytes hold which samples.

This module parses tar headers itself. Python's `tarfile` takes four times as long per header, and stops without an
error where a tar is damaged.
"""

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import IO, Literal, NamedTuple

from litevae import storage
from litevae.errors import UserError
from pipelines.data.discovery import IMAGE_SUFFIXES, shown_path
from pipelines.data.left_out import LeftOut
from pipelines.data.splits import split_of
from pipelines.data.unusable import explain_content

Rows = Literal["samples", "images"]

# A range is read at once and held in memory, so it ends when it has this many samples or this many bytes.
RANGE_SAMPLES = 256
RANGE_BYTES = 32 * 2**20
_BLOCK = 512
_RECORD = 20 * _BLOCK  # tars are padded with zeros to a multiple of this
_READ_AHEAD = 2 * 2**20


class Range(NamedTuple):
    """A byte range of a tar that holds whole samples: offset and size in bytes, and the number of samples."""

    offset: int
    size: int
    samples: int


class Member(NamedTuple):
    """A file in a tar.

    Attributes:
        name: its path in the tar.
        regular: False for a link, a device, or another file without data of its own here.
        start: position of its first header.
        offset: position of its data.
        size: bytes of its data.
        end: position after its data and padding.
    """

    name: bytes
    regular: bool
    start: int
    offset: int
    size: int
    end: int


class Sample(NamedTuple):
    """The files that belong to one row: its name (`key`), and the files by extension.

    Extensions are in lower case. Only if two files of a sample differ in nothing but letter case are they as they are.
    """

    key: str
    files: dict[str, Member]


@dataclass
class TarIndex:
    """What is in a tar.

    Attributes:
        ranges: ranges of up to `RANGE_SAMPLES` samples, in order.
        extensions: how many samples have which extensions.
        examples: the key of one sample for each of these combinations.
        left_out: members that belong to no sample.
        splits: how many samples lie in folders that are named as which split; "" for none.
    """

    ranges: list[Range] = field(default_factory=list)
    extensions: Counter[tuple[str, ...]] = field(default_factory=Counter)
    examples: dict[tuple[str, ...], str] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)
    splits: Counter[str] = field(default_factory=Counter)


def index_tar(path: str, size: int, rows: Rows) -> TarIndex:
    """Index a tar.

    Args:
        path: the tar.
        size: its bytes.
        rows: what is a row; see `read_samples`.

    Raises:
        UserError: if the tar is damaged or truncated, or if the files of a sample do not lie together.
    """
    index = TarIndex()
    keys: set[str] = set()
    offset = end = samples = 0
    with open_tar(path, size) as file:
        for key, files in read_samples(file, path, 0, size, rows, whole=True, left_out=index.left_out):
            if key in keys:
                raise UserError(
                    f"{path}: sample {key!r} is in the tar twice; the files of a sample must lie next to each other, "
                    f"and names must be unique (write the tar again, e.g. with tar --sort=name)"
                )
            keys.add(key)
            index.splits[_split_of_folder(key.rpartition("/")[0])] += 1
            extensions = tuple(files)
            index.extensions[extensions] += 1
            index.examples.setdefault(extensions, key)
            members = list(files.values())
            full = samples >= RANGE_SAMPLES or end - offset >= RANGE_BYTES
            if full and members[0].start >= end:  # two images with one text lie in one range
                index.ranges.append(Range(offset, end - offset, samples))
                samples = 0
            offset, end = offset if samples else members[0].start, members[-1].end
            samples += 1
    if samples:
        index.ranges.append(Range(offset, end - offset, samples))
    return index


def open_tar(path: str, size: int) -> IO[bytes]:
    """Open the first `size` bytes of a tar to read headers; on S3 with few requests."""
    file = storage.open_binary(path, size)
    return io.BufferedReader(file, _READ_AHEAD) if storage.is_remote(path) else file  # type: ignore[type-var]


def read_samples(
    file: IO[bytes],
    path: str,
    start: int,
    stop: int,
    rows: Rows,
    whole: bool = False,
    left_out: LeftOut | None = None,
) -> Iterator[Sample]:
    """Yield the samples in bytes `start` to `stop` of a tar.

    By WebDataset's rule, which is rows="samples", neighbours whose names agree up to the first dot of the last path
    part form a sample. With rows="images" each image is a sample of its own, with all other neighbours whose names
    agree with its name up to the last dot. Hidden names and names without an extension are left out.

    Args:
        file: the tar, or a part of it.
        path: its path, for error messages.
        start, stop: positions in `file`.
        rows: "samples" or "images".
        whole: whether `stop` is the end of the tar, so that an end-of-archive marker must be there.
        left_out: where members that belong to no sample are counted.

    Raises:
        UserError: if the tar is damaged or truncated, or if a sample has two files with one extension.
    """
    left_out = LeftOut() if left_out is None else left_out
    divide = _one_sample if rows == "samples" else _one_sample_each
    stem, files = b"", dict[bytes, Member]()
    for member in _members(file, path, start, stop, whole):
        name = member.name.removeprefix(b"./")
        base = name.rfind(b"/") + 1
        dot = name.find(b".", base) if rows == "samples" else name.rfind(b".", base)
        if dot <= base or name[base : base + 1] == b".":
            left_out.leave("hidden" if name[base : base + 1] == b"." else "without an extension", name)
            continue
        if files and name[:dot] != stem:
            yield from divide(stem, files, left_out)
            files = {}
        stem, extension = name[:dot], name[dot + 1 :]
        if extension in files:
            raise UserError(f"{path}: {shown_path(name)!r} is in the tar twice; write the tar again")
        files[extension] = member
    if files:
        yield from divide(stem, files, left_out)


def _one_sample(stem: bytes, files: dict[bytes, Member], left_out: LeftOut) -> Iterator[Sample]:
    """Yield all files of one name as a sample."""
    found: dict[str, Member] = {shown_path(extension).lower(): member for extension, member in files.items()}
    if len(found) < len(files):  # a.JPG beside a.jpg
        lower = Counter(shown_path(extension).lower() for extension in files)
        found = {
            text if lower[text.lower()] > 1 else text.lower(): member
            for text, member in ((shown_path(extension), member) for extension, member in files.items())
        }
    yield Sample(shown_path(stem), found)


def _one_sample_each(stem: bytes, files: dict[bytes, Member], left_out: LeftOut) -> Iterator[Sample]:
    """Yield a sample for each image of one name, with all files of this name that are no images."""
    named = [(shown_path(extension).lower(), extension, member) for extension, member in files.items()]
    others = {text: member for text, _, member in named if not is_image(text)}
    images = [each for each in named if is_image(each[0])]
    for text, extension, member in images:
        own = sorted([(text, member), *others.items()], key=lambda each: each[1].start)
        yield Sample(shown_path(stem + b"." + extension), dict(own))
    if not images:
        for text in others:
            left_out.add("files without an image", f".{text}")


@lru_cache(maxsize=4096)
def _split_of_folder(folder: str) -> str:
    return split_of(f"{folder}/", folders_only=True)


@lru_cache(maxsize=4096)
def is_image(extension: str) -> bool:
    """Return whether an extension such as "jpg" or "depth.png" is that of an image."""
    return f".{extension.lower()}".endswith(IMAGE_SUFFIXES)


def _members(file: IO[bytes], path: str, start: int, stop: int, whole: bool) -> Iterator[Member]:
    """Yield all members except folders."""
    position, first = start, start
    extended: dict[bytes, bytes] = {}  # what extra headers say about the next member: name, size
    while position < stop:
        file.seek(position)
        header = file.read(_BLOCK)
        if len(header) == _BLOCK and not header.strip(b"\0"):
            if file.read(_RECORD).strip(b"\0"):
                raise UserError(
                    f"{path} has data after its end-of-archive marker at byte {position}; if several tars were joined, "
                    f"give each tar separately"
                )
            return
        try:
            kind, name, size = _parse(header)
            offset = position + _BLOCK
            if kind in b"xL":
                content = file.read(size)
                extended |= _pax(content) if kind == b"x" else {b"path": content.split(b"\0", 1)[0]}
            elif kind not in b"gK":
                name, size = extended.get(b"path", name), int(extended.get(b"size", size))
            if size < 0:
                raise ValueError(f"a member of {size} bytes")
        except ValueError as error:
            if position == 0 and (explained := explain_content(path, header)):
                raise UserError(explained) from None
            raise UserError(f"{path} can't be read at byte {position}: {error}; write it again") from None
        position = offset + -(-size // _BLOCK) * _BLOCK if kind not in b"123456" else offset
        if kind in b"xgKL":
            continue
        if position > stop:
            break
        folder = kind == b"5" or name.endswith(b"/")
        if not folder:
            regular = kind in b"0\0007" and not any(key.startswith(b"GNU.sparse") for key in extended)
            yield Member(name, regular, first, offset, size, position)
        first, extended = position, {}
    if whole or position > stop:
        raise UserError(
            f"{path} is truncated: its {stop} bytes have no end-of-archive marker; copy it again or write it again"
        )


def _parse(header: bytes) -> tuple[bytes, bytes, int]:
    """Return the type, the name and the size in bytes of the member that a header describes.

    Raises:
        ValueError: if it is not a header, or one of a sparse file.
    """
    if len(header) < _BLOCK:
        raise ValueError("incomplete header, so the tar is truncated")
    if _number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise ValueError("not a tar header, so the tar is damaged")
    kind, name = header[156:157], header[:100].split(b"\0", 1)[0]
    if kind == b"S":
        raise ValueError("sparse files are not supported")
    if header[257:263] == b"ustar\0" and header[345] and kind not in b"xg":
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return kind, name, _number(header[124:136])


def _number(field: bytes) -> int:
    """Parse a number field of a header."""
    if field[0] == 0x80:  # base-256, for numbers too large for the octal digits
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _pax(content: bytes) -> dict[bytes, bytes]:
    """Parse the records of a pax header, each "length key=value\\n"."""
    records = {}
    while content:
        digits, _, record = content.partition(b" ")
        length = int(digits)
        if not len(digits) < length <= len(content):
            raise ValueError(f"a pax record of {length} bytes")
        key, _, value = record[: length - len(digits) - 2].partition(b"=")
        records[key], content = value, content[length:]
    return records
