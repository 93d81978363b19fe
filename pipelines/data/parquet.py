"""Parquet files with images or paths of images. A locality group is a row group."""

import json
import posixpath
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from litevae import storage
from litevae.errors import UserError
from litevae.images import ImageError
from litevae.lru_cache import LRUCache
from pipelines.data.config import Source as SourceConfig
from pipelines.data.discovery import THREADS, Found, shown_path
from pipelines.data.source import (
    MAX_GROUP_BYTES,
    Source,
    about_of,
    encode_path,
    id_column_of,
    is_foreign,
    is_text,
    locate,
    make_listing,
    read_file,
)


class ParquetSource(Source):
    """Parquet files with one image per row: its encoded bytes, a struct of `bytes` and `path`, or its path."""

    def __init__(self, listing: pa.Table):
        super().__init__(listing)
        self._image: str = self._about["settings"]["image_column"]
        self._id: str | None = self._about["settings"]["id_column"]
        self._paths: bool = self._about["paths"]
        self._class_names: dict[str, tuple[str, list[str]]] = self._about["names"]
        carried = [_stored(self._class_names, name) for name in self.schema.names]
        self._columns = list(dict.fromkeys([self._image, *([self._id] if self._id else []), *carried]))
        self._footers = LRUCache(self._read_footer, limit=4)
        self._tables = LRUCache(self._read_group, limit=self.window + int(self.groups.max()))

    def _read_footer(self, path: str) -> tuple[pq.FileMetaData, int]:
        return _footer(path), 1

    def _read_group(self, group: int) -> tuple[pa.Table, int]:
        table = self._columns_of(group, self._columns)
        return table, len(table)

    def _columns_of(self, group: int, columns: list[str]) -> pa.Table:
        """Read columns of a row group.

        Raises:
            UserError: if it can't be read, or if the file has changed since it was listed.
        """
        path, position = storage.join(self.root, self._file(group)), self.listing["offset"][group].as_py()
        try:
            table = storage.read_row_group(path, self._footers(path), position, columns)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: row group {position} can't be read: {error}") from error
        if len(table) != self.listing["rows"][group].as_py():
            raise UserError(f"{path} has changed since it was listed")
        return table.select(columns).combine_chunks()

    def _row(self, unit: int) -> tuple[pa.Table, int]:
        """Return the row group of a unit and its row there. As many rows as a window can span are kept in memory."""
        group, row = self._place(unit)
        return self._tables(group), row

    def id(self, unit: int) -> str:
        group, row = self._place(unit)
        if self._id is None and not self._paths:
            return self._number(group, row)
        return self._name(self._tables(group)[self._id or self._image][row].as_py(), group, row)

    def ids(self, start: int, stop: int) -> list[str]:
        ids = []
        for group, first, count in self._spans(start, stop):
            rows = range(first, first + count)
            if self._id is None and not self._paths:
                ids += [self._number(group, row) for row in rows]
                continue
            column = self._id or self._image
            values = self._columns_of(group, [column])[column].slice(first, count).to_pylist()
            ids += [self._name(value, group, row) for value, row in zip(values, rows, strict=True)]
        return ids

    def _number(self, group: int, row: int) -> str:
        """Return the id of a row without an id column: the file name and the number of the row in the file."""
        return f"{shown_path(self.listing['file'][group].as_py())}/{self.listing['first'][group].as_py() + row:09d}"

    def _name(self, value: Any, group: int, row: int) -> str:
        """Return the id of a row from the value of its id column, or of its path column if there is no id column."""
        if value is None and self._id is None:  # the path is null
            return self._number(group, row)
        if value is None:
            number = self.listing["first"][group].as_py() + row
            path = storage.join(self.root, self._file(group))
            raise UserError(f"{path}: row {number} has no value in {self._id!r}")
        return str(value)

    def columns(self, unit: int) -> dict[str, Any]:
        if not self.schema.names:
            return {}
        table, row = self._row(unit)
        return {name: self._value(table, row, name) for name in self.schema.names}

    def _value(self, table: pa.Table, row: int, name: str) -> Any:
        if name not in self._class_names:
            return table[name][row].as_py()
        column, names = self._class_names[name]
        label = table[column][row].as_py()
        return names[label] if label is not None and 0 <= label < len(names) else None

    def data(self, unit: int) -> bytes:
        table, row = self._row(unit)
        value = table[self._image][row].as_py()
        if isinstance(value, dict):
            value = value["bytes"] if value["bytes"] is not None else value.get("path")
        if value is None:
            raise ImageError("missing", f"column {self._image!r} is null")
        if isinstance(value, bytes):
            return value
        file = storage.join(self.root, self._file(self._place(unit)[0]))
        return read_file(locate(posixpath.dirname(file), value))


def list_parquet(found: Found, uri: str, config: SourceConfig, name: str) -> Source:
    """List Parquet files.

    Args:
        found: the files.
        uri: the absolute path or pattern that names them.
        config: the source's config section.
        name: the name of that section, for error messages.

    Raises:
        UserError: if a file can't be read, if columns are missing or of an unusable type, if files differ in them, if
            the split is missing or ambiguous, or if there are no rows.
    """
    files = _of_split(found.files, config.split, name, config.uri)
    paths = [storage.join(found.root, file) for file, _ in files]
    with ThreadPoolExecutor(THREADS) as threads:
        listed = list(threads.map(_row_groups, paths, [size for _, size in files]))
    schema = listed[0][0]
    names = _class_names(schema, config)
    image, identity, carried = _choose_columns(schema, names, config, paths[0], name)
    needed = [image, *([identity] if identity else []), *(_stored(names, column) for column in carried.names)]
    for path, (other, _) in zip(paths, listed, strict=True):
        for column in needed:
            if column not in other.names or other.field(column).type != schema.field(column).type:
                has = other.field(column).type if column in other.names else "no such column"
                raise UserError(f"{path}: column {column!r}: {has}; {paths[0]} has {schema.field(column).type}")
            if storage.has_pickles(kind := schema.field(column).type):
                raise UserError(f"{path}: column {column!r} is {kind}: it may hold pickles, which are not read")
    groups = [
        (encode_path(file), *group) for (file, _), (_, parts) in zip(files, listed, strict=True) for group in parts
    ]
    if not groups:
        raise UserError(f"{name}.uri={config.uri}: no rows in {len(files)} Parquet file(s)")
    file, rows, position, size, first = zip(*groups, strict=True)
    settings, paths_in_it = {"image_column": image, "id_column": identity}, is_text(schema.field(image).type)
    about = about_of(found, uri, carried, settings, names=names, paths=paths_in_it)
    source = ParquetSource(make_listing(about, file, rows, position, size, {"first": pa.array(first, pa.int64())}))
    if paths_in_it and not identity and is_foreign(path := source.id(0)):
        raise UserError(
            f"{name}.image_column: {image!r} has {path}: only local paths and s3:// can be read; download it"
        )
    return source


def _row_groups(path: str, size: int) -> tuple[pa.Schema, list[tuple[int, int, int, int]]]:
    """Return the schema of a file, and (rows, number, bytes, first row) of each row group that is not empty."""
    footer = _footer(path, size)
    groups, first = [], 0
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        if group.total_byte_size > MAX_GROUP_BYTES:
            raise UserError(
                f"{path}: row group {number} has {group.total_byte_size / 2**30:.1f} GiB and would be read as a "
                f"whole; write the file with smaller row groups (100 to 1000 images)"
            )
        stored = sum(group.column(column).total_compressed_size for column in range(group.num_columns))
        if group.num_rows:
            groups.append((group.num_rows, number, stored, first))
        first += group.num_rows
    features = {key: value for key, value in (footer.metadata or {}).items() if key == b"huggingface"}
    return footer.schema.to_arrow_schema().with_metadata(features), groups


def _footer(path: str, size: int | None = None) -> pq.FileMetaData:
    try:
        return storage.read_footer(path, size)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}") from error


def _of_split(files: list[tuple[str, int]], split: str, name: str, uri: str) -> list[tuple[str, int]]:
    """Return the files of one split, for files named as Hugging Face does: data/train-00000-of-00002.parquet.

    Raises:
        UserError: if there is no such split, or if there are several and none was asked for.
    """
    splits: dict[str, list[tuple[str, int]]] = {}
    for file, size in files:
        if match := re.search(r"(?:^|/)(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.parquet$", file):
            splits.setdefault(match[1], []).append((file, size))
    if split and split not in splits:
        there = (
            f"there are {', '.join(sorted(splits))}"
            if splits
            else "files are not named as train-00000-of-00002.parquet"
        )
        raise UserError(f"{name}.split: no split {split!r} in {uri}; {there}")
    if not split and len(splits) > 1:
        raise UserError(f"{name}.uri={uri} holds several splits; give one, {name}.split={' or '.join(sorted(splits))}")
    return splits[split] if split else files


def _class_names(schema: pa.Schema, config: SourceConfig) -> dict[str, tuple[str, list[str]]]:
    """Return the columns that are made from class names.

    If the config asks for `label_name` and the files have no such column, it is made from the column `label` and its
    class names in Hugging Face's metadata.

    Returns:
        For each such column, the column of labels and the class names by label.
    """
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        named = {label: feature["names"] for label, feature in features.items() if "names" in feature}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
    wanted = [column for column in config.columns if column not in schema.names and column.endswith("_name")]
    labels = {column: column.removesuffix("_name") for column in wanted}
    return {column: (label, named[label]) for column, label in labels.items() if label in named}


def _stored(names: dict[str, tuple[str, list[str]]], column: str) -> str:
    """Return the column of the file that a carried column is made from."""
    return names[column][0] if column in names else column


def _choose_columns(
    schema: pa.Schema, names: dict[str, tuple[str, list[str]]], config: SourceConfig, file: str, name: str
) -> tuple[str, str | None, pa.Schema]:
    """Return the image column, the id column if there is one, and the schema of the carried columns.

    Raises:
        UserError: if a column is missing or its type can't be used.
    """
    where = f"{file}; it has {', '.join(schema.names)}"
    for key, column in [("image_column", config.image_column), *(("columns", column) for column in config.columns)]:
        if column not in schema.names and (key == "image_column" or column not in names):
            raise UserError(f"{name}.{key}: no column {column!r} in {where}")
    kind = schema.field(config.image_column).type
    encoded = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(encoded) or pa.types.is_large_binary(encoded) or is_text(kind)):
        raise UserError(
            f"{name}.image_column: column {config.image_column!r} of {file} is {kind}, not image bytes or paths"
        )
    fields = [
        pa.field(column, pa.string()) if column in names else schema.field(column).remove_metadata()
        for column in config.columns
    ]
    for carried in fields:
        if pa.types.is_nested(carried.type):
            raise UserError(f"{name}.columns: {carried.name!r} is {carried.type}; only plain values are carried")
    return config.image_column, id_column_of(schema.names, config, name, where), pa.schema(fields)
