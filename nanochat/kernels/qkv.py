"""Queries, keys and values of a block: three matrix products, or one with the three weights stacked.

    separate    q = x Wq^T,  k = x Wk^T,  v = x Wv^T;     dx = dq Wq + dk Wk + dv Wv: three products and two additions
    fused       (q k v) = x W^T,  W = Wq over Wk over Wv;  dx = (dq dk dv) W: one product, summed in fp32 and rounded once

The weights stay three parameters, for checkpoints and for Muon, which updates each as a matrix of its own; stacking them is part
of their cast to the compute dtype. Whether one product is faster depends on the device and the sizes: `choose_qkv` measures it.
Both ways differ by rounding only.
"""

from collections.abc import Iterable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels.linear import Linear
from nanochat.kernels.weight_gradient import LinearWithWeightGradient
from nanochat.runtime.tuner import MOST_TOKENS, Choice, Tuner, untimed_choice

LEAST_WORK = 2**28  # multiplications of all blocks for a micro-batch, below which nothing is timed: milliseconds of a CPU


def separate_qkv(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """The output (..., N_i) of each of these layers for x (..., K): the reference."""
    return tuple(layer(x) for layer in layers)


def fused_qkv(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """`separate_qkv` by one product. The outputs are views of one tensor (..., sum N_i), so that only features are contiguous.

    Layers that are not plain ones, FP8 layers for example, are computed one by one.
    """
    if not are_plain(layers):
        return separate_qkv(x, *layers)
    weight = torch.cat([layer.weight_in(x.dtype) for layer in layers])
    if all(layer.own_weight_gradient for layer in layers):
        y = LinearWithWeightGradient.apply(x, weight.detach(), *(layer.weight for layer in layers))
    else:
        y = F.linear(x, weight)
    return y.split([len(layer.weight) for layer in layers], dim=-1)


def are_plain(layers: Iterable[nn.Module]) -> bool:
    """Whether the forward of all these layers is x W^T and nothing else, with W from `weight_in(dtype)`."""
    return all(type(layer).forward is Linear.forward for layer in layers)


def choose_qkv(blocks: list[tuple[nn.Module, nn.Module, nn.Module]], tokens: int, dtype: torch.dtype, *,
               tuner: Tuner | None = None, wanted: str = "auto", recorded: str | None = None) -> Choice:
    """How queries, keys and values are computed: `separate` or `fused`, whichever takes less time forward and backward.

    Both are timed uncompiled: compiled they compared alike on a CPU, and took 4 to 13 s to compile (dev/LOG.md).

    blocks: the three layers of each block.   tokens: of a micro-batch.   wanted: --fused-qkv.   recorded: the choice of the run
    to be resumed.
    Raises: UserError where `fused` is wanted and does not work.
    """
    plain = [layers for layers in blocks if are_plain(layers)]
    why_not = None if plain else "no block has plain linear layers for its queries, keys and values"
    if choice := untimed_choice("--fused-qkv", wanted, "separate", "fused", why_not, recorded):
        return choice
    layers, in_use, tokens = plain[0], tokens, min(tokens, MOST_TOKENS)
    weights = [layer.weight for layer in layers]
    if 3 * in_use * len(plain) * sum(w.numel() for w in weights) < LEAST_WORK:
        return Choice("separate", "too short to matter", {})
    device, random = weights[0].device, torch.Generator().manual_seed(0)  # a private generator: the run's must not change

    def training_call(function):
        def make():
            x, *gradients = (torch.randn(tokens, n, generator=random).to(device, dtype)
                             for n in (weights[0].size(1), *map(len, weights)))
            x.requires_grad_()
            return lambda: torch.autograd.grad(function(x, *layers), (x, *weights), gradients)
        return make
    functions = {"separate": separate_qkv, "fused": fused_qkv}
    own = ", own weight gradient" * all(layer.own_weight_gradient for layer in layers)
    problem = (f"q, k, v of {tokens} tokens, {type(layers[0]).__name__} {'+'.join(str(len(w)) for w in weights)}x"
               f"{weights[0].size(1)} {dtype}{own}")
    with torch.inference_mode(False), torch.enable_grad():
        return (tuner or Tuner(device, folder=None)).choose(
            problem, {name: training_call(f) for name, f in functions.items()}, times_in_use=in_use / tokens * len(plain))
