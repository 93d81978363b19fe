"""complexity: MACs of a small autoencoder counted by hand, and what else is measured as far as it has to hold."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL

from jobs.evaluate import ACTIONS
from litevae.autoencoder import LiteVAE
from litevae.errors import UserError
from pipelines.evaluation import cost as module
from pipelines.evaluation.config import Evaluate, EvaluateComplexity
from pipelines.evaluation.cost import complexity
from pipelines.runtime import cluster, host
from pipelines.runtime.cli import main
from pipelines.runtime.schema import validate

SIDE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """f = 2, one ResBlock a level in the encoder and two in the decoder, attention in the middle of both."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    model = AutoencoderKL(
        block_out_channels=(16, 32), **blocks, layers_per_block=1, norm_num_groups=8, latent_channels=3
    )
    path = tmp_path_factory.mktemp("kl")
    model.save_pretrained(path)
    return path


def config(models, out, /, **more) -> EvaluateComplexity:
    values = {
        "models": models,
        "resolution": SIDE,
        "batch_size": 8,
        "repeats": 3,
        "warmup": 1,
        "out": str(out / "out"),
        "root": str(out / "runs"),
        "tracking": {"enabled": False},
        "ray": {"gpu": False, "cpus_per_worker": 1},
    }
    return validate(EvaluateComplexity, values | more)


@pytest.fixture(scope="module")
def summary(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return complexity(config([str(folder), "S"], out, tracking={"enabled": True})) | {"at": out}


def conv(channels: int, out: int, side: int, kernel: int = 3) -> int:
    return channels * out * kernel**2 * side**2


def attention(channels: int, side: int) -> int:
    """Queries, keys, values and output are linear; scores of all pairs of positions, and sums weighted by them."""
    return 4 * channels**2 * side**2 + 2 * channels * side**4


# --- parts, without processes of their own


class Clock:
    """Seconds, of which each forward pass takes what is next; nothing else takes any."""

    def __init__(self, *seconds):
        self.now, self.seconds, self.asked = 0.0, list(seconds), 0

    def perf_counter(self):
        if self.asked % 2:
            self.now += self.seconds.pop(0)
        self.asked += 1
        return self.now


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_one_model_is_measured(folder, tmp_path, monkeypatch, part):
    """The model of diffusers above: warm-up left out, medians and extremes of the others, and its MACs by hand."""
    cfg = config([str(folder)], tmp_path, part=part, warmup=2, batch_size=2, precision="fp32")
    meter = module.CostMeter(
        module.ModelToMeasure(str(folder), 2, 3), cfg, cluster.Placement(workers=1, gpu=False, threads=2)
    )
    seen, run = [], meter.half.run
    meter.half.run = meter.half.forward = lambda x: seen.append(x) or run(x)
    clock = Clock(9, 9, 2.0, 0.5, 1.0, 9, 9, 0.004, 0.001, 0.002)
    monkeypatch.setattr(host, "time", clock)
    monkeypatch.setattr(meter, "_watch_memory", lambda: SimpleNamespace(bytes=lambda: 7_500_000))
    found, machine = meter.measure()
    shape = (3, SIDE, SIDE) if part == "encoder" else (3, SIDE // 2, SIDE // 2)
    assert [tuple(x.shape) for x in seen] == [(2, *shape)] * 5 + [(1, *shape)] * 6
    whole = AutoencoderKL.from_pretrained(folder)
    assert found.pop("params_m") == sum(p.numel() for p in getattr(whole, part).parameters()) / 1e6
    assert found.pop("gmacs") > 0
    latencies = {"latency_ms": 2.0, "latency_ms_low": 1.0, "latency_ms_high": 4.0}
    assert found == {
        "memory_mb": 7.5,
        "images_per_s": 2.0, "images_per_s_low": 1.0, "images_per_s_high": 4.0,
        **{name: pytest.approx(ms) for name, ms in latencies.items()},
    }  # fmt: skip
    assert machine.startswith("2 threads of ")
    assert isinstance(getattr(meter.half.model, "decoder" if part == "encoder" else "encoder"), torch.nn.Identity)
    if part == "encoder":
        assert -1 <= seen[0].min() < -0.9 < 0.9 < seen[0].max() <= 1
    else:
        assert 0.9 < seen[0].std() < 1.1


def test_macs_are_half_the_flops(folder, tmp_path):
    cfg = config([str(folder)], tmp_path, part="decoder", batch_size=1, repeats=1, warmup=1)
    meter = module.CostMeter(
        module.ModelToMeasure(str(folder), 2, 3), cfg, cluster.Placement(workers=1, gpu=False, threads=1)
    )
    meter.half.run = meter.half.forward = torch.nn.Conv2d(3, 5, 3, padding=1)
    assert meter.measure()[0]["gmacs"] * 1e9 == pytest.approx(conv(3, 5, SIDE // 2))


def test_what_is_planned(folder, tmp_path):
    plans = list(module._plans(config(["dwt", "dwt-2", " S", str(folder)], tmp_path, latent_channels=7)))
    assert plans == [("dwt", 8, 12), ("dwt-2", 8, 48), ("S", 8, 7), (str(folder), 2, 3)]


def test_models_are_compared_with_the_first(tmp_path, monkeypatch, capsys):
    numbers = {
        "sd-vae": {
            "params_m": 34.0,
            "gmacs": 0.0,
            "images_per_s": 10.0,
            "images_per_s_low": 9.0,
            "images_per_s_high": 12.0,
        },
        "S": {"params_m": 1.0, "gmacs": 5.0, "images_per_s": 40.0, "memory_mb": 3.0},
    }
    logged = []
    tracker = SimpleNamespace(metrics=lambda values, step: logged.append(values), artifact=lambda path: None)

    @contextmanager
    def tracked(cfg, job, name, folder):
        assert (job, name, folder) == ("evaluate", "out", str(tmp_path / "out"))
        (tmp_path / "out").mkdir(exist_ok=True)
        yield tracker, None

    workers = []
    monkeypatch.setattr(module.cluster, "start", lambda ray: workers.append(ray.workers) or "share")
    monkeypatch.setattr(module.mlflow_run, "tracked_run", tracked)
    monkeypatch.setattr(module.mlflow_run, "link", lambda run: "a link")
    monkeypatch.setattr(module, "_measured", lambda plan, cfg, placement: (numbers[plan.name], f"machine, {placement}"))
    found = complexity(config(["sd-vae", "S"], tmp_path, ray={"workers": 3}))
    assert workers == [1]
    assert (found["complexity"], found["baseline"], found["machine"]) == (numbers, "sd-vae", "machine, share")
    assert found["against"] == {
        "sd-vae": {"params_m": 1, "images_per_s": 1}, "S": {"params_m": 1 / 34, "images_per_s": 4},
    }  # fmt: skip
    assert logged[1] == {f"eval/complexity/S/{key}": value for key, value in numbers["S"].items()}
    shown = capsys.readouterr().out
    assert "10.00 (9.00 to 12.00)" in shown
    assert [line.split() for line in shown.splitlines() if line.startswith("S ")][1] == ["S", "0.029", "4.000"]
    assert "batches of 8 images" in shown
    assert "torch.utils.flop_counter" not in shown
    complexity(config(["sd-vae", "S"], tmp_path, verbose=True))
    assert "torch.utils.flop_counter" in capsys.readouterr().out


@pytest.mark.slow
def test_macs_are_those_counted_by_hand(summary, folder, tmp_path):
    half = SIDE // 2
    middle = 4 * conv(32, 32, half) + attention(32, half)
    encoder = (
        conv(3, 16, SIDE)
        + 2 * conv(16, 16, SIDE)
        + conv(16, 16, half)  # downsampling
        + conv(16, 32, half)
        + conv(32, 32, half)
        + conv(16, 32, half, kernel=1)  # the ResBlock's shortcut
        + middle
        + conv(32, 6, half)
        + conv(6, 6, half, kernel=1)
    )
    assert summary["complexity"][str(folder)]["gmacs"] * 1e9 == pytest.approx(encoder)
    decoder = (
        conv(3, 3, half, kernel=1)
        + conv(3, 32, half)
        + middle
        + 4 * conv(32, 32, half)
        + conv(32, 32, SIDE)  # upsampling
        + conv(32, 16, SIDE)
        + 3 * conv(16, 16, SIDE)
        + conv(32, 16, SIDE, kernel=1)
        + conv(16, 3, SIDE)
    )
    found = complexity(config([str(folder)], tmp_path, part="decoder", repeats=1))["complexity"][str(folder)]
    assert found["gmacs"] * 1e9 == pytest.approx(decoder)
    model = AutoencoderKL.from_pretrained(folder)
    assert found["params_m"] * 1e6 == pytest.approx(sum(p.numel() for p in model.decoder.parameters()))


@pytest.mark.slow
def test_macs_of_litevae_are_those_of_its_convolutions(summary):
    model, macs = LiteVAE("S", 4), []

    def count(layer, inputs, output):
        macs.append(output[0].numel() * layer.weight[0].numel())

    for layer in model.encoder.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model.encode(torch.zeros(1, 3, SIDE, SIDE))
    assert summary["complexity"]["S"]["gmacs"] * 1e9 == pytest.approx(sum(macs))
    assert summary["complexity"]["S"]["params_m"] == pytest.approx(1.038308)  # as the paper's Table 3 rounds it: 1.03


@pytest.mark.slow
def test_speed_memory_and_ratios(summary, folder):
    for values in summary["complexity"].values():
        for key in ("images_per_s", "latency_ms"):
            assert 0 < values[f"{key}_low"] <= values[key] <= values[f"{key}_high"]
    largest = 8 * 16 * SIDE**2 * 4  # bytes of the widest maps, in and out of a convolution
    assert summary["complexity"][str(folder)]["memory_mb"] > 2 * largest / 1e6
    assert summary["baseline"] == str(folder)
    mine, base = summary["complexity"]["S"], summary["complexity"][str(folder)]
    for key in ("params_m", "gmacs", "memory_mb", "images_per_s", "latency_ms"):
        assert summary["against"]["S"][key] == pytest.approx(mine[key] / base[key])
        assert key in summary["protocols"]
    assert set(summary["against"][str(folder)].values()) == {1}
    assert summary["machine"].startswith("1 thread of ")


@pytest.mark.slow
def test_it_is_written_and_logged(summary, folder):
    from mlflow import MlflowClient

    saved = json.loads((summary["at"] / "out" / "metrics.json").read_text())
    assert saved == {key: value for key, value in summary.items() if key != "at"}
    client = MlflowClient(f"sqlite:///{summary['at']}/runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("litevae").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["eval/complexity/S/gmacs"] == summary["complexity"]["S"]["gmacs"]
    assert f"eval/complexity/{str(folder)[1:]}/images_per_s_high" in run.data.metrics


def test_mistakes_are_refused_with_nothing_written(folder, tmp_path, capsys):
    def refused(match: str, *models: str, **more) -> None:
        with pytest.raises(UserError, match=match):
            complexity(config([*models], tmp_path, **more))

    refused("'X' is neither a model folder nor one of S, B", "S", "X")
    refused("models has S twice", "S", "B", "S")
    refused("models has .* twice", str(folder), f"{folder}/")
    refused("is not a model folder", str(tmp_path))
    refused("resolution=36: S takes multiples of 8 px", str(folder), "S", resolution=36)
    assert not (tmp_path / "out").exists()
    assert main(Evaluate, complexity, ["complexity", "--print-config", "sd-vae,S,dwt"], actions=ACTIONS) == 0
    assert "models:\n- sd-vae\n- S\n- dwt\n" in capsys.readouterr().out
