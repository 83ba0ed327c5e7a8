"""The experiments: which cells they run, and what they decide from the rows."""

import json
import math
import statistics
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from nanochat.common import print0
from nanochat.lab import timing
from nanochat.lab.cells import Cell, Folder
from nanochat.lab.clock import Clock
from nanochat.lab.decide import Verdict, judge, judge_series
from nanochat.lab.gain import (
    MOST_PAIRS,
    PROMOTE_ALPHA,
    measure_of,
    net_gain,
    pairs_of,
    quality,
    same_bits,
    succeeded,
    worth_of_a_step,
)
from nanochat.lab.outputs import summary
from nanochat.lab.plan import Variant, interleaved, matched, pilot, shorter
from nanochat.lab.rows import config_of, number, write_csv
from nanochat.lab.stats import Estimate, levels, t_quantile
from nanochat.recipe.shape import scaling_params
from nanochat.runtime.files import write_atomic

CALIBRATION_SHARES = (0.95, 0.9)   # of the horizon, beside the whole of it
CALIBRATION_SEEDS = 3              # at most: with more, the noise of the seeds' own runs dominates
CONTROL_SHARE = 0.95               # of the steps: the control only trains less
PILOT_SHARE = 0.5                  # of the steps: the run that measures a candidate's rate, where times are to be equal
RESUME_TOLERANCE = 1e-3            # relative difference of a resumed run; with --device-type=cpu the bits must be equal
JOBS, MORE_JOBS = 3, 5             # that time a step; more where the machine's clock noise is not yet known
ENOUGH_DF = 4                      # degrees of freedom of the clock noise with which it is
POWER = 0.8                        # with which the noise card's differences are detected
CONFIRMED = "worth confirming"     # the state of the variants of a sweep of which the first is compared on fresh seeds
UNTIMED = Clock(0.0, math.inf, 0, 0, 0, "the time of a step has not been measured yet")
SERIES_COLUMNS = ("depth", "num_params", "num_scaling_params", "num_iterations", "tokens_trained", "param_data_ratio", "val_bpb",
                  "core_score", "train_time_sec", "variant", "seed", "status")


@dataclass(frozen=True)
class Comparison:
    """A baseline and its candidates in a folder.

    clock: measure the seconds of a step of both sides in turn, instead of by the whole runs. accept_load: believe these
    seconds beside other programs too. judge_time: judge the time of a candidate that changes no bit.
    """
    folder: Folder
    baseline: Variant
    candidates: tuple[Variant, ...]
    match: str = "steps"
    calibrate: bool = True
    control: bool = False             # add a hidden candidate that only trains less, and must not be promoted
    horizons: tuple[float, ...] = ()  # shares of the steps with which all are trained too, to extrapolate the time to target
    clock: bool = True
    accept_load: bool = False
    judge_time: bool = False
    profile: str = ""                 # whose measurements share a card of the machine's clock noise
    excluded: tuple[int, ...] = ()    # seeds that selected the candidate, and so do not count
    lengths_known: bool = False       # the candidates have the lengths that `match` asks for

    def run(self, seeds: list[int]) -> dict[str, list[dict]]:
        """Run what is not finished; rows by variant name, in the order of the seeds."""
        comparison, cells = self.with_lengths(seeds[0]), []
        for i, seed in enumerate(seeds):
            variants = [comparison.baseline, *comparison.candidates]
            variants += [at_share(v, share) for v in variants for share in self.horizons]
            if self.calibrate and i < CALIBRATION_SEEDS:
                variants += [at_share(comparison.baseline, share) for share in CALIBRATION_SHARES if share not in self.horizons]
            if self.control:
                variants.append(shorter(comparison.baseline, CONTROL_SHARE, "control"))
            cells += [comparison.cell(v, seed) for v in interleaved(variants, i)]
        rows: dict[str, list[dict]] = {}
        for cell, row in zip(cells, self.folder.run(cells), strict=True):
            rows.setdefault(cell.variant, []).append(row)
        return rows

    def cell(self, variant: Variant, seed: int) -> Cell:
        """The run of a variant with a seed. Shared with other experiments are the baseline's calibration runs, of which only
        steps and quality count, and, where its time does not count, the baseline itself: else both sides run in turn."""
        calibration = {at_share(self.baseline, share).name for share in CALIBRATION_SHARES}
        untimed = self.clock and self.match != "time" and variant.name == self.baseline.name
        return Cell(variant.name, seed, variant.flags, shared=untimed or variant.name in calibration)

    def seeds_run(self, seeds: list[int]) -> list[int]:
        """`seeds`, and those with which this folder has runs of a candidate that were not asked for: they count as well, or the
        best-looking could be chosen."""
        asked = [self.cell(v, seed) for v in self.candidates for seed in seeds]
        others = {seed for found in self.folder.other_seeds(asked).values() for seed in found}
        found = sorted(others - {*seeds, *self.excluded})
        if found:
            print0(f"seeds {', '.join(map(str, found))} were run before, and count")
        return [*seeds, *found]

    def with_lengths(self, seed: int) -> "Comparison":
        """A copy whose candidates take the baseline's FLOPs or time, if that is to match. One that cannot be measured keeps its
        length, and fails later."""
        if self.lengths_known or self.match not in ("flops", "time"):
            return self
        pilots = [pilot(v, PILOT_SHARE) for v in self.candidates] if self.match == "time" else []
        first, *measured = self.folder.run([self.cell(v, seed) for v in (self.baseline, *pilots)])
        if not succeeded(first):
            print0(f"note: {self.baseline.name} failed, so there is no {self.match} to match: the others keep their length")
            return self
        pilot_rows: list[dict | None] = [*measured] or [None] * len(self.candidates)
        return replace(self, lengths_known=True, candidates=tuple(
            matched(v, first, row, self.match) if row is None or succeeded(row) else v
            for v, row in zip(self.candidates, pilot_rows, strict=True)))

    def calibration(self, rows: dict[str, list[dict]]) -> list[dict]:
        """The baseline's rows of several horizons, for the seeds that have them."""
        # only the end of the horizon: further back a step is worth more
        names = {at_share(self.baseline, share).name for share in CALIBRATION_SHARES}
        shorter_runs = [row for name, found in rows.items() if name in names for row in found]
        seeds = {row["seed"] for row in shorter_runs}
        return [row for row in rows["baseline"] if row["seed"] in seeds] + shorter_runs

    def time_a_step(self, name: str, rows: dict[str, list[dict]]) -> Clock | None:
        """The clock of the candidate `name`: both sides take turns, in processes of their own. None where times are those of
        the whole runs: without --clock, or where a run takes several processes."""
        ended = [row for side in ("baseline", name) for row in rows[side] if succeeded(row) and number(row["dt_median_ms"])]
        if not self.clock or self.folder.processes > 1 or not ended:
            return None
        candidate = next(v for v in self.candidates if v.name == name)
        measure = partial(timing.measure, self.folder.path, name, self.baseline.flags, candidate.flags,
                          base_dir=self.folder.base_dir, profile=self.profile, accept_load=self.accept_load,
                          seconds_per_step=max(row["dt_median_ms"] for row in ended) / 1000)
        clock = measure(jobs=JOBS)
        return measure(jobs=MORE_JOBS) if math.isfinite(clock.se) and clock.df < ENOUGH_DF else clock

    def judge(self, name: str, rows: dict[str, list[dict]], clock: Clock | None = None, **options) -> Verdict:
        """The verdict on the candidate `name`; `options` are those of `decide.judge`."""
        return judge(rows["baseline"], rows[name], self.calibration(rows), clock=clock,
                     extrapolated=self.extrapolated(name, rows, clock), **{"match": self.match} | options)

    def extrapolated(self, name: str, rows: dict[str, list[dict]], clock: Clock | None = None) -> Estimate | None:
        """ln(baseline's time to target / that of `name`) from runs of several horizons; None where it is not known. The times of
        both sides, each extrapolated by itself, are recorded in their rows."""
        from nanochat.lab.target import FIELDS, paired_saving, time_to_target  # numpy, which no flag needs
        whole = rows["baseline"][0]
        if not self.horizons or whole["target_metric_name"] is None:
            return None
        field, threshold = FIELDS[whole["target_metric_name"]], whole["target_metric_threshold"]
        base, other = (self.points(variant, rows, field) for variant in ("baseline", name))
        for variant, points in (("baseline", base), (name, other)):
            self.record_crossing(rows[variant], time_to_target(list(points.values()), threshold))
        return paired_saving(base, other, threshold, clock.log_ratio if clock else None)

    def points(self, name: str, rows: dict[str, list[dict]], field: str) -> dict[tuple[int, float], tuple[float, float]]:
        """(seed, share of the steps) -> (training seconds, value of `field`) of a variant's runs of all horizons."""
        found = {}
        for share in (1.0, *self.horizons, *CALIBRATION_SHARES):
            for row in rows.get(name if share == 1.0 else share_name(name, share), []):
                if succeeded(row) and number(row[field]) is not None:
                    found[row["seed"], share] = (row["train_time_sec"], row[field])
        return found

    def record_crossing(self, rows: list[dict], crossing) -> None:
        """Write an extrapolated time to target into the rows of a variant's whole runs, where there is one."""
        from nanochat.lab.target import METHOD
        for row in rows if crossing else []:
            row |= {"time_to_target_sec_extrapolated": crossing.seconds, "time_to_target_sec_low": crossing.low,
                    "time_to_target_sec_high": number(crossing.high), "extrapolation_method": METHOD}
            write_atomic(self.folder.path / "cells" / row["cell"] / "row.json", json.dumps(row))
        write_csv(self.folder.path)


def at_share(variant: Variant, share: float) -> Variant:
    """The variant with a share of its steps, named after it: baseline-95."""
    return shorter(variant, share, share_name(variant.name, share))


def share_name(name: str, share: float) -> str:
    return f"{name}-{f'{share:.0%}'.rstrip('%')}"


def compare(comparison: Comparison, seeds: list[int], max_seeds: int, always_resume: bool = False) -> tuple[Verdict, dict]:
    """Judge the one candidate of a comparison, with one more seed at a time, up to `max_seeds`, while it is inconclusive.

    A candidate that ends with the same bits is said to change nothing, at once; with --judge-time its time alone is judged. The
    time of a step is measured once, and not at all for a candidate that is rejected without it.

    always_resume: check the resume of a killed run whatever the verdict, not only before promoting. Returns verdict and rows.
    """
    comparison = comparison.with_lengths(seeds[0])
    name, seeds, most = comparison.candidates[0].name, comparison.seeds_run(seeds), max(MOST_PAIRS, max_seeds)
    rows = comparison.run(seeds[:1])
    unchanged = same_bits(pairs_of(rows["baseline"], rows[name])) and not always_resume
    if not unchanged:
        rows = comparison.run(seeds)
    elif not comparison.judge_time:
        return comparison.judge(name, rows, judge_time=False), rows
    verdict = comparison.judge(name, rows, UNTIMED, most=most, resumed=True)
    clock = comparison.time_a_step(name, rows) if verdict.decision != "reject" else None
    while verdict.decision != "reject":
        verdict = comparison.judge(name, rows, clock, most=most, resumed=True)
        hopeless = unchanged or (clock is not None and math.isinf(clock.se))  # more seeds would not tell the time
        if verdict.decision != "inconclusive" or len(seeds) >= max_seeds or hopeless:
            break
        print0(f"{verdict}; one more seed")
        seeds.append(max(seeds) + 1)
        rows = comparison.run(seeds)
    resumed, detail = None, ""
    if always_resume or verdict.decision == "promote":
        resumed, detail = check_resume(comparison, name, rows)
    verdict = comparison.judge(name, rows, clock, most=most, resumed=resumed, resume_detail=detail)
    if comparison.control:
        # the control is the baseline with fewer steps: a step takes as long
        same_pace = clock and replace(clock, log_ratio=0.0)
        control = comparison.judge("control", rows, same_pace, most=most, resumed=True, match="free")
        if control.decision == "promote":
            why = f"the control, which only trains less, would be promoted too: {control.why}"
            verdict = replace(verdict, decision="inconclusive", why=why)
    return verdict, rows


def check_resume(comparison: Comparison, name: str, rows: dict[str, list[dict]]) -> tuple[bool | None, str]:
    """Kill a run of the candidate, resume it, and compare its end with that of the undisturbed run.

    Returns whether they agree, None where that could not be tried, and the details.
    """
    whole = next((row for row in rows[name] if succeeded(row)), None)
    if whole is None:
        return None, ""
    flags, every = whole["flags"], max(1, whole["num_iterations"] // 3)
    resumed, = comparison.folder.run([Cell(f"{name}-resumed", whole["seed"], (*flags, f"--save-every={every}"), kill=True)])
    if not resumed["killed_at"]:
        return None, "the run ended before it could be killed: give it more steps"
    tolerance = 0.0 if config_of(flags).run.device_type == "cpu" else RESUME_TOLERANCE
    steps, again = (read_metrics(comparison.folder.path / "cells" / row["cell"] / "metrics.jsonl") for row in (whole, resumed))
    if problem := continues_otherwise(steps, again, int(resumed["killed_at"].rpartition("_")[2]), tolerance):
        return False, f"killed after {resumed['killed_at']}, resumed: {problem}"
    same = all(agree(resumed[field], whole[field], tolerance) for field in ("final_loss", "val_bpb"))
    detail = f"killed after {resumed['killed_at']}, resumed: {resumed['status']}, " + (
        f"loss {whole['final_loss']} and {whole['val_bpb']} bpb as without" if same else
        f"loss {resumed['final_loss']} and {resumed['val_bpb']} bpb against {whole['final_loss']} and {whole['val_bpb']}")
    return succeeded(resumed) and same, detail


def read_metrics(path: Path) -> dict[int, dict]:
    """The training steps of a metrics.jsonl; {} where there is none."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return {}
    return {row["step"]: row for row in rows if row.get("batch_crc32") is not None}


def continues_otherwise(whole: dict[int, dict], resumed: dict[int, dict], killed_at: int, tolerance: float) -> str | None:
    """How the steps of a resumed run differ from those of the undisturbed one, from the checkpoint on: in their batches, or the
    first in its loss, which the final loss could hide. None where they do not."""
    for step in sorted(step for step in whole if step >= killed_at):
        if step not in resumed:
            return f"there is no step {step}"
        if whole[step]["batch_crc32"] != resumed[step]["batch_crc32"]:
            return f"step {step} has another batch"
        if step == killed_at and not agree(whole[step]["loss"], resumed[step]["loss"], tolerance):
            return f"the first step, {step}, has a loss of {resumed[step]['loss']} instead of {whole[step]['loss']}"
    return None


def agree(x, y, tolerance: float) -> bool:
    """Whether two results are equal, or numbers that differ by a share of at most `tolerance`."""
    known = number(x) is not None and number(y) is not None
    return x == y or (known and math.isclose(x, y, rel_tol=tolerance))


def sweep(comparison: Comparison, seeds: list[int], max_seeds: int) -> tuple[Verdict, dict, list[dict]]:
    """Screen the candidates on `seeds`, then compare the best with the baseline on as many fresh seeds, which alone count.

    Screening is by successive halving (Jamieson and Talwalkar, AISTATS 2016): after each seed the better half goes on, by whole
    runs. The best of many equal candidates looks good on the seeds that selected it (selection bias). Returns verdict, rows,
    ranking.
    """
    left: list[Variant] = list(comparison.candidates)
    rows: dict[str, list[dict]] = {}
    scores: dict[str, tuple[float, str]] = {}  # net gain, decision
    for i in range(len(seeds)):
        now = replace(comparison, candidates=tuple(left), clock=False).run(seeds[:i + 1])
        rows |= now
        measure = measure_of(*now.values())
        worth = worth_of_a_step(comparison.calibration(now), measure)
        for v in left:
            gain = net_gain(pairs_of(now["baseline"], now[v.name]), worth, measure)
            verdict = comparison.judge(v.name, now, resumed=True, judge_time=comparison.judge_time)
            scores[v.name] = (gain.mean if gain else -math.inf, verdict.decision)
        left.sort(key=lambda v: scores[v.name][0], reverse=True)
        if i + 1 < len(seeds):
            left = left[:math.ceil(len(left) / 2)]

    def screening(v: Variant) -> str:
        gain, decision = scores[v.name]
        if decision in ("reject", "no change") or v not in left:
            return decision if decision in ("reject", "no change") else "left out"
        return CONFIRMED if gain > 0 else decision
    ordered = sorted(comparison.candidates, key=lambda v: (len(rows[v.name]), scores[v.name][0]), reverse=True)
    ranking = [{"variant": v.name, **summary(rows[v.name]), "net_gain": number(scores[v.name][0]), "screening": screening(v)}
               for v in ordered]
    best = next((r["variant"] for r in ranking if r["screening"] == CONFIRMED), None)
    if best is None:
        known = any(r["net_gain"] is not None for r in ranking)
        return Verdict("keep optional" if known else "inconclusive",
                       "no variant gained on the screening seeds" if known else "no variant's net gain is known"), rows, ranking
    fresh = [max(seeds) + 1 + i for i in range(max(2, len(seeds)))]
    print0(f"{best} is the best on seeds {seeds}, which selected it, so seeds {fresh} decide")
    final = replace(comparison, candidates=tuple(v for v in comparison.candidates if v.name == best), excluded=tuple(seeds))
    verdict, confirmed = compare(final, fresh, max_seeds)
    verdict = replace(verdict, why=f"{best}, on fresh seeds: {verdict.why}")
    return verdict, {name: [*rows.get(name, []), *confirmed.get(name, [])] for name in {**rows, **confirmed}}, ranking


def noise(comparison: Comparison, seeds: list[int]) -> tuple[dict, dict]:
    """Compare the baseline with itself (an A/A test). Returns the noise card and the rows.

    Time: of whole runs, each seed twice, and of steps in turn, which is what verdicts use. Quality: over seeds, which is an upper
    bound on the differences between pairs of one seed, after a change has made their runs diverge.
    """
    rows = replace(comparison, clock=False).run(seeds)  # the whole runs' time counts too
    pairs, measure = pairs_of(rows["baseline"], rows["again"]), measure_of(*rows.values())
    worth = worth_of_a_step(comparison.calibration(rows), measure)
    saved = [math.log(b["train_time_sec"] / c["train_time_sec"]) for b, c in pairs]
    values = [value for row in rows["baseline"] if succeeded(row) and (value := quality(row, measure)) is not None]
    if len(pairs) < 2 or len(values) < 2:
        return {"error": "fewer than two pairs succeeded"}, rows
    clock = comparison.time_a_step("again", rows)
    time_sd, quality_sd = statistics.stdev(saved) / math.sqrt(2), statistics.stdev(values)
    pair_sd = worth and math.sqrt(2) * quality_sd / worth.value
    time_se = clock.se if clock and math.isfinite(clock.se) else time_sd * math.sqrt(2 / len(pairs))
    t_sum = {n: t_quantile(1 - level, n - 1) + t_quantile(POWER, n - 1)
             for n, level in levels(MOST_PAIRS, PROMOTE_ALPHA).items()}
    card = {
        "pairs": len(pairs), "time_sd": time_sd, "clock": clock and clock.as_dict(), "quality_sd": quality_sd,
        "quality_per_ln_steps": worth and worth.value,
        "quality_sd_in_steps": worth and quality_sd / worth.value, "pair_sd": pair_sd,
        "same_seed_same_bits": all(quality(b, measure) == quality(c, measure) for b, c in pairs),
        "detectable_gain": pair_sd and {n: t * math.hypot(pair_sd / math.sqrt(n), time_se) for n, t in t_sum.items()},
        "a_against_a": comparison.judge("again", rows, clock, resumed=True).as_dict(),
        "control": comparison.judge("control", rows, clock and replace(clock, log_ratio=0.0), resumed=True,
                                    match="free").as_dict(),
        "control_as_candidate": comparison.judge("control", rows, resumed=True).as_dict(),
    }
    return card, rows


def series(comparisons: dict[int, Comparison], seeds: list[int], max_seeds: int) -> tuple[Verdict, dict, list[dict]]:
    """Compare baseline and candidate at each depth. Returns the verdict, the verdicts by depth, and rows of SERIES_COLUMNS."""
    verdicts, table = {}, []
    for depth, comparison in comparisons.items():
        verdicts[depth], rows = compare(comparison, seeds, max_seeds)
        print0(f"d{depth}: {verdicts[depth]}")
        for name in ("baseline", comparison.candidates[0].name):
            table += [series_row(row, comparison) for row in rows[name]]
    return judge_series(verdicts), verdicts, table


def series_row(row: dict, comparison: Comparison) -> dict:
    shape = config_of(list(comparison.baseline.flags)).model.shape(comparison.folder.vocab_size())
    params, tokens = scaling_params(shape), row["tokens_seen"]
    known = row | {"num_scaling_params": params, "tokens_trained": tokens, "core_score": None,
                   "param_data_ratio": tokens and round(tokens / params, 2)}
    return {name: known[name] for name in (*SERIES_COLUMNS, "flops_per_token")}
