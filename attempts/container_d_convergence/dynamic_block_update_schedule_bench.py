"""Does training only the top blocks that matter buy quality for time? Three schedules on one stack of residual blocks.

    python attempts/container_d_convergence/dynamic_block_update_schedule_bench.py --equal-time-budget --json-out d.json

`full_update` trains every block at every step, `static_suffix` always the top few, `dynamic_suffix` the suffix that the
policy chooses; the policy is the one that training uses (nanochat/recipe/suffix_policy.py). All start from the same weights and
get the same batches in the same order (residual_stack.py). Validation always runs through all blocks.

A step that trains a of n blocks costs C(a) = always + n F + a B: forward everywhere, backward and update only in the
suffix. F, B and their ratio k = B/F are measured before training, so that the predicted speed-up can be compared with
the measured one.

Cheaper steps are useful only if they lead to better quality in the same time. Under --equal-time-budget `full_update` takes
--steps steps, and each other schedule as many as fit into the same training time, at most --max-steps-multiplier times
as many. Time is counted in full steps: a schedule's seconds over the mean seconds of a full step, or, with
--budget-clock model, the sum of C(a)/C(n) in FLOPs (k = 2), which is the same on every machine and in every repeat.

The number of steps N must be known during training, because freezing and recovery start at shares of it. So N is planned: the
largest number for which the remaining steps, as the policy would decide them with its present relevance, use up the remaining
time. N is planned again whenever the policy has new information, until recovery begins: a new policy is then made for the new N
and takes over the state of the old one, as in a resumed run. Before the first measurement all blocks count as equally relevant,
and a freeze that waits for a stable loss counts as one that never happens. So recovery is always reached, and ends with the
budget.

Steps are interleaved: the next one is always of the schedule that has used the least of its time so far, so that a machine that
slows down slows all schedules.
"""

import math
import sys
import time
from bisect import bisect_right
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout works without being installed

from nanochat.benchmarks.flags import AttemptFlags
from nanochat.benchmarks.result_file import make_result, save
from nanochat.cli.flags import flag, parse
from nanochat.cli.program import cli
from nanochat.common import Progress, format_table
from nanochat.features.suffix import relevance_of_blocks
from nanochat.recipe.schedules import lr_scale
from nanochat.recipe.suffix_policy import SCHEDULES, CostModel, SuffixFlags, SuffixPolicy, predicted_speedup, problems
from nanochat.runtime import timing

SCRIPT = "attempts/container_d_convergence/dynamic_block_update_schedule_bench.py"
PRESETS = {
    "smoke": dict(dmodel=64, n_layers=6, hidden_mult=4, batch_size=4, seq_len=64, steps=100),
    "default": dict(dmodel=128, n_layers=8, hidden_mult=4, batch_size=4, seq_len=128, steps=200),
    "gpu": dict(dmodel=1024, n_layers=18, hidden_mult=4, batch_size=8, seq_len=1024, steps=500),
}


@dataclass
class BenchFlags(AttemptFlags):
    """The bench; the preset gives the sizes that are not given"""
    schedules: list[str] = flag(list(SCHEDULES), "what to compare", choices=SCHEDULES)
    dmodel: int | None = flag(None, "width of the stack", low=1)
    n_layers: int | None = flag(None, "number of blocks", low=2)
    hidden_mult: int | None = flag(None, "width inside a block, as a multiple of --dmodel", low=1)
    batch_size: int | None = flag(None, "sequences in a batch", low=1)
    seq_len: int | None = flag(None, "positions in a sequence", low=1)
    steps: int | None = flag(None, "optimizer steps of full_update, and of all without --equal-time-budget", low=2)
    equal_time_budget: bool = flag(False, "give each schedule the training time of full_update instead of its steps")
    max_steps_multiplier: float = flag(3.0, "under it, at most this many times --steps", low=1, high=1000)
    budget_clock: str = flag("seconds", "what counts as time under it: the clock, or FLOPs, which are reproducible",
                             choices=("seconds", "model"))
    lr: float = flag(-1.0, "learning rate of AdamW; -1 is 3e-4 x (1024 / dmodel)^0.5")
    warmdown_ratio: float = flag(0.0, "share of the steps over which the learning rate falls to 0", low=0, high=1)
    eval_every: int = flag(-1, "steps between validations; -1 is a tenth of --steps")
    val_batches: int = flag(4, "held-out batches that validation averages over", low=1)

    presets = PRESETS
    varied = ("block_update_schedule",)  # by --schedules: the flags of every schedule have an effect

    def filled(self) -> "BenchFlags":
        flags = super().filled()
        return replace(flags, lr=3e-4 * (1024 / flags.dmodel) ** 0.5 if flags.lr == -1 else flags.lr,
                       eval_every=max(1, flags.steps // 10) if flags.eval_every == -1 else flags.eval_every)

    def validate(self) -> list[str]:
        found = super().validate()
        if self.lr != -1 and self.lr <= 0:
            found.append(f"--lr must be above 0, or -1 to derive it from --dmodel, got {self.lr}")
        if self.eval_every != -1 and self.eval_every < 1:
            found.append(f"--eval-every must be at least 1, or -1 to derive it from --steps, got {self.eval_every}")
        if self.equal_time_budget and "full_update" not in self.schedules:
            found.append("--equal-time-budget needs full_update among --schedules: its time is the budget")
        return found


def variants(flags: BenchFlags, suffix: SuffixFlags) -> dict[str, SuffixFlags]:
    """The policy's flags for each schedule; by default static_suffix trains a third of the blocks."""
    static = max(1, flags.n_layers // 3) if suffix.static_active_layers == -1 else suffix.static_active_layers
    return {name: replace(suffix, block_update_schedule=name, static_active_layers=static) for name in SCHEDULES
            if name in flags.schedules}


def most_steps(flags: BenchFlags) -> int:
    return int(flags.max_steps_multiplier * flags.steps) if flags.equal_time_budget else flags.steps


def schedule_problems(flags: BenchFlags, suffix: SuffixFlags) -> list[str]:
    """The policy's problems with any of the schedules, at the fewest and at the most steps it may be made for."""
    flags = flags.filled()
    found = [problem for variant in variants(flags, suffix).values() for steps in (flags.steps, most_steps(flags))
             for problem in problems(variant, flags.n_layers, steps)]
    if suffix.block_update_schedule != SuffixFlags().block_update_schedule:
        found.append("--block-update-schedule: several are compared here; name them with --schedules")
    return list(dict.fromkeys(found))


def make_policy(flags: SuffixFlags, n_layer: int, steps: int, old: SuffixPolicy | None = None, step: int = 0) -> SuffixPolicy:
    """A policy for a run of `steps`, at `step`, with the state of the `old` one. A freeze in the future moves with the steps."""
    policy = SuffixPolicy(flags, n_layer, steps)
    if old:
        state = old.state_dict()
        if old.freeze_step is None or old.freeze_step > step:
            state["freeze_step"] = policy.freeze_step
        policy.load_state_dict(state)
    return policy


def plan(policy: SuffixPolicy, step: int, left: float, fewest: int, most: int, share: list[float]) -> int:
    """The total number of steps, from `fewest` to `most`, so that those from `step` on use `left`. See the top of this file.

    share[a]: the cost of a step that trains a blocks, in the unit of `left`.
    """
    n = policy.n_layer

    def cost(steps: int) -> float:
        if problems(policy.flags, n, steps):
            return math.inf
        trial = make_policy(policy.flags, n, steps, policy, step)
        trial.relevance = trial.relevance or [1.0] * n
        return sum(share[n - trial.decide(s).active_start] for s in range(step, steps))

    return max(fewest, fewest - 1 + bisect_right(range(fewest, most + 1), left + 1e-9, key=cost))


class Training:
    """One schedule's run, with its own model and optimizer."""

    def __init__(self, flags: BenchFlags, suffix: SuffixFlags, task, device):
        self.flags, self.suffix, self.task, self.device = flags, suffix, task, device
        self.model, self.optimizer = make_model(flags, device)
        self.planned = flags.steps
        self.policy = make_policy(suffix, flags.n_layers, self.planned)
        self.active, self.kinds, self.seconds, self.losses = [], [], [], []  # a value per step
        self.relevance, self.plans, self.validations = [], [], []            # [step, values...] at some steps

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def diverged(self) -> bool:
        return bool(self.losses) and not math.isfinite(self.losses[-1])

    def decide(self):
        return self.policy.decide(self.step)

    def train_step(self) -> bool:
        """Take a step. True where the policy has new information, which may change the number of steps."""
        step, decision, known = self.step, self.decide(), (self.policy.freeze_step, self.policy.ended_at)
        scale = lr_scale(min(step, self.planned - 1), self.planned, warmup_steps=0, final_lr_frac=0.0,
                         warmdown_ratio=self.flags.warmdown_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = scale * self.flags.lr
        seconds, (loss, relevance) = timing.timed(self.device, self._update, *self.task.batch(step), decision)
        loss = loss.item()
        self.policy.observe(step, loss, relevance)
        self.active.append(self.policy.n_layer - decision.active_start)
        self.kinds.append(decision.kind)
        self.seconds.append(seconds)
        self.losses.append(loss)
        if relevance:
            self.relevance.append([step, relevance])
        return decision.needs_relevance or (self.policy.freeze_step, self.policy.ended_at) != known

    def _update(self, x, y, decision):
        """The timed part: forward, backward, relevance where it is needed, update. Frozen blocks have no gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model.loss(x, y, decision.active_start)
        loss.backward()
        relevance = None
        if decision.needs_relevance:
            relevance = relevance_of_blocks(self.model.blocks, self.suffix.dyn_relevance_metric)
        self.optimizer.step()
        return loss.detach(), relevance

    def replan(self, steps: int) -> None:
        self.plans.append([self.step, steps])
        self.planned, self.policy = steps, make_policy(self.suffix, self.policy.n_layer, steps, self.policy, self.step)

    def validate(self) -> None:
        import torch
        with torch.no_grad():
            losses = [self.model.loss(x, y).item() for x, y in self.task.validation(self.flags.val_batches)]
        self.validations.append([self.step, sum(self.seconds), sum(losses) / len(losses)])


def make_model(flags: BenchFlags, device):
    """The student and its AdamW. The sum of all blocks' outputs has unit variance (GPT-2's scaling)."""
    import torch

    from residual_stack import ResidualStack
    model = ResidualStack(flags.n_layers, flags.dmodel, flags.hidden_mult * flags.dmodel)
    model = model.init_weights(flags.seed, branch=flags.n_layers ** -0.5).to(device)
    return model, torch.optim.AdamW(model.parameters(), lr=flags.lr, fused=device.type != "mps")


def measure_cost(flags: BenchFlags, task, device, repeats: int = 5) -> CostModel:
    """Seconds of a block's forward, of its backward and update, and of the rest, on a temporary model.

    T(n) - T(1), steps that train all blocks and the top one alone, is n - 1 times backward and update.
    """
    import torch
    model, optimizer = make_model(flags, device)
    x, y = task.batch(0)
    with torch.no_grad():
        hidden = model.embed(x)

    def step(active_start: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        model.loss(x, y, active_start).backward()
        optimizer.step()

    @torch.no_grad()
    def forward() -> None:
        out = hidden
        for block in model.blocks:
            out = block(out)

    n = flags.n_layers
    times = timing.time_in_turn({"all": lambda: step(0), "top": lambda: step(n - 1), "forward": forward}, device, repeats)
    full, top, ahead = (timing.spread(seconds)["median"] for seconds in times.values())
    backward = max(0.0, full - top) / (n - 1)
    return CostModel(ahead / n, backward, max(0.0, full - ahead - n * backward))


def cost_in_flops(model) -> CostModel:
    """In units of a block's forward pass; input projection and head run forward and backward, which is three, at every step."""
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    return CostModel(1.0, 2.0, 3 * (count["embed"] + count["head"]) * len(model.blocks) / count["blocks"])


class InterleavedRuns:
    """The runs of all schedules, their steps interleaved, each up to its steps or its time. share[a]: C(a)/C(n) for a = 0..n."""

    def __init__(self, runs: dict[str, Training], flags: BenchFlags, measured: CostModel):
        self.runs, self.flags, self.full = runs, flags, runs.get("full_update")
        by_model = flags.budget_clock == "model"
        cost, n = cost_in_flops(next(iter(runs.values())).model) if by_model else measured, flags.n_layers
        self.share = [cost.step(a, n) / cost.step(n, n) for a in range(n + 1)]
        self.measured_full_step = None if by_model else measured.step(n, n)

    def used(self, run: Training) -> float:
        """The used part of the budget, which is --steps: in steps, or in the time of full steps."""
        if not self.flags.equal_time_budget:
            return run.step
        if self.measured_full_step is None:
            return sum(count * self.share[a] for a, count in sorted(Counter(run.active).items()))
        full_step = sum(self.full.seconds) / self.full.step if self.full.step else self.measured_full_step
        return sum(run.seconds) / full_step

    def has_budget(self, run: Training) -> bool:
        if run.diverged or not self.flags.equal_time_budget or run is self.full:
            return not run.diverged and run.step < self.flags.steps
        next_step = self.share[run.policy.n_layer - run.decide().active_start]
        return run.step < most_steps(self.flags) and self.used(run) + next_step <= self.flags.steps + 1e-9

    def replan(self, run: Training) -> None:
        left = self.flags.steps - self.used(run)
        fewest = max(self.flags.steps, run.step + 1)
        run.replan(plan(run.policy, run.step, left, fewest, max(fewest, most_steps(self.flags)), self.share))

    def train(self) -> None:
        for run in self.runs.values():
            if self.flags.equal_time_budget and run is not self.full:
                self.replan(run)
            run.validate()
        progress = Progress("training", total=0, unit=" steps")
        while ready := [run for run in self.runs.values() if self.has_budget(run)]:
            run = min(ready, key=self.used)
            has_news = run.train_step()
            if has_news and self.flags.equal_time_budget and run.step < run.policy.recovery_start:
                self.replan(run)
            if run.step % self.flags.eval_every == 0:
                run.validate()
            progress.total = sum(max(r.planned, r.step) for r in self.runs.values())
            progress.update()
        for run in self.runs.values():
            if run.validations[-1][0] != run.step:
                run.validate()
        progress.total = progress.done
        progress.close()

    def result(self, run: Training, measured: CostModel) -> dict:
        """A schedule's row in the JSON. Latencies exclude the first step, which also allocates the optimizer's state."""
        latency = timing.latency_ms(run.seconds[1:] or run.seconds)
        final = number(run.validations[-1][-1])
        row = {
            "status": "diverged" if run.diverged else "ok",
            "steps_done": run.step, "steps_planned": run.planned, "train_time_sec": sum(run.seconds),
            "budget_used": self.used(run),
            "val_loss_final": final, "val_vs_full_pct": None,
            "train_loss_start": number(run.losses[0]), "train_loss_end": number(run.losses[-1]),
            **latency, "speedup_vs_full": None,
            "speedup_predicted": predicted_speedup(run.active, run.policy.n_layer, measured),
            "active_layers_mean": sum(run.active) / run.step, "active_layers_min": min(run.active),
            "active_layers_max": max(run.active),
            "active_layers_steps": {str(a): count for a, count in sorted(Counter(run.active).items())},
            "step_kinds": dict(Counter(run.kinds)), "probe_count": len(run.relevance),
        }
        if self.full:
            full_final = number(self.full.validations[-1][-1])
            row["val_vs_full_pct"] = 100 * (final / full_final - 1) if final and full_final else None
            full_latency = timing.latency_ms(self.full.seconds[1:] or self.full.seconds)
            row["speedup_vs_full"] = full_latency["mean_ms"] / latency["mean_ms"]
        return row


def number(value: float) -> float | None:
    """`value`, or None for infinity and NaN, which JSON does not have."""
    return value if math.isfinite(value) else None


def trace(run: Training) -> dict:
    return {"train_loss": [number(loss) for loss in run.losses], "active_layers": run.active, "step_kind": run.kinds,
            "seconds": [float(f"{s:.7g}") for s in run.seconds],
            "validation": [[step, seconds, number(loss)] for step, seconds, loss in run.validations],
            "relevance": run.relevance, "steps_planned": run.plans}


def table(results: dict) -> str:
    def percent(value):
        return None if value is None else f"{value:+.2f}%"

    def digits(value, places):
        return None if value is None else round(value, places)

    return format_table([{
        "schedule": name, "steps": r["steps_done"], "train s": digits(r["train_time_sec"], 2),
        "val loss": digits(r["val_loss_final"], 5), "vs full": percent(r["val_vs_full_pct"]),
        "train start": digits(r["train_loss_start"], 4), "end": digits(r["train_loss_end"], 4),
        "mean ms": digits(r["mean_ms"], 2), "p50": digits(r["p50_ms"], 2), "p90": digits(r["p90_ms"], 2),
        "speed-up": digits(r["speedup_vs_full"], 3), "predicted": digits(r["speedup_predicted"], 3),
        "blocks": digits(r["active_layers_mean"], 2), "range": f"{r['active_layers_min']}-{r['active_layers_max']}",
        "probes": r["probe_count"]} for name, r in results.items()])


def draw(figure, result: dict) -> None:
    """Loss and trained blocks over steps and over training time."""
    figure.set_size_inches(11, 6)
    (by_step, by_time), (blocks_by_step, blocks_by_time) = figure.subplots(2, 2, sharex="col", height_ratios=[3, 1])
    colors = "tab:blue", "tab:orange", "tab:green"  # there may be fewer schedules
    for color, (name, t) in zip(colors, result["traces"].items(), strict=False):
        steps, elapsed = range(1, len(t["seconds"]) + 1), []
        for seconds in t["seconds"]:
            elapsed.append(seconds + (elapsed[-1] if elapsed else 0.0))
        losses = [math.nan if loss is None else loss for loss in t["train_loss"]]
        for axes, blocks, x, column in ((by_step, blocks_by_step, steps, 0), (by_time, blocks_by_time, elapsed, 1)):
            axes.plot(x, losses, color=color, alpha=0.25, linewidth=0.8)
            seen = [v for v in t["validation"] if v[2] is not None]
            axes.plot([v[column] for v in seen], [v[2] for v in seen], color=color, marker="o", markersize=4, label=name)
            blocks.step(x, t["active_layers"], where="pre", color=color, linewidth=0.9)
    for axes in (by_step, by_time):
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
    by_step.set_ylabel("loss: validation (dots) and training")
    by_step.legend()
    for axes, label in ((blocks_by_step, "optimizer step"), (blocks_by_time, "training time (s)")):
        axes.set_ylim(0, None)
        axes.grid(alpha=0.25)
        axes.set_xlabel(label)
    blocks_by_step.set_ylabel("blocks trained")


def main(argv: list[str] | None = None) -> int:
    flags, suffix = parse([BenchFlags, SuffixFlags], argv, prog=f"python {SCRIPT}", description=__doc__.splitlines()[0],
                          validate=schedule_problems)
    flags, started = flags.filled(), time.monotonic()
    device, dtype = flags.open_device()
    from nanochat.runtime.compute_dtype import dtype_name
    from nanochat.runtime.device import device_name
    from residual_stack import Task
    task = Task(flags.seed, (flags.batch_size, flags.seq_len), device, dtype)
    measured = measure_cost(flags, task, device)
    k = measured.backward_block / measured.forward_block
    runs = {name: Training(flags, variant, task, device) for name, variant in variants(flags, suffix).items()}
    parameters = sum(p.numel() for p in next(iter(runs.values())).model.parameters())
    print(f"{device_name(device)}, {dtype_name(dtype)} | {flags.n_layers} blocks of {flags.dmodel}, "
          f"{parameters / 1e6:.2f} M parameters, {flags.batch_size} x {flags.seq_len} rows a step, lr {flags.lr:.3g}")
    print(f"measured: backward and update of a block take k = {k:.2f} times its forward", flush=True)
    interleaved = InterleavedRuns(runs, flags, measured)
    interleaved.train()
    results = {name: interleaved.result(run, measured) for name, run in runs.items()}
    traces = {name: trace(run) for name, run in runs.items()}
    print(table(results))
    config = asdict(suffix) | asdict(flags) | {
        "dtype": dtype_name(dtype), "parameters": parameters, "k": k, "cost_sec": asdict(measured)}
    del config["block_update_schedule"]
    content = make_result(SCRIPT, device, config, results, time.monotonic() - started, traces, argv)
    save(flags.json_out, content, draw if flags.plot else None)
    return 1 if any(run.diverged for run in runs.values()) else 0


if __name__ == "__main__":
    cli(main)
