"""The demo's photos: held-out squares that no training tile touches."""

from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from pipelines.diagnostics import demo
from pipelines.diagnostics.demo import HELD_OUT, TILE, _free_square, cut_photos


def test_photos_are_cut_once_and_the_same_everywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TILES", 50)
    a, b = cut_photos(tmp_path / "a"), cut_photos(tmp_path / "b")
    names = sorted(path.relative_to(a) for path in a.rglob("*.png"))
    assert len([name for name in names if name.parts[0] == "train"]) == 50 // len(HELD_OUT) * len(HELD_OUT)
    assert len([name for name in names if name.parts[0] == "val"]) == sum(map(len, HELD_OUT.values()))
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in names)
    with Image.open(a / names[0]) as tile:
        assert (tile.size, tile.mode) == ((TILE, TILE), "RGB")
    left, top, side = HELD_OUT["astronaut.png"][0]
    face = np.asarray(Image.open(a / "val" / "astronaut" / "0.png"))
    assert np.array_equal(face, skimage.data.astronaut()[top : top + side, left : left + side])
    stamp = (a / "cut.json").stat().st_mtime_ns
    cut_photos(a)
    assert (a / "cut.json").stat().st_mtime_ns == stamp


def test_tiles_stay_off_what_is_held_out():
    draw = np.random.default_rng(1)
    for squares in HELD_OUT.values():
        mask = np.zeros((2000, 2000), bool)
        for x, y, side in squares:
            mask[y : y + side, x : x + side] = True
        for _ in range(100):
            left, top, right, bottom = _free_square(draw, (640, 427), squares)
            assert not mask[top:bottom, left:right].any()
            assert 0 <= left < right <= 640
            assert 0 <= top < bottom <= 427


def test_the_report_says_what_to_look_at():
    judged = {
        "images_per_s": {"encoder": 105.7, "decoder": 182.04}, "parameters": {"encoder": 1_040_628, "decoder": 612_867},
        "reconstruction": {"psnr": 22.184, "ssim": 0.6071}, "bicubic": {"psnr": 19.911, "ssim": 0.4522},
        "run": "a link",
    }  # fmt: skip
    done = {
        "evaluate": judged, "seconds": 490.4, "encode": {"images_per_s": 88.4, "bits_per_pixel": 6.451},
        "train_vae": {"images_per_second": 31.84}, "sample": {"images_per_s": 18.51},
        "train_ldm": {"images_per_second": 0.0, "parameters": 1_905_964},
    }  # fmt: skip
    lines = demo._report(done, Path("/tmp/demo")).splitlines()
    assert lines[1] == "The demo is done, in 8 min 10 s. Look at these two pictures first:"
    assert [line.strip() for line in lines if ".png" in line] == [
        "/tmp/demo/reconstructions.png", "/tmp/demo/samples.png",
    ]  # fmt: skip
    found = {line.split("  ")[0]: line.split()[-2:] for line in lines}
    assert found["PSNR (dB), higher is better"] == ["22.18", "19.91"]
    assert found["SSIM, higher is better"] == ["0.607", "0.452"]
    assert found["train the autoencoder"] == ["images/s", "1,653,495"]
    assert "train the diffusion model    done before   1,905,964" in lines
    assert lines[-1] == "runs     a link"
    assert max(map(len, lines)) <= 110
