"""What the speed of a step is compared with: the machine's matrix rate, and another trainer.

torch is imported where it is used: wrong flags are reported before it is loaded.
"""

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
