"""Open a source of any kind, and restore a source from its listing."""

import json
from collections.abc import Callable, Sequence

import pyarrow as pa

from litevae import storage
from litevae.errors import UserError
from pipelines.data.beside import suffixes_beside
from pipelines.data.config import Source as SourceConfig
from pipelines.data.discovery import find, root_of
from pipelines.data.file_source import FileSource
from pipelines.data.folder import list_folder
from pipelines.data.parquet import ParquetSource, list_parquet
from pipelines.data.path_list import list_paths
from pipelines.data.source import Source, with_about
from pipelines.data.unusable import explain_uri
from pipelines.data.webdataset import TarSource, list_tars
from pipelines.runtime.logs import say


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
        raise UserError(f"{name}.uri: {error}{explain_uri(config.uri)}") from None
    found = find(uri, f"{name}.uri={config.uri}", beside=suffixes_beside(config))
    if config.split and found.kind == "list":
        raise UserError(f"{name}.split={config.split}: a list has no splits; write a list for each")
    if found.kind == "folder":
        source = list_folder(found, uri, config, name, labels)
    else:
        kinds = {"parquet": list_parquet, "webdataset": list_tars, "list": list_paths}
        source = kinds[found.kind](found, uri, config, name)
    say(f"{name}.uri={config.uri}: {source.accounted()}")
    return source


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
