"""Studies behind this project's design, as docs/performance.md and docs/scale.md report them.

python -m tests.benchmarks                                             # decoding, train_ldm's modes, OpenMP's threads
python -m tests.benchmarks parts=scale source=PHOTOS scale_rows=100000000
"""

import sys

from litevae.errors import UserError
from pipelines.benchmark.run import benchmark
from pipelines.runtime.cli import load
from tests.benchmarks.config import Study

PARTS = {  # where each part is measured
    "images": "tests.benchmarks.images:images",
    "modes": "tests.benchmarks.modes:modes",
    "threads": "tests.benchmarks.threads:threads",
    "scale": "tests.benchmarks.scale:scale",
}

if __name__ == "__main__":
    try:
        benchmark(load(Study, None, sys.argv[1:]), PARTS)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
