"""The metadata of encoded images: what is read of it, and files without it.

Pillow refuses or misreads images whose metadata is damaged, large or of unusual types. Here metadata is read leniently,
and can be taken out of a file, so that Pillow gets what the pixels need and nothing else.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any

# The default for the largest image: a phone's photo of 200 megapixels (16320x12240) is read. Decoding takes up to 10
# bytes per pixel. It is here because configs name it, and this module imports nothing that takes time.
MAX_PIXELS = 200_000_000
# The largest text that is unpacked, and the largest profile: a JPEG has room for one of 16 MB.
_MOST_TEXT, _MOST_PROFILE = 2**20, 2**24
_XMP_ORIENTATION = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>\s*)([0-9])""")
# TIFF tags that decide how pixels are decoded or shown. All others are metadata.
_TIFF_PIXELS = {
    *(254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 290, 291, 292, 293, 317, 318, 319, 320),
    *(322, 323, 324, 325, 332, 334, 336, 338, 339, 340, 341, 347, *range(512, 522), 529, 530, 531, 532, 34675),
}
_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_PNG = b"\x89PNG\r\n\x1a\n"
# JPEG frames that libjpeg does not decode: the marker, and what it means.
RARE_FRAMES: dict[int | None, str] = {
    0xC3: "lossless", 0xC5: "hierarchical", 0xC6: "hierarchical", 0xC7: "hierarchical", 0xCB: "lossless arithmetic",
    0xCD: "hierarchical arithmetic", 0xCE: "hierarchical arithmetic", 0xCF: "hierarchical arithmetic",
}  # fmt: skip


# --- orientation ------------------------------------------------------------------------------------------------


def orientation(exif: Any, xmp: Any) -> int:
    """Return the orientation that EXIF states, or else XMP, 1 to 8; 1 where none can be read.

    Args:
        exif: The bytes of EXIF, with or without the header "Exif"; anything else counts as none.
        xmp: The bytes of XMP; likewise.
    """
    found = _exif_orientation(exif) if isinstance(exif, bytes) else None
    if found is None and isinstance(xmp, bytes) and (match := _XMP_ORIENTATION.search(xmp)):
        found = int(match[1])
    return found if found is not None and 1 <= found <= 8 else 1


def _exif_orientation(exif: bytes) -> int | None:
    """Return the value of the field Orientation, the first if it has several; None if it can't be read.

    Only this field is looked at, so that damage in others does not matter.
    """
    exif = re.sub(rb"^(Exif\0\0)+", b"", exif)  # some writers put the header twice
    order = _order(exif)
    for tag, kind, count, value in _tiff_entries(exif, one=True):
        if tag == 0x0112:
            form = {3: "H", 4: "I", 8: "h", 9: "i"}.get(kind)
            if form is None or not count:
                return None
            if count * _TIFF_SIZES[kind] > len(value):  # then it is the place of the values
                place = struct.unpack(order + "I", value)[0]
                value = exif[place : place + _TIFF_SIZES[kind]].ljust(4, b"\0")
            return struct.unpack_from(order + form, value)[0]
    return None


# --- TIFF -------------------------------------------------------------------------------------------------------


def _order(data: bytes) -> str:
    return "<" if data[:2] == b"II" else ">"


def _tiff_directory(data: bytes) -> tuple[int, int, int, int]:
    """Return where the first directory of a TIFF has its entries, how many are whole, and their size.

    Returns:
        The position of the directory, that of its first entry, the number of entries and the bytes of an entry; no
        entries if it is no TIFF.
    """
    if data[:2] not in (b"II", b"MM") or len(data) < 16:
        return 0, 0, 0, 12
    order = _order(data)
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    start = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)[0]
    first, size = start + (8 if big else 2), 20 if big else 12
    if start < 8 or first > len(data):
        return 0, 0, 0, size
    count = struct.unpack_from(order + ("Q" if big else "H"), data, start)[0]
    return start, first, min(count, (len(data) - first) // size), size


def _tiff_entries(data: bytes, one: bool = False) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield (tag, type, count, value or its position) of the entries in the first directory of a TIFF.

    Args:
        data: The bytes of the TIFF.
        one: Whether a directory of at most 2^16 entries of 12 bytes is meant, as in EXIF.
    """
    _, first, count, size = _tiff_directory(data)
    if one and size != 12:
        return
    form = _order(data) + ("HHI4s" if size == 12 else "HHQ8s")
    for at in range(first, first + count * size, size):
        yield struct.unpack_from(form, data, at)


def tiff_tags(data: bytes) -> dict[int, tuple[int, ...]]:
    """Return the values of those tags of a TIFF's first directory that are whole numbers, at most 64 of each."""
    order = _order(data)
    found: dict[int, tuple[int, ...]] = {}
    for tag, kind, count, value in _tiff_entries(data):
        form = {1: "B", 3: "H", 4: "I", 16: "Q"}.get(kind)
        if form is None or not count:
            continue
        count = min(count, 64)
        size = count * _TIFF_SIZES[kind]
        at = 0 if size <= len(value) else int.from_bytes(value, "little" if order == "<" else "big")
        held = value if size <= len(value) else data
        if at + size <= len(held):
            found.setdefault(tag, struct.unpack_from(f"{order}{count}{form}", held, at))
    return found


def _bare_tiff(data: bytes) -> bytes | None:
    start, first, count, size = _tiff_directory(data)
    order = _order(data)
    kept = []
    for number, (tag, kind, amount, value) in enumerate(_tiff_entries(data)):
        end = amount * _TIFF_SIZES.get(kind, 0)
        if end > len(value):
            end += int.from_bytes(value, "little" if order == "<" else "big")
        if tag in _TIFF_PIXELS and end <= len(data):
            kept.append(data[first + number * size : first + (number + 1) * size])
    if not count or len(kept) == count:
        return None
    bare = bytearray(data)
    head = struct.pack(order + ("H" if size == 12 else "Q"), len(kept))
    directory = head + b"".join(kept) + bytes(4 if size == 12 else 8)  # no further pages
    bare[start : start + len(directory)] = directory
    return bytes(bare)


# --- PNG --------------------------------------------------------------------------------------------------------


def without_png_chunks(data: bytes) -> tuple[bytes, dict[str, Any] | None]:
    """Take the chunks out of a PNG that its pixels do not need.

    Pillow keeps texts under their own keywords beside its own entries, where "transparency" or "icc_profile" would
    take effect, and refuses images with large ones.

    Returns:
        The file without them, and what could be read of "exif", "xmp" and "icc_profile"; of files that are no PNG, the
        file and None.
    """
    if not data.startswith(_PNG):
        return data, None
    view, kept = memoryview(data), []
    metadata: dict[str, Any] = {}
    start = at = len(_PNG)
    while at + 8 <= len(data):
        name, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4])
        if not name.isalpha() or name == b"IEND":
            break  # Pillow says what is wrong
        # A lower-case letter marks chunks that are not critical.
        if name[0] & 32 and not (name == b"tRNS" and _is_colour(view[at:end], data[25])):
            kept.append(view[start:at])
            start = min(end, len(data))
            if name in (b"eXIf", b"iCCP", b"iTXt", b"zTXt", b"tEXt") and _is_whole(view[at:end]):
                metadata |= _read_chunk(name, data[at + 8 : end - 4])
        at = end
    if not kept:
        return data, metadata
    return b"".join([_PNG, *kept, view[start:]]), metadata


def _is_whole(chunk: memoryview) -> bool:
    """Return whether a chunk is there to its end, with its checksum."""
    return len(chunk) >= 12 and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])


def _is_colour(chunk: memoryview, colour_type: int) -> bool:
    """Return whether a chunk tRNS can be read; libpng ignores others, where Pillow refuses the image."""
    length = len(chunk) - 12
    fits = {0: length == 2, 2: length == 6, 3: 1 <= length <= 256}
    return fits.get(colour_type, False) and _is_whole(chunk)


def _read_chunk(name: bytes, body: bytes) -> dict[str, Any]:
    """Return the metadata of a PNG chunk; nothing if it can't be read."""
    if name == b"eXIf":
        return {"exif": body}
    keyword, _, rest = body[:2048].partition(b"\0")
    rest = body[len(keyword) + 1 :]
    if name == b"iCCP":
        profile = _inflated(rest[1:], _MOST_PROFILE) if rest[:1] == b"\0" else None
        return {"icc_profile": profile} if profile else {}
    if name == b"iTXt" and keyword == b"XML:com.adobe.xmp":
        parts = rest[2:].split(b"\0", 2)
        if len(parts) < 3:
            return {}
        xmp = parts[2] if rest[0] == 0 else _inflated(parts[2], _MOST_TEXT)
        return {"xmp": xmp} if xmp else {}
    if name in (b"tEXt", b"zTXt") and keyword == b"Raw profile type exif":
        text = rest if name == b"tEXt" else _inflated(rest[1:], _MOST_TEXT) or b""
        try:
            return {"exif": bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))}
        except ValueError:
            return {}
    return {}


def _inflated(data: bytes, most: int) -> bytes | None:
    """Decompress data, also if it is cut; None if that can't be done or gives more than `most` bytes."""
    try:
        found = zlib.decompressobj().decompress(data, most + 1)
    except zlib.error:
        return None
    return found if len(found) <= most else None


# --- other formats ----------------------------------------------------------------------------------------------


def bare(data: bytes) -> tuple[bytes, dict[str, Any] | None] | None:
    """Take all metadata out of a file that can't be read with it.

    Returns:
        The file without it, and what could be read of "exif", "xmp" and "icc_profile"; None instead of the latter if
        Pillow is to read it from the result. None if there is nothing to take out.
    """
    if data.startswith(b"\xff\xd8"):
        return _bare_jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _bare_webp(data)
    if data[:2] in (b"II", b"MM"):
        return (found, None) if (found := _bare_tiff(data)) else None
    if data[4:8] == b"ftyp":  # AVIF: an item of EXIF becomes one of an unknown type
        hidden = re.sub(rb"(infe(?:\x02.{7}|\x03.{9}))Exif", rb"\1none", data, flags=re.DOTALL)
        return (hidden, None) if hidden != data else None
    return None


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, start, end) of the segments of a JPEG up to its first scan, whose end is that of the file."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 4 <= len(data):
        marker = data[at + 1]
        if marker in (0, 0xFF) or marker == 1 or 0xD0 <= marker <= 0xD8:  # padding, and markers without a body
            at += 1 if marker in (0, 0xFF) else 2
            continue
        end = len(data) if marker == 0xDA else at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if end > len(data) or end < at + 4:
            return
        yield marker, at, end
        at = end


def jpeg_frame(data: bytes) -> int | None:
    """Return the marker of a JPEG's frame, which says how it is coded; None if there is none."""
    if not data.startswith(b"\xff\xd8"):
        return None
    return next((m for m, *_ in _jpeg_segments(data) if 0xC0 <= m <= 0xCF and m not in (0xC4, 0xC8, 0xCC)), None)


def _bare_jpeg(data: bytes) -> tuple[bytes, dict[str, Any]] | None:
    view, kept, profile = memoryview(data), [], []
    metadata: dict[str, Any] = {}
    marker = 0
    for marker, start, end in _jpeg_segments(data):
        head = data[start + 4 : start + 40]
        # libjpeg takes the colour space from these two, where they are whole.
        colour = (marker == 0xE0 and head[:5] == b"JFIF\0" and end - start >= 18) or (
            marker == 0xEE and head[:5] == b"Adobe" and end - start >= 16
        )
        if colour or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(view[start:end])
        elif head.startswith(b"Exif\0\0"):
            metadata.setdefault("exif", data[start + 4 : end])
        elif head.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            metadata.setdefault("xmp", data[start + 33 : end])
        elif head.startswith(b"ICC_PROFILE\0") and end - start >= 18:
            profile.append(data[start + 16 : end])
    if marker != 0xDA:
        return None
    profile.sort(key=lambda part: part[0])
    if profile and [part[0] for part in profile] == [*range(1, profile[0][1] + 1)]:
        metadata["icc_profile"] = b"".join(part[2:] for part in profile)
    return b"".join([b"\xff\xd8", *kept]), metadata


def _bare_webp(data: bytes) -> tuple[bytes, dict[str, Any]]:
    names = {b"EXIF": "exif", b"XMP ": "xmp", b"ICCP": "icc_profile"}
    kept, at = [], 12
    metadata: dict[str, Any] = {}
    while at + 8 <= len(data):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + size + size % 2
        if name in names:
            if at + 8 + size <= len(data):
                metadata[names[name]] = data[at + 8 : at + 8 + size]
        elif name == b"VP8X" and size >= 10:
            kept.append(data[at : at + 8] + bytes((data[at + 8] & ~0x2C,)) + data[at + 9 : end])
        elif name in (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"):
            kept.append(data[at:end])
        at = end
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body, metadata
