"""The jobs by name, and how a message names the command of one: as the user called the job that says it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Script:
    """A job of the command `litevae`.

    Attributes:
        module: the module in jobs/ whose `main` does it, and the file of `python jobs/<module>.py`.
        says: what it does, in one line.
    """

    module: str
    says: str


SCRIPTS = {
    "train-vae": Script("train_vae", "train a LiteVAE autoencoder"),
    "encode-dataset": Script("encode_dataset", "encode images into a latent cache; verify, repair or inspect one"),
    "train-ldm": Script("train_ldm", "train a latent diffusion model on a cache or on images"),
    "sample": Script("sample", "sample images from a latent diffusion model"),
    "evaluate": Script("evaluate", "measure reconstructions, generated images, latents or cost"),
    "sweep": Script("sweep", "train and evaluate many autoencoders: a table of the paper, or any fields"),
    "compare-runs": Script("compare_runs", "compare runs with each other and with the paper, as one HTML page"),
    "benchmark": Script("benchmark", "measure how fast this machine encodes, decodes, trains and loads"),
    "doctor": Script("doctor", "check this machine or a Ray cluster before a long run"),
    "weights": Script("fetch_weights", "fetch the published weights that LPIPS and FID are computed with"),
    "demo": Script("demo", "run the whole pipeline on a few photos in minutes"),
}
LITEVAE = "litevae"  # the console script
_console = False


@contextmanager
def from_console_script() -> Iterator[None]:
    """Make messages inside the block name commands as `litevae JOB`."""
    global _console
    before, _console = _console, True
    try:
        yield
    finally:
        _console = before


def command(module: str) -> str:
    """Return the command of a job as a user types it: `litevae train-vae`, or `python jobs/train_vae.py`.

    Args:
        module: the job's module in jobs/.
    """
    if _console:
        return f"{LITEVAE} {next((name for name, job in SCRIPTS.items() if job.module == module), module)}"
    called = Path(sys.argv[0])
    if called.parent.name != "jobs" or called.suffix != ".py":  # another program, which calls a job's `main`
        return f"python jobs/{module}.py"
    folder = called.parent
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    return f"python {folder / module}.py"
