"""The loop that drives a training, Ray Train's run around it, and what its workers do at the edges: with a small task
that notes what it is asked, a clock of its own, and Ray's parts stood in for."""

import json
import os
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from litevae.errors import UserError
from litevae.order import VERSION
from pipelines.runtime import mlflow_run, progress, prometheus, shutdown
from pipelines.runtime.cli import load
from pipelines.runtime.cluster import Placement
from pipelines.runtime.schema import values_to_keep
from pipelines.training import checkpoint, compiling, interruptions, launch, loop, may_change, optimizer, step_metrics
from pipelines.training.config import Loop, Optimizer, TrainLDM, TrainVAE
from pipelines.training.interruptions import StopRequest
from pipelines.training.run_files import STATE
from pipelines.training.worker_setup import TrainSetup
from tests.setups import leave_checkpoint, untracked

WAIT, STEP = 0.5, 1.5  # seconds for a batch, and for a step unless the task says otherwise


@pytest.fixture
def clock(monkeypatch):
    """Moves when the task does something."""
    clock = SimpleNamespace(now=1000.0)
    for module in (interruptions, progress, step_metrics):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


class Task:
    """One weight, moved by what was drawn at random; `calls` notes what the task was asked."""

    digest = "of the data"
    order = VERSION

    def __init__(self, clock, *stages):
        self.stages, self._clock, self.validated = list(stages), clock, "2 images of 8 px"
        self.model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.model.weight)
        self.optimizer = optimizer.Adam(self.model, Optimizer())
        self.calls, self.drawn = [], {}
        self.seconds, self.then, self.counts = {}, {}, {}  # by position
        self.picture = np.zeros((4, 6, 3), np.uint8)
        self.streak = 0

    def begin(self, stage):
        self._clock.now += 5000
        self.calls.append(("begin", stage))

    def batches(self, start, end, batch_size):
        self.calls.append(("batches", start, end, batch_size))
        for at in range(start, end, batch_size):
            self._clock.now += WAIT
            yield f"batch {at}"

    def step(self, batch, images):
        assert batch == f"batch {images}"
        self.calls.append(("step", images))
        self._clock.now += self.seconds.get(images, STEP)
        self.drawn[images] = torch.initial_seed(), float(torch.rand(()))
        (self.model.weight * self.drawn[images][1]).sum().backward()
        self.optimizer.step(0.1)
        self.then.get(images, lambda: None)()
        return {"loss": torch.tensor(float(images)), "odd": torch.tensor(float("nan"))}

    def count(self):
        self.calls.append(("count",))
        return {"bad_images": torch.tensor(3.0)}

    def check(self, means):
        self.calls.append(("check", means))

    def skipped(self):
        self.calls.append(("skipped",))
        return self.streak

    def validate(self):
        self.calls.append(("validate",))
        self._clock.now += 300
        return {"psnr": float(len(self.calls))}, self.picture

    def state(self):
        self.calls.append(("state",))
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def exports(self):
        return {"model": self._export, "model-more": lambda folder: (folder / "more").write_text("more")}

    def _export(self, folder):
        self.calls.append(("export",))
        (folder / "weight").write_text(str(self.model.weight.item()))

    def of(self, *names):
        """Calls of these names."""
        return [call for call in self.calls if call[0] in names]


class Told(mlflow_run.Tracker):
    """A tracker that notes besides."""

    def __init__(self, handle):
        super().__init__(handle)
        self.told, self.closed = [], False
        Told.last = self

    def dataset(self, *arguments):
        self.told.append(("dataset", *arguments))

    def artifacts(self, path, folder=""):
        self.told.append(("artifacts", Path(path), folder))

    def close(self, status=None):
        self.closed = True
        super().close(status)


@pytest.fixture
def run(clock, tmp_path, monkeypatch):
    """Drives a task as the worker `rank` does. What it reports goes into the run's folder, and into `run.reports`."""
    folder, shown = tmp_path / "loop", []
    folder.mkdir()

    def report(metrics, checkpoint, checkpoint_dir_name):
        clock.now += 700
        made = Path(checkpoint.path) if checkpoint else None
        if made:
            shutil.copytree(made, folder / checkpoint_dir_name)
        drive.reports.append((metrics, checkpoint_dir_name, made))

    monkeypatch.setattr("ray.train.report", report)
    monkeypatch.setattr("ray.train.get_checkpoint", lambda: None)
    monkeypatch.setattr(mlflow_run, "Tracker", Told)
    monkeypatch.setattr(interruptions, "LOOK_EVERY", 0.0)
    monkeypatch.setattr(prometheus, "TrainingGauges", lambda name: SimpleNamespace(
        show=lambda *arguments: shown.append((name, *arguments))
    ))  # fmt: skip

    def drive(task, *more, rank=0, **setup):
        words = ["name=loop", "loop.log_every=2", "loop.checkpoint_every=1000", "loop.val_every=0", *more]
        config = load(TrainLDM, None, words)
        given = {"config": {}, "folder": str(folder), "data": "/data/photos", "handle": untracked(folder)}
        setup = TrainSetup(**given | setup)
        drive.config = config
        return loop.run(task, "a run", config, setup, rank, 1)

    drive.folder, drive.reports, drive.shown = folder, [], shown
    return drive


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- the schedule -------------------------------------------------------------------------------------------------


def test_a_run_of_two_stages_from_its_first_image_to_its_last(run, clock):
    task = Task(clock, (20, 8), (10, 4))
    task.seconds = {16: 3.5, 24: 7.5, 28: 7.5}
    result = run(task, "loop.checkpoint_every=16", "loop.val_every=12")
    assert task.of("begin", "batches", "step", "validate", "state") == [
        ("begin", 0), ("batches", 0, 20, 8), ("step", 0), ("step", 8), ("validate",), ("state",),
        ("step", 16), ("validate",), ("state",),  # the stage's end, with a whole batch
        ("begin", 1), ("batches", 24, 30, 4), ("step", 24), ("step", 28), ("validate",), ("state",),
    ]  # fmt: skip
    psnr = [n + 1.0 for n, call in enumerate(task.calls) if call == ("validate",)]
    assert result == {"images": 32, "stopped": False, "images_per_second": 2.0, "loss": 26.0, "psnr": psnr[-1]}

    speed = ("train/images_per_second", "train/waiting_for_data")
    lines = [{key: value for key, value in line.items() if key != "time"} for line in logged(run.folder)]
    expected = []
    for n, (step, loss, rate, waited) in enumerate([(16, 4, 4, 0.25), (24, 16, 2, 0.125), (32, 26, 0.5, 0.0625)]):
        means = {"train/loss": loss, "train/bad_images": 3}  # and not `odd`, which is NaN
        expected += [{"step": step, **means, **dict(zip(speed, (rate, waited), strict=True))}]
        expected += [{"step": step, "val/psnr": psnr[n]}]
    assert lines == expected

    names = [f"checkpoint-{images:012d}" for images in (16, 24, 32)]
    assert [name for _, name, _ in run.reports] == names
    assert [metrics for metrics, _, _ in run.reports] == [
        {"images": 16, "loss": 4.0, "psnr": psnr[0]},
        {"images": 24, "loss": 16.0, "psnr": psnr[1]},
        {"images": 32, "loss": 26.0, "psnr": psnr[2]},
    ]
    assert not any(made.exists() for *_, made in run.reports)  # the folder that was handed over
    pictures = sorted(path.name for path in (run.folder / "images").iterdir())
    assert pictures == [f"val-picture-{images:012d}.png" for images in (16, 24, 32)]
    assert Told.last.told == [
        ("dataset", "photos", "of the data", "/data/photos"),
        ("artifacts", run.folder / "model", "model"),
        ("artifacts", run.folder / "model-more", "model-more"),
    ]
    assert Told.last.closed


def test_what_is_checked_and_exported_comes_before_the_checkpoint(run, clock):
    task = Task(clock, (16, 8))
    run(task, "loop.checkpoint_every=8", "loop.val_every=16")
    last = task.calls[next(n for n, call in enumerate(task.calls) if call == ("step", 8)) + 1 :]
    assert [name for name, *_ in last] == ["count", "check", "skipped", "validate", "export", "state"]
    assert task.of("check")[0][1].keys() == {"loss", "odd", "bad_images"}
    assert [call[1]["loss"] for call in task.of("check")] == [0.0, 8.0]
    assert float((run.folder / "model" / "weight").read_text()) == task.model.weight.item()
    assert (run.folder / "model-more" / "more").read_text() == "more"


@pytest.mark.parametrize(
    ("begin", "begun", "asked"),
    [
        (0, [0, 2], [("batches", 0, 22, 32), ("batches", 32, 50, 8)]),
        (20, [0], [("batches", 20, 22, 32)]),
        (24, [1, 2], [("batches", 24, 30, 4), ("batches", 32, 50, 8)]),
        (30, [2], [("batches", 30, 50, 8)]),
        (40, [2], [("batches", 40, 50, 8)]),
    ],
)
def test_a_stage_that_another_one_has_overrun_is_left_out(run, clock, begin, begun, asked):
    """The first stage's one batch of 32 reaches beyond the second's end, at 30."""
    task = Task(clock, (22, 32), (8, 4), (20, 8))
    if begin:
        state = checkpoint.save(task.state() | {"images": begin, "digest": task.digest})
        shutil.move(state, run.folder / f"checkpoint-{begin:012d}")
    run(task)
    assert [stage for _, stage in task.of("begin")] == begun
    assert task.of("batches") == asked


def test_losses_are_means_since_they_were_logged_last_and_validation_costs_no_speed(run, clock):
    task = Task(clock, (64, 8))
    result = run(task, "loop.log_every=4", "loop.val_every=24")  # at 24, 48 and 64, between the logs
    lines = [line for line in logged(run.folder) if "train/loss" in line]
    assert [(line["step"], line["train/loss"]) for line in lines] == [(32, 12.0), (64, 44.0)]
    assert [line["train/images_per_second"] for line in lines] == [4.0, 4.0]
    assert [line["train/waiting_for_data"] for line in lines] == [0.25, 0.25]
    assert result["images_per_second"] == 4.0
    assert [line["step"] for line in logged(run.folder) if "val/psnr" in line] == [24, 48, 64]


def test_the_speed_of_a_run_is_the_median_and_its_first_image_no_rate(run, clock):
    task = Task(clock, (40, 8))
    task.seconds = {0: 7.5, 8: 0.5, 16: 3.5, 24: 1.5, 32: 15.5}
    assert run(task, "loop.log_every=1")["images_per_second"] == 2.0  # of 1, 8, 2, 4, 0.5
    assert run(Task(clock, (40, 8)))["images_per_second"] == 0.0  # nothing was left


def test_a_cluster_is_shown_images_steps_and_means(run, clock):
    run(Task(clock, (20, 8), (12, 4)))
    means = {"bad_images": 3.0, "waiting_for_data": 0.25}
    shown = [(*rest, {key: value for key, value in found.items() if key != "odd"}) for *rest, found in run.shown]
    assert shown == [
        ("loop", 16, 2, means | {"loss": 4.0, "images_per_second": 4.0}),
        ("loop", 8, 1, means | {"loss": 16.0, "images_per_second": 4.0}),
        ("loop", 8, 2, means | {"loss": 26.0, "images_per_second": 2.0}),
    ]


def test_people_see_how_far_it_is(run, clock, capsys):
    task = Task(clock, (20, 8))
    task.seconds = {0: 39.5, 8: 4.5, 16: 9.5}
    run(task, "loop.log_every=1")
    # the stage's beginning, 5000 s, and the first step do not count; and the end is shown as 20, not 24
    assert capsys.readouterr().out.splitlines() == [
        "a run: 8 of 20 images, loss 0",
        "a run: 20 of 20 images, 0.800 images/s, loss 16",
    ]


def test_validation_is_not_counted_and_said_to_be_the_trainings(run, clock, capsys):
    task = Task(clock, (40, 8))
    task.seconds = dict.fromkeys(range(0, 40, 8), 7.5)  # and half a second of waiting: an image a second
    run(task, "loop.log_every=1", "loop.val_every=16")
    first, second, _ = (n + 1 for n, call in enumerate(task.calls) if call == ("validate",))
    assert capsys.readouterr().out.splitlines() == [
        "a run: 8 of 40 images, loss 0",
        f"a run: 24 of 40 images, 1.00 images/s, about 16 s left, loss 16, val psnr {first} (2 images of 8 px)",
        f"a run: 40 of 40 images, 1.00 images/s, loss 32, val psnr {second} (2 images of 8 px)",
    ]


@pytest.mark.parametrize(("gpu", "said"), [(True, 1), (False, 0)])
def test_on_gpus_rank_0_says_once_how_long_it_will_take(run, clock, capsys, gpu, said):
    task = Task(clock, (80, 8))
    task.seconds = {0: 999.5}  # the device's start
    run(task, "loop.log_every=1", gpu=gpu)
    shown = [line for line in capsys.readouterr().out.splitlines() if "will take" in line]
    assert shown == ["training on the 64 images that are left will take about 16 s on this machine"] * said


def test_on_a_terminal_the_bar_is_closed_whatever_happens(run, clock, monkeypatch):
    moved = []
    bar = SimpleNamespace(update=moved.append, close=lambda: moved.append("closed"), set_description=lambda text: None)
    monkeypatch.setattr("ray.experimental.tqdm_ray.tqdm", lambda **about: bar)
    run(Task(clock, (12, 8)), live=True)
    assert moved == [8, 4, "closed"]  # the last batch goes beyond the end
    task = Task(clock, (32, 8))
    task.then[16] = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run(task, live=True)
    assert moved[-1] == "closed"
    assert Told.last.closed


def test_without_a_picture_there_is_none(run, clock):
    task = Task(clock, (8, 8))
    task.picture = None
    run(task)
    assert not (run.folder / "images").exists()
    assert [line["step"] for line in logged(run.folder) if "val/psnr" in line] == [8]


def test_other_ranks_neither_log_nor_write(run, clock, capsys):
    task = Task(clock, (16, 8))
    result = run(task, "loop.checkpoint_every=8", "loop.val_every=8", rank=1)
    assert os.listdir(run.folder) == []
    assert [(metrics["images"], made) for metrics, _, made in run.reports] == [(8, None), (16, None)]
    assert task.of("state", "export") == []
    assert len(task.of("validate")) == len(task.of("check")) == len(task.of("count")) == 2  # with all others
    assert result["loss"] == 8.0
    assert capsys.readouterr().out == ""
    assert run.shown == []


# --- chance -------------------------------------------------------------------------------------------------------


def test_chance_depends_on_seed_position_and_rank(run, clock):
    def drawn(*more, rank=0):
        task = Task(clock, (32, 8))
        run(task, *more, rank=rank)
        shutil.rmtree(run.folder)
        run.folder.mkdir()
        return task.drawn

    runs = [drawn(), drawn("seed=1"), drawn(rank=1), drawn("seed=1", rank=1)]
    assert all(list(found) == [0, 8, 16, 24] for found in runs)
    for part in (0, 1):  # the seed, and what is drawn
        assert len({one[part] for found in runs for one in found.values()}) == 16
    assert drawn() == runs[0]


# --- checkpoints, and going on --------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_state_the_position_the_data_and_the_config(run, clock):
    task = Task(clock, (16, 8))
    run(task, "loop.checkpoint_every=8", "seed=3")
    state = checkpoint.load(str(run.folder / "checkpoint-000000000016"))
    assert (state["images"], state["digest"]) == (16, "of the data")
    assert state["config"] == values_to_keep(run.config)
    assert "tracking" not in state["config"]
    assert state["config"]["seed"] == 3
    assert torch.equal(state["model"]["weight"], task.model.weight)
    assert int(state["optimizer"]["state"][0]["step"]) == 2
    assert sorted(path.name[-2:] for path in run.folder.glob("checkpoint-*")) == ["08", "16"]


@pytest.mark.parametrize("listed", [True, False])
def test_a_run_goes_on_from_its_newest_checkpoint_to_the_same_weight(run, clock, monkeypatch, capsys, listed):
    """As Ray lists it, which is none of the folder's own then; or where Ray's list was lost."""
    whole = Task(clock, (48, 8))
    run(whole, "loop.checkpoint_every=8")
    assert "continues" not in capsys.readouterr().out
    shutil.rmtree(run.folder / "checkpoint-000000000048")
    shutil.rmtree(run.folder / "checkpoint-000000000040")
    if listed:
        import ray.train

        elsewhere = run.folder.parent / "elsewhere"
        (run.folder / "checkpoint-000000000024").rename(elsewhere)
        monkeypatch.setattr(ray.train, "get_checkpoint", lambda: ray.train.Checkpoint.from_directory(str(elsewhere)))
    else:
        (run.folder / "checkpoint-000000000099").mkdir()  # and this one is not whole
        (run.folder / "checkpoint-000000000099" / checkpoint.STATE).write_text("half")
    again = Task(clock, (48, 8))
    run.reports.clear()
    result = run(again, begin="/not/looked/at")
    at = 24 if listed else 32
    assert again.of("batches") == [("batches", at, 48, 8)]
    assert again.drawn == {images: drawn for images, drawn in whole.drawn.items() if images >= at}
    assert again.model.weight.item() == whole.model.weight.item()
    assert result["images"] == 48
    assert f"a run: continues after {at} images" in capsys.readouterr().out
    assert [metrics["images"] for metrics, _, _ in run.reports] == [48]


def test_only_rank_0_says_that_it_goes_on(run, clock, capsys):
    run(Task(clock, (16, 8)))
    capsys.readouterr()
    run(Task(clock, (24, 8)), rank=1)
    assert capsys.readouterr().out == ""


def test_a_run_of_an_earlier_version_keeps_its_order(run, clock):
    run(Task(clock, (16, 8)))
    path = run.folder / "checkpoint-000000000016" / STATE
    state = checkpoint.load(str(path.parent))
    assert state.pop("order") == VERSION
    torch.save(state, path)
    task = Task(clock, (32, 8))
    run(task)
    assert task.order == 1
    assert checkpoint.load(str(run.folder / "checkpoint-000000000032"))["order"] == 1  # and so does the next resume


def test_other_data_are_refused(run, clock):
    run(Task(clock, (16, 8)))
    task = Task(clock, (32, 8))
    task.digest = "of other data"
    with pytest.raises(UserError, match="the data are not those that run .*/loop was trained on.*Start a new run"):
        run(task)
    assert task.calls == []
    assert task.model.weight.item() == 1


def test_a_new_run_begins_with_anothers_checkpoint_of_other_data(run, clock, tmp_path):
    first = Task(clock, (16, 8))
    run(first)
    begin = tmp_path / "begin"
    (run.folder / "checkpoint-000000000016").rename(begin)
    task = Task(clock, (32, 8))
    task.digest = "of other data"
    assert run(task, begin=str(begin))["images"] == 32
    assert [images for _, images in task.of("step")] == [16, 24]
    assert checkpoint.load(str(run.folder / "checkpoint-000000000032"))["digest"] == "of other data"

    other = Task(clock, (64, 8))
    other.load = lambda state: state["discriminator"]
    (run.folder / "checkpoint-000000000032").rename(tmp_path / "away")
    with pytest.raises(UserError, match=f"^begin={begin} is a checkpoint of another model.*it has no 'discriminator'"):
        run(other, begin=str(begin))


def test_a_finished_run_exports_once_more_and_trains_no_further(run, clock):
    first = Task(clock, (16, 8))
    run(first)
    shutil.rmtree(run.folder / "model")
    run.reports.clear()
    again = Task(clock, (16, 8))
    result = run(again)
    assert result == {"images": 16, "stopped": False, "images_per_second": 0.0}
    assert again.of("begin", "step", "validate", "state") == []
    assert run.reports == []
    assert float((run.folder / "model" / "weight").read_text()) == first.model.weight.item()
    assert [folder for what, _, folder in Told.last.told[1:]] == ["model", "model-more"]


def test_a_checkpoint_that_does_not_fit_is_named_and_its_folder_not_left(run, clock, monkeypatch):
    made = []

    def full(metrics, checkpoint, checkpoint_dir_name):
        made.append(Path(checkpoint.path))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ray.train.report", full)
    with pytest.raises(UserError, match="loop/checkpoint-000000000016 can't be written: No space left.*make room"):
        run(Task(clock, (16, 8)))
    assert not made[0].exists()
    assert Told.last.closed


# --- what ends it early ---------------------------------------------------------------------------------------------


def test_a_request_to_stop_ends_in_a_checkpoint_and_the_run_goes_on_later(run, clock):
    task = Task(clock, (20, 8), (20, 4))
    task.then[8] = (run.folder / shutdown.FILE).touch
    result = run(task, "loop.log_every=100")
    assert result == {"images": 16, "stopped": True, "images_per_second": 4.0, "loss": 4.0}
    assert [name for _, name, _ in run.reports] == ["checkpoint-000000000016"]
    assert task.of("step", "begin", "validate", "export") == [("begin", 0), ("step", 0), ("step", 8)]
    assert [what for what, *_ in Told.last.told] == ["dataset"]
    assert not (run.folder / "model").exists()

    (run.folder / shutdown.FILE).unlink()
    again = Task(clock, (20, 8), (20, 4))
    assert run(again)["stopped"] is False
    assert again.of("batches") == [("batches", 16, 20, 8), ("batches", 24, 40, 4)]


def test_a_request_at_the_last_step_stops_nothing(run, clock):
    task = Task(clock, (16, 8))
    task.then[8] = (run.folder / shutdown.FILE).touch
    assert run(task)["stopped"] is False
    assert (run.folder / "model").exists()
    assert len(Told.last.told) == 3


def test_too_many_skipped_steps_end_a_run_with_its_last_checkpoint(run, clock):
    task = Task(clock, (64, 8))
    task.then |= {24: lambda: setattr(task, "streak", 3), 40: lambda: setattr(task, "streak", 4)}
    with pytest.raises(UserError, match=r"^4 steps in a row, up to 48 images.*checkpoint at 32 is kept"):
        run(task, "loop.max_skipped=4", "loop.checkpoint_every=16")
    assert [metrics["images"] for metrics, _, _ in run.reports] == [16, 32]
    assert Told.last.closed


def test_what_to_do_after_skipped_steps_can_be_done(run, clock):
    """A run of train_vae keeps its learning rate, so that a new one must go on from its checkpoint."""
    task = Task(clock, (64, 8))
    task.then |= {8: lambda: setattr(task, "streak", 4)}
    with pytest.raises(UserError, match=r"there is no checkpoint yet\. .*run the same command again: it begins anew$"):
        run(task, "loop.max_skipped=4")
    fields = {"optim.lr", "optim.clip", "loop.precision"}
    assert fields <= {*may_change.LDM}
    assert not fields & {*may_change.VAE}
    for cls, advice in (
        (TrainLDM, "run the same command again: it continues from there"),
        (TrainVAE, "continue from there in a new run: name=NEW begin=/r/checkpoint-000000000048"),
    ):
        state = SimpleNamespace(saved=48, config=load(cls), setup=SimpleNamespace(folder="/r"))
        assert loop._Run._again(state) == advice


def test_what_the_task_finds_wrong_is_not_kept(run, clock):
    task = Task(clock, (64, 8))

    def check(means):
        if means["loss"] > 10:
            raise UserError("too many bad images")

    task.check = check
    with pytest.raises(UserError, match="too many bad images"):
        run(task, "loop.checkpoint_every=16")
    assert [metrics["images"] for metrics, _, _ in run.reports] == [16]


def test_a_notice_that_a_node_goes_saves_once(run, clock, monkeypatch, capsys):
    notices = iter([None, "a", "a", "b", None, None])
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: next(notices))
    run(Task(clock, (48, 8)), "loop.log_every=1", nodes=2)
    assert [metrics["images"] for metrics, _, _ in run.reports] == [16, 32, 48]
    told = [line for line in capsys.readouterr().out.splitlines() if "taken away" in line]
    assert told == [f"a run: a node will be taken away; writing a checkpoint after {n} images" for n in (16, 32)]


def test_on_one_node_no_notice_is_asked_for(run, clock, monkeypatch):
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: "a")
    run(Task(clock, (32, 8)), "loop.log_every=1")
    assert [metrics["images"] for metrics, _, _ in run.reports] == [32]


# --- several ranks ----------------------------------------------------------------------------------------------------


def test_all_ranks_hear_of_a_request_at_the_same_step(tmp_path, monkeypatch):
    sent, told = [], {0: -1, 1: -1}

    def broadcast(tensor, src, group, async_op):
        assert (src, group, async_op) == (0, "gloo", True)
        rank, told[rank] = asking, told[asking] + 1
        number = told[rank]
        if rank == 0:
            sent.append(float(tensor))
        return SimpleNamespace(wait=lambda: tensor.fill_(sent[number]))

    monkeypatch.setattr(interruptions, "LOOK_EVERY", 0.0)
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend: backend)
    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    ranks = [StopRequest(str(tmp_path), rank, 2) for rank in (0, 1)]
    heard = []
    for step in range(6):
        if step == 2:
            (tmp_path / shutdown.FILE).touch()
        row = []
        for asking in (0, 1):
            row.append(ranks[asking].heard())
        heard.append(row)
    assert heard == [[False, False]] * 3 + [[True, True]] * 3


def test_one_rank_looks_for_a_request_now_and_then_and_remembers_it(tmp_path, clock, monkeypatch):
    looks = []
    monkeypatch.setattr(os.path, "exists", lambda path: looks.append(clock.now) or os.access(path, os.F_OK))
    watch = StopRequest(str(tmp_path), 0, 1)
    for n in range(8):
        assert watch.heard() == (n >= 6)
        clock.now += 0.2
        if n == 4:
            (tmp_path / shutdown.FILE).touch()
    assert looks == pytest.approx([1000, 1000.6, 1001.2])
    (tmp_path / shutdown.FILE).unlink()
    clock.now += 10
    assert watch.heard()


def test_gradients_cross_the_network_with_the_last_micro_batch_only():
    held = []

    class Net:
        def no_sync(self):
            held.append(True)
            return self

        def __enter__(self):
            held.append("in")

        def __exit__(self, *_):
            held.append("out")

    with compiling.synced(Net(), last=True):
        assert held == []
    with compiling.synced(Net(), last=False):
        assert held == [True, "in"]
    with compiling.synced(object(), last=False):
        pass
    assert held == [True, "in", "out"]


# --- a worker ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """`training.work` on a rank, with a task that ends in `error`."""
    import ray.train
    import ray.train.torch

    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", lambda count: work.threads.append(count))
    monkeypatch.setattr("logging.disable", lambda level: None)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("meta"))
    config = load(TrainLDM)

    def work(error=None, rank=0, world=1):
        context = SimpleNamespace(get_world_rank=lambda: rank, get_world_size=lambda: world)
        monkeypatch.setattr(ray.train, "get_context", lambda: context)

        def ran(task, *arguments):
            if error is not None:
                raise error
            return {"task": task, "arguments": arguments}

        monkeypatch.setattr(launch, "run", ran)
        return launch.work(lambda *made: made, config, "a run", setup)

    setup = TrainSetup(config={}, folder=str(tmp_path), data="", handle=untracked(), threads=7)
    work.folder, work.threads, work.config, work.setup = tmp_path, [], config, setup
    yield work
    assert torch.get_num_threads() == threads


def test_a_worker_makes_its_task_and_runs_it(worker):
    found = worker(rank=1, world=3)
    assert found["task"] == (worker.config, worker.setup, 1, 3, torch.device("meta"))
    assert found["arguments"] == ("a run", worker.config, worker.setup, 1, 3)
    assert worker.threads == [7]


def test_a_lone_worker_returns_the_users_mistake(worker):
    assert worker(UserError("no such column")) == {"error": "no such column"}
    assert os.listdir(worker.folder) == []


def test_one_of_several_workers_leaves_it_for_all_which_return_it_when_they_begin_anew(worker):
    with pytest.raises(RuntimeError, match="no such column"):
        worker(UserError("no such column"), rank=1, world=2)
    assert (worker.folder / launch.ERROR).read_text() == "no such column"
    for rank in (0, 1):
        assert worker(AssertionError("it ran"), rank=rank, world=2) == {"error": "no such column"}


def test_what_is_no_mistake_of_the_users_is_raised(worker):
    for world in (1, 2):
        with pytest.raises(ValueError, match="a fault of ours"):
            worker(ValueError("a fault of ours"), world=world)
    assert os.listdir(worker.folder) == []


# --- Ray Train's run --------------------------------------------------------------------------------------------------


@pytest.fixture
def fitted(tmp_path, monkeypatch):
    """`training.fit` with a trainer that notes what it is made with, and ends as it is told."""
    import ray
    import ray.train.torch

    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    handle = untracked(folder)

    class Trainer:
        def __init__(self, worker, **given):
            fit.given = given | {"worker": worker}

        def fit(self):
            fit.left = sorted(os.listdir(folder))
            found = fit.ends()
            return SimpleNamespace(return_value=found)

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)
    monkeypatch.setattr(ray, "nodes", lambda: ["one", "two", "three"])
    monkeypatch.setattr(mlflow_run, "finish", lambda *arguments: fit.ended.append(arguments))

    def fit(ends, options=None, callbacks=(), **more):
        fit.ends = ends if callable(ends) else lambda: ends
        placement = Placement(**({"workers": 2, "gpu": False, "threads": 3} | more))
        setup = TrainSetup(config={}, folder=str(folder), data="d", handle=handle)
        return launch.fit(print, setup, placement, options or Loop(), callbacks)

    fit.folder, fit.ended, fit.handle = folder, [], handle
    return fit


def done(**more):
    return {"images": 16, "stopped": False, "loss": 1.0} | more


def test_ray_train_gets_what_the_config_says(fitted, capsys):
    import ray.train

    callback = ray.train.UserCallback()
    result = fitted(done(), Loop(max_restarts=5, keep=4), [callback], gpu=True, labels={"pool": "a"})
    given = fitted.given
    assert given["worker"] is print
    expected = TrainSetup(
        config={},
        folder=str(fitted.folder),
        data="d",
        handle=fitted.handle,
        threads=3,
        live=False,
        gpu=True,
        nodes=3,
    )
    assert given["train_loop_config"] == {"setup": expected}
    scaling, run = given["scaling_config"], given["run_config"]
    assert (scaling.num_workers, scaling.use_gpu, scaling.resources_per_worker) == (2, True, {"CPU": 1.0, "GPU": 1.0})
    assert scaling.label_selector == {"pool": "a"}
    assert (run.name, run.storage_path) == ("mine", str(fitted.folder.parent))
    assert run.failure_config.max_failures == 5
    assert run.checkpoint_config.num_to_keep == 4
    assert run.callbacks == [callback]
    assert given["torch_config"].timeout_s == 600
    assert given["torch_config"].backend_cls.__name__ == "_TorchBackend"
    assert result == {
        "images": 16, "loss": 1.0, "model": str(fitted.folder / "model"),
        "tracking": str(fitted.folder / "metrics.jsonl"),
    }  # fmt: skip
    assert fitted.ended == [(fitted.handle, "FINISHED")]
    shown = capsys.readouterr().out
    assert f"run: {fitted.folder}\nMLflow: {fitted.folder}/metrics.jsonl" in shown


@pytest.mark.parametrize(
    ("placement", "workers", "group"),
    [({"workers": 1}, 1, False), ({"workers": 4}, 4, True), ({"workers": 4, "min_workers": 2}, (2, 4), True),
     ({"workers": 1, "min_workers": 1}, (1, 1), True)],
)  # fmt: skip
def test_workers_meet_only_where_there_may_be_several(fitted, placement, workers, group):
    fitted(done(), **placement)
    scaling, torch_config = fitted.given["scaling_config"], fitted.given["torch_config"]
    assert scaling.num_workers == workers
    assert scaling.label_selector is None
    assert (scaling.use_gpu, scaling.resources_per_worker) == (False, {"CPU": 1.0})
    assert scaling.elastic_resize_monitor_interval_s == launch.RESIZE_EVERY
    assert (torch_config.backend_cls.__name__ == "_TorchBackend") == group


def test_what_a_worker_found_is_the_users_and_the_run_failed(fitted):
    with pytest.raises(UserError, match="^no such column$"):
        fitted({"error": "no such column"})
    assert fitted.ended == [(fitted.handle, "FAILED")]


def test_a_run_that_was_asked_to_stop_says_where_it_goes_on(fitted):
    def asked():
        (fitted.folder / shutdown.FILE).write_text("143")
        return done(stopped=True, images=1600)

    with pytest.raises(shutdown.Stopped, match="stopped after 1,600 images; the checkpoint is in .*/mine") as stopped:
        fitted(asked)
    assert stopped.value.code == 143
    assert fitted.ended == [(fitted.handle, "KILLED")]
    assert os.listdir(fitted.folder) == []


def test_an_interrupt_is_one_and_no_request_is_left(fitted):
    def interrupted():
        (fitted.folder / shutdown.FILE).touch()
        (fitted.folder / launch.ERROR).touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(interrupted)
    assert fitted.ended == [(fitted.handle, "KILLED")]
    assert os.listdir(fitted.folder) == []


def test_requests_and_errors_of_an_earlier_run_are_not_for_this_one(fitted):
    (fitted.folder / shutdown.FILE).touch()
    (fitted.folder / launch.ERROR).write_text("an old one")
    fitted(done())
    assert fitted.left == []


def test_what_ray_train_gives_up_names_the_rank_and_the_cause(fitted):
    import ray.train

    def failed(*failures):
        error = ray.train.TrainingFailedError("a training failed\nout of memory")
        if failures:
            error.worker_failures = dict(failures)
        raise error

    with pytest.raises(UserError, match="^training failed: out of memory; there is no checkpoint yet, so the same"):
        fitted(failed)
    leave_checkpoint(fitted.folder)
    for failures, words in (
        ([(1, RuntimeError("a\nno memory left\n")), (0, RuntimeError("b"))], "on rank 1: no memory left"),
        ([(2, RuntimeError())], r"on rank 2: \['RuntimeError\(\)'\]|on rank 2: .*"),
        ([], ": out of memory"),
    ):
        with pytest.raises(UserError, match=f"^training failed ?{words}; the last checkpoint in .*/mine is kept"):
            fitted(lambda failures=failures: failed(*failures))
    assert [status for _, status in fitted.ended] == ["FAILED"] * 4


# --- small parts ------------------------------------------------------------------------------------------------------


def test_progress_is_a_line_now_and_then(clock, capsys):
    shown = progress.Progress("job", 2000, 400, live=False)
    for seconds, images in ((9, 600), (2, 700), (5, 900), (6, 1000), (1, 2000)):
        clock.now += seconds
        shown.update(images, "loss 0.1235", loss=0.123456)
    shown.close()
    assert capsys.readouterr().out.splitlines() == [
        "job: 700 of 2,000 images, 50.0 images/s, about 26 s left, loss 0.1235",
        "job: 1,000 of 2,000 images, 30.8 images/s, about 32 s left, loss 0.1235",
        "job: 2,000 of 2,000 images, 100 images/s, loss 0.1235",
    ]


def test_the_rate_is_that_of_the_last_minute_without_the_start(clock):
    rate = progress.RecentRate()
    assert rate.value == 0
    rate.add(0, 1000)
    assert rate.value == 0  # one moment has no rate
    for second in range(1, 101):
        rate.add(second, 1000 + 10 * second)
    assert rate.value == 10
    for second in range(101, 201):
        rate.add(second, 2000 + 2 * (second - 100))
        if second == 130:
            assert rate.value == pytest.approx(6, abs=0.3)  # half a minute of either
    assert rate.value == 2  # for longer than a minute
    rate.leave_out(5000)
    rate.add(5001, 2202)
    assert rate.value == 2


def test_a_rate_of_burst_steps_is_measured_too():
    rate = progress.RecentRate()
    for moment in (0.0, 0.25, 0.5, 0.75):
        rate.add(moment, int(40 * moment))
    assert rate.value == 40


def test_lines_come_less_often_as_a_job_goes_on(clock, capsys):
    shown = progress.Progress("job", 10**6, 0, live=False)
    for second in range(3600):
        clock.now += 1
        shown.update(second)
    count = len(capsys.readouterr().out.splitlines())
    assert 60 < count < 120  # one every 10 seconds would be 360


@pytest.mark.parametrize(
    ("rate", "text"), [(0.02571, "0.0257"), (2.414, "2.41"), (31.84, "31.8"), (99.97, "100"), (1824.3, "1,824")]
)
def test_a_speed_has_three_digits(rate, text):
    assert progress.rounded(rate) == text


def test_what_collectors_of_logs_get(clock, capsys, monkeypatch):
    monkeypatch.setenv("RAY_LOGGING_CONFIG_ENCODING", "JSON")
    shown = progress.Progress("job", 100, 0, live=False)
    for images in (10, 60):
        clock.now += 10
        shown.update(images, "loss 0.5, and more", loss=0.5)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first.keys() == second.keys() - {"images_per_second"}
    about = ("job", "images", "total", "loss", "images_per_second", "message")
    assert [second[key] for key in about] == [
        "job", 60, 100, 0.5, 5.0, "job: 60 of 100 images, 5.00 images/s, about 8 s left, loss 0.5, and more",
    ]  # fmt: skip


def test_progress_is_a_bar_on_a_terminal(clock, monkeypatch, capsys):
    moved = []

    class Bar:
        def __init__(self, desc, total, unit):
            moved.append((desc, total, unit))

        def update(self, by):
            moved.append(by)

        def set_description(self, text):
            moved.append(text)

        def close(self):
            moved.append("closed")

    monkeypatch.setattr("ray.experimental.tqdm_ray.tqdm", Bar)
    shown = progress.Progress("job", 100, 40, live=True)
    clock.now += 100
    for done_so_far in (50, 58, 100):
        shown.update(done_so_far, "loss 1" if done_so_far > 50 else "")
    shown.close()
    name = "job, from 40 on"  # earlier images would count for the bar's speed
    assert moved == [(name, 60, " images"), 10, f"{name}, loss 1", 8, f"{name}, loss 1", 42, "closed"]
    assert capsys.readouterr().out == ""


def test_the_mean_of_micro_batches():
    one = {"loss": torch.tensor(1.0, requires_grad=True), "kl": torch.tensor(2.0)}
    other = {"loss": torch.tensor(4.0), "kl": torch.tensor(float("nan"))}
    assert not step_metrics.mean_of([one])["loss"].requires_grad
    assert {name: float(value) for name, value in step_metrics.mean_of([one]).items()} == {"loss": 1, "kl": 2}
    assert {name: float(value) for name, value in step_metrics.mean_of([one, other]).items()} == {"loss": 2.5, "kl": 2}


def test_the_newest_checkpoint_is_the_last_whole_one(tmp_path):
    assert checkpoint.newest(str(tmp_path)) == ""
    for images in (96, 128, 1024):
        folder = tmp_path / f"checkpoint-{images:012d}"
        folder.mkdir()
        with zipfile.ZipFile(folder / checkpoint.STATE, "w") as file:
            file.writestr("a", "b")
    (tmp_path / "checkpoint-000000002048").mkdir()
    (tmp_path / "checkpoint-000000004096").mkdir()
    (tmp_path / "checkpoint-000000004096" / checkpoint.STATE).write_text("half")
    assert checkpoint.newest(str(tmp_path)) == str(tmp_path / "checkpoint-000000001024")
