"""Linear layers: the default one, and one that casts its weight once per optimizer step.

Master weights are fp32 and every matrix product needs them in the dtype of its input. The default layer casts in each forward
pass, and often again in the backward pass, for every micro-batch. The result only changes when the optimizer updates the weight.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.weight_gradient import LinearWithWeightGradient, fits


class Linear(nn.Linear):
    """A linear layer without bias and with an fp32 master weight (N, K), cast to the dtype of its input: no autocast.

    x (..., K) -> (..., N) in the dtype of x.

    own_weight_gradient: compute the weight's gradient in C++ (nanochat/kernels/weight_gradient.py).
    joins_relu_square: whether the layer computes max(x, 0)^2 of its input itself, so that the MLP leaves it out. False here; an
    FP8 layer can square the ReLU while it quantizes its input.
    """
    own_weight_gradient = False
    joins_relu_square = False

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weight (N, K) cast to `dtype`, differentiable."""
        return self.weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_in(x.dtype)
        if self.own_weight_gradient:
            return LinearWithWeightGradient.apply(x, weight.detach(), self.weight)
        return F.linear(x, weight)


class CastOnceLinear(Linear):
    """A Linear that keeps `cast`, its weight in low precision. Call `refresh` before the first use and after each update.

    Outputs and gradients are the same bits as those of a Linear.

    gathered: `refresh` leaves `cast` out, as who divides the weights among ranks fills it before each use.
    """
    gathered = False

    @classmethod
    def from_linear(cls, linear: Linear, dtype: torch.dtype) -> "CastOnceLinear":
        """Make one that shares the weight parameter of `linear`."""
        with torch.device("meta"):
            new = cls(linear.in_features, linear.out_features)
        new.weight = linear.weight
        new.own_weight_gradient = linear.own_weight_gradient
        new.register_buffer("cast", torch.empty_like(linear.weight, dtype=dtype, requires_grad=False), persistent=False)
        return new

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        return _Cast.apply(self.weight, self.cast) if dtype == self.cast.dtype else super().weight_in(dtype)


class _Cast(torch.autograd.Function):
    """The value of weight.to(cast.dtype), already in `cast`, with the gradient of that cast."""

    @staticmethod
    def forward(ctx, weight, cast):
        ctx.dtype = weight.dtype
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to(ctx.dtype), None


def use_own_weight_gradient(layers: Iterable[nn.Module]) -> None:
    """Let those of these layers that are Linear, and of a size that fits, compute the gradient of their weight in C++."""
    for layer in layers:
        if isinstance(layer, Linear):
            layer.own_weight_gradient = fits(layer.weight)


@torch.no_grad()
def refresh(layers: Iterable[CastOnceLinear]) -> None:
    """Update the low-precision copies of these layers, in place, in one fused kernel."""
    layers = [layer for layer in layers if not layer.gathered]
    if layers:
        torch._foreach_copy_([layer.cast for layer in layers], [layer.weight for layer in layers])


def keep_casts(model, wanted: Callable[[Linear], bool] = lambda layer: True) -> list[CastOnceLinear]:
    """Replace by a CastOnceLinear each Linear of the model that would cast its weight in every forward pass and that is `wanted`.
    Returns the new layers."""
    plain = {name: layer for name, layer in model.linears().items()
             if type(layer) is Linear and layer.weight.dtype != model.compute_dtype and wanted(layer)}
    layers = [CastOnceLinear.from_linear(layer, model.compute_dtype) for layer in plain.values()]
    for name, layer in zip(plain, layers, strict=True):
        model.set_submodule(name, layer)
    return layers
