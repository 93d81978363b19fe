"""Find problems that could spoil a long run before it is started. Every check is a function that yields findings.

The driver starts a process of its own on every node (`Nodes`), and each check asks all of them the same thing at the
same time. An exception or a timeout also becomes a finding, and no check stops the others.
"""

import json
import os
import shutil
import socket
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from litevae import storage
from litevae.errors import UserError, redact
from pipelines.diagnostics import first_look
from pipelines.diagnostics.config import Doctor
from pipelines.diagnostics.folders import folder
from pipelines.diagnostics.machine import clock, collectives, cpus, gpus, kernels, limits, versions, versions_here
from pipelines.diagnostics.probe import DRIVER, Ask, Finding, Findings, Nodes, State, counted, failure, on_this_machine
from pipelines.diagnostics.services import mlflow
from pipelines.diagnostics.workload import Speeds, estimate, model, source, weights
from pipelines.runtime import cluster, paths, tables
from pipelines.runtime.schema import Ray


def run(config: Doctor) -> int:
    """Run the job `doctor`: print a table of findings, and return the exit code (1 if a check failed, else 0)."""
    findings = doctor(config)
    print(f"\n{table(findings)}\n")
    counts = Counter(finding.state for finding in findings)
    nodes = len({finding.node for finding in findings} - {DRIVER})
    words: dict[State, str] = {"ok": "ok", "warning": "warnings", "failed": "failed", "skipped": "skipped"}
    print(
        f"doctor: {', '.join(f'{counts[state]} {word}' for state, word in words.items())}, on {counted(nodes, 'node')}"
    )
    if config.report:
        summary = {"counts": dict(counts), "findings": [finding._asdict() for finding in findings]}
        storage.put(os.path.abspath(config.report), json.dumps(summary, indent=2).encode() + b"\n")
    return 1 if counts["failed"] else 0


def doctor(config: Doctor) -> list[Finding]:
    """Run all checks and return their findings.

    Raises:
        UserError: if a path in the config is one that no job would accept, or the report's folder does not exist.
    """
    first_look.doctor(config)
    root = paths.output_path("root", config.root)
    out = paths.output_path("out", config.out, remote=True) if config.out else ""
    findings: list[Finding] = []

    def check(name: str, function: Callable[..., Findings], *arguments: Any) -> None:
        print(f"doctor: {name} ...", file=sys.stderr, flush=True)
        findings.extend(found._replace(check=name) for found in examined(function, *arguments))

    started = start(config.ray)
    check("ray", lambda: started.findings)
    nodes = Nodes(config.limit) if started.up else None
    ask: Ask = nodes.ask if nodes else on_this_machine
    try:
        check("versions", lambda: versions(versions_here(), ask(versions_here)))
        check("cpus", cpus, ask, nodes.resources if nodes else {})
        check("gpus", gpus, ask, nodes.resources if nodes else {})
        check("kernels", kernels, ask)
        check("memory, disk", limits, ask, nodes.resources if nodes else {})
        check("clock", clock, ask, out)
        check("gloo", collectives, nodes, "gloo")
        check("nccl", collectives, nodes, "nccl")
        check("root", folder, ask, root)
        check("out", folder, ask, out)
        check("mlflow", mlflow, ask, config)
        check("weights", weights, ask)
        speeds = Speeds()
        check("model", model, ask, config, started.placement, speeds)
        check("source", source, ask, config, speeds)
        check("estimate", estimate, started.placement, speeds)
    finally:
        if nodes:
            nodes.close()
    return findings


def examined(function: Callable[..., Findings], *arguments: Any) -> list[Finding]:
    """Return the findings of a check. If it raises an exception, that becomes the last finding."""
    findings: list[Finding] = []
    try:
        for finding in function(*arguments):
            findings.append(finding._replace(found=redact(finding.found)))
    except Exception as error:  # noqa: BLE001 - every error is a finding
        findings.append(failure(DRIVER, error))
    return findings


def table(findings: Sequence[Finding], width: int = 0) -> str:
    """Format findings as aligned columns; what to do stands below what was found.

    Nodes with the same finding share one row. Text is wrapped, but paths, addresses and commands are not broken, so
    that they can be copied: text with one that is too long for its column begins at the left.

    Args:
        findings: the findings.
        width: width of the table in characters; 0: that of the terminal, but at most `tables.WIDTH`.
    """
    width = width or max(60, min(tables.WIDTH, shutil.get_terminal_size((tables.WIDTH, 24)).columns))
    every = {finding.node for finding in findings} - {DRIVER}
    same: dict[Finding, list[str]] = {}
    for finding in findings:
        same.setdefault(finding._replace(node=""), []).append(finding.node)
    heads = [("check", "node", "state")]
    for finding, nodes in same.items():
        where = f"all {len(nodes)}" if len(nodes) > 1 and set(nodes) == every else ", ".join(nodes)
        heads.append((finding.check, textwrap.shorten(where, 32, placeholder=" ..."), finding.state))
    widths = [max(len(head[column]) for head in heads) for column in range(3)]
    begin = sum(widths) + 6

    def wrapped(text: str) -> list[str]:
        fits = all(len(word) <= width - begin for word in text.split())
        indent = " " * (begin if fits else 4)
        options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
        return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, **options)

    lines = []
    for head, text, advice in zip(
        heads, ["found", *(each.found for each in same)], ["", *(each.advice for each in same)], strict=True
    ):
        first = "  ".join(part.ljust(limit) for part, limit in zip(head, widths, strict=True)) + "  "
        found = wrapped(text)
        if found and found[0].startswith(" " * begin):
            found[0] = first + found[0].strip()
        else:
            lines.append(first.rstrip())
        lines += found + (wrapped(f"-> {advice}") if advice else [])
    return "\n".join(lines)


# --- Ray ------------------------------------------------------------------------------------------


class Started(NamedTuple):
    """The result of starting Ray.

    Attributes:
        up: whether Ray is running.
        placement: the workers that a job would get; None if that could not be found out.
        findings: the findings about Ray.
    """

    up: bool
    placement: cluster.Placement | None
    findings: list[Finding]


def start(config: Ray) -> Started:
    """Join or start Ray as every job does, and check the number of nodes and the authentication."""
    import ray

    placement: cluster.Placement | None = None
    problems: list[Finding] = []
    host, _, port = os.environ.get("RAY_ADDRESS", "").rpartition(":")
    try:
        if host and port.isdigit() and "//" not in host:  # Ray itself would try for about four minutes
            _reach(host, int(port))
        placement = cluster.start(config)
    except Exception as error:  # noqa: BLE001 - the other checks go on without Ray or without a placement
        advice = "see that $RAY_ADDRESS is that of a running cluster, with the same RAY_AUTH_MODE and token"
        advice = "" if isinstance(error, UserError) else advice
        problems.append(failure(DRIVER, error, advice))
    if not ray.is_initialized():
        return Started(False, None, problems)
    alive = [node for node in ray.nodes() if node["Alive"]]
    joined = "joined" if "RAY_ADDRESS" in os.environ or paths.in_ray_job() else "started here"
    found = f"Ray {ray.__version__}, {joined}, {counted(len(alive), 'node')}"
    if placement:
        problems.append(Finding(DRIVER, "ok", f"{found}; a job gets {placement.text}"))
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    outside = sorted({node["NodeName"] for node in alive if not _loopback(node["NodeManagerAddress"])})
    if is_token_auth_enabled():
        problems.append(Finding(DRIVER, "ok", "token authentication is on"))
    elif joined == "started here" or not outside:
        problems.append(Finding(DRIVER, "ok", "no token authentication, but Ray listens only on loopback"))
    else:
        advice = "ray get-auth-token --generate, and RAY_AUTH_MODE=token on every node before ray start"
        text = f"no token authentication: whoever reaches {', '.join(outside[:3])} can run code there"
        problems.append(Finding(DRIVER, "warning", text, advice))
    return Started(True, placement, problems)


def _reach(host: str, port: int) -> None:
    """Raise a UserError if nothing accepts a TCP connection at this address within 10 seconds."""
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        advice = "start Ray there (ray start --head), open the port, or unset RAY_ADDRESS"
        raise UserError(f"$RAY_ADDRESS={host}:{port} can't be reached ({error}); {advice}") from None


def _loopback(address: str) -> bool:
    return address.startswith("127.") or address in ("::1", "localhost")
