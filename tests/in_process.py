"""Jobs whose workers are objects of the test's process: for what a job computes, which does not depend on who computes
it. A worker's process takes ten seconds to import what it needs; how work is spread is tested with real ones, and so is
each job as a whole."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.data.decode import decode_shard
from pipelines.encoding import encode
from pipelines.encoding.encoder import ShardEncoder
from pipelines.encoding.plan import CachePlan
from pipelines.evaluation import generated, image_batches, reconstruction, sample
from pipelines.runtime import cluster, mlflow_run, paths
from pipelines.runtime.schema import Ray
from pipelines.training import launch, loop


@contextmanager
def in_process() -> Iterator[None]:
    """For encode, sample and evaluate, which then do without Ray."""
    with pytest.MonkeyPatch.context() as patch:
        here = SimpleNamespace(**vars(cluster) | {"start": _placement})
        for module in (encode, sample, reconstruction, generated):
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
    """As in the one worker of a training, which begins anew: Ray Train's parts are stood in for, the loop is the real
    one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.train.torch.prepare_model", lambda model: model)
        patch.setattr("ray.train.get_checkpoint", lambda: None)
        patch.setattr(loop, "_report", _keep)
        yield


@contextmanager
def up_to_the_workers(result: dict[str, Any]) -> Iterator[SimpleNamespace]:
    """A training job up to Ray Train, which is said to have ended with `result`: with what folders are `checked`, how
    a run is `started`, and what the workers get, as `fitted`."""
    noted = SimpleNamespace(started=None, fitted=None, checked=None)

    def fit(*given: Any) -> dict[str, Any]:
        noted.fitted = given
        return result

    def start_run(*given: Any, **more: Any) -> str:
        noted.started = given, more
        return "a handle"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "start", _placement)
        patch.setattr(paths, "check_folders", lambda *given: setattr(noted, "checked", given))
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
            yield encoder(decode_shard({"shard": shard}, self.plan.views))


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
