"""The compute dtype on a CPU: bf16 where this machine multiplies it faster, not where it merely has the instructions."""

import platform

import pytest
import torch

from nanochat.common import UserError
from nanochat.runtime.compute_dtype import GAIN, bf16_over_fp32, cpu_has_bf16_instructions, pick_compute_dtype
from processes import python_c

CPU = torch.device("cpu")
PICK = """import torch
from nanochat.runtime.compute_dtype import bf16_over_fp32, pick_compute_dtype
print(*pick_compute_dtype(torch.device("cpu")), bf16_over_fp32())"""


def test_what_is_asked_for_comes_first(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    assert pick_compute_dtype(CPU, "float32") == (torch.float32, "set by --dtype")
    assert pick_compute_dtype(CPU) == (torch.bfloat16, "set by NANOCHAT_DTYPE")
    monkeypatch.setenv("NANOCHAT_DTYPE", "float8")
    with pytest.raises(UserError, match="^NANOCHAT_DTYPE=float8: choose one of bfloat16, float16, float32"):
        pick_compute_dtype(CPU)


def test_bf16_is_taken_where_its_products_are_faster(monkeypatch):
    monkeypatch.delenv("NANOCHAT_DTYPE", raising=False)
    state = torch.random.get_rng_state()
    dtype, reason = pick_compute_dtype(CPU)
    assert torch.equal(state, torch.random.get_rng_state())
    assert dtype == (torch.bfloat16 if cpu_has_bf16_instructions() and bf16_over_fp32() >= GAIN else torch.float32), reason


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN's names of x86 processors")
def test_instructions_that_the_library_does_not_use_are_not_enough():
    done = python_c(PICK, ONEDNN_MAX_CPU_ISA="AVX2", NANOCHAT_DTYPE="")
    dtype, *reason, gain = done.stdout.split()
    assert dtype == "torch.float32" and reason, done.stderr
    assert float(gain) < GAIN or not cpu_has_bf16_instructions()
