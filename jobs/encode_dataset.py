"""Encode images into a latent cache. The same command, run again, resumes where it stopped.

python jobs/encode_dataset.py source.uri=/data/photos model=runs/vae/model out=/data/latents transform.resolution=256
python jobs/encode_dataset.py verify /data/latents      # also: repair, retry, inspect
"""

from collections.abc import Sequence

from pipelines.encoding.config import Encode, Inspect, Repair, Retry, Verify
from pipelines.runtime import cli
from pipelines.runtime.cli import Action
from pipelines.runtime.schema import Section

CONFIG = Encode
SWITCHES = ("append=true",)
ACTIONS = {
    "verify": Action(Verify, switches=("source=contents",)),
    "repair": Action(Repair),
    "retry": Action(Retry),
    "inspect": Action(Inspect),
}


def look(config: Section) -> None:
    from pipelines.encoding import first_look

    first_look.check(config)


def run(config: Section) -> None:
    # Imported here because it takes seconds, which --help and errors in the command line do without.
    from pipelines.encoding import (
        encode,
        inspect,
        maintenance,
        verify,
    )

    does = {Encode: encode.run, Repair: maintenance.repair, Retry: maintenance.retry}
    sees = {Verify: verify.verify, Inspect: inspect.inspect}
    (does | sees)[type(config)](config)  # type: ignore[operator]


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(CONFIG, run, argv, actions=ACTIONS, switches=SWITCHES, look=look)


if __name__ == "__main__":
    raise SystemExit(main())
