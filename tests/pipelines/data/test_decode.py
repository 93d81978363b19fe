"""What decoding gets of a config, and which files count as images."""

import ast
from pathlib import Path

import pytest
from PIL import Image

from litevae import image_files
from pipelines.data.config import Views
from pipelines.data.decode import MEMORY, _memory, transform_of
from pipelines.data.discovery import IMAGE_SUFFIXES

PIPELINES = Path(__file__).parents[3] / "pipelines"


def test_every_field_of_the_views_reaches_the_transform():
    views = Views(
        resolution=64, crop="random", crops=2, flips=True, buckets=True, bucket_step=32, decode="scaled", max_pixels=99
    )
    made = transform_of(views)
    assert (made.resolution, made.resize, made.crop, made.crops, made.both) == (64, "shorter", "random", 2, True)
    assert (made.buckets, made.bucket_step, made.decode, made.max_pixels) == (True, 32, "scaled", 99)


def test_a_larger_limit_of_pixels_gets_more_memory_at_the_first_death_only():
    usual = Views().max_pixels
    for deaths, memory in enumerate(MEMORY, 1):
        assert _memory(deaths, Views()) == _memory(deaths, Views(max_pixels=5)) == memory
        assert _memory(deaths, Views(max_pixels=3 * usual)) == (3 * memory if deaths == 1 else memory)
    assert _memory(9, Views()) == MEMORY[-1]


# Those that are made without a config: a benchmark's, and of generated images, which have their size.
WITHOUT = {"benchmark"}
CALLS = [
    pytest.param(node, id=f"{path.relative_to(PIPELINES)}:{node.lineno}")
    for path in sorted(PIPELINES.rglob("*.py"))
    if path.relative_to(PIPELINES).parts[0] not in WITHOUT
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("ImageTransform", "Views")
    and (node.args or len(node.keywords) > 1)
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_the_limit_of_pixels_reaches_all_that_decodes(call):
    assert "max_pixels" in {keyword.arg for keyword in call.keywords}


def test_those_calls_are_found():
    assert len(CALLS) >= 8


def test_suffixes_are_those_of_all_formats_that_are_read():
    Image.init()
    read = {suffix for suffix, name in Image.EXTENSION.items() if name in image_files.FORMATS}
    assert read - {".pfm"} <= {*IMAGE_SUFFIXES}  # whose pixels are floats without a defined range
    assert {".heic", ".heif", ".hif", ".jxl", ".jpe", ".mpo", ".pgm", ".j2k", ".psd"} <= {*IMAGE_SUFFIXES}
    known = {suffix for suffix, name in Image.EXTENSION.items() if name not in (*image_files.FORMATS, "DIB", "MPO")}
    optional = {".heic", ".heif", ".heics", ".heifs", ".hif", ".jxl"}  # where a package has registered them
    assert not {*IMAGE_SUFFIXES} & (known - optional)
