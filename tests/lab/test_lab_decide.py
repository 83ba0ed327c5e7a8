"""Verdicts on simulated runs with known truth: error rates, power, and a better candidate is never judged worse."""

import math
import random

import pytest
from hypothesis import given, settings, strategies as st

from dev.lab_error_rates import TARGET, WORLDS, WORTH, World, experiment, experiments, simulate
from nanochat.lab.clock import Clock
from nanochat.lab.decide import DECISIONS, judge, judge_series
from nanochat.lab.gain import (
    ALIKE,
    measure_of,
    net_gain,
    pairs_of,
    quality_lost,
    same_bits,
    time_saved,
    worth_of_a_step,
)
from nanochat.lab.gates import (
    FALLBACK_GAIN,
    gate_audit,
    gate_clock,
    gate_evaluated,
    gate_matched,
    gate_non_inferior,
    gate_stable,
    gate_time_to_target,
    log_ratio,
)
from nanochat.lab.stats import Estimate


def at_most(count: int, n: int, rate: float) -> bool:
    """Whether `count` of `n` is no evidence of more than `rate` (one-sided, three standard errors)."""
    return count <= n * rate + 3 * math.sqrt(n * rate * (1 - rate))


@pytest.mark.slow
def test_no_difference_and_less_training_are_promoted_in_at_most_one_percent():
    """Over all looks, under each noise, with and without a target. Truly equal candidates are seldom rejected, either."""
    n, all_promoted, cells = 60, 0, 0
    for world in (*WORLDS.values(), World(hosts=2), World(hosts=2, clock=None)):
        for target in (None, TARGET):
            for truth in ({}, {"steps": 0.965}):
                found = [verdict.decision for verdict, _ in experiments(n, world, target=target, **truth)]
                assert at_most(found.count("promote"), n, 0.01), (world, truth, target)
                assert truth or at_most(found.count("reject"), n, 0.05), (world, target)
                all_promoted, cells = all_promoted + found.count("promote"), cells + 1
    assert at_most(all_promoted, n * cells, 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("truth", [{"pace": 0.95}, {"better": -math.log(0.95)}], ids=["faster", "better"])
def test_a_true_five_percent_is_promoted_in_nine_of_ten_with_six_runs(truth):
    n, all_missed, cells = 60, 0, 0
    for name, world in WORLDS.items():
        for target in (None, TARGET) if world.pair == 0.02 else (None,):
            found = experiments(n, world, target=target, **truth)
            missed = sum(verdict.decision != "promote" for verdict, _ in found)
            assert at_most(missed, n, 0.1), (name, missed)
            assert sorted(seeds for _, seeds in found)[n // 2] <= 6, name
            all_missed, cells = all_missed + missed, cells + 1
    assert all_missed <= 0.1 * n * cells


@pytest.mark.slow
def test_a_true_gain_of_one_and_a_half_percent_is_not_called_three():
    for world in (World(), World(pair=0.02), World(clock=None), World(tails=True)):
        for target in (None, TARGET):
            found = experiments(150, world, target=target, pace=0.985)
            called = sum(v.decision == "promote" and v.gain.mean >= FALLBACK_GAIN for v, _ in found)
            assert at_most(called, 150, 0.05), (world, target)


def test_two_seeds_alone_promote_no_noise():
    found = experiments(300, World(pair=0.04), most=2, target=TARGET)
    assert not any(verdict.decision == "promote" for verdict, _ in found)


def test_a_candidate_that_trains_less_is_rejected_at_equal_steps():
    rng = random.Random(1)
    verdict, n = experiment(rng, match="steps", steps=0.95, pace=0.9, better=0.3)  # however good it looks
    assert verdict.decision == "reject" and n == 2 and any(g.name == "equal steps" and g.outcome == "fail" for g in verdict.gates)


def constant_experiment(saved, lost, wobble, n=4, target=False):
    """Rows with these means of time saved (ln) and quality lost (bpb) per pair, and differences of `wobble` between pairs."""
    rng = random.Random(3)
    base = [simulate(rng, s, noise=0) for s in range(n)]
    other = []
    for s in range(n):
        d, q = saved + wobble * (s - (n - 1) / 2), lost + WORTH * wobble * ((s * 7) % n - (n - 1) / 2)
        row = simulate(rng, s, noise=0, pace=math.exp(-d), better=-q / WORTH)
        other.append(row | ({"time_to_target_sec_measured": 90 * math.exp(-d + q / WORTH)} if target else {}))
    if target:
        base = [row | {"time_to_target_sec_measured": 90.0} for row in base]
    shorter = [simulate(random.Random(s), s, steps=share, noise=0.0005) for s in range(3) for share in (0.95, 0.9)]
    return base, other, [*base[:3], *shorter]


changes = dict(saved=st.floats(-0.2, 0.2), lost=st.floats(-0.02, 0.02), wobble=st.floats(0.0005, 0.03), target=st.booleans())
ORDER = {name: i for i, name in enumerate(DECISIONS)}


@settings(max_examples=150)
@given(**changes, faster=st.floats(0, 0.1), better=st.floats(0, 0.01))
def test_a_strictly_better_candidate_is_not_judged_worse(saved, lost, wobble, target, faster, better):
    """Faster and better by a constant: the decision is the same, or later in DECISIONS."""
    before = judge(*constant_experiment(saved, lost, wobble, target=target), match="free", resumed=True)
    after = judge(*constant_experiment(saved + faster, lost - better, wobble, target=target), match="free", resumed=True)
    assert ORDER[after.decision] >= ORDER[before.decision], (before.why, after.why)


@settings(max_examples=150)
@given(**changes)
def test_every_decision_has_its_reasons(saved, lost, wobble, target):
    rows = constant_experiment(saved, lost, wobble, target=target)
    verdict = judge(*rows, match="free", resumed=True)
    outcomes = {g.name: g.outcome for g in verdict.gates}
    if verdict.decision == "promote":
        assert set(outcomes.values()) == {"pass"} and verdict.gain.promotion_bound > 0
        assert judge(*rows, match="free", resumed=False).decision == "reject"
        assert judge(*rows, match="free", resumed=None).decision == "inconclusive"
    if verdict.decision == "reject":
        assert "fail" in outcomes.values() or verdict.gain.mean < -FALLBACK_GAIN
    assert str(verdict).startswith(f"verdict: {verdict.decision} (") and str(verdict).endswith(")")


def test_net_gain_by_hand():
    """5 % less time and 0.006 bpb lost, where a unit of ln(steps) is worth 0.12: 0.0513 - 0.05."""
    base = [simulate(random.Random(0), s, noise=0) for s in (1, 2)]
    other = [simulate(random.Random(0), s, noise=0, pace=0.95, better=-0.05) for s in (1, 2)]
    shorter = [simulate(random.Random(0), s, noise=0, steps=share) for s in (1, 2) for share in (0.95, 0.9)]
    worth = worth_of_a_step(base + shorter, "lab_val_bpb")
    assert worth.value == pytest.approx(WORTH) and worth.low == pytest.approx(WORTH) == pytest.approx(worth.high)
    assert net_gain(pairs_of(base, other), worth, "lab_val_bpb").mean == pytest.approx(-math.log(0.95) - 0.05)


def test_pairs_have_one_seed_and_both_runs_succeeded():
    rng = random.Random(0)
    base = [simulate(rng, 1), simulate(rng, 2), simulate(rng, 3, status="failed")]
    other = [simulate(rng, 3), simulate(rng, 2), simulate(rng, 4)]
    assert [(b["seed"], c["seed"]) for b, c in pairs_of(base, other)] == [(2, 2)]


@pytest.mark.parametrize("field", ALIKE)
def test_runs_under_other_conditions_are_no_pair(field):
    """However good the candidate looks, a seed that was run elsewhere, or on other text, neither counts nor is forgotten."""
    base, other, calibration = constant_experiment(0.06, 0.0, 0.001)
    assert judge(base, other, calibration, resumed=True).decision == "promote"
    moved = [row | {field: "another"} for row in other]
    assert not pairs_of(base, moved) and judge(base, moved, calibration, resumed=True).decision == "inconclusive"
    verdict = judge(base, [moved[0], *other[1:]], calibration, resumed=True)
    assert len(pairs_of(base, [moved[0], *other[1:]])) == len(base) - 1 and verdict.decision == "inconclusive"
    before = base[0].get(field)
    assert verdict.why.startswith(f"same conditions: seed {base[0]['seed']}: {ALIKE[field]} {before} against another")


def test_bits_per_byte_never_stand_against_a_loss_in_nats_nor_the_labs_against_a_runs_own():
    """The same bits on both sides; one run of one side was not evaluated."""
    base, other, calibration = constant_experiment(0.0, 0.0, 0.0)
    own = [[row | {"lab_val_bpb": None} for row in rows] for rows in (base, other, calibration)]
    own[1][0] |= {"val_bpb": None, "final_train_loss": base[0]["final_train_loss"]}
    verdict = judge(*own, resumed=True)
    assert measure_of(*own[:2]) == "final_train_loss" and measure_of(base, other) == "lab_val_bpb"
    assert verdict.gain.mean == pytest.approx(0.0, abs=1e-9) and verdict.decision != "promote"
    other[0] |= {"lab_val_bpb": None, "val_bpb": 0.5}
    verdict = judge(base, other, calibration, resumed=True)
    assert verdict.decision == "inconclusive" and verdict.gain is None
    assert {g.name: g.detail for g in verdict.gates}["evaluated by the lab"] == "not known: candidate, seed 0"


def test_a_candidate_that_evaluates_itself_better_than_the_lab_gains_nothing():
    base, other, calibration = constant_experiment(0.0, 0.0, 0.001)
    lying = [row | {"val_bpb": row["val_bpb"] - 0.4} for row in other]
    verdict = judge(base, lying, calibration, resumed=True)
    assert verdict.gain == judge(base, other, calibration, resumed=True).gain and verdict.decision != "promote"
    assert gate_evaluated(pairs_of(base, lying), "lab_val_bpb").outcome == "unclear"
    assert gate_evaluated(pairs_of(base, other), "lab_val_bpb").outcome == "pass"


HONEST = {"steps": 12, "changed_between_steps": [], "batches_drawn": 24, "batches_declared": 24, "backward_calls": 24,
          "backward_declared": 24}


@pytest.mark.parametrize("cheat, found", [
    ({}, None), ({"changed_between_steps": [0, 7]}, "before step 0, 7"), ({"batches_drawn": 27}, "27 batches instead of 24"),
    ({"backward_calls": 30}, "30 backward passes instead of 24")])
def test_training_that_is_not_declared_is_rejected(cheat, found):
    base, other, calibration = constant_experiment(0.2, -0.01, 0.001)
    audited = [row | {"audit": HONEST | cheat} for row in other]
    gate, verdict = gate_audit(audited), judge(base, audited, calibration, resumed=True)
    assert gate_audit(other) is None and verdict.decision == ("reject" if found else "promote")
    assert gate.outcome == ("fail" if found else "pass") and (not found or found in gate.detail)


def test_the_clock_tells_the_time_and_whole_runs_do_not_matter():
    """Whole runs on a busy machine; steps in turn are 5 % faster, or are not known."""
    base, other, calibration = constant_experiment(0.0, 0.0, 0.001)
    slowed = [row | {"train_time_sec": 200.0 + 40 * row["seed"]} for row in other]
    clock = Clock(0.05, 0.002, 8, 3, 0, "")
    verdict = judge(base, slowed, calibration, clock=clock, resumed=True)
    assert verdict.decision == "promote" and verdict.time == Estimate(0.05, 0.002, 8)
    assert judge(base, slowed, calibration, resumed=True).decision != "promote"
    unknown = judge(base, slowed, calibration, clock=Clock(0.0, math.inf, 0, 0, 30, "other programs used 40 %"), resumed=True)
    assert unknown.decision == "inconclusive" and "40 %" in unknown.why
    fewer = [row | {"steps_done": 950} for row in other]
    assert time_saved(pairs_of(base, fewer), clock).mean == pytest.approx(0.05 - math.log(0.95))


def test_a_whole_run_beside_other_programs_is_not_believed():
    base, other, calibration = constant_experiment(0.06, 0.0, 0.001)
    other[1] |= {"other_load": 0.4}
    assert gate_clock(pairs_of(base, other), None).outcome == "unclear"
    assert judge(base, other, calibration, resumed=True).decision == "inconclusive"


def test_time_under_no_name_counts():
    base, other, calibration = constant_experiment(0.06, 0.0, 0.001)
    hidden = [row | {"unnamed_time_sec": 0.06 * row["train_time_sec"]} for row in other]
    assert time_saved(pairs_of(base, hidden), None).mean == pytest.approx(0.06 - math.log(1.06), abs=1e-3)
    assert judge(base, hidden, calibration, resumed=True).decision != "promote"


def test_the_same_bits_are_no_change_and_their_time_alone_counts():
    base, other, calibration = constant_experiment(0.0, 0.0, 0.0)
    bits = [[row | {"weights_sha256": f"w{row['seed']}"} for row in rows] for rows in (base, other)]
    assert same_bits(pairs_of(*bits)) and not same_bits(pairs_of(base, other))
    assert judge(*bits, calibration, resumed=True, judge_time=False).decision == "no change"
    one = [rows[:1] for rows in bits]  # more seeds would tell nothing more
    assert quality_lost(pairs_of(*one), "lab_val_bpb") == Estimate(0.0, 0.0, math.inf)
    assert judge(*one, [], clock=Clock(0.04, 0.002, 8, 3, 0, ""), resumed=True).decision == "promote"
    assert judge(*one, [], clock=Clock(0.0, 0.002, 8, 3, 0, ""), resumed=True).decision == "keep optional"
    few = [simulate(random.Random(s), 0, steps=share, noise=0.5) for s, share in ((0, 1.0), (1, 0.95), (2, 0.9))]
    assert math.isfinite(judge(*one, few, clock=Clock(0.04, 0.002, 8, 3, 0, ""), resumed=True).gain.high)  # k does not matter


@pytest.mark.parametrize("baseline, candidate, expected", [
    (10.0, 10.0, 0.0), (0.0, 0.0, 0.0), (0.0, 5.0, math.inf), (5.0, 0.0, -math.inf), (None, 0.0, -math.inf),
    (0.0, None, math.inf), (10.0, 5.0, -math.log(2))])
def test_a_target_met_before_the_first_step_is_no_target_that_was_never_met(baseline, candidate, expected):
    assert log_ratio(baseline, candidate) == pytest.approx(expected)


@pytest.mark.parametrize("fields", [{"status": "diverged"}, {"status": "oom"}, {"skipped_steps": 1}, {"rollbacks": 1},
                                    {"min_val_bpb": 0.98, "val_bpb": 1.0}])
def test_instability_is_rejected_however_good_the_rest(fields):
    rng = random.Random(0)
    base = [simulate(rng, s) for s in (1, 2)]
    other = [simulate(rng, seed, pace=0.5, **fields) for seed in (1, 2)]
    assert gate_stable(base, other).outcome == "fail"
    assert judge(base, other, [], resumed=True).decision == "reject"


@pytest.mark.parametrize("failed, of, baseline_failed, baseline_of, outcome", [
    (1, 2, 0, 2, "pass"), (2, 2, 0, 2, "fail"), (1, 1, 0, 1, "fail"), (1, 6, 0, 12, "pass"), (2, 6, 0, 12, "unclear"),
    (3, 8, 0, 20, "unclear"), (4, 8, 0, 20, "fail"), (2, 6, 3, 12, "pass"), (2, 2, 2, 2, "unclear"),
    (6, 6, 4, 6, "unclear"), (20, 20, 11, 20, "fail")])
def test_divergence_is_a_rate_on_both_sides(failed, of, baseline_failed, baseline_of, outcome):
    sides = [[{"seed": i, "status": "diverged" if i < bad else "ok"} for i in range(n)]
             for bad, n in ((baseline_failed, baseline_of), (failed, of))]
    assert gate_stable(*sides).outcome == outcome


def test_a_failure_that_was_run_again_is_not_forgotten():
    rng = random.Random(0)
    base, again = ([simulate(rng, seed, **fields) for seed in (1, 2)] for fields in ({}, {"failures_before": 1}))
    assert gate_stable(base, again).outcome == "fail"


def test_rising_validation_is_accepted_where_the_baselines_rises_too():
    rng = random.Random(0)
    rose, held = ([simulate(rng, s, min_val_bpb=lowest, val_bpb=1.0) for s in (1, 2)] for lowest in (0.97, 0.995))
    assert [gate_stable(*rows).outcome for rows in ((rose, rose), (held, rose), (rose, held))] == ["pass", "fail", "pass"]


@pytest.mark.parametrize("lost, outcome", [(0.0049, "pass"), (0.0051, "fail"), (-0.1, "pass")])
def test_the_validation_margin_is_exact(lost, outcome):
    pairs = [({"val_bpb": 1.0 + s}, {"val_bpb": 1.0 + s + lost}) for s in (0.0, 0.01, 0.02)]
    assert gate_non_inferior(pairs, "margin", "val_bpb", absolute=0.005).outcome == outcome


def test_a_margin_exceeded_within_the_noise_is_unclear():
    pairs = [({"final_train_loss": 2.0}, {"final_train_loss": loss}) for loss in (1.98, 2.10)]
    assert gate_non_inferior(pairs, "margin", "final_train_loss", relative=0.01).outcome == "unclear"
    assert gate_non_inferior([({"val_bpb": None}, {"val_bpb": None})], "margin", "val_bpb", absolute=0.005) is None


def timed(*times):
    return [({"time_to_target_sec_measured": b}, {"time_to_target_sec_measured": c}) for b, c in times]


@pytest.mark.parametrize("pairs, extrapolated, outcome", [
    (timed((10, 9), (10, 9.5)), None, "pass"),
    (timed((10, 9), (10, 10.5)), None, "unclear"),
    (timed((10, 11), (10, 10.5)), None, "fail"),
    (timed((10, None), (10, None)), None, "fail"),
    (timed((None, 10), (None, 10)), None, "pass"),
    (timed((10, 9)), None, "unclear"),
    (timed((None, None), (None, None)), Estimate(0.05, 0.01, 10), "pass"),
    (timed((None, None), (None, None)), Estimate(0.05, 0.04, 10), "unclear"),
    (timed((None, None), (None, None)), Estimate(-0.05, 0.01, 10), "fail"),
])
def test_time_to_target(pairs, extrapolated, outcome):
    assert gate_time_to_target(pairs, None, extrapolated).outcome == outcome


def test_with_a_clock_the_time_to_target_is_a_share_of_the_training():
    """The candidate's run was slowed down by others, and met the target at the same step; by the clock a step is 5 % faster."""
    rows = [{"time_to_target_sec_measured": at * scale, "train_time_sec": 100 * scale, "steps_done": 100} for at, scale in (
        (80, 1), (80, 1.5), (70, 1), (70, 1.4))]
    pairs = [(rows[0], rows[1]), (rows[2], rows[3])]
    assert gate_time_to_target(pairs).outcome == "fail"
    gate = gate_time_to_target(pairs, Clock(0.05, 0.01, 8, 3, 0, ""))
    assert gate.outcome == "pass" and gate.detail.startswith(f"{math.exp(-0.05):.3f}")


@pytest.mark.parametrize("saved, outcome", [(0.01, "pass"), (-0.01, "pass"), (0.05, "unclear"), (-0.05, "unclear")])
def test_equal_times_are_checked(saved, outcome):
    base, other, _ = constant_experiment(saved, 0.0, 0.0)
    assert gate_matched(pairs_of(base, other), "time", None).outcome == outcome


def test_an_extrapolated_win_passes_where_the_net_gain_does():
    base, other, calibration = constant_experiment(0.02, 0.0, 0.001)
    assert judge(base, other, calibration, resumed=True).decision == "keep optional"  # 3 % are ruled out
    win = judge(base, other, calibration, resumed=True, extrapolated=Estimate(0.02, 0.004, 8))
    assert win.decision == "promote" and win.gates[0].name == "time to target (extrapolated)"


def test_without_calibration_a_loss_of_quality_is_inconclusive():
    base, other, _ = constant_experiment(0.08, 0.001, 0.001)
    verdict = judge(base, other, [], resumed=True)
    assert verdict.decision == "inconclusive" and verdict.gain is None


def test_over_depths_a_gain_must_hold_at_each():
    promoted = judge(*constant_experiment(0.06, 0.0, 0.001), resumed=True)
    also = judge(*constant_experiment(0.05, 0.0, 0.001), resumed=True)
    nothing = judge(*constant_experiment(-0.001, 0.0, 0.001), resumed=True)
    worse = judge(*constant_experiment(-0.1, 0.0, 0.001), resumed=True)
    assert (promoted.decision, nothing.decision, worse.decision) == ("promote", "keep optional", "reject")
    assert judge_series({6: promoted, 12: also}).decision == "promote"
    assert judge_series({6: promoted, 12: nothing}).decision == "keep optional"
    assert judge_series({6: promoted, 12: also, 16: worse}).decision == "reject"
    assert judge_series({6: promoted}).decision == "inconclusive"
    verdict = judge_series({6: promoted, 12: judge(*constant_experiment(0.2, 0.0, 0.001), resumed=True)})
    assert verdict.decision == "promote"  # gains that differ are no noise
    assert verdict.gain.mean == pytest.approx(0.06, abs=0.01)  # the least is what a cycle gains
    noisy = judge(*constant_experiment(-0.001, 0.0, 0.2), resumed=True)
    assert judge_series({6: promoted, 12: noisy}).decision == "inconclusive"  # it may be a gain as well as a loss
