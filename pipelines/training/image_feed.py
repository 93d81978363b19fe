"""Training images for an autoencoder: read, cropped and mirrored as their position in the data says."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from litevae.errors import UserError
from litevae.images import ImageError, ImageTransform
from litevae.loader import stream
from litevae.order import EpochOrder, batch_positions, seed_for
from pipelines.data.source import Source
from pipelines.runtime.logs import say
from pipelines.training import ranks


class Picture(NamedTuple):
    """An image as the transform gives it."""

    id: str
    pixels: np.ndarray  # uint8 (H, W, 3)
    columns: dict[str, Any]


class Images:
    """Positions of a source's endless order as images; the next readable image stands in for a bad one.

    Args:
        loaders: decoding threads.
        max_bad: share of unreadable images that is skipped.
    """

    def __init__(self, source: Source, transform: ImageTransform, seed: int, loaders: int, max_bad: float):
        self._source, self._transform, self._seed = source, transform, seed
        self._loaders, self._max_bad = loaders, max_bad
        self.order = EpochOrder(source.groups, seed, source.window)
        self.bad: dict[str, str] = {}

    def load(self, place: tuple[int, int]) -> Picture:
        """Of a (position, row)."""
        position, row = place
        for _ in range(self._source.units):
            try:
                item = self._source.read(row)
                pixels = self._transform(item.data, seed=seed_for(self._seed, position)).pixels
                return Picture(item.id, pixels, item.columns)
            except ImageError as error:
                name = self._source.id(row)
                if name not in self.bad:
                    self.bad[name] = f"{error.reason}: {error}"
                    say(f"skipped unreadable image {name} ({self.bad[name]})", "WARNING", image=name)
                row = (row + 1) % self._source.units
        raise UserError(f"no image of {self._source.uri} can be read")

    def batches(self, start: int, end: int, batch: int, rank: int, world: int) -> Iterator[list[Picture]]:
        steps = batch_positions(start, end, batch)
        places = ([(position, self.order.index(position)) for position in step[rank::world]] for step in steps)
        return stream(self.load, places, self._loaders)

    def count_bad(self, world: int) -> int:
        """Unreadable images that any rank has met; all ranks call this together."""
        return len(set(ranks.gathered([*self.bad], world)))

    def check(self, bad: int) -> None:
        """
        Raises:
            UserError: more images are unreadable than the config allows.
        """
        if bad > self._max_bad * self._source.units:
            some = "; ".join(f"{name} ({reason})" for name, reason in list(self.bad.items())[:3])
            raise UserError(
                f"{bad} of {self._source.units} images can't be read, more than data.max_bad={self._max_bad:g} "
                f"allows: {some or 'named above'}. Remove them, or raise data.max_bad"
            )
