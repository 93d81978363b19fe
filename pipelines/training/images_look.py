"""A look at some images, and at the range of the labels, before a training starts."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from litevae.cache import LatentCache
from litevae.errors import UserError
from litevae.images import ImageError, ImageTransform
from pipelines.data.label_range import label_range, range_in_files
from pipelines.data.source import Item, Source
from pipelines.runtime.logs import say

IMAGES = 16  # evenly spaced over the source
THREADS = 8


def check_images(source: Source, transform: ImageTransform, name: str) -> list[Item]:
    """Read and decode some images of a source, evenly spaced, and say which can't be read.

    Args:
        source: the source.
        transform: what the training does with its images.
        name: the name of the source's config section, for messages.

    Returns:
        The images that can be read.

    Raises:
        UserError: if none of them can be read.
    """
    units = np.unique(np.linspace(0, source.units - 1, IMAGES).round().astype(int)).tolist()

    def look(unit: int) -> Item | str:
        try:
            item = source.read(unit)
            if item.lost:
                raise ImageError("unreadable", "; ".join(f"column {key!r}: {why}" for key, why in item.lost.items()))
            transform(item.data, seed=0)
        except ImageError as error:
            return f"{source.id(unit)} ({error.reason}: {error})"
        return item

    with ThreadPoolExecutor(THREADS) as threads:
        found = list(threads.map(look, units))
    bad = [each for each in found if isinstance(each, str)]
    few = "; ".join(bad[:3]) + ("; ..." if len(bad) > 3 else "")
    if len(bad) == len(units):
        raise UserError(f"{name}.uri={source.uri}: none of {len(units)} images, evenly spaced, can be read: {few}")
    if bad:
        say(
            f"warning: {len(bad)} of {len(units)} images, evenly spaced over {source.uri}, can't be read: {few}. "
            f"Such images are left out, and training stops if they are more than max_bad allows",
            "WARNING",
        )
    return [each for each in found if isinstance(each, Item)]


def check_labels(classes: int, label: str, where: Source | LatentCache, items: Sequence[Item] = ()) -> None:
    """Check the range of a label column against the number of classes.

    It is known from the listing or from the statistics of Parquet files. Of tars and of texts beside images it is not;
    there only the labels of some images are checked.

    Args:
        classes: number of classes; 0: nothing is checked.
        label: name of the column, which holds integers.
        where: the source or the cache.
        items: some images of the source.

    Raises:
        UserError: if a label is negative, or not smaller than the number of classes.
    """
    if not classes:
        return
    if isinstance(where, Source):
        path, ends = where.uri, label_range(where, label)
    else:
        path, ends = where.path, range_in_files(where.files, label)
    if ends is None:
        seen: list[Any] = [value for item in items if (value := item.columns.get(label)) is not None]
        ends = (min(seen), max(seen)) if seen else (0, 0)
    least, largest = ends
    if least < 0:
        raise UserError(
            f"column {label!r} of {path} holds {least}; classes are integers from 0 on; an image without one has null"
        )
    if largest >= classes:
        raise UserError(
            f"column {label!r} of {path} holds labels up to {largest}, but classes={classes} allows 0 to "
            f"{classes - 1}; give classes={largest + 1}"
        )
