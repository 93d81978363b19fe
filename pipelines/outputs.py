"""What a job leaves for people: files that appear whole or not at all, and tables."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write(path: str | Path, data: bytes) -> None:
    """Put a file in place in one step, in place of an older one."""
    partly = f"{path}.tmp"
    with open(partly, "wb") as file:
        file.write(data)
    os.replace(partly, path)


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
