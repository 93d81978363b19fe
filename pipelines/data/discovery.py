"""Find the files that the uri of a source names: files of one kind, in an order independent of the file system."""

import fnmatch
import glob
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import pyarrow as pa
import pyarrow.compute as pc

from litevae import storage
from litevae.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".ppm")
SUFFIXES = {"parquet": (".parquet",), "webdataset": (".tar",), "list": (".txt", ".csv", ".jsonl")}
NAMES = {"folder": "images", "parquet": "Parquet files", "webdataset": "tars", "list": "lists"}
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
THREADS = 16
_IMAGES, _PACKED = (tuple(suffix.encode() for suffix in suffixes) for suffixes in (IMAGE_SUFFIXES, PACKED))
_ALL = (*_IMAGES, *_PACKED, b".parquet", b".tar")
_BATCH = 2**16
_MAGIC = re.compile(r"[*?[{]")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_FILES = pa.schema([("file", pa.large_binary()), ("size", pa.int64())])


@dataclass
class Found:
    """The files that a uri names, all of one kind and sorted.

    Attributes:
        kind: "folder" (of images), "parquet", "webdataset" or "list".
        root: the folder that file names are relative to.
        images: for "folder", a table of `file` (name) and `size` (bytes).
        files: for the other kinds, (name, bytes) of each file.
    """

    kind: str
    root: str
    images: pa.Table = field(default_factory=_FILES.empty_table)
    files: list[tuple[str, int]] = field(default_factory=list)


def find(path: str, shown: str) -> Found:
    """Find the files that a path names.

    Args:
        path: a folder, a file, or a pattern with `*`, `?`, `[...]`, `**` or `{000..012}`.
        shown: the name of the path in error messages.

    Raises:
        UserError: if there are no files, no usable files, or files of several kinds.
    """
    if _is_folder(path):
        return _within(path, shown)
    size, root = storage.size(path), root_of(path)
    files = _matching(path, shown) if size is None else [(path, size)]
    kinds = {next((kind for kind, ends in SUFFIXES.items() if file.lower().endswith(ends)), "") for file, _ in files}
    if len(kinds) > 1:
        raise UserError(f"{shown} names several kinds of files, e.g. {files[0][0]} and {files[-1][0]}; name one kind")
    kind = kinds.pop()
    if not kind:
        _refuse_packed(files[0][0])
        raise UserError(f"{shown}: {files[0][0]} is neither a folder nor a .parquet, .tar, .txt, .csv or .jsonl file")
    if kind == "list" and len(files) > 1:
        raise UserError(f"{shown} names {len(files)} lists; join them into one")
    start = len(root.rstrip("/")) + 1
    return Found(kind, root, files=[(file[start:], size) for file, size in files])


def root_of(path: str) -> str:
    """Return the folder that file names are relative to: the deepest folder above all files that a path names."""
    if _is_folder(path):
        return path
    fixed = path if storage.size(path) is not None else _MAGIC.split(path, maxsplit=1)[0]
    return fixed.rpartition("/")[0] or "/"


def _is_folder(path: str) -> bool:
    bucket = storage.is_remote(path) and "/" not in path.removeprefix("s3://")  # an empty bucket too
    return storage.folder_exists(path) or bucket


def _matching(pattern: str, shown: str) -> list[tuple[str, int]]:
    """Return the files that match a pattern, sorted, with their bytes. Every file that braces name must exist."""
    found: dict[str, int | None] = {}
    for each in _expand(pattern):
        if not glob.has_magic(each):
            found[each] = None
        elif storage.is_remote(each):
            found |= _glob_remote(each)
        else:
            found |= {path: os.path.getsize(path) for path in glob.iglob(each, recursive=True) if os.path.isfile(path)}
    unknown = [path for path, size in found.items() if size is None]
    with ThreadPoolExecutor(THREADS) as threads:
        found |= zip(unknown, threads.map(storage.size, unknown), strict=True)
    missing = [path for path, size in found.items() if size is None]
    if missing or not found:
        raise UserError(
            f"{shown} does not exist" if not missing or missing == [pattern] else f"{shown}: there is no {missing[0]}"
        )
    return sorted((path, size) for path, size in found.items() if size is not None)


def _expand(pattern: str) -> list[str]:
    """Replace each {000..012} in a pattern by its numbers, and return all resulting patterns."""
    if not (braces := _BRACES.search(pattern)):
        return [pattern]
    first, last = braces.groups()
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [each for n in numbers for each in _expand(pattern[: braces.start()] + n + pattern[braces.end() :])]


def _glob_remote(pattern: str) -> dict[str, int]:
    """Return the files on S3 that match a pattern, with their bytes."""
    folder = _MAGIC.split(pattern, maxsplit=1)[0].rpartition("/")[0]
    parts = pattern[len(folder) + 1 :].split("/")
    return {
        storage.join(folder, key): size
        for key, size in storage.walk(folder)
        if not _hidden(key.encode()) and _matches(key.split("/"), parts)
    }


def _matches(parts: list[str], patterns: list[str]) -> bool:
    """Return whether the parts of a path match the parts of a pattern, in which `**` stands for any number of parts."""
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_matches(parts[start:], patterns[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])


def _within(root: str, shown: str) -> Found:
    """Find all usable files in a folder tree.

    Hidden names are left out, because systems and tools create them (._photo.jpg, .ipynb_checkpoints).
    """
    batches: list[pa.Table] = []
    others: dict[str, list[tuple[str, int]]] = {"parquet": [], "webdataset": []}
    packed = None
    found = _walk_remote(root) if storage.is_remote(root) else _walk(os.fsencode(root))
    while batch := list(islice(found, _BATCH)):  # in batches, so that no Python object per file is kept
        images = []
        for path, size in batch:
            name = path.lower()
            if name.endswith(_IMAGES):
                images.append((path, size))
            elif name.endswith(_PACKED):
                packed = path
            else:
                kind = "parquet" if name.endswith(b".parquet") else "webdataset"
                others[kind].append((path.decode("utf-8", "surrogateescape"), size))
        if images:
            batches.append(pa.table([list(column) for column in zip(*images, strict=True)], schema=_FILES))
    examples = {kind: files[0][0] for kind, files in others.items() if files}
    if batches:
        examples["folder"] = batches[0]["file"][0].as_py().decode(errors="replace")
    if len(examples) > 1:
        held = " and ".join(f"{NAMES[kind]} ({examples[kind]})" for kind in NAMES if kind in examples)
        raise UserError(
            f"{shown} holds both {held}; name one of them, e.g. a subfolder or '{storage.join(root, '*.parquet')}'"
        )
    if not examples:
        if packed:
            _refuse_packed(storage.join(root, packed.decode(errors="replace")))
        empty = (
            "has no images, Parquet files or tars in it" if storage.is_remote(root) or os.listdir(root) else "is empty"
        )
        raise UserError(f"{shown} {empty} (image suffixes: {' '.join(IMAGE_SUFFIXES)})")
    kind = next(iter(examples))
    if packed and kind == "webdataset":
        _refuse_packed(storage.join(root, packed.decode(errors="replace")))
    if kind != "folder":
        return Found(kind, root, files=sorted(others[kind]))
    images = pa.concat_tables(batches).combine_chunks()
    return Found(kind, root, images.take(pc.sort_indices(images, sort_keys=[("file", "ascending")])))


def _walk_remote(root: str) -> Iterator[tuple[bytes, int]]:
    for key, size in storage.walk(root):
        path = key.encode()
        if path.lower().endswith(_ALL) and not _hidden(path):
            yield path, size


def _walk(root: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield usable files below a local folder as (relative path, bytes).

    Links are followed, but no folder is visited twice. A dangling link has -1 bytes.
    """
    seen, left = set(), [b""]
    while left:
        folder = left.pop()
        path = os.path.join(root, folder)
        children = []
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:  # a link back up the tree
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    name = entry.name
                    if name.startswith(b"."):
                        continue
                    if entry.is_dir():
                        children.append(folder + name + b"/")
                    elif name.lower().endswith(_ALL):
                        if entry.is_file():
                            yield folder + name, entry.stat().st_size
                        elif entry.is_symlink():  # a dangling link
                            yield folder + name, -1
        except OSError as error:
            raise UserError(f"{os.fsdecode(path)} can't be listed: {error.strerror}") from error
        left += sorted(children, reverse=True)


def _hidden(path: bytes) -> bool:
    return path.startswith(b".") or b"/." in path


def _refuse_packed(path: str) -> None:
    """Raise a UserError if the file is a compressed tar."""
    if path.lower().endswith(PACKED):
        raise UserError(f"{path} is compressed, so single images can't be read from it; decompress it to a plain .tar")


def shown_path(path: bytes) -> str:
    """Return a file name as valid text. Bytes that are not UTF-8 become backslash escapes."""
    return path.decode("utf-8", "backslashreplace")
