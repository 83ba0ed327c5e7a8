"""C++ kernels: they compile on CPUs that support them; elsewhere there is a reason, not a crash."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat.kernels import cpp_kernels

ROOT = Path(__file__).parents[2]
supported = sys.platform == "linux" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
needs_cpu = pytest.mark.skipif(not supported, reason="the kernels are for CPUs with AVX512-BF16, on Linux")


def reason_in_a_process(**environment):
    code = "from nanochat.kernels.cpp_kernels import cpp_unavailable_reason; print(cpp_unavailable_reason('attention'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@needs_cpu
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
@pytest.mark.skipif(os.environ.get(cpp_kernels.SWITCH) == "0", reason=f"{cpp_kernels.SWITCH}=0")
@pytest.mark.parametrize("name", sorted(path.stem for path in cpp_kernels.FOLDER.glob("*.cpp")))
def test_every_kernel_compiles(name):
    assert cpp_kernels.cpp_unavailable_reason(name) is None


def test_a_header_is_part_of_what_is_compiled(tmp_path, monkeypatch):
    """And so of what the cache knows a kernel by: whoever changes a header gets new kernels."""
    assert not any(line.startswith('#include "') for path in cpp_kernels.FOLDER.glob("*.cpp")
                   for line in cpp_kernels.source(path.stem).splitlines())
    monkeypatch.setattr(cpp_kernels, "FOLDER", tmp_path)
    (tmp_path / "one.cpp").write_text('#include <cmath>\n#include "two.h"\nint one = two - 1;\n')
    (tmp_path / "two.h").write_text("constexpr int two = 2;\n")
    assert cpp_kernels.source("one").split() == "#include <cmath> constexpr int two = 2; int one = two - 1;".split()


def test_the_switch_leaves_the_kernels_out():
    assert reason_in_a_process(NANOCHAT_NATIVE="0") == "NANOCHAT_NATIVE=0"


@pytest.mark.slow
@needs_cpu
def test_without_a_compiler_there_is_a_reason(tmp_path):
    warning, reason = reason_in_a_process(CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path),
                                          NANOCHAT_NATIVE="1").splitlines()
    assert "no-such-compiler" in reason and reason in warning


@pytest.mark.slow
@needs_cpu
def test_a_space_in_the_path_of_torch_and_of_the_cache(tmp_path):
    """A kernel compiles all the same, its library where it was asked for. One as small as kernels get, for its compile time."""
    (tmp_path / "my env").mkdir()
    (tmp_path / "my env" / "torch").symlink_to(Path(torch.__file__).parent)
    code = """from pathlib import Path; import sys; from nanochat.kernels import cpp_kernels
cpp_kernels.FOLDER = Path(sys.argv[1])
print(cpp_kernels.cpp_unavailable_reason('small'), cpp_kernels.library('small').answer())"""
    (tmp_path / "small.cpp").write_text('extern "C" int answer() { return 42; }')
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "my env"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "my cache"),
                                "TMPDIR": str(tmp_path), "NANOCHAT_NATIVE": "1"}
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.stdout.splitlines()[-1:] == ["None 42"], run.stderr
    assert any((tmp_path / "my cache").rglob("*.so"))


@needs_cpu
def test_a_file_that_is_missing_is_a_reason():
    assert "no_such_kernel" in cpp_kernels.cpp_unavailable_reason("no_such_kernel")


def test_pointer_is_where_the_elements_are():
    x = torch.arange(10)
    assert cpp_kernels.pointer(x[3:]).value == x.data_ptr() + 3 * x.element_size()
