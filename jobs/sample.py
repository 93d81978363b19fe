"""Sample images from a latent diffusion model.

python jobs/sample.py model=runs/ldm/model images=64 out=samples
python jobs/sample.py model=runs/ldm/model images=50000 classes=[207,360] guidance=4 format=parquet out=s3://bucket/samples
"""

from pipelines.evaluation.config import Sample
from pipelines.runtime.cli import main


def run(config: Sample) -> None:
    # Imported here because it takes seconds, which --help and errors in the command line do without.
    from pipelines.evaluation.sample import sample

    sample(config)


if __name__ == "__main__":
    raise SystemExit(main(Sample, run))
