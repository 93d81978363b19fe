"""A folder tree of images. Each file is a unit, and the folders are the classes."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from litevae.errors import UserError
from pipelines.data.beside import column_beside, list_beside, refuse_unknown, type_beside
from pipelines.data.config import Source as SourceConfig
from pipelines.data.discovery import Found, shown_path
from pipelines.data.file_source import FileSource
from pipelines.data.hive import hive_columns
from pipelines.data.image_metadata import list_metadata
from pipelines.data.source import LISTING, Source, about_of, make_listing, version_column
from pipelines.data.splits import choose_split, split_of, without_split
from pipelines.data.text_fields import extension_of
from pipelines.runtime.logs import say

NOT_CARRIED = ("id", "version", *LISTING.names)  # columns of a listing with a meaning of their own
RESERVED = ("label", "label_name", *NOT_CARRIED)


def list_folder(found: Found, uri: str, config: SourceConfig, name: str, labels: Sequence[str]) -> Source:
    """List a folder tree of images.

    Args:
        found: the images.
        uri: the absolute path of the folder.
        config: the source's config section.
        name: the name of that section, for error messages.
        labels: class names that have numbers already; new ones are numbered after them.

    Raises:
        UserError: if `config.columns` names a column that a folder tree does not have, or one of `NOT_CARRIED`.
    """
    if taken := [column for column in config.columns if column in NOT_CARRIED]:
        raise UserError(
            f"{name}.columns: {taken[0]!r} can't be carried from a folder under this name; rename it in {config.uri}, "
            f"or leave it out"
        )
    file = found.images["file"]
    parents = pc.struct_field(pc.extract_regex(file, "(?s)^(?P<parent>.*)/"), "parent").fill_null(b"")
    coded = parents.combine_chunks().dictionary_encode()
    folders = [shown_path(folder) for folder in coded.dictionary.to_pylist()]
    counts = np.bincount(coded.indices.to_numpy(), minlength=len(folders))
    splits = [split_of(f"{folder}/", folders_only=True) for folder in folders]
    kept = choose_split(splits, counts.tolist(), config.split, name, config.uri, found.left_out)
    images, indices = found.images, coded.indices
    if not kept.all():
        chosen = pa.array(kept[indices.to_numpy()])
        images, indices = images.filter(chosen), indices.filter(chosen)
    # With a split chosen, its folder is no part of a class: "cat" is one class in train/cat and in val/cat.
    classes = [without_split(folder) if config.split else folder for folder in folders]
    used = {each for each, keep in zip(classes, kept, strict=True) if keep}
    numbers = {folder: number for number, folder in enumerate(dict.fromkeys([*labels, *sorted(used)]))}
    # The root folder is not a class: images in it have no label.
    numbered = pa.array([numbers.get(each) if each else None for each in classes], pa.int64())
    values = {"label_name": [each or None for each in classes]}
    values |= {key: texts for key, texts in hive_columns(folders).items() if key not in RESERVED}
    described = list_metadata(found, images["file"], config.columns, name)
    of_folders = ("label", *values)
    if taken := [column for column in described if column in of_folders]:
        say(f"{name}.columns: {', '.join(taken)} of {', '.join(found.metadata[:3])}, not of the folders")
    others = [column for column in config.columns if column not in (*described, *of_folders)]
    beside, version = list_beside(found, images, others)
    unknown = [column for column in others if column_beside(extension_of(column)) not in beside]
    refuse_unknown(unknown, of_folders, found.metadata, name, config.uri)
    columns = {"label": numbered.take(indices)}
    for column in ("label_name", *(column for column in values if column in config.columns)):
        # In parts: an array of strings can hold 2 GiB, which 240 million short names exceed; Arrow reports no error.
        texts = pa.array(values[column], pa.string())
        parts = [texts.take(indices.slice(start, 2**20)) for start in range(0, len(indices), 2**20)]
        columns[column] = pa.chunked_array(parts, pa.string())
    columns |= described
    types = {column: values.type for column, values in columns.items()}
    for column in others:
        how = beside[column_beside(extension_of(column))]
        where = f"the files .{extension_of(column)} beside images of {config.uri}"
        types[column] = type_beside(found.root, images["file"], how, column, name, where)
    about = about_of(found, uri, pa.schema(types.items()), {}, labels=list(numbers), described=list(described))
    more = {version_column(found.kind): version, **columns, **beside}
    return FileSource(make_listing(about, images["file"], size=images["size"], more=more))
