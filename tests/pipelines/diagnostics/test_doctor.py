"""The doctor: what it says of sound machines, and of faults, each of them caused. Where a node is to differ from the
driver, it is asked the same of another path, another environment or another clock."""

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from litevae import native, storage
from litevae.errors import UserError
from pipelines.data.open_source import restore
from pipelines.data.source import Source
from pipelines.diagnostics import doctor, folders, machine, probe, services, workload
from pipelines.diagnostics.config import Doctor
from pipelines.diagnostics.doctor import DRIVER, Finding, examined
from pipelines.runtime import mlflow_server
from pipelines.runtime.cli import load
from tests.encoding import BAD, photo_folder, save_model
from tests.nodes import cluster
from tests.proxy import proxied

REPO = Path(__file__).resolve().parents[3]


def here(function, *arguments):
    """One node, which is this machine."""
    return {"a": function(*arguments)}


def elsewhere(old, new):
    """Two nodes; the second sees `new` where the first sees `old`."""

    def moved(value):
        if isinstance(value, str):
            return value.replace(str(old), str(new))
        if isinstance(value, list) and value and isinstance(value[0], Source):
            return [restore(part.listing, moved(part.uri)) for part in value]
        return value

    def ask(function, *arguments):
        answers = {"a": arguments, "b": [moved(argument) for argument in arguments]}
        for node, given in answers.items():
            try:
                answers[node] = function(*given)
            except Exception as error:  # noqa: BLE001 - a node's answer
                answers[node] = error
        return answers

    return ask


def states(findings):
    return [(finding.node, finding.state) for finding in findings]


def only(findings, state):
    (found,) = [finding for finding in findings if finding.state == state]
    return found


# --- findings -----------------------------------------------------------------------------------------------------


def test_a_check_that_breaks_is_a_finding():
    def broken():
        yield Finding("a", "ok", "postgresql://me:secret@host/db answers")
        raise ZeroDivisionError("of its own\nand many lines")

    first, second = examined(broken)
    assert first.found == "postgresql://***@host/db answers"
    assert second == Finding(DRIVER, "failed", "ZeroDivisionError: of its own")


def test_a_table_has_a_row_for_nodes_that_are_alike_and_breaks_no_path():
    path = "/a/long/path/" + "x" * 70
    same = [Finding(node, "ok", "as the driver's", check="versions") for node in "abc"]
    other = Finding("b", "failed", f"{path} is not there, for a reason that takes many words", "mend it", check="root")
    head, alike, first, found, *rest = doctor.table([*same, other], width=100).splitlines()
    assert head.split() == ["check", "node", "state", "found"]
    assert alike.split() == ["versions", "all", "3", "ok", "as", "the", "driver's"]
    assert head.index("found") == alike.index("as the")
    assert first.split() == ["root", "b", "failed"]
    assert found.startswith(f"    {path} is not")  # at the left, since it is too long for its column
    assert rest[-1].index("-> mend it") == head.index("found")


@pytest.mark.parametrize("width", [0, 70, 100])
def test_no_line_of_a_table_is_wider_than_a_page(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", "250")
    text = "a finding of many words, which says all that was found and more, " * 5
    rows = [
        Finding(
            f"a-node-with-a-long-name-{n}.cluster.internal",
            "warning",
            f"{n} {text}",
            f"do this: {text}",
            "memory, disk",
        )
        for n in range(3)
    ]
    lines = doctor.table(rows, width).splitlines()
    assert max(map(len, lines)) <= (width or 100)
    assert " ".join(" ".join(lines).split()).count("do this:") == 3
    long = "https://example.org/" + "x" * 120
    shown = doctor.table([Finding("a", "warning", "none", f"get {long}", "weights")]).splitlines()
    assert shown[-2:] == ["    -> get", f"    {long}"]  # an address can be copied


# --- machines -----------------------------------------------------------------------------------------------------


def test_another_version_on_a_node():
    mine = machine.versions_here()
    assert mine["torch"].startswith("2.")
    theirs = mine | {"torch": "2.6.0", "code": "00000000"}
    lost = ModuleNotFoundError("No module named 'pipelines'")
    found = examined(machine.versions, mine, {"a": mine, "b": theirs, "c": lost})
    assert states(found) == [(DRIVER, "ok"), ("c", "failed"), ("a", "ok"), ("b", "failed")]
    assert "No module named 'pipelines'" in found[1].found
    assert "constraints.txt" in found[1].advice
    assert found[3].found == f"torch 2.6.0, not {mine['torch']}; code 00000000, not {mine['code']}"


@pytest.mark.parametrize(
    ("seen", "given", "state", "words"),
    [
        ((8, 4, 8.0), 8, "ok", ""),
        ((8, 4, 8.0), 10, "ok", ""),
        ((8, 4, 8.0), 11, "warning", "--num-cpus=10"),
        ((8, 4, 8.0), 4, "warning", "--num-cpus=8"),
        ((8, 4, 2.0), 8, "warning", "ray.cpus_per_worker"),
        ((8, 4, 8.0), 0, "skipped", ""),
    ],
)
def test_logical_cpus_against_real_ones(seen, given, state, words):
    (found,) = examined(machine.cpus, lambda function: {"a": seen}, {"a": {"CPU": given}})
    assert found.state == state
    assert words in found.advice


def test_cpus_of_this_machine_within_a_smaller_affinity():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [min(before)])  # this thread's
    try:
        logical, _, usable = machine._cpus()
    finally:
        os.sched_setaffinity(0, before)
    assert (logical, usable <= 1) == (os.cpu_count(), True)


@pytest.mark.parametrize(
    ("seen", "given", "state", "words"),
    [
        (("", "none", []), 0, "skipped", "no GPU"),
        (("", "none", []), 2, "failed", "Ray has 2 GPUs there, but PyTorch (built for CUDA none) sees none"),
        (("H100, 535.1", "13.0", []), 1, "failed", "nvidia-smi shows H100, 535.1, but PyTorch (built for CUDA 13.0)"),
        (("H100, 580.1", "13.0", [("H100", 79 * 10**9, 80 * 10**9, True, 1e-7)]), 1, "ok", "79 of 80 GB free, bf16"),
        (("H100, 580.1", "13.0", [("H100", 10**9, 80 * 10**9, True, 1e-7)]), 1, "warning", "1 of 80 GB free"),
        (("H100, 580.1", "13.0", [("H100", 79 * 10**9, 80 * 10**9, True, 0.5)]), 1, "failed", "off by 0.5"),
    ],
)
def test_gpus(seen, given, state, words):
    (found,) = examined(machine.gpus, lambda function: {"a": seen}, {"a": {"GPU": given}})
    assert found.state == state
    assert words in found.found


def test_a_gpu_that_ray_does_not_know():
    seen = ("H100, 580.1", "13.0", [("H100", 79 * 10**9, 80 * 10**9, True, 1e-7)])
    assert states(examined(machine.gpus, lambda function: {"a": seen}, {"a": {}})) == [("a", "warning"), ("a", "ok")]


def test_kernels(tmp_path, monkeypatch):
    (sound,) = examined(machine.kernels, here)
    assert sound.state == "ok"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    native._library.cache_clear()
    try:
        (found,) = examined(machine.kernels, probe.on_this_machine)
    finally:
        native._library.cache_clear()
    assert found.state == "warning"
    assert "does not run" in found.found
    assert "g++" in found.advice
    assert states(examined(machine.kernels, lambda function: {"a": 0.5})) == [("a", "failed")]


def test_limits():
    (sound,) = examined(machine.limits, here, {"a": {"object_store_memory": 10**6}})
    assert sound.state in ("ok", "warning")  # this machine's disk may be nearly full
    small = (10**10, 1024, "/tmp/ray", 10**9, 64 * 10**6)
    found = examined(machine.limits, lambda function: {"a": small}, {"a": {"object_store_memory": 10**9}})
    assert states(found) == [("a", "warning")] * 3
    for finding, words in zip(found, ("1.0 GB free in /tmp/ray", "1024 open files", "/dev/shm has 0.1"), strict=True):
        assert words in finding.found


@pytest.mark.parametrize(("ahead", "state"), [(0, "ok"), (-1, "ok"), (3, "warning"), (-3, "warning"), (400, "failed")])
def test_clocks(ahead, state):
    (found,) = examined(machine.clock, lambda function: {"a": function() + ahead}, "")
    assert found.state == state
    assert f"{ahead:+d}.0" in found.found or ahead == 0
    assert ("NTP" in found.advice) == (state != "ok")


def test_s3_clock(s3):
    assert states(examined(machine.clock, here, s3)) == [("a", "ok"), ("S3", "ok")]


def test_a_rank_that_nobody_can_reach(closed_port):
    """Rank 1, whose rank 0 is not there."""
    with pytest.raises(UserError, match="not all of the 2 processes reach the first one at 127.0.0.1"):
        machine.rank(1, 2, f"127.0.0.1:{closed_port}", "gloo", False, 2.0)


class Ranks:
    """Two nodes, whose ranks answered so."""

    def __init__(self, **answers):
        self.answers, self.limit = answers, 10.0
        self.resources = {"a": {"CPU": 2.0}, "b": {"CPU": 2.0}}

    def ranks(self, names, function, backend, apart, seconds):
        assert (names, function, backend, apart, seconds) == (["a", "b"], machine.rank, "gloo", False, 5.0)
        return self.answers


def test_what_is_said_of_ranks():
    assert states(examined(machine.collectives, None, "gloo")) == [(DRIVER, "skipped")]
    assert states(examined(machine.collectives, Ranks(), "nccl")) == [(DRIVER, "skipped")]
    assert states(examined(machine.collectives, Ranks(a=(True, 900.0), b=(True, 800.0)), "gloo")) == [(DRIVER, "ok")]
    slow = only(examined(machine.collectives, Ranks(a=(True, 2.0), b=(True, 1.0)), "gloo"), "warning")
    assert slow.found.endswith("2 processes on 2 nodes, 1 MB/s")
    assert states(examined(machine.collectives, Ranks(a=(True, 9e2), b=(False, 9e2)), "gloo")) == [("b", "failed")]
    (lost,) = examined(machine.collectives, Ranks(a=(True, 9e2), b=TimeoutError("no answer within 10 s")), "gloo")
    assert (lost.node, lost.state) == ("b", "failed")
    assert "GLOO_SOCKET_IFNAME" in lost.advice


# --- storage ------------------------------------------------------------------------------------------------------


def test_a_sound_folder(tmp_path):
    found = examined(folders.folder, here, str(tmp_path / "new"))
    assert [finding.state for finding in found[:2]] == ["ok", "ok"]
    assert found[2].node == "a"  # its state depends on this machine's disk
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_not_shared(tmp_path):
    for name in ("shared", "own"):
        (tmp_path / name).mkdir()
    found = examined(folders.folder, elsewhere(tmp_path / "shared", tmp_path / "own"), str(tmp_path / "shared"))
    assert states(found) == [("b", "failed"), (DRIVER, "skipped")]
    assert found[0].found == f"{tmp_path}/shared is not shared: this node sees nothing of what the driver wrote"
    assert "all nodes share" in found[0].advice
    assert not list((tmp_path / "shared").iterdir()) + list((tmp_path / "own").iterdir())


def test_a_node_that_writes_to_an_overlay(tmp_path):
    """It sees what the driver wrote, but not the other way round."""

    def ask(function, mark, *rest):
        name = function(mark, *rest)
        os.remove(os.path.join(mark, name))
        return {"a": name}

    assert "writes what the driver can't see" in only(examined(folders.folder, ask, str(tmp_path)), "failed").found


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    (found,) = examined(folders.folder, here, str(tmp_path / "file" / "runs"))
    assert found.state == "failed"
    assert "can't be written" in found.found


def test_a_file_system_without_exclusive_links(tmp_path, monkeypatch):
    def link(source, target):
        os.replace(source, target)  # as one that knows no links would have to

    monkeypatch.setattr(os, "link", link)
    failed = only(examined(folders.folder, here, str(tmp_path)), "failed")
    assert "not exactly one succeeds (8, 8, 8, 8 in 4 rounds)" in failed.found


def test_a_sound_store(s3):
    found = examined(folders.folder, elsewhere("nothing", "nothing"), f"{s3}/cache")
    assert states(found) == [(DRIVER, "ok"), (DRIVER, "ok"), ("a", "ok"), ("b", "ok")]
    assert "of 16 writers that create the same file at once, exactly one succeeds" in found[1].found
    assert not list(storage.walk(s3))


def test_a_store_that_ignores_the_condition(s3, monkeypatch):
    with proxied(os.environ["AWS_ENDPOINT_URL"]) as proxy:

        class Deaf(proxy.server.RequestHandlerClass):
            def do_PUT(self):
                del self.headers["If-None-Match"]
                self.handle_one()

        proxy.server.RequestHandlerClass = Deaf
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.uri)
        failed = only(examined(folders.folder, here, f"{s3}/cache"), "failed")
    assert "not exactly one succeeds" in failed.found
    assert "If-None-Match" in failed.advice


@pytest.mark.slow
def test_a_store_that_is_dead(s3, monkeypatch, closed_port):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port}")
    (failed,) = examined(folders.folder, here, f"{s3}/cache")
    assert failed.state == "failed"
    assert "can't be reached" in failed.found
    assert "AWS_ENDPOINT_URL" in failed.advice
    assert only(examined(machine.clock, here, s3), "failed").advice == "check AWS_ENDPOINT_URL"


def test_a_store_that_finds_our_clock_wrong(s3, monkeypatch):
    with proxied(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        proxy.fault = lambda *request: "skewed"
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.uri)
        (failed,) = examined(folders.folder, here, f"{s3}/cache")
    assert "the clock of" in failed.found
    assert "NTP" in failed.advice


# --- MLflow -------------------------------------------------------------------------------------------------------


def test_mlflow(tmp_path):
    """A node with an SQLite file of its own, and then all is well."""
    for name in ("runs", "own"):
        (tmp_path / name).mkdir()
    config = load(Doctor, None, [f"root={tmp_path}/runs"])
    found = examined(services.mlflow, elsewhere(tmp_path / "runs", tmp_path / "own"), config)
    assert "logging fails" in only(found, "failed").found
    assert only(found, "failed").node == "b"

    (sound,) = examined(services.mlflow, here, config)
    assert sound.state == "ok", sound
    client = mlflow_server.client_of(f"sqlite:///{tmp_path}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("litevae-doctor")
    assert experiment is not None
    assert client.search_runs([experiment.experiment_id]) == []


def test_an_mlflow_that_refuses(closed_port):
    config = load(Doctor, None, [f"tracking.uri=http://me:secret@127.0.0.1:{closed_port}"])
    (failed,) = examined(services.mlflow, here, config)
    assert failed.state == "failed"
    assert "Connection refused" in failed.found
    assert "secret" not in failed.found + failed.advice
    assert "is the server up" in failed.advice


def test_mlflow_that_is_off():
    assert states(examined(services.mlflow, here, load(Doctor, None, ["tracking.enabled=false"]))) == [
        (DRIVER, "skipped")
    ]


# --- weights, models, images ----------------------------------------------------------------------------------------


def test_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    lpips, fid = examined(workload.weights, here)
    assert (lpips.state, fid.state) == ("warning", "warning")
    assert str(tmp_path) in lpips.found
    assert "LPIPS is left out, and train_vae refuses to train with it unless" in lpips.found
    assert "train_vae" not in fid.found
    assert "TORCH_HOME" in lpips.advice

    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "vgg16-397923af.pth").write_bytes(b"half a download")
    (failed,) = examined(workload.weights, elsewhere(tmp_path, tmp_path))[:1]
    assert failed.state == "failed"
    assert "is damaged" in failed.found


def test_a_model_with_other_weights_on_a_node(tmp_path):
    for number, name in enumerate(("mine", "theirs")):
        save_model(tmp_path / name, seed=number)
    config = load(Doctor, None, [f"model={tmp_path}/mine", "transform.resolution=64", "batch_size=2"])
    (failed,) = examined(
        workload.model, elsewhere(tmp_path / "mine", tmp_path / "theirs"), config, None, workload.Speeds()
    )
    assert (failed.node, failed.state) == ("b", "failed")
    assert "is another model" in failed.found

    gone = examined(workload.model, elsewhere(tmp_path / "mine", tmp_path / "none"), config, None, workload.Speeds())
    assert "does not exist" in only(gone, "failed").found

    speeds = workload.Speeds()
    same, timed = examined(workload.model, here, config, None, speeds)
    assert (same.state, timed.state) == ("ok", "ok")
    assert speeds.encode[0] > 0


def test_images(tmp_path):
    for name in ("mine", "own"):
        (tmp_path / name).mkdir()
    photo_folder(tmp_path / "mine")
    config = load(Doctor, None, [f"source.uri={tmp_path}/mine", "transform.resolution=32"])
    speeds = workload.Speeds()
    listed, a, b = examined(workload.source, elsewhere(tmp_path / "mine", tmp_path / "own"), config, speeds)
    assert "48 images" in listed.found
    assert (a.node, a.state) == ("a", "warning")
    assert "3 of 48 images can't be read" in a.found
    for reason in BAD.values():
        assert f"1 {reason}" in a.found
    assert "error_budget" in a.advice
    assert (b.node, b.state) == ("b", "failed")
    assert "none of 48 images can be read: 48 missing" in b.found
    assert (speeds.images, len(speeds.decode)) == (48, 1)


def test_images_that_are_noise(tmp_path):
    """Files with images' names that hold none."""
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(random.Random(number).randbytes(1000))
    config = load(Doctor, None, [f"source.uri={tmp_path}"])
    _, failed = examined(workload.source, here, config, workload.Speeds())
    assert failed.state == "failed"
    assert "4 not_an_image" in failed.found
    (nowhere,) = examined(workload.source, here, load(Doctor, None, [f"source.uri={tmp_path}/none"]), workload.Speeds())
    assert nowhere.state == "failed"
    assert "source.uri" in nowhere.found


def test_an_estimate():
    from pipelines.runtime.cluster import Placement

    speeds = workload.Speeds()
    speeds.images, speeds.encode, speeds.decode = 1_000_000, [10.0, 30.0], [100.0]
    (found,) = examined(workload.estimate, Placement(2, False, 4), speeds)
    seconds = 1_000_000 / 40 + 1_000_000 / 800  # of 2 workers, and of their 8 cores
    assert f"take about {seconds / 3600:,.1f} hours" in found.found
    assert "encoding is the bottleneck" in found.found
    (found,) = examined(workload.estimate, Placement(20, True, 1, decoders=3), speeds)
    assert f"take about {1_000_000 / 300 / 60:,.1f} minutes" in found.found  # 3 decoders, beside the encoders
    assert "decoding is the bottleneck" in found.found
    assert states(examined(workload.estimate, None, speeds)) == [(DRIVER, "skipped")]


# --- clusters -----------------------------------------------------------------------------------------------------


def test_a_cluster_that_is_not_there(tmp_path, monkeypatch, capsys, closed_port):
    """The other checks are of this machine alone."""
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port}")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    report = tmp_path / "report.json"
    assert doctor.run(load(Doctor, None, [f"root={tmp_path}", "tracking.enabled=false", f"report={report}"])) == 1
    summary = json.loads(report.read_text())
    (failed,) = [finding for finding in summary["findings"] if finding["state"] == "failed"]
    assert (failed["check"], failed["node"]) == ("ray", DRIVER)
    assert "Connection refused" in failed["found"]
    assert "RAY_ADDRESS" in failed["advice"]
    seen = {finding["check"] for finding in summary["findings"] if finding["state"] == "ok"}
    assert {"versions", "kernels", "clock", "root"} <= seen
    shown = capsys.readouterr().out
    assert f"{summary['counts']['ok']} ok, " in shown
    assert "1 failed" in shown
    assert "Traceback" not in shown


@pytest.mark.slow
def test_a_node_that_shares_nothing(tmp_path, closed_port):
    """Two nodes, of which one does not see the folder that all is in."""
    data, photos = tmp_path / "data", tmp_path / "data" / "photos"
    photos.mkdir(parents=True)
    for number in range(4):
        buffer = io.BytesIO()
        Image.new("RGB", (80, 60), (60 * number, 0, 0)).save(buffer, "jpeg")
        (photos / f"{number}.jpg").write_bytes(buffer.getvalue())
    save_model(data / "model")
    report = tmp_path / "report.json"
    with cluster(num_cpus=4) as nodes:
        apart = nodes.add_apart(str(data), cpus=2)
        done = subprocess.run(
            [
                sys.executable, "jobs/doctor.py", f"root={data}/runs", f"source.uri={photos}", f"model={data}/model",
                f"report={report}", "transform.resolution=32", "batch_size=2", "images=4", "ray.workers=50",
                f"tracking.uri=http://127.0.0.1:{closed_port}",
            ],
            cwd=REPO, env=os.environ | {"RAY_ADDRESS": nodes.address}, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stdout
    found = json.loads(report.read_text())["findings"]
    failed = {
        (finding["check"], finding["node"]): finding["found"] for finding in found if finding["state"] == "failed"
    }
    assert set(failed) == {
        ("ray", DRIVER), ("root", apart), ("mlflow", DRIVER), ("model", apart), ("source", apart)
    }, done.stdout  # fmt: skip
    assert "ray.workers=50" in failed["ray", DRIVER]
    assert "is not shared" in failed["root", apart]
    (gloo,) = [finding for finding in found if finding["check"] == "gloo"]
    assert gloo["found"].startswith("all_reduce over 2 processes on 2 nodes")
    assert [finding["state"] for finding in found if finding["check"] == "versions"] == ["ok"] * 3
