"""JPEG -> 256 pixels on one thread: the ways our transform decodes, torchvision beside them, and how they differ."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from litevae.images import ImageTransform
from pipelines.benchmark import meter

SIDE = 256
PHOTOS, MOSAICS = 200, 3  # at most so many
LARGE = {  # tiles of a mosaic, and the size of each
    "3000 x 2250": ((6, 6), (500, 375)),
    "6000 x 4000": ((12, 10), (500, 400)),
}
LEAST = 0.5  # seconds that a sample takes Pillow: a few small images are read again and again

Decoder = Callable[[bytes], np.ndarray]


def images(setting: meter.Setting) -> Iterator[meter.ReportTable]:
    """A table for photos without a colour profile, for those with one, and for each size of mosaics."""
    files: dict[bool, list[Path]] = {False: [], True: []}
    photos = setting.photos()
    for file in photos:
        with Image.open(file) as image:
            if image.mode in ("L", "RGB"):  # of CMYK there is one way only, Pillow's
                files[bool(image.info.get("icc_profile"))].append(file)
    if files[False]:
        yield _table("photos", files[False][:PHOTOS], setting, DECODERS)
    if files[True]:
        ours = {name: decoder for name, decoder in DECODERS.items() if decoder is not torchvision}
        yield _table(
            "photos with a colour profile, which torchvision does not apply", files[True][:PHOTOS], setting, ours
        )
    for size, (tiles, tile) in LARGE.items():
        made = meter.mosaics(photos, MOSAICS, setting.place / f"mosaics-{size.replace(' ', '')}", tiles, tile)
        yield _table(f"mosaics of {size} pixels", made, setting, DECODERS)


def ours(mode: str) -> Decoder:
    transform = ImageTransform(SIDE, decode=mode)  # type: ignore[arg-type]  # a key of DECODERS
    return lambda data: transform(data).pixels


def torchvision(data: bytes) -> np.ndarray:
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    image = decode_jpeg(raw, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    height, width = image.shape[1:]
    scale = SIDE / min(height, width)
    image = resize(image, [round(height * scale), round(width * scale)], InterpolationMode.BICUBIC, antialias=True)
    top, left = ((side - SIDE) // 2 for side in image.shape[1:])
    return image[:, top : top + SIDE, left : left + SIDE].permute(1, 2, 0).contiguous().numpy()


DECODERS: dict[str, Decoder] = {
    "decode=pillow": ours("pillow"),
    "decode=fast": ours("fast"),
    "decode=scaled": ours("scaled"),
    "torchvision decode_jpeg, antialiased bicubic": torchvision,
}


def _table(
    title: str, files: Sequence[Path], setting: meter.Setting, decoders: dict[str, Decoder]
) -> meter.ReportTable:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measured(title, [file.read_bytes() for file in files], setting, decoders)
    finally:
        torch.set_num_threads(threads)


def _measured(
    title: str, data: Sequence[bytes], setting: meter.Setting, decoders: dict[str, Decoder]
) -> meter.ReportTable:
    first = next(iter(decoders))
    outputs, start = {first: [decoders[first](each) for each in data]}, time.process_time()
    outputs[first] = [decoders[first](each) for each in data]  # once more: the first pass warms up
    passes = max(1, math.ceil(LEAST / (time.process_time() - start)))
    outputs |= {name: [decoder(each) for each in data] for name, decoder in decoders.items() if name != first}
    calls = {name: partial(_all, decoder, data, passes) for name, decoder in decoders.items()}
    seconds = meter.rounds(calls, setting.config.repeats, clock=time.process_time)
    table = meter.ReportTable(
        f"Decoding to {SIDE} px: {len(data)} {title}",
        f"{sum(map(len, data)) / len(data) / 1000:,.1f} kB each on average; one thread; {setting.config.repeats} runs "
        f"of each in turn: median (range). Times: the median of the ratios of the same round. PSNR: against Pillow, of "
        f"all images and of the worst.",
        ["", "images/s of CPU time", "times Pillow's", "PSNR, dB", "worst"],
    )
    for name, taken in seconds.items():
        overall, worst = psnr(outputs[name], outputs[first])
        shown = ["identical", ""] if math.isinf(overall) else [f"{overall:.1f}", f"{worst:.1f}"]
        rates = meter.rates(taken, passes * len(data))
        table.rows.append([name, meter.median_and_range(rates), f"{meter.ratio(seconds[first], taken):.2f}", *shown])
        table.samples[name] = {"images": passes * len(data), "CPU seconds": taken}
    return table


def _all(decoder: Decoder, data: Sequence[bytes], passes: int) -> None:
    for each in itertools.chain.from_iterable(itertools.repeat(data, passes)):
        decoder(each)


def psnr(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> tuple[float, float]:
    """dB of all images together, and of the worst."""
    errors = [np.square(a.astype(np.float64) - b).mean() for a, b in zip(found, expected, strict=True)]
    overall, worst = (math.inf if e == 0 else 10 * math.log10(255**2 / e) for e in (np.mean(errors), max(errors)))
    return overall, worst
