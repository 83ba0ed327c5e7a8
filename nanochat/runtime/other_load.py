"""How much of the processor other programs use while something is timed. No torch."""

import os
from collections.abc import Sequence
from pathlib import Path

SPOILT = 0.05  # share of all cores' time that others may have before a figure is no longer to be believed


class OtherLoad:
    """Measures from its construction on. Linux only: elsewhere `share` is None.

    Counted are other programs and, on a virtual machine, what its host gives to others (steal). Of this process's children those
    count as its own that have ended.

    processes: ids of further processes that count as its own, with all their children, as long as they live.
    """

    def __init__(self, stat: Path = Path("/proc/stat"), processes: Sequence[int] = ()):
        self.stat, self.processes = stat, processes
        self.began = self._seconds()

    def share(self) -> float | None:
        """Share of all cores' time since then that others have used, 0 to 1."""
        now = self._seconds()
        if not now or not self.began:
            return None
        elapsed, busy, own = (after - before for after, before in zip(now, self.began, strict=True))
        return min(max(0.0, busy - own) / elapsed, 1.0) if elapsed > 0 else None

    def _seconds(self) -> tuple[float, float, float] | None:
        """Seconds of all cores together since the system started: in all, busy, and of this program's processes."""
        try:
            words = self.stat.read_text().split("\n")[0].split()
            ticks = [int(word) for word in words[1:9]]  # user nice system idle iowait irq softirq steal
            hertz = os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, AttributeError):
            return None
        if words[:1] != ["cpu"] or len(ticks) < 8:
            return None
        own = sum(os.times()[:4]) + sum(self._ticks_of(pid) for pid in self.processes) / hertz
        return sum(ticks) / hertz, (sum(ticks) - ticks[3] - ticks[4]) / hertz, own

    def _ticks_of(self, pid: int) -> int:
        """Clock ticks of a live process and its children, those that have ended too; 0 for one that has ended itself."""
        folder = self.stat.parent / str(pid)
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            children = [int(child) for path in folder.glob("task/*/children") for child in path.read_text().split()]
        except (OSError, ValueError):
            return 0
        return sum(map(int, fields[11:15])) + sum(map(self._ticks_of, children))  # utime stime cutime cstime


def spoilt_warning(share: float | None) -> str | None:
    """A line for the user where others had so large a share that the figures are spoilt."""
    if share is None or share <= SPOILT:
        return None
    return f"note: other programs used {share:.0%} of the processor while this was timed, so the figures are spoilt"
