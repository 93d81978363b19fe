"""Unusual and broken images as they occur in folders of photos, and the right result for each.

All are made from one picture with known pixels. The right result is either how a viewer shows the image, or the reason
why it is refused. Pillow writes what it can; the rest is assembled by hand according to the standards of the formats.
"""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms


@dataclass(frozen=True)
class Odd:
    """An image file, and the right result for it.

    Attributes:
        data: the file's bytes.
        pixels: what a viewer shows on white, (H, W, 3); None if the image is refused.
        near: the largest mean difference of pixels that is allowed, in levels; 0 for a lossless file.
        reason: the reason of a refusal.
        most: the largest difference of a single pixel that is allowed, in levels.
    """

    data: bytes
    pixels: np.ndarray | None = None
    near: float = 0.0
    reason: str = ""
    most: float = 255.0


def _picture() -> np.ndarray:
    """Return a smooth picture, which JPEG changes little, and which differs in each of its eight orientations."""
    y, x = np.mgrid[:64, :96] / 96
    waves = [40 + 200 * x, 230 - 280 * y, 128 + 90 * np.sin(5 * x + 9 * y * y)]
    return np.stack(waves, axis=2).round().clip(0, 255).astype(np.uint8)


PICTURE = _picture()
GRAY = PICTURE[..., 0]
_RGB, _L = Image.fromarray(PICTURE), Image.fromarray(GRAY)
_HIGH, _WIDE = GRAY.shape
_SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9"/></svg>'
_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 39127\n"


def _saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def _jpeg(image: Image.Image = _RGB, **options: object) -> bytes:
    return _saved(image, "JPEG", **{"quality": 95, "subsampling": 0} | options)


def _grays(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(values, dtype=float)[..., None], 3, axis=2)


def _on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    part = alpha[..., None] / 255
    return pixels * part + 255 * (1 - part)


# --- PNG --------------------------------------------------------------------------------------------------------


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(samples: np.ndarray, kind: int, bits: int = 8, before: bytes = b"", interlaced: bool = False) -> bytes:
    """Return a PNG file.

    Args:
        samples: (H, W, channels), or (H, W, 1) with indices.
        kind: 0 gray, 2 RGB, 3 palette, 4 gray with alpha, 6 RGBA.
        before: chunks before the pixels.
        interlaced: whether the pixels are stored in Adam7's seven passes.
    """
    high, wide = samples.shape[:2]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", wide, high, bits, kind, 0, 0, interlaced))
    adam7 = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]
    passes = [samples[a::b, c::d] for a, b, c, d in adam7] if interlaced else [samples]
    rows = [_packed(row, bits) for part in passes if part.size for row in part.reshape(len(part), -1)]
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + before + body + chunk(b"IEND", b"")


def _packed(row: np.ndarray, bits: int) -> bytes:
    if bits == 16:
        return row.astype(">u2").tobytes()
    if bits == 8:
        return row.astype(np.uint8).tobytes()
    return np.packbits((row.astype(np.uint8)[:, None] >> np.arange(bits - 1, -1, -1)) & 1).tobytes()


def _pngs() -> dict[str, Odd]:
    deep = GRAY[..., None].astype(int) * 257
    alpha = np.linspace(0, 255, _WIDE).round()[None].repeat(_HIGH, 0)
    rgba = np.concatenate([PICTURE, alpha[..., None]], axis=2)
    hidden = np.where(alpha[..., None] > 127, PICTURE, 0)
    cut = np.where(alpha > 127, 255, 0)
    bit = (GRAY > 128).astype(int)
    index = np.add.outer(np.arange(_HIGH), np.arange(_WIDE)) // 20 % 4
    colours = np.array([(250, 10, 20), (0, 0, 0), (20, 200, 90), (9, 8, 200)])
    palette = chunk(b"PLTE", bytes(colours.astype(np.uint8).ravel()))
    seen = colours[index]
    key = PICTURE.copy()
    key[:20] = (1, 2, 3)
    keyed = np.where((key == (1, 2, 3)).all(axis=2, keepdims=True), 255, key)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    xmp += b'<r:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/"><tiff:Orientation>3</tiff:Orientation>'
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + xmp + b"</r:Description></r:RDF></x:xmpmeta>"
    profile = zlib.compress(swapped_profile())
    whole = png(PICTURE, 2)
    start = whole.index(b"IDAT") - 4
    header = whole[:start]
    damaged = bytearray(whole)
    damaged[start + 200 : start + 260] = bytes(60)
    wrong = bytearray(whole)
    wrong[29] ^= 1  # in the header's checksum
    bomb = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3 << 20)))
    swapped = PICTURE[..., [1, 0, 2]]
    return {
        "rgb.png": Odd(whole, PICTURE),
        "interlaced.png": Odd(png(PICTURE, 2, interlaced=True), PICTURE),
        "gray_1bit.png": Odd(png(bit[..., None], 0, 1), _grays(bit * 255)),
        "gray_2bit.png": Odd(png(index[..., None], 0, 2), _grays(index * 85)),
        "gray_16bit.png": Odd(png(deep, 0, 16), _grays(GRAY)),
        "gray_alpha.png": Odd(png(np.stack([GRAY, alpha], axis=2), 4), _on_white(_grays(GRAY), alpha), 0.6),
        "gray_alpha_16bit.png": Odd(
            png(np.stack([deep[..., 0], alpha * 257], axis=2), 4, 16), _on_white(_grays(GRAY), alpha), 0.6
        ),
        "rgb_16bit.png": Odd(png(PICTURE.astype(int) * 257, 2, 16), PICTURE),
        "rgba_16bit.png": Odd(png(rgba * 257, 6, 16), _on_white(PICTURE, alpha), 0.6),
        "rgba.png": Odd(png(rgba, 6), _on_white(PICTURE, alpha), 0.6),
        "rgba_black_under_alpha.png": Odd(
            png(np.concatenate([hidden, cut[..., None]], axis=2), 6), _on_white(PICTURE, cut)
        ),
        "palette.png": Odd(png(index[..., None], 3, 2, palette), seen),
        "palette_trns.png": Odd(
            png(index[..., None], 3, 8, palette + chunk(b"tRNS", b"\xff\0")),
            np.where(index[..., None] == 1, 255, seen),
        ),
        "all_transparent.png": Odd(
            png(index[..., None], 3, 8, palette + chunk(b"tRNS", bytes(4))), np.full_like(PICTURE, 255)
        ),
        "rgb_trns.png": Odd(png(key, 2, before=chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))), keyed),
        "gray_trns.png": Odd(
            png(GRAY[..., None], 0, before=chunk(b"tRNS", struct.pack(">H", 90))),
            _grays(np.where(GRAY == 90, 255, GRAY)),
        ),
        "xmp_orientation.png": Odd(png(PICTURE, 2, before=chunk(b"iTXt", xmp)), PICTURE[::-1, ::-1]),
        "icc.png": Odd(png(PICTURE, 2, before=chunk(b"iCCP", b"swapped\0\0" + profile)), swapped, 1.5),
        "icc_without_checksum.png": Odd(
            png(PICTURE, 2, before=chunk(b"iCCP", b"swapped\0\0" + profile[:-4])), swapped, 1.5
        ),
        "icc_that_is_none.png": Odd(
            png(PICTURE, 2, before=chunk(b"iCCP", b"none\0\0" + zlib.compress(b"no profile" * 20))), PICTURE
        ),
        "icc_of_cmyk_on_rgb.png": Odd(
            png(PICTURE, 2, before=chunk(b"iCCP", b"inks\0\0" + zlib.compress(ink_profile()))), PICTURE
        ),
        "png_named.jpg": Odd(whole, PICTURE),
        "apng_animated.png": Odd(_animated("PNG"), PICTURE),
        "truncated.png": Odd(whole[: len(whole) // 2], reason="corrupt"),
        "broken_data_stream.png": Odd(bytes(damaged), reason="corrupt"),
        "bad_ihdr_crc.png": Odd(bytes(wrong), reason="corrupt"),
        "no_idat.png": Odd(header + chunk(b"IEND", b""), reason="corrupt"),
        "only_a_signature.png": Odd(whole[:8], reason="corrupt"),
        "huge.png": Odd(
            whole[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 65536, 65536, 8, 2, 0, 0, 0)) + whole[start:],
            reason="too_large",
        ),
        "text_chunk_bomb.png": Odd(header + bomb + whole[start:], PICTURE),
    }


# --- colour profiles --------------------------------------------------------------------------------------------


def swapped_profile() -> bytes:
    """The sRGB profile with the red and green primaries exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for number in range(struct.unpack(">I", profile[128:132])[0]):
        entry = 132 + 12 * number
        if name := {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(bytes(profile[entry : entry + 4])):
            profile[entry : entry + 4] = name
    return bytes(profile)


def _profile(space: bytes, connection: bytes, kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    """Return an ICC profile of version 2: 128 bytes of header, a table of tags, the tags."""
    table, body = struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        tag = tag.ljust(-(-len(tag) // 4) * 4, b"\0")
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(tag))
        body += tag
    header = struct.pack(">I", 128 + len(table + body)) + b"lcms\x02\x10\0\0" + kind + space + connection
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)  # D50
    return header.ljust(128, b"\0") + table + body


def gray_profile(gamma: float) -> bytes:
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)  # 1/65536
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    return _profile(b"GRAY", b"XYZ ", b"mntr", {b"wtpt": white, b"kTRC": curve})


INKS = (20, 30, 10, 40)  # by how much a full ink lowers L*


def ink_profile(padding: int = 0) -> bytes:
    """Return a CMYK profile with gray inks: L* = 100 - 20 C - 30 M - 10 Y - 40 K, as a table of 2 points a channel."""
    corners = np.array(np.meshgrid(*[[0, 1]] * 4, indexing="ij")).reshape(4, -1).T
    lightness = 100 - corners @ INKS
    grid = np.stack([lightness * 2.55, np.full(16, 128), np.full(16, 128)], axis=1).round().astype(np.uint8)
    line = bytes(range(256))
    unity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + unity + line * 4 + grid.tobytes() + line * 3
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    tags = {b"wtpt": white, b"A2B0": lut}
    if padding:
        tags[b"fill"] = b"data" + bytes(4 + padding)
    return _profile(b"CMYK", b"Lab ", b"prtr", tags)


def of_inks(cmyk: np.ndarray) -> np.ndarray:
    """Return the sRGB gray levels (H, W, 3), 0 to 255, of inks (H, W, 4) according to `ink_profile`."""
    lightness = 100 - cmyk @ np.array(INKS) / 255
    f = (lightness + 16) / 116
    linear = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    return _grays(np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255)


# --- JPEG -------------------------------------------------------------------------------------------------------


def _segments(data: bytes) -> list[tuple[int, bytes]]:
    """Return (marker, body) of each segment of a JPEG; the last body is the scan with everything after it."""
    place, found = 2, []
    while True:
        marker, length = data[place + 1], struct.unpack(">H", data[place + 2 : place + 4])[0]
        if marker == 0xDA:
            return [*found, (marker, data[place + 4 :])]
        found.append((marker, data[place + 4 : place + 2 + length]))
        place += 2 + length


def _joined(segments: list[tuple[int, bytes]], between: bytes = b"") -> bytes:
    result = b"\xff\xd8"
    for marker, body in segments:
        # the scan's own header has 12 bytes with its length where there are three components, 8 where there is one
        length = 6 + 2 * body[0] if marker == 0xDA else 2 + len(body)
        result += between + bytes((255, marker)) + struct.pack(">H", length) + body
    return result


def _frame(data: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """Return a JPEG with a changed SOF segment: precision, height, width, components."""
    return _joined([(m, change(b) if 0xC0 <= m <= 0xC2 else b) for m, b in _segments(data)])


def _exif(tag: int, kind: int, count: int, value: bytes) -> bytes:
    """Return an EXIF segment with one field, big endian."""
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">HHHI4sI", 1, tag, kind, count, value, 0)


# How pixels are stored so that a viewer that obeys EXIF sees the picture, from the standard.
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda seen: seen,
    2: lambda seen: seen[:, ::-1],
    3: lambda seen: seen[::-1, ::-1],
    4: lambda seen: seen[::-1],
    5: lambda seen: seen.transpose(1, 0, 2),
    6: lambda seen: np.rot90(seen, 1),
    7: lambda seen: seen[::-1, ::-1].transpose(1, 0, 2),
    8: lambda seen: np.rot90(seen, -1),
}


def _turned(orientation: int) -> Odd:
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](PICTURE)))
    return Odd(_jpeg(stored, exif=_exif(0x0112, 3, 1, struct.pack(">Hxx", orientation))), PICTURE, 2)


def _jpegs() -> dict[str, Odd]:
    whole, gray, progressive = _jpeg(), _jpeg(_L), _jpeg(progressive=True)
    cmyk = _RGB.convert("CMYK")
    inked = np.concatenate([PICTURE, 255 - PICTURE[..., :1]], axis=2) // 2
    inks = Image.frombytes("CMYK", (_WIDE, _HIGH), np.ascontiguousarray(inked).tobytes())
    # Adobe's YCCK: C, M, Y as if they were R, G, B, in YCbCr, and all inverted; the marker's last byte says so.
    ycc = np.asarray(Image.merge("RGB", cmyk.split()[:3]).convert("YCbCr"))
    stored = np.concatenate([255 - ycc, np.asarray(cmyk)[..., 3:]], axis=2)
    ycck = _jpeg(Image.frombytes("CMYK", (_WIDE, _HIGH), np.ascontiguousarray(stored).tobytes()))
    ycck = _joined([(m, b[:-1] + b"\2" if m == 0xEE else b) for m, b in _segments(ycck)])
    large = np.asarray(_RGB.resize((960, 640), Image.Resampling.BICUBIC))
    wide = b"".join(
        bytes((16 | body[place],)) + bytes(v for byte in body[place + 1 : place + 65] for v in (0, byte))
        for marker, body in _segments(whole)
        if marker == 0xDB
        for place in range(0, len(body), 65)
    )
    parts = _segments(whole)
    first = next(n for n, (marker, _) in enumerate(parts) if marker == 0xDB)
    deep = [part for part in parts if part[0] != 0xDB]
    deep.insert(first, (0xDB, wide))
    strip = np.linspace(0, 255, 1000).round().astype(np.uint8)[:, None]
    maker = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">HHHIII", 1, 0x927C, 7, 60_000, 26, 0) + bytes(60_000)
    other = Image.fromarray(255 - PICTURE)
    scans = [place for place in range(len(progressive) - 1) if progressive[place : place + 2] == b"\xff\xda"]
    fuzzed = bytearray(whole)
    for place in range(len(whole) // 2, len(whole) // 2 + 40):
        fuzzed[place] = 0x55
    return (
        {f"exif_orientation_{number}.jpg": _turned(number) for number in STORED}
        | {
            "baseline.jpg": Odd(whole, PICTURE, 2),
            "subsampled.jpg": Odd(_jpeg(subsampling=2), PICTURE, 2),
            "gray.jpg": Odd(gray, _grays(GRAY), 2),
            "progressive.jpg": Odd(progressive, PICTURE, 2),
            "progressive_large.jpg": Odd(_jpeg(Image.fromarray(large), progressive=True), large, 2),
            "progressive_partial.jpg": Odd(
                progressive[: scans[4]] + b"\xff\xd9", PICTURE, 6
            ),  # the last scans are missing
            "restart_markers.jpg": Odd(_jpeg(restart_marker_blocks=3), PICTURE, 2),
            "rgb_not_ycc.jpg": Odd(_jpeg(keep_rgb=True), PICTURE, 2),
            "cmyk_adobe.jpg": Odd(_jpeg(cmyk), PICTURE, 2),  # inks are stored inverted
            "cmyk_no_marker.jpg": Odd(_joined([p for p in _segments(_jpeg(cmyk)) if p[0] != 0xEE]), PICTURE, 2),
            "ycck_adobe.jpg": Odd(ycck, PICTURE, 2),
            "cmyk_icc_multi_segment.jpg": Odd(_jpeg(inks, icc_profile=ink_profile(150_000)), of_inks(inked), 2),
            "icc.jpg": Odd(_jpeg(icc_profile=swapped_profile()), PICTURE[..., [1, 0, 2]], 3),
            "icc_of_gray.jpg": Odd(
                _jpeg(_L, icc_profile=gray_profile(1.0)),
                _grays(
                    255
                    * np.where(GRAY / 255 <= 0.0031308, 12.92 * GRAY / 255, 1.055 * (GRAY / 255) ** (1 / 2.4) - 0.055)
                ),
                2,
            ),
            "icc_that_is_none.jpg": Odd(_jpeg(icc_profile=b"no profile" * 20), PICTURE, 2),
            "extraneous_bytes.jpg": Odd(_joined(parts, b"\xff\xff"), PICTURE, 2),
            "junk_between_segments.jpg": Odd(_joined(parts[:1]) + _joined(parts[1:], b"\x12\x34")[2:], PICTURE, 2),
            "qtables_16bit.jpg": Odd(_joined(deep), PICTURE, 2),
            "one_pixel.jpg": Odd(_jpeg(Image.new("RGB", (1, 1), (200, 100, 50))), np.array([[(200, 100, 50)]]), 2),
            "long_strip.jpg": Odd(_jpeg(Image.fromarray(strip)), _grays(strip), 2),
            "more_after_the_end.jpg": Odd(whole + b"camera's own data" * 99, PICTURE, 2),
            "mpo_two_frames.jpg": Odd(
                _saved(_RGB, "MPO", save_all=True, append_images=[other], quality=95, subsampling=0), PICTURE, 2
            ),
            "exif_corrupt.jpg": Odd(_jpeg(exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\3" * 9), PICTURE, 2),
            "exif_that_is_text.jpg": Odd(_jpeg(exif=b"Exif\0\0no tables here"), PICTURE, 2),
            "exif_wrong_types.jpg": Odd(_jpeg(exif=_exif(0x0112, 2, 4, b"six\0")), PICTURE, 2),
            "exif_orientation_0.jpg": Odd(_jpeg(exif=_exif(0x0112, 3, 1, bytes(4))), PICTURE, 2),
            "exif_orientation_9.jpg": Odd(_jpeg(exif=_exif(0x0112, 3, 1, b"\0\x09\0\0")), PICTURE, 2),
            "exif_large_maker_note.jpg": Odd(_jpeg(exif=maker), PICTURE, 2),
            "truncated.jpg": Odd(whole[: len(whole) // 2], reason="corrupt"),
            "truncated_progressive.jpg": Odd(progressive[: scans[1] + 20], reason="corrupt"),
            "fuzzed_until_it_ends_early.jpg": Odd(bytes(fuzzed)[:-400], reason="corrupt"),
            "corrupt_header.jpg": Odd(whole[:30] + whole[60:90], reason="corrupt"),
            "no_scan.jpg": Odd(_joined(parts[:-1]) + b"\xff\xd9", reason="corrupt"),
            "null_height.jpg": Odd(_frame(whole, lambda sof: sof[:1] + b"\0\0" + sof[3:]), reason="corrupt"),
            "zeros_after_the_start.jpg": Odd(b"\xff\xd8\xff\xe0" + bytes(200), reason="corrupt"),
            "jpeg_12bit.jpg": Odd(_frame(whole, lambda sof: b"\x0c" + sof[1:]), reason="unsupported"),
            "huge.jpg": Odd(
                _frame(whole, lambda sof: sof[:1] + struct.pack(">HH", 20000, 14000) + sof[5:]), reason="too_large"
            ),
        }
    )


# --- TIFF and the others ----------------------------------------------------------------------------------------


def _tiff(samples: bytes, wide: int, high: int, bits: int, kind: int, form: int = 1) -> bytes:
    """Return a TIFF of one channel, little endian, in one strip; kind 1: black is 0; form 1: integers, 3: float."""
    fields = {
        256: wide,
        257: high,
        258: bits,
        259: 1,
        262: kind,
        273: 0,
        277: 1,
        278: high,
        279: len(samples),
        339: form,
    }
    fields[273] = 8 + 2 + 12 * len(fields) + 4
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + body + bytes(4) + samples


def _animated(format: str, **options: object) -> bytes:
    frames = [_RGB, Image.fromarray(255 - PICTURE), Image.new("RGB", _RGB.size, (0, 0, 250))]
    return _saved(frames[0], format, save_all=True, append_images=frames[1:], duration=80, **options)


def _tiffs() -> dict[str, Odd]:
    twelve = (GRAY.astype(int) * 4095 / 255).round().astype(int)
    pairs = twelve.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
    bit = _L.point(lambda value: 255 if value > 128 else 0, "1")
    # L*, a*, b* of sRGB's red, green, blue and white as D50 has them: byte, signed byte, signed byte
    lab = np.array([(54.29, 80.81, 69.89), (87.82, -79.27, 80.99), (29.57, 68.30, -112.03), (100, 0, 0)])
    stripes = (lab * (2.55, 1, 1)).round().astype(np.int16).astype(np.uint8)[None].repeat(4, 0)
    primaries = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)])[None].repeat(4, 0)
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "deflate.tif": Odd(_saved(_RGB, "TIFF", compression="tiff_adobe_deflate"), PICTURE),
        "lzw.tif": Odd(_saved(_RGB, "TIFF", compression="tiff_lzw"), PICTURE),
        "jpeg.tif": Odd(_saved(_RGB, "TIFF", compression="jpeg", quality=95), PICTURE, 3),
        "bigtiff.tif": Odd(_saved(_RGB, "TIFF", big_tiff=True), PICTURE),
        "fax_g4.tif": Odd(_saved(bit, "TIFF", compression="group4"), _grays((GRAY > 128) * 255)),
        "cmyk.tif": Odd(_saved(_RGB.convert("CMYK"), "TIFF"), PICTURE, 1),
        "cmyk_jpeg.tif": Odd(_saved(_RGB.convert("CMYK"), "TIFF", compression="jpeg", quality=95), PICTURE, 3),
        "icc.tif": Odd(_saved(_RGB, "TIFF", icc_profile=swapped_profile()), PICTURE[..., [1, 0, 2]], 1.5),
        "lab.tif": Odd(_saved(Image.frombytes("LAB", (4, 4), stripes.tobytes()), "TIFF"), primaries, 8),
        "turned.tif": Odd(_saved(Image.fromarray(np.rot90(PICTURE, 1).copy()), "TIFF", exif=turned), PICTURE),
        "pages.tiff": Odd(_animated("TIFF"), PICTURE),
        "gray_12bit.tif": Odd(_tiff(packed.astype(np.uint8).tobytes(), _WIDE, _HIGH, 12, 1), _grays(GRAY)),
        "gray_16bit.tif": Odd(_tiff((GRAY.astype("<u2") * 257).tobytes(), _WIDE, _HIGH, 16, 1), _grays(GRAY)),
        "gray_white_is_zero.tif": Odd(_tiff(GRAY.tobytes(), _WIDE, _HIGH, 8, 0), _grays(255 - GRAY)),
        "float32.tiff": Odd(_tiff((GRAY / np.float32(255)).tobytes(), _WIDE, _HIGH, 32, 1, 3), reason="unsupported"),
        "truncated.tif": Odd(_saved(_RGB, "TIFF", compression="tiff_adobe_deflate")[:-900], reason="corrupt"),
    }


def _others() -> dict[str, Odd]:
    clear = _RGB.convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(GRAY > 128, 255, 0).astype(np.uint8)))
    shown = np.where(GRAY[..., None] > 128, PICTURE, 255)
    webp, avif, jp2 = (
        _saved(_RGB, "WEBP", lossless=True),
        _saved(_RGB, "AVIF", quality=95, subsampling="4:4:4"),
        _saved(_RGB, "JPEG2000"),
    )
    index = (np.add.outer(np.arange(_HIGH), np.arange(_WIDE)) // 20 % 3).astype(np.uint8)
    colours = np.array([(250, 10, 20), (0, 0, 0), (20, 200, 90)], dtype=np.uint8)
    gif = Image.fromarray(index)
    gif.putpalette(colours.tobytes())
    second = Image.fromarray(2 - index)
    second.putpalette(colours.tobytes())
    frames = {"save_all": True, "append_images": [second], "optimize": False}
    psd = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, _HIGH, _WIDE, 8, 3) + bytes(12)  # and three empty sections
    psd += b"\0\0" + PICTURE.transpose(2, 0, 1).tobytes()
    place, canvas = avif.index(b"ispe") + 8, (65535, 65535)
    return {
        "webp_lossless.webp": Odd(webp, PICTURE),
        "webp_photo.webp": Odd(_saved(_RGB, "WEBP", quality=95), PICTURE, 4),
        "webp_alpha.webp": Odd(_saved(clear, "WEBP", lossless=True), shown),
        "webp_animated.webp": Odd(_animated("WEBP", lossless=True), PICTURE),
        "webp_named.jpg": Odd(webp, PICTURE),
        "avif_named.jpg": Odd(avif, PICTURE, 3),
        "gif.gif": Odd(_saved(gif, "GIF"), colours[index]),
        "gif_animated.gif": Odd(_saved(gif, "GIF", **frames), colours[index]),
        "gif_animated_transparent.gif": Odd(
            _saved(gif, "GIF", transparency=1, disposal=2, **frames),
            np.where(index[..., None] == 1, 255, colours[index]),
        ),
        "bmp.bmp": Odd(_saved(_RGB, "BMP"), PICTURE),
        "bmp_of_a_palette.bmp": Odd(_saved(gif, "BMP"), colours[index]),
        "jpeg2000.jp2": Odd(jp2, PICTURE),
        "ppm.ppm": Odd(b"P6 %d %d 255\n" % (_WIDE, _HIGH) + PICTURE.tobytes(), PICTURE),
        "gray_16bit.pgm": Odd(
            b"P5\n# by hand\n%d %d\n65535\n" % (_WIDE, _HIGH) + (GRAY.astype(">u2") * 257).tobytes(), _grays(GRAY)
        ),
        "psd.psd": Odd(psd, PICTURE),
        "truncated.webp": Odd(webp[:60], reason="corrupt"),
        "truncated.avif": Odd(avif[:150], reason="corrupt"),
        "truncated.jp2": Odd(jp2[: len(jp2) // 2], reason="corrupt"),
        "huge.avif": Odd(avif[:place] + struct.pack(">II", 17000, 17000) + avif[place + 8 :], reason="too_large"),
        "huge.gif": Odd(
            b"GIF89a" + struct.pack("<HHBBBcHHHHB", *canvas, 0, 0, 0, b",", 0, 0, *canvas, 0) + b"\2\1\0\0;",
            reason="too_large",
        ),
        "zero_bytes.jpg": Odd(b"", reason="empty"),
        "git_lfs_pointer.jpg": Odd(_LFS, reason="not_an_image"),
        "svg_named.jpg": Odd(_SVG, reason="not_an_image"),
        "page_not_found.jpg": Odd(b"<!DOCTYPE html><html><title>404</title></html>", reason="not_an_image"),
        "text_named.jpg": Odd(b"Python 3 was released in 2008\n", reason="not_an_image"),
        "zeros.png": Odd(bytes(500), reason="not_an_image"),
        "icon_named.png": Odd(_saved(_RGB, "ICO"), reason="not_an_image"),
        "postscript_named.jpg": Odd(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", reason="not_an_image"),
    }


# --- metadata that is wrong, large or strange beside sound pixels ----------------------------------------------------

_SIX = (0x0112, 3, 1, b"\6\0\0\0")  # the field Orientation, little endian
_FAR = (0x010F, 2, 500, b"\xff\xff\0\0")  # a text that lies outside the file; it comes before Orientation


def directory(*entries: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """A TIFF's header and one directory, as EXIF has it: (tag, type, count, value or offset) each."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    return head + b"".join(struct.pack(order + "HHI4s", *entry) for entry in entries) + bytes(4)


_SIDEWAYS = np.ascontiguousarray(STORED[6](PICTURE))


def _exifs() -> dict[str, tuple[bytes, int]]:
    """EXIF without its header, and the orientation that can be read in it."""
    long, text, two = (0x0112, 4, 1, b"\6\0\0\0"), (0x0112, 2, 2, b"6\0\0\0"), (0x0112, 3, 2, b"\6\0\6\0")
    return {
        "empty": (b"", 1),
        "garbage": (b"\x01\2\3\4garbage garbage", 1),
        "header_only": (b"II*\0", 1),
        "directory_outside": (b"MM\0*\xff\xff\0\0", 1),
        "good": (directory(_SIX), 6),
        "good_big_endian": (directory((0x0112, 3, 1, b"\0\6\0\0"), order=">"), 6),
        "after_a_far_text": (directory(_FAR, _SIX), 6),
        "after_a_huge_count": (directory((0x010F, 2, 2**32 - 1, b"\xff\xff\0\0"), _SIX), 6),
        "before_a_unit_of_bytes": (directory(_SIX, (0x0128, 7, 1, b"\2\0\0\0")), 6),
        "before_a_text_for_a_number": (directory((0x0100, 2, 4, b"60\0\0"), _SIX, (0x0131, 3, 1, b"\7\0\0\0")), 6),
        "before_an_unknown_type": (directory(_SIX, (0x9999, 99, 1, b"\7\0\0\0")), 6),
        "cut_after_it": (directory(_SIX, _FAR, _FAR)[:27], 6),
        "long": (directory(long), 6),
        "text": (directory(text), 1),
        "two": (directory(two), 6),
        "three_elsewhere": (directory((0x0112, 3, 3, b"\x1a\0\0\0")) + b"\6\0\6\0\6\0", 6),
        "three_outside": (directory((0x0112, 3, 3, b"\xff\xff\0\0")), 1),
        "zero": (directory((0x0112, 3, 1, bytes(4))), 1),
        "nine": (directory((0x0112, 3, 1, b"\x09\0\0\0")), 1),
    }


def _with_segments(jpeg: bytes, *segments: tuple[int, bytes], first: bytes | None = None) -> bytes:
    """A JPEG with segments after its first, which `first` can replace."""
    parts = _segments(jpeg)
    start = parts[:1] if first is None else [(0xE0, first)]
    return _joined([*start, *segments, *parts[1:]])


def _with_chunks(*before: bytes, after: bytes = b"", stored: np.ndarray = PICTURE) -> bytes:
    whole = png(stored, 2, before=b"".join(before))
    return whole[:-12] + after + whole[-12:]


def _with_tags(tiff: bytes, *entries: tuple[int, int, int, bytes]) -> bytes:
    """A little-endian TIFF with entries added to its directory, which moves to the end."""
    start = struct.unpack_from("<I", tiff, 4)[0]
    count = struct.unpack_from("<H", tiff, start)[0]
    found = {tiff[at : at + 2]: tiff[at : at + 12] for at in range(start + 2, start + 2 + 12 * count, 12)}
    found |= {struct.pack("<H", entry[0]): struct.pack("<HHI4s", *entry) for entry in entries}
    kept = [found[tag] for tag in sorted(found, key=lambda tag: tag[::-1])]
    return (
        tiff[:4]
        + struct.pack("<IH", len(tiff), len(kept))[:4]
        + tiff[8:]
        + struct.pack("<H", len(kept))
        + (b"".join(kept) + bytes(4))
    )


def _avif_with_exif(exif: bytes, turned: bool = False) -> bytes:
    """An AVIF whose EXIF these bytes are; where `turned` the format's own field turns it, and Pillow wrote that."""
    fields = Image.Exif()
    fields[0x010E] = "x" * 200
    if turned:
        fields[0x0112] = 6
    image = Image.fromarray(_SIDEWAYS) if turned else _RGB
    whole = _saved(image, "AVIF", quality=95, subsampling="4:4:4", exif=fields.tobytes())
    start = max(whole.rfind(head, 0, whole.index(b"x" * 200)) for head in (b"MM\0*", b"II*\0"))
    return whole[:start] + exif.ljust(150, b"\0") + whole[start + 150 :]


def _metadata() -> dict[str, Odd]:
    found = {}
    upright, sideways = _jpeg(), _jpeg(Image.fromarray(_SIDEWAYS))
    for name, (exif, orientation) in _exifs().items():
        stored, jpeg = (_SIDEWAYS, sideways) if orientation == 6 else (PICTURE, upright)
        body = b"Exif\0\0" + exif
        webp = _saved(Image.fromarray(stored), "WEBP", lossless=True, exif=body)
        found |= {
            f"exif_{name}.jpg": Odd(_with_segments(jpeg, (0xE1, body)), PICTURE, 2),
            f"exif_{name}_twice.jpg": Odd(_with_segments(jpeg, (0xE1, b"Exif\0\0" + body)), PICTURE, 2),
            f"exif_{name}_short_jfif.jpg": Odd(_with_segments(jpeg, (0xE1, body), first=b"JFIF\0"), PICTURE, 2),
            f"exif_{name}.png": Odd(_with_chunks(chunk(b"eXIf", exif), stored=stored), PICTURE),
            f"exif_{name}_at_the_end.png": Odd(_with_chunks(after=chunk(b"eXIf", body), stored=stored), PICTURE),
            f"exif_{name}.webp": Odd(webp, PICTURE),
            f"exif_{name}.avif": Odd(_avif_with_exif(exif), PICTURE, 3),  # a viewer obeys the format's own field
        }
        text = b"Raw profile type exif\0\nexif\n  99\n" + body.hex().encode()
        found[f"exif_{name}_as_text.png"] = Odd(_with_chunks(chunk(b"tEXt", text), stored=stored), PICTURE)
    dpi = _jpeg(dpi=(72, 72))  # Pillow then looks at EXIF late
    found["exif_garbage_dpi.jpg"] = Odd(_with_segments(dpi, (0xE1, b"Exif\0\0garbage")), PICTURE, 2)
    for name, exif in {"garbage": b"garbage " * 9, "wrong_types": directory((0x0128, 7, 1, b"\2\0\0\0"), _SIX)}.items():
        found[f"turned_with_{name}.avif"] = Odd(_avif_with_exif(exif, turned=True), PICTURE, 3)
    large = struct.pack(">I", len(swapped_profile()) + 1_300_000) + swapped_profile()[4:] + bytes(1_300_000)
    swapped, xmp = PICTURE[..., [1, 0, 2]], b'<x tiff:Orientation="6"/>'
    adobe = b"http://ns.adobe.com/xap/1.0/\0"
    jpegs = {
        "jfif_empty": _with_segments(upright, first=b""),
        "adobe_short": _with_segments(upright, (0xEE, b"Adobe")),
        "photoshop_cut": _with_segments(upright, (0xED, b"Photoshop 3.0\x008BIM\x03\xed")),
        "photoshop_short": _with_segments(upright, (0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\2\0\0")),
        "icc_short": _with_segments(upright, (0xE2, b"ICC_PROFILE\0")),
        "icc_part_of_three": _with_segments(upright, (0xE2, b"ICC_PROFILE\0\1\3abc")),
        "mpf_garbage": _with_segments(upright, (0xE2, b"MPF\0garbage garbage")),
        "mpf_without_entries": _with_segments(upright, (0xE2, b"MPF\0" + directory((0xB001, 4, 1, b"\3\0\0\0")))),
        "mpf_text": _with_segments(upright, (0xE2, b"MPF\0" + directory((0xB001, 2, 4, b"abc\0")))),
        "xmp": _with_segments(sideways, (0xE1, adobe + xmp)),
        "xmp_beside_garbage": _with_segments(sideways, (0xE1, b"Exif\0\0garbage"), (0xE1, adobe + xmp)),
        "xmp_short_jfif": _with_segments(sideways, (0xE1, adobe + xmp), first=b"JFIF\0"),
    }
    found |= {f"{name}.jpg": Odd(data, PICTURE, 2) for name, data in jpegs.items()}
    profile = (0xE2, b"ICC_PROFILE\0\1\1" + swapped_profile())
    found["icc_short_jfif.jpg"] = Odd(_with_segments(upright, profile, first=b"JFIF\0"), swapped, 3)
    for name in ("transparency", "interlace", "icc_profile", "bbox", "gamma", "exif", "xmp", "default_image"):
        text = chunk(b"tEXt", name.encode() + b"\0some words")
        found |= {
            f"text_{name}.png": Odd(_with_chunks(text), PICTURE),
            f"text_{name}_at_the_end.png": Odd(_with_chunks(after=text), PICTURE),
        }
    for kind in (
        b"gAMA",
        b"cHRM",
        b"sRGB",
        b"pHYs",
        b"tIME",
        b"acTL",
        b"fcTL",
        b"iCCP",
        b"eXIf",
        b"tEXt",
        b"zTXt",
        b"iTXt",
    ):
        shown = kind.decode()
        found |= {
            f"empty_{shown}.png": Odd(_with_chunks(chunk(kind, b"")), PICTURE),
            f"short_{shown}_at_the_end.png": Odd(_with_chunks(after=chunk(kind, b"\1")), PICTURE),
            f"bad_checksum_{shown}.png": Odd(_with_chunks(chunk(kind, b"abc\0def")[:-4] + b"crc!"), PICTURE),
        }
    noise = np.random.default_rng(0).integers(32, 127, 1_200_000, dtype=np.uint8).tobytes()
    packed = zlib.compress(noise, 1)
    pngs = {
        "ztxt_large": _with_chunks(chunk(b"zTXt", b"workflow\0\0" + packed)),
        "itxt_large": _with_chunks(chunk(b"iTXt", b"prompt\0\1\0\0\0" + packed)),
        "ztxt_method_1": _with_chunks(chunk(b"zTXt", b"workflow\0\1abc")),
        "iccp_method_1": _with_chunks(chunk(b"iCCP", b"name\0\1abc")),
        "exif_text_not_hex": _with_chunks(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 3\nzz zz")),
        "text_cut_at_the_end": _with_chunks(after=chunk(b"tEXt", b"a\0" + b"b" * 500))[:-300],
        "xmp_packed": _with_chunks(
            chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)), stored=_SIDEWAYS
        ),
    }
    found |= {f"{name}.png": Odd(data, PICTURE) for name, data in pngs.items()}
    found["icc_large.png"] = Odd(_with_chunks(chunk(b"iCCP", b"a\0\0" + zlib.compress(large))), swapped, 1.5)
    found["icc_large.jpg"] = Odd(_jpeg(icc_profile=large), swapped, 3)
    webp = _saved(_RGB, "WEBP", lossless=True, exif=b"Exif\0\0" + bytes(300))
    found["exif_cut.webp"] = Odd(webp[:-200], PICTURE)
    for packing in ("raw", "tiff_lzw"):
        tiff = _saved(Image.fromarray(_SIDEWAYS), "TIFF", compression=packing)
        far = b"\xff\xff\xff\0"
        tags = {
            "far_make": [(271, 2, 500, far)],
            "far_description": [(270, 2, 500, far)],
            "text_for_resolution": [(282, 2, 2, b"a\0\0\0"), (283, 2, 2, b"a\0\0\0"), (296, 3, 1, b"\3\0\0\0")],
            "far_exif": [(34665, 4, 1, far)],
            "far_xmp": [(700, 1, 500, far)],
            "numbers_for_profile": [(34675, 3, 2, b"abcd")],
            "far_profile": [(34675, 7, 5000, far)],
        }
        for name, entries in tags.items():
            found[f"{packing}_{name}.tif"] = Odd(_with_tags(tiff, (274, 3, 1, b"\6\0\0\0"), *entries), PICTURE)
    return found


# --- 16 bits, and what is not read ------------------------------------------------------------------------------------


def _planes(samples: np.ndarray, order: str, photometric: int, orientation: int = 1, **tags: int) -> bytes:
    """A TIFF of (channels, H, W) whole numbers, each channel in a plane of its own, uncompressed, with Orientation."""
    channels, high, wide = samples.shape
    bits = samples.dtype.itemsize * 8
    body = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    places = [8 + number * (len(body) // channels) for number in range(channels)]
    lists = {258: ("H", [bits] * channels), 273: ("I", places), 279: ("I", [len(body) // channels] * channels)}
    numbers = {256: wide, 257: high, 259: 1, 262: photometric, 274: orientation, 277: channels, 278: high}
    numbers |= {284: 2 if channels > 1 else 1, 339: 1} | {int(tag[1:]): value for tag, value in tags.items()}
    entries, more = [], b""
    start = 8 + len(body)
    for tag in sorted(lists.keys() | numbers.keys()):
        form, values = lists.get(tag) or ("H", [numbers[tag]])
        packed = struct.pack(f"{order}{len(values)}{form}", *values)
        if len(packed) > 4:
            place = start + 2 + 12 * (len(lists) + len(numbers)) + 4 + len(more)
            more, packed = more + packed, struct.pack(order + "I", place)
        entries.append(struct.pack(order + "HHI4s", tag, 3 if form == "H" else 4, len(values), packed))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start)
    return head + body + struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4) + more


def _deep() -> dict[str, Odd]:
    """Files of 16 bits with the tags that their twins of 8 bits have, and of other depths likewise."""
    deep = PICTURE.astype(np.uint16) * 257
    gray, found = deep[..., 0], {}
    low = gray.copy()
    low[::2] |= 1  # differs from the transparent value in the lower byte only
    shown = np.where((low == 90 * 257)[..., None], 255, _grays(GRAY))
    key = chunk(b"tRNS", struct.pack(">H", 90 * 257))
    found["gray_16bit_trns.png"] = Odd(png(low[..., None], 0, 16, key), shown, 0.1)
    colours = deep.copy()
    colours[:20], colours[20:40] = (256, 512, 768), (257, 512, 768)
    seen = np.where((colours == (256, 512, 768)).all(axis=2, keepdims=True), 255, colours >> 8)
    found["rgb_16bit_trns.png"] = Odd(png(colours, 2, 16, chunk(b"tRNS", struct.pack(">3H", 256, 512, 768))), seen)
    found["rgb_16bit_trns_interlaced.png"] = Odd(
        png(colours, 2, 16, chunk(b"tRNS", struct.pack(">3H", 256, 512, 768)), interlaced=True), seen
    )
    for bits in (1, 2, 4):
        most = 2**bits - 1
        index = np.add.outer(np.arange(_HIGH), np.arange(_WIDE)) // 20 % (most + 1)
        cut = np.where(index == 1, 255, index * (255 // most))
        trns = chunk(b"tRNS", struct.pack(">H", 1))
        found[f"gray_{bits}bit_trns.png"] = Odd(png(index[..., None], 0, bits, trns), _grays(cut))
    for order in "<>":
        shown = "little" if order == "<" else "big"
        turned = np.ascontiguousarray(STORED[6](deep)).transpose(2, 0, 1)
        for bits, samples in ((8, PICTURE), (16, deep)):
            planes = samples.transpose(2, 0, 1)
            found |= {
                f"white_is_zero_{bits}bit_{shown}.tif": Odd(_planes(planes[:1], order, 0), _grays(255 - GRAY)),
                f"planes_{bits}bit_{shown}.tif": Odd(_planes(planes, order, 2), PICTURE),
                f"signed_{bits}bit_{shown}.tif": Odd(_planes(planes[:1], order, 1, t339=2), reason="unsupported"),
            }
        found[f"planes_16bit_turned_{shown}.tif"] = Odd(_planes(turned, order, 2, orientation=6), PICTURE)
        found[f"white_is_zero_turned_{shown}.tif"] = Odd(
            _planes(turned[:1], order, 0, orientation=6), _grays(255 - GRAY)
        )
    found["gray_16bit.jp2"] = Odd(_saved(Image.fromarray(gray), "JPEG2000"), _grays(GRAY))
    return found


def _unread() -> dict[str, Odd]:
    """Sound files of kinds that are not read, or that look like images and are none."""
    whole, deep = _jpeg(), (GRAY.astype(np.uint16) * 257)[None]
    psd = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, _HIGH, _WIDE, 16, 3) + bytes(14) + bytes(6 * GRAY.size)
    files = {
        "openexr.jpg": b"v/1\x01" + bytes(99),
        "jpeg_xr.jpg": b"II\xbc\x01" + bytes(99),
        "radiance.png": b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 9 +X 9\n",
        "qoi.png": b"qoif" + bytes(99),
        "cr2.jpg": b"II*\0\x10\0\0\0CR\2\0" + bytes(99),
        "cr3.jpg": b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(99),
        "raf.jpg": b"FUJIFILMCCD-RAW 0201" + bytes(99),
        "psb.psd": psd[:4] + b"\0\2" + psd[6:],
        "rgb_16bit.psd": psd,
        "dng.tif": _planes(PICTURE[..., :1].transpose(2, 0, 1), "<", 1, t50706=1),
        "cfa.tif": _planes(deep, "<", 32803),
        "float.tif": _planes(PICTURE.astype(np.uint32).transpose(2, 0, 1), "<", 2, t339=3),
        "eight_channels.tif": _planes(np.repeat(deep, 8, axis=0), ">", 1),
        "jpeg_xl_in_tiff.tif": _planes(deep, "<", 1, t259=50002),
        "lossless.jpg": whole.replace(b"\xff\xc0", b"\xff\xc3", 1),
        "hierarchical.jpg": whole.replace(b"\xff\xc0", b"\xff\xc5", 1),
        "two_channels.jpg": _frame(whole, lambda sof: sof[:5] + b"\2" + sof[6:12]),
        "bmp_of_five_bits.bmp": _saved(_RGB, "BMP").replace(struct.pack("<HH", 1, 24), struct.pack("<HH", 1, 5), 1),
    }
    return {name: Odd(data, reason="unsupported") for name, data in files.items()} | {
        "text_of_a_car.bmp": Odd(b"BMW is a maker of cars, and this is no bitmap at all", reason="not_an_image"),
        "video_named.jpg": Odd(b"\0\0\0\x18ftypmp42" + bytes(60), reason="not_an_image"),
        "jpeg_xl_named.jpg": Odd(b"\xff\x0a" + bytes(60), reason=_with_package("pillow_jxl")),
        "jpeg_xl_in_boxes.jpg": Odd(
            b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl \0\0\0\0jxl " + bytes(40), reason=_with_package("pillow_jxl")
        ),
        "heic_named.jpg": Odd(b"\0\0\0\x24ftypheic\0\0\0\0mif1heic" + bytes(200), reason=_with_package("pillow_heif")),
    }


def _with_package(module: str) -> str:
    """Why a damaged file is refused whose format takes a package."""
    return "corrupt" if find_spec(module) else "unsupported"


@cache
def odd_images() -> dict[str, Odd]:
    """By name, with the suffix that the file has where it is found."""
    return _pngs() | _jpegs() | _tiffs() | _others() | _metadata() | _deep() | _unread()


def write_odd_images(folder: Path) -> None:
    folder.mkdir()
    for name, odd in odd_images().items():
        (folder / name).write_bytes(odd.data)
