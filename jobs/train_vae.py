"""Train a LiteVAE autoencoder.

python jobs/train_vae.py data.train.uri=/data/photos data.val.uri=/data/photos-val name=vae
"""

from pipelines.runtime.cli import main
from pipelines.training.config import TrainVAE


def run(config: TrainVAE) -> None:
    # Imported here because it takes seconds, which --help and errors in the command line do without.
    from pipelines.training.vae import train_vae

    train_vae(config)


if __name__ == "__main__":
    raise SystemExit(main(TrainVAE, run))
