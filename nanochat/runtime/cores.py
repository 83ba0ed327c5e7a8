"""Cores and threads: how many a container grants, which ones each of several processes takes, how many threads are fastest."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from nanochat.runtime.tuner import Choice, Tuner

SYSTEM = Path("/sys/devices/system/cpu")
CONTROL_GROUP = Path("/sys/fs/cgroup")
AS_FAST = 0.9  # a core of this share of the fastest core's clock or more is one of the fast ones
TOKENS = 2048  # of the products by which numbers of threads are compared


def take_cores(local_rank: int, processes: int, system: Path = SYSTEM) -> None:
    """Of several processes of one machine, keep this one to its share of the cores, with as many threads: neighbours of one
    memory node, so that its weights are near. Linux only, and where each has a core of its own.

    torchrun sets OMP_NUM_THREADS=1, whatever the number of cores; another value counts.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0), key=lambda core: place_of_core(system / f"cpu{core}"))
    share = cores[len(cores) * local_rank // processes:len(cores) * (local_rank + 1) // processes]
    if len(cores) >= processes:
        os.sched_setaffinity(0, share)
        if os.environ.get("OMP_NUM_THREADS", "1") == "1":
            torch.set_num_threads(min(len(share), max(1, (cpu_quota() or len(cores)) // processes)))


def place_of_core(folder: Path) -> tuple[int, ...]:
    """Memory node, physical core, number: sorted by it, neighbours are near each other."""
    node = next((int(path.name[4:]) for path in folder.glob("node[0-9]*")), 0)
    return node, _number(folder / "topology/core_id") or 0, int(folder.name[3:])


def cpu_quota(group: Path = CONTROL_GROUP) -> int | None:
    """Cores that the control group of a container grants, at least 1; None without a limit. torch counts those of the machine:
    the threads beyond the quota would make all of them wait."""
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # of control groups version 2, and 1
        try:
            quota, period = [word for name in files for word in (group / name).read_text().split()]
            return None if int(quota) <= 0 else max(1, -(-int(quota) // int(period)))
        except (OSError, ValueError, ZeroDivisionError):  # not there, or "max"
            continue
    return None


def cache_bytes(system: Path = SYSTEM) -> int | None:
    """Bytes of the last-level caches of the cores that this process may use; None where the system does not tell (Linux does)."""
    caches: dict[str, int] = {}  # by the cores that share it
    for core in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ():
        levels = [(level, folder) for folder in (system / f"cpu{core}/cache").glob("index[0-9]*")
                  if (level := _number(folder / "level"))]
        try:
            _, last = max(levels)
            size = (last / "size").read_text().strip()
            caches[(last / "shared_cpu_list").read_text()] = int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1:]]
        except (OSError, ValueError, KeyError):
            return None
    return sum(caches.values()) or None


def choose_threads(tuner: "Tuner", width: int, dtype: torch.dtype, recorded: str | None = None,
                   system: Path = SYSTEM) -> "Choice | None":
    """Let torch use the number of threads that multiplies fastest: on a processor with fast and slow cores, those of the slow
    ones may hold up all others, and of two threads of one core the second may gain nothing.

    width: of the model.   recorded: the number in the run to be resumed, which is kept where this machine has as many.
    Returns None where there is nothing to choose: all cores are alike, the user has set OMP_NUM_THREADS, not Linux.
    """
    counts = thread_counts(system)
    if recorded in map(str, counts):
        counts = [int(recorded)]
    elif len(counts) == 1:
        return None
    random = torch.Generator().manual_seed(0)  # a private generator: the run's random numbers must not change
    x, w = (torch.randn(shape, generator=random).to(dtype) for shape in ((TOKENS, width), (width, 4 * width)))

    def multiply(threads: int) -> None:  # to the MLP's width and back, with its activation: most of a layer
        torch.set_num_threads(threads)
        (x @ w).relu_().square_() @ w.t()
    choice = tuner.choose(f"threads for products {TOKENS}x{width}x{4 * width} {dtype}",
                          {str(n): lambda n=n: lambda: multiply(n) for n in counts}, times_in_use=100)
    torch.set_num_threads(int(choice.name))
    return choice


def thread_counts(system: Path = SYSTEM, group: Path = CONTROL_GROUP) -> list[int]:
    """Numbers of threads that may be the fastest here, the present one first: one per physical core, per fast physical core, and
    per logical core, of those that this process may use and within a container's quota."""
    present = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ or not hasattr(os, "sched_getaffinity"):
        return [present]
    physical: dict[tuple, int] = {}  # socket and core -> its clock or capacity
    usable = os.sched_getaffinity(0)
    for core in usable:
        folder = system / f"cpu{core}"
        speed = _number(folder / "cpu_capacity") or _number(folder / "cpufreq/cpuinfo_max_freq") or 0
        socket, number = _number(folder / "topology/physical_package_id"), _number(folder / "topology/core_id")
        physical[(socket, core if number is None else number)] = speed
    fast = sum(speed >= AS_FAST * max(physical.values()) for speed in physical.values())
    most = cpu_quota(group) or len(usable)
    return list(dict.fromkeys(min(count, most) for count in (present, len(physical), fast, len(usable))))


def _number(path: Path) -> int | None:
    """The number in a file of the system, None where it has none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
