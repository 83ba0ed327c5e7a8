"""The load of other programs: counted from the system's own figures, this process left out."""

import os
import subprocess
import sys
import time
from pathlib import Path

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


def process(folder, pid, ticks, children=()):
    """The /proc entry of a process with these utime, stime, cutime, cstime."""
    (folder / str(pid) / "task" / str(pid)).mkdir(parents=True, exist_ok=True)
    (folder / str(pid) / "stat").write_text(f"{pid} (a name) with ) S 1 2 3 4 5 6 7 8 9 10 {' '.join(map(str, ticks))} 20 0\n")
    (folder / str(pid) / "task" / str(pid) / "children").write_text(" ".join(map(str, children)))


def test_processes_that_are_named_and_their_children_are_not_others(tmp_path):
    stat(tmp_path / "stat")
    process(tmp_path, 7, (0, 0, 0, 0), children=[8])
    process(tmp_path, 8, (100, 0, 0, 0))
    load = OtherLoad(tmp_path / "stat", processes=[7, 99])  # 99 has ended
    stat(tmp_path / "stat", user=60, idle=40)
    process(tmp_path, 7, (10 * HERTZ, 5 * HERTZ, 3 * HERTZ, 2 * HERTZ), children=[8])
    process(tmp_path, 8, (100 + 20 * HERTZ, 0, 0, 0))
    assert load.share() == pytest.approx(0.2, abs=0.01)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="where there is /proc")
def test_a_process_of_this_machine_can_be_named():
    spin = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        with_it, without = OtherLoad(), OtherLoad(processes=[spin.pid])
        time.sleep(0.5)
        assert with_it.share() - without.share() > 0.1 / os.cpu_count()  # of a core, however busy the machine is
    finally:
        spin.kill()
        spin.wait()
