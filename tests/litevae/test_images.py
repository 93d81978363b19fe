"""The image transform against Pillow's own operations, and against inputs that are broken or odd."""

import base64
import copy
import csv
import dataclasses
import io
import math
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL
import pytest
import simplejpeg
import torch
from PIL import Image, ImageCms, ImageOps, features
from skimage import data as photos
from skimage.color import lab2rgb

from litevae import images
from litevae.errors import UserError
from litevae.images import ImageError, ImageTransform, decode, to_tensor, to_uint8
from tests import memory
from tests.commands import REPO
from tests.odd_images import PICTURE, STORED, Odd, chunk, gray_profile, odd_images, swapped_profile, write_odd_images

NASTY = Path(__file__).parents[3] / "shared" / "data" / "nasty"


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


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("buckets", [False, True])
def test_all_views_of_an_image(photo, buckets, both):
    transform = ImageTransform(128, crop="random", crops=3, both=both, buckets=buckets, bucket_step=32)
    views = transform.all(encoded(photo), seed=5)
    assert len(views) == transform.views == (6 if both else 3)
    assert [view.flip for view in views] == ([False, True] * 3 if both else [False] * 3)
    assert len({(view.crop_top, view.crop_left) for view in views}) == 3
    high, wide = size = (96, 160) if buckets else (128, 128)
    cover = (107, 160) if buckets else (128, 192)  # of 200 x 300
    resized = np.asarray(photo.resize(cover[::-1], Image.Resampling.BICUBIC), dtype=int)
    for view in views:
        assert view.pixels.shape == (*size, 3)
        expected = resized[view.crop_top : view.crop_top + high, view.crop_left : view.crop_left + wide]
        expected = expected[:, ::-1] if view.flip else expected
        assert np.abs(view.pixels - expected).max() <= 2  # rounding of the box's edges
    again, first = transform.all(encoded(photo), seed=5), transform(encoded(photo), seed=5)
    for view, same in [*zip(views, again, strict=True), (views[0], first)]:
        np.testing.assert_array_equal(view.pixels, same.pixels)
        assert (view.crop_top, view.crop_left, view.flip) == (same.crop_top, same.crop_left, same.flip)


def test_a_single_view_is_that_of_the_call(photo):
    for transform in (ImageTransform(64), ImageTransform(64, crop="random", flip=True)):
        for seed in range(5):
            (view,) = transform.all(encoded(photo), seed=seed)
            np.testing.assert_array_equal(view.pixels, transform(encoded(photo), seed=seed).pixels)


@pytest.mark.parametrize(("resolution", "step"), [(256, 64), (256, 32), (512, 64), (1024, 64), (128, 128), (192, 8)])
def test_buckets_are_the_largest_that_are_allowed(resolution, step):
    sides = range(step, 2 * resolution + 1, step)
    allowed = [(h, w) for h in sides for w in sides if h * w <= resolution**2 and max(h, w) <= 2 * min(h, w)]
    largest = [(h, w) for h, w in allowed if not any(a >= h and b >= w and (a, b) != (h, w) for a, b in allowed)]
    sizes = ImageTransform(resolution, buckets=True, bucket_step=step).sizes
    assert sizes == sorted(largest)
    assert (resolution, resolution) in sizes
    assert ImageTransform(resolution).sizes == [(resolution, resolution)]


def test_buckets_at_1024_hold_those_of_sdxl():
    sizes = ImageTransform(1024, buckets=True).sizes
    assert {(768, 1344), (832, 1216), (896, 1152), (1024, 1024), (1152, 896), (1216, 832), (1344, 768)} <= {*sizes}


@pytest.mark.parametrize("shape", [(200, 300), (300, 200), (150, 150), (40, 400), (400, 10), (100, 139), (61, 50)])
def test_an_image_goes_to_the_bucket_of_the_nearest_ratio(shape):
    transform = ImageTransform(128, buckets=True, bucket_step=32)
    ramp = np.add.outer(np.arange(shape[0]), np.arange(shape[1])) % 256
    image = Image.fromarray(ramp.astype(np.uint8)).convert("RGB")
    result = transform(encoded(image))
    nearest = min(abs(math.log(h / w) - math.log(shape[0] / shape[1])) for h, w in transform.sizes)
    high, wide = result.pixels.shape[:2]
    assert (high, wide) in transform.sizes
    assert abs(math.log(high / wide) - math.log(shape[0] / shape[1])) == pytest.approx(nearest)
    assert (result.height, result.width) == shape
    scale = max(high / shape[0], wide / shape[1])  # covers it
    resized = [max(side, round(whole * scale)) for side, whole in zip((high, wide), shape, strict=True)]
    assert (result.crop_top, result.crop_left) == ((resized[0] - high) // 2, (resized[1] - wide) // 2)
    whole = np.asarray(image.resize(resized[::-1], Image.Resampling.BICUBIC), dtype=int)
    expected = whole[result.crop_top :, result.crop_left :][:high, :wide]
    assert np.abs(result.pixels - expected).mean() < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crops": 2}, "needs crop=random"),
        ({"crops": 0, "crop": "random"}, "crops=0"),
        ({"flip": True, "both": True}, "exclude each other"),
        ({"buckets": True, "resize": "none"}, "resize=shorter"),
        ({"buckets": True, "bucket_step": 48}, "resolution=64 is not a multiple of bucket_step=48"),
    ],
)
def test_impossible_transforms_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ImageTransform(64, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(photo, orientation):
    upright = np.asarray(photo)
    stored = STORED[orientation](upright)
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


def test_icc_profile_is_applied():
    image = Image.new("RGB", (8, 8), (200, 60, 30))
    assert np.abs(np.asarray(decode(encoded(image, icc_profile=swapped_profile())), int) - (60, 200, 30)).max() <= 2
    translucent = image.copy()
    translucent.putalpha(128)
    pixels = np.asarray(decode(encoded(translucent, icc_profile=swapped_profile())), int)
    assert np.abs(pixels - (157, 227, 142)).max() <= 3


@pytest.mark.parametrize("kind", ["gray", "16 bits", "with alpha"])
def test_gray_profiles_are_applied_also_to_16_bits_and_alpha(kind):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    image = Image.fromarray(ramp.astype(np.uint16) * 257 if kind == "16 bits" else ramp)
    if kind == "with alpha":
        image.putalpha(255)
    linear = (ramp / 255) ** 1.8
    expected = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
    pixels = np.asarray(decode(encoded(image, icc_profile=gray_profile(1.8))), dtype=float)
    assert np.abs(pixels - expected[..., None]).max() <= 2
    assert np.abs(ramp - expected).max() > 10


def test_profile_that_does_not_fit_is_ignored(photo):
    for image in (photo.convert("L"), photo):
        for profile in (b"not a profile", swapped_profile()[:200]):
            pixels = np.asarray(decode(encoded(image, icc_profile=profile)))
            np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))
    gray = photo.convert("L")
    pixels = np.asarray(decode(encoded(gray, icc_profile=swapped_profile())))  # an RGB profile on gray pixels
    np.testing.assert_array_equal(pixels, np.asarray(gray.convert("RGB")))
    for colours in (photo, photo.convert("RGBA")):  # a gray profile on colours
        pixels = np.asarray(decode(encoded(colours, icc_profile=gray_profile(1.0))))
        np.testing.assert_array_equal(pixels, np.asarray(photo))


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


@pytest.mark.parametrize("key", [b"", b"x", bytes(5), bytes(7), bytes(300)], ids=len)
def test_a_transparent_colour_that_is_none_costs_nothing(photo, key):
    png = encoded(photo)
    for written in (chunk(b"tRNS", key), chunk(b"tRNS", bytes(6))[:-1] + b"?"):  # also one with a wrong checksum
        assert np.array_equal(np.asarray(decode(png[:33] + written + png[33:])), np.asarray(decode(png)))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a pointer of Git LFS.* `git lfs pull`"),
        (b"\n<!DOCTYPE html><html>", "an HTML page"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (base64.b64encode(b"\xff\xd8\xff\xe0\0\x10JFIF"), "base64 text"),
        (base64.b64encode(b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR"), "base64 text"),
        (b"data:image/png;base64,AAAA", "base64 text"),
        (b"\xff\xd8\xff\xe0".hex().encode(), "hexadecimal text"),
        (str(b"\xff\xd8\xff\xe0").encode(), "as Python prints them"),
        (pickle.dumps([1]), "a Python pickle"),
        (b"\0\0\0\x18ftypmp42" + bytes(60), "a video"),
    ],
    ids=str,
)
def test_what_is_no_image_is_named(data, named):
    with pytest.raises(ImageError, match=f"not an image but .*{named}") as error:
        decode(data)
    assert error.value.reason == "not_an_image"


def test_formats_that_are_not_read_and_headers_that_are_damaged(photo):
    def reason(data):
        with pytest.raises(ImageError) as error:
            decode(data)
        return error.value.reason, str(error.value)

    assert reason(b"Python 3 was released in 2008")[0] == "not_an_image"  # Pillow's PPM plugin takes "Py" for its own
    assert reason(encoded(photo, "WEBP")[:40])[0] == "corrupt"
    assert reason(encoded(photo, "AVIF")[:150])[0] == "corrupt"
    whole = encoded(photo, "AVIF")
    place = whole.index(b"ispe") + 8
    for size in ((17000, 17000), (2, 40000)):
        huge = whole[:place] + struct.pack(">II", *size) + whole[place + 8 :]
        assert reason(huge) == ("too_large", f"an AVIF image of {size[0]}x{size[1]} pixels")


@pytest.mark.slow
def test_memory_stays_near_that_of_the_pixels(tmp_path):
    """Pillow itself holds 4 bytes a pixel, 64 MB here, of what it reads and of the result."""
    side = 4000
    Image.new("RGBA", (side, side), (1, 2, 3, 4)).save(tmp_path / "alpha.png", compress_level=1)
    Image.fromarray(np.zeros((side, side), np.uint16)).save(tmp_path / "gray16.png", compress_level=1)
    enough, little = 2.7 * 4 * side**2, 0.9 * 4 * side**2
    found = within([(size, tmp_path / name) for name in ("alpha.png", "gray16.png") for size in (enough, little)])
    assert found == ["read", "out_of_memory"] * 2  # and what the limit does


def within(limits):
    """What becomes of each image in a process of its own that may take so many bytes more than it had: "read", or the
    reason of the refusal. limits: (bytes, file).

    Of its own, since what an image before has left to Python's collector is room for the next once it is collected.
    """
    code = """if True:
        import os, pathlib, sys
        from litevae.images import ImageError, decode
        from tests.memory import allow

        def outcome(size, data):
            allow(size)
            try:
                decode(data)
            except ImageError as error:
                return error.reason
            return "read"

        for size, name in zip(sys.argv[1::2], sys.argv[2::2]):
            if os.fork() == 0:
                print(outcome(int(size), pathlib.Path(name).read_bytes()), flush=True)
                os._exit(0)
            assert os.wait()[1] == 0
    """
    command = [sys.executable, "-c", code, *(str(word) for size, file in limits for word in (int(size), file))]
    environment = os.environ | memory.EXACT
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPO, env=environment)
    return done.stdout.split()


def test_a_long_strip_does_not_blow_up():
    result = ImageTransform(256)(encoded(Image.new("RGB", (1, 60_000), (9, 8, 7))))  # 256 x 15 M if resized
    assert (result.pixels == (9, 8, 7)).all()
    assert result.crop_top == (60_000 * 256 - 256) // 2


def test_identity_tells_transforms_apart(photo):
    identity = ImageTransform(128).identity
    assert identity == ImageTransform(128).identity
    assert identity["Pillow"] == PIL.__version__
    others = [ImageTransform(64), ImageTransform(128, "none"), ImageTransform(128, crop="random")]
    others += [
        ImageTransform(128, flip=True),
        ImageTransform(128, crop="random", crops=2),
        ImageTransform(128, both=True),
    ]
    others += [ImageTransform(128, buckets=True), ImageTransform(128, buckets=True, bucket_step=32)]
    others += [ImageTransform(128, decode="fast"), ImageTransform(128, decode="scaled")]
    assert all(other.identity != identity for other in others)
    assert others[-1].identity != others[-2].identity
    assert {name: others[-2].identity[name] for name in ("decode", "simplejpeg")} == {
        "decode": "fast",
        "simplejpeg": simplejpeg.__version__,
    }
    assert torch.__version__.startswith(others[-2].identity["PyTorch"])


def test_identity_of_pillows_pixels_is_that_of_old_caches():
    assert ImageTransform(128, decode="pillow").identity == {
        "steps": "exif, srgb, alpha on white, bicubic antialiased, crop, flip",
        "resolution": 128,
        "resize": "shorter",
        "crop": "center",
        "flip": False,
        "crops": 1,
        "both": False,
        "buckets": False,
        "bucket_step": 64,
        "Pillow": PIL.__version__,
        "libjpeg-turbo": features.version("libjpeg_turbo"),
    }


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


# --- the faster ways -------------------------------------------------------------------------------------------


def psnr(found, expected):
    error = np.square(np.asarray(found, dtype=float) - expected).mean()
    return 10 * np.log10(255**2 / error) if error else np.inf


def agree(data, transform, floor, seed=0):
    """Every view is Pillow's, but for rounding; what else is known of it is the same."""
    reference = dataclasses.replace(transform, decode="pillow").all(data, seed)
    views = transform.all(data, seed)
    for view, expected in zip(views, reference, strict=True):
        assert view.pixels.dtype == np.uint8
        assert view.pixels.flags.c_contiguous
        assert psnr(view.pixels, expected.pixels) >= floor
        assert dataclasses.replace(view, pixels=expected.pixels) == expected
    return views


def exif(orientation):
    found = Image.Exif()
    found[0x0112] = orientation
    return found


PHOTOS = {
    "astronaut": photos.astronaut,  # 512 x 512
    "coffee": photos.coffee,  # 400 x 600
    "chelsea": photos.chelsea,  # 300 x 451
    "rocket": photos.rocket,  # 427 x 640
}
SIZES = [(375, 500), (500, 375), (427, 640), (640, 480), (300, 300), (111, 97), (1000, 391)]  # height, width


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PHOTOS)
def test_fast_agrees_with_pillow_to_60_db(name, size):
    image = Image.fromarray(PHOTOS[name]()).resize(size[::-1], Image.Resampling.LANCZOS)
    transforms = [ImageTransform(side, decode="fast") for side in (64, 128, 256)]
    transforms.append(ImageTransform(128, buckets=True, bucket_step=32, decode="fast"))
    transforms.append(ImageTransform(96, crop="random", crops=3, both=True, decode="fast"))
    for data in (encoded(image, "JPEG", quality=90), encoded(image)):
        for transform in transforms:
            agree(data, transform, 60)
        if min(size) >= 97:
            agree(data, ImageTransform(97, resize="none", crop="random", flip=True, decode="fast"), np.inf)


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("quality", [30, 75, 98])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("gray", [False, True])
def test_fast_decodes_jpegs_as_pillow_does(photo, quality, subsampling, progressive, gray):
    image = photo.convert("L") if gray else photo
    options = {"quality": quality, "subsampling": subsampling, "progressive": progressive}
    data = encoded(image.crop((0, 0, 289, 193)), "JPEG", **options)
    agree(data, ImageTransform(193, resize="none", decode="fast"), np.inf)
    agree(data, ImageTransform(64, decode="fast"), 60)


@pytest.mark.parametrize("mode", ["fast", "scaled"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_however_it_is_decoded(photo, orientation, mode):
    data = encoded(photo, "JPEG", quality=95, exif=exif(orientation))
    for transform in (
        ImageTransform(64, decode=mode),
        ImageTransform(96, crop="random", crops=2, decode=mode),
        ImageTransform(64, buckets=True, bucket_step=16, decode=mode),
    ):
        agree(data, transform, 60 if mode == "fast" else 40)
    agree(data, ImageTransform(64, resize="none", crop="random", decode=mode), np.inf)


def test_orientation_in_xmp_of_a_jpeg(photo):
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(photo, "JPEG", xmp=xmp)
    (view,) = agree(data, ImageTransform(64, decode="fast"), 60)
    assert (view.height, view.width) == photo.size


@pytest.mark.parametrize("mode", ["fast", "scaled"])
def test_cmyk_is_left_to_pillow(photo, mode, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("not for simplejpeg")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", refuse)
    agree(encoded(photo.convert("CMYK"), "JPEG", quality=95), ImageTransform(200, resize="none", decode=mode), np.inf)


@pytest.mark.parametrize("gray", [False, True])
def test_profiles_are_applied_to_what_is_decoded_fast(photo, gray):
    image, profile = (photo.convert("L"), gray_profile(1.4)) if gray else (photo, swapped_profile())
    data, plain = encoded(image, "JPEG", icc_profile=profile), encoded(image, "JPEG")
    (view,) = agree(data, ImageTransform(200, resize="none", decode="fast"), np.inf)
    assert psnr(view.pixels, ImageTransform(200, resize="none")(plain).pixels) < 30
    agree(data, ImageTransform(64, decode="fast"), 60)
    for wrong in (b"not a profile", swapped_profile() if gray else gray_profile(1.4)):
        agree(encoded(image, "JPEG", icc_profile=wrong), ImageTransform(200, resize="none", decode="fast"), np.inf)


def test_a_profile_of_srgb_is_not_applied_in_vain(photo, monkeypatch):
    data = encoded(photo, "JPEG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    agree(data, ImageTransform(200, resize="none", decode="fast"), 60)
    agree(data, ImageTransform(64, decode="scaled"), 60)
    other = encoded(photo, "JPEG", icc_profile=swapped_profile())
    applied = []
    monkeypatch.setattr(images, "_converted", lambda image, *_: applied.append(image) or image)
    ImageTransform(64, decode="fast")(data)
    assert not applied
    ImageTransform(64, decode="fast")(other)
    assert applied


def test_conversions_are_kept_by_profile_and_mode(photo):
    first = encoded(photo, "JPEG", icc_profile=swapped_profile())
    second = encoded(photo.convert("L"), "JPEG", icc_profile=gray_profile(1.4))
    for data in (first, second, first, second):
        image = Image.open(io.BytesIO(data))
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        expected = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(expected))


@pytest.mark.parametrize("mode", ["fast", "scaled"])
def test_damaged_jpegs_have_pillows_reasons(photo, mode):
    whole = encoded(photo, "JPEG", quality=90)
    middle = len(whole) // 2
    damaged = [whole[:middle], whole[:-2], whole[:200], whole[:3], whole[:middle] + b"\xff\xd9"]
    damaged += [whole[:middle] + bytes(50) + whole[middle + 50 :], whole + b"more", b"\xff\xd8\xff" + bytes(100)]
    for data in damaged:
        assert outcome(data, mode) == outcome(data, "pillow")
    assert outcome(whole[:middle], mode)[0] == "corrupt"


def outcome(data, mode):
    """Why it is refused, or of what size and colours it is."""
    try:
        view = ImageTransform(64, decode=mode)(data)
    except ImageError as error:
        return error.reason, str(error)
    return view.height, view.width, view.crop_top, view.crop_left, *(view.pixels.mean((0, 1)).round(-1))


def test_a_jpeg_that_states_another_size_to_each_reader_is_pillows(photo, monkeypatch):
    """It could take more memory than Pillow's limit allows."""
    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", lambda data: (60000, 60000, "YCbCr", "420"))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)
    agree(encoded(photo, "JPEG"), ImageTransform(64, decode="fast"), 60)


@pytest.mark.parametrize("mode", ["fast", "scaled"])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_long_strip_is_not_resized_whole(format, mode):
    strip = Image.fromarray(np.linspace(0, 255, 60_000).astype(np.uint8)[:, None]).convert("RGB")
    data = encoded(strip, format)
    agree(data, ImageTransform(256, decode=mode), np.inf)
    with pytest.raises(ImageError, match="less than the crop"):
        ImageTransform(256, resize="none", decode=mode)(data)
    wide = Image.fromarray(photos.coffee()).resize((2000, 200))
    agree(encoded(wide, format), ImageTransform(64, crop="random", crops=2, decode=mode), np.inf)


# What scaled decoding comes to: pixels of the photo, and of what is decoded of it for 64 pixels, by OVERSAMPLING.
SCALED = [
    ((3000, 2250), (375, 282)),
    ((2250, 3000), (282, 375)),
    ((1501, 1999), (188, 250)),
    ((1023, 767), (256, 192)),
    ((511, 300), (256, 150)),
    ((250, 251), (250, 251)),
    ((60, 90), (60, 90)),
]


@pytest.mark.parametrize(("size", "decoded"), SCALED)
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_scaled_decodes_fewer_pixels(size, decoded, orientation, monkeypatch):
    decode_jpeg, shapes = simplejpeg.decode_jpeg, []

    def spy(*args, **options):
        shapes.append((pixels := decode_jpeg(*args, **options)).shape)
        return pixels

    image = Image.fromarray(photos.coffee()).resize(size[::-1], Image.Resampling.LANCZOS)
    data = encoded(image, "JPEG", quality=92, exif=exif(orientation))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", spy)
    (view,) = agree(data, ImageTransform(64, decode="scaled"), 40)
    assert (view.height, view.width) == (size if orientation < 5 else size[::-1])
    assert shapes == [(*decoded, 3)]
    shapes.clear()
    agree(data, ImageTransform(64, decode="fast"), 60)
    assert shapes == [(*size, 3)]


@pytest.mark.parametrize("size", [(1600, 1600), (1593, 1601), (1599, 1207), (1207, 2393)])
def test_scaled_keeps_the_phase_at_sides_that_eighths_do_not_fit(size):
    """Without it this is at 30 dB: what is decoded would be stretched by up to a pixel."""
    tiles = np.tile(photos.astronaut(), (3, 5, 1))[: size[0], : size[1]]
    agree(encoded(Image.fromarray(tiles), "JPEG", quality=92), ImageTransform(128, decode="scaled"), 42)


@pytest.mark.slow
def test_decoding_opens_no_threads(tmp_path):
    """OpenMP's in a loader's thread slow the training step beside it (docs/performance.md)."""
    code = """if True:
        import os, sys, threading
        import torch
        from litevae.images import ImageTransform

        torch.set_num_threads(4)
        datas = [open(name, "rb").read() for name in sys.argv[1:]]

        def work():
            for mode in ("fast", "scaled"):
                for options in ({}, {"crop": "random", "crops": 2, "both": True}, {"buckets": True}):
                    for data in datas:
                        ImageTransform(256, decode=mode, **options).all(data, 0)

        def threads(do):
            before = len(os.listdir("/proc/self/task"))
            thread = threading.Thread(target=lambda: (do(), found.append(len(os.listdir("/proc/self/task")))))
            thread.start()
            thread.join()
            return found.pop() - before - 1  # but for itself

        found = []
        print(threads(work), threads(lambda: torch.ones(2000, 2000) + 1))
    """
    if not Path("/proc/self/task").is_dir():
        pytest.skip("threads are counted in /proc")
    image = Image.fromarray(photos.coffee())
    for n, (size, format, turn) in enumerate(
        [((500, 375), "JPEG", 1), ((375, 500), "JPEG", 1), ((1801, 1203), "JPEG", 6), ((1203, 1801), "PNG", 1)]
    ):
        image.resize(size).save(tmp_path / f"{n}.img", format, exif=exif(turn))
    command = [sys.executable, "-c", code, *sorted(map(str, tmp_path.iterdir()))]
    ours, torchs = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert ours == 0
    assert torchs > 0  # it would have been seen


# --- odd and broken files ---------------------------------------------------------------------------------------

MODES = ("pillow", "fast", "scaled")
# Of a collection of such files as they were found, where that lies beside the repository: what is refused, and why;
# every other file decodes to what `reading` makes of it.
REFUSED = {
    "float32.tiff": "unsupported",  # no range defined: 0..1, 0..255, metres?
    "jpeg_12bit.jpg": "unsupported",
    "ultrahdr_gainmap.jpg": "corrupt",
    "truncated_1.jpg": "corrupt",
    "truncated_2.jpg": "corrupt",
    "truncated.png": "corrupt",
    "corrupt_header.jpg": "corrupt",
    "broken_data_stream.png": "corrupt",
    "bad_ihdr_crc.png": "corrupt",
    "no_idat.png": "corrupt",
    "no_scan.jpg": "corrupt",
    "null_height.jpg": "corrupt",
    "fuzzed_2.jpg": "corrupt",
    "jpeg2000.jp2": "corrupt",
    "zero_bytes.jpg": "empty",
    "git_lfs_pointer.jpg": "not_an_image",
    "svg_named.jpg": "not_an_image",
    "huge_1.jpg": "too_large",
    "huge_2.png": "too_large",
    "huge_3.avif": "too_large",  # Pillow says "cannot identify": libavif refuses its size
    "huge_4.gif": "too_large",
}
# Where Pillow's own convert("RGB") would do something else: what does.
SPECIAL = {
    "gray_16bit.png": 65535,
    "gray_16bit.pgm": 65535,
    "gray_12bit.tif": 4095,
}
PROFILE_IGNORED = {
    "progressive_partial.jpg",  # no colour engine can use it
    "gray_alpha_16bit.png",  # of gray, and black is black
}
UPRIGHT = {
    3: Image.Transpose.ROTATE_180,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    8: Image.Transpose.ROTATE_90,
}


def collected():
    """name -> row of nasty.csv; none where the collection is not here."""
    if not (NASTY / "nasty.csv").is_file():
        return {}
    with open(NASTY / "nasty.csv", newline="") as file:
        return {f"nasty/{row['file']}": row for row in csv.DictReader(file)}


COLLECTED = collected()


def odd_file(name):
    if name not in COLLECTED:
        return odd_images()[name]
    row = COLLECTED[name]
    data = (NASTY / row["file"]).read_bytes()
    if row["file"] == "text_chunk_bomb.png":  # Pillow refuses it: its pixels are those of the file without texts
        start = data.index(b"zTXt") - 4
        sound = Image.open(io.BytesIO(data[:start] + data[data.index(b"IDAT") - 4 :])).convert("RGB")
        return Odd(data, np.asarray(sound, dtype=float))
    if reason := REFUSED.get(row["file"]):
        assert row["rgb"] != "yes" or row["file"] == "float32.tiff"  # Pillow fails as well
        return Odd(data, reason=reason)
    tolerance = {"LAB": 3, "RGBA": 1, "P": 1}.get(row["mode"], 0)  # other arithmetic of alpha and LAB
    return Odd(data, reading(row), tolerance, most=tolerance)


def reading(row):
    """Pillow's reading of a file, step by step by what nasty.csv says of it."""
    image = Image.open(NASTY / row["file"])
    image.load()
    assert (image.mode, image.size) == (row["mode"], (int(row["width"]), int(row["height"])))
    if turn := UPRIGHT.get(int(row["orientation"] or 1)):
        image = image.transpose(turn)
    if levels := SPECIAL.get(row["file"]):
        gray = np.asarray(image, dtype=float) / levels * 255
        return np.repeat(gray.round()[..., None], 3, axis=2)
    if row["mode"] == "LAB":
        lightness, a, b = (np.asarray(part) for part in image.split())
        lab = np.stack([lightness / 2.55, a - 128.0, b - 128.0], axis=2)
        return lab2rgb(lab, illuminant="D65") * 255  # white stays white
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode in ("P", "1", "RGBA"):
        image = image.convert("RGB")
    if int(row["icc"]) and row["file"] not in PROFILE_IGNORED:
        profile = ImageCms.getOpenProfile(io.BytesIO(image.info["icc_profile"]))
        space = profile.profile.xcolor_space.strip()
        assert space == {"RGB": "RGB", "CMYK": "CMYK"}[image.mode]
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), image.mode, "RGB")
        image = ImageCms.applyTransform(image, transform)
    image = image.convert("RGB")
    if alpha is None:
        return np.asarray(image, dtype=float)
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=alpha)
    return np.asarray(white, dtype=float)


@pytest.mark.parametrize("name", [*odd_images(), *COLLECTED])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged EXIF
def test_odd_files_look_as_they_should_or_are_refused_with_the_right_reason(name):
    odd = odd_file(name)
    if odd.reason:
        for mode in MODES:
            with pytest.raises(ImageError) as error:
                ImageTransform(64, decode=mode)(odd.data)
            assert error.value.reason == odd.reason, str(error.value)
        return
    image = decode(odd.data)
    assert image.mode == "RGB"
    assert odd.pixels.shape == (image.height, image.width, 3)
    distance = np.abs(np.asarray(image, dtype=float) - odd.pixels)
    assert distance.mean() <= odd.near
    assert distance.max() <= odd.most
    for mode in MODES:
        transform = ImageTransform(64, crop="random", crops=2, both=True, buckets=True, bucket_step=16, decode=mode)
        for view in agree(odd.data, transform, {"pillow": np.inf, "fast": 60, "scaled": 38}[mode]):
            assert (view.height, view.width) == (image.height, image.width)
            assert view.pixels.shape[0] * view.pixels.shape[1] <= 64**2


def test_wrong_readings_of_the_picture_are_far_from_it():
    """Or the tolerances above would let them pass: turned, with channels exchanged, inverted."""
    pixels = PICTURE.astype(float)
    wrong = [pixels[::-1], pixels[:, ::-1], pixels[::-1, ::-1], 255 - pixels, pixels[..., ::-1], pixels[..., [1, 0, 2]]]
    assert min(np.abs(other - pixels).mean() for other in wrong) > 20
    assert max(odd.near for odd in odd_images().values()) < 10


if COLLECTED:  # none is skipped where it is not

    def test_the_tables_name_files_that_are_there():
        assert len(COLLECTED) == 81
        assert {*REFUSED, *SPECIAL, *PROFILE_IGNORED} <= {path.name for path in NASTY.iterdir()}

    def test_collected_files_mean_what_they_should():
        """Not only equal to Pillow: what a person would see."""

        def pixels(name):
            return np.asarray(decode((NASTY / name).read_bytes()), dtype=float)

        assert (pixels("all_transparent.png") == 255).all()
        raw = np.asarray(Image.open(NASTY / "xmp_orientation.png").convert("RGBA"))  # its orientation is in XMP only
        turned, stored = (np.abs(pixels("xmp_orientation.png") - way[..., :3]).mean() for way in (raw[::-1, ::-1], raw))
        assert turned < stored / 2  # not equal: it has a profile
        naive = np.asarray(Image.open(NASTY / "xyb_icc.jpg").convert("RGB"), dtype=float)
        same_photo = pixels("palette.png")
        assert np.abs(pixels("xyb_icc.jpg") - same_photo).mean() < 8
        assert np.abs(naive - same_photo).mean() > 20  # colours are wildly wrong without the profile
        upright = pixels("exif_orientation_6.jpg")
        assert upright.shape == pixels("exif_orientation_3.jpg").shape == (450, 600, 3)
        assert np.abs(upright - pixels("exif_orientation_3.jpg")).mean() < 12  # the same photo, turned and saved again
        for name in ("gif_animated.gif", "webp_animated.webp", "apng_animated.png"):
            with Image.open(NASTY / name) as animation:
                animation.seek(animation.n_frames // 2)
                later = np.asarray(animation.convert("RGB"), dtype=float)
            assert np.abs(pixels(name) - later).max() > 50


def test_bombs_take_no_memory(tmp_path):
    """The largest would take 12 GB."""
    write_odd_images(tmp_path / "odd")
    folders = [tmp_path / "odd", *([NASTY] if COLLECTED else [])]
    bombs = [path for folder in folders for path in folder.iterdir() if path.name.startswith(("huge", "text_chunk"))]
    assert len(bombs) == 5 * len(folders)
    expected = ["read" if path.name.startswith("text_chunk") else "too_large" for path in bombs]
    assert within([(100e6, bomb) for bomb in bombs]) == expected
