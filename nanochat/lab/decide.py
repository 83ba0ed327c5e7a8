"""From rows to a verdict: the gates of the execution plan (section 7.1), and the net gain. Pure functions.

**Why a net gain.** The plan's bands allow +1 % loss and +0.005 bits per byte, which is what leaving out a tenth of the
training costs. So time saved is compared with quality lost, in one unit: baseline runs at 100, 97 and 94 % of the horizon,
each annealed to its end, tell how many bits per byte a step is worth. With d = ln(baseline's time / candidate's time), q = the
candidate's bits per byte less the baseline's (pairs of one seed), and k = bits per byte per unit of ln(steps),

    net gain = d - q / k,

zero for a candidate that just trains less, and 0.05 for one that gets to the same quality 5 % sooner. k is not known exactly;
its 95 % bound that is worse for the candidate counts.

**Errors.** Promoting needs a net gain above zero at a one-sided error of 1 %, divided by the number of looks: seeds may be
added one at a time, and each look is a chance to be wrong. Other statements (no gain, a loss) may err in 5 %.
"""

import math
import statistics
from dataclasses import asdict, dataclass

from nanochat.lab.rows import number
from nanochat.lab.stats import Slope, common_slope, half_width, seeds_needed

PROMOTE_ERROR, OTHER_ERROR = 0.01, 0.05
FALLBACK_GAIN = math.log(1.03)     # section 7.1, 2
LOSS_BAND, BPB_BAND = 0.01, 0.005  # section 7.1, 5 (relative) and 6 (absolute)
EQUAL = 0.005                      # tokens or FLOPs that differ by less count as matched: steps are whole numbers
DECISIONS = ("reject", "keep optional", "inconclusive", "promote")


@dataclass(frozen=True)
class Gate:
    name: str
    outcome: str  # pass | fail | unclear
    detail: str


@dataclass(frozen=True)
class Gain:
    """A mean over pairs in units of ln(time), with bounds. `safe`: the lower bound that promoting needs."""
    mean: float
    low: float
    high: float
    safe: float
    sd: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.mean:+.1%} ({self.low:+.1%} to {self.high:+.1%})"


@dataclass(frozen=True)
class Verdict:
    decision: str
    why: str
    gates: tuple[Gate, ...] = ()
    gain: Gain | None = None
    seeds_wanted: int | None = None  # of pairs in all, if more could decide

    def __str__(self) -> str:
        return f"verdict: {self.decision} ({self.why})"

    def as_dict(self) -> dict:
        return {"decision": self.decision, "why": self.why, "gates": [asdict(g) for g in self.gates],
                "net_gain": {k: number(v) for k, v in asdict(self.gain).items()} if self.gain else None,
                "seeds_wanted": self.seeds_wanted}


def good(row: dict) -> bool:
    return row["status"] == "ok"


def quality(row: dict) -> float | None:
    """The figure of merit: final validation bits per byte, or the smoothed training loss where nothing was evaluated."""
    bpb = number(row.get("val_bpb"))
    return number(row.get("final_train_loss")) if bpb is None else bpb


def known_quality(row: dict) -> float:
    """The same of a run that ended well, which has one."""
    value = quality(row)
    assert value is not None, f"no loss of a run that ended well: {row.get('variant')}, seed {row.get('seed')}"
    return value


def pairs_of(baseline: list[dict], candidate: list[dict]) -> list[tuple[dict, dict]]:
    """(baseline's row, candidate's row) of each seed that both finished."""
    mine = {row["seed"]: row for row in candidate if good(row)}
    return [(row, mine[row["seed"]]) for row in baseline if good(row) and row["seed"] in mine]


def worth_of_a_step(calibration: list[dict]) -> Slope | None:
    """k, quality lost per unit of ln(steps), from baseline rows of several horizons. None where these show nothing."""
    points = [(row["seed"], -math.log(row["steps_done"]), value) for row in calibration if good(row) and (value := quality(row))]
    slope = common_slope(points)
    return slope if slope and slope.value > 0 else None


def net_gain(pairs: list[tuple[dict, dict]], worth: Slope | None, looks: int = 1) -> Gain | None:
    """Time saved less quality lost, per pair, as a mean with bounds. None where it cannot be known: `worth` is, and differs."""
    saved = [math.log(b["train_time_sec"] / c["train_time_sec"]) for b, c in pairs]
    lost = [known_quality(c) - known_quality(b) for b, c in pairs]
    if not pairs or (worth is None and any(lost)):
        return None
    k = worth or Slope(1.0, 1.0, 1.0)
    each = [d - q / k.value for d, q in zip(saved, lost, strict=True)]
    d, q = statistics.fmean(saved), statistics.fmean(lost)
    dear, cheap = (k.low, k.high) if q > 0 else (k.high, k.low)  # what a loss costs at most and at least; a gain is worth
    centre_low = d - q / dear if dear > 0 else -math.inf
    centre_high = d - q / cheap if cheap > 0 else math.inf
    width, safe = half_width(each, OTHER_ERROR / looks), half_width(each, PROMOTE_ERROR / looks)
    return Gain(statistics.fmean(each), centre_low - width, centre_high + width, centre_low - safe,
                statistics.stdev(each) if len(each) > 1 else math.inf, len(each))


# --- the gates -----------------------------------------------------------------------------------------------------


def gate_stable(baseline: list[dict], candidate: list[dict]) -> Gate:
    """7.1, 3: every candidate run ended well, took every step, never went back, and kept what it had reached."""
    trouble = [f"seed {r['seed']}: {r['status']}" for r in candidate if not good(r)]
    trouble += [f"seed {r['seed']}: {r['skipped_steps'] or 0} steps skipped, {r['rollbacks'] or 0} rollbacks"
                for r in candidate if good(r) and (r.get("skipped_steps") or r.get("rollbacks"))]
    usual = {r["seed"] for r in baseline if went_up(r)}  # the baseline overfits too
    trouble += [f"seed {r['seed']}: validation rose from {r['min_val_bpb']:.4f} to {r['val_bpb']:.4f}"
                for r in candidate if went_up(r) and r["seed"] not in usual]
    return Gate("no instability", "fail" if trouble else "pass", "; ".join(trouble) or f"{len(candidate)} runs ended well")


def went_up(row: dict) -> bool:
    """Whether validation ended more than 1 % above its lowest."""
    lowest, last = number(row.get("min_val_bpb")), number(row.get("val_bpb"))
    return lowest is not None and last is not None and last > (1 + LOSS_BAND) * lowest


def gate_matched(pairs: list[tuple[dict, dict]], match: str) -> Gate | None:
    """The conditions were as declared: a candidate that trained on less is not compared, it is refused."""
    amounts = {"steps": lambda r: r["tokens_seen"], "flops": lambda r: r["tokens_seen"] * r["flops_per_token"]}
    if match not in amounts or not pairs:
        return None
    worst = max((amounts[match](c) / amounts[match](b) for b, c in pairs), key=lambda ratio: abs(ratio - 1))
    # one step more or less is what whole steps allow
    room = max(EQUAL, *(1 / min(b["steps_done"], c["steps_done"]) for b, c in pairs)) if match == "flops" else EQUAL
    unit = "tokens" if match == "steps" else "FLOPs"
    return Gate(f"equal {match}", "pass" if abs(worst - 1) <= room else "fail", f"{worst:.4f} of the baseline's {unit}")


def gate_resume(resumed: bool | None, detail: str = "") -> Gate:
    """7.1, 4: a run that was killed went on to where it would have come."""
    outcome = {True: "pass", False: "fail", None: "unclear"}[resumed]
    return Gate("resume", outcome, detail or ("not tried: lab gate kills a run and resumes it" if resumed is None else ""))


def gate_floor(pairs: list[tuple[dict, dict]], name: str, field: str, relative=0.0, absolute=0.0) -> Gate | None:
    """7.1, 5 and 6: the candidate's median is worse than the baseline's by at most the band. None where unknown."""
    known = [(x, y) for b, c in pairs if (x := number(b.get(field))) is not None and (y := number(c.get(field))) is not None]
    if not known:
        return None
    before, after = (statistics.median(side) for side in zip(*known, strict=True))
    differences = [c - b for b, c in known]
    band, worse = absolute or relative * abs(before), after - before
    detail = f"{after:.5f} against {before:.5f}, {worse:+.5f}; the band is +{band:.5f}"
    if worse <= band:
        return Gate(name, "pass", detail)
    certain = statistics.fmean(differences) - half_width(differences, OTHER_ERROR) > band
    return Gate(name, "fail" if certain else "unclear", detail)


def gate_time_to_target(pairs: list[tuple[dict, dict]], extrapolated=None) -> Gate | None:
    """7.1, 1: lower time to target over two seeds. None where no target was declared, or neither reached it.

    `extrapolated`: ((low, high) of the baseline, (low, high) of the candidate) in seconds, from fits across horizons.
    """
    times = [(number(b.get("time_to_target_sec_measured")), number(c.get("time_to_target_sec_measured"))) for b, c in pairs]
    if times and all(b is not None or c is not None for b, c in times):
        logs = [math.log(c / b) if b and c else (-math.inf if c is not None else math.inf) for b, c in times]
        finite = [x for x in logs if math.isfinite(x)]
        mean = f"{math.exp(statistics.fmean(finite)):.3f} of the baseline's" if finite else "one of the two never got there"
        detail = f"{mean}; lower with {sum(x < 0 for x in logs)} of {len(logs)} seeds"
        if len(logs) < 2:
            return Gate("time to target", "unclear", f"{detail}; it takes two")
        if all(x < 0 for x in logs):
            return Gate("time to target", "pass", detail)
        if len(finite) == len(logs) > 2 and statistics.fmean(logs) + half_width(logs, OTHER_ERROR) < 0:
            return Gate("time to target", "pass", detail)
        return Gate("time to target", "fail" if all(x > 0 for x in logs) else "unclear", detail)
    if extrapolated:
        (b_low, b_high), (c_low, c_high) = extrapolated
        detail = f"extrapolated: {c_low:.4g} to {c_high:.4g} s against {b_low:.4g} to {b_high:.4g} s"
        outcome = "pass" if c_high < b_low else "fail" if c_low > b_high else "unclear"
        return Gate("time to target (extrapolated)", outcome, detail)
    return None


def gate_fallback(pairs: list[tuple[dict, dict]], gain: Gain | None, worth: Slope | None) -> Gate:
    """7.1, 2: where no target was reached, 3 % less wall time at matched quality, which is the net gain."""
    undivided = net_gain(pairs, worth)  # by the looks: decide's simulations hold a true 1.5 % to 5 %
    if gain is None or undivided is None:
        return Gate("3 % at matched quality", "unclear", "the net gain is not known")
    outcome = "pass" if undivided.low >= FALLBACK_GAIN else "fail" if gain.high < FALLBACK_GAIN else "unclear"
    return Gate("3 % at matched quality", outcome, f"net gain {gain}")


def gate_net_gain(gain: Gain | None) -> Gate:
    if gain is None:
        return Gate("net gain", "unclear", "what a step is worth is not known: give calibration runs, or more seeds of them")
    outcome = "pass" if gain.safe > 0 else "fail" if gain.high < 0 else "unclear"
    return Gate("net gain", outcome, f"time saved less quality lost: {gain}, {gain.pairs} pairs")


# --- the verdict ---------------------------------------------------------------------------------------------------


def judge(baseline: list[dict], candidate: list[dict], calibration: list[dict], *, match: str = "steps", looks: int = 1,
          resumed: bool | None = None, resume_detail: str = "", extrapolated=None) -> Verdict:
    """The verdict on a candidate.

    baseline, candidate: rows of the same seeds. calibration: baseline rows of several horizons, the full one included.
    match: what was to be equal. looks: how many times the same question may be asked with more seeds. resumed: whether a
    killed run went on as it should; None where that was not tried, which leaves the gate open.
    """
    pairs, worth = pairs_of(baseline, candidate), worth_of_a_step(calibration)
    stable = gate_stable(baseline, candidate)
    if stable.outcome == "fail":
        return Verdict("reject", f"{stable.name}: {stable.detail}", (stable,))
    if not pairs:
        return Verdict("inconclusive", "no seed that both finished", (stable,))
    gain = net_gain(pairs, worth, looks)
    reached = gate_time_to_target(pairs, extrapolated)
    provisional = reached is not None and "extrapolated" in reached.name
    gates = tuple(gate for gate in (
        reached or gate_fallback(pairs, gain, worth), stable, gate_matched(pairs, match), gate_resume(resumed, resume_detail),
        gate_floor(pairs, "loss within +1 %", "final_train_loss", relative=LOSS_BAND),
        gate_floor(pairs, "validation within +0.005", "val_bpb", absolute=BPB_BAND), gate_net_gain(gain)) if gate)
    hard = [g for g in gates[1:] if g.outcome == "fail"]
    unclear = [g for g in gates if g.outcome != "pass" and g.name != "resume"]
    wanted = seeds_needed(gain.sd, gain.mean, PROMOTE_ERROR / looks) if gain and gain.pairs > 1 and gain.mean else None

    def verdict(decision, why, more=None):
        return Verdict(decision, why, gates, gain, more)
    if hard:
        return verdict("reject", f"{hard[0].name}: {hard[0].detail}")
    if gain and gain.high < FALLBACK_GAIN and not (gain.safe > 0 and gates[0].outcome == "pass"):
        harmful = gain.mean < -FALLBACK_GAIN and gain.high < 0
        return verdict("reject" if harmful else "keep optional", f"no gain of 3 %: net gain {gain}")
    if unclear:  # gates[0] too: where a net gain of 3 % is still possible, slower on every seed so far is chance or not
        few = f"; {len(pairs)} seeds screen" + (f", about {wanted} would decide" if wanted and len(pairs) < wanted < 99 else "")
        return verdict("inconclusive", f"{unclear[0].name}: {unclear[0].detail}{few}", wanted)
    if provisional:
        return verdict("keep optional", f"provisional, as the time to target is extrapolated: net gain {gain}")
    if resumed is None:
        return verdict("inconclusive", f"all that was measured passes, net gain {gain}; resume not tried")
    return verdict("promote", f"net gain {gain}, every gate passed")


def judge_series(by_depth: dict[int, Verdict]) -> Verdict:
    """Over depths (phase 5): promote only if the gain holds at each depth, and quality regresses at none."""
    rejected = [d for d, v in by_depth.items() if v.decision == "reject"]
    known = {d: v.gain for d, v in by_depth.items() if v.gain}
    listed = ", ".join(f"d{d} {gain.mean:+.1%}" for d, gain in known.items())
    if rejected:
        return Verdict("reject", f"rejected at depth {', '.join(map(str, rejected))}; net gains {listed or 'unknown'}")
    if len(by_depth) < 2 or len(known) < len(by_depth):
        return Verdict("inconclusive", f"it takes two depths with a known gain; {listed or 'none is known'}")
    gains = [gain.mean for gain in known.values()]
    if min(gains) > 0 and statistics.fmean(gains) - half_width(gains, OTHER_ERROR) > 0 and any(
            v.decision == "promote" for v in by_depth.values()):
        return Verdict("promote", f"the gain holds across depths: {listed}")
    if max(gain.high for gain in known.values()) < FALLBACK_GAIN or min(gains) <= 0:
        return Verdict("keep optional", f"no gain that holds across depths: {listed}")
    return Verdict("inconclusive", f"more seeds or depths are needed: {listed}")
