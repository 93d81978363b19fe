"""JPEG -> 256 pixels on one core: our transform beside torchvision's and simplejpeg's decoders, and how they differ.

python tests/benchmarks/decode.py DATA [--repeats 5]

DATA holds JPEGs; those with a colour profile are left out, since only our transform applies it.
"""

import tempfile
import time
from pathlib import Path

import common
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from litevae.images import ImageTransform

SIDE = 256
TRANSFORM = ImageTransform(SIDE)


def pillow(data):
    return TRANSFORM(data).pixels


def torchvision(data):
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    image = decode_jpeg(raw, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    height, width = image.shape[1:]
    scale = SIDE / min(height, width)
    image = resize(image, [round(height * scale), round(width * scale)], InterpolationMode.BICUBIC, antialias=True)
    top, left = ((side - SIDE) // 2 for side in image.shape[1:])
    return image[:, top : top + SIDE, left : left + SIDE].permute(1, 2, 0).contiguous().numpy()


def simple(data):
    pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False)
    return next(TRANSFORM._views(Image.fromarray(pixels), None)).pixels


DECODERS = {
    "**Pillow (our transform)**": pillow,
    "torchvision decode_jpeg, antialiased bicubic": torchvision,
    "simplejpeg in full, Pillow's bicubic": simple,
}


def psnr(found, expected):
    error = np.mean([np.square(a.astype(np.float64) - b).mean() for a, b in zip(found, expected, strict=True)])
    return "identical" if error == 0 else f"{10 * np.log10(255**2 / error):.1f} dB"


def measure(images, repeats):
    """Of each decoder: images/s of CPU time, images/s of wall time, PSNR against our transform."""
    outputs = [[decoder(data) for data in images] for decoder in DECODERS.values()]  # warms up, too
    rates = {name: ([], []) for name in DECODERS}
    for _ in range(repeats):
        for name, decoder in DECODERS.items():
            cpu, wall = time.process_time(), time.perf_counter()
            for data in images:
                decoder(data)
            rates[name][0].append(len(images) / (time.process_time() - cpu))
            rates[name][1].append(len(images) / (time.perf_counter() - wall))
    return [
        [common.spread(cpu), common.spread(wall), psnr(found, outputs[0])]
        for (cpu, wall), found in zip(rates.values(), outputs, strict=True)
    ]


def main(data, repeats):
    torch.set_num_threads(1)
    common.environment("pillow", "torchvision", "simplejpeg")
    plain = []
    for file in common.jpegs(data):
        with Image.open(file) as image:
            if not image.info.get("icc_profile"):
                plain.append(file)
    with tempfile.TemporaryDirectory() as temporary:
        large = [file.read_bytes() for file in common.mosaics(plain, 8, Path(temporary) / "mosaics")]
    small = [file.read_bytes() for file in plain]
    for name, images in ((f"{len(small)} JPEGs of DATA", small), (f"{len(large)} JPEGs of 24 megapixels", large)):
        print(f"{name}, to {SIDE} px, one core, {repeats} runs: median (range)\n")
        rows = [[name, *row] for name, row in zip(DECODERS, measure(images, repeats), strict=True)]
        common.table(["", "images/s of CPU time", "images/s of wall time", "PSNR against Pillow"], rows)
        print(flush=True)


if __name__ == "__main__":
    main(**vars(common.arguments(__doc__, "data", repeats=5).parse_args()))
