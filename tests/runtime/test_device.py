"""Threads: as many as a container may use, and waiting ones that sleep soon."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.runtime.device import cpu_quota

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
