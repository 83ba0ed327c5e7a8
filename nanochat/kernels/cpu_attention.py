"""nanochat/kernels/cpp/attention.cpp as operators of torch: attention for CPUs with AVX512-BF16, in bf16.

Compilers do not look inside, so a compiled model and an eager one get the same bits; so do any two numbers of threads.
"""

import ctypes

import torch
from torch import Tensor

from nanochat.kernels.cpp_kernels import library, pointer, why_not_native

MULTIPLE = 32  # of which the features of a head must be a multiple: a vector of bf16


def load():
    """The backend: (q, k, v, window) -> y. Compiles the kernels the first time; RuntimeError where they cannot be had."""
    reason = why_not_native("attention")
    if reason is not None:
        raise RuntimeError(reason)
    return attention


def attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention: q (B, T, H, D), k and v (B, T, H_kv, D), all bf16 on a CPU, D a multiple of 32 -> (B, T, H, D).

    `window`: the tokens a query sees before itself, negative for all of them. Any strides; copied where the features of a
    head are not next to each other.
    """
    return attention_forward(q, k, v, window)[0]


@torch.library.custom_op("nanochat::attention_forward", mutates_args=(), device_types="cpu")
def attention_forward(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """y (B, T, H, D) in bf16, and the log-sum-exp of the scores (B, H, T) in fp32."""
    B, T, H, D = q.shape
    if not (q.dtype == k.dtype == v.dtype == torch.bfloat16):
        raise ValueError(f"the kernel is for bfloat16, not {q.dtype}, {k.dtype}, {v.dtype}")
    if D == 0 or D % MULTIPLE:
        raise ValueError(f"the kernel takes heads of a multiple of {MULTIPLE}, not of {D}")
    if not (k.shape == v.shape == (B, T, k.size(2), D) and k.size(2) and H % k.size(2) == 0):
        raise ValueError(f"the shapes of q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not go together")
    q, k, v = (_dense_features(x) for x in (q, k, v))
    y, lse = _room_for_output(q)
    library("attention").attention_forward(_problem(q, k, v, q, window), *map(pointer, (q, k, v, y, lse)))
    return y, lse


@attention_forward.register_fake
def _(q, k, v, window):
    return _room_for_output(q)


@torch.library.custom_op("nanochat::attention_backward", mutates_args=(), device_types="cpu")
def attention_backward(q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, dy: Tensor,
                       window: int) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, in bf16, from what the forward was given and gave, and the gradient of y."""
    q, k, v, dy = (_dense_features(x) for x in (q, k, v, dy))
    gradients = _room_for_gradients(q, k, v)
    library("attention").attention_backward(_problem(q, k, v, dy, window), *map(pointer, (q, k, v, y, lse, dy, *gradients)))
    return gradients


@attention_backward.register_fake
def _(q, k, v, y, lse, dy, window):
    return _room_for_gradients(q, k, v)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # nothing depends on the log-sum-exp: no zeros for its gradient


def _backward(ctx, dy, _):
    q, k, v, y, lse = ctx.saved_tensors
    return *attention_backward(q, k, v, y, lse, dy, ctx.window), None


attention_forward.register_autograd(_backward, setup_context=_setup_context)


def _room_for_output(q: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)


def _room_for_gradients(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in inputs)


def _dense_features(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _problem(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, window: int) -> ctypes.Array:
    """`struct Problem` of attention.cpp."""
    strides = [stride for x in (q, k, v, dy) for stride in x.stride()[:3]]
    return (ctypes.c_int64 * 18)(*q.shape[:3], k.size(2), q.size(3), window, *strides)
