"""Images that are files of their own: those of a folder tree, or those that a list names."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from litevae import storage
from litevae.errors import UserError
from pipelines.data.beside import NONE, column_beside, name_beside
from pipelines.data.column_types import NotCarried
from pipelines.data.discovery import shown_path
from pipelines.data.source import Source, locate, read_file
from pipelines.data.text_fields import MISSING, extension_of, fit_field, read_field


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

    @property
    def ids_can_repeat(self) -> bool:
        return self.kind == "list"  # one list names no id twice, but a list that has grown may name one again

    def place_of(self, unit: int) -> str:
        return f"{self.uri}, row {unit}" if self.kind == "list" else self._file(self._place(unit)[0])

    def columns(self, unit: int) -> dict[str, Any]:
        return {
            field.name: self.listing[field.name][unit].as_py()
            if field.name in self.listing.column_names
            else fit_field(self._beside(unit, field.name), field)
            for field in self.schema
        }

    def _beside(self, unit: int, column: str) -> Any:
        """Return what the file beside an image has for a column; see `read_field`."""
        extension, group = extension_of(column), self._place(unit)[0]
        how = self.listing[column_beside(extension)][group].as_py()
        if how == NONE:
            return MISSING
        path = storage.join(self.root, name_beside(self._file(group), extension, how))
        try:
            return read_field(storage.read(path), column)
        except storage.Unavailable:
            raise
        except (OSError, UserError) as error:
            return NotCarried(f"{path}: {error}")

    def data(self, unit: int) -> bytes:
        group = self._place(unit)[0]
        path = self._file(group)
        if self.kind == "list":
            return read_file(locate(self.root, path))
        return read_file(storage.join(self.root, path), self.listing["size"][group].as_py())
