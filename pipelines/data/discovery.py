"""Find the files that the uri of a source names: files of one kind, in an order independent of the file system.

What lies there and is not taken is counted by reason and suffix (`LeftOut`).
"""

import fnmatch
import glob
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from litevae import storage
from litevae.errors import UserError
from litevae.storage import Facts
from pipelines.data.left_out import LeftOut
from pipelines.data.unusable import PACKED, explain_file, explain_folder, explain_missing, refuse_packed

# Those of all formats that litevae/image_files.py reads, also of those that take a further package.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".png", ".apng", ".webp", ".avif", ".avifs", ".gif", ".bmp"),
    *(".dib", ".tif", ".tiff", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".psd"),
    *(".heic", ".heif", ".hif", ".heics", ".heifs", ".jxl"),
)
SUFFIXES = {"parquet": (".parquet",), "webdataset": (".tar",), "list": (".txt", ".csv", ".jsonl")}
NAMES = {"folder": "images", "webdataset": "tars", "parquet": "Parquet files", "list": "lists"}
THREADS = 16
DANGLING = Facts(-1, 0)  # of a link whose file is gone

# Why a file in a folder is not taken.
HIDDEN, SYSTEM, UNCOMMITTED = "hidden", "of the system", "not committed output"
METADATA, BESIDE, SUFFIX = "metadata", "texts beside images", "with another suffix"
COMPRESSED, SPECIAL = "compressed tars", "neither file nor folder"

_KINDS = {
    **{suffix.encode(): "folder" for suffix in IMAGE_SUFFIXES},
    **{suffix.encode(): kind for kind in ("parquet", "webdataset") for suffix in SUFFIXES[kind]},
}
# File names as tools write them beside data: Hugging Face's ImageFolder and data set cards, img2dataset, Spark.
_METADATA = re.compile(
    rb"(?i)(?:metadata\.(?:jsonl|csv|parquet)|dataset_infos?\.json|state\.json|.*_stats\.json|(?:readme|licen[cs]e)(?:\..*)?)"
)
_PACKED = tuple(suffix.encode() for suffix in PACKED)
_TEXTS = (b".txt", b".caption", b".json", b".xml", b".tags", b".yaml", b".yml")
# Names of files and folders that nobody means as data. "." and "..", which keys of S3 may hold, are not hidden.
# Hadoop's rule, by which every name with a leading _ is hidden, holds for Parquet only: cameras write _DSC1234.jpg.
_SYSTEM = (
    rb"@eaDir|__MACOSX|\$RECYCLE\.BIN|System Volume Information|#recycle|#snapshot|lost\+found|Thumbs\.db|desktop\.ini"
)
_OUTPUT = rb"_temporary|_SUCCESS|_spark_metadata|_delta_log|_(?:common_)?metadata|_(?:committed|started)_[^/]*"
_SKIPPED = re.compile(
    rb"(?:^|/)(?:(?P<hidden>\.(?!\.?(?:/|$))[^/]*)|(?P<system>" + _SYSTEM + rb")|(?P<output>" + _OUTPUT + rb"))(?=/|$)"
)
_BEGINS = frozenset(b".@_$#SlTd")  # of the names that these patterns match
_SNAPSHOTS = (b".snapshot", b".snapshots", b".zfs", b"#snapshot")  # whole copies of the tree: not looked into
_BATCH = 2**16
_MAGIC = re.compile(r"[*?[{]")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_FILES = pa.schema([("file", pa.large_binary()), ("size", pa.int64()), ("version", pa.int64())])


class File(NamedTuple):
    """A file of a source that holds several images: its name, relative to the root, and its facts."""

    name: str
    facts: Facts


@dataclass
class Found:
    """The files that a uri names, all of one kind and sorted.

    Attributes:
        kind: "folder" (of images), "parquet", "webdataset" or "list".
        root: the folder that file names are relative to.
        images: for "folder", a table of `file` (name), `size` (bytes) and `version` (see `storage.Facts`).
        files: for the other kinds, the files.
        beside: for "folder", a table as `images`, of the texts beside images that were asked for.
        metadata: for "folder", the files metadata.jsonl, .csv and .parquet of Hugging Face's ImageFolder.
        packed: the path of a compressed tar that was left out, if there is one.
        left_out: what was not taken.
    """

    kind: str
    root: str
    images: pa.Table = field(default_factory=_FILES.empty_table)
    files: list[File] = field(default_factory=list)
    beside: pa.Table = field(default_factory=_FILES.empty_table)
    metadata: list[str] = field(default_factory=list)
    packed: str = ""
    left_out: LeftOut = field(default_factory=LeftOut)


def find(path: str, shown: str, beside: Collection[str] = ()) -> Found:
    """Find the files that a path names.

    Args:
        path: a folder, a file, or a pattern with `*`, `?`, `[...]`, `**` or `{000..012}`.
        shown: the name of the path in error messages.
        beside: suffixes of texts beside images that are asked for, such as ".txt".

    Raises:
        UserError: if there are no files, no usable files, or files of several kinds.
    """
    if _is_folder(path):
        return _within(path, shown, _suffixes(beside))
    facts, root = storage.facts(path), root_of(path)
    files = _matching(path, shown) if facts is None else [File(path, facts)]
    start = len(root.rstrip("/")) + 1
    files, left_out = _usable([File(file.name[start:], file.facts) for file in files])
    if not files:
        raise UserError(f"{shown} names nothing but what is left out: {left_out}")
    kinds = {_kind_of(file.name) for file in files}
    examples = [storage.join(root, file.name) for file in (files[0], files[-1])]
    if len(kinds) > 1:
        raise UserError(f"{shown} names several kinds of files, e.g. {examples[0]} and {examples[1]}; name one kind")
    kind = kinds.pop()
    if not kind:
        raise UserError(explain_file(shown, examples[0]))
    if kind == "list" and len(files) > 1:
        raise UserError(f"{shown} names {len(files)} lists; join them into one")
    if kind != "folder":
        return Found(kind, root, files=files, left_out=left_out)
    rows = [(_encoded(file.name), *file.facts) for file in files]
    images = pa.table([list(column) for column in zip(*rows, strict=True)], schema=_FILES)
    found = Found(kind, root, images=_sorted(images), left_out=left_out)
    if beside:
        _find_beside(found, {row[0].rpartition(b"/")[0] for row in rows}, _suffixes(beside))
    return found


def _find_beside(found: Found, folders: set[bytes], beside: frozenset[bytes]) -> None:
    """Find the texts and the metadata files in the folders of the images that a pattern names."""
    texts = []
    for path, known in _files_in(found.root, folders):
        if _skipped(path) or _is_metadata(path, found):
            continue
        if path.rpartition(b"/")[2].lower() == b"metadata.parquet":
            found.metadata.append(path.decode("utf-8", "surrogateescape"))
        elif path[path.rfind(b".") :].lower() in beside:
            facts = known or storage.facts(storage.join(found.root, os.fsdecode(path))) or DANGLING
            texts.append((path, *facts))
    found.beside = _table_of(texts) if texts else found.beside


def _files_in(root: str, folders: set[bytes]) -> Iterator[tuple[bytes, Facts | None]]:
    """Yield the names, relative to the root, of what lies in these folders below it; on S3 with its facts."""
    if storage.is_remote(root):
        keys = ((key.encode(), facts) for key, facts in storage.walk(root))
        yield from (found for found in keys if found[0].rpartition(b"/")[0] in folders)
        return
    for folder in sorted(folders):
        names = os.listdir(os.path.join(os.fsencode(root), folder))
        yield from ((folder + b"/" + name if folder else name, None) for name in sorted(names))


def _suffixes(texts: Collection[str]) -> frozenset[bytes]:
    return frozenset(suffix.encode() for suffix in texts)


def root_of(path: str) -> str:
    """Return the folder that file names are relative to: the deepest folder above all files that a path names."""
    if _is_folder(path):
        return path
    fixed = path if storage.size(path) is not None else _MAGIC.split(path, maxsplit=1)[0]
    return fixed.rpartition("/")[0] or "/"


def _is_folder(path: str) -> bool:
    bucket = storage.is_remote(path) and "/" not in path.removeprefix("s3://")  # an empty bucket too
    return storage.folder_exists(path) or bucket


def _kind_of(name: str) -> str:
    """Return the kind of source that a file belongs to by its suffix; "" for none."""
    suffix = os.path.splitext(name)[1].lower()
    return _KINDS.get(suffix.encode(), "list" if suffix in SUFFIXES["list"] else "")


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _usable(files: Iterable[File]) -> tuple[list[File], LeftOut]:
    """Divide the files of a pattern into those to read and those that nobody means, such as _temporary/part.parquet."""
    kept, left_out = [], LeftOut()
    for file in files:
        name = _encoded(file.name)
        if reason := _skipped(name) or (_uncommitted(name) if file.name.lower().endswith(".parquet") else ""):
            left_out.leave(reason, name)
        else:
            kept.append(file)
    return kept, left_out


def _skipped(path: bytes) -> str:
    """Return the reason why no file of this path is data; "" if it may be."""
    found = _SKIPPED.search(path)
    return {"hidden": HIDDEN, "system": SYSTEM, "output": UNCOMMITTED}[found.lastgroup or ""] if found else ""


def _uncommitted(path: bytes) -> str:
    """Return the reason to leave out a Parquet file that Hadoop's rule hides: a name in its path begins with _."""
    parts = path.split(b"/")
    return UNCOMMITTED if any(part.startswith(b"_") and b"=" not in part for part in parts) else ""


# --- patterns ---------------------------------------------------------------------------------------------------


def _matching(pattern: str, shown: str) -> list[File]:
    """Return the files that match a pattern, sorted, with their facts. Every file that braces name must exist."""
    found: dict[str, Facts | None] = {}
    folders = ""
    for each in _expand(pattern):
        if not glob.has_magic(each):
            found[each] = None
        elif storage.is_remote(each):
            found |= _glob_remote(each)
        else:
            for path in glob.iglob(each, recursive=True):
                if facts := storage.facts(path):
                    found[path] = facts
                elif os.path.isdir(path):
                    folders = folders or path
                elif os.path.islink(path):
                    found[path] = DANGLING
    unknown = [path for path, facts in found.items() if facts is None]
    with ThreadPoolExecutor(THREADS) as threads:
        found |= zip(unknown, threads.map(storage.facts, unknown), strict=True)
    missing = [path for path, facts in found.items() if facts is None]
    if missing == [pattern]:
        raise UserError(explain_missing(shown, pattern))
    if missing:
        raise UserError(f"{shown}: there is no {missing[0]}")
    if not found and folders:
        inside = storage.join(pattern.rstrip("/"), "**", "*.jpg")
        raise UserError(f"{shown} matches only folders, e.g. {folders}; name the files in them, e.g. '{inside}'")
    if not found:
        raise UserError(explain_missing(shown, pattern))
    return sorted(File(path, facts) for path, facts in found.items() if facts is not None)


def _expand(pattern: str) -> list[str]:
    """Replace each {000..012} in a pattern by its numbers, and return all resulting patterns."""
    if not (braces := _BRACES.search(pattern)):
        return [pattern]
    first, last = braces.groups()
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [each for n in numbers for each in _expand(pattern[: braces.start()] + n + pattern[braces.end() :])]


def _glob_remote(pattern: str) -> dict[str, Facts | None]:
    """Return the files on S3 that match a pattern, with their facts."""
    folder = _MAGIC.split(pattern, maxsplit=1)[0].rpartition("/")[0]
    parts = pattern[len(folder) + 1 :].split("/")
    return {
        storage.join(folder, key): facts
        for key, facts in storage.walk(folder)
        if not _hidden(key) and _matches(key.split("/"), parts)
    }


def _hidden(key: str) -> bool:
    """Return whether a shell's pattern would pass over a key, because one of its names begins with a dot."""
    return key.startswith(".") or "/." in key


def _matches(parts: list[str], patterns: list[str]) -> bool:
    """Return whether the parts of a path match the parts of a pattern, in which `**` stands for any number of parts."""
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_matches(parts[start:], patterns[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])


# --- folders ----------------------------------------------------------------------------------------------------


def _within(root: str, shown: str, beside: frozenset[bytes]) -> Found:
    """Find all usable files in a folder tree, and count what is not taken."""
    found = Found("", root)
    batches: list[pa.Table] = []
    texts: list[pa.Table] = []
    others: dict[str, list[File]] = {"parquet": [], "webdataset": []}
    files = _walk_remote(root, found) if storage.is_remote(root) else _walk(os.fsencode(root), found, beside)
    while batch := list(islice(files, _BATCH)):  # in batches, so that no Python object per file is kept
        images, captions = [], []
        for path, kind, facts in batch:
            if kind == "folder":
                images.append((path, *facts))
            elif kind:
                others[kind].append(File(path.decode("utf-8", "surrogateescape"), Facts(*facts)))
            elif path[path.rfind(b".") :].lower() in beside:
                captions.append((path, *facts))
            else:
                leave_out(path, found)
        if images:
            batches.append(_table_of(images))
        if captions:
            texts.append(_table_of(captions))
    _choose_kind(found, shown, batches, others)
    if found.kind == "folder":
        found.images = _sorted(pa.concat_tables(batches))
        found.beside = pa.concat_tables(texts).combine_chunks() if texts else found.beside
    else:
        for text in texts:
            for path in text["file"].to_pylist():
                leave_out(path, found)
        for name in found.metadata:
            found.left_out.leave(METADATA, name)
    return found


def _table_of(files: list[tuple[bytes, int, int]]) -> pa.Table:
    return pa.table([list(column) for column in zip(*files, strict=True)], schema=_FILES)


def _sorted(images: pa.Table) -> pa.Table:
    images = images.combine_chunks()
    return images.take(pc.sort_indices(images, sort_keys=[("file", "ascending")]))


def _choose_kind(found: Found, shown: str, images: Sequence[pa.Table], others: dict[str, list[File]]) -> None:
    """Set what kind of source a folder is, and for one of packed files these files.

    Args:
        found: what is set.
        shown: the name of the folder in error messages.
        images: tables of the images in it.
        others: the packed files in it, by kind.

    Raises:
        UserError: if there are files of several kinds or of none.
    """
    root = found.root
    if others["parquet"] and images:  # a table of captions beside images is no source of images
        is_metadata = {file.name for file in others["parquet"] if _METADATA.fullmatch(_encoded(_base(file.name)))}
        found.metadata += sorted(is_metadata)
        others["parquet"] = [file for file in others["parquet"] if file.name not in is_metadata]
    committed = [file for file in others["parquet"] if not _uncommitted(_encoded(file.name))]
    for _ in range(len(others["parquet"]) - len(committed)):
        found.left_out.add(UNCOMMITTED, ".parquet")
    others["parquet"] = committed
    kinds = [kind for kind in NAMES if others.get(kind) or (kind == "folder" and images)]
    if len(kinds) > 1:
        held = " and ".join(NAMES[kind] for kind in kinds)
        suffix = _suffix(images[0]["file"][0].as_py()) if kinds[0] == "folder" else SUFFIXES[kinds[0]][0]
        every = storage.join(root, "**", f"*{suffix}")
        raise UserError(f"{shown} holds both {held}; name one kind, e.g. '{every}' or a subfolder")
    if not kinds:
        raise UserError(explain_folder(shown, found.left_out, IMAGE_SUFFIXES, found.packed))
    found.kind = kinds[0]
    if found.kind == "webdataset" and found.packed:
        raise UserError(refuse_packed(found.packed))
    if found.kind != "folder":
        found.files = sorted(others[found.kind])


def _suffix(path: bytes) -> str:
    return os.path.splitext(path)[1].decode("utf-8", "surrogateescape")


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def leave_out(path: bytes, found: Found) -> None:
    """Count a file that is no image, Parquet file or tar."""
    name = path[path.rfind(b"/") + 1 :]
    low = name.lower()
    if low.endswith(_PACKED):
        found.packed = found.packed or storage.join(found.root, path.decode(errors="replace"))
        found.left_out.leave(COMPRESSED, path)
    elif _METADATA.fullmatch(name):
        found.left_out.leave(METADATA, path)
    else:
        found.left_out.leave(BESIDE if low.endswith(_TEXTS) else SUFFIX, path)


def _walk_remote(root: str, found: Found) -> Iterator[tuple[bytes, str, tuple[int, int]]]:
    """Yield what `_walk` yields, for a folder on S3."""
    for key, facts in storage.walk(root):
        path = key.encode()
        if reason := _skipped(path):
            found.left_out.leave(reason, path)
        elif not _is_metadata(path, found):
            yield path, _KINDS.get(path[path.rfind(b".") :].lower(), ""), facts


def _is_metadata(path: bytes, found: Found) -> bool:
    """Return whether a file is a list of captions as ImageFolder has it, and if so remember it."""
    name = path[path.rfind(b"/") + 1 :].lower()
    if name not in (b"metadata.jsonl", b"metadata.csv"):
        return False
    found.metadata.append(path.decode("utf-8", "surrogateescape"))
    return True


def _walk(root: bytes, found: Found, beside: frozenset[bytes]) -> Iterator[tuple[bytes, str, tuple[int, int]]]:
    """Yield the files below a local folder as (relative path, kind or "", facts), and count what nobody means as data.

    Links are followed, but no folder is visited twice. Facts are only those of files that have a kind, or a
    suffix of `beside`.
    """
    seen, left = set(), [(b"", "")]
    while left:
        folder, reason = left.pop()  # reason: why nothing below the folder is taken
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
                    why = reason or (_skipped(name) if name[0] in _BEGINS else "")
                    if entry.is_dir(follow_symlinks=not why):
                        if name in _SNAPSHOTS:
                            found.left_out.add(why, "folder")
                        else:
                            children.append((folder + name + b"/", why))
                    elif why:
                        found.left_out.leave(why, name)
                    elif kind := _KINDS.get(name[name.rfind(b".") :].lower()):
                        if facts := _facts(entry):
                            yield folder + name, kind, facts
                        else:
                            found.left_out.leave(SPECIAL, name)
                    elif not _is_metadata(folder + name, found):
                        asked = name[name.rfind(b".") :].lower() in beside
                        yield folder + name, "", (_facts(entry) if asked else None) or DANGLING
        except OSError as error:
            if reason:  # such as lost+found, which only root may read
                found.left_out.add(reason, "folder")
                continue
            raise UserError(f"{os.fsdecode(path)} can't be listed: {error.strerror}") from error
        left += sorted(children, reverse=True)


def _facts(entry: os.DirEntry[bytes]) -> tuple[int, int] | None:
    """Return the facts of a file, `DANGLING` for a link to a file that is gone, and None for a pipe or a device.

    They are a plain tuple, as `Facts` has it: Python's garbage collection would look at millions of named tuples again
    and again, which takes as long as the rest of the listing.
    """
    if entry.is_file():
        status = entry.stat()
        return status.st_size, status.st_mtime_ns
    return DANGLING if entry.is_symlink() else None


def shown_path(path: bytes) -> str:
    """Return a file name as valid text, another one for each name.

    A byte that is not UTF-8 becomes an escape such as `\\xff`. A backslash that is there, and that would look like the
    begin of such an escape, becomes `\\x5c`.
    """
    escaped = _LIKE_AN_ESCAPE.sub(rb"\\x5c\1", path) if b"\\x" in path else path
    return escaped.decode("utf-8", "backslashreplace")


_LIKE_AN_ESCAPE = re.compile(rb"\\(x(?:5c|[89a-f][0-9a-f]))")
