"""C++ kernels for CPUs that multiply bf16 natively: compiled when first used, never needed.

A kernel is a file in `cpp/` of plain C functions on pointers and sizes, without a torch header, so that it
compiles in seconds; what several kernels share is in a header there. torch.compile's own builder makes it a library: its
compiler, its flags (`-march=native`), its cache on disk, and torch's OpenMP, so that kernels and torch share their threads.
Whoever wants a kernel asks `why_not_native` first, and has a plain path that the kernel is tested against.
"""

import ctypes
import functools
import os
import re
import sys
from pathlib import Path

import torch

from nanochat.common import print0
from nanochat.runtime.toolchain import prepare_compiler, reason

FOLDER = Path(__file__).parent / "cpp"
SWITCH = "NANOCHAT_NATIVE"  # 0 in the environment leaves the kernels out


@functools.cache
def why_not_native(name: str) -> str | None:
    """None where the kernels of `cpp/NAME.cpp` can be had, else the reason in words. Compiles them to find out."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    if not (sys.platform == "linux" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()):
        return "the kernels are for CPUs with AVX512-BF16, on Linux"
    try:
        library(name)
    except Exception as e:  # whatever a missing or broken tool chain raises
        _say(why := reason(e))
        return why


@functools.cache
def _say(why: str) -> None:
    """Once, whatever the number of kernels: a machine that could be faster is worth a line."""
    print0(f"going on without the C++ kernels, slower: {why}")


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """The compiled kernels of `cpp/NAME.cpp`."""
    prepare_compiler()
    from torch._inductor.codecache import CppCodeCache
    return CppCodeCache.load(source(name))


def source(name: str) -> str:
    """What is compiled, and what its cache knows it by: one text, with the headers of `cpp/` where they are included."""
    text = (FOLDER / f"{name}.cpp").read_text()
    return re.sub(r'^#include "(.+)"$', lambda included: (FOLDER / included[1]).read_text(), text, flags=re.MULTILINE)


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    """Where the elements of a tensor are. The caller keeps the tensor alive, and sees to its strides and dtype."""
    return ctypes.c_void_p(tensor.data_ptr())
