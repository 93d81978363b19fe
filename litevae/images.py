"""From encoded bytes to pixels: the one image transform, and its identity.

EXIF orientation -> sRGB -> alpha on white -> antialiased bicubic resize -> crop -> flip. Pillow does it all, which is
the reference; or simplejpeg (libjpeg-turbo) decodes JPEGs, Pillow the rest, and PyTorch resizes, which agrees to 60 dB
and takes less than half the time. Pixels are uint8 RGB HWC until they reach the model's device.
"""

import io
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, lru_cache, partial
from typing import Any, Literal

import numpy as np
import PIL
import simplejpeg
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError, features
from torch.nn import functional as F

from litevae.errors import UserError

Image.init()
# Not Pillow's whole list: some of its plugins start other programs (EPS) or are no image formats of photos.
FORMATS: list[str] = [
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "AVIF", "JPEG2000", "PPM", "PSD")
    if name in Image.OPEN
]
_SRGB = ImageCms.createProfile("sRGB")
_STRIP = 64  # rows at once, where whole images would take several copies of what may be 180 million pixels
# Of decode="scaled": a side is decoded to at least so many times its resized length. From twice on it is 46 dB and more
# to the full decode, at 1.1 times 35 dB; less would hardly be faster, since entropy decoding is most of what is left.
OVERSAMPLING = 2
# JPEGs are decoded to so many eighths: what libjpeg-turbo has fast code for. 3/8 takes longer than 4/8, 5/8 than 8/8.
_EIGHTHS = (1, 2, 4, 8)
_STRETCHED = 4  # times a view's pixels: of an image that would have more when it is resized only the views are

Size = tuple[int, int]  # height, width


class ImageError(UserError):
    """An image that can't be used.

    `reason` is its class: empty, not_an_image, too_large, corrupt, unsupported, too_small, out_of_memory; a source adds
    missing and unreadable, an encoder not_finite and out_of_range.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return type(self), (self.reason, str(self))


@dataclass(frozen=True)
class Transformed:
    """pixels: uint8 (H, W, 3), one of the transform's `sizes`; height, width: of the whole image, upright; crop_top,
    crop_left: in pixels of the resized image, before the flip."""

    pixels: np.ndarray
    height: int
    width: int
    crop_top: int
    crop_left: int
    flip: bool


@dataclass(frozen=True)
class ImageTransform:
    """Encoded image -> uint8 pixels, square or of the bucket that fits best; one view of it or several.

    Args:
        resolution: side in pixels; of buckets, the side of the square one.
        resize: "shorter" side to the resolution (with buckets: until they are covered); "none" crops the original
            pixels.
        crop: "center", or "random" from the seed of the call.
        flip: mirror half of the views, by the same seed.
        crops: random crops an image.
        both: every crop also mirrored, as a view of its own.
        buckets: keep aspect ratios, see `sizes`; an image goes to the one of the nearest ratio.
        bucket_step: sides of buckets are multiples of it.
        decode: "pillow" alone; "fast": JPEGs by simplejpeg and the resize by PyTorch, which agrees with it to 60 dB;
            "scaled": as fast, with large JPEGs decoded to a half, a quarter or an eighth of their sides (46 dB).
    """

    resolution: int
    resize: Literal["shorter", "none"] = "shorter"
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    crops: int = 1
    both: bool = False
    buckets: bool = False
    bucket_step: int = 64
    decode: Literal["pillow", "fast", "scaled"] = "pillow"

    def __post_init__(self) -> None:
        if self.crops != 1 and (self.crops < 1 or self.crop != "random"):
            raise UserError(f"crops={self.crops}: only crop=random can be another each time")
        if self.flip and self.both:
            raise UserError("views are mirrored by chance (flip) or both ways (both), not both")
        if self.buckets and self.resize == "none":
            raise UserError("buckets need resize=shorter: images are resized until they cover one")
        if self.buckets and self.resolution % self.bucket_step:
            raise UserError(f"resolution={self.resolution} is not a multiple of bucket_step={self.bucket_step}")

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the pixels depend on; images with equal identities compare."""
        steps = "exif, srgb, alpha on white, bicubic antialiased, crop, flip"
        fields = asdict(self)
        libraries: dict[str, Any] = {"Pillow": PIL.__version__, "libjpeg-turbo": features.version("libjpeg_turbo")}
        if fields.pop("decode") != "pillow":  # which caches of before there was a choice say nothing of
            libraries["decode"] = self.decode
            libraries["simplejpeg"] = simplejpeg.__version__  # which has a libjpeg-turbo of its own
            libraries["PyTorch"] = torch.__version__.split("+")[0]  # +cpu, +cu130: this is on the CPU
        if self.decode == "scaled":
            libraries["oversampling"] = OVERSAMPLING
        return {"steps": steps, **fields, **libraries}

    @property
    def views(self) -> int:
        """How many an image gives."""
        return self.crops * (2 if self.both else 1)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) that views can have, sorted.

        Buckets have sides that are multiples of the step, an area of at most resolution^2 and a ratio of sides of at
        most 2, and are as large as that allows.
        """
        side = self.resolution
        return [*_buckets(side, self.bucket_step)] if self.buckets else [(side, side)]

    def __call__(self, data: bytes, seed: int | None = None) -> Transformed:
        """The first view.

        Raises:
            ImageError: the image can't be read, or is smaller than the crop.
        """
        return next(self._views(data, seed))

    def all(self, data: bytes, seed: int | None = None) -> list[Transformed]:
        """Every view: crop 0, crop 0 mirrored, crop 1, ... The image is decoded once.

        Raises:
            ImageError: the image can't be read, or is smaller than the crop.
        """
        return list(self._views(data, seed))

    def _views(self, data: bytes, seed: int | None) -> Iterator[Transformed]:
        try:
            height, width, cut = self._read(data)
        except (MemoryError, RuntimeError) as error:
            if not _is_of_memory(error):
                raise
            raise ImageError("out_of_memory", str(error) or "decoding takes more than there is") from error
        if self.resize == "none" and min(height, width) < self.resolution:
            raise ImageError("too_small", f"{width}x{height} pixels, less than the crop of {self.resolution}")
        if self.crop == "random" or self.flip:
            if seed is None:
                raise ValueError("a random crop or flip needs a seed")
            draw = np.random.default_rng(seed)
        size, resized = self._fit(height, width)
        for _ in range(self.crops):
            room = [whole - side for whole, side in zip(resized, size, strict=True)]
            top, left = (int(draw.integers(r + 1)) for r in room) if self.crop == "random" else (r // 2 for r in room)
            pixels = cut(top, left)
            flips = (False, True) if self.both else (self.flip and bool(draw.random() < 0.5),)
            for flip in flips:
                view = np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels
                yield Transformed(view, height, width, top, left, flip)

    def _fit(self, height: int, width: int) -> tuple[Size, Size]:
        """Of an image: the (height, width) of its views, and that of the whole, resized."""
        # The nearest ratio on a logarithmic scale.
        ratio = {size: (size[1] * height, size[0] * width) for size in self.sizes}
        size = min(ratio, key=lambda size: max(ratio[size]) / min(ratio[size]))
        if self.resize == "none":
            return size, (height, width)
        scale = max(size[0] / height, size[1] / width)
        return size, (max(size[0], round(height * scale)), max(size[1], round(width * scale)))

    def _read(self, data: bytes) -> tuple[int, int, Callable[[int, int], np.ndarray]]:
        """An image's height and width, and what gives a view of it by its top and left in the resized image.

        Raises:
            ImageError: it can't be read.
        """
        if self.decode != "pillow" and (jpeg := _jpeg(data)):
            size, resized = self._fit(*jpeg.upright)
            whole = None if self._cut_first(size, resized) else jpeg.resized(resized, size, self.decode == "scaled")
            if whole is not None:
                return *jpeg.upright, partial(_crop, whole, size)
        image = decode(data)
        width, height = image.size
        size, resized = self._fit(height, width)
        if self.decode == "pillow" or self._cut_first(size, resized):
            return height, width, partial(_crop_and_resize, image, size, resized)
        whole = _resized(_array(image), (height, width), resized, _rows_first(height, width, size))
        return height, width, partial(_crop, whole, size)

    def _cut_first(self, size: Size, resized: Size) -> bool:
        """Whether views alone are resized, not the whole: a strip of 1 x 1000 pixels would become 256 x 256,000."""
        return self.resize == "shorter" and resized[0] * resized[1] > _STRETCHED * size[0] * size[1]


@cache
def _buckets(resolution: int, step: int) -> tuple[tuple[int, int], ...]:
    area, sizes = resolution**2, set()
    for short in range(step, resolution + 1, step):
        long = min(area // short, 2 * short) // step * step
        if (short + step) * long > area:  # else the short side could grow
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes))


# --- decoding ---------------------------------------------------------------------------------------------------


def decode(data: bytes) -> Image.Image:
    """By Pillow: the first frame, upright, in sRGB, on white.

    Raises:
        ImageError: empty, not an image, damaged, above Pillow's pixel limit, or of a kind that is not read.
    """
    with _reasons(data):
        return _on_white(_to_srgb(_upright(data)))  # no names: what one step is done with is free in the next


@contextmanager
def _reasons(data: bytes) -> Iterator[None]:
    """What is raised in reading these bytes, as an ImageError."""
    if not data:
        raise ImageError("empty", "zero bytes")
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too_large", str(error)) from error
    except Exception as error:  # Pillow's plugins raise whatever damaged bytes provoke in them
        if _is_of_memory(error):
            raise ImageError("out_of_memory", str(error) or "decoding takes more than there is") from error
        bomb = "data too large" in str(error)  # compressed text in a PNG
        raise ImageError("too_large" if bomb else "corrupt", f"{type(error).__name__}: {error}") from error


def _is_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)  # as PyTorch says


@dataclass(frozen=True)
class _Jpeg:
    """A JPEG, and what Pillow says of it: (height, width) as stored, EXIF's number of the orientation, if it is gray,
    the ICC profile."""

    data: bytes
    stored: Size
    orientation: int
    gray: bool
    profile: bytes | None

    @property
    def upright(self) -> Size:
        return self.stored if self.orientation < 5 else self.stored[::-1]

    def resized(self, resized: Size, size: Size, scaled: bool) -> np.ndarray | None:
        """All of it, upright, uint8 (*resized, 3), for views of a size; None where Pillow has to decide."""
        rows_first = _rows_first(*self.upright, size)
        if self.orientation >= 5:  # it is turned when it is small
            resized, rows_first = resized[::-1], not rows_first
        eighths = _eighths(self.stored, resized) if scaled else 8
        pixels = self._pixels(eighths)
        if pixels is None:
            return None
        height, width = (side * eighths / 8 for side in self.stored)
        return _turned(_resized(pixels, (height, width), resized, rows_first), self.orientation)

    def _pixels(self, eighths: int) -> np.ndarray | None:
        """By libjpeg-turbo, as stored, uint8 (H, W, 3) in sRGB, sides scaled and rounded up; None where it finds fault:
        Pillow then reads on, or says what is wrong."""
        size = tuple(-(-side * eighths // 8) for side in self.stored)
        try:
            if simplejpeg.decode_jpeg_header(self.data)[:2] != self.stored:
                return None  # or more memory could be taken than Pillow's limit allows
            pixels = simplejpeg.decode_jpeg(
                self.data,
                "GRAY" if self.gray and self.profile else "RGB",  # a profile of gray is for gray
                fastdct=False,  # as Pillow has it ...
                fastupsample=False,
                min_height=size[0],
                min_width=size[1],
                strict=True,  # ... but it says no more of damage than that there is some
            )
        except ValueError:
            return None
        if pixels.shape[:2] != size:
            return None
        if not self.profile or (not self.gray and _is_srgb(self.profile)):
            return pixels
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        image.info["icc_profile"] = self.profile
        return _array(_to_srgb(image))


def _jpeg(data: bytes) -> _Jpeg | None:
    """Of a JPEG as cameras and the web have them; None for all that Pillow reads alone: other formats, CMYK.

    Raises:
        ImageError: Pillow can't read its header, or it is above its pixel limit.
    """
    if not data.startswith(b"\xff\xd8"):
        return None
    with _reasons(data):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        exif = image.getexif()
        orientation = exif.get(ExifTags.Base.Orientation, 1)
        if orientation in _TURNS and "exif" in image.info:
            exif.tobytes()  # which Pillow does when it turns an image, and refuses those where it can't
        if image.format not in ("JPEG", "MPO") or image.mode not in ("L", "RGB"):
            return None
        upright = orientation if orientation in _TURNS else 1
        return _Jpeg(data, image.size[::-1], upright, image.mode == "L", image.info.get("icc_profile"))


def _eighths(stored: Size, resized: Size) -> int:
    """The fewest that a JPEG can be decoded to."""
    wanted = [min(OVERSAMPLING * small, whole) for whole, small in zip(stored, resized, strict=True)]
    return next(n for n in _EIGHTHS if all(w * n >= 8 * s for w, s in zip(stored, wanted, strict=True)))


def _unidentified(data: bytes) -> ImageError:
    """Why: Pillow says the same of a text file and of a damaged JPEG; the format's own plugin knows more."""
    if data[4:8] == b"ftyp" and data[8:11] in (b"hei", b"hev", b"mif") and b"av01" not in data[:4096]:
        return ImageError("unsupported", "a HEIC image; convert it to JPEG, PNG or AVIF")
    for name in FORMATS:
        plugin, accepts = Image.OPEN[name]
        accepted = accepts(data[:16]) if accepts else False
        if isinstance(accepted, str):  # Pillow was built without the format's library
            return ImageError("unsupported", accepted)
        if not accepted:
            continue
        if name == "AVIF" and (start := data.find(b"ispe", 0, 4096)) > 0 and len(data) >= start + 16:
            width, height = struct.unpack_from(">II", data, start + 8)
            if width * height > 2**28 or max(width, height) > 2**15:  # libavif's limits
                return ImageError("too_large", f"an AVIF image of {width}x{height} pixels")
        try:
            plugin(io.BytesIO(data), "")
        except (SyntaxError, IndexError, TypeError, struct.error) as error:  # those that Image.open keeps silent
            if not str(error).startswith("not a "):  # else text that happens to begin like one
                reason = "unsupported" if "bit layers" in str(error) else "corrupt"  # JPEG with 12 bits a sample
                return ImageError(reason, f"begins as {name}, but: {error}")
    return ImageError("not_an_image", f"can't be identified as an image (first bytes: {data[:8]!r})")


def _upright(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _to_srgb(image: Image.Image) -> Image.Image:
    """RGB, or RGBA where parts are transparent."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = _from_16_bits(image)  # Pillow's own conversion clips at 255
    if image.mode in ("I", "F"):
        raise ImageError("unsupported", f"pixels of mode {image.mode} ({image.format}) have no defined range")
    if image.has_transparency_data:
        image = _as(image, "RGBA")
    elif image.mode in ("P", "1"):
        image = image.convert("RGB")
    target = "RGBA" if image.mode == "RGBA" else "RGB"
    if profile:
        try:
            if target == "RGBA" and _is_gray(profile):
                return _gray_with_alpha(image, profile)
            return _converted(image, profile, target)
        except (ImageCms.PyCMSError, OSError):
            # A damaged profile, or one of another colour space than the pixels: viewers ignore it, and so do we.
            return _as(image, target)
    return _as(image, target)


def _converted(image: Image.Image, profile: bytes, mode: str) -> Image.Image:
    return _conversion(profile, image.mode, mode).apply(image)


@lru_cache(maxsize=64)  # of a camera's or a program's many images; to build one takes longer than to apply it
def _conversion(profile: bytes, mode: str, target: str) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(io.BytesIO(profile), _SRGB, mode, target)


@lru_cache(maxsize=64)
def _is_srgb(profile: bytes) -> bool:
    """Whether it changes colours by a level at most, and hardly any by that: most profiles are sRGB's own, and to apply
    one takes longer than to decode the image. Below 0.01 it is 68 dB."""
    levels = np.linspace(0, 255, 33).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(33, -1, 3)
    try:
        converted = _conversion(profile, "RGB", "RGB").apply(Image.fromarray(colours))
    except (ImageCms.PyCMSError, OSError):
        return False
    change = np.square(np.asarray(converted).astype(float) - colours)
    return change.max() <= 1 and change.mean() <= 0.01


def _is_gray(profile: bytes) -> bool:
    return ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip() == "GRAY"


def _gray_with_alpha(image: Image.Image, profile: bytes) -> Image.Image:
    """Of RGBA pixels that were gray ones in the file: Pillow has no profiles of gray with alpha."""
    red, green, blue, alpha = image.split()
    if not red.tobytes() == green.tobytes() == blue.tobytes():
        return image
    result = _converted(red, profile, "RGB")
    result.putalpha(alpha)
    return result


def _as(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # which copies also where there is nothing to do


def _from_16_bits(image: Image.Image) -> Image.Image:
    bits = 16
    if image.format == "TIFF":  # 12-bit samples are not spread over 16 bits
        bits = min(16, int(image.tag_v2.get(258, (16,))[0]))  # type: ignore[attr-defined]  # 258: BitsPerSample
    values = np.asarray(image)
    gray = np.empty(values.shape, dtype=np.uint8)
    for start in range(0, len(values), _STRIP):
        rows = slice(start, start + _STRIP)
        gray[rows] = (values[rows] * (255 / (2**bits - 1)) + 0.5).clip(0, 255)
    return Image.fromarray(gray)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image
    result = Image.new("RGB", image.size)
    for top in range(0, image.height, _STRIP):
        strip = image.crop((0, top, image.width, min(top + _STRIP, image.height)))
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        result.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return result


# --- resizing ---------------------------------------------------------------------------------------------------


def _crop_and_resize(image: Image.Image, size: Size, resized: Size, top: int, left: int) -> np.ndarray:
    width, height = image.size
    bottom, right = top + size[0], left + size[1]
    box = (
        left * width / resized[1],
        top * height / resized[0],
        min(right * width / resized[1], width),
        min(bottom * height / resized[0], height),
    )
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, box=box))


def _crop(whole: np.ndarray, size: Size, top: int, left: int) -> np.ndarray:
    return whole[top : top + size[0], left : left + size[1]].copy()  # which does not keep the whole


def _rows_first(height: int, width: int, size: Size) -> bool:
    """Whether Pillow (13) would resize rows before columns on the way to views of a size. What is between the two is
    rounded, so that in the other order 54 dB come of 70."""
    fewer = height - size[0]
    return fewer > 0 and fewer > 2 * (width - size[1])


def _resized(pixels: np.ndarray, whole: tuple[float, float], resized: Size, rows_first: bool) -> np.ndarray:
    """uint8 (H, W, 3) -> (*resized, 3), antialiased bicubic, by PyTorch, on this thread alone.

    Args:
        whole: the image's (height, width) in these pixels: H and W, or a little less where the last ones are cut by its
            edge.
    """
    if pixels.shape[:2] == resized:
        return pixels
    images = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # channels last in memory: twice as fast
    # A trifle more, because sizes are rounded down.
    down, across = (small / side * (1 + 1e-12) for small, side in zip(resized, whole, strict=True))
    if rows_first:
        images = F.interpolate(images, scale_factor=(down, 1.0), mode="bicubic", antialias=True)[:, :, : resized[0]]
        down = 1.0
    images = F.interpolate(images, scale_factor=(down, across), mode="bicubic", antialias=True)
    return images[0].permute(1, 2, 0).numpy()[: resized[0], : resized[1]]


# How an image is seen, by the orientation that EXIF says it is stored in.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    return _TURNS[orientation](pixels) if orientation in _TURNS else pixels


# --- tensors ----------------------------------------------------------------------------------------------------


def _array(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3) of an RGB image."""
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    for top in range(0, image.height, _STRIP):
        strip = image.crop((0, top, image.width, min(top + _STRIP, image.height)))
        pixels[top : top + _STRIP] = np.asarray(strip)
    return pixels


def to_tensor(
    pixels: np.ndarray | torch.Tensor, memory_format: torch.memory_format = torch.contiguous_format
) -> torch.Tensor:
    """uint8 NHWC -> float32 NCHW in [-1, 1], on the device where the pixels are. `channels_last` saves a copy."""
    if isinstance(pixels, np.ndarray):
        pixels = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous(memory_format=memory_format)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """float NCHW in [-1, 1] (clipped) -> uint8 NHWC."""
    values = images.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return values.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
