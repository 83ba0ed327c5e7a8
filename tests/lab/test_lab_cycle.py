"""The state of a cycle: plateau and rollback as in docs/lab.md, a log whose newest entry is first."""

import pytest
from hypothesis import given, strategies as st

from nanochat.common import UserError
from nanochat.lab.cycle import (
    PHASES,
    PLATEAU_GAIN,
    ROLLBACK_REASONS,
    current,
    log_entry,
    new_cycle,
    plateau,
    read_cycles,
    record_decision,
    roll_back,
    write_cycles,
    write_log,
)


def cycle(gain=0.0, done=True, promoted=()):
    made = new_cycle("c", "val_bpb", 1.0)
    return made | {"robust_gain": gain, "promoted": list(promoted), "phases": dict.fromkeys(PHASES, "done" if done else "open")}


@pytest.mark.parametrize("cycles, reached", [
    ([cycle(), cycle()], True),
    ([cycle(0.019), cycle(0.0199)], True),
    ([cycle()], False),
    ([cycle(), cycle(0.02)], False),
    ([cycle(), cycle(done=False)], False),
    ([cycle(), cycle(promoted=["x"])], False),
    ([cycle(0.5), cycle(), cycle()], True),   # only the last two count
    ([cycle(), cycle(), cycle(done=False)], True),        # one is under way
    ([cycle(), cycle(done=False), cycle()], False),       # one was given up: they are not two in a row
])
def test_plateau(cycles, reached):
    assert plateau(cycles)[0] == reached


@given(st.lists(st.floats(0.0, 0.05), min_size=2, max_size=5))
def test_plateau_is_two_small_cycles_in_a_row(gains):
    assert plateau([cycle(g) for g in gains])[0] == all(g < PLATEAU_GAIN for g in gains[-2:])


def test_decisions_add_up_and_roll_back():
    now = record_decision(record_decision(cycle(), "cosine", "promote", 0.03), "batch", "keep optional", 0.01)
    assert now["promoted"] == ["cosine"] and now["optional"] == ["batch"] and now["robust_gain"] == pytest.approx(0.03)
    newer = cycle(0.01, promoted=["other"])
    back, same = roll_back([now, newer], "cosine", ROLLBACK_REASONS[0])  # promoted by an earlier cycle than the present one
    assert back["promoted"] == [] and back["robust_gain"] == pytest.approx(0) and "cosine" in back["optional"]
    assert len(back["log"]) == 3 and now["promoted"] == ["cosine"] and same == newer
    with pytest.raises(UserError, match="other"):
        roll_back([back, newer], "cosine", ROLLBACK_REASONS[0])
    with pytest.raises(UserError):
        roll_back([now], "cosine", "mood")


def test_files(tmp_path):
    path = tmp_path / "a" / "cycles.json"
    assert read_cycles(path) == []
    with pytest.raises(UserError):
        current([])
    write_cycles(path, [cycle()])
    assert current(read_cycles(path)) == cycle()
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
