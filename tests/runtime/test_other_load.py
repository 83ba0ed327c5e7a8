"""The load of other programs: counted from the system's own figures, this process left out."""

import os

import pytest

from nanochat.runtime.other_load import SPOILT, OtherLoad, spoilt_warning

HERTZ = os.sysconf("SC_CLK_TCK")


def stat(path, user=0.0, idle=0.0, steal=0.0):
    """A /proc/stat of these seconds, all cores together."""
    ticks = [int(1000 * HERTZ + seconds * HERTZ) for seconds in (user, 0, 0, idle, 0, 0, 0, steal)]
    path.write_text(f"cpu  {' '.join(map(str, ticks))} 0 0\ncpu0 1 2 3\n")


@pytest.mark.parametrize("user, idle, steal, share", [(0, 100, 0, 0.0), (30, 70, 0, 0.3), (30, 60, 10, 0.4), (100, 0, 0, 1.0)])
def test_others_are_what_is_busy_and_not_ours(tmp_path, user, idle, steal, share):
    path = tmp_path / "stat"
    stat(path)
    load = OtherLoad(path)
    stat(path, user, idle, steal)
    assert load.share() == pytest.approx(share, abs=0.02)  # this process has used some milliseconds
    assert (spoilt_warning(load.share()) is not None) == (share > SPOILT)


def test_own_work_is_not_others(tmp_path):
    path = tmp_path / "stat"
    stat(path)
    load, began = OtherLoad(path), sum(os.times()[:4])
    while sum(os.times()[:4]) - began < 0.3:
        pass
    stat(path, user=0.3, idle=0.7)
    assert load.share() < 0.05


@pytest.mark.parametrize("content", [None, "", "cpu", "intr 1 2 3 4 5 6 7 8", "cpu a b c d e f g h"])
def test_where_the_system_does_not_say_nothing_is_claimed(tmp_path, content):
    path = tmp_path / "stat"
    if content is not None:
        path.write_text(content)
    assert OtherLoad(path).share() is None and spoilt_warning(None) is None
