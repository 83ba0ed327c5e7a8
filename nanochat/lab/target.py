"""Time to target where no run reached it: extrapolated across horizons, never along a run.

The tail of a warm-down falls faster than the loss falls from one horizon to a longer one, so extending a run's own curve
promises too much. Here each point is a whole run, annealed to its end: (training seconds, final value). Through them goes

    value(t) = E + (target - E) * (t / T) ** -a,

which meets the target at t = T. The interval of T is the profile interval: all T for which some E and a fit about as well
as the best do. Where the points do not bound T from above, it is infinite: then nobody knows whether the target is ever met.
"""

import math
from dataclasses import dataclass

import numpy as np

from nanochat.lab.stats import t_quantile

METHOD = "power law with offset across annealed horizons, 95% profile interval"
EXPONENTS = np.geomspace(0.02, 3.0, 50)


@dataclass(frozen=True)
class Crossing:
    """Seconds of training at which the target is met: the best estimate and the interval."""
    seconds: float
    low: float
    high: float


def time_to_target(points: list[tuple[float, float]], target: float, level: float = 0.95) -> Crossing | None:
    """Where (seconds, value) of whole runs meet `target`. None for fewer than four points or fewer than three horizons."""
    t, value = (np.array(side, dtype=float) for side in zip(*points, strict=True)) if points else (np.zeros(0), np.zeros(0))
    if len(points) < 4 or np.ptp(t) == 0 or len(np.unique(np.round(np.log(t), 1))) < 3:
        return None
    grid = np.geomspace(t.min() / 10, t.max() * 1000, 1500)
    error = _misfit(t, value, target, grid)
    best = int(np.argmin(error))
    freedom = len(points) - 3
    allowed = error[best] * (1 + t_quantile(0.5 + level / 2, freedom) ** 2 / freedom)
    inside = np.flatnonzero(error <= allowed)
    unbounded = inside[-1] == len(grid) - 1
    return Crossing(float(grid[best]), float(grid[inside[0]]), math.inf if unbounded else float(grid[inside[-1]]))


def _misfit(t: np.ndarray, value: np.ndarray, target: float, crossings: np.ndarray) -> np.ndarray:
    """The least sum of squares over E in [0, target) and the exponent, for each T in `crossings`."""
    best = np.full(len(crossings), np.inf)
    for exponent in EXPONENTS:
        w = (t / crossings[:, None]) ** -exponent                                   # (T, points)
        lever = 1 - w
        offset = ((value - target * w) * lever).sum(1) / np.maximum((lever * lever).sum(1), 1e-300)
        offset = np.clip(offset, 0.0, target * (1 - 1e-6))[:, None]
        best = np.minimum(best, ((value - offset - (target - offset) * w) ** 2).sum(1))
    return best
