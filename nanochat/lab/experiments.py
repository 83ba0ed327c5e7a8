"""What an experiment runs, what it decides, and what it leaves in its folder: verdict.json, runs.csv, report.html."""

import json
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from nanochat.common import format_table, print0
from nanochat.lab import target
from nanochat.lab.cells import Cell, Folder
from nanochat.lab.decide import (
    DECISIONS,
    Verdict,
    good,
    judge,
    judge_series,
    known_quality,
    net_gain,
    number,
    pairs_of,
    quality,
    worth_of_a_step,
)
from nanochat.lab.plan import Variant, interleaved, matched, pilot, shorter
from nanochat.lab.report import write_report
from nanochat.lab.rows import config_of, write_csv
from nanochat.lab.stats import t_quantile
from nanochat.recipe.shape import scaling_params
from nanochat.runtime.files import write_atomic

CALIBRATION = (0.97, 0.94)  # shares of the horizon, beside the whole of it
CALIBRATION_SEEDS = 3       # at most: from there on the seeds' own noise decides
CONTROL = 0.95              # the candidate that only trains less
PILOT = 0.5                 # share of the steps by which a rate is measured, where times are to be equal
SAME = 1e-3                 # relative, of a resumed run; under --device-type=cpu the bits must be equal
SERIES_COLUMNS = ("depth", "model_dim", "num_params", "num_scaling_params", "num_iterations", "tokens_trained",
                  "param_data_ratio", "val_bpb", "core_score", "train_time_sec", "variant", "seed", "status")


@dataclass(frozen=True)
class Contest:
    """A baseline and its candidates in a folder."""
    folder: Folder
    baseline: Variant
    candidates: tuple[Variant, ...]
    match: str = "steps"
    calibrate: bool = True
    control: bool = False           # a hidden candidate that only trains less, which must not be promoted
    horizons: tuple[float, ...] = ()  # shares of the steps at which all are trained too, to extrapolate the time to target

    def run(self, seeds: list[int]) -> dict[str, list[dict]]:
        """Rows by variant name, in the order of the seeds; what is not finished yet is run."""
        contest = self._matched(seeds[0]) if self.match in ("flops", "time") else self
        cells = []
        for i, seed in enumerate(seeds):
            variants = [contest.baseline, *contest.candidates]
            variants += [shorter(v, share, f"{v.name}-{share:.0%}".rstrip("%")) for v in variants for share in self.horizons]
            if self.calibrate and i < CALIBRATION_SEEDS:
                variants += [shorter(contest.baseline, share, f"baseline-{share:.0%}".rstrip("%")) for share in CALIBRATION
                             if share not in self.horizons]
            if self.control:
                variants.append(shorter(contest.baseline, CONTROL, "control"))
            cells += [Cell(v.name, seed, v.flags) for v in interleaved(variants, i)]
        rows: dict[str, list[dict]] = {}
        for cell, row in zip(cells, self.folder.run(cells), strict=True):
            rows.setdefault(cell.variant, []).append(row)
        return rows

    def _matched(self, seed: int) -> "Contest":
        """The candidates at the baseline's FLOPs or time. One that cannot be measured keeps its length, and fails later."""
        timed = [pilot(v, PILOT) for v in self.candidates] if self.match == "time" else []
        first, *measured = self.folder.run([Cell(v.name, seed, v.flags) for v in (self.baseline, *timed)])
        if not good(first):
            print0(f"note: {self.baseline.name} failed, so there is no {self.match} to match: the others keep their length")
            return self
        pilots: list[dict | None] = [*measured] or [None] * len(self.candidates)
        return replace(self, candidates=tuple(
            matched(v, first, row, self.match) if row is None or good(row) else v
            for v, row in zip(self.candidates, pilots, strict=True)))

    def calibration(self, rows: dict[str, list[dict]]) -> list[dict]:
        """The baseline's rows of several horizons, of the seeds that have them."""
        shorter_ones = [row for name, found in rows.items() if name.startswith("baseline-") for row in found]
        seeds = {row["seed"] for row in shorter_ones}
        return [row for row in rows["baseline"] if row["seed"] in seeds] + shorter_ones

    def judge(self, name: str, rows: dict[str, list[dict]], **options) -> Verdict:
        return judge(rows["baseline"], rows[name], self.calibration(rows), match=options.pop("match", self.match),
                     extrapolated=self.extrapolated(name, rows), **options)

    def extrapolated(self, name: str, rows: dict[str, list[dict]]):
        """Intervals of the time to target of the baseline and of `name`, each from its runs of several horizons."""
        if not self.horizons:
            return None
        found = [self.crossing(v, rows) for v in ("baseline", name)]
        known = tuple((c.low, c.high) for c in found if c)
        return known if len(known) == len(found) else None

    def crossing(self, name: str, rows: dict[str, list[dict]]) -> target.Crossing | None:
        """Time to target of a variant, extrapolated across its horizons; also put into its rows."""
        whole = rows[name]
        metric, threshold = whole[0]["target_metric_name"], whole[0]["target_metric_threshold"]
        if metric is None:
            return None
        field = {"val_bpb": "val_bpb", "smooth_loss": "final_train_loss"}[metric]
        found = [row for key, group in rows.items() if key == name or key.rpartition("-")[0] == name for row in group
                 if good(row) and number(row[field])]
        crossing = target.time_to_target([(row["train_time_sec"], row[field]) for row in found], threshold)
        if crossing:
            for row in whole:
                row |= {"time_to_target_sec_extrapolated": crossing.seconds, "time_to_target_sec_low": crossing.low,
                        "time_to_target_sec_high": number(crossing.high), "extrapolation_method": target.METHOD}
                write_atomic(self.folder.path / "cells" / row["cell"] / "row.json", json.dumps(row))
            write_csv(self.folder.path)
        return crossing


def compare(contest: Contest, seeds: list[int], max_seeds: int, always_resume: bool = False) -> tuple[Verdict, dict]:
    """The verdict on the contest's one candidate, and the rows. Seeds are added up to `max_seeds` while it is inconclusive."""
    name, seeds = contest.candidates[0].name, list(seeds)
    looks = max(0, max_seeds - len(seeds)) + 1
    while True:
        rows = contest.run(seeds)
        verdict = contest.judge(name, rows, looks=looks, resumed=True)
        if verdict.decision != "inconclusive" or len(seeds) >= max_seeds:
            break
        print0(f"{verdict}; one more seed")
        seeds.append(max(seeds) + 1)
    resumed, detail = None, ""
    if always_resume or verdict.decision == "promote":
        resumed, detail = try_resume(contest, name, rows)
    verdict = contest.judge(name, rows, looks=looks, resumed=resumed, resume_detail=detail)
    if contest.control:
        blind = contest.judge("control", rows, looks=looks, resumed=True, match="free")
        if blind.decision == "promote":
            why = f"the control, which only trains less, would be promoted too: {blind.why}"
            verdict = replace(verdict, decision="inconclusive", why=why)
    return verdict, rows


def try_resume(contest: Contest, name: str, rows: dict[str, list[dict]]) -> tuple[bool | None, str]:
    """Kill a run of the candidate, resume it, and see whether it comes to where the undisturbed one came."""
    whole = next((row for row in rows[name] if good(row)), None)
    if whole is None:
        return None, ""
    flags, every = whole["flags"], max(1, whole["num_iterations"] // 3)
    resumed, = contest.folder.run([Cell(f"{name}-resumed", whole["seed"], (*flags, f"--save-every={every}"), kill=True)])
    if not resumed["killed_at"]:
        return None, "the run was over before it could be killed: give it more steps"
    tolerance = 0.0 if config_of(flags).run.device_type == "cpu" else SAME
    same = all(resumed[field] == whole[field] or (number(resumed[field]) and number(whole[field]) and math.isclose(
        resumed[field], whole[field], rel_tol=tolerance)) for field in ("final_loss", "val_bpb"))
    detail = f"killed after {resumed['killed_at']}, resumed: {resumed['status']}, " + (
        f"loss {whole['final_loss']} and {whole['val_bpb']} bpb as without" if same else
        f"loss {resumed['final_loss']} and {resumed['val_bpb']} bpb against {whole['final_loss']} and {whole['val_bpb']}")
    return good(resumed) and same, detail


def sweep(contest: Contest, seeds: list[int], max_seeds: int) -> tuple[Verdict, dict, list[dict]]:
    """Screen all candidates on `seeds`, then the best against the baseline on as many fresh ones: only those count.

    The best of many equal cells looks good on the seeds that chose it. Returns verdict, rows, and the ranking.
    """
    rows = contest.run(seeds)
    worth, ranking = worth_of_a_step(contest.calibration(rows)), []
    for v in contest.candidates:
        gain, verdict = net_gain(pairs_of(rows["baseline"], rows[v.name]), worth), contest.judge(v.name, rows, resumed=True)
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
    print0(f"{best} looks best on seeds {seeds}; that chose it, so seeds {fresh} decide")
    final = replace(contest, candidates=tuple(v for v in contest.candidates if v.name == best))
    verdict, confirmed = compare(final, fresh, max_seeds)
    verdict = replace(verdict, why=f"{best}, on fresh seeds: {verdict.why}")
    return verdict, {name: [*rows.get(name, []), *confirmed.get(name, [])] for name in {**rows, **confirmed}}, ranking


def noise(contest: Contest, seeds: list[int]) -> tuple[dict, dict]:
    """The noise card: A against A, and what difference n seeds can tell here. Returns card and rows.

    Time: each seed is run twice, so pairs differ by the machine only. Quality: over seeds, which bounds what pairs of one
    seed differ by, once a change has sent them different ways.
    """
    rows = contest.run(seeds)
    pairs, worth = pairs_of(rows["baseline"], rows["again"]), worth_of_a_step(contest.calibration(rows))
    saved = [math.log(b["train_time_sec"] / c["train_time_sec"]) for b, c in pairs]
    values = [known_quality(row) for row in rows["baseline"] if good(row)]
    if len(pairs) < 2:
        return {"error": "fewer than two pairs were finished"}, rows
    time_sd, quality_sd = statistics.stdev(saved) / math.sqrt(2), statistics.stdev(values)
    pair_sd = math.sqrt(2) * math.hypot(time_sd, quality_sd / worth.value) if worth else None
    card = {
        "pairs": len(pairs), "time_sd": time_sd, "quality_sd": quality_sd, "quality_per_ln_steps": worth and worth.value,
        "quality_sd_in_steps": worth and quality_sd / worth.value, "pair_sd": pair_sd,
        "same_seed_same_bits": all(quality(b) == quality(c) for b, c in pairs),
        "detectable_gain": pair_sd and {n: (t_quantile(0.99, n - 1) + t_quantile(0.8, n - 1)) * pair_sd / math.sqrt(n)
                                        for n in (2, 3, 4, 6, 8)},
        "a_against_a": contest.judge("again", rows, resumed=True).as_dict(),
        "control": contest.judge("control", rows, resumed=True, match="free").as_dict(),
        "control_as_candidate": contest.judge("control", rows, resumed=True).as_dict(),
    }
    return card, rows


def series(contests: dict[int, Contest], seeds: list[int], max_seeds: int) -> tuple[Verdict, dict, list[dict]]:
    """Baseline against candidate over depths. Returns the verdict, the verdicts by depth, and rows of SERIES_COLUMNS."""
    verdicts, table = {}, []
    for depth, contest in contests.items():
        verdicts[depth], rows = compare(contest, seeds, max_seeds)
        print0(f"d{depth}: {verdicts[depth]}")
        for name in ("baseline", contest.candidates[0].name):
            table += [series_row(row, contest) for row in rows[name]]
    return judge_series(verdicts), verdicts, table


def series_row(row: dict, contest: Contest) -> dict:
    shape = config_of(list(contest.baseline.flags)).model.shape(contest.folder.vocab_size())
    params, tokens = scaling_params(shape), row["tokens_seen"]
    return {"depth": row["depth"], "model_dim": row["model_dim"], "num_params": row["num_params"], "num_scaling_params": params,
            "num_iterations": row["num_iterations"], "tokens_trained": tokens,
            "param_data_ratio": tokens and round(tokens / params, 2),
            "val_bpb": row["val_bpb"], "core_score": None, "train_time_sec": row["train_time_sec"],
            "variant": row["variant"], "seed": row["seed"], "status": row["status"], "flops_per_token": row["flops_per_token"]}


# --- what is shown and left ----------------------------------------------------------------------------------------


def summary(rows: list[dict]) -> dict:
    """A variant's rows in one: medians over the seeds that ended well."""
    fine = [row for row in rows if good(row)]

    def median(field):
        known = [row[field] for row in fine if number(row[field]) is not None]
        return statistics.median(known) if known else None
    return {"runs": f"{len(fine)}/{len(rows)}", "steps": median("steps_done"), "train_time_sec": median("train_time_sec"),
            "tok_per_sec": median("tok_per_sec_median"), "final_train_loss": median("final_train_loss"),
            "val_bpb": median("val_bpb"), "time_to_target_sec": median("time_to_target_sec_measured"),
            "peak_mem_mib": median("peak_mem_mib")}


def table(rows: dict[str, list[dict]]) -> str:
    return format_table([{"variant": name, **summary(found)} for name, found in rows.items() if name != "control"])


def leave(folder: Folder, verdict: Verdict, rows: dict[str, list[dict]], about: str, extra: dict | None = None) -> int:
    """Write verdict.json and report.html, print the table and the verdict. The exit status: 1 where a run failed."""
    assert verdict.decision in DECISIONS
    record = verdict.as_dict() | {"about": about, "line": str(verdict)} | (extra or {})
    record["variants"] = {name: summary(found) for name, found in rows.items()}
    write_atomic(folder.path / "verdict.json", json.dumps(record, indent=1) + "\n")
    write_csv(folder.path)
    write_report(folder.path)
    print0("\n" + table(rows) + "\n")
    for gate in verdict.gates:
        print0(f"{gate.outcome.ljust(8)}{gate.name}: {gate.detail}")
    print0(f"report: {folder.path / 'report.html'}")
    print0(str(verdict))
    return int(any(not good(row) for found in rows.values() for row in found))


def read_verdict(path: Path) -> dict:
    try:
        return json.loads((path / "verdict.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
