"""MuonAdamW: one optimizer, two update rules. Matrices inside blocks take Muon, everything else AdamW.

AdamW (arXiv 1711.05101) scales each weight's step by its own gradient history. Muon (kellerjordan.github.io/posts/muon)
treats a matrix as a linear map: it replaces the momentum by the nearest semi-orthogonal matrix, so that every direction
the gradient points in is followed equally far. One Muon step here is, in this order:

1. Nesterov momentum;
2. row equilibration, all rows to one norm, so that the iteration below starts well conditioned (arXiv 2603.28254);
3. five Polar Express iterations towards the polar factor, in bf16 where that is native (arXiv 2505.16932);
4. Frobenius norm to sqrt(min(m, n)), that of an exactly semi-orthogonal matrix (arXiv 2602.21545);
5. NorMuon: each row (or column) scaled by its own second moment, the whole norm kept (arXiv 2510.05491);
6. cautious weight decay, only where update and weight agree in sign (arXiv 2411.16085), and the update.

A parameter whose `.grad` is None is left alone entirely: no update, no decay, no momentum decay, no step count. That is
not the same as a zero gradient, under which Muon would go on moving the weights at full speed along old momentum.

`step(finite)` updates only if `finite`, a bool on the device: a NaN never reaches a weight or a moment, and the host need not
wait to learn of it. In a compiled rule the choice is part of the last pass over the data and costs nothing.
"""

import torch
from torch import Tensor

from nanochat.recipe.shape import MUON_BATCH

# (a, b, c) of X <- a X + (b A + c A A) X with A = X X^T: five iterations, safety 2e-2, cushion 2 (arXiv 2505.16932).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
COMPILE_FROM = 2**14  # elements: smaller parameters are updated eagerly, as a graph for each would cost seconds
FP32_BELOW = 2**10    # elements: the first moments of smaller parameters are always fp32, as they hardly take memory
TINY = 1e-20  # keeps a division by the norm of an all-zero row or matrix finite, and matters to nothing else


def adamw_update(p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, finite: Tensor,
                 decay, step_size, one_minus_beta1, one_minus_beta2, bias2_sqrt, eps) -> None:
    """One AdamW step in place, computed in fp32 whatever the dtype of `p`, if `finite` (0-d bool); the last six are scalars
    of this step."""
    grad = grad.float()
    new_avg = torch.lerp(exp_avg.float(), grad, one_minus_beta1)
    new_avg_sq = torch.lerp(exp_avg_sq, grad.square(), one_minus_beta2)
    new = p.float() * decay - step_size * new_avg / (new_avg_sq.sqrt() / bias2_sqrt + eps)
    p.copy_(torch.where(finite, new.to(p.dtype), p))
    exp_avg.copy_(torch.where(finite, new_avg, exp_avg))
    exp_avg_sq.copy_(torch.where(finite, new_avg_sq, exp_avg_sq))


def polar_factor(g: Tensor, dtype: torch.dtype) -> Tensor:
    """About the semi-orthogonal matrix nearest to each row-equilibrated matrix of g (K, m, n); computed in `dtype`."""
    x = g / g.norm(dim=-1, keepdim=True).clamp_min(TINY)
    x = (x / (1.01 * x.norm(dim=(-2, -1), keepdim=True)).clamp_min(TINY)).to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:  # work on the smaller of X X^T and X^T X
        x = x.mT
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(g.dtype)


def muon_update(params: Tensor, grads: Tensor, momenta: Tensor, second: Tensor, finite: Tensor,
                momentum, lr, weight_decay, beta2, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """One Muon step for K matrices of one shape: (12, 768, 3072) say. Returns new params, momenta and second moments, in
    fp32; the old ones unless `finite` (0-d bool).

    `second` is (K, m, 1) for m >= n, else (K, 1, n). lr: spectral norm per update.
    """
    before = params, momenta, second
    momenta = torch.lerp(momenta.float(), grads, 1 - momentum)
    g = polar_factor(torch.lerp(grads, momenta, momentum), dtype)
    m, n = g.shape[-2:]
    g = g * (min(m, n) ** 0.5 / g.norm(dim=(-2, -1), keepdim=True).clamp_min(TINY))
    reduced = -1 if m >= n else -2
    mean_square = g.square().mean(dim=reduced, keepdim=True)
    second = torch.lerp(second, mean_square, 1 - beta2)
    scale = second.clamp_min(1e-10).rsqrt()
    plain = mean_square.sum(dim=(-2, -1), keepdim=True)
    scaled = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True)
    g = g * (scale * (plain / scaled.clamp_min(TINY)).sqrt())
    agree = (g * params) >= 0
    after = params - lr * (g + weight_decay * params * agree), momenta, second
    return tuple(torch.where(finite, new, old) for new, old in zip(after, before, strict=True))


class MuonAdamW(torch.optim.Optimizer):
    """Groups are tagged `kind`: `adamw` (lr, betas, eps, weight_decay) or `muon` (lr, momentum, beta2, weight_decay).

    All parameters of a Muon group have one shape: those that have a gradient are stacked and updated as one batch, or as
    several of at most MUON_BATCH elements: the temporaries of an update are some twenty times its matrices.
    A Muon group's lr is multiplied by max(1, rows/cols)^0.5. Second moments are fp32, also those of bf16 tables.

    names: parameter -> name, for `named_state`.   muon_dtype: what the orthogonalization multiplies in.
    momentum_dtype: in which first moments are kept between steps; they are computed in fp32.
    compile: fuse each rule with torch.compile, for parameters large enough to pay for their graph. A batch of another
    size reuses the graph (the batch is dynamic).
    """

    def __init__(self, param_groups: list[dict], names: dict[Tensor, str] | None = None,
                 muon_dtype: torch.dtype = torch.float32, momentum_dtype: torch.dtype = torch.float32, compile: bool = False):
        super().__init__(param_groups, defaults={})
        assert all(g["kind"] in ("adamw", "muon") for g in self.param_groups)
        assert all(len({p.shape for p in g["params"]}) <= 1 for g in self.param_groups if g["kind"] == "muon")
        self.names = names or {}
        self.muon_dtype, self.momentum_dtype = muon_dtype, momentum_dtype
        self.compile = compile
        self._compiled_adamw = torch.compile(adamw_update, dynamic=False, fullgraph=True)  # compiles when first called
        self._compiled_muon = torch.compile(muon_update, fullgraph=True)

    @torch.no_grad()
    def step(self, closure=None, finite: Tensor | None = None):
        """Update every parameter that has a gradient, if `finite` (0-d bool on their device; None: in any case)."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            active = [p for p in group["params"] if p.grad is not None]
            if active and finite is None:
                finite = torch.ones((), dtype=torch.bool, device=active[0].device)
            if active and group["kind"] == "adamw":
                self._step_adamw(group, active, finite)
            elif active:
                for batch in batches(active, max(1, MUON_BATCH // active[0].numel())):
                    self._step_muon(group, batch, finite)

    def _step_adamw(self, group: dict, active: list[Tensor], finite: Tensor) -> None:
        lr, eps, (beta1, beta2) = group["lr"], group["eps"], group["betas"]
        for p in active:
            state = self._state(p, group)
            state["step"] += 1
            step = state["step"].item()
            scalars = (1 - lr * group["weight_decay"], lr / (1 - beta1**step), 1 - beta1, 1 - beta2,
                       (1 - beta2**step) ** 0.5, eps)
            tensors = p, p.grad, state["exp_avg"], state["exp_avg_sq"], finite
            if self._compiles(p):
                self._compiled_adamw(*tensors, *_on_host(scalars))
            else:
                adamw_update(*tensors, *scalars)

    def _step_muon(self, group: dict, active: list[Tensor], finite: Tensor) -> None:
        states = [self._state(p, group) for p in active]
        momenta = [s["momentum_buffer"] for s in states]
        seconds = [s["second_momentum"] for s in states]
        rows, cols = active[0].shape
        lr = group["lr"] * max(1.0, rows / cols) ** 0.5
        stacks = [torch.stack(list(t)) for t in (active, [p.grad.float() for p in active], momenta, seconds)]
        scalars = group["momentum"], lr, group["weight_decay"], group["beta2"]
        if self._compiles(active[0]):
            for stack in stacks:
                torch._dynamo.maybe_mark_dynamic(stack, 0)
            updated = self._compiled_muon(*stacks, finite, *_on_host(scalars), self.muon_dtype)
        else:
            updated = muon_update(*stacks, finite, *scalars, self.muon_dtype)
        for tensors, new in zip((active, momenta, seconds), updated, strict=True):
            torch._foreach_copy_(tensors, list(new.unbind()))

    def _state(self, p: Tensor, group: dict) -> dict:
        """The state of one parameter, made at its first update."""
        state = self.state[p]
        momentum_dtype = self.momentum_dtype if p.numel() >= FP32_BELOW else torch.float32
        if not state and group["kind"] == "adamw":
            state["step"] = torch.zeros((), dtype=torch.int64)  # on the host: reading it never waits for the device
            state["exp_avg"] = torch.zeros_like(p, dtype=momentum_dtype)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
        elif not state:
            rows, cols = p.shape
            state["momentum_buffer"] = torch.zeros_like(p, dtype=momentum_dtype)
            state["second_momentum"] = p.new_zeros((rows, 1) if rows >= cols else (1, cols), dtype=torch.float32)
        return state

    def _compiles(self, p: Tensor) -> bool:
        return self.compile and p.numel() >= COMPILE_FROM

    def named_state(self) -> dict[str, Tensor]:
        """Every state tensor under `<parameter name>/<key>`, for checkpoints that do not depend on grouping or order."""
        return {f"{self.names[p]}/{key}": tensor for p, state in self.state.items() for key, tensor in state.items()}

    @torch.no_grad()
    def load_named_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `named_state` gave. Parameters without an entry start afresh. KeyError for an unknown name."""
        owner = {self.names[p]: (p, group) for group in self.param_groups for p in group["params"]}
        self.state.clear()
        for key, tensor in tensors.items():
            name, _, slot = key.rpartition("/")
            p, group = owner[name]
            self._state(p, group)[slot].copy_(tensor)


def batches(items: list, most: int) -> list[list]:
    """The items in as few runs of at most `most` as it takes, of lengths that differ by one at most."""
    count = -(-len(items) // most)
    return [items[len(items) * i // count:len(items) * (i + 1) // count] for i in range(count)]


def _on_host(scalars: tuple[float, ...]) -> list[Tensor]:
    """Numbers as 0-d host tensors: a compiled function takes other values of them without compiling anew."""
    return [torch.tensor(value, dtype=torch.float32) for value in scalars]
