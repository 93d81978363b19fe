"""Measure an autoencoder's reconstructions.

python jobs/evaluate.py model=runs/vae/model source.uri=/data/photos transform.resolution=256
"""

from pipelines.config import Evaluate, main


def run(config: Evaluate) -> None:
    from pipelines.evaluate import evaluate  # takes seconds; --help and typos do without

    evaluate(config)


if __name__ == "__main__":
    raise SystemExit(main(Evaluate, run))
