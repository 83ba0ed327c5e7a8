"""Cores and threads: as many as a container grants, shared among processes, and as many threads as are fastest."""

import json
import os
import time

import pytest
import torch

from nanochat.runtime.cores import cache_bytes, choose_threads, cpu_quota, place_of_core, thread_counts
from nanochat.runtime.tuner import Tuner
from processes import python_c

CPU = torch.device("cpu")


@pytest.mark.parametrize("files, cores", [
    ({}, None), ({"cpu.max": "max 100000\n"}, None), ({"cpu.max": "200000 100000\n"}, 2), ({"cpu.max": "150000 100000"}, 2),
    ({"cpu.max": "5000 100000"}, 1), ({"cpu.max": ""}, None), ({"cpu.max": "x y"}, None), ({"cpu.max": "1 0"}, None),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
])
def test_the_quota_of_a_container(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == cores


def make_core(system, number, core, node=0, **files):
    """A core as Linux describes it, with further files: name -> number, `__` for `/`."""
    folder = system / f"cpu{number}"
    (folder / f"node{node}").mkdir(parents=True)
    for name, value in {"topology__core_id": core, **files}.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{value}\n")


def cores_of_ranks(tmp_path, processes):
    """The cores and the number of threads that each of several processes of this machine takes, in processes of their own."""
    code = ("import os, sys, torch; from pathlib import Path; from nanochat.runtime.cores import take_cores; "
            "take_cores(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])); "
            "print(sorted(os.sched_getaffinity(0)), torch.get_num_threads())")
    found = []
    for rank in range(processes):
        done = python_c(code, rank, processes, tmp_path, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        cores, _, count = done.stdout.strip().rpartition(" ")
        found.append((json.loads(cores), int(count)))
    return found


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux alone lets a process choose its cores")
def test_processes_of_a_machine_share_its_cores(tmp_path):
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) < 2:
        assert cores_of_ranks(tmp_path, 2)[0][0] == mine  # none has a core of its own: they share
        return
    (first, threads), (second, _) = cores_of_ranks(tmp_path, 2)
    assert sorted(first + second) == mine and threads == len(first) and abs(len(first) - len(second)) <= 1
    assert cores_of_ranks(tmp_path, len(mine) + 1)[0][0] == mine


def test_neighbours_are_of_one_memory_node_and_one_core(tmp_path):
    for number, core, node in ((0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1), (4, 0, 0), (5, 0, 1)):  # 0 and 4 are one core
        make_core(tmp_path, number, core, node)
    by_place = sorted(range(6), key=lambda number: place_of_core(tmp_path / f"cpu{number}"))
    assert by_place == [0, 4, 2, 1, 5, 3]
    assert place_of_core(tmp_path / "cpu9") == (0, 0, 9)  # a system that does not say


@pytest.fixture
def two_threads(monkeypatch):
    """torch has two threads, whatever the test does, and no variable says how many it should have."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def use_cores(monkeypatch, number):
    """This process may use the first `number` cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(number)), raising=False)


LAPTOP = [{"core": core, "cpufreq__cpuinfo_max_freq": 5_000_000 if core < 2 else 3_800_000}
          for core in (0, 0, 1, 1, 2, 3, 4, 5)]  # 2 fast cores of 2 threads, 4 slow ones
PHONE = [{"core": core, "cpu_capacity": 1024 if core > 5 else 400} for core in range(8)]  # ARM: 2 fast cores
SERVER = [{"core": core % 2, "topology__physical_package_id": core // 2} for core in range(4)]  # two sockets of two cores


@pytest.mark.parametrize("machine, quota, counts", [
    (LAPTOP, None, [2, 6, 8]), (PHONE, None, [2, 8]), (SERVER, None, [2, 4]), (LAPTOP, 3, [2, 3]), (LAPTOP, 1, [1]),
    ([{"core": 0}] * 4, None, [2, 1, 4]), ([{"core": 0}, {"core": 1}], None, [2])])
def test_threads_worth_trying_follow_from_the_kinds_of_cores(tmp_path, monkeypatch, two_threads, machine, quota, counts):
    for number, core in enumerate(machine):
        make_core(tmp_path, number, **core)
    use_cores(monkeypatch, len(machine))
    if quota:
        (tmp_path / "cpu.max").write_text(f"{quota * 100000} 100000\n")
    assert thread_counts(tmp_path, tmp_path) == counts
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert thread_counts(tmp_path, tmp_path) == [2], "the user has said how many"


def test_a_system_that_says_nothing_of_its_cores_has_as_many_as_it_has_numbers(tmp_path, monkeypatch, two_threads):
    use_cores(monkeypatch, 4)
    assert thread_counts(tmp_path, tmp_path) == [2, 4]


def test_the_fastest_number_of_threads_is_taken_remembered_and_resumed(tmp_path, monkeypatch, two_threads):
    make_core(tmp_path, 0, 0)
    make_core(tmp_path, 1, 0)
    use_cores(monkeypatch, 2)
    real = torch.set_num_threads

    def slow_with_two(count):  # two threads of one core that stand in each other's way
        time.sleep(0.01 if count == 2 else 0)
        real(count)
    monkeypatch.setattr(torch, "set_num_threads", slow_with_two)
    tuner = Tuner(CPU, tmp_path / "tuner")
    state = torch.random.get_rng_state()
    choice = choose_threads(tuner, 64, torch.float32, system=tmp_path)
    assert (choice.name, torch.get_num_threads()) == ("1", 1) and set(choice.milliseconds) == {"2", "1"}
    assert torch.equal(state, torch.random.get_rng_state())
    real(2)
    assert choose_threads(tuner, 64, torch.float32, system=tmp_path).reason == "measured before" and torch.get_num_threads() == 1
    real(2)
    assert choose_threads(tuner, 64, torch.float32, recorded="2", system=tmp_path).name == "2" and torch.get_num_threads() == 2
    assert choose_threads(tuner, 64, torch.float32, recorded="16", system=tmp_path).name == "1", "fewer cores than there were"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux alone tells which cores a process may use")
def test_the_last_level_caches_of_a_processor(tmp_path):
    """Each counts once, however many cores share it; where a core does not tell, nothing is known."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("a single core")

    def describe(core, shared, size):
        for index, (level, bytes_) in enumerate([(1, "32K"), (1, "32K"), (2, "1024K"), (3, size)]):
            folder = tmp_path / f"cpu{core}/cache/index{index}"
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in (("level", level), ("size", bytes_), ("shared_cpu_list", shared if level == 3 else core)):
                (folder / name).write_text(f"{text}\n")
    assert cache_bytes(tmp_path) is None
    for core in cores:
        describe(core, "all", "32768K")
    assert cache_bytes(tmp_path) == 32 * 2**20
    describe(cores[0], "one", "16M")
    assert cache_bytes(tmp_path) == 48 * 2**20
    (tmp_path / f"cpu{cores[1]}/cache/index3/size").write_text("unknown")
    assert cache_bytes(tmp_path) is None
