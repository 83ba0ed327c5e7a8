"""Experiments on simulated runs: which cells are run, how the best is confirmed on fresh seeds, which outputs are written."""

import json
import math
import random
import re
import zlib

import pytest

from dev.lab_error_rates import WORTH, simulate
from nanochat.lab import experiments
from nanochat.lab.experiments import Comparison
from nanochat.lab.outputs import write_outputs
from nanochat.lab.plan import Variant, make_variants, read_profile, read_template
from nanochat.lab.report import write_report
from nanochat.lab.rows import COLUMNS, config_of, read_rows

SMOKE = read_profile("cpu-smoke")
COSINE = {"candidate": "--warmdown-shape=cosine"}


class SimulatedFolder:
    """A folder whose cells are simulated instead of trained. `truths`: parameters of `simulate` by variant."""

    def __init__(self, path, noise=0.01, target=1.006, **truths):
        self.path, self.name, self.truths, self.noise, self.target, self.processes = path, "simulated", truths, noise, target, 1
        self.order = []  # cells run
        self.stored = {}

    def vocab_size(self):
        return 512

    def run(self, cells):
        return [self.stored.setdefault(cell.id, self.train(cell)) for cell in cells]

    def other_seeds(self, cells):
        asked, known = {(cell.variant, cell.seed) for cell in cells}, {cell.variant for cell in cells}
        return {name: [seed for variant, seed in self.order if variant == name and (name, seed) not in asked] for name in known}

    def train(self, cell):
        if cell.id not in self.stored:
            self.order.append((cell.variant, cell.seed))
        config = config_of(list(cell.flags))
        steps = config.horizon.num_iterations
        if steps < 0:
            steps = round(config.horizon.target_flops / (config.horizon.total_batch_size * 1e6))
        variant = re.sub(r"^pilot-|-resumed$|-\d\d$", "", cell.variant)
        truth = self.truths.get(variant.replace("-", "_"), {})
        rng = random.Random(zlib.crc32(f"{cell.variant.removesuffix('-resumed')} {cell.seed}".encode()))
        done = simulate(rng, cell.seed, steps=steps / 100, noise=self.noise, target=self.target, **truth)
        row = dict.fromkeys(COLUMNS) | done
        row |= {"steps_done": steps, "num_iterations": steps, "tokens_seen": steps * config.horizon.total_batch_size,
                "cell": cell.id, "variant": cell.variant, "flags": cell.flags, "depth": config.model.depth,
                "val_curve": [[0, 0.0, 4.0], [steps, 1.0, row["val_bpb"]]], "timestamp": "2026",
                "tok_per_sec_median": done["tokens_seen"] / done["train_time_sec"], "peak_mem_mib": 700.0,
                "final_loss": row["final_train_loss"], "killed_at": "step_000033" if cell.kill else None,
                "command": "python -m scripts.base_train", "target_metric_name": config.eval.target_metric_name,
                "target_metric_threshold": config.eval.target_metric_threshold} | truth.get("row", {})
        folder = self.path / "cells" / cell.id
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "row.json").write_text(json.dumps(row))
        return row


def comparison(folder, candidates=COSINE, match="steps", **options):
    base, found = make_variants(SMOKE, "", candidates, match)
    return Comparison(folder, base, tuple(found), match, **{"clock": False} | options)


def test_variants_take_turns_over_paired_seeds(tmp_path):
    folder = SimulatedFolder(tmp_path)
    comparison(folder).run([1, 2])
    assert folder.order == [("baseline", 1), ("candidate", 1), ("baseline-95", 1), ("baseline-90", 1),
                            ("baseline-90", 2), ("baseline-95", 2), ("candidate", 2), ("baseline", 2)]


def test_seeds_are_added_until_it_is_decided_and_resume_is_checked_before_promoting(tmp_path):
    folder = SimulatedFolder(tmp_path, candidate={"pace": 0.93})
    verdict, rows = experiments.compare(comparison(folder), [1, 2], 6)
    assert verdict.decision == "promote" and 2 < len(rows["candidate"]) <= 6
    assert ("candidate-resumed", 1) in folder.order
    assert {g.name: g.outcome for g in verdict.gates}["resume"] == "pass"


def test_a_candidate_that_does_not_resume_is_rejected(tmp_path):
    folder = SimulatedFolder(tmp_path, candidate={"pace": 0.93})
    original = folder.train
    folder.train = lambda cell: original(cell) | ({"val_bpb": 1.2345} if cell.kill else {})
    verdict, _ = experiments.compare(comparison(folder), [1, 2], 6)
    assert verdict.decision == "reject" and {g.name: g.outcome for g in verdict.gates}["resume"] == "fail"


def test_resume_is_not_checked_for_a_reject(tmp_path):
    folder = SimulatedFolder(tmp_path, candidate={"better": -0.2})
    verdict, rows = experiments.compare(comparison(folder), [1, 2], 6)
    assert verdict.decision == "reject" and len(rows["candidate"]) <= 3
    assert not any(name.endswith("resumed") for name, _ in folder.order)


def test_nothing_is_promoted_where_the_control_is(tmp_path):
    """The simulated machine is wrong: shorter runs are better. Then none of its verdicts can be trusted."""
    folder = SimulatedFolder(tmp_path, candidate={"pace": 0.93}, control={"better": 0.2})
    verdict, _ = experiments.compare(comparison(folder, control=True), [1, 2], 6)
    assert verdict.decision == "inconclusive"
    correct = SimulatedFolder(tmp_path / "b", candidate={"pace": 0.93})
    assert experiments.compare(comparison(correct, control=True), [1, 2], 6)[0].decision == "promote"


def test_the_best_of_a_sweep_is_judged_on_fresh_seeds_only(tmp_path):
    """Of eight equal variants on noisy runs one is always the best. On fresh seeds it is not."""
    read = read_template("B")
    folder = SimulatedFolder(tmp_path, noise=0.02)
    base, found = make_variants(SMOKE, "", read.variants, read.match)
    verdict, rows, ranking = experiments.sweep(Comparison(folder, base, tuple(found), clock=False), [1, 2], 2)
    assert verdict.decision != "promote"
    best = ranking[0]["variant"]
    assert ranking[0]["net_gain"] == max(r["net_gain"] for r in ranking) > 0
    assert [row["seed"] for row in rows[best]] == [1, 2, 3, 4]
    assert {seed for name, seed in folder.order if name not in (best, "baseline", "baseline-95", "baseline-90")} == {1, 2}


def test_a_sweep_finds_a_real_gain(tmp_path):
    folder = SimulatedFolder(tmp_path, lr_x1_1={"pace": 0.9})
    folder.truths["lr-x1.1_wd-x1.0".replace("-", "_")] = {"pace": 0.9}
    base, found = make_variants(SMOKE, "", read_template("D").variants, "steps")
    verdict, _, ranking = experiments.sweep(Comparison(folder, base, tuple(found), clock=False), [1, 2, 3], 6)
    assert ranking[0]["variant"] == "lr-x1.1_wd-x1.0" and verdict.decision == "promote"


def test_equal_time_gives_a_faster_candidate_more_steps(tmp_path):
    folder = SimulatedFolder(tmp_path, noise=0.0, candidate={"pace": 0.5})
    rows = comparison(folder, match="time").run([1, 2])
    assert ("pilot-candidate", 1) in folder.order and ("pilot-candidate", 2) not in folder.order
    assert [row["steps_done"] for row in rows["candidate"]] == [200, 200]
    assert rows["candidate"][0]["train_time_sec"] == pytest.approx(rows["baseline"][0]["train_time_sec"])


def test_equal_flops_gives_a_larger_batch_fewer_steps(tmp_path):
    folder = SimulatedFolder(tmp_path, noise=0.0)
    rows = comparison(folder, {"candidate": "--total-batch-size=x2"}, match="flops").run([1])
    assert rows["candidate"][0]["steps_done"] == 50
    assert rows["candidate"][0]["tokens_seen"] == rows["baseline"][0]["tokens_seen"]


def test_a_target_that_no_run_reached_is_extrapolated_across_horizons(tmp_path):
    folder = SimulatedFolder(tmp_path, noise=0.001, target=0.5, candidate={"pace": 0.8})
    profile = [*SMOKE, "--target-metric-threshold=0.99"]
    base, found = make_variants(profile, "", {"candidate": "--warmdown-shape=cosine"}, "steps")
    made = Comparison(folder, base, tuple(found), horizons=(0.25, 0.5, 0.71), clock=False)
    rows = made.run([1, 2])
    saving = made.extrapolated("candidate", rows)
    assert abs(saving.mean + math.log(0.8)) < saving.margin(0.01) < 0.02
    truth = 100 * math.exp(0.01 / WORTH)  # where 1 - 0.12 ln(steps) meets 0.99; a logarithm is not exactly a power law
    for side, share in (("baseline", 1.0), ("candidate", 0.8)):
        row = rows[side][0]
        assert 0.95 * row["time_to_target_sec_low"] < share * truth < 1.05 * row["time_to_target_sec_high"]
        assert row["extrapolation_method"] and row["time_to_target_sec_measured"] is None
    verdict = made.judge("candidate", rows, resumed=True)
    assert verdict.gates[0].name == "time to target (extrapolated)" and verdict.gates[0].outcome == "pass"


@pytest.mark.parametrize("pace, passed", [(0.95, 0.9), (1.0, 0.1)])
def test_an_extrapolated_gain_of_five_percent_is_found_and_none_is_not(tmp_path, pace, passed):
    """With a noise of 1 % a run and two seeds at four horizons."""
    found = 0
    for i in range(20):
        folder = SimulatedFolder(tmp_path / str(i), noise=0.01, target=0.5, candidate={"pace": pace})
        base, variants = make_variants([*SMOKE, "--target-metric-threshold=0.99"], "", COSINE, "steps")
        made = Comparison(folder, base, tuple(variants), horizons=(0.25, 0.5, 0.71), clock=False)
        rows = made.run([10 * i, 10 * i + 1])
        found += made.judge("candidate", rows, resumed=True).gates[0].outcome == "pass"
    assert found >= 20 * passed if pace < 1 else found <= 20 * passed


def test_the_worth_of_a_step_is_that_at_the_end_of_the_horizon(tmp_path):
    """Runs of half the horizon learn more by a step than whole ones, and would make a candidate that trains less look good."""
    made = comparison(SimulatedFolder(tmp_path), horizons=(0.25, 0.5, 0.71))
    rows = made.run([1, 2])
    assert {"baseline-25", "baseline-50", "baseline-71", "baseline-95", "baseline-90"} < set(rows)
    assert {row["variant"] for row in made.calibration(rows)} == {"baseline", "baseline-95", "baseline-90"}


STEPS_OF_A_RUN = {step: {"step": step, "loss": 3 - step / 100, "batch_crc32": 1000 + step} for step in range(100)}


@pytest.mark.parametrize("changed, problem", [
    ({}, None), ({33: {"loss": 2.67001}}, "first step, 33"), ({70: {"batch_crc32": 7}}, "step 70 has another batch"),
    ({10: {"batch_crc32": 7}}, None)])  # before the checkpoint: not what was resumed
def test_a_resume_is_checked_by_its_batches_and_its_first_loss(changed, problem):
    resumed = {step: row | changed.get(step, {}) for step, row in STEPS_OF_A_RUN.items()}
    found = experiments.continues_otherwise(STEPS_OF_A_RUN, resumed, 33, 0.0)
    assert found is None if problem is None else problem in found
    del resumed[99]
    assert experiments.continues_otherwise(STEPS_OF_A_RUN, resumed, 33, 0.0)


def test_the_noise_card_finds_the_noise(tmp_path):
    folder = SimulatedFolder(tmp_path, noise=0.02)
    base, _ = make_variants(SMOKE, "", {}, "steps")
    card, _ = experiments.noise(Comparison(folder, base, (Variant("again", base.flags),), control=True), list(range(60)))
    assert card["time_sd"] == pytest.approx(0.012, rel=0.3) and card["quality_sd"] == pytest.approx(0.016 * WORTH, rel=0.3)
    gains = list(card["detectable_gain"].values())
    assert gains == sorted(gains, reverse=True) and card["a_against_a"]["decision"] != "promote"
    assert card["control"]["decision"] != "promote" and card["control_as_candidate"]["decision"] == "reject"


def test_a_series_over_depths(tmp_path):
    made = {}
    for depth in (2, 4):
        base, found = make_variants(SMOKE, f"--depth={depth}", {"candidate": "--warmdown-shape=cosine"}, "steps")
        folder = SimulatedFolder(tmp_path / str(depth), noise=0.005, candidate={"pace": 0.93})
        made[depth] = Comparison(folder, base, tuple(found), clock=False)
    verdict, by_depth, table = experiments.series(made, [1, 2], 6)
    assert verdict.decision == "promote" and set(by_depth) == {2, 4}
    assert {(row["depth"], row["variant"]) for row in table} == {(d, v) for d in (2, 4) for v in ("baseline", "candidate")}
    assert all(row["param_data_ratio"] == round(51200 / row["num_scaling_params"], 2) for row in table)
    assert table[-1]["num_scaling_params"] > table[0]["num_scaling_params"]


def test_a_candidate_with_the_same_bits_is_said_to_change_nothing_after_one_seed(tmp_path):
    bits = {"row": {"weights_sha256": "the same"}}
    folder = SimulatedFolder(tmp_path, candidate=bits, baseline=bits)
    verdict, rows = experiments.compare(comparison(folder), [1, 2], 6)
    assert verdict.decision == "no change" and len(rows["candidate"]) == 1
    assert experiments.compare(comparison(folder, judge_time=True), [1, 2], 6)[0].decision in ("inconclusive", "keep optional")


def test_seeds_that_were_run_and_are_left_out_count_all_the_same(tmp_path):
    """Of eight seeds the best-looking two would be a gain; all eight are none."""
    folder = SimulatedFolder(tmp_path, noise=0.02)
    made = comparison(folder)
    made.run(list(range(8)))
    _, rows = experiments.compare(made, [2, 5], 2)
    assert sorted(row["seed"] for row in rows["candidate"]) == list(range(8))


def test_a_sweep_halves_its_variants_after_each_seed(tmp_path):
    folder = SimulatedFolder(tmp_path, noise=0.001, **{"lr_x1.1_wd_x1.0": {"pace": 0.9}})
    base, found = make_variants(SMOKE, "", read_template("D").variants, "steps")
    experiments.sweep(Comparison(folder, base, tuple(found), clock=False), [1, 2, 3], 3)
    screened = [sum(seed == s and name in {v.name for v in found} for name, seed in folder.order) for s in (1, 2, 3)]
    assert screened == [8, 4, 2]


@pytest.mark.slow
def test_outputs_and_exit_status(tmp_path, capsys):
    diverged = {"status": "diverged", "val_bpb": "nan", "error": "step 3 was not taken"}
    folder = SimulatedFolder(tmp_path, candidate={"row": diverged})
    made = comparison(folder)
    verdict, rows = experiments.compare(made, [1, 2], 2)
    assert write_outputs(folder.path, verdict, rows, "a test") == 1 and verdict.decision == "reject"
    assert capsys.readouterr().out.splitlines()[-1] == str(verdict)
    assert json.loads((tmp_path / "verdict.json").read_text())["decision"] == "reject"
    assert len(read_rows(tmp_path)) == 8 and (tmp_path / "runs.csv").read_text().count("\n") == 9
    assert write_report(tmp_path).exists()
