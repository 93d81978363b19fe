"""Put small faults into the code, one at a time, and check that the fast tests notice each.

    python -m tests.mutate                  every fault of mutants.py
    python -m tests.mutate --tenth 3        the fourth of ten equal parts, as CI draws one
    python -m tests.mutate train_vae.py     the faults whose place or tests have this in their name

A fault is put into a copy of the working tree, and the tests that it names run there. It is caught if each of them
fails. Packages of others are imported once, and the tests of each fault run in a fork of that process.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.mutants import MUTANTS, Mutant

REPO = Path(__file__).resolve().parents[1]
PRODUCT = ("litevae", "pipelines", "jobs")
SECONDS = 300  # time limit for the tests of one fault; a fault that makes them hang counts as caught
IMPORTED_ONCE = (
    *(
        "diffusers.models.autoencoders.autoencoder_kl",
        "diffusers.models.unets.unet_2d",
        "diffusers.models.transformers",
    ),
    *("pyarrow.parquet", "pytest", "scipy.stats", "torch", "torchvision"),
)
# The suites set these as well: see conftest.py, which comes after the imports here.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}


class Unusable(Exception):
    """A fault fits no place or several, or is not valid Python; or its test is missing, or fails without the fault."""


def place(fault: Mutant, root: Path = REPO) -> Path:
    """Return the file that holds the fault's text exactly once: the named one, or the only such file of the product."""
    own = root / fault.file
    if own.is_file() and own.read_text().count(fault.old) == 1:
        return own
    sources = [path for folder in PRODUCT for path in sorted((root / folder).rglob("*.*")) if path.suffix != ".pyc"]
    found = {path: count for path in sources if (count := path.read_text().count(fault.old))}
    if sum(found.values()) != 1:
        raise Unusable(f"{fault.file}: {fault.old!r} is in the product {sum(found.values())} times, not once")
    return next(iter(found))


def mutated(fault: Mutant, path: Path) -> str:
    text = path.read_text().replace(fault.old, fault.new)
    if path.suffix == ".py":
        try:
            ast.parse(text)
        except SyntaxError as error:
            raise Unusable(f"{fault.file}: {fault.new!r} is not valid Python: {error}") from None
    return text


@dataclass
class Outcome:
    fault: Mutant
    passed: list[str]  # of the tests that should have failed
    seconds: float
    died: bool  # by a signal: ours, after SECONDS, or that of a crash

    @property
    def caught(self) -> bool:
        return self.died or not self.passed


# --- running ----------------------------------------------------------------------------------------------------------


def copy_of_the_tree(folder: Path) -> Path:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in filter(None, subprocess.run(command, cwd=REPO, check=True, capture_output=True).stdout.split(b"\0")):
        source, target = REPO / os.fsdecode(name), folder / os.fsdecode(name)
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    return folder


def run_tests(tree: Path, tests: Sequence[str], log: Path) -> int:
    """Start the tests in a fork that has `tree` as its project, and return its process id.

    The fork exits with 0 if all tests failed, with 1 if some passed, whose names it writes next to its log, and with 2
    if a test did not run.
    """
    if child := os.fork():
        return child
    code = 2
    try:
        os.setsid()  # what the tests start ends with them
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        for name in [name for name in sys.modules if name.split(".")[0] in ("tests", *PRODUCT)]:
            del sys.modules[name]  # so that they are imported from the tree
        os.environ["PYTHONPATH"] = str(tree)
        import pytest

        results = _Results(tests)
        options = ["-p", "no:cacheprovider", f"--basetemp={log.with_suffix('.tmp')}", "--tb=short"]
        stop = ["--exitfirst"] if len(tests) == 1 else []
        pytest.main([*options, *stop, *tests], plugins=[results])
        passed = [test for test, failed in results.failed.items() if not failed]
        missing = [] if results.broken else [test for test in tests if test not in results.ran]
        log.with_suffix(".passed").write_text("\n".join(passed))
        print("did not run:", *missing)
        sys.stdout.flush()
        code = 0 if results.broken else 2 if missing else int(bool(passed))
    finally:
        os._exit(code)


class _Results:
    """A plugin of pytest that records which of the named tests failed in at least one of their cases."""

    def __init__(self, tests: Sequence[str]):
        self.failed = dict.fromkeys(tests, False)
        self.ran: set[str] = set()
        self.broken = False  # a module could not be imported

    def pytest_collectreport(self, report) -> None:
        self.broken |= report.failed

    def pytest_runtest_logreport(self, report) -> None:
        for test in self.failed:
            if report.nodeid == test or report.nodeid.startswith((f"{test}[", f"{test}::")):
                self.ran |= {test} if not report.skipped else set()
                self.failed[test] |= report.failed


@contextmanager
def trees(count: int) -> Iterator[list[Path]]:
    with tempfile.TemporaryDirectory(prefix="litevae-mutants-") as folder:
        yield [copy_of_the_tree(Path(folder, str(n), "tree")) for n in range(count)]


def outcomes(faults: Sequence[Mutant], processes: int) -> Iterator[Outcome]:
    """Try each fault, `processes` of them at a time.

    Raises:
        Unusable: see there.
    """
    with trees(processes) as free:
        running: dict[int, tuple[Path, Path, Mutant, str, float]] = {}
        waiting = list(reversed(faults))
        try:
            while waiting or running:
                while waiting and free:
                    tree, fault = free.pop(), waiting.pop()
                    path = place(fault, tree)
                    before = path.read_text()
                    path.write_text(mutated(fault, path))
                    running[run_tests(tree, fault.tests, tree.with_name("log"))] = (
                        tree,
                        path,
                        fault,
                        before,
                        time.time(),
                    )
                ended, status = os.waitpid(-1, os.WNOHANG)
                if not ended:
                    time.sleep(0.05)
                    for child, (*_, begun) in running.items():
                        if time.time() - begun > SECONDS:
                            os.killpg(child, signal.SIGKILL)
                    continue
                tree, path, fault, before, begun = running.pop(ended)
                path.write_text(before)
                code, log = os.waitstatus_to_exitcode(status), tree.with_name("log")
                if code == 2:
                    raise Unusable(f"{fault}: its tests did not run:\n{log.read_text(errors='replace')[-3000:]}")
                passed = log.with_suffix(".passed").read_text().split("\n") if code == 1 else []
                yield Outcome(fault, passed, time.time() - begun, died=code < 0)
                free.append(tree)
        finally:
            for child in running:
                os.killpg(child, signal.SIGKILL)


def check_without_faults(faults: Sequence[Mutant]) -> None:
    """Check that all tests pass without a fault; otherwise their failures would prove nothing.

    Raises:
        Unusable: see there.
    """
    tests = sorted({test for fault in faults for test in fault.tests})
    with trees(1) as (tree,):
        log = tree.with_name("log")
        _, status = os.waitpid(run_tests(tree, tests, log), 0)
        if os.waitstatus_to_exitcode(status) != 1 or log.with_suffix(".passed").read_text().split("\n") != tests:
            lines = log.read_text(errors="replace").splitlines()
            raise Unusable("without any fault some of the tests do not pass:\n" + "\n".join(lines[-60:]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="", help="only faults with this in their file's or tests' names")
    parser.add_argument("--tenth", type=int, help="only the part of this number, 0 to 9")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    faults = [fault for fault in MUTANTS if any(arguments.name in text for text in (fault.file, *fault.tests))]
    if arguments.tenth is not None:
        faults = random.Random(0).sample(faults, len(faults))[arguments.tenth :: 10]
    os.environ.update(ENVIRONMENT)
    sys.dont_write_bytecode = True
    for name in IMPORTED_ONCE:
        importlib.import_module(name)

    begun, survived = time.time(), []
    try:
        check_without_faults(faults)
        for number, outcome in enumerate(outcomes(faults, arguments.processes), 1):
            word = "died" if outcome.died else "caught" if outcome.caught else "SURVIVED"
            print(f"{number}/{len(faults)}  {word}  {outcome.seconds:.0f} s  {outcome.fault}", flush=True)
            if not outcome.caught:
                survived.append(outcome)
    except Unusable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for outcome in survived:
        print(f"\n{outcome.fault} was not noticed by:\n  " + "\n  ".join(outcome.passed))
    print(f"\n{len(faults) - len(survived)} of {len(faults)} faults caught in {time.time() - begun:.0f} s")
    return int(bool(survived))


if __name__ == "__main__":
    raise SystemExit(main())
