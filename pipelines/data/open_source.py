"""Open a source of any kind, restore a source from its listing, and compare a source with earlier listings."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from litevae import storage
from litevae.errors import UserError
from pipelines.data.config import Source as SourceConfig
from pipelines.data.discovery import find, root_of, shown_path
from pipelines.data.folder import FileSource, list_folder
from pipelines.data.parquet import ParquetSource, list_parquet
from pipelines.data.path_list import list_paths
from pipelines.data.source import LISTING, Source, digest_of, with_about
from pipelines.data.webdataset import TarSource, list_tars


def open_source(config: SourceConfig, name: str = "source", labels: Sequence[str] = ()) -> Source:
    """List a source of any kind.

    Args:
        config: the source's config section.
        name: the name of that section, for error messages.
        labels: class names that have numbers already (`Source.labels` of an earlier listing). New ones are numbered
            after them.

    Raises:
        UserError: if the path does not exist, holds no images, lacks a column, or can't be used for another reason.
    """
    if not config.uri:
        raise UserError(f"{name}.uri is empty; give a folder of images or Parquet file(s): {name}.uri=/data/photos")
    try:
        uri = storage.absolute(config.uri)
    except UserError as error:
        raise UserError(f"{name}.uri: {error}") from None
    found = find(uri, f"{name}.uri={config.uri}")
    if config.split and found.kind != "parquet":
        raise UserError(
            f"{name}.split={config.split}: only Parquet sources have splits, and {config.uri} is not Parquet"
        )
    if found.kind == "folder":
        return list_folder(found, uri, config, name, labels)
    return {"parquet": list_parquet, "webdataset": list_tars, "list": list_paths}[found.kind](found, uri, config, name)


def restore(listing: pa.Table, uri: str = "") -> Source:
    """Return the source of a listing without listing the files again.

    Args:
        listing: a source's `listing`.
        uri: where the files are now, if they were moved.
    """
    about = json.loads(listing.schema.metadata[b"source"])
    uri = storage.absolute(uri) if uri else about["uri"]
    if uri != about["uri"]:
        listing = with_about(listing, about | {"uri": uri, "root": root_of(uri)})
    kinds: dict[str, Callable[[pa.Table], Source]] = {
        "folder": FileSource,
        "list": FileSource,
        "parquet": ParquetSource,
        "webdataset": TarSource,
    }
    return kinds[about["kind"]](listing)


# --- listings -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Growth:
    """How a source differs from its earlier listings.

    Attributes:
        new: the groups that were not listed before, as a listing that `restore` takes.
        changed: number of groups whose size or number of rows has changed.
        gone: number of groups that no longer exist.
        examples: the files of up to 5 changed or missing groups, the changed ones first.
    """

    new: pa.Table
    changed: int
    gone: int
    examples: str


def compare(old: list[pa.Table], new: Source) -> Growth:
    """Compare the groups of a source with those of earlier listings. A group is known by its `file` and `offset`."""
    every = pa.concat_tables(
        table.select(LISTING.names)
        .cast(LISTING)
        .append_column("new", [np.full(len(table), table is new.listing)])
        .append_column("place", [np.arange(len(table))])
        for table in [*old, new.listing]
    ).combine_chunks()
    order = [(key, "ascending") for key in ("file", "offset", "new")]
    every = every.take(pc.sort_indices(every, sort_keys=order)).combine_chunks()
    is_new = every["new"].to_numpy()
    pairs = _repeats(every, "file", "offset") & ~is_new[:-1] & is_new[1:]
    known = np.append(False, pairs) | np.append(pairs, False)
    changed = np.flatnonzero(pairs & ~_repeats(every, "rows", "size"))
    gone = np.flatnonzero(~is_new & ~known)
    added = np.sort(every["place"].to_numpy()[is_new & ~known])
    examples = [shown_path(every["file"][int(row)].as_py()) for row in [*changed, *gone][:5]]
    table = new.listing.take(pa.array(added))
    about = json.loads(table.schema.metadata[b"source"])
    table = with_about(table, about | {"digest": digest_of(table, about)})
    return Growth(table, len(changed), len(gone), ", ".join(examples))


def _repeats(table: pa.Table, *columns: str) -> np.ndarray:
    """Return, for each row but the last, whether it equals the next row in these columns."""
    equal = [pc.equal(table[name].slice(0, len(table) - 1), table[name].slice(1)).to_numpy() for name in columns]
    return np.logical_and.reduce(equal)
