"""Embedding tables whose gradient is the same to the bit every time.

The gradient of a lookup adds up, per table row, what flows back to every place where that token stands. torch.compile
does it with atomic adds from several threads, in whatever order they come; PyTorch's own kernel gives each thread rows
of its own, but in a bf16 table also adds in bf16, where a frequent token's sum soon stops growing. Here PyTorch's kernel
adds in fp32 and the result is rounded once; on a CPU with AVX512-BF16 ours does (`cpp/embedding.cpp`), in the same order. It
is an operator of its own, so that compilers do not look inside.
"""

import ctypes

import torch
import torch.nn as nn

from nanochat.kernels.cpp_kernels import library, pointer, why_not_native


@torch.library.custom_op("nanochat::embedding_gradient", mutates_args=())
def embedding_gradient(grad: torch.Tensor, idx: torch.Tensor, rows: int) -> torch.Tensor:
    """Sum of grad (..., C) over the places in idx (...) int64 of each token: (rows, C) in grad's dtype, summed in fp32."""
    if grad.is_cpu and grad.dtype == torch.bfloat16 and why_not_native("embedding") is None:
        grad, idx, out = grad.contiguous(), idx.contiguous(), grad.new_empty(rows, grad.size(-1))
        sizes = map(ctypes.c_int64, (idx.numel(), rows, grad.size(-1)))
        library("embedding").embedding_gradient(*sizes, *map(pointer, (grad, idx, out)))
        return out
    return embedding_gradient_plainly(grad, idx, rows)


def embedding_gradient_plainly(grad: torch.Tensor, idx: torch.Tensor, rows: int) -> torch.Tensor:
    """The same by PyTorch's kernel, which on a CPU adds in the same order."""
    return torch.ops.aten.embedding_dense_backward(grad.float(), idx, rows, -1, False).to(grad.dtype)


@embedding_gradient.register_fake
def _(grad, idx, rows):
    return grad.new_empty(rows, grad.size(-1))


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, idx):
        ctx.save_for_backward(idx)
        ctx.rows = table.size(0)
        return table[idx]

    @staticmethod
    def backward(ctx, grad):
        idx, = ctx.saved_tensors
        return embedding_gradient(grad, idx, ctx.rows), None


class Embedding(nn.Embedding):
    """`nn.Embedding` with the gradient above: idx (...) int64 -> (..., C) in the table's dtype."""

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return _Lookup.apply(self.weight, idx)
