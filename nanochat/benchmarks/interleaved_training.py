"""Train several variants of a model on the same batches, their steps interleaved, so that a slow machine slows all alike."""

import math
from typing import TYPE_CHECKING

from nanochat.benchmarks.trained_model import TrainedModel
from nanochat.common import Progress, UserError
from nanochat.runtime import timing

if TYPE_CHECKING:
    import torch


class Training:
    """One variant: its model, AdamW over `parameters`, and the records of its training."""

    def __init__(self, model, parameters: list, lr: float):
        import torch
        self.model, self.parameters, self.lr = model.train().requires_grad_(False), list(parameters), lr
        for p in self.parameters:
            p.requires_grad_()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.seconds, self.losses, self.curve = [], [], []  # per step; curve: [step, bits per byte] per evaluation

    @property
    def bpb(self) -> float:
        """The last validation bits per byte."""
        return self.curve[-1][1]

    def compared_with(self, dense: "Training") -> dict:
        """Quality, and the speed of a step, against a run that was trained together with it."""
        return {"rise_vs_dense_pct": 100 * (self.bpb / dense.bpb - 1),
                "step_ms": timing.spread([1000 * s for s in self.seconds]),
                "speedup_step": timing.speedup(self.seconds, dense.seconds)}

    def step(self, x, y, lr_scale: float) -> "torch.Tensor":
        """Take a step at `lr_scale` times the learning rate; the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr_scale * self.lr
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(x, y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def train_interleaved(trained: TrainedModel, runs: dict[str, Training], steps: int, seed: int, val: list,
                      evaluations: int = 4) -> None:
    """Train every run for `steps` on the same batches, one step of each in turn, the learning rate falling linearly to 0.

    evaluations: how often to validate on the batches `val`, besides the start.
    Raises: UserError where a run has diverged.
    """
    progress = Progress("training", total=steps * len(runs), unit=" steps")
    batches = trained.train_batches(steps, seed)
    for step in range(steps + 1):
        if step % max(1, steps // evaluations) == 0 or step == steps:
            for name, run in runs.items():
                run.curve.append([step, trained.bpb(val, run.model)])
                if not math.isfinite(run.bpb):
                    raise UserError(f"{name} has diverged by step {step}: lower its learning rate")
        if step == steps:
            break
        for run in runs.values():
            seconds, loss = timing.timed(trained.device, run.step, *batches[step], 1 - step / steps)
            run.seconds.append(seconds)
            run.losses.append(loss.item())
            progress.update()
    progress.close()
