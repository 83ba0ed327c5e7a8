"""From rows to the net gain: pairs of runs, time saved, quality lost, and what they are worth together. Pure functions.

**Net gain.** The gates alone allow +1 % loss and +0.005 bits per byte, which a candidate could get by leaving out a tenth of the
training. So time saved is weighed against quality lost, in one unit. The baseline is also run shorter (`CALIBRATION_SHARES`),
each time to the end of its schedule, which tells how many bits per byte a step is worth. With d = ln(baseline's time /
candidate's time), q = the candidate's bits per byte minus the baseline's, and k = bits per byte per unit of ln(steps),

    net gain = d - q / k,

which is zero for a candidate that only trains less, and 0.05 for one that reaches the same quality 5 % sooner. k is an estimate:
the end of its 95 % interval that is worse for the candidate is used.

**Two measurements.** q is a mean over pairs of runs, each with one seed, by a paired t-test; no quiet machine is needed. d is a
`Clock`: the seconds of a step on both sides, whose runs take turns (nanochat/lab/timing.py); no other seeds are needed. Where
there is no clock, both come from the whole runs, pair by pair. The margin of the net gain is sqrt(margin of d ^ 2 + (margin of
q / k) ^ 2): an interval by Welch and Satterthwaite would be too narrow where one of the two looks small by chance.
"""

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanochat.lab.rows import number
from nanochat.lab.stats import Estimate, Slope, common_slope, estimate, levels

if TYPE_CHECKING:
    from nanochat.lab.clock import Clock

PROMOTE_ALPHA = 0.008                    # over all looks, of the levels: in simulation t-tests with few pairs then err in 1 %
RULED_OUT_ALPHA = 0.05                   # over all looks, that a gain of 3 % is ruled out though there is one
SHOWN_ALPHA = 0.025                      # of the 95 % intervals that are shown
MOST_PAIRS = 8                           # the looks that are planned; --max-seeds may ask for more
ALIKE = {"host": "host", "device": "device", "torch_version": "torch", "source_fingerprint": "source", "dtype": "precision",
         "text_fingerprint": "text", "validation_fingerprint": "validation text"}  # field of a row -> what it is; see `unlike`
MEASURES = ("lab_val_bpb", "val_bpb", "final_train_loss")  # of quality, the best first; lower is better


@dataclass(frozen=True)
class Gain:
    """Time saved minus quality lost in units of ln(time), with 95 % bounds, and the bounds that decide, corrected for all
    looks: the lower one of promoting, and the upper one above which a gain is ruled out."""
    mean: float
    low: float
    high: float
    promotion_bound: float
    highest: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.mean:+.1%} ({self.low:+.1%} to {self.high:+.1%})"


def succeeded(row: dict) -> bool:
    return row["status"] == "ok"


def measure_of(*groups: list[dict]) -> str:
    """The field by which all of these runs are compared: bits per byte of all validation tokens, evaluated by the lab; else,
    where no run was evaluated so, the run's own bits per byte; else the smoothed training loss. Bits per byte never stand
    against a loss in nats, nor the lab's evaluation against a run's own: where the lab evaluated some of the runs, the others
    have no quality."""
    rows = [row for group in groups for row in group if succeeded(row)]
    lab, own, loss = MEASURES
    if any(number(row.get(lab)) is not None for row in rows):
        return lab
    return own if all(number(row.get(own)) is not None for row in rows) else loss


def quality(row: dict, measure: str) -> float | None:
    """The value by which a run that succeeded is compared; None where it has none."""
    return number(row.get(measure))


def seconds_of(row: dict) -> float:
    """A run's training time: the wall time of its loop less what is named (evaluating, saving, compiling)."""
    return row["train_time_sec"] + (number(row.get("unnamed_time_sec")) or 0.0)


def unlike(baseline: dict, candidate: dict) -> list[str]:
    """What two runs that are to be a pair do not have in common, with both values. The candidate may train in another precision
    if its flags say so: then the flag is the change."""
    return [f"{what} {baseline.get(field)} against {candidate.get(field)}" for field, what in ALIKE.items()
            if baseline.get(field) != candidate.get(field) and not (field == "dtype" and other_precision(baseline, candidate))]


def other_precision(baseline: dict, candidate: dict) -> bool:
    """Whether the flags of the two runs ask for different precisions."""
    asked = [[word for word in row.get("flags") or () if word.startswith("--dtype")][-1:] for row in (baseline, candidate)]
    return asked[0] != asked[1]


def seeds_in_common(baseline: list[dict], candidate: list[dict]) -> list[tuple[dict, dict]]:
    """(baseline's row, candidate's row) of each seed with which both succeeded."""
    by_seed = {row["seed"]: row for row in candidate if succeeded(row)}
    return [(row, by_seed[row["seed"]]) for row in baseline if succeeded(row) and row["seed"] in by_seed]


def pairs_of(baseline: list[dict], candidate: list[dict]) -> list[tuple[dict, dict]]:
    """(baseline's row, candidate's row) of each seed with which both succeeded under the same conditions."""
    return [pair for pair in seeds_in_common(baseline, candidate) if not unlike(*pair)]


def same_bits(pairs: list[tuple[dict, dict]]) -> bool:
    """Whether both runs of every pair ended with the same weights, bit for bit."""
    return bool(pairs) and all(b.get("weights_sha256") and b["weights_sha256"] == c.get("weights_sha256") for b, c in pairs)


def worth_of_a_step(calibration: list[dict], measure: str) -> Slope | None:
    """k: quality lost per unit of ln(steps), from baseline rows of several horizons. None where no loss can be seen."""
    points = [(row["seed"], -math.log(row["steps_done"]), value) for row in calibration
              if succeeded(row) and (value := quality(row, measure)) is not None]
    slope = common_slope(points)
    return slope if slope and slope.value > 0 else None


def time_saved(pairs: list[tuple[dict, dict]], clock: "Clock | None") -> Estimate:
    """ln(baseline's training time / candidate's), over one pair or more: by the clock, else by the whole runs."""
    if clock is None:
        return estimate([math.log(seconds_of(b) / seconds_of(c)) for b, c in pairs])
    steps = statistics.fmean(math.log(b["steps_done"] / c["steps_done"]) for b, c in pairs)
    return Estimate(clock.log_ratio + steps, clock.se, clock.df)


def quality_lost(pairs: list[tuple[dict, dict]], measure: str) -> Estimate | None:
    """The candidate's value minus the baseline's, over pairs; None where one of them is not known. Without an error where the
    bits are the same."""
    lost = [after - before for b, c in pairs
            if (before := quality(b, measure)) is not None and (after := quality(c, measure)) is not None]
    if not pairs or len(lost) < len(pairs):
        return None
    return Estimate(0.0, 0.0, math.inf) if same_bits(pairs) else estimate(lost)


def net_gain(pairs: list[tuple[dict, dict]], worth: Slope | None, measure: str, clock: "Clock | None" = None, *,
             seeds: int | None = None, most: int = MOST_PAIRS) -> Gain | None:
    """Time saved minus quality lost. None without pairs, where time or quality is unknown, or where quality differs while `worth`
    is not known.

    seeds: how many have been run, which is the look; by default those of the pairs. most: of all looks.
    """
    lost = quality_lost(pairs, measure)
    if lost is None or (worth is None and (lost.mean or lost.se)) or (clock is not None and math.isinf(clock.se)):
        return None
    saved, k = time_saved(pairs, clock), worth or Slope(1.0, 1.0, 1.0)
    if clock is None:
        both = estimate([math.log(seconds_of(b) / seconds_of(c)) - (c[measure] - b[measure]) / k.value for b, c in pairs])
        margin = both.margin
    else:
        def margin(alpha: float) -> float:
            return math.hypot(saved.margin(alpha), lost.margin(alpha) / k.value)
    worst, best = (k.low, k.high) if lost.mean > 0 else (k.high, k.low)  # for the candidate: a loss costs most where k is small

    def mean_at(k: float, unknown: float) -> float:
        return saved.mean if not lost.mean else saved.mean - lost.mean / k if k > 0 else unknown
    mean_low, mean_high = mean_at(worst, -math.inf), mean_at(best, math.inf)
    look = seeds or len(pairs)

    def at(total: float) -> float:  # no looks are planned where the bits are the same: more seeds would tell nothing
        return margin(total if lost.se == 0 else levels(max(most, look), total).get(look, 0.0))
    return Gain(saved.mean - lost.mean / k.value, mean_low - margin(SHOWN_ALPHA), mean_high + margin(SHOWN_ALPHA),
                mean_low - at(PROMOTE_ALPHA), mean_high + at(RULED_OUT_ALPHA), len(pairs))
