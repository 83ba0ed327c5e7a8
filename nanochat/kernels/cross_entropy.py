"""The training loss: cross-entropy of soft-capped logits, as a reference implementation and in chunks of tokens.

Soft cap (Gemma 2, arXiv 2408.00118): s = cap * tanh(z / cap), in fp32, keeps every logit within (-cap, cap).

The reference implementation keeps the logits of all tokens for the backward pass, several times and in fp32: the largest
tensors of a training step. As the loss is the last operation, its gradient can be computed in the forward pass, one chunk of
n tokens at a time (as in Liger Kernel, arXiv 2410.10989):

    logits     z  = x W^T                        (n, V)  in the dtype of x
    loss       log(sum exp s) - s[target]        (n,)    in fp32
    gradient   dz = (softmax(s) - onehot(target)) (1 - tanh^2(z / cap))   (n, V), written over z
    products   dx = dz W  (n, C),  dW += dz^T x  (V, C), summed in fp32

Only dx and dW are kept. They are the gradients of the *sum* of the losses, so that no small factor 1/N is rounded into them;
the backward pass multiplies them by the gradient that arrives at the sum.

As |s| < cap, exp(s) cannot overflow, so softmax needs no maximum, and loss and gradient take a single pass over a row. This
fused kernel exists in Triton for CUDA, in C++ for CPUs (nanochat/kernels/cpp/loss.cpp), and in PyTorch for other devices,
compiled where the model is. On CPUs in bf16 one kernel may do all of a chunk instead: head_loss.py.
"""

import ctypes
import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.cpp_kernels import cpp_unavailable_reason, library, pointer
from nanochat.kernels.weight_gradient import add_weight_gradient_cpp
from nanochat.runtime.toolchain import triton_runs_on

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS, the CPU build of torch
    triton = None

SOFTCAP = 15.0
IGNORED = -1            # target without a loss
FP16_SCALE = 2.0**8     # multiplies dz in fp16, where probabilities below 6e-8 would underflow
CHUNK_BYTES = {"cpu": 2**23, "cuda": 2**28}  # size of a chunk's logits
LEAST_CHUNK = 512       # tokens; fewer would waste time, as dW is read and written once per chunk
DW_ROWS = 2048          # rows of dW that a CPU updates at once: their product is still in the cache when it is added
BLOCK = 2048            # columns per iteration of the Triton kernel


def softcapped_logits(x: Tensor, lm_head, vocab_size: int) -> Tensor:
    """Soft-capped logits (B, T, vocab_size) fp32 of the normed residual stream x (B, T, C), without the padding of lm_head."""
    logits = lm_head(x)[..., :vocab_size].float()
    return SOFTCAP * torch.tanh(logits / SOFTCAP)


def softcapped_cross_entropy(x: Tensor, lm_head, targets: Tensor, vocab_size: int, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats, fp32: the reference implementation.

    x: normed residual stream (B, T, C).   targets: (B, T) int64, -1 = ignored.
    reduction: `mean` over targets that are not ignored (NaN if all are), `sum`, or `none` -> (B, T), 0 where ignored.
    """
    logits = softcapped_logits(x, lm_head, vocab_size)
    loss = F.cross_entropy(logits.view(-1, vocab_size), targets.reshape(-1), ignore_index=IGNORED, reduction=reduction)
    return loss.view_as(targets) if reduction == "none" else loss


class ChunkedCrossEntropy:
    """`softcapped_cross_entropy` in chunks of tokens, with its signature.

    chunk_tokens: tokens per chunk; 0 chooses by the size of their logits.
    plain: the class of linear layers whose forward is x W^T and nothing else, with W from `weight_in(dtype)`. For those the
    products are computed by `gradients`: `chunked_gradients`, or a function with its signature. An lm_head with a method
    `chunked_gradients` (FP8) computes them itself; any other is called on each chunk, which torch.compile cannot see through.

    With gradients and `reduction="none"` the reference implementation runs instead: the gradient that arrives at each single
    loss is not known in the forward pass.
    """

    def __init__(self, chunk_tokens: int, plain: type):
        self.chunk_tokens, self.plain, self.gradients = chunk_tokens, plain, chunked_gradients

    def is_plain(self, lm_head) -> bool:
        return type(lm_head).forward is self.plain.forward

    def __call__(self, x: Tensor, lm_head, targets: Tensor, vocab_size: int, reduction: str = "mean") -> Tensor:
        rows, flat_targets = x.reshape(-1, x.size(-1)), targets.reshape(-1)
        chunk = self.chunk_tokens or default_chunk(lm_head.weight.size(0), x.dtype, x.device.type)
        if torch.is_grad_enabled():
            if reduction == "none":
                return softcapped_cross_entropy(x, lm_head, targets, vocab_size, reduction)
            compiled = torch.compiler.is_compiling()
            if self.is_plain(lm_head):
                weight = lm_head.weight_in(x.dtype).detach()
                gradients = self.gradients(rows.detach(), weight, flat_targets, vocab_size, chunk, compiled,
                                           lm_head.own_weight_gradient)
            elif hasattr(lm_head, "chunked_gradients"):
                gradients = lm_head.chunked_gradients(rows.detach(), flat_targets, vocab_size, chunk, compiled)
            else:
                gradients = gradients_through(lm_head, rows.detach(), flat_targets, vocab_size, chunk, compiled)
            total = _WithGradients.apply(rows, lm_head.weight, *gradients)
        else:
            losses = torch.empty(flat_targets.shape, device=x.device)  # one tensor: a list of small ones fragments memory
            for x_part, y_part, out in zip(rows.split(chunk), flat_targets.split(chunk), losses.split(chunk), strict=True):
                out.copy_(loss_without_gradient(lm_head(x_part), y_part, vocab_size))
            if reduction == "none":
                return losses.view_as(targets)
            total = losses.sum()
        if reduction == "sum":
            return total
        count = (flat_targets != IGNORED).sum()
        return torch.where(count > 0, total / count.clamp(min=1), math.nan)  # NaN has zero gradients, as in the reference


def default_chunk(vocab: int, dtype: torch.dtype, device_type: str) -> int:
    """Tokens per chunk for an lm_head of `vocab` rows: a multiple of 16, at least LEAST_CHUNK."""
    return max(LEAST_CHUNK, CHUNK_BYTES.get(device_type, 2**26) // (vocab * dtype.itemsize) // 16 * 16)


class _WithGradients(torch.autograd.Function):
    """`total` (0-d) as a function of x and weight, whose gradients dx and dw are already computed."""

    @staticmethod
    def forward(ctx, x, weight, total, dx, dw):
        ctx.save_for_backward(dx, dw)
        return total.clone()

    @staticmethod
    def backward(ctx, gradient):
        dx, dw = ctx.saved_tensors
        # in fp32: dx * gradient could round the gradient, a factor common to all elements, to the dtype of dx first
        return (dx.float() * gradient).to(dx.dtype), dw * gradient, None, None, None


@torch.library.custom_op("nanochat::chunked_loss", mutates_args=())
def chunked_gradients(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: int,
                      compiled: bool, own_weight_gradient: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses (0-d fp32) and its gradients dx (N, C) in the dtype of x and dW (V, C) fp32.

    x (N, C).   weight (V, C) in the dtype of x; rows from `vocab_size` on are padding.   targets (N,) int64.
    chunk: tokens.   compiled: compile the PyTorch kernel, which torch.compile cannot see inside this custom operator.
    own_weight_gradient: compute dW by the C++ kernel of nanochat/kernels/weight_gradient.py.
    """
    total, dx, dw = empty_gradients(x, weight)
    logits, scale = x.new_empty(min(chunk, len(x)), len(weight)), FP16_SCALE if x.dtype == torch.float16 else 1.0
    for x_part, y_part, dx_part in zip(x.split(chunk), targets.split(chunk), dx.split(chunk), strict=True):
        dz = torch.mm(x_part, weight.t(), out=logits[:len(x_part)])
        total += loss_and_gradient(dz, y_part, vocab_size, compiled, scale).sum()
        torch.mm(dz, weight, out=dx_part)
        (add_weight_gradient_cpp if own_weight_gradient else _add_product)(dw, dz, x_part)
    if scale != 1:
        dx, dw = dx / scale, dw / scale
    return total, dx, dw


@chunked_gradients.register_fake
def _(x, weight, targets, vocab_size, chunk, compiled, own_weight_gradient=False):
    return empty_gradients(x, weight)


def empty_gradients(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """total (0-d), dx and dW before the first chunk; the sums start at zero."""
    return x.new_zeros((), dtype=torch.float32), torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)


def _add_product(dw: Tensor, dz: Tensor, x: Tensor) -> None:
    """dw (V, C) fp32 += dz^T (V, n) x (n, C)."""
    if dz.dtype == torch.float32:
        dw.addmm_(dz.t(), x)
    elif dz.is_cuda:
        dw += torch.mm(dz.t(), x, out_dtype=torch.float32)
    elif dz.dtype == torch.float16:  # a sum over tokens may overflow fp16
        dw.addmm_(dz.t().float(), x.float())
    else:
        for dw_rows, columns in zip(dw.split(DW_ROWS), dz.split(DW_ROWS, dim=1), strict=True):
            dw_rows += columns.t() @ x


@torch.compiler.disable
def gradients_through(lm_head, x: Tensor, targets: Tensor, vocab_size: int, chunk: int,
                      compiled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `chunked_gradients`, but by the forward and backward of lm_head itself."""
    assert lm_head.bias is None, "a head's bias would get no gradient here"
    total, dx, dw = torch.zeros((), device=x.device), torch.empty_like(x), None
    for x_part, y_part, dx_part in zip(x.split(chunk), targets.split(chunk), dx.split(chunk), strict=True):
        x_part = x_part.detach().requires_grad_()
        logits = lm_head(x_part)
        dz = logits.detach()
        total += loss_and_gradient(dz, y_part, vocab_size, compiled).sum()
        d_x, d_weight = torch.autograd.grad(logits, (x_part, lm_head.weight), dz)
        dx_part.copy_(d_x)
        dw = d_weight if dw is None else dw.add_(d_weight)
    return total, dx, dw


# ---------------------------------------------------------------------------------------------------------------------
# The fused kernel: loss and gradient in one pass over the logits of a chunk, in PyTorch (reference), C++ and Triton

def loss_and_gradient(logits: Tensor, targets: Tensor, vocab_size: int, compiled: bool = False, scale: float = 1.0) -> Tensor:
    """Losses (n,) fp32 in nats, 0 where ignored. In place, the logits (n, V) become the gradient of the losses' sum.

    logits: contiguous; columns from `vocab_size` on are padding and get gradient 0.   targets: (n,) int64.
    scale: multiplies the gradient.
    Raises: IndexError for targets outside of the vocabulary (C++); Triton gives NaN losses instead.
    """
    assert logits.is_contiguous()
    loss = {"Triton": loss_triton, "C++": loss_cpp, "PyTorch": _compiled_reference() if compiled else loss_reference}
    return loss[kernel_name(logits.device.type, logits.dtype)](logits, targets, vocab_size, scale)


def loss_without_gradient(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """The losses of `loss_and_gradient` alone. The logits may be overwritten."""
    name, targets = kernel_name(logits.device.type, logits.dtype), targets.reshape(-1)
    if name == "PyTorch":
        capped = SOFTCAP * torch.tanh(logits[:, :vocab_size].float() / SOFTCAP)
        return F.cross_entropy(capped, targets, ignore_index=IGNORED, reduction="none")
    return {"Triton": loss_triton, "C++": loss_cpp}[name](logits.contiguous(), targets, vocab_size, gradient=False)


def kernel_name(device_type: str, dtype: torch.dtype) -> str:
    """Implementation that runs on this device for logits of this dtype: `Triton`, `C++` or `PyTorch`."""
    if triton_runs_on(device_type):
        return "Triton"
    return "C++" if device_type == "cpu" and dtype in CPP_KERNELS and cpp_unavailable_reason("loss") is None else "PyTorch"


@functools.cache
def _compiled_reference():
    return torch.compile(loss_reference, dynamic=False)


def loss_reference(logits: Tensor, targets: Tensor, vocab_size: int, scale: float = 1.0) -> Tensor:
    """`loss_and_gradient` in PyTorch: the reference implementation."""
    ignored = targets == IGNORED
    at = targets.masked_fill(ignored, 0)[:, None]
    tanh = (logits[:, :vocab_size].float() / SOFTCAP).tanh_()                       # (n, V) fp32
    exp = (SOFTCAP * tanh).exp_()
    total = exp.sum(1, keepdim=True)
    losses = (total.log() - SOFTCAP * tanh.gather(1, at))[:, 0].masked_fill(ignored, 0.0)
    gradient = exp.div_(total).scatter_add_(1, at, torch.full_like(total, -1.0)).mul_(1 - tanh.square_())
    logits.zero_()[:, :vocab_size] = gradient.mul_(scale).masked_fill_(ignored[:, None], 0.0)
    return losses


CPP_KERNELS = {torch.float32: "loss_fp32", torch.bfloat16: "loss_bf16"}  # in nanochat/kernels/cpp/loss.cpp


def loss_cpp(logits: Tensor, targets: Tensor, vocab_size: int, scale: float = 1.0, gradient: bool = True) -> Tensor:
    """`loss_and_gradient` in C++, for fp32 and bf16 on a CPU; without `gradient` the logits stay as they are."""
    losses = torch.empty(len(logits))
    targets = targets.contiguous()
    wrong = getattr(library("loss"), CPP_KERNELS[logits.dtype])(
        pointer(logits), pointer(targets), pointer(losses), *map(ctypes.c_int64, (*logits.shape, vocab_size)),
        *map(ctypes.c_float, (SOFTCAP, scale)), ctypes.c_int64(gradient))
    if wrong:
        raise IndexError(f"{wrong} targets are neither in the vocabulary of {vocab_size} nor {IGNORED}")
    return losses


def loss_triton(logits: Tensor, targets: Tensor, vocab_size: int, scale: float = 1.0, gradient: bool = True,
                sums: Tensor | None = None) -> Tensor:
    """`loss_and_gradient` in Triton, one program per row; without `gradient` the logits stay as they are.

    sums: (n,) fp32, receives the sum of exp(s) of each row; None where it is not wanted.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _loss_kernel[len(logits),](logits, targets.contiguous(), losses, losses if sums is None else sums, logits.size(1), vocab_size,
                               SOFTCAP, scale, GRADIENT=gradient, SUMS=sums is not None, BLOCK=BLOCK, num_warps=8)
    return losses


if triton:
    @triton.jit
    def _loss_kernel(logits, targets, losses, row_sums, width, vocab, cap, scale, GRADIENT: tl.constexpr, SUMS: tl.constexpr,
                     BLOCK: tl.constexpr):
        """One row of logits (n, width): read once for the sum, then again from the cache, and overwritten by the gradient.

        With r = 1 / (1 + exp(2 z / cap)) the capped logit is cap (1 - 2 r). A target that is neither in the vocabulary nor -1
        makes the loss NaN.
        """
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
        if SUMS:
            tl.store(row_sums + row, total)
        if GRADIENT:
            scale = tl.where(target == -1, 0.0, scale)
            for start in range(0, width, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                z = tl.load(logits + columns, mask=columns < vocab, other=0.0).to(tl.float32)
                dz = gradient_of_logits(z, total, columns == target, cap) * scale
                tl.store(logits + columns, tl.where(columns < vocab, dz, 0.0), mask=columns < width)

    @triton.jit
    def gradient_of_logits(z, total, is_target, cap):
        """Gradient of a loss for its logits z (fp32), with `total`, the sum of exp(s) of the row: the probability, less one at
        the target, times the soft cap's derivative 4 r (1 - r)."""
        r = 1 / (1 + tl.exp(z * (2 / cap)))
        return (tl.exp(cap - 2 * cap * r) / total - tl.where(is_target, 1.0, 0.0)) * (4 * r * (1 - r))
