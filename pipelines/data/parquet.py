"""Parquet files with images or paths of images. A locality group is a row group."""

import json
import posixpath
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from litevae import storage
from litevae.errors import UserError
from litevae.images import ImageError
from litevae.lru_cache import LRUCache
from pipelines.data.column_types import plain, stored, widest
from pipelines.data.config import Source as SourceConfig
from pipelines.data.discovery import THREADS, Found, shown_path
from pipelines.data.hive import hive_columns
from pipelines.data.odd_paths import FIRST, refuse_odd_paths
from pipelines.data.source import (
    DEFAULTS,
    MAX_GROUP_BYTES,
    Source,
    about_of,
    decode_path,
    encode_path,
    id_column_of,
    is_foreign,
    locate,
    make_listing,
    read_file,
)
from pipelines.data.splits import files_of_split
from pipelines.data.unusable import explain_content

ID_GROUPS = 64  # row groups whose ids are read at a time

# For each file with rows, its path and its schema; for each type of a column, the first file that has it.
Schemas = list[tuple[str, pa.Schema]]
Types = dict[pa.DataType, str]


class ParquetSource(Source):
    """Parquet files with one image per row: its encoded bytes, a struct of `bytes` and `path`, or its path."""

    def __init__(self, listing: pa.Table):
        super().__init__(listing)
        self._image: str = self._about["settings"]["image_column"]
        self._id: str | None = self._about["settings"]["id_column"]
        self._paths: bool = self._about["paths"]
        unique = self._about["settings"].get("ids") == "unique"
        self._named = not unique and (self._id is not None or self._paths)  # whether ids come from a column
        self._hex: bool = self._about.get("hex_ids", False)  # older listings show bytes as Python writes them
        self._class_names: dict[str, tuple[str, list[str]]] = self._about["names"]
        self._of_folders: list[str] = self._about.get("of_folders", [])
        stored = [name for name in self.schema.names if name not in self._of_folders]
        carried = [_stored(self._class_names, name) for name in stored]
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
        if not self._named:
            return self._number(group, row)
        return self._name(self._tables(group)[self._id or self._image][row], group, row)

    def ids(self, start: int, stop: int) -> list[str]:
        ids = []
        for group, first, count in self._spans(start, stop):
            rows = range(first, first + count)
            if not self._named:
                ids += [self._number(group, row) for row in rows]
                continue
            column = self._id or self._image
            values = self._columns_of(group, [column])[column].slice(first, count)
            ids += [self._name(value, group, row) for value, row in zip(values, rows, strict=True)]
        return ids

    @property
    def ids_can_repeat(self) -> bool:
        return self._named

    def id_batches(self) -> Iterator[pa.Array]:
        ends = np.cumsum(self.groups)
        with ThreadPoolExecutor(THREADS) as threads:
            for begin in range(0, len(ends), ID_GROUPS):  # in parts, so that the ids of few groups are held at a time
                parts = zip(ends[begin : begin + ID_GROUPS], self.groups[begin : begin + ID_GROUPS], strict=True)
                units = [(int(end - count), int(end)) for end, count in parts]
                yield from threads.map(lambda part: pa.array(self.ids(*part), pa.string()), units)

    def place_of(self, unit: int) -> str:
        group, row = self._place(unit)
        number = self.listing["first"][group].as_py() + row
        return f"{storage.join(self.root, self._file(group))}, row {number}"

    def _number(self, group: int, row: int) -> str:
        """Return the id of a row without an id column: the file name and the number of the row in the file."""
        return f"{shown_path(self.listing['file'][group].as_py())}/{self.listing['first'][group].as_py() + row:09d}"

    def _name(self, scalar: pa.Scalar, group: int, row: int) -> str:
        """Return the id of a row from the value of its id column, or of its path column if there is no id column."""
        value = _python_value(scalar)
        if self._id is None:
            if value is None:
                return self._number(group, row)
            return shown_path(value) if isinstance(value, bytes) else str(value)
        unreadable = isinstance(value, bytes) and plain(scalar.type) == pa.string()
        if value is None or unreadable:
            number = self.listing["first"][group].as_py() + row
            path = storage.join(self.root, self._file(group))
            raise UserError(
                f"{path}: row {number} has {'bad text' if unreadable else 'no value'} in {self._id!r}; give another "
                f"id_column, or ids=unique, by which ids are made from file and row"
            )
        return value.hex() if self._hex and isinstance(value, bytes) else str(value)

    def columns(self, unit: int) -> dict[str, Any]:
        if not self.schema.names:
            return {}
        table, row = self._row(unit)
        values = {}
        if self._of_folders:
            folder = shown_path(self.listing["file"][self._place(unit)[0]].as_py()).rpartition("/")[0]
            values = {key: texts[0] for key, texts in hive_columns([folder]).items()}
        return {
            name: values.get(name) if name in self._of_folders else self._value(table, row, name)
            for name in self.schema.names
        }

    def _value(self, table: pa.Table, row: int, name: str) -> Any:
        if name not in self._class_names:
            return stored(table[name][row], self.schema.field(name).type)
        column, names = self._class_names[name]
        label = table[column][row].as_py()
        return names[label] if label is not None and 0 <= label < len(names) else None

    def data(self, unit: int) -> bytes:
        table, row = self._row(unit)
        scalar = table[self._image][row]
        path, data = (scalar, None) if self._paths else (None, scalar)
        if isinstance(scalar, pa.StructScalar):
            path, data = (scalar.get(name) for name in ("path", "bytes"))
        if data is not None and data.is_valid:
            return data.as_py()
        value = None if path is None else _python_value(path)
        if value is None:
            raise ImageError("missing", f"column {self._image!r} is null")
        file = storage.join(self.root, self._file(self._place(unit)[0]))
        return read_file(locate(posixpath.dirname(file), decode_path(value) if isinstance(value, bytes) else value))


def _python_value(scalar: pa.Scalar) -> Any:
    """Return a value as a Python object: text that is not UTF-8 as bytes."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        value = scalar.value if isinstance(scalar, pa.DictionaryScalar) else scalar
        return value.as_buffer().to_pybytes()


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
    files = files_of_split(found, config, name)
    paths = [storage.join(found.root, file.name) for file in files]
    with ThreadPoolExecutor(THREADS) as threads:
        listed = list(threads.map(_row_groups, paths, [file.facts.size for file in files]))
    full = [(path, schema) for path, (schema, parts) in zip(paths, listed, strict=True) if parts]
    if not full:
        raise UserError(f"{name}.uri={config.uri}: no rows in {len(files)} Parquet file(s)")
    names = _class_names(full, config)
    keys = hive_columns([file.name.rpartition("/")[0] for file in files])
    of_folders = [column for column in config.columns if column in keys and column not in full[0][1].names]
    image, identity = _choose_columns(full[0], [*names, *of_folders], config, name)
    stored_columns = [_stored(names, column) for column in config.columns if column not in of_folders]
    types = {column: _types_of(column, full) for column in [image, *([identity] if identity else []), *stored_columns]}
    paths_in_it = _holds_paths(image, types[image], name)
    hex_ids = identity is not None and _are_bytes(identity, types[identity], name)
    fields = []
    for column in config.columns:
        if column in of_folders:
            fields.append(pa.field(column, pa.string()))
            continue
        kind = _one_type(_stored(names, column), types[_stored(names, column)], full, name)
        if column in names and not pa.types.is_integer(kind):
            raise UserError(f"{name}.columns: {column!r} is made from {names[column][0]!r}, which is {kind}")
        fields.append(pa.field(column, pa.string() if column in names else kind))
    groups = [
        (encode_path(file.name), file.facts.version, *group)
        for file, (_, parts) in zip(files, listed, strict=True)
        for group in parts
    ]
    file, version, rows, position, size, first = zip(*groups, strict=True)
    settings: dict[str, Any] = {"image_column": image, "id_column": identity}
    if config.ids != DEFAULTS.ids:  # only then, so that the digest of other sources stays what it was
        settings["ids"] = config.ids
    more = ({"hex_ids": True} if hex_ids else {}) | ({"of_folders": of_folders} if of_folders else {})
    about = about_of(found, uri, pa.schema(fields), settings, names=names, paths=paths_in_it, **more)
    columns = {"first": pa.array(first, pa.int64()), "version": pa.array(version, pa.int64())}
    source = ParquetSource(make_listing(about, file, rows, position, size, columns))
    if paths_in_it:
        _check_paths(source, full[0][0], image, name)
    return source


def _check_paths(source: ParquetSource, file: str, column: str, name: str) -> None:
    """Raise a UserError if the first rows of the first file show that its paths are none, or none that can be read."""
    values = [_python_value(scalar) for scalar in source._columns_of(0, [column])[column].slice(0, FIRST)]
    paths = [value if isinstance(value, bytes) else encode_path(value) for value in values if value is not None]
    refuse_odd_paths(paths, posixpath.dirname(file), f"{name}.image_column: column {column!r} of {file}", column)
    if paths and is_foreign(path := shown_path(paths[0])):
        raise UserError(
            f"{name}.image_column: {column!r} has {path}: only local paths and s3:// can be read; download it"
        )


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
        explained = explain_content(path, _head(path, size))
        raise UserError(explained or f"{path}: not a readable Parquet file: {error}") from error


def _head(path: str, size: int | None) -> bytes:
    """Return the first bytes of a file; none if they can't be read."""
    try:
        return storage.read_range(path, 0, min(size or 0, 64))
    except OSError:
        return b""


def _class_names(full: Schemas, config: SourceConfig) -> dict[str, tuple[str, list[str]]]:
    """Return the columns that are made from class names.

    If the config asks for `label_name` and the files have no such column, it is made from the column `label` and its
    class names in Hugging Face's metadata.

    Returns:
        For each such column, the column of labels and the class names by label.

    Raises:
        UserError: if the class names of two files differ.
    """
    (first, schema), *others = full
    there = _features(schema)
    wanted = [column for column in config.columns if column not in schema.names and column.endswith("_name")]
    labels = {column: column.removesuffix("_name") for column in wanted}
    names = {column: (label, there[label]) for column, label in labels.items() if label in there}
    for path, other in others if names else []:
        theirs = _features(other) if other.metadata != schema.metadata else {}
        for label, known in names.values():
            if theirs.get(label, known) != known:
                raise UserError(f"{path}: the class names of {label!r} are not those of {first}; give them one by one")
    return names


def _features(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the class names of each label column, from Hugging Face's metadata."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {label: feature["names"] for label, feature in features.items() if "names" in feature}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _stored(names: dict[str, tuple[str, list[str]]], column: str) -> str:
    """Return the column of the file that a carried column is made from."""
    return names[column][0] if column in names else column


def _choose_columns(
    first: tuple[str, pa.Schema], made: Sequence[str], config: SourceConfig, name: str
) -> tuple[str, str | None]:
    """Return the image column, and the id column if there is one.

    Args:
        first: the path and the schema of the first file.
        made: columns that are made from others, or from the names of folders.
        config: the source's config section.
        name: the name of that section, for error messages.

    Raises:
        UserError: if a column is missing.
    """
    have = first[1].names
    where = f"{first[0]}; it has {', '.join(have)}"
    for key, column in [("image_column", config.image_column), *(("columns", column) for column in config.columns)]:
        if column not in have and (key == "image_column" or column not in made):
            raise UserError(f"{name}.{key}: no column {column!r} in {where}")
    return config.image_column, id_column_of(have, config, name, where)


# --- types ------------------------------------------------------------------------------------------------------


def _types_of(column: str, full: Schemas) -> Types:
    """Return the types that the files have in a column, each with the first file that has it.

    Raises:
        UserError: if a file has no such column or several, or if it may hold pickles.
    """
    types: Types = {}
    for path, schema in full:
        places = schema.get_all_field_indices(column)
        if not places:
            first, kind = full[0][0], full[0][1].field(column).type
            raise UserError(f"{path}: column {column!r}: no such column; {first} has {kind}")
        if len(places) > 1:
            raise UserError(f"{path} has {len(places)} columns {column!r}; give each a name of its own")
        types.setdefault(schema.field(places[0]).type, path)
    for kind, path in types.items():
        if storage.has_pickles(kind):
            raise UserError(f"{path}: column {column!r} is {kind}: it may hold pickles, which are not read")
    return types


def _holds_paths(column: str, types: Types, name: str) -> bool:
    """Return whether the image column holds paths, not encoded images.

    Raises:
        UserError: if it holds neither, or paths in one file and images in another.
    """
    found: dict[bool, tuple[pa.DataType, str]] = {}
    for kind, path in types.items():
        if pa.types.is_null(kind):
            continue
        text, fields = plain(kind) == pa.string(), {}
        if pa.types.is_struct(kind):
            fields = {field.name: plain(field.type) for field in kind.fields}
        encoded = fields.get("bytes", plain(kind))
        paths_only = pa.types.is_null(encoded) and fields.get("path") == pa.string()
        if not text and encoded != pa.binary() and not paths_only:
            hint = ""
            if pa.types.is_list(kind) or pa.types.is_large_list(kind):
                hint = ": it is a list of them; write each image as a row of its own"
            elif fields and encoded == pa.string():
                hint = ": its bytes are text; if that is base64, decode it and write the bytes"
            what = f"column {column!r} of {path} is {kind}, not image bytes or paths{hint}"
            raise UserError(f"{name}.image_column: {what}")
        found.setdefault(text, (kind, path))
    if not found:
        raise UserError(f"{name}.image_column: column {column!r} is null in every file, not image bytes or paths")
    if len(found) > 1:
        (kind, path), (other, its) = found.values()
        raise UserError(f"{its}: column {column!r}: {other}; {path} has {kind}; give the files of one kind")
    return True in found


def _are_bytes(column: str, types: Types, name: str) -> bool:
    """Return whether the id column holds bytes, whose ids are their hexadecimal digits.

    Raises:
        UserError: if its values can't be ids, or if those of one file are written otherwise than those of another.
    """
    for kind, path in types.items():
        if pa.types.is_nested(plain(kind)) or pa.types.is_null(kind):
            what = "null" if pa.types.is_null(kind) else f"{kind}; only plain values are ids"
            raise UserError(f"{name}.id_column: column {column!r} of {path} is {what}; name another column")
    kinds = {pa.int64() if pa.types.is_integer(plain(kind)) else plain(kind) for kind in types}
    if len(kinds) > 1:
        raise _conflict(column, types)
    kind = kinds.pop()
    return pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _one_type(column: str, types: Types, full: Schemas, name: str) -> pa.DataType:
    """Return the type that holds the values that all files have in a column.

    Raises:
        UserError: if there is none, or if the values are nested.
    """
    kinds = [plain(kind) for kind in types]
    for kind in kinds:
        if pa.types.is_nested(kind):
            raise UserError(f"{name}.columns: {column!r} is {kind}; only plain values are carried")
    numbers = [kind for kind in kinds if not pa.types.is_null(kind)]
    integers = [kind for kind in numbers if pa.types.is_integer(kind)]
    floats = [kind for kind in numbers if pa.types.is_floating(kind)]
    found = widest(kinds)
    if integers and len(integers) + len(floats) == len(numbers) and (floats or found is None):
        found = _type_of_numbers(column, full, found)
    if found is None:
        raise _conflict(column, types)
    return found


def _conflict(column: str, types: Types) -> UserError:
    """Return the error that names two files whose types in a column don't go together."""
    pairs = [(one, other) for n, other in enumerate(types) for one in [*types][:n]]
    one, other = next((pair for pair in pairs if widest(pair) is None), pairs[0])
    return UserError(
        f"{types[other]}: column {column!r}: {other}; {types[one]} has {one}, and no type holds both unchanged; write "
        f"the files with one type"
    )


def _type_of_numbers(column: str, full: Schemas, widest_of_types: pa.DataType | None) -> pa.DataType | None:
    """Return the type that holds the numbers of a column that has whole numbers in some files, fractions in others.

    Whole numbers that were written as fractions, as pandas does where some are missing, become whole numbers again.

    Args:
        column: the column.
        full: the files.
        widest_of_types: the type that holds all values of these types, if there is one.

    Returns:
        The type; None if there is none that holds each number unchanged.
    """
    least, largest, whole, fractions = 0, 0, True, False
    for path, schema in full:
        kind = schema.field(column).type
        if pa.types.is_floating(plain(kind)):
            fractions, whole = True, whole and _are_whole(path, column)
        elif pa.types.is_integer(plain(kind)):
            low, high = extremes(path, column)
            least, largest = min(least, low), max(largest, high)
    if not fractions:
        return pa.int64() if largest < 2**63 else pa.uint64() if least >= 0 else None
    if whole and largest < 2**63:
        return pa.int64()
    if widest_of_types is not None:
        return widest_of_types
    return pa.float64() if least >= -(2**53) and largest <= 2**53 else None


def _are_whole(path: str, column: str) -> bool:
    """Return whether all numbers of a file's column are whole, and so small that each was stored unchanged."""
    footer = _footer(path)
    for number in range(footer.num_row_groups):
        values = storage.read_row_group(path, footer, number, [column])[column].cast(pa.float64()).drop_null()
        fit = pc.and_(pc.equal(pc.floor(values), values), pc.less_equal(pc.abs(values), float(2**53)))
        if not pc.all(fit, min_count=0).as_py():
            return False
    return True


def extremes(path: str, column: str) -> tuple[int, int]:
    """Return the least and the largest whole number of a file's column, and at most and at least 0.

    They are in the file's statistics, or else the column is read.
    """
    footer, found = _footer(path), [0]
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        chunks = (group.column(place) for place in range(group.num_columns))
        chunk = next(chunk for chunk in chunks if chunk.path_in_schema == column)
        if chunk.is_stats_set and chunk.statistics.has_min_max:
            found += [chunk.statistics.min, chunk.statistics.max]
        else:
            ends = pc.min_max(storage.read_row_group(path, footer, number, [column])[column]).as_py()
            found += [end for end in ends.values() if end is not None]
    return min(found), max(found)
