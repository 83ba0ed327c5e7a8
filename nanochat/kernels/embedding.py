"""Embedding tables with a deterministic gradient, summed in fp32.

The gradient of a table row is the sum over all positions of its token. torch.compile sums with atomic adds from several
threads, in random order. PyTorch's own kernel is deterministic, but for a bf16 table on a CPU it sums in bf16, where the sum of a
frequent token soon stops growing. Here the sum is in fp32 and rounded once, in one of three ways:

    torch     PyTorch's kernel on the gradient cast to fp32
    cpp       for bf16 on CPUs: a C++ kernel (`cpp/embedding.cpp`), in the same order and so to the same bits
    sorted    on CUDA: positions are sorted by token once for all tables of a model (`sort_tokens`), and a Triton kernel reads
              each gradient once and writes each table once, where PyTorch's way casts, sorts, clears and casts back for every
              table. It adds in another order than PyTorch's kernel, so the last bits differ, and runs record the choice

`choose_embedding_gradient` takes the fastest. The gradient is a custom operator, which torch.compile does not replace.
The Triton kernel has not been run on a GPU yet.
"""

import ctypes

import torch
import torch.nn as nn
from torch import Tensor

from nanochat.kernels.cpp_kernels import cpp_unavailable_reason, library, pointer
from nanochat.runtime.toolchain import triton_runs_on
from nanochat.runtime.tuner import MOST_TOKENS, Choice, Tuner, untimed_choice

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS, the CPU build of torch
    triton = None

PIECE = 64      # sorted places whose sum is computed ahead where they are all of one token
TILE = 8        # gradients that a program of the Triton kernels reads at once
COLUMNS = 256   # columns of a program: 8 for each thread of a warp, 16 bytes of bf16


def sort_tokens(idx: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Group the positions of each token. idx (...) int64 in [0, rows), N numbers in all.

    Returns order (N,) int64, all positions in the flattened idx, by token and those of a token ascending; and starts (rows + 1,)
    int64: the positions of token r are order[starts[r]:starts[r + 1]].
    """
    tokens, order = idx.flatten().int().sort(stable=True)  # of 32 bits: sorted in half the passes
    return order, torch.searchsorted(tokens, torch.arange(rows + 1, dtype=tokens.dtype, device=idx.device))


@torch.library.custom_op("nanochat::embedding_gradient", mutates_args=())
def embedding_gradient(grad: Tensor, idx: Tensor, rows: int, way: str = "torch", order: Tensor | None = None,
                       starts: Tensor | None = None) -> Tensor:
    """Gradient of a table of `rows` rows: grad (..., C) summed per token of idx (...) int64 -> (rows, C) in grad's dtype.

    way: `torch`; `cpp`, which takes bf16 on a CPU; or `sorted`, for which order and starts are those of `sort_tokens(idx, rows)`.
    """
    if way == "sorted":
        run = sorted_gradient_triton if triton_runs_on(grad.device.type) else sorted_gradient_reference
        return run(grad.reshape(-1, grad.size(-1)).contiguous(), idx.flatten(), order, starts)
    if way == "cpp":
        grad, idx, out = grad.contiguous(), idx.contiguous(), grad.new_empty(rows, grad.size(-1))
        sizes = map(ctypes.c_int64, (idx.numel(), rows, grad.size(-1)))
        library("embedding").embedding_gradient(*sizes, *map(pointer, (grad, idx, out)))
        return out
    return embedding_gradient_reference(grad, idx, rows)


@embedding_gradient.register_fake
def _(grad, idx, rows, way="torch", order=None, starts=None):
    return grad.new_empty(rows, grad.size(-1))


def embedding_gradient_reference(grad: Tensor, idx: Tensor, rows: int) -> Tensor:
    """Reference implementation, by PyTorch's kernel. On a CPU it sums in the same order as the C++ kernel."""
    return torch.ops.aten.embedding_dense_backward(grad.float(), idx, rows, -1, False).to(grad.dtype)


def sorted_gradient_reference(grad: Tensor, idx: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """The gradient from sorted positions, in PyTorch. grad (N, C), idx (N,), order (N,), starts (rows + 1,) -> (rows, C)."""
    return torch.segment_reduce(grad.float()[order], "sum", offsets=starts, axis=0, initial=0.0).to(grad.dtype)


def sorted_gradient_triton(grad: Tensor, idx: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """`sorted_gradient_reference` in Triton, for contiguous tensors.

    A frequent token may have thousands of positions, too many for one program to add while all others wait for it. So the sorted
    positions are cut into pieces of PIECE. The first kernel sums those pieces that are of one token; the second sums, for each
    row, what lies before its whole pieces, their sums, and what lies after. No atomic adds: the order never changes.
    """
    width, out = grad.size(1), grad.new_empty(len(starts) - 1, grad.size(1))
    pieces = grad.new_empty(len(order) // PIECE, width, dtype=torch.float32)
    blocks, sizes = triton.cdiv(width, COLUMNS), dict(PIECE=PIECE, TILE=TILE, COLUMNS=COLUMNS, num_warps=1)
    if len(pieces):
        _pieces_kernel[len(pieces), blocks](grad, idx, order, pieces, width, **sizes)
    _rows_kernel[len(out), blocks](grad, order, starts, pieces, out, width, **sizes)
    return out


if triton:
    @triton.jit
    def _sum(source, order, first, last, columns, width, TILE: tl.constexpr, COLUMNS: tl.constexpr):
        """Sum (COLUMNS,) fp32 of the rows order[first:last] of source (..., width), or, if order is None, of its rows first to
        last - 1."""
        total = tl.zeros([COLUMNS], tl.float32)
        for start in range(first, last, TILE):
            places = start + tl.arange(0, TILE)
            there = places < last
            if order is not None:
                places = tl.load(order + places, mask=there, other=0)
            at = places.to(tl.int64)[:, None] * width + columns[None, :]
            values = tl.load(source + at, mask=there[:, None] & (columns < width)[None, :], other=0.0)
            total += tl.sum(values.to(tl.float32), 0)
        return total

    @triton.jit
    def _pieces_kernel(grad, idx, order, pieces, width, PIECE: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr):
        """The sum of a piece whose positions are all of one token; as they are sorted, that of both ends says so."""
        piece = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        first = piece * PIECE
        if tl.load(idx + tl.load(order + first)) == tl.load(idx + tl.load(order + first + PIECE - 1)):
            total = _sum(grad, order, first, first + PIECE, columns, width, TILE, COLUMNS)
            tl.store(pieces + piece * width + columns, total, mask=columns < width)

    @triton.jit
    def _rows_kernel(grad, order, starts, pieces, out, width, PIECE: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr):
        """A row of the table, also of a token that is absent. Its whole pieces are [begin, end), if begin < end."""
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        first, last = tl.load(starts + row), tl.load(starts + row + 1)
        begin, end = (first + PIECE - 1) // PIECE, last // PIECE
        before = tl.minimum(begin * PIECE, last)
        total = _sum(grad, order, first, before, columns, width, TILE, COLUMNS)
        total += _sum(pieces, None, begin, end, columns, width, TILE, COLUMNS)
        total += _sum(grad, order, tl.maximum(end * PIECE, before), last, columns, width, TILE, COLUMNS)
        tl.store(out + row * width + columns, total, mask=columns < width)


class _Lookup(torch.autograd.Function):
    """table (V, C), idx (...) int64 -> (..., C)."""

    @staticmethod
    def forward(ctx, table, idx, way, order, starts):
        ctx.save_for_backward(idx, order, starts)
        ctx.rows, ctx.way = table.size(0), way
        return table[idx]

    @staticmethod
    def backward(ctx, grad):
        idx, *by_token = ctx.saved_tensors
        return embedding_gradient(grad, idx, ctx.rows, ctx.way, *by_token), None, None, None, None


class Embedding(nn.Embedding):
    """`nn.Embedding` with the gradient of `embedding_gradient`: idx (...) int64 -> (..., C) in the table's dtype.

    gradient_by: the way in which it is computed.
    """
    gradient_by = "torch"

    def forward(self, idx: Tensor, by_token: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """by_token: `sort_tokens(idx, rows)` for the way `sorted`, so that several tables can share it; else it is made here."""
        if self.gradient_by == "sorted" and by_token is None and torch.is_grad_enabled():
            by_token = sort_tokens(idx, self.num_embeddings)
        return _Lookup.apply(self.weight, idx, self.gradient_by, *(by_token or (None, None)))


def choose_embedding_gradient(tables: list[Embedding], tokens: int, tuner: Tuner | None = None,
                              recorded: str | None = None) -> Choice:
    """Let these tables compute their gradients by `torch`, or by `cpp` on a CPU, or `sorted` on CUDA: whichever takes less time
    for a micro-batch of `tokens` tokens.

    recorded: the choice of the run to be resumed.
    """
    choice = _choice(tables, tokens, tuner, recorded)
    for table in tables:
        table.gradient_by = choice.name
    return choice


def _choice(tables: list[Embedding], tokens: int, tuner: Tuner | None, recorded: str | None) -> Choice:
    table = tables[0].weight
    rows, device = len(table), table.device
    fast, why_not = faster_way(device.type, table.dtype)
    if choice := untimed_choice("", "auto", "torch", fast, why_not, recorded if recorded in ("torch", fast) else None):
        return choice
    random = torch.Generator().manual_seed(0)  # a private generator: the run's random numbers must not change
    in_use, tokens = tokens, min(tokens, MOST_TOKENS)
    grads = {width: torch.randn(tokens, width, generator=random).to(device, table.dtype)
             for width in {table.embedding_dim for table in tables}}
    idx = (torch.rand(tokens, generator=random, dtype=torch.float64)**4 * rows).long().to(device)  # as in text a few are frequent

    def gradients_of_all(way):
        by_token = sort_tokens(idx, rows) if way == "sorted" else ()
        return [embedding_gradient(grads[table.embedding_dim], idx, rows, way, *by_token) for table in tables]
    shapes = " ".join(f"{rows}x{table.embedding_dim}" for table in tables)
    return (tuner or Tuner(device, folder=None)).choose(
        f"embedding gradients of {tokens} tokens, {shapes} {table.dtype}",
        {way: lambda way=way: lambda: gradients_of_all(way) for way in ("torch", fast)}, times_in_use=in_use / tokens)


def faster_way(device_type: str, dtype: torch.dtype) -> tuple[str, str | None]:
    """The way that may be faster than `torch` on this device, and the reason why it does not work, or None."""
    if device_type == "cuda":
        return "sorted", None if triton_runs_on(device_type) else "Triton does not run here"
    if device_type != "cpu" or dtype != torch.bfloat16:
        return "cpp", f"the kernel is for bfloat16 on a CPU, not for {dtype} on {device_type}"
    return "cpp", cpp_unavailable_reason("embedding")
