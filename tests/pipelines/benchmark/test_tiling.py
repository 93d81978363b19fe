"""Tiling as the benchmark measures it: its memory does not grow with the image, and its table is right."""

from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image
from skimage import data

from litevae.autoencoder import LiteVAE
from litevae.errors import UserError
from litevae.images import ImageTransform
from pipelines.benchmark import meter, tiling
from pipelines.benchmark.config import Benchmark
from pipelines.benchmark.tiling import Call

CPU = torch.device("cpu")


@pytest.fixture
def call(tmp_path) -> Call:
    """A call of a model with a small decoder, whose blocks do something."""
    torch.manual_seed(0)
    model = LiteVAE("S", block_out_channels=(8, 8, 8, 8), layers_per_block=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    photo = tmp_path / "photos" / "coffee.jpg"
    Image.fromarray(data.coffee()).save(photo)
    (tmp_path / "place").mkdir()
    place = str(tmp_path / "place")
    return Call(str(tmp_path / "model"), "encode", True, str(photo), 1024, place, torch.get_num_threads(), "cpu")


@pytest.mark.slow
def test_the_memory_of_tiles_is_flat(call):
    """What a call needs beyond its input and its result is that of one tile; the limit of 1.3 is for the allocator."""
    beyond: dict[tuple[str, int], int] = {}
    for side in (1024, 2048):
        for do in ("encode", "decode"):
            given = replace(call, do=do, resolution=side)
            result = 4 * 3 * side**2 if do == "decode" else 4 * 4 * (side // 8) ** 2
            beyond[do, side] = tiling.measured(given) - result
    for do in ("encode", "decode"):
        assert 0 < beyond[do, 2048] < 1.3 * beyond[do, 1024], beyond
    whole = tiling.measured(replace(call, do="encode", tiled=False))
    assert whole > 2 * beyond["encode", 1024]  # otherwise this test would not see tiles


def test_the_table_compares_tiles_with_the_whole(call, tmp_path, monkeypatch):
    monkeypatch.setattr(tiling, "measured", lambda given: tiling.answer(asdict(given))["bytes"])
    config = Benchmark(repeats=1, source=str(tmp_path / "photos"), models=[call.model, "taesd"], resolutions=[576])
    (table,) = tiling.tiling(meter.Setting(config, CPU, call.threads, tmp_path))
    ((name, *peaks, overlaps, elsewhere),) = table.rows  # taesd has no such tiling
    assert name == f"{call.model}, 576 px"
    assert len(peaks) == 4
    model = LiteVAE.from_pretrained(call.model).eval()
    pixels = ImageTransform(576)((tmp_path / "photos" / "coffee.jpg").read_bytes()).pixels
    x = torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        whole = model(x).sample
        model.enable_tiling()
        levels = 127.5 * (model(x).sample.clamp(-1, 1) - whole.clamp(-1, 1)).abs()
    once = torch.zeros(576, dtype=torch.bool)
    once[:64] = once[512:] = True  # tiles are [0, 512) and [64, 576)
    where = once[:, None] & once
    for cell, part in ((overlaps, levels[..., ~where]), (elsewhere, levels[..., where])):
        mean, most = (float(number.strip("()")) for number in cell.split())
        assert mean == pytest.approx(float(part.mean()), abs=0.006)
        assert most == pytest.approx(float(part.max()), abs=0.06)
    assert float(levels.mean()) > 0.01


def test_what_can_not_be_measured_is_refused(tmp_path):
    for given, message in (
        ({"models": ["taesd"], "resolutions": [1024]}, "part tiling measures LiteVAE"),
        ({"models": ["S"], "resolutions": [1024, 512]}, "images of 512 px are one tile; give resolutions above 512"),
    ):
        setting = meter.Setting(Benchmark(**given), CPU, 1, tmp_path)
        with pytest.raises(UserError, match=message):
            next(tiling.tiling(setting))
