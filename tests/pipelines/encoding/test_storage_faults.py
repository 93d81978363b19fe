"""Stores that fail, disks that are full, images that take all memory and clocks that are wrong, while a cache is made
and read: what is there in the end is sound, and nothing is lost without a word."""

import hashlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image

from litevae import storage
from litevae.cache import LatentCache
from litevae.errors import UserError
from litevae.loader import LatentLoader
from pipelines.data.config import Views
from pipelines.data.decode import decode_carefully
from pipelines.data.open_source import open_source
from pipelines.encoding import verify
from pipelines.encoding.config import Encode
from pipelines.encoding.encode import encode_dataset, run
from pipelines.runtime.cli import load, main
from tests import memory
from tests.disks import resize, small_disk
from tests.encoding import BAD, JOB, arguments, config, crops, photo_folder, save_model, shard_bytes
from tests.in_process import in_process
from tests.proxy import TRANSIENT, proxied, transient

SEED = 2026
SIZES = ("rows_per_shard=3", "kernels=torch")


@pytest.fixture(scope="module")
def proxy(_moto):
    """Between us, Ray's workers among us, and moto."""
    with proxied(os.environ["AWS_ENDPOINT_URL"]) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.uri)
        yield proxy
        ray.shutdown()


@pytest.fixture(autouse=True)
def well(proxy, at_once):
    """The store works unless a test says otherwise."""
    yield
    proxy.fault = lambda *request: ""


@pytest.fixture
def bucket(proxy, s3):
    return s3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return photo_folder(tmp_path_factory.mktemp("photos"), 21)


@pytest.fixture(scope="module")
def undisturbed(proxy, folder, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "cache"
    with in_process():
        encode_dataset(config(folder, model, out, *SIZES, "error_budget=0.2"))
    return out


def upload(folder, uri):
    for path in folder.rglob("*.*"):
        storage.put(storage.join(uri, path.relative_to(folder).as_posix()), path.read_bytes())
    return uri


def job(source, model, out, *more):
    return arguments(source, model, out, *SIZES, "error_budget=0.2", *more)


def check_same(out, undisturbed):
    """Sound; of all images those that can't be read, and no others, are in quarantine; the same bytes."""
    found = verify.audit(str(out))
    assert (found.problems, found.general, found.missing) == ({}, [], [])
    ours, theirs = (json.loads(storage.read(storage.join(str(each), "manifest.json"))) for each in (out, undisturbed))
    assert ours["counts"] == theirs["counts"]
    assert ours["counts"]["quarantined"] == len(BAD)
    assert ours["digest"] == theirs["digest"]
    assert shard_bytes(out) == shard_bytes(undisturbed)


def commits(out):
    """Every commit, and that what it names is there and whole."""
    found = [json.loads(storage.read(storage.join(out, "commits", name))) for name in _names(out, "commits")]
    for commit in found:
        for record in (commit, commit.get("quarantine", {})):
            if "file" in record:
                data = storage.read(storage.join(out, record["file"]))
                assert hashlib.sha256(data).hexdigest() == record["sha256"]
    return found


def _names(out, folder):
    return storage.names(storage.join(str(out), folder))


# --- S3: the encode job -------------------------------------------------------------------------------------------


@pytest.mark.chaos
@pytest.mark.usefixtures("in_process")
def test_faults_that_pass_leave_no_trace_in_a_cache(proxy, bucket, folder, model, undisturbed):
    source = upload(folder, f"{bucket}/photos")
    proxy.fault = transient(SEED)
    proxy.done.clear()
    encode_dataset(load(Encode, None, job(source, model, f"{bucket}/cache")))
    assert {*TRANSIENT} <= {*proxy.done}, proxy.done
    proxy.fault = lambda *request: ""
    check_same(f"{bucket}/cache", undisturbed)


@pytest.mark.chaos
def test_a_store_that_goes_away_ends_the_job_which_goes_on_when_it_is_back(
    proxy, bucket, folder, model, undisturbed, capsys
):
    source, out = upload(folder, f"{bucket}/photos"), f"{bucket}/cache"
    words = job(source, model, out)
    done = threading.Semaphore(3)  # commits that are let through

    def goes(method, path, *_):
        return "" if method != "PUT" or "/commits/" not in path or done.acquire(blocking=False) else "503"

    for fault, message in ((goes, "fails"), (lambda *request: "reset", "can't be reached")):
        proxy.fault = fault
        assert main(Encode, run, words) == 2
        shown = capsys.readouterr().err
        (error,) = [line for line in shown.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in shown
        assert f"{proxy.uri} {message}" in error
        assert bucket in error
        assert "try again later" in error or "AWS_ENDPOINT_URL" in error
        proxy.fault = lambda *request: ""
        assert len(commits(out)) == 3
        assert storage.size(f"{out}/manifest.json") is None
    assert main(Encode, run, words) == 0
    check_same(out, undisturbed)


@pytest.mark.chaos
@pytest.mark.usefixtures("in_process")
def test_a_store_that_loses_its_images_is_not_the_images_fault(proxy, bucket, folder, model, undisturbed, capsys):
    """Those that can't be had now are not put into quarantine."""
    source, out = upload(folder, f"{bucket}/photos"), f"{bucket}/cache"
    proxy.fault = lambda method, path, *_: "503" if "/photos/" in path and path.endswith("7.png") else ""
    assert main(Encode, run, job(source, model, out, "error_budget=1")) == 2
    assert "7.png: " in capsys.readouterr().err
    proxy.fault = lambda *request: ""
    assert sum(commit["quarantined"] for commit in commits(out)) <= len(BAD)
    assert main(Encode, run, job(source, model, out)) == 0
    check_same(out, undisturbed)


# --- S3: readers --------------------------------------------------------------------------------------------------


def epoch(cache):
    return [batch["latents"] for batch in LatentLoader(cache, batch_size=4, seed=1, epochs=1)]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def cached(proxy, bucket, undisturbed):
    return upload(undisturbed, f"{bucket}/cache")


@pytest.mark.parametrize("brought", [False, True])
def test_a_loader_reads_through_faults_that_pass(proxy, cached, undisturbed, tmp_path, brought):
    proxy.fault, proxy.done = transient(SEED, share=0.4), proxy.done.__class__()
    local = tmp_path / "shards" if brought else None
    assert equal(epoch(LatentCache(cached, local=local)), epoch(LatentCache(undisturbed)))
    assert sum(proxy.done.values()) > proxy.done[""]


def test_a_loader_goes_on_when_the_store_is_back(proxy, cached, undisturbed):
    expected = epoch(LatentCache(undisturbed))
    loader = LatentLoader(LatentCache(cached), batch_size=4, seed=1, epochs=1, threads=0)
    batches = iter(loader)
    first = [next(batches)["latents"]]
    proxy.fault = lambda *request: "500"
    with pytest.raises(storage.Unavailable, match=r"shards/.*parquet: .* fails \(InternalError: .*try again later"):
        next(batch for batch in batches if batch is None)
    proxy.fault = lambda *request: ""
    again = LatentLoader(LatentCache(cached), batch_size=4, seed=1, epochs=1)
    again.load_state_dict(loader.state_dict())
    got = first + [batch["latents"] for batch in loader]
    assert equal(got, expected)
    assert equal(first + [batch["latents"] for batch in again], expected)


@pytest.mark.parametrize("brought", [False, True])
def test_a_body_that_ends_early_and_says_so_is_found(proxy, cached, tmp_path, brought):
    cache = LatentCache(cached, local=tmp_path / "shards" if brought else None)
    proxy.fault = lambda method, path, *_: "short" if "/shards/" in path else ""
    with pytest.raises(UserError, match=r"shards/\S*parquet (is damaged|has \d+ bytes; the manifest says)"):
        epoch(cache)
    assert not any(tmp_path.rglob("*.parquet"))


def test_a_store_that_is_silent_is_given_up(proxy, cached, monkeypatch):
    monkeypatch.setattr(storage, "SILENCE", 1)
    monkeypatch.setattr(storage, "_stores", {})
    cache = LatentCache(cached)
    proxy.asked.clear()
    proxy.fault = lambda *request: "hang"
    with pytest.raises(storage.Unavailable, match="can't be reached"):
        cache.latents([0], epoch=0, seed=0)
    assert len(proxy.asked) == 4


def test_a_clock_that_is_wrong_is_named(proxy, bucket):
    proxy.fault = lambda *request: "skewed"
    for act in (
        lambda: storage.read(f"{bucket}/a"),
        lambda: storage.put_new(f"{bucket}/a", b""),
        lambda: storage.put(f"{bucket}/a", b""),
        lambda: storage.names(bucket),
    ):
        with pytest.raises(storage.Unavailable, match=r"the clock of \S+ \(.* UTC\) differs from that of .*; set it"):
            act()


@pytest.mark.parametrize("part", ["/shards/", "/quarantine/", "/commits/", "/manifest"])
def test_an_audit_takes_a_store_that_is_away_for_no_damage(proxy, cached, part):
    """Which `repair` would mend, and files of commits that can't be read now be removed."""
    proxy.fault = lambda method, path, *_: "503" if method == "GET" and part in path and "list-type" not in path else ""
    with pytest.raises(storage.Unavailable, match=r"fails \(SlowDown"):
        verify.audit(cached)
    proxy.fault = lambda *request: ""
    found = verify.audit(cached)
    assert (found.problems, found.general, found.unnamed) == ({}, [], [])


# --- S3: sources --------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(bucket, folder):
    """The same images, in each kind of source."""
    paths = sorted(folder.rglob("*.png"))
    upload(folder, f"{bucket}/folder")
    table = pa.table({"id": [path.name for path in paths], "image": [path.read_bytes() for path in paths]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=4)
    storage.put(f"{bucket}/table.parquet", buffer.getvalue())
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path in paths:
            tar.add(path, arcname=path.name)
    storage.put(f"{bucket}/packed.tar", packed.getvalue())
    storage.put(f"{bucket}/list.txt", "".join(f"folder/{path.relative_to(folder)}\n" for path in paths).encode())
    return {name: f"{bucket}/{name}" for name in ("folder", "table.parquet", "packed.tar", "list.txt")}


def opened(uri):
    columns = ("source.image_column=image", "source.id_column=id") if uri.endswith("parquet") else ()
    return open_source(load(Encode, None, [f"source.uri={uri}", *columns]).source)


@pytest.mark.slow
def test_sources_are_read_through_faults_that_pass(proxy, sources):
    expected = {
        name: [*map(source.read, range(source.units))] for name, source in ((n, opened(u)) for n, u in sources.items())
    }
    proxy.fault = transient(SEED, share=0.3)
    for name, uri in sources.items():
        source = opened(uri)
        assert [source.read(unit) for unit in range(source.units)] == expected[name]


@pytest.mark.chaos
def test_sources_that_are_away_are_not_unreadable_images(proxy, sources):
    found = {name: opened(uri) for name, uri in sources.items()}
    proxy.fault = lambda *request: "503"
    for name, source in found.items():
        with pytest.raises(UserError, match=r"fails \((SlowDown|503): ") as error:
            source.read(source.units - 1)
        assert type(error.value) is storage.Unavailable, name
        with pytest.raises(storage.Unavailable):
            opened(sources[name])


# --- full disks ---------------------------------------------------------------------------------------------------


@pytest.mark.chaos
@pytest.mark.usefixtures("in_process")
def test_a_full_disk_ends_the_job_which_goes_on_when_there_is_room(folder, model, undisturbed, tmp_path, capsys):
    files = (path.stat().st_size for path in undisturbed.rglob("*") if path.is_file())
    pages = sum(-(-size // 4096) for size in files)
    with small_disk(tmp_path / "disk", f"{2 * pages}k") as disk:  # half of them
        out = disk / "cache"
        words = job(folder, model, out, f"root={tmp_path / 'runs'}")
        for kilobytes in (2 * pages, 3 * pages):
            resize(disk, f"{kilobytes}k")
            assert main(Encode, run, words) == 2
            shown = capsys.readouterr().err
            (error,) = [line for line in shown.splitlines() if line.startswith("error: ")]
            assert "Traceback" not in shown
            assert f"{out}/" in error
            assert "No space left on device; make room there and run the same command again" in error
            there = commits(str(out))
            assert len(there) < 8
            assert not (out / "manifest.json").exists()
            assert not list(disk.rglob(".tmp-*"))
            for path in (out / "shards").glob("*"):  # an attempt that was not committed is whole, too
                assert pq.read_table(path, page_checksum_verification=True).num_rows
        assert there
        resize(disk, "8m")
        assert main(Encode, run, words) == 0
        check_same(out, undisturbed)


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Two small images, and two of 80 million pixels: decoding takes Pillow 550 MB, and simplejpeg 240."""
    root = tmp_path_factory.mktemp("large")
    for name, photo in zip(("a.png", "d.png"), crops(2), strict=True):
        photo.save(root / name)
    whole = Image.new("RGB", (8000, 10000), "teal")
    whole.save(root / "b.png", compress_level=1)
    whole.save(root / "c.jpg")
    return root


def test_an_image_that_memory_does_not_hold_is_lost_alone(large):
    code = """if True:
        import json, sys
        from pipelines.data.config import Views
        from pipelines.data.decode import decode_carefully
        from pipelines.data.open_source import open_source
        from pipelines.encoding.config import Encode
        from pipelines.runtime.cli import load

        source = open_source(load(Encode, None, ["source.uri=" + sys.argv[1]]).source)
        found = decode_carefully(source, Views(resolution=32), range(4), memory=100 * 2**20)
        print(json.dumps([(unit, item.id if item else [why.stage, why.reason]) for unit, item, why in found]))
    """
    # a process of its own: in one that has freed as much as an image takes, the image needs no more than it has
    done = subprocess.run(
        [sys.executable, "-c", code, large], env=os.environ | memory.EXACT, capture_output=True, check=True
    )
    lost = ["decode", "out_of_memory"]
    assert json.loads(done.stdout.splitlines()[-1]) == [[0, "a.png"], [1, lost], [2, lost], [3, "d.png"]]


def _run_within(memory, words, log):
    """The job, each of whose processes may have so much memory; the most that one had."""
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, JOB, *words],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (memory, memory)),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        most = 0
        while process.poll() is None:
            for each in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    most = max(most, each.memory_info().data)
            time.sleep(0.1)
    assert process.returncode == 0, log.read_text()
    return most


@pytest.mark.chaos
def test_a_job_goes_on_without_the_images_that_memory_does_not_hold(large, model, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "d.png"):
        shutil.copy(large / name, photos)
    most = _run_within(resource.RLIM_INFINITY, job(photos, model, tmp_path / "before"), tmp_path / "log")
    # Pillow takes 7 bytes a pixel: far more than what the encoder has and a decoding task has not, and 300 MB
    Image.new("RGB", (12000, 14000), "teal").save(photos / "b.png", compress_level=1)
    _run_within(most + 300 * 2**20, job(photos, model, tmp_path / "after", "error_budget=0.5"), tmp_path / "log")
    counts = LatentCache(str(tmp_path / "after")).manifest["counts"]
    assert (counts["encoded"], counts["reasons"]) == (2, {"out_of_memory": 1})


@contextmanager
def memory_group(megabytes):
    """A control group of processes that together get so much memory, and are killed by the kernel beyond it."""
    first = Path("/sys/fs/cgroup/memory")
    root, limit = (first, "memory.limit_in_bytes") if first.is_dir() else (Path("/sys/fs/cgroup"), "memory.max")
    group = root / f"litevae-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(megabytes * 2**20))
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        pytest.skip(f"no control groups here: {error}")
    try:
        yield group
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                (root / "cgroup.procs").write_text(pid)
        for _ in range(100):
            with suppress(OSError):  # until what was killed is gone
                group.rmdir()
                break
            time.sleep(0.1)


def _decode_in(group, folder, writer):
    (group / "cgroup.procs").write_text(str(os.getpid()))
    source = open_source(load(Encode, None, [f"source.uri={folder}"]).source)
    found = decode_carefully(source, Views(resolution=32), range(4))
    writer.send([(unit, item.id if item else (why.reason, why.message)) for unit, item, why in found])


@pytest.mark.chaos
def test_what_the_kernel_kills_for_its_memory_is_lost_alone(large):
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    with memory_group(400) as group:
        process = context.Process(target=_decode_in, args=(group, large, writer))
        process.start()
        writer.close()
        found = reader.recv()  # or EOFError, where it has died
        process.join(30)
        told = (group / "memory.oom_control", group / "memory.events")  # of version 1, or 2
        text = next(file for file in told if file.exists()).read_text()
        assert int(text.split("oom_kill ")[1].split()[0]) == 1
    lost = ("crashed", "the process that decoded it died (exit code -9, out of memory?)")
    assert found == [(0, "a.png"), (1, lost), (2, "c.jpg"), (3, "d.png")]


def test_a_child_that_dies_takes_one_image_with_it(large, monkeypatch):
    monkeypatch.setattr("pipelines.data.decode.decode_units", _dying)
    source = open_source(load(Encode, None, [f"source.uri={large}"]).source)
    found = [*decode_carefully(source, Views(resolution=32), range(4))]
    assert [(unit, why.reason if item is None else None) for unit, item, why in found] == [
        (0, None), (1, "crashed"), (2, None), (3, None),
    ]  # fmt: skip


def _dying(source, views, units):
    for unit in list(units):
        if unit == 1:
            os.kill(os.getpid(), 9)
        yield unit, source.read(unit), []


# --- clocks -------------------------------------------------------------------------------------------------------


@pytest.mark.chaos
@pytest.mark.usefixtures("in_process")
def test_resuming_does_not_depend_on_clocks(folder, model, undisturbed, tmp_path):
    """Files of 1970, 2038 and 2106, as they are where a server's clock or a node's is wrong."""
    out = tmp_path / "cache"
    shutil.copytree(undisturbed, out)
    (out / "manifest.json").unlink()
    shutil.rmtree(out / "manifests")
    for number in (1, 4):
        (out / f"commits/{number:06d}.json").unlink()
    for n, path in enumerate(sorted(out.rglob("*"))):
        os.utime(path, (n % 2 * 2**32 + n, n % 3 * 2**31 + n % 7))
    done = encode_dataset(load(Encode, None, job(folder, model, out)))
    assert 0 < done["encoded_now"] <= 6
    check_same(out, undisturbed)
