"""Gradient of a linear layer's weight: dW (N, K) = g^T x, from the output's gradient g (tokens, N) and the input x (tokens, K).

By itself autograd computes it in the dtype of g and casts it to the master weight's fp32. For bf16 on CPUs there is a C++ kernel
(`cpp/weight_gradient.cpp`) that packs both factors for PyTorch's brgemm and sums in fp32, without rounding to bf16. Whether it is
faster depends on processor and sizes: `choose_weight_gradient` measures it on those of a model.
"""

import ctypes
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.cpp_kernels import cpp_unavailable_reason, library, pointer
from nanochat.runtime.tuner import MOST_TOKENS, Choice, Tuner, untimed_choice

ROWS, COLUMNS = 16, 32  # the kernel takes multiples of these


def weight_gradient_reference(g: Tensor, x: Tensor) -> Tensor:
    """g^T x in their dtype, (N, K) fp32: what autograd does."""
    return (g.t() @ x).float()


def add_weight_gradient_cpp(dw: Tensor, g: Tensor, x: Tensor, add: bool = True) -> None:
    """dw (N, K) fp32, contiguous, += g^T x, or = where not `add`. g (tokens, N) and x (tokens, K) bf16, any strides."""
    g, x = (t if t.stride(1) == 1 else t.contiguous() for t in (g, x))
    sizes = map(ctypes.c_int64, (len(g), *dw.shape))
    with torch.profiler.record_function("nanochat::add_weight_gradient"):  # inside the loss too it counts as a product
        library("weight_gradient").weight_gradient(*sizes, pointer(g), ctypes.c_int64(g.stride(0)), pointer(x),
                                                   ctypes.c_int64(x.stride(0)), pointer(dw), ctypes.c_int64(add))


def unavailable_reason(dtype: torch.dtype, device_type: str) -> str | None:
    """Why the C++ kernel cannot be used for layers that compute in `dtype`, or None."""
    if device_type != "cpu" or dtype != torch.bfloat16:
        return f"the kernel is for bfloat16 on a CPU, not for {dtype} on {device_type}"
    return cpp_unavailable_reason("weight_gradient")


def fits(weight: Tensor) -> bool:
    """Whether the C++ kernel takes a weight of this shape."""
    return weight.size(0) % ROWS == 0 and weight.size(1) % COLUMNS == 0


@torch.library.custom_op("nanochat::weight_gradient", mutates_args=(), device_types="cpu")
def weight_gradient_cpp(g: Tensor, x: Tensor) -> Tensor:
    """g^T x summed in fp32, (N, K) fp32."""
    dw = g.new_empty(g.size(1), x.size(1), dtype=torch.float32)
    add_weight_gradient_cpp(dw, g, x, add=False)
    return dw


@weight_gradient_cpp.register_fake
def _(g, x):
    return g.new_empty(g.size(1), x.size(1), dtype=torch.float32)


class LinearWithWeightGradient(torch.autograd.Function):
    """x (..., K), cast (N, K), masters: fp32 weights (N_i, K), which one over the other are `cast` in the dtype of x, so that
    N = sum N_i -> x cast^T (..., N). The gradient of the masters is computed by the C++ kernel; `cast` gets none."""

    @staticmethod
    def forward(ctx, x, cast, *masters):
        ctx.save_for_backward(x, cast)
        ctx.rows = [len(master) for master in masters]
        return F.linear(x, cast)

    @staticmethod
    def backward(ctx, g):
        x, cast = ctx.saved_tensors
        dx = g @ cast if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[2:]):
            return dx, None, *[None] * len(ctx.rows)
        return dx, None, *weight_gradient_cpp(g.flatten(0, -2), x.flatten(0, -2)).split(ctx.rows)


def choose_weight_gradient(weights: Iterable[Tensor], tokens: int, dtype: torch.dtype, *, tuner: Tuner | None = None,
                           wanted: str = "auto", recorded: str | None = None) -> Choice:
    """How the gradients of these weights (N, K) are computed: `torch` or `brgemm`, whichever takes less time for all of them.

    tokens: of a micro-batch.   wanted: --weight-gradient.   recorded: the choice of the run to be resumed.
    Raises: UserError where `brgemm` is wanted and does not work.
    """
    weights = list(weights)
    shapes = {tuple(w.shape) for w in weights if fits(w)}  # each is timed once: large layers weigh most, as in a step
    device = next((w.device for w in weights), torch.device("cpu"))
    why_not = unavailable_reason(dtype, device.type) or (None if shapes else "no layer has a size that the kernel takes")
    if choice := untimed_choice("--weight-gradient", wanted, "torch", "brgemm", why_not, recorded):
        return choice
    functions = {"torch": weight_gradient_reference, "brgemm": weight_gradient_cpp}
    random = torch.Generator().manual_seed(0)  # a private generator: the run's random numbers must not change

    in_use, tokens = tokens, min(tokens, MOST_TOKENS)

    def all_shapes(function):
        def make():
            pairs = [[torch.randn(tokens, n, generator=random).to(dtype) for n in shape] for shape in shapes]
            return lambda: [function(g, x) for g, x in pairs]
        return make
    problem = f"weight gradients of {tokens} tokens, " + " ".join(f"{n}x{k}" for n, k in sorted(shapes))
    return (tuner or Tuner(device, folder=None)).choose(
        problem, {name: all_shapes(f) for name, f in functions.items()}, times_in_use=in_use / tokens)
