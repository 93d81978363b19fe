"""Count what a listing saw and did not take, by reason and by suffix, so that nothing is left out without a word."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

SUFFIXES = 40  # that are counted by name for each reason; names such as photo.1, photo.2 would have no end
SHOWN = 6  # suffixes that a sentence names for each reason
OTHER = "other"


@dataclass
class LeftOut:
    """Numbers of files, rows or members of tars that a listing left out.

    Attributes:
        counts: by reason (a phrase such as "hidden"), then by suffix in lower case, with its dot; "no suffix".
    """

    counts: dict[str, Counter[str]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The number of all that was left out."""
        return sum(counter.total() for counter in self.counts.values())

    def add(self, reason: str, suffix: str, count: int = 1) -> None:
        """Count what was left out for a reason."""
        counter = self.counts.setdefault(reason, Counter())
        counter[suffix if suffix in counter or len(counter) < SUFFIXES else OTHER] += count

    def leave(self, reason: str, path: str | bytes) -> None:
        """Count a file that was left out for a reason."""
        self.add(reason, suffix_of(path))

    def to_json(self) -> dict[str, dict[str, int]]:
        """Return the counts as JSON values, in alphabetical order."""
        return {reason: dict(sorted(counter.items())) for reason, counter in sorted(self.counts.items()) if counter}

    @classmethod
    def from_json(cls, value: Mapping[str, Mapping[str, int]]) -> "LeftOut":
        """Return the counts that `to_json` returned."""
        return cls({reason: Counter(counts) for reason, counts in value.items()})

    def __str__(self) -> str:
        """A list by reason, the largest number first: "12 hidden (.jpg 11, no suffix 1), 3 metadata (.md)"."""
        parts = []
        for reason, counter in sorted(self.counts.items(), key=lambda item: (-item[1].total(), item[0])):
            common = sorted(counter.items(), key=lambda item: (-item[1], item[0]))
            named = [f"{suffix} {count:,}" if len(counter) > 1 else suffix for suffix, count in common[:SHOWN]]
            more = [f"{len(counter) - SHOWN} more suffixes"] if len(counter) > SHOWN else []
            parts.append(f"{counter.total():,} {reason} ({', '.join(named + more)})")
        return ", ".join(parts) or "nothing"


def suffix_of(path: str | bytes) -> str:
    """Return the suffix of a file name in lower case, with its dot; "no suffix" if it has none."""
    text = path.decode("utf-8", "backslashreplace") if isinstance(path, bytes) else path
    name = text.rpartition("/")[2]
    stem, dot, suffix = name.rpartition(".")
    return f".{suffix.lower()}" if dot and stem and suffix else "no suffix"
