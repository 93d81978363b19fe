"""Scores, each with a protocol that says how it was measured, and how they are written and printed."""

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
    """A measured number.

    Attributes:
        name: the name in files and in MLflow.
        title: the title for people.
        value: the number.
        std: standard deviation, if there is one.
        protocol: everything that distinguishes this number from others with the same title.
    """

    name: str
    title: str
    value: float
    std: float | None
    protocol: str


def networks(
    inception: str, squeezenet: str = "", backbone: str = "", model: str = ""
) -> tuple[list[FeatureNetwork], list[str]]:
    """Load the networks that compare sets of images, as far as there are weights.

    Args:
        inception: weights of the FID Inception; empty: the file in torch hub's cache, if it is there.
        squeezenet: weights of the Caffe SqueezeNet; empty: not loaded.
        backbone: weights of the torchvision model `model`; empty: not loaded.
        model: name of the backbone in torchvision.

    Returns:
        The networks, and a remark if the weights of Inception are missing.

    Raises:
        UserError: if a file that is named does not exist or holds something else.
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


def small_sample_warning(count: int, network: FeatureNetwork) -> list[str]:
    """Return a warning about a Frechet distance of too few images, if `count` does not exceed the feature dimension."""
    if count > network.dimension:
        return []
    return [
        f"CAUTION: {count:,} images give a singular covariance of {network.dimension:,} features, so the distance is "
        f"too large; compare it only at equal N"
    ]


def describe_transform(transform: ImageTransform) -> str:
    """Describe for people how a transform brings images to their size."""
    if transform.resize == "none":
        return f"centre crop of {transform.resolution} px, not resized"
    library = f"Pillow {transform.identity['Pillow']}"
    return f"shorter side to {transform.resolution} px ({library}, antialiased bicubic), centre crop"


def write_scores(summary: dict[str, Any], out: str, tracker: Tracker) -> None:
    """Write a summary to metrics.json in `out`, and log its "metrics" (scores as dicts) to MLflow as eval/<name>."""
    for score in summary["metrics"]:
        values = {"": score["value"], "_std": score["std"]}
        tracker.metrics({f"eval/{score['name']}{end}": v for end, v in values.items() if v is not None}, step=0)
    write_summary(summary, out, tracker)


def write_summary(summary: dict[str, Any], out: str, tracker: Tracker) -> None:
    """Write a summary to metrics.json in `out`, and upload the file to MLflow."""
    path = os.path.join(out, "metrics.json")
    storage.put(str(path), json.dumps(summary, indent=2).encode() + b"\n")
    tracker.artifact(path)


def report(summary: dict[str, Any], out: str) -> str:
    """Format what `write_scores` wrote, with each protocol below the scores that share it."""
    lines = format_scores([Score(**score) for score in summary["metrics"]])
    return "\n".join([*lines, *summary["remarks"], f"metrics   {out}/metrics.json", f"run       {summary['run']}"])


def format_scores(scores: list[Score]) -> list[str]:
    """Return scores as lines of text, with the protocol and an empty line after each group of scores that share it."""
    lines, width = [], max((len(score.title) for score in scores), default=0)
    for score, following in pairwise([*scores, None]):
        assert score is not None
        lines.append(f"{score.title:{width}}  {score.value:.5g}" + ("" if score.std is None else f" ± {score.std:.2g}"))
        if following is None or following.protocol != score.protocol:
            lines += [*textwrap.wrap(score.protocol, 118, initial_indent="    ", subsequent_indent="    "), ""]
    return lines
