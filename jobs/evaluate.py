"""Measure an autoencoder's reconstructions.

python jobs/evaluate.py model=runs/vae/model source.uri=/data/photos transform.resolution=256
"""

from pipelines.config import Evaluate, main
from pipelines.evaluate import evaluate

if __name__ == "__main__":
    raise SystemExit(main(Evaluate, evaluate))
