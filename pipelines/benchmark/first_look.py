"""What can be known about a benchmark without PyTorch and Ray, so that mistakes are answered at once."""

import os
from datetime import datetime

from litevae.errors import UserError
from pipelines.benchmark.config import Benchmark
from pipelines.data.first_look import check_model
from pipelines.runtime import mlflow_run
from pipelines.runtime.outputs import Output, check_output

RESULT = "benchmark.json"


def benchmark(config: Benchmark) -> Output:
    """Check what is known at once about a benchmark, and return where the report will be.

    Raises:
        UserError: if photos or a model are not there, or the output folder can't be written or holds another benchmark.
    """
    if config.source and not os.path.isdir(config.source):
        raise UserError(f"source={config.source} does not exist; give a folder of JPEGs, or leave it out")
    if config.model:
        check_model("model", config.model)
    mlflow_run.check_place(config)
    return check_output(config, os.path.join(config.root, "benchmarks", f"{datetime.now():%Y-%m-%d-%H%M%S}"), RESULT)
