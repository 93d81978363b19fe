"""Run jobs without Ray: their workers are objects in the test's own process.

This is for tests of what a job computes, which does not depend on the process that computes it. A real worker process
takes ten seconds to import its modules. Other tests use real workers: those of how work is spread, and one of each job
as a whole.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.data.decode import decode_shard
from pipelines.encoding import encode, maintenance
from pipelines.encoding.encoder import ShardEncoder
from pipelines.encoding.plan import CachePlan
from pipelines.evaluation import generated, image_batches, reconstruction, sample
from pipelines.runtime import cluster, mlflow_run, paths
from pipelines.runtime.schema import Ray
from pipelines.training import forecast, launch, loop


@contextmanager
def in_process() -> Iterator[None]:
    """Run encode with its repair and retry, sample and evaluate without Ray inside the block."""
    with pytest.MonkeyPatch.context() as patch:
        here = SimpleNamespace(**vars(cluster) | {"start": _placement})
        for module in (encode, maintenance, sample, reconstruction, generated):
            patch.setattr(module, "cluster", here)
        patch.setattr(paths, "check_folders", lambda written, read: None)
        patch.setattr(encode, "_pipeline", _Pipeline)
        for module in (sample, reconstruction, generated):
            patch.setattr(module, "pool", _pool)
        for module in (sample, reconstruction):
            patch.setattr(module, "spread", _spread)
        patch.setattr(image_batches, "process_batches", _over)
        yield


@contextmanager
def as_worker() -> Iterator[None]:
    """Run the training loop in this process inside the block, as the only worker of a new run.

    Ray Train's functions are replaced by stand-ins; the loop is the real one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.train.torch.prepare_model", lambda model: model)
        patch.setattr("ray.train.get_checkpoint", lambda: None)
        patch.setattr(loop, "_report", _keep)
        yield


@contextmanager
def up_to_the_workers(result: dict[str, Any]) -> Iterator[SimpleNamespace]:
    """Run a training job up to the call of Ray Train, which is replaced by one that returns `result`.

    Yields:
        What the job passed on: `checked` are the arguments of `paths.check_folders`, `forecast` those of
        `forecast.say_duration`, which measures nothing here, `started` those of `mlflow_run.start_run`, and `fitted`
        those of `launch.fit`.
    """
    noted = SimpleNamespace(started=None, fitted=None, checked=None, forecast=None)

    def fit(*given: Any) -> dict[str, Any]:
        noted.fitted = given
        return result

    def start_run(*given: Any, **more: Any) -> str:
        noted.started = given, more
        return "a handle"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "start", _placement)
        patch.setattr(paths, "check_folders", lambda *given: setattr(noted, "checked", given))
        patch.setattr(forecast, "say_duration", lambda *given: setattr(noted, "forecast", given))
        patch.setattr(mlflow_run, "start_run", start_run)
        patch.setattr(launch, "fit", fit)
        yield noted


def _keep(metrics: dict[str, Any], checkpoint: str, run: Path) -> None:
    shutil.move(checkpoint, run / f"checkpoint-{metrics['images']:012d}")


def _placement(config: Ray) -> cluster.Placement:
    return cluster.Placement(workers=config.workers, gpu=False, threads=1)


class _Pipeline:
    def __init__(self, plan: CachePlan, shards: Sequence[Any], out: str, placement: cluster.Placement):
        self.plan, self.shards, self.out, self.placement = plan, shards, out, placement

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        encoder = ShardEncoder(self.out, self.plan, False, self.placement.threads)
        for shard in self.shards:
            yield encoder(decode_shard({"shard": shard}, self.plan.views, self.plan.hashed))


class _Actor:
    def __init__(self, instance: Any):
        self._instance = instance

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self._instance, name))


def _pool(cls: type, placement: cluster.Placement, *arguments: Any) -> list[Any]:
    return [_Actor(cls(*arguments)) for _ in range(placement.workers)]


def _spread(actors: list[Any], call: Callable[[Any, Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    for number, item in enumerate(items):
        yield call(actors[number % len(actors)], item)


def _over(
    units: Sequence[int], call: Any, source: Any, transform: Any, batch_size: int, actors: list[Any], decoders: int
) -> Iterator[Any]:
    parts = image_batches.chunks(units, batch_size, transform.resolution, len(actors))
    return _spread(actors, lambda actor, part: call(actor, image_batches._read(source, transform, part), part), parts)
