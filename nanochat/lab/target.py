"""Time to target, extrapolated across horizons where no run reached the target.

A run's own curve is never extended: during warm-down the loss falls faster than it does from one horizon to a longer one, so the
result would be too optimistic. Each point here is a whole run, trained to the end of its schedule: (training seconds, final
value). The model is a power law with an offset,

    value(t) = E + (target - E) * (t / T) ** -a,

which meets the target at t = T. The interval of T is a profile likelihood interval: every T for which some E and a fit about as
well as the best do. Its upper end is infinite where the points do not show that the target is ever met.

Two sides are compared in pairs (`paired_saving`): what one seed and one horizon have in common then does not count as noise, as
it would between two curves that are fitted apart.
"""

import math
from dataclasses import dataclass

import numpy as np

from nanochat.lab.stats import Estimate, line_at, t_quantile

METHOD = "power law with offset across annealed horizons, 95% profile interval"
FIELDS = {"val_bpb": "val_bpb", "smooth_loss": "final_train_loss"}  # target metric -> a row's final value of it
EXPONENTS = np.geomspace(0.02, 3.0, 50)
Points = dict[tuple[int, float], tuple[float, float]]  # (seed, share of the steps) -> (training seconds, final value)


@dataclass(frozen=True)
class Crossing:
    """Seconds of training at which the target is met: best estimate, lower and upper confidence bound; and the curve of the best
    fit, E + (target - E) * (t / seconds) ** -exponent."""
    seconds: float
    low: float
    high: float
    offset: float
    exponent: float
    target: float

    def log_time(self, value: float) -> float:
        """ln of the seconds at which the curve has this value; NaN below its lowest."""
        share = (value - self.offset) / (self.target - self.offset)
        return math.log(self.seconds) - math.log(share) / self.exponent if share > 0 else math.nan


def time_to_target(points: list[tuple[float, float]], target: float, level: float = 0.95) -> Crossing | None:
    """Fit (seconds, value) of whole runs; None for fewer than four points or fewer than three horizons."""
    t, value = (np.array(side, dtype=float) for side in zip(*points, strict=True)) if points else (np.zeros(0), np.zeros(0))
    if len(points) < 4 or np.ptp(t) == 0 or len(np.unique(np.round(np.log(t), 1))) < 3:
        return None
    grid = np.geomspace(t.min() / 10, t.max() * 1000, 1500)
    errors, offsets = _fits(t, value, target, grid)
    error = errors.min(0)
    best = int(np.argmin(error))
    exponent = int(np.argmin(errors[:, best]))
    df = len(points) - 3
    allowed = error[best] * (1 + t_quantile(0.5 + level / 2, df) ** 2 / df)
    inside = np.flatnonzero(error <= allowed)
    unbounded = inside[-1] == len(grid) - 1
    return Crossing(float(grid[best]), float(grid[inside[0]]), math.inf if unbounded else float(grid[inside[-1]]),
                    float(offsets[exponent, best]), float(EXPONENTS[exponent]), target)


def _fits(t: np.ndarray, value: np.ndarray, target: float, crossings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each exponent and each T in `crossings` (n,): the residual sum of squares at the best E in [0, target), and this E;
    both are (exponents, n)."""
    errors, offsets = [], []
    for exponent in EXPONENTS:
        w = (t / crossings[:, None]) ** -exponent                                   # (n, points)
        x = 1 - w                                                                   # the model is linear in E: E x + target w
        offset = ((value - target * w) * x).sum(1) / np.maximum((x * x).sum(1), 1e-300)
        offsets.append(np.clip(offset, 0.0, target * (1 - 1e-6)))
        errors.append(((value - offsets[-1][:, None] - (target - offsets[-1][:, None]) * w) ** 2).sum(1))
    return np.array(errors), np.array(offsets)


def paired_saving(baseline: Points, candidate: Points, target: float, pace: float | None) -> Estimate | None:
    """ln(baseline's time to target / candidate's), extrapolated from runs of several horizons.

    pace: ln(baseline's seconds per step / candidate's), where it was measured; else the runs' own times count. Of each pair of
    runs, one seed and one horizon, the saving is pace plus how much later on its curve the baseline has the candidate's
    quality. A straight line over ln(share of the steps) carries the savings to the share at which the baseline's curve meets
    the target. None where the baseline's curve is not known, or its values lie beyond it.
    """
    curve = time_to_target(list(baseline.values()), target)
    pairs = [(share, *baseline[seed, share], *candidate[seed, share]) for seed, share in baseline if (seed, share) in candidate]
    if curve is None or len({share for share, *_ in pairs}) < 2:
        return None
    savings = [(math.log(share), (math.log(b_seconds / c_seconds) if pace is None else pace)
                + curve.log_time(c_value) - curve.log_time(b_value)) for share, b_seconds, b_value, c_seconds, c_value in pairs]
    if any(math.isnan(saving) for _, saving in savings):
        return None
    whole = [seconds for (_, share), (seconds, _) in baseline.items() if share == 1.0]
    return line_at(savings, math.log(curve.seconds / (sum(whole) / len(whole)))) if whole else None
