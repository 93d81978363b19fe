"""Opening image files: limits, reasons, formats that take a package, metadata of any size."""

import io
import struct
import sys
import zlib
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFile
from skimage import data as photos

from litevae import image_files
from litevae.image_files import ImageError, open_header
from litevae.image_metadata import MAX_PIXELS
from litevae.images import ImageTransform, decode
from tests.odd_images import PICTURE, chunk, odd_images, png

MODES = ("pillow", "fast", "scaled")
HEIC = b"\0\0\0\x24ftypheic\0\0\0\0mif1heic" + bytes(200)
JXL = b"\xff\x0a" + bytes(60)


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def refusal(data, **options):
    """The reason and the message, which are the same in every mode."""
    found = set()
    for mode in MODES:
        with pytest.raises(ImageError) as error:
            ImageTransform(8, decode=mode, **options)(data)
        found.add((error.value.reason, str(error.value)))
    assert len(found) == 1
    return found.pop()


# --- limits -----------------------------------------------------------------------------------------------------

FORMATS = [
    ("JPEG", {}),
    ("PNG", {}),
    ("WEBP", {"lossless": True}),
    ("GIF", {}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("JPEG2000", {}),
    ("AVIF", {}),
    ("PPM", {}),
]


@pytest.mark.parametrize(("format", "options"), FORMATS)
def test_the_limit_is_ours_whatever_pillows_is(format, options, monkeypatch):
    data = encoded(Image.fromarray(PICTURE), format, **options)
    high, wide = PICTURE.shape[:2]
    reason, message = refusal(data, max_pixels=high * wide - 1)
    assert reason == "too_large"
    assert "transform.max_pixels" in message
    assert f"{high * wide:,} pixels, above the limit of {high * wide - 1:,}" in message
    expected = np.asarray(decode(data))
    for pillows in (1, 100, high * wide - 1, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
        for mode in MODES:
            view = ImageTransform(64, decode=mode, resize="none", max_pixels=high * wide)(data)
            assert (view.height, view.width) == (high, wide)
        np.testing.assert_array_equal(np.asarray(decode(data, high * wide)), expected)
        assert pillows == Image.MAX_IMAGE_PIXELS  # as it was


def test_by_default_a_phones_photo_of_200_megapixels_goes_in():
    def header(width, height):
        start = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", start) + chunk(b"IDAT", b"")

    image, _ = open_header(header(16320, 12240), MAX_PIXELS)
    assert image.size == (16320, 12240)
    assert refusal(header(20000, 10001))[0] == "too_large"


def test_the_limit_is_no_part_of_what_pixels_look_like():
    assert ImageTransform(64, max_pixels=5).identity == ImageTransform(64).identity


@pytest.mark.parametrize(
    ("size", "enlarged"), [((64, 64), False), ((63, 64), True), ((200, 63), True), ((65, 99), False)]
)
def test_a_view_knows_that_its_image_was_enlarged(size, enlarged):
    data = encoded(Image.new("RGB", size), "PNG")
    assert ImageTransform(64)(data).enlarged == enlarged
    assert not ImageTransform(32)(data).enlarged


# --- metadata ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["before", "after"])
def test_texts_of_any_size_cost_nothing(where):
    """More than Pillow takes of all texts together."""
    texts = b"".join(chunk(b"tEXt", b"k%d\0" % n + bytes([65 + n % 26]) * 2**20) for n in range(66))
    data = png(PICTURE, 2, before=texts if where == "before" else b"")
    if where == "after":
        data = data[:-12] + texts + data[-12:]
    np.testing.assert_array_equal(np.asarray(decode(data)), PICTURE)


def test_a_profile_that_unpacks_to_gigabytes_is_left_out():
    packer = zlib.compressobj(9)
    bomb = b"".join([*(packer.compress(bytes(2**20)) for _ in range(64)), packer.flush()])
    np.testing.assert_array_equal(np.asarray(decode(png(PICTURE, 2, before=chunk(b"iCCP", b"a\0\0" + bomb)))), PICTURE)


def test_a_files_own_error_is_shown_not_that_of_the_second_try():
    whole = odd_images()["raw_far_make.tif"].data
    start = struct.unpack_from("<I", whole, 4)[0]
    cut = whole[: 8 + 500] + whole[start:]  # the directory is moved, most pixels are gone
    data = cut[:4] + struct.pack("<I", 8 + 500) + cut[8:]
    reason, message = refusal(data)
    assert reason == "corrupt"
    assert "begins as TIFF, but: " in message


# --- what is not read -------------------------------------------------------------------------------------------

KINDS = {
    "float.tif": "32-bit float RGB TIFF",
    "cfa.tif": "16-bit camera raw TIFF",
    "eight_channels.tif": "16-bit gray TIFF with 7 further channels",
    "jpeg_xl_in_tiff.tif": "16-bit gray TIFF, compressed by method 50002",
    "signed_16bit_little.tif": "16-bit signed TIFF",
    "signed_8bit_big.tif": "8-bit signed TIFF",
    "float32.tiff": "float TIFF",
    "dng.tif": "camera's raw file",
    "cr2.jpg": "camera raw (CR2)",
    "cr3.jpg": "camera raw (CR3)",
    "rgb_16bit.psd": "16-bit RGB PSD of 3 channels",
    "psb.psd": "large Photoshop (PSB)",
    "jpeg_12bit.jpg": "12-bit JPEG",
    "two_channels.jpg": "JPEG of 2 channels",
    "lossless.jpg": "lossless JPEG",
    "hierarchical.jpg": "hierarchical JPEG",
    "openexr.jpg": "OpenEXR",
    "radiance.png": "Radiance HDR",
    "bmp_of_five_bits.bmp": "BMP pixel depth (5)",
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_sound_but_not_read_is_named(name):
    reason, message = refusal(odd_images()[name].data)
    assert reason == "unsupported"
    assert KINDS[name] in message


# --- formats that take a package --------------------------------------------------------------------------------


@pytest.fixture
def packages(monkeypatch):
    """Set what `import` finds of the optional packages, and forget the formats that they register."""
    image_files._register.cache_clear()
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    for module, *_ in image_files.OPTIONAL.values():
        monkeypatch.setitem(sys.modules, module, None)
    yield lambda module, found: monkeypatch.setitem(sys.modules, module, found)
    image_files._register.cache_clear()


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (HEIC, ("HEIC", "pillow-heif")),
        (HEIC.replace(b"ftypheic", b"ftypmif1"), ("HEIC", "pillow-heif")),
        (JXL, ("JPEG XL", "pillow-jxl-plugin")),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), ("JPEG XL", "pillow-jxl-plugin")),
    ],
)
@pytest.mark.usefixtures("packages")
def test_without_its_package_a_format_names_it(data, names):
    reason, message = refusal(data)
    assert reason == "unsupported"
    assert all(name in message for name in names)
    assert "pip install 'litevae[formats]'" in message


class Reader(ImageFile.ImageFile):
    """A plugin for Pillow that reads its one picture of anything."""

    def _open(self):
        self._mode, self._size, self.tile = "RGB", PICTURE.shape[1::-1], []
        self.format = "HEIF"

    def load(self):
        if self._im is None:
            self.im = Image.fromarray(PICTURE).im
        return super().load()


def test_a_package_is_imported_where_such_a_file_is_met(packages):
    asked = []

    def register(**options):
        asked.append(options)
        Image.register_open("HEIF", Reader, lambda prefix: True)

    packages("pillow_heif", SimpleNamespace(register_heif_opener=register))
    decode(encoded(Image.fromarray(PICTURE), "PNG"))
    assert not asked
    for _ in range(2):
        np.testing.assert_array_equal(np.asarray(decode(HEIC)), PICTURE)
    assert len(asked) == 1
    assert asked[0]["decode_threads"] == 1
    assert refusal(HEIC, max_pixels=100)[0] == "too_large"


def sized(width, height):
    """The head of a JPEG XL: the lowest bit first; sides of 30 bits less one, no ratio."""
    bits = 0 | 3 << 1 | (height - 1) << 3 | 0 << 33 | 3 << 36 | (width - 1) << 38
    return b"\xff\x0a" + bits.to_bytes(20, "little")


# After the signature: (small sides?, height / 8 - 1, ratio of 1:1), as the standard has them.
SMALL = b"\xff\x0a" + (1 | 11 << 1 | 1 << 6).to_bytes(20, "little")


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (SMALL, (96, 96)),
        (sized(300, 200), (300, 200)),
        (sized(100_000, 99_999), (100_000, 99_999)),
        (b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x30jxlc" + sized(7, 9), (7, 9)),
        (b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x30jxlp\0\0\0\0" + sized(7, 9), (7, 9)),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40), None),
    ],
)
def test_the_size_of_a_jpeg_xl_is_read_from_its_header(data, size):
    assert image_files._jxl_size(data) == size


def test_a_huge_jpeg_xl_is_refused_before_its_plugin_decodes_it(packages):
    opened = []
    packages("pillow_jxl", SimpleNamespace(JpegXLImagePlugin=SimpleNamespace()))
    Image.OPEN["JXL"] = (lambda *_: opened.append(1), lambda prefix: True)
    assert refusal(sized(100_000, 100_000))[0] == "too_large"
    assert not opened


if find_spec("pillow_heif") and find_spec("pillow_jxl"):  # none is skipped where they are not

    @pytest.mark.parametrize("format", ["HEIF", "JXL"])
    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
    def test_real_files_are_read(format, mode):
        for name in image_files.OPTIONAL:
            image_files._register(image_files.OPTIONAL[name][0])
        image = Image.fromarray(photos.astronaut()).resize((96, 64)).convert(mode)
        options = {"lossless": True} if format == "JXL" else {"quality": 95, "chroma": 444}
        data = encoded(image, format, **options)
        expected = np.asarray(image.convert("RGB"), dtype=float)
        for each in MODES:
            pixels = ImageTransform(64, resize="none", decode=each)(data).pixels
            assert np.abs(pixels - expected[:, 16:80]).mean() < 3
        assert refusal(data[: len(data) // 2])[0] == "corrupt"
