"""Numbers that judge something, each beside the protocol that says what it is."""

import json
import os
import textwrap
from itertools import pairwise
from typing import Any, NamedTuple

from pipelines import outputs
from pipelines.tracking import Tracker


class Score(NamedTuple):
    """
    Attributes:
        name: for files and MLflow.
        title: for people.
        std: standard deviation, where there is one.
        protocol: all that it takes to tell this number from others of that title.
    """

    name: str
    title: str
    value: float
    std: float | None
    protocol: str


def leave(summary: dict[str, Any], out: str, tracker: Tracker) -> None:
    """Write metrics.json into `out`, and log its "metrics", which are scores as dicts, as eval/<name>."""
    for score in summary["metrics"]:
        values = {"": score["value"], "_std": score["std"]}
        tracker.metrics({f"eval/{score['name']}{end}": v for end, v in values.items() if v is not None}, step=0)
    path = os.path.join(out, "metrics.json")
    outputs.write(path, json.dumps(summary, indent=2).encode() + b"\n")
    tracker.artifact(path)


def report(summary: dict[str, Any], out: str) -> str:
    """What `leave` wrote, for a person: the protocol stands below the scores that have it in common."""
    scores = [Score(**score) for score in summary["metrics"]]
    lines, width = [], max(len(score.title) for score in scores)
    for score, following in pairwise([*scores, None]):
        assert score is not None
        lines.append(f"{score.title:{width}}  {score.value:.5g}" + ("" if score.std is None else f" ± {score.std:.2g}"))
        if following is None or following.protocol != score.protocol:
            lines += [*textwrap.wrap(score.protocol, 118, initial_indent="    ", subsequent_indent="    "), ""]
    return "\n".join([*lines, *summary["remarks"], f"metrics   {out}/metrics.json", f"run       {summary['run']}"])
