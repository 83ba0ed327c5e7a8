"""Verdicts on simulated runs with known truth: error rates, power, and a better candidate is never judged worse."""

import math
import random

import pytest
from hypothesis import given, settings, strategies as st

from nanochat.lab.decide import (
    ALIKE,
    DECISIONS,
    FALLBACK_GAIN,
    gate_non_inferior,
    gate_stable,
    gate_time_to_target,
    judge,
    judge_series,
    log_ratio,
    measure_of,
    net_gain,
    pairs_of,
    worth_of_a_step,
)

WORTH = 0.12   # bits per byte per unit of ln(steps)
STEPS = 1000
TARGET = 1.0 + 0.05 * WORTH  # the baseline reaches it shortly before its end


def simulate(rng, seed, steps=1.0, pace=1.0, better=0.0, noise=0.01, target=None, **fields):
    """The row of a run.

    steps: share of the horizon. pace: seconds per step relative to the baseline. better: quality in units of ln(steps).
    noise: standard deviation of ln(time to the same quality), 0.8 of it from quality and 0.6 from the clock.
    """
    bpb = 1.0 - WORTH * (math.log(steps) + better + rng.gauss(0, 0.8 * noise))
    seconds = 100 * steps * pace * math.exp(rng.gauss(0, 0.6 * noise))
    crossed = target is not None and bpb <= target
    return {"seed": seed, "status": "ok", "train_time_sec": seconds, "val_bpb": bpb, "final_train_loss": 2 + bpb,
            "time_to_target_sec_measured": seconds * math.exp((bpb - target) / (2 * WORTH)) if crossed else None,
            "steps_done": round(STEPS * steps), "tokens_seen": 512 * round(STEPS * steps), "flops_per_token": 1e6,
            "skipped_steps": 0, "rollbacks": 0} | fields


def experiment(rng, most=6, first=2, match="free", calibration_seeds=3, target=None, noise=0.01, **candidate):
    """The verdict of a comparison that adds seeds while it is inconclusive, and the number of seeds."""
    shorter = [simulate(rng, s, steps=share, noise=noise) for s in range(calibration_seeds) for share in (0.97, 0.94)]
    base, other = [], []
    for n in range(most):
        base.append(simulate(rng, n, target=target, noise=noise))
        other.append(simulate(rng, n, target=target, noise=noise, **candidate))
        if n + 1 >= first:
            calibration = [r for r in base + shorter if r["seed"] < min(calibration_seeds, n + 1)]
            verdict = judge(base, other, calibration, match=match, analyses=most - first + 1, resumed=True)
            if verdict.decision != "inconclusive":
                break
    return verdict, n + 1


def rate(n, **how):
    """The share of `n` experiments that promote, and the 95 % margin of error of that share."""
    rng = random.Random(7)
    promoted = sum(experiment(rng, **how)[0].decision == "promote" for _ in range(n)) / n
    return promoted, 1.645 * math.sqrt(max(promoted, 1 / n) / n)


@pytest.mark.slow
@pytest.mark.parametrize("target", [None, TARGET])
@pytest.mark.parametrize("truth", [{}, {"steps": 0.95}], ids=["A against A", "5 % fewer steps"])
def test_no_difference_and_less_training_are_promoted_in_at_most_one_percent(truth, target):
    promoted, margin = rate(2000, target=target, **truth)
    assert promoted - margin <= 0.01


@pytest.mark.parametrize("truth, target", [
    ({"pace": 0.95}, TARGET), ({"better": -math.log(0.95)}, TARGET), ({"pace": 0.95}, None)],
    ids=["faster", "better", "faster, no target"])
def test_a_true_five_percent_is_promoted_in_nine_of_ten_with_six_seeds(truth, target):
    promoted, margin = rate(500, target=target, **truth)
    assert promoted + margin >= 0.9


@pytest.mark.slow
def test_a_true_gain_of_one_and_a_half_percent_does_not_pass_as_three():
    for noise in (0.01, 0.02):
        promoted, margin = rate(1000, pace=0.985, noise=noise)
        assert promoted - margin <= 0.05


def test_two_seeds_alone_promote_no_noise():
    promoted, margin = rate(2000, most=2, target=TARGET, noise=0.03)
    assert promoted - margin <= 0.01


@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_no_difference_is_seldom_rejected(noise):
    """With two seeds on a noisy machine, both are slower in one case of four by chance. Three gates may each err in 5 %."""
    rng = random.Random(7)
    decisions = [experiment(rng, most=2, target=TARGET, noise=noise)[0].decision for _ in range(500)]
    assert decisions.count("reject") / 500 <= 0.1


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
    shorter = [simulate(random.Random(s), s, steps=share, noise=0.0005) for s in range(3) for share in (0.97, 0.94)]
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
    shorter = [simulate(random.Random(0), s, noise=0, steps=share) for s in (1, 2) for share in (0.97, 0.94)]
    worth = worth_of_a_step(base + shorter, "val_bpb")
    assert worth.value == pytest.approx(WORTH) and worth.low == pytest.approx(WORTH) == pytest.approx(worth.high)
    assert net_gain(pairs_of(base, other), worth, "val_bpb").mean == pytest.approx(-math.log(0.95) - 0.05)


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
    assert verdict.why.startswith(f"same conditions: seed {base[0]['seed']}: {ALIKE[field]} None against another")


def test_bits_per_byte_never_stand_against_a_loss_in_nats():
    """The same bits on both sides; one run of one side was not evaluated."""
    base, other, calibration = constant_experiment(0.0, 0.0, 0.0)
    other[0] = other[0] | {"val_bpb": None, "final_train_loss": base[0]["final_train_loss"]}
    verdict = judge(base, other, calibration, resumed=True)
    assert measure_of(base, other) == "final_train_loss" and measure_of(base) == "val_bpb"
    assert verdict.gain.mean == pytest.approx(0.0, abs=1e-9) and verdict.decision != "promote"


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
    other = [simulate(rng, 1, pace=0.5), simulate(rng, 2, pace=0.5, **fields)]
    assert gate_stable(base, other).outcome == "fail"
    assert judge(base, other, [], resumed=True).decision == "reject"


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
    (timed((None, None), (None, None)), ((100, 120), (80, 99)), "pass"),
    (timed((None, None), (None, None)), ((100, 120), (80, math.inf)), "unclear"),
    (timed((None, None), (None, None)), ((100, 120), (121, 130)), "fail"),
])
def test_time_to_target(pairs, extrapolated, outcome):
    assert gate_time_to_target(pairs, extrapolated).outcome == outcome


def test_an_extrapolated_win_is_provisional():
    base, other, calibration = constant_experiment(0.08, 0.0, 0.001)
    verdict = judge(base, other, calibration, resumed=True, extrapolated=((100, 101), (90, 91)))
    assert verdict.decision == "keep optional" and verdict.gates[0].outcome == "pass"
    assert judge(base, other, calibration, resumed=True).decision == "promote"  # by 3 % at matched quality


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
