"""Local files and S3 objects through litevae.storage, looked at by the standard library and boto3."""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from litevae import storage
from litevae.errors import UserError


@pytest.fixture(params=["local", "moto", pytest.param("ceph", marks=pytest.mark.slow)])
def folder(request, tmp_path):
    """A folder that is not there yet, in each kind of storage."""
    if request.param == "local":
        return str(tmp_path / "data")
    return storage.join(request.getfixturevalue({"moto": "s3", "ceph": "ceph"}[request.param]), "data")


@pytest.fixture(params=["moto", pytest.param("ceph", marks=pytest.mark.slow)])
def bucket(request):
    return request.getfixturevalue({"moto": "s3", "ceph": "ceph"}[request.param])


def content(path: str) -> bytes:
    """A file's bytes, past our own code."""
    if storage.is_remote(path):
        name, key = path.removeprefix("s3://").split("/", 1)
        return boto3.client("s3").get_object(Bucket=name, Key=key)["Body"].read()
    with open(path, "rb") as file:
        return file.read()


def everything(folder: str) -> list[str]:
    """Every name below a folder, hidden and unfinished ones too, past our own code."""
    if storage.is_remote(folder):
        name, key = folder.removeprefix("s3://").split("/", 1)
        client = boto3.client("s3")
        parts = client.list_multipart_uploads(Bucket=name).get("Uploads", [])
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=name, Prefix=f"{key}/")
        objects = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return sorted(item.removeprefix(f"{key}/") for item in [*objects, *(part["Key"] for part in parts)])
    found = [os.path.join(top, name) for top, _, names in os.walk(folder) for name in names]
    return sorted(os.path.relpath(name, folder) for name in found)


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.is_remote("s3://b/k")
    assert not storage.is_remote("/s3://b")
    assert storage.absolute("a/../b/") == str(tmp_path / "b")
    assert storage.absolute("s3://bucket/a//b/") == "s3://bucket/a//b"
    assert storage.join("s3://bucket/a/", "b", "c.txt") == "s3://bucket/a/b/c.txt"
    assert storage.join("/a", "b", "c.txt") == "/a/b/c.txt"
    for path in ("s3://", "s3:///key", "gs://bucket/a", "https://host/a.jpg"):
        with pytest.raises(UserError, match="s3://"):
            storage.absolute(path)


def test_write_and_read(folder):
    path = storage.join(folder, "one", "a.bin")
    data = np.random.default_rng(0).bytes(300_001)
    assert storage.size(path) is None
    assert not storage.folder_exists(folder)
    with pytest.raises(FileNotFoundError):
        storage.read(path)
    with pytest.raises(FileNotFoundError):
        storage.read_range(path, 0, 1)
    with pytest.raises(FileNotFoundError):
        storage.open_binary(path)

    assert storage.put_new(path, data)
    assert content(path) == storage.read(path) == data
    assert storage.size(path) == len(data)
    assert storage.folder_exists(folder)
    assert storage.folder_exists(folder + "/")
    assert not storage.folder_exists(folder[:-1])  # a prefix is no folder
    for offset, length in [(0, 0), (0, 1), (5, 1000), (300_000, 1), (299_990, 100), (300_001, 5), (400_000, 5)]:
        assert storage.read_range(path, offset, length) == data[offset : offset + length]

    assert not storage.put_new(path, b"second")
    assert content(path) == data
    storage.put(path, b"third")
    assert content(path) == b"third"
    storage.put(storage.join(folder, "two", "b"), b"")
    assert storage.size(storage.join(folder, "two", "b")) == 0
    assert storage.read(storage.join(folder, "two", "b")) == b""
    assert everything(folder) == ["one/a.bin", "two/b"]

    storage.remove(path)
    storage.remove(path)
    assert storage.size(path) is None
    assert everything(folder) == ["two/b"]


def test_names(folder):
    assert storage.names(folder) == []
    given = ["b", "a b+c%20=&?versionId=1#x", "Z", "ä.json", "日本.txt", ".hidden", "deep/inside", "a/b/c"]
    for name in given:
        assert storage.put_new(storage.join(folder, name), name.encode())
    assert storage.names(folder) == ["Z", "a b+c%20=&?versionId=1#x", "b", "ä.json", "日本.txt"]
    assert storage.names(folder + "/") == storage.names(folder)
    assert all(storage.read(storage.join(folder, name)) == name.encode() for name in given)
    assert storage.names(storage.join(folder, "deep")) == ["inside"]
    assert storage.names(folder + "x") == []
    storage.remove(storage.join(folder, "b"))  # listings are never old ones
    assert "b" not in storage.names(folder)
    storage.put(storage.join(folder, "b"), b"")
    assert "b" in storage.names(folder)


@pytest.mark.slow
def test_pages(bucket):
    """More objects than a page of a listing holds."""
    client, name = boto3.client("s3"), bucket.removeprefix("s3://")
    keys = [f"many/{number % 7}/{number:05d}" for number in range(1100)] + ["many/0!", "many/é", "manyx", "many/empty/"]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda key: client.put_object(Bucket=name, Key=key, Body=b"x" * (len(key) % 3)), keys))
    below = [key for key in keys if key.startswith("many/") and not key.endswith("/")]
    expected = [(key.removeprefix("many/"), len(key) % 3) for key in sorted(below, key=str.encode)]
    assert [(key, facts.size) for key, facts in storage.walk(f"{bucket}/many")] == expected
    assert [(key, facts.size) for key, facts in storage.walk(f"{bucket}/many/")] == expected
    assert [f"many/{key}" for key, _ in expected] == [key for key, _ in storage.walk(bucket) if key != "manyx"]
    assert storage.names(f"{bucket}/many/3") == [f"{number:05d}" for number in range(3, 1100, 7)]
    assert storage.names(bucket) == ["manyx"]
    assert list(storage.walk(f"{bucket}/none")) == []


def test_race(folder):
    """Of eight writers at once exactly one wins, and what it wrote stays."""

    def write(path, me, start):
        start.wait()
        return storage.put_new(path, bytes([me]) * 100_000)

    for number in range(10):
        path, start = storage.join(folder, f"{number}"), threading.Barrier(8)
        with ThreadPoolExecutor(8) as threads:
            won = list(threads.map(write, [path] * 8, range(8), [start] * 8))
        assert won.count(True) == 1
        assert content(path) == bytes([won.index(True)]) * 100_000
    assert everything(folder) == [f"{number}" for number in range(10)]


def test_race_without_looking_first(bucket, monkeypatch):
    """The look before the PUT is not what decides."""
    looked = storage._head
    first = threading.local()

    def blind(path):
        if not hasattr(first, "done"):
            first.done = True
            return None
        return looked(path)

    monkeypatch.setattr(storage, "_head", blind)
    assert storage.put_new(f"{bucket}/a", b"one")
    del first.done
    assert not storage.put_new(f"{bucket}/a", b"two")
    assert content(f"{bucket}/a") == b"one"


def test_large_put_is_one_request(bucket):
    """s3fs would upload these in parts, which Ceph then puts over what is there."""
    data = np.random.default_rng(0).bytes(101 << 20)
    assert storage.put_new(f"{bucket}/large", data)
    assert boto3.client("s3").head_object(Bucket=bucket.removeprefix("s3://"), Key="large")["ETag"].count("-") == 0
    assert storage.read(f"{bucket}/large") == data
    assert not storage.put_new(f"{bucket}/large", data[: 100 << 20])
    assert storage.size(f"{bucket}/large") == len(data)


def test_replace(folder):
    path = storage.join(folder, "a")
    assert storage.read_content(path) is None
    assert storage.replace(path, b"one", None)
    assert not storage.replace(path, b"two", None)  # it is there by now
    one = storage.read_content(path)
    assert one.data == content(path) == b"one"
    assert storage.replace(path, b"two", one)
    assert not storage.replace(path, b"three", one)
    assert content(path) == b"two"
    two = storage.read_content(path)
    storage.remove(path)
    assert not storage.replace(path, b"three", two)
    assert everything(folder) == []


def test_race_to_replace(folder):
    """Each of eight adds 1 five times; of those who have read the same number one goes on."""
    path = storage.join(folder, "count")
    storage.put(path, b"0")

    def count(_):
        done = 0
        for _ in range(2000):  # more tries than eight could need
            before = storage.read_content(path)
            done += storage.replace(path, str(int(before.data) + 1).encode(), before)
            if done == 5:
                return

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(count, range(8)))
    assert content(path) == b"40"


def test_a_store_without_conditions_replaces_all_the_same(s3, faulty):
    storage.put(f"{s3}/a", b"one")
    one = storage.read_content(f"{s3}/a")
    faulty.plan[:] = ["501"]
    assert storage.replace(f"{s3}/a", b"two", one)
    assert (faulty.asked[-2:], content(f"{s3}/a")) == (["PUT", "PUT"], b"two")


WRITER = """
import sys
from litevae import storage
folder, number = sys.argv[1], 0
while True:
    storage.put_new(storage.join(folder, f"{number}"), bytes([number % 256]) * (4 << 20))
    print(number, flush=True)
    number += 1
"""


@pytest.mark.slow
def test_killed_writer(folder):
    """Killed anywhere: what has a name is whole."""
    random = np.random.default_rng(0)
    for run in range(4):
        place = storage.join(folder, f"{run}")
        with subprocess.Popen([sys.executable, "-c", WRITER, place], stdout=subprocess.PIPE) as writer:
            assert writer.stdout.readline() == b"0\n"
            time.sleep(random.uniform(0, 0.1))
            writer.send_signal(signal.SIGKILL)
            reported = 1 + len(writer.stdout.read().split())
        there = sorted(int(name) for name in storage.names(place))
        assert there in ([*range(reported)], [*range(reported + 1)])
        for number in there:
            assert content(storage.join(place, f"{number}")) == bytes([number % 256]) * (4 << 20)


def test_failing_writer_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (storage.put_new, storage.put):
        with pytest.raises(UserError, match="a/b can't be written: No space left"):
            write(str(tmp_path / "a" / "b"), b"data")
    assert everything(str(tmp_path)) == []


def test_local_file_as_folder(tmp_path):
    storage.put(str(tmp_path / "a"), b"")
    with pytest.raises(UserError, match=r"a/b can't be written.*a is not a folder"):
        storage.put_new(str(tmp_path / "a" / "b"), b"")


def test_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.put_new("a", b"1")
    storage.put("b", b"2")
    assert everything(str(tmp_path)) == ["a", "b"]


def test_open_binary(folder):
    path, data = storage.join(folder, "x"), np.random.default_rng(0).bytes(10_000)
    storage.put(path, data)
    reference = io.BytesIO(data)
    for size in (None, len(data)):
        reference.seek(0)
        with storage.open_binary(path, size) as file:
            assert file.seekable()
            assert file.readable()
            for act in (
                "read(10)",
                "seek(-7, 2)",
                "read()",
                "read(5)",
                "seek(100)",
                "read(0)",
                "seek(3, 1)",
                "read(300)",
            ):
                assert eval(f"file.{act}", {"file": file}) == eval(f"file.{act}", {"file": reference})
                assert file.tell() == reference.tell()
            file.seek(9_990)
            assert file.readinto(bytearray(100)) == 10
            with pytest.raises(OSError):
                file.seek(-1)
    with io.BufferedReader(storage.open_binary(path, len(data)), 4096) as file:
        assert b"".join(iter(lambda: file.read(7), b"")) == data


def test_parquet_through_open_binary(folder):
    table = pa.table({"a": range(10_000), "b": [str(number) for number in range(10_000)]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=1000)
    path = storage.join(folder, "x.parquet")
    storage.put(path, buffer.getvalue())
    with storage.open_binary(path, len(buffer.getvalue())) as file:
        assert pq.ParquetFile(file).read_row_group(7, columns=["a"]) == table.slice(7000, 1000).select(["a"])


def test_requests_are_exact(s3, monkeypatch):
    """No request more than needed, no byte more than asked for."""
    storage.put(f"{s3}/x", bytes(1_000_000))
    asked = []
    call = type(storage._store())._call_s3

    async def counted(self, method, *rest, **arguments):
        asked.append((method, arguments.get("Range")))
        return await call(self, method, *rest, **arguments)

    monkeypatch.setattr(type(storage._store()), "_call_s3", counted)
    with storage.open_binary(f"{s3}/x", 1_000_000) as file:
        file.seek(-10, 2)
        file.read(4)
    storage.read_range(f"{s3}/x", 5, 6)
    storage.read(f"{s3}/x")
    assert asked == [("get_object", "bytes=999990-999993"), ("get_object", "bytes=5-10"), ("get_object", None)]


def test_no_bucket(bucket):
    missing = f"{bucket}-none"
    for act in (
        lambda: storage.read(f"{missing}/a"),
        lambda: storage.size(f"{missing}/a"),
        lambda: storage.put(f"{missing}/a", b""),
        lambda: storage.put_new(f"{missing}/a", b""),
        lambda: storage.names(missing),
        lambda: storage.folder_exists(f"{missing}/a"),
        lambda: list(storage.walk(missing)),
        lambda: storage.remove(f"{missing}/a"),
    ):
        with pytest.raises(UserError, match=rf"{missing}.* has no bucket"):
            act()


@pytest.mark.slow
def test_wrong_credentials(ceph, monkeypatch):
    """The file system follows the environment; moto would not check."""
    storage.put(f"{ceph}/a", b"1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for act in (storage.read, storage.size, storage.names, lambda path: storage.put_new(path, b"")):
        with pytest.raises(UserError, match=r"refuses access .*AWS_SECRET_ACCESS_KEY"):
            act(f"{ceph}/a")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(UserError, match=r"refuses access .*InvalidAccessKeyId"):
        storage.read(f"{ceph}/a")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "CEPHAK")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "CEPHSK")
    assert storage.read(f"{ceph}/a") == b"1"


def test_no_credentials(s3, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="no credentials; set AWS_ACCESS_KEY_ID"):
        storage.read(f"{s3}/a")


@pytest.mark.usefixtures("at_once")
def test_unreachable(s3, monkeypatch, closed_port):
    storage.put(f"{s3}/a", b"1")
    endpoint = f"http://127.0.0.1:{closed_port}"
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(UserError, match=rf"{s3}/a: {endpoint} can't be reached .*AWS_ENDPOINT_URL"):
            storage.read(f"{s3}/a")
        patch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
        with pytest.raises(UserError, match=r"127.0.0.1:9000.*AWS_ENDPOINT_URL"):
            storage.read(f"{s3}/a")
    assert storage.read(f"{s3}/a") == b"1"  # back at the server that works


@pytest.mark.usefixtures("at_once")
def test_a_store_that_is_silent_is_asked_four_times_and_given_up(monkeypatch):
    """Instead of for ever: botocore's client has our limits, and keeps them."""
    monkeypatch.setattr(storage, "SILENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        storage._store().connect()
        config = storage._store().s3.meta.config
        assert (config.connect_timeout, config.read_timeout) == (5, 0.2)
        with pytest.raises(UserError, match="s3://bucket/a: "):
            storage.read("s3://bucket/a")
        silent.setblocking(False)
        asked = 0
        with contextlib.suppress(BlockingIOError):  # nobody else has asked
            while True:
                silent.accept()[0].close()
                asked += 1
    assert asked == 4


class Faulty(BaseHTTPRequestHandler):
    """Hands on to the real server; `plan` says what goes wrong first."""

    protocol_version = "HTTP/1.1"
    plan: list[str]
    asked: list[str]
    target: tuple[str, int]

    def handle_one(self):
        from http.client import HTTPConnection

        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append(self.command)
        fault = self.plan.pop(0) if self.plan else ""
        if fault in ("501", "503"):
            self.send_response(int(fault))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "reset":
            self.close_connection = True
            return
        connection = HTTPConnection(*self.target)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        if fault == "lost":  # done, and the client never hears of it
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "server", "date"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if fault == "cut":
            data, self.close_connection = data[: len(data) // 2], True
        self.wfile.write(data)

    do_GET = do_PUT = do_HEAD = do_DELETE = handle_one

    def log_message(self, *_):
        return


@pytest.fixture
def faulty(s3, monkeypatch):
    host, port = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://").split(":")
    handler = type("Plan", (Faulty,), {"plan": [], "asked": [], "target": (host, int(port))})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield handler
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("fault", ["503", "reset", "cut"])
def test_passing_faults(s3, faulty, fault):
    data = np.random.default_rng(0).bytes(200_000)
    storage.put(f"{s3}/a", data)
    faulty.plan[:] = [fault]
    assert storage.read(f"{s3}/a") == data
    faulty.plan[:] = [fault]
    assert storage.read_range(f"{s3}/a", 1000, 100_000) == data[1000:101_000]
    assert not faulty.plan


@pytest.mark.usefixtures("at_once")
def test_lasting_fault(s3, faulty):
    faulty.plan[:] = ["503"] * 100
    with pytest.raises(UserError, match=f"{s3}/a: .*503"):
        storage.read(f"{s3}/a")
    assert len(faulty.asked) == 4


@pytest.mark.parametrize("fault", ["lost", "503", "reset"])
def test_winner_knows_that_it_won(s3, faulty, fault):
    """The PUT is done, its answer lost, and its repetition refused: it was ours all the same."""
    faulty.plan[:] = ["", fault]
    assert storage.put_new(f"{s3}/a", b"ours")
    assert faulty.asked[:3] == ["HEAD", "PUT", "PUT"]
    assert not storage.put_new(f"{s3}/a", b"theirs")
    assert storage.read(f"{s3}/a") == b"ours"


def _forked(path, queue):
    queue.put(storage.read(path))


@pytest.mark.slow
def test_fork(s3):
    """A forked process does not use its parent's connections and threads."""
    storage.put(f"{s3}/a", b"1")
    context = get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_forked, args=(f"{s3}/a", queue)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=30) for _ in processes] == [b"1", b"1"]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert storage.read(f"{s3}/a") == b"1"


def test_without_s3fs():
    """Local files need no s3fs, nor the time that its import takes; s3:// says what to install."""
    code = """
import json, sys
sys.modules["s3fs"] = None
from litevae import storage
from litevae.errors import UserError
try:
    storage.read("s3://bucket/a")
except UserError as error:
    print(json.dumps([str(error), "botocore" in sys.modules, storage.size(sys.executable) > 0]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == ["s3:// paths need s3fs: pip install 'litevae[s3]'", False, True]
