"""Faster functions for a model that computes no gradients and is not compiled: evaluation and generation.

In training, the compiler fuses what lies between the matrix products. Evaluation and generation run uncompiled: texts have any
length, and a graph for each would take longer to compile than it saves. There, every elementwise operation is a pass over memory
of its own. For bf16 on CPUs the C++ kernels of `cpp/elementwise.cpp` make one pass of each group of them. They compute in fp32
and round once, where PyTorch rounds after every operation.
"""

import ctypes
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.cpp_kernels import cpp_unavailable_reason, library, pointer
from nanochat.kernels.cross_entropy import ChunkedCrossEntropy
from nanochat.kernels.linear import Linear
from nanochat.kernels.norms import EPS
from nanochat.kernels.rotary import MULTIPLE, rotary_norm_cpp
from nanochat.runtime.tuner import MOST_TOKENS, Choice, Tuner

MOST_VECTORS = 4   # that `matvec_cpp` takes at once


def use_inference_kernels(model, tokens: int, tuner: Tuner | None = None) -> Choice:
    """Let `model.kernels` take their C++ versions wherever no gradient is wanted and nothing is compiled, if these are faster on
    batches of `tokens` tokens: `cpp`, otherwise `torch`."""
    kernels, weight, device = model.kernels, model.lm_head.weight, model.get_device()
    if device.type != "cpu" or model.compute_dtype != torch.bfloat16 or cpp_unavailable_reason("elementwise"):
        return Choice("torch", "the only one that works", {})
    fast = {"norm": norm_cpp, "mix_norm": mix_norm_cpp, "add_norm": add_norm_cpp, "relu_square": relu_square_cpp}
    plain, one, tokens = {name: getattr(kernels, name) for name in fast}, torch.ones(()), min(tokens, MOST_TOKENS)

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


class InferenceLinear(Linear):
    """A Linear whose weight has the compute dtype already and gets no gradient. Few tokens at a time are multiplied in C++ where
    that is `fast`."""
    fast = False

    @classmethod
    def from_linear(cls, linear: nn.Module, dtype: torch.dtype) -> "InferenceLinear":
        with torch.device("meta"):
            new = cls(linear.in_features, linear.out_features)
        new.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
        return new

    def forward(self, x: Tensor) -> Tensor:
        if self.fast and x.dtype == torch.bfloat16 and x.numel() <= MOST_VECTORS * x.size(-1):
            return matvec_cpp(x, self.weight)
        return F.linear(x, self.weight)


def use_inference_linears(model, tuner: Tuner | None = None) -> Choice:
    """Cast the weights of linear layers to the compute dtype, once, and choose how few tokens at a time are multiplied: by
    `torch`, or `cpp` where that is faster on the model's shapes. The model can no longer be trained."""
    for name, layer in model.linears().items():
        model.set_submodule(name, InferenceLinear.from_linear(layer, model.compute_dtype))
    layers = list(model.linears().values())
    if model.get_device().type != "cpu" or model.compute_dtype != torch.bfloat16 or cpp_unavailable_reason("matvec"):
        return Choice("torch", "the only one that works", {})
    shapes = {tuple(layer.weight.shape): layer.weight for layer in layers}

    def all_shapes(function):
        def make():
            inputs = [(torch.ones(rows, w.size(1), dtype=w.dtype), w) for w in shapes.values() for rows in (1, MOST_VECTORS)]
            return lambda: [function(x, w) for x, w in inputs]
        return make
    problem = f"products of 1 and {MOST_VECTORS} tokens, " + " ".join(f"{n}x{k}" for n, k in sorted(shapes))
    with torch.no_grad():
        choice = (tuner or Tuner(model.get_device(), folder=None)).choose(
            problem, {"torch": all_shapes(F.linear), "cpp": all_shapes(matvec_cpp)}, times_in_use=len(layers) / len(shapes))
    for layer in layers:
        layer.fast = choice.name == "cpp"
    return choice


def matvec_cpp(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K) weight^T -> (..., N), for at most MOST_VECTORS vectors in all; weight (N, K) contiguous, bf16."""
    x, y = x.contiguous(), x.new_empty(*x.shape[:-1], len(weight))
    library("matvec").matvec(*map(ctypes.c_int64, (x.numel() // max(x.size(-1), 1), *weight.shape)), pointer(x), pointer(weight),
                             pointer(y))
    return y


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
