"""How long a job will take, said before it begins, and a question where that is longer than anybody would wait."""

import sys
from collections.abc import Sequence

from litevae.errors import UserError
from pipelines.runtime.logs import say

LONG = 24 * 3600.0  # seconds after which a job without a GPU asks whether it should begin


def duration(seconds: float) -> str:
    """Return a time for people, in the two units that matter: "45 s", "3 min 20 s", "2 h 5 min", "108 days"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole < 600 else f"{round(whole / 60)} min"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{round(whole / 86400):,} days"


def announce(what: str, seconds: float, *, gpu: bool, yes: bool, hints: Sequence[str] = ()) -> None:
    """Say how long a job will take. If that is over a day and there is no GPU, ask on a terminal whether to begin.

    Where nobody can be asked, because the input is no terminal, a warning takes the place of the question.

    Args:
        what: what takes the time, such as "training on 1,600,000 images".
        seconds: the estimate, from steps that were measured on this machine.
        gpu: whether the job runs on GPUs.
        yes: whether the user has said beforehand that the job should begin (`yes=true`).
        hints: what would be faster, one phrase each.

    Raises:
        UserError: if the answer is not yes.
    """
    long = seconds > LONG and not gpu
    text = "; ".join([f"{what} will take about {duration(seconds)} on this machine", *hints])
    say(text, "WARNING" if long else "INFO", seconds=round(seconds))
    if not long or yes or not (sys.stdin and sys.stdin.isatty() and sys.stdout.isatty()):
        return
    try:
        answer = input("Begin nevertheless? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise UserError("not begun; yes=true begins without asking")
