"""The benchmark: what it computes by hand, what it writes when; its numbers are the machine's and not looked at."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from litevae.autoencoder import LiteVAE
from litevae.errors import UserError
from pipelines.benchmark import encoding, meter, models, moments, run
from pipelines.benchmark.config import Benchmark
from pipelines.runtime.cli import load, main
from tests.benchmarks import images

CPU = torch.device("cpu")


def setting(place: Path, **fields) -> meter.Setting:
    return meter.Setting(Benchmark(repeats=1, **fields), CPU, 1, place)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for n in range(3):
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        small.resize((64, 48), Image.Resampling.BICUBIC).save(folder / f"{n}.jpg", quality=95)
    return folder


# --- measuring ----------------------------------------------------------------------------------------------------


def test_rounds_take_turns():
    calls: list[str] = []
    found = meter.rounds({name: lambda name=name: calls.append(name) for name in "ABC"}, repeats=2, warmup=1)
    assert calls == [*"ABC"] * 3
    assert {name: len(seconds) for name, seconds in found.items()} == {"A": 2, "B": 2, "C": 2}
    assert all(seconds > 0 for each in found.values() for seconds in each)


def test_rounds_by_another_clock():
    ticks = iter(range(100))
    found = meter.rounds({"A": lambda: next(ticks), "B": lambda: None}, 3, warmup=0, clock=lambda: next(ticks))
    assert found == {"A": [2, 2, 2], "B": [1, 1, 1]}


def test_numbers_by_hand():
    assert meter.median_and_range([3.0, 1.0, 2000.0], 1) == "3.0 (1.0 to 2,000.0)"
    assert meter.median_and_range([2.5], 2) == "2.50"
    assert meter.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == 2.0  # of 2, 3 and 1
    assert meter.rates([2.0, 0.5], 4) == [2.0, 8.0]
    with pytest.raises(ValueError):
        meter.ratio([1.0], [1.0, 2.0])


def test_steady_rates_leave_the_first_quarter_out():
    done = [(0.0, 4), (10.0, 4), (11.0, 4), (12.0, 4)]
    assert encoding.steady(done) == 8 / 2  # from the file at 10 s on
    assert encoding.steady([(5.0, 4)]) == 0.0


def test_tables_in_markdown():
    table = meter.ReportTable("Title", "How.", ["", "a"], [["x", "1"], ["y", "2"]])
    assert table.markdown == "### Title\n\nHow.\n\n|  | a |\n| --- | --- |\n| x | 1 |\n| y | 2 |\n"


ANSWERING = """
import os, sys
from litevae.errors import UserError
from pipelines.benchmark import meter
from pipelines.runtime.host import PeakMemory

def answer(request):
    print("not an answer")
    if "refuse" in request:
        raise UserError("this can't be done")
    if "die" in request:
        os._exit(3)
    if "raise" in request:
        raise ValueError("a bug")
    if "allocate" in request:
        import torch
        memory = PeakMemory(torch.device("cpu"))
        block = bytearray(os.urandom(1024)) * (request["allocate"] // 1024)
        del block
        return {"bytes": memory.bytes()}
    variables = [os.environ.get(name) for name in ("SPINS", "OTHER")]
    return {"twice": 2 * request["number"], "word": sys.argv[1], "set": variables}

meter.serve(answer)
"""


@pytest.fixture
def answering(tmp_path, monkeypatch) -> str:
    (tmp_path / "answering.py").write_text(ANSWERING)
    monkeypatch.syspath_prepend(tmp_path)
    return "answering"


@pytest.mark.slow
def test_children_answer(answering, monkeypatch):
    monkeypatch.setenv("OTHER", "outer")
    with meter.Child(answering, "word", environment={"SPINS": "7", "OTHER": None}) as child:
        assert child.ask(number=4) == {"twice": 8, "word": "word", "set": ["7", None]}
        with pytest.raises(UserError, match="this can't be done"):
            child.ask(refuse=True)
        assert child.ask(number=5)["twice"] == 10  # and goes on


@pytest.mark.slow
def test_children_that_die_are_told_of(answering):
    with meter.Child(answering, "word") as child:
        with pytest.raises(UserError, match="exit code 3"):
            child.ask(die=True)
        with pytest.raises(UserError, match="exit code 3"):
            child.ask(number=1)
    with (
        meter.Child(answering, "word") as child,
        pytest.raises(UserError, match=r"exit code 1\); see its output above"),
    ):
        child.ask(**{"raise": True})


@pytest.mark.slow
def test_memory_is_the_peak_beyond_what_was_there(answering):
    size = 200 * 10**6
    with meter.Child(answering, "word") as child:
        assert size * 0.95 < child.ask(allocate=size)["bytes"] < size * 1.2


def test_limits_are_positive():
    found = meter.limits(CPU, seconds=0.01)
    assert found["copy"] > 0
    assert found["matrix"] > 0


def test_many_files_of_few(photos, tmp_path):
    files = sorted(photos.iterdir())
    folder = meter.linked(files, 5, tmp_path / "linked")
    assert [path.name for path in sorted(folder.iterdir())] == [f"{n:06d}.jpg" for n in range(5)]
    assert (folder / "000003.jpg").read_bytes() == files[0].read_bytes()
    made = meter.mosaics(files, 2, tmp_path / "mosaics", (3, 2), (20, 10))
    assert [Image.open(path).size for path in made] == [(60, 20)] * 2
    assert made[0].read_bytes() == made[1].read_bytes()  # 6 tiles of 3 photos: the same ones again


def test_photos_come_with_the_job_or_from_a_folder(photos, tmp_path):
    assert len(setting(tmp_path, source=str(photos)).photos()) == 3
    assert all(Image.open(path).format == "JPEG" for path in setting(tmp_path).photos())
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds no JPEGs"):
        setting(tmp_path, source=str(empty)).photos()


# --- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "part", "parameters"),
    [
        ("sd-vae", "encoder", 34_163_592),
        ("S", "encoder", 1_038_308),
        ("B", "encoder", 6_753_252),
        ("pseudocode-B", "encoder", 6_753_252),
        ("sd-vae", "decoder", 49_490_179),
        ("S", "decoder", 49_490_179),
    ],
)
def test_parameters(name, part, parameters):
    assert models.about(name, part, 64, "fp32")["parameters"] == parameters


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_operations_are_those_that_pytorch_counts(tmp_path, part):
    model = LiteVAE("S", block_out_channels=(8, 8, 8, 8), layers_per_block=1).eval()
    model.save_pretrained(tmp_path)
    half = getattr(model, part)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        half(torch.zeros(1, 3, 64, 64) if part == "encoder" else torch.zeros(1, 4, 8, 8))
    counted = {str(operator): n for operator, n in counter.get_flop_counts()["Global"].items()}
    assert set(counted) <= {"aten.convolution", "aten.mm", "aten.addmm"}  # mm and addmm: linear layers
    layers = models.about(str(tmp_path), part, 64, "fp32")["layers"]
    assert sum(flops for flops, _ in layers) == sum(counted.values())


def test_bytes_are_of_input_weights_and_output(tmp_path):
    flops, moved = models.about("S", "encoder", 64, "fp32")["layers"][0]
    first = next(m for m in LiteVAE("S").encoder.modules() if isinstance(m, torch.nn.Conv2d))
    positions = flops // (2 * first.weight.numel())
    assert moved == 4 * (positions * (first.in_channels + first.out_channels) + first.weight.numel())
    assert models.about("S", "encoder", 64, "bf16")["layers"][0] == (flops, moved // 2)


def test_the_pseudocode_is_our_encoder():
    literal, ours = models.build("pseudocode-B", "eager"), models.build("B", "eager")
    ours.load_state_dict(literal.state_dict())
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.inference_mode():
        torch.testing.assert_close(literal.encoder(x), ours.encoder(x), rtol=1e-5, atol=1e-5)


# --- images -------------------------------------------------------------------------------------------------------


def test_decoding(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "LARGE", {"80 x 40": ((2, 2), (40, 20))})
    monkeypatch.setattr(images, "LEAST", 0.01)
    small, large = images.images(setting(tmp_path, source=str(photos)))
    for table, count in ((small, 3), (large, images.MOSAICS)):
        assert [row[0] for row in table.rows] == list(images.DECODERS)
        assert [row[0] for row in table.rows if row[3] == "identical"] == ["decode=pillow"]
        assert all(float(row[3]) > 35 for row in table.rows[1:])
        assert f"{count} " in table.title
        assert all(each["images"] % count == 0 and each["CPU seconds"][0] > 0 for each in table.samples.values())


def test_profiles_are_a_table_of_their_own_without_torchvision(photos, tmp_path, monkeypatch):
    from PIL import ImageCms

    monkeypatch.setattr(images, "LARGE", {})
    monkeypatch.setattr(images, "LEAST", 0.01)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    folder = tmp_path / "profiled"
    folder.mkdir()
    Image.open(photos / "0.jpg").save(folder / "0.jpg", icc_profile=profile)
    (table,) = images.images(setting(tmp_path, source=str(folder)))
    assert [row[0] for row in table.rows] == ["decode=pillow", "decode=fast", "decode=scaled"]


# --- the command --------------------------------------------------------------------------------------------------


def test_parts_as_words():
    assert load(Benchmark, None, ["parts=loader,encode"]).parts == ["loader", "encode"]
    assert load(Benchmark, None, ["models=[S]"]).models == ["S"]
    assert set(load(Benchmark).parts) < set(run.PARTS)


def test_unknown_parts_are_refused(capsys):
    assert main(Benchmark, lambda config: None, ["parts=encoder,speed"]) == 2
    assert "parts.1" in capsys.readouterr().err


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match=r"part loader compares with datasets, which is not installed: pip install datasets"
    ):
        run.benchmark(config(tmp_path, parts=["loader"]))


def test_what_is_measured_is_written_at_once(tmp_path, monkeypatch):
    def part(setting):
        assert setting.place.is_dir()
        yield meter.ReportTable("First", "How.", ["a"], [["1"]], {"raw": [1.5]})

    def interrupted(setting):
        yield meter.ReportTable("Second", "How.", ["a"], [["2"]])
        raise KeyboardInterrupt

    monkeypatch.setattr(images, "part", part, raising=False)
    monkeypatch.setattr(images, "interrupted", interrupted, raising=False)
    parts = {"encode": "tests.benchmarks.images:part", "loader": "tests.benchmarks.images:interrupted"}
    with pytest.raises(KeyboardInterrupt):
        run.benchmark(config(tmp_path, parts=["encode", "loader"]), parts)
    found = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [table["title"] for part in found["parts"].values() for table in part["tables"]] == ["First", "Second"]
    assert found["parts"]["encode"]["tables"][0]["samples"] == {"raw": [1.5]}
    assert found["environment"]["threads"] == 1
    text = (tmp_path / "out" / "benchmark.md").read_text()
    assert "### First\n\nHow.\n\n| a |\n| --- |\n| 1 |" in text
    assert text.index("First") < text.index("Second")


def config(place: Path, **fields) -> Benchmark:
    return Benchmark(
        out=str(place / "out"), root=str(place), threads=1, gpu=False, repeats=1, tracking={"enabled": False}, **fields
    )


def measured(place: Path, *words: str) -> dict:
    """benchmark.json of a run of the command."""
    command = [sys.executable, str(Path(__file__).parents[3] / "jobs" / "benchmark.py"), *words, f"out={place / 'out'}"]
    command += [f"root={place}", "tracking.enabled=false", "repeats=1", "gpu=false", "threads=1"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == 0, done.stderr[-3000:]
    assert (place / "out" / "benchmark.md").is_file()
    return json.loads((place / "out" / "benchmark.json").read_text())


def test_every_size_is_compiled_before_any_is_timed_on_a_gpu():
    class Child:
        def __init__(self):
            self.asked = []

        def ask(self, do, batch, resolution):
            self.asked.append((do, batch))
            return {"bytes": 7, "seconds": 1.0}

    asked = {}
    for device in ("cpu", "cuda"):
        child = Child()
        assert models._warm(child, batches=[1, 32, 4], resolution=64, device=torch.device(device)) == 7
        asked[device] = child.asked
    assert asked == {"cpu": [("memory", 32)], "cuda": [("memory", 32), ("time", 1), ("time", 4)]}


def test_the_error_of_moments_by_hand():
    sigma = torch.tensor([1.0, 0.5, 2.0, 4.0]).view(1, 1, 2, 2)
    mean, logvar = torch.zeros(1, 1, 2, 2), 2 * sigma.log()
    found = torch.cat([torch.tensor([0.1, -0.1, 0.1, 0.4]).view(1, 1, 2, 2), logvar + 0.25], dim=1)
    errors = moments.error_in_sigma(found, torch.cat([mean, logvar], dim=1))  # 0.1, 0.2, 0.05 and 0.1 sigma
    assert errors["median"] == pytest.approx(0.1)
    assert errors["largest"] == pytest.approx(0.2)
    assert errors["logvar_median"] == errors["logvar_percentile_99"] == pytest.approx(0.25)


def test_moments_are_compared_by_path_and_number_format(photos, tmp_path):
    (table,) = moments.moments(setting(tmp_path, source=str(photos), resolutions=[32]))
    median = {name: errors["median"] for name, errors in table.samples.items()}
    plain = "PyTorch, image by image in "
    assert {f"{plain}{a}, {b}" for a in ("fp32", "bf16") for b in ("fp32", "fp16", "bf16")} <= median.keys()
    by_format = [median[f"{plain}fp32, {stored}"] for stored in ("fp32", "fp16", "bf16")]
    assert by_format == sorted(by_format)
    assert by_format[0] < 1e-4 < by_format[2]
    assert median[f"{plain}bf16, fp32"] > by_format[1]
    assert len(table.rows) == len(table.samples)


def test_a_model_without_a_posterior_has_no_sigma(photos, tmp_path):
    AutoencoderTiny().save_pretrained(tmp_path / "tiny")
    with pytest.raises(UserError, match="has no posterior"):
        moments.moments(setting(tmp_path, source=str(photos), model=str(tmp_path / "tiny")))


def test_pytorch_image_by_image_is_a_mode_of_its_own():
    batch = [models.Contender("S", mode, "encoder", "fp32", "1", "cpu") for mode in ("eager", "sliced")]
    assert [contender.half.model.use_slicing for contender in batch] == [False, True]
    x = batch[0].half.input(3, 32)
    with torch.inference_mode():
        torch.testing.assert_close(batch[1].half.run(x), batch[0].half.run(x), rtol=1e-4, atol=1e-4)


@pytest.mark.chaos
def test_the_command_measures_models_and_the_loader(tmp_path):
    sizes = ["models=taesd,S", "batch_sizes=[1]", "resolutions=[32]", "loader_rows=1000"]
    found = measured(tmp_path, "parts=encoder,loader", *sizes)
    tables = {name: part["tables"] for name, part in found["parts"].items()}
    assert {name: len(each) for name, each in tables.items()} == {"encoder": 1, "loader": 1}
    names = [row[0] for row in found["parts"]["encoder"]["tables"][0]["rows"]]
    assert names == ["TAESD, eager", "LiteVAE-S, eager", "TAESD, fast", "LiteVAE-S, fast"]
    (table,) = tables["loader"]
    assert len(table["rows"]) == 6
    assert {len(row) for row in table["rows"]} == {len(table["head"])}
