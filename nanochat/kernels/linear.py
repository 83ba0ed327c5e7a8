"""The linear layer of every model here, and one that casts its weight once for all products of a step.

Master weights are fp32, and each product casts them: once forward, once more backward where a compiler would rather cast
again than keep the copy, and that for every micro-batch. The cast of an optimizer step is the same each time.
"""

from collections.abc import Iterable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Linear(nn.Linear):
    """A bias-free linear layer with fp32 master weights, multiplied in the dtype of its input (no autocast)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weight as products in `dtype` take it."""
        return self.weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_in(x.dtype))


class CastOnceLinear(Linear):
    """A Linear whose products take `cast`, a copy of its weight that `refresh` makes: before it is first used, and whenever
    the weight changed. It shares the weight with the layer it is made from, and gives it the same gradient, bit by bit."""

    @classmethod
    def from_linear(cls, linear: Linear, dtype: torch.dtype) -> "CastOnceLinear":
        with torch.device("meta"):
            new = cls(linear.in_features, linear.out_features)
        new.weight = linear.weight
        new.register_buffer("cast", torch.empty_like(linear.weight, dtype=dtype, requires_grad=False), persistent=False)
        return new

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        return _Cast.apply(self.weight, self.cast) if dtype == self.cast.dtype else super().weight_in(dtype)


class _Cast(torch.autograd.Function):
    """weight.to(cast.dtype), which is at hand."""

    @staticmethod
    def forward(ctx, weight, cast):
        ctx.dtype = weight.dtype
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to(ctx.dtype), None


@torch.no_grad()
def refresh(layers: Iterable[CastOnceLinear]) -> None:
    """Cast the weights of these layers, in place."""
    layers = list(layers)
    if layers:
        torch._foreach_copy_([layer.cast for layer in layers], [layer.weight for layer in layers])
