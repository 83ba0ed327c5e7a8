"""Student's t as in the tables, slopes by hand, and intervals that cover the truth at their rate."""

import math
import random

import numpy as np
import pytest

from nanochat.lab.stats import common_slope, margin_of_error, pairs_needed, t_quantile
from nanochat.lab.target import time_to_target


@pytest.mark.parametrize("p, df, t", [(0.95, 1, 6.313752), (0.975, 1, 12.706205), (0.95, 2, 2.919986), (0.99, 5, 3.364930),
                                      (0.975, 10, 2.228139), (0.005, 30, -2.749996)])
def test_quantiles_of_the_tables(p, df, t):
    assert t_quantile(p, df) == pytest.approx(t, rel=1e-6)


def test_margin_of_error():
    assert margin_of_error([1.0, 2.0, 3.0], 0.025) == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert margin_of_error([1.0], 0.05) == math.inf


def test_the_bounds_of_a_mean_hold_at_their_rate():
    rng = random.Random(0)
    for n in (2, 3, 6):
        missed = 0
        for _ in range(4000):
            values = [rng.gauss(0, 1) for _ in range(n)]
            missed += sum(values) / n - margin_of_error(values, 0.05) > 0
        assert 0.04 < missed / 4000 < 0.06


def test_more_noise_and_smaller_effects_need_more_pairs():
    assert pairs_needed(0.01, 0.05, 0.01) < pairs_needed(0.01, 0.02, 0.01) < pairs_needed(0.02, 0.02, 0.01)


def test_a_common_slope_ignores_levels():
    points = [(g, x, 3.0 * x + level) for g, level in (("a", 0.0), ("b", 50.0)) for x in (0.0, 1.0, 2.0)]
    slope = common_slope(points)
    assert (slope.value, slope.low, slope.high) == pytest.approx((3.0, 3.0, 3.0))
    assert common_slope([("a", 0.0, 1.0), ("b", 1.0, 2.0)]) is None  # levels alone explain it


def test_the_slope_bound_holds_at_its_rate():
    rng = random.Random(0)
    below = 0
    for _ in range(2000):
        slope = common_slope([(g, x, 2.0 * x + g + rng.gauss(0, 0.3)) for g in (0, 1) for x in (0.0, 0.5, 1.0)])
        below += slope.low > 2.0
    assert 0.035 < below / 2000 < 0.065


# --- time to target across horizons --------------------------------------------------------------------------------


def curve(t, floor, exponent, scale=1.0):
    return floor + scale * np.asarray(t, dtype=float) ** -exponent


@pytest.mark.slow
@pytest.mark.parametrize("floor, exponent", [(0.0, 0.1), (0.8, 0.4), (1.0, 0.25)])
def test_the_interval_covers_the_truth_at_its_rate(floor, exponent):
    """Power laws with an offset that the fit has to find too, three seeds at five horizons, target half an octave beyond."""
    rng = np.random.default_rng(1)
    horizons = np.repeat([25.0, 35.0, 50.0, 71.0, 100.0], 3)
    target = float(curve(150, floor, exponent))
    covered, n = 0, 120
    for _ in range(n):
        noisy = curve(horizons, floor, exponent) + rng.normal(0, 0.002, len(horizons))
        found = time_to_target(list(zip(horizons, noisy, strict=True)), target)
        covered += found.low <= 150 <= found.high
    assert covered / n >= 0.95 - 1.645 * math.sqrt(0.05 * 0.95 / n)


def test_without_noise_the_crossing_is_found():
    t = [20.0, 30.0, 45.0, 70.0, 100.0]
    found = time_to_target(list(zip(t, curve(t, 0.9, 0.5), strict=True)), float(curve(140, 0.9, 0.5)))
    assert found.seconds == pytest.approx(140, rel=0.02) and found.low < 140 < found.high


def test_a_target_below_the_curves_limit_has_no_upper_bound():
    t = np.repeat([25.0, 50.0, 100.0], 3)
    noisy = curve(t, 1.0, 0.5) + np.random.default_rng(0).normal(0, 0.003, len(t))
    assert time_to_target(list(zip(t, noisy, strict=True)), 0.95).high == math.inf


def test_one_horizon_or_few_points_are_not_enough():
    assert time_to_target([(99.0, 1.2), (99.5, 1.19), (100.0, 1.18), (100.2, 1.17)], 1.0) is None  # one horizon
    assert time_to_target([(50.0, 1.2), (100.0, 1.1)], 1.0) is None
    assert time_to_target([], 1.0) is None
