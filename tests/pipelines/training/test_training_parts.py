"""The trainers' shared parts: batches, schedule, checkpoints, and when a run may go on."""

import copy
import os
import pickle

import numpy as np
import pytest
import torch
import yaml

from litevae import order
from litevae.errors import UserError
from pipelines.runtime.cli import load
from pipelines.runtime.schema import Ray
from pipelines.training import checkpoint, compiling, launch, loop, optimizer, ranks, run_folder, step_metrics
from pipelines.training.config import Optimizer, TrainLDM, TrainVAE
from pipelines.training.ldm import MAY_CHANGE, MAY_CHANGE_CACHED
from tests.setups import leave_checkpoint


def test_batches_are_whole_and_go_on_at_any_position():
    steps = list(order.batch_positions(0, 20, 8))
    assert [list(step) for step in steps] == [[*range(8)], [*range(8, 16)], [*range(16, 24)]]
    assert list(order.batch_positions(8, 20, 8)) == steps[1:]


def test_due_where_a_multiple_was_passed():
    assert [n for n in range(0, 100, 16) if loop.due(n, n + 16, 40)] == [32, 64]
    assert loop.due(0, 40, 40)
    assert not loop.due(40, 56, 40)
    assert not loop.due(0, 10**9, 0)


def test_the_rate_warms_up_and_falls():
    config = Optimizer(warmup=100, schedule="cosine")
    factors = [optimizer.learning_rate_factor(config, n, 1100) for n in (0, 50, 100, 600, 1100)]
    assert factors == pytest.approx([1 / 101, 51 / 101, 1, 0.5, 0])
    assert optimizer.learning_rate_factor(config, 1300, 1100) == 0  # a last batch that goes beyond the end
    assert optimizer.learning_rate_factor(Optimizer(schedule="cosine"), 0, 0) == 1
    assert optimizer.learning_rate_factor(Optimizer(), 10**9, 1) == 1


def test_seeds_differ_and_stay():
    seeds = [order.seed_for(seed, position) for seed in range(10) for position in range(100)]
    assert len(set(seeds)) == 1000
    assert seeds[0] == order.seed_for(0, 0)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({order.seed_for(*key) for key in ((1, 2, 3), (1, 3, 2), (3, 2, 1), (1, 2), (1, 2, 4))}) == 5


def test_seeds_are_fixed_for_ever():
    """A resumed run must draw what the version that started it would have drawn."""
    assert [order.seed_for(0, 0), order.seed_for(0, 16, 1), order.seed_for(7, 2**40)] == [
        7896617691693857887, 6027083068679656692, 2079425455804338922,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 100, Ray(workers=4), 1), "does not divide by ray.workers=4"),
        ((8, 100, Ray(workers=2), 3), "does not divide by ray.workers=2 x optim.accumulate=3"),
        ((6, 100, Ray(workers=4, min_workers=2), 1), "does not divide by ray.workers=4 .any of"),
        ((64, 32, Ray(), 1), "larger than the data: 32 images"),
        ((33, 32, Ray(), 1), "larger than the data: 32 images"),
        ((16, 100, Ray(workers=4, min_workers=2), 1), "ray.workers=3 .any of ray.min_workers=2 to 4"),
    ],
)
def test_impossible_batches(arguments, message):
    with pytest.raises(UserError, match=f"^batch=.*{message}"):
        launch.check_batch("batch", *arguments)


def test_a_batch_may_be_all_of_the_data():
    launch.check_batch("batch", 36, 36, Ray(workers=3, min_workers=1), 2)


def test_totals_are_means_since_the_last_look():
    totals = step_metrics.Totals()
    for value in (1.0, 2.0, 6.0):
        totals.add({"loss": torch.tensor(value, requires_grad=True)})
    totals.add({"late": torch.tensor(5.0)})
    means = totals.means()
    assert {key: float(value) for key, value in means.items()} == {"loss": 3.0, "late": 5.0}
    assert not means["loss"].requires_grad
    assert totals.means() == {}


def test_totals_count_a_metric_in_every_step_that_has_it():
    totals = step_metrics.Totals()
    for values in ({"loss": 1.0}, {"loss": 3.0, "r1": 7.0}, {}, {"loss": 8.0}, {"loss": 4.0, "r1": 9.0}):
        totals.add({name: torch.tensor(value) for name, value in values.items()})
    assert {key: float(value) for key, value in totals.means().items()} == {"loss": 4.0, "r1": 8.0}


def test_what_is_not_finite_counts_neither_in_totals_nor_over_ranks(monkeypatch):
    totals = step_metrics.Totals()
    for value in (1.0, float("nan"), 3.0, float("inf")):
        totals.add({"loss": torch.tensor(value), "empty": torch.tensor(float("nan"))})
    means = totals.means()
    assert float(means["loss"]) == 2
    assert means["empty"].isnan()

    def gather(into, values):
        into[:] = [values, [{"loss": 4.0, "empty": float("nan")}]]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    over_ranks = ranks.mean_over_ranks(means)
    assert over_ranks["loss"] == 3
    assert np.isnan(over_ranks["empty"])


def linear(values):
    model = torch.nn.Linear(len(values), 1, bias=False)
    model.weight = torch.nn.Parameter(torch.tensor([values]))
    return model


def test_adam_is_torchs_adam_without_decay():
    model, weight = linear([1.0, 1.0, 1.0]), torch.nn.Parameter(torch.ones(1, 3))
    ours = optimizer.Adam(model, Optimizer(lr=1.0))
    theirs = torch.optim.Adam([weight], betas=(0.5, 0.9))
    for rate in (1e-4, 3e-4, 2e-4):  # each step's own
        model.weight.grad, weight.grad = model.weight.detach() * 2, weight.detach() * 2
        ours.step(rate)
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
    torch.testing.assert_close(model.weight, weight, rtol=0, atol=1e-7)


def test_adam_clips_and_reports_the_norm():
    model, clipped = linear([0.5, 0.5]), linear([0.5, 0.5])
    model.weight.grad, clipped.weight.grad = torch.tensor([[0.6, 0.8]]), torch.tensor([[3.0, 4.0]])
    ours = [optimizer.Adam(each, Optimizer(clip=1.0)) for each in (model, clipped)]
    norms = [float(each.step(1.0)["gradient_norm"]) for each in ours]
    assert norms == pytest.approx([1, 5])
    states = [each.state_dict()["state"][0]["exp_avg"] for each in ours]
    torch.testing.assert_close(*states, rtol=1e-5, atol=0)
    assert clipped.weight.grad is None


def test_a_step_whose_gradient_is_not_finite_changes_nothing_and_is_counted():
    model = linear([1.0, 2.0])
    adam = optimizer.Adam(model, Optimizer(clip=1.0))

    def step(*gradient):
        model.weight.grad = torch.tensor([gradient])
        return float(adam.step(0.1)["skipped_steps"])

    assert step(1.0, 1.0) == 0
    before = copy.deepcopy([model.state_dict(), adam.state_dict()])
    assert [step(1.0, float("nan")), step(float("inf"), 0.0)] == [1, 1]
    after = [model.state_dict(), adam.state_dict()]
    assert torch.equal(before[0]["weight"], after[0]["weight"])
    for key in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(before[1]["state"][0][key], after[1]["state"][0][key])
    assert adam.skipped() == 2
    assert adam.skipped() == 2  # they go on
    assert step(1.0, 1.0) == 0
    assert not torch.equal(before[0]["weight"], model.weight)
    assert step(float("nan"), 1.0) == 1
    assert adam.skipped() == 2
    assert adam.skipped() == 1


# --- checkpoints --------------------------------------------------------------------------------------------------


def test_training_takes_channels_last_where_it_is_compiled_on_a_gpu():
    formats = {
        (device, compiled): compiling.memory_format(torch.device(device), compiled)
        for device in ("cpu", "cuda")
        for compiled in (False, True)
    }
    assert [where for where, found in formats.items() if found == torch.channels_last] == [("cuda", True)]


def test_networks_are_compiled_by_a_pytorch_with_one_limit_for_all(monkeypatch):
    """As before 2.14: torch.compile takes no limit of its own."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, *, dynamic: compile(model, dynamic=dynamic, backend="eager"))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    part, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    wanted = part(x)
    compiling.compile_parts(part, None)
    assert torch._dynamo.config.recompile_limit == compiling.RECOMPILE_LIMIT
    assert torch.equal(part(x), wanted)
    torch._dynamo.reset()


def test_state_comes_back(tmp_path):
    state = {"images": 7, "model": {"w": torch.randn(3)}, "text": "a"}
    again = checkpoint.load(checkpoint.save(state))
    assert torch.equal(again["model"]["w"], state["model"]["w"])
    assert (again["images"], again["text"]) == (7, "a")


def test_a_damaged_checkpoint_is_named():
    folder = checkpoint.save({"model": torch.randn(1000)})
    path = os.path.join(folder, checkpoint.STATE)
    os.truncate(path, os.path.getsize(path) // 2)
    with pytest.raises(UserError, match=r"can't be read"):
        checkpoint.load(folder)


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": Bomb()}, tmp_path / checkpoint.STATE, pickle_module=pickle)
    with pytest.raises(UserError, match="can't be read"):
        checkpoint.load(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_run_goes_on_only_with_its_own_config(tmp_path):
    folder = str(tmp_path / "run")
    first = load(TrainVAE, None, ["seed=1"])
    assert not run_folder.open_run(folder, first, ["loop.keep"])
    leave_checkpoint(folder)
    assert run_folder.open_run(folder, first, ["loop.keep"])
    assert run_folder.open_run(folder, load(TrainVAE, None, ["seed=1", "loop.keep=9"]), ["loop.keep"])
    other = load(TrainVAE, None, ["seed=2", "model.encoder=S"])
    with pytest.raises(UserError) as error:
        run_folder.open_run(folder, other, ["loop.keep"])
    assert "model.encoder: was 'B', is 'S'" in str(error.value)
    assert "seed: was 1, is 2" in str(error.value)


@pytest.mark.parametrize("cls", [TrainVAE, TrainLDM])
def test_a_run_from_before_there_was_a_choice_of_decoders_goes_on_with_pillow(tmp_path, cls):
    run_folder.write_config(str(tmp_path), load(cls, None, ["data.decode=pillow"]))
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert values["data"].pop("decode") == "pillow"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    leave_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"data\.decode: was 'pillow', is 'fast'"):
        run_folder.open_run(str(tmp_path), load(cls), MAY_CHANGE)
    assert run_folder.open_run(str(tmp_path), load(cls, None, ["data.decode=pillow"]), MAY_CHANGE)
    assert run_folder.open_run(str(tmp_path), load(cls), MAY_CHANGE_CACHED)  # what decodes nothing need not say so


def test_a_foreign_folder_is_no_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not a run of this project"):
        run_folder.open_run(str(tmp_path), load(TrainVAE), [])
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_run_may_only_get_longer(tmp_path):
    run_folder.write_config(str(tmp_path), load(TrainVAE, None, ["val_images=10"]))
    run_folder.check_longer(str(tmp_path), "val_images", 11)
    with pytest.raises(UserError, match=r"val_images .* was 10, and is 9"):
        run_folder.check_longer(str(tmp_path), "val_images", 9)


def test_publish_replaces_whole_folders_or_nothing(tmp_path):
    folder = tmp_path / "model"
    for text in ("one", "two"):
        checkpoint.publish(lambda build, text=text: (build / "a").write_text(text), folder)
        assert (folder / "a").read_text() == text

    def fail(build):
        (build / "a").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.publish(fail, folder)
    assert (folder / "a").read_text() == "two"
    assert os.listdir(tmp_path) == ["model"]
    assert oct(folder.stat().st_mode & 0o777) == "0o755"
