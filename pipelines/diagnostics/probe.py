"""The base of `doctor`: findings, and the means to call a function on every node of a Ray cluster."""

import platform
import re
import socket
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from litevae.errors import UserError, redact

State = Literal["ok", "warning", "failed", "skipped"]
DRIVER = "driver"


class Finding(NamedTuple):
    """One result of a check.

    Attributes:
        node: the node's name, or `DRIVER`.
        state: "ok", "warning", "failed" or "skipped".
        found: what was found.
        advice: what the user can do about it.
        check: the check's name.
    """

    node: str
    state: State
    found: str
    advice: str = ""
    check: str = ""


Findings = Iterable[Finding]
# Calls function(*arguments) on every node, and returns what it returned or raised there, by node.
Ask = Callable[..., dict[str, Any]]


def failure(node: str, error: BaseException, advice: str = "") -> Finding:
    """Make a finding from an exception. A UserError's message also gives the advice, unless `advice` is given."""
    if isinstance(error, UserError):
        found, *rest = re.split(r"; |\. ", str(error), maxsplit=1)
        return Finding(node, "failed", found, advice or "".join(rest))
    text, *more = f"{type(error).__name__}: {error}".strip().splitlines()
    if more and type(error).__module__.startswith("ray."):  # its last line says why a process could not start
        text = f"{text} {more[-1]}"
    return Finding(node, "failed", redact(textwrap.shorten(text, 300)), advice)


def answered(answers: dict[str, Any], advice: str = "") -> tuple[dict[str, Any], list[Finding]]:
    """Split the answers into those of nodes that answered, and findings about nodes that raised an exception."""
    lost = [failure(node, answer, advice) for node, answer in answers.items() if isinstance(answer, BaseException)]
    return {node: answer for node, answer in answers.items() if not isinstance(answer, BaseException)}, lost


class Probe:
    """An actor on a node, which calls functions there."""

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


class Nodes:
    """A process on each node of the cluster, which reserves neither a CPU nor a GPU.

    Attributes:
        resources: each node's resources, as Ray counts them, by node.
        limit: seconds that an answer may take.
    """

    def __init__(self, limit: float):
        import ray

        self.limit = limit
        self._ids: dict[str, str] = {}
        self.resources: dict[str, dict[str, float]] = {}
        for node in ray.nodes():
            if node["Alive"]:
                taken = node["NodeName"] in self._ids
                name = f"{node['NodeName']} ({node['NodeID'][:6]})" if taken else node["NodeName"]
                self._ids[name], self.resources[name] = node["NodeID"], node["Resources"]
        self._probes = {name: self._probe(name) for name in self._ids}

    def _probe(self, name: str) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        pinned = NodeAffinitySchedulingStrategy(self._ids[name], soft=False)
        # An actor that reserves no GPU sees all of them. With several threads, a call that hangs does not block the
        # next one. The log level keeps processes that do not find each other from printing stack traces.
        quiet = {"env_vars": {"TORCH_CPP_LOG_LEVEL": "FATAL"}}
        options = {"num_cpus": 0, "max_concurrency": 16, "scheduling_strategy": pinned, "runtime_env": quiet}
        return ray.remote(Probe).options(**options).remote()

    def ask(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """Call function(*arguments) on every node, and return what it returned or raised there, by node."""
        return self._gather({name: probe.call.remote(function, *arguments) for name, probe in self._probes.items()})

    def ranks(self, names: list[str], function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """Call function(rank, ranks, address, *arguments) once on each of these nodes, or twice if there is only one.

        The calls run in new processes, because PyTorch counts the process groups that a process has been in.

        Args:
            names: the nodes.
            function: gets its rank, the number of ranks, and the address (host:port) on which rank 0 can listen.
            arguments: further arguments.

        Returns:
            What each call returned or raised, by node.
        """
        import ray

        probes = {name: self._probe(name) for name in names}
        if len(probes) == 1:
            probes[f"{names[0]} (2nd process)"] = self._probe(names[0])
        try:
            there = self._gather({name: probe.call.remote(_address) for name, probe in probes.items()})
            if any(isinstance(answer, Exception) for answer in there.values()):
                return there
            calls = {
                name: probe.call.remote(function, rank, len(probes), there[names[0]], *arguments)
                for rank, (name, probe) in enumerate(probes.items())
            }
            return self._gather(calls)
        finally:
            for probe in probes.values():
                ray.kill(probe)

    def _gather(self, calls: dict[str, Any]) -> dict[str, Any]:
        """Wait up to `limit` seconds for the calls; one that does not end in time gives a TimeoutError."""
        import ray

        done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=self.limit)
        answers: dict[str, Any] = {}
        for name, call in calls.items():
            try:
                if call not in done:
                    raise TimeoutError(f"no answer within {self.limit:g} s; see whether the node is busy or hangs")
                answers[name] = ray.get(call)
            except ray.exceptions.RayTaskError as error:
                answers[name] = error.cause if isinstance(error.cause, Exception) else error
            except Exception as error:  # noqa: BLE001 - returned as the answer
                answers[name] = error
        return answers

    def close(self) -> None:
        """End the processes."""
        import ray

        for probe in self._probes.values():
            ray.kill(probe)


def on_this_machine(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Do the same as `Nodes.ask`, for this machine only and without Ray."""
    try:
        return {platform.node(): function(*arguments)}
    except Exception as error:  # noqa: BLE001 - returned as the answer
        return {platform.node(): error}


def _address() -> str:
    """Return this node's IP address with a free port."""
    import ray

    host = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{host}:{probe.getsockname()[1]}"


def counted(number: int, what: str) -> str:
    """Return a count in words, for example "1 node" or "2 nodes"."""
    return f"{number} {what}{'s' if number != 1 else ''}"
