"""Exactly once, whatever dies: drivers, encoders, decoding tasks and a node are killed at random moments, with the
cache on S3 and, while it is encoded, appended to, repaired and retried, on a disk; what is there in the end is what an
undisturbed run makes."""

import contextlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from litevae import storage
from pipelines.encoding import verify
from pipelines.encoding.encode import encode_dataset
from tests.encoding import BAD, JOB, config, crops, photo_folder, save_model, shard_bytes, start_job
from tests.in_process import in_process
from tests.nodes import cluster, title_of

pytestmark = pytest.mark.chaos

SEED = 2026
TITLES = {
    "decode": "ray::Map(decode_shard)",
    "encoder": "ray::MapWorker(Map(ShardEncoder))",
}  # as Ray names its processes
SIZES = ("rows_per_shard=3", "transform.resolution=96", "batch_size=16", "kernels=torch")  # a third of a second each
TWO = ("ray.workers=2", "ray.decode_tasks=2")  # of each one for either node
# `Job` has a method for each.
KINDS = ("driver", "second", "encoder", "written", "decode", "raylet")
KILLS = 6  # at least
PATIENCE = 120  # seconds; where nothing happens for that long, something hangs


# --- a cluster of two nodes -------------------------------------------------------------------------------------


SIZE = {"num_cpus": 4}


@contextlib.contextmanager
def two_nodes():
    with cluster(**SIZE) as nodes:
        be_two(nodes)
        yield nodes


def be_two(nodes):
    if "second" not in nodes:
        nodes.add("second", **SIZE)


# --- a job that is disturbed --------------------------------------------------------------------------------------


@dataclass
class Driver:
    process: subprocess.Popen
    log: Path
    started: float
    commits: int  # that there were then


class Job:
    """A job on a cache, which is started again until it is finished; then it begins on another cache.

    Its methods named in `KINDS` kill, or do other mischief, and say how many processes they killed.

    Args:
        launch: (out, **options of Popen) -> the process of a driver.
        outs: caches.
        check: called with each that is finished.
    """

    def __init__(self, nodes, folder, seed, launch, outs, check):
        self.nodes, self.folder, self.launch, self.check = nodes, folder, launch, check
        self.random, self.begin = random.Random(seed), time.monotonic()
        self.outs, self.out, self.done = iter(outs), None, []
        self.drivers: list[Driver] = []
        self.dead: set[psutil.Process] = set()
        self.kills, self.started, self.restarts = Counter(), 0, 0
        self.say(f"seed {seed!r}")

    def say(self, text):
        """pytest shows it where the test fails."""
        print(f"{time.monotonic() - self.begin:7.2f} s  {text}", flush=True)

    def disturb(self, kinds):
        """Do all that, and see the last cache finished."""
        for kind in kinds:
            be_two(self.nodes)
            while not (killed := getattr(self, kind)()) and kind != "second":
                self.say(f"{kind}: too late")
            self.kills += Counter({kind: killed})
        be_two(self.nodes)
        self.wait(lambda: self.out is None and self.done)
        self.say(
            f"killed {sum(self.kills.values())}: {dict(self.kills)}; "
            f"{self.started} drivers, {self.restarts} of which stopped; {len(self.done)} caches"
        )

    def close(self):
        for driver in self.drivers:
            driver.process.kill()
            driver.process.wait()

    def names(self, folder):
        return storage.names(storage.join(self.out, folder)) if self.out else []

    def start(self):
        self.out = self.out or str(next(self.outs))
        log = self.folder / f"driver-{self.started}.txt"
        with log.open("w") as file:
            environment = os.environ | {"RAY_ADDRESS": self.nodes.address}
            process = self.launch(self.out, stdout=file, env=environment)
        self.drivers.append(Driver(process, log, time.time(), len(self.names("commits"))))
        self.started += 1
        self.say(f"driver {process.pid} starts: {self.out}, {self.drivers[-1].commits} commits")

    def tend(self):
        """Look after drivers that ended."""
        ended = [driver for driver in self.drivers if driver.process.poll() is not None]
        self.drivers = [driver for driver in self.drivers if driver not in ended]
        well = [self.finished(driver) for driver in ended]
        if not any(well):
            return
        for driver in self.drivers:
            driver.process.wait(2 * PATIENCE)
            self.finished(driver)
        self.drivers = []
        self.check(self.out)
        self.say(f"{self.out} is sound")
        self.done.append(self.out)
        self.out = None

    def finished(self, driver):
        """Whether a driver that ended had finished; the only other end is that it gave a shard up."""
        code, text = driver.process.returncode, driver.log.read_text(errors="replace")
        self.say(f"driver {driver.process.pid} ends with {code}")
        if code == 2 and "error: encoding stopped after " in text and "the same command continues" in text:
            self.restarts += 1
            return False
        assert code == 0, f"driver {driver.process.pid} ended with {code}:\n{text}"
        return True

    def wait(self, found, every=0.05):
        """Until `found()` is something. Meanwhile there is always a driver."""
        end, before = time.monotonic() + PATIENCE, None
        while True:
            self.tend()
            if what := found():
                return what
            if not self.drivers:
                self.start()
            if time.monotonic() > end:
                now = self.out, self.names("commits")
                logs = [driver.log for driver in self.drivers]
                assert now != before, f"nothing happens for {PATIENCE} s:\n" + "\n".join(map(Path.read_text, logs))
                end, before = time.monotonic() + PATIENCE, now
            time.sleep(every)

    def pause(self, longest):
        end = time.monotonic() + self.random.uniform(0, longest)
        self.wait(lambda: time.monotonic() > end)

    def at_work(self):
        """A driver that has committed shards."""
        return next((driver for driver in self.drivers if len(self.names("commits")) > driver.commits), None)

    def workers(self, kind):
        """The drivers' own; those of one that is gone linger for a while."""
        started = min((driver.started for driver in self.drivers), default=time.time())
        own = [process for process in self.nodes.workers() if process.create_time() >= started]
        return [process for process in own if title_of(process).startswith(TITLES[kind])]

    def some_time(self):
        """Half of what dies does so when shards are committed, half of it at any time, often while all is starting."""
        if self.random.random() < 0.5:
            self.wait(self.at_work)
        self.pause(2.5)

    # --- mischief ---

    def driver(self):
        """A driver that has committed shards."""
        self.wait(self.at_work)
        self.pause(2.5)
        return self._kill_driver(self.wait(self.at_work))

    def starting(self):
        """A driver, and the next one in its first seconds."""
        killed = self._kill_driver(self.drivers[-1]) if self.drivers else 0
        self.start()
        driver = self.drivers[-1]
        self.pause(10)
        return killed + self._kill_driver(driver)

    def _kill_driver(self, driver):
        if driver not in self.drivers or driver.process.poll() is not None:
            return 0
        driver.process.kill()
        if driver.process.wait() != -signal.SIGKILL:
            return 0  # it ended just before
        self.drivers.remove(driver)
        self.say(f"killed driver {driver.process.pid}, {len(self.names('commits'))} commits")
        return 1

    def second(self):
        """Another driver of the same cache."""
        self.wait(lambda: self.drivers)
        self.start()
        return 0

    def encoder(self):
        return self._worker("encoder")

    def decode(self):
        return self._worker("decode")

    def _worker(self, kind):
        self.some_time()
        victims = self.wait(lambda: self.workers(kind))
        return self._kill(self.random.choice(victims), kind)

    def written(self):
        """The encoders, between a shard and its commit. They are stopped to look."""
        while True:
            self.wait(self.at_work)
            self.pause(0.5)
            encoders = self.wait(lambda: self.workers("encoder"))
            known = set(self.names("shards"))
            self.wait(lambda known=known: set(self.names("shards")) - known, every=0.0005)
            for encoder in encoders:
                _signal(encoder, signal.SIGSTOP)
            shards = {name[:6] for name in self.names("shards") if name not in known}
            if shards - {name[:6] for name in self.names("commits")}:
                return sum(self._kill(encoder, "encoder") for encoder in encoders)
            for encoder in encoders:
                _signal(encoder, signal.SIGCONT)

    def raylet(self):
        """The second node, and with it what runs there."""
        self.wait(lambda: any(self.workers(kind) for kind in TITLES))
        self.some_time()
        self.say(f"killed raylet of {', '.join(self.nodes.kill('second'))}")
        return 1

    def _kill(self, process, kind):
        """Stop it, see that it still is what it was chosen for, and kill it."""
        _signal(process, signal.SIGSTOP)
        title = title_of(process)
        if not title.startswith(TITLES[kind]) or process in self.dead:  # dying takes a moment
            _signal(process, signal.SIGCONT)
            return 0
        _signal(process, signal.SIGKILL)
        self.dead.add(process)
        self.say(f"killed {title.strip()} {process.pid}")
        return 1


def _signal(process, number):
    with contextlib.suppress(psutil.NoSuchProcess):  # psutil knows whether the number is another's now
        process.send_signal(number)


# --- what it is compared with -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """144 files, most of which take some time to decode."""
    root = photo_folder(tmp_path_factory.mktemp("photos"))
    for n, photo in enumerate(crops(96)):
        photo.resize((1000, 1000)).save(root / ("cats" if n % 2 else "dogs") / f"large-{n:03d}.jpg")
    return root


@pytest.fixture(scope="module")
def undisturbed(folder, model, tmp_path_factory):
    return encoded(folder, model, tmp_path_factory.mktemp("undisturbed") / "cache", *SIZES)


def encoded(source, model, out, *more):
    """A cache that was left in peace."""
    with in_process():
        encode_dataset(config(source, model, out, *more))
    return out


def check_cache(out, folder, undisturbed, bad=BAD):
    """The cache is sound, has every file in a row or in its quarantine, and is the same as the undisturbed one."""
    found = verify.audit(out)
    assert (found.problems, found.general, found.missing) == ({}, [], [])
    manifest, expected = (
        json.loads(storage.read(storage.join(str(root), "manifest.json"))) for root in (out, undisturbed)
    )
    rows, lost = [], []
    for shard in manifest["shards"]:
        for place, ids in ((shard, rows), (shard.get("quarantine", {}), lost)):
            if "file" in place:
                ids += pq.read_table(io.BytesIO(storage.read(storage.join(out, place["file"]))))["id"].to_pylist()
    assert Counter(lost) == Counter(list(bad))
    files = [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*.*")]
    assert Counter(rows) == Counter(set(files) - set(bad))
    assert shard_bytes(out) == shard_bytes(undisturbed)
    assert manifest["digest"] == expected["digest"]


@pytest.fixture
def store(request):
    """A bucket, in Ceph where there is one."""
    try:
        return request.getfixturevalue("ceph")
    except pytest.skip.Exception as reason:
        print(f"in moto: {reason}")
    return request.getfixturevalue("s3")


def upload(folder, uri):
    for path in folder.rglob("*.*"):
        storage.put(storage.join(uri, path.relative_to(folder).as_posix()), path.read_bytes())
    return uri


# --- the tests ----------------------------------------------------------------------------------------------------


def test_append_repair_and_retry_survive_what_is_killed(model, tmp_path):
    """A cache that grows, is damaged, mended and tried again is in the end what encoding it all at once makes."""
    (tmp_path / "photos").mkdir()
    photos = photo_folder(tmp_path / "photos")
    sizes = (*SIZES, "rows_per_shard=2")

    def append(out, **options):
        return start_job(photos, model, out, *sizes, "--append", **options)

    def mend(action, out, options):
        common = ["tracking.enabled=false", "ray.gpu=false", "ray.cpus_per_worker=1", f"root={tmp_path}/runs"]
        return subprocess.Popen([sys.executable, JOB, action, out, *common], stderr=subprocess.STDOUT, **options)

    def sound(out):
        found = verify.audit(out)
        assert (found.problems, found.general, found.missing) == ({}, [], [])

    def disturbed(name, launch, before, kinds):
        """What a copy of `before` becomes; where jobs on it were too quick for all kills, the last copy."""
        folder = tmp_path / name
        folder.mkdir()
        outs = (shutil.copytree(before, folder / str(n)) for n in itertools.count())
        job = Job(nodes, folder, f"{SEED} {name}", launch, outs, sound)
        try:
            job.disturb(kinds)
        finally:
            job.close()
        assert sum(job.kills.values()) >= len(kinds)
        return Path(job.done[-1])

    first = encoded(photos, model, tmp_path / "first", *sizes)
    with two_nodes() as nodes:
        (photos / "zebras").mkdir()
        for n, photo in enumerate(crops(24)):
            photo.save(photos / f"zebras/{n:02d}.png")
        grown = disturbed("append", append, first, ["raylet"])
        for number in range(0, 36, 3):
            damage(grown, number)
        whole = disturbed("repair", lambda out, **options: mend("repair", out, options), grown, ["encoder"])
        for name, photo in zip(BAD, crops(3), strict=True):
            photo.save(photos / name, "PNG")
        mended = disturbed("retry", lambda out, **options: mend("retry", out, options), whole, ["starting"])
    check_cache(str(mended), photos, encoded(photos, model, tmp_path / "at-once", *sizes), bad={})


def damage(out, number):
    """A file that is gone, or cut, or a commit that is gone."""
    commit = out / f"commits/{number:06d}.json"
    record = json.loads(commit.read_text())
    file = out / record["file"] if record["rows"] else commit
    if number % 2:
        file.write_bytes(file.read_bytes()[:-9])
    else:
        (commit if number % 4 else file).unlink()


# Last: Ceph is there from here to the module's end, and there is one at a time.
def test_encoding_survives_what_is_killed(store, folder, model, undisturbed, tmp_path):
    source = upload(folder, f"{store}/photos")
    kinds = [*KINDS]
    random.Random(SEED).shuffle(kinds)
    with two_nodes() as nodes:
        job = Job(
            nodes,
            tmp_path,
            SEED,
            launch=lambda out, **options: start_job(source, model, out, *SIZES, *TWO, "takeover=true", **options),
            outs=(f"{store}/cache-{n}" for n in itertools.count()),
            check=lambda out: check_cache(out, folder, undisturbed),
        )
        try:
            job.disturb(kinds)
        finally:
            job.close()
    assert sum(job.kills.values()) >= KILLS
