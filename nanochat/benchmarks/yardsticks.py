"""What the speed of a step is compared with: the machine's matrix rate, and another trainer.

torch is imported where it is used: wrong flags are reported before it is loaded.
"""

import ctypes
import re
import statistics
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING

from nanochat.common import UserError

if TYPE_CHECKING:
    import torch


def make_gemm(device: "torch.device", dtype: "torch.dtype", m: int = 4096, n: int = 4096,
              k: int = 1024) -> tuple[Callable[[], None], int]:
    """A product of random matrices (m, k) and (k, n), whose best rate is this machine's peak, and its FLOPs."""
    import torch
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((m, k), (k, n)))
    out = torch.empty(m, n, device=device, dtype=dtype)
    return lambda: torch.mm(a, b, out=out), 2 * m * n * k


def make_instruction_loop(dtype: "torch.dtype") -> tuple[Callable[[], None], int] | None:
    """The CPU's bf16 matrix instruction (AMX's, where there is one) repeated on registers by all threads, and its FLOPs: its best
    rate is the hardware's own peak, with nothing to load. None for other dtypes, where C++ kernels do not run, and where the
    compiler is too old for the processor's AMX."""
    import torch

    from nanochat.kernels.cpp_kernels import cpp_unavailable_reason, library
    if dtype != torch.bfloat16 or cpp_unavailable_reason("peak"):
        return None
    amx = torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()  # the system has to allow it
    if amx and not library("peak").knows_amx():
        return None
    rounds = 200_000 if amx else 2_000_000  # some tens of milliseconds
    repeat = library("peak").repeat_matrix_instruction
    repeat.restype = ctypes.c_int64
    arguments = ctypes.c_int64(rounds), ctypes.c_int64(amx)
    return lambda: repeat(*arguments), repeat(*arguments)


def external_rate(command: str, pattern: str, skip: int) -> float:
    """Run another trainer's command line in a shell; the median of the tokens/s that it prints.

    pattern: regular expression whose one group is the number. skip: how many numbers at the beginning do not count.
    Raises: UserError where the command fails, or prints no such number.
    """
    done = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, errors="replace")
    last = "\n".join(done.stdout.splitlines()[-15:])
    if done.returncode:
        raise UserError(f"{command}: exit status {done.returncode}. Its last lines:\n{last}")
    found = re.findall(pattern, done.stdout)
    try:
        rates = [float(number.replace(",", "").replace("_", "")) for number in found[skip:]]
    except ValueError as e:
        raise UserError(f"--against-regex {pattern!r} finds what is no number: {e}") from None
    if not rates:
        raise UserError(f"{command}: --against-regex {pattern!r} is found {len(found)} times in its output, of which the first "
                        f"{skip} do not count. Its last lines:\n{last}")
    return statistics.median(rates)
