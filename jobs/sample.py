"""Sample images from a latent diffusion model.

python jobs/sample.py model=runs/ldm/model images=64 out=samples
"""

from pipelines.config import Sample, main
from pipelines.sample import sample

if __name__ == "__main__":
    raise SystemExit(main(Sample, sample))
