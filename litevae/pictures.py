"""Pictures for people: grids of images, reconstructions next to their inputs, and feature maps."""

import io

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from litevae.images import to_uint8

_GAP = 2  # white pixels between images
_LABEL = 16  # height of the line of labels
_CELL = 128  # smaller images are enlarged by an integer factor (nearest neighbour) to at least this side
ERROR_SCALE = 4


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Arrange images (N, H, W, 3), uint8, row by row on a white sheet (height, width, 3), uint8."""
    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, 3), 255, np.uint8)
    for number, image in enumerate(images):
        top, left = (
            _GAP + place * (side + _GAP) for place, side in zip(divmod(number, columns), (height, width), strict=True)
        )
        sheet[top : top + height, left : left + width] = image
    return sheet


def latents_as_rgb(latents: Tensor) -> tuple[np.ndarray, str]:
    """Show latents as colours.

    With 4 or more channels, red, green and blue are the first three principal components over all positions of all
    latents. With up to 3 channels they are the channels themselves. Black and white are the 1st and 99th percentile of
    each component.

    Args:
        latents: Latents (N, C, h, w).

    Returns:
        Images (N, h, w, 3), uint8, and a label that says what the colours are.
    """
    latents = latents.detach().double().cpu()
    channels = latents.shape[1]
    points = latents.movedim(1, -1)
    points = points - points.mean(dim=(0, 1, 2))
    if channels > 3:
        flat = points.reshape(-1, channels)
        axes = torch.linalg.eigh(flat.T @ flat).eigenvectors.flip(1)[:, :3]
        largest = axes.abs().argmax(dim=0, keepdim=True)
        points = points @ (axes * axes.gather(0, largest).sign())  # fixes the arbitrary sign
    low, high = (torch.quantile(_thinned(points.reshape(-1, points.shape[-1])), q, dim=0) for q in (0.01, 0.99))
    colours = ((points - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
    rgb = torch.full((*points.shape[:3], 3), 0.5, dtype=torch.float64)
    rgb[..., : colours.shape[-1]] = colours
    if channels == 1:
        rgb[:] = colours
    return (rgb * 255).round().to(torch.uint8).numpy(), "latent, PCA 1-3" if channels > 3 else "latent channels"


def reconstruction_picture(x: Tensor, reconstruction: Tensor, latents: Tensor) -> np.ndarray:
    """Draw a labelled row per image: input | reconstruction | latent as RGB | error.

    The error is |input - reconstruction| in levels of 0..255, times 4.

    Args:
        x: Images (N, 3, H, W) in [-1, 1].
        reconstruction: Their reconstructions (N, 3, H, W) in [-1, 1].
        latents: Their latents (N, C, h, w); see `latents_as_rgb`.

    Returns:
        The picture (height, width, 3), uint8.
    """
    before, after = to_uint8(x), to_uint8(reconstruction)
    error = np.abs(before.astype(np.int16) - after.astype(np.int16)) * ERROR_SCALE
    colours, colours_are = latents_as_rgb(latents)
    size = (before.shape[2], before.shape[1])
    colours = np.stack([_resized(image, size) for image in colours])
    return _labelled(
        {
            "input": before,
            "reconstruction": after,
            colours_are: colours,
            f"error x{ERROR_SCALE}": error.clip(0, 255).astype(np.uint8),
        }
    )


def strongest_maps(maps: Tensor, channels: int = 4) -> Tensor:
    """Return the mean magnitude of feature maps, and the magnitudes of the channels with the largest maxima.

    Args:
        maps: Feature maps (N, C, H, W).
        channels: Number of channels to return, at most C.

    Returns:
        Maps (N, 1 + channels, H, W), float32: the mean over all channels, then the channels, the largest first.
    """
    found = []
    for image in maps.detach().float().abs():  # one by one, to save memory: they are a decoder's largest tensors
        order = image.amax(dim=(1, 2)).argsort(descending=True, stable=True)[:channels]
        found.append(torch.cat([image.mean(0, keepdim=True), image[order]]))
    return torch.stack(found)


def feature_map_picture(x: Tensor, maps: Tensor) -> np.ndarray:
    """Draw a labelled row per image (Figure 3): input | mean over channels | channel with the largest maximum | ...

    In each map, black is 0 and white is the maximum of the map.

    Args:
        x: Images (N, 3, H, W) in [-1, 1].
        maps: Maps (N, 1 + channels, h, w) from `strongest_maps`.

    Returns:
        The picture (height, width, 3), uint8.
    """
    images = to_uint8(x)
    size = (images.shape[2], images.shape[1])
    levels = (maps / maps.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12) * 255).round().to(torch.uint8).cpu().numpy()
    columns = {"input": images}
    for n in range(maps.shape[1]):
        shown = np.stack([_resized(level, size) for level in levels[:, n]])
        columns["mean |map|" if n == 0 else f"{_ordinal(n)} maximum"] = shown[..., None].repeat(3, axis=3)
    return _labelled(columns)


def _ordinal(number: int) -> str:
    return {1: "largest", 2: "2nd", 3: "3rd"}.get(number, f"{number}th")


def _labelled(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Draw columns of images (N, H, W, 3), uint8, all of one size, each column below its label."""
    first = next(iter(columns.values()))
    height, width = first.shape[1:3]
    scale = max(1, -(-_CELL // min(height, width)))
    cells = np.stack(list(columns.values()), axis=1).reshape(-1, *first.shape[1:])
    sheet = grid(cells.repeat(scale, axis=1).repeat(scale, axis=2), len(columns))
    header = Image.new("RGB", (sheet.shape[1], _LABEL), "white")
    draw = ImageDraw.Draw(header)
    for number, label in enumerate(columns):
        left = _GAP + number * (width * scale + _GAP)
        draw.text((left + 2, _LABEL // 2), label, fill="black", anchor="lm", font=ImageFont.load_default(11))
    return np.concatenate([np.asarray(header), sheet])


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.NEAREST))


def _thinned(points: Tensor, limit: int = 1_000_000) -> Tensor:
    """Return at most `limit` evenly spaced rows, because torch.quantile takes at most 16 million values."""
    return points[:: -(-len(points) // limit)]


def png(image: np.ndarray) -> bytes:
    """Encode an image, uint8 (H, W, 3), as PNG."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, format="png")
    return data.getvalue()
