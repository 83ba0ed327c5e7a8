"""Embedding tables with a deterministic gradient, summed in fp32.

The gradient of a table row is the sum over all positions of its token. torch.compile sums with atomic adds from several
threads, in random order. PyTorch's own kernel is deterministic (each thread owns some rows), but for a bf16 table it sums in
bf16, where the sum of a frequent token soon stops growing. Here PyTorch's kernel sums in fp32 and the result is rounded once.
On CPUs with AVX512-BF16 a C++ kernel (`cpp/embedding.cpp`) does the same in the same order. It is a custom operator, which
torch.compile does not replace.
"""

import ctypes

import torch
import torch.nn as nn

from nanochat.kernels.cpp_kernels import cpp_unavailable_reason, library, pointer


@torch.library.custom_op("nanochat::embedding_gradient", mutates_args=())
def embedding_gradient(grad: torch.Tensor, idx: torch.Tensor, rows: int) -> torch.Tensor:
    """Gradient of a table of `rows` rows: grad (..., C) summed per token of idx (...) int64 -> (rows, C) in grad's dtype."""
    if grad.is_cpu and grad.dtype == torch.bfloat16 and cpp_unavailable_reason("embedding") is None:
        grad, idx, out = grad.contiguous(), idx.contiguous(), grad.new_empty(rows, grad.size(-1))
        sizes = map(ctypes.c_int64, (idx.numel(), rows, grad.size(-1)))
        library("embedding").embedding_gradient(*sizes, *map(pointer, (grad, idx, out)))
        return out
    return embedding_gradient_reference(grad, idx, rows)


def embedding_gradient_reference(grad: torch.Tensor, idx: torch.Tensor, rows: int) -> torch.Tensor:
    """Reference implementation, by PyTorch's kernel. On a CPU it sums in the same order as the C++ kernel."""
    return torch.ops.aten.embedding_dense_backward(grad.float(), idx, rows, -1, False).to(grad.dtype)


@embedding_gradient.register_fake
def _(grad, idx, rows):
    return grad.new_empty(rows, grad.size(-1))


class _Lookup(torch.autograd.Function):
    """table (V, C), idx (...) int64 -> (..., C)."""

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
    """`nn.Embedding` with the gradient of `embedding_gradient`: idx (...) int64 -> (..., C) in the table's dtype."""

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return _Lookup.apply(self.weight, idx)
