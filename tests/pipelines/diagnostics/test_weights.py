"""Published weights are fetched by their checksums, whole or not at all, here from a server on this machine."""

import hashlib
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from jobs import fetch_weights
from litevae import generation, perceptual, weight_files
from litevae.errors import UserError
from pipelines.diagnostics import weights
from tests.commands import REPO

DATA = bytes(range(256)) * 9000  # more than one block
OTHER = b"other weights"


def named(name, data):
    return f"{name}-{hashlib.sha256(data).hexdigest()[:8]}.pth"


VGG, INCEPTION = named("vgg16", DATA), named("weights-inception", OTHER)
FILES = {VGG: "LPIPS", INCEPTION: "FID"}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server of both files; `answers` changes what it sends, `asked` are the paths that it was asked for."""
    answers, asked = {f"/{VGG}": DATA, f"/{INCEPTION}": OTHER}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = answers.get(self.path)
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *words):
            pass

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setattr(weight_files, "url_of", lambda file: f"http://127.0.0.1:{found.server_port}/{file}")
    found.answers, found.asked, found.hub = answers, asked, tmp_path / "hub" / "checkpoints"
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def test_missing_files_are_fetched_and_right_ones_are_left(server):
    server.hub.mkdir(parents=True)
    (server.hub / INCEPTION).write_bytes(OTHER)
    weights.fetch(weights.Weights(), FILES)
    assert server.asked == [f"/{VGG}"]
    assert {path.name: path.read_bytes() for path in server.hub.iterdir()} == {VGG: DATA, INCEPTION: OTHER}
    weights.fetch(weights.Weights(force=True), FILES)
    assert server.asked == [f"/{VGG}"]


def test_a_wrong_file_is_said_and_replaced_only_by_force(server):
    server.hub.mkdir(parents=True)
    (server.hub / VGG).write_bytes(b"mine")
    begins = hashlib.sha256(b"mine").hexdigest()[:8]
    with pytest.raises(UserError, match=rf"{VGG} is not the published file: its SHA-256 begins with {begins}, not"):
        weights.fetch(weights.Weights(), FILES)
    assert (server.hub / VGG).read_bytes() == b"mine"
    assert (server.hub / INCEPTION).read_bytes() == OTHER  # the other one was fetched nevertheless
    weights.fetch(weights.Weights(force=True), FILES)
    assert (server.hub / VGG).read_bytes() == DATA


@pytest.mark.parametrize("sent", [DATA[:-1], b"<html>log in first</html>"], ids=["cut", "page"])
def test_what_is_not_the_file_is_not_kept(server, sent):
    server.answers[f"/{VGG}"] = sent
    with pytest.raises(UserError, match="nothing was written") as refused:
        weights.fetch(weights.Weights(), FILES)
    assert f"{weight_files.url_of(VGG)} -> {server.hub / VGG}" in str(refused.value)
    assert [path.name for path in server.hub.iterdir()] == [INCEPTION]


def test_an_answer_that_breaks_off_leaves_nothing(server, monkeypatch):
    class Breaks:
        def __init__(self, *given, **more):
            self.left = [DATA[:1000]]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def read(self, size):
            if self.left:
                return self.left.pop()
            raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(weights.urllib.request, "urlopen", Breaks)
    with pytest.raises(UserError, match="can't be fetched: reset by peer"):
        weights.fetch(weights.Weights(), FILES)
    assert list(server.hub.iterdir()) == []


def test_without_a_network_the_job_says_what_to_copy_where(server, monkeypatch, capsys):
    server.answers.clear()
    monkeypatch.setattr(weights, "FILES", FILES)
    assert fetch_weights.main([]) == 2
    shown = capsys.readouterr().err
    for file in FILES:
        digits = file[-12:-4]
        assert f"{weight_files.url_of(file)} -> {server.hub / file} (its SHA-256 begins with {digits})" in shown
    assert shown.count("error: ") == 1
    assert "Traceback" not in shown


def test_the_folder_is_torch_hubs(monkeypatch, tmp_path):
    """Of a process with PyTorch and of one without, wherever the environment says."""
    code = "import sys; from litevae.weight_files import in_hub; print(in_hub('a')); assert 'torch' not in sys.modules"
    for changed in ({"TORCH_HOME": f"{tmp_path}/own"}, {"XDG_CACHE_HOME": f"{tmp_path}/cache"}):
        monkeypatch.delenv("TORCH_HOME", raising=False)
        monkeypatch.setattr(torch.hub, "_hub_dir", None)
        for name, value in changed.items():
            monkeypatch.setenv(name, value)
        done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=os.environ, capture_output=True, text=True)
        assert done.stdout.strip() == f"{torch.hub.get_dir()}/checkpoints/a", done.stderr


@pytest.mark.usefixtures("no_home")
def test_without_a_home_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    with pytest.raises(UserError, match="there is no home folder to put it in; set TORCH_HOME or HOME"):
        weights.fetch(weights.Weights(), FILES)
    assert not list(tmp_path.iterdir())
    assert "or set TORCH_HOME" in weight_files.how_to_get(VGG)


def test_jobs_look_for_the_files_that_are_fetched(monkeypatch, tmp_path):
    """And where they are missing they say the way to get them; the digits are those that the two projects publish."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    messages = []
    for load in (perceptual.load_lpips, generation.Inception):
        with pytest.raises(perceptual.WeightsMissing) as missing:
            load()
        messages.append(str(missing.value))
    way = "does not exist. Fetch it with `make weights` or `litevae weights`"
    for message, file, digits in zip(messages, weights.FILES, ("397923af", "6726825d"), strict=True):
        assert f"{tmp_path}/checkpoints/{file} {way}" in message
        assert f"{weight_files.url_of(file)}; its SHA-256 begins with {digits}" in message
