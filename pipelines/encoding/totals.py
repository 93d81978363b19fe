"""Running totals of an encode job, and the check that stops it when it loses too many images."""

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
    """What an encode job has done so far, added up from the commits of its shards.

    Attributes:
        images: number of images in the source.
        slots: how many tasks ("decode") or actors ("encode") of each stage work at a time.
        done: number of images in committed shards, including those in quarantine.
        encoded: number of images that this run has encoded.
        earlier: number of images that this run has encoded in vain, because their shard had been committed before, by
            another driver or by an attempt of which Ray did not hear.
        reasons: number of images in quarantine, by reason.
        devices: names of the devices that have encoded.
        seconds: seconds that each stage has worked, summed over its tasks or actors.
        started: `time.monotonic()` at the start of the run.
    """

    images: int
    slots: Mapping[str, int]
    done: int = 0
    encoded: int = 0
    earlier: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    devices: set[str] = field(default_factory=set)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    started: float = field(default_factory=lambda: time.monotonic())
    _shards: list[tuple[float, int]] = field(default_factory=list)  # of each: Unix time of completion, encoded images

    def add_earlier(self, commit: Mapping[str, Any]) -> None:
        """Count a shard that was committed before this run."""
        self.done += commit["units"][1] - commit["units"][0]
        self.reasons.update(commit.get("reasons", {}))

    def add(self, row: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
        """Count a shard that a `ShardEncoder` has just committed.

        Args:
            row: what the encoder returned.

        Returns:
            The number of images that it encoded, and the number that were lost, by reason.
        """
        commit = json.loads(row["commit"])
        encoded = commit["units"][1] - commit["units"][0] - commit["quarantined"]
        self.add_earlier(commit)
        self.encoded += encoded
        if commit.get("earlier"):
            self.earlier += encoded
        self.devices.add(row["device"])
        self._shards.append((row["finished"], encoded))
        for stage in STAGES:
            self.seconds[stage] += row[f"{stage}_seconds"]
        return encoded, commit.get("reasons", {})

    def check_budget(self, budget: float, out: str) -> None:
        """Stop the job if it has lost too many images; see the function of the same name."""
        encoded = self.done - sum(self.reasons.values())
        check_budget(self.reasons, budget, out, self.images, encoded=encoded)

    def busy(self, seconds: float | None = None) -> dict[str, float]:
        """Return, for each stage, the share of the run's time, 0 to 1, in which its tasks or actors worked.

        Args:
            seconds: duration of the run; None: until now.
        """
        seconds = time.monotonic() - self.started if seconds is None else seconds
        return {stage: self.seconds[stage] / self.slots[stage] / seconds for stage in STAGES}

    def text(self, busy: Mapping[str, float]) -> str:
        """Return what people should see beside the progress: how busy the stages are, and what is in quarantine.

        Args:
            busy: as `busy` returns it.
        """
        names = {"decode": "decoding", "encode": "encoding"}
        stages = ", ".join(f"{names[stage]} {min(share, 1):.0%} busy" for stage, share in busy.items())
        return stages + (f", {lost:,} in quarantine" if (lost := self.reasons.total()) else "")

    def summary(self) -> dict[str, Any]:
        """Return numbers of this run for its table and its tracked run.

        They are the images, the seconds, the images per second, the share of time that each stage was busy, and the
        devices.
        """
        seconds = time.monotonic() - self.started
        # The steady rate is measured from the first finished shard to the last, and so leaves out the actors' start.
        shards = sorted(self._shards)
        steady = sum(images for _, images in shards[1:]) / (shards[-1][0] - shards[0][0]) if shards[1:] else 0.0
        return {
            "encoded_now": self.encoded,
            **({"encoded_twice": self.earlier} if self.earlier else {}),
            "seconds": round(seconds, 3),
            "images_per_s": round(self.encoded / seconds, 3),
            "steady_images_per_s": round(steady, 3),
            **{f"{stage}_busy": round(share, 3) for stage, share in self.busy(seconds).items()},
            "devices": sorted(self.devices),
        }


def check_budget(
    reasons: Mapping[str, int], budget: float, out: str, total: int, name: str = "error_budget", encoded: int = 0
) -> None:
    """Stop a job that loses too many images.

    Args:
        reasons: number of images in quarantine, by reason.
        budget: the share of images, 0 to 1, that may be in quarantine.
        out: the cache folder.
        total: number of images in the source.
        name: the config field that sets the budget.
        encoded: number of images that are encoded and committed.

    Raises:
        UserError: if more images are in quarantine than the budget allows.
    """
    quarantined = sum(reasons.values())
    if quarantined > budget * total:
        raise UserError(
            f"{quarantined} of {total} images could not be encoded ({listed_reasons(reasons)}), more than {name}="
            f"{budget:g} allows; they are listed in {out}/quarantine"
            + (f", and the {encoded:,} images that were encoded are kept" if encoded else "")
            + f". Raise {name} to go on with the same command; `encode_dataset.py retry {out}` then encodes those that "
            f"were repaired"
        )


def listed_losses(losses: Mapping[str, Any]) -> list[str]:
    """Format the values that could not be carried, a text for each column.

    Args:
        losses: `lost_values` of a manifest's counts.
    """
    lines = []
    for column, found in sorted(losses.items()):
        values, are = ("value", "is") if found["count"] == 1 else ("values", "are")
        name, reason = found["examples"][0]
        lines.append(
            f"column {column!r}: {found['count']:,} {values} could not be carried ({name}: {reason}) and {are} null"
        )
    return lines


def listed_reasons(reasons: Mapping[str, int]) -> str:
    """Format counts by reason in alphabetical order, such as "2 corrupt, 1 empty"."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
