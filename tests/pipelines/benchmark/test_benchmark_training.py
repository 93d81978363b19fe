"""The training steps' benchmark: its plain loops do what the trainers do, and it says so where they do not."""

import pytest
import torch

from litevae.errors import UserError
from pipelines.benchmark import meter, training
from pipelines.benchmark.config import Benchmark

SMALL = [
    "model.encoder=S", "model.levels=[3]", "model.decoder.channels=[8, 8, 8, 8]", "model.decoder.layers=1",
    "loss.adversarial.channels=2", "loss.lpips.weight=0", "loop.precision=fp32",
]  # fmt: skip


@pytest.fixture
def setting(tmp_path):
    return meter.Setting(Benchmark(repeats=1), torch.device("cpu"), 1, tmp_path)


def test_the_plain_loop_takes_the_same_steps():
    pixels = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8)
    made = [kind(SMALL, 64, 8, torch.device("cpu")) for kind in (training.Plain, training.Ours)]
    for step in range(3):
        values = []
        for one in made:
            torch.manual_seed(step)
            values.append({name: float(value) for name, value in one.step(pixels).items()})
        assert values[0].keys() == {"loss", "adversarial", "discriminator"}
        for name, value in values[0].items():
            assert value == pytest.approx(values[1][name], rel=1e-3, abs=1e-4), (step, name)
    plain, ours = (dict(one.nets.model.named_parameters()) for one in made)
    moved = torch.cat([(ours[name] - plain[name]).flatten() for name in ours])
    assert moved.abs().mean() < 1e-5  # of three steps of 1e-4


@pytest.mark.slow
def test_tables_of_a_vae(setting):
    steps, parts = training.steps_of_vae(setting, 64, 2, SMALL)
    assert [row[0] for row in steps.rows] == ["plain loop", "plain loop, discriminator frozen", "ours"]
    assert [len(row) for row in parts.rows] == [4] * len(parts.rows)


@pytest.mark.slow
def test_memory_is_that_of_processes_of_their_own(setting):
    memory = training.checkpointing(setting, 64, 2, SMALL)
    assert memory.samples["peak"]["recomputed"] > 0
    assert "| kept |" in memory.markdown


def test_tables_of_a_diffusion_model(setting):
    (table,) = training.steps_of_ldm(setting, [("tiny", 8, 4)])
    assert [row[0] for row in table.rows] == ["plain loop", "ours"]


def test_loops_that_do_other_things_are_not_compared():
    with pytest.raises(UserError, match="ours and the plain loop do not compute the same: loss is 1.1 and 1.0"):
        training._check_same({"plain loop": {"loss": 1.0}, "ours": {"loss": 1.1}}, rtol=1e-3)
