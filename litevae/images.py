"""From encoded bytes to pixels: the one image transform, and its identity.

EXIF orientation -> sRGB -> alpha on white -> antialiased bicubic resize -> crop -> flip, decoded in full by Pillow.
Pixels are uint8 RGB HWC until they reach the model's device.
"""

import io
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import PIL
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError, features

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


class ImageError(UserError):
    """An image that can't be used.

    `reason` is its class: empty, not_an_image, too_large, corrupt, unsupported, too_small; a source adds missing
    and unreadable, an encoder not_finite and out_of_range.
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
    """

    resolution: int
    resize: Literal["shorter", "none"] = "shorter"
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    crops: int = 1
    both: bool = False
    buckets: bool = False
    bucket_step: int = 64

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
        libraries = {"Pillow": PIL.__version__, "libjpeg-turbo": features.version("libjpeg_turbo")}
        return {"steps": steps, **asdict(self), **libraries}

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
        return next(self._views(decode(data), seed))

    def all(self, data: bytes, seed: int | None = None) -> list[Transformed]:
        """Every view: crop 0, crop 0 mirrored, crop 1, ... The image is decoded once.

        Raises:
            ImageError: the image can't be read, or is smaller than the crop.
        """
        return list(self._views(decode(data), seed))

    def _views(self, image: Image.Image, seed: int | None) -> Iterator[Transformed]:
        width, height = image.size
        # The nearest ratio on a logarithmic scale.
        ratio = {size: (size[1] * height, size[0] * width) for size in self.sizes}
        size = min(ratio, key=lambda size: max(ratio[size]) / min(ratio[size]))
        scale = 1.0
        if self.resize == "shorter":
            scale = max(size[0] / height, size[1] / width)
        elif min(height, width) < self.resolution:
            raise ImageError("too_small", f"{width}x{height} pixels, less than the crop of {self.resolution}")
        if self.crop == "random" or self.flip:
            if seed is None:
                raise ValueError("a random crop or flip needs a seed")
            draw = np.random.default_rng(seed)
        resized = max(size[0], round(height * scale)), max(size[1], round(width * scale))
        for _ in range(self.crops):
            room = [whole - side for whole, side in zip(resized, size, strict=True)]
            top, left = (int(draw.integers(r + 1)) for r in room) if self.crop == "random" else (r // 2 for r in room)
            # Only the crop is resized: a strip of 1 x 1000 pixels would otherwise become one of 256 x 256,000.
            bottom, right = top + size[0], left + size[1]
            box = (
                left * width / resized[1],
                top * height / resized[0],
                min(right * width / resized[1], width),
                min(bottom * height / resized[0], height),
            )
            pixels = np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC, box=box))
            flips = (False, True) if self.both else (self.flip and bool(draw.random() < 0.5),)
            for flip in flips:
                view = np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels
                yield Transformed(view, height, width, top, left, flip)


@cache
def _buckets(resolution: int, step: int) -> tuple[tuple[int, int], ...]:
    area, sizes = resolution**2, set()
    for short in range(step, resolution + 1, step):
        long = min(area // short, 2 * short) // step * step
        if (short + step) * long > area:  # else the short side could grow
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes))


def decode(data: bytes) -> Image.Image:
    """The first frame, upright, in sRGB, on white.

    Raises:
        ImageError: empty, not an image, damaged, above Pillow's pixel limit, or of a kind that is not read.
    """
    if not data:
        raise ImageError("empty", "zero bytes")
    try:
        return _on_white(_to_srgb(_upright(data)))  # no names: what one step is done with is free in the next
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too_large", str(error)) from error
    except Exception as error:  # Pillow's plugins raise whatever damaged bytes provoke in them
        bomb = "data too large" in str(error)  # compressed text in a PNG
        raise ImageError("too_large" if bomb else "corrupt", f"{type(error).__name__}: {error}") from error


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
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if target == "RGBA" and source.profile.xcolor_space.strip() == "GRAY":
                return _gray_with_alpha(image, source)
            return _converted(image, source, target)
        except (ImageCms.PyCMSError, OSError):
            # A damaged profile, or one of another colour space than the pixels: viewers ignore it, and so do we.
            return _as(image, target)
    return _as(image, target)


def _converted(image: Image.Image, source: ImageCms.ImageCmsProfile, mode: str) -> Image.Image:
    converted = ImageCms.profileToProfile(image, source, _SRGB, outputMode=mode)
    assert converted is not None  # only when inPlace
    return converted


def _gray_with_alpha(image: Image.Image, source: ImageCms.ImageCmsProfile) -> Image.Image:
    """Of RGBA pixels that were gray ones in the file: Pillow has no profiles of gray with alpha."""
    red, green, blue, alpha = image.split()
    if not red.tobytes() == green.tobytes() == blue.tobytes():
        return image
    result = _converted(red, source, "RGB")
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


def to_tensor(pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 NHWC -> float32 NCHW in [-1, 1], on the device where the pixels are."""
    if isinstance(pixels, np.ndarray):
        pixels = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """float NCHW in [-1, 1] (clipped) -> uint8 NHWC."""
    values = images.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return values.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
