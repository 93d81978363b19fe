"""Jobs whose workers are objects of the test's process: for what a job computes, which does not depend on who computes
it. A worker's process takes ten seconds to import what it needs; how work is spread is tested with real ones, and so is
each job as a whole."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines import cluster, encode, evaluate, judge, sample, training
from pipelines.config import Ray
from pipelines.decode import decode_shard, views_of


@contextmanager
def in_process() -> Iterator[None]:
    """For encode (then without Ray), sample and evaluate; reading tasks of the latter stay Ray's."""
    with pytest.MonkeyPatch.context() as patch:
        here = {"start": _share, "check_folders": lambda written, read: None}
        patch.setattr(encode, "cluster", SimpleNamespace(**vars(cluster) | here))
        patch.setattr(encode, "_pipeline", _Pipeline)
        for module in (sample, evaluate, judge):
            patch.setattr(module, "pool", _pool)
        yield


@contextmanager
def as_worker() -> Iterator[None]:
    """As in the one worker of a training, which begins anew: Ray Train's parts are stood in for, the loop is the real
    one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.train.torch.prepare_model", lambda model: model)
        patch.setattr("ray.train.get_checkpoint", lambda: None)
        patch.setattr(training, "_report", _keep)
        yield


def _keep(metrics: dict[str, Any], checkpoint: str, run: Path) -> None:
    shutil.move(checkpoint, run / f"checkpoint-{metrics['images']:012d}")


def _share(config: Ray) -> cluster.Share:
    return cluster.Share(workers=config.workers, gpu=False, threads=1)


class _Pipeline:
    def __init__(self, plan: dict[str, Any], shards: Sequence[Any], out: str, share: cluster.Share):
        self.plan, self.shards, self.out, self.share = plan, shards, out, share

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        encoder = encode.Encoder(self.out, self.plan, False, self.share.threads)
        for shard in self.shards:
            yield encoder(decode_shard({"shard": shard}, views_of(self.plan)))


class _Actor:
    def __init__(self, instance: Any):
        self._instance = instance

    def __getattr__(self, name: str) -> SimpleNamespace:
        import ray

        def remote(*arguments: Any) -> Any:
            given = [ray.get(each) if isinstance(each, ray.ObjectRef) else each for each in arguments]
            return ray.put(getattr(self._instance, name)(*given))

        return SimpleNamespace(remote=remote)


def _pool(cls: type, share: cluster.Share, *arguments: Any) -> list[Any]:
    return [_Actor(cls(*arguments)) for _ in range(share.workers)]
