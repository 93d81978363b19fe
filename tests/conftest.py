"""Environment of all tests; set before anything imports torch, Ray or MLflow."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    MLFLOW_DISABLE_TELEMETRY="true",
)
for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):  # the developer's own servers are not for tests
    os.environ.pop(name, None)
