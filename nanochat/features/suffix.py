"""Dynamic suffix training: each step trains only the top blocks that still learn; the blocks below run forward only.

The policy (nanochat/recipe/suffix_policy.py) decides before a step and gets its loss afterwards, so that `active_start` is the
same for all micro-batches of an optimizer step. Relevance is measured only on the gradients of probe steps, which train all
blocks anyway, and is copied to the host in one transfer. Under torchrun all ranks have the same averaged gradients and loss, and
so decide the same.
"""

import statistics
from dataclasses import dataclass, replace

from nanochat.cli.flags import flag, one_of
from nanochat.common import UserError
from nanochat.features.base import Feature
from nanochat.recipe.depth_growth import grows, growth_step
from nanochat.recipe.shape import flops_per_token, padded_vocab_size
from nanochat.recipe.suffix_policy import CostModel, SuffixFlags, SuffixPolicy, chooses_once, predicted_speedup, problems

EPSILON = 1e-12  # keeps the relevance finite where all weights of a block are zero
PARTS_KEPT = 32  # full steps whose forward, backward and update times are kept


@dataclass
class Flags(SuffixFlags):
    """Dynamic suffix training"""
    suffix_detach_x0: bool = flag(False, "do not train the embedding on suffix steps, which otherwise reach it through x0",
                                  requires={"block_update_schedule": one_of("static_suffix", "dynamic_suffix")})


class Suffix(Feature):
    name = "suffix"
    Config = Flags
    dynamic_forward_args = follows_results = True
    STATE = ("active", "steps", "full", "parts")

    @classmethod
    def enabled(cls, config) -> bool:
        return config.features[cls.name].block_update_schedule != "full_update"

    @property
    def many_variants(self) -> bool:
        return not chooses_once(self.config)

    @classmethod
    def validate(cls, config) -> list[str]:
        steps = config.horizon.num_iterations  # if it is derived from the model, on_model checks what depends on it
        return problems(config.features[cls.name], config.model.depth, steps if steps > 0 else None)

    def __init__(self, config):
        super().__init__(config)
        self.depth = config.features.get("progressive_depth")

    def on_model(self, model, horizon) -> None:
        try:
            self.policy = SuffixPolicy(self.config, model.config.n_layer, horizon.num_iterations)
        except ValueError as e:
            raise UserError(str(e)) from None
        self.shape = model.config
        # the first step in which all blocks run: what came before tells nothing of relevance or of full steps
        growing = self.depth and grows(self.depth, model.config.n_layer)
        self.first = growth_step(self.depth, horizon.num_iterations) if growing else 0
        if self.policy.freeze_start < self.first:
            raise UserError(f"blocks may be frozen from step {self.policy.freeze_start} on, before all are there ({self.first}): "
                            "raise --dyn-freeze-start-step, or lower --depth-growth-frac")
        self.active = []              # number of trained blocks, per step
        self.steps, self.full = [0, 0.0], [0, 0.0]  # [number, seconds] of all steps, and of full ones that measured nothing
        self.parts = []               # (forward, backward, update) seconds of these full steps

    def before_step(self, step: int) -> dict:
        self.decision, self.relevance = self.policy.decide(step), None
        self.shallow = step < self.first
        if self.shallow:
            self.decision = replace(self.decision, needs_relevance=False)
        return {"active_start": self.decision.active_start, "detach_x0": self.config.suffix_detach_x0}

    def after_backward(self, model, step: int) -> None:
        if self.decision.needs_relevance:
            self.relevance = relevance_of_blocks(model.transformer.h, self.config.dyn_relevance_metric)

    def step_columns(self) -> dict:
        """`cost_share`: the step's cost as a share of a full step's, by the cost model."""
        if self.shallow:
            return {}
        start = self.decision.active_start
        layers = self.policy.n_layer - start
        return {"step_kind": self.decision.kind, "active_start": start, "active_layers": layers,
                "cost_share": 1 / predicted_speedup([layers], self.policy.n_layer, self.cost())}

    def after_step(self, step: int, loss: float, time) -> None:
        self.policy.observe(step, loss, self.relevance)
        if step < self.first:
            return
        plain = self.decision.active_start == 0 and not self.decision.needs_relevance
        for count in (self.steps, self.full) if plain else (self.steps,):
            count[0], count[1] = count[0] + 1, count[1] + time.total
        if plain and time.forward is not None:
            self.parts = [*self.parts, (time.forward, time.backward, time.update)][-PARTS_KEPT:]
        self.active.append(self.policy.n_layer - self.decision.active_start)

    def summary(self) -> dict:
        """`speedup_measured`: mean time of this run's full steps over the mean time of all its steps; None without full steps."""
        if not self.active:
            return {"schedule": self.config.block_update_schedule}
        (steps, seconds), (full_steps, full_seconds), cost = self.steps, self.full, self.cost()
        return {
            "schedule": self.config.block_update_schedule,
            "active_layers_mean": sum(self.active) / len(self.active),
            "active_layers_range": f"{min(self.active)}-{max(self.active)}",
            "speedup_predicted": predicted_speedup(self.active, self.policy.n_layer, cost),
            "speedup_measured": full_seconds / full_steps / (seconds / steps) if full_steps else None,
            "backward_over_forward": cost.backward_block / cost.forward_block,
            "guard_ended_at": self.policy.ended_at,
        }

    def report(self) -> str | None:
        result = self.summary()
        if not self.active:
            return None
        measured, ended = result["speedup_measured"], self.policy.ended_at
        return (f"{result['schedule']}: {result['active_layers_mean']:.2f} of {self.policy.n_layer} blocks trained on average "
                f"({result['active_layers_range']}) | speed-up over full steps: predicted {result['speedup_predicted']:.2f} with "
                f"k {result['backward_over_forward']:.2f}{'' if self.parts else ' (assumed)'}, "
                + (f"measured {measured:.2f}" if measured else "not measured, as no step was full")
                + (f" | the loss rose, so all blocks are trained from step {ended} on" if ended is not None else ""))

    def cost(self) -> CostModel:
        """A step's cost in seconds, from the measured full steps of this run; in FLOPs until there are any."""
        if not self.parts:
            return cost_in_flops(self.shape)
        return cost_in_seconds(self.shape, *map(statistics.median, zip(*self.parts, strict=True)))

    def state_dict(self) -> dict:
        return {"policy": self.policy.state_dict()} | {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state: dict) -> None:
        self.policy.load_state_dict(state["policy"])
        for name in self.STATE:
            setattr(self, name, state[name])


def head_share(config) -> float:
    """Share of the model's FLOPs in the head, which every step trains."""
    return 6 * padded_vocab_size(config.vocab_size) * config.n_embd / flops_per_token(config)


def cost_in_flops(config) -> CostModel:
    """Cost in FLOPs per token. The backward counts as two forwards; the optimizer is not counted."""
    total, share = flops_per_token(config), head_share(config)
    blocks = (1 - share) * total / config.n_layer
    return CostModel(forward_block=blocks / 3, backward_block=2 * blocks / 3, always=share * total)


def cost_in_seconds(config, forward: float, backward: float, update: float) -> CostModel:
    """Cost in seconds, from those of a full step's forward, backward and update. Forward and backward are split between head and
    blocks in proportion to FLOPs. The update counts for the blocks alone: Muon's matrix products outweigh the rest of it."""
    blocks = (1 - head_share(config)) / config.n_layer
    return CostModel(forward_block=blocks * forward, backward_block=blocks * backward + update / config.n_layer,
                     always=head_share(config) * (forward + backward))


def relevance_of_blocks(blocks, metric: str) -> list[float]:
    """Relevance of each block from its gradients g and weights W: ||g|| / (||W|| + eps) (grad_ratio), or the sum of |g W|.

    Of several ranks, each has the gradients of a part of the weights; the results are of all.
    """
    import torch

    from nanochat.runtime.distributed import all_reduce_sum, norm_over_ranks
    by_block = [[(p.grad, p.detach()) for p in block.parameters() if p.grad is not None] for block in blocks]
    device = next(blocks[0].parameters()).device

    def norm(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors))) if tensors else torch.zeros((), device=device)
    if metric == "grad_ratio":
        gradients, weights = (norm_over_ranks(torch.stack([norm([pair[side] for pair in pairs]) for pairs in by_block]))
                              for side in (0, 1))
        return (gradients / (weights + EPSILON)).tolist()
    sums = [sum(((p * g).abs().sum() for g, p in pairs), torch.zeros((), device=device)) for pairs in by_block]
    return all_reduce_sum(torch.stack(sums)).tolist()
