"""Measure this machine: encoders, decoders, training steps, decoding of images, the encode job, the latent loader.

python jobs/benchmark.py                                             # everything: an hour on two cores
python jobs/benchmark.py parts=encoder models=sd-vae,B,runs/vae/model
"""

from pipelines.benchmark.config import Benchmark
from pipelines.runtime.cli import main


def run(config: Benchmark) -> None:
    from pipelines.benchmark.run import benchmark  # takes seconds; --help and typos do without

    benchmark(config)


if __name__ == "__main__":
    raise SystemExit(main(Benchmark, run))
