"""The listings of a cache: what its source held when the cache was started, and what was appended since."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from litevae import cache
from litevae.errors import UserError
from pipelines.data.growth import Growth, compare, update, with_types
from pipelines.data.open_source import open_source, restore
from pipelines.data.source import Source
from pipelines.encoding.config import Encode
from pipelines.encoding.partition import Partition
from pipelines.encoding.plan import CachePlan, source_settings
from pipelines.runtime.logs import say


@dataclass(frozen=True)
class Inputs:
    """What a cache is made from.

    Attributes:
        sources: the source of each listing.
        identity: `Source.identity` as the cache records it.
        new: a further listing to append; None if there is none.
        changed: numbers of the units whose images were written again, and are to be encoded again.
    """

    sources: list[Source]
    identity: dict[str, Any]
    new: pa.Table | None = None
    changed: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


def inputs_of(config: Encode, out: str, before: CachePlan | None) -> Inputs:
    """Return what a cache is made from. An existing cache is compared with its source as it is now.

    Args:
        config: the job's config.
        out: the cache folder.
        before: the plan of the cache; None for a new cache.

    Raises:
        UserError: if the source can't be opened, if `out` lies within it, or if inputs have changed since they were
            listed, and the config asks for more inputs but does not say what becomes of the changed ones.
    """
    listings = cache.read_listings(out) if before else []
    fresh = open_source(config.source, labels=restore(listings[-1]).labels if listings else ())
    if out == fresh.uri or out.startswith(fresh.uri + "/"):
        raise UserError(f"out={config.out} lies within the source; give a folder outside {fresh.uri}")
    if not before or not listings:
        return Inputs([fresh], fresh.identity)
    growth = compare(listings, fresh)
    if before.described_source() != source_settings(config) and (growth.changed or growth.gone):
        return Inputs([fresh], fresh.identity)  # another source, which `CachePlan.write` refuses
    _say_growth(growth, config, fresh.uri, growth.changed > 0 and _can_be_encoded_again(listings, fresh))
    same = {key: before.source[key] for key in ("digest", "units")}
    changed = np.empty(0, np.int64)
    if config.append and growth.changed and config.changed == "encode":
        listings, changed = update(listings, fresh)
    new = with_types(growth.new, restore(listings[0]).schema) if growth.new.num_rows and config.append else None
    return Inputs([restore(listing, fresh.uri) for listing in listings], fresh.identity | same, new, changed)


def _can_be_encoded_again(listings: list[pa.Table], fresh: Source) -> bool:
    """Return whether what changed files hold now can take the place of what they held."""
    try:
        update(listings, fresh)
    except UserError:
        return False
    return True


def _say_growth(growth: Growth, config: Encode, uri: str, again: bool) -> None:
    """Say how the source differs from its listings.

    Args:
        growth: the differences.
        config: the job's config.
        uri: the source.
        again: whether what has changed can be encoded again.

    Raises:
        UserError: if inputs have changed, and the config does not say what becomes of them.
    """
    if growth.changed and config.append and config.changed == "refuse":
        way = "changed=encode to encode them again" if again else "encode into a new folder: some hold other images"
        raise UserError(
            f"{growth.changed:,} files of {uri} were written again since they were listed ({growth.examples}). Give "
            f"changed=keep to leave their latents as they are, or {way}"
        )
    hints = []
    if growth.new.num_rows and not config.append:
        hints.append("--append adds what is new")
    if again and not config.append:
        hints.append("--append changed=encode encodes again what has changed")
    if growth.grown:
        hints.append(
            f"{growth.grown:,} images that changed files hold in other places than before are not added; encode into a "
            f"new folder to have them"
        )
    if growth.changed or growth.gone or hints:
        named = f" ({growth.examples})" if growth.examples else ""
        say(
            f"the source has changed since it was listed: {growth.units:,} inputs new, {growth.changed:,} files "
            f"changed, {growth.gone:,} gone{named}" + "".join(f"; {hint}" for hint in hints),
            "WARNING",
        )


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
    left_out = sources[-1].left_out  # each listing counts all that is left out, so that the newest one counts
    total = {"digest": joined, "units": partition.units, "shards": len(partition), "listings": listed}
    total |= {"seen": partition.units + left_out.total, "left_out": left_out.to_json()}
    return sources[0].identity | total
