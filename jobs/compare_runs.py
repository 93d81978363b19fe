"""Compare runs with a baseline and with the paper's numbers, and write tables, curves and pictures as one HTML page.

python jobs/compare_runs.py                                    # the newest sweep
python jobs/compare_runs.py sweep=table-9 out=table-9
python jobs/compare_runs.py runs='[vae-a*,vae-b*]' baseline=vae-a metrics='[eval/*,train/images_per_second]'
"""

from collections.abc import Sequence

from pipelines.experiments.config import Compare
from pipelines.runtime import cli

CONFIG = Compare


def look(config: Compare) -> None:
    from pipelines.experiments import first_look

    first_look.compare(config)


def run(config: Compare) -> None:
    # Imported here because it takes seconds, which --help and errors in the command line do without.
    from pipelines.experiments.compare import compare

    compare(config)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(CONFIG, run, argv, look=look)


if __name__ == "__main__":
    raise SystemExit(main())
