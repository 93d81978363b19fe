"""Scores, each with a protocol that says how it was measured, and how they are written and printed."""

import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from litevae import storage
from litevae.generation import Backbone, FeatureNetwork, Inception, SqueezeNetCaffe
from litevae.images import ImageTransform
from litevae.perceptual import WeightsMissing
from pipelines.runtime import tables
from pipelines.runtime.mlflow_run import Tracker

CAUTION = "CAUTION"  # how a protocol begins its last part, if the number misleads


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
        f"{CAUTION}: {count:,} images give a singular covariance of {network.dimension:,} features, so the distance is "
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


def report(summary: dict[str, Any], out: str, verbose: bool) -> str:
    """Format what `write_scores` wrote.

    Args:
        summary: the content of metrics.json.
        out: its folder.
        verbose: whether to show how each number was measured.
    """
    scores = [Score(**score) for score in summary["metrics"]]
    protocols: dict[str, list[str]] = {}
    for score in scores:
        protocols.setdefault(score.protocol, []).append(score.title.strip())
    rows = [["", "value"], *([score.title, cell(score)] for score in scores)]
    how = {", ".join(titles): protocol for protocol, titles in protocols.items()}
    return "\n".join([tables.fitted(rows), "", *closing_lines(how, summary, out, verbose)])


def closing_lines(
    protocols: Mapping[str, str], summary: dict[str, Any], out: str, verbose: bool, pictures: Sequence[str] = ()
) -> list[str]:
    """Return the lines of a report after its tables: protocols, cautions, remarks, and where everything was written.

    Args:
        protocols: how numbers were measured, by their titles.
        summary: the content of metrics.json.
        out: its folder.
        verbose: whether to show the protocols. Cautions in them are always shown.
        pictures: names of pictures in that folder.
    """
    lines = []
    for titles, protocol in protocols.items():
        text = protocol if verbose else "".join(protocol.partition(CAUTION)[1:])
        lines += wrapped(f"{titles}: {text}") if text else []
    lines += [""] * bool(lines)
    for remark in summary.get("remarks", []):
        lines += wrapped(remark)
    files = [f"metrics   {out}/metrics.json" + ("" if verbose else "   (also how each number was measured)")]
    return [*lines, *files, *(f"pictures  {out}/{name}" for name in pictures), f"run       {summary['run']}"]


def cell(score: Score) -> str:
    """Return a score's value for people, with its standard deviation."""
    return f"{score.value:.5g}" + ("" if score.std is None else f" ± {score.std:.2g}")


def wrapped(text: str) -> list[str]:
    """Return text as lines of a report. Paths and addresses are not broken, so that they can be copied."""
    return textwrap.wrap(text, tables.WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
