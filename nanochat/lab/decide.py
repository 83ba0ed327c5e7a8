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
ALIKE = {"host": "host", "device": "device", "torch_version": "torch", "git_commit": "commit", "git_dirty": "uncommitted changes",
         "text_fingerprint": "text"}     # field of a row -> what it is; rows that differ in one are no pair
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


def measure_of(*groups: list[dict]) -> str:
    """The field by which all of these runs are compared: final validation bits per byte, or the smoothed training loss where one
    of those that succeeded has none. Lower is better. Bits per byte never stand against a loss in nats."""
    known = all(number(row.get("val_bpb")) is not None for group in groups for row in group if succeeded(row))
    return "val_bpb" if known else "final_train_loss"


def quality(row: dict, measure: str) -> float:
    """The value by which a run that succeeded is compared."""
    value = number(row.get(measure))
    assert value is not None, f"a run that succeeded has no {measure}: {row.get('variant')}, seed {row.get('seed')}"
    return value


def unlike(baseline: dict, candidate: dict) -> list[str]:
    """What two runs that are to be a pair do not have in common, with both values."""
    return [f"{what} {baseline.get(field)} against {candidate.get(field)}" for field, what in ALIKE.items()
            if baseline.get(field) != candidate.get(field)]


def seeds_in_common(baseline: list[dict], candidate: list[dict]) -> list[tuple[dict, dict]]:
    """(baseline's row, candidate's row) of each seed with which both succeeded."""
    by_seed = {row["seed"]: row for row in candidate if succeeded(row)}
    return [(row, by_seed[row["seed"]]) for row in baseline if succeeded(row) and row["seed"] in by_seed]


def pairs_of(baseline: list[dict], candidate: list[dict]) -> list[tuple[dict, dict]]:
    """(baseline's row, candidate's row) of each seed with which both succeeded under the same conditions."""
    return [pair for pair in seeds_in_common(baseline, candidate) if not unlike(*pair)]


def worth_of_a_step(calibration: list[dict], measure: str) -> Slope | None:
    """k: quality lost per unit of ln(steps), from baseline rows of several horizons. None where no loss can be seen."""
    points = [(row["seed"], -math.log(row["steps_done"]), quality(row, measure)) for row in calibration if succeeded(row)]
    slope = common_slope(points)
    return slope if slope and slope.value > 0 else None


def net_gain(pairs: list[tuple[dict, dict]], worth: Slope | None, measure: str, analyses: int = 1) -> Gain | None:
    """Time saved minus quality lost, as a mean over pairs with bounds. None without pairs, or where quality differs and
    `worth` is not known."""
    saved = [math.log(b["train_time_sec"] / c["train_time_sec"]) for b, c in pairs]
    lost = [quality(c, measure) - quality(b, measure) for b, c in pairs]
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


def gate_alike(baseline: list[dict], candidate: list[dict]) -> Gate:
    """Both runs of every seed had the same conditions. Others are no pairs, and leave the verdict open: which seeds are left out
    must not decide."""
    found = [(b["seed"], differences) for b, c in seeds_in_common(baseline, candidate) if (differences := unlike(b, c))]
    detail = "; ".join(f"seed {seed}: {', '.join(differences)}" for seed, differences in found)
    return Gate("same conditions", "unclear" if found else "pass", detail and f"{detail}. Run them again (another --out)"
                or "both runs of every seed")


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
        logs = [log_ratio(b, c) for b, c in times]
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


def log_ratio(baseline: float | None, candidate: float | None) -> float:
    """ln(candidate's time / baseline's), where None is never, and 0 a target that was met before the first step."""
    if baseline == candidate:
        return 0.0
    if candidate is None or baseline == 0:
        return math.inf
    if baseline is None or candidate == 0:
        return -math.inf
    return math.log(candidate / baseline)


def gate_fallback(pairs: list[tuple[dict, dict]], gain: Gain | None, worth: Slope | None, measure: str) -> Gate:
    """Local gate 2, where no run reached the target: 3 % less time at matched quality, which is the net gain."""
    # not corrected for repeated analyses; in simulation a true gain of 1.5 % passes in 5 % or less
    uncorrected = net_gain(pairs, worth, measure)
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
    pairs, measure = pairs_of(baseline, candidate), measure_of(baseline, candidate, calibration)
    worth, stable = worth_of_a_step(calibration, measure), gate_stable(baseline, candidate)
    alike = gate_alike(baseline, candidate)
    if stable.outcome == "fail":
        return Verdict("reject", f"{stable.name}: {stable.detail}", (stable,))
    if not pairs:
        why = "there is no seed with which both succeeded" if alike.outcome == "pass" else f"{alike.name}: {alike.detail}"
        return Verdict("inconclusive", why, (stable, alike))
    gain = net_gain(pairs, worth, measure, analyses)
    reached = gate_time_to_target(pairs, extrapolated)
    provisional = reached is not None and "extrapolated" in reached.name
    gates = tuple(gate for gate in (
        reached or gate_fallback(pairs, gain, worth, measure), stable, alike, gate_matched(pairs, match),
        gate_resume(resumed, resume_detail),
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
    """The verdict over depths (phase 5), with the least gain of any depth: promote only if the 95 % bounds of the gain are above
    zero at each depth, and one depth promotes by itself. Depths may differ in their gain; that is no noise."""
    rejected = [d for d, v in by_depth.items() if v.decision == "reject"]
    known = {d: v.gain for d, v in by_depth.items() if v.gain}
    listed = ", ".join(f"d{d} {gain.mean:+.1%}" for d, gain in known.items())
    if rejected:
        return Verdict("reject", f"rejected at depth {', '.join(map(str, rejected))}; net gains {listed or 'unknown'}")
    if len(by_depth) < 2 or len(known) < len(by_depth):
        return Verdict("inconclusive", f"two depths with a known gain are needed; known: {listed or 'none'}")
    least = min(known.values(), key=lambda gain: gain.mean)  # what holds at every depth
    if min(gain.low for gain in known.values()) > 0 and any(v.decision == "promote" for v in by_depth.values()):
        return Verdict("promote", f"the gain holds at every depth: {listed}", gain=least)
    none_here = any(gain.low <= 0 and gain.high < FALLBACK_GAIN for gain in known.values())  # 3 % are ruled out at a depth
    if none_here or max(gain.high for gain in known.values()) < FALLBACK_GAIN:
        return Verdict("keep optional", f"no gain that holds at every depth: {listed}", gain=least)
    return Verdict("inconclusive", f"more seeds or depths are needed: {listed}", gain=least)
