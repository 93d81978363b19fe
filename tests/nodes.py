"""A Ray cluster on this machine, whose nodes can be added and killed."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

# A killed raylet refuses connections at once; a living one on a busy machine may take some seconds to answer.
QUICK = {"health_check_period_ms": 500, "health_check_timeout_ms": 5000, "health_check_failure_threshold": 5}
MEMORY = 200 * 2**20  # of an object store


class Nodes:
    """A head node, and further nodes by name.

    Each has its own address: the head 127.0.0.2, the first node 127.0.0.3, and so on. The second process of a parallel
    test run uses 127.0.1.2 and so on, since Ray's ports are the same.
    """

    def __init__(self, **head):
        from ray.cluster_utils import Cluster

        # Ray replaces 127.0.0.1 by the machine's outer address, but leaves other addresses of 127.0.0.0/8 as they are.
        process = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
        self._network, self._last = f"127.0.{process}", 2
        own = {"node_ip_address": f"{self._network}.2", "include_dashboard": False, "_system_config": QUICK}
        # shutdown_at_exit would take this process out of its terminal's process group
        self._cluster = Cluster(
            initialize_head=True, head_node_args=own | {"object_store_memory": MEMORY} | head, shutdown_at_exit=False
        )
        self._nodes, self._apart = {"head": self._cluster.head_node}, []
        self.address = self._cluster.address

    def __contains__(self, name):
        return name in self._nodes

    def add(self, name, **options):
        """Add a node. This must be called from the main thread."""
        self._last += 1
        options = {"node_ip_address": f"{self._network}.{self._last}", "object_store_memory": MEMORY} | options
        self._nodes[name] = self._cluster.add_node(**options)

    def add_apart(self, folder, cpus):
        """Add a node that sees an empty folder instead of `folder`, as another machine would, and return its address.

        Skip the test if this user may not mount.
        """
        if subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", folder]).returncode:
            pytest.skip("mounting a folder for one node needs root")
        self._last += 1
        ray = [
            str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats",
            f"--address={self.address}", f"--node-ip-address={self._network}.{self._last}", f"--num-cpus={cpus}",
            f"--object-store-memory={MEMORY}",
        ]  # fmt: skip
        command = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', folder, *ray]
        log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._apart.append(subprocess.Popen(command, stdout=log, stderr=log))
        end = time.monotonic() + 120
        while len(self.alive()) < len(self._nodes) + len(self._apart):
            if self._apart[-1].poll() is not None or time.monotonic() > end:
                log.seek(0)
                raise AssertionError(f"the node did not come up:\n{log.read().decode()}")
            time.sleep(0.3)
        return f"{self._network}.{self._last}"

    def alive(self):
        from ray._raylet import GcsClient

        return [node for node in GcsClient(address=self.address).get_all_node_info().values() if node.state == 0]

    def warn(self, name):
        """Tell Ray that a node will be taken away, as a cloud does before it ends a spot machine."""
        command = [str(Path(sys.executable).with_name("ray")), "drain-node", f"--address={self.address}"]
        command += ["--node-id", self._nodes[name].node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message", "spot", "--deadline-remaining-seconds", "600"]
        subprocess.run(command, check=True, timeout=120)

    def kill(self, name):
        """Kill a node, and return the titles of the processes that ran there."""
        raylet = self._raylet(name)
        titles = [title_of(child).strip() for child in raylet.children()]
        raylet.kill()
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)
        return titles

    def workers(self, *names):
        """Return the processes that the raylets started, without the forks of these, which have the same titles."""
        return [child for name in names or self._nodes for child in self._raylet(name).children()]

    def where(self, title):
        """Return the names of the nodes with a process whose title begins with `title`."""
        return {name for name in self._nodes if any(title_of(p).startswith(title) for p in self.workers(name))}

    def _raylet(self, name):
        return psutil.Process(self._nodes[name].all_processes["raylet"][0].process.pid)

    def close(self):
        for process in self._apart:
            family = [process, *psutil.Process(process.pid).children(recursive=True)]
            for one in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            process.wait()
        self._cluster.shutdown()


def title_of(process):
    with contextlib.suppress(psutil.NoSuchProcess):  # or a zombie
        return " ".join(process.cmdline())
    return ""


@contextlib.contextmanager
def cluster(**head) -> Iterator[Nodes]:
    """Start a cluster with only a head.

    It has its own folder, so that ray.init() in other programs does not find it; the folder's name is short, because
    it holds sockets. Only one such cluster runs on this machine at a time: two would starve each other, and Ray would
    take slow nodes for dead ones.
    """
    with open(Path(tempfile.gettempdir(), "litevae-nodes.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield from _run(**head)


def _run(**head) -> Iterator[Nodes]:
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the cluster ends with this process
    before = os.environ.get("RAY_TMPDIR")
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        nodes = Nodes(**head)
        try:
            yield nodes
        finally:
            nodes.close()
            signal.signal(signal.SIGTERM, handler)
            os.environ.pop("RAY_TMPDIR")
            if before is not None:
                os.environ["RAY_TMPDIR"] = before
