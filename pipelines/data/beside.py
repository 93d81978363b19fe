"""Small files beside the images of a folder: cat/1.txt or cat/1.jpg.txt with the caption of cat/1.jpg, or its JSON."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from litevae import storage
from litevae.errors import UserError
from pipelines.data.column_types import NotCarried
from pipelines.data.config import Source as SourceConfig
from pipelines.data.discovery import Found, leave_out
from pipelines.data.text_fields import MISSING, extension_of, read_field, type_of_field

OF_FOLDERS = ("label", "label_name")  # columns that every folder has
NONE, BY_STEM, BY_NAME = 0, 1, 2  # whether an image has no file beside it, 1.txt, or 1.jpg.txt
TYPED_FILES = 256  # files, evenly spread, whose values decide the type of a column


def suffixes_beside(config: SourceConfig) -> list[str]:
    """Return the suffixes of the files that the columns of a config would be read from."""
    return [f".{extension_of(column)}" for column in config.columns if column not in OF_FOLDERS]


def column_beside(extension: str) -> str:
    """Return the name of the listing's column that says which images have a file with this extension beside them."""
    return f"beside.{extension}"


def is_beside(column: str) -> bool:
    """Return whether a listing's column is one that `column_beside` names."""
    return column.startswith("beside.")


def name_beside(image: str, extension: str, how: int) -> str:
    """Return the name of the file beside an image."""
    stem = image if how == BY_NAME else image[: image.rfind(".")]
    return f"{stem}.{extension}"


def list_beside(found: Found, images: pa.Table, columns: Sequence[str]) -> tuple[dict[str, pa.Array], pa.Array]:
    """Find the files beside images that the columns are read from, and count those that belong to no image.

    Args:
        found: the files of the folder.
        images: the images, as `Found.images` has them.
        columns: the columns.

    Returns:
        For each extension that some images have, an int8 column of a listing by the name of `column_beside`: `NONE`,
        `BY_STEM` or `BY_NAME`. And a version of each image, which is another once a file beside it is written again.
    """
    used = pa.array([], pa.large_binary())
    listed = {}
    names_of_images, version = images["file"], images["version"].to_numpy()
    stems = pc.replace_substring_regex(names_of_images, r"(?s)\.[^./]*$", "") if columns else names_of_images
    sizes, times = (found.beside[name].to_numpy() for name in ("size", "version"))
    for extension in dict.fromkeys(map(extension_of, columns)):
        suffix = pa.scalar(f".{extension}".encode(), pa.large_binary())
        how, place = np.full(len(images), NONE, np.int8), np.zeros(len(images), np.int64)
        for code, names in ((BY_STEM, stems), (BY_NAME, names_of_images)):
            files = pc.binary_join_element_wise(names, suffix, pa.scalar(b"", pa.large_binary()))
            places = pc.index_in(files, value_set=found.beside["file"])
            there = places.is_valid().to_numpy()
            how[there], place[there] = code, places.drop_null().to_numpy()
            used = pa.concat_arrays([used, files.filter(pa.array(there)).combine_chunks()])
        if how.any():
            listed[column_beside(extension)] = pa.array(how)
            both = 31 * (31 * version + times[place]) + sizes[place]  # a hash: int64 wraps around
            version = np.where(how == NONE, version, both)
    unused = pc.invert(pc.is_in(found.beside["file"], value_set=used))
    for path in found.beside["file"].filter(unused).to_pylist():
        leave_out(path, found)
    return listed, pa.array(version)


def type_beside(root: str, images: pa.ChunkedArray, how: pa.Array, column: str, name: str, where: str) -> pa.DataType:
    """Return the type of a column that is read from files beside images.

    Args:
        root: the folder.
        images: names of the images.
        how: the column that `list_beside` returned for it.
        column: the column.
        name: the name of the source's config section, for error messages.
        where: what is read, for error messages.

    Raises:
        UserError: if no value can be read, or no type holds those that are read.
    """
    extension = extension_of(column)
    if column != "cls" and not column.startswith("json."):
        return pa.string()
    places = np.flatnonzero(how.to_numpy())
    seen = {}
    for place in np.unique(places[np.linspace(0, len(places) - 1, TYPED_FILES).round().astype(int)]).tolist():
        image = images[place].as_py().decode("utf-8", "surrogateescape")
        try:
            content = storage.read(storage.join(root, name_beside(image, extension, how[place].as_py())))
        except FileNotFoundError:
            continue
        value = read_field(content, column)
        if not isinstance(value, NotCarried) and value is not MISSING:
            seen[image] = value
    return type_of_field(seen, column, name, where)


def refuse_unknown(unknown: Sequence[str], known: Sequence[str], metadata: Sequence[str], name: str, uri: str) -> None:
    """Raise a UserError for columns that a folder does not have."""
    if not unknown:
        return
    of_metadata = f", the columns of {', '.join(metadata[:3])}" if metadata else ""
    raise UserError(
        f"{name}.columns: {uri} has no {', '.join(unknown)}. A folder carries {', '.join(known)}{of_metadata}, and "
        f"what lies beside its images: txt for 1.txt or 1.jpg.txt, json.key for a key of 1.json (no image has such a "
        f"file)"
    )
