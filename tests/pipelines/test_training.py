"""The trainers' shared parts: batches, schedule, checkpoints, and when a run may go on."""

import os
import pickle

import pytest
import torch

from litevae.errors import UserError
from pipelines import checkpoint, training
from pipelines.config import Optimizer, TrainVAE, load


def test_batches_are_whole_and_go_on_at_any_position():
    steps = list(training.batch_positions(0, 20, 8))
    assert [list(step) for step in steps] == [[*range(8)], [*range(8, 16)], [*range(16, 24)]]
    assert list(training.batch_positions(8, 20, 8)) == steps[1:]


def test_due_where_a_multiple_was_passed():
    assert [n for n in range(0, 100, 16) if training.due(n, n + 16, 40)] == [32, 64]
    assert training.due(0, 40, 40)
    assert not training.due(40, 56, 40)
    assert not training.due(0, 10**9, 0)


def test_the_rate_warms_up_and_falls():
    config = Optimizer(warmup=100, schedule="cosine")
    factors = [training.learning_rate_factor(config, n, 1100) for n in (0, 50, 100, 600, 1100)]
    assert factors == pytest.approx([1 / 101, 51 / 101, 1, 0.5, 0])
    assert training.learning_rate_factor(Optimizer(), 10**9, 1) == 1


def test_seeds_differ_and_stay():
    seeds = [training.seed_for(seed, position) for seed in range(10) for position in range(100)]
    assert len(set(seeds)) == 1000
    assert seeds[0] == training.seed_for(0, 0)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((10, 100, 4, 1), "does not divide"), ((64, 32, 1, 1), "larger than the data: 32 images")],
)
def test_impossible_batches(arguments, message):
    with pytest.raises(UserError, match=f"^batch=.*{message}"):
        training.check_batch("batch", *arguments)


def test_totals_are_means_since_the_last_look():
    totals = training.Totals()
    for value in (1.0, 2.0, 6.0):
        totals.add({"loss": torch.tensor(value, requires_grad=True)})
    totals.add({"late": torch.tensor(5.0)})
    means = totals.means()
    assert {key: float(value) for key, value in means.items()} == {"loss": 3.0, "late": 5.0}
    assert not means["loss"].requires_grad
    assert totals.means() == {}


def test_adam_is_torchs_adam_without_decay():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    ours = training.adam([weights[0]], Optimizer())
    theirs = torch.optim.Adam([weights[1]], lr=1e-4, betas=(0.5, 0.9))
    for _ in range(3):
        for weight, optimizer in zip(weights, (ours, theirs), strict=True):
            weight.grad = weight.detach().clone() * 2
            optimizer.step()
    assert torch.equal(*weights)


def test_update_clips_and_reports_the_norm():
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
    before = model.weight.detach().clone()
    assert float(training.update(optimizer, model, lr=1.0, clip=1.0)["gradient_norm"]) == pytest.approx(5)
    assert torch.allclose(before - model.weight, torch.tensor([[0.6, 0.8]]), atol=1e-4)
    assert model.weight.grad is None


# --- checkpoints --------------------------------------------------------------------------------------------------


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
    assert not checkpoint.open_run(folder, first, ["loop.keep"])
    assert checkpoint.open_run(folder, first, ["loop.keep"])
    assert checkpoint.open_run(folder, load(TrainVAE, None, ["seed=1", "loop.keep=9"]), ["loop.keep"])
    other = load(TrainVAE, None, ["seed=2", "model.encoder=S"])
    with pytest.raises(UserError) as error:
        checkpoint.open_run(folder, other, ["loop.keep"])
    assert "model.encoder: was 'B', is 'S'" in str(error.value)
    assert "seed: was 1, is 2" in str(error.value)


def test_a_foreign_folder_is_no_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="no run of this project"):
        checkpoint.open_run(str(tmp_path), load(TrainVAE), [])
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_run_may_only_get_longer(tmp_path):
    checkpoint.write_config(str(tmp_path), load(TrainVAE, None, ["val_images=10"]))
    checkpoint.check_longer(str(tmp_path), "val_images", 11)
    with pytest.raises(UserError, match=r"val_images .* was 10, and is 9"):
        checkpoint.check_longer(str(tmp_path), "val_images", 9)


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
