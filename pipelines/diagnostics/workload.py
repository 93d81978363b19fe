"""Doctor's checks of a job's model, weights and images, and the estimate of the job's duration."""

import os
import time
from collections import Counter
from collections.abc import Iterator

import torch

from litevae import hub
from litevae.any_autoencoder import fingerprint
from litevae.errors import UserError
from litevae.generation import Inception
from litevae.images import ImageError, ImageTransform
from litevae.perceptual import WeightsMissing, load_lpips
from pipelines.data.open_source import open_source
from pipelines.data.source import Source
from pipelines.diagnostics.config import Doctor
from pipelines.diagnostics.probe import DRIVER, Ask, Finding, answered, counted, failure
from pipelines.encoding.speed import encoder_speed, rates
from pipelines.evaluation import image_batches
from pipelines.runtime import cluster


class Speeds:
    """What the checks measured and the estimate needs.

    Attributes:
        images: the number of images in the source.
        decode: images/s that one core decodes, for each node.
        encode: images/s that one worker encodes, for each node.
    """

    def __init__(self) -> None:
        self.images = 0
        self.decode: list[float] = []
        self.encode: list[float] = []


def weights(ask: Ask) -> Iterator[Finding]:
    """Check that each node has the published weights of LPIPS and FID where the jobs look for them."""
    nodes, lost = answered(ask(_weights))
    yield from lost
    for node, found in nodes.items():
        for what, name, missing in found:
            if missing:
                problem = failure(node, UserError(missing))
                so = f"in evaluations {what} is left out"
                if what == "LPIPS":
                    so += ", and train_vae refuses to train with it unless loss.lpips.required=false"
                yield problem._replace(state="warning", found=f"{problem.found} ({so})")
            elif "on other weights" in name:
                yield Finding(node, "warning", f"{name}: not the published file", "fetch it again")
            else:
                yield Finding(node, "ok", f"{name}: the published weights")


def _weights() -> list[tuple[str, str, str]]:
    """Return (metric, name of its network, "") or (metric, "", what is missing) for LPIPS and FID."""
    found = []
    for what, load in (("LPIPS", load_lpips), ("FID", Inception)):
        try:
            found.append((what, load().name, ""))
        except WeightsMissing as error:
            found.append((what, "", str(error)))
    return found


def model(ask: Ask, config: Doctor, placement: cluster.Placement | None, speeds: Speeds) -> Iterator[Finding]:
    """Check that all nodes have the same model, and measure how fast a worker on each node encodes with it."""
    if not config.model:
        yield Finding(DRIVER, "skipped", "not given")
        return
    path = hub.pinned(config.model)
    mine = fingerprint(path)
    nodes, lost = answered(ask(fingerprint, path), "give a model folder that all nodes share")
    yield from lost
    for node, theirs in nodes.items():
        if theirs != mine:
            text = f"{path} on this node is another model ({theirs[:8]}) than on the driver ({mine[:8]})"
            yield Finding(node, "failed", text, "copy the driver's there, or give a folder that all nodes share")
    if lost or any(theirs != mine for theirs in nodes.values()):
        return
    yield Finding(DRIVER, "ok", f"{path} ({mine[:8]}), the same on {counted(len(nodes), 'node')}")
    threads = placement.threads if placement else os.cpu_count() or 1
    timed, lost = answered(ask(_encode, path, config.transform.resolution, config.batch_size, threads))
    yield from lost
    for node, (speed, how) in timed.items():
        speeds.encode.append(speed)
        yield Finding(node, "ok", f"{speed:,.1f} images/s a worker at {config.transform.resolution} px, {how}")


def _encode(path: str, resolution: int, batch_size: int, threads: int) -> tuple[float, str]:
    """Measure an encoder on a node; see `encoder_speed`."""
    return encoder_speed(path, (resolution, resolution), batch_size, threads)


def source(ask: Ask, config: Doctor, speeds: Speeds) -> Iterator[Finding]:
    """Check that all nodes can read the images, and measure how fast one core on each node decodes them."""
    if not config.source.uri:
        yield Finding(DRIVER, "skipped", "not given")
        return
    begun = time.monotonic()
    found = open_source(config.source)
    speeds.images = found.units
    text = f"{found.uri}: {found.units:,} images ({found.kind}), listed in {time.monotonic() - begun:.1f} s"
    yield Finding(DRIVER, "ok", text)
    sample = image_batches.evenly_spaced(range(found.units), min(config.images, found.units))
    parts = [found.part(unit, unit + 1) for unit in sample]
    size = config.transform
    transform = ImageTransform(size.resolution, size.resize, decode="fast", max_pixels=size.max_pixels)
    nodes, lost = answered(ask(_decode, parts, transform))
    yield from lost
    for node, (good, bad, example, read, decode) in nodes.items():
        count = sum(bad.values())
        reasons = ", ".join(f"{number} {reason}" for reason, number in bad.items())
        if not good:
            advice = "give a path that all nodes share, or s3://; else see the message"
            yield Finding(node, "failed", f"none of {count} images can be read: {reasons}; {example}", advice)
            continue
        speeds.decode.append(good / (read + decode))
        text = f"{good / decode:,.0f} images/s decoded by a core, {good / read:,.0f} read by one thread"
        if count:
            advice = "repair or remove them, or raise error_budget (encode, 0.01) or data.max_bad (training)"
            text = f"{count} of {good + count} images can't be read: {reasons}; {example}; else {text}"
            yield Finding(node, "warning", text, advice)
        else:
            yield Finding(node, "ok", text)


def _decode(parts: list[Source], transform: ImageTransform) -> tuple[int, dict[str, int], str, float, float]:
    """Read and decode images on a node with one thread.

    Returns:
        The number of decoded images, the reasons of the others with counts, an example of these, and the seconds spent
        on reading and on decoding.
    """
    torch.set_num_threads(1)
    bad: Counter[str] = Counter()
    example, good, read, decode = "", 0, 0.0, 0.0
    for part in parts:
        begun = between = time.perf_counter()
        try:
            data = part.data(0)
            between = time.perf_counter()
            transform(data)
            good += 1
        except ImageError as error:
            bad[error.reason] += 1
            example = example or f"{part.id(0)}: {error}"
            continue
        read, decode = read + between - begun, decode + time.perf_counter() - between
    return good, dict(bad), example, read, decode


def estimate(placement: cluster.Placement | None, speeds: Speeds) -> Iterator[Finding]:
    """Estimate how long it takes to encode the source; see `rates`."""
    if not (placement and speeds.images and speeds.encode and speeds.decode):
        yield Finding(DRIVER, "skipped", "needs Ray, a source and a model")
        return
    mean = (sum(found) / len(found) for found in (speeds.encode, speeds.decode))
    encode, decode, rate = rates(placement, *mean)
    seconds = speeds.images / rate
    shown = f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:,.1f} minutes"
    slower = "encoding" if encode <= decode else "decoding"
    text = (
        f"{speeds.images:,} images take about {shown} with {placement.text} (encoding {encode:,.1f} and decoding "
        f"{decode:,.0f} a second); {slower} is the bottleneck"
    )
    advice = "more ray.workers" if slower == "encoding" else "more CPUs or ray.decode_tasks, or transform.decode=scaled"
    yield Finding(DRIVER, "ok", text, advice if seconds >= 3600 else "")
