"""The verdict, from the gates (gates.py) and the net gain (gain.py). Pure functions; docs/lab.md explains them to users.

**Errors.** To promote, the lower confidence bound of the net gain must be above zero. Seeds may be added while the verdict is
open, up to `most`, and all these tests together err in 1 % or less (`stats.levels`). The statement that a gain of 3 % is ruled
out errs in 5 % over all tests, each statement that a margin is exceeded in 1.25 %. The limits on loss and bits per byte are
non-inferiority margins.
"""

import math
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from nanochat.lab import gates as g
from nanochat.lab.gain import (
    MOST_PAIRS,
    PROMOTE_ALPHA,
    SHOWN_ALPHA,
    Gain,
    measure_of,
    net_gain,
    pairs_of,
    quality_lost,
    same_bits,
    time_saved,
    worth_of_a_step,
)
from nanochat.lab.gates import BPB_MARGIN, FALLBACK_GAIN, LOSS_MARGIN, Gate
from nanochat.lab.rows import number
from nanochat.lab.stats import Estimate, Slope, levels, pairs_needed, partially_pooled, sd_range, t_quantile

if TYPE_CHECKING:
    from nanochat.lab.clock import Clock

MANY = 99  # pairs; more are not counted
CAUSES = ("same conditions", "evaluated by the lab", "time")  # gates that, when unclear, make others unclear
DECISIONS = ("reject", "keep optional", "no change", "inconclusive", "promote")


@dataclass(frozen=True)
class Verdict:
    decision: str  # one of DECISIONS
    why: str
    gates: tuple[Gate, ...] = ()
    gain: Gain | None = None
    time: Estimate | None = None      # ln(baseline's time / candidate's)
    quality: Estimate | None = None   # bits per byte lost, or nats where no run was evaluated
    next: str = ""                    # what would change it

    def __str__(self) -> str:
        return f"verdict: {self.decision} ({self.why})"

    def as_dict(self) -> dict:
        return {"decision": self.decision, "why": self.why, "gates": [asdict(gate) for gate in self.gates],
                "net_gain": {k: number(v) for k, v in asdict(self.gain).items()} if self.gain else None,
                "time": shown(self.time), "quality": shown(self.quality), "next": self.next}


def shown(value: Estimate | None) -> dict | None:
    """An estimate as a mean with a 95 % interval, whose ends are None where they are not known."""
    if value is None:
        return None
    margin = value.margin(SHOWN_ALPHA)
    return {"mean": number(value.mean), "low": number(value.mean - margin), "high": number(value.mean + margin)}


def judge(baseline: list[dict], candidate: list[dict], calibration: list[dict], *, clock: "Clock | None" = None,
          match: str = "steps", most: int = MOST_PAIRS, resumed: bool | None = None, resume_detail: str = "",
          extrapolated: Estimate | None = None, judge_time: bool = True) -> Verdict:
    """The verdict on a candidate.

    baseline, candidate: rows of the same seeds. calibration: baseline rows of several horizons, the full one included.
    clock: the time of a step, measured in turn. match: what was declared equal. most: the number of seeds up to which the same
    question may be asked. resumed: whether a killed run ended as the undisturbed one; None where that was not tried, which leaves
    the gate open. judge_time: also judge the time of a candidate that ends with the same bits.
    """
    pairs, measure = pairs_of(baseline, candidate), measure_of(baseline, candidate)
    seeds = max(len({row["seed"] for row in candidate}), 2)
    worth, alike = worth_of_a_step(calibration, measure), g.gate_alike(baseline, candidate)
    stable = g.gate_stable([*baseline, *(row for row in calibration if row not in baseline)], candidate)
    if stable.outcome == "fail":
        return Verdict("reject", f"{stable.name}: {stable.detail}", (stable,))
    if not pairs:
        why = "there is no seed with which both succeeded" if alike.outcome == "pass" else f"{alike.name}: {alike.detail}"
        return Verdict("inconclusive", why, (stable, alike))
    unchanged = same_bits(pairs)
    if unchanged and not judge_time:
        numbers = ", ".join(str(b["seed"]) for b, _ in pairs)
        return Verdict("no change", f"the same weights, bit for bit, with seed {numbers}", (stable, alike),
                       quality=Estimate(0.0, 0.0, math.inf), next="--judge-time measures whether its steps are faster")
    gain = net_gain(pairs, worth, measure, clock, seeds=seeds, most=most)
    reached = None if unchanged else g.gate_time_to_target(pairs, clock, extrapolated)  # with the same bits, a step's time is all
    first = reached or g.gate_fallback(gain)
    found = tuple(gate for gate in (
        first, stable, alike, g.gate_matched(pairs, match, clock), g.gate_audit(candidate), g.gate_evaluated(pairs, measure),
        g.gate_clock(pairs, clock), g.gate_resume(resumed, resume_detail),
        g.gate_non_inferior(pairs, "loss within +1 %", "final_train_loss", relative=LOSS_MARGIN, seeds=seeds, most=most),
        g.gate_non_inferior(pairs, "validation within +0.005", "val_bpb" if measure == "final_train_loss" else measure,
                          absolute=BPB_MARGIN, seeds=seeds, most=most), g.gate_net_gain(gain)) if gate)
    failed = [gate for gate in found[1:] if gate.outcome == "fail" and gate.name != "net gain"]
    unclear = [gate for gate in found if gate.outcome != "pass" and gate.name != "resume"]
    unclear.sort(key=lambda gate: gate.name not in CAUSES)
    saved, lost = time_saved(pairs, clock), quality_lost(pairs, measure)
    bits = ", the same bits" if unchanged else ""

    def verdict(decision, why, more=""):
        return Verdict(decision, why, found, gain, saved, lost, more)
    if failed:
        return verdict("reject", f"{failed[0].name}: {failed[0].detail}")
    if gain and gain.highest < FALLBACK_GAIN and gain.mean < -FALLBACK_GAIN and gain.high < 0:
        return verdict("reject", f"a net loss: net gain {gain}{bits}")
    if gain and gain.highest < FALLBACK_GAIN and not (gain.promotion_bound > 0 and found[0].outcome == "pass"):
        return verdict("keep optional", f"no gain of 3 %: net gain {gain}{bits}", "nothing here: a gain of 3 % is ruled out")
    if unclear:  # the first too: while a net gain of 3 % is possible, being slower with every seed so far may be chance
        more = "" if math.isinf(saved.se) or unchanged else seeds_wanted(pairs, worth, measure, gain, most)
        return verdict("inconclusive", f"{unclear[0].name}: {unclear[0].detail}{more and '; ' + more}", more)
    if resumed is None:
        return verdict("inconclusive", f"all that was measured passes, net gain {gain}{bits}; resume not tried")
    return verdict("promote", f"net gain {gain}{bits}, every gate passed", "the miniseries over depths, before a default changes")


def seeds_wanted(pairs: list[tuple[dict, dict]], worth: Slope | None, measure: str, gain: Gain | None, most: int) -> str:
    """How many seeds would find the gain as it looks now with a power of 80 %, as a range: the spread of few pairs is not well
    known. "" where nothing can be said."""
    if gain is None or worth is None or len(pairs) < 2 or gain.mean <= 0:
        return ""
    each = [(c[measure] - b[measure]) / worth.value for b, c in pairs]
    last = levels(most, PROMOTE_ALPHA)[most]
    low, high = (pairs_needed(sd, gain.mean, last, most=MANY) for sd in sd_range(statistics.stdev(each), len(each) - 1))
    if high <= len(pairs):
        return ""
    wanted = "far more" if low >= MANY else f"{low} to {'many' if high >= MANY else high}"
    return f"{len(pairs)} seeds so far, {wanted} would decide with a power of 80 %"


def judge_series(by_depth: dict[int, Verdict]) -> Verdict:
    """The verdict over depths (phase 5), with the least gain of any depth.

    Promote only if the gain is positive at each depth and its 95 % bound is above zero there, and one depth promotes by itself.
    The bounds are those of a mixed model, in which depths that agree support each other; depths may differ: that is no noise.
    """
    rejected = [d for d, v in by_depth.items() if v.decision == "reject"]
    known = {d: v.gain for d, v in by_depth.items() if v.gain and math.isfinite(v.gain.low)}
    listed = ", ".join(f"d{d} {gain.mean:+.1%}" for d, gain in known.items())
    if rejected:
        return Verdict("reject", f"rejected at depth {', '.join(map(str, rejected))}; net gains {listed or 'unknown'}")
    if len(by_depth) < 2 or len(known) < len(by_depth):
        return Verdict("inconclusive", f"two depths with a known gain are needed; known: {listed or 'none'}")
    least = min(known.values(), key=lambda gain: gain.mean)  # what holds at every depth
    pooled = partially_pooled([Estimate(gain.mean, (gain.mean - gain.low) / t_quantile(1 - SHOWN_ALPHA, math.inf), math.inf)
                               for gain in known.values()])
    low, high = ([e.mean + sign * e.margin(0.05) for e in pooled] for sign in (-1, 1))
    if min(low) > 0 and least.mean > 0 and any(v.decision == "promote" for v in by_depth.values()):
        return Verdict("promote", f"the gain holds at every depth: {listed}", gain=least)
    none_here = any(below <= 0 and above < FALLBACK_GAIN for below, above in zip(low, high, strict=True))  # at one depth
    if none_here or max(high) < FALLBACK_GAIN:
        return Verdict("keep optional", f"no gain that holds at every depth: {listed}", gain=least)
    return Verdict("inconclusive", f"more seeds or depths are needed: {listed}", gain=least)
