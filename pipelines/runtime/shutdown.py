"""Leaving when asked: Ctrl-C, SIGTERM (`ray job stop`, a pod that is taken away), or a file in the run's folder.

A job that keeps its work as it goes (encode, sample, evaluate, sweep) just ends: what is done is done. A training run
leaves at its next step, with a checkpoint. A second signal ends that one at once, too.

The request reaches the workers, on other machines perhaps, as the file `stop` in the run's folder, which all nodes
share; making it by hand stops a run as well.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

from pipelines.runtime.logs import say

FILE = "stop"

Result = TypeVar("Result")


class Stopped(KeyboardInterrupt):
    """The job was asked to end. `code` is its exit code, as shells have it: 128 + the signal's number."""

    def __init__(self, code: int = 128 + signal.SIGINT, message: str = "") -> None:
        super().__init__(message or "stopped; run the same command again to go on")
        self.code = code


@contextmanager
def on_sigterm() -> Iterator[None]:
    """In the block, which is to be a job's main part, SIGTERM ends this process as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def kept() -> Iterator[None]:
    """Around the start of Ray, whose own handler would exit without a word, and with the run still open in MLflow."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if before is _end:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: FrameType | None) -> None:
    raise Stopped(128 + number)


def patiently(call: Callable[[], Result], folder: str) -> Result:
    """`call()`, in a thread. The first signal meanwhile asks the run in `folder` to stop, the second raises Stopped.

    In a thread, since Ray Train would take Ctrl-C for itself in the main one. Where this process is no job's own
    (a trial of a sweep), signals are not ours.
    """
    if signal.getsignal(signal.SIGTERM) is not _end:
        return call()
    found: list[Result] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            found.append(call())
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            raised.append(error)

    with _asking(Path(folder, FILE)):
        thread = threading.Thread(target=work, name="training", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(1)  # or signals would wait for the thread's end
    if raised:
        raise raised[0]
    return found[0]


@contextmanager
def _asking(file: Path) -> Iterator[None]:
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            _end(number, frame)
        asked.append(number)
        say("stopping: the run leaves at its next step, with a checkpoint; a second time: at once", "WARNING")
        file.write_text(str(128 + number))

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def withdraw(folder: str) -> int:
    """Forget a request, and return the exit code that it asks for."""
    file = Path(folder, FILE)
    text = file.read_text().strip() if file.exists() else ""
    file.unlink(missing_ok=True)
    return int(text) if text.isdigit() else Stopped().code
