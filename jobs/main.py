"""The command `litevae`: every job by its name, and completion for shells.

litevae                                              # the list of jobs
litevae train-vae data.train.uri=/data/photos        # the same as python jobs/train_vae.py data.train.uri=/data/photos
litevae completion bash                              # prints a script; also: zsh
"""

import sys
from collections.abc import Sequence
from importlib import import_module, metadata

from litevae.errors import UserError
from pipelines.runtime import cli, near_misses
from pipelines.runtime.commands import LITEVAE, SCRIPTS, from_console_script

OTHERS = {
    "completion SHELL": "print what completes this command's words in bash or zsh",
    "help JOB": "the same as JOB --help",
    "--version": "print the version",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Do the job that the first word names, and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"] and words[1:]:
        words = [words[1], "--help", *words[2:]]
    job, *rest = words or ["--help"]
    with from_console_script():
        if job.replace("_", "-") in SCRIPTS:
            # Only the job that is called is imported.
            return int(import_module(f"jobs.{SCRIPTS[job.replace('_', '-')].module}").main(rest))
        return cli.guarded(lambda: _own(job, rest))


def _own(job: str, rest: Sequence[str]) -> int:
    """Do what is no job, and return the exit code."""
    if job in ("--help", "-h", "help", "--help-all"):
        cli.show(_jobs())
    elif job == "--version":
        cli.show(f"{LITEVAE} {metadata.version('litevae')}")
    elif job == "completion":
        from jobs.completion import script  # it imports the configs of all jobs

        cli.show(script(rest[0] if rest else ""))
    else:
        names = [*SCRIPTS, "completion", "help", "--version"]
        close = near_misses.nearest(job.removesuffix(".py"), names)
        hint = f"; did you mean {LITEVAE} {close[0]}?" if close else f"; there are {', '.join(SCRIPTS)}"
        raise UserError(f"{LITEVAE} has no job {job!r}{hint}")
    return 0


def _jobs() -> str:
    """Return the list of jobs, a line each."""
    rows = {name: script.says for name, script in SCRIPTS.items()} | OTHERS
    wide = max(map(len, rows))
    return "\n".join(
        [
            "Train LiteVAE autoencoders and latent diffusion models, cache latents, sample and evaluate.",
            "",
            f"usage: {LITEVAE} JOB [FIELD=VALUE ...]        {LITEVAE} JOB --help says more of each",
            "",
            *(f"  {name:<{wide}}  {says}" for name, says in rows.items()),
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
