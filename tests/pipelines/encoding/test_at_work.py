"""A driver that is at work on a cache is known to the next; one that was killed hinders nobody."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from litevae import storage
from litevae.errors import UserError
from pipelines.encoding import at_work, encode, maintenance, verify
from pipelines.encoding.config import Repair, Retry
from pipelines.encoding.encode import encode_dataset, print_summary
from pipelines.runtime import file_lock
from tests.commands import REPO
from tests.encoding import config, photo_folder, save_model, shard_bytes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return photo_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(params=["disk", "s3"])
def out(request, tmp_path):
    """A cache folder that does not exist yet, on a disk and on S3."""
    return str(tmp_path / "caches/cache") if request.param == "disk" else f"{request.getfixturevalue('s3')}/cache"


def marks(out):
    if storage.is_remote(out):
        return storage.names(storage.join(out, at_work.FOLDER))
    return [name for name in (at_work.FILE,) if os.path.exists(os.path.join(out, name))]


def test_a_second_driver_is_refused(out, capsys):
    here = f"process {os.getpid()} on "
    with at_work.claimed(out) as alone:
        assert alone()
        (mine,) = marks(out)
        who = f"another driver is at work on {out}: {here}.*, since 2.* UTC. Wait for it"
        with pytest.raises(UserError, match=who), at_work.claimed(out):
            pytest.fail("it began")
        assert marks(out) == [mine]
        with at_work.claimed(out, takeover=True) as beside:
            assert not beside()
            assert f"another driver is at work on {out}: {here}" in capsys.readouterr().out
        assert marks(out) == [mine]
    assert marks(out) == []
    assert not storage.folder_exists(out)
    if not storage.is_remote(out):
        assert not os.path.exists(os.path.dirname(out))  # which was made for the mark, too
    with at_work.claimed(out) as alone:
        assert alone()


WORKS = """
import sys, time
from pipelines.encoding import at_work
with at_work.claimed(sys.argv[1]):
    print(1, flush=True)
    time.sleep(600)
"""


def test_after_a_kill_the_next_driver_begins_at_once(out, capsys):
    with subprocess.Popen([sys.executable, "-c", WORKS, out], cwd=REPO, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"1\n"
            with pytest.raises(UserError, match=f"process {process.pid} on "), at_work.claimed(out):
                pytest.fail("it began")
        finally:
            process.send_signal(signal.SIGKILL)
    capsys.readouterr()
    with at_work.claimed(out) as alone:
        assert alone()
        assert len(marks(out)) == 1
    assert marks(out) == []
    assert capsys.readouterr().out == ""


def test_a_child_does_not_hold_the_lock_of_its_parent(tmp_path):
    """Images are looked at in forks, which outlive a killed driver for a moment."""
    context = multiprocessing.get_context("fork")
    begun, over = context.Event(), context.Event()
    file = file_lock.hold(tmp_path / "lock")
    child = context.Process(target=lambda: (begun.set(), over.wait(60)), daemon=True)
    child.start()
    try:
        assert begun.wait(60)
        with pytest.raises(file_lock.Held, match=f"process {os.getpid()} on "):
            file_lock.hold(tmp_path / "lock")
        file.close()  # as the end of the process does
        file_lock.hold(tmp_path / "lock").close()
    finally:
        over.set()
        child.join()


@pytest.mark.parametrize(
    ("host", "pid", "age", "said"),
    [("another", 1, 20, True), ("another", 1, 3600, False), (None, 2**22 + 1, 5, False), (None, os.getpid(), 5, False)],
    ids=["elsewhere", "elsewhere-long-ago", "gone", "another-of-this-number"],
)
def test_marks_of_drivers_that_may_be_gone(s3, capsys, host, pid, age, said):
    """None hinders. One of another host may still be at work, which is said."""
    out = f"{s3}/cache"
    mark = {"host": host or os.uname().nodename, "pid": pid, "started": 1.7e9, "since": 1.7e9}
    mark["time"] = time.time() - age
    storage.put(f"{out}/{at_work.FOLDER}/a.json", json.dumps(mark).encode())
    with at_work.claimed(out) as alone:
        assert alone() != said
        text = capsys.readouterr().out
        maybe = f"another driver may be at work on {out}: process 1 on another, since 2023-11-14 22:13:20"
        assert (maybe in text) == said
    assert marks(out) == (["a.json"] if said else [])


def test_of_two_that_begin_at_once_the_first_goes_on(s3, monkeypatch):
    """Each writes its mark before it looks at others, so that one at least sees the other."""
    out, put = f"{s3}/cache", storage.put
    process = psutil.Process()
    mark = {"host": os.uname().nodename, "pid": process.pid, "started": process.create_time(), "time": time.time()}

    def late(path, data):
        put(path, data)
        put(f"{out}/{at_work.FOLDER}/other.json", json.dumps(mark).encode())

    monkeypatch.setattr(storage, "put", late)
    mark["since"] = time.time() + 1000
    with at_work.claimed(out):
        pass
    mark["since"] = time.time() - 1000
    with pytest.raises(UserError, match="another driver is at work"), at_work.claimed(out):
        pytest.fail("it began")


def test_a_mark_is_written_again(s3, monkeypatch):
    monkeypatch.setattr(at_work, "BEAT", 0.01)
    with at_work.claimed(f"{s3}/cache"):
        (name,) = marks(f"{s3}/cache")
        first = storage.read(f"{s3}/cache/{at_work.FOLDER}/{name}")
        for _ in range(1000):
            if storage.read(f"{s3}/cache/{at_work.FOLDER}/{name}") != first:
                break
            time.sleep(0.01)
        else:
            pytest.fail("it stays as it was")


@pytest.mark.usefixtures("in_process")
def test_jobs_on_a_cache_are_marked_and_the_mark_is_no_part_of_it(folder, model, tmp_path, monkeypatch):
    out, seen = tmp_path / "cache", []
    track = encode.encode_and_track
    for module in (encode, maintenance):
        monkeypatch.setattr(module, "encode_and_track", lambda *given: seen.append(marks(str(out))) or track(*given))
    encode_dataset(config(folder, model, out))
    common = {"cache": str(out), "root": f"{out}-runs", "tracking": {"enabled": False}, "ray": {"gpu": False}}
    maintenance.repair(Repair(**common))
    maintenance.retry(Retry(**common))
    assert seen == [[".driver"]] * 3
    assert not (out / ".driver").exists()
    with at_work.claimed(str(out)):
        assert verify.audit(str(out)).unnamed == []
        for job, settings in (
            (encode_dataset, config(folder, model, out)),
            (maintenance.repair, Repair(**common)),
            (maintenance.retry, Retry(**common)),
        ):
            with pytest.raises(UserError, match="another driver is at work"):
                job(settings)
        assert encode_dataset(config(folder, model, out, "takeover=true"))["images"] == 45
        assert maintenance.retry(Retry(**common, takeover=True))["images"] == 45
        assert maintenance.repair(Repair(**common, takeover=True))["images"] == 45


@pytest.mark.usefixtures("in_process")
def test_what_two_drivers_encode_counts_once_and_is_said(folder, model, tmp_path, monkeypatch, capsys):
    """The second one begins when the first has encoded two shards, and encodes all others before it."""
    out, pipeline = tmp_path / "cache", encode._pipeline

    class Overtaken:
        def __init__(self, *given):
            self.rows = pipeline(*given).iter_rows

        def iter_rows(self):
            for number, row in enumerate(self.rows()):
                yield row
                if number == 1:
                    with monkeypatch.context() as patch:
                        patch.setattr(encode, "_pipeline", pipeline)
                        second.append(encode_dataset(config(folder, model, out, "takeover=true")))

    second = []
    monkeypatch.setattr(encode, "_pipeline", Overtaken)
    done = encode_dataset(config(folder, model, out))
    encoded = [json.loads((out / f"commits/{n:06}.json").read_text())["rows"] for n in range(6)]
    assert second[0]["encoded_now"] == sum(encoded[2:])
    assert "encoded_twice" not in second[0]
    assert (done["encoded_now"], done["encoded_twice"], done["images"]) == (45, sum(encoded[2:]), 45)
    print_summary(done)
    assert f"{sum(encoded[2:])} of the 45 images of this run: another driver, or an earlier attempt, had committed" in (
        capsys.readouterr().out
    )
    found = verify.audit(str(out))
    assert (found.problems, found.general, found.rows) == ({}, [], 45)
    monkeypatch.setattr(encode, "_pipeline", pipeline)
    encode_dataset(config(folder, model, tmp_path / "alone"))
    assert shard_bytes(out) == shard_bytes(tmp_path / "alone")
    assert "earlier" not in json.loads((out / "commits/000005.json").read_text())
