"""The time of two sides that take turns: what is estimated, what counts, what is kept; and real pairs of runs."""

import json
import math
import random
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nanochat.common import UserError
from nanochat.lab.clock import CLEAN_ROUNDS, Job, NoiseCard, Round, Spread, clock_of, log_ratio, without_slow_spells
from nanochat.lab.plan import horizon_of, read_profile
from nanochat.lab.rows import config_of
from nanochat.lab.stats import t_quantile
from nanochat.lab.timing import LEAD_IN, Pace, Stretch, make_pace, measure, round_of, shortened
from nanochat.recipe.depth_growth import growth_step
from nanochat.recipe.suffix_policy import freeze_start, recovery_start

ROOT = Path(__file__).parents[2]
SMOKE = read_profile("cpu-smoke")
LONG = [*SMOKE, "--num-iterations=1000"]
DYNAMIC = "--block-update-schedule=dynamic_suffix"


def job(ratio, rounds=20, load=0.0):
    return Job(tuple(Round(ratio, 1.0, load, step) for step in range(rounds)), seconds=30.0)


def alone(spread):
    """The noise card of a first measurement."""
    return spread


def test_steps_that_differ_in_cost_count_by_their_time():
    # every fourth step of the candidate costs as much as the baseline's, the others half
    rounds = [Round(1.0, 0.5 if i % 4 else 1.0, None) for i in range(40)]
    assert log_ratio(rounds) == pytest.approx(math.log(1 / 0.625))


def test_the_clock_of_some_jobs():
    clock = clock_of([job(1.10), job(1.12), job(1.11)], False, alone)
    logs = [math.log(r) for r in (1.10, 1.12, 1.11)]
    assert clock.log_ratio == pytest.approx(statistics.fmean(logs))
    assert clock.se == pytest.approx(statistics.stdev(logs) / math.sqrt(3))
    assert (clock.df, clock.jobs, clock.set_apart, clock.note, clock.seconds) == (2, 3, 0, "", 90.0)


@pytest.mark.parametrize("pooled, variance", [(Spread(0.0040, 40), 0.0001), (Spread(0.40, 40), 0.01)])
def test_the_error_is_the_noise_cards_or_the_jobs_own_if_that_is_larger(pooled, variance):
    jobs = [job(math.exp(d)) for d in (0.09, 0.10, 0.11)]  # a variance of 0.0001
    clock = clock_of(jobs, False, lambda own: pooled)
    assert clock.se == pytest.approx(math.sqrt(variance / 3)) and clock.df == 40
    assert clock_of(jobs[:1], False, lambda own: pooled).se == pytest.approx(math.sqrt(pooled.variance))
    assert math.isinf(clock_of(jobs[:1], False, alone).se)


def test_rounds_beside_other_programs_are_set_apart_unless_they_are_accepted():
    spoilt = tuple(Round(3.0, 1.0, 0.4, step) for step in range(12, 20))
    mixed = [Job((*job(1.1, rounds=12).rounds, *spoilt)), job(1.1)]
    clock = clock_of(mixed, False, alone)
    assert clock.log_ratio == pytest.approx(math.log(1.1)) and clock.set_apart == 8 and "8 of 40 rounds" in clock.note
    clock = clock_of(mixed, True, alone)
    assert clock.log_ratio > math.log(1.2) and clock.set_apart == 0 and "8 of 40 rounds" in clock.note
    unknown = clock_of([job(1.1, load=None), job(1.1, load=None)], False, alone)  # where the system does not say
    assert unknown.set_apart == 0 and math.isfinite(unknown.se)


def noisy(ratio, cost=lambda step: 1.0, seed=0, stalls=0):
    """A job's rounds. cost: of the candidate's step. stalls: in how many rounds, at random, the candidate takes twice as long."""
    draw = random.Random(seed)
    stalled = draw.sample(range(40), stalls)
    return [Round(ratio * draw.gauss(1, 0.03), cost(step) * draw.gauss(1, 0.03) * (2 if step in stalled else 1), 0.0, step)
            for step in range(40)]


def test_a_slow_spell_of_the_machine_is_set_apart():
    jobs = [noisy(1.1, seed=seed) for seed in range(3)]
    slowed = [replace(r, baseline=r.baseline * (1.6 if 10 <= r.step < 14 else 1.0), candidate=r.candidate * (1.6 + r.step % 2)
                      if 10 <= r.step < 15 else r.candidate) for r in jobs[1]]
    found = without_slow_spells([jobs[0], slowed, jobs[2]])
    assert found[0] == jobs[0] and found[2] == jobs[2]
    assert [r.step for r in found[1]] == [*range(10), *range(15, 40)]
    slower = [replace(r, baseline=1.5 * r.baseline, candidate=1.5 * r.candidate) for r in jobs[1]]  # all the time
    assert without_slow_spells([jobs[0], slower, jobs[2]]) == [jobs[0], slower, jobs[2]]
    assert without_slow_spells([slowed]) == [slowed] and without_slow_spells([jobs[0], slowed]) == [jobs[0], slowed]


def test_what_a_candidate_costs_is_no_slow_spell():
    rare = [noisy(1.1, cost=lambda step: 4.0 if step % 10 == 0 else 1.0, seed=seed) for seed in range(3)]  # at the same steps
    assert without_slow_spells(rare) == rare
    stalls = [noisy(1.1, seed=seed, stalls=4) for seed in range(3)]  # at other steps each time
    assert without_slow_spells(stalls) == stalls


def test_work_in_the_other_sides_turn_spoils_the_round():
    assert not round_of(Stretch(1.0, False, 0.04), Stretch(3.0, False, 0.02)).spoilt
    assert round_of(Stretch(1.0, False, 0.0), Stretch(3.0, False, 0.08)).load == pytest.approx(0.06)
    assert round_of(Stretch(1.0, False, None), Stretch(3.0, False, 0.5)).load is None


def test_a_busy_machine_has_no_clock():
    busy = Job(tuple(Round(1.1, 1.0, 0.4 if i >= CLEAN_ROUNDS - 1 else 0.0) for i in range(40)))
    clock = clock_of([job(1.1), busy], False, alone)
    assert math.isinf(clock.se) and "31% of the processor" in clock.note and "quiet machine" in clock.note
    assert clock.as_dict()["se"] is None and json.dumps(clock.as_dict(), allow_nan=False)
    compiled = clock_of([Job(job(1.1, rounds=CLEAN_ROUNDS - 1).rounds, compiled=20)], True, alone)
    assert math.isinf(compiled.se) and "too few rounds" in compiled.note and "20 of 29 rounds" in compiled.note


def test_the_noise_card_grows_and_counts_no_measurement_twice(tmp_path):
    quiet, busy = (NoiseCard(tmp_path / "card.json", key) for key in ("host | cpu", "host | cpu | with other load"))
    assert quiet.pooled_with("one", Spread(0.02, 2)) == Spread(0.02, 2)
    assert busy.pooled_with("one", Spread(9.0, 2)) == Spread(9.0, 2)
    assert quiet.pooled_with("two", Spread(0.04, 2)) == Spread(0.06, 4)
    assert quiet.pooled_with("one", Spread(0.05, 3)) == Spread(0.09, 5)  # it has more jobs now
    (tmp_path / "card.json").write_text("{")
    assert quiet.pooled_with("one", Spread(0.05, 3)) == Spread(0.05, 3)


def test_error_rates_of_a_clock():
    """At no difference, 1 % of the measurements at most find one at a one-sided level of 1 %, however long the noise card; one
    that is twice as noisy as the card's others finds one in less than 4 %, where the card's variance alone says 12 %."""
    draw = random.Random(1)

    def found(noise, card, n=2000):
        times = 0
        for _ in range(n):
            jobs = [job(math.exp(draw.gauss(0, noise)), rounds=CLEAN_ROUNDS) for _ in range(3)]
            others = 0.01**2 * sum(draw.gauss(0, 1) ** 2 for _ in range(card))
            clock = clock_of(jobs, False, lambda own: Spread(own.sum_of_squares + others, own.df + card))  # noqa: B023
            times += clock.log_ratio > t_quantile(0.99, clock.df) * clock.se
        return times / n
    assert found(0.01, card=0) < 0.015 and found(0.01, card=4) < 0.015 and found(0.01, card=40) < 0.012
    assert found(0.02, card=40) < 0.06


def test_a_pace():
    plain, deferred = config_of(LONG), config_of([*LONG, "--deferred-loss-logging"])
    assert make_pace(1.6, plain, plain) == Pace(rounds=20, stretch=1)
    assert make_pace(0.4, plain, plain) == Pace(rounds=38, stretch=1)
    assert make_pace(0.02, plain, plain) == Pace(rounds=58, stretch=13)
    assert make_pace(0.01, plain, plain) == Pace(rounds=40, stretch=25)  # as long as the whole run
    assert make_pace(0.4, plain, deferred) == Pace(rounds=20, stretch=5)


@pytest.mark.parametrize("more", [
    [], ["--eval-every=-1", "--target-metric-name=smooth_loss"], ["--save-every=50", "--keep-last=2"]])
def test_a_timed_run_evaluates_and_saves_nothing(more):
    given = [*LONG, "--core-metric-every=7", "--sample-every=9", "--max-train-seconds=5", *more]
    config = config_of(shortened(given, Pace(20, 3)))
    assert horizon_of(config).num_iterations == LEAD_IN + 60 and config.run.max_train_seconds == -1
    for period in ("eval_every", "core_metric_every", "sample_every", "save_every"):
        assert not 0 < getattr(config.eval, period) < 10**6


@pytest.mark.parametrize("more", [
    [], ["--dyn-warmup-steps=300"], ["--dyn-freeze-start-step=500"], ["--dyn-freeze-start-frac=0.6"],
    ["--dyn-final-full-frac=0.25"], ["--dyn-final-recovery-mode=staged"]])
def test_the_phases_of_dynamic_suffix_training_keep_their_shares(more):
    flags, pace = [*LONG, DYNAMIC, *more], Pace(20, 4)
    whole, timed = (config_of(f).features["suffix"] for f in (flags, shortened(flags, pace)))
    steps = pace.steps - pace.lead_in
    full, recovery = freeze_start(timed, pace.steps) - pace.lead_in, pace.steps - recovery_start(timed, pace.steps)
    assert full == pytest.approx(steps * freeze_start(whole, 1000) / 1000, abs=1)
    assert recovery == pytest.approx(steps * (1 - recovery_start(whole, 1000) / 1000), abs=1)


def test_steps_that_begin_late_keep_their_weight():
    """The round in which they are compiled does not count, so there is one more; also where both sides have such steps."""
    growing = [*LONG, "--initial-depth=1", "--depth-growth-frac=0.6"]
    frozen = [*growing, DYNAMIC, "--dyn-freeze-start-frac=0.8"]
    pace = make_pace(0.4, config_of(growing), config_of(frozen))
    assert pace == Pace(rounds=40, stretch=1, changes=(0.6, 0.8)) and pace.steps == LEAD_IN + 42
    for flags in (growing, frozen):
        depth = config_of(shortened(flags, pace)).features["progressive_depth"]
        assert growth_step(depth, pace.steps) == LEAD_IN + 24  # one compiles, 16 count
    suffix = config_of(shortened(frozen, pace)).features["suffix"]
    assert freeze_start(suffix, pace.steps) == LEAD_IN + 24 + 1 + 8  # one compiles, 8 count


# ---- real runs

@pytest.fixture(scope="module")
def flags(base):
    return [f"--data={base / 'text'}" if word.startswith("--data=") else word for word in SMOKE if "vocab" not in word] + [
        "--vocab-size=300", "--max-chars=-1", "--num-iterations=400"]


def timed(base, flags, *more, name="candidate"):
    return measure(base / "experiment", name, flags, [*flags, *more], seconds_per_step=1.0, base_dir=base, profile="cpu-smoke",
                   jobs=1, accept_load=True)


def left_over(base):
    """Run folders, locks and pipes' other ends that a measurement has not cleared away."""
    return [p.name for p in (base / "base_checkpoints").iterdir()] + [p.name for p in (base / "lab").glob(".*claim")]


@pytest.mark.slow
def test_twice_the_batch_takes_longer(base, flags, capsys):
    clock = timed(base, flags, "--total-batch-size=2048", name="batch")
    assert -2.5 < clock.log_ratio < -0.4 and clock.jobs == 1  # four times the micro-batches
    kept, = (base / "experiment" / "timing").glob("batch-*-job1.json")
    assert len(json.loads(kept.read_text())["rounds"]) == 20 and not left_over(base)
    card = json.loads((base / "lab" / "clock_noise.json").read_text())
    assert [key.split(" | ")[-1] for key in card] == ["with other load"]
    began, logs = time.monotonic(), list((base / "experiment" / "timing").glob("batch-job1-*.txt"))
    before = [log.stat().st_mtime_ns for log in logs]
    assert timed(base, flags, "--total-batch-size=2048", name="batch") == clock and time.monotonic() - began < 2
    assert len(logs) == 2 and [log.stat().st_mtime_ns for log in logs] == before
    for log in logs:
        assert "interrupted" in log.read_text()


@pytest.mark.slow
def test_a_side_that_fails_is_named(base, flags):
    clock = timed(base, [*flags, f"--val-data={base / 'nowhere'}"], name="lost")
    log = base / "experiment" / "timing" / "lost-job1-baseline.txt"
    assert math.isinf(clock.se) and clock.note.startswith("the baseline could not be timed") and str(log) in clock.note
    assert "nowhere" in log.read_text() and not left_over(base) and not list(log.parent.glob("lost-*.json"))
    with pytest.raises(UserError, match="no-such"):
        timed(base, flags, "--no-such-flag")


@pytest.mark.slow
def test_a_lab_that_is_killed_leaves_no_run(base, flags):
    code = f"""import sys, time
from pathlib import Path
from nanochat.lab.timing import Side
with Side("baseline", {flags!r}, Path({str(base / 'killed.txt')!r}), Path({str(base)!r}), lambda: None) as side:
    side.answer()
    print("ready", flush=True)
    time.sleep(60)"""
    lab = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert lab.stdout.readline() == "ready\n"
    lab.kill()
    lab.communicate()
    deadline = time.monotonic() + 30
    while "interrupted:" not in (base / "killed.txt").read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "interrupted:" in (base / "killed.txt").read_text()  # the last that a run says
