"""What a run records: rows of metrics.jsonl, lines on the console and for trackers, and at the end result.json."""

import json
import platform
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from nanochat.cli.launch_environment import launch_id
from nanochat.cli.paths import portable
from nanochat.common import is_main_rank, resolve
from nanochat.recipe.shape import flops_per_token, param_counts
from nanochat.runtime.compilation import graphs_compiled
from nanochat.runtime.compute_dtype import dtype_name
from nanochat.runtime.device import device_name, peak_flops
from nanochat.runtime.files import write_atomic
from nanochat.runtime.provenance import git_state, source_fingerprint
from nanochat.training import run_folder
from nanochat.training.auto_batch import memory_limit
from nanochat.training.config import Config
from nanochat.training.console import RECENT_STEPS, Console, progress_line
from nanochat.training.divergence import MAX_ROLLBACKS
from nanochat.training.forecast import forecast_for_result
from nanochat.training.plan_cache import keep_run
from nanochat.training.plot import plot_run
from nanochat.training.records import MetricsFile, write_result
from nanochat.training.report import report_run
from nanochat.training.state import RunPlan, TrainState
from nanochat.training.step import StepResult, Trainer
from nanochat.training.trackers import Trackers

FIRST_STEPS_SHOWN = 3  # each with a line of its own


class Recorder:
    """Records the run of `plan` from the present step of `state` on.

    same_run: whether it goes on to the same bits as the run whose records are there already.
    """

    def __init__(self, plan: RunPlan, state: TrainState, console: Console, started: float, same_run: bool):
        self.plan, self.state, self.console, self.started, self.first_step = plan, state, console, started, state.step
        self.metrics = MetricsFile(plan.run_dir / "metrics.jsonl", resume_step=state.step)
        self.trackers = Trackers(tracker_names(plan.config), plan.config.run.run, plan.run_dir, plan.config.flat(), state.step,
                                 same_run)

    def step(self, result: StepResult) -> None:
        """Record a step that is counted in `state.stats` already."""
        plan, state, seconds = self.plan, self.state, result.time.total
        row = self._row(result) | {
            "loss": result.loss, "smooth_loss": state.stats.smooth_loss, "dt_ms": seconds * 1000,
            "tok_per_sec": plan.horizon.total_batch_size / seconds, "peak_mem_mib": result.peak_memory_mib, "step_kind": "full",
            "active_start": 0, "active_layers": plan.shape.n_layer, "grad_norm": result.grad_norm,
        } | result.columns
        self.metrics.write(row)
        self.trackers.log({f"train/{k}": v for k, v in row.items() if k != "step"}, result.step)
        self.console.row(row)
        if result.step - self.first_step < FIRST_STEPS_SHOWN or self.console.is_due():
            self.console.progress(progress_line(row, plan.horizon.num_iterations, state.stats.dts[-RECENT_STEPS:],
                                                state.clock.train, plan.config.run.max_train_seconds,
                                                state.features.cost_between))

    def skipped_step(self, result: StepResult, trouble: str) -> None:
        """Record a step that was left out because its loss or gradients were not finite."""
        self.metrics.write(self._row(result) | {"step_kind": "skipped"})
        self.console.line(f"{trouble}; skipped ({len(self.state.stats.skipped_steps)} so far)")

    def _row(self, result: StepResult) -> dict:
        return {"step": result.step, "lr_multiplier": result.lr_scale, "batch_crc32": result.batch_crc32,
                "tokens_seen": (result.step + 1) * self.plan.horizon.total_batch_size, "train_time_sec": self.state.clock.train}

    def bits_per_byte(self, bpb: float) -> None:
        state, seconds = self.state, self.state.clock.train
        row = {"step": state.step, "val_bpb": bpb, "train_time_sec": seconds,
               "tokens_seen": state.step * self.plan.horizon.total_batch_size}
        self.metrics.write(row)
        self.trackers.log({"val/bpb": bpb, "val/train_time_sec": seconds}, state.step)
        self.console.row(row)
        self.console.line(f"step {state.step} | validation {bpb:.6f} bits per byte (best {state.stats.min_val_bpb:.6f})")

    def core_metric(self, value: float) -> None:
        step = self.state.step
        self.metrics.write({"step": step, "train_time_sec": self.state.clock.train, "core_metric": value})
        self.trackers.log({"core_metric": value}, step)
        self.console.line(f"step {step} | CORE metric {value:.4f}")

    def samples(self, texts: list[str]) -> None:
        """Record what the model writes: texts that begin with their prompts, which are always the same."""
        self.metrics.write({"step": self.state.step, "train_time_sec": self.state.clock.train, "samples": texts})

    def roll_back(self, trouble: str, diverged_at: int) -> None:
        """Drop what was recorded after the present step: the run has returned to it, and goes on with other data."""
        self.metrics.close()
        self.metrics = MetricsFile(self.metrics.path, resume_step=self.state.step)
        self.trackers.go_back(self.state.step)
        self.console.line(f"{trouble}; back to step {self.state.step}, and on with the data that follows step {diverged_at}'s "
                          f"(rollback {len(self.state.stats.rollbacks)} of {MAX_ROLLBACKS})")

    def close(self) -> None:
        self.metrics.close()
        self.trackers.close()

    def result(self, trainer: Trainer, last_checkpoint: Path | None, status: str, error: str | None, exit_code: int) -> None:
        """Write result.json, the plot and the report, on rank 0."""
        plan, state, horizon, clock = self.plan, self.state, self.plan.horizon, self.state.clock
        peak = peak_flops(plan.device)
        peak = peak and peak * plan.ranks.world_size
        fields = describe_run(plan.config, plan.device, plan.dtype, plan) | {
            "status": status, "exit_code": exit_code, "error": error,
            "last_checkpoint": last_checkpoint and portable(last_checkpoint), "steps_done": state.step,
            "tokens_seen": state.step * horizon.total_batch_size, "wall_time_sec": time.monotonic() - self.started,
            "loop_time_sec": clock.loop, "train_time_sec": clock.train, "compile_time_sec": clock.compile,
            "eval_time_sec": clock.eval, "save_time_sec": clock.save, "unnamed_time_sec": clock.unnamed,
            "other_load": clock.other_load if plan.ranks.world_size == 1 else None,  # other ranks would count as other programs
        } | state.stats.summary(horizon.total_batch_size, flops_per_token(plan.shape), peak) | {
            "schedule": "full_update", "compiled_graphs": graphs_compiled() if plan.compile else 0,
            "graph_breaks": trainer.forward.graph_breaks.total() if plan.compile else 0,
            "eager_fallbacks": trainer.forward.eager_fallbacks if plan.compile else int(plan.config.run.compile),
            "kernel_choices": plan.kernel_choices, "audit": trainer.audit.summary() if trainer.audit else None,
            # what scripts.plan foretold, where it was asked on this machine; for one rank, as it measures
            "plan": forecast_for_result(plan.config, plan.shape) if plan.ranks.world_size == 1 else None,
        } | state.features.summary()
        write_result(result_files(plan.config, plan.run_dir), fields)
        if plan.ranks.world_size == 1:
            keep_run(plan.config, plan.shape, fields, state.stats.dts, device_type=plan.device.type, rows=plan.micro_batch_size,
                     memory_limit=memory_limit(plan.device))
        for line in [*state.features.reports(), plot_run(plan.run_dir), report_run(plan.run_dir)]:
            self.console.line(line)


def describe_run(config: Config, device: torch.device, dtype: torch.dtype, plan: RunPlan | None) -> dict:
    """The fields of result.json that say what is run; without a plan those that are known before the text is read."""
    commit, dirty = git_state()
    known = {
        "command": shlex.join([Path(sys.executable).name, "-m", "scripts.base_train", *sys.argv[1:]]), "argv": sys.argv[1:],
        "git_commit": commit, "git_dirty": dirty, "source_fingerprint": source_fingerprint(), "seed": config.run.seed,
        "host": platform.node(), "device": device_name(device), "dtype": dtype_name(dtype), "torch_version": torch.__version__,
        "depth": config.model.depth}
    if plan:
        known |= {"text_fingerprint": plan.tokens.fingerprint(), "model_dim": plan.shape.n_embd,
                  "num_params": param_counts(plan.shape)["total"],
                  "flops_per_token": plan.horizon.flops_per_token, "num_iterations": plan.horizon.num_iterations}
    return known


def write_failed_start(run_dir: Path, described: dict, config: Config, error: str, out_of_memory: bool, started: float) -> None:
    """Write result.json of a run that could not be built; not in the folder of another run that has weights."""
    fields = {"status": "oom" if out_of_memory else "failed", "exit_code": 1, "steps_done": 0, "error": error,
              "wall_time_sec": time.monotonic() - started}
    with suppress(OSError):
        own = not run_folder.start_problem(run_dir, overwrite=False)
        if own:
            run_dir.mkdir(parents=True, exist_ok=True)
        write_result(result_files(config, run_dir if own else None), described | fields)
        if own:
            report_run(run_dir)


def result_files(config: Config, run_dir: Path | None) -> list[Path]:
    named = config.run.result_json
    return ([run_dir / "result.json"] if run_dir else []) + ([resolve(named)] if named else [])


def write_config(plan: RunPlan) -> None:
    """Write config.json: the flags, and the command that was typed."""
    content = plan.config.flat() | {"command": shlex.join(sys.argv)} | ({"launch": launch_id()} if launch_id() else {})
    write_atomic(plan.run_dir / "config.json", json.dumps(content, indent=1) + "\n")


def tracker_names(config: Config) -> list[str]:
    """--tracker's, or wandb where --run names a run, as nanochat's users expect."""
    if config.run.tracker:
        return [name for name in config.run.tracker if name != "none"]
    return ["wandb"] if config.run.run != "dummy" else []


def record_end(recorder: Recorder, trainer: Trainer, last_checkpoint: Path | None, status: str, error: str | None,
                   exit_code: int) -> None:
    """Write the result of a run that has ended; a full disk costs the record, not how the run ended."""
    if is_main_rank():
        try:
            recorder.result(trainer, last_checkpoint, status, error, exit_code)
            run_folder.restore_replaced(recorder.plan.run_dir)
        except OSError as e:
            recorder.console.line(f"result.json could not be written: {e}")
