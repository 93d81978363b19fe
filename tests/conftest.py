"""The environment of all tests, which is set before torch, Ray or MLflow is imported, and S3 servers on loopback.

moto (in memory, without a check of credentials) is for all tests, Ceph (a real store) for slow ones.
"""

import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ports

_SCRIPT = Path(__file__).resolve().parents[2] / "shared" / "tools" / "ceph-s3-up.sh"
_CHECKSUMS = {"AWS_REQUEST_CHECKSUM_CALCULATION": "when_required", "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required"}


_MOTO = {
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports.reserve()}",
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    **_CHECKSUMS,
}
_CEPH = _MOTO | {
    "AWS_ENDPOINT_URL": "http://127.0.0.1:5703",
    "AWS_ACCESS_KEY_ID": "CEPHAK",
    "AWS_SECRET_ACCESS_KEY": "CEPHSK",
}

os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in [name for name in os.environ if name.startswith("AWS_")]:  # tests must not use the developer's own stores,
    del os.environ[name]
for name in (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_EXPERIMENT_ID",
    "MLFLOW_RUN_ID",
    "RAY_ADDRESS",
):  # nor are the servers
    os.environ.pop(name, None)
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_worker_niceness="0",  # the default of 15 would starve them while another test computes
    MLFLOW_DISABLE_TELEMETRY="true",
    # as pipelines.runtime.cluster does before it imports Ray; here a test may have imported it already
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN=secrets.token_hex(32),
    # child processes, Ray's workers among them, find the same S3 server
    AWS_CONFIG_FILE=os.devnull,
    AWS_SHARED_CREDENTIALS_FILE=os.devnull,
    AWS_EC2_METADATA_DISABLED="true",
    **_MOTO,
)


# The files whose tests take longest. They come first, because a process that begins one of them last would end long
# after the other processes.
FIRST = (
    *("test_commands.py", "test_nodes.py", "test_train_vae.py", "test_sweep.py", "test_demo.py"),
    *("test_autoencoder.py", "test_generated.py", "test_train_ldm.py", "test_maintenance.py", "test_encode.py"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", metavar="K/N", help="run the K-th of N equal parts of the tests")


@pytest.hookimpl(trylast=True)  # after -m has chosen
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what tests recorded by `record_property`, which reaches here from the processes of xdist, too."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, parts = map(int, config.getoption("--part").split("/"))
    items[:] = items[part - 1 :: parts]
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def _bucket() -> str:
    import boto3  # imported here, because most tests do not need it

    name = f"bucket-{uuid.uuid4().hex[:12]}"
    boto3.session.Session().client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


def _answers(port: int, process: subprocess.Popen, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"moto ended with {process.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"nothing listens on port {port} after {seconds} s")


@pytest.fixture(scope="module", autouse=True)
def _ray_ends_with_its_module() -> Iterator[None]:
    """Stop Ray after each module. The next module would join it, with the environment and the nodes of this one."""
    yield
    if ray := sys.modules.get("ray"):
        ray.shutdown()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nothing listens while the test runs."""
    with ports.closed() as port:
        yield port


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the home folder away, as in a container that runs under a number that its system does not know."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def in_process() -> Iterator[None]:
    """Run jobs without Ray during the test; see `tests.in_process`."""
    from tests import in_process  # imported here, because most tests do not need it

    with in_process.in_process():
        yield


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make botocore repeat requests without waiting."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)


@pytest.fixture(params=["here", pytest.param("ray", marks=pytest.mark.slow)])
def wherever(request: pytest.FixtureRequest) -> None:
    """Run the test with `in_process`; in the slow suite also with Ray's workers."""
    if request.param == "here":
        request.getfixturevalue("in_process")


@pytest.fixture(scope="session")
def _moto() -> Iterator[None]:
    """Start the server that the environment of all tests names."""
    port = int(_MOTO["AWS_ENDPOINT_URL"].rsplit(":", 1)[1])
    command = [sys.executable, Path(__file__).with_name("moto_s3.py"), "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _answers(port, process)
        yield
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def s3(_moto) -> str:
    """A new bucket in moto: s3://bucket-..."""
    return _bucket()


@pytest.fixture(scope="module")  # its ports are fixed, so only one process of a parallel test run has it at a time
def _ceph(tmp_path_factory) -> Iterator[None]:
    if shutil.which("ceph-mon") is None or shutil.which("radosgw") is None:
        pytest.skip("Ceph is not installed: apt-get install ceph-mon ceph-osd radosgw ceph-common")
    if not _SCRIPT.is_file():
        pytest.skip(f"{_SCRIPT} does not exist")
    folder = tmp_path_factory.mktemp("ceph") / "run"
    with open(Path(tempfile.gettempdir(), "litevae-ceph.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield from _run_ceph(folder)


def _run_ceph(folder: Path) -> Iterator[None]:
    try:
        up = subprocess.run(["bash", _SCRIPT, folder], capture_output=True, text=True, timeout=300)
        assert up.returncode == 0, f"{up.stdout}\n{up.stderr}"
        running = [Path(f"/proc/{file.read_text().strip()}").exists() for file in folder.glob("*.pid")]
        assert running == [True] * 3, "not all of Ceph's processes run: are its ports (5703, 3300, 6789) taken?"
        yield
    finally:
        for file in folder.glob("*.pid"):
            try:
                os.kill(int(file.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                print(f"{file.stem} had ended")


@pytest.fixture
def ceph(_ceph, monkeypatch) -> str:
    """Make a bucket in Ceph. The environment names Ceph only during the test, so child processes must start in it."""
    import boto3

    for name, value in _CEPH.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it has moto's credentials
    return _bucket()
