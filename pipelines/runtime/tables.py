"""What a job leaves for people: tables and pictures."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image


def png(image: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as PNG."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, format="png")
    return data.getvalue()


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
