"""Stop a job on request: by Ctrl-C, SIGTERM (`ray job stop`, a pod that is evicted), or a file in the run folder.

A job that saves its work continuously (encode, sample, evaluate, sweep) ends at once, because nothing is lost. A
training run ends at its next step with a checkpoint, and at a second signal it also ends at once.

The request reaches the workers, which may be on other machines, as the file `stop` in the run folder, which all nodes
share. Creating this file by hand stops a run too.
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
    """Raised when a job is asked to end.

    Args:
        code: the exit code, as in shells: 128 + the number of the signal.
        message: what the user reads; empty: `text` chooses it.
    """

    def __init__(self, code: int = 128 + signal.SIGINT, message: str = "") -> None:
        super().__init__(message)
        self.code, self._message = code, message

    def text(self, continues: bool) -> str:
        """Return what the user reads.

        Args:
            continues: whether the same command goes on where this job was. Jobs that measure begin anew.
        """
        default = (
            "stopped; run the same command again to continue" if continues else "stopped; the same command begins anew"
        )
        return self._message or default


@contextmanager
def on_sigterm() -> Iterator[None]:
    """Make SIGTERM raise Stopped, a KeyboardInterrupt, inside the block, which is to be the main part of a job."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def keep_sigterm_handler() -> Iterator[None]:
    """Keep the SIGTERM handler of `on_sigterm` over the start of Ray.

    Ray installs its own handler, which would exit without a message and leave the run open in MLflow.
    """
    before = signal.getsignal(signal.SIGTERM)
    yield
    if before is _end:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: FrameType | None) -> None:
    """Handle a signal by raising Stopped."""
    raise Stopped(128 + number)


def call_stoppable(call: Callable[[], Result], folder: str) -> Result:
    """Return the result of `call()`. A first signal asks the run in `folder` to stop; a second one raises Stopped.

    `call` runs in a thread, because in the main thread Ray Train would handle Ctrl-C itself. If this process does not
    belong to one job only (a trial of a sweep), signals are not handled here.
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

    with _stop_on_signal(Path(folder, FILE)):
        thread = threading.Thread(target=work, name="training", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(1)  # with a timeout, otherwise signals would wait for the end of the thread
    if raised:
        raise raised[0]
    return found[0]


@contextmanager
def _stop_on_signal(file: Path) -> Iterator[None]:
    """Make the first signal inside the block write `file`, and the second raise Stopped."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            _end(number, frame)
        asked.append(number)
        say(
            "stopping: the run writes a checkpoint and ends after this step; a second signal ends it at once", "WARNING"
        )
        file.write_text(str(128 + number))

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def clear_stop_request(folder: str) -> int:
    """Delete the request to stop the run in `folder`, and return the exit code that it asks for."""
    file = Path(folder, FILE)
    text = file.read_text().strip() if file.exists() else ""
    file.unlink(missing_ok=True)
    return int(text) if text.isdigit() else Stopped().code
