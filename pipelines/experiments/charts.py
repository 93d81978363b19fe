"""Charts of curves as SVG. Rows have the classes c0, c1, ..., to which a page's style sheet gives colours."""

import math
import re
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise
from typing import Any

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 10, 44
COLOURS = 10
IMAGES = "images seen"
SHOWN = 160  # most points of a line; a longer line is replaced by the means of this many equal parts
LOGARITHMIC = 10  # ratio of the largest to the smallest value above which the vertical axis is logarithmic


def chart(
    title: str, names: Sequence[str], rows: Sequence[Sequence[Points]], unit: str = IMAGES
) -> tuple[str, dict[str, Any]] | None:
    """Draw the curves of several rows: for each row the mean over its seeds, with a thin line for each seed behind it.

    Args:
        title: the metric's name.
        names: the rows' names.
        rows: for each row and each seed, points (x, y). Points whose y is not finite are left out.
        unit: unit of x, the label of the horizontal axis.

    Returns:
        The SVG, and the values and places of the mean lines' points for a mouse pointer; None if no curve has two
        points.
    """
    rows = [[[(x, y) for x, y in seed if math.isfinite(y)] for seed in row] for row in rows]
    if not any(len(seed) > 1 for row in rows for seed in row):
        return None
    thin = [[thinned(seed) for seed in row if seed] for row in rows]
    means = [thinned(mean([seed for seed in row if seed])) for row in rows]
    x = [x for row in thin for seed in row for x, _ in seed]
    y = [y for row in thin for seed in row for _, y in seed]
    left = 0.0 if unit == IMAGES else min(x)
    low, high, log = *_padded(min(y), max(y)), False
    if min(y) > 0 and max(y) / min(y) > LOGARITHMIC:
        low, high, log = min(y) / 1.15, max(y) * 1.15, True
    across = _scale(left, max(x), LEFT, WIDTH - RIGHT)
    up = _scale(*((math.log10(low), math.log10(high)) if log else (low, high)), HEIGHT - BOTTOM, TOP)
    upward: Callable[[float], float] = (lambda value: up(math.log10(value))) if log else up
    base, middle = HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for value, text in _logarithmic(low, high) if log else _linear(low, high):
        at = f"{upward(value):.1f}"
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at}" dy=".32em" text-anchor="end">{text}</text>')
    for value, text in _linear(left, max(x), 4):
        parts.append(f'<text class="tick" x="{across(value):.1f}" y="{base + 18}" text-anchor="middle">{text}</text>')
        parts.append(f'<path class="axis" d="M{across(value):.1f} {base}v4"/>')
    parts.append(f'<path class="axis" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>')
    centre = f'x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}"'
    parts.append(f'<text class="label" {centre} text-anchor="middle">{escape(unit)}</text>')
    label = escape(title.rpartition("/")[2]) + (", logarithmic" if log else "")
    parts.append(
        f'<text class="label" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{label}</text>'
    )

    def line(points: Points, kind: str) -> str:
        return f'<polyline class="{kind}" points="{" ".join(f"{across(x):.1f},{upward(y):.1f}" for x, y in points)}"/>'

    pointer = []
    for number, (name, seeds, average) in enumerate(zip(names, thin, means, strict=True)):
        if not average:
            continue
        lines = [line(seed, "seed") for seed in seeds if len(seeds) > 1] + [line(average, "mean")]
        parts.append(f'<g class="{style(number)}">{"".join(lines)}</g>')
        places = [[round(across(x), 1), round(upward(y), 1), x, float(f"{y:.4g}")] for x, y in average]
        pointer.append({"name": name, "style": style(number), "points": places})
    return "".join([*parts, "</svg>"]), {"rows": pointer, "frame": [LEFT, TOP, WIDTH - RIGHT, base], "unit": unit}


def style(number: int) -> str:
    """Return the CSS classes of row `number` (from 0): one of ten colours; rows 10 to 19, 30 to 39 ... are dashed."""
    return f"c{number % COLOURS}" + (" dashed" if number // COLOURS % 2 else "")


def mean(seeds: Sequence[Points]) -> Points:
    """Return the mean curve over the seeds, at every x where all seeds have a value."""
    if not seeds:
        return []
    values = [dict(seed) for seed in seeds]
    shared = sorted(set.intersection(*map(set, values)))
    return [(x, math.fsum(each[x] for each in values) / len(values)) for x in shared]


def thinned(points: Points) -> Points:
    """Reduce a curve of more than `SHOWN` points to the means of `SHOWN` equal parts, each at its part's last x."""
    if len(points) <= SHOWN:
        return points
    edges = [round(part * len(points) / SHOWN) for part in range(SHOWN + 1)]
    parts = [points[start:end] for start, end in pairwise(edges)]
    return [(part[-1][0], math.fsum(y for _, y in part) / len(part)) for part in parts]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Return the linear function that maps `low` to `start` and `high` to `end`."""
    return lambda value: start + (end - start) * (value - low) / ((high - low) or 1)


def _padded(low: float, high: float) -> tuple[float, float]:
    """Widen a range by 5% on both sides; an empty range gets 5% of its value, or 1."""
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad


def _linear(low: float, high: float, most: int = 6) -> list[tuple[float, str]]:
    """Return about `most` ticks (value, text) in steps of 1, 2 or 5 times a power of ten, with the digits they need."""
    rough = (high - low or 1) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(number * step, _short(number * step, step)) for number in range(first, last + 1)]


def _logarithmic(low: float, high: float) -> list[tuple[float, str]]:
    """Return the ticks (value, text) of a logarithmic axis: powers of ten, times 1, 2 and 5 if they are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    few = len(powers) > 4
    values = [factor * 10.0**power for power in powers for factor in ((1,) if few else (1, 2, 5))]
    return [(value, _short(value, value)) for value in values if low <= value <= high]


def _short(value: float, step: float) -> str:
    """Format a tick: 12k instead of 12000, and powers of ten for steps below 0.0001."""
    size = max(abs(value), step)
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit and size >= 10_000:
            return f"{value / unit:g}{letter if value else ''}".replace("-", "−")
    if 0 < step < 1e-4:
        return re.sub(r"(\.0)?e([+-])0*", r"e\2", f"{value:.1e}").replace("-", "−") if value else "0"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:.{digits}f}".replace("-", "−")
