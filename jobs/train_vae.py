"""Train a LiteVAE autoencoder.

python jobs/train_vae.py data.train.uri=/data/photos data.val.uri=/data/photos-val name=vae
"""

from pipelines.config import TrainVAE, main
from pipelines.train_vae import train_vae

if __name__ == "__main__":
    raise SystemExit(main(TrainVAE, train_vae))
