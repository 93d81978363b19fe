"""Decode the images of a shard into uint8 pixels. The CPU tasks of the encode job do this.

This module does not import the models, so that a decoding task starts in a third of the time and takes less memory.
"""

import hashlib
import multiprocessing
import resource
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pyarrow as pa
import torch

from litevae.errors import UserError
from litevae.image_metadata import MAX_PIXELS
from litevae.images import ImageError, ImageTransform, View
from litevae.shards import QUARANTINE, SOURCE_HASH, row_schema
from pipelines.data.config import Views
from pipelines.data.source import Item, Source

# Bytes that decoding an image may take after the task of its shard has died once, twice, or three times. The first
# value is enough for any image of the default `max_pixels`; it grows with a larger one. The others are smaller: if the
# task died again, together with the child process that decoded, then the node or its container has less memory.
MEMORY = (2**31, 2**29, 2**28)
# Of each value that its column can't hold, and that is therefore null.
LOST_VALUES = pa.schema([("unit", pa.int64()), *((name, pa.string()) for name in ("id", "column", "reason"))])
READERS = 16  # images of a shard that are read at a time if they come over a network


@dataclass(frozen=True)
class ShardTask:
    """A shard to encode, for the first time or as its next generation.

    Attributes:
        shard: number of the shard.
        generation: 0, or one more than the last committed generation.
        only: units to try again; rows of all others are taken from the previous generation. Empty: encode all units.
        keep: whether images that can't be read any more keep their rows of the previous generation.
    """

    shard: int
    generation: int = 0
    only: tuple[int, ...] = ()
    keep: bool = False


@dataclass(frozen=True)
class Shard:
    """What a worker gets.

    Attributes:
        task: what to do.
        source: the part of the source with the units of the shard, renumbered from 0.
        first: number of the first of these units in the whole cache.
    """

    task: ShardTask
    source: Source
    first: int


def transform_of(config: Views) -> ImageTransform:
    """Return the image transform that a config section describes."""
    return ImageTransform(
        config.resolution,
        config.resize,
        config.crop,
        crops=config.crops,
        both=config.flips,
        buckets=config.buckets,
        bucket_step=config.bucket_step,
        decode=config.decode,
        max_pixels=config.max_pixels,
    )


@dataclass(frozen=True)
class Lost:
    """Why an image is not encoded.

    Attributes:
        stage: where it failed.
        reason: the error class, e.g. "missing", as in the counts of the manifest.
        message: the details.
    """

    stage: Literal["read", "decode", "encode"]
    reason: str
    message: str


# A unit, with its image and the views of it, or with the reason why there are none.
Decoded = tuple[int, Item, list[View]] | tuple[int, None, Lost]


def decode_shard(row: dict[str, Any], views: Views, hashed: bool = False) -> dict[str, Any]:
    """Decode the images of a shard.

    The message of a UserError is returned as `error`, not raised, because Ray would print pages of tracebacks.

    Args:
        row: {"shard": the `Shard`}.
        views: which views to cut from each image.
        hashed: whether the rows of the cache hold the SHA-256 of their images' bytes.

    Returns:
        The row that `ShardEncoder` takes: `pixels`, all views end to end in one uint8 array; `sizes`, int32 (rows, 2),
        the height and width of each view; `rows`, `quarantine` and `lost_values`, Arrow tables as bytes (see `unpack`),
        with the columns of the rows, with the images that could not be read, and with the values of columns that could
        not be carried; `enlarged`, the number of images that are smaller than their views; `decode_seconds`; `shard`
        and `error`.
    """
    start = time.perf_counter()
    shard: Shard = row["shard"]
    transform, source = transform_of(views), shard.source
    units = [unit - shard.first for unit in shard.task.only] or list(range(source.units))
    pixels = np.empty(len(units) * transform.views * max(h * w for h, w in transform.sizes) * 3, dtype=np.uint8)
    sizes: list[tuple[int, ...]] = []
    rows: list[dict[str, Any]] = []
    lost: list[dict[str, Any]] = []
    values: list[dict[str, Any]] = []
    end = enlarged = 0
    deaths = _deaths()
    decode = partial(decode_carefully, memory=_memory(deaths, views)) if deaths else decode_units
    common = {"shard": shard, "error": ""}
    try:
        for decoded in decode(source, views, units):
            if decoded[1] is None:
                unit, _, why = decoded
                lost.append(quarantined(shard, shard.first + unit, source.id(unit), why))
                continue
            unit, item, images = decoded
            one = {"unit": shard.first + unit, "id": item.id}
            values += [one | {"column": column, "reason": reason} for column, reason in item.lost.items()]
            enlarged += images[0].enlarged
            of_image = item.columns | ({SOURCE_HASH.name: hashlib.sha256(item.data).digest()} if hashed else {})
            for view, image in enumerate(images):
                pixels[end : end + image.pixels.size] = image.pixels.reshape(-1)
                end += image.pixels.size
                sizes.append(image.pixels.shape[:2])
                own = {name: getattr(image, name) for name in ("height", "width", "crop_top", "crop_left", "flip")}
                rows.append({"id": item.id, "unit": shard.first + unit, "view": view, **own, **of_image})
        table = pa.Table.from_pylist(rows, schema=row_schema(source.schema, hashed))
    except UserError as error:
        common["error"], end, enlarged, sizes, lost, values = str(error), 0, 0, [], [], []
        table = pa.table({})
    return common | {
        "pixels": pixels[:end],
        "sizes": np.array(sizes, dtype=np.int32).reshape(-1, 2),
        "rows": pack(table),
        "quarantine": pack(pa.Table.from_pylist(lost, schema=QUARANTINE)),
        "lost_values": pack(pa.Table.from_pylist(values, schema=LOST_VALUES)),
        "enlarged": enlarged,
        "decode_seconds": time.perf_counter() - start,
    }


def _memory(deaths: int, views: Views) -> int:
    """Return how many bytes decoding an image may take after its task has died so often."""
    share = max(1.0, views.max_pixels / MAX_PIXELS) if deaths == 1 else 1.0
    return int(MEMORY[min(deaths, len(MEMORY)) - 1] * share)


def decode_units(source: Source, views: Views, units: Sequence[int]) -> Iterator[Decoded]:
    """Decode units of a source in order, and yield the views of each image, or why it can't be read or decoded."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # problems of an image are recorded in the quarantine
    transform = transform_of(views)
    for unit, item in _items(source, units):
        if isinstance(item, ImageError):
            yield unit, None, Lost("read", item.reason, str(item))
            continue
        try:
            yield unit, item, transform.all(item.data, seed_of(views, item.id))
        except ImageError as error:
            yield unit, None, Lost("decode", error.reason, str(error))


def decode_carefully(source: Source, views: Views, units: Sequence[int], memory: int = MEMORY[0]) -> Iterator[Decoded]:
    """Decode as `decode_units` does, but in child processes; for a shard whose task died before.

    An image that kills its decoder, or that takes more than `memory` bytes to decode, is lost but does not stop the
    job.
    """
    fork = multiprocessing.get_context("fork")
    left = list(units)

    def work(reader: Any, writer: Any) -> None:
        reader.close()
        torch.set_num_threads(1)  # a fork has no threads of PyTorch, and would wait for them
        _limit(memory)
        try:
            for found in decode_units(source, views, left):
                writer.send(found)
        except UserError as error:
            writer.send(error)

    while left:
        reader, writer = fork.Pipe(duplex=False)
        child = fork.Process(target=work, args=(reader, writer), daemon=True)
        child.start()
        writer.close()  # otherwise the end of the child would not be noticed
        try:
            while left:
                found = reader.recv()
                if isinstance(found, UserError):
                    raise found
                left.pop(0)
                yield found
        except EOFError:
            child.join()
            maybe = ", out of memory?" if child.exitcode == -signal.SIGKILL else ""
            message = f"the process that decoded it died (exit code {child.exitcode}{maybe})"
            yield left.pop(0), None, Lost("decode", "crashed", message)
        finally:
            reader.close()
            child.kill()
            child.join()


def _limit(memory: int) -> None:
    """Limit the memory that this process may take beyond what it has, and offer it first to the kernel's OOM killer."""
    if sys.platform != "linux":
        return
    with suppress(OSError):  # where /proc is read-only the kernel chooses a process: no reason to lose an image
        Path("/proc/self/oom_score_adj").write_text("1000")
    # Limit the memory that is written to, not the reserved memory: threads reserve much more than they use.
    wanted = psutil.Process().memory_info().data + memory
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == resource.RLIM_INFINITY or wanted < soft:
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


def _deaths() -> int:
    """Return how often this task was started before. Its process died each time."""
    import ray

    if not ray.is_initialized():
        return 0
    worker = ray._private.worker.global_worker.core_worker  # Ray has no public API for this
    return worker.get_current_task_attempt_number()


def seed_of(views: Views, identity: str) -> int:
    """Return the seed of an image's random crops. It depends on `views.seed` and the id, not on order or shards."""
    return int.from_bytes(hashlib.blake2b(f"{views.seed}\0{identity}".encode(), digest_size=8).digest())


def _items(source: Source, units: Sequence[int]) -> Iterator[tuple[int, Item | ImageError]]:
    """Yield the encoded images, or why they can't be read. Over a network, `READERS` images are read at a time."""

    def read(unit: int) -> Item | ImageError:
        try:
            return source.read(unit)
        except ImageError as error:
            return error

    if not source.remote:
        yield from ((unit, read(unit)) for unit in units)
        return
    with ThreadPoolExecutor(READERS) as threads:
        yield from zip(units, threads.map(read, units), strict=True)


def quarantined(shard: Shard, unit: int, identity: str, why: Lost) -> dict[str, Any]:
    """Return the row of the quarantine for an image that is not encoded."""
    place = {"unit": unit, "id": identity, "source": shard.source.uri}
    return place | {"stage": why.stage, "error": why.reason, "message": why.message}


def pack(table: pa.Table) -> bytes:
    """Serialise a table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def unpack(data: bytes) -> pa.Table:
    """Restore a table from the bytes that `pack` returned."""
    return pa.ipc.open_stream(data).read_all()
