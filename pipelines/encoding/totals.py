"""Running totals of an encode job, and how many images may be lost before it stops."""

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from litevae.errors import UserError

STAGES = ("decode", "encode")


@dataclass
class EncodeTotals:
    """What an encode job has done so far, from the commits of its shards.

    Attributes:
        images: images of the source.
        slots: how many tasks or actors of each stage work at a time.
        done: images of committed shards, those in quarantine included.
        encoded: images that this run has encoded.
        reasons: how many images are in quarantine, by reason.
        devices: names of the devices that have encoded.
        seconds: seconds that each stage has worked, over all its tasks or actors.
        started: `time.monotonic()` at the start.
    """

    images: int
    slots: Mapping[str, int]
    done: int = 0
    encoded: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    devices: set[str] = field(default_factory=set)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    started: float = field(default_factory=lambda: time.monotonic())
    _shards: list[tuple[float, int]] = field(default_factory=list)  # when each was finished, and its encoded images

    def add_earlier(self, commit: Mapping[str, Any]) -> None:
        """Count a shard that was committed before this run."""
        self.done += commit["units"][1] - commit["units"][0]
        self.reasons.update(commit.get("reasons", {}))

    def add(self, row: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
        """Count a shard that an `Encoder` has just committed.

        Args:
            row: what the encoder returned.

        Returns:
            How many images it encoded, and how many were lost, by reason.
        """
        commit = json.loads(row["commit"])
        encoded = commit["units"][1] - commit["units"][0] - commit["quarantined"]
        self.add_earlier(commit)
        self.encoded += encoded
        self.devices.add(row["device"])
        self._shards.append((row["finished"], encoded))
        for stage in STAGES:
            self.seconds[stage] += row[f"{stage}_seconds"]
        return encoded, commit.get("reasons", {})

    def busy(self, seconds: float | None = None) -> dict[str, float]:
        """The share of the run's time, 0 to 1, in which each stage's tasks or actors worked.

        Args:
            seconds: how long the run took; None: until now.
        """
        seconds = time.monotonic() - self.started if seconds is None else seconds
        return {stage: self.seconds[stage] / self.slots[stage] / seconds for stage in STAGES}

    def summary(self) -> dict[str, Any]:
        """Numbers for the job's table and its tracked run: images, seconds, images per second, busy shares, devices."""
        seconds = time.monotonic() - self.started
        # The steady rate leaves out the start of the actors: it is that from the first finished shard to the last.
        shards = sorted(self._shards)
        steady = sum(images for _, images in shards[1:]) / (shards[-1][0] - shards[0][0]) if shards[1:] else 0.0
        return {
            "encoded_now": self.encoded,
            "seconds": round(seconds, 3),
            "images_per_s": round(self.encoded / seconds, 3),
            "steady_images_per_s": round(steady, 3),
            **{f"{stage}_busy": round(share, 3) for stage, share in self.busy(seconds).items()},
            "devices": sorted(self.devices),
        }


def check_budget(reasons: Mapping[str, int], budget: float, out: str, total: int, name: str = "error_budget") -> None:
    """Stop a job that loses too many images.

    Args:
        reasons: how many images are in quarantine, by reason.
        budget: the share of images, 0 to 1, that may be.
        out: the cache's folder.
        total: images of the source.
        name: the config field that sets the budget.

    Raises:
        UserError: more images are in quarantine than the budget allows.
    """
    quarantined = sum(reasons.values())
    if quarantined > budget * total:
        raise UserError(
            f"{quarantined} of {total} images could not be encoded ({listed_reasons(reasons)}), more than {name}="
            f"{budget:g} allows; they are listed in {out}/quarantine. Mend them, or raise the budget and "
            f"run again: it goes on"
        )


def listed_reasons(reasons: Mapping[str, int]) -> str:
    """ "2 corrupt, 1 empty", in alphabetical order."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
