"""Train a latent diffusion model on a latent cache, or on images that are encoded during training.

python jobs/train_ldm.py cache=/data/cache name=ldm
python jobs/train_ldm.py mode=online data.source.uri=/data/photos vae=runs/vae/model data.crop=random name=ldm
"""

from collections.abc import Sequence

from pipelines.runtime import cli
from pipelines.training.config import TrainLDM

CONFIG = TrainLDM


def look(config: TrainLDM) -> None:
    from pipelines.training import first_look

    first_look.train_ldm(config)


def run(config: TrainLDM) -> None:
    # Imported here because it takes seconds, which --help and errors in the command line do without.
    from pipelines.training.ldm import train_ldm

    train_ldm(config)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(CONFIG, run, argv, look=look)


if __name__ == "__main__":
    raise SystemExit(main())
