"""Look at a few images before a job starts Ray: how many can't be read, how long decoding takes, and whether there is
room for their latents."""

import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from litevae import storage
from litevae.any_autoencoder import load_autoencoder
from litevae.errors import UserError
from litevae.images import ImageTransform
from litevae.latents import downsampling
from litevae.shards import DTYPES
from pipelines.data.config import Views
from pipelines.data.decode import Lost, ShardTask, decode_carefully, transform_of
from pipelines.encoding.partition import Partition
from pipelines.encoding.plan import CachePlan
from pipelines.encoding.totals import listed_reasons
from pipelines.runtime import paths
from pipelines.runtime.logs import say

IMAGES = 32  # images that are looked at
SECONDS = 10.0  # after which no further image is looked at
SURE = 1e-4  # probability at which so many unreadable images are no accident of which ones were looked at
NAMED = 3  # images that are named


@dataclass
class Preview:
    """What was seen of the images that are to be encoded.

    Attributes:
        todo: how many images there are to encode.
        seen: how many of them were decoded, or tried to.
        lost: the ids of those that can't be read, and why.
        seconds: seconds that the images took together, on one core.
    """

    todo: int
    seen: int = 0
    lost: list[tuple[str, Lost]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def reasons(self) -> Counter[str]:
        """How many images are lost, by reason."""
        return Counter(why.reason for _, why in self.lost)


def look(partition: Partition, todo: Sequence[ShardTask], views: Views) -> Preview:
    """Decode a few images, spread evenly over those that are to be encoded, in a child process.

    An image that kills its decoder kills only the child.

    Args:
        partition: the images of the cache.
        todo: the shards to encode.
        views: which views to cut from each image.
    """
    units = _spread(partition, todo)
    found = Preview(sum(int(partition.sizes[task.shard]) for task in todo))
    begun = time.perf_counter()
    for source, own in partition.located(units):
        for unit, _, result in decode_carefully(source, views, own):
            found.seen += 1
            found.seconds = time.perf_counter() - begun
            if isinstance(result, Lost):
                found.lost.append((source.id(unit), result))
            if found.seconds > SECONDS:
                return found
    return found


def _spread(partition: Partition, todo: Sequence[ShardTask]) -> list[int]:
    """Return up to `IMAGES` units of these shards: one at random in each of as many equal parts, always the same."""
    ends, total = [], 0
    for task in todo:
        total += int(partition.sizes[task.shard])
        ends.append(total)
    count = min(IMAGES, total)
    dice, units, place = random.Random(0), [], 0
    for part in range(count):
        chosen = dice.randrange(part * total // count, (part + 1) * total // count)
        while chosen >= ends[place]:
            place += 1
        units.append(partition.first(todo[place].shard) + chosen - (ends[place - 1] if place else 0))
    return units


def judge(found: Preview, budget: float, total: int) -> None:
    """Say what can't be read, and refuse a job that would certainly lose more images than its budget allows.

    Args:
        found: what was seen.
        budget: the share of images, 0 to 1, that may be in quarantine.
        total: number of images in the cache.

    Raises:
        UserError: if that many of the images that were looked at can't be read that the job would not reach its end.
    """
    if not found.lost:
        return
    lost = len(found.lost)
    named = "; ".join(f"{name}: {why.message}" for name, why in found.lost[:NAMED])
    more = f"; and {lost - NAMED} more" if lost > NAMED else ""
    text = (
        f"{lost} of the {found.seen} images that were looked at can't be read ({listed_reasons(found.reasons)}), "
        f"and error_budget={budget:g} allows {int(budget * total):,} of {total:,}: {named}{more}"
    )
    if lost <= budget * total and _chance(found.seen, lost, budget) >= SURE:
        say(text, "WARNING")
        return
    column = ", or check source.image_column" if lost == found.seen else ""
    raise UserError(
        f"{text}. The job was not begun. Repair or remove such images{column}; or raise error_budget, which then puts "
        f"them into the cache's quarantine"
    )


def _chance(seen: int, lost: int, share: float) -> float:
    """Return how probable it is that at least `lost` of `seen` images are bad where this share of all images is."""
    return sum(math.comb(seen, n) * share**n * (1 - share) ** (seen - n) for n in range(lost, seen + 1))


def check_room(out: str, plan: CachePlan, images: int) -> None:
    """Check that a local disk has room for the latents of so many images.

    Raises:
        UserError: if it has not.
    """
    if not storage.is_remote(out) and (needed := images * latent_bytes(plan)):
        paths.check_free("out", out, needed, f"the latents of {images:,} images")


def latent_bytes(plan: CachePlan) -> int:
    """Return how many bytes the latents of an image take; 0 if the model's config does not tell its channels.

    With aspect-ratio buckets it is the smallest size.
    """
    model = load_autoencoder(plan.model.path)
    channels = plan.model.config.get("latent_channels")
    if not isinstance(channels, int):
        return 0
    transform: ImageTransform = transform_of(plan.views)
    pixels = min(height * width for height, width in transform.sizes)
    values = channels * (2 if plan.latents["content"] == "moments" else 1) * pixels // downsampling(model) ** 2
    return values * transform.views * int(DTYPES[plan.latents["dtype"]][-1])
