"""Spread work over a pool of Ray actors that each hold a model, and get the results in order."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from litevae.errors import UserError
from pipelines.runtime.cluster import Placement, outside_placement_groups

Item = TypeVar("Item")


def pool(cls: type, placement: Placement, *arguments: Any, **options: Any) -> list[Any]:
    """Create one actor of `cls` per worker, and wait until all are ready.

    An actor that dies is started again up to three times, and its calls are repeated up to three times.

    Args:
        cls: the class of the actors.
        placement: how many workers there are, and their resources.
        arguments: arguments of the constructor. They must be small: an actor can't be started again if its arguments
            were in the object store and are lost.
        options: further options for Ray, which take precedence over the ones set here.

    Raises:
        UserError: if an actor could not be made, e.g. because its node does not have the model folder.
    """
    import ray

    given = placement.ray_options() | {"max_restarts": 3, "max_task_retries": 3}
    if not placement.labels:
        given["scheduling_strategy"] = outside_placement_groups()
    actor = ray.remote(cls).options(**given | options)
    actors = [actor.remote(*arguments) for _ in range(placement.workers)]
    try:
        ray.get([actor.__ray_ready__.remote() for actor in actors])
    except ray.exceptions.RayActorError as error:
        if error.actor_init_failed and (found := re.search(r"litevae\.errors\.UserError: (.*)", str(error), re.S)):
            raise UserError(f"on a worker: {found[1].strip()}") from error
        raise
    return actors


def spread(actors: list[Any], call: Callable[[Any, Item], Any], items: Iterable[Item], ahead: int = 2) -> Iterator[Any]:
    """Yield the results of `call(actor, item)` in the order of `items`.

    Items are taken one by one as actors become free. Running items and results that wait for an earlier item are
    together at most four times the number of items that actors hold, so that memory stays bounded if one item takes
    long.

    Args:
        actors: the pool.
        call: starts the work and returns an object reference to its result.
        items: the work.
        ahead: number of items that wait or run at each actor.

    Raises:
        UserError: if an actor raised it.
    """
    import ray

    free = actors * ahead
    running: dict[Any, tuple[int, Any]] = {}
    finished: dict[int, Any] = {}
    upcoming, numbered, most = 0, enumerate(items), 4 * len(actors) * ahead
    while True:
        while free and len(running) + len(finished) < most and (next_item := next(numbered, None)) is not None:
            number, item = next_item
            actor = free.pop(0)
            running[call(actor, item)] = number, actor
        if not running:
            return
        (done,), _ = ray.wait(list(running))
        number, actor = running.pop(done)
        free.append(actor)
        try:
            finished[number] = ray.get(done)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        while upcoming in finished:
            yield finished.pop(upcoming)
            upcoming += 1
