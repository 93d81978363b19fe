"""Train a latent diffusion model on a latent cache.

python jobs/train_ldm.py cache=/data/cache name=ldm
"""

from pipelines.config import TrainLDM, main


def run(config: TrainLDM) -> None:
    from pipelines.train_ldm import train_ldm  # takes seconds; --help and typos do without

    train_ldm(config)


if __name__ == "__main__":
    raise SystemExit(main(TrainLDM, run))
