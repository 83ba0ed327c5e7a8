"""Embedding tables with a deterministic gradient, summed in fp32.

The gradient of a table row is the sum over all positions of its token. torch.compile sums with atomic adds from several
threads, in random order. PyTorch's own kernel is deterministic (each thread owns some rows), but for a bf16 table it sums in
bf16, where the sum of a frequent token soon stops growing. Here PyTorch's kernel sums in fp32 and the result is rounded once.
For bf16 on CPUs a C++ kernel (`cpp/embedding.cpp`) does the same in the same order: the same bits, so that
`choose_embedding_gradient` is free to take the faster one. It is a custom operator, which torch.compile does not replace.
"""

import ctypes

import torch
import torch.nn as nn

from nanochat.kernels.cpp_kernels import cpp_unavailable_reason, library, pointer
from nanochat.runtime.tuner import MOST_TOKENS, Choice, Tuner


@torch.library.custom_op("nanochat::embedding_gradient", mutates_args=())
def embedding_gradient(grad: torch.Tensor, idx: torch.Tensor, rows: int, cpp: bool = False) -> torch.Tensor:
    """Gradient of a table of `rows` rows: grad (..., C) summed per token of idx (...) int64 -> (rows, C) in grad's dtype.

    cpp: by the C++ kernel, which takes bf16 on a CPU."""
    if cpp:
        grad, idx, out = grad.contiguous(), idx.contiguous(), grad.new_empty(rows, grad.size(-1))
        sizes = map(ctypes.c_int64, (idx.numel(), rows, grad.size(-1)))
        library("embedding").embedding_gradient(*sizes, *map(pointer, (grad, idx, out)))
        return out
    return embedding_gradient_reference(grad, idx, rows)


def embedding_gradient_reference(grad: torch.Tensor, idx: torch.Tensor, rows: int) -> torch.Tensor:
    """Reference implementation, by PyTorch's kernel. On a CPU it sums in the same order as the C++ kernel."""
    return torch.ops.aten.embedding_dense_backward(grad.float(), idx, rows, -1, False).to(grad.dtype)


@embedding_gradient.register_fake
def _(grad, idx, rows, cpp=False):
    return grad.new_empty(rows, grad.size(-1))


class _Lookup(torch.autograd.Function):
    """table (V, C), idx (...) int64 -> (..., C)."""

    @staticmethod
    def forward(ctx, table, idx, cpp):
        ctx.save_for_backward(idx)
        ctx.rows, ctx.cpp = table.size(0), cpp
        return table[idx]

    @staticmethod
    def backward(ctx, grad):
        idx, = ctx.saved_tensors
        return embedding_gradient(grad, idx, ctx.rows, ctx.cpp), None, None


class Embedding(nn.Embedding):
    """`nn.Embedding` with the gradient of `embedding_gradient`: idx (...) int64 -> (..., C) in the table's dtype.

    cpp: compute it in C++."""
    cpp = False

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        return _Lookup.apply(self.weight, idx, self.cpp)


def choose_embedding_gradient(tables: list[Embedding], tokens: int, tuner: Tuner | None = None) -> Choice:
    """Let these tables compute their gradient by `torch` or `cpp`: whichever takes less time for the first of them and a
    micro-batch of `tokens` tokens."""
    table = tables[0].weight
    if not table.is_cpu or table.dtype != torch.bfloat16 or cpp_unavailable_reason("embedding"):
        return Choice("torch", "the only one that works", {})
    random = torch.Generator().manual_seed(0)  # a private generator: the run's random numbers must not change
    in_use, tokens = tokens, min(tokens, MOST_TOKENS)
    grad = torch.randn(tokens, table.size(1), generator=random).bfloat16()
    idx = torch.randint(len(table), (tokens,), generator=random)
    choice = (tuner or Tuner(table.device, folder=None)).choose(
        f"embedding gradient of {tokens} tokens, {len(table)}x{table.size(1)}",
        {name: lambda cpp=cpp: lambda: embedding_gradient(grad, idx, len(table), cpp)
         for name, cpp in {"torch": False, "cpp": True}.items()}, times_in_use=in_use / tokens * len(tables))
    for one in tables:
        one.cpp = choice.name == "cpp"
    return choice
