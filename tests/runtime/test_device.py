"""Waiting threads sleep soon. GPUs: settings that not every system bears, and none that is passed over in silence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat.common import UserError
from nanochat.runtime.device import check_device_type, let_segments_grow

ROOT = Path(__file__).parents[2]


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
