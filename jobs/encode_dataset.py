"""Encode images into a latent cache; the same command again goes on where it stopped.

python jobs/encode_dataset.py source.uri=/data/photos model=runs/vae/model out=/data/latents transform.resolution=256
"""

from pipelines.config import Encode, main


def run(config: Encode) -> None:
    from pipelines.encode import run as encode  # takes seconds; --help and typos do without

    encode(config)


if __name__ == "__main__":
    raise SystemExit(main(Encode, run))
