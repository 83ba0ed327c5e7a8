"""Patterns of structured sparsity for the MLPs of a model, as layers that replace c_fc and c_proj.

Names as in nanochat.gpt: W1 is c_fc (hidden, width), W2 is c_proj (width, hidden), h = relu(W1 x)^2.
"""

import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from measure import mean, time_layers
from nanochat.gpt import Linear
from nanochat.runtime.toolchain import first_line


class Sparse(Linear):
    """A linear layer with `kept` effective weights: a smaller one, one with a mask that stays during training, or one with a
    2:4 pattern in its input."""

    def __init__(self, weight: Tensor, mask: Tensor | None = None, sparse_input: bool = False):
        super().__init__(weight.size(1), weight.size(0))
        self.weight = nn.Parameter(weight.float())
        self.register_buffer("mask", mask, persistent=False)
        self.sparse_input = sparse_input
        self.kept = int(weight.numel() if mask is None else mask.sum()) // (2 if sparse_input else 1)

    def dense_weight(self) -> Tensor:
        return self.weight if self.mask is None else self.weight * self.mask

    def forward(self, x):
        return F.linear(two_of_four(x) if self.sparse_input else x, self.dense_weight().to(x.dtype))


def mask_two_of_four(scores: Tensor) -> Tensor:
    """True at the two largest of every four neighbours in the last dimension, the first of equal ones."""
    order = scores.unflatten(-1, (-1, 4)).argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order[..., :2], True).flatten(-2)


def two_of_four(x: Tensor) -> Tensor:
    return x * mask_two_of_four(x.detach().abs())


def mask_blocks(w: Tensor, keep: float, block: int) -> Tensor:
    """True in the blocks of `block` x `block` weights with the largest norms, a share `keep` of them."""
    norms = w.unflatten(1, (-1, block)).unflatten(0, (-1, block)).norm(dim=(1, 3))  # (out / block, in / block)
    mask = torch.zeros(norms.numel(), dtype=torch.bool)
    mask[norms.flatten().topk(max(1, round(keep * norms.numel()))).indices] = True
    return mask.view_as(norms).repeat_interleave(block, 0).repeat_interleave(block, 1)


def top_indices(scores: Tensor, keep: float, group: int = 1) -> Tensor:
    """Indices, ascending, of the share `keep` of neurons with the largest scores (hidden,), in groups of neighbours."""
    groups = scores.view(-1, group).sum(1)
    chosen = groups.topk(max(1, round(keep * len(groups)))).indices.sort().values
    return (chosen[:, None] * group + torch.arange(group)).flatten()


def refit(w2: Tensor, moments: Tensor, kept: Tensor) -> Tensor:
    """W2 (width, kept) by least squares, so that the neurons kept reproduce the old outputs: W2 C[:, k] C[k, k]^-1 in float64,
    with C = H^T H / N the second moments of the hidden values. Directions that fp32 cannot distinguish from 0 are dropped."""
    w2, moments = w2.double(), moments.double()
    inside = moments[kept][:, kept]
    return w2 @ moments[:, kept] @ torch.linalg.pinv(inside, hermitian=True, rtol=1e-7)


def make_variants(named: dict, moments: dict, keep: list[float], block: int) -> dict[str, dict[str, Sparse]]:
    """{variant: {layer name: its replacement}} for all MLPs of a model. `named`, `moments`: by the layers' names."""
    variants = {}

    def add(variant, layer_name, layer):
        variants.setdefault(variant, {})[layer_name] = layer

    for fc in (name for name in named if name.endswith("c_fc")):
        proj = fc.replace("c_fc", "c_proj")
        w1, w2 = (named[name].weight.detach().cpu().float() for name in (fc, proj))
        hidden, inputs = moments[proj], moments[fc]
        contribution = hidden.diagonal().float() * w2.square().sum(0)
        by_weight = w1.square().sum(1) * w2.norm(dim=0)  # relu(w x)^2 grows with the square of w
        for share in sorted(keep):
            for name, scores, group in (("neurons_by_weight", by_weight, 1), ("neurons", contribution, 1),
                                        ("groups", contribution, block)):
                kept = top_indices(scores, share, group)
                add(f"{name} keep {share:g}", fc, Sparse(w1[kept]))
                add(f"{name} keep {share:g}", proj, Sparse(w2[:, kept]))
                if name != "neurons_by_weight":
                    add(f"{name} refit keep {share:g}", fc, Sparse(w1[kept]))
                    add(f"{name} refit keep {share:g}", proj, Sparse(refit(w2, hidden, kept)))
            for name, weight in ((fc, w1), (proj, w2)):
                add(f"weights_bsr keep {share:g}", name, Sparse(weight, mask_blocks(weight, share, block)))
        for name, weight, second in ((fc, w1, inputs), (proj, w2, hidden)):
            scores = weight.abs() * second.diagonal().float().sqrt()
            add("weights_2_4", name, Sparse(weight, mask_two_of_four(scores)))
        add("hidden_2_4", fc, Sparse(w1))
        add("hidden_2_4", proj, Sparse(w2, sparse_input=True))
    return variants


def is_recovered(name: str) -> bool:
    """Whether a variant is also trained: one of each idea is."""
    return name.startswith(("neurons refit", "groups refit", "weights_2_4", "hidden_2_4"))


@torch.no_grad()
def error_of(model, variant, seen: dict) -> float:
    """||y' - y|| / ||y|| of the MLPs, each on its inputs in the model as it was trained; the mean over layers."""
    errors = []
    for i, (block, other) in enumerate(zip(model.transformer.h, variant.transformer.h, strict=True)):
        x = seen[f"transformer.h.{i}.mlp.c_fc"]
        y, theirs = block.mlp(x).float(), other.mlp(x).float()
        errors.append(((theirs - y).norm() / y.norm()).item())
    return mean(errors)


# ---- speed

def mlp(x, w1, w2):
    return F.linear(F.relu(F.linear(x, w1)).square(), w2)


UNTIMED = dict.fromkeys(("forward_ms", "speedup_forward", "training_ms", "speedup_training"))


def timings(models: dict, dense, seen: dict, device, block: int, repeats: int) -> dict[str, dict]:
    """The speed of the first MLP in each variant, on real inputs, or the reason why there is none."""
    x = seen["transformer.h.0.mlp.c_fc"]
    first = dense.transformer.h[0].mlp
    layers, packed, reasons = {"dense": (mlp, [first.c_fc.weight, first.c_proj.weight])}, {}, {}
    for name, model in models.items():
        fc, proj = model.transformer.h[0].mlp.c_fc, model.transformer.h[0].mlp.c_proj
        if fc.mask is None and not proj.sparse_input:
            layers[name] = (mlp, [fc.weight, proj.weight])
            continue
        weights = [layer.dense_weight().detach().to(x.dtype) for layer in (fc, proj)]
        try:
            packed[name] = pack(name, weights, x, block)
        except Exception as e:  # kernels raise many types of errors on devices that they do not support
            reasons[name] = first_line(e)[:160]
    times = time_layers(layers, x, device, repeats)
    if packed:  # weights packed for inference: only the forward
        forward = {"dense": layers["dense"]} | {name: (call, []) for name, call in packed.items()}
        times = time_layers(forward, x, device, repeats, training=False) | times
    return {name: UNTIMED | times.get(name, {}) | {"why_not_timed": reasons.get(name)} for name in models}


def pack(name: str, weights: list[Tensor], x: Tensor, block: int):
    """The MLP as a function of x with PyTorch's kernels for block-sparse rows or 2:4 weights (CUDA from sm_80 on), or with
    torchao's for 2:4 hidden values.

    torchao selects in tiles of 4 x 4, two of four in both directions, so that the backward pass has the pattern too. These are
    not exactly the values that `two_of_four` keeps, so it is timed, but its result is not compared.

    Raises: whatever the kernels raise on this device; RuntimeError where the result is wrong.
    """
    w1, w2 = weights
    if name.startswith("weights_bsr"):
        warnings.filterwarnings("ignore", message="Sparse BSR tensor support is in beta")
        b1, b2 = (w.to_sparse_bsr((block, block)) for w in weights)
    elif not x.is_cuda:
        raise RuntimeError("2:4 kernels need an NVIDIA GPU from sm_80 on")
    elif name == "hidden_2_4":
        from torchao.sparsity.training.autograd import semi_structured_sparsify

        def sparse_hidden(x):
            return F.linear(semi_structured_sparsify(F.relu(F.linear(x, w1)).square(), backend="cusparselt"), w2)
        sparse_hidden(x)
        return sparse_hidden
    else:
        from torch.sparse import to_sparse_semi_structured
        b1, b2 = (to_sparse_semi_structured(w) for w in weights)

    def call(x):
        return mlp(x, b1, b2)
    y, expected = call(x), mlp(x, *weights)
    if (y - expected).norm() > 0.03 * expected.norm():
        raise RuntimeError("the kernel ran, but its results are wrong")
    return call
