"""Tests of the estimate that is said before a long job, and of the question."""

import builtins

import pytest

from litevae.errors import UserError
from pipelines.runtime import estimate

DAY = 24 * 3600


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"), (45.4, "45 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (601, "10 min"), (1230, "20 min"),
        (7500, "2 h 5 min"), (47.5 * 3600, "47 h 30 min"), (108 * DAY, "108 days"), (9_322_500, "108 days"),
    ],
)  # fmt: skip
def test_a_duration_has_the_units_that_matter(seconds, text):
    assert estimate.duration(seconds) == text


@pytest.fixture
def terminal(monkeypatch):
    """A terminal whose user gives the answers of the list; a question without an answer is an end of input."""
    answers, asked = [], []

    def answer(question):
        asked.append(question)
        if not answers:
            raise EOFError
        return answers.pop()

    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True, raising=False)
    monkeypatch.setattr(builtins, "input", answer)
    return answers, asked


@pytest.mark.parametrize("answer", ["", "n", "no", "later", None])
def test_over_a_day_without_a_gpu_a_terminal_is_asked(terminal, answer):
    answers, asked = terminal
    answers.extend([] if answer is None else [answer])
    with pytest.raises(UserError, match="yes=true begins without asking"):
        estimate.announce("training", DAY + 1, gpu=False, yes=False)
    assert len(asked) == 1


@pytest.mark.parametrize("answer", ["y", "YES", " yes "])
def test_yes_begins(terminal, answer):
    terminal[0].append(answer)
    estimate.announce("training", DAY + 1, gpu=False, yes=False)


@pytest.mark.parametrize(
    ("seconds", "options"),
    [
        (DAY - 1, {"gpu": False, "yes": False}),
        (9 * DAY, {"gpu": True, "yes": False}),
        (9 * DAY, {"gpu": False, "yes": True}),
    ],
)
def test_nobody_is_asked_about_a_short_job_or_one_that_was_agreed_to(terminal, seconds, options):
    estimate.announce("training", seconds, **options)
    assert not terminal[1]


def test_without_a_terminal_nobody_is_asked_and_a_warning_is_said(terminal, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    hints = ["on one H200 about 2 days", "--config small takes 20 minutes"]
    estimate.announce("training on 10 images", 108 * DAY, gpu=False, yes=False, hints=hints)
    assert not terminal[1]
    assert capsys.readouterr().out == (
        "training on 10 images will take about 108 days on this machine; on one H200 about 2 days; "
        "--config small takes 20 minutes\n"
    )
