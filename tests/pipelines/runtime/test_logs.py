"""A job's lines: as they are for people, and as objects where Ray's are."""

import json
from pathlib import Path

from pipelines.encoding.config import Encode
from pipelines.runtime.cli import main
from pipelines.runtime.logs import say


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
