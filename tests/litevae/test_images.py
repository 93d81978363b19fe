"""The image transform against Pillow's own operations, and against inputs that are broken or odd."""

import copy
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps
from skimage import data as photos

from litevae.images import ImageError, ImageTransform, decode, to_tensor, to_uint8


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(photos.astronaut()).crop((0, 0, 300, 200))


def test_resize_and_crop_equal_pillows(photo):
    result = ImageTransform(128)(encoded(photo))
    resized = photo.resize((192, 128), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((32, 0, 160, 128)), dtype=int)
    assert result.pixels.dtype == np.uint8
    assert np.abs(result.pixels - expected).max() <= 1  # rounding of the box's edges
    assert (result.pixels == expected).mean() > 0.999
    assert (result.height, result.width, result.crop_top, result.crop_left, result.flip) == (200, 300, 0, 32, False)


def test_without_resize_the_pixels_are_the_originals(photo):
    result = ImageTransform(64, resize="none")(encoded(photo))
    np.testing.assert_array_equal(result.pixels, np.asarray(photo)[68:132, 118:182])
    with pytest.raises(ImageError, match="300x200 pixels, less than the crop of 256") as error:
        ImageTransform(256, resize="none")(encoded(photo))
    assert error.value.reason == "too_small"


def test_random_crop_and_flip_depend_on_the_seed_only(photo):
    transform, data = ImageTransform(64, resize="none", crop="random", flip=True), encoded(photo)
    results = [transform(data, seed=seed) for seed in range(40)]
    for seed, result in enumerate(results):
        top, left = result.crop_top, result.crop_left
        expected = np.asarray(photo)[top : top + 64, left : left + 64]
        np.testing.assert_array_equal(result.pixels, expected[:, ::-1] if result.flip else expected)
        np.testing.assert_array_equal(result.pixels, transform(data, seed=seed).pixels)
    assert len({(r.crop_top, r.crop_left) for r in results}) > 35
    assert 8 < sum(r.flip for r in results) < 32
    with pytest.raises(ValueError, match="seed"):
        transform(data)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(photo, orientation):
    upright = np.asarray(photo)
    # How each orientation is stored, from the EXIF standard: the inverse of what a viewer has to do.
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in ("PNG", "TIFF"):
        image = decode(encoded(Image.fromarray(np.ascontiguousarray(stored)), format, exif=exif))
        np.testing.assert_array_equal(np.asarray(image), upright)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr"])
def test_colour_modes_read_as_pillow_reads_them(photo, mode):
    data = encoded(photo.convert(mode), "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_cmyk_jpeg(photo):
    data = encoded(photo.convert("CMYK"), "JPEG", quality=95)
    difference = np.asarray(decode(data), dtype=float) - np.asarray(photo)
    assert np.abs(difference).mean() < 4


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_put_on_white(photo, mode):
    alpha = Image.linear_gradient("L").resize(photo.size)
    image = photo.convert("RGB" if mode == "RGBA" else "L")
    image.putalpha(alpha)
    part = np.asarray(alpha, dtype=float)[..., None] / 255
    expected = np.asarray(image.convert("RGBA"), dtype=float)[..., :3] * part + 255 * (1 - part)
    assert np.abs(np.asarray(decode(encoded(image)), dtype=float) - expected).max() <= 1


def test_transparent_palette_entry_and_colour_key_become_white(photo):
    palette = photo.quantize(16)
    values = np.asarray(palette)
    pixels = np.asarray(decode(encoded(palette, transparency=3)))
    assert (pixels[values == 3] == 255).all()
    np.testing.assert_array_equal(pixels[values != 3], np.asarray(palette.convert("RGB"))[values != 3])
    key = np.asarray(photo).copy()
    key[:50] = (1, 2, 3)
    pixels = np.asarray(decode(encoded(Image.fromarray(key), transparency=(1, 2, 3))))
    assert (pixels[:50] == 255).all()


def test_16_bit_gray_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    for format in ("PNG", "TIFF", "PPM"):
        pixels = np.asarray(decode(encoded(Image.fromarray(ramp.astype(np.uint16)), format)), dtype=float)
        assert np.abs(pixels - ramp[..., None] / 257).max() <= 0.51


def test_pixels_without_a_defined_range_are_refused():
    for values in (np.linspace(0, 1, 64, dtype=np.float32), np.arange(64, dtype=np.int32)):
        with pytest.raises(ImageError, match="no defined range") as error:
            decode(encoded(Image.fromarray(values.reshape(8, 8)), "TIFF"))
        assert error.value.reason == "unsupported"


def swapped_profile():
    """The sRGB profile with the red and green primaries exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for number in range(struct.unpack(">I", profile[128:132])[0]):
        entry = 132 + 12 * number
        if name := {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(bytes(profile[entry : entry + 4])):
            profile[entry : entry + 4] = name
    return bytes(profile)


def test_icc_profile_is_applied():
    image = Image.new("RGB", (8, 8), (200, 60, 30))
    assert np.abs(np.asarray(decode(encoded(image, icc_profile=swapped_profile())), int) - (60, 200, 30)).max() <= 2
    translucent = image.copy()
    translucent.putalpha(128)
    pixels = np.asarray(decode(encoded(translucent, icc_profile=swapped_profile())), int)
    assert np.abs(pixels - (157, 227, 142)).max() <= 3


def test_profile_that_does_not_fit_is_ignored(photo):
    for image in (photo.convert("L"), photo):
        for profile in (b"not a profile", swapped_profile()[:200]):
            pixels = np.asarray(decode(encoded(image, icc_profile=profile)))
            np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))
    gray = photo.convert("L")
    pixels = np.asarray(decode(encoded(gray, icc_profile=swapped_profile())))  # an RGB profile on gray pixels
    np.testing.assert_array_equal(pixels, np.asarray(gray.convert("RGB")))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(format):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert np.asarray(decode(data))[16, 16].tolist() == [250, 0, 0]


def test_unreadable_images_have_a_reason(photo):
    jpeg, png = encoded(photo, "JPEG"), encoded(photo)
    bomb = png[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)) + chunk(b"IEND", b"")
    broken = {
        "empty": [b""],
        "not_an_image": [b"<svg/>", b"version https://git-lfs.github.com/spec/v1", b"\0" * 100, b"%!PS-Adobe-3.0 EPSF"],
        "corrupt": [jpeg[: len(jpeg) // 2], png[: len(png) // 2], png[:1000] + b"\0" * 400 + png[1400:]],
        "too_large": [bomb],
    }
    for reason, inputs in broken.items():
        for data in inputs:
            with pytest.raises(ImageError) as error:
                ImageTransform(64)(data)
            assert error.value.reason == reason, str(error.value)
            again = copy.deepcopy(error.value)  # as pickle would
            assert (again.reason, str(again)) == (reason, str(error.value))


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def test_a_long_strip_does_not_blow_up():
    result = ImageTransform(256)(encoded(Image.new("RGB", (1, 60_000), (9, 8, 7))))  # 256 x 15 M if resized
    assert (result.pixels == (9, 8, 7)).all()
    assert result.crop_top == (60_000 * 256 - 256) // 2


def test_identity_tells_transforms_apart(photo):
    import PIL

    identity = ImageTransform(128).identity
    assert identity == ImageTransform(128).identity
    assert identity["Pillow"] == PIL.__version__
    others = [ImageTransform(64), ImageTransform(128, "none"), ImageTransform(128, crop="random")]
    others += [ImageTransform(128, flip=True)]
    assert all(other.identity != identity for other in others)


def test_tensor_and_back():
    pixels = np.arange(2 * 4 * 8 * 3, dtype=np.uint8).reshape(2, 4, 8, 3)
    x = to_tensor(pixels)
    assert x.shape == (2, 3, 4, 8)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x[1, 2, 3, 4], torch.tensor(pixels[1, 3, 4, 2] / 127.5 - 1, dtype=torch.float32))
    np.testing.assert_array_equal(to_uint8(x), pixels)
    clipped = to_uint8(torch.tensor([-3.0, -1, 1, 7]).reshape(1, 1, 2, 2))
    assert clipped.flatten().tolist() == [0, 0, 255, 255]
    assert to_tensor(np.frombuffer(b"\0\xff\0", np.uint8).reshape(1, 1, 1, 3)).flatten().tolist() == [-1, 1, -1]


def test_a_real_jpeg_equals_pillows_reading():
    data = encoded(Image.fromarray(photos.chelsea()), "JPEG", quality=90)
    reference = ImageOps.fit(
        Image.open(io.BytesIO(data)).convert("RGB"), (128, 128), Image.Resampling.BICUBIC, centering=(0.5, 0.5)
    )
    error = (ImageTransform(128)(data).pixels.astype(float) - np.asarray(reference)) ** 2
    assert 10 * np.log10(255**2 / error.mean()) > 45  # `fit` crops at a fraction of a pixel elsewhere
