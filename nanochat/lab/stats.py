"""Small-sample statistics: confidence bounds of a mean by Student's t, sample size, a slope that several groups share.

The differences of pairs are taken as normal, which makes a comparison a paired t-test (Student, "The probable error of a mean",
Biometrika 1908). With n = 2 pairs the one-sided 95 % bound of a mean is 6.3 standard errors away and the 99 % bound 31.8; with
n = 6 they are 2.0 and 3.4. So two seeds only screen: they show a failure, or a gain far above the noise, and little between.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from nanochat.common import UserError


@cache
def t_quantile(p: float, df: float) -> float:
    """The quantile p in (0, 1) of Student's t with df > 0 degrees of freedom.

    Raises: UserError without scipy.
    """
    try:
        from scipy.stats import t
    except ImportError:
        raise UserError("the lab's verdicts need scipy: pip install scipy (`lab run` works without it)") from None
    return float(t.ppf(p, df))


def margin_of_error(values: list[float], alpha: float) -> float:
    """The distance from the mean of `values` to its one-sided (1 - alpha) confidence bounds; infinite for fewer than two."""
    if len(values) < 2:
        return math.inf
    return t_quantile(1 - alpha, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def pairs_needed(sd: float, effect: float, alpha: float, most: int = 99) -> int:
    """The smallest number of pairs, up to `most`, whose expected (1 - alpha) bound excludes zero: a power of about 50 %.

    sd: standard deviation of a pair's difference; effect: its mean.
    """
    for n in range(2, most):
        if t_quantile(1 - alpha, n - 1) * sd / math.sqrt(n) <= abs(effect):
            return n
    return most


@dataclass(frozen=True)
class Slope:
    """A slope with its one-sided 95 % confidence bounds."""
    value: float
    low: float
    high: float


def common_slope(points: Sequence[tuple[object, float, float]]) -> Slope | None:
    """Fit y = level[group] + slope * x to points (group, x, y) by least squares (analysis of covariance).

    None where x never varies within a group, or no degree of freedom is left.
    """
    groups: dict[object, list[tuple[float, float]]] = {}
    for group, x, y in points:
        groups.setdefault(group, []).append((x, y))
    centred = [(x - statistics.fmean(p[0] for p in group), y - statistics.fmean(p[1] for p in group))
               for group in groups.values() for x, y in group]
    sxx, df = sum(x * x for x, _ in centred), len(points) - len(groups) - 1
    if sxx == 0 or df < 1:
        return None
    slope = sum(x * y for x, y in centred) / sxx
    standard_error = math.sqrt(sum((y - slope * x) ** 2 for x, y in centred) / df / sxx)
    margin = t_quantile(0.95, df) * standard_error
    return Slope(slope, slope - margin, slope + margin)
