"""The statistics of a comparison: means over seeds, and the significance of differences."""

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence


def mean_over_seeds(values: Mapping[str, float]) -> float | None:
    """Return the mean of the values by seed; None if there are none."""
    return sum(values.values()) / len(values) if values else None


def std_over_seeds(values: Mapping[str, float]) -> float | None:
    """Return the sample standard deviation (n - 1) of the values by seed.

    It is None for fewer than two values, or if a value is not finite.
    """
    if len(values) < 2 or not all(map(math.isfinite, values.values())):
        return None
    return statistics.stdev(values.values())


def significance(x: Sequence[float], y: Sequence[float], paired: bool = False) -> float | None:
    """Return the two-sided p-value of Welch's t-test, or of a paired t-test.

    Args:
        x, y: the values of the two sides.
        paired: whether x[i] and y[i] have the same seed.

    Returns:
        The p-value; None if a side has fewer than two values, a value is not finite, or nothing varies.
    """
    varying = [[b - a for a, b in zip(x, y, strict=True)]] if paired else [x, y]
    if min(len(x), len(y)) < 2 or not all(map(math.isfinite, [*x, *y])) or not any(len({*v}) > 1 for v in varying):
        return None
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy warns if values hardly vary
        p = float((stats.ttest_rel(x, y) if paired else stats.ttest_ind(x, y, equal_var=False)).pvalue)
    return p if math.isfinite(p) else None
