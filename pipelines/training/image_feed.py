"""Training images, read in a shuffled order; the position in that order seeds the random crop and mirroring."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from litevae.errors import UserError
from litevae.images import ImageError, ImageTransform
from litevae.loader import stream
from litevae.order import VERSION, EpochOrder, batch_positions, seed_for
from pipelines.data.source import Source
from pipelines.runtime.logs import say
from pipelines.training import ranks


class Picture(NamedTuple):
    """A transformed image, with its id and the other columns of its row in the source.

    Attributes:
        id: the image's id in the source.
        pixels: uint8 (H, W, 3).
        columns: what the source carries with the image, for example its label.
    """

    id: str
    pixels: np.ndarray
    columns: dict[str, Any]


class Images:
    """Images of a source in an endless shuffled order. An unreadable image is replaced by the next readable one.

    Args:
        source: the source of the images.
        transform: resizes, crops and mirrors each image.
        seed: seed of the order, and with the position of each random crop and mirroring.
        loaders: number of decoding threads; 0: decode between the steps.
        max_bad: largest share of unreadable images that `check` accepts, 0 to 1.
        version: version of the order; see `litevae.order.VERSION`.

    Attributes:
        order: maps a position to a row of the source.
        bad: the reason for each unreadable image that this rank has met, by image id.
    """

    def __init__(
        self,
        source: Source,
        transform: ImageTransform,
        seed: int,
        loaders: int,
        max_bad: float,
        version: int = VERSION,
    ):
        self._source, self._transform, self._seed = source, transform, seed
        self._loaders, self._max_bad = loaders, max_bad
        self.order = EpochOrder(source.groups, seed, source.window, version)
        self.bad: dict[str, str] = {}

    def load(self, place: tuple[int, int]) -> Picture:
        """Read and transform the image for a (position, row), or the next readable one.

        Args:
            place: the position, which seeds the transform, and the source's row.

        Raises:
            UserError: if no image of the source can be read.
        """
        position, row = place
        for _ in range(self._source.units):
            try:
                item = self._source.read(row)
                if item.lost:  # else an image of a class would be taken for one without
                    raise ImageError(
                        "unreadable", "; ".join(f"column {name!r}: {why}" for name, why in item.lost.items())
                    )
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
        """Yield this rank's part of each batch from position `start` up to `end`; the last batch is whole too.

        Args:
            batch: images per batch over all ranks. This rank takes every `world`-th one, from number `rank` on.
        """
        steps = batch_positions(start, end, batch)
        places = ([(position, self.order.index(position)) for position in step[rank::world]] for step in steps)
        return stream(self.load, places, self._loaders)

    def count_bad(self, world: int) -> int:
        """Return how many different unreadable images the ranks have met so far. All ranks must call this together."""
        return len(set(ranks.gathered([*self.bad], world)))

    def check(self, bad: int) -> None:
        """Check the number of unreadable images against `max_bad`.

        Args:
            bad: unreadable images over all ranks, as `count_bad` returns them.

        Raises:
            UserError: if more images are unreadable than `max_bad` allows.
        """
        if bad > self._max_bad * self._source.units:
            some = "; ".join(f"{name} ({reason})" for name, reason in list(self.bad.items())[:3])
            raise UserError(
                f"{bad} of {self._source.units} images can't be read, more than data.max_bad={self._max_bad:g} "
                f"allows: {some or 'named above'}. Remove them, or raise data.max_bad"
            )
