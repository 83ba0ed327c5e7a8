"""One optimizer step, from the first micro-batch to the numbers that it leaves.

A step has two halves. `launch_step` queues all of its work on the device; `finalize_step` waits for its results and reads them.
Between the two the next step may be launched (--deferred-loss-logging): the device then never waits for the host.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch

from nanochat.common import print0
from nanochat.dataloader import TrainLoader
from nanochat.recipe.schedules import lr_scale, muon_momentum, weight_decay_scale
from nanochat.runtime.clock import StepTime
from nanochat.runtime.device import PeakMemory
from nanochat.runtime.distributed import all_reduce_max, all_reduce_sum, norm_over_ranks
from nanochat.runtime.signals import Interrupted, Signals
from nanochat.training.audit import Audit
from nanochat.training.sharding import Sharding
from nanochat.training.state import RunPlan, TrainState


class PendingStep(NamedTuple):
    """A step that the device may still be working on."""
    step: int
    lr_scale: float
    parameters: list[str]         # names of the n parameters that have a gradient
    results: torch.Tensor         # (3 + n,) fp32 on the host, complete when the step has ended: loss, stop signal, whether the
                                  # time was up, gradient norms
    batch_crc32: int              # checksum of its tokens
    time: Callable[[], StepTime]  # waits for the end of the step
    compiled: bool                # whether something was compiled in this time
    columns: dict                 # of the features, for metrics.jsonl


class StepResult(NamedTuple):
    """What a step came to."""
    step: int
    lr_scale: float
    loss: float                   # mean over the micro-batches and ranks, in nats
    grad_norm: float              # of all parameters together, before the optimizer
    not_finite: list[str]         # parameters whose gradients are not finite
    trained: int                  # parameters that have a gradient
    stop_signal: int              # the largest signal number that any rank has received, else 0
    time_is_up: bool              # whether any rank had used up --max-train-seconds before the step, as far as it knew
    batch_crc32: int
    time: StepTime
    compiled: bool                # whether something was compiled in this time, which then says little
    peak_memory_mib: float
    columns: dict


class Trainer:
    """Takes optimizer steps. It needs no run folder, lock or file, so that a step can be measured by itself.

    forward: `(x, y, **forward_args) -> loss`, the compiled model or the model itself; x, y (B, T) int64.
    signals: those that this process has received; each step tells the other ranks.
    audit: watches the steps (--audit); None where nothing does.
    say: prints a line for the user.
    """

    def __init__(self, plan: RunPlan, state: TrainState, forward: Callable, loader: TrainLoader, signals: Signals):
        self.plan, self.state, self.forward, self.loader, self.signals = plan, state, forward, loader, signals
        self.peak_memory = PeakMemory(plan.device)
        self.audit: Audit | None = None
        self.say: Callable[[str], None] = print0

    def launch_step(self, interruptible: bool = False) -> PendingStep:
        """Queue one optimizer step: all micro-batches forward and backward, then one update if its gradients are finite.

        interruptible: whether a signal may end the process while the compiler works, because nothing trained would be lost.
        """
        plan, state = self.plan, self.state
        model, optimizer, scaler, features = state.model, state.optimizer, state.scaler, state.features
        sharding = state.sharding
        forward_args = features.before_step(state.step)
        self.warm_up(forward_args, interruptible)
        if self.audit:
            self.audit.step_begins()
        loss, compile_seconds = torch.zeros((), device=plan.device), state.clock.compile
        with state.clock.training() as lap:
            for micro_step in range(plan.horizon.grad_accum_steps):
                x, y = self.loader.next()
                sharding.expect(forward_args, last=micro_step == plan.horizon.grad_accum_steps - 1)
                micro_loss = self.forward(x, y, **forward_args) / plan.horizon.grad_accum_steps
                lap("forward")
                scaler.scale(micro_loss).backward()
                loss += micro_loss.detach()
                lap("backward")
            # filled on the device: a tensor made from a list would be copied there, and the host would wait
            stop = torch.stack([torch.full((), float(value), device=plan.device)
                                for value in (self.signals.received, self.time_is_up())])
            sharding.reduce()
            scaler.unscale_(optimizer)
            names, norms = gradient_norms(sharding)
            loss, stop = all_reduce_sum(loss) / plan.ranks.world_size, all_reduce_max(stop)
            features.after_backward(model, state.step)
            scale = self.set_schedules()
            # fp16 gradients overflow now and then: the scaler then leaves out the update, and lowers its scale
            finite = None if scaler.is_enabled() else norms.isfinite().all() & loss.isfinite()
            # "stop" leaves out an update on the device, without waiting; a run that goes on must not even count the step
            if plan.config.run.on_divergence == "stop" or finite is None or finite.item():
                scaler.step(optimizer, finite=finite)
                scaler.update()
                sharding.gather()
                features.on_weights_changed()
            sharding.zero_grad()
            lap("update")
            results = copy_to_host_async(torch.cat([loss[None], stop, norms]))
        if self.audit:
            self.audit.step_ended()
        pending = PendingStep(state.step, scale, names, results, self.loader.checksum(), state.clock.last,
                              state.clock.compile > compile_seconds, features.step_columns() | sharding.step_columns())
        state.step += 1
        return pending

    def finalize_step(self, pending: PendingStep) -> StepResult:
        """Wait for the end of a step and read its results."""
        time = pending.time()
        loss, stop_signal, time_is_up, *norms = pending.results.tolist()
        not_finite = [name for name, norm in zip(pending.parameters, norms, strict=True) if not math.isfinite(norm)]
        return StepResult(pending.step, pending.lr_scale, loss, math.hypot(*norms), not_finite, len(norms), int(stop_signal),
                          bool(time_is_up), pending.batch_crc32, time, pending.compiled, self.peak_memory.step_peak(),
                          pending.columns)

    def time_is_up(self) -> bool:
        """Whether --max-train-seconds are over by this rank's clock, which knows the steps whose results were read."""
        limit = self.plan.config.run.max_train_seconds
        return 0 < limit <= self.state.clock.train

    def set_schedules(self) -> float:
        """Set the optimizer's learning rates, momentum and weight decay for this step; returns the learning rates' scale."""
        step, total, flags = self.state.step, self.plan.horizon.num_iterations, self.plan.config.optim
        scale = lr_scale(step, total, warmup_steps=flags.warmup_steps, warmdown_ratio=flags.warmdown_ratio,
                         final_lr_frac=flags.final_lr_frac, warmdown_shape=flags.warmdown_shape)
        momentum = muon_momentum(step, total, warmdown_ratio=flags.warmdown_ratio)
        decay = weight_decay_scale(step, total)
        for group in self.state.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
            if group["kind"] == "muon":
                group["momentum"] = momentum
                group["weight_decay"] = group["initial_weight_decay"] * decay
        return scale

    def warm_up(self, forward_args: dict, interruptible: bool = False) -> None:
        """Compile all graphs of a step whose forward takes these arguments, the first time there is one: forward, backward and
        update, on zeros. So no compilation falls into the time of a step."""
        plan, state = self.plan, self.state
        if not plan.compile or self.forward.is_warmed_up(forward_args):
            return
        if plan.compile_whole and self.forward.compiled_variants:
            self.say(f"step {state.step}: compiling, as the steps from here on differ; it does not count as training time")
        shape = plan.micro_batch_size, plan.shape.sequence_len
        # two tensors: with one for both, torch would compile another graph that no step uses
        x, y = (torch.zeros(shape, dtype=torch.int64, device=plan.device) for _ in range(2))
        fallbacks = self.forward.eager_fallbacks
        with self.signals.raise_immediately(interruptible and plan.ranks.world_size == 1), state.clock.compiling(), \
                self.audit.warming_up() if self.audit else nullcontext():
            trained = self.forward.warm_up(x, y, **forward_args)
            # none, where the forward could not be compiled
            state.optimizer.warm_up(state.sharding.owned_of(trained or state.model.parameters()))
        if self.signals.received and self.forward.eager_fallbacks > fallbacks:
            # a terminal's Ctrl-C ends the C++ compiler too: going on uncompiled would give other bits
            raise Interrupted(self.signals.received)


def trial_step(model, optimizer, tokens: torch.Tensor) -> None:
    """Take the memory that an uncompiled step takes, and change no weight. tokens: (B, T) int64."""
    for _ in range(2):  # the second micro-batch finds the gradients of the first
        model(tokens, tokens).backward()
    for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is None):
        p.grad = torch.zeros_like(p)  # rows of a table that several ranks divide
    optimizer.step(finite=torch.zeros((), dtype=torch.bool, device=tokens.device))


def gradient_norms(sharding: Sharding) -> tuple[list[str], torch.Tensor]:
    """Names of the n parameters that have a gradient, and the norms of these, over all ranks: (n,) fp32 on the device."""
    by_dtype: dict[torch.dtype, list[tuple[str, torch.Tensor]]] = {}
    for name, gradient in sharding.owned_gradients():
        by_dtype.setdefault(gradient.dtype, []).append((name, gradient))
    names, norms = [], []
    for gradients in by_dtype.values():  # the norms of one dtype are a single kernel on a GPU
        names += [name for name, _ in gradients]
        norms += [norm.float() for norm in torch._foreach_norm([gradient for _, gradient in gradients])]
    if sharding.world_size == 1:
        return names, torch.stack(norms)
    trained = sharding.trained_names()
    parts = torch.zeros(len(trained), device=sharding.model.get_device())
    index = {name: i for i, name in enumerate(trained)}
    for name, norm in zip(names, norms, strict=True):
        parts[index[name]] = norm
    return trained, norm_over_ranks(parts)


def copy_to_host_async(results: torch.Tensor) -> torch.Tensor:
    """Start a copy to the host that is complete when the step has ended. A copy started later would queue behind the steps that
    were launched since, and wait for them."""
    return results.to("cpu", non_blocking=True)  # into pinned memory
