"""Triton's own compiler: where it is missing, PyTorch takes the place of our kernels, and one line says why and what
to install."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat.runtime.toolchain import failure_reason

ROOT = Path(__file__).parents[2]


def without_compiler(code: str, folder: Path) -> list[str]:
    """The lines that `code` prints in a process of its own, which finds no program and nothing that Triton has kept."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment | {
        "PATH": str(folder), "TRITON_CACHE_DIR": str(folder / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


CHOSEN = """
import torch
from nanochat.kernels.cross_entropy import kernel_name
from nanochat.kernels.norms import kernels_for
print(kernels_for("cpu"))
print(kernel_name("cuda", torch.bfloat16), kernels_for("cuda"), kernels_for("cuda"))
"""


def test_where_triton_does_not_run_pytorch_takes_its_place(tmp_path):
    """Whatever is missing: Triton, a GPU or the C compiler. The reason is printed once, and only when a GPU is meant."""
    for_cpu, *said, chosen = without_compiler(CHOSEN, tmp_path)
    assert for_cpu == "None"
    if torch.cuda.is_available() and not said:
        pytest.skip("this Triton needs no C compiler")
    assert chosen == "PyTorch None None" and len(said) == 1
    assert said[0].startswith("kernels in Triton cannot be used, PyTorch takes their place, slower: ")


LAUNCHER = """
from triton.runtime.build import compile_module_from_src
from nanochat.runtime.toolchain import failure_reason
print(failure_reason(lambda: compile_module_from_src("int launch;", "launcher")))
"""


def test_tritons_launcher_without_a_c_compiler(tmp_path):
    """The step that a launch begins with, which needs no GPU."""
    pytest.importorskip("triton", reason="triton is not installed: its launcher is not compiled here")
    said, = without_compiler(LAUNCHER, tmp_path)
    assert "C compiler" in said and "apt install gcc" in said


@pytest.mark.parametrize("compiler", ["no-such-compiler", "gcc -O1", ""])
def test_a_variable_that_names_no_c_compiler(monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    assert failure_reason(lambda: subprocess.check_call([compiler])) == (
        f"CC={compiler!r} is no C compiler that runs. Set it to the path of one, without options, or unset it")


@pytest.mark.parametrize("variable, folder, named", [
    (None, ".triton/cache", "TRITON_CACHE_DIR"), ("TRITON_CACHE_DIR", "mine", "TRITON_CACHE_DIR"),
    (None, "torchinductor_me", "TORCHINDUCTOR_CACHE_DIR"),
])
def test_a_folder_that_cannot_be_made_is_named_with_its_variable(tmp_path, monkeypatch, variable, folder, named):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    if variable:
        monkeypatch.setenv(variable, str(tmp_path / folder))
    (tmp_path / folder.split("/")[0]).write_text("a file, where the folder should be")
    said = failure_reason(lambda: (tmp_path / folder / "key").mkdir(parents=True))
    assert str(tmp_path) in said and f"Set {named} to a folder that you can write to" in said


def test_the_reasons_of_triton_say_what_to_do(tmp_path):
    def missing():
        raise ModuleNotFoundError("No module named 'triton'", name="triton")
    assert failure_reason(missing) == "No module named 'triton'. Install Triton (pip install triton)"
    (compiler := tmp_path / "gcc").write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    said = failure_reason(lambda: subprocess.check_call([str(compiler), "main.c"]))
    assert said.startswith(f"{compiler} failed") and "python3-dev" in said
    assert failure_reason(lambda: None) is None
