"""A cycle: the order of its phases, what counts in which, its locked target, plateau, rollback; the log, newest first."""

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given, strategies as st

from nanochat.common import UserError
from nanochat.lab.cli import Experiment, JudgeFlags, LabFlags
from nanochat.lab.cycle import (
    PASSED,
    PHASES,
    PLATEAU_GAIN,
    REGRESSION,
    ROLLBACK_REASONS,
    against_best,
    changing,
    current,
    is_full,
    locked,
    log_entry,
    new_cycle,
    obstacle,
    plateau,
    read_cycles,
    record,
    robust_gain,
    roll_back,
    running_phase,
    set_phase,
    start,
    status,
    write_log,
)
from nanochat.lab.decide import Verdict
from nanochat.lab.gain import Gain
from nanochat.lab.plan import read_profile

SMOKE = read_profile("cpu-smoke")


def verdict(decision, mean, low=None):
    known = dict.fromkeys((field.name for field in fields(Gain)), 0.0)
    return Verdict(decision, "why", gain=Gain(**known | {"mean": mean, "low": mean if low is None else low}))


def judged(cycles, change, decision="promote", gain=0.01, miniseries=False, baseline=SMOKE, **more):
    """The cycles after a verdict on `change`, and the decision as recorded."""
    cycles, _ = record(cycles, change, verdict(decision, gain, more.pop("low", None)), miniseries=miniseries, baseline=baseline,
                       **more)
    return cycles, cycles[-1]["log"][-1]["decision"]


def in_phase(phase, gain=0.001, name="c"):
    """A cycle in which `phase` is running, and each phase before it was done with a change of this gain that passed."""
    cycles = [new_cycle(name, "val_bpb", 1.0)]
    for done in PHASES:
        state = "running" if done == phase else "done"
        if done in ("1", "2", "3") and state == "done":
            cycles, _ = judged([set_phase(cycles[0], done, "running")], f"change {done}", gain=gain)
        if done not in ("0.5", "4") or done == phase:
            cycles = [set_phase(cycles[0], done, state)]
        if done == phase:
            return cycles[0]
    return cycles[0]


def over(gain=0.0, promoted=(), name="c"):
    """A full cycle that promoted `promoted`, all with the same gain."""
    log = [{"change": change, "decision": "promote", "gain": gain} for change in promoted]
    return new_cycle(name, "val_bpb", 1.0) | {"phases": dict.fromkeys(PHASES, "done"), "promoted": list(promoted), "log": log}


# --- phases

@pytest.mark.parametrize("phase, state, says", [
    ("0.5", "running", "phase 0 must"), ("1", "running", "phase 0 must"), ("2", "done", "phase 0, 1 must"),
    ("3", "running", "phase 0, 1, 2 must"), ("4", "running", "phase 0, 1, 2, 3 must"), ("5", "done", "phase 0, 1, 2, 3 must")])
def test_a_phase_waits_for_those_before_it(phase, state, says):
    with pytest.raises(UserError, match=f"phase {phase} cannot be {state}: {says}"):
        set_phase(new_cycle("c", "val_bpb", 1.0), phase, state)


def test_a_phase_is_done_only_with_a_decision_of_its_own():
    cycle = set_phase(set_phase(new_cycle("c", "val_bpb", 1.0), "0", "done"), "1", "running")
    with pytest.raises(UserError, match="phase 1 cannot be done: no decision is recorded"):
        set_phase(cycle, "1", "done")
    (after,), _ = judged([cycle], "x", "reject", -0.1)  # a phase may end without a gain
    assert set_phase(after, "1", "done")["phases"]["1"] == "done"


def test_one_phase_runs_at_a_time_and_going_back_is_allowed():
    cycle = in_phase("2")
    with pytest.raises(UserError, match="phase 2 is running"):
        set_phase(cycle, "0.5", "running")
    back = set_phase(set_phase(cycle, "2", "open"), "1", "open")
    assert running_phase(back) is None and running_phase(set_phase(back, "0.5", "running")) == "0.5"
    with pytest.raises(UserError, match="phase 1 must be done"):
        set_phase(back, "2", "running")


@pytest.mark.parametrize("gain, allowed", [(0.006, True), (0.0067, False), (0.03, False)])
def test_phase_4_is_for_a_plateau_of_phases_1_to_3_and_else_skipped(gain, allowed):
    """Three changes passed, one in each phase: together they gained 1.8 %, 2.01 %, or 9 %."""
    cycle = set_phase(in_phase("3", gain), "3", "open")
    (cycle,), _ = judged([set_phase(cycle, "3", "running")], "change 3", gain=gain)
    cycle = set_phase(cycle, "3", "done")
    if allowed:
        with pytest.raises(UserError, match="phase 4 must be done before"):
            set_phase(cycle, "5", "running")
        assert running_phase(set_phase(cycle, "4", "running")) == "4"
    else:
        with pytest.raises(UserError, match="plateau of phases 1 to 3"):
            set_phase(cycle, "4", "running")
        last = set_phase(cycle, "5", "running")
        assert last["phases"]["4"] == "skipped" and not is_full(last)
        with pytest.raises(UserError, match="no miniseries is recorded"):
            set_phase(last, "5", "done")
        (last,), _ = judged([last], "change 1", "keep optional", miniseries=True)
        assert is_full(set_phase(last, "5", "done"))


def test_a_gain_that_was_taken_back_is_no_gain():
    cycle = in_phase("3", 0.03)
    cycles, _ = judged([cycle], "change 1", "reject", -0.1)
    cycles, _ = judged(cycles, "change 2", "keep optional", 0.0)
    cycles, _ = judged(cycles, "change 3", "inconclusive", 0.05)
    assert running_phase(set_phase(set_phase(cycles[0], "3", "done"), "4", "running")) == "4"


def test_a_cycle_begins_when_the_one_before_is_over_or_given_up():
    first = start([], "one", "val_bpb", 1.0)
    with pytest.raises(UserError, match="'one' is not over, phase 5 is open"):
        start(first, "two", "val_bpb", 1.0)
    given_up = start(first, "two", "val_bpb", 1.0, abandon=True)
    assert [c["name"] for c in given_up] == ["one", "two"] and given_up[0]["abandoned"] and not plateau(given_up)[0]
    assert [c["name"] for c in start([over(name="one")], "two", "val_bpb", 1.0)] == ["one", "two"]
    with pytest.raises(UserError, match="'one'"):
        start([over(name="one")], "one", "val_bpb", 1.0)
    with pytest.raises(UserError, match="is over"):
        set_phase(over(), "1", "running")


@pytest.mark.parametrize("flags, allowed", [
    ([], True), (["--target-metric-name=val_bpb", "--target-metric-threshold=1.65"], True),
    (["--target-metric-name=val_bpb", "--target-metric-threshold=1.66"], False),
    (["--target-metric-name=smooth_loss", "--target-metric-threshold=1.65"], False), (SMOKE, False)])
def test_the_target_is_locked(flags, allowed):
    problem = locked(new_cycle("c", "val_bpb", 1.65), flags)
    assert problem is None if allowed else "'c' is locked to val_bpb 1.65" in problem


# --- decisions

def test_the_local_gate_comes_before_the_miniseries():
    cycles, decision = judged([in_phase("5", 0.03)], "new", miniseries=True)
    assert decision == "keep optional" and cycles[0]["promoted"] == []
    assert "has not passed the local gate" in cycles[0]["log"][-1]["lowered"]
    cycles, decision = judged([in_phase("5", 0.03)], "change 1", gain=0.03, miniseries=True)
    assert decision == "promote" and cycles[0]["promoted"] == ["change 1"]
    earlier = over(name="b") | {"log": [{"change": "x", "decision": PASSED, "gain": 0.01}]}
    assert judged([earlier, in_phase("5", 0.03)], "x", miniseries=True)[1] == "promote"


def test_only_phase_5_promotes():
    cycles, decision = judged([in_phase("2")], "change 1", miniseries=True)
    assert decision == "keep optional" and "phase 5 is not running" in cycles[0]["log"][-1]["lowered"]
    assert obstacle(cycles, "change 1", True, SMOKE) == "phase 5 is not running, and only it promotes"  # it still has passed


@pytest.mark.parametrize("low, decision", [(0.029, "keep optional"), (0.0296, PASSED)])
def test_phase_4_asks_for_3_percent(low, decision):
    """ln 1.03 is 0.02956."""
    assert judged([in_phase("4")], "fused", gain=0.05, low=low)[1] == decision
    assert judged([in_phase("3")], "fused", gain=0.05, low=0.001)[1] == PASSED


def test_later_phases_are_measured_against_the_current_best():
    best = ["--warmdown-shape=cosine", "--warmdown-ratio=0.4"]
    cycles, _ = judged([in_phase("1")], "weaker", gain=0.01, flags=["--lr-multiplier=3"])
    cycles, _ = judged(cycles, "cosine", gain=0.02, flags=best)
    cycles, _ = judged(cycles, "worse", "keep optional", gain=0.05, flags=["--lr-multiplier=4"])
    cycles = [set_phase(set_phase(cycles[0], "1", "done"), "2", "running")]
    cycles, decision = judged(cycles, "data")
    assert decision == "keep optional" and f'--baseline "{" ".join(best)}"' in cycles[0]["log"][-1]["lowered"]
    assert against_best(cycles[0], [*SMOKE, best[1], best[0], "--num-iterations=50"]) is None
    cycles, decision = judged(cycles, "data", baseline=[*SMOKE, *best], flags=[*best, "--final-lr-frac=0.1"], gain=0.001)
    assert decision == PASSED
    assert "--final-lr-frac=0.1" in against_best(cycles[0], [*SMOKE, *best])  # it beat the best, so it is the best now


def test_gains_of_promoted_changes_combine_and_each_counts_once():
    cycles = [in_phase("5", 0.03)]
    for change, gain in (("change 1", 0.03), ("change 2", 0.01), ("change 2", 0.011), ("change 3", None)):
        cycles, _ = judged(cycles, change, gain=gain, miniseries=True)
    assert cycles[0]["promoted"] == ["change 1", "change 2", "change 3"]
    assert robust_gain(cycles[0]) == pytest.approx(0.041)
    later = [*cycles, in_phase("5", 0.03, "later")]
    later, _ = judged(later, "change 1", gain=0.03, miniseries=True)  # a default already
    assert robust_gain(later[1]) == 0 and later[1]["promoted"] == []


def test_a_reject_of_a_promoted_change_rolls_it_back_at_once():
    cycles, _ = judged([in_phase("5", 0.03)], "cosine")
    cycles, _ = judged(cycles, "cosine", gain=0.03, miniseries=True)
    now = [*cycles, in_phase("2", name="next")]
    after, lines = record(now, "cosine", verdict("reject", -0.05), miniseries=False, baseline=SMOKE)
    assert f"rolled back: cosine is optional again ({REGRESSION})" in lines
    assert after[0]["promoted"] == [] and robust_gain(after[0]) == 0
    assert after[0]["log"][-1]["decision"] == f"rolled back: {REGRESSION}" and after[1]["log"][-1]["decision"] == "reject"
    assert after[1]["phases"] == now[1]["phases"] and cycles[0]["promoted"] == ["cosine"]  # a copy
    assert "has not passed" in obstacle(after, "cosine", True, SMOKE)  # it has to begin anew
    untouched, lines = record(now, "other", verdict("reject", -0.05), miniseries=False, baseline=SMOKE)
    assert untouched[0] == now[0] and "rolled back" not in lines


def test_the_same_verdict_is_recorded_once():
    cycles, _ = judged([in_phase("1")], "x", candidates=9)
    same, line = record(cycles, "x", verdict("promote", 0.01), miniseries=False, baseline=SMOKE, candidates=9)
    assert same == cycles and "already" in line
    assert len(judged(cycles, "x", "reject", candidates=9)[0][0]["log"]) == len(cycles[0]["log"]) + 1


def test_an_experiment_records_what_it_decided(tmp_path, monkeypatch, capsys):
    """A sweep by the flags of its best variant, so that the miniseries finds them; a regression in the change log too."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    path, log, flags = tmp_path / "c.json", tmp_path / "LOG.md", "--warmdown-ratio=0.4 --warmdown-shape=cosine"
    with changing(path) as cycles:
        cycles.append(in_phase("1") | {"target_metric_threshold": 2.6})
    judging = JudgeFlags(cycle=str(path), log=str(log))
    sweep = Experiment("sweep", "B", LabFlags(baseline="--final-lr-frac=0.1", out=str(tmp_path)), judging)
    name = "warmdown-ratio-0.4_warmdown-shape-cosine"
    for cell, own in ("other", []), ("trained", [*flags.split(), "--wd-multiplier=1.2"]):
        (tmp_path / "cells" / cell).mkdir(parents=True)
        row = {"variant": name, "timestamp": "2026", "flags": [*sweep.plans[None][0].flags, *own]}
        (tmp_path / "cells" / cell / "row.json").write_text(json.dumps(row))
    sweep.record(verdict("promote", 0.02), "lab sweep B", best=name)
    entry = read_cycles(path)[0]["log"][-1]
    assert (entry["change"], entry["decision"], entry["phase"], entry["candidates"]) == (flags, PASSED, "1", 8)
    assert entry["flags"] == ["--final-lr-frac=0.1", *flags.split(), "--wd-multiplier=1.2"]  # as it was trained
    assert f"phase 1: {flags}: {PASSED}" in capsys.readouterr().out
    with changing(path) as cycles:
        cycles[0]["promoted"].append(flags)
    series = Experiment("miniseries", None, LabFlags(candidate=flags), replace(judging, depths=[2, 3]))
    series.record(verdict("reject", -0.02), "lab miniseries")
    assert read_cycles(path)[0]["promoted"] == []
    assert "rolled back" in capsys.readouterr().out and "rolled back" in log.read_text()


def test_roll_back_by_hand():
    now = [over(0.03, ["cosine"]), over(0.01, ["other"])]
    back, same = roll_back(now, "cosine", "complexity")
    assert back["promoted"] == [] and robust_gain(back) == 0 and same == now[1]
    with pytest.raises(UserError, match="other"):
        roll_back([back, same], "cosine", ROLLBACK_REASONS[0])
    with pytest.raises(UserError):
        roll_back(now, "cosine", "mood")


UNDER_WAY = new_cycle("under way", "val_bpb", 1.0)


@pytest.mark.parametrize("cycles, reached", [
    ([over(), over()], True),
    ([over()], False),
    ([over(), over(0.03, ["x"])], False),
    ([over(), UNDER_WAY], False),
    ([over(), over(0.001, ["x"])], False),          # promoted, if little
    ([over(0.5, ["x"]), over(), over()], True),     # only the last two count
    ([over(), over(), UNDER_WAY], True),
    ([over(), UNDER_WAY, over()], False),           # one was given up: they are not two in a row
])
def test_plateau(cycles, reached):
    assert plateau(cycles)[0] == reached


@given(st.lists(st.floats(0.0, 0.05), min_size=2, max_size=5))
def test_plateau_is_two_small_cycles_in_a_row(gains):
    """One that gained 2 % or more is named with its gain, a smaller one by what it promoted."""
    reached, why = plateau([over(gain, ["x"] if gain else []) for gain in gains])
    first = next((gain for gain in gains[-2:] if gain), None)
    assert reached == (first is None) and ("gained" in why) == (first is not None and first >= PLATEAU_GAIN)


def test_status_shows_what_is_missing_and_what_was_decided():
    before = [over(0.03, ["old"], name="first"), in_phase("2", name="second")]
    cycles, _ = judged(before, "batch", "reject", -0.041, candidates=3)
    text = status(cycles)
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert lines["1"].split()[-1] == "done" and "running" in lines["2"] and "phase 2 must be done before" in lines["3"]
    assert "reject" in text and "-4.1%" in text and "4 candidates judged" in text and "promoted: nothing" in text
    assert "first" in lines and lines["first"].split()[-1] == "old" and "+3.0%" in lines["first"]
    assert "plateau: 1 of 2 full cycles are done" in text and "current best: change 1" in text


def test_files(tmp_path):
    path = tmp_path / "a" / "cycles.json"
    assert read_cycles(path) == []
    with pytest.raises(UserError):
        current([])
    with changing(path) as cycles:
        cycles.append(over())
    assert current(read_cycles(path)) == over() and [p.name for p in path.parent.iterdir()] == ["cycles.json"]
    with pytest.raises(UserError), changing(path) as cycles:
        cycles[:] = roll_back(cycles, "unknown", REGRESSION)
    assert read_cycles(path) == [over()]
    path.write_text("{")
    with pytest.raises(UserError):
        read_cycles(path)


def test_the_log_keeps_its_newest_first_and_loses_nothing(tmp_path):
    path = tmp_path / "LOG.md"
    path.write_text("# Log\n\nPreface.\n\n## 2026-01-01 · old\n\nText.\n")
    write_log(path, log_entry("cosine", "promote", "it is faster", 0.031, "`command`"))
    text = path.read_text()
    assert text.startswith("# Log\n\nPreface.\n\n## ") and text.endswith("\n\n## 2026-01-01 · old\n\nText.\n")
    assert text.index("cosine") < text.index("old") and "+3.1%" in text and "**promote**" in text
    write_log(tmp_path / "new.md", log_entry("x", "reject", "slower", None))
    assert (tmp_path / "new.md").read_text().startswith("# Log\n\n## ")
