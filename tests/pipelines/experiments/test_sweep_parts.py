"""What a sweep gives to Tune, and what becomes of a trial, with stand-ins for Tune, Ray and the jobs."""

import json
import queue
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import yaml
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from ray.util.queue import Empty

from pipelines.encoding import encode as encode_job
from pipelines.evaluation import generated as judge_job
from pipelines.evaluation import reconstruction
from pipelines.evaluation import sample as sample_job
from pipelines.experiments import paper, run_trial, search_space, sweep
from pipelines.experiments.config import Sweep
from pipelines.experiments.trials import (
    SweepSetup,
    TrainedModel,
    Trial,
    TrialRow,
    _is,
    _jobs,
    _train,
    point,
    slug,
    training_lengths,
    trials_of_table,
)
from pipelines.runtime import cluster, mlflow_run
from pipelines.runtime.cli import load
from pipelines.training import ldm, vae

STAGES = "train_vae.stages=[{resolution: 32, images: 500, batch_size: 8}, {resolution: 64, images: 300, batch_size: 8}]"
PLACEMENT = cluster.Placement(
    workers=1, gpu=False, threads=3, jobs=5, labels={"pool": "w"}, decode_labels={"pool": "d"}
)


def configured(root="runs", *more) -> Sweep:
    return load(Sweep, None, [f"root={root}", "tracking.enabled=false", STAGES, *more])


# --- what Tune is given -------------------------------------------------------------------------------------------


def test_a_look_at_a_trial_is_an_eighth_of_its_images_or_as_said():
    assert training_lengths(configured(), configured().train_vae) == (800, 100)
    assert training_lengths(configured("runs", "every=70"), configured().train_vae) == (800, 70)
    odd = {"stages": [{"images": 801}]}
    assert training_lengths(configured(), odd) == (801, 101)


@pytest.mark.parametrize("metric", ["psnr", "ssim"])
def test_what_is_best_is_the_highest(metric):
    plain = sweep._tune_config(configured("runs", f"metric={metric}"), PLACEMENT, False)
    assert (plain.metric, plain.mode, plain.scheduler, plain.search_alg) == (metric, "max", None, None)
    asha = sweep._tune_config(configured("runs", f"metric={metric}", "scheduler=asha", "every=40"), PLACEMENT, False)
    assert (asha.metric, asha.mode) == (None, None)  # Tune takes them once: here of the scheduler
    assert (asha.scheduler._metric, asha.scheduler._mode) == (metric, "max")
    space = "space.optim.lr.uniform=[1e-4, 1e-3]"
    pbt = sweep._tune_config(configured("runs", f"metric={metric}", "scheduler=pbt", space), PLACEMENT, False)
    assert (pbt.scheduler._metric, pbt.scheduler._mode) == (metric, "max")
    optuna = sweep._tune_config(configured("runs", f"metric={metric}", "search=optuna", "seeds=[7]"), PLACEMENT, False)
    assert (optuna.metric, optuna.mode) == (metric, "max")
    assert (optuna.search_alg._metric, optuna.search_alg._mode, optuna.search_alg._seed) == (metric, "max", 7)


def test_given_trials_are_run_once_and_so_many_at_a_time():
    assert sweep._tune_config(configured("runs", "trials=9"), PLACEMENT, True).num_samples == 1
    drawn = sweep._tune_config(configured("runs", "trials=9"), PLACEMENT, False)
    assert (drawn.num_samples, drawn.max_concurrent_trials) == (9, 5)


def test_asha_may_stop_a_trial_from_its_first_look_on():
    scheduler = sweep._tune_config(configured("runs", "scheduler=asha"), PLACEMENT, True).scheduler
    assert isinstance(scheduler, ASHAScheduler)
    assert (scheduler._time_attr, scheduler._max_t, scheduler._reduction_factor) == ("images", 801, 3)
    (bracket,) = scheduler._brackets
    assert min(milestone for milestone, _ in bracket._rungs) == 100


def test_pbt_moves_the_fields_of_the_space():
    space = ["space.optim.lr.loguniform=[1e-4, 1e-2]", "space.model.encoder=[S, B]"]
    scheduler = sweep._tune_config(configured("runs", "scheduler=pbt", "every=40", *space), PLACEMENT, False).scheduler
    assert isinstance(scheduler, PopulationBasedTraining)
    assert (scheduler._time_attr, scheduler._perturbation_interval) == ("images", 40)
    assert scheduler._hyperparam_mutations["model.encoder"] == ["S", "B"]
    rate = scheduler._hyperparam_mutations["optim.lr"]
    assert (rate.lower, rate.upper) == (1e-4, 1e-2)
    moved = scheduler._custom_explore_fn({"optim.lr": 0.5, "model.encoder": "S"})
    assert moved == {"optim.lr": 1e-2, "model.encoder": "S"}


def test_what_a_field_is_drawn_from():
    names = {
        "a": ("loss.l1.weight", "{uniform: [1, 2]}"),
        "b": ("optim.lr", "{loguniform: [1e-4, 1e-2]}"),
        "c": ("model.latent_channels", "{randint: [3, 5]}"),
        "d": ("model.init", "{choice: [007, 2024-10-05]}"),
        "e": ("loss.l2.weight", "[5, 1e-3]"),
        "f": ("model.decoder.norm", "[smc, group]"),
        "g": ("model.levels", "[[1, 2], [3]]"),
    }
    fields = [f"space.{field}={values}" for field, values in names.values()]
    found = search_space.tune_space(configured("runs", *fields, "seeds=[4]"))
    space = {"seed": found["seed"]} | {key: found[field] for key, (field, _) in names.items()}
    assert space["seed"] == 4
    assert (space["a"].lower, space["a"].upper) == (1, 2)
    assert {type(space[key].get_sampler()).__name__ for key in "ac"} == {"_Uniform"}
    assert (space["b"].lower, space["b"].upper) == (1e-4, 1e-2)
    assert "Log" in type(space["b"].get_sampler()).__name__
    assert (space["c"].lower, space["c"].upper) == (3, 6)  # Tune's upper end is not drawn
    assert space["d"].categories == ["007", "2024-10-05"]
    assert space["e"].categories == [5, 1e-3]
    assert space["f"].categories == ["smc", "group"]
    assert space["g"].categories == [[1, 2], [3]]


def test_values_drawn_here_are_of_the_same_kinds():
    generator = np.random.default_rng(0)

    def many(values):
        return [search_space.drawn_value(values, generator) for _ in range(300)]

    assert {*many([1, "b"])} == {*many({"choice": [1, "b"]})} == {1, "b"}
    assert {*many({"randint": [3, 5]})} == {3, 4, 5}
    plain, log = many({"uniform": [1, 100]}), many({"loguniform": [1, 100]})
    assert all(1 <= value <= 100 for value in plain + log)
    assert 40 < np.median(plain) < 60
    assert 5 < np.median(log) < 20


def test_values_of_a_space_by_field():
    config = configured("runs", "space={optim.lr: {uniform: [1e-4, 1]}}", "space.model.init=[1.10, x]")
    assert dict(search_space.space_fields(config.space)) == {
        "optim.lr": {"uniform": [1e-4, 1]}, "model.init": ["1.10", "x"],
    }  # fmt: skip
    assert search_space.nested({"a.b": 1, "a.c.d": 2, "e": 3}) == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}


def test_fields_within_others():
    assert _is("data.train.uri", ("data.train",))
    assert _is("seed", ("seed",))
    assert not _is("data.training", ("data.train",))


class Tuner:
    """A stand-in for Tune's that keeps what it was given."""

    restorable, results = False, ()

    def __init__(self, trainable, **given):
        type(self).last = SimpleNamespace(trainable=trainable, **given)

    @classmethod
    def can_restore(cls, path):
        return cls.restorable

    @classmethod
    def restore(cls, path, trainable, resume_unfinished):
        cls.last = SimpleNamespace(trainable=trainable, restored=path, unfinished=resume_unfinished)
        return cls.__new__(cls)

    def fit(self):
        return self.results


@pytest.fixture
def tuner(monkeypatch):
    kind = type("Tuner", (Tuner,), {})
    monkeypatch.setattr(tune, "Tuner", kind)
    monkeypatch.setattr(tune, "with_resources", lambda function, resources: (function, resources))
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    return kind


def trials_in(folder, count=4):
    rows = [TrialRow(f"row {n}", n, str(folder / "rows" / f"{n}"), {}) for n in range(count)]
    return [Trial({"name": f"vae-{n}", "root": str(folder / "trained")}, [row]) for n, row in enumerate(rows)]


def leave(row, name):
    Path(row.folder).mkdir(parents=True, exist_ok=True)
    Path(row.folder, name).write_text("{}")


def test_trials_that_are_done_or_were_stopped_are_not_run_again(tuner, tmp_path, monkeypatch):
    trials = trials_in(tmp_path)
    trials[3].rows.append(TrialRow("row 3 again", 0, str(tmp_path / "rows" / "again"), {}))
    for row, name in (
        (trials[0].rows[0], "result.json"),
        (trials[2].rows[0], "stopped.json"),
        (trials[3].rows[0], "result.json"),
    ):
        leave(row, name)
    cfg = configured(tmp_path, "scheduler=asha", "space.optim.lr=[1]", "ray.wait=4")
    run = SimpleNamespace(run_id="parent")
    assert sweep._tune(cfg, trials, PLACEMENT, run, str(tmp_path / "sweep")) == []
    given = tuner.last
    assert given.param_space == {"trial": {"grid_search": [1, 3]}}
    assert given.tune_config.num_samples == 1
    assert given.run_config.storage_path == str(tmp_path / "sweep")
    assert given.run_config.name == "tune"
    assert len(given.run_config.callbacks) == 1
    function, resources = given.trainable
    assert resources.bundles == [{"node:10.0.0.1": 0.001}]
    called = []
    monkeypatch.setattr(run_trial, "run", lambda values, setup: called.append((values, setup)))
    function({"trial": 1})
    ((values, setup),) = called
    assert values == {"trial": 1}
    assert setup.cfg == cfg.model_dump(mode="json")
    assert [each.train["name"] for each in setup.trials] == [f"vae-{n}" for n in range(4)]
    assert (setup.parent, setup.folder) == ("parent", str(tmp_path / "sweep"))
    own = {"cpus_per_worker": 3, "worker_labels": {"pool": "w"}, "decode_labels": {"pool": "d"}}
    assert setup.ray == cfg.ray.model_dump(mode="json") | own
    for each in trials:
        leave(each.rows[-1], "result.json")
    leave(trials[1].rows[0], "result.json")
    del tuner.last
    assert sweep._tune(cfg, trials, PLACEMENT, run, str(tmp_path / "sweep")) == []
    assert not hasattr(tuner, "last")


def test_points_that_tune_draws_go_on_where_tune_was(tuner, tmp_path):
    cfg, run = configured(tmp_path, "search=optuna", "space.optim.lr=[1, 2]"), SimpleNamespace(run_id=None)
    sweep._tune(cfg, [], PLACEMENT, run, str(tmp_path))
    assert tuner.last.param_space["optim.lr"].categories == [1, 2]
    assert tuner.last.tune_config.num_samples == 8
    assert tuner.last.run_config.callbacks is None
    tuner.restorable = True
    sweep._tune(cfg, [], PLACEMENT, run, str(tmp_path))
    assert (tuner.last.restored, tuner.last.unfinished) == (str(tmp_path / "tune"), True)
    sweep._tune(configured(tmp_path), trials_in(tmp_path), PLACEMENT, run, str(tmp_path))
    assert not hasattr(tuner.last, "restored")  # given trials go on by themselves


def test_what_failed_is_told_by_its_row(tuner, tmp_path):
    error = "Traceback\n  ...\nlitevae.errors.UserError: the disk is full\nin all"
    tuner.results = [
        SimpleNamespace(error=None, config={"trial": 0}),
        SimpleNamespace(error=error, config={"trial": 1}),
        SimpleNamespace(error="Traceback\nKeyError: 5", config={"optim.lr": 1, "seed": 0}),
    ]
    failed = sweep._tune(
        configured(tmp_path), trials_in(tmp_path), PLACEMENT, SimpleNamespace(run_id=""), str(tmp_path)
    )
    assert failed == ["  row 1, seed 1: the disk is full\nin all", "  optim.lr=1, seed=0: KeyError: 5"]


def test_a_trial_that_asha_stops_is_noted(tmp_path, capsys):
    trials = trials_in(tmp_path, 2)
    callback = sweep._stopped(trials)
    last = {"images": 1600, "psnr": 21.25, "ssim": 0.5, "time_total_s": 3}
    callback.on_trial_complete(3, [], SimpleNamespace(config={"trial": 1}, last_result=last))
    noted = json.loads(Path(trials[1].rows[0].folder, "stopped.json").read_text())
    assert noted == {"images": 1600, "psnr": 21.25, "ssim": 0.5}
    assert "row 1, seed 1: stopped after 1,600 images, psnr 21.25" in capsys.readouterr().out
    Path(trials[0].folder).mkdir(parents=True)
    Path(trials[0].folder, "trained.json").write_text("{}")  # it came to its end
    callback.on_trial_complete(3, [], SimpleNamespace(config={"trial": 0}, last_result=last))
    assert not Path(trials[0].rows[0].folder, "stopped.json").exists()


# --- what comes of it ---------------------------------------------------------------------------------------------


def test_results_are_in_the_tables_order(tmp_path):
    trials = trials_in(tmp_path, 3)
    for each in trials[:2]:
        leave(each.rows[0], "result.json")
        Path(each.rows[0].folder, "result.json").write_text(json.dumps({"row": each.rows[0].name}))
    assert [each["row"] for each in sweep._results(str(tmp_path), trials, ["row 1", "row 0"])] == ["row 1", "row 0"]
    assert [each["row"] for each in sweep._results(str(tmp_path), trials, [])] == ["row 0", "row 1"]
    assert [each["row"] for each in sweep._results(str(tmp_path), [], [])] == ["row 0", "row 1"]


def test_a_report_without_mlflow_has_the_numbers(tmp_path):
    metrics = {"eval/reconstruction/psnr": 20.12345, "eval/params_m": 1.5, "eval/bicubic/psnr": 3.0}
    results = [
        {"row": "a", "seed": 0, "metrics": metrics, "remarks": ["no rFID", "no LPIPS"]},
        {"row": "b", "seed": 1, "metrics": {"eval/params_m": 2.0}, "remarks": ["no rFID"]},
    ]
    lines = sweep._report(configured(tmp_path), results, "folder").split("\n")
    assert [line.split() for line in lines[1:4]] == [
        ["params_m", "psnr"], ["a,", "seed", "0", "1.5", "20.12"], ["b,", "seed", "1", "2", "-"],
    ]  # fmt: skip
    assert lines[5:10] == [
        "no LPIPS", "no rFID", "results  folder/results.json", "configs  folder/configs",
        "best     folder/best.yaml (train_vae.py --config)",
    ]  # fmt: skip
    tracked = configured(tmp_path, "tracking.enabled=true")
    assert "psnr" not in sweep._report(tracked, results, "folder")
    assert "best" not in sweep._report(tracked, [], "folder")


def test_a_files_name_of_a_label():
    assert slug("FFHQ 128: VAE").startswith("FFHQ-128-VAE-")
    assert slug("a b") != slug("a-b")
    assert len(slug("x" * 200)) == 87


# --- a trial ------------------------------------------------------------------------------------------------------


class Reports:
    """What a training has reported, a list for each time that it is waited for."""

    def __init__(self, rounds):
        self.rounds, self.left = iter(rounds), []

    def wait(self, running, timeout):
        self.left = next(self.rounds)
        return (running if self.left and self.left[-1] == "end" else []), []

    def get_nowait(self):
        if not self.left or self.left[0] == "end":
            raise Empty
        return self.left.pop(0)


@pytest.fixture
def tunes_actor(monkeypatch):
    """`trial.run` with a task that reports so, and what it and Tune are given."""
    found = SimpleNamespace(reported=[], checkpoints=[], task=[], options={}, begin=None)

    def report(metrics, checkpoint=None):
        found.reported.append(metrics)
        found.checkpoints.append(checkpoint and json.loads(Path(checkpoint, "checkpoint.json").read_text()))

    class Task:
        def options(self, **options):
            found.options = options
            return self

        def remote(self, *given):
            found.task = given
            return "task"

    def run(values, setup, rounds):
        reports = Reports(rounds)
        monkeypatch.setattr("ray.util.queue.Queue", lambda actor_options: reports)
        monkeypatch.setattr(ray, "wait", reports.wait)
        run_trial.run(values, setup)
        return found

    context = SimpleNamespace(get_node_id=lambda: "0" * 56)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray, "remote", lambda function: Task())
    monkeypatch.setattr(ray, "get", lambda task: {"psnr": 99.0, "of": task})
    monkeypatch.setattr(tune, "report", report)
    monkeypatch.setattr(tune, "get_checkpoint", lambda: found.begin)
    monkeypatch.setattr(tune, "Checkpoint", SimpleNamespace(from_directory=str))
    found.run = run
    return found


def setup_of(cfg, **more):
    given = {"ray": {"worker_labels": {}}, "folder": "f", "trials": ["zero", "one"], "parent": "", "cwd": ""} | more
    return SweepSetup(cfg.model_dump(mode="json"), **given)


def test_what_a_training_reports_at_checkpoints_is_tunes(tunes_actor):
    rounds = [[({"images": 8}, "a"), ({"psnr": 1.0}, "b")], [], [({"psnr": 2.0}, "c"), "end"]]
    found = tunes_actor.run({"trial": 1}, setup_of(configured()), rounds)
    assert found.reported == [{"psnr": 1.0}, {"psnr": 2.0}, {"psnr": 99.0, "of": "task"}]
    assert found.checkpoints == [None] * 3
    assert found.task[0] == "one"
    assert (found.options["num_cpus"], found.options["scheduling_strategy"], found.options["max_retries"]) == (
        0,
        "DEFAULT",
        3,
    )


def test_with_pbt_a_trial_goes_on_from_another_ones_checkpoint(tunes_actor, tmp_path, monkeypatch):
    points = []

    def point(cfg, values, seed, folder, begin):
        points.append((values, seed, folder, begin))
        return Trial({"name": "n", "root": "r"})

    monkeypatch.setattr(run_trial, "point", point)
    (tmp_path / "checkpoint.json").write_text('{"path": "runs/a/checkpoint-8"}')
    cfg = configured("runs", "scheduler=pbt", "space.optim.lr=[1]")
    tunes_actor.begin = SimpleNamespace(as_directory=lambda: nullcontext(str(tmp_path)))
    found = tunes_actor.run(
        {"optim.lr": 0.5, "seed": 3}, setup_of(cfg), [[({"psnr": 1.0}, "runs/b/checkpoint-16"), "end"]]
    )
    assert points == [({"optim.lr": 0.5}, 3, "f", "runs/a/checkpoint-8")]
    assert found.task[0] == Trial({"name": "n", "root": "r"})
    assert found.checkpoints == [{"path": "runs/b/checkpoint-16"}, None]
    tunes_actor.begin = None
    tunes_actor.run({"optim.lr": 0.5, "seed": 3}, setup_of(cfg), [["end"]])
    assert points[1][3] == ""


def result_of(row, psnr):
    metrics = {"eval/reconstruction/psnr": psnr, "eval/reconstruction/ssim": psnr / 100}
    Path(row.folder).mkdir(parents=True, exist_ok=True)
    Path(row.folder, "result.json").write_text(json.dumps({"metrics": metrics}))


def test_a_trial_is_a_training_and_its_rows_that_are_not_done(tmp_path, monkeypatch, capsys):
    rows = [TrialRow(f"row {n}", n, str(tmp_path / str(n)), {"evaluate": {"images": n}}, "decoder") for n in range(2)]
    result_of(rows[0], 20.0)
    trained, judged = [], []

    def train(cfg, mine, parent, reports):
        print("much")
        trained.append((mine, parent, reports))
        return TrainedModel("folder", "the model", {"psnr": 1.0, "images": 800}, rows[0].folder)

    def judge(cfg, values, trained, row, parent):
        print("more")
        judged.append((values, row, parent))
        result_of(row, 30.0)

    monkeypatch.setattr(run_trial, "_trained", train)
    monkeypatch.setattr(run_trial, "_evaluate", judge)
    asked = Trial({"name": "n", "root": "r"}, rows)
    setup = setup_of(configured(), ray={"workers": 2}, cwd=str(tmp_path / "nowhere"), parent="p")
    found = run_trial._work(asked, setup, "reports")
    assert found == {"psnr": 30.0, "ssim": 0.3, "images": 800}
    (mine, parent, reports), ((values, row, of),) = trained[0], judged
    assert (parent, reports, of) == ("p", "reports", "p")
    assert mine.train == values == {"name": "n", "root": "r", "ray": {"workers": 2}}
    assert (row.name, row.part) == ("row 1", "decoder")
    assert row.jobs == {"evaluate": {"images": 1, "ray": {"workers": 2}}}
    assert Path(rows[0].folder, "log.txt").read_text() == "much\n"
    assert Path(rows[1].folder, "log.txt").read_text() == "more\n"
    shown = capsys.readouterr().out
    assert "much" not in shown
    assert "row 0, seed 0: psnr 20  ssim 0.2" in shown
    assert "row 1, seed 1: psnr 30  ssim 0.3" in shown


def test_a_training_is_done_once(tmp_path, monkeypatch):
    row = TrialRow("a row", 3, str(tmp_path / "row"), {})
    mine = Trial({"name": "vae-1", "root": str(tmp_path / "trained"), "seed": 3}, [row])
    ran = []

    def train(config, callbacks):
        ran.append((config, callbacks))
        Path(mine.folder).mkdir()
        return {"model": "the model", "psnr": 20.5, "images": 8, "stages": [1]}

    monkeypatch.setattr(vae, "train_vae", train)
    monkeypatch.setattr(run_trial, "_reporter", lambda reports: f"reporter of {reports}")
    cfg = configured(tmp_path, "name=mine", "tracking.tags={a: b}")
    for _ in range(2):
        found = run_trial._trained(cfg, mine, "parent", "queue")
    assert found == TrainedModel(mine.folder, "the model", {"psnr": 20.5, "images": 8}, row.folder)
    assert json.loads(Path(mine.folder, "trained.json").read_text()) == {
        "folder": mine.folder, "model": "the model", "metrics": {"psnr": 20.5, "images": 8}, "row": row.folder,
    }  # fmt: skip
    ((config, callbacks),) = ran
    assert (config.name, config.seed, callbacks) == ("vae-1", 3, ["reporter of queue"])
    tags = {"a": "b", "litevae.sweep": "mine", "litevae.row": "a row", "litevae.seed": "3"}
    assert (config.tracking.tags, config.tracking.run, config.tracking.parent) == (tags, "a row, seed 3", "parent")
    of_table = run_trial.tracking_of(configured(tmp_path, "table=t9", "scale=smoke"), row, "parent")
    assert (of_table.tags["litevae.table"], of_table.tags["litevae.scale"]) == ("9", "smoke")


def test_a_reporter_hands_on_checkpoints():
    reports = queue.Queue()
    reporter = run_trial._reporter(reports)
    reporter.after_report(None, [{"psnr": 1.0}, {"psnr": 2.0}], SimpleNamespace(path="there"))
    reporter.after_report(None, [{"psnr": 3.0}], None)
    assert (reports.get_nowait(), reports.qsize()) == (({"psnr": 1.0}, "there"), 0)


@pytest.fixture
def tracked(monkeypatch):
    """What a trial brings to MLflow."""
    found = SimpleNamespace(started=[], logged=[], replayed=[], closed=[])

    class Tracker:
        def __init__(self, run, system):
            assert (run, system) == ("run", False)

        def metrics(self, values, step):
            found.logged.append((values.copy(), step))

        def close(self, status):
            found.closed.append(status)

    def replay(folder, tracker, images, training=False):
        found.replayed.append((folder, images, training))
        return {f"eval/{Path(folder).name}": 1.0}

    monkeypatch.setattr(mlflow_run, "start_run", lambda *given: found.started.append(given) or "run")
    monkeypatch.setattr(mlflow_run, "Tracker", Tracker)
    monkeypatch.setattr(mlflow_run, "replay", replay)
    monkeypatch.setattr(mlflow_run, "link", lambda run: f"link to {run}")
    monkeypatch.setattr(run_trial, "_parameters", lambda model, part: {"encoder": 1_500_000, "decoder": 7}[part])
    return found


def test_a_row_is_evaluated_and_joins_its_trainings_run(tracked, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(reconstruction, "evaluate", lambda config: asked.append(config) or {"remarks": ["no rFID"]})
    row = TrialRow("a row", 3, str(tmp_path / "row"), {"evaluate": {"images": 5}})
    training = tmp_path / "training"
    for folder in (training, tmp_path / "row"):
        folder.mkdir()
    (training / "metrics.jsonl").write_text('{"train/loss": 1}\n')
    trained = TrainedModel(str(training), "the model", {"images": 800}, row.folder)
    cfg, values = configured(tmp_path), {"name": "vae-1", "optim": {}}
    run_trial._evaluate(cfg, values, trained, row, "parent")
    assert (asked[0].model, asked[0].images, asked[0].out) == ("the model", 5, str(tmp_path / "row/evaluation"))
    where, root, job, name, given, folder = tracked.started[0]
    assert (where.parent, root, job, name) == ("parent", cfg.root, "train_vae", "vae-1")
    assert (given, folder) == (values, str(training))  # of the training's own row: its run
    assert tracked.logged == [({"eval/params_m": 1.5}, 800)]
    assert tracked.replayed == [(str(tmp_path / "row/evaluation"), 800, False)]
    assert tracked.closed == ["FINISHED"]
    assert json.loads((tmp_path / "row/result.json").read_text()) == {
        "row": "a row", "seed": 3, "metrics": {"eval/params_m": 1.5, "eval/evaluation": 1.0}, "model": "the model",
        "evaluation": str(tmp_path / "row/evaluation"), "remarks": ["no rFID"],
        "run": "link to run", "train_vae": values,
    }  # fmt: skip
    # of another row, or where the run has an evaluation already: a run of its own, with the training's metrics
    run_trial._evaluate(cfg, values, replace(trained, row="another"), row, "parent")
    (training / "metrics.jsonl").write_text('{"eval/reconstruction/psnr": 1}\n')
    run_trial._evaluate(cfg, values, trained, row, "parent")
    for started in tracked.started[1:]:
        assert started[5] == str(tmp_path / "row/run")
    assert tracked.replayed[1::2] == [(str(training), 800, True)] * 2


def test_a_row_with_a_diffusion_model(tracked, tmp_path, monkeypatch):
    asked = {}

    def keep(name, result=None):
        return lambda config: asked.update({name: config}) or result

    monkeypatch.setattr(encode_job, "run", keep("encode"))
    monkeypatch.setattr(ldm, "train_ldm", keep("ldm", {"model": "the ldm"}))
    monkeypatch.setattr(sample_job, "sample", keep("sample"))
    monkeypatch.setattr(judge_job, "samples", keep("judge"))
    monkeypatch.setattr(reconstruction, "evaluate", lambda config: {"remarks": []})
    jobs = {
        "evaluate": {}, "encode_dataset": {"rows_per_shard": 7}, "train_ldm": {"images": 6}, "sample": {"steps": 4},
        "evaluate_samples": {"images": 12},
    }  # fmt: skip
    row = TrialRow("a row", 3, str(tmp_path), jobs)
    (tmp_path / "metrics.jsonl").write_text("")
    trained = TrainedModel(str(tmp_path), "the model", {"images": 800}, row.folder)
    run_trial._evaluate(configured(tmp_path), {"name": "vae-1"}, trained, row, "")
    encoded, trained, drawn, judged = (asked[name] for name in ("encode", "ldm", "sample", "judge"))
    assert (encoded.model, encoded.out, encoded.rows_per_shard) == ("the model", f"{tmp_path}/cache", 7)
    assert (trained.cache, trained.root, trained.name, trained.seed, trained.images) == (
        f"{tmp_path}/cache",
        str(tmp_path),
        "ldm",
        3,
        6,
    )
    assert (drawn.model, drawn.out, drawn.steps) == ("the ldm", f"{tmp_path}/samples", 4)
    out = f"{tmp_path}/evaluation-samples"
    assert (judged.samples.uri, judged.out, judged.images) == (f"{tmp_path}/samples", out, 12)
    assert [folder for folder, *_ in tracked.replayed] == [f"{tmp_path}/evaluation", out]


# --- a table's jobs -----------------------------------------------------------------------------------------------


def listed(monkeypatch, units=20):
    monkeypatch.setattr(
        "pipelines.experiments.trials._source",
        lambda cfg, name: SimpleNamespace(units=units, digest=f"digest of {name}"),
    )


def test_jobs_after_a_training_have_their_sources_and_sizes(tmp_path, monkeypatch):
    listed(monkeypatch)
    monkeypatch.setattr("pipelines.experiments.trials.check_networks", lambda *given: checked.append(given))
    checked = []
    data = ["data.train.uri=/train", "data.val.uri=/val", "evaluate_samples.squeezenet=w.pth", "sample.steps=7"]
    cfg = configured(tmp_path, *data)
    values = {
        "evaluate": {"images": 50, "mmd_images": 40},
        "train_ldm": {"images": 9},
        "sample": {"steps": 5, "images": 3},
    }
    jobs = _jobs(cfg, values, "ldm")
    assert [*jobs] == ["evaluate", "encode_dataset", "train_ldm", "sample", "evaluate_samples"]
    sources = {job: values["source"]["uri"] for job, values in jobs.items() if "source" in values}
    assert sources == {"evaluate": "/val", "encode_dataset": "/train", "evaluate_samples": "/train"}
    assert (jobs["evaluate"]["images"], jobs["evaluate"]["mmd_images"]) == (20, 20)  # as many as there are
    assert (jobs["sample"]["steps"], jobs["sample"]["images"], jobs["train_ldm"]["images"]) == (7, 3, 9)
    assert {values["root"] for values in jobs.values()} == {str(tmp_path)}
    assert not any(values["tracking"]["enabled"] for values in jobs.values())
    assert checked == [("", "w.pth", "", "resnet50")]
    assert [*_jobs(cfg, {}, "vae")] == ["evaluate"]
    few = configured(tmp_path, *data, "evaluate.images=8", "evaluate.mmd_images=30")
    assert _jobs(few, {}, "vae")["evaluate"]["mmd_images"] == 8


def test_a_searched_training_looks_and_keeps_its_checkpoints(tmp_path, monkeypatch):
    listed(monkeypatch)
    off = "train_vae.loss.lpips.weight=0"
    values = configured(tmp_path, off).train_vae
    plain = _train(configured(tmp_path), values, 5)
    assert (plain["seed"], plain["begin"], plain["root"]) == (5, "", str(tmp_path / "trained"))
    assert plain["loop"]["keep"] == 2
    for more in ("scheduler=asha", "scheduler=pbt", "search=optuna"):
        loop = _train(configured(tmp_path, more, "every=70"), values, 5)["loop"]
        assert (loop["val_every"], loop["checkpoint_every"], loop["keep"]) == (70, 70, 12)  # 800 // 70, and one
    begun = point(configured(tmp_path, off), {"optim.lr": 1e-3}, 5, "folder", "runs/a/checkpoint-8")
    assert begun.train["begin"] == "runs/a/checkpoint-8"
    (row,) = begun.rows
    assert row.name == f"optim.lr=0.001 ({begun.train['name']})"
    assert row.folder == f"folder/rows/{begun.train['name']}"
    assert row.jobs["evaluate"]["transform"]["resolution"] == 64  # of the last stage


def test_a_tables_rows_are_merged_into_trainings(tmp_path, monkeypatch):
    listed(monkeypatch)
    cfg = configured(tmp_path, "table=20", "scale=smoke", "seeds=[0, 4]")
    trials, left_out = trials_of_table(cfg, paper.table("20"), "folder")
    assert left_out == {}
    assert [(row.name, row.seed, row.part) for each in trials for row in each.rows] == [
        ("UNet", 0, "encoder.aggregator"), ("UNet", 4, "encoder.aggregator"),
        ("ViT", 0, "encoder.aggregator"), ("ViT", 4, "encoder.aggregator"),
    ]  # fmt: skip
    assert [each.train["seed"] for each in trials] == [0, 4, 0, 4]
    assert trials[2].train["model"]["aggregator"] == "vit"
    assert trials[0].rows[0].folder.startswith("folder/rows/UNet-seed-0-")


# --- a sweep as a whole -------------------------------------------------------------------------------------------


@pytest.fixture
def whole(tmp_path, monkeypatch):
    """`sweep.sweep` of a space, whose trials are stood in for: rates of 1e-4 and 1e-3 with PSNRs of 20 and 30."""
    found = SimpleNamespace(asked=[], finished=[], failed=[])
    listed(monkeypatch)
    monkeypatch.setattr(sweep.first_look, "check_source", lambda config, name: None)
    monkeypatch.setattr(sweep.cluster, "start", lambda ray, jobs: found.asked.append(jobs) or PLACEMENT)
    monkeypatch.setattr(sweep.paths, "check_folders", lambda written, read: found.asked.append((written, read)))
    monkeypatch.setattr(sweep.mlflow_run, "finish", lambda run, status: found.finished.append(status))

    def tune_it(cfg, trials, placement, run, folder):
        for each in trials:
            for row in each.rows:
                psnr = 20.0 if each.train["optim"]["lr"] == 1e-4 else 30.0
                metrics = {"eval/reconstruction/psnr": psnr, "eval/reconstruction/ssim": 1 / psnr}
                Path(row.folder).mkdir(parents=True)
                about = {"row": row.name, "seed": row.seed, "metrics": metrics, "remarks": [], "train_vae": each.train}
                Path(row.folder, "result.json").write_text(json.dumps(about))
        return found.failed

    monkeypatch.setattr(sweep, "_tune", tune_it)
    data = ["data.train.uri=/train", "data.val.uri=/val", "train_vae.loss.lpips.weight=0", "name=rates", "concurrent=3"]
    found.run = lambda *more: sweep.sweep(configured(tmp_path, *data, "space.optim.lr=[1e-4, 1e-3]", *more))
    found.folder = tmp_path / "rates"
    return found


@pytest.mark.parametrize(("metric", "rate"), [("psnr", 1e-3), ("ssim", 1e-4)])
def test_a_sweep_leaves_results_configs_and_the_best(whole, tmp_path, metric, rate, capsys):
    results = whole.run(f"metric={metric}", "seeds=[0, 1]")
    assert [(each["row"], each["seed"]) for each in results] == [
        (f"optim.lr={value}", seed) for value in ("0.0001", "0.001") for seed in (0, 1)
    ]
    assert json.loads((whole.folder / "results.json").read_text()) == results
    best = yaml.safe_load((whole.folder / "best.yaml").read_text())
    assert (best["optim"]["lr"], best["name"], best["root"]) == (rate, "rates-best", str(tmp_path))
    assert "tracking" not in best
    configs = sorted((whole.folder / "configs").iterdir())
    kept = [yaml.safe_load(path.read_text()) for path in configs]
    assert {(each["optim"]["lr"], each["seed"]) for each in kept} == {(r, s) for r in (1e-4, 1e-3) for s in (0, 1)}
    assert whole.asked == [3, ({"root": str(tmp_path)}, {"data.train.uri": "/train", "data.val.uri": "/val"})]
    assert whole.finished == ["FINISHED"]
    shown = capsys.readouterr().out
    assert "sweep rates: 4 trainings, 5 at a time" in shown
    assert "left out" not in shown


def test_a_sweep_with_failures_leaves_what_is_done_and_tells(whole):
    whole.failed.append("  a row: the disk is full")
    with pytest.raises(
        sweep.UserError, match="1 of 2 trials failed; the same command continues with them:\n  a row: the"
    ):
        whole.run()
    assert whole.finished == ["FAILED"]
    assert len(json.loads((whole.folder / "results.json").read_text())) == 2


def test_a_population_is_there_at_a_time(whole, monkeypatch):
    monkeypatch.setattr(sweep, "_results", lambda folder, trials, order: [])
    whole.run("scheduler=pbt", "trials=6")
    assert whole.asked[0] == 6
    assert not (whole.folder / "best.yaml").exists()


def test_a_sweep_that_is_interrupted_is_killed(whole, monkeypatch):
    def interrupt(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "_tune", interrupt)
    with pytest.raises(KeyboardInterrupt):
        whole.run()
    assert whole.finished == ["KILLED"]


def test_a_table_of_costs_is_measured_by_one_job(tmp_path, monkeypatch, tracked):
    asked = []
    numbers = {"sd-vae": {"params_m": 34.0}, "S": {"params_m": 1.0}, "M": {"params_m": 32.0}}

    def measure(job):
        asked.append(job)
        return {"complexity": {model: numbers[model] for model in job.models}}

    monkeypatch.setattr("pipelines.evaluation.cost.complexity", measure)
    monkeypatch.setattr(mlflow_run, "start_run", lambda *given, **more: tracked.started.append(given) or Run())
    monkeypatch.setattr(mlflow_run, "finish", lambda run, status: tracked.closed.append(status))
    monkeypatch.setattr(mlflow_run, "Tracker", lambda run, system: tracked_by(tracked))
    more = ["table=3", "scale=smoke", "rows=[LiteVAE-S, LiteVAE-M]", "evaluate_complexity.repeats=5", "seeds=[2]"]
    results = sweep.sweep(configured(tmp_path, *more))
    (job,) = asked
    assert (job.models, job.batch_size, job.repeats, job.resolution) == (["S", "M"], 2, 5, 64)
    assert (job.out, job.tracking.enabled) == (f"{tmp_path}/table-3-smoke/complexity", False)
    assert results == [
        {"row": f"LiteVAE-{model}", "seed": 2, "metrics": {"eval/params_m": numbers[model]["params_m"]}, "remarks": []}
        for model in "SM"
    ]
    assert json.loads((tmp_path / "table-3-smoke/results.json").read_text()) == results
    assert [given[4]["model"] for given in tracked.started[1:]] == ["S", "M"]
    assert tracked.logged == [({"eval/params_m": 1.0}, 0), ({"eval/params_m": 32.0}, 0)]
    assert tracked.closed == ["FINISHED"] * 3


class Run:
    run_id, experiment = "parent", "of the sweep"


def tracked_by(found):
    return SimpleNamespace(metrics=lambda values, step: found.logged.append((values, step)), close=found.closed.append)
