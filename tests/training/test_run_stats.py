"""What a run's steps have come to: rates leave out the steps in which something was compiled."""

import json

import pytest

from nanochat.training.run_stats import RunStats


def stats_of(seconds, compiled=(), partial=()):
    stats, clock = RunStats(), 0.0
    for step, dt in enumerate(seconds):
        clock += dt
        stats.add_step(step, 5.0 - step, dt, 100.0, clock, compiled=step in compiled, partial=step in partial)
    return stats


def test_a_step_that_compiled_is_no_measure_of_speed():
    """Its seconds may be too many or, on a GPU, too few. Its loss and memory count like any other's."""
    with_one, without = stats_of([1e-9, 2.0, 4.0, 9.0, 3.0], compiled=(0, 3)), stats_of([2.0, 4.0, 3.0])
    now, expected = with_one.summary(60, 10, 1000.0), without.summary(60, 10, 1000.0)
    for field in ("tok_per_sec_max", "tok_per_sec_avg", "tok_per_sec_median", "dt_median_ms", "mfu"):
        assert now[field] == expected[field], field
    assert (now["tok_per_sec_max"], now["tok_per_sec_avg"], now["dt_median_ms"]) == (30, 20, 3000)
    assert now["final_loss"] == 1.0 and with_one.smooth_loss == pytest.approx(stats_of([1] * 5).smooth_loss)


def test_mfu_is_of_steps_that_run_and_train_all_blocks():
    """The others do fewer of the FLOPs that are counted, so it would be too high. Of 1000 FLOP/s: 600 in 2 s."""
    summary = stats_of([0.5, 0.5, 0.5, 2.0, 2.0], partial=(0, 1, 2)).summary(60, 10, 1000.0)
    assert summary["mfu"] == pytest.approx(0.3) and summary["tok_per_sec_median"] == 120
    assert stats_of([1.0, 1.0], partial=(0, 1)).summary(60, 10, 1000.0)["mfu"] is None


def test_nothing_is_known_where_every_step_compiled():
    summary = stats_of([1.0, 2.0], compiled=(0, 1)).summary(60, 10, None)
    assert summary["tok_per_sec_max"] is summary["tok_per_sec_avg"] is summary["dt_median_ms"] is None


def test_a_state_of_before_steps_were_marked_can_be_loaded():
    state = json.loads(json.dumps(stats_of([1.0, 2.0], compiled=(0,)).state_dict()))
    loaded = RunStats()
    loaded.load_state_dict(state)
    assert loaded.summary(60, 10, None)["tok_per_sec_max"] == 30
    del state["compiled"]
    older = RunStats()
    older.load_state_dict(state)
    older.add_step(2, 1.0, 4.0, 100.0, 7.0, compiled=True)
    assert older.summary(60, 10, None)["tok_per_sec_avg"] == 40 and older.compiled == [2]
