"""Compare a source with earlier listings of it: what is new, what was written again, and what is gone."""

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from litevae.errors import UserError
from pipelines.data.beside import is_beside
from pipelines.data.column_types import plain, widest
from pipelines.data.discovery import shown_path
from pipelines.data.open_source import restore
from pipelines.data.source import LISTING, Source, digest_of, packed_schema, version_column, with_about


@dataclass(frozen=True)
class Growth:
    """How a source differs from its earlier listings.

    Attributes:
        new: the groups of files that were not listed before, or that have only grown, as a listing that `restore`
            takes.
        grown: number of images in groups that changed files have, and did not have before. They may be images that were
            listed in other groups, so that they are never added.
        changed: number of files that were written again: their size, their number of rows, or their version differs.
            For images of a folder or a list also those whose values in the list, in metadata files or in the texts
            beside them differ.
        gone: number of files that no longer exist, or hold fewer groups.
        examples: up to 5 changed or missing files, the changed ones first.
    """

    new: pa.Table
    grown: int
    changed: int
    gone: int
    examples: str

    @property
    def units(self) -> int:
        """The number of new images."""
        return pc.sum(self.new["rows"]).as_py() or 0


def compare(old: list[pa.Table], new: Source) -> Growth:
    """Compare the groups of a source with those of earlier listings. A group is known by its `file` and `offset`.

    Versions of files are compared only where both listings have them, and only if the source is where it was: a copy of
    it has other times.
    """
    every = pa.concat_tables(
        _with_facts(table, new.root)
        .append_column("new", [np.full(len(table), table is new.listing)])
        .append_column("place", [np.arange(len(table))])
        for table in [*old, new.listing]
    ).combine_chunks()
    order = [(key, "ascending") for key in ("file", "offset", "new")]
    every = every.take(pc.sort_indices(every, sort_keys=order)).combine_chunks()
    is_new = every["new"].to_numpy()
    pairs = _repeats(every, "file", "offset") & ~is_new[:-1] & is_new[1:]
    known = np.append(False, pairs) | np.append(pairs, False)
    changed = np.flatnonzero(pairs & ~_repeats(every, "rows", "size", "version", "values"))
    gone = np.flatnonzero(~is_new & ~known)
    changed_files, gone_files = (every["file"].take(pa.array(rows)).unique() for rows in (changed, gone))
    of_changed = pc.is_in(every["file"], value_set=changed_files).to_numpy()
    added = np.sort(every["place"].to_numpy()[is_new & ~known & ~of_changed])
    grown = int(every["rows"].to_numpy()[is_new & ~known & of_changed].sum())
    examples = [shown_path(file.as_py()) for file in [*changed_files[:5], *gone_files[:5]][:5]]
    table = new.listing.take(pa.array(added))
    about = json.loads(table.schema.metadata[b"source"])
    table = with_about(table, about | {"digest": digest_of(table, about)})
    return Growth(table, grown, len(changed_files), len(gone_files), ", ".join(dict.fromkeys(examples)))


def _with_facts(listing: pa.Table, root: str) -> pa.Table:
    """Return the columns that all listings have, and two that are null where they are unknown or say nothing.

    They are `version`, of the file; and `values`, one text of all values that are in the listing and not in the file.
    """
    table = listing.select(LISTING.names).cast(LISTING)
    about = json.loads(listing.schema.metadata[b"source"])
    version = version_column(about["kind"])
    known = version in listing.column_names and about["root"] == root
    table = table.append_column("version", listing[version] if known else pa.nulls(len(table), pa.int64()))
    names: list[str] = []
    if about["kind"] == "list":
        names = [name for name in listing.column_names if name not in (*LISTING.names, version)]
    elif about["kind"] == "folder":
        names = about.get("described", []) + [name for name in listing.column_names if is_beside(name)]
    if not names:
        return table.append_column("values", pa.nulls(len(table), pa.large_binary()))
    end, null = pa.scalar(b"\0", pa.large_binary()), b"\1"
    columns = [_as_bytes(listing[name]) for name in sorted(names)]
    values = pc.binary_join_element_wise(*columns, end, null_handling="replace", null_replacement=null)
    return table.append_column("values", values)


def _as_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return values as bytes. A whole number has the same ones in any type."""
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        return column.cast(pa.large_binary())
    text = column.cast(pa.large_string())
    if pa.types.is_floating(column.type):
        text = pc.replace_substring_regex(text, r"\.0$", "")
    return text.cast(pa.large_binary())


def with_types(listing: pa.Table, earlier: pa.Schema) -> pa.Table:
    """Return a listing whose columns have the types of an earlier listing, which are those of the cache's rows.

    Raises:
        UserError: if values of a column don't fit the type that it has there.
    """
    about = json.loads(listing.schema.metadata[b"source"])
    now = restore(listing).schema
    if now.equals(earlier) or now.names != earlier.names:  # other names are another plan, which is refused
        return listing
    for field in earlier:
        held, kind = now.field(field.name).type, plain(field.type)
        in_listing = field.name in listing.column_names  # other values are read, and checked, later
        if in_listing and held != field.type:
            column = _recast(listing[field.name], kind)
            fits = column is not None
            if column is not None:
                listing = listing.set_column(listing.column_names.index(field.name), field.name, column)
        else:
            fits = widest([held, kind]) == kind or (pa.types.is_integer(held) and pa.types.is_floating(kind))
        if not fits:
            raise UserError(
                f"column {field.name!r} holds {held} with what is new in {about['uri']}, and {field.type} in the "
                f"cache; encode into a new folder"
            )
    about["schema"] = packed_schema(earlier)
    return with_about(listing, about | {"digest": digest_of(listing, about)})


def _recast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray | None:
    """Return a column of another type, or None if its values would not be the same."""
    try:
        found = column.cast(kind)
        return found if found.cast(column.type).equals(column) else None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def update(old: list[pa.Table], new: Source) -> tuple[list[pa.Table], np.ndarray]:
    """Return earlier listings with the groups that were written again as they are now.

    Args:
        old: the earlier listings.
        new: the source as it is now.

    Returns:
        The listings; and the numbers of the units, counted over all listings, whose images may have changed.

    Raises:
        UserError: if a file holds another number of images than before, or holds them in other groups, which would be
            other units.
    """
    fresh = _with_facts(new.listing, new.root)
    known = pa.concat_tables(_with_facts(table, new.root) for table in old).combine_chunks()
    keys, now = _keys(known), _keys(fresh)
    places = pc.index_in(keys, value_set=now)
    there = places.is_valid().to_numpy()
    row_of = places.fill_null(0).to_numpy().astype(np.int64)
    pair = fresh.take(pa.array(row_of))
    same = {name: pc.fill_null(pc.equal(known[name], pair[name]), True).to_numpy() for name in known.column_names}
    changed = there & ~(same["rows"] & same["size"] & same["version"] & same["values"])
    files = known["file"].filter(pa.array(changed)).unique()
    lost = pc.is_in(known["file"], value_set=files).to_numpy() & ~(there & same["rows"])
    added = pc.is_in(fresh["file"], value_set=files).to_numpy() & ~pc.is_in(now, value_set=keys).to_numpy()
    for table, odd in ((known, lost), (fresh, added)):
        if odd.any():
            file = shown_path(table["file"][int(np.flatnonzero(odd)[0])].as_py())
            raise UserError(
                f"{file} and perhaps others hold another number of images, or in other places, than when they were "
                f"listed; what they hold can't be encoded again in its place. Encode into a new folder"
            )
    rows = known["rows"].to_numpy().astype(np.int64)
    ends = np.cumsum(rows)
    units = [np.arange(ends[group] - rows[group], ends[group]) for group in np.flatnonzero(changed).tolist()]
    cuts = np.cumsum([len(table) for table in old])[:-1]
    parts = zip(old, np.split(changed, cuts), np.split(row_of, cuts), strict=True)
    return [_replaced(*part, new) for part in parts], np.concatenate([np.empty(0, np.int64), *units])


def _keys(listing: pa.Table) -> pa.ChunkedArray:
    """Return what a group is known by, in one column: its file and its offset."""
    offset = listing["offset"].cast(pa.string()).cast(pa.large_binary())
    return pc.binary_join_element_wise(listing["file"], offset, pa.scalar(b"\0", pa.large_binary()))


def _replaced(table: pa.Table, changed: np.ndarray, row_of: np.ndarray, new: Source) -> pa.Table:
    """Return a listing with the changed rows of the new one."""
    version = version_column(new.kind)
    if version not in table.column_names:
        table = table.append_column(version, pa.nulls(len(table), pa.int64()))
    try:
        fresh = new.listing.select(table.column_names).cast(table.schema.remove_metadata())
    except pa.ArrowInvalid as error:
        raise UserError(
            f"values of {new.uri} no longer fit the type that they had when they were listed: {error}; encode into a "
            f"new folder"
        ) from None
    both = pa.concat_tables([table.replace_schema_metadata(None), fresh.replace_schema_metadata(None)])
    rows = np.where(changed, len(table) + row_of, np.arange(len(table)))
    about = json.loads(table.schema.metadata[b"source"]) | {"left_out": new.left_out.to_json()}
    found = both.take(pa.array(rows))
    return with_about(found, about | {"digest": digest_of(found, about)})


def _repeats(table: pa.Table, *columns: str) -> np.ndarray:
    """Return, for each row but the last, whether it equals the next row in these columns, where both have a value."""
    pairs = [(table[name].slice(0, len(table) - 1), table[name].slice(1)) for name in columns]
    equal = [pc.fill_null(pc.equal(*pair), True).to_numpy() for pair in pairs]
    return np.logical_and.reduce(equal)
