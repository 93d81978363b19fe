"""MLflow tracking that never holds training up.

Metrics are appended to <folder>/metrics.jsonl and pictures saved under <folder>/images/; a background thread carries
both to MLflow, as far as MLflow takes them. How much of metrics.jsonl has arrived is noted in the MLflow run itself,
in the same call, so a server that was away is caught up with and nothing is logged twice. A step that is already in
metrics.jsonl is not logged again: a resumed run repeats the steps after its last checkpoint.

On the driver: start_run, link, finish. In the driver or in rank 0 of the workers: Tracker(handle). A job whose driver
does it all: tracked.
"""

import errno
import json
import math
import os
import queue
import re
import shlex
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from litevae import storage
from litevae.errors import UserError, redact
from pipelines.runtime import mlflow_server
from pipelines.runtime.metrics_log import clear_log, mend_log, metric_name, parse_line
from pipelines.runtime.mlflow_server import RunHandle, Status
from pipelines.runtime.paths import output_path
from pipelines.runtime.schema import Tracked, Tracking

CLOSE_TIMEOUT = 300  # for uploads that go on; close() gives up at the first failure

FLUSH_EVERY = 2.0
SYSTEM_EVERY = 10.0
_SENT = "litevae.metrics_sent"  # run tag: bytes of metrics.jsonl that have arrived
_CHUNK = 16 * 2**10  # bytes of metrics.jsonl a request: some hundreds of metrics (MLflow takes 1000)


def start_run(
    config: Tracking,
    root: str,
    job: str,
    name: str,
    params: dict[str, Any],
    folder: str,
    tags: dict[str, str] | None = None,
    resume: bool = True,
) -> RunHandle:
    """Open the MLflow run of a run folder; on the driver.

    With `resume` the run that this job had in `folder` goes on; without, metrics and pictures of an earlier one are
    removed from `folder` and a new run begins. A server that does not answer costs one warning and a few seconds.

    Raises:
        UserError: the tracking URI is of a kind that MLflow can't use.
    """
    folder = os.path.abspath(folder)
    os.makedirs(folder, exist_ok=True)
    if not resume:
        clear_log(folder)
    uri = tracking_uri(config, root) if config.enabled else ""
    handle = RunHandle(uri, None, config.experiment, folder)
    if not uri:
        return handle
    labels = {"litevae.job": job, "litevae.folder": folder, "mlflow.source.name": f"jobs/{job}.py"}
    labels |= config.tags | (tags or {}) | ({"mlflow.parentRunId": config.parent} if config.parent else {})
    # The first use of an SQLite store creates its tables: seconds on an idle disk.
    seconds = 3 * mlflow_server.REQUEST_TIMEOUT if mlflow_server.is_server(uri) else 120
    return (
        mlflow_server.attempt(
            handle,
            seconds,
            partial(mlflow_server.open_run, handle, root, config.run or name, params, redact(labels), resume),
        )
        or handle
    )


def finish(handle: RunHandle, status: Status = "FINISHED") -> None:
    """Set how the run ended; on the driver, after every Tracker was closed."""
    if handle.run_id:
        mlflow_server.attempt(
            handle,
            2 * mlflow_server.REQUEST_TIMEOUT,
            lambda: mlflow_server.client_of(handle.uri).set_terminated(handle.run_id, status),
        )


def link(handle: RunHandle) -> str:
    """What to open or type to see the run."""
    if handle.run_id is None:
        return os.path.join(handle.folder, "metrics.jsonl")
    if mlflow_server.is_server(handle.uri):
        server = re.sub(r"(?<=://)[^/?#\s]*@", "", handle.uri).rstrip("/")
        return f"{server}/#/experiments/{handle.experiment_id}/runs/{handle.run_id}"
    command = "mlflow" if shutil.which("mlflow") else str(Path(sys.executable).with_name("mlflow"))
    return f"{shlex.quote(command)} ui --workers 1 --backend-store-uri {shlex.quote(redact(handle.uri))}"


def tracking_uri(config: Tracking, root: str) -> str:
    """tracking.uri, else $MLFLOW_TRACKING_URI, else SQLite beside the runs: not in the working directory, which is a
    throw-away copy in a submitted job. SQLite paths are made absolute: workers may run elsewhere."""
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{output_path('root', root)}/mlflow.db"
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        raise UserError(
            f"{'tracking.uri' if config.uri else '$MLFLOW_TRACKING_URI'}={uri}: MLflow keeps runs in a server or a "
            f"database; give http://host:port or sqlite:////path/mlflow.db, or set tracking.enabled=false"
        )
    if scheme == "sqlite":
        path = output_path("tracking.uri", rest.removeprefix("/"))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return f"sqlite:///{path}"
    return uri


@contextmanager
def tracked_run(
    cfg: Tracked, job: str, name: str, folder: str, resume: bool = False
) -> Iterator[tuple["Tracker", RunHandle]]:
    """The run of a job that logs from its driver alone, closed however the job ends: see `start_run`.

    Raises:
        UserError: as `start_run`.
    """
    run = start_run(cfg.tracking, cfg.root, job, name, cfg.model_dump(mode="json"), folder, resume=resume)
    tracker = Tracker(run)
    status: Status = "FAILED"
    try:
        yield tracker, run
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.close(status)


class Tracker:
    """Logs one run. Calls return at once and never fail because of MLflow; opening one imports MLflow (2 s).

    Use one at a time a run: in the driver or in rank 0 of the workers. With `system`, the CPU, memory, disk, network
    and GPU use of this machine goes to MLflow too.
    """

    def __init__(self, handle: RunHandle, system: bool = True) -> None:
        self._handle = handle
        os.makedirs(handle.folder, exist_ok=True)
        self._path = os.path.join(handle.folder, "metrics.jsonl")
        self._last = mend_log(self._path)
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed in close()
        # Here and not in the thread: a data loader forked in the middle of an import would inherit its locks.
        self._client: Any = (
            mlflow_server.attempt(handle, 60, lambda: mlflow_server.client_of(handle.uri)) if handle.run_id else None
        )
        self._queue: queue.Queue[Callable[[], None]] = queue.Queue(maxsize=256)  # what calls leave to the thread
        self._uploads: deque[Callable[[], None]] = deque(maxlen=1000)  # what the thread still has to bring to MLflow
        self._sent: int | None = None
        self._system = system
        self._monitor: Any = None
        self._sampled = 0.0
        self._failing = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Log numbers; a step that a metric already has is left as it is.

        Raises:
            UserError: metrics.jsonl can't be written: a full disk takes no checkpoint either.
        """
        fresh = {
            name: float(value) for key, value in values.items() if self._last.get(name := metric_name(key), -1) < step
        }
        if not fresh:
            return
        self._last.update(dict.fromkeys(fresh, step))
        # JSON has no NaN
        shown = {name: value if math.isfinite(value) else str(value) for name, value in fresh.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3)} | shown)
        self._append(line.encode() + b"\n")

    def _append(self, line: bytes) -> None:
        """One write: a line is there or not, whatever kills us."""
        try:
            if (written := self._file.write(line)) != len(line):
                self._file.truncate(os.path.getsize(self._path) - (written or 0))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise storage.unwritable(self._path, error) from error

    def image(self, key: str, image: np.ndarray, step: int) -> None:
        """Log a picture, uint8 HWC (RGB): <folder>/images/<key>-<step>.png, and MLflow's picture of that step."""
        path = Path(self._handle.folder, "images", f"{metric_name(key).replace('/', '-')}-{step:012d}.png")
        if not path.exists():
            self._put(partial(self._picture, metric_name(key), np.array(image), step, path))

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Upload a file; it must stay as it is until close()."""
        self._put(partial(self._upload, os.path.abspath(path), "log_artifact", folder))

    def artifacts(self, path: str | Path, folder: str = "") -> None:
        """Upload what is in a folder; it must stay as it is until close()."""
        self._put(partial(self._upload, os.path.abspath(path), "log_artifacts", folder))

    def dataset(self, name: str, digest: str, source: str, context: str = "training") -> None:
        """Note what the run read: a name, the digest of the contents, and where it is."""
        self._put(lambda: self._uploads.append(partial(self._log_dataset, name, digest, redact(source), context)))

    def close(self, status: Status | None = None) -> None:
        """Bring everything to MLflow that it takes, and with `status` end the run there."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join(CLOSE_TIMEOUT)
        self._empty_queue()  # pictures go to disk even where the thread is stuck in MLflow
        self._file.close()
        if status and not self._failing and not self._thread.is_alive():
            finish(self._handle, status)

    # --- the thread ---------------------------------------------------------------------------------------------

    def _put(self, work: Callable[[], None]) -> None:
        try:
            self._queue.put_nowait(work)
        except queue.Full:
            mlflow_server.warn_once(
                self._handle, "too many pictures and files are waiting; further ones are dropped until it catches up"
            )

    def _run(self) -> None:
        wait = FLUSH_EVERY
        while True:
            last = self._closing.is_set()  # before delivering, so that nothing logged earlier is missed
            try:
                self._empty_queue()
                if self._client is not None:
                    self._deliver()
                self._failing, wait = False, FLUSH_EVERY
            except Exception as error:  # noqa: BLE001 - the boundary: whatever MLflow raises is reported, and training goes on
                self._failing, wait = True, min(2 * max(wait, mlflow_server.BACKOFF[0] / 2), mlflow_server.BACKOFF[1])
                mlflow_server.warn_once(self._handle, error)
            if last or (self._failing and self._closing.is_set()):
                return
            self._closing.wait(wait)

    def _empty_queue(self) -> None:
        while True:
            try:
                work = self._queue.get_nowait()
            except queue.Empty:
                return
            work()

    def _deliver(self) -> None:
        mlflow_server.set_timeout(mlflow_server.REQUEST_TIMEOUT)
        if self._sent is None:
            sent = int(self._client.get_run(self._handle.run_id).data.tags.get(_SENT, 0))
            # A file shorter than that is another one. Sending a line twice is harmless: MLflow drops exact doubles.
            self._sent = sent if sent <= os.path.getsize(self._path) else 0
        self._send_metrics()
        if self._system and time.monotonic() - self._sampled >= SYSTEM_EVERY:
            self._send_system_metrics()
        while self._uploads:
            self._uploads.rotate(-1)  # one that fails goes behind the others
            self._uploads[-1]()
            self._uploads.pop()

    def _send_metrics(self) -> None:
        from mlflow.entities import Metric, RunTag

        assert self._sent is not None
        with open(self._path, "rb") as file:
            file.seek(self._sent)
            while lines := [line for line in file.readlines(_CHUNK) if line.endswith(b"\n")]:
                sent = self._sent + sum(map(len, lines))
                metrics = [
                    Metric(key, value, int(moment * 1000), step)
                    for step, moment, values in map(parse_line, lines)
                    for key, value in values.items()
                ]
                self._client.log_batch(self._handle.run_id, metrics, tags=[RunTag(_SENT, str(sent))], synchronous=True)
                self._sent = sent

    def _send_system_metrics(self) -> None:
        from mlflow.entities import Metric

        if self._monitor is None:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            # Its probes only: its own thread would ask a dead server on its own account, and close() wait for it.
            self._monitor = SystemMetricsMonitor(self._handle.run_id, tracking_uri=self._handle.uri)
        self._sampled, now = time.monotonic(), time.time()
        self._monitor.collect_metrics()
        values = self._monitor.aggregate_metrics()
        for probe in self._monitor.monitors:
            probe.clear_metrics()
        step = int(now - self._handle.started)  # goes on after a resume
        metrics = [Metric(f"system/{key}", value, int(now * 1000), step) for key, value in values.items()]
        self._client.log_batch(self._handle.run_id, metrics, synchronous=True)

    def _picture(self, key: str, image: np.ndarray, step: int, path: Path) -> None:
        from PIL import Image

        path.parent.mkdir(parents=True, exist_ok=True)
        partly = path.with_suffix(".tmp")
        Image.fromarray(image).save(partly, format="png")
        partly.replace(path)
        self._uploads.append(partial(self._log_image, key, step, path))

    def _log_image(self, key: str, step: int, path: Path) -> None:
        from PIL import Image

        with Image.open(path) as image:
            image.load()
            self._client.log_image(self._handle.run_id, image, key=key, step=step, synchronous=True)

    def _upload(self, path: str, method: str, folder: str) -> None:
        self._uploads.append(partial(self._log_files, path, method, folder))

    def _log_files(self, path: str, method: str, folder: str) -> None:
        if not os.path.exists(path):
            print(f"warning: {path} is gone; it is not uploaded to MLflow", file=sys.stderr, flush=True)
            return
        self._client.get_run(self._handle.run_id)  # a server that hangs shows here, within the short timeout
        mlflow_server.set_timeout(mlflow_server.UPLOAD_TIMEOUT)
        try:
            getattr(self._client, method)(self._handle.run_id, path, folder or None)
        finally:
            mlflow_server.set_timeout(mlflow_server.REQUEST_TIMEOUT)

    def _log_dataset(self, name: str, digest: str, source: str, context: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=name,
            digest=digest[:36],  # MLflow's limit
            source_type=source.partition("://")[0] if "://" in source else "local",
            source=json.dumps({"uri": source}),
            profile=json.dumps({"digest": digest}),
        )
        tag = InputTag("mlflow.data.context", context)
        self._client.log_inputs(self._handle.run_id, [DatasetInput(dataset, [tag])])


def replay(folder: str, tracker: Tracker, step: int, training: bool = False) -> dict[str, float]:
    """Log again what was logged in another run's folder: step 0 as `step`, other steps and pictures as they are.

    Returns the last value of each metric.

    Args:
        training: only what is of a training, not of evaluations that were logged in its folder.
    """
    last: dict[str, float] = {}
    for line in Path(folder, "metrics.jsonl").read_bytes().splitlines():
        at, _, values = parse_line(line)
        values = {key: value for key, value in values.items() if not (training and key.startswith("eval/"))}
        tracker.metrics(values, at or step)
        last |= values
    from PIL import Image

    for path in sorted(Path(folder, "images").glob(f"{'val-' if training else ''}*-" + "[0-9]" * 12 + ".png")):
        key = path.stem[:-13]
        with Image.open(path) as image:
            tracker.image(
                key.replace("-", "/", 1) if training else key, np.asarray(image), int(path.stem[-12:]) or step
            )
    return last
