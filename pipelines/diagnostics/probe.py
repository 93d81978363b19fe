"""Asking every node of a Ray cluster the same, and what is to be said of the answers: what `doctor` is built on."""

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
    node: str
    state: State
    found: str
    advice: str = ""
    check: str = ""


Findings = Iterable[Finding]
Ask = Callable[..., dict[str, Any]]  # (function, *arguments) -> by node what it returned there, or its exception


def failure(node: str, error: BaseException, advice: str = "") -> Finding:
    """What an exception tells: of a UserError, what to do as well."""
    if isinstance(error, UserError):
        found, *rest = re.split(r"; |\. ", str(error), maxsplit=1)
        return Finding(node, "failed", found, advice or "".join(rest))
    text, *more = f"{type(error).__name__}: {error}".strip().splitlines()
    if more and type(error).__module__.startswith("ray."):  # of a process that could not start it tells why at the end
        text = f"{text} {more[-1]}"
    return Finding(node, "failed", redact(textwrap.shorten(text, 300)), advice)


def answered(answers: dict[str, Any], advice: str = "") -> tuple[dict[str, Any], list[Finding]]:
    """The nodes that answered, and findings about those that failed to."""
    lost = [failure(node, answer, advice) for node, answer in answers.items() if isinstance(answer, BaseException)]
    return {node: answer for node, answer in answers.items() if not isinstance(answer, BaseException)}, lost


class Probe:
    """A process on a node."""

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


class Nodes:
    """A process of ours on each node of the cluster, which takes neither CPU nor GPU from others.

    Attributes:
        resources: of each node, as Ray counts them.
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
        # With no GPU of its own it sees all; with threads, a call that hangs does not hold up the next.
        quiet = {"env_vars": {"TORCH_CPP_LOG_LEVEL": "FATAL"}}  # or processes that don't find each other print stacks
        options = {"num_cpus": 0, "max_concurrency": 16, "scheduling_strategy": pinned, "runtime_env": quiet}
        return ray.remote(Probe).options(**options).remote()

    def ask(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """Of each node what `function` returns there, or what it raised."""
        return self._gather({name: probe.call.remote(function, *arguments) for name, probe in self._probes.items()})

    def ranks(self, names: list[str], function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """The same of function(rank, ranks, address, *arguments), once on each of these nodes, twice where it is one;
        `address` is where rank 0 can listen. In new processes: PyTorch counts the groups that each one was in."""
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
            except Exception as error:  # noqa: BLE001 - handed on as the answer
                answers[name] = error
        return answers

    def close(self) -> None:
        import ray

        for probe in self._probes.values():
            ray.kill(probe)


def on_this_machine(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """What `Nodes.ask` returns, for this machine only and without Ray."""
    try:
        return {platform.node(): function(*arguments)}
    except Exception as error:  # noqa: BLE001 - handed on as the answer
        return {platform.node(): error}


def _address() -> str:
    import ray

    host = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{host}:{probe.getsockname()[1]}"


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"
