"""Which suffix of the blocks to train, and when. Pure Python, no torch; training and the bench use it as it is.

A step that trains only the top `a` of `n` blocks runs the others forward only and so saves their backward and update:

    C(a) / C(n) = (always + n F + a B) / (always + n F + n B)     F forward, B backward and update of one block;
                                                                  always: embedding, head and their optimizer

Which blocks may wait is read off their gradients. A full step now and then, the probe, gives each block's relevance;
an EMA smooths it, and the smallest top suffix that holds a given share of the sum is trained until the next probe.
A `dynamic_suffix` run, in order:

    warmup      everything: gradients above zero-initialized projections say nothing yet, so nothing is measured either
    full        everything, measuring at the probes' cadence, until the freeze gate opens: a step or a share of the run,
                and on request a stable loss; once open it stays open
    suffix      with a full step at every probe and refresh. On request these also move the budget, the most layers a
                suffix may have: up where their loss exceeds the EMA of the earlier ones, down where it falls below it
    recovery    on request: everything again, at once (`full`) or in three stages that never train less than the suffix

The defaults are those that won at equal time (dev/LOG.md): a fifth of the steps for all blocks, from then on every fourth
step, the others for the top third or a little more. So no block is ever left for long, and all settle as the learning
rate falls; a recovery at the end cost more than it gave.

The policy is asked before a step, `decide(step)`, which changes nothing, and told after it, `observe(step, loss,
relevance)`. Its whole state is plain JSON, so a resumed run decides as the one that was never killed.
"""

import math
from dataclasses import dataclass, fields
from itertools import accumulate
from statistics import fmean, pstdev

from nanochat.cli.flags import flag, flag_name

SCHEDULES = ("full_update", "static_suffix", "dynamic_suffix")


@dataclass
class SuffixFlags:
    """Dynamic suffix training"""
    block_update_schedule: str = flag("full_update", "which blocks are trained: all of them, always the top "
                                      "--static-active-layers, or a suffix chosen by relevance", choices=SCHEDULES)
    static_active_layers: int = flag(-1, "blocks that static_suffix trains")
    dyn_warmup_steps: int = flag(25, "full steps at the start")
    dyn_probe_every: int = flag(4, "steps between probes: full steps that measure relevance")
    dyn_refresh_every: int = flag(120, "steps between refreshes, which go before probes; 0 makes none")
    dyn_relevance_metric: str = flag("grad_ratio", "relevance of a block: ||g|| / ||W||, or the sum of |g p|",
                                     choices=("grad_ratio", "saliency_abs_gp"))
    dyn_relevance_ema_decay: float = flag(0.9, "beta of the EMA of relevance over its measurements")
    dyn_relevance_threshold: float = flag(0.25, "share of the summed relevance that the suffix must hold")
    dyn_min_active_layers: int = flag(-1, "fewest blocks to train; -1 is a third of them")
    dyn_max_active_layers: int = flag(-1, "most blocks to train on a suffix step; -1 is all of them")
    dyn_adapt_budget: bool = flag(False, "let the loss of probes and refreshes move the most blocks to train")
    dyn_loss_upper: float = flag(1.01, "more blocks where a probe's loss exceeds this multiple of its EMA")
    dyn_loss_lower: float = flag(0.997, "fewer blocks where a probe's loss is below this multiple of its EMA")
    dyn_budget_step_up: int = flag(2, "by how many more")
    dyn_budget_step_down: int = flag(1, "by how many fewer")
    dyn_loss_ema_decay: float = flag(0.9, "decay of the EMA of the probes' loss")
    dyn_freeze_start_frac: float = flag(0.2, "share of the steps before which nothing is frozen")
    dyn_freeze_start_step: int = flag(-1, "step before which nothing is frozen; -1 uses the share")
    dyn_require_stable: bool = flag(False, "freeze nothing before the loss is stable")
    dyn_stability_window: int = flag(12, "losses that are looked at for that")
    dyn_stability_rel_change: float = flag(0.02, "stable: the means of its halves differ by at most this share")
    dyn_stability_cv: float = flag(0.03, "stable: standard deviation over mean in the window is at most this")
    dyn_final_full_frac: float = flag(-1.0, "share of the steps, at the end, that recover the frozen blocks; -1 is none, or a "
                                     "tenth if in stages")
    dyn_final_recovery_mode: str = flag("full", "how: all blocks at once, or in stages", choices=("full", "staged"))
    dyn_final_recovery_stage1_progress: float = flag(0.34, "share of the recovery at which stage 1 ends")
    dyn_final_recovery_stage1_layers: int = flag(-1, "blocks trained in stage 1; -1 is a third from min to all")
    dyn_final_recovery_stage2_progress: float = flag(0.67, "share at which stage 2 ends; then all blocks are trained")
    dyn_final_recovery_stage2_layers: int = flag(-1, "blocks trained in stage 2; -1 is two thirds from min to all")


@dataclass(frozen=True)
class LayerCounts:
    """How many blocks are trained at least, at most on suffix steps, and in the stages of recovery."""
    low: int
    high: int
    stage1: int
    stage2: int


def layer_counts(flags: SuffixFlags, n_layer: int) -> LayerCounts:
    """The flags' counts, with every -1 derived from `n_layer`: 4, 12, 7 and 9 of 12 blocks."""
    def given(count: int, derived: int) -> int:
        return derived if count == -1 else count

    high = given(flags.dyn_max_active_layers, n_layer)
    low = given(flags.dyn_min_active_layers, min((n_layer + 2) // 3, high))
    return LayerCounts(
        low=low, high=high,
        stage1=given(flags.dyn_final_recovery_stage1_layers, low + round((n_layer - low) / 3)),
        stage2=given(flags.dyn_final_recovery_stage2_layers, low + round((n_layer - low) * 2 / 3)))


def freeze_start(flags: SuffixFlags, num_steps: int) -> int:
    """The first step that may leave a block frozen, as far as steps alone decide."""
    start = flags.dyn_freeze_start_step
    return max(flags.dyn_warmup_steps, round(flags.dyn_freeze_start_frac * num_steps) if start == -1 else start)


def recovery_start(flags: SuffixFlags, num_steps: int) -> int:
    """The first step of the final recovery; `num_steps` where there is none."""
    return num_steps - round(recovery_share(flags) * num_steps)


def recovery_share(flags: SuffixFlags) -> float:
    """The share of the steps that the final recovery takes."""
    if flags.dyn_final_full_frac == -1:
        return 0.1 if flags.dyn_final_recovery_mode == "staged" else 0.0
    return flags.dyn_final_full_frac


def problems(flags: SuffixFlags, n_layer: int, num_steps: int | None) -> list[str]:
    """Every reason why these flags make no schedule for this model and run, with what to do about it. `num_steps` is None
    where it is not known yet, which leaves the rules of `step_problems` for later."""
    found = []

    def require(good: bool, name: str, rule: str) -> bool:
        if not good:
            found.append(f"{flag_name(name)} {rule}, got {getattr(flags, name)}")
        return good

    for f in fields(flags):
        choices = f.metadata["choices"]
        require(not choices or getattr(flags, f.name) in choices, f.name, f"must be one of {', '.join(choices or ())}")
    if flags.block_update_schedule == "static_suffix":
        require(1 <= flags.static_active_layers <= n_layer, "static_active_layers",
                f"must say how many of the {n_layer} blocks static_suffix trains, from 1 to {n_layer}")
    if found or flags.block_update_schedule != "dynamic_suffix":
        return found  # the --dyn-* flags may stay set while another schedule is tried

    require(flags.dyn_warmup_steps >= 0, "dyn_warmup_steps", "must be at least 0")
    require(flags.dyn_probe_every >= 1, "dyn_probe_every", "must be at least 1: only probes tell what is relevant")
    require(flags.dyn_refresh_every >= 0, "dyn_refresh_every", "must be at least 1, or 0 for no refreshes")
    require(0 < flags.dyn_relevance_threshold <= 1, "dyn_relevance_threshold", "must be above 0 and at most 1")
    for name in ("dyn_relevance_ema_decay", "dyn_loss_ema_decay"):
        require(0 <= getattr(flags, name) < 1, name, "must be at least 0 and below 1: at 1 the first value would stay")
    require(flags.dyn_freeze_start_step >= -1, "dyn_freeze_start_step",
            "must be a step, or -1 to use --dyn-freeze-start-frac")
    require(0 <= flags.dyn_freeze_start_frac < 1, "dyn_freeze_start_frac", "must be at least 0 and below 1")
    require(flags.dyn_final_full_frac == -1 or 0 <= flags.dyn_final_full_frac < 1, "dyn_final_full_frac",
            "must be at least 0 and below 1, or -1 to derive it")

    staged, counts = flags.dyn_final_recovery_mode == "staged", layer_counts(flags, n_layer)
    names = ["dyn_min_active_layers", "dyn_max_active_layers"]
    names += ["dyn_final_recovery_stage1_layers", "dyn_final_recovery_stage2_layers"] if staged else []
    possible = [require(getattr(flags, name) in (-1, *range(1, n_layer + 1)), name,
                        f"must be from 1 to {n_layer}, the number of blocks, or -1 to derive it") for name in names]
    if all(possible) and counts.low > counts.high:
        found.append(f"--dyn-min-active-layers ({counts.low}) is above --dyn-max-active-layers ({counts.high}): "
                     "lower the first or raise the second")
    if staged:
        if all(possible) and not counts.low <= counts.stage1 <= counts.stage2:
            found.append("staged recovery needs stages that grow: --dyn-min-active-layers <= "
                         "--dyn-final-recovery-stage1-layers <= --dyn-final-recovery-stage2-layers, "
                         f"got {counts.low}, {counts.stage1}, {counts.stage2}")
        first, second = flags.dyn_final_recovery_stage1_progress, flags.dyn_final_recovery_stage2_progress
        if not 0 < first < second <= 1:
            found.append("staged recovery needs 0 < --dyn-final-recovery-stage1-progress < "
                         f"--dyn-final-recovery-stage2-progress <= 1, got {first} and {second}")
        require(flags.dyn_final_full_frac != 0, "dyn_final_full_frac",
                "must be above 0 for --dyn-final-recovery-mode staged: that is the part of the run it stages")
    if flags.dyn_adapt_budget:
        if not 0 < flags.dyn_loss_lower < flags.dyn_loss_upper:
            found.append("--dyn-adapt-budget needs 0 < --dyn-loss-lower < --dyn-loss-upper, for example 0.997 and "
                         f"1.01, got {flags.dyn_loss_lower} and {flags.dyn_loss_upper}")
        for name in ("dyn_budget_step_up", "dyn_budget_step_down"):
            require(getattr(flags, name) >= 1, name,
                    "must be at least 1 block; leave out --dyn-adapt-budget to keep the budget")
    if flags.dyn_require_stable:
        require(flags.dyn_stability_window >= 2, "dyn_stability_window", "must be at least 2: its halves are compared")
        for name in ("dyn_stability_rel_change", "dyn_stability_cv"):
            require(getattr(flags, name) > 0, name, "must be above 0, or no loss is stable")
    if not found and num_steps is None and flags.dyn_freeze_start_step == -1:
        recovery = recovery_share(flags)
        require(flags.dyn_freeze_start_frac + recovery < 1, "dyn_freeze_start_frac",
                f"leaves no step to train a suffix in, as recovery takes {recovery:g} of the steps: lower one of the shares")
    return found if found or num_steps is None else step_problems(flags, num_steps)


def step_problems(flags: SuffixFlags, num_steps: int) -> list[str]:
    """The reasons that depend on the number of steps, for flags that are right by themselves."""
    start, end = freeze_start(flags, num_steps), recovery_start(flags, num_steps)
    if start >= end:
        return [f"no step is left to train a suffix in: freezing starts at step {start} and recovery at {end} of "
                f"{num_steps}. Lower --dyn-warmup-steps, --dyn-freeze-start-step or --dyn-freeze-start-frac, "
                "or --dyn-final-full-frac, or train for longer"]
    if flags.dyn_require_stable and flags.dyn_stability_window >= end:
        return [f"--dyn-stability-window must be less than the {end} steps before recovery, or it is never filled, "
                f"got {flags.dyn_stability_window}"]
    return []


def choose_suffix(relevance: list[float], threshold: float, low: int, high: int) -> int:
    """The fewest top blocks that hold the share `threshold` of all relevance, but at least `low` and at most `high`.

    Where no block has any relevance nothing tells them apart, and `high` are trained.
    """
    held = list(accumulate(reversed(relevance)))  # held[k-1]: relevance of the top k blocks
    if held[-1] <= 0:
        return high
    enough = next(k for k, share in enumerate(held, start=1) if share >= threshold * held[-1])
    return min(max(enough, low), high)


def is_stable(losses: list[float], rel_change: float, cv: float) -> bool:
    """Whether the mean hardly moves from the first half of `losses` to the second, and they scatter little."""
    middle = len(losses) // 2
    before, after = fmean(losses[:middle]), fmean(losses[middle:])
    return abs(after - before) <= rel_change * abs(before) and pstdev(losses) <= cv * abs(fmean(losses))


@dataclass(frozen=True)
class Decision:
    """What one optimizer step trains: blocks [active_start, n)."""
    active_start: int
    kind: str              # full, warmup, probe, refresh, suffix or recovery: `step_kind` in metrics.jsonl
    needs_relevance: bool  # whether `observe` wants every block's relevance after this step's backward


class SuffixPolicy:
    """Decides for every step of one run; see the top of this file for the rules."""

    STATE = ("relevance", "probe_loss", "budget", "losses", "freeze_step")

    def __init__(self, flags: SuffixFlags, n_layer: int, num_steps: int):
        if found := problems(flags, n_layer, num_steps):
            raise ValueError("; ".join(found))
        self.flags, self.n_layer = flags, n_layer
        self.counts = layer_counts(flags, n_layer)
        self.freeze_start, self.recovery_start = freeze_start(flags, num_steps), recovery_start(flags, num_steps)
        self.recovery_steps = num_steps - self.recovery_start

        self.relevance: list[float] | None = None  # EMA, a value for each block; None before the first measurement
        self.probe_loss: float | None = None       # EMA over probes and refreshes
        self.budget = self.counts.high             # the most blocks that a suffix may have now
        self.losses: list[float] = []              # the stability window; no longer fed once the gate is open
        self.freeze_step = None if flags.dyn_require_stable else self.freeze_start  # the first step behind the gate

    def decide(self, step: int) -> Decision:
        """What to train at `step`. Asking changes nothing."""
        flags = self.flags
        if flags.block_update_schedule == "full_update":
            return Decision(0, "full", False)
        if flags.block_update_schedule == "static_suffix":
            return Decision(self.n_layer - flags.static_active_layers, "suffix", False)
        if step < flags.dyn_warmup_steps:
            return Decision(0, "warmup", False)
        if step >= self.recovery_start:
            stage = self._recovery_layers(step)
            return Decision(0, "recovery", False) if stage == self.n_layer else self._suffix(step, stage, "recovery")
        if self.freeze_step is None or step < self.freeze_step:
            return Decision(0, "full", step % flags.dyn_probe_every == 0)
        return self._suffix(step, self.counts.low, "suffix")

    def observe(self, step: int, loss: float, relevance: list[float] | None = None) -> None:
        """Take in the training loss of `step` and, where it was asked for, the relevance of every block.

        Values that are not finite say nothing about the blocks: they are left out, and a loss that is not finite
        empties the stability window.
        """
        flags = self.flags
        if flags.block_update_schedule != "dynamic_suffix":
            return
        kind = self.decide(step).kind
        if relevance is not None:
            assert len(relevance) == self.n_layer, f"{len(relevance)} values of relevance for {self.n_layer} blocks"
            if all(map(math.isfinite, relevance)):
                self.relevance = list(relevance) if self.relevance is None else [
                    ema(old, new, flags.dyn_relevance_ema_decay) for old, new in zip(self.relevance, relevance, strict=True)]
        if kind in ("probe", "refresh") and math.isfinite(loss):
            self._adapt_budget(loss)
        if self.freeze_step is None:
            self._watch_stability(step, loss)

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state: dict) -> None:
        for name in self.STATE:
            setattr(self, name, state[name])

    def _suffix(self, step: int, at_least: int, kind: str) -> Decision:
        """A refresh or a probe where one is due (and always before the first measurement), else the chosen suffix."""
        flags = self.flags
        if flags.dyn_refresh_every and step % flags.dyn_refresh_every == 0:
            return Decision(0, "refresh", True)
        if self.relevance is None or step % flags.dyn_probe_every == 0:
            return Decision(0, "probe", True)
        chosen = choose_suffix(self.relevance, flags.dyn_relevance_threshold, self.counts.low, self.budget)
        return Decision(self.n_layer - max(chosen, at_least), kind, False)

    def _recovery_layers(self, step: int) -> int:
        """How many blocks this step of the recovery trains at least; all where none was ever frozen."""
        flags, progress = self.flags, (step - self.recovery_start) / max(1, self.recovery_steps)
        if flags.dyn_final_recovery_mode == "full" or self.freeze_step is None:
            return self.n_layer
        if progress < flags.dyn_final_recovery_stage1_progress:
            return self.counts.stage1
        return self.counts.stage2 if progress < flags.dyn_final_recovery_stage2_progress else self.n_layer

    def _adapt_budget(self, loss: float) -> None:
        """Compare a probe's loss with the EMA of the probes before it, move the budget, and take it into the EMA."""
        flags = self.flags
        if self.probe_loss is None:
            self.probe_loss = loss
            return
        if flags.dyn_adapt_budget and loss > flags.dyn_loss_upper * self.probe_loss:
            self.budget = min(self.budget + flags.dyn_budget_step_up, self.counts.high)
        elif flags.dyn_adapt_budget and loss < flags.dyn_loss_lower * self.probe_loss:
            self.budget = max(self.budget - flags.dyn_budget_step_down, self.counts.low)
        self.probe_loss = ema(self.probe_loss, loss, flags.dyn_loss_ema_decay)

    def _watch_stability(self, step: int, loss: float) -> None:
        """Open the freeze gate for the next step if the loss is stable. It does not open during recovery."""
        flags = self.flags
        window = flags.dyn_stability_window
        self.losses = [*self.losses, loss][-window:] if math.isfinite(loss) else []
        in_time = self.freeze_start <= step + 1 < self.recovery_start
        if in_time and len(self.losses) == window and is_stable(
                self.losses, flags.dyn_stability_rel_change, flags.dyn_stability_cv):
            self.freeze_step = step + 1


def ema(old: float, new: float, decay: float) -> float:
    return decay * old + (1 - decay) * new


@dataclass(frozen=True)
class CostModel:
    """Cost of a step in one unit, seconds or FLOPs. A backward of 2 forwards is the reference's guess: measure it."""
    forward_block: float = 1.0   # a block's forward, paid frozen or not
    backward_block: float = 2.0  # a block's backward and update, saved while it is frozen
    always: float = 0.0          # per step: embedding, head, loss and their optimizer

    def step(self, active_layers: float, n_layer: int) -> float:
        return self.always + n_layer * self.forward_block + active_layers * self.backward_block


def predicted_speedup(active_layers: list[int], n_layer: int, cost: CostModel) -> float:
    """How much faster than full training the steps are that trained these numbers of blocks."""
    return len(active_layers) * cost.step(n_layer, n_layer) / sum(cost.step(a, n_layer) for a in active_layers)
