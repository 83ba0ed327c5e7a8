"""Small-sample statistics: one-sided bounds of a mean by Student's t, the slope of a line with a level per group.

What two seeds can tell: with n=2 the 95 % bound of a mean is 6.3 standard errors away, the 99 % bound 31.8; with n=6 it is
2.0 and 3.4. So two seeds screen: they can show a wreck, or a gain far above the noise, and little between.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from nanochat.common import UserError


@cache
def t_quantile(p: float, df: float) -> float:
    """The t that a fraction `p` in (0, 1) lies below, with `df` > 0 degrees of freedom. UserError without scipy."""
    try:
        from scipy.stats import t
    except ImportError:
        raise UserError("the lab's verdicts need scipy: pip install scipy (`lab run` goes without)") from None
    return float(t.ppf(p, df))


def half_width(values: list[float], alpha: float) -> float:
    """How far the one-sided (1 - alpha) bounds of the mean lie from the mean; infinite for fewer than two values."""
    if len(values) < 2:
        return math.inf
    return t_quantile(1 - alpha, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def seeds_needed(sd: float, effect: float, alpha: float, most: int = 99) -> int:
    """The smallest n of pairs whose one-sided (1 - alpha) bound is expected to clear `effect` (sd: of a pair's difference)."""
    for n in range(2, most):
        if t_quantile(1 - alpha, n - 1) * sd / math.sqrt(n) <= abs(effect):
            return n
    return most


@dataclass(frozen=True)
class Slope:
    """A slope, and its one-sided 95 % bounds."""
    value: float
    low: float
    high: float


def common_slope(points: Sequence[tuple[object, float, float]]) -> Slope | None:
    """Least squares of y on x for (group, x, y), with one slope and a level per group. None where there is no slope to see."""
    groups: dict[object, list[tuple[float, float]]] = {}
    for group, x, y in points:
        groups.setdefault(group, []).append((x, y))
    centred = [(x - statistics.fmean(p[0] for p in group), y - statistics.fmean(p[1] for p in group))
               for group in groups.values() for x, y in group]
    sxx, df = sum(x * x for x, _ in centred), len(points) - len(groups) - 1
    if sxx == 0 or df < 1:
        return None
    slope = sum(x * y for x, y in centred) / sxx
    error = math.sqrt(sum((y - slope * x) ** 2 for x, y in centred) / df / sxx)
    width = t_quantile(0.95, df) * error
    return Slope(slope, slope - width, slope + width)
