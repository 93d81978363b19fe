"""Measure encoders, decoders, training steps, decoding of images, the encode job and the latent loader on this machine.

python jobs/benchmark.py                                             # everything: one hour on two cores
python jobs/benchmark.py parts=encoder models=sd-vae,B,runs/vae/model
"""

from collections.abc import Sequence

from pipelines.benchmark.config import Benchmark
from pipelines.runtime import cli

CONFIG = Benchmark


def look(config: Benchmark) -> None:
    from pipelines.benchmark import first_look

    first_look.benchmark(config)


def run(config: Benchmark) -> None:
    # Imported here because it takes seconds, which --help and errors in the command line do without.
    from pipelines.benchmark.run import benchmark

    benchmark(config)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.main(CONFIG, run, argv, look=look)


if __name__ == "__main__":
    raise SystemExit(main())
