"""MLflow tracking that never delays training.

Metrics are appended to <folder>/metrics.jsonl and pictures are saved in <folder>/images/. A background thread sends
both to MLflow whenever MLflow accepts them. The call that sends metrics also records in the MLflow run how much of
metrics.jsonl has arrived. So metrics are sent later if a server was unavailable, and none are logged twice. A resumed
run repeats the steps after its last checkpoint; steps that are already in metrics.jsonl are not logged again.

Use start_run, link and finish on the driver. Use Tracker(handle) on the driver or in rank 0 of the workers. A job that
logs on its driver only can use tracked_run instead.
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
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np

from litevae import storage
from litevae.errors import UserError, redact
from pipelines.runtime import cluster, mlflow_server, mlflow_target, paths
from pipelines.runtime.logs import say
from pipelines.runtime.metrics_log import clear_log, metric_name, parse_line, repair_log
from pipelines.runtime.mlflow_server import RunHandle, Status
from pipelines.runtime.paths import output_path
from pipelines.runtime.schema import Tracked, Tracking

EXPERIMENT = "litevae"  # where neither the config nor the environment names one
CLOSE_TIMEOUT = 300  # seconds that close() waits for uploads that make progress; it gives up at the first failure

FLUSH_EVERY = 2.0  # seconds
BACKOFF = (5.0, 300.0)  # first and longest wait after a failure, in seconds
SYSTEM_EVERY = 10.0  # seconds
_CHUNK = 16 * 2**10  # bytes of metrics.jsonl per request: a few hundred metrics (MLflow accepts 1000)


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
    """Open the MLflow run of a run folder. Call this on the driver.

    If the server does not answer, the only cost is one warning and a few seconds.

    Args:
        config: the tracking section of the config. What it leaves empty is taken from MLflow's environment variables,
            see `target_of`.
        root: folder of the default MLflow database.
        job: name of the job.
        name: name of the run, unless `config.run` gives one.
        params: config values to record; secrets are removed.
        folder: the run folder.
        tags: further tags of the run.
        resume: True: continue the run that this job had in `folder`. False: delete metrics and pictures of an earlier
            run from `folder`, and begin a new run.

    Raises:
        UserError: if MLflow can't use this kind of tracking URI, or if the experiment or the run that is asked for was
            deleted or is not there. `check` finds this before Ray starts.
    """
    folder = os.path.abspath(folder)
    uri = tracking_uri(config, root) if config.enabled else ""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise storage.unwritable(folder, error) from error
    make_folder(uri)
    target = target_of(config)
    handle = RunHandle(uri, None, target.experiment, folder)
    if not uri:
        if not resume:
            clear_log(folder)
        return handle
    labels = {"litevae.job": job, "litevae.folder": folder, "mlflow.source.name": f"jobs/{job}.py"}
    labels |= config.tags | (tags or {}) | ({"mlflow.parentRunId": config.parent} if config.parent else {})
    # The first use of an SQLite store creates its tables, which takes seconds even on an idle disk.
    seconds = 3 * mlflow_server.REQUEST_TIMEOUT if mlflow_server.is_server(uri) else 120
    named = config.run or name

    def opened() -> RunHandle:
        return mlflow_server.open_run(handle, target, root, named, params, redact(labels), resume, bool(config.run))

    handle = mlflow_server.attempt(handle, seconds, opened) or handle
    if not resume:  # now, since a run that is refused leaves what is there
        clear_log(folder)
    return handle


def check(cfg: Tracked) -> None:
    """Check, before Ray starts, whether the run can be tracked where the config and the environment want it.

    A server that does not answer is no reason to refuse a job: `start_run` warns of it. In a worker of Ray, such as a
    trial of a sweep, nothing is checked: Ray runs, and the driver has done it.

    Raises:
        UserError: if MLflow can't use this kind of tracking URI, or if the experiment or a run that is asked for was
            deleted or is not there.
    """
    config = cfg.tracking
    if not config.enabled or cluster.in_worker():
        return
    check_place(cfg)
    uri, target = tracking_uri(config, cfg.root), target_of(config)
    file = _file_of(uri)
    if file and not os.path.exists(file) and not (target.run_id or target.experiment_id or config.parent):
        return  # there is nothing yet that could have been deleted

    def look() -> None:
        make_folder(uri)
        client = mlflow_server.client_of(uri)
        if config.parent:
            mlflow_target.check_parent(client, uri, config.parent)
        if mlflow_target.run_to_join(client, uri, target) is None:
            mlflow_target.find_experiment(client, uri, target)

    _, error = mlflow_server.ask(60 if file else 3 * mlflow_server.REQUEST_TIMEOUT, look)
    if isinstance(error, ImportError) or type(error).__name__ == "NoSuchModuleError":  # of the database's driver
        raise UserError(
            f"{_uri_from(config)}={uri}: {error}; install the driver of this database on every node, or set "
            f"tracking.enabled=false"
        )


def check_place(cfg: Tracked) -> None:
    """Check at once, without MLflow, that the tracking URI is of a usable kind, and that SQLite can be written.

    Raises:
        UserError: if not.
    """
    if cfg.tracking.enabled and (file := _file_of(tracking_uri(cfg.tracking, cfg.root))):
        default = not cfg.tracking.uri and not os.environ.get("MLFLOW_TRACKING_URI")
        paths.check_local("root" if default else "tracking.uri", os.path.dirname(file))


def make_folder(uri: str) -> None:
    """Make the folder of an SQLite database.

    Raises:
        UserError: if it can't be made.
    """
    if file := _file_of(uri):
        try:
            os.makedirs(os.path.dirname(file), exist_ok=True)
        except OSError as error:
            raise storage.unwritable(os.path.dirname(file), error) from error


def _file_of(uri: str) -> str:
    """Return the file of an SQLite database, or "" if a tracking URI is none."""
    return uri.partition(":///")[2].partition("?")[0] if uri.startswith("sqlite") else ""


def finish(handle: RunHandle, status: Status = "FINISHED") -> None:
    """Record how the run ended. Call this on the driver, after every Tracker was closed."""
    if handle.run_id:
        mlflow_server.attempt(
            handle,
            2 * mlflow_server.REQUEST_TIMEOUT,
            lambda: mlflow_server.client_of(handle.uri).set_terminated(handle.run_id, status),
        )


def link(handle: RunHandle) -> str:
    """Return how to see the run: a URL, a command to type, or the path of metrics.jsonl."""
    if handle.run_id is None:
        return os.path.join(handle.folder, "metrics.jsonl")
    if mlflow_server.is_server(handle.uri):
        server = re.sub(r"(?<=://)[^/?#\s]*@", "", handle.uri).rstrip("/")
        return f"{server}/#/experiments/{handle.experiment_id}/runs/{handle.run_id}"
    command = "mlflow" if shutil.which("mlflow") else str(Path(sys.executable).with_name("mlflow"))
    return f"{shlex.quote(command)} ui --workers 1 --backend-store-uri {shlex.quote(redact(handle.uri))}"


def target_of(config: Tracking) -> mlflow_target.Target:
    """Return which experiment and run are asked for: the config's, else those of MLflow's environment variables."""
    name, number, run_id = (
        os.environ.get(f"MLFLOW_{what}", "") for what in ("EXPERIMENT_NAME", "EXPERIMENT_ID", "RUN_ID")
    )
    if config.join and config.parent and run_id:
        mlflow_target.say_once(f"MLflow: $MLFLOW_RUN_ID={run_id} is left alone: tracking.parent={config.parent}")
    if not config.join or config.parent:
        run_id = ""
    elsewhere = bool(config.uri) and config.uri != os.environ.get("MLFLOW_TRACKING_URI")
    if config.experiment:
        other = f"$MLFLOW_EXPERIMENT_NAME={name}" if name not in ("", config.experiment) else ""
        return mlflow_target.Target(config.experiment, "", "tracking.experiment", other, run_id, elsewhere)
    by = "$MLFLOW_EXPERIMENT_NAME" if name else "$MLFLOW_EXPERIMENT_ID" if number else ""
    return mlflow_target.Target(name or ("" if number else EXPERIMENT), number, by, "", run_id, elsewhere)


def tracking_uri(config: Tracking, root: str) -> str:
    """Return the tracking URI: `tracking.uri`, else $MLFLOW_TRACKING_URI, else SQLite in the folder of the runs.

    The default is not in the working directory, which is a temporary copy in a submitted job. SQLite paths are made
    absolute, because workers may run in another directory.

    Raises:
        UserError: if MLflow can't use this kind of URI.
    """
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{output_path('root', root)}/mlflow.db"
    scheme, separator, rest = uri.partition(":")
    scheme = scheme.lower()
    kind = scheme.partition("+")[0]
    if kind == "sqlite":
        if rest.strip("/") in ("", ":memory:"):
            raise UserError(f"{_uri_from(config)}={uri}: give the database's file: sqlite:////path/mlflow.db")
        path = output_path("tracking.uri", rest.removeprefix("//").removeprefix("/"))
        return f"{scheme}:///{path}"
    known = (kind in mlflow_target.DATABASES or scheme in ("http", "https")) and rest[:2] == "//" != rest
    if known or (separator and scheme in _plugins()):
        return f"{scheme}:{rest}"
    raise UserError(f"{_uri_from(config)}={uri}: {_why_not(uri, scheme)}, or set tracking.enabled=false")


def _uri_from(config: Tracking) -> str:
    """Return where the tracking URI is given, for messages."""
    return "tracking.uri" if config.uri else "$MLFLOW_TRACKING_URI"


def _plugins() -> set[str]:
    """Return the schemes of tracking URIs that installed packages add to MLflow, such as azureml."""
    return {entry.name for entry in entry_points(group="mlflow.tracking_store")}


def _why_not(uri: str, scheme: str) -> str:
    """Return why a tracking URI can't be used, and what to give."""
    servers = "give tracking.uri=http://host:port of an MLflow server, or sqlite:////path/mlflow.db"
    if scheme in ("databricks", "databricks-uc", "uc"):
        return f"tracking on Databricks is not supported; {servers}"
    if scheme == "postgres":
        return f"MLflow calls this kind postgresql; give tracking.uri=postgresql{uri[len(scheme) :]}"
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", uri):
        return f"it lacks its scheme; give tracking.uri=http://{uri}"
    if scheme in ("http", "https") or scheme.partition("+")[0] in mlflow_target.DATABASES:
        return f"it names no host; give tracking.uri={scheme}://{uri[len(scheme) + 1 :].lstrip('/') or 'host:port'}"
    if re.match(r"[\w+.-]{2,}:", uri) and scheme != "file":
        return f"{scheme} is not supported: no package that adds it to MLflow is installed; {servers}"
    return f"MLflow keeps runs in a server or a database, not in a folder; {servers}"


@contextmanager
def tracked_run(
    cfg: Tracked, job: str, name: str, folder: str, resume: bool = False
) -> Iterator[tuple["Tracker", RunHandle]]:
    """Open the run of a job that logs on its driver only, and close it however the job ends.

    Args:
        cfg: the config of the job.
        job, name, folder, resume: see `start_run`.

    Yields:
        The tracker and the handle of the run.

    Raises:
        UserError: see `start_run`.
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
    """A logger of one run. Its methods return at once and never fail because of MLflow.

    Creating a tracker imports MLflow, which takes 2 s. A run must have only one tracker at a time: on the driver, or in
    rank 0 of the workers.

    Args:
        handle: the run.
        system: whether to send the CPU, memory, disk, network and GPU use of this machine to MLflow too.
    """

    def __init__(self, handle: RunHandle, system: bool = True) -> None:
        self._handle = handle
        os.makedirs(handle.folder, exist_ok=True)
        self._path = os.path.join(handle.folder, "metrics.jsonl")
        self._last = repair_log(self._path)
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed in close()
        # Import MLflow here, not in the thread: a data loader that is forked during an import would inherit its locks.
        self._client: Any = (
            mlflow_server.attempt(handle, 60, lambda: mlflow_server.client_of(handle.uri)) if handle.run_id else None
        )
        self._queue: queue.Queue[Callable[[], None]] = queue.Queue(maxsize=256)  # work that methods leave to the thread
        self._uploads: deque[Callable[[], None]] = deque(maxlen=1000)  # what the thread still has to send to MLflow
        self._sent: int | None = None
        self._system = system
        self._monitor: Any = None
        self._sampled = 0.0
        self._failing = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._send_with_retries, name="tracking", daemon=True)
        self._thread.start()

    def metrics(self, values: dict[str, float], step: int) -> None:
        """Log numbers at a step. A metric that already has a value at this step, or at a later one, keeps it.

        Raises:
            UserError: if metrics.jsonl can't be written. This ends the job, since a full disk takes no checkpoint
                either.
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
        """Append a line in one write, so that a kill leaves the whole line or nothing of it."""
        try:
            if (written := self._file.write(line)) != len(line):
                self._file.truncate(os.path.getsize(self._path) - (written or 0))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise storage.unwritable(self._path, error) from error

    def image(self, key: str, image: np.ndarray, step: int) -> None:
        """Log a picture to <folder>/images/<key>-<step>.png and to MLflow.

        Args:
            key: name of the picture.
            image: uint8 (H, W, 3), RGB.
            step: the step that it belongs to. A picture that already exists is kept.
        """
        path = Path(self._handle.folder, "images", f"{metric_name(key).replace('/', '-')}-{step:012d}.png")
        if not path.exists():
            self._put(partial(self._picture, metric_name(key), np.array(image), step, path))

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Upload a file to MLflow. It must not change until close()."""
        self._put(partial(self._upload, os.path.abspath(path), "log_artifact", folder))

    def artifacts(self, path: str | Path, folder: str = "") -> None:
        """Upload the content of a folder to MLflow. It must not change until close()."""
        self._put(partial(self._upload, os.path.abspath(path), "log_artifacts", folder))

    def dataset(self, name: str, digest: str, source: str, context: str = "training") -> None:
        """Record a dataset that the run read.

        Args:
            name: its name.
            digest: digest of its content.
            source: its path or URI; secrets are removed.
            context: what it was used for.
        """
        self._put(lambda: self._uploads.append(partial(self._log_dataset, name, digest, redact(source), context)))

    def close(self, status: Status | None = None) -> None:
        """Send everything to MLflow that it accepts, and stop the thread. With `status`, end the run in MLflow too."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join(CLOSE_TIMEOUT)
        self._empty_queue()  # pictures are saved even if the thread is stuck in MLflow
        self._file.close()
        if status and not self._failing and not self._thread.is_alive():
            finish(self._handle, status)

    # --- the thread ---------------------------------------------------------------------------------------------

    def _put(self, work: Callable[[], None]) -> None:
        """Leave work to the thread. If too much is waiting, warn and drop it."""
        try:
            self._queue.put_nowait(work)
        except queue.Full:
            mlflow_server.warn_once(
                self._handle, "too many pictures and files are waiting; further ones are dropped until it catches up"
            )

    def _send_with_retries(self) -> None:
        """Save pictures and send everything to MLflow until close(). After each failure, wait longer."""
        wait = FLUSH_EVERY
        while True:
            last = self._closing.is_set()  # read before sending, so that nothing logged earlier is missed
            try:
                self._empty_queue()
                if self._client is not None:
                    self._deliver()
                self._failing, wait = False, FLUSH_EVERY
            except Exception as error:  # noqa: BLE001 - whatever MLflow raises is reported here, and training continues
                self._failing, wait = True, min(2 * max(wait, BACKOFF[0] / 2), BACKOFF[1])
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
        """Send the metrics that MLflow does not have yet, the use of the system, and the uploads."""
        mlflow_server.set_timeout(mlflow_server.REQUEST_TIMEOUT)
        if self._sent is None:
            sent = int(self._client.get_run(self._handle.run_id).data.tags.get(mlflow_server.SENT, 0))
            # A shorter file is another one, so it is sent from its start. It does no harm to send a line twice, because
            # MLflow drops exact duplicates.
            self._sent = sent if sent <= os.path.getsize(self._path) else 0
        self._send_metrics()
        if self._system and time.monotonic() - self._sampled >= SYSTEM_EVERY:
            self._send_system_metrics()
        while self._uploads:
            self._uploads.rotate(-1)  # one that fails is tried again after the others
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
                self._client.log_batch(
                    self._handle.run_id, metrics, tags=[RunTag(mlflow_server.SENT, str(sent))], synchronous=True
                )
                self._sent = sent

    def _send_system_metrics(self) -> None:
        from mlflow.entities import Metric

        if self._monitor is None:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            # Use its probes only. Its own thread would also ask a dead server, and close() would wait for it.
            self._monitor = SystemMetricsMonitor(self._handle.run_id, tracking_uri=self._handle.uri)
        self._sampled, now = time.monotonic(), time.time()
        self._monitor.collect_metrics()
        values = self._monitor.aggregate_metrics()
        for probe in self._monitor.monitors:
            probe.clear_metrics()
        step = int(now - self._handle.started)  # seconds, which continue after a resume
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
            say(f"warning: {path} does not exist any more; it is not uploaded to MLflow", "WARNING")
            return
        self._client.get_run(self._handle.run_id)  # a server that hangs fails here, within the short timeout
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
    """Log again what was logged in the folder of another run.

    Args:
        folder: the folder of the other run.
        tracker: the tracker of this run.
        step: the step at which values and pictures of step 0 are logged; other steps stay as they are.
        training: whether to log only what a training logged, without evaluations that were logged in its folder.

    Returns:
        The last value of each metric.
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
