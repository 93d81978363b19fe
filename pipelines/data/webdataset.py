"""WebDataset: tar files with images and other fields of each sample. A locality group is a range of bytes."""

import io
import json
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import pyarrow as pa

from litevae import storage
from litevae.errors import UserError
from litevae.images import ImageError
from litevae.lru_cache import LRUCache
from pipelines.data import tar_index
from pipelines.data.config import Source as SourceConfig
from pipelines.data.discovery import IMAGE_SUFFIXES, THREADS, Found, shown_path
from pipelines.data.source import (
    DEFAULTS,
    UNREADABLE,
    WINDOW_GROUPS,
    Source,
    about_of,
    encode_path,
    make_listing,
)


class TarSource(Source):
    """The tars of a WebDataset. Each sample has an image, and its other files are columns named by extension."""

    def __init__(self, listing: pa.Table):
        super().__init__(listing)
        self._image: str | None = self._about["settings"]["image_column"]
        self._ranges = LRUCache(self._read_range, limit=WINDOW_GROUPS + 1)

    def _range(self, group: int) -> tuple[str, int, int]:
        """Return the path of a group's tar, and the group's offset and size in bytes."""
        offset, size = (self.listing[column][group].as_py() for column in ("offset", "size"))
        return storage.join(self.root, self._file(group)), offset, size

    def _read_range(self, group: int) -> tuple[tuple[list[tar_index.Sample], bytes], int]:
        path, offset, size = self._range(group)
        try:
            data = storage.read_range(path, offset, size)
        except OSError as error:
            raise UserError(f"{path} can't be read: {error}") from error
        return (self._samples(io.BytesIO(data), group, 0), data), 1

    def _samples(self, file: IO[bytes], group: int, start: int) -> list[tar_index.Sample]:
        """Return the samples of a group, which begins at position `start` of `file`.

        Raises:
            UserError: if they are not those that were listed.
        """
        path, _, size = self._range(group)
        try:
            samples = list(tar_index.read_samples(file, path, start, start + size))
        except storage.Unavailable:
            raise
        except UserError:
            samples = []
        if len(samples) != self.listing["rows"][group].as_py():
            raise UserError(f"{path} has changed since it was listed")
        return samples

    def sample(self, unit: int) -> tuple[tar_index.Sample, bytes]:
        """Return a sample, and the bytes that the offsets of its files refer to."""
        group, row = self._place(unit)
        samples, data = self._ranges(group)
        return samples[row], data

    def id(self, unit: int) -> str:
        return self._name(self._place(unit)[0], self.sample(unit)[0])

    def ids(self, start: int, stop: int) -> list[str]:
        ids = []
        for group, row, count in self._spans(start, stop):
            path, offset, size = self._range(group)
            try:
                with tar_index.open_tar(path, offset + size) as file:
                    samples = self._samples(file, group, offset)
            except OSError as error:
                raise UserError(f"{path} can't be read: {error}") from error
            ids += [self._name(group, sample) for sample in samples[row : row + count]]
        return ids

    def _name(self, group: int, sample: tar_index.Sample) -> str:
        return f"{shown_path(self.listing['file'][group].as_py())}/{sample.key}"

    def columns(self, unit: int) -> dict[str, Any]:
        if not self.schema.names:
            return {}
        sample, data = self.sample(unit)
        values = {}
        for column in self.schema:
            try:
                value = _tar_value(sample, data, column.name)
                if pa.types.is_string(column.type) and not isinstance(value, str | None):
                    value = json.dumps(value)
                values[column.name] = pa.scalar(value, column.type).as_py()
            except KeyError:
                values[column.name] = None
            except UNREADABLE as error:
                raise ImageError("unreadable", f"column {column.name!r} ({column.type}): {error}") from error
        return values

    def data(self, unit: int) -> bytes:
        sample, data = self.sample(unit)
        extension = _image_of(sample, self._image)
        if extension is None:
            raise ImageError("missing", f"no {self._image or 'image'} among {', '.join(sample.files)}")
        if not sample.files[extension].regular:
            raise ImageError("unreadable", f".{extension} is a link or another special file in the tar")
        return _content(sample, data, extension)


def list_tars(found: Found, uri: str, config: SourceConfig, name: str) -> Source:
    """List the tars of a WebDataset.

    Args:
        found: the files.
        uri: the absolute path or pattern that names them.
        config: the source's config section.
        name: the name of that section, for error messages.

    Raises:
        UserError: if a tar is damaged, if there are no samples, or if the first samples have no image or lack a column
            that was asked for.
    """
    with ThreadPoolExecutor(THREADS) as threads:
        paths = [storage.join(found.root, file) for file, _ in found.files]
        ranges = list(threads.map(tar_index.list_ranges, paths, [size for _, size in found.files]))
    rows = [(encode_path(file), *each) for (file, _), parts in zip(found.files, ranges, strict=True) for each in parts]
    if not rows:
        raise UserError(f"{name}.uri={config.uri}: no samples in {len(paths)} tar(s)")
    file, offset, size, samples = zip(*rows, strict=True)
    image = None if config.image_column == DEFAULTS.image_column else config.image_column.lower()

    def source(schema: pa.Schema) -> TarSource:
        about = about_of(found, uri, schema, {"image_column": image})
        return TarSource(make_listing(about, file, samples, offset, size))

    bare = source(pa.schema([]))
    first = [bare.sample(unit) for unit in range(samples[0])]
    extensions = sorted({extension for sample, _ in first for extension in sample.files})
    where = f"the first samples of {paths[0]}; they have {', '.join(extensions)}"
    if not any(_image_of(sample, image) for sample, _ in first):
        raise UserError(f"{name}.image_column: no {image or 'image'} in {where}")
    return source(pa.schema([(column, _tar_type(first, column, name, where)) for column in config.columns]))


def _tar_type(samples: list[tuple[tar_index.Sample, bytes]], column: str, name: str, where: str) -> pa.DataType:
    """Infer the type of a column from the first samples."""
    values = []
    for sample, data in samples:
        try:
            values.append(_tar_value(sample, data, column))
        except (KeyError, *UNREADABLE):
            continue
    if not values:
        raise UserError(f"{name}.columns: no readable {column!r} in {where}")
    try:
        kind = pa.array(values).type
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{name}.columns: {column!r} is of several types in {where}: {error}") from error
    if pa.types.is_nested(kind):
        raise UserError(f"{name}.columns: {column!r} is {kind}; only plain values are carried")
    return pa.string() if pa.types.is_null(kind) else kind


def _tar_value(sample: tar_index.Sample, data: bytes, column: str) -> Any:
    """Return the value of a column: `cls` as int, `json.field` as the field's JSON value, any other extension as text.

    Raises:
        KeyError: if the sample does not have it.
        ValueError, RecursionError: if it can't be parsed.
    """
    if not column.startswith("json."):
        text = _content(sample, data, column).decode()
        return int(text) if column == "cls" else text
    content = json.loads(_content(sample, data, "json"))
    if not isinstance(content, dict):
        raise ValueError("the JSON is not an object")
    return content[column.removeprefix("json.")]


def _content(sample: tar_index.Sample, data: bytes, extension: str) -> bytes:
    member = sample.files[extension]
    return data[member.offset : member.offset + member.size]


def _image_of(sample: tar_index.Sample, asked: str | None) -> str | None:
    """Return the extension of a sample's image: the one asked for, else the first image suffix; None if it has none."""
    if asked:
        return asked if asked in sample.files else None
    return next((extension for extension in sample.files if f".{extension}".endswith(IMAGE_SUFFIXES)), None)
