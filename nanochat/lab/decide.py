"""From rows to a verdict: the acceptance gates (docs/lab.md) and the net gain. Pure functions.

**Net gain.** The gates alone allow +1 % loss and +0.005 bits per byte, which a candidate could get by leaving out a tenth of the
training. So time saved is weighed against quality lost, in one unit. Baseline runs at 100, 97 and 94 % of the horizon, each
trained to the end of its schedule, tell how many bits per byte a step is worth. With d = ln(baseline's time / candidate's time),
q = the candidate's bits per byte minus the baseline's (one seed is one pair), and k = bits per byte per unit of ln(steps),

    net gain = d - q / k,

which is zero for a candidate that only trains less, and 0.05 for one that reaches the same quality 5 % sooner. k is an estimate:
the end of its 95 % interval that is worse for the candidate is used.

**Errors.** A paired t-test. To promote, the lower confidence bound of the net gain must be above zero, at a one-sided type I
error of 1 %. Seeds may be added one at a time, which makes this a sequential test: the error is divided by the number of
analyses (Bonferroni; without it repeated tests are too often significant: Armitage, McPherson and Rowe, J. R. Stat. Soc. A,
1969). Other statements (no gain, a loss) may be wrong in 5 %. The limits on loss and bits per byte are non-inferiority margins.
"""

import math
import statistics
from dataclasses import asdict, dataclass

from nanochat.lab.rows import number
from nanochat.lab.stats import Slope, common_slope, margin_of_error, pairs_needed

PROMOTE_ALPHA, OTHER_ALPHA = 0.01, 0.05  # one-sided type I errors
FALLBACK_GAIN = math.log(1.03)           # docs/lab.md, local gate 2
LOSS_MARGIN, BPB_MARGIN = 0.01, 0.005    # docs/lab.md, local gates 5 (relative) and 6 (absolute)
MATCH_TOLERANCE = 0.005                  # relative; steps are whole numbers, so tokens and FLOPs are never quite equal
DECISIONS = ("reject", "keep optional", "inconclusive", "promote")


@dataclass(frozen=True)
class Gate:
    name: str
    outcome: str  # pass | fail | unclear
    detail: str


@dataclass(frozen=True)
class Gain:
    """A mean over pairs in units of ln(time), with 95 % bounds, and the lower bound that promoting needs."""
    mean: float
    low: float
    high: float
    promotion_bound: float
    sd: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.mean:+.1%} ({self.low:+.1%} to {self.high:+.1%})"


@dataclass(frozen=True)
class Verdict:
    decision: str  # one of DECISIONS
    why: str
    gates: tuple[Gate, ...] = ()
    gain: Gain | None = None
    pairs_needed: int | None = None  # in all, where more could decide

    def __str__(self) -> str:
        return f"verdict: {self.decision} ({self.why})"

    def as_dict(self) -> dict:
        return {"decision": self.decision, "why": self.why, "gates": [asdict(g) for g in self.gates],
                "net_gain": {k: number(v) for k, v in asdict(self.gain).items()} if self.gain else None,
                "pairs_needed": self.pairs_needed}


def succeeded(row: dict) -> bool:
    return row["status"] == "ok"


def quality(row: dict) -> float | None:
    """Final validation bits per byte, or the smoothed training loss where nothing was evaluated. Lower is better."""
    bpb = number(row.get("val_bpb"))
    return number(row.get("final_train_loss")) if bpb is None else bpb


def required_quality(row: dict) -> float:
    """`quality` of a run that succeeded, which has one."""
    value = quality(row)
    assert value is not None, f"a run that succeeded has no loss: {row.get('variant')}, seed {row.get('seed')}"
    return value


def pairs_of(baseline: list[dict], candidate: list[dict]) -> list[tuple[dict, dict]]:
    """(baseline's row, candidate's row) of each seed with which both succeeded."""
    by_seed = {row["seed"]: row for row in candidate if succeeded(row)}
    return [(row, by_seed[row["seed"]]) for row in baseline if succeeded(row) and row["seed"] in by_seed]


def worth_of_a_step(calibration: list[dict]) -> Slope | None:
    """k: quality lost per unit of ln(steps), from baseline rows of several horizons. None where no loss can be seen."""
    points = [(row["seed"], -math.log(row["steps_done"]), value) for row in calibration
              if succeeded(row) and (value := quality(row))]
    slope = common_slope(points)
    return slope if slope and slope.value > 0 else None


def net_gain(pairs: list[tuple[dict, dict]], worth: Slope | None, analyses: int = 1) -> Gain | None:
    """Time saved minus quality lost, as a mean over pairs with bounds. None without pairs, or where quality differs and
    `worth` is not known."""
    saved = [math.log(b["train_time_sec"] / c["train_time_sec"]) for b, c in pairs]
    lost = [required_quality(c) - required_quality(b) for b, c in pairs]
    if not pairs or (worth is None and any(lost)):
        return None
    k = worth or Slope(1.0, 1.0, 1.0)
    each = [d - q / k.value for d, q in zip(saved, lost, strict=True)]
    d, q = statistics.fmean(saved), statistics.fmean(lost)
    worst, best = (k.low, k.high) if q > 0 else (k.high, k.low)  # for the candidate: a loss costs most where k is small
    mean_low = d - q / worst if worst > 0 else -math.inf
    mean_high = d - q / best if best > 0 else math.inf
    margin, promotion = (margin_of_error(each, alpha / analyses) for alpha in (OTHER_ALPHA, PROMOTE_ALPHA))
    return Gain(statistics.fmean(each), mean_low - margin, mean_high + margin, mean_low - promotion,
                statistics.stdev(each) if len(each) > 1 else math.inf, len(each))


# --- the gates -----------------------------------------------------------------------------------------------------


def gate_stable(baseline: list[dict], candidate: list[dict]) -> Gate:
    """Local gate 3: every candidate run succeeded, took every step, never rolled back, and did not lose what it had reached."""
    trouble = [f"seed {r['seed']}: {r['status']}" for r in candidate if not succeeded(r)]
    trouble += [f"seed {r['seed']}: {r['skipped_steps'] or 0} steps skipped, {r['rollbacks'] or 0} rollbacks"
                for r in candidate if succeeded(r) and (r.get("skipped_steps") or r.get("rollbacks"))]
    baseline_too = {r["seed"] for r in baseline if validation_rose(r)}  # the baseline overfits as well
    trouble += [f"seed {r['seed']}: validation rose from {r['min_val_bpb']:.4f} to {r['val_bpb']:.4f}"
                for r in candidate if validation_rose(r) and r["seed"] not in baseline_too]
    return Gate("no instability", "fail" if trouble else "pass", "; ".join(trouble) or f"{len(candidate)} runs succeeded")


def validation_rose(row: dict) -> bool:
    """Whether validation ended more than 1 % above its lowest value."""
    lowest, last = number(row.get("min_val_bpb")), number(row.get("val_bpb"))
    return lowest is not None and last is not None and last > (1 + LOSS_MARGIN) * lowest


def gate_matched(pairs: list[tuple[dict, dict]], match: str) -> Gate | None:
    """Steps (tokens) or FLOPs are as equal as declared. None where nothing was declared that a row can show."""
    amounts = {"steps": lambda r: r["tokens_seen"], "flops": lambda r: r["tokens_seen"] * r["flops_per_token"]}
    if match not in amounts or not pairs:
        return None
    worst = max((amounts[match](c) / amounts[match](b) for b, c in pairs), key=lambda ratio: abs(ratio - 1))
    # equal FLOPs may differ by one step, as steps are whole numbers
    one_step = max(1 / min(b["steps_done"], c["steps_done"]) for b, c in pairs) if match == "flops" else 0.0
    unit = "tokens" if match == "steps" else "FLOPs"
    outcome = "pass" if abs(worst - 1) <= max(MATCH_TOLERANCE, one_step) else "fail"
    return Gate(f"equal {match}", outcome, f"{worst:.4f} of the baseline's {unit}")


def gate_resume(resumed: bool | None, detail: str = "") -> Gate:
    """Local gate 4: a run that was killed and resumed ends where the undisturbed run ends. None: not tried."""
    outcome = {True: "pass", False: "fail", None: "unclear"}[resumed]
    return Gate("resume", outcome, detail or ("not tried: lab gate kills a run and resumes it" if resumed is None else ""))


def gate_non_inferior(pairs: list[tuple[dict, dict]], name: str, field: str, relative=0.0, absolute=0.0) -> Gate | None:
    """Local gates 5 and 6: the candidate's median is worse than the baseline's by at most the margin, which is `absolute`, or
    `relative` to the baseline's median. None where the field is not known."""
    known = [(x, y) for b, c in pairs if (x := number(b.get(field))) is not None and (y := number(c.get(field))) is not None]
    if not known:
        return None
    before, after = (statistics.median(side) for side in zip(*known, strict=True))
    differences = [c - b for b, c in known]
    margin, worse = absolute or relative * abs(before), after - before
    detail = f"{after:.5f} against {before:.5f}, {worse:+.5f}; the margin is +{margin:.5f}"
    if worse <= margin:
        return Gate(name, "pass", detail)
    certain = statistics.fmean(differences) - margin_of_error(differences, OTHER_ALPHA) > margin
    return Gate(name, "fail" if certain else "unclear", detail)


def gate_time_to_target(pairs: list[tuple[dict, dict]], extrapolated=None) -> Gate | None:
    """Local gate 1: a lower time to target over two or more seeds. None without a target, or where no run reached it.

    extrapolated: ((low, high) of the baseline, (low, high) of the candidate) in seconds, from fits across horizons.
    """
    times = [(number(b.get("time_to_target_sec_measured")), number(c.get("time_to_target_sec_measured"))) for b, c in pairs]
    if times and all(b is not None or c is not None for b, c in times):
        logs = [math.log(c / b) if b and c else (-math.inf if c is not None else math.inf) for b, c in times]
        finite = [x for x in logs if math.isfinite(x)]
        mean = f"{math.exp(statistics.fmean(finite)):.3f} of the baseline's" if finite else "one of the two never reached it"
        detail = f"{mean}; lower with {sum(x < 0 for x in logs)} of {len(logs)} seeds"
        if len(logs) < 2:
            return Gate("time to target", "unclear", f"{detail}; two seeds are needed")
        upper = statistics.fmean(logs) + margin_of_error(logs, OTHER_ALPHA) if len(finite) == len(logs) > 2 else math.inf
        outcome = "pass" if all(x < 0 for x in logs) or upper < 0 else "fail" if all(x > 0 for x in logs) else "unclear"
        return Gate("time to target", outcome, detail)
    if extrapolated:
        (b_low, b_high), (c_low, c_high) = extrapolated
        detail = f"extrapolated: {c_low:.4g} to {c_high:.4g} s against {b_low:.4g} to {b_high:.4g} s"
        outcome = "pass" if c_high < b_low else "fail" if c_low > b_high else "unclear"
        return Gate("time to target (extrapolated)", outcome, detail)
    return None


def gate_fallback(pairs: list[tuple[dict, dict]], gain: Gain | None, worth: Slope | None) -> Gate:
    """Local gate 2, where no run reached the target: 3 % less time at matched quality, which is the net gain."""
    uncorrected = net_gain(pairs, worth)  # for repeated analyses; in simulation a true gain of 1.5 % passes in 5 % or less
    if gain is None or uncorrected is None:
        return Gate("3 % at matched quality", "unclear", "the net gain is not known")
    outcome = "pass" if uncorrected.low >= FALLBACK_GAIN else "fail" if gain.high < FALLBACK_GAIN else "unclear"
    return Gate("3 % at matched quality", outcome, f"net gain {gain}")


def gate_net_gain(gain: Gain | None) -> Gate:
    if gain is None:
        return Gate("net gain", "unclear", "the worth of a step is not known: give calibration runs, or more seeds of them")
    outcome = "pass" if gain.promotion_bound > 0 else "fail" if gain.high < 0 else "unclear"
    return Gate("net gain", outcome, f"time saved minus quality lost: {gain}, {gain.pairs} pairs")


# --- the verdict ---------------------------------------------------------------------------------------------------


def judge(baseline: list[dict], candidate: list[dict], calibration: list[dict], *, match: str = "steps", analyses: int = 1,
          resumed: bool | None = None, resume_detail: str = "", extrapolated=None) -> Verdict:
    """The verdict on a candidate.

    baseline, candidate: rows of the same seeds. calibration: baseline rows of several horizons, the full one included.
    match: what was declared equal. analyses: how often the same question may be asked with more seeds. resumed: whether a
    killed run ended as the undisturbed one; None where that was not tried, which leaves the gate open.
    """
    pairs, worth = pairs_of(baseline, candidate), worth_of_a_step(calibration)
    stable = gate_stable(baseline, candidate)
    if stable.outcome == "fail":
        return Verdict("reject", f"{stable.name}: {stable.detail}", (stable,))
    if not pairs:
        return Verdict("inconclusive", "there is no seed with which both succeeded", (stable,))
    gain = net_gain(pairs, worth, analyses)
    reached = gate_time_to_target(pairs, extrapolated)
    provisional = reached is not None and "extrapolated" in reached.name
    gates = tuple(gate for gate in (
        reached or gate_fallback(pairs, gain, worth), stable, gate_matched(pairs, match), gate_resume(resumed, resume_detail),
        gate_non_inferior(pairs, "loss within +1 %", "final_train_loss", relative=LOSS_MARGIN),
        gate_non_inferior(pairs, "validation within +0.005", "val_bpb", absolute=BPB_MARGIN), gate_net_gain(gain)) if gate)
    failed = [g for g in gates[1:] if g.outcome == "fail"]
    unclear = [g for g in gates if g.outcome != "pass" and g.name != "resume"]
    needed = pairs_needed(gain.sd, gain.mean, PROMOTE_ALPHA / analyses) if gain and gain.pairs > 1 and gain.mean else None

    def verdict(decision, why, more=None):
        return Verdict(decision, why, gates, gain, more)
    if failed:
        return verdict("reject", f"{failed[0].name}: {failed[0].detail}")
    if gain and gain.high < FALLBACK_GAIN and not (gain.promotion_bound > 0 and gates[0].outcome == "pass"):
        harmful = gain.mean < -FALLBACK_GAIN and gain.high < 0
        return verdict("reject" if harmful else "keep optional", f"no gain of 3 %: net gain {gain}")
    if unclear:  # gates[0] too: while a net gain of 3 % is possible, being slower with every seed so far may be chance
        few = f"; {len(pairs)} seeds screen" + (f", about {needed} would decide" if needed and len(pairs) < needed < 99 else "")
        return verdict("inconclusive", f"{unclear[0].name}: {unclear[0].detail}{few}", needed)
    if provisional:
        return verdict("keep optional", f"provisional, as the time to target is extrapolated: net gain {gain}")
    if resumed is None:
        return verdict("inconclusive", f"all that was measured passes, net gain {gain}; resume not tried")
    return verdict("promote", f"net gain {gain}, every gate passed")


def judge_series(by_depth: dict[int, Verdict]) -> Verdict:
    """The verdict over depths (phase 5): promote only if the gain holds, and quality does not regress, at each depth."""
    rejected = [d for d, v in by_depth.items() if v.decision == "reject"]
    known = {d: v.gain for d, v in by_depth.items() if v.gain}
    listed = ", ".join(f"d{d} {gain.mean:+.1%}" for d, gain in known.items())
    if rejected:
        return Verdict("reject", f"rejected at depth {', '.join(map(str, rejected))}; net gains {listed or 'unknown'}")
    if len(by_depth) < 2 or len(known) < len(by_depth):
        return Verdict("inconclusive", f"two depths with a known gain are needed; known: {listed or 'none'}")
    gains = [gain.mean for gain in known.values()]
    if min(gains) > 0 and statistics.fmean(gains) - margin_of_error(gains, OTHER_ALPHA) > 0 and any(
            v.decision == "promote" for v in by_depth.values()):
        return Verdict("promote", f"the gain holds across depths: {listed}")
    if max(gain.high for gain in known.values()) < FALLBACK_GAIN or min(gains) <= 0:
        return Verdict("keep optional", f"no gain that holds across depths: {listed}")
    return Verdict("inconclusive", f"more seeds or depths are needed: {listed}")
