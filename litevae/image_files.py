"""Open encoded image files by Pillow: which formats, up to which size, and why a file is refused.

Metadata never decides whether pixels can be read. What is wrong with EXIF, XMP, a colour profile or text costs only
that metadata (see `image_metadata`).
"""

import importlib
import io
import re
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin

from litevae import image_metadata
from litevae.errors import UserError

Image.init()
# This is not Pillow's whole list: some of its plugins start other programs (EPS), are not formats for photos, or take
# any bytes for an image (TGA, which has no signature).
FORMATS: list[str] = [
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "AVIF", "JPEG2000", "PPM", "PSD")
    if name in Image.OPEN
]
# Formats that Pillow reads with a further package: (module, package, name of the format).
OPTIONAL = {
    "HEIF": ("pillow_heif", "pillow-heif", "HEIC"),
    "JXL": ("pillow_jxl", "pillow-jxl-plugin", "JPEG XL"),
}
# Image formats that are known but not read: (position, signature, name).
_OTHERS = (
    (0, b"II\xbc\x01", "JPEG XR"),
    (0, b"v/1\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
    (0, b"#?RGBE", "Radiance HDR"),
    (0, b"qoif", "QOI"),
    (0, b"BPG\xfb", "BPG"),
    (0, b"DDS ", "DDS"),
    (0, b"SDPX", "DPX"),
    (0, b"XPDS", "DPX"),
    (0, b"SIMPLE  =", "FITS"),
    (0, b"\x8aMNG\r\n", "MNG"),
    (0, b"\x8bJNG\r\n", "JNG"),
    (0, b"gimp xcf", "GIMP (XCF)"),
    (0, b"8BPS\0\2", "large Photoshop (PSB)"),
    (0, b"AT&TFORM", "DjVu"),
    (8, b"CR\2\0", "camera raw (CR2)"),
    (4, b"ftypcrx ", "camera raw (CR3)"),
    (0, b"FUJIFILMCCD-RAW", "camera raw (RAF)"),
    (0, b"FOVb", "camera raw (X3F)"),
    (0, b"IIRO", "camera raw (ORF)"),
    (0, b"IIRS", "camera raw (ORF)"),
    (0, b"MMOR", "camera raw (ORF)"),
    (0, b"IIU\0", "camera raw (RW2)"),
)
# What else lies where images should be, often in all of a data set's files: first bytes, and what to say.
_NO_IMAGES = (
    (rb"version https://git-lfs", "a pointer of Git LFS, not the file itself, which `git lfs pull` fetches"),
    (rb"(?i)\s*<(?:!doctype )?html", "an HTML page, as servers send it in place of a file; download it again"),
    (rb"(?i)\s*(?:<\?xml[^>]*>\s*)?(?:<!doctype svg[^>]*>\s*)?<svg", "an SVG drawing, which has no pixels"),
    (rb"/9j/|iVBORw0KGgo|UklGR|R0lGOD|(?i:data:image/)", "an image as base64 text; decode it first (base64.b64decode)"),
    (rb"(?i)ffd8ff|89504e470d0a", "an image as hexadecimal text; decode it first (bytes.fromhex)"),
    (rb"b['\"]\\x(?:ff|89)", "an image's bytes as Python prints them; decode it first (ast.literal_eval)"),
    (rb"\x93NUMPY", "a NumPy array; write it as an image"),
    (rb"\x80[\x02-\x05]", "a Python pickle; write what it holds as an image"),
    (rb"%PDF-", "a PDF"),
    (rb"PK\x03\x04", "a zip archive"),
    (rb"\x1f\x8b", "gzip-compressed; unpack it first"),
    (rb"(?s:....)ftyp|\x1aE\xdf\xa3|RIFF(?s:....)AVI ", "a video"),
)
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1", b"mif2"}
_AVIF_BRANDS = {b"avif", b"avis"}
_INSTEAD = "convert it to JPEG, PNG or AVIF"
# Pillow's messages about files in which nothing is damaged.
_UNSUPPORTED = re.compile(r"unsupported|not (yet )?supported|cannot handle|unable to determine J2K", re.IGNORECASE)
# Kinds of TIFF that Pillow reads only in one byte order or with black at 0; `images` inverts where white is at 0.
for _order, _zero, _bits, _mode in (
    (b"MM", 0, 16, ("I;16B", "I;16B")),
    (b"MM", 1, 12, ("I;16", "I;12")),
    (b"MM", 0, 12, ("I;16", "I;12")),
    (b"II", 0, 12, ("I;16", "I;12")),
):
    TiffImagePlugin.OPEN_INFO.setdefault((_order, _zero, (1,), 1, (_bits,), ()), _mode)
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # bytes of the second header
_PSD_MODES = {0: "bitmap", 1: "gray", 2: "palette", 3: "RGB", 4: "CMYK", 7: "multichannel", 8: "duotone", 9: "Lab"}
_LOCK = threading.Lock()
Result = TypeVar("Result")


class ImageError(UserError):
    """An image can't be used.

    Attributes:
        reason: The kind of problem: "empty", "not_an_image", "too_large", "corrupt", "unsupported", "too_small" or
            "out_of_memory". Sources also use "missing" and "unreadable"; encoders also use "not_finite" and
            "out_of_range".
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return type(self), (self.reason, str(self))


# --- opening ----------------------------------------------------------------------------------------------------


def load_upright(data: bytes, max_pixels: int) -> Image.Image:
    """Decode the first frame of an image by Pillow, and rotate it as its metadata says.

    Args:
        data: The bytes of the file.
        max_pixels: Size of the largest image that is decoded.

    Returns:
        The image, in the mode in which it is stored. Of its metadata, `info` has "icc_profile" and "transparency".

    Raises:
        ImageError: The file is empty, not an image, damaged, too large, or of an unsupported kind.
    """

    def load(pixels: bytes, metadata: dict[str, Any] | None) -> Image.Image:
        image = _open(pixels, metadata, max_pixels)
        orientation = orientation_of(image)
        with _pillow_allows(image.size):
            image.load()
            if image.format == "PNG":
                _apply_key(image, pixels)
            _turn(image, orientation)
        return image

    return _read(data, max_pixels, load)


def open_header(data: bytes, max_pixels: int) -> tuple[Image.Image, bytes]:
    """Read the header of an image, and nothing of its pixels.

    Returns:
        The opened image with its metadata in `info`, and the bytes that its pixels are to be decoded from.

    Raises:
        ImageError: As for `load_upright`.
    """
    return _read(data, max_pixels, lambda pixels, metadata: (_open(pixels, metadata, max_pixels), pixels))


def orientation_of(image: Image.Image) -> int:
    """Return the orientation of an opened image, 1 to 8 as EXIF counts; 1 where none can be read.

    Whatever else EXIF and XMP hold does not matter.
    """
    if image.format == "JXL" and not getattr(image, "jpeg", None):
        return 1  # the decoder has applied the orientation of the codestream, and the standard ignores that of EXIF
    if image.format == "TIFF":
        return 1  # Pillow turns it itself, or `_turn` does
    return image_metadata.orientation(image.info.get("exif"), image.info.get("xmp"))


def _turn(image: Image.Image, orientation: int) -> None:
    """Rotate a loaded image in place."""
    if image.format != "TIFF":
        for name in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"):
            image.info.pop(name, None)  # Pillow would write them anew, and fail where they are damaged
        exif = image.getexif()
        exif.clear()
        exif[ExifTags.Base.Orientation] = orientation
    ImageOps.exif_transpose(image, in_place=True)


def _read(data: bytes, max_pixels: int, work: Callable[[bytes, dict[str, Any] | None], Result]) -> Result:
    """Call `work` with the bytes of a file; if it fails, once more with the same file without its metadata.

    Args:
        data: The bytes of the file.
        max_pixels: Size of the largest image, for the error message.
        work: Gets bytes, and the metadata that has been taken out of them; None if all of it is still in them.
    """
    with reasons(data, max_pixels):
        pixels, metadata = image_metadata.without_png_chunks(data)
        try:
            return work(pixels, metadata)
        except Exception as error:
            bare = None if _is_final(error) else image_metadata.bare(data)
            if bare is None:
                raise
            first = error
        try:
            return work(*bare)
        except Exception as error:
            if _is_final(error):
                raise
            raise first from None


def _is_final(error: Exception) -> bool:
    """Return whether an error can't be the fault of metadata."""
    if isinstance(error, ImageError):
        return error.reason not in ("corrupt", "not_an_image")
    return is_of_memory(error) or isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning))


@contextmanager
def reasons(data: bytes, max_pixels: int) -> Iterator[None]:
    """Turn all errors that are raised while these bytes are read into an ImageError."""
    if not data:
        raise ImageError("empty", "zero bytes")
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too_large", f"{error} {_how_to_raise(max_pixels)}") from error
    except Exception as error:  # damaged bytes can make Pillow's plugins raise any error
        if is_of_memory(error):
            raise ImageError("out_of_memory", str(error) or "decoding takes more than there is") from error
        if _UNSUPPORTED.search(str(error)):
            raise ImageError("unsupported", f"{error}; {_INSTEAD}") from error
        if (marker := image_metadata.jpeg_frame(data)) in image_metadata.RARE_FRAMES:
            kind = image_metadata.RARE_FRAMES[marker]
            raise ImageError("unsupported", f"{kind} JPEG; {_INSTEAD}") from error
        raise ImageError("corrupt", f"{type(error).__name__}: {error}") from error


def is_of_memory(error: Exception) -> bool:
    """Return whether an error means that memory ran out."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)  # PyTorch's message


def _open(data: bytes, metadata: dict[str, Any] | None, max_pixels: int) -> Image.Image:
    """Read the header of an image, as `Image.open` does but with our own limit and reasons.

    Args:
        data: The bytes of the file.
        metadata: What replaces "exif", "xmp" and "icc_profile" in the `info` of the image; None keeps Pillow's.
        max_pixels: Size of the largest image.
    """
    for name in _formats_of(data):
        plugin, accepts = Image.OPEN[name]
        accepted = accepts(data[:16]) if accepts else False
        if name == "BMP" and int.from_bytes(data[14:18], "little") not in _BMP_HEADERS:
            continue  # it is text that happens to begin with BM
        if isinstance(accepted, str):  # the reason: Pillow was built without the library of this format
            raise ImageError("unsupported", accepted)
        if not accepted:
            continue
        if name == "JXL" and (size := _jxl_size(data)):
            _check_size(size, max_pixels)  # the plugin decodes when it opens
        try:
            image = _opened_by(plugin, data, max_pixels)
        except (SyntaxError, IndexError, TypeError, KeyError, struct.error) as error:
            if str(error).startswith("not a "):
                continue  # it is text that happens to begin like this format
            raise _refusal(name, data, error) from error
        _check_size(image.size, max_pixels)
        _check_tiff(image)
        if metadata is not None:
            for key in ("exif", "xmp", "icc_profile"):
                image.info.pop(key, None)
            image.info.update(metadata)
        return image
    raise _unidentified(data)


def _opened_by(plugin: Any, data: bytes, max_pixels: int) -> Image.Image:
    try:
        return plugin(io.BytesIO(data), "")
    except Image.DecompressionBombError as error:
        # Some plugins ask Pillow's own limit before they reserve memory.
        pixels = re.search(r"\((\d+) pixels", str(error))
        if not pixels or int(pixels[1]) > max_pixels:
            raise
    with _pillow_allows((max_pixels, 1)):
        return plugin(io.BytesIO(data), "")


@contextmanager
def _pillow_allows(size: tuple[int, int]) -> Iterator[None]:
    """Lift Pillow's own limit, which is global, only while an image above it is decoded that ours allows."""
    if Image.MAX_IMAGE_PIXELS is None or size[0] * size[1] <= Image.MAX_IMAGE_PIXELS:
        yield
        return
    with _LOCK:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        pixels = f"{size[0]}x{size[1]} = {size[0] * size[1]:,} pixels"
        raise ImageError("too_large", f"{pixels}, {_how_to_raise(max_pixels)}")


def _how_to_raise(max_pixels: int) -> str:
    return (
        f"above the limit of {max_pixels:,}; raise transform.max_pixels (training: data.max_pixels; retry: max_pixels)"
    )


# --- formats ----------------------------------------------------------------------------------------------------


def _formats_of(data: bytes) -> list[str]:
    """Return the formats that a file can have, after making sure that Pillow can read them.

    Raises:
        ImageError: The format takes a package that is not installed.
    """
    name = _optional_format(data)
    if not name:
        return FORMATS
    module, package, shown = OPTIONAL[name]
    if not _register(module):
        hint = f"install {package} (pip install 'litevae[formats]'), or {_INSTEAD}"
        raise ImageError("unsupported", f"a {shown} image, which Pillow alone does not read; {hint}")
    return [name]


def _optional_format(data: bytes) -> str | None:
    """Return the key in `OPTIONAL` of the format of a file, if it has such a one."""
    if data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")):
        return "JXL"
    if data[4:8] != b"ftyp":
        return None
    end = min(int.from_bytes(data[:4]), len(data), 256)
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, end - 3, 4))}
    return "HEIF" if brands & _HEIF_BRANDS and not brands & _AVIF_BRANDS else None


@cache
def _register(module: str) -> bool:
    """Register the plugin of an optional format; return whether it is installed.

    It is imported only when such a file is met, since few data sets have any.
    """
    try:
        plugin = importlib.import_module(module)
    except ImportError:
        return False
    # As all decoding here, on the calling thread only.
    if module == "pillow_heif":
        plugin.register_heif_opener(decode_threads=1, thumbnails=False, depth_images=False, aux_images=False)
    else:
        plugin.JpegXLImagePlugin.DECODE_THREADS = 0
    return True


def _unidentified(data: bytes) -> ImageError:
    """Return the error for a file of none of our formats."""
    for at, signature, shown in _OTHERS:
        if data.startswith(signature, at):
            return ImageError("unsupported", f"an image of the format {shown}; {_INSTEAD}")
    for pattern, shown in _NO_IMAGES:
        if re.match(pattern, data[:256]):
            return ImageError("not_an_image", f"not an image but {shown}")
    return ImageError("not_an_image", f"can't be identified as an image (first bytes: {data[:8]!r})")


def _refusal(name: str, data: bytes, error: Exception) -> ImageError:
    """Return the error for a file that begins as a format but whose header Pillow can't read.

    Args:
        name: The format.
        data: The bytes of the file.
        error: What its plugin raised.
    """
    text = str(error)
    if name == "AVIF" and (start := data.find(b"ispe", 0, 4096)) > 0 and len(data) >= start + 16:
        width, height = struct.unpack_from(">II", data, start + 8)
        if width * height > 2**28 or max(width, height) > 2**15:  # libavif's limits
            return ImageError("too_large", f"an AVIF image of {width}x{height} pixels")
    unidentified = _unidentified(data)
    if unidentified.reason == "unsupported":  # a camera's raw file is a TIFF, for one
        return unidentified
    if name == "HEIF" and "limit" in text.lower():  # libheif's
        return ImageError("too_large", f"a HEIC image: {text}")
    kind = _kind(name, data, text)
    if kind or _UNSUPPORTED.search(text):
        return ImageError("unsupported", f"{kind or f'{name} that Pillow does not read: {text}'}; {_INSTEAD}")
    return ImageError("corrupt", f"begins as {name}, but: {error}")


def _kind(name: str, data: bytes, text: str) -> str:
    """Return what a file is that Pillow does not read although nothing is damaged; "" if something is.

    Args:
        name: The format.
        data: The bytes of the file.
        text: The message of Pillow's plugin.
    """
    if name == "TIFF":
        return _tiff_kind(data)
    if name == "PSD" and len(data) >= 26:
        channels, bits, mode = struct.unpack_from(">H8xHH", data, 12)
        if mode in _PSD_MODES and bits in (1, 8, 16, 32) and text.startswith("("):
            return f"{bits}-bit {_PSD_MODES[mode]} PSD of {channels} channels"
    if name == "JPEG2000" and (at := data.find(b"ihdr", 0, 4096)) > 0 and len(data) >= at + 14:
        channels = int.from_bytes(data[at + 12 : at + 14])
        if channels > 4:
            return f"JPEG 2000 of {channels} channels"
    if name == "JPEG" and (found := re.fullmatch(r"cannot handle (\d+)-(bit layers|layer images)", text)):
        return f"{found[1]}-bit JPEG" if found[2] == "bit layers" else f"JPEG of {found[1]} channels"
    return ""


# --- TIFF -------------------------------------------------------------------------------------------------------

_PHOTOMETRIC = {
    0: "gray", 1: "gray", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr", 8: "Lab", 9: "Lab", 10: "Lab",
    32803: "camera raw", 32844: "LogL", 32845: "LogLuv", 34892: "camera raw",
}  # fmt: skip
_SAMPLES = {1: "", 2: "signed ", 3: "float ", 4: "", 5: "complex ", 6: "complex "}
_COLOURS = {"gray": 1, "palette": 1, "mask": 1, "CMYK": 4, "LogL": 1}  # 3 of all others


def _tiff_kind(data: bytes) -> str:
    """Return what a TIFF holds, e.g. "16-bit float RGB TIFF"; "" if Pillow reads that, or if the tags make no sense."""
    tags = image_metadata.tiff_tags(data)
    bits, form, compression = tags.get(258, (1,)), tags.get(339, (1,)), tags.get(259, (1,))[0]
    photometric, samples = tags.get(262, (0,))[0], tags.get(277, (len(bits),))[0]
    name = _PHOTOMETRIC.get(photometric, "")
    if not (name and form[0] in _SAMPLES and len(bits) in (1, samples, 64) and tags.keys() >= {256, 257}):
        return ""
    key = (data[:2], photometric, form[:1], tags.get(266, (1,))[0], bits[:1] * samples, tags.get(338, ()))
    known = compression in TiffImagePlugin.COMPRESSION_INFO
    if known and key in TiffImagePlugin.OPEN_INFO:
        return ""
    sizes = "/".join(map(str, sorted({*bits})))
    more = samples - _COLOURS.get(name, 3)
    extra = f" with {more} further channel{'s' * (more > 1)}" if more > 0 else ""
    packed = "" if known else f", compressed by method {compression}"
    return f"{sizes}-bit {_SAMPLES[form[0]]}{name} TIFF{extra}{packed}"


def _check_tiff(image: Image.Image) -> None:
    """See to TIFFs of which Pillow would read something else than the picture.

    Raises:
        ImageError: Samples are signed, which Pillow takes for unsigned at 8 bits; or the file is a camera's raw file,
            whose first image is a thumbnail.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    tags = image.tag_v2
    bits = tags.get(258, (1,))
    if 50706 in tags or (330 in tags and tags.get(254, 0) == 1):  # DNGVersion; SubIFDs beside a reduced image
        raise ImageError("unsupported", f"a camera's raw file (DNG, NEF or alike); {_INSTEAD}")
    if tags.get(339, (1,))[0] == 2:
        raise ImageError("unsupported", f"{bits[0]}-bit signed TIFF, whose pixels have no defined range; {_INSTEAD}")
    if tags.get(284, 1) == 2 and bits[0] == 16 and not image.use_load_libtiff:
        # Of uncompressed planes Pillow itself would read single bytes; libtiff reads them right.
        size = getattr(image, "_tile_size", image.size)  # as it is stored; in older versions of Pillow always so
        whole = ("libtiff", (0, 0, *size), 0, (f"{image.mode};16N", False, tags.offset))
        image.tile = [_tile_like(image.tile[0], whole)]
        image.use_load_libtiff = True


def _tile_like(tile: Any, fields: tuple[Any, ...]) -> Any:
    """Return a tile of Pillow's with these fields: a named tuple, or a plain one in older versions."""
    return getattr(tile, "_make", tuple)(fields)


# --- PNG and JPEG XL --------------------------------------------------------------------------------------------


def _apply_key(image: Image.Image, data: bytes) -> None:
    """Make a PNG's transparent colour (tRNS) count at all depths, as Pillow does at 8 bits.

    At 2 and 4 bits Pillow scales the pixels but not the colour. Of 16-bit RGB it keeps the upper bytes only.
    """
    key, bits = image.info.get("transparency"), data[24]
    if isinstance(key, int) and image.mode == "L" and bits in (2, 4):
        image.info["transparency"] = key * (255 // (2**bits - 1))
    if not isinstance(key, tuple) or image.mode != "RGB" or bits != 16:
        return
    lower = Image.OPEN["PNG"][0](io.BytesIO(data), "")
    lower.tile = [_tile_like(tile, (*tile[:3], "RGB;16L")) for tile in lower.tile]  # the other byte of each sample
    lower.load()
    alpha = Image.new("L", image.size, 255)
    for top in range(0, image.height, 64):
        box = (0, top, image.width, min(top + 64, image.height))
        match = np.ones((box[3] - top, image.width), dtype=bool)
        for part, values in ((image, [v >> 8 for v in key]), (lower, [v & 255 for v in key])):
            match &= (np.asarray(part.crop(box)) == values).all(axis=2)
        alpha.paste(Image.fromarray(np.where(match, 0, 255).astype(np.uint8)), (0, top))
    del image.info["transparency"]
    image.putalpha(alpha)


def _jxl_size(data: bytes) -> tuple[int, int] | None:
    """Return the (width, height) that the header of a JPEG XL states (ISO 18181-1, SizeHeader); None if it is cut."""
    at = 0
    if not data.startswith(b"\xff\x0a"):
        at = next((m.end() for m in re.finditer(rb"jxlc|jxlp....", data[:65536], re.DOTALL)), -1)
        if at < 0 or data[at : at + 2] != b"\xff\x0a":
            return None
    bits = int.from_bytes(data[at + 2 : at + 18], "little")

    def take(count: int) -> int:
        nonlocal bits
        value = bits & ((1 << count) - 1)
        bits >>= count
        return value

    small = take(1)

    def side() -> int:
        return 8 * (take(5) + 1) if small else 1 + take((9, 13, 18, 30)[take(2)])

    height, ratio = side(), take(3)
    across, down = ((0, 0), (1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio]
    return (height * across // down if ratio else side()), height
