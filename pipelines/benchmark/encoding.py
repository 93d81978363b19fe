"""Compare the encode job with its two halves alone, a DataLoader loop, and plain Ray Data; measure its peak memory.

Every run is a process of its own: `python -m pipelines.benchmark.encoding SYSTEM`, which gets a `Request`.
"""

import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from litevae import hub
from litevae.any_autoencoder import load_autoencoder
from litevae.autoencoder import LiteVAE
from litevae.errors import UserError
from litevae.images import ImageTransform, to_tensor
from litevae.inference import memory_format
from litevae.latents import encode_latents
from litevae.precision import autocast
from pipelines.benchmark import meter
from pipelines.data.decode import transform_of
from pipelines.encoding.config import Encode
from pipelines.encoding.encode import encode_dataset
from pipelines.encoding.encoder import ShardEncoder
from pipelines.encoding.plan import CachePlan
from pipelines.runtime.cli import load
from pipelines.runtime.host import process_memory

SIDE = 256
BATCH = {"cpu": 16, "cuda": 64}  # images per batch and per file, so that all systems finish files equally often
SECONDS = 10.0  # longest measurement of each half
MOSAICS = 4  # different images of 24 megapixels; each is used many times
JOB = Path(__file__).resolve().parents[2] / "jobs" / "encode_dataset.py"
TIMES = (1, 4, 16)  # factors of the number of images at which memory is measured
KINDS = {"ray::MapWorker": "encoder", "ray::Map(": "decode task", "raylet": "raylet", "gcs_server": "GCS"}
MODULE = "pipelines.benchmark.encoding"

SYSTEMS = {
    "decode": "decode alone",
    "encode": "encode alone",
    "both": "both at the same time, unconnected: the slower",
    "job": "**the job**",
    "loop": "DataLoader + loop + pyarrow",
    "ray_data": "Ray Data, write_parquet",
}


@dataclass(frozen=True)
class Request:
    """A request to the process of a system.

    Attributes:
        photos: folder of JPEGs.
        model: the model folder.
        out: folder to write to; for the two halves, the cache whose plan they use.
        device: "cpu" or "cuda".
        decoders: number of processes that decode.
        seconds: how long to measure a half.
    """

    photos: str
    model: str
    out: str
    device: str
    decoders: int
    seconds: float = 0.0

    @property
    def batch(self) -> int:
        """Images per batch on this device."""
        return BATCH[self.device]

    @property
    def files(self) -> list[Path]:
        """The JPEGs in order."""
        return sorted(Path(self.photos).iterdir())


# --- the job and its alternatives ---------------------------------------------------------------------------------


def encode(setting: meter.Setting) -> Iterator[meter.ReportTable]:
    """Measure the encode job and its alternatives: one table for photos, and one for images of a camera's size.

    Raises:
        UserError: if `encode_images` is too small, or a system failed.
    """
    count, device = setting.config.encode_images, setting.device.type
    if count < 2 * BATCH[device]:
        raise UserError(
            f"encode_images={count} is too small to measure a rate on this device; give {2 * BATCH[device]} or more"
        )
    files, place = setting.photos(), setting.place / "encode"
    place.mkdir()
    decoders = max(1, setting.threads - 2) if device == "cuda" else 1  # on a CPU, one that decodes and one that encodes
    model = _model(setting, place)
    sources = {
        "photos": meter.linked(files, count, place / "photos"),
        "24-megapixel JPEGs": meter.linked(meter.mosaics(files, MOSAICS, place / "mosaics"), count, place / "large"),
    }
    # The first run of the job, on one batch, makes the plan, and also compiles kernels and loads libraries.
    plan = str(place / "first")
    warm = str(meter.linked(files, BATCH[device], place / "warm"))
    run_system("job", Request(warm, model, plan, device, decoders), plan)
    for number, (title, folder) in enumerate(sources.items()):
        runs = [
            _round(
                Request(str(folder), model, plan, device, decoders), place / f"{number}-{n}", min(SECONDS, count / 20)
            )
            for n in range(setting.config.repeats)
        ]
        yield _table(setting, title, count, decoders, CachePlan.read(plan), runs)


def _table(
    setting: meter.Setting, title: str, count: int, decoders: int, plan: CachePlan, runs: list[dict[str, float]]
) -> meter.ReportTable:
    def of(key: str) -> list[float]:
        return [run[key] for run in runs]

    slower = [min(run["decode"], run["encode"]) for run in runs]
    model = setting.config.model or "LiteVAE-S with random weights"
    table = meter.ReportTable(
        f"The encode job, {title}",
        f"images/s at {SIDE} px; {model}, {plan.precision}; {count} images a run, {len(runs)} runs of each in turn: "
        f"median (range). Everything gets {decoders} decoding process{'es' * (decoders > 1)} and one that encodes, of "
        f"a thread each. The job and its halves decode with decode={plan.views.decode} and "
        f"encode with kernels={plan.kernels}, as the job does by itself; the loop and Ray Data take Pillow and "
        f"PyTorch, channels last. Rates of whole systems are steady ones, by the times at which files of "
        f"{BATCH[setting.device.type]} were finished, the first quarter left out. A whole run is a process's, start "
        f"and end included.",
        ["", "images/s", "times the slower half's", "a whole run, s"],
        samples={"runs": runs, "plan": {name: getattr(plan, name) for name in ("precision", "kernels", "transform")}},
    )
    for system, name in SYSTEMS.items():
        whole = meter.median_and_range(of(f"{system} whole")) if f"{system} whole" in runs[0] else ""
        table.rows.append([name, meter.median_and_range(of(system)), f"{meter.ratio(of(system), slower):.2f}", whole])
    return table


def _model(setting: meter.Setting, place: Path) -> str:
    """Return the config's model folder, or save a LiteVAE-S with random weights and return its folder."""
    if setting.config.model:
        return hub.pinned(setting.config.model)
    torch.manual_seed(0)
    LiteVAE("S").save_pretrained(place / "vae")
    return str(place / "vae")


def _round(given: Request, out: Path, seconds: float) -> dict[str, float]:
    """Run every system once, and return each one's images/s and the seconds of each whole run."""
    found = halves(given, seconds)
    for system in ("job", "loop", "ray_data"):
        start = time.perf_counter()
        done = run_system(system, given, f"{out}-{system}")
        found[f"{system} whole"] = time.perf_counter() - start
        found[system] = steady(done)
    return found


def halves(given: Request, seconds: float) -> dict[str, float]:
    """Measure decoding and encoding, first alone and then at the same time but unconnected.

    Returns:
        Images/s: "decode" and "encode" alone, and "both", the slower of the two when they run at the same time.
    """
    found: dict[str, float] = {}
    with ExitStack() as stack, ThreadPoolExecutor(given.decoders + 1) as pool:
        decoders = [stack.enter_context(meter.Child(MODULE, "decode")) for _ in range(given.decoders)]
        encoders = [stack.enter_context(meter.Child(MODULE, "encode"))]

        def rates(children: list[meter.Child], seconds: float) -> list[float]:
            request = asdict(given) | {"seconds": seconds}
            return [answer["rate"] for answer in pool.map(lambda child: child.ask(**request), children)]

        rates([*decoders, *encoders], 0.0)  # loads the model and warms it up
        found["decode"], found["encode"] = sum(rates(decoders, seconds)), sum(rates(encoders, seconds))
        *together, other = rates([*decoders, *encoders], seconds)
        found["both"] = min(sum(together), other)
    return found


def run_system(system: str, given: Request, folder: str) -> list[tuple[float, int]]:
    """Run a system in a process of its own.

    Returns:
        For each file of latents the Unix time at which it was finished and its number of rows, in order of time.

    Raises:
        UserError: if the system failed, or left images out.
    """
    with meter.Child(MODULE, system) as child:
        child.ask(**asdict(given) | {"out": folder})
    out = Path(folder)
    files = [path for path in out.rglob("*.parquet") if path.parent in (out, out / "shards")]
    done = sorted((path.stat().st_mtime_ns / 1e9, pq.read_metadata(path).num_rows) for path in files)
    rows, wanted = sum(rows for _, rows in done), len(given.files)
    if rows != wanted:
        raise UserError(f"{system} encoded {rows} of {wanted} images; the source must hold only readable JPEGs")
    return done


def steady(done: Sequence[tuple[float, int]]) -> float:
    """Return the steady images/s from the times at which files were finished.

    The first quarter of the files is left out, since not all processes have started by then.
    """
    first = len(done) // 4
    seconds = done[-1][0] - done[first][0]
    return sum(rows for _, rows in done[first + 1 :]) / seconds if seconds else 0.0


# --- a system's process -------------------------------------------------------------------------------------------


class DecodeHalf:
    """Decoding alone, in one thread."""

    def __call__(self, given: Request) -> dict[str, Any]:
        transform, files = _transform(given.out), given.files
        return _rate(lambda n: transform(files[n % len(files)].read_bytes()), 1, given.seconds)


class EncodeHalf:
    """Encoding alone, in one thread, with the encoder that the job's actor uses."""

    def __init__(self) -> None:
        self._encoder: ShardEncoder | None = None
        self._batch: list[np.ndarray] = []

    def __call__(self, given: Request) -> dict[str, Any]:
        torch.set_num_threads(1)
        if self._encoder is None:
            self._encoder = ShardEncoder("", CachePlan.read(given.out), gpu=given.device == "cuda", threads=1)
            transform = _transform(given.out)
            self._batch = [transform(file.read_bytes()).pixels for file in given.files[: given.batch]]
        encoder = self._encoder
        return _rate(lambda n: encoder.encode(self._batch), given.batch, given.seconds)


def _transform(out: str) -> ImageTransform:
    return transform_of(CachePlan.read(out).views)


def _rate(work: Callable[[int], object], images: int, seconds: float) -> dict[str, Any]:
    """Call `work`, which handles `images` images, for about this many seconds but at least once; return images/s."""
    torch.set_num_threads(1)
    start, done = time.perf_counter(), 0
    while not done or time.perf_counter() - start < seconds:
        work(done)
        done += 1
    return {"rate": images * done / (time.perf_counter() - start)}


def job(given: Request) -> dict[str, Any]:
    """Run the encode job with one worker of one thread."""
    sizes = [f"rows_per_shard={given.batch}", f"batch_size={given.batch}", f"transform.resolution={SIDE}"]
    shares = ["ray.workers=1", f"ray.decode_tasks={given.decoders}", "ray.cpus_per_worker=1"]
    places = [f"source.uri={given.photos}", f"model={given.model}", f"out={given.out}", f"root={given.out}-runs"]
    gpu = f"ray.gpu={str(given.device == 'cuda').lower()}"
    encode_dataset(load(Encode, None, [*places, *sizes, *shares, gpu, "tracking.enabled=false"]))
    return {}


class Photos(torch.utils.data.Dataset):
    """A data set for a DataLoader as a user would write it."""

    def __init__(self, files: list[Path]):
        self.files, self.transform = files, ImageTransform(SIDE)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        file = self.files[index]
        return self.transform(file.read_bytes()).pixels.copy(), file.name  # copied because Pillow's array is read-only


class Model:
    """An encoder run by plain PyTorch in one thread; it is also the actor of plain Ray Data."""

    def __init__(self, folder: str, device: str):
        torch.set_num_threads(1)
        self.device = device
        self.vae = load_autoencoder(folder).to(device=device, memory_format=memory_format(device, compiled=False))

    @torch.inference_mode()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        pixels = torch.as_tensor(batch["pixels"]).to(self.device)
        with autocast(self.device, "auto"):
            latents = encode_latents(self.vae, to_tensor(pixels))
        return {"id": batch["id"], "moments": latents.half().cpu().numpy()}


def loop(given: Request) -> dict[str, Any]:
    """Encode with a DataLoader and a plain loop, and write the latents with pyarrow."""
    model, out = Model(given.model, given.device), Path(given.out)
    out.mkdir()
    loader = torch.utils.data.DataLoader(Photos(given.files), given.batch, num_workers=given.decoders)
    for number, (pixels, names) in enumerate(loader):
        latents = np.ascontiguousarray(model({"id": names, "pixels": pixels})["moments"])
        data = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(latents[0].nbytes), len(names), [None, pa.py_buffer(latents)]
        )
        pq.write_table(pa.table({"id": names, "moments": data}), out / f"{number:06d}.parquet", compression="none")
    return {}


def ray_data(given: Request) -> dict[str, Any]:
    """Encode with plain Ray Data and `write_parquet`."""
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_DATA_DISABLE_PROGRESS_BARS="1", RAY_DATA_LOG_LEVEL="ERROR")
    # With a token given here, Ray does not write one into the home folder.
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray.data

    # As many CPUs as the encode job gives itself.
    cpus = max(os.cpu_count() or 1, 1 + given.decoders) + 2
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, logging_level="ERROR")
    transform = ImageTransform(SIDE)
    rows = ray.data.read_binary_files(given.photos, include_paths=True)
    pixels = rows.map(
        lambda row: {"id": Path(row["path"]).name, "pixels": transform(row["bytes"]).pixels},
        compute=ray.data.TaskPoolStrategy(size=given.decoders),
    )
    latents = pixels.map_batches(
        Model,
        fn_constructor_args=(given.model, given.device),
        batch_size=given.batch,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0.9,  # differs from decoding's resources, or Ray would run both steps in the actor
        num_gpus=1 if given.device == "cuda" else 0,
    )
    latents.write_parquet(given.out)
    return {}


SERVED: dict[str, Callable[[], Callable[[Request], dict[str, Any]]]] = {
    "decode": DecodeHalf,
    "encode": EncodeHalf,
    "job": lambda: job,
    "loop": lambda: loop,
    "ray_data": lambda: ray_data,
}


# --- memory -------------------------------------------------------------------------------------------------------


def memory(setting: meter.Setting) -> Iterator[meter.ReportTable]:
    """Measure the peak memory of the encode job's processes for increasing numbers of images."""
    files, place, count = setting.photos(), setting.place / "memory", setting.config.encode_images
    place.mkdir()
    words = [f"model={_model(setting, place)}", f"root={place}", "tracking.enabled=false", "ray.cpus_per_worker=1"]
    words += ["transform.resolution=128", "rows_per_shard=64", f"ray.gpu={str(setting.device.type == 'cuda').lower()}"]
    folders = {times: meter.linked(files, times * count, place / f"{times}") for times in TIMES}
    found: dict[int, list[dict[str, tuple[int, int]]]] = {times: [] for times in TIMES}
    for repeat in range(setting.config.repeats):
        for times, folder in folders.items():
            places = [f"source.uri={folder}", f"out={place / f'out-{repeat}-{times}'}"]
            found[times].append(_peaks([sys.executable, str(JOB), *words, *places]))
    kinds = ["driver", *KINDS.values()]
    table = meter.ReportTable(
        "Peak memory of the encode job",
        f"MB of resident memory of the largest process of a kind, and in brackets how much of it was its own, neither "
        f"libraries nor Ray's object store; at 128 px, shards of 64 images; {setting.config.repeats} runs: medians.",
        ["images", *kinds],
        samples={f"{times * count} images, bytes": runs for times, runs in found.items()},
    )
    for times, runs in found.items():
        medians = [[statistics.median(run[kind][n] for run in runs) / 1e6 for n in (0, 1)] for kind in kinds]
        table.rows.append([f"{times * count:,}", *(f"{most:,.0f} ({own:,.0f})" for most, own in medians)])
    yield table


def _peaks(command: list[str]) -> dict[str, tuple[int, int]]:
    """Run the encode job, and watch the memory of its processes.

    Returns:
        For each kind of process, in bytes: the largest resident memory of one process, and the largest part of it that
        was not shared.

    Raises:
        UserError: if the job failed.
    """
    found: dict[str, tuple[int, int]] = {}
    with tempfile.TemporaryFile("w+") as log:
        job = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while job.poll() is None:
            for process in [job, *job.children(recursive=True)]:
                try:
                    kind, memory = _kind(process, job.pid), process.memory_info()
                    most = process_memory("VmHWM", process.pid)
                except (psutil.Error, OSError, StopIteration):
                    continue  # the process has ended meanwhile
                before = found.get(kind, (0, 0))
                found[kind] = max(before[0], most), max(before[1], memory.rss - memory.shared)
            try:
                job.wait(0.1)
            except psutil.TimeoutExpired:
                continue
        if job.returncode:
            log.seek(0)
            raise UserError(f"the encode job failed:\n{log.read().strip()[-2000:]}")
    return found


def _kind(process: psutil.Process, driver: int) -> str:
    """Return the kind of a process by its title, in which Ray's workers name what they do."""
    if process.pid == driver:
        return "driver"
    title = " ".join(process.cmdline())
    return next((kind for start, kind in KINDS.items() if start in title), "others")


if __name__ == "__main__":
    system = SERVED[sys.argv[1]]()
    meter.serve(lambda request: system(Request(**request)))
