"""Fetch the published weights that LPIPS and FID are computed with (`make weights`).

python jobs/fetch_weights.py
"""

from collections.abc import Sequence

from pipelines.diagnostics.config import Weights
from pipelines.runtime import cli

CONFIG = Weights


def run(config: Weights) -> None:
    # Imported here because it takes seconds, which --help and errors in the command line do without.
    from pipelines.diagnostics.weights import fetch

    fetch(config)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(CONFIG, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
