"""Sample images from a latent diffusion model.

python jobs/sample.py model=runs/ldm/model images=64 out=samples
"""

from pipelines.config import Sample, main


def run(config: Sample) -> None:
    from pipelines.sample import sample  # takes seconds; --help and typos do without

    sample(config)


if __name__ == "__main__":
    raise SystemExit(main(Sample, run))
