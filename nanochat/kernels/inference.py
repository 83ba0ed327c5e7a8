"""Faster functions for a model that computes no gradients and is not compiled: evaluation and generation.

In training, the compiler fuses what lies between the matrix products. Evaluation and generation run uncompiled: texts have any
length, and a graph for each would take longer to compile than it saves. There, every elementwise operation is a pass over memory
of its own. For bf16 on CPUs the C++ kernels of `cpp/elementwise.cpp` make one pass of each group of them. They compute in fp32
and round once, where PyTorch rounds after every operation.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from nanochat.kernels.cpp_kernels import cpp_unavailable_reason, library, pointer
from nanochat.kernels.cross_entropy import ChunkedCrossEntropy
from nanochat.kernels.linear import Linear
from nanochat.kernels.norms import EPS
from nanochat.kernels.rotary import MULTIPLE, rotary_norm_cpp
from nanochat.runtime.tuner import Choice, Tuner

MOST_TIMED = 4096  # tokens: of a larger batch a part is timed


def use_inference_kernels(model, tokens: int, tuner: Tuner | None = None) -> Choice:
    """Let `model.kernels` take their C++ versions wherever no gradient is wanted and nothing is compiled, if these are faster on
    batches of `tokens` tokens: `cpp`, otherwise `torch`."""
    kernels, weight, device = model.kernels, model.lm_head.weight, model.get_device()
    if device.type != "cpu" or model.compute_dtype != torch.bfloat16 or cpp_unavailable_reason("elementwise"):
        return Choice("torch", "the only one that works", {})
    fast = {"norm": norm_cpp, "mix_norm": mix_norm_cpp, "add_norm": add_norm_cpp, "relu_square": relu_square_cpp}
    plain, one, tokens = {name: getattr(kernels, name) for name in fast}, torch.ones(()), min(tokens, MOST_TIMED)

    def passes_of_a_block(functions):
        def make():
            x, y = (torch.ones(tokens, n, dtype=torch.bfloat16) for n in (weight.size(1), 4 * weight.size(1)))
            return lambda: (functions["mix_norm"](x, x, one, one), functions["add_norm"](x, x), functions["relu_square"](y))
        return make
    with torch.no_grad():
        choice = (tuner or Tuner(device, folder=None)).choose(
            f"norms and relu^2 without gradients, {tokens}x{weight.size(1)}",
            {name: passes_of_a_block(functions) for name, functions in {"torch": plain, "cpp": fast}.items()})
    if choice.name == "cpp":
        if model.cos.size(-1) * 2 % MULTIPLE == 0:
            fast["rotary_norm"] = rotary_norm_cpp
        for name, function in fast.items():
            setattr(kernels, name, _without_gradient(function, getattr(kernels, name)))
        kernels.loss = _without_gradient(ChunkedCrossEntropy(0, plain=Linear), kernels.loss)
    return choice


def _without_gradient(fast: Callable, otherwise: Callable) -> Callable:
    def function(x: Tensor, *more):
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or x.dtype != torch.bfloat16:
            return otherwise(x, *more)
        return fast(x, *more)
    return function


def norm_cpp(x: Tensor) -> Tensor:
    """x (..., C) by its root mean square."""
    return _sum_and_norm(x, None, 1.0, 0.0)[1]


def mix_norm_cpp(x: Tensor, x0: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """x' = a x + b x0, and norm(x')."""
    return _sum_and_norm(x, x0, a.item(), b.item())


def add_norm_cpp(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x' = x + y, and norm(x')."""
    return _sum_and_norm(x, y, 1.0, 1.0)


def relu_square_cpp(x: Tensor) -> Tensor:
    """max(x, 0)^2."""
    x = x.contiguous()
    y = x.new_empty(x.shape)
    library("elementwise").relu_square(ctypes.c_int64(x.numel()), pointer(x), pointer(y))
    return y


def _sum_and_norm(x: Tensor, y: Tensor | None, a: float, b: float) -> tuple[Tensor, Tensor]:
    """a x + b y (x itself where y is None), and its norm: bf16 (..., C) of one shape."""
    x = x.contiguous()
    normed = x.new_empty(x.shape)
    mixed, y = (x, None) if y is None else (x.new_empty(x.shape), y.contiguous())
    sizes = map(ctypes.c_int64, (x.numel() // max(x.size(-1), 1), x.size(-1)))
    library("elementwise").sum_and_norm(*sizes, pointer(x), y if y is None else pointer(y), *map(ctypes.c_float, (a, b, EPS)),
                                        pointer(mixed), pointer(normed))
    return mixed, normed
