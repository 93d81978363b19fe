"""Work spread over a pool of Ray actors, each with a model, and the results in order."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from litevae.errors import UserError
from pipelines.runtime.cluster import Placement, anywhere

Item = TypeVar("Item")


def pool(cls: type, placement: Placement, *arguments: Any, **options: Any) -> list[Any]:
    """An actor of `cls` per worker, ready. One that dies is started and its work done again, up to three times.

    `arguments` are small: an actor can't be started again when those are in the object store and lost. `options` are
    Ray's, beside or instead of those here.

    Raises:
        UserError: an actor could not be made, e.g. because its node does not have the model's folder.
    """
    import ray

    given = placement.ray_options() | {"max_restarts": 3, "max_task_retries": 3}
    if not placement.labels:
        given["scheduling_strategy"] = anywhere()
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
    """Results of `call(actor, item)`, an object reference, in the order of `items`.

    Items are taken one by one as actors become free, with `ahead` of them waiting or running per actor. No more than
    four times as many are under way or have a result that waits for an earlier one, so that memory stays bounded where
    one item takes long.

    Raises:
        UserError: as an actor raised it.
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
