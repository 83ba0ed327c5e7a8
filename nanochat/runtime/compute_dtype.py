"""The dtype that activations and matrix products use, and why."""

import os
import platform
from functools import cache

import torch

from nanochat.common import UserError
from nanochat.runtime.timing import timed

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOKENS, WIDTH = 512, 512  # of the product that is timed in bf16 and in fp32: some milliseconds a round
ROUNDS = 6, 40            # at least and at most
GAIN = 1.2  # bf16 has to be so many times as fast as fp32: native instructions are 2 to 16 times as fast, emulated ones slower


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pick_compute_dtype(device: torch.device, requested: str = "auto") -> tuple[torch.dtype, str]:
    """The dtype that activations and matrix products use, and the reason in words.

    In order: `requested` (the flag `--dtype`), `$NANOCHAT_DTYPE`, then bf16 where the hardware multiplies it natively and, on a
    CPU, faster than fp32; else fp32. fp16 is never chosen by itself: it needs a gradient scaler.
    """
    environment = os.environ.get("NANOCHAT_DTYPE", "")
    for name, origin in ((requested, "--dtype"), (environment, "NANOCHAT_DTYPE")):
        if name and name != "auto":
            if name not in DTYPES:
                raise UserError(f"{origin}={name}: choose one of {', '.join(DTYPES)}.")
            if name == "float16" and device.type == "cpu":
                raise UserError(f"{origin}=float16 trains on a GPU only; on a CPU choose bfloat16 or float32.")
            return DTYPES[name], f"set by {origin}"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "the GPU is sm_80 or newer"
        return torch.float32, "the GPU is older than sm_80 and has no bf16 units"
    if device.type != "cpu" or not cpu_has_bf16_instructions():
        return torch.float32, f"no known fast bf16 on this {device.type}"
    if (gain := bf16_over_fp32()) >= GAIN:
        return torch.bfloat16, "the CPU multiplies bf16 natively"
    return torch.float32, f"the CPU has bf16 instructions, but multiplies bf16 only {gain:.2g} times as fast as fp32 here"


def cpu_has_bf16_instructions() -> bool:
    """Whether the processor multiplies bf16 natively: AVX512-BF16 or AMX, or BFMMLA on ARM."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        try:
            return torch.ops.mkldnn._is_mkldnn_bf16_supported()
        except (AttributeError, RuntimeError):  # a torch that was built without oneDNN
            return False
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in probes)


@cache
def bf16_over_fp32() -> float:
    """How many times as fast as in fp32 this CPU multiplies in bf16, timed in turn until that is clearly above or below GAIN: a
    busy neighbour must not decide. It takes some hundredths of a second, and is not written down."""
    random, cpu = torch.Generator().manual_seed(0), torch.device("cpu")  # private: the run's random numbers must not change
    factors = [torch.randn(rows, WIDTH, generator=random) for rows in (TOKENS, WIDTH)]
    pairs = {dtype: [x.to(dtype) for x in factors] for dtype in (torch.bfloat16, torch.float32)}
    least, gain = dict.fromkeys(pairs, float("inf")), GAIN
    for rounds in range(1, ROUNDS[1] + 1):
        for dtype, pair in pairs.items():
            least[dtype] = min(least[dtype], timed(cpu, torch.mm, *pair)[0])
        gain = least[torch.float32] / least[torch.bfloat16]
        if rounds >= ROUNDS[0] and not GAIN / 2 < gain < GAIN:
            break
    return gain
