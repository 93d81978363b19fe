"""A job's lines: as they are for people, and as objects where Ray's are."""

import json
import os
from pathlib import Path

import pytest

from pipelines.encoding.config import Encode, Verify
from pipelines.evaluation.config import EvaluateLatents
from pipelines.runtime.cli import main
from pipelines.runtime.logs import say, without_stderr_lines
from pipelines.training.config import TrainVAE


def test_people_read_the_text(capsys):
    say("two", images=2)
    say("three", "ERROR")
    assert tuple(capsys.readouterr()) == ("two\n", "three\n")


def test_an_object_has_its_fields_beside_rays_own(capsys, monkeypatch):
    monkeypatch.setenv("RAY_LOGGING_CONFIG_ENCODING", "JSON")
    say("\nwhat\nhappened", "WARNING", loss=float("nan"), shape=(2, 3), where=Path("here"))
    found = json.loads(capsys.readouterr().out)
    when = found.pop("asctime")
    assert when[4:5] + when[10:11] + when[19:20] == "- ,"
    assert found == {
        "levelname": "WARNING", "message": "what\nhappened", "loss": "nan", "shape": [2, 3], "where": "here",
    }  # fmt: skip


def test_a_mistake_is_one_too(capsys, monkeypatch):
    monkeypatch.setenv("RAY_LOGGING_CONFIG_ENCODING", "json")
    assert main(Encode, print, ["nonsense=1"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    error = json.loads(shown.err)
    assert error["levelname"] == "ERROR"
    assert error["message"].startswith("error: ")


@pytest.mark.parametrize(
    ("job", "words", "line"),
    [
        (TrainVAE, ["name=faces"], "train_vae faces: loading PyTorch and Ray, about 10 s"),
        (Encode, [], "encode_dataset: loading PyTorch and Ray, about 10 s"),
        (EvaluateLatents, [], "evaluate: loading what it needs, a few seconds"),
        (Verify, [], "encode_dataset: loading what it needs, a few seconds"),
    ],
    ids=["training", "encoding", "evaluation", "verify"],
)
def test_the_first_line_comes_before_the_job(capsys, job, words, line):
    assert main(job, lambda config: print("the job"), words) == 0
    assert capsys.readouterr().out.splitlines() == [line, "the job"]


@pytest.mark.parametrize("option", ["--help", "--print-config"])
def test_what_is_asked_for_has_no_line_before_it(capsys, option):
    assert main(TrainVAE, print, [option]) == 0
    assert "loading" not in capsys.readouterr().out


def test_the_first_line_is_an_object_for_collectors(capsys, monkeypatch):
    monkeypatch.setenv("RAY_LOGGING_CONFIG_ENCODING", "JSON")
    assert main(TrainVAE, lambda config: None, []) == 0
    assert json.loads(capsys.readouterr().out)["message"] == "train_vae vae: loading PyTorch and Ray, about 10 s"


def test_lines_of_native_code_are_dropped_by_their_text(capfd):
    with without_stderr_lines("of no use"):
        os.write(2, b"first\na line of no use\n")
        os.write(2, b"of no use either\nlast, unfinished")
    os.write(2, b"\nof no use, but after it\n")
    assert capfd.readouterr().err == "first\nlast, unfinished\nof no use, but after it\n"


def test_stderr_is_as_it_was_after_an_error(capfd):
    with pytest.raises(KeyboardInterrupt), without_stderr_lines("of no use"):
        raise KeyboardInterrupt
    os.write(2, b"of no use\n")
    assert capfd.readouterr().err == "of no use\n"
