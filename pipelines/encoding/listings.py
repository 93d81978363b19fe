"""The listings of a cache: what its source held when the cache was started, and what was appended since."""

import hashlib
from typing import Any

import pyarrow as pa

from litevae import cache
from litevae.errors import UserError
from pipelines.data.open_source import compare, open_source, restore
from pipelines.data.source import Source
from pipelines.encoding.config import Encode
from pipelines.encoding.partition import Partition
from pipelines.encoding.plan import CachePlan, source_settings
from pipelines.runtime.logs import say


def inputs_of(
    config: Encode, out: str, before: CachePlan | None, finished: bool
) -> tuple[list[Source], dict[str, Any], pa.Table | None]:
    """Return the sources of a cache, their identity, and the listing of what is to be appended, if anything.

    An unfinished cache continues with the listing that it was started with. A finished cache is compared with its
    source as it is now.

    Args:
        config: the job's config.
        out: the cache folder.
        before: the plan of the cache; None for a new cache.
        finished: whether the cache has a manifest.

    Raises:
        UserError: if the source can't be opened, if `out` lies within it, or if inputs have changed since they were
            listed and `append` is set.
    """
    listings = cache.read_listings(out) if before else []
    if before and listings and before.settings.source == source_settings(config) and not finished and not config.append:
        return [restore(listing) for listing in listings], before.source, None
    fresh = open_source(config.source, labels=restore(listings[-1]).labels if listings else ())
    if out == fresh.uri or out.startswith(fresh.uri + "/"):
        raise UserError(f"out={config.out} lies within the source; give a folder outside {fresh.uri}")
    if not before or not listings:
        return [fresh], fresh.identity, None
    growth = compare(listings, fresh)
    if before.settings.source != source_settings(config) and (growth.changed or growth.gone):
        return [fresh], fresh.identity, None  # another source, which `CachePlan.write` refuses
    if growth.changed and config.append:
        raise UserError(
            f"{growth.changed} inputs of {fresh.uri} have changed since they were listed ({growth.examples}); "
            f"--append can only add. Restore them, or encode into a new folder"
        )
    if growth.changed or growth.gone or (growth.new.num_rows and not config.append):
        hint = "; --append adds what is new" if growth.new.num_rows and not config.append else ""
        say(
            f"the source has changed since it was listed: {growth.new.num_rows:,} inputs new, {growth.changed:,} "
            f"changed, {growth.gone:,} gone{hint}",
            "WARNING",
        )
    same = {key: before.source[key] for key in ("digest", "units")}
    new = growth.new if growth.new.num_rows and config.append else None
    return [restore(listing, fresh.uri) for listing in listings], fresh.identity | same, new


def open_listings(out: str, uri: str = "") -> list[Source]:
    """Return the sources of a cache, restored from its own listings.

    Args:
        out: the cache folder.
        uri: where the source is now, if it was moved.
    """
    return [restore(listing, uri) for listing in cache.read_listings(out)]


def source_of(partition: Partition) -> dict[str, Any]:
    """Return what the manifest says of the source: identity, digest and number of all inputs that were listed."""
    sources = partition.sources
    digests = [source.digest for source in sources]
    joined = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
    listed = [{"uri": source.uri, "digest": source.digest, "units": source.units} for source in sources]
    total = {"digest": joined, "units": partition.units, "shards": len(partition), "listings": listed}
    return sources[0].identity | total
