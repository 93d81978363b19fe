"""Images of a shard as uint8 pixels: what the encode job's CPU tasks do.

A file of its own, without the models: a task that decodes is up in a third of the time, and takes less memory.
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

from litevae import cache
from litevae.errors import UserError
from litevae.images import ImageError, ImageTransform, Transformed
from pipelines.data.config import Views
from pipelines.data.source import Item, Source

# Bytes that an image's decoding may take where its shard's task died once, twice, ...: any image; then less, since the
# node, or its container, has no more, and the task died with the child that it decoded in.
MEMORY = (2**31, 2**29, 2**28)
READERS = 16  # images of a shard asked for at a time where they come over a network


@dataclass(frozen=True)
class Task:
    """A shard to encode, for the first time or as its next generation."""

    shard: int
    generation: int = 0
    only: tuple[int, ...] = ()  # units to try again; the others' rows are taken from the generation before


@dataclass(frozen=True)
class Shard:
    """What a worker gets: a task, the shard's units, renumbered from 0, and the number of the first of them."""

    task: Task
    source: Source
    first: int


def transform_of(config: Views) -> ImageTransform:
    return ImageTransform(
        config.resolution,
        config.resize,
        config.crop,
        crops=config.crops,
        both=config.flips,
        buckets=config.buckets,
        bucket_step=config.bucket_step,
        decode=config.decode,
    )


@dataclass(frozen=True)
class Lost:
    """Why an image is not encoded."""

    stage: Literal["read", "decode", "encode"]
    reason: str
    message: str


Decoded = tuple[int, Item, list[Transformed]] | tuple[int, None, Lost]  # a unit, and what became of it


def decode_shard(row: dict[str, Any], views: Views) -> dict[str, Any]:
    """A shard's images as uint8 pixels, end to end in one array, with the (height, width) of each; the columns of their
    rows, and what could not be read.

    A UserError is returned, not raised: through Ray it would come out as pages of tracebacks.
    """
    start = time.perf_counter()
    shard: Shard = row["shard"]
    transform, source = transform_of(views), shard.source
    units = [unit - shard.first for unit in shard.task.only] or list(range(source.units))
    pixels = np.empty(len(units) * transform.views * max(h * w for h, w in transform.sizes) * 3, dtype=np.uint8)
    sizes: list[tuple[int, ...]] = []
    rows: list[dict[str, Any]] = []
    lost: list[dict[str, Any]] = []
    end = 0
    deaths = _deaths()
    decode = partial(decode_carefully, memory=MEMORY[min(deaths, len(MEMORY)) - 1]) if deaths else decode_units
    common = {"shard": shard, "error": ""}
    try:
        for decoded in decode(source, views, units):
            if decoded[1] is None:
                unit, _, why = decoded
                lost.append(quarantined(shard, shard.first + unit, source.id(unit), why))
                continue
            unit, item, images = decoded
            for view, image in enumerate(images):
                pixels[end : end + image.pixels.size] = image.pixels.reshape(-1)
                end += image.pixels.size
                sizes.append(image.pixels.shape[:2])
                own = {name: getattr(image, name) for name in ("height", "width", "crop_top", "crop_left", "flip")}
                rows.append({"id": item.id, "unit": shard.first + unit, "view": view, **own, **item.columns})
        table = pa.Table.from_pylist(rows, schema=cache.row_schema(source.schema))
    except UserError as error:
        common["error"], end, sizes, lost, table = str(error), 0, [], [], pa.table({})
    return common | {
        "pixels": pixels[:end],
        "sizes": np.array(sizes, dtype=np.int32).reshape(-1, 2),
        "rows": pack(table),
        "quarantine": pack(pa.Table.from_pylist(lost, schema=cache.QUARANTINE)),
        "decode_seconds": time.perf_counter() - start,
    }


def decode_units(source: Source, views: Views, units: Sequence[int]) -> Iterator[Decoded]:
    """Images of a source, in order, as the transform gives them."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what is wrong with an image goes into the quarantine
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
    """The same in child processes, for a shard whose task died before: an image that kills its decoder, or whose
    decoding takes more than so many bytes, is lost, and does not stop the job."""
    fork = multiprocessing.get_context("fork")
    left = list(units)

    def work(reader: Any, writer: Any) -> None:
        reader.close()
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
        writer.close()  # or the end of the child's would not be seen
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
    """What this process may take beyond what it has; where a node's memory ends, it is the one that the kernel ends."""
    if sys.platform != "linux":
        return
    with suppress(OSError):  # where /proc is read-only the kernel chooses by itself: no reason to lose an image
        Path("/proc/self/oom_score_adj").write_text("1000")
    # of what is written to: threads reserve much more than they use
    wanted = psutil.Process().memory_info().data + memory
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft == resource.RLIM_INFINITY or wanted < soft:
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


def _deaths() -> int:
    """How often this task was begun before: its process died each time."""
    import ray

    if not ray.is_initialized():
        return 0
    worker = ray._private.worker.global_worker.core_worker  # Ray has no public way to ask
    return worker.get_current_task_attempt_number()


def seed_of(views: Views, identity: str) -> int:
    """Of an image's random crops: by its id, so that neither order nor shards matter."""
    return int.from_bytes(hashlib.blake2b(f"{views.seed}\0{identity}".encode(), digest_size=8).digest())


def _items(source: Source, units: Sequence[int]) -> Iterator[tuple[int, Item | ImageError]]:
    """Images as they are stored, or why they can't be read; over a network many are on their way at a time."""

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
    place = {"unit": unit, "id": identity, "source": shard.source.uri}
    return place | {"stage": why.stage, "error": why.reason, "message": why.message}


def pack(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def unpack(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()
