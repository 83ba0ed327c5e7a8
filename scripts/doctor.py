"""What can this machine really do? `python -m scripts.doctor` launches and times it; nothing is read off a version number.

    python -m scripts.doctor            # a table: ok, slow, missing, or - where the hardware has no such thing
    python -m scripts.doctor --json     # the same for a bug report; user name and home folder are left out

For what is missing it says what to install or which flag to use. The exit status is 1 where nothing can be trained at all, and
0 otherwise.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial

from nanochat.cli.flags import flag, parse
from nanochat.cli.program import cli
from nanochat.runtime import diagnosis
from nanochat.runtime.diagnosis import MISSING, NOT_HERE, OK, SLOW, Finding, findings_of
from nanochat.runtime.other_load import OtherLoad
from nanochat.training.config import DeviceFlags

GEMM_SIZE = {"cuda": 4096, "mps": 2048}  # of the products of square matrices; on a CPU 512, as some have no bf16


@dataclass
class DoctorFlags(DeviceFlags):
    """The diagnosis"""
    json: bool = flag(False, "print JSON, for a bug report")


def matrix_rate(device, name: str, rates: dict[str, float]) -> Iterable[Finding]:
    """The best rate of a matrix product in this dtype, which goes into `rates`, in FLOP/s."""
    import torch

    from nanochat.benchmarks.yardsticks import make_gemm
    from nanochat.runtime.tuner import measure
    size = GEMM_SIZE.get(device.type, 512)
    call, flops = make_gemm(device, getattr(torch, name), size, size, size)
    rate = rates[name] = flops / measure({name: call}, device)[name]
    slow = rate < rates.get("float32", 0.0)
    yield Finding(f"matrix {name}", SLOW if slow else OK, f"{rate / 1e9:,.0f} GFLOP/s"
                  + (", which is less than in float32: train with --dtype=float32" if slow else ""), {"flops_per_sec": rate})


def instructions(device) -> Iterable[Finding]:
    """The CPU's matrix instruction, repeated on registers: what bf16 products can reach at most."""
    import torch

    from nanochat.benchmarks.yardsticks import make_instruction_loop
    from nanochat.kernels.cpp_kernels import cpp_unavailable_reason
    from nanochat.runtime.tuner import measure
    if not (loop := make_instruction_loop(torch.bfloat16)):
        why = cpp_unavailable_reason("peak") or "the compiler is too old for this processor's AMX"
        yield Finding("AMX, AVX512-BF16", NOT_HERE if "are for CPUs with" in why else MISSING, why)
        return
    call, flops = loop
    amx = torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()
    rate = flops / measure({"loop": call}, torch.device("cpu"))["loop"]
    yield Finding("AMX, AVX512-BF16", OK, f"{'AMX' if amx else 'AVX512-BF16'}: {rate / 1e9:,.0f} GFLOP/s in registers",
                  {"flops_per_sec": rate, "amx": amx})


def diagnose(flags: DoctorFlags) -> Iterator[Finding]:
    """All findings, each as soon as it is known. Raises: UserError where there is no device of the type that was asked for."""
    load, missing = OtherLoad(), False
    for finding in findings_of("packages", diagnosis.software):
        missing |= finding.prevents_training
        yield finding
    yield from findings_of("base directory", diagnosis.disk, required=True)
    if missing:
        return
    from nanochat.runtime.compute_dtype import pick_compute_dtype
    from nanochat.runtime.device import init_device
    from nanochat.training import kernel_checks
    with redirect_stdout(sys.stderr):
        device, _ = init_device(flags.device_type)
    dtype, _ = pick_compute_dtype(device, flags.dtype)
    rates: dict[str, float] = {}
    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("device", partial(diagnosis.device_and_memory, device)),
        ("matrix float32", partial(matrix_rate, device, "float32", rates)),
        ("clock", diagnosis.clock_rate),
        ("matrix bfloat16", partial(matrix_rate, device, "bfloat16", rates)),
        ("FP8", lambda: kernel_checks.fp8(device, rates.get("bfloat16"))),
        ("C++ compiler", diagnosis.cpp_compiler),
        ("torch.compile", partial(diagnosis.torch_compile, device)),
        ("Triton", partial(diagnosis.triton, device)),
        ("AMX, AVX512-BF16", partial(instructions, device)),
        ("C++ kernels", kernel_checks.cpp_kernels),
        ("attention", partial(kernel_checks.attention, device, dtype)),
        ("training", partial(kernel_checks.training_steps, device, flags.dtype)),
        ("packages", diagnosis.optional_packages),
        ("other programs", partial(diagnosis.other_programs, load)),
    ]
    for name, check in checks:
        yield from findings_of(name, check, required=name == "training")


def main() -> int:
    flags, = parse([DoctorFlags], prog="python -m scripts.doctor", description="What can this machine really do?")
    found = []
    for finding in diagnose(flags):
        found.append(finding)
        if not flags.json:
            print(finding.line(), flush=True)
    if flags.json:
        print(json.dumps(diagnosis.as_json(found), indent=1))
    else:
        print(f"\n{summary(found)}")
    return int(any(finding.prevents_training for finding in found))


def summary(found: list[Finding]) -> str:
    if stops := [finding.name for finding in found if finding.prevents_training]:
        return f"nothing can be trained here: see {', '.join(stops)}"
    counts = {status: sum(f.status == status for f in found) for status in (OK, SLOW, MISSING)}
    return "this machine can train: " + ", ".join(f"{count} {status}" for status, count in counts.items())


if __name__ == "__main__":
    cli(main, for_its_output=True)
