"""Train a latent diffusion model on a latent cache.

python jobs/train_ldm.py cache=/data/cache name=ldm
"""

from pipelines.config import TrainLDM, main
from pipelines.train_ldm import train_ldm

if __name__ == "__main__":
    raise SystemExit(main(TrainLDM, train_ldm))
