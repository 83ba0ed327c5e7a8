"""Small-sample statistics: Student's t, tests that are repeated while data come in, sample size, a slope that groups share.

The differences of pairs are taken as normal, which makes a comparison a paired t-test (Student, "The probable error of a mean",
Biometrika 1908). With n = 2 pairs the one-sided 95 % bound of a mean is 6.3 standard errors away and the 99 % bound 31.8; with
n = 6 they are 2.0 and 3.4. So two seeds only screen: they show a failure, or a gain far above the noise, and little between.
"""

import math
import statistics
from bisect import bisect_left as bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from nanochat.common import UserError


def distributions():
    """scipy.stats. Raises: UserError without scipy."""
    try:
        import scipy.stats
    except ImportError:
        raise UserError("the lab's verdicts need scipy: pip install scipy (`lab run` works without it)") from None
    return scipy.stats


@cache
def t_quantile(p: float, df: float) -> float:
    """The quantile p in (0, 1) of Student's t with df > 0 degrees of freedom, which may be infinite (the normal distribution).

    Raises: UserError without scipy.
    """
    return float(distributions().t.ppf(p, df) if math.isfinite(df) else distributions().norm.ppf(p))


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error `se`, which was estimated with `df` degrees of freedom."""
    mean: float
    se: float
    df: float

    def margin(self, alpha: float) -> float:
        """The distance from the mean to its one-sided (1 - alpha) confidence bounds; infinite where they are not known."""
        if self.se == 0:
            return 0.0
        if self.df < 1 or alpha <= 0 or not math.isfinite(self.se):
            return math.inf
        return t_quantile(1 - alpha, self.df) * self.se


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of `values`, of which there is at least one; its error is infinite for one."""
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Estimate(statistics.fmean(values), spread, len(values) - 1)


def margin_of_error(values: Sequence[float], alpha: float) -> float:
    """The distance from the mean of `values` to its one-sided (1 - alpha) confidence bounds; infinite for fewer than two."""
    return estimate(values).margin(alpha) if len(values) > 1 else math.inf


# --- tests that are repeated -----------------------------------------------------------------------------------------

GRID = 1201  # points of the numerical integration


@cache
def levels(most: int, total: float) -> dict[int, float]:
    """The type I error of the test after n = 2, 3, ... `most` pairs, such that all these tests together err in `total`.

    Tests that are repeated until one is significant err too often (Armitage, McPherson and Rowe, J. R. Stat. Soc. A 1969). So
    the error is spent over the looks: total * (n / most)^2 of it by the n-th pair (alpha spending: Lan and DeMets, Biometrika
    1983; this function of it: Kim and DeMets, Biometrika 1987). The levels follow by numerical integration over the sums that
    have not crossed a boundary yet. They are those of a normal mean with a known variance, used as levels of t-tests ("the
    significance level approach": Jennison and Turnbull, Group Sequential Methods, 2000).
    """
    import numpy as np
    normal, found, density, spent = distributions().norm, {}, None, 0.0
    sums, width = np.linspace(-8 * math.sqrt(most), 8 * math.sqrt(most), GRID, retstep=True)
    step = normal.pdf(sums[:, None] - sums[None, :]) * width  # one more pair
    for n in range(2, most + 1):
        density = normal.pdf(sums, scale=math.sqrt(n)) if density is None else step @ density
        beyond = np.cumsum(density[::-1])[::-1] * width       # the probability of at least this sum, no boundary crossed before
        aim = total * (n / most) ** 2 - spent
        boundary = float(np.interp(-math.log(aim), -np.log(np.maximum(beyond, 1e-300)), sums))
        found[n] = float(normal.sf(boundary / math.sqrt(n)))
        density, spent = np.where(sums < boundary, density, 0.0), spent + aim
    return found


def pairs_needed(sd: float, effect: float, alpha: float, power: float = 0.8, most: int = 99) -> int:
    """The smallest number of pairs, up to `most`, with which a one-sided t-test at `alpha` finds a mean of `effect` with `power`.

    sd: standard deviation of a pair's difference.
    """
    if sd <= 0 or effect == 0:
        return 2 if effect else most
    from scipy.special import nctdtr  # the noncentral t: much faster than scipy.stats.nct

    def found(n: int) -> bool:
        return 1 - nctdtr(n - 1, abs(effect) / sd * math.sqrt(n), t_quantile(1 - alpha, n - 1)) >= power
    return bisect(range(most), True, lo=2, key=found) if found(most - 1) else most


def sd_range(sd: float, df: int, coverage: float = 0.8) -> tuple[float, float]:
    """The confidence interval of a standard deviation that was estimated with `df` degrees of freedom (chi-squared)."""
    chi2, tail = distributions().chi2, (1 - coverage) / 2
    return sd * math.sqrt(df / chi2.ppf(1 - tail, df)), sd * math.sqrt(df / chi2.ppf(tail, df))


# --- rates, slopes, depths -------------------------------------------------------------------------------------------


def more_often(failures: int, runs: int, other_failures: int, other_runs: int) -> float:
    """The probability of so many or more of all failures on this side, where both sides fail equally often: the one-sided p of
    Fisher's exact test (Fisher, "The Design of Experiments", 1935)."""
    return float(distributions().hypergeom.sf(failures - 1, runs + other_runs, failures + other_failures, runs))


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


def line_at(points: Sequence[tuple[float, float]], x: float) -> Estimate | None:
    """The value at `x` of a straight line through points (x, y), by least squares. None for fewer than three, or one x."""
    n = len(points)
    centre = statistics.fmean(p[0] for p in points) if points else 0.0
    sxx = sum((p[0] - centre) ** 2 for p in points)
    if n < 3 or sxx == 0:
        return None
    level = statistics.fmean(p[1] for p in points)
    slope = sum((p[0] - centre) * p[1] for p in points) / sxx
    variance = sum((p[1] - level - slope * (p[0] - centre)) ** 2 for p in points) / (n - 2)
    return Estimate(level + slope * (x - centre), math.sqrt(variance * (1 / n + (x - centre) ** 2 / sxx)), n - 2)


def partially_pooled(groups: Sequence[Estimate]) -> list[Estimate]:
    """Estimates of the same effect in several groups that may truly differ, each drawn towards the common mean as far as the
    groups agree: best linear unbiased predictions of a mixed model (random effects; the variance between groups by DerSimonian
    and Laird, Controlled Clinical Trials 1986). Groups that differ by more than their errors keep their own estimates."""
    precision = [1 / max(g.se, 1e-9) ** 2 for g in groups]
    fixed = sum(w * g.mean for w, g in zip(precision, groups, strict=True)) / sum(precision)
    heterogeneity = sum(w * (g.mean - fixed) ** 2 for w, g in zip(precision, groups, strict=True)) - (len(groups) - 1)
    between = max(0.0, heterogeneity / (sum(precision) - sum(w * w for w in precision) / sum(precision)))
    weights = [1 / (between + 1 / w) for w in precision]
    common, common_variance = sum(w * g.mean for w, g in zip(weights, groups, strict=True)) / sum(weights), 1 / sum(weights)
    found = []
    for w, g in zip(precision, groups, strict=True):
        own = between / (between + 1 / w)
        variance = own / w + (1 - own) ** 2 * common_variance
        found.append(Estimate(own * g.mean + (1 - own) * common, math.sqrt(variance), g.df))
    return found
