"""Measure encoders, decoders, training steps, decoding of images, the encode job and the latent loader on this machine.

python jobs/benchmark.py                                             # everything: one hour on two cores
python jobs/benchmark.py parts=encoder models=sd-vae,B,runs/vae/model
"""

from pipelines.benchmark.config import Benchmark
from pipelines.runtime.cli import main


def run(config: Benchmark) -> None:
    # Imported here because it takes seconds, which --help and errors in the command line do without.
    from pipelines.benchmark.run import benchmark

    benchmark(config)


if __name__ == "__main__":
    raise SystemExit(main(Benchmark, run))
