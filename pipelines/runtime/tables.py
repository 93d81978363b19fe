"""Tables for people."""

import re
from collections.abc import Iterator, Sequence

WIDTH = 100  # characters of a line of a job's results


def fitted(rows: Sequence[Sequence[str]], width: int = WIDTH) -> str:
    """Format rows of text like `table`, in lines of at most `width` characters.

    Names in the first column that take more than half of the width are wrapped, at any place if need be. Columns that
    do not fit beside the others follow in a further table, which has the first column too.

    Args:
        rows: rows of equal length.
        width: characters of a line. Each column but the first must fit into half of it.
    """
    names = [list(_pieces(row[0], width // 2)) for row in rows]
    room = width - max(len(piece) for name in names for piece in name)
    groups: list[list[int]] = [[]]
    left = room
    for column in range(1, len(rows[0])):
        needed = 2 + max(len(row[column]) for row in rows)
        if needed > left and groups[-1]:
            groups.append([])
            left = room
        groups[-1].append(column)
        left -= needed
    blocks = []
    for group in groups:
        lines = []
        for name, row in zip(names, rows, strict=True):
            lines.append([name[0], *(row[column] for column in group)])
            lines += [[piece, *[""] * len(group)] for piece in name[1:]]
        blocks.append(table(lines))
    return "\n\n".join(blocks)


def _pieces(text: str, width: int) -> Iterator[str]:
    """Split text into pieces of at most `width` characters: after a space or a slash where there is one."""
    while len(text) > width:
        ends = [found.end() for found in re.finditer(r"[\s/]", text[:width])]
        end = ends[-1] if ends else width
        yield text[:end].rstrip()
        text = text[end:].lstrip()
    yield text


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
