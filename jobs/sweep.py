"""Train and evaluate many configs on Ray Tune: a table of the paper, or any fields of train_vae.

python jobs/sweep.py table=9 scale=small data.train.uri=/data/photos data.val.uri=/data/photos-val seeds=[0,1,2]
python jobs/sweep.py name=weights data.train.uri=... data.val.uri=... space.loss.wavelet.weight=[0,0.1,1]
"""

from pipelines.experiments.config import Sweep
from pipelines.runtime.cli import main


def run(config: Sweep) -> None:
    from pipelines.experiments.sweep import sweep  # takes seconds; --help and typos do without

    sweep(config)


if __name__ == "__main__":
    raise SystemExit(main(Sweep, run))
