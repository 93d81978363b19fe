"""WebDataset: tar files with images and other fields of each sample. A locality group is a range of bytes."""

import io
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO, Any

import numpy as np
import pyarrow as pa

from litevae import storage
from litevae.errors import UserError
from litevae.images import ImageError
from litevae.lru_cache import LRUCache
from pipelines.data import tar_index
from pipelines.data.column_types import NotCarried
from pipelines.data.config import Source as SourceConfig
from pipelines.data.discovery import THREADS, Found, shown_path
from pipelines.data.left_out import LeftOut
from pipelines.data.source import (
    DEFAULTS,
    WINDOW_GROUPS,
    Source,
    about_of,
    encode_path,
    make_listing,
)
from pipelines.data.splits import ALL, files_of_split
from pipelines.data.text_fields import MISSING, extension_of, fit_field, read_field, type_of_field

TYPED_RANGES = 16  # ranges of samples, evenly spread over all tars, whose values decide the types of columns


class TarSource(Source):
    """The tars of a WebDataset. Each sample has an image, and its other files are columns named by extension."""

    def __init__(self, listing: pa.Table):
        super().__init__(listing)
        self._image: str | None = self._about["settings"]["image_column"]
        self._rows: tar_index.Rows = self._about["settings"].get("tar_rows", "samples")
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
            samples = list(tar_index.read_samples(file, path, start, start + size, self._rows))
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
        return {field.name: fit_field(_value(sample, data, field.name), field) for field in self.schema}

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
        UserError: if a tar is damaged, if there are no samples, if the first samples have no image, or if a column that
            was asked for is missing or holds values of several types.
    """
    files = files_of_split(found, config, name)
    paths = [storage.join(found.root, file.name) for file in files]
    with ThreadPoolExecutor(THREADS) as threads:
        index = partial(tar_index.index_tar, rows=config.tar_rows)
        indexes = list(threads.map(index, paths, [file.facts.size for file in files]))
    rows = [
        (encode_path(file.name), file.facts.version, *each)
        for file, index in zip(files, indexes, strict=True)
        for each in index.ranges
    ]
    if not rows:
        raise UserError(f"{name}.uri={config.uri}: no samples in {len(paths)} tar(s)")
    _check_splits(indexes, config, name)
    file, version, offset, size, samples = zip(*rows, strict=True)
    image = _choose_image(paths, indexes, config, name)
    _account(found.left_out, indexes, image, config)
    settings: dict[str, Any] = {"image_column": image}
    if config.tar_rows != DEFAULTS.tar_rows:  # only then, so that the digest of other sources stays what it was
        settings["tar_rows"] = config.tar_rows

    def source(schema: pa.Schema) -> TarSource:
        about = about_of(found, uri, schema, settings)
        more = {"version": pa.array(version, pa.int64())}
        return TarSource(make_listing(about, file, samples, offset, size, more))

    bare = source(pa.schema([]))
    first = [bare.sample(unit)[0] for unit in range(samples[0])]
    extensions = sorted({extension for sample in first for extension in sample.files})
    where = f"the first samples of {paths[0]}; they have {', '.join(extensions)}"
    if not any(_image_of(sample, image) for sample in first):
        raise UserError(f"{name}.image_column: no {image or 'image'} in {where}")
    seen = _values(bare, config.columns) if config.columns else {}
    return source(pa.schema([(column, type_of_field(seen[column], column, name, where)) for column in config.columns]))


def _check_splits(indexes: Sequence[tar_index.TarIndex], config: SourceConfig, name: str) -> None:
    """Raise a UserError if tars mix the samples of several splits and nobody asked for all of them."""
    sizes = sum((index.splits for index in indexes), Counter[str]())
    there = sorted(split for split in sizes if split)
    if len(there) > 1 and not config.split:
        listed = ", ".join(f"{split} ({sizes[split]:,} samples)" for split in there)
        raise UserError(
            f"{name}.uri={config.uri}: folders in the tars are named as several splits: {listed}; write a tar for each "
            f"split, or give {name}.split={ALL} for all of them"
        )


def _choose_image(
    paths: Sequence[str], indexes: Sequence[tar_index.TarIndex], config: SourceConfig, name: str
) -> str | None:
    """Return the extension of the images that the config asks for; None if each sample has at most one image.

    Raises:
        UserError: if samples hold several images and the config names none.
    """
    there = {extension for index in indexes for extensions in index.extensions for extension in extensions}
    if config.image_column != DEFAULTS.image_column:
        asked = config.image_column.removeprefix(".")
        return asked if asked in there else asked.lower()
    several = {
        extensions: (path, index.examples[extensions])
        for path, index in zip(paths, indexes, strict=True)
        for extensions in index.extensions
        if len(_images_of(extensions)) > 1
    }
    if not several:
        return None
    count = sum(index.extensions[extensions] for index in indexes for extensions in several)
    total = sum(index.extensions.total() for index in indexes)
    extensions, (path, key) = next(iter(several.items()))
    images = sorted(_images_of(extensions), key=lambda extension: (extension.count("."), extension))
    case = "; they differ in letter case only" if len({each.lower() for each in images}) == 1 else ""
    raise UserError(
        f"{name}: {count:,} of {total:,} samples hold several images, e.g. {key!r} of {path}: "
        f"{_listed(images)}{case}. If they belong to one row, choose one: {name}.image_column={images[0]}. If each is "
        f"an image of its own, because names hold dots: {name}.tar_rows=images"
    )


def _images_of(extensions: Sequence[str]) -> list[str]:
    return [extension for extension in extensions if tar_index.is_image(extension)]


def _listed(values: Sequence[str], most: int = 6) -> str:
    return ", ".join(values[:most]) + (f" and {len(values) - most} more" if len(values) > most else "")


def _account(left_out: LeftOut, indexes: Sequence[tar_index.TarIndex], image: str | None, config: SourceConfig) -> None:
    """Count the members of tars that are neither an image of a row nor carried by a column."""
    carried = {extension_of(column) for column in config.columns}
    for index in indexes:
        for reason, counter in index.left_out.counts.items():
            for suffix, number in counter.items():
                left_out.add(reason, suffix, number)
        for extensions, number in index.extensions.items():
            images = _images_of(extensions)
            taken = image if image else next(iter(images), None)
            for extension in extensions:
                if extension in images and extension != taken:
                    left_out.add("further images of samples", f".{extension}", number)
                elif extension != taken and extension not in carried:
                    left_out.add("other files of samples", f".{extension}", number)


def _values(source: TarSource, columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the readable values of each column in the samples of `TYPED_RANGES` ranges, by the id of the sample."""
    values: dict[str, dict[str, Any]] = {column: {} for column in columns}
    groups = len(source.listing)
    for group in np.unique(np.linspace(0, groups - 1, min(TYPED_RANGES, groups)).round().astype(int)).tolist():
        start = int(source.groups[:group].sum())
        for unit in range(start, start + int(source.groups[group])):
            sample, data = source.sample(unit)
            for column, found in values.items():
                value = _value(sample, data, column)
                if not isinstance(value, NotCarried) and value is not MISSING:
                    found[source.id(unit)] = value
    return values


def _value(sample: tar_index.Sample, data: bytes, column: str) -> Any:
    """Return what a sample has in a column; see `read_field`."""
    extension = extension_of(column)
    if extension not in sample.files:
        return MISSING
    if not sample.files[extension].regular:
        return NotCarried("a link or another special file in the tar")
    return read_field(_content(sample, data, extension), column)


def _content(sample: tar_index.Sample, data: bytes, extension: str) -> bytes:
    member = sample.files[extension]
    return data[member.offset : member.offset + member.size]


def _image_of(sample: tar_index.Sample, asked: str | None) -> str | None:
    """Return the extension of a sample's image: the one asked for, else the first image suffix; None if it has none."""
    if asked:
        return asked if asked in sample.files else None
    return next((extension for extension in sample.files if tar_index.is_image(extension)), None)
