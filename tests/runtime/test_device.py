"""Threads: as many as a container may use, and waiting ones that sleep soon. GPUs: settings that not every system bears, and none
that is passed over in silence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat.common import UserError
from nanochat.runtime.device import check_device_type, cpu_quota, let_segments_grow, place_of_core
from processes import python_c

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("given, expected", [({}, "2000 None"), ({"GOMP_SPINCOUNT": "7"}, "7 None"),
                                             ({"OMP_WAIT_POLICY": "active"}, "None active")])
def test_waiting_threads_sleep_soon_unless_the_user_says_otherwise(given, expected):
    code = """import os
from nanochat.cli.program import cli
cli(lambda: print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY")))"""
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean | given, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr


@pytest.mark.parametrize("program", sorted(p.stem for p in (ROOT / "scripts").glob("*.py")))
def test_no_program_loads_torch_before_its_main(program):
    """Or what the environment says of threads would come too late."""
    done = subprocess.run([sys.executable, "-c", f"import sys, scripts.{program}; sys.exit('torch' in sys.modules)"], cwd=ROOT)
    assert done.returncode == 0


@pytest.mark.parametrize("release, given, setting", [
    ("6.8.0-45-generic\n", {}, "expandable_segments:True"), (None, {}, "expandable_segments:True"),
    ("5.15.153.1-microsoft-standard-WSL2\n", {}, None), ("4.4.0-19041-Microsoft\n", {}, None),
    ("6.8.0-45-generic\n", {"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
    ("6.8.0-45-generic\n", {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None),
    ("5.15.153.1-microsoft-standard-WSL2\n", {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, "expandable_segments:True"),
])
def test_segments_grow_except_under_windows_and_where_the_user_says_otherwise(tmp_path, monkeypatch, release, given, setting):
    monkeypatch.setattr(os, "environ", dict(given))
    if release is not None:
        (tmp_path / "osrelease").write_text(release)
    let_segments_grow(tmp_path / "osrelease")
    assert os.environ.get("PYTORCH_ALLOC_CONF") == setting


@pytest.mark.skipif(torch.cuda.is_available() or Path("/proc/driver/nvidia/version").exists(), reason="this machine has a GPU")
def test_a_gpu_that_torch_does_not_see_is_named(tmp_path, monkeypatch, capsys):
    """As with a torch for CUDA 13 under Windows' Linux, where the driver's version is asked of nvidia-smi."""
    (smi := tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 552.44\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert check_device_type("") != "cuda" and not capsys.readouterr().out  # this torch has no CUDA, or knows no such driver
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert check_device_type("") != "cuda"
    said = capsys.readouterr().out
    assert said.startswith("the GPU is not used: the NVIDIA driver 552.44 is too old") and len(said.splitlines()) == 1
    with pytest.raises(UserError, match="^--device-type cuda: the NVIDIA driver 552.44 .* CUDA 13.0.* Available: "):
        check_device_type("cuda")
    assert check_device_type("cpu") == "cpu" and not capsys.readouterr().out


def make_core(system, number, core, node):
    folder = system / f"cpu{number}"
    (folder / "topology").mkdir(parents=True)
    (folder / "topology/core_id").write_text(f"{core}\n")
    (folder / f"node{node}").mkdir()


def cores_of_ranks(tmp_path, processes):
    """The cores and the number of threads that each of several processes of this machine takes, in processes of their own."""
    code = ("import os, sys, torch; from pathlib import Path; from nanochat.runtime.device import take_cores; "
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
