"""Doctor's check of MLflow: whether a run can be created, written to and read."""

import secrets
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

from litevae.errors import UserError, redact
from pipelines.diagnostics.probe import DRIVER, Ask, Finding, answered
from pipelines.runtime import mlflow_run, mlflow_server
from pipelines.runtime.schema import Tracked


def mlflow(ask: Ask, config: Tracked) -> Iterator[Finding]:
    """Create a run in the experiment litevae-doctor, let every node log to it, read it, and delete it."""
    if not config.tracking.enabled:
        yield Finding(DRIVER, "skipped", "tracking.enabled=false")
        return
    uri = mlflow_run.tracking_uri(config.tracking, config.root)
    mlflow_run.check(config)
    begun = time.monotonic()

    def asked(what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - MLflow can raise anything
            reason = textwrap.shorten(redact(mlflow_server.cause_of(error)), 200)
            advice = "is the server up, and may this user write there? tracking.uri=..., or tracking.enabled=false"
            raise UserError(f"{redact(uri)}: {what} fails ({reason.replace('; ', ', ')}); {advice}") from None

    def open_run() -> tuple[Any, str]:
        mlflow_run.make_folder(uri)
        client = mlflow_server.client_of(uri)
        handle = mlflow_server.RunHandle(uri, None, "litevae-doctor", config.root)
        experiment = mlflow_server.experiment_of(client, handle, config.root)
        return client, client.create_run(experiment, run_name="doctor").info.run_id

    client, run_id = asked("making a run", open_run)
    try:
        nodes, lost = answered(ask(_log, uri, run_id), "each node has to reach it: rank 0 may be there")
        yield from lost
        arrived = asked("reading it", client.get_run, run_id).data.metrics
        for node, key in nodes.items():
            if key not in arrived:
                advice = "SQLite needs a folder that all nodes share; or start a server, tracking.uri=http://..."
                yield Finding(node, "failed", f"{redact(uri)}: metrics logged by this node do not arrive", advice)
        asked("keeping a file", client.log_text, run_id, "written by the doctor", "doctor.txt")
    finally:
        asked("deleting it", client.delete_run, run_id)
    text = f"{redact(uri)}: a run was made, logged to, read and deleted in {time.monotonic() - begun:.1f} s"
    yield Finding(DRIVER, "ok", text)


def _log(uri: str, run_id: str) -> str:
    """Log a metric from a node and return the metric's name."""
    key = f"doctor-{secrets.token_hex(8)}"
    try:
        mlflow_server.client_of(uri).log_metric(run_id, key, 1.0)
    except Exception as error:  # noqa: BLE001 - MLflow can raise anything
        raise UserError(
            f"{redact(uri)}: logging fails ({textwrap.shorten(redact(mlflow_server.cause_of(error)), 200)})"
        ) from None
    return key
