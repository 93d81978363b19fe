"""Sample images from a latent diffusion model.

python jobs/sample.py model=runs/ldm/model images=64 out=samples
python jobs/sample.py model=runs/ldm/model images=50000 classes=[207,360] guidance=4 format=parquet out=s3://bucket/samples
"""

from collections.abc import Sequence

from pipelines.evaluation.config import Sample
from pipelines.runtime import cli

CONFIG = Sample


def look(config: Sample) -> None:
    from pipelines.evaluation import first_look

    first_look.sample(config)


def run(config: Sample) -> None:
    # Imported here because it takes seconds, which --help and errors in the command line do without.
    from pipelines.evaluation.sample import sample

    sample(config)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(CONFIG, run, argv, look=look)


if __name__ == "__main__":
    raise SystemExit(main())
