"""MuonAdamW: one optimizer with two update rules. Matrices of the blocks use Muon, all other parameters AdamW.

AdamW (arXiv 1711.05101) divides each weight's step by the root of its second moment. Muon (kellerjordan.github.io/posts/muon)
treats a matrix as a linear map: it replaces the momentum by the nearest semi-orthogonal matrix, so that the update is equally
large in every direction that the gradients point in. One Muon step, in order:

1. Nesterov momentum;
2. row equilibration: all rows scaled to one norm, so that the iteration below starts well conditioned (arXiv 2603.28254);
3. five Polar Express iterations (arXiv 2505.16932), a faster Newton-Schulz iteration towards the polar factor
   (nanochat/kernels/polar_express.py);
4. Frobenius norm scaled to sqrt(min(m, n)), that of an exactly semi-orthogonal matrix (arXiv 2602.21545);
5. NorMuon: each row (or column) divided by the root of its second moment, the norm of the whole kept (arXiv 2510.05491);
6. cautious weight decay, only where update and weight have the same sign (arXiv 2411.16085), and the update.

A parameter with `.grad` None is skipped completely: no update, no weight decay, no momentum decay, no step count. A zero
gradient is something else: Muon would go on moving the weights at full speed along the old momentum.

`step(finite)` updates only where `finite`, a bool on the device, is true. So a NaN never reaches a weight or a moment, and the
host does not have to wait for the device to find out. In a compiled update the selection is part of the last pass over the
data and costs nothing.
"""

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from nanochat.kernels.polar_express import TINY, polar_factor
from nanochat.recipe.shape import MUON_BATCH

COMPILE_FROM = 2**14  # elements: smaller parameters are updated eagerly, as compiling a graph for each would cost seconds
FP32_BELOW = 2**10    # elements: first moments of smaller parameters are always fp32, as they take hardly any memory


def adamw_update(p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, finite: Tensor,
                 decay, step_size, one_minus_beta1, one_minus_beta2, bias2_sqrt, eps) -> None:
    """One AdamW step in place on a parameter of any shape, if `finite` (0-d bool). Computed in fp32 whatever the dtype of `p`.

    decay: 1 - lr * weight_decay.   step_size: lr / (1 - beta1^t).   bias2_sqrt: sqrt(1 - beta2^t).
    """
    grad = grad.float()
    new_avg = torch.lerp(exp_avg.float(), grad, one_minus_beta1)
    new_avg_sq = torch.lerp(exp_avg_sq, grad.square(), one_minus_beta2)
    new = p.float() * decay - step_size * new_avg / (new_avg_sq.sqrt() / bias2_sqrt + eps)
    p.copy_(torch.where(finite, new.to(p.dtype), p))
    exp_avg.copy_(torch.where(finite, new_avg, exp_avg))
    exp_avg_sq.copy_(torch.where(finite, new_avg_sq, exp_avg_sq))


def muon_update(params: Tensor, grads: Tensor, momenta: Tensor, second: Tensor, finite: Tensor,
                momentum, lr, weight_decay, beta2, dtype: torch.dtype, way: str = "plain") -> tuple[Tensor, Tensor, Tensor]:
    """One Muon step for a stack of K matrices of one shape, (12, 768, 3072) for example.

    params, grads, momenta: (K, m, n).   second: second moments of rows (K, m, 1) if m >= n, else of columns (K, 1, n).
    lr: the spectral norm of the update.   dtype, way: of `polar_factor`.
    Returns the new params, momenta and second moments in fp32, or unchanged values unless `finite` (0-d bool).
    """
    before = params, momenta, second
    momenta = torch.lerp(momenta.float(), grads, 1 - momentum)
    g = polar_factor(torch.lerp(grads, momenta, momentum), dtype, way)  # Nesterov: the gradient once more on top
    m, n = g.shape[-2:]
    reduced = -1 if m >= n else -2  # NorMuon: one second moment per row of a tall matrix, per column of a wide one
    mean_square = g.square().mean(dim=reduced, keepdim=True)
    norm_square = mean_square.sum(dim=(-2, -1), keepdim=True) * g.size(reduced)
    to_size = min(m, n) / norm_square.clamp_min(TINY)  # the square of the factor: g itself is multiplied once, below
    mean_square = mean_square * to_size
    second = torch.lerp(second, mean_square, 1 - beta2)
    scale = second.clamp_min(1e-10).rsqrt()
    plain = mean_square.sum(dim=(-2, -1), keepdim=True)
    scaled = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True)
    g = g * (scale * (to_size * plain / scaled.clamp_min(TINY)).sqrt())
    agree = (g * params) >= 0  # cautious weight decay: only where it points the same way as the update
    after = params - lr * (g + weight_decay * params * agree), momenta, second
    return tuple(torch.where(finite, new, old) for new, old in zip(after, before, strict=True))


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW in one optimizer, by parameter group.

    param_groups: `kind` is `adamw` (with lr, betas, eps, weight_decay) or `muon` (with lr, momentum, beta2, weight_decay). All
    parameters of a Muon group have the same shape (m, n): those with a gradient are stacked and updated at once, in stacks of
    at most `muon_batch` elements, as the temporaries take about twenty times the memory of the stack. lr is multiplied by
    max(1, m/n)^0.5.
    names: parameter -> name, for `named_state`. Of several ranks, each updates only what it owns, of large parameters rows
    such as `NAME[0:512]` (nanochat/training/sharding.py).
    muon_dtype, muon_way: dtype of Muon's matrix products, and how they are computed (nanochat/kernels/polar_express.py).
    momentum_dtype: dtype in which first moments are stored; they are computed in fp32. Second moments are always fp32.
    compile: fuse each update rule with torch.compile. The size of a stack is dynamic, so all stacks of two or more matrices of a
    shape share a graph; the sizes of the matrices are fixed in it.
    """

    def __init__(self, param_groups: list[dict], names: dict[Tensor, str] | None = None,
                 muon_dtype: torch.dtype = torch.float32, momentum_dtype: torch.dtype = torch.float32, compile: bool = False,
                 muon_way: str = "plain", muon_batch: int = MUON_BATCH):
        super().__init__(param_groups, defaults={})
        assert all(g["kind"] in ("adamw", "muon") for g in self.param_groups)
        assert all(len({p.shape for p in g["params"]}) <= 1 for g in self.param_groups if g["kind"] == "muon")
        self.names = names or {}
        self.known = set(self.names.values())
        self.muon_dtype, self.muon_way, self.momentum_dtype = muon_dtype, muon_way, momentum_dtype
        self.compile, self.muon_batch = compile, muon_batch

    @cached_property  # where nothing is compiled, the compiler is not even loaded
    def _compiled_adamw(self):
        return torch.compile(adamw_update, dynamic=False, fullgraph=True)

    @cached_property
    def _compiled_muon(self):
        return torch.compile(muon_update, dynamic=False, fullgraph=True)

    @torch.no_grad()
    def step(self, closure=None, finite: Tensor | None = None):
        """Update every parameter that has a gradient, if `finite` (0-d bool on their device; None means always)."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            active = [p for p in group["params"] if p.grad is not None]
            if active and finite is None:
                finite = torch.ones((), dtype=torch.bool, device=active[0].device)
            if active and group["kind"] == "adamw":
                self._step_adamw(group, active, finite)
            elif active:
                for part in even_parts(active, self._most_at_once(active[0])):
                    self._step_muon(group, part, finite)

    @torch.no_grad()
    def warm_up(self, trained: Iterable[Tensor]) -> None:
        """Compile and run, on zeros, every graph that a step needs in which these parameters have a gradient, so that no step
        waits for the compiler. No parameter, moment or step count changes."""
        trained = {id(p) for p in trained}
        for group in self.param_groups:
            active = [p for p in group["params"] if id(p) in trained and self._is_compiled(p)]
            if active and group["kind"] == "adamw":
                for p in {(p.shape, p.dtype): p for p in active}.values():
                    zeros = torch.nn.Parameter(torch.zeros_like(p))  # torch.compile tells parameters from other tensors
                    state = self._new_state(p, group)
                    self._compiled_adamw(zeros, torch.zeros_like(p), state["exp_avg"], state["exp_avg_sq"], _no(p),
                                         *_host_tensors((0.0,) * 6))
            elif active:
                sizes = {len(part) for part in even_parts(active, self._most_at_once(active[0]))}
                for size in {min(sizes), max(sizes)}:  # a single matrix has a graph of its own
                    state = self._new_state(active[0], group)
                    stacks = [torch.zeros((size, *t.shape), dtype=t.dtype, device=t.device) for t in (
                        active[0], active[0].float(), state["momentum_buffer"], state["second_momentum"])]
                    self._compiled_muon_update(stacks, _no(active[0]), (0.0,) * 4)

    def _step_adamw(self, group: dict, active: list[Tensor], finite: Tensor) -> None:
        lr, eps, (beta1, beta2) = group["lr"], group["eps"], group["betas"]
        for p in active:
            state = self._state(p, group)
            state["step"] += 1
            step = state["step"].item()
            scalars = (1 - lr * group["weight_decay"], lr / (1 - beta1**step), 1 - beta1, 1 - beta2,
                       (1 - beta2**step) ** 0.5, eps)
            tensors = p, p.grad, state["exp_avg"], state["exp_avg_sq"], finite
            if self._is_compiled(p):
                self._compiled_adamw(*tensors, *_host_tensors(scalars))
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
        if self._is_compiled(active[0]):
            updated = self._compiled_muon_update(stacks, finite, scalars)
        else:
            updated = muon_update(*stacks, finite, *scalars, self.muon_dtype, self.muon_way)
        for tensors, new in zip((active, momenta, seconds), updated, strict=True):
            torch._foreach_copy_(tensors, list(new.unbind()))

    def _compiled_muon_update(self, stacks: list[Tensor], finite: Tensor, scalars: tuple[float, ...]):
        """`muon_update` of stacks (K, ...), compiled for any K."""
        for stack in stacks:
            torch._dynamo.maybe_mark_dynamic(stack, 0)
        return self._compiled_muon(*stacks, finite, *_host_tensors(scalars), self.muon_dtype, self.muon_way)

    def _most_at_once(self, p: Tensor) -> int:
        """How many matrices of the size of p Muon stacks at most."""
        return max(1, self.muon_batch // p.numel())

    def _state(self, p: Tensor, group: dict) -> dict:
        """The optimizer state of one parameter, created at its first update."""
        state = self.state[p]
        if not state:
            state.update(self._new_state(p, group))
        return state

    def _new_state(self, p: Tensor, group: dict) -> dict:
        """The optimizer state that a parameter begins with: zeros."""
        momentum_dtype = self.momentum_dtype if p.numel() >= FP32_BELOW else torch.float32
        first = torch.zeros_like(p, dtype=momentum_dtype)
        if group["kind"] == "adamw":
            # the count is on the host: reading it does not synchronize with the device
            return {"step": torch.zeros((), dtype=torch.int64), "exp_avg": first,
                    "exp_avg_sq": torch.zeros_like(p, dtype=torch.float32)}
        rows, cols = p.shape
        return {"momentum_buffer": first,
                "second_momentum": p.new_zeros((rows, 1) if rows >= cols else (1, cols), dtype=torch.float32)}

    def _is_compiled(self, p: Tensor) -> bool:
        return self.compile and p.numel() >= COMPILE_FROM

    def named_state(self) -> dict[str, Tensor]:
        """`<parameter name>/<key>` -> state tensor: a checkpoint format that does not depend on the groups or their order."""
        return {f"{self.names[p]}/{key}": tensor for p, state in self.state.items() for key, tensor in state.items()}

    @torch.no_grad()
    def load_named_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `named_state` returned. Parameters without an entry start with fresh state.

        An optimizer that has only rows of a parameter (`NAME[0:512]`) takes these of the whole parameter's state.
        Raises: KeyError for an unknown parameter or key.
        """
        self.state.clear()
        owned: dict[str, list] = {}
        for group in self.param_groups:
            for p in group["params"]:
                name, rows = split_label(self.names[p])
                owned.setdefault(name, []).append((p, group, rows))
        for key, tensor in tensors.items():
            name, _, slot = key.rpartition("/")
            if name not in self.known:
                raise KeyError(name)
            for p, group, rows in owned.get(name, ()):
                self._state(p, group)[slot].copy_(tensor[rows] if tensor.dim() else tensor)


def split_label(label: str) -> tuple[str, slice]:
    """"lm_head.weight[0:512]" -> ("lm_head.weight", slice(0, 512)); the slice of a name without rows takes all."""
    name, bracket, rows = label.partition("[")
    return name, slice(*map(int, rows.rstrip("]").split(":"))) if bracket else slice(None)


def even_parts(items: list, most: int) -> list[list]:
    """Split a list into as few parts of at most `most` items as possible; their lengths differ by at most one."""
    count = -(-len(items) // most)
    return [items[len(items) * i // count:len(items) * (i + 1) // count] for i in range(count)]


def _no(p: Tensor) -> Tensor:
    """False on the device of p."""
    return torch.zeros((), dtype=torch.bool, device=p.device)


def _host_tensors(scalars: tuple[float, ...]) -> list[Tensor]:
    """Numbers as 0-d fp32 CPU tensors: torch.compile would recompile for each new value of a Python float."""
    return [torch.tensor(value, dtype=torch.float32) for value in scalars]
