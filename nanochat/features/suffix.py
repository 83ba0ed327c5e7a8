"""Dynamic suffix training: each step trains the top blocks that still matter; those below run forward only.

The policy (nanochat/suffix_policy.py) decides before a step and is told its loss afterwards, so `active_start` is one
number per optimizer step, whatever the micro-batches. Relevance is measured on the gradients of probe steps alone, which
train everything anyway, and leaves the device in one transfer. Under torchrun every rank sees the same averaged
gradients and loss and so decides the same.
"""

from nanochat.common import UserError
from nanochat.features import Feature
from nanochat.shape import flops_per_token, padded_vocab_size
from nanochat.suffix_policy import CostModel, SuffixFlags, SuffixPolicy, predicted_speedup, problems

EPSILON = 1e-12  # keeps the relevance of a block of zeros finite


class Suffix(Feature):
    name = "suffix"
    Config = SuffixFlags
    varies_forward = True

    @classmethod
    def enabled(cls, config) -> bool:
        return config.features[cls.name].block_update_schedule != "full_update"

    @classmethod
    def validate(cls, config) -> list[str]:
        steps = config.horizon.num_iterations  # where the horizon comes from the model, on_model checks
        return problems(config.features[cls.name], config.model.depth, steps) if steps > 0 else []

    def on_model(self, model, horizon) -> None:
        try:
            self.policy = SuffixPolicy(self.config, model.config.n_layer, horizon.num_iterations)
        except ValueError as e:
            raise UserError(str(e)) from None
        self.cost = cost_model(model.config)
        self.active, self.seconds = [], {}  # blocks trained per step; [steps, seconds] by number of blocks

    def before_step(self, step: int) -> dict:
        self.decision, self.relevance = self.policy.decide(step), None
        return {"active_start": self.decision.active_start}

    def after_backward(self, model, step: int) -> None:
        if self.decision.needs_relevance:
            self.relevance = relevance_of_blocks(model, self.config.dyn_relevance_metric)

    def after_step(self, step: int, loss: float, seconds: float) -> None:
        self.policy.observe(step, loss, self.relevance)
        layers = self.policy.n_layer - self.decision.active_start
        self.active.append(layers)
        total = self.seconds.setdefault(str(layers), [0, 0.0])
        total[0], total[1] = total[0] + 1, total[1] + seconds

    def metrics(self) -> dict:
        start = self.decision.active_start
        return {"step_kind": self.decision.kind, "active_start": start, "active_layers": self.policy.n_layer - start}

    def summary(self) -> dict:
        """`speedup_measured` compares the mean step with the mean of this run's own full steps, where it had any."""
        if not self.active:
            return {"schedule": self.config.block_update_schedule}
        steps, spent = (sum(column) for column in zip(*self.seconds.values()))
        full_steps, full_seconds = self.seconds.get(str(self.policy.n_layer), (0, 0.0))
        return {
            "schedule": self.config.block_update_schedule,
            "active_layers_mean": sum(self.active) / len(self.active),
            "active_layers_range": f"{min(self.active)}-{max(self.active)}",
            "speedup_predicted": predicted_speedup(self.active, self.policy.n_layer, self.cost),
            "speedup_measured": full_seconds / full_steps / (spent / steps) if full_steps else None,
        }

    def state_dict(self) -> dict:
        return {"policy": self.policy.state_dict(), "active": self.active, "seconds": self.seconds}

    def load_state_dict(self, state: dict) -> None:
        self.policy.load_state_dict(state["policy"])
        self.active, self.seconds = state["active"], state["seconds"]


def cost_model(config) -> CostModel:
    """FLOPs per token of a block's forward and backward, and of what every step pays: head, embedding aside."""
    head = 6 * padded_vocab_size(config.vocab_size) * config.n_embd
    blocks = (flops_per_token(config) - head) / config.n_layer
    return CostModel(forward_block=blocks / 3, backward_block=2 * blocks / 3, always=head)


def relevance_of_blocks(model, metric: str) -> list[float]:
    """Relevance of each block to the step, from its gradients: ||g|| / (||W|| + eps), or the sum of |g p|."""
    import torch
    values = []
    for block in model.transformer.h:
        weights = [p for p in block.parameters() if p.grad is not None]
        gradients = [p.grad for p in weights]
        if metric == "grad_ratio":
            norms = [torch.linalg.vector_norm(torch.stack(torch._foreach_norm(t))) for t in (gradients, weights)]
            values.append(norms[0] / (norms[1] + EPSILON))
        else:
            values.append(sum((p.detach() * g).abs().sum() for p, g in zip(weights, gradients)))
    return torch.stack(values).tolist()
