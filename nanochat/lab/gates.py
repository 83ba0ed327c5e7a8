"""The acceptance gates (docs/lab.md, "Local gate"): each looks at pairs of runs and says pass, fail or unclear, and why."""

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanochat.lab.gain import (
    MEASURES,
    MOST_PAIRS,
    Gain,
    quality,
    seeds_in_common,
    succeeded,
    time_saved,
    unlike,
)
from nanochat.lab.rows import number
from nanochat.lab.stats import Estimate, levels, margin_of_error, more_often
from nanochat.runtime.other_load import SPOILT

if TYPE_CHECKING:
    from nanochat.lab.clock import Clock

AGAINST_ALPHA = 0.0125                   # of each statement against a candidate, over all looks
FALLBACK_GAIN = math.log(1.03)           # docs/lab.md, local gate 2
LOSS_MARGIN, BPB_MARGIN = 0.01, 0.005    # docs/lab.md, local gates 5 (relative) and 6 (absolute)
MATCH_TOLERANCE = 0.005                  # relative; steps are whole numbers, so tokens and FLOPs are never quite equal
TIME_TOLERANCE = 0.02                    # of equal times: the number of steps is chosen by a rate that was measured before
OWN_TOLERANCE = 0.01                     # bits per byte by which a run's evaluation and the lab's may differ more on one side


@dataclass(frozen=True)
class Gate:
    name: str
    outcome: str  # pass | fail | unclear
    detail: str


def gate_stable(baseline: list[dict], candidate: list[dict]) -> Gate:
    """Local gate 3. A run fails here if it did not succeed (now or before it was tried again), skipped steps, rolled back, or
    lost what it had reached. The baseline may fail as well: the candidate fails the gate if it fails in more than half of its
    runs, or significantly more often than the baseline (Fisher's exact test, 1 %). Where the baseline itself fails in more than
    half of its runs, nothing is compared."""
    baseline_too = {r["seed"] for r in baseline if validation_rose(r)}  # the baseline overfits as well
    trouble = [(r["seed"], what) for r in candidate if (what := instability(r, r["seed"] in baseline_too))]
    before = [r for r in baseline if instability(r, may_rise=True)]
    listed = "; ".join(f"seed {seed}: {what}" for seed, what in sorted(trouble))
    if not trouble:
        return Gate("no instability", "pass", f"{len(candidate)} runs succeeded")
    p = more_often(len(trouble), len(candidate), len(before), len(baseline))
    detail = f"{listed} ({len(trouble)} of {len(candidate)} runs, the baseline {len(before)} of {len(baseline)})"
    if 2 * len(before) > len(baseline) and p >= 0.01:
        return Gate("no instability", "unclear", detail)
    outcome = "fail" if 2 * len(trouble) > len(candidate) or p < 0.01 else "unclear" if p < 0.1 else "pass"
    return Gate("no instability", outcome, detail)


def instability(row: dict, may_rise: bool) -> str:
    """What was wrong with a run, in a few words; "" if nothing was."""
    if not succeeded(row):
        return row["status"]
    if row.get("skipped_steps") or row.get("rollbacks"):
        return f"{row['skipped_steps'] or 0} steps skipped, {row['rollbacks'] or 0} rollbacks"
    if row.get("failures_before"):
        return f"failed {row['failures_before']} times before"
    if may_rise or not validation_rose(row):
        return ""
    return f"validation rose from {row['min_val_bpb']:.4f} to {row['val_bpb']:.4f}"


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


def gate_matched(pairs: list[tuple[dict, dict]], match: str, clock: "Clock | None") -> Gate | None:
    """Steps (tokens), FLOPs or times are as equal as declared. None where nothing was declared."""
    amounts = {"steps": lambda r: r["tokens_seen"], "flops": lambda r: r["tokens_seen"] * r["flops_per_token"]}
    if match == "time" and pairs:
        saved = time_saved(pairs, clock)
        near = abs(saved.mean) <= TIME_TOLERANCE
        return Gate("equal time", "pass" if near else "unclear", f"{math.exp(-saved.mean):.3f} of the baseline's time")
    if match not in amounts or not pairs:
        return None
    worst = max((amounts[match](c) / amounts[match](b) for b, c in pairs), key=lambda ratio: abs(ratio - 1))
    # equal FLOPs may differ by one step, as steps are whole numbers
    one_step = max(1 / min(b["steps_done"], c["steps_done"]) for b, c in pairs) if match == "flops" else 0.0
    unit = "tokens" if match == "steps" else "FLOPs"
    outcome = "pass" if abs(worst - 1) <= max(MATCH_TOLERANCE, one_step) else "fail"
    return Gate(f"equal {match}", outcome, f"{worst:.4f} of the baseline's {unit}")


def gate_audit(candidate: list[dict]) -> Gate | None:
    """Each run trained what it declares: its weights changed inside its steps only, by the batches and backward passes of these
    steps. None where no run was audited."""
    audited = [(row["seed"], row["audit"]) for row in candidate if succeeded(row) and row.get("audit")]
    if not audited:
        return None
    trouble = []
    for seed, found in audited:
        if found["changed_between_steps"]:
            trouble.append(f"seed {seed}: weights or moments changed outside of steps, before step "
                           f"{', '.join(map(str, found['changed_between_steps'][:3]))}")
        trouble += [f"seed {seed}: {found[drawn]} {what} instead of {found[declared]}" for drawn, declared, what in (
            ("batches_drawn", "batches_declared", "batches"), ("backward_calls", "backward_declared", "backward passes"))
            if found[drawn] != found[declared]]
    return Gate("trained what it declares", "fail" if trouble else "pass", "; ".join(trouble) or
                f"{sum(found['steps'] for _, found in audited)} steps: no change of weights between them, no other batch")


def gate_evaluated(pairs: list[tuple[dict, dict]], measure: str) -> Gate | None:
    """The lab could evaluate every run itself, and on the tokens that the runs read for their own evaluation, they differ from it
    alike on both sides. None where the lab evaluated none."""
    if measure != MEASURES[0]:
        return None
    missing = [f"{side}, seed {row['seed']}" for pair in pairs for side, row in zip(("baseline", "candidate"), pair, strict=True)
               if quality(row, measure) is None]
    if missing:
        return Gate("evaluated by the lab", "unclear", f"not known: {'; '.join(missing)}")
    for b, c in pairs:
        before, after = (_own_minus_labs(row) for row in (b, c))
        if before is None or after is None:
            continue
        apart = after - before
        if abs(apart) > OWN_TOLERANCE:
            return Gate("evaluated by the lab", "unclear", f"seed {b['seed']}: a run's own evaluation differs from the lab's by "
                        f"{apart:+.4f} bits per byte more on the candidate's side")
    tokens = max((number(row.get("lab_val_tokens")) or 0 for pair in pairs for row in pair), default=0)
    return Gate("evaluated by the lab", "pass", f"{tokens:,} tokens" if tokens else "all runs")


def _own_minus_labs(row: dict) -> float | None:
    """A run's own bits per byte minus the lab's on the same tokens; None where one of them is not known."""
    own, labs = number(row.get("val_bpb")), number(row.get("lab_own_bpb"))
    return None if own is None or labs is None else own - labs


def gate_clock(pairs: list[tuple[dict, dict]], clock: "Clock | None") -> Gate | None:
    """The time is known: by the clock, or by whole runs beside which no other programs ran. None where nothing can be said."""
    if clock is not None:
        detail = f"steps in turn, {clock.jobs} times: {math.expm1(-clock.log_ratio):+.2%} (standard error {clock.se:.2%}) a step"
        known = math.isfinite(clock.se)
        return Gate("time", "pass" if known else "unclear", detail if known else clock.note)
    loads = [(b["seed"], load) for b, c in pairs if (load := max(number(r.get("other_load")) or 0.0 for r in (b, c))) > SPOILT]
    if loads:
        return Gate("time", "unclear", "other programs used the processor: " + ", ".join(
            f"seed {seed} {load:.0%}" for seed, load in loads) + ". Run these again on a quiet machine")
    return None


def gate_resume(resumed: bool | None, detail: str = "") -> Gate:
    """Local gate 4: a run that was killed and resumed ends where the undisturbed run ends. None: not tried."""
    outcome = {True: "pass", False: "fail", None: "unclear"}[resumed]
    return Gate("resume", outcome, detail or ("not tried: lab gate kills a run and resumes it" if resumed is None else ""))


def gate_non_inferior(pairs: list[tuple[dict, dict]], name: str, field: str, relative=0.0, absolute=0.0, *,
                      seeds: int | None = None, most: int = MOST_PAIRS) -> Gate | None:
    """Local gates 5 and 6: the candidate's median is worse than the baseline's by at most the margin, which is `absolute`, or
    `relative` to the baseline's median. None where the field is not known."""
    known = [(x, y) for b, c in pairs if (x := number(b.get(field))) is not None and (y := number(c.get(field))) is not None]
    if not known:
        return None
    before, after = (statistics.median(side) for side in zip(*known, strict=True))
    differences, look = [c - b for b, c in known], seeds or len(known)
    margin, worse = absolute or relative * abs(before), after - before
    detail = f"{after:.5f} against {before:.5f}, {worse:+.5f}; the margin is +{margin:.5f}"
    if worse <= margin:
        return Gate(name, "pass", detail)
    level = levels(max(most, look), AGAINST_ALPHA).get(look, 0.0)
    certain = statistics.fmean(differences) - margin_of_error(differences, level) > margin
    return Gate(name, "fail" if certain else "unclear", detail)


def gate_time_to_target(pairs: list[tuple[dict, dict]], clock: "Clock | None" = None,
                        extrapolated: Estimate | None = None) -> Gate | None:
    """Local gate 1: a lower time to target over two or more seeds. None without a target, or where no run reached it.

    With a clock, a run's time to target is the share of its training at which it met the target, times the time by the clock.
    extrapolated: ln(baseline's time to target / candidate's), from runs of several horizons, where no run reached it.
    """
    times = [(number(b.get("time_to_target_sec_measured")), number(c.get("time_to_target_sec_measured"))) for b, c in pairs]
    if times and all(b is not None or c is not None for b, c in times):
        if clock is not None:
            ratio = math.exp(-time_saved(pairs, clock).mean)  # of the candidate's training time to the baseline's
            times = [(x and x / b["train_time_sec"], y and ratio * y / c["train_time_sec"])
                     for (x, y), (b, c) in zip(times, pairs, strict=True)]
        logs = [log_ratio(b, c) for b, c in times]
        finite = [x for x in logs if math.isfinite(x)]
        mean = f"{math.exp(statistics.fmean(finite)):.3f} of the baseline's" if finite else "one of the two never reached it"
        detail = f"{mean}; lower with {sum(x < 0 for x in logs)} of {len(logs)} seeds"
        if len(logs) < 2:
            return Gate("time to target", "unclear", f"{detail}; two seeds are needed")
        upper = statistics.fmean(logs) + margin_of_error(logs, 0.05) if len(finite) == len(logs) > 2 else math.inf
        outcome = "pass" if all(x < 0 for x in logs) or upper < 0 else "fail" if all(x > 0 for x in logs) else "unclear"
        return Gate("time to target", outcome, detail)
    if extrapolated:
        margin = extrapolated.margin(0.05)
        low, high = extrapolated.mean - margin, extrapolated.mean + margin
        outcome = "pass" if low > 0 else "fail" if high < 0 else "unclear"
        return Gate("time to target (extrapolated)", outcome, f"{math.expm1(-extrapolated.mean):+.1%} "
                    f"({math.expm1(-high):+.1%} to {math.expm1(-low):+.1%}), paired over horizons")
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


def gate_fallback(gain: Gain | None) -> Gate:
    """Local gate 2, where no run reached the target: 3 % less time at matched quality, which is the net gain. It is estimated at
    3 % or more, and above zero for certain; an interval that lies above 3 % would need four times the runs for a gain of 5 %."""
    if gain is None:
        return Gate("3 % at matched quality", "unclear", "the net gain is not known")
    passed = gain.mean >= FALLBACK_GAIN and gain.promotion_bound > 0
    outcome = "pass" if passed else "fail" if gain.highest < FALLBACK_GAIN else "unclear"
    return Gate("3 % at matched quality", outcome, f"net gain {gain}")


def gate_net_gain(gain: Gain | None) -> Gate:
    if gain is None:
        return Gate("net gain", "unclear", "not known: give calibration runs, or more seeds of them")
    outcome = "pass" if gain.promotion_bound > 0 else "fail" if gain.high < 0 else "unclear"
    return Gate("net gain", outcome, f"time saved minus quality lost: {gain}, {gain.pairs} pairs")
