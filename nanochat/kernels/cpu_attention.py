"""Attention for CPUs with AVX512-BF16: two C++ kernels as custom operators of torch.

`cpp/attention.cpp` multiplies by AVX512-BF16 instructions of its own, `cpp/attention_brgemm.cpp` through PyTorch's brgemm, which
uses AMX where the processor has it. Which is faster depends on the processor: nanochat/flash_attention.py measures it.

torch.compile treats them as opaque, so a compiled and an eager model get the same bits. The number of threads does not change
a bit either.
"""

import ctypes
from functools import partial

import torch
from torch import Tensor

from nanochat.kernels.cpp_kernels import cpp_unavailable_reason, library, pointer

MULTIPLE = 32  # head_dim must be a multiple of this: the bf16 numbers in a 512-bit vector


def load(kernel: str):
    """Return the backend `attention` by `kernel`, "attention" or "attention_brgemm". Compiles it at the first call.

    Raises: RuntimeError where it is not available.
    """
    reason = cpp_unavailable_reason(kernel)
    if reason is not None:
        raise RuntimeError(reason)
    return partial(attention, kernel=kernel)


def attention(q: Tensor, k: Tensor, v: Tensor, window: int, kernel: str = "attention") -> Tensor:
    """Causal attention: q (B, T, H, D), k and v (B, T, H_kv, D), bf16 on a CPU, D a multiple of 32 -> (B, T, H, D).

    window: tokens that a query sees before itself; negative means all.
    Strides are free, except that a tensor whose last dimension is not contiguous is copied.
    """
    return attention_forward(q, k, v, window, kernel)[0]


@torch.library.custom_op("nanochat::attention_forward", mutates_args=(), device_types="cpu")
def attention_forward(q: Tensor, k: Tensor, v: Tensor, window: int, kernel: str) -> tuple[Tensor, Tensor]:
    """Output y (B, T, H, D) bf16, and the log-sum-exp of the scores (B, H, T) fp32, which the backward pass needs.

    Raises: ValueError for other dtypes, or shapes that do not match.
    """
    B, T, H, D = q.shape
    if not (q.dtype == k.dtype == v.dtype == torch.bfloat16):
        raise ValueError(f"the kernel is for bfloat16, not {q.dtype}, {k.dtype}, {v.dtype}")
    if D == 0 or D % MULTIPLE:
        raise ValueError(f"the kernel takes heads of a multiple of {MULTIPLE}, not of {D}")
    if not (k.shape == v.shape == (B, T, k.size(2), D) and k.size(2) and H % k.size(2) == 0):
        raise ValueError(f"the shapes of q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not go together")
    q, k, v = (_contiguous_heads(x) for x in (q, k, v))
    y, lse = _empty_output(q)
    library(kernel).attention_forward(_problem(q, k, v, q, window), *map(pointer, (q, k, v, y, lse)))
    return y, lse


@attention_forward.register_fake
def _(q, k, v, window, kernel):
    return _empty_output(q)


@torch.library.custom_op("nanochat::attention_backward", mutates_args=(), device_types="cpu")
def attention_backward(q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, dy: Tensor, window: int,
                       kernel: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in bf16, from the forward's inputs and outputs and the gradient dy (B, T, H, D)."""
    q, k, v, dy = (_contiguous_heads(x) for x in (q, k, v, dy))
    gradients = _empty_gradients(q, k, v)
    library(kernel).attention_backward(_problem(q, k, v, dy, window), *map(pointer, (q, k, v, y, lse, dy, *gradients)))
    return gradients


@attention_backward.register_fake
def _(q, k, v, y, lse, dy, window, kernel):
    return _empty_gradients(q, k, v)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.window, ctx.kernel = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # the log-sum-exp has no gradient; do not allocate zeros for it


def _backward(ctx, dy, _):
    q, k, v, y, lse = ctx.saved_tensors
    return *attention_backward(q, k, v, y, lse, dy, ctx.window, ctx.kernel), None, None


attention_forward.register_autograd(_backward, setup_context=_setup_context)


def _empty_output(q: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)


def _empty_gradients(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in inputs)


def _contiguous_heads(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _problem(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, window: int) -> ctypes.Array:
    """The sizes and strides as attention_common.h's `struct Problem`: 18 int64."""
    strides = [stride for x in (q, k, v, dy) for stride in x.stride()[:3]]
    return (ctypes.c_int64 * 18)(*q.shape[:3], k.size(2), q.size(3), window, *strides)
