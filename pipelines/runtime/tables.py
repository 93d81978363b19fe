"""Tables and pictures for people."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image


def png(image: np.ndarray) -> bytes:
    """Encode an image, uint8 (H, W, 3), as PNG."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, format="png")
    return data.getvalue()


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of text as aligned columns: the first left-aligned, all others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
