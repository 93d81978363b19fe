"""Tables for people, which fit onto a page."""

import pytest

from pipelines.runtime import tables

WORDS = [
    "PSNR (dB)",
    "SSIM",
    "a measure with a long name, of which nobody knows how to say it in fewer words than this",
]


def test_what_fits_is_a_plain_table():
    rows = [["", "ours", "bicubic"], ["PSNR (dB)", "22.21", "19.9"]]
    assert tables.fitted(rows) == tables.table(rows) == "            ours  bicubic\nPSNR (dB)  22.21     19.9"


def test_columns_that_do_not_fit_follow_below():
    rows = [["row", "first", "second", "third"], ["a", "1", "2", "3"], ["b", "4", "5", "6"]]
    assert tables.fitted(rows, 18) == (
        "row  first  second\na        1       2\nb        4       5\n\nrow  third\na        3\nb        6"
    )


def test_long_names_are_wrapped_at_spaces_and_slashes_or_anywhere():
    rows = [["", "value"], ["/data/photos/of cats", "1"], ["abcdefghijklm", "2"]]
    assert tables.fitted(rows, 20).splitlines() == [
        "            value",
        "/data/          1",
        "photos/of",
        "cats",
        "abcdefghij      2",
        "klm",
    ]


@pytest.mark.parametrize("width", [40, 60, 100])
@pytest.mark.parametrize("columns", [1, 3, 12])
def test_no_line_is_wider_and_no_cell_is_lost(width, columns):
    rows = [
        ["", *(f"column {n}" for n in range(columns))],
        *([word, *(f"{n}.{len(word)}" for n in range(columns))] for word in WORDS),
    ]
    text = tables.fitted(rows, width)
    assert max(map(len, text.splitlines())) <= width
    assert all(text.split().count(cell) == 1 for row in rows[1:] for cell in row[1:])
