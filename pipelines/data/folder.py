"""A folder tree of images. Each file is a unit, and the folders are the classes."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from litevae import storage
from litevae.errors import UserError
from pipelines.data.config import Source as SourceConfig
from pipelines.data.discovery import Found, shown_path
from pipelines.data.source import Source, about_of, locate, make_listing, read_file


class FileSource(Source):
    """A folder tree of images, or a list of paths. Each group of the listing is one file.

    In a folder tree, the label of an image is the index of its parent folder among all folders that hold images.
    """

    def __init__(self, listing: pa.Table):
        super().__init__(listing)
        self.window = self.units
        if self.kind == "list":
            self.remote |= pc.any(pc.starts_with(self.listing["file"], "s3://")).as_py()

    def id(self, unit: int) -> str:
        return self.ids(self._place(unit)[0], unit + 1)[0]

    def ids(self, start: int, stop: int) -> list[str]:
        part = self.listing.slice(start, stop - start)
        if "id" in part.column_names:
            return part["id"].to_pylist()
        return [shown_path(path) for path in part["file"].to_pylist()]

    def columns(self, unit: int) -> dict[str, Any]:
        return {name: self.listing[name][unit].as_py() for name in self.schema.names}

    def data(self, unit: int) -> bytes:
        group = self._place(unit)[0]
        path = self._file(group)
        if self.kind == "list":
            return read_file(locate(self.root, path))
        return read_file(storage.join(self.root, path), self.listing["size"][group].as_py())


def list_folder(found: Found, uri: str, config: SourceConfig, name: str, labels: Sequence[str]) -> Source:
    """List a folder tree of images.

    Args:
        found: the images.
        uri: the absolute path of the folder.
        config: the source's config section.
        name: the name of that section, for error messages.
        labels: class names that have numbers already; new ones are numbered after them.

    Raises:
        UserError: if `config.columns` names a column that a folder tree does not have.
    """
    schema = pa.schema([("label", pa.int64()), ("label_name", pa.string())])
    if unknown := sorted(set(config.columns) - set(schema.names)):
        raise UserError(f"{name}.columns: a folder has only the columns label and label_name, not {', '.join(unknown)}")
    file = found.images["file"]
    parents = pc.struct_field(pc.extract_regex(file, "(?s)^(?P<parent>.*)/"), "parent").fill_null(b"")
    coded = parents.combine_chunks().dictionary_encode()
    folders = [shown_path(folder) for folder in coded.dictionary.to_pylist()]
    numbers = {folder: number for number, folder in enumerate(dict.fromkeys([*labels, *sorted(folders)]))}
    # The root folder is not a class: images in it have no label.
    of_folder = pa.array([numbers[folder] if folder else None for folder in folders], pa.int64())
    names = pa.array([folder or None for folder in folders], pa.string())
    # In parts: an array of strings can hold 2 GiB, which 240 million short names exceed, and Arrow reports no error.
    parts = [names.take(coded.indices.slice(start, 2**20)) for start in range(0, len(coded), 2**20)]
    columns = {"label": of_folder.take(coded.indices), "label_name": pa.chunked_array(parts, pa.string())}
    about = about_of(found, uri, schema, {}, labels=list(numbers))
    return FileSource(make_listing(about, file, size=found.images["size"], more=columns))
