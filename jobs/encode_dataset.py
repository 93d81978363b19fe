"""Encode images into a latent cache. The same command, run again, resumes where it stopped.

python jobs/encode_dataset.py source.uri=/data/photos model=runs/vae/model out=/data/latents transform.resolution=256
python jobs/encode_dataset.py verify /data/latents      # also: repair, retry, inspect
"""

import sys

from pipelines.encoding.config import Encode, Inspect, Repair, Retry, Verify
from pipelines.runtime.cli import main
from pipelines.runtime.schema import Section

ACTIONS: dict[str, type[Section]] = {"verify": Verify, "repair": Repair, "retry": Retry, "inspect": Inspect}


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


if __name__ == "__main__":
    action, *rest = sys.argv[1:] or [""]
    if action in ACTIONS:
        switches = ("source",) if action == "verify" else ()
        raise SystemExit(main(ACTIONS[action], run, rest, action, switches))
    raise SystemExit(main(Encode, run, switches=("append",)))
