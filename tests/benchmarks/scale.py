"""How far the encode job and the cache reach: listings, plans and commit logs made here by the job's own code, requests
counted at the store, and a small model of time, cost and what is full first. docs/scale.md says what follows from it.

Made up are only a store's answers to listings of images (`Bucket`), and most files: of Parquet files, tars and shards
one is written, and linked under as many names as it takes. What is measured runs in a process of its own:
`python -m tests.benchmarks.scale STEP`.
"""

import io
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from litevae import cache, storage
from litevae.autoencoder import LiteVAE
from litevae.cache import LatentCache
from litevae.commits import commit_path, commit_shard, committed_shards, json_bytes, read_commits
from litevae.errors import UserError
from litevae.loader import LatentLoader
from litevae.shards import QUARANTINE, SOURCE_HASH, latent_layout, row_schema
from pipelines.benchmark import encoding, meter
from pipelines.data.config import Source as SourceConfig
from pipelines.data.config import Views
from pipelines.data.decode import ShardTask
from pipelines.data.open_source import open_source, restore
from pipelines.encoding import preview
from pipelines.encoding.config import Encode
from pipelines.encoding.partition import Partition
from pipelines.runtime.host import PeakMemory

MODULE = "tests.benchmarks.scale"
SHARD: int = Encode.model_fields["rows_per_shard"].default
SHAPE = (8, 32, 32)  # moments of 4 channels at 256 px
GROUP, FILE = 500, 10_000  # images of a row group; of a Parquet file or a tar
LINKS = 50_000  # names of one file: ext4 gives it up to 65,000
PAGE = 1000  # keys that S3 lists with one request
FURTHER = (10**9, 10**10)  # images that the laws are asked for
MOST = {"folder": 10**7, "webdataset": 10**6}  # images: with more it takes too long here, or too much memory
KINDS = {"folder": "folder on S3", "parquet": "Parquet", "webdataset": "tars"}

# --- the model ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """A kind of machine.

    Attributes:
        cores: that decode; of a node without GPUs also those that encode.
        network: GB/s.
        price: dollars an hour.
    """

    cores: int
    gpus: int
    network: float
    price: float


@dataclass(frozen=True)
class Work:
    """What an image takes.

    Attributes:
        decode: images/s a core.
        encode: images/s a GPU; without GPUs a core.
        read, write: bytes, of its file and of its row.
        pixels: bytes that pass from a node that decodes to another that encodes.
        gets, puts: requests to the store. A HEAD counts as a GET.
    """

    decode: float
    encode: float
    read: float
    write: float
    pixels: float = 256 * 256 * 3
    gets: float = 1.0
    puts: float = 2 / SHARD


@dataclass(frozen=True)
class Store:
    """What Amazon documents of a prefix (a second), and list prices a thousand requests, in dollars: check them."""

    gets: float = 5500
    puts: float = 3500
    prefixes: int = 1
    get_price: float = 0.0004
    put_price: float = 0.005


def limits(nodes: Mapping[Node, int], work: Work, store: Store | None = None) -> dict[str, float]:
    """Images/s at which each part of a cluster is full; the least is the job's rate.

    All cores decode. Where there are GPUs they encode, and nodes that have some get the pixels from those that have
    none; otherwise the cores encode, too. Links carry `network` each way at the same time.
    """
    store = store or Store()
    cores, gpus = (sum(n * getattr(node, name) for node, n in nodes.items()) for name in ("cores", "gpus"))
    asked = {"GETs": (store.gets, work.gets), "PUTs": (store.puts, work.puts)}
    found = {name: store.prefixes * most / each for name, (most, each) in asked.items() if each}
    links = [sum(n * node.network * 1e9 for node, n in nodes.items() if bool(node.gpus) == g) for g in (False, True)]
    if not gpus:
        found["cores"] = cores / (1 / work.decode + 1 / work.encode)
        return found | {"network": links[False] / max(work.read, work.write)}
    found |= {"decode": cores * work.decode, "encode": gpus * work.encode}
    here = sum(n * node.cores for node, n in nodes.items() if node.gpus) / cores  # decoded where it is encoded
    found["network"] = links[True] / max(here * work.read + (1 - here) * work.pixels, work.write)
    if here < 1:
        found["network of CPU nodes"] = links[False] / ((1 - here) * max(work.read, work.pixels))
    return found


def estimate(images: int, nodes: Mapping[Node, int], work: Work, store: Store | None = None) -> dict[str, Any]:
    """Images/s, what is full first, hours, and dollars of nodes and of requests."""
    store, parts = store or Store(), limits(nodes, work, store)
    first = min(parts, key=lambda name: parts[name])
    hours = images / parts[first] / 3600
    asked = images / 1000 * (work.gets * store.get_price + work.puts * store.put_price)
    price = hours * sum(count * node.price for node, count in nodes.items())
    return {"rate": parts[first], "first": first, "hours": hours, "nodes": price, "requests": asked}


def break_even(cores: int, decode: float, gpus: int) -> float:
    """Images/s of each GPU beyond which so many decoding cores are what holds them up."""
    return cores * decode / gpus


def requests_of_shard(kind: str, rows: int, groups: int = 0, files: int = 1) -> dict[str, int]:
    """Requests for a shard of sound images, from S3 to S3: HEAD, GET, PUT.

    Args:
        kind: folder, parquet or webdataset.
        rows: images of the shard.
        groups, files: row groups (of a tar ranges of up to 256 samples) that the shard is read from, and their files.
    """
    read = {
        "folder": {"HEAD": 0, "GET": rows},
        "parquet": {"HEAD": files + groups, "GET": files + groups},  # a file's footer of up to 64 kB, and its groups
        "webdataset": {"HEAD": 0, "GET": groups},
    }[kind]
    # A shard and its commit are put if absent, after a look; at the end the commit is read for the manifest.
    return {"HEAD": read["HEAD"] + 2, "GET": read["GET"] + 1, "PUT": 2}


def law(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Fixed and each: value = fixed + each * size, by least squares; never below zero at size 0."""
    x, y = np.asarray(sizes, float), np.asarray(values, float)
    each, fixed = np.polyfit(x, y, 1) if len(x) > 1 else (y[0] / x[0], 0.0)
    return (float(fixed), float(each)) if fixed >= 0 else (0.0, float(x @ y / (x @ x)))


# --- sources of as many images as one likes -----------------------------------------------------------------------


class Bucket:
    """A store's answers to listings of so many images in 1000 folders, paths of 24 bytes, a thousand a page."""

    uri = "s3://bucket/images"

    def __init__(self, images: int):
        self.images, self.requests = images, 0

    def listing(self, path: str, MaxKeys: int = PAGE, ContinuationToken: str = "0", **_: Any) -> dict[str, Any]:
        self.requests += 1
        start = int(ContinuationToken)
        stop = min(start + MaxKeys, self.images)
        keys = [f"images/n{1000 * n // self.images:08d}/{n:010d}.jpg" for n in range(start, stop)]
        items = [{"Key": key, "Size": 57_800, "ETag": f'"{n:032x}"'} for n, key in enumerate(keys, start)]
        return {"Contents": items, "IsTruncated": stop < self.images, "NextContinuationToken": str(stop)}


def parquet_file(path: Path, rows: int, group: int, image: bytes = b"") -> None:
    names = [f"{n:010d}" for n in range(rows)]
    pq.write_table(pa.table({"id": names, "image": [image] * rows}), path, row_group_size=group)


def tar_file(path: Path, samples: int, image: bytes = b"") -> None:
    with tarfile.open(path, "w") as tar:
        for n in range(samples):
            member = tarfile.TarInfo(f"{n:010d}.jpg")
            member.size = len(image)
            tar.addfile(member, io.BytesIO(image))


def make_source(kind: str, folder: Path, images: int) -> str:
    """The uri of a source of so many images, for Parquet and tars a multiple of `FILE`; the images are empty."""
    if kind == "folder":
        return Bucket.uri
    suffix = {"parquet": "parquet", "webdataset": "tar"}[kind]
    one, place = folder / f"one.{suffix}", folder / f"{kind}-{images}"
    place.mkdir()
    if kind == "parquet":
        parquet_file(one, FILE, GROUP)
    else:
        tar_file(one, FILE)
    _linked(one, [place / f"{n:08d}.{suffix}" for n in range(images // FILE)])
    return str(place)


def _linked(file: Path, names: Sequence[Path]) -> None:
    """Further names of a file."""
    for n, name in enumerate(names):
        if n % LINKS == 0:
            first = file.with_name(f".{file.name}-{n // LINKS}")
            shutil.copyfile(file, first)
        os.link(first, name)


# --- a commit log of as many shards as one likes ------------------------------------------------------------------


def commit(folder: Path, shard: int, rows: int = SHARD) -> dict[str, Any]:
    """A shard as a folder of images gives it, committed as the job does it. Latents are normal numbers; they are stored
    as they are, so their values do not matter for sizes."""
    first, how = shard * rows, latent_layout("moments", "float16")
    schema = row_schema(pa.schema([("label", pa.int64()), ("label_name", pa.string())]), hashed=True)
    same = dict.fromkeys(schema.names, 0) | {"flip": False, "height": 375, "width": 500, "label_name": "n01440764"}
    random = np.random.default_rng(shard)
    own = [
        same | {"id": f"n01440764/{unit:010d}.jpg", "unit": unit, SOURCE_HASH.name: random.bytes(32)}
        for unit in range(first, first + rows)
    ]
    values = random.standard_normal((rows, *SHAPE)).astype(np.float16)
    table, none = pa.Table.from_pylist(own, schema=schema), QUARANTINE.empty_table()
    return commit_shard(str(folder), shard, (first, first + rows), how, table, [values], none, device="x86_64")


def commit_log(folder: Path, shards: int, rows: int = SHARD) -> None:
    """A cache but for its manifest. The first shard is real; the others are its file, and its commit, as their own."""
    first = commit(folder, 0, rows)
    files = [f"shards/{n:06d}-{uuid.uuid4().hex[:12]}.parquet" for n in range(1, shards)]
    _linked(folder / first["file"], [folder / file for file in files])
    for n, file in enumerate(files, 1):
        own = first | {"shard": n, "units": [n * rows, (n + 1) * rows], "file": file}
        Path(commit_path(str(folder), n, 0)).write_bytes(json_bytes(own))


def merge(folder: Path, shards: int, rows: int = SHARD) -> dict[str, Any]:
    """The manifest, as the end of the job writes it."""
    plan = {"model": {}, "transform": {}, "latents": latent_layout("moments", "float16"), "precision": "fp32"}
    source = {"uri": "", "digest": "", "units": shards * rows, "shards": shards}
    return cache.write_manifest(str(folder), plan | {"columns": {}}, source, {})


# --- steps, each measured in a process of its own -----------------------------------------------------------------


class Watch:
    """Seconds of steps, and the most memory beyond what there was at first."""

    def __init__(self) -> None:
        self._memory, self.found = PeakMemory(torch.device("cpu")), {}  # type: ignore[var-annotated]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.found |= {name: time.perf_counter() - start, "bytes": self._memory.bytes()}


def plan(uri: str, images: int, out: str) -> dict[str, Any]:
    """What the driver does before the first shard: list, cut, write the listing; then the same from that listing."""
    bucket, watch = Bucket(images), Watch()
    with mock.patch.object(storage, "_listing", bucket.listing), watch("list"):
        source = open_source(SourceConfig(uri=uri))
    with watch("cut"):
        partition = Partition([source], SHARD)
        tasks = [ShardTask(number) for number in range(len(partition))]
    with watch("write"):
        cache.write_listing(out, 1, source.listing)
    some = tasks[:: max(1, len(tasks) // 100)][:100]
    with watch("shards"):
        sent = [len(pickle.dumps(partition.shard(task))) for task in some]
    return watch.found | {
        "units": partition.units,
        "groups": len(source.listing),
        "shards": len(tasks),
        "listing": source.listing.nbytes,
        "stored": os.path.getsize(os.path.join(out, "listing", "000001.parquet")),
        "requests": bucket.requests,
        "shard bytes": sum(sent) / len(sent),
        "shard seconds": watch.found["shards"] / len(some),
    }


def resume(out: str) -> dict[str, Any]:
    """What a driver does that goes on with a cache."""
    watch = Watch()
    if os.path.isdir(os.path.join(out, "listing")):
        with watch("listing"):
            Partition([restore(listing) for listing in cache.read_listings(out)], SHARD)
    with watch("names"):
        committed = committed_shards(out)
    with watch("commits"):
        done = sum(commit["units"][1] - commit["units"][0] for commit in read_commits(out, committed))
    return watch.found | {"done": done}


def finish(out: str, shards: int) -> dict[str, Any]:
    watch = Watch()
    with watch("merge"):
        merge(Path(out), shards)
    return watch.found | {"manifest": os.path.getsize(os.path.join(out, "manifest.json"))}


def reader(out: str) -> dict[str, Any]:
    """What each training worker does: open the cache, and get its first batch."""
    watch = Watch()
    with watch("open"):
        latents = LatentCache(out)
    with watch("batch"):
        next(iter(LatentLoader(latents, 256, threads=0)))
    return watch.found | {"rows": len(latents)}


def listing(uri: str) -> dict[str, Any]:
    return {"units": open_source(SourceConfig(uri=uri)).units}


def glance(uri: str, rows: int) -> dict[str, Any]:
    """What the driver looks at before its first shard: a few images, at the size of `requests_of_job`."""
    partition = Partition([open_source(SourceConfig(uri=uri))], rows)
    found = preview.look(partition, [ShardTask(n) for n in range(len(partition))], Views(resolution=32))
    return {"seen": found.seen}


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    "plan": plan,
    "resume": resume,
    "finish": finish,
    "reader": reader,
    "listing": listing,
    "glance": glance,
}


def step(name: str, environment: Mapping[str, str | None] | None = None, **request: Any) -> dict[str, Any]:
    with meter.Child(MODULE, name, environment=environment) as child:
        return child.ask(**request)


# --- the part -----------------------------------------------------------------------------------------------------


def scale(setting: meter.Setting) -> Iterator[meter.ReportTable]:
    """Plans, commit logs, requests, and the model beside a measured job."""
    sizes = [setting.config.scale_rows // 10**n for n in (3, 2, 1, 0)]
    place = setting.place / "scale"
    place.mkdir()
    yield plans(place, sizes)
    yield logs(place, sizes)
    yield requests(place)
    yield predictions(setting, place)
    yield costs(DECODE, ENCODE, setting.config.scale_gpu_rate)


def plans(place: Path, sizes: Sequence[int]) -> meter.ReportTable:
    table = meter.ReportTable(
        "Listing and plan",
        f"What the driver does before its first shard. Folder: keys of 24 bytes in 1000 classes, the store's answers "
        f"made up and so without its time; Parquet: files of {FILE:,} rows in row groups of {GROUP}; tars of "
        f"{FILE:,}; both on a local disk, of empty images. Shards of {SHARD}. Memory: the peak beyond the start; "
        f"stored: the listing in the cache (zstd). Rows with ~ are not made: a fixed and a linear part, fitted to "
        f"those above. Check: memory of the largest size by a fit to the smaller ones, over what was measured.",
        ["source", "images", "listing, s", "cut into shards, s", "memory, MB", "stored, MB", "shards", "check"],
    )
    for kind, title in KINDS.items():
        runs: dict[int, dict[str, Any]] = {}
        for images in [n for n in sizes if n <= MOST.get(kind, n)]:
            if runs and _memory(runs, images) > 0.7 * psutil.virtual_memory().available:
                break  # it is left to the law
            folder = place / f"{kind}-{images}"
            folder.mkdir()
            uri = make_source(kind, folder, images)
            runs[images] = step("plan", uri=uri, images=images, out=str(folder / "out"))
            shutil.rmtree(folder)
        names, digits = ("list", "cut", "bytes", "stored", "shards"), (1, 2, 0, 1, 0)
        table.samples[title] = runs
        for images in (*runs, *FURTHER):
            values = [runs[images][name] if images in runs else _by_law(runs, name, images) for name in names]
            cells = [_cell(n, value, d) for n, value, d in zip(names, values, digits, strict=True)]
            check = _check(runs, "bytes") if images == max(runs) else ""
            table.rows.append([title, f"{images:,}", *(c if images in runs else f"~{c}" for c in cells), check])
    return table


def _cell(name: str, value: float, digits: int) -> str:
    return f"{value / 1e6 if name in MEGABYTES else value:,.{digits}f}"


MEGABYTES = ("bytes", "stored", "manifest", "log")


def _by_law(runs: Mapping[int, Mapping[str, Any]], name: str, size: float) -> float:
    fixed, each = law(list(runs), [run[name] for run in runs.values()])
    return fixed + each * size


def _memory(runs: Mapping[int, Mapping[str, Any]], size: int) -> float:
    return _by_law(runs, "bytes", size)


def _check(runs: Mapping[int, Mapping[str, Any]], name: str) -> str:
    """The law of all but the largest size, over what that one gave."""
    largest = max(runs)
    smaller = {size: run for size, run in runs.items() if size != largest}
    return f"{_by_law(smaller, name, largest) / runs[largest][name]:.2f}" if len(smaller) > 1 else ""


def logs(place: Path, sizes: Sequence[int]) -> meter.ReportTable:
    table = meter.ReportTable(
        "Commit log, manifest, readers",
        f"Shards of {SHARD} rows of 8 x 32 x 32 fp16 on a local disk. Resuming: names and commits are read; "
        f"finishing: commits are merged into the manifest; reading: what each training worker does until its first "
        f"batch of 256. Memory: the peak beyond the start, a process each. Rows with ~ and check: as above, of the "
        f"finishing.",
        [
            "images",
            "shards",
            "commits, MB",
            "resume, s",
            "MB",
            "finish, s",
            "MB",
            "manifest, MB",
            "open, s",
            "MB",
            "check",
        ],
    )
    runs: dict[int, dict[str, Any]] = {}
    for images in sizes:
        folder, shards = place / f"log-{images}", -(-images // SHARD)
        commit_log(folder, shards)
        went, ended = step("resume", out=str(folder)), step("finish", out=str(folder), shards=shards)
        read = step("reader", out=str(folder))
        size = sum(entry.stat().st_size for entry in os.scandir(folder / "commits"))
        runs[images] = {"shards": shards, "log": size, "manifest": ended["manifest"], "merge": ended["merge"]}
        runs[images] |= {"resume": went["names"] + went["commits"], "resume bytes": went["bytes"]}
        runs[images] |= {
            "bytes": ended["bytes"],
            "open": read["open"],
            "batch": read["batch"],
            "read bytes": read["bytes"],
        }
        shutil.rmtree(folder)
    names = ("shards", "log", "resume", "resume bytes", "merge", "bytes", "manifest", "open", "read bytes")
    table.samples["runs"] = runs
    for images in (*runs, *FURTHER):
        cells = []
        for name in names:
            value = runs[images][name] if images in runs else _by_law(runs, name, images)
            scaled = value / 1e6 if name in MEGABYTES or name.endswith("bytes") else value
            cells.append(f"{'' if images in runs else '~'}{scaled:,.{0 if scaled >= 100 or name == 'shards' else 1}f}")
        table.rows.append([f"{images:,}", *cells, _check(runs, "bytes") if images == max(runs) else ""])
    return table


# --- requests -----------------------------------------------------------------------------------------------------


class Served:
    """moto as a process, and the requests that it has got."""

    bucket = "litevae-scale"

    def __init__(self, place: Path):
        import boto3  # type: ignore[import-untyped]
        import moto  # noqa: F401  # packages that only developers have

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            **dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "testing"),
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        }
        self._log, self._read = place / "moto.log", 0
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self._log.open("w"))
        end = time.monotonic() + 120
        while "Running on" not in self._log.read_text():
            if self._process.poll() is not None or time.monotonic() > end:
                self.__exit__()
                raise UserError(f"moto does not start:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.1)
        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
        self.client = boto3.client("s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"], **keys)
        self.client.create_bucket(Bucket=self.bucket)
        self.new()

    def new(self) -> Counter[tuple[str, str]]:
        """Requests since the last call: LIST, HEAD, GET or PUT, and the folder of the key."""
        text = self._log.read_text()
        fresh, self._read = text[self._read :], len(text)
        found: Counter[tuple[str, str]] = Counter()
        for method, path, query in re.findall(r'"(?:\x1b\[\d+m)*([A-Z]+) /([^ ?]*)(?:\?(\S*))? HTTP', fresh):
            if "list-type=2" in query:
                method, path = "LIST", re.sub("%2F", "/", query.partition("prefix=")[2].partition("&")[0])
            found[method, path.removeprefix(f"{self.bucket}/").rpartition("/")[0]] += 1
        return found

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *problem: object) -> None:
        self._process.kill()
        self._process.wait()


def put_images(served: Served, kind: str, place: Path, images: int, group: int) -> str:
    """The uri of a source of real, small JPEGs in the store: a file each, or all in one."""
    sink = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), 128, np.uint8)).save(sink, "JPEG")
    if kind == "folder":
        for n in range(images):
            served.client.put_object(Bucket=served.bucket, Key=f"{kind}/{n:06d}.jpg", Body=sink.getvalue())
        return f"s3://{served.bucket}/{kind}"
    file = place / {"parquet": "0.parquet", "webdataset": "0.tar"}[kind]
    if kind == "parquet":
        parquet_file(file, images, group, sink.getvalue())
    else:
        tar_file(file, images, sink.getvalue())
    served.client.put_object(Bucket=served.bucket, Key=f"{kind}/{file.name}", Body=file.read_bytes())
    return f"s3://{served.bucket}/{kind}"


def requests_of_job(
    served: Served, kind: str, place: Path, model: str, shards: int, rows: int, group: int
) -> dict[str, Any]:
    """Requests of the encode job from S3 to S3, as the store got them: of the listing, of each shard, of all else; and
    those of a reader that gets a batch."""
    uri, out = put_images(served, kind, place, shards * rows, group), f"s3://{served.bucket}/cache-{kind}"
    served.new()
    step("listing", served.environment, uri=uri)
    listed = served.new()
    step("glance", served.environment, uri=uri, rows=rows)
    looked = served.new() - listed
    words = [f"source.uri={uri}", f"model={model}", f"out={out}", f"root={place}/runs", f"rows_per_shard={rows}"]
    words += ["transform.resolution=32", "precision=fp32", "kernels=torch", "ray.gpu=false", "ray.workers=1"]
    words += ["ray.decode_tasks=1", "ray.cpus_per_worker=1", "tracking.enabled=false"]
    environment = os.environ | served.environment
    job = subprocess.run([sys.executable, str(encoding.JOB), *words], capture_output=True, text=True, env=environment)
    if job.returncode:
        raise UserError(f"the encode job failed:\n{(job.stdout + job.stderr).strip()[-2000:]}")
    every = served.new()
    step("reader", served.environment, out=out)
    read = served.new()
    cached = {f"cache-{kind}/{folder}" for folder in ("shards", "commits")}
    rest, shard = every - listed - looked, Counter[str]()
    for (method, folder), count in list(rest.items()):
        if method != "LIST" and folder in (kind, *cached):
            shard[method] += count
            del rest[method, folder]
    return {
        "listing": _by_method(listed),
        "first look": _by_method(looked),
        "each shard": {method: count / shards for method, count in shard.items()},
        "once": _by_method(rest),
        "reader": _by_method(read),
    }


def _by_method(found: Mapping[tuple[str, str], int]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for (method, _), count in found.items():
        total[method] += count
    return dict(total)


def small_model(folder: Path) -> str:
    torch.manual_seed(0)
    LiteVAE("S", block_out_channels=(8, 8, 8, 8), layers_per_block=1).save_pretrained(folder)
    return str(folder)


METHODS = ("LIST", "HEAD", "GET", "PUT")


def requests(place: Path, shards: int = 2, rows: int = SHARD) -> meter.ReportTable:
    table = meter.ReportTable(
        "Requests to S3",
        f"The encode job (`jobs/encode_dataset.py`) from S3 to S3, {shards} shards of {rows} images, as a server "
        f"(moto) got them. Parquet: one file, row groups of {rows // 2}; tars: one file, ranges of 256 samples. Each "
        f"shard: its reading, its file, its commit, and reading the commit at the end; in brackets what the model "
        f"says. First look: 32 images, before the job begins. Once: plan, manifest, and looking what is there. A "
        f"reader: opens the cache and gets one batch.",
        ["source", "", *METHODS],
    )
    model = small_model(place / "small")
    with Served(place) as served:
        for kind, title in KINDS.items():
            found = requests_of_job(served, kind, place, model, shards, rows, rows // 2)
            expected = requests_of_shard(kind, rows, groups=2 if rows == SHARD else 1)
            table.samples[title] = found | {"model": expected}
            for name, counts in found.items():
                cells = [f"{counts.get(method, 0):,.0f}" for method in METHODS]
                if name == "each shard":
                    cells = [f"{cell} ({expected.get(m, 0):,})" for cell, m in zip(cells, METHODS, strict=True)]
                table.rows.append([title if name == "listing" else "", name, *cells])
    return table


# --- the model beside measurements --------------------------------------------------------------------------------


def predictions(setting: meter.Setting, place: Path) -> meter.ReportTable:
    """A job whose encoder is the slower half, and one whose decoder is."""
    count, photos = setting.config.encode_images, setting.photos()
    torch.manual_seed(0)
    LiteVAE("S").save_pretrained(place / "S")
    mosaics = meter.mosaics(photos, encoding.MOSAICS, place / "mosaics")
    cases = {
        "photos": (meter.linked(photos, count, place / "photos"), str(place / "S")),
        "24-megapixel JPEGs": (meter.linked(mosaics, count, place / "large"), str(place / "small")),
    }
    table = meter.ReportTable(
        "The model against the job",
        f"images/s, 256 px, fp32, {count} images, one run each; one core decodes, one encodes (the model's GPU). "
        f"Photos by LiteVAE-S; the large ones by one of 8 channels a layer, so that decoding is the slower. "
        f"Predicted: the least of the model's limits, from both rates alone. Measured: once started, as in part "
        f"encode.",
        ["", "decode alone", "encode alone", "predicted", "full first", "measured", "measured / predicted"],
    )
    for number, (title, (folder, model)) in enumerate(cases.items()):
        out = place / f"job-{number}"
        given = encoding.Request(str(folder), model, str(out), setting.device.type, decoders=1)
        rate = encoding.steady(encoding.run_system("job", given, str(out)))
        alone = encoding.halves(given, encoding.SECONDS)
        size = sum(file.stat().st_size for file in folder.iterdir()) / count
        work = Work(alone["decode"], alone["encode"], size, ROW, gets=0, puts=0)
        parts = limits({Node(cores=1, gpus=1, network=1.0, price=0.0): 1}, work)
        first = min(parts, key=lambda name: parts[name])
        table.samples[title] = alone | {"job": rate, "limits": parts}
        values = [alone["decode"], alone["encode"], parts[first]]
        row = [*(f"{value:,.1f}" for value in values), first, f"{rate:,.1f}", f"{rate / parts[first]:.2f}"]
        table.rows.append([title, *row])
    return table


# Of one core, decoding and encoding photos alone, on the machine of docs/performance.md (its part encode).
DECODE, ENCODE = 589.1, 10.0
ROW = 16_480.0  # bytes of a row at 256 px: its part of a shard of 512, 16,477, and of commit, manifest and listing
PHOTO = 57_800.0  # bytes of an image there
EXAMPLES = {  # prices and networks are examples, for the reader to replace
    "100 nodes of 64 cores": {Node(64, 0, 3.1, 3.0): 100},
    "100 nodes of 8 cores, 1 GPU": {Node(8, 1, 1.2, 1.2): 100},
    "100 nodes of 32 cores, 1 GPU": {Node(32, 1, 3.1, 2.5): 100},
    "100 nodes of 96 cores, 8 GPUs": {Node(96, 8, 12.5, 30.0): 100},
    "the same and 100 nodes of 64 cores": {Node(96, 8, 12.5, 30.0): 100, Node(64, 0, 3.1, 3.0): 100},
}
SIZES = {"10 M": 10**7, "1 B": 10**9, "10 B": 10**10}


def costs(decode: float, encode: float, gpu: float) -> meter.ReportTable:
    """
    Args:
        decode, encode: images/s a core.
        gpu: images/s a GPU.
    """
    table = meter.ReportTable(
        "Time and cost by the model",
        f"A core decodes {decode:,.0f} images/s, encodes {encode:.1f} (LiteVAE-S, fp32, 256 px: docs/performance.md). "
        f"A GPU is taken to do {gpu:,.0f}, NOT measured. Images of {PHOTO / 1e3:,.0f} kB in Parquet on S3, one "
        f"prefix. Prices and networks are examples. Break-even: what a GPU must reach for decoding to hold it up.",
        ["nodes", "break-even, images/s a GPU", "images/s", "full first", *(f"{name}: hours, $" for name in SIZES)],
    )
    for title, nodes in EXAMPLES.items():
        gpus = sum(count * node.gpus for node, count in nodes.items())
        cores = sum(count * node.cores for node, count in nodes.items())
        asked = requests_of_shard("parquet", SHARD, groups=2)
        work = Work(decode, gpu if gpus else encode, PHOTO, ROW, gets=(asked["GET"] + asked["HEAD"]) / SHARD)
        found = {name: estimate(images, nodes, work) for name, images in SIZES.items()}
        some = found["1 B"]
        even = f"{break_even(cores, decode, gpus):,.0f}" if gpus else ""
        each = [f"{e['hours']:,.1f} h, {e['nodes'] + e['requests']:,.0f} $" for e in found.values()]
        table.rows.append([title, even, f"{some['rate']:,.0f}", some["first"], *each])
        table.samples[title] = {"estimates": found, "limits": limits(nodes, work), "work": asdict(work)}
    return table


if __name__ == "__main__":
    meter.serve(lambda request: STEPS[sys.argv[1]](**request))
