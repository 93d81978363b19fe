"""What a job leaves for people: files that appear whole or not at all, and tables."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from litevae import storage


def write(path: str | Path, data: bytes) -> None:
    """Put a file in place in one step, in place of an older one.

    Raises:
        UserError: the disk is full.
    """
    partly = f"{path}.tmp"
    try:
        with open(partly, "wb") as file:
            file.write(data)
        os.replace(partly, path)
    except OSError as error:
        if not storage.full(error):
            raise
        Path(partly).unlink(missing_ok=True)
        raise storage.unwritable(str(path), error) from error


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
