"""The training loss: soft-capped cross-entropy over the head's logits. The plain version, and one that goes by chunks.

Soft cap (Gemma 2, arXiv 2408.00118): s = cap * tanh(z / cap) keeps every logit within (-cap, cap), in fp32.

The plain version keeps the logits of all tokens for the backward pass, in fp32 and more than once: the largest tensors of
a step. But the loss comes last, so a chunk of n tokens can go forward and backward at once (Liger, arXiv 2410.10989):

    logits     z  = x W^T                        (n, V)  in the dtype of x
    loss       log(sum exp s) - s[target]        (n,)    in fp32
    gradient   dz = (softmax(s) - onehot(target)) (1 - tanh^2(z / cap))   (n, V), written over z
    products   dx = dz W  (n, C),  dW += dz^T x  (V, C), added up in fp32

Only dx and dW are kept. They belong to the *sum* of the losses, so that no small factor is rounded into them; the
backward pass multiplies them by the gradient that arrives at the sum. As |s| < cap, exp(s) cannot overflow: it needs no
maximum, and loss and gradient take one pass over a row. That is a C++ kernel on CPUs (nanochat/kernels/cpp/loss.cpp), a Triton
kernel on CUDA, and elsewhere plain PyTorch, compiled by itself where the model is.
"""

import ctypes
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.cpp_kernels import library, pointer, why_not_native

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS, the CPU build of torch
    triton = None

SOFTCAP = 15.0
IGNORED = -1            # the target that does not count
FP16_SCALE = 2.0**8     # of dz in fp16, where a probability below 6e-8 would be zero
CHUNK_BYTES = {"cpu": 2**23, "cuda": 2**28}  # of a chunk's logits
LEAST_CHUNK = 512       # tokens, whatever their logits take: dW is read and written once per chunk
DW_ROWS = 2048          # of dW on a CPU, added to at once: few enough for their product to be still in the cache
BLOCK = 2048            # columns that a program of the Triton kernel takes at once


def softcapped_logits(x: Tensor, lm_head, vocab_size: int) -> Tensor:
    """Logits (B, T, vocab_size) in fp32 from the normed residual stream (B, T, C); the head's padding is cropped off."""
    logits = lm_head(x)[..., :vocab_size].float()
    return SOFTCAP * torch.tanh(logits / SOFTCAP)


def softcapped_cross_entropy(x: Tensor, lm_head, targets: Tensor, vocab_size: int, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of `targets` (B, T) int64, -1 = ignored, given the normed residual stream `x` (B, T, C).

    `reduction`: `mean` over the targets that count (NaN if none does), `sum`, or `none` -> (B, T), zero where ignored.
    """
    logits = softcapped_logits(x, lm_head, vocab_size)
    loss = F.cross_entropy(logits.view(-1, vocab_size), targets.reshape(-1), ignore_index=IGNORED, reduction=reduction)
    return loss.view_as(targets) if reduction == "none" else loss


class ChunkedCrossEntropy:
    """`softcapped_cross_entropy` by chunks of tokens. Without gradients each chunk is the plain one.

    chunk_tokens: tokens of a chunk, 0 to choose by the size of their logits.
    plain: the class of heads whose forward is x W^T and no more, with W from `weight_in(dtype)`. Their products are made
    here. A head with a forward of its own is called for each chunk, so that it multiplies as it does, in FP8 say.

    The gradients of single losses (`none`) are not known ahead: where they are wanted, all is the plain one.
    """

    def __init__(self, chunk_tokens: int, plain: type):
        self.chunk_tokens, self.plain = chunk_tokens, plain

    def __call__(self, x: Tensor, lm_head, targets: Tensor, vocab_size: int, reduction: str = "mean") -> Tensor:
        rows, wanted = x.reshape(-1, x.size(-1)), targets.reshape(-1)
        chunk = self.chunk_tokens or default_chunk(lm_head.weight.size(0), x.dtype, x.device.type)
        if torch.is_grad_enabled():
            if reduction == "none":
                return softcapped_cross_entropy(x, lm_head, targets, vocab_size, reduction)
            compiled = torch.compiler.is_compiling()
            if type(lm_head).forward is self.plain.forward:
                weight = lm_head.weight_in(x.dtype).detach()
                gradients = chunked_gradients(rows.detach(), weight, wanted, vocab_size, chunk, compiled)
            else:
                gradients = gradients_through(lm_head, rows.detach(), wanted, vocab_size, chunk, compiled)
            total = _WithGradients.apply(rows, lm_head.weight, *gradients)
        else:
            losses = torch.empty(wanted.shape, device=x.device)  # parts kept by themselves would pin the memory between them
            for some, theirs, into in zip(rows.split(chunk), wanted.split(chunk), losses.split(chunk), strict=True):
                into.copy_(softcapped_cross_entropy(some, lm_head, theirs, vocab_size, "none"))
            if reduction == "none":
                return losses.view_as(targets)
            total = losses.sum()
        if reduction == "sum":
            return total
        count = (wanted != IGNORED).sum()
        return torch.where(count > 0, total / count.clamp(min=1), math.nan)  # at NaN the gradients are zero, as the plain one's


def default_chunk(vocab: int, dtype: torch.dtype, device_type: str) -> int:
    """Tokens of a chunk for a head of `vocab` rows."""
    return max(LEAST_CHUNK, CHUNK_BYTES.get(device_type, 2**26) // (vocab * dtype.itemsize) // 16 * 16)


class _WithGradients(torch.autograd.Function):
    """`total` (0-d) as a function of x and weight, of which the gradients dx and dw are at hand."""

    @staticmethod
    def forward(ctx, x, weight, total, dx, dw):
        ctx.save_for_backward(dx, dw)
        return total.clone()

    @staticmethod
    def backward(ctx, gradient):
        dx, dw = ctx.saved_tensors
        # in fp32, as dx * gradient may first round the gradient, a factor common to all, to the dtype of dx
        return (dx.float() * gradient).to(dx.dtype), dw * gradient, None, None, None


@torch.library.custom_op("nanochat::chunked_loss", mutates_args=())
def chunked_gradients(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: int,
                      compiled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses (0-d fp32), and its gradients dx (N, C) in the dtype of x and dW (V, C) fp32.

    x (N, C); weight (V, C) in the dtype of x, whose rows from `vocab_size` on are padding; targets (N,) int64. `compiled`:
    whether what is plain PyTorch in it shall be compiled, as compilers do not look inside.
    """
    total, dx, dw = _room_for_gradients(x, weight)
    logits, scale = x.new_empty(min(chunk, len(x)), len(weight)), FP16_SCALE if x.dtype == torch.float16 else 1.0
    for some, wanted, into in zip(x.split(chunk), targets.split(chunk), dx.split(chunk), strict=True):
        dz = torch.mm(some, weight.t(), out=logits[:len(some)])
        total += loss_and_gradient(dz, wanted, vocab_size, compiled, scale).sum()
        torch.mm(dz, weight, out=into)
        _add_product(dw, dz, some)
    if scale != 1:
        dx, dw = dx / scale, dw / scale
    return total, dx, dw


@chunked_gradients.register_fake
def _(x, weight, targets, vocab_size, chunk, compiled):
    return _room_for_gradients(x, weight)


def _room_for_gradients(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_zeros((), dtype=torch.float32), torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)


def _add_product(dw: Tensor, dz: Tensor, x: Tensor) -> None:
    """dw (V, C) fp32 += dz^T (V, n) x (n, C)."""
    if dz.dtype == torch.float32:
        dw.addmm_(dz.t(), x)
    elif dz.is_cuda:
        dw += torch.mm(dz.t(), x, out_dtype=torch.float32)
    elif dz.dtype == torch.float16:  # the sum over tokens may be too large for it
        dw.addmm_(dz.t().float(), x.float())
    else:
        for some, columns in zip(dw.split(DW_ROWS), dz.split(DW_ROWS, dim=1), strict=True):
            some += columns.t() @ x


@torch.compiler.disable
def gradients_through(lm_head, x: Tensor, targets: Tensor, vocab_size: int, chunk: int,
                      compiled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `chunked_gradients`, by the forward and backward of the head itself."""
    assert lm_head.bias is None, "a head's bias would get no gradient here"
    total, dx, dw = torch.zeros((), device=x.device), torch.empty_like(x), None
    for some, wanted, into in zip(x.split(chunk), targets.split(chunk), dx.split(chunk), strict=True):
        some = some.detach().requires_grad_()
        logits = lm_head(some)
        dz = logits.detach()
        total += loss_and_gradient(dz, wanted, vocab_size, compiled).sum()
        d_some, d_weight = torch.autograd.grad(logits, (some, lm_head.weight), dz)
        into.copy_(d_some)
        dw = d_weight if dw is None else dw.add_(d_weight)
    return total, dx, dw


# ---------------------------------------------------------------------------------------------------------------------
# The pass over the logits of a chunk

def loss_and_gradient(logits: Tensor, targets: Tensor, vocab_size: int, compiled: bool = False, scale: float = 1.0) -> Tensor:
    """Losses (n,) fp32 in nats, zero where ignored. The logits (n, V), contiguous, become the gradient of the losses' sum
    times `scale`; their columns from `vocab_size` on, which are padding, become zero."""
    assert logits.is_contiguous()
    loss = {"Triton": loss_with_triton, "C++": loss_natively, "PyTorch": _compiled_plainly() if compiled else loss_plainly}
    return loss[kernel_name(logits.device.type, logits.dtype)](logits, targets, vocab_size, scale)


def kernel_name(device_type: str, dtype: torch.dtype) -> str:
    """In what the pass over logits of this dtype is written that serves there."""
    if device_type == "cuda" and triton:
        return "Triton"
    return "C++" if device_type == "cpu" and dtype in KERNELS and why_not_native("loss") is None else "PyTorch"


@functools.cache
def _compiled_plainly():
    return torch.compile(loss_plainly, dynamic=False)


def loss_plainly(logits: Tensor, targets: Tensor, vocab_size: int, scale: float = 1.0) -> Tensor:
    ignored = targets == IGNORED
    at = targets.masked_fill(ignored, 0)[:, None]
    tanh = (logits[:, :vocab_size].float() / SOFTCAP).tanh_()                       # (n, V) fp32
    exp = (SOFTCAP * tanh).exp_()
    total = exp.sum(1, keepdim=True)
    losses = (total.log() - SOFTCAP * tanh.gather(1, at))[:, 0].masked_fill(ignored, 0.0)
    gradient = exp.div_(total).scatter_add_(1, at, torch.full_like(total, -1.0)).mul_(1 - tanh.square_())
    logits.zero_()[:, :vocab_size] = gradient.mul_(scale).masked_fill_(ignored[:, None], 0.0)
    return losses


KERNELS = {torch.float32: "loss_fp32", torch.bfloat16: "loss_bf16"}  # in nanochat/kernels/cpp/loss.cpp


def loss_natively(logits: Tensor, targets: Tensor, vocab_size: int, scale: float = 1.0) -> Tensor:
    losses = torch.empty(len(logits))
    targets = targets.contiguous()
    wrong = getattr(library("loss"), KERNELS[logits.dtype])(
        pointer(logits), pointer(targets), pointer(losses), *map(ctypes.c_int64, (*logits.shape, vocab_size)),
        *map(ctypes.c_float, (SOFTCAP, scale)))
    if wrong:
        raise IndexError(f"{wrong} targets are neither in the vocabulary of {vocab_size} nor {IGNORED}")
    return losses


def loss_with_triton(logits: Tensor, targets: Tensor, vocab_size: int, scale: float = 1.0) -> Tensor:
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _loss_kernel[len(logits),](logits, targets.contiguous(), losses, logits.size(1), vocab_size, SOFTCAP, scale,
                               BLOCK=BLOCK, num_warps=8)
    return losses


if triton:
    @triton.jit
    def _loss_kernel(logits, targets, losses, width, vocab, cap, scale, BLOCK: tl.constexpr):
        """A row of logits (n, width): read for the sum, then read again, from the cache, and written over. With
        r = 1 / (1 + exp(2 z / cap)) the capped logit is cap (1 - 2 r), its slope 4 r (1 - r). A target that is neither a
        token nor ignored makes the loss NaN."""
        row = tl.program_id(0)
        target = tl.load(targets + row)
        logits += row.to(tl.int64) * width
        sums, hits = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z = tl.load(logits + columns, mask=columns < vocab, other=0.0).to(tl.float32)
            s = cap - 2 * cap / (1 + tl.exp(z * (2 / cap)))
            sums += tl.where(columns < vocab, tl.exp(s), 0.0)
            hits += tl.where(columns == target, s, 0.0)
        total = tl.sum(sums)
        loss = tl.where(target == -1, 0.0, tl.log(total) - tl.sum(hits))
        tl.store(losses + row, tl.where((target >= -1) & (target < vocab), loss, float("nan")))
        scale = tl.where(target == -1, 0.0, scale)
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z = tl.load(logits + columns, mask=columns < vocab, other=0.0).to(tl.float32)
            r = 1 / (1 + tl.exp(z * (2 / cap)))
            dz = (tl.exp(cap - 2 * cap * r) / total - tl.where(columns == target, 1.0, 0.0)) * (4 * r * (1 - r) * scale)
            tl.store(logits + columns, tl.where(columns < vocab, dz, 0.0), mask=columns < width)
