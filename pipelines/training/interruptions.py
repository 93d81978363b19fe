"""What ends a training early, as its workers hear of it: a request to stop, and notices that a node will be taken away.

The request is written by `pipelines.runtime.shutdown`. Ray listens for notices of spot machines only where
`PREEMPTION_NOTICES` of `pipelines.runtime.cluster` says so.
"""

import os
import time
from pathlib import Path
from typing import Any

import torch

from pipelines.runtime import shutdown
from pipelines.training.worker_setup import TrainSetup

LOOK_EVERY = 0.5  # seconds between checks for a request to stop


class StopRequest:
    """Check in a training worker whether the run was asked to stop.

    Every rank asks once per step, and all ranks get the same answer at the same step. Rank 0 looks for the file and
    broadcasts the result over gloo (on CPUs) while the step's own work goes on, so the answer comes one step late.
    """

    def __init__(self, folder: str, rank: int, world: int):
        self._file, self._rank = Path(folder, shutdown.FILE), rank
        self._looked, self._seen = 0.0, False
        self._group: Any = torch.distributed.new_group(backend="gloo") if world > 1 else None
        self._told = torch.zeros(1)
        self._telling: Any = None

    def heard(self) -> bool:
        """Return whether the run was asked to stop. All ranks must call this together, once per step."""
        if self._group is None:
            return self._look()
        told = False
        if self._telling is not None:
            self._telling.wait()
            told = bool(self._told)
        if self._rank == 0:
            self._told.fill_(self._look())
        self._telling = torch.distributed.broadcast(self._told, src=0, group=self._group, async_op=True)
        return told

    def _look(self) -> bool:
        """Look for the request's file, at most once every `LOOK_EVERY` seconds."""
        if not self._seen and time.monotonic() - self._looked >= LOOK_EVERY:
            self._looked, self._seen = time.monotonic(), os.path.exists(self._file)
        return self._seen


class PreemptionNotices:
    """Notices of Ray that nodes of this run will be taken away, from spot machines or from `ray drain-node`.

    Args:
        setup: what the driver gave to the worker. A run on one node is never asked to leave it.
    """

    def __init__(self, setup: TrainSetup):
        self._listening = setup.nodes > 1
        self._last: Any = None  # the notice that was found at the last check

    def new(self) -> bool:
        """Return whether there is a notice that differs from that at the last call.

        All ranks must call this together, and all get the same answer.
        """
        import ray.train

        found = ray.train.get_preemption_info() if self._listening else None
        different, self._last = found != self._last, found
        return different and found is not None
