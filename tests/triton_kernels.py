"""Test Triton kernels without a GPU: run them in Triton's interpreter, and compile them to PTX.

In processes of their own, the interpreter's a new one: Triton reads its environment variables when it is first imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from processes import python_c

ROOT = Path(__file__).parents[1]
COMPILER = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
target = GPUTarget("cuda", {capability}, 32)
"""


def interpreted(code: str) -> None:
    """Run `code`, which ends in print("equal"), in Triton's interpreter."""
    pytest.importorskip("triton", reason="triton is not installed: its kernels are not run here")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True,
                          text=True)
    assert done.stdout == "equal\n", done.stderr


def compiled_for(capability: int, code: str) -> str:
    """Output of `code`, which runs after the lines of COMPILER. capability: of the GPU `target`, 89 for sm_89 and so on."""
    pytest.importorskip("triton", reason="triton is not installed: its kernels are not compiled here")
    done = python_c(COMPILER.format(capability=capability) + code)
    assert done.returncode == 0, done.stderr
    return done.stdout
