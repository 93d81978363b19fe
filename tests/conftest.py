"""Environment of all tests; set before anything imports torch, Ray or MLflow."""

import os
import secrets

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    # as pipelines.cluster does before it imports Ray; here a test may have imported it already
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN=secrets.token_hex(32),
)
for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):  # the developer's own servers are not for tests
    os.environ.pop(name, None)
