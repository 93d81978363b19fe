"""Opens a source of any kind, restores one from its listing, and compares one with earlier listings."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from litevae import storage
from litevae.errors import UserError
from pipelines.data.config import Source as SourceConfig
from pipelines.data.discovery import find, root_of
from pipelines.data.folder import FileSource, list_folder
from pipelines.data.parquet import ParquetSource, list_parquet
from pipelines.data.path_list import list_paths
from pipelines.data.source import LISTING, Source, digest_of, shown_path, with_about
from pipelines.data.webdataset import TarSource, list_tars


def open_source(config: SourceConfig, name: str = "source", labels: Sequence[str] = ()) -> Source:
    """
    Args:
        name: the config section, for messages.
        labels: class names that are numbered already, as `Source.labels` of an earlier listing: new ones come after.

    Raises:
        UserError: no such path, no images in it, no such column, ...
    """
    if not config.uri:
        raise UserError(f"{name}.uri is empty; give a folder of images or Parquet file(s): {name}.uri=/data/photos")
    try:
        uri = storage.absolute(config.uri)
    except UserError as error:
        raise UserError(f"{name}.uri: {error}") from None
    found = find(uri, f"{name}.uri={config.uri}")
    if config.split and found.kind != "parquet":
        raise UserError(f"{name}.split={config.split}: {config.uri} is no Parquet, only there are splits")
    if found.kind == "folder":
        return list_folder(found, uri, config, name, labels)
    return {"parquet": list_parquet, "webdataset": list_tars, "list": list_paths}[found.kind](found, uri, config, name)


def restore(listing: pa.Table, uri: str = "") -> Source:
    """The source of a listing. Nothing is listed again.

    Args:
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
    """What a source has become since it was listed.

    Attributes:
        new: groups that were not there, as a listing: `restore` makes a source of them.
        changed, gone: how many groups have another size now, or are not there any more.
        examples: files of up to 5 of these, the changed ones first.
    """

    new: pa.Table
    changed: int
    gone: int
    examples: str


def compare(old: list[pa.Table], new: Source) -> Growth:
    """A source's groups against those of earlier listings; the same `file` and `offset` make the same group."""
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
    """Which rows are equal to the next, in these columns."""
    equal = [pc.equal(table[name].slice(0, len(table) - 1), table[name].slice(1)).to_numpy() for name in columns]
    return np.logical_and.reduce(equal)
