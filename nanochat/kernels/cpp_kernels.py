"""C++ kernels for CPUs with AVX512-BF16, compiled at first use. Every kernel has a PyTorch fallback that it is tested against.

A kernel is a file in `cpp/` with plain C functions on pointers and sizes. It includes no torch header, so it compiles in
seconds. The build is torch.compile's own (torch._inductor's CppCodeCache): its compiler and flags (`-march=native`), its cache
on disk, and torch's OpenMP runtime, so that kernels and torch share one pool of threads.

Call `cpp_unavailable_reason(name)` first; if it is None, `library(name)` has the functions.
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
SWITCH = "NANOCHAT_NATIVE"  # environment variable: 0 disables the kernels


@functools.cache
def cpp_unavailable_reason(name: str) -> str | None:
    """Why the kernels of `cpp/NAME.cpp` cannot be used here, or None. Compiles them to find out."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    if not (sys.platform == "linux" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()):
        return "the kernels are for CPUs with AVX512-BF16, on Linux"
    try:
        kernels = library(name)
    except Exception as e:  # a missing or broken compiler raises many kinds of errors
        _warn_once(why := reason(e))
        return why
    if hasattr(kernels, "brgemm_works"):
        why = ctypes.create_string_buffer(200)
        if not kernels.brgemm_works(why, ctypes.c_int64(len(why))):
            return f"PyTorch's brgemm does not work here: {why.value.decode(errors='replace').splitlines()[0]}"


@functools.cache
def _warn_once(why: str) -> None:
    """One line for all kernels: this CPU could be faster with a working compiler."""
    print0(f"C++ kernels are not available, training is slower: {why}")


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """The compiled kernels of `cpp/NAME.cpp`."""
    prepare_compiler()
    from torch._inductor.codecache import CppCodeCache
    return CppCodeCache.load(source(name))


def source(name: str) -> str:
    """Source code of a kernel with the headers of `cpp/` pasted in: the compile cache is keyed by this one text."""
    text = (FOLDER / f"{name}.cpp").read_text()
    return re.sub(r'^#include "(.+)"$', lambda included: (FOLDER / included[1]).read_text(), text, flags=re.MULTILINE)


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    """Address of a tensor's data. The caller keeps the tensor alive and is responsible for strides and dtype."""
    return ctypes.c_void_p(tensor.data_ptr())
