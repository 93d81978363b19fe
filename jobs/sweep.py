"""Train and evaluate many configs on Ray Tune: a table of the paper, or any fields of train_vae.

python jobs/sweep.py table=9 scale=small data.train.uri=/data/photos data.val.uri=/data/photos-val seeds=[0,1,2]
python jobs/sweep.py name=weights data.train.uri=... data.val.uri=... space.loss.wavelet.weight=[0,0.1,1]
"""

from collections.abc import Sequence

from pipelines.experiments.config import Sweep
from pipelines.runtime import cli

CONFIG = Sweep


def look(config: Sweep) -> None:
    from pipelines.experiments import first_look

    first_look.sweep(config)


def run(config: Sweep) -> None:
    # Imported here because it takes seconds, which --help and errors in the command line do without.
    from pipelines.experiments.sweep import sweep

    sweep(config)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(CONFIG, run, argv, look=look)


if __name__ == "__main__":
    raise SystemExit(main())
