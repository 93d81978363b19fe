"""Train a LiteVAE autoencoder.

python jobs/train_vae.py data.train.uri=/data/photos data.val.uri=/data/photos-val name=vae
"""

from collections.abc import Sequence

from pipelines.runtime import cli
from pipelines.training.config import TrainVAE

CONFIG = TrainVAE


def look(config: TrainVAE) -> None:
    from pipelines.training import first_look

    first_look.train_vae(config)


def run(config: TrainVAE) -> None:
    # Imported here because it takes seconds, which --help and errors in the command line do without.
    from pipelines.training.vae import train_vae

    train_vae(config)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(CONFIG, run, argv, look=look)


if __name__ == "__main__":
    raise SystemExit(main())
