"""Time to target, extrapolated across horizons where no run reached the target.

A run's own curve is never extended: during warm-down the loss falls faster than it does from one horizon to a longer one, so the
result would be too optimistic. Each point here is a whole run, trained to the end of its schedule: (training seconds, final
value). The model is a power law with an offset,

    value(t) = E + (target - E) * (t / T) ** -a,

which meets the target at t = T. The interval of T is a profile likelihood interval: every T for which some E and a fit about as
well as the best do. Its upper end is infinite where the points do not show that the target is ever met.
"""

import math
from dataclasses import dataclass

import numpy as np

from nanochat.lab.stats import t_quantile

METHOD = "power law with offset across annealed horizons, 95% profile interval"
EXPONENTS = np.geomspace(0.02, 3.0, 50)


@dataclass(frozen=True)
class Crossing:
    """Seconds of training at which the target is met: best estimate, lower and upper confidence bound."""
    seconds: float
    low: float
    high: float


def time_to_target(points: list[tuple[float, float]], target: float, level: float = 0.95) -> Crossing | None:
    """Fit (seconds, value) of whole runs; None for fewer than four points or fewer than three horizons."""
    t, value = (np.array(side, dtype=float) for side in zip(*points, strict=True)) if points else (np.zeros(0), np.zeros(0))
    if len(points) < 4 or np.ptp(t) == 0 or len(np.unique(np.round(np.log(t), 1))) < 3:
        return None
    grid = np.geomspace(t.min() / 10, t.max() * 1000, 1500)
    error = _sum_of_squares(t, value, target, grid)
    best = int(np.argmin(error))
    df = len(points) - 3
    allowed = error[best] * (1 + t_quantile(0.5 + level / 2, df) ** 2 / df)
    inside = np.flatnonzero(error <= allowed)
    unbounded = inside[-1] == len(grid) - 1
    return Crossing(float(grid[best]), float(grid[inside[0]]), math.inf if unbounded else float(grid[inside[-1]]))


def _sum_of_squares(t: np.ndarray, value: np.ndarray, target: float, crossings: np.ndarray) -> np.ndarray:
    """The residual sum of squares for each T in `crossings` (n,), at the best E in [0, target) and the best exponent: (n,)."""
    best = np.full(len(crossings), np.inf)
    for exponent in EXPONENTS:
        w = (t / crossings[:, None]) ** -exponent                                   # (n, points)
        x = 1 - w                                                                   # the model is linear in E: E x + target w
        offset = ((value - target * w) * x).sum(1) / np.maximum((x * x).sum(1), 1e-300)
        offset = np.clip(offset, 0.0, target * (1 - 1e-6))[:, None]
        best = np.minimum(best, ((value - offset - (target - offset) * w) ** 2).sum(1))
    return best
