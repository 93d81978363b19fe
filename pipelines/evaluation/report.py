"""Numbers that judge something, each beside the protocol that says what it is."""

import json
import os
import textwrap
from itertools import pairwise
from typing import Any, NamedTuple

from litevae import storage
from litevae.generation import Backbone, FeatureNetwork, Inception, SqueezeNetCaffe
from litevae.images import ImageTransform
from litevae.perceptual import WeightsMissing
from pipelines.runtime.mlflow_run import Tracker


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


def networks(
    inception: str, squeezenet: str = "", backbone: str = "", model: str = ""
) -> tuple[list[FeatureNetwork], list[str]]:
    """Networks to compare sets of images by, those that there are weights for, and a line about one that is missing.

    Args:
        inception: weights of the FID Inception; empty: torch hub's file, if it has it.
        squeezenet: weights; empty: none.
        backbone: weights of torchvision's `model`; empty: none.

    Raises:
        UserError: a file that is named does not exist or holds something else.
    """
    found: list[FeatureNetwork] = []
    remarks = []
    try:
        found.append(Inception(inception))
    except WeightsMissing as error:
        remarks.append(str(error))
    if squeezenet:
        found.append(SqueezeNetCaffe(squeezenet))
    if backbone:
        found.append(Backbone(model, backbone))
    return found, remarks


def caution(count: int, network: FeatureNetwork) -> list[str]:
    """What is to be said of a Frechet distance of so few images, if anything."""
    if count > network.dimension:
        return []
    return [
        f"CAUTION: {count:,} images make a singular covariance of {network.dimension:,} features: too large, and to be "
        f"compared at equal N only"
    ]


def shown(transform: ImageTransform) -> str:
    """How images were brought to their size, for people."""
    if transform.resize == "none":
        return f"centre crop of {transform.resolution} px, not resized"
    library = f"Pillow {transform.identity['Pillow']}"
    return f"shorter side to {transform.resolution} px ({library}, antialiased bicubic), centre crop"


def leave(summary: dict[str, Any], out: str, tracker: Tracker) -> None:
    """Write metrics.json into `out`, and log its "metrics", which are scores as dicts, as eval/<name>."""
    for score in summary["metrics"]:
        values = {"": score["value"], "_std": score["std"]}
        tracker.metrics({f"eval/{score['name']}{end}": v for end, v in values.items() if v is not None}, step=0)
    save(summary, out, tracker)


def save(summary: dict[str, Any], out: str, tracker: Tracker) -> None:
    """Write metrics.json into `out`, for MLflow too."""
    path = os.path.join(out, "metrics.json")
    storage.put(str(path), json.dumps(summary, indent=2).encode() + b"\n")
    tracker.artifact(path)


def report(summary: dict[str, Any], out: str) -> str:
    """What `leave` wrote, for a person: the protocol stands below the scores that have it in common."""
    lines = listed([Score(**score) for score in summary["metrics"]])
    return "\n".join([*lines, *summary["remarks"], f"metrics   {out}/metrics.json", f"run       {summary['run']}"])


def listed(scores: list[Score]) -> list[str]:
    """Lines of them, each followed by an empty one where its protocol ends."""
    lines, width = [], max((len(score.title) for score in scores), default=0)
    for score, following in pairwise([*scores, None]):
        assert score is not None
        lines.append(f"{score.title:{width}}  {score.value:.5g}" + ("" if score.std is None else f" ± {score.std:.2g}"))
        if following is None or following.protocol != score.protocol:
            lines += [*textwrap.wrap(score.protocol, 118, initial_indent="    ", subsequent_indent="    "), ""]
    return lines
