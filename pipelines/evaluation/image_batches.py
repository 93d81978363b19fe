"""Read images for evaluation with CPU tasks, in batches that are the same for any number of workers."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from litevae.images import ImageError, ImageTransform
from pipelines.data.source import Source
from pipelines.runtime.actor_pool import spread
from pipelines.runtime.cluster import outside_placement_groups


class UnreadableImage(NamedTuple):
    """An image that was left out: its id, the error class, and the details."""

    id: str
    reason: str
    message: str


class PixelBatch(NamedTuple):
    """A batch of images.

    Attributes:
        pixels: uint8 (n, H, W, 3) of the images that could be read.
        units: the units of these images.
        bad: the images that could not be read.
    """

    pixels: np.ndarray
    units: list[int]
    bad: list[UnreadableImage]


def process_batches(
    units: Sequence[int],
    call: Callable[[Any, Any, list[Sequence[int]]], Any],
    source: Source,
    transform: ImageTransform,
    batch_size: int,
    actors: list[Any],
    decoders: int,
) -> Iterator[Any]:
    """Read images in batches, hand them to a pool of actors, and yield the results in the order of units.

    Args:
        units: the images of the source to read.
        call: `call(actor, read, batches)` starts the work and returns an object reference to its result. `read` is an
            object reference to a list with a `PixelBatch` for each of `batches`.
        source: where the images come from.
        transform: how they become pixels.
        batch_size: images per batch.
        actors: the pool.
        decoders: number of reading tasks at a time.
    """
    import ray

    shared = ray.put(source)
    read = ray.remote(_read).options(num_cpus=1, scheduling_strategy=outside_placement_groups())
    ahead = 1 + -(-decoders // len(actors))  # one is measured while the others are read
    parts = chunks(units, batch_size, transform.resolution, len(actors))
    return spread(actors, lambda actor, part: call(actor, read.remote(shared, transform, part), part), parts, ahead)


def chunks(units: Sequence[int], batch_size: int, resolution: int, workers: int) -> list[list[Sequence[int]]]:
    """Group batches into chunks, each of which one task reads.

    A chunk has adjacent batches, because a Parquet row group is read as a whole. It has at most 64 MiB of pixels (but
    at least one batch), and there are at least four chunks per worker if there are enough batches. The batches are the
    same for any number of workers.
    """
    batches = [units[start : start + batch_size] for start in range(0, len(units), batch_size)]
    count = max(1, min(64 * 2**20 // (batch_size * resolution**2 * 3), len(batches) // (4 * workers)))
    return [batches[start : start + count] for start in range(0, len(batches), count)]


def evenly_spaced(units: Sequence[int], count: int) -> Sequence[int]:
    """Return `count` of the units, evenly spaced: if images are ordered by class, the first ones show few classes."""
    return units if count == len(units) else [units[number * len(units) // count] for number in range(count)]


def describe_unreadable(bad: list[UnreadableImage], limit: int = 5) -> str:
    """Return a text with the first `limit` of these images and their reasons, and the number of all others."""
    names = [f"{entry.id} ({entry.reason})" for entry in bad[:limit]]
    return ", ".join(names) + (f" and {len(bad) - limit} more" if len(bad) > limit else "")


def _read(source: Source, transform: ImageTransform, batches: list[Sequence[int]]) -> list[PixelBatch]:
    return [_read_batch(source, transform, units) for units in batches]


def _read_batch(source: Source, transform: ImageTransform, units: Sequence[int]) -> PixelBatch:
    pixels, good, bad = [], [], []
    for unit in units:
        try:
            pixels.append(transform(source.data(unit)).pixels)
            good.append(unit)
        except ImageError as error:
            bad.append(UnreadableImage(source.id(unit), error.reason, str(error)))
    size = transform.resolution
    return PixelBatch(np.stack(pixels) if pixels else np.empty((0, size, size, 3), np.uint8), good, bad)
