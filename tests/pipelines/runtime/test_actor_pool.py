"""A pool of actors: order, how far ahead it goes, errors, and workers that die: without Ray where it does not matter
who works, and in the slow suite with Ray's."""

import os
import random
import signal
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from litevae.errors import UserError
from pipelines.runtime import cluster, paths
from pipelines.runtime.actor_pool import pool, spread
from pipelines.runtime.schema import Ray


class Calls:
    """Stands for what of Ray waits for results: `order` names the one of those under way that is ready next."""

    def __init__(self, order):
        self.order, self.results, self.busy, self.most = order, {}, [], 0

    def __call__(self, actor, number):
        reference = object()
        self.results[reference] = actor, number
        self.busy.append(actor)
        self.most = max(self.most, self.busy.count(actor))
        return reference

    def wait(self, references):
        chosen = self.order(references)
        return [chosen], [each for each in references if each is not chosen]

    def get(self, reference):
        actor, number = self.results.pop(reference)
        self.busy.remove(actor)
        if isinstance(number, Exception):
            raise number
        return number**2


@pytest.fixture
def calls(monkeypatch):
    def make(order):
        calls = Calls(order)
        monkeypatch.setattr("ray.wait", calls.wait)
        monkeypatch.setattr("ray.get", calls.get)
        return calls

    return make


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize(
    ("order", "bound"), [(lambda ready: ready[0], 1), (lambda ready: ready[-1], 4), (random.Random(5).choice, 4)]
)
def test_results_come_in_order_whoever_is_ready_first(calls, order, bound, ahead):
    calls, actors, taken, seen = calls(order), ["a", "b", "c"], [], []

    def items():
        for number in range(60):
            taken.append(number)
            yield number

    for result in spread(actors, calls, items(), ahead=ahead):
        seen.append(result)
        assert len(taken) < len(seen) + bound * len(actors) * ahead  # what has just been given is not under way
    assert seen == [number**2 for number in range(60)]
    assert calls.most == ahead
    assert list(spread(actors, calls, [])) == []


def test_actors_that_are_free_get_the_next_item(calls):
    given = []

    def order(ready):
        return next((each for each in ready if made.results[each][0] == "quick"), ready[0])

    made = calls(order)

    def call(actor, number):
        given.append(actor)
        return made(actor, number)

    assert list(spread(["slow", "quick"], call, range(8), ahead=1)) == [number**2 for number in range(8)]
    assert given == ["slow", *["quick"] * 7]


@pytest.mark.parametrize("cause", [UserError("four is too many"), ValueError("another's")])
def test_what_an_actor_raises_comes_back(calls, cause):
    import ray

    error = ray.exceptions.RayTaskError("call", "Traceback", cause)
    found = spread(["a"], calls(lambda ready: ready[0]), [1, 2, error, 3])
    assert [next(found), next(found)] == [1, 4]
    with pytest.raises(UserError if isinstance(cause, UserError) else ray.exceptions.RayTaskError) as raised:
        next(found)
    assert raised.value is (cause if isinstance(cause, UserError) else error)


@pytest.mark.parametrize("began", [True, False])
def test_an_actor_that_can_not_be_made_says_why(monkeypatch, began):
    import ray

    class Died(ray.exceptions.RayActorError):
        actor_init_failed = not began

        def __str__(self):
            return "The actor died\n  in __init__\nlitevae.errors.UserError: no such model\nlook elsewhere\n"

    def get(_):
        raise Died

    made = SimpleNamespace(remote=lambda *arguments: SimpleNamespace(__ray_ready__=SimpleNamespace(remote=str)))
    monkeypatch.setattr("ray.remote", lambda cls: SimpleNamespace(options=lambda **options: made))
    monkeypatch.setattr("ray.get", get)
    with pytest.raises(Died if began else UserError) as raised:
        pool(object, cluster.Placement(workers=2, gpu=False, threads=1))
    if not began:
        assert str(raised.value) == "on a worker: no such model\nlook elsewhere"


# --- with Ray's workers


@pytest.fixture(scope="module")
def placement():
    return cluster.start(Ray(workers=2))


@pytest.mark.slow
def test_a_node_that_leaves_while_folders_are_looked_for_does_not_matter(placement, tmp_path, monkeypatch):
    import ray

    nodes = ray.nodes()
    gone = {"NodeID": "a" * 56, "NodeName": "gone", "Alive": True, "Resources": {"CPU": 1.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, gone])
    paths.check_folders({"root": str(tmp_path / "runs")}, {"source.uri": str(tmp_path)})
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.slow
def test_spot_notices_are_awaited_on_a_cluster_that_is_joined_also_after_one_of_our_own(placement, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # as it was left
    monkeypatch.setenv("RAY_ADDRESS", "joined before")
    cluster.start(Ray())
    assert os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "1"
    monkeypatch.delenv("RAY_ADDRESS")
    cluster.start(Ray())
    assert os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "0"


@pytest.fixture(scope="module")
def worker():
    """A local class: Ray ships it by value, as workers can't import tests."""

    class Worker:
        def __init__(self, fit: bool):
            if not fit:
                raise UserError("no such model\nlook elsewhere")

        def square(self, number: int, folder: str) -> int:
            """3 is finished when a later one is."""
            end = time.monotonic() + 240
            while number == 3 and not any(int(name) > 3 for name in os.listdir(folder)):
                assert time.monotonic() < end, "nothing goes on beside one that takes its time"
                time.sleep(0.01)
            open(os.path.join(folder, str(number)), "w").close()
            return number**2

        def hold(self, number: int, folder: str) -> int:
            """3 is finished when 18 is."""
            end = time.monotonic() + 240
            while number == 3 and not os.path.exists(os.path.join(folder, "18")):
                assert time.monotonic() < end, "others do not go on far enough"
                time.sleep(0.01)
            open(os.path.join(folder, str(number)), "w").close()
            return number

        def die_once(self, number: int, folder: str) -> int:
            marker = os.path.join(folder, f"died-{number}")
            if number in (2, 5) and not os.path.exists(marker):
                open(marker, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            return number

        def fail(self, number: int) -> int:
            if number == 4:
                raise UserError("four is too many")
            return number

    return Worker


@pytest.fixture(scope="module")
def actors(placement, worker):
    return pool(worker, placement, True)


@pytest.mark.slow
def test_results_come_in_order_and_items_are_taken_as_needed(actors, tmp_path):
    taken, seen, none = [], [], tmp_path / "none"
    none.mkdir()
    (tmp_path / "9").touch()  # one worker alone does 3 before 4

    def square(actor, number, folder=tmp_path):
        return actor.square.remote(number, str(folder))

    def items(count):
        for number in range(count):
            taken.append(number)
            yield number

    for result in spread(actors[:1], square, items(12), ahead=1):
        seen.append(result)
        assert len(taken) == len(seen)  # one at a time: the next is taken only once this one's result was
    assert seen == [n**2 for n in range(12)]
    assert list(spread(actors, partial(square, folder=none), range(12))) == seen
    assert list(spread(actors, square, [])) == []


@pytest.mark.slow
def test_how_far_others_go_ahead_of_a_slow_one_is_bounded(actors, tmp_path):
    """Item 3 ends when 18 has: two actors with two items each may have 16, that one among them, waiting or running."""
    taken, seen = [], []

    def hold(actor, number):
        return actor.hold.remote(number, str(tmp_path))

    def items():
        for number in range(40):
            taken.append(number)
            yield number

    for result in spread(actors, hold, items(), ahead=2):
        seen.append(result)
        assert len(taken) < 16 + len(seen)  # the one that has just been given is not counted
    assert seen == list(range(40))


@pytest.mark.slow
def test_a_users_mistake_comes_back_as_one(actors, placement, worker):
    with pytest.raises(UserError) as error:
        list(spread(actors, lambda actor, n: actor.fail.remote(n), range(8)))
    assert str(error.value) == "four is too many"
    with pytest.raises(UserError) as error:
        pool(worker, replace(placement, workers=1), False)
    assert str(error.value) == "on a worker: no such model\nlook elsewhere"


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_work_done_again(actors, tmp_path):
    folder = str(tmp_path)
    assert list(spread(actors, lambda actor, n: actor.die_once.remote(n, folder), range(8))) == list(range(8))
    assert sorted(os.listdir(folder)) == ["died-2", "died-5"]
