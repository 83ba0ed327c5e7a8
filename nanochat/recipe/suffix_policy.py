"""Dynamic suffix training: which suffix of the blocks to train in each step. Pure Python, no torch.

A step that trains only the top `a` of `n` blocks runs the others forward only, and saves their backward pass and update:

    C(a) / C(n) = (always + n F + a B) / (always + n F + n B)     F: forward of a block; B: its backward and update;
                                                                  always: embedding, head and their optimizer

The gradients show which blocks need training. A probe, a full step now and then, measures the relevance of each block; an
exponential moving average (EMA) smooths it. Until the next probe the smallest suffix is trained that holds a given share of the
total relevance. The phases of a `dynamic_suffix` run:

    warmup      all blocks, without measuring: output projections start at zero, so the gradients above them say nothing yet
    full        all blocks, measuring relevance at the interval of the probes, until the freeze gate opens: at a step or a share
                of the run, optionally also not before the loss is stable. Once open it stays open
    suffix      the chosen suffix, with a full step at every probe and refresh, if there are any
    recovery    optional: all blocks again, at once (`full`) or in three stages that never train less than the suffix

Optionally each measurement also adapts the budget, the maximum number of blocks in a suffix: up if its step's loss is above the
EMA of earlier ones, down if it is below.

The guard ends the schedule where it does harm: if the loss of suffix steps rises again, all blocks are trained from then on.

The defaults cost the least quality per second saved of all that were tried (docs/dynamic-suffix.md): all blocks for most of the
run, then the top quarter to the end, without probes. Lower blocks that move only now and then can undo what is learned above
them.

Call `decide(step)`, which changes nothing, before a step, and `observe(step, loss, relevance)` after it. The whole state is
plain JSON, so a resumed run decides exactly as an uninterrupted one.
"""

import math
from dataclasses import dataclass, fields
from itertools import accumulate
from statistics import fmean, pstdev

from nanochat.cli.flags import flag, flag_name

SCHEDULES = ("full_update", "static_suffix", "dynamic_suffix")
DYNAMIC = {"block_update_schedule": "dynamic_suffix"}  # for `requires`: the flags that have an effect under it
ADAPT = DYNAMIC | {"dyn_adapt_budget": True}
STABLE = DYNAMIC | {"dyn_require_stable": True}
STAGED = DYNAMIC | {"dyn_final_recovery_mode": "staged"}
MEASURE_EVERY = 4   # steps between measurements while all blocks are trained, if there are no probes later
GUARD_STEPS = 16    # losses of a mean that the guard compares


@dataclass
class SuffixFlags:
    """Dynamic suffix training"""
    block_update_schedule: str = flag("full_update", "which blocks are trained: all of them, always the top "
                                      "--static-active-layers, or a suffix chosen by relevance", choices=SCHEDULES)
    static_active_layers: int = flag(-1, "blocks that static_suffix trains", requires={"block_update_schedule": "static_suffix"})
    dyn_warmup_steps: int = flag(25, "full steps at the start", requires=DYNAMIC)
    dyn_probe_every: int = flag(0, "steps between probes: full steps that measure relevance; 0 is none once blocks are "
                               "frozen", requires=DYNAMIC)
    dyn_refresh_every: int = flag(0, "steps between refreshes, full steps that replace a probe; 0 is none", requires=DYNAMIC)
    dyn_relevance_metric: str = flag("grad_ratio", "relevance of a block: |gradient| / |weight|, or sum of |gradient * weight|",
                                     choices=("grad_ratio", "saliency_abs_gp"), requires=DYNAMIC)
    dyn_relevance_ema_decay: float = flag(0.9, "decay of the moving average of relevance", requires=DYNAMIC)
    dyn_relevance_threshold: float = flag(0.1, "share of the total relevance that the suffix must hold", requires=DYNAMIC)
    dyn_min_active_layers: int = flag(-1, "fewest blocks to train; -1 is a quarter of them", requires=DYNAMIC)
    dyn_max_active_layers: int = flag(-1, "most blocks to train on a suffix step; -1 is all of them", requires=DYNAMIC)
    dyn_adapt_budget: bool = flag(False, "adapt the most blocks to train to the loss of steps that measure", requires=DYNAMIC)
    dyn_loss_upper: float = flag(1.01, "more blocks if a probe's loss exceeds this multiple of its average", requires=ADAPT)
    dyn_loss_lower: float = flag(0.997, "fewer blocks if a probe's loss is below this multiple of its average", requires=ADAPT)
    dyn_budget_step_up: int = flag(2, "by how many blocks it rises", requires=ADAPT)
    dyn_budget_step_down: int = flag(1, "by how many blocks it falls", requires=ADAPT)
    dyn_loss_ema_decay: float = flag(0.9, "decay of the moving average of a probe's loss", requires=ADAPT)
    dyn_freeze_start_frac: float = flag(0.7, "share of the steps before which nothing is frozen",
                                        requires=DYNAMIC | {"dyn_freeze_start_step": -1})
    dyn_freeze_start_step: int = flag(-1, "step before which nothing is frozen; -1 uses the share", requires=DYNAMIC)
    dyn_guard: float = flag(0.01, "train all blocks to the end if the mean loss of suffix steps rises by this share; 0 never",
                            requires=DYNAMIC)
    dyn_require_stable: bool = flag(False, "freeze nothing before the loss is stable", requires=DYNAMIC)
    dyn_stability_window: int = flag(12, "number of recent losses that must be stable", requires=STABLE)
    dyn_stability_rel_change: float = flag(0.02, "stable: the means of both halves differ by at most this share", requires=STABLE)
    dyn_stability_cv: float = flag(0.03, "stable: standard deviation / mean of the window is at most this", requires=STABLE)
    dyn_final_full_frac: float = flag(-1.0, "share of the steps, at the end, that recover the frozen blocks; -1 is none, or a "
                                     "tenth if in stages", requires=DYNAMIC)
    dyn_final_recovery_mode: str = flag("full", "recovery: all blocks at once, or in stages", choices=("full", "staged"),
                                        requires=DYNAMIC)
    dyn_final_recovery_stage1_progress: float = flag(0.34, "share of the recovery at which stage 1 ends", requires=STAGED)
    dyn_final_recovery_stage1_layers: int = flag(-1, "blocks trained in stage 1; -1 is a third from min to all", requires=STAGED)
    dyn_final_recovery_stage2_progress: float = flag(0.67, "share at which stage 2 ends; then all blocks are trained",
                                                     requires=STAGED)
    dyn_final_recovery_stage2_layers: int = flag(-1, "blocks trained in stage 2; -1 is two thirds from min to all",
                                                 requires=STAGED)


@dataclass(frozen=True)
class LayerCounts:
    """Numbers of trained blocks, with every -1 of the flags replaced."""
    low: int     # minimum
    high: int    # maximum in suffix steps
    stage1: int  # minimum in stage 1 of a staged recovery
    stage2: int  # and in stage 2


def layer_counts(flags: SuffixFlags, n_layer: int) -> LayerCounts:
    """The counts of the flags; -1 is derived from `n_layer`: 3, 12, 6 and 9 of 12 blocks."""
    def given(count: int, derived: int) -> int:
        return derived if count == -1 else count

    high = given(flags.dyn_max_active_layers, n_layer)
    low = given(flags.dyn_min_active_layers, min((n_layer + 3) // 4, high))
    return LayerCounts(
        low=low, high=high,
        stage1=given(flags.dyn_final_recovery_stage1_layers, low + round((n_layer - low) / 3)),
        stage2=given(flags.dyn_final_recovery_stage2_layers, low + round((n_layer - low) * 2 / 3)))


def freeze_start(flags: SuffixFlags, num_steps: int) -> int:
    """First step that may freeze blocks, apart from --dyn-require-stable."""
    start = flags.dyn_freeze_start_step
    return max(flags.dyn_warmup_steps, round(flags.dyn_freeze_start_frac * num_steps) if start == -1 else start)


def chooses_once(flags: SuffixFlags) -> bool:
    """Whether a run trains at most one suffix besides all blocks: nothing is measured once blocks are frozen."""
    if flags.block_update_schedule != "dynamic_suffix":
        return True
    return flags.dyn_probe_every == flags.dyn_refresh_every == 0 and flags.dyn_final_recovery_mode == "full"


def recovery_start(flags: SuffixFlags, num_steps: int) -> int:
    """First step of the final recovery; `num_steps` if there is none."""
    return num_steps - round(recovery_share(flags) * num_steps)


def recovery_share(flags: SuffixFlags) -> float:
    """Share of the steps that the final recovery takes."""
    if flags.dyn_final_full_frac == -1:
        return 0.1 if flags.dyn_final_recovery_mode == "staged" else 0.0
    return flags.dyn_final_full_frac


def problems(flags: SuffixFlags, n_layer: int, num_steps: int | None) -> list[str]:
    """Every reason why these flags are invalid for this model and run, with advice.

    num_steps: None if not known yet; the rules of `step_problems` are then not checked.
    """
    found = []
    for f in fields(flags):
        if (choices := f.metadata["choices"]) and getattr(flags, f.name) not in choices:
            found += _problem(flags, f.name, f"must be one of {', '.join(choices)}")
    if flags.block_update_schedule == "static_suffix" and not 1 <= flags.static_active_layers <= n_layer:
        found += _problem(flags, "static_active_layers",
                          f"must say how many of the {n_layer} blocks static_suffix trains, from 1 to {n_layer}")
    if found or flags.block_update_schedule != "dynamic_suffix":
        return found
    found = _number_problems(flags) + _block_problems(flags, n_layer) + _option_problems(flags)
    if not found and num_steps is None and flags.dyn_freeze_start_step == -1:
        recovery = recovery_share(flags)
        if flags.dyn_freeze_start_frac + recovery >= 1:
            found = _problem(flags, "dyn_freeze_start_frac", "leaves no step to train a suffix in, as recovery takes "
                             f"{recovery:g} of the steps: lower one of the shares")
    return found if found or num_steps is None else step_problems(flags, num_steps)


def _problem(flags: SuffixFlags, name: str, rule: str) -> list[str]:
    return [f"{flag_name(name)} {rule}, got {getattr(flags, name)}"]


def _number_problems(flags: SuffixFlags) -> list[str]:
    """Single numbers of a dynamic suffix that are out of range."""
    decay = "must be at least 0 and below 1: at 1 the first value would stay"
    rules = (  # (is valid, name, rule)
        (flags.dyn_warmup_steps >= 0, "dyn_warmup_steps", "must be at least 0"),
        (flags.dyn_probe_every >= 0, "dyn_probe_every", "must be at least 1, or 0 for no probes once blocks are frozen"),
        (flags.dyn_refresh_every >= 0, "dyn_refresh_every", "must be at least 1, or 0 for no refreshes"),
        (0 < flags.dyn_relevance_threshold <= 1, "dyn_relevance_threshold", "must be above 0 and at most 1"),
        (0 <= flags.dyn_relevance_ema_decay < 1, "dyn_relevance_ema_decay", decay),
        (0 <= flags.dyn_loss_ema_decay < 1, "dyn_loss_ema_decay", decay),
        (flags.dyn_freeze_start_step >= -1, "dyn_freeze_start_step", "must be a step, or -1 to use --dyn-freeze-start-frac"),
        (flags.dyn_guard >= 0, "dyn_guard", "must be a share above 0, or 0 for no guard"),
        (0 <= flags.dyn_freeze_start_frac < 1, "dyn_freeze_start_frac", "must be at least 0 and below 1"),
        (flags.dyn_final_full_frac == -1 or 0 <= flags.dyn_final_full_frac < 1, "dyn_final_full_frac",
         "must be at least 0 and below 1, or -1 to derive it"),
    )
    return [problem for valid, name, rule in rules if not valid for problem in _problem(flags, name, rule)]


def _block_problems(flags: SuffixFlags, n_layer: int) -> list[str]:
    """Numbers of blocks that are out of range or in the wrong order, and the stages of a recovery."""
    staged, counts = flags.dyn_final_recovery_mode == "staged", layer_counts(flags, n_layer)
    names = ["dyn_min_active_layers", "dyn_max_active_layers"]
    names += ["dyn_final_recovery_stage1_layers", "dyn_final_recovery_stage2_layers"] if staged else []
    found = [problem for name in names if getattr(flags, name) not in (-1, *range(1, n_layer + 1))
             for problem in _problem(flags, name, f"must be from 1 to {n_layer}, the number of blocks, or -1 to derive it")]
    in_range = not found
    if in_range and counts.low > counts.high:
        found.append(f"--dyn-min-active-layers ({counts.low}) is above --dyn-max-active-layers ({counts.high}): "
                     "lower the first or raise the second")
    if not staged:
        return found
    if in_range and not counts.low <= counts.stage1 <= counts.stage2:
        found.append("staged recovery needs stages that grow: --dyn-min-active-layers <= "
                     "--dyn-final-recovery-stage1-layers <= --dyn-final-recovery-stage2-layers, "
                     f"got {counts.low}, {counts.stage1}, {counts.stage2}")
    first, second = flags.dyn_final_recovery_stage1_progress, flags.dyn_final_recovery_stage2_progress
    if not 0 < first < second <= 1:
        found.append("staged recovery needs 0 < --dyn-final-recovery-stage1-progress < "
                     f"--dyn-final-recovery-stage2-progress <= 1, got {first} and {second}")
    if flags.dyn_final_full_frac == 0:
        found += _problem(flags, "dyn_final_full_frac",
                          "must be above 0 for --dyn-final-recovery-mode staged: it is the share of steps in stages")
    return found


def _option_problems(flags: SuffixFlags) -> list[str]:
    """Invalid numbers of --dyn-adapt-budget and --dyn-require-stable."""
    found = []
    if flags.dyn_adapt_budget:
        if not 0 < flags.dyn_loss_lower < flags.dyn_loss_upper:
            found.append("--dyn-adapt-budget needs 0 < --dyn-loss-lower < --dyn-loss-upper, for example 0.997 and "
                         f"1.01, got {flags.dyn_loss_lower} and {flags.dyn_loss_upper}")
        for name in ("dyn_budget_step_up", "dyn_budget_step_down"):
            if getattr(flags, name) < 1:
                found += _problem(flags, name, "must be at least 1 block; leave out --dyn-adapt-budget to keep the budget")
    if flags.dyn_require_stable:
        if flags.dyn_stability_window < 2:
            found += _problem(flags, "dyn_stability_window", "must be at least 2: its halves are compared")
        for name in ("dyn_stability_rel_change", "dyn_stability_cv"):
            if not getattr(flags, name) > 0:
                found += _problem(flags, name, "must be above 0, or no loss is stable")
    return found


def step_problems(flags: SuffixFlags, num_steps: int) -> list[str]:
    """The problems that depend on the number of steps, for flags that are otherwise valid."""
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
    """Length of the smallest suffix with the share `threshold` of the total relevance, limited to [low, high].

    If the total is zero, no block is preferred and the result is `high`.
    """
    held = list(accumulate(reversed(relevance)))  # held[k-1]: total relevance of the top k blocks
    if held[-1] <= 0:
        return high
    enough = next(k for k, share in enumerate(held, start=1) if share >= threshold * held[-1])
    return min(max(enough, low), high)


def is_stable(losses: list[float], rel_change: float, cv: float) -> bool:
    """Whether the means of the two halves differ by at most the share `rel_change`, and std / mean is at most `cv`."""
    middle = len(losses) // 2
    before, after = fmean(losses[:middle]), fmean(losses[middle:])
    return abs(after - before) <= rel_change * abs(before) and pstdev(losses) <= cv * abs(fmean(losses))


@dataclass(frozen=True)
class Decision:
    """What to train in one optimizer step: blocks [active_start, n)."""
    active_start: int
    kind: str              # full, warmup, probe, refresh, suffix or recovery: `step_kind` in metrics.jsonl
    needs_relevance: bool  # whether to measure the relevance of every block after the backward pass, for `observe`


class SuffixPolicy:
    """The decisions for the steps of one run, by the rules at the top of this file. Raises: ValueError for invalid flags."""

    STATE = ("relevance", "probe_loss", "budget", "losses", "freeze_step", "recent", "lowest", "ended_at")

    def __init__(self, flags: SuffixFlags, n_layer: int, num_steps: int):
        if found := problems(flags, n_layer, num_steps):
            raise ValueError("; ".join(found))
        self.flags, self.n_layer = flags, n_layer
        self.counts = layer_counts(flags, n_layer)
        self.freeze_start, self.recovery_start = freeze_start(flags, num_steps), recovery_start(flags, num_steps)
        self.recovery_steps = num_steps - self.recovery_start

        self.relevance: list[float] | None = None  # EMA, one value per block; None before the first measurement
        self.probe_loss: float | None = None       # EMA of the loss of probes and refreshes
        self.budget = self.counts.high             # current maximum of blocks in a suffix
        self.losses: list[float] = []              # the stability window; not updated once the gate is open
        self.freeze_step = None if flags.dyn_require_stable else self.freeze_start  # first step with the freeze gate open
        self.recent: list[float] = []              # the guard's: losses since the freeze, at most GUARD_STEPS
        self.lowest: list[float] = []              # those with the lowest mean so far
        self.ended_at: int | None = None           # step at which the guard ended the schedule

    def decide(self, step: int) -> Decision:
        """Decide what to train at `step`. Changes no state."""
        flags = self.flags
        if flags.block_update_schedule == "full_update":
            return Decision(0, "full", False)
        if flags.block_update_schedule == "static_suffix":
            return Decision(self.n_layer - flags.static_active_layers, "suffix", False)
        if step < flags.dyn_warmup_steps:
            return Decision(0, "warmup", False)
        if self.ended_at is not None:
            return Decision(0, "full", False)
        if step >= self.recovery_start:
            stage = self._recovery_layers(step)
            return Decision(0, "recovery", False) if stage == self.n_layer else self._suffix(step, stage, "recovery")
        if self.freeze_step is None or step < self.freeze_step:
            return Decision(0, "full", step % (flags.dyn_probe_every or MEASURE_EVERY) == 0)
        return self._suffix(step, self.counts.low, "suffix")

    def observe(self, step: int, loss: float, relevance: list[float] | None = None) -> None:
        """Update the state with the training loss of `step` and, if it was measured, the relevance of every block.

        Values that are not finite are ignored, except that such a loss empties the stability window.
        """
        flags = self.flags
        if flags.block_update_schedule != "dynamic_suffix":
            return
        decision = self.decide(step)
        if relevance is not None:
            assert len(relevance) == self.n_layer, f"{len(relevance)} values of relevance for {self.n_layer} blocks"
            if all(map(math.isfinite, relevance)):
                self.relevance = list(relevance) if self.relevance is None else [
                    ema(old, new, flags.dyn_relevance_ema_decay) for old, new in zip(self.relevance, relevance, strict=True)]
        if decision.needs_relevance and math.isfinite(loss):
            self._adapt_budget(loss)
        if self.freeze_step is None:
            self._watch_stability(step, loss)
        elif flags.dyn_guard and self.freeze_step <= step < self.recovery_start and self.ended_at is None:
            self._watch_harm(step, loss)

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state: dict) -> None:
        for name in self.STATE:
            if name in state:  # the guard's are missing in older checkpoints
                setattr(self, name, state[name])

    def _suffix(self, step: int, at_least: int, kind: str) -> Decision:
        """A refresh or probe if one is due, or nothing was measured yet; else the chosen suffix, of `at_least` blocks."""
        flags = self.flags
        if flags.dyn_refresh_every and step % flags.dyn_refresh_every == 0:
            return Decision(0, "refresh", True)
        if self.relevance is None or flags.dyn_probe_every and step % flags.dyn_probe_every == 0:
            return Decision(0, "probe", True)
        chosen = choose_suffix(self.relevance, flags.dyn_relevance_threshold, self.counts.low, self.budget)
        return Decision(self.n_layer - max(chosen, at_least), kind, False)

    def _recovery_layers(self, step: int) -> int:
        """Minimum of trained blocks in this step of the recovery; all if none was ever frozen."""
        flags, progress = self.flags, (step - self.recovery_start) / max(1, self.recovery_steps)
        if flags.dyn_final_recovery_mode == "full" or self.freeze_step is None:
            return self.n_layer
        if progress < flags.dyn_final_recovery_stage1_progress:
            return self.counts.stage1
        return self.counts.stage2 if progress < flags.dyn_final_recovery_stage2_progress else self.n_layer

    def _adapt_budget(self, loss: float) -> None:
        """Adapt the budget by comparing the loss of a probe with the EMA of earlier ones, then update the EMA."""
        flags = self.flags
        if self.probe_loss is None:
            self.probe_loss = loss
            return
        if flags.dyn_adapt_budget and loss > flags.dyn_loss_upper * self.probe_loss:
            self.budget = min(self.budget + flags.dyn_budget_step_up, self.counts.high)
        elif flags.dyn_adapt_budget and loss < flags.dyn_loss_lower * self.probe_loss:
            self.budget = max(self.budget - flags.dyn_budget_step_down, self.counts.low)
        self.probe_loss = ema(self.probe_loss, loss, flags.dyn_loss_ema_decay)

    def _watch_harm(self, step: int, loss: float) -> None:
        """End the schedule if the mean loss is above the lowest since the freeze, by more than its error and --dyn-guard."""
        self.recent = [*self.recent, loss][-GUARD_STEPS:] if math.isfinite(loss) else self.recent
        if len(self.recent) < GUARD_STEPS:
            return
        if not self.lowest or fmean(self.recent) < fmean(self.lowest):
            self.lowest = self.recent
        error = math.hypot(pstdev(self.recent), pstdev(self.lowest)) / math.sqrt(GUARD_STEPS)
        if fmean(self.recent) > (1 + self.flags.dyn_guard) * fmean(self.lowest) + 2 * error:
            self.ended_at = step + 1

    def _watch_stability(self, step: int, loss: float) -> None:
        """Open the freeze gate for the next step if the loss is stable, but not during recovery."""
        flags = self.flags
        window = flags.dyn_stability_window
        self.losses = [*self.losses, loss][-window:] if math.isfinite(loss) else []
        in_time = self.freeze_start <= step + 1 < self.recovery_start
        if in_time and len(self.losses) == window and is_stable(
                self.losses, flags.dyn_stability_rel_change, flags.dyn_stability_cv):
            self.freeze_step = step + 1


def ema(old: float, new: float, decay: float) -> float:
    """One update of an exponential moving average."""
    return decay * old + (1 - decay) * new


@dataclass(frozen=True)
class CostModel:
    """Cost of a step, in seconds or FLOPs. The default, backward = 2 forwards, is only a guess: measure it."""
    forward_block: float = 1.0   # forward of a block, frozen or not
    backward_block: float = 2.0  # backward and update of a block, saved while it is frozen
    always: float = 0.0          # the rest of a step: embedding, head, loss and their optimizer

    def step(self, active_layers: float, n_layer: int) -> float:
        return self.always + n_layer * self.forward_block + active_layers * self.backward_block


def predicted_speedup(active_layers: list[int], n_layer: int, cost: CostModel) -> float:
    """Speed-up over full training of steps that trained these numbers of blocks."""
    return len(active_layers) * cost.step(n_layer, n_layer) / sum(cost.step(a, n_layer) for a in active_layers)
