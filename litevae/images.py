"""From encoded bytes to pixels: the one image transform, and its identity.

EXIF orientation -> sRGB -> alpha on white -> antialiased bicubic resize of the shorter side -> crop -> flip, decoded
in full by Pillow. Pixels are uint8 RGB HWC until they reach the model's device.
"""

import io
from dataclasses import asdict, dataclass
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
    """pixels: uint8 (resolution, resolution, 3); height, width: of the whole image, upright; crop_top, crop_left:
    in pixels of the resized image, before the flip."""

    pixels: np.ndarray
    height: int
    width: int
    crop_top: int
    crop_left: int
    flip: bool


@dataclass(frozen=True)
class ImageTransform:
    """Encoded image -> square uint8 pixels.

    Args:
        resolution: side in pixels.
        resize: "shorter" side to the resolution; "none" crops the original pixels.
        crop: "center", or "random" from the seed of the call.
        flip: mirror half of the images, by the same seed.
    """

    resolution: int
    resize: Literal["shorter", "none"] = "shorter"
    crop: Literal["center", "random"] = "center"
    flip: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the pixels depend on; images with equal identities compare."""
        steps = "exif, srgb, alpha on white, bicubic antialiased, crop, flip"
        libraries = {"Pillow": PIL.__version__, "libjpeg-turbo": features.version("libjpeg_turbo")}
        return {"steps": steps, **asdict(self), **libraries}

    def __call__(self, data: bytes, seed: int | None = None) -> Transformed:
        """
        Raises:
            ImageError: the image can't be read, or is smaller than the crop.
        """
        image = decode(data)
        side, width, height = self.resolution, *image.size
        shorter = side if self.resize == "shorter" else min(width, height)
        if shorter < side:
            raise ImageError("too_small", f"{width}x{height} pixels, less than the crop of {side}")
        scale = shorter / min(width, height)
        wide, high = max(shorter, round(width * scale)), max(shorter, round(height * scale))
        top, left, flip = (high - side) // 2, (wide - side) // 2, False
        if self.crop == "random" or self.flip:
            if seed is None:
                raise ValueError("a random crop or flip needs a seed")
            draw = np.random.default_rng(seed)
            if self.crop == "random":
                top, left = (int(draw.integers(size - side + 1)) for size in (high, wide))
            flip = self.flip and bool(draw.random() < 0.5)
        # Only the crop is resized: a strip of 1 x 1000 pixels would otherwise become one of 256 x 256,000.
        box = (
            left * width / wide,
            top * height / high,
            min((left + side) * width / wide, width),
            min((top + side) * height / high, height),
        )
        pixels = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=box))
        return Transformed(np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels, height, width, top, left, flip)


def decode(data: bytes) -> Image.Image:
    """The first frame, upright, in sRGB, on white.

    Raises:
        ImageError: empty, not an image, damaged, above Pillow's pixel limit, or without a defined range.
    """
    if not data:
        raise ImageError("empty", "zero bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return _on_white(_to_srgb(image))
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("not_an_image", f"can't be identified as an image (first bytes: {data[:8]!r})") from error
    except Image.DecompressionBombError as error:
        raise ImageError("too_large", str(error)) from error
    except Exception as error:  # Pillow's plugins raise whatever damaged bytes provoke in them
        bomb = "data too large" in str(error)  # compressed text in a PNG
        raise ImageError("too_large" if bomb else "corrupt", f"{type(error).__name__}: {error}") from error


def _to_srgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _from_16_bits(image)  # Pillow's own conversion clips at 255
    if image.mode in ("I", "F"):
        raise ImageError("unsupported", f"pixels of mode {image.mode} ({image.format}) have no defined range")
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode in ("P", "1"):
        image = image.convert("RGB")
    target = "RGBA" if image.mode == "RGBA" else "RGB"
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, _SRGB, outputMode=target)
            assert converted is not None  # only when inPlace
            return converted
        except (ImageCms.PyCMSError, OSError):
            # A damaged profile, or one of another colour space than the pixels: viewers ignore it, and so do we.
            return image.convert(target)
    return image.convert(target)


def _from_16_bits(image: Image.Image) -> Image.Image:
    bits = 16
    if image.format == "TIFF":  # 12-bit samples are not spread over 16 bits
        bits = min(16, int(image.tag_v2.get(258, (16,))[0]))  # type: ignore[attr-defined]  # 258: BitsPerSample
    values = np.asarray(image).astype(np.float64) * (255 / (2**bits - 1))
    return Image.fromarray((values + 0.5).clip(0, 255).astype(np.uint8)).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def to_tensor(pixels: np.ndarray | torch.Tensor) -> torch.Tensor:
    """uint8 NHWC -> float32 NCHW in [-1, 1], on the device where the pixels are."""
    if isinstance(pixels, np.ndarray):
        pixels = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """float NCHW in [-1, 1] (clipped) -> uint8 NHWC."""
    values = images.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return values.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
