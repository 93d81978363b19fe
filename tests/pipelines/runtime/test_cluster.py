"""How much of a cluster a job takes, how one is joined or started, what nodes have to see, and signals. Without Ray."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from litevae.errors import UserError
from pipelines.diagnostics.config import Doctor
from pipelines.encoding.config import Encode, Inspect, Retry
from pipelines.evaluation.config import Evaluate, EvaluateLatents
from pipelines.experiments.config import Sweep
from pipelines.runtime import actor_pool, cluster, shutdown
from pipelines.runtime.cli import main
from pipelines.runtime.paths import check_folders, output_path
from pipelines.runtime.schema import Ray


def node(cpus, gpus=0, alive=True, **labels):
    resources = {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})
    labels = {"ray.io/node-id": "abc"} | labels
    return {"Alive": alive, "Resources": resources, "Labels": labels, "NodeID": f"id {cpus}", "NodeName": f"of {cpus}"}


@pytest.fixture
def nodes(monkeypatch):
    """Sets the cluster's nodes; this machine has 8 CPUs."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    return lambda *found: monkeypatch.setattr(ray, "nodes", lambda: [*found])


# --- what a job takes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "jobs", "found", "expected"),
    [
        # workers, gpu, threads, gpus, decoders, jobs, min_workers
        ({}, 1, [node(4)], (1, False, 8, 1.0, 1, 1, 0)),
        ({"workers": 2}, 1, [node(4), node(60), node(900, alive=False)], (2, False, 4, 1.0, 8, 1, 0)),
        ({"workers": 3}, 1, [node(5)], (3, False, 2, 1.0, 1, 1, 0)),
        ({"workers": 2, "cpus_per_worker": 3, "decode_tasks": 5}, 2, [node(6)], (2, False, 3, 1.0, 5, 2, 0)),
        ({"workers": 3}, 4, [node(14)], (3, False, 1, 1.0, 2, 4, 0)),
        ({"workers": 2}, 1, [node(12, 2)], (2, True, 4, 1.0, 8, 1, 0)),
        ({"workers": 2}, 1, [node(4, 2)], (2, True, 4, 1.0, 1, 1, 0)),  # one for data at least
        ({"workers": 2, "gpu": False}, 1, [node(12, 2)], (2, False, 4, 1.0, 2, 1, 0)),
        ({"workers": 4, "gpus_per_worker": 0.5}, 1, [node(12, 2)], (4, True, 2, 0.5, 6, 1, 0)),
        ({}, 0, [node(12, 4)], (1, True, 2, 1.0, 6, 4, 0)),  # as many jobs as GPUs hold ...
        ({}, 0, [node(5, 4)], (1, True, 2, 1.0, 1, 3, 0)),  # ... or CPUs
        ({"workers": 2}, 0, [node(12, 4)], (2, True, 2, 1.0, 6, 2, 0)),
        ({"workers": 2}, 0, [node(12, 3)], (2, True, 4, 1.0, 8, 1, 0)),
        ({}, 0, [node(12)], (1, False, 8, 1.0, 2, 1, 0)),
        ({"workers": 4, "min_workers": 2}, 1, [node(4, 2)], (4, True, 2, 1.0, 1, 1, 2)),  # what it begins with
    ],
)
def test_what_a_job_takes(nodes, config, jobs, found, expected):
    nodes(*found)
    placement = cluster._placement(Ray(**config), jobs)
    assert (
        placement.workers,
        placement.gpu,
        placement.threads,
        placement.gpus,
        placement.decoders,
        placement.jobs,
        placement.min_workers,
    ) == expected
    assert placement.elastic == ((2, 4) if placement.min_workers else None)
    assert placement.resources == ({"CPU": 1.0, "GPU": placement.gpus} if placement.gpu else {"CPU": 1.0})


def test_labels_choose_the_nodes_of_workers_and_of_decoding(nodes):
    nodes(node(3), node(4, 2, pool="gpu"), node(20, pool="cpu", zone="a"))
    placement = cluster._placement(Ray(workers=2, worker_labels={"pool": "gpu"}, decode_labels={"pool": "cpu"}), 1)
    assert (placement.gpu, placement.decoders) == (True, 20)
    assert (placement.labels, placement.decode_labels) == ({"pool": "gpu"}, {"pool": "cpu"})
    assert cluster._placement(Ray(decode_labels={"pool": "cpu", "zone": "a"}, gpu=False), 1).decoders == 20
    assert cluster._placement(Ray(workers=4, worker_labels={"pool": "cpu"}), 1).gpu is False
    with pytest.raises(UserError, match=r"no node .* labels .*'tpu'.*; there are pool: cpu, pool: gpu, zone: a \("):
        cluster._placement(Ray(worker_labels={"pool": "tpu"}), 1)
    with pytest.raises(
        UserError, match=r"needs a logical CPU for each, but the nodes with ray.worker_labels have 4; lower"
    ):
        cluster._placement(Ray(workers=5, gpu=False, worker_labels={"pool": "gpu"}), 1)
    nodes(node(3))
    with pytest.raises(UserError, match="no node has any"):
        cluster._placement(Ray(worker_labels={"pool": "tpu"}), 1)


@pytest.mark.parametrize(
    ("config", "jobs", "found", "message"),
    [
        (
            {"workers": 3},
            1,
            node(12, 2),
            r"^ray.workers=3 with 1 GPU each, but the cluster has 2; lower it or set ray.gpu",
        ),
        (
            {"workers": 2},
            2,
            node(12, 3),
            r"^ray.workers=2 of 2 trials at a time with 1 GPU each, but the cluster has 3",
        ),
        ({"gpu": True}, 1, node(12), r"^ray.workers=1 with 1 GPU each, but the cluster has 0"),
        ({"workers": 5, "gpus_per_worker": 0.5}, 1, node(12, 2), "with 0.5 GPU each, but the cluster has 2"),
        ({"workers": 5}, 1, node(4), "^ray.workers=5 needs a logical CPU for each, but the cluster has 4"),
        ({"workers": 3}, 1, node(4), r"^ray.workers=3 needs 5 logical CPUs \(2 for .* has 4; .* --num-cpus=5$"),
        ({"workers": 2}, 2, node(5), r"^ray.workers=2 of 2 trials at a time needs 6 logical CPUs"),
    ],
)
def test_what_there_is_no_room_for_is_refused(nodes, config, jobs, found, message):
    nodes(found)
    with pytest.raises(UserError, match=message):
        cluster._placement(Ray(**config), jobs)


def test_words_about_a_share():
    assert cluster.Placement(workers=1, gpu=False, threads=1).text == "1 worker, 1 CPU thread each"
    assert cluster.Placement(workers=2, gpu=False, threads=3).text == "2 workers, 3 CPU threads each"
    assert cluster.Placement(workers=2, gpu=True, threads=3, gpus=0.5).text == "2 workers, 0.5 GPU each"


def test_a_worker_that_measures_computes_alike_each_time(monkeypatch):
    import torch

    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=True))
    monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace(allow_tf32=True, deterministic=False))
    assert cluster.Placement(workers=1, gpu=True, threads=5).configure_torch() == torch.device("cuda")
    assert cluster.Placement(workers=1, gpu=False, threads=6).configure_torch() == torch.device("cpu")
    assert threads == [5, 6]
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.deterministic


# --- joining and starting ---------------------------------------------------------------------------------------------


@pytest.fixture
def init(monkeypatch, nodes):
    """What Ray is started with; no variable of Ray's is set."""
    given = []
    for name in [*cluster.ENVIRONMENT, cluster._MANY_MACHINES, cluster.PREEMPTION_NOTICES, "RAY_ADDRESS",
                 "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_API_SERVER_ADDRESS", cluster._NO_PREFIX,
                 "RAY_COLOR_PREFIX"]:  # fmt: skip
        monkeypatch.setenv(name, "")  # restored in the end, whatever is set meanwhile
        monkeypatch.delenv(name)
    nodes(node(10))

    def start(**options):
        given.append(options | {"alone": os.environ.get(cluster._MANY_MACHINES)})
        given[-1]["server"] = os.environ.get("RAY_API_SERVER_ADDRESS")

    monkeypatch.setattr(ray, "init", start)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    return given


def test_without_a_cluster_one_is_started_on_loopback_alone(init, nodes):
    placement = cluster.start(
        Ray(workers=3, decode_tasks=9, worker_labels={"pool": "gpu"}, decode_labels={"pool": "cpu"}), 2
    )
    (given,) = init
    port = given.pop("dashboard_port")
    assert given == {
        "address": "local", "num_cpus": (3 + 9) * 2 + 2, "include_dashboard": True, "dashboard_host": "127.0.0.1",
        "logging_level": "ERROR", "log_to_driver": True, "alone": "0", "server": f"http://127.0.0.1:{port}",
    }  # fmt: skip
    assert (placement.workers, placement.jobs, placement.labels, placement.decode_labels) == (3, 2, {}, {})
    assert cluster._MANY_MACHINES not in os.environ
    assert "RAY_API_SERVER_ADDRESS" not in os.environ
    assert os.environ[cluster.PREEMPTION_NOTICES] == "0"
    assert {name: os.environ[name] for name in cluster.ENVIRONMENT} == {
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "600", "RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_DEDUP_LOGS": "0",
        "RAY_DATA_LOG_LEVEL": "ERROR", "GOMP_SPINCOUNT": "20000",
        "MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "1073741824",
    }  # fmt: skip
    cluster.start(Ray())
    assert init[1]["num_cpus"] == 8 + 2  # this machine's, and two to spare


@pytest.mark.parametrize(
    ("there", "gpu", "expected"), [(True, "auto", True), (True, False, False), (False, "auto", False)]
)
def test_what_a_job_takes_of_this_machine_is_known_before_ray_starts(init, monkeypatch, there, gpu, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    found = cluster.alone(Ray(workers=3, gpu=gpu))
    assert (found.workers, found.gpu, found.threads) == (3, expected, 2)  # of 8 CPUs
    assert cluster.alone(Ray(cpus_per_worker=7)).threads == 7
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster.alone(Ray()) is None
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    assert cluster.alone(Ray()) is None


def test_what_is_waited_for_is_said_before_it_begins(init, monkeypatch, capsys):
    monkeypatch.setattr(ray, "init", lambda **options: print("here it is"))
    cluster.start(Ray())
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    cluster.start(Ray())
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        "starting Ray on this machine, about 10 s",
        "here it is",
        "joining Ray at 10.0.0.1:6379",
        "here it is",
    ]
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    cluster.start(Ray())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("terminal", "colour"), [(False, "0"), (True, None)])
def test_lines_of_workers_are_plain_on_one_machine_and_coloured_on_terminals_alone(init, monkeypatch, terminal, colour):
    monkeypatch.setattr(os, "isatty", lambda file: terminal)
    cluster.start(Ray())
    assert os.environ[cluster._NO_PREFIX] == "1"
    assert os.environ.get("RAY_COLOR_PREFIX") == colour
    monkeypatch.delenv(cluster._NO_PREFIX)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    cluster.start(Ray())
    assert cluster._NO_PREFIX not in os.environ  # with several machines it says where a line is from


def test_only_rays_noise_is_left_out(monkeypatch):
    """The first two are Ray's lines as they were seen."""
    from ray._private import worker

    shown = []
    monkeypatch.setattr(
        worker, "print_worker_logs", lambda data, *more: shown.append((data["pid"], data["lines"], *more))
    )
    cluster._drop_noise()
    cluster._drop_noise()  # once is enough
    noise = [
        "2026-01-01 10:00:00,000 WARNING: Failed to query Ray Train Controller actor state. State API may be "
        "temporarily unavailable. Continuing to monitor.",
        "Task MapWorker(Map(ShardEncoder)).submit failed. There are 3 retries remaining, so the task will be retried. "
        "Error: The actor is dead because it was killed by `ray.kill`.",
    ]
    for pid, lines in ((1, noise), (2, ["before", *noise, "after"]), (3, ["Task MapWorker(x) failed: out of memory"])):
        worker.print_worker_logs({"pid": pid, "lines": lines, "ip": "a"}, "a stream")
    assert shown == [
        (2, ["before", "after"], "a stream"), (3, ["Task MapWorker(x) failed: out of memory"], "a stream"),
    ]  # fmt: skip


def test_a_cluster_of_ones_own_has_a_token_of_its_own(init, monkeypatch):
    def started(*modules):
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        monkeypatch.setattr(cluster, "sys", SimpleNamespace(modules=dict.fromkeys(modules)))
        cluster.start(Ray())
        return os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN")

    found = [started(), started()]
    assert [mode for mode, _ in found] == ["token", "token"]
    assert len({token for _, token in found}) == 2
    assert {len(token) for _, token in found} == {64}
    monkeypatch.setattr(cluster, "in_worker", lambda: False)
    assert started("ray") == (None, None)  # it has read them, and its own default holds
    monkeypatch.setenv("RAY_AUTH_MODE", "mine")
    monkeypatch.setattr(cluster, "sys", SimpleNamespace(modules={}))
    cluster.start(Ray())
    assert os.environ["RAY_AUTH_MODE"] == "mine"
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setenv("RAY_ADDRESS", "here")
    cluster.start(Ray())
    assert "RAY_AUTH_MODE" not in os.environ  # another's cluster has its own


@pytest.mark.parametrize(("mode", "inside"), [(1, True), (0, False)])
def test_a_process_of_rays_leaves_labels_to_the_driver(init, monkeypatch, mode, inside):
    context = SimpleNamespace(worker=SimpleNamespace(mode=mode))
    monkeypatch.setattr(ray, "WORKER_MODE", 1)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    assert cluster.in_worker() == inside
    if inside:
        with pytest.raises(UserError, match="no node of the cluster has the labels"):
            cluster.start(Ray(worker_labels={"pool": "a"}))
    else:
        assert cluster.start(Ray(worker_labels={"pool": "a"})).labels == {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert not cluster.in_worker()


def test_a_cluster_that_there_is_is_joined(init, monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.setenv(name, "here")
        monkeypatch.setenv("RAY_DEDUP_LOGS", "1")  # the user's own is left
        cluster.start(Ray())
        assert init.pop() == {"logging_level": "ERROR", "log_to_driver": True, "alone": None, "server": None}
        assert os.environ[cluster.PREEMPTION_NOTICES] == "1"
        assert os.environ["RAY_DEDUP_LOGS"] == "1"
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_ADDRESS", "here")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(cluster, "in_worker", lambda: False)
    with pytest.raises(UserError, match="no node of the cluster has the labels"):
        cluster.start(Ray(worker_labels={"pool": "gpu"}))
    with pytest.raises(UserError, match=r"needs 11 logical CPUs .*; if the cluster grows by itself, ray.wait=600"):
        cluster.start(Ray(workers=9))
    assert init == []


def test_an_old_ray_is_refused(init, monkeypatch):
    monkeypatch.setattr(ray, "__version__", "2.54.9")
    with pytest.raises(UserError, match=r"Ray 2\.54\.9 has known security vulnerabilities; install 2\.55 or newer"):
        cluster.start(Ray())
    monkeypatch.setattr(ray, "__version__", "2.55.0")
    cluster.start(Ray())


def test_a_cluster_that_grows_is_waited_for_and_told_how_large(init, nodes, monkeypatch, capsys):
    asked, clock = [], SimpleNamespace(now=0.0)

    def sleep(seconds):
        clock.now += seconds
        if clock.now >= 10:
            nodes(node(4), node(12, 4))

    monkeypatch.setenv("RAY_ADDRESS", "here")
    monkeypatch.setattr(cluster, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda **given: asked.append(given))
    nodes(node(4))
    placement = cluster.start(Ray(workers=2, gpu=True, wait=600), 2)
    assert (placement.workers, placement.gpu, clock.now) == (2, True, 10.0)
    assert asked == [{"bundles": [{"CPU": 1, "GPU": 1.0}] * 4, "bundle_label_selectors": None}] * 2 + [
        {"bundles": [], "bundle_label_selectors": None}
    ]
    assert capsys.readouterr().out.count("waiting up to 600 s for the cluster to grow: ray.workers=2 of 2") == 1

    asked.clear()
    labels = {"worker_labels": {"pool": "a"}, "decode_labels": {"pool": "b"}, "decode_tasks": 3}
    with pytest.raises(UserError, match="no node of the cluster has the labels") as error:
        cluster.start(Ray(workers=1, wait=12, **labels))
    assert "ray.wait" not in str(error.value)
    assert clock.now == 10 + 15  # every 5 s, and once more when they are over
    assert asked[0] == {
        "bundles": [{"CPU": 1}] * 4, "bundle_label_selectors": [{"pool": "a"}] + [{"pool": "b"}] * 3,
    }  # fmt: skip


# --- folders ----------------------------------------------------------------------------------------------------------


def test_output_folders(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert output_path("root", "runs") == f"{tmp_path}/runs"
    assert output_path("out", "s3://b/c/", remote=True) == "s3://b/c"
    with pytest.raises(UserError, match="^root: give a path"):
        output_path("root", "")
    with pytest.raises(UserError, match="^root=s3://b/c: only local paths"):
        output_path("root", "s3://b/c")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UserError, match="^root=runs is relative; a submitted job"):
        output_path("root", "runs")
    assert output_path("root", "/data/runs") == "/data/runs"
    assert output_path("out", "s3://b/c", remote=True) == "s3://b/c"


@pytest.fixture
def others(monkeypatch):
    """Other nodes than this one, each with its own way to look; returns where was looked."""

    def make(**looks):
        asked = {}

        class Look:
            def __init__(self, function):
                self._function = function

            def options(self, scheduling_strategy):
                return SimpleNamespace(remote=lambda paths: (scheduling_strategy, self._function, paths))

        def get(found):
            strategy, function, paths = found
            assert strategy.soft is False
            asked[strategy.node_id[0]] = paths
            return looks[strategy.node_id[0]](function, paths)

        here = {"NodeID": "me", "NodeName": "here", "Alive": True, "Resources": {"CPU": 1.0}}
        dead = here | {"NodeID": "dead", "Alive": False}
        idle = here | {"NodeID": "no CPUs", "Resources": {"CPU": 0.0}}
        found = [here | {"NodeID": name * 56, "NodeName": f"node-{name}"} for name in looks]
        monkeypatch.setattr(ray, "nodes", lambda: [here, dead, idle, *found])
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "me"))
        monkeypatch.setattr(ray, "remote", lambda **options: Look)
        monkeypatch.setattr(ray, "get", get)
        return asked

    return make


def test_all_nodes_have_to_see_what_is_written_and_read(others, tmp_path):
    written, read = (
        {"root": f"{tmp_path}/runs", "out": "s3://bucket/out"},
        {"vae": str(tmp_path), "cache": "", "s": "s3://b"},
    )
    asked = others(a=lambda look, paths: look(paths))
    check_folders(written, read)
    (paths,) = asked.values()
    assert [os.path.dirname(path) for path in paths] == [f"{tmp_path}/runs", str(tmp_path.parent)]
    assert os.listdir(tmp_path / "runs") == []  # what was written there to be seen is gone

    others(a=lambda look, paths: [], b=lambda look, paths: paths[:1])
    with pytest.raises(UserError, match=rf"^root={tmp_path}/runs is not shared: node node-b .* all nodes share \(NFS"):
        check_folders(written, read)
    assert os.listdir(tmp_path / "runs") == []
    others(b=lambda look, paths: look([*paths, "/not/there"]) and paths[1:])
    with pytest.raises(UserError, match=f"^vae={tmp_path} is not shared"):
        check_folders(written, read)
    others(b=lambda look, paths: paths)
    with pytest.raises(UserError, match=r"out=.* is not shared.*\), or s3://$"):
        check_folders({"out": f"{tmp_path}/runs"}, {})


def test_a_node_that_left_is_not_asked_and_one_alone_is_not(others, tmp_path):
    def gone(look, paths):
        raise ray.exceptions.TaskUnschedulableError("it left")

    others(a=gone, b=lambda look, paths: look(paths))
    check_folders({"root": f"{tmp_path}/runs"}, {})
    others()
    check_folders({"root": f"{tmp_path}/other"}, {"vae": "/not/there"})
    assert not (tmp_path / "other").exists()


# --- a pool -----------------------------------------------------------------------------------------------------------


def test_actors_get_the_share_and_can_be_started_again(monkeypatch):
    made = []

    class Remote:
        def __init__(self, cls):
            self._cls = cls

        def options(self, **given):
            made.append(given)
            return SimpleNamespace(remote=lambda *arguments: SimpleNamespace(
                what=(self._cls, *arguments), __ray_ready__=SimpleNamespace(remote=lambda: "ready")
            ))  # fmt: skip

    monkeypatch.setattr(ray, "remote", Remote)
    monkeypatch.setattr(ray, "get", lambda found: made.append(found))
    placement = cluster.Placement(workers=3, gpu=True, threads=1, gpus=0.5, labels={"pool": "a"})
    found = actor_pool.pool(dict, placement, 1, 2)
    assert [actor.what for actor in found] == [(dict, 1, 2)] * 3
    assert made == [
        {"num_cpus": 1.0, "num_gpus": 0.5, "max_restarts": 3, "max_task_retries": 3, "label_selector": {"pool": "a"}},
        ["ready"] * 3,
    ]
    made.clear()
    actor_pool.pool(dict, cluster.Placement(workers=1, gpu=False, threads=1), max_restarts=0)
    strategy = made[0].pop("scheduling_strategy")
    assert strategy.placement_group is None
    assert made[0] == {"num_cpus": 1.0, "num_gpus": 0, "max_restarts": 0, "max_task_retries": 3}


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def handlers():
    """Those of the test process come back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_sigterm_ends_a_job_as_ctrl_c_does():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(shutdown.Stopped) as stopped, shutdown.on_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert shutdown.Stopped().code == 130
    assert isinstance(shutdown.Stopped(), KeyboardInterrupt)


@pytest.mark.parametrize(
    ("job", "text"),
    [
        (Encode, "stopped; run the same command again to continue"),
        (Retry, "stopped; run the same command again to continue"),
        (Sweep, "stopped; run the same command again to continue"),
        (Evaluate, "stopped; the same command begins anew"),
        (EvaluateLatents, "stopped; the same command begins anew"),
        (Inspect, "stopped; the same command begins anew"),
        (Doctor, "stopped; the same command begins anew"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.usefixtures("handlers")
def test_only_jobs_that_continue_say_so(capsys, monkeypatch, job, text):
    monkeypatch.setattr(cluster, "set_environment", lambda: None)
    assert main(job, lambda config: signal.raise_signal(signal.SIGTERM), []) == 143
    assert capsys.readouterr().err.strip() == text

    def stop(config):
        raise shutdown.Stopped(130, "stopped after 16 images")

    assert main(job, stop, []) == 130
    assert capsys.readouterr().err.strip() == "stopped after 16 images"


@pytest.mark.usefixtures("handlers")
def test_rays_handler_does_not_take_the_place_of_ours():
    def rays(number, frame):
        raise AssertionError

    with shutdown.on_sigterm():
        ours = signal.getsignal(signal.SIGTERM)
        with shutdown.keep_sigterm_handler():
            signal.signal(signal.SIGTERM, rays)
        assert signal.getsignal(signal.SIGTERM) == ours
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # no job of ours: Ray's stays
    with shutdown.keep_sigterm_handler():
        signal.signal(signal.SIGTERM, rays)
    assert signal.getsignal(signal.SIGTERM) == rays


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_asks_a_run_to_stop(tmp_path, capsys, number, code):
    file = tmp_path / shutdown.FILE

    def run():
        os.kill(os.getpid(), number)
        while not file.exists():
            os.sched_yield()
        return "a result"

    with shutdown.on_sigterm():
        ours = signal.getsignal(signal.SIGTERM)
        assert shutdown.call_stoppable(run, str(tmp_path)) == "a result"
        assert signal.getsignal(signal.SIGTERM) == ours
    assert "stopping: the run writes a checkpoint and ends" in capsys.readouterr().out
    assert shutdown.clear_stop_request(str(tmp_path)) == code
    assert not file.exists()


@pytest.mark.usefixtures("handlers")
def test_a_second_signal_ends_it_at_once(tmp_path):
    file = tmp_path / shutdown.FILE
    with shutdown._stop_on_signal(file):
        signal.raise_signal(signal.SIGINT)
        assert file.read_text() == "130"
        with pytest.raises(shutdown.Stopped) as stopped:
            signal.raise_signal(signal.SIGTERM)
    assert stopped.value.code == 143


@pytest.mark.usefixtures("handlers")
def test_what_a_run_raises_comes_back_and_without_a_job_signals_are_left(tmp_path):
    def fail():
        raise UserError("no such column")

    with shutdown.on_sigterm(), pytest.raises(UserError, match="no such column"):
        shutdown.call_stoppable(fail, str(tmp_path))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert shutdown.call_stoppable(lambda: signal.getsignal(signal.SIGTERM), str(tmp_path)) == signal.SIG_DFL


@pytest.mark.parametrize(("text", "code"), [(None, 130), ("", 130), ("143\n", 143), ("by hand", 130)])
def test_a_request_is_forgotten_with_its_code(tmp_path, text, code):
    file = Path(tmp_path, shutdown.FILE)
    if text is not None:
        file.write_text(text)
    assert shutdown.clear_stop_request(str(tmp_path)) == code
    assert not file.exists()
