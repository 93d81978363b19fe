"""Compare runs: a table against a baseline, the paper's numbers beside it, curves and pictures, as one HTML page.

python jobs/compare_runs.py                                    # the newest sweep
python jobs/compare_runs.py sweep=table-9 out=table-9
python jobs/compare_runs.py runs='[vae-a*,vae-b*]' baseline=vae-a metrics='[eval/*,train/images_per_second]'
"""

from pipelines.experiments.config import Compare
from pipelines.runtime.cli import main


def run(config: Compare) -> None:
    from pipelines.experiments.compare import compare  # takes seconds; --help and typos do without

    compare(config)


if __name__ == "__main__":
    raise SystemExit(main(Compare, run))
