"""The experiments: which cells they run, and what they decide from the rows."""

import json
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.common import print0
from nanochat.lab.cells import Cell, Folder
from nanochat.lab.decide import (
    PROMOTE_ALPHA,
    Verdict,
    judge,
    judge_series,
    measure_of,
    net_gain,
    number,
    pairs_of,
    quality,
    succeeded,
    worth_of_a_step,
)
from nanochat.lab.outputs import summary
from nanochat.lab.plan import Variant, interleaved, matched, pilot, shorter
from nanochat.lab.rows import config_of, write_csv
from nanochat.lab.stats import t_quantile
from nanochat.recipe.shape import scaling_params
from nanochat.runtime.files import write_atomic

if TYPE_CHECKING:
    from nanochat.lab.target import Crossing

CALIBRATION_SHARES = (0.97, 0.94)  # of the horizon, beside the whole of it
CALIBRATION_SEEDS = 3              # at most: with more, the noise of the seeds' own runs dominates
CONTROL_SHARE = 0.95               # of the steps: the control only trains less
PILOT_SHARE = 0.5                  # of the steps: the run that measures a candidate's rate, where times are to be equal
RESUME_TOLERANCE = 1e-3            # relative difference of a resumed run; with --device-type=cpu the bits must be equal
POWER = 0.8                        # with which the noise card's differences are detected
SERIES_COLUMNS = ("depth", "model_dim", "num_params", "num_scaling_params", "num_iterations", "tokens_trained",
                  "param_data_ratio", "val_bpb", "core_score", "train_time_sec", "variant", "seed", "status")


@dataclass(frozen=True)
class Comparison:
    """A baseline and its candidates in a folder."""
    folder: Folder
    baseline: Variant
    candidates: tuple[Variant, ...]
    match: str = "steps"
    calibrate: bool = True
    control: bool = False             # add a hidden candidate that only trains less, and must not be promoted
    horizons: tuple[float, ...] = ()  # shares of the steps with which all are trained too, to extrapolate the time to target

    def run(self, seeds: list[int]) -> dict[str, list[dict]]:
        """Run what is not finished; rows by variant name, in the order of the seeds."""
        comparison = self._matched(seeds[0]) if self.match in ("flops", "time") else self
        cells = []
        for i, seed in enumerate(seeds):
            variants = [comparison.baseline, *comparison.candidates]
            variants += [at_share(v, share) for v in variants for share in self.horizons]
            if self.calibrate and i < CALIBRATION_SEEDS:
                variants += [at_share(comparison.baseline, share) for share in CALIBRATION_SHARES if share not in self.horizons]
            if self.control:
                variants.append(shorter(comparison.baseline, CONTROL_SHARE, "control"))
            cells += [Cell(v.name, seed, v.flags) for v in interleaved(variants, i)]
        rows: dict[str, list[dict]] = {}
        for cell, row in zip(cells, self.folder.run(cells), strict=True):
            rows.setdefault(cell.variant, []).append(row)
        return rows

    def _matched(self, seed: int) -> "Comparison":
        """A copy whose candidates take the baseline's FLOPs or time. One that cannot be measured keeps its length, and fails
        later."""
        pilots = [pilot(v, PILOT_SHARE) for v in self.candidates] if self.match == "time" else []
        first, *measured = self.folder.run([Cell(v.name, seed, v.flags) for v in (self.baseline, *pilots)])
        if not succeeded(first):
            print0(f"note: {self.baseline.name} failed, so there is no {self.match} to match: the others keep their length")
            return self
        pilot_rows: list[dict | None] = [*measured] or [None] * len(self.candidates)
        return replace(self, candidates=tuple(
            matched(v, first, row, self.match) if row is None or succeeded(row) else v
            for v, row in zip(self.candidates, pilot_rows, strict=True)))

    def calibration(self, rows: dict[str, list[dict]]) -> list[dict]:
        """The baseline's rows of several horizons, for the seeds that have them."""
        # only the end of the horizon: further back a step is worth more
        names = {at_share(self.baseline, share).name for share in CALIBRATION_SHARES}
        shorter_runs = [row for name, found in rows.items() if name in names for row in found]
        seeds = {row["seed"] for row in shorter_runs}
        return [row for row in rows["baseline"] if row["seed"] in seeds] + shorter_runs

    def judge(self, name: str, rows: dict[str, list[dict]], **options) -> Verdict:
        """The verdict on the candidate `name`; `options` are those of `decide.judge`."""
        return judge(rows["baseline"], rows[name], self.calibration(rows), match=options.pop("match", self.match),
                     extrapolated=self.extrapolated(name, rows), **options)

    def extrapolated(self, name: str, rows: dict[str, list[dict]]):
        """Intervals in seconds of the time to target of the baseline and of `name`, from runs of several horizons; None where
        one of them is not known."""
        if not self.horizons:
            return None
        found = [self.crossing(v, rows) for v in ("baseline", name)]
        known = tuple((c.low, c.high) for c in found if c)
        return known if len(known) == len(found) else None

    def crossing(self, name: str, rows: dict[str, list[dict]]) -> "Crossing | None":
        """Extrapolate a variant's time to target across its horizons, and record it in the variant's rows."""
        from nanochat.lab.target import METHOD, time_to_target  # numpy, which no flag needs
        whole = rows[name]
        metric, threshold = whole[0]["target_metric_name"], whole[0]["target_metric_threshold"]
        if metric is None:
            return None
        field = {"val_bpb": "val_bpb", "smooth_loss": "final_train_loss"}[metric]
        names = {name, *(f"{name}-{percent(share)}" for share in (*self.horizons, *CALIBRATION_SHARES))}
        found = [row for key, group in rows.items() if key in names for row in group
                 if succeeded(row) and number(row[field]) is not None]
        crossing = time_to_target([(row["train_time_sec"], row[field]) for row in found], threshold)
        if crossing:
            for row in whole:
                row |= {"time_to_target_sec_extrapolated": crossing.seconds, "time_to_target_sec_low": crossing.low,
                        "time_to_target_sec_high": number(crossing.high), "extrapolation_method": METHOD}
                write_atomic(self.folder.path / "cells" / row["cell"] / "row.json", json.dumps(row))
            write_csv(self.folder.path)
        return crossing


def at_share(variant: Variant, share: float) -> Variant:
    """The variant with a share of its steps, named after it: baseline-97."""
    return shorter(variant, share, f"{variant.name}-{percent(share)}")


def percent(share: float) -> str:
    """A share of the steps in the name of a variant: 97."""
    return f"{share:.0%}".rstrip("%")


def compare(comparison: Comparison, seeds: list[int], max_seeds: int, always_resume: bool = False) -> tuple[Verdict, dict]:
    """Judge the one candidate of a comparison, with one more seed at a time, up to `max_seeds`, while it is inconclusive.

    always_resume: check the resume of a killed run whatever the verdict, not only before promoting. Returns verdict and rows.
    """
    name, seeds = comparison.candidates[0].name, list(seeds)
    analyses = max(0, max_seeds - len(seeds)) + 1
    while True:
        rows = comparison.run(seeds)
        verdict = comparison.judge(name, rows, analyses=analyses, resumed=True)
        if verdict.decision != "inconclusive" or len(seeds) >= max_seeds:
            break
        print0(f"{verdict}; one more seed")
        seeds.append(max(seeds) + 1)
    resumed, detail = None, ""
    if always_resume or verdict.decision == "promote":
        resumed, detail = check_resume(comparison, name, rows)
    verdict = comparison.judge(name, rows, analyses=analyses, resumed=resumed, resume_detail=detail)
    if comparison.control:
        control = comparison.judge("control", rows, analyses=analyses, resumed=True, match="free")
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
    """Screen all candidates on `seeds`, then compare the best with the baseline on as many fresh seeds, which alone count.

    The best of many equal candidates looks good on the seeds that selected it (selection bias). Returns verdict, rows, ranking.
    """
    rows = comparison.run(seeds)
    measure = measure_of(*rows.values())
    worth, ranking = worth_of_a_step(comparison.calibration(rows), measure), []
    for v in comparison.candidates:
        gain = net_gain(pairs_of(rows["baseline"], rows[v.name]), worth, measure)
        verdict = comparison.judge(v.name, rows, resumed=True)
        promising = gain and gain.mean > 0 and verdict.decision != "reject"
        ranking.append({"variant": v.name, **summary(rows[v.name]), "net_gain": gain and gain.mean,
                        "screening": "worth confirming" if promising else verdict.decision})
    ranking.sort(key=lambda r: (-math.inf if r["net_gain"] is None else r["net_gain"]), reverse=True)
    best = next((r["variant"] for r in ranking if r["screening"] == "worth confirming"), None)
    if best is None:
        known = any(r["net_gain"] is not None for r in ranking)
        return Verdict("keep optional" if known else "inconclusive",
                       "no variant gained on the screening seeds" if known else "no variant's net gain is known"), rows, ranking
    fresh = [max(seeds) + 1 + i for i in range(len(seeds))]
    print0(f"{best} is the best on seeds {seeds}, which selected it, so seeds {fresh} decide")
    final = replace(comparison, candidates=tuple(v for v in comparison.candidates if v.name == best))
    verdict, confirmed = compare(final, fresh, max_seeds)
    verdict = replace(verdict, why=f"{best}, on fresh seeds: {verdict.why}")
    return verdict, {name: [*rows.get(name, []), *confirmed.get(name, [])] for name in {**rows, **confirmed}}, ranking


def noise(comparison: Comparison, seeds: list[int]) -> tuple[dict, dict]:
    """Compare the baseline with itself (an A/A test). Returns the noise card and the rows.

    Time: each seed is run twice, so that pairs differ by the machine only. Quality: over seeds, which is an upper bound on the
    differences between pairs of one seed, after a change has made their runs diverge.
    """
    rows = comparison.run(seeds)
    pairs, measure = pairs_of(rows["baseline"], rows["again"]), measure_of(*rows.values())
    worth = worth_of_a_step(comparison.calibration(rows), measure)
    saved = [math.log(b["train_time_sec"] / c["train_time_sec"]) for b, c in pairs]
    values = [quality(row, measure) for row in rows["baseline"] if succeeded(row)]
    if len(pairs) < 2:
        return {"error": "fewer than two pairs succeeded"}, rows
    time_sd, quality_sd = statistics.stdev(saved) / math.sqrt(2), statistics.stdev(values)
    pair_sd = math.sqrt(2) * math.hypot(time_sd, quality_sd / worth.value) if worth else None
    t_sum = {n: t_quantile(1 - PROMOTE_ALPHA, n - 1) + t_quantile(POWER, n - 1) for n in (2, 3, 4, 6, 8)}
    card = {
        "pairs": len(pairs), "time_sd": time_sd, "quality_sd": quality_sd, "quality_per_ln_steps": worth and worth.value,
        "quality_sd_in_steps": worth and quality_sd / worth.value, "pair_sd": pair_sd,
        "same_seed_same_bits": all(quality(b, measure) == quality(c, measure) for b, c in pairs),
        "detectable_gain": pair_sd and {n: t * pair_sd / math.sqrt(n) for n, t in t_sum.items()},
        "a_against_a": comparison.judge("again", rows, resumed=True).as_dict(),
        "control": comparison.judge("control", rows, resumed=True, match="free").as_dict(),
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
