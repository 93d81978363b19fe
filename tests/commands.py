"""Run `python jobs/X.py ...` as a process or in the test's own process."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


@dataclass
class Result:
    code: int
    output: str  # stdout and stderr


def run(*words: str, **environment: str) -> Result:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=REPO,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return Result(done.returncode, done.stdout)


def run_in_this_process(script: str, *words: str) -> Result:
    """Do the same as `run` in this process, which saves the seconds that importing torch takes."""
    output = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        patch.setattr(sys, "argv", [script, *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(REPO / script), run_name="__main__")
    return Result(exit.value.code, output.getvalue())
