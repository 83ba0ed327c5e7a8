"""What a run leaves behind: metrics.jsonl and result.json. No torch."""

import json
import math
import os
import statistics
import subprocess
from contextlib import suppress
from pathlib import Path

from nanochat.common import is_main_rank, print0, write_atomic

SCHEMA_VERSION = 1
SMOOTHING = 0.9  # EMA factor of smooth_loss
ROW_COLUMNS = ("step", "loss", "smooth_loss", "lr_multiplier", "dt_ms", "tok_per_sec", "peak_mem_mib", "step_kind",
               "active_start", "active_layers", "tokens_seen", "train_time_sec", "val_bpb", "grad_norm", "batch_crc32")
RESULT_FIELDS = (
    "schema_version", "status", "exit_code", "error", "last_checkpoint", "command", "argv", "git_commit", "git_dirty", "seed",
    "host", "device", "dtype", "torch_version", "depth", "model_dim", "num_params", "flops_per_token", "num_iterations",
    "steps_done", "tokens_seen", "wall_time_sec", "train_time_sec", "compile_time_sec", "eval_time_sec",
    "tok_per_sec_max", "tok_per_sec_avg", "tok_per_sec_median", "dt_median_ms", "mfu", "final_loss", "final_train_loss",
    "val_bpb", "min_val_bpb", "val_curve", "target_metric_name", "target_metric_threshold",
    "time_to_target_sec_measured", "peak_mem_mib", "avg_step_peak_mem_mib", "skipped_steps", "rollbacks", "fp8_layers",
    "schedule", "active_layers_mean", "active_layers_range", "speedup_predicted", "compiled_graphs", "eager_fallbacks")


class MetricsFile:
    """metrics.jsonl: one JSON object a line, every line with all columns, in the file as soon as it is written.

    A row that cannot be written (a full disk) is lost whole, is counted, and training goes on.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        """Rows from `resume_step` on are dropped: they will be written again."""
        kept = [line for line in _lines(path) if (row := _row(line)) and row["step"] < resume_step] if resume_step else []
        if is_main_rank():
            write_atomic(path, "".join(line + "\n" for line in kept))
        self.file = open(path, "ab", buffering=0) if is_main_rank() else None
        self.lost = 0  # rows

    def write(self, row: dict) -> None:
        if not self.file:
            return
        full = dict.fromkeys(ROW_COLUMNS) | row
        line = json.dumps({k: finite(v) for k, v in full.items()}).encode() + b"\n"
        whole = os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(line) != len(line):
                raise OSError("no room for a whole row")
        except OSError as e:
            if not self.lost:
                print0(f"{self.file.name} could not be written ({e.strerror or e}): training goes on, without some of its rows")
            self.lost += 1
            with suppress(OSError):
                self.file.truncate(whole)  # so that the next row begins a line of its own

    def close(self) -> None:
        if self.file and not self.file.closed:
            self.file.close()
            if self.lost:
                print0(f"{self.lost} rows of {self.file.name} are lost")


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, every one with all columns; a line that is damaged or was cut off is left out."""
    return [row for line in _lines(path) if (row := _row(line))]


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return text.split("\n")[:-1]  # what follows the last newline is empty, or was cut off


def _row(line: str) -> dict | None:
    try:
        row = json.loads(line)
        return dict.fromkeys(ROW_COLUMNS) | row if isinstance(row["step"], int) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def finite(value):
    """NaN and infinities as strings: JSON has no word for them."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Tally:
    """What result.json needs from the steps and evaluations so far; survives a resume."""

    def __init__(self, target_name: str | None = None, target_threshold: float | None = None):
        self.target_name, self.target_threshold = target_name, target_threshold
        self.ema = 0.0                # of the loss, not yet debiased
        self.smooth_loss = self.loss = self.val_bpb = self.min_val_bpb = self.time_to_target = None
        self.val_curve = []           # [step, train_time_sec, bpb]
        self.dts, self.peaks = [], []  # per step: seconds, MiB
        self.skipped_steps = []       # that were not finite
        self.rollbacks = []           # [step that was not finite, step of the checkpoint gone back to]
        self.before_target = None     # (train_time_sec, value) of the target metric when last seen above the threshold

    def add_step(self, step: int, loss: float, dt: float, peak_mib: float, train_time: float) -> None:
        self.loss = loss
        self.ema = SMOOTHING * self.ema + (1 - SMOOTHING) * loss
        self.dts.append(dt)
        self.smooth_loss = self.ema / (1 - SMOOTHING ** len(self.dts))
        self.peaks.append(peak_mib)
        self._watch_target("smooth_loss", self.smooth_loss, train_time)

    def add_evaluation(self, step: int, bpb: float, train_time: float) -> None:
        self.val_bpb = bpb
        self.min_val_bpb = bpb if self.min_val_bpb is None else min(bpb, self.min_val_bpb)
        if self.val_curve and self.val_curve[-1][0] == step:  # it was cut short after that, and is done again
            self.val_curve.pop()
        self.val_curve.append([step, train_time, bpb])
        self._watch_target("val_bpb", bpb, train_time)

    def _watch_target(self, name: str, value: float, train_time: float) -> None:
        """Note the training time of the first crossing, interpolated between the values on either side of it."""
        if name != self.target_name or self.time_to_target is not None:
            return
        if value > self.target_threshold:
            self.before_target = (train_time, value)
        elif self.before_target is None:
            self.time_to_target = train_time
        else:
            earlier, above = self.before_target
            self.time_to_target = earlier + (train_time - earlier) * (above - self.target_threshold) / (above - value)

    def summary(self, tokens_per_step: int, flops_per_token: int, peak_flops: float | None) -> dict:
        """The fields of result.json that follow from the steps. MFU only where the hardware's peak is known."""
        median = statistics.median(self.dts) if self.dts else None
        throughput = tokens_per_step / median if median else None
        return {
            "tok_per_sec_max": tokens_per_step / min(self.dts) if self.dts else None,
            "tok_per_sec_avg": tokens_per_step * len(self.dts) / sum(self.dts) if self.dts else None,
            "tok_per_sec_median": throughput,
            "dt_median_ms": median * 1000 if median else None,
            "mfu": throughput * flops_per_token / peak_flops if throughput and peak_flops else None,
            "final_loss": self.loss, "final_train_loss": self.smooth_loss,
            "val_bpb": self.val_bpb, "min_val_bpb": self.min_val_bpb, "val_curve": self.val_curve,
            "target_metric_name": self.target_name, "target_metric_threshold": self.target_threshold,
            "time_to_target_sec_measured": self.time_to_target,
            "peak_mem_mib": max(self.peaks, default=None),
            "avg_step_peak_mem_mib": statistics.fmean(self.peaks) if self.peaks else None,
            "skipped_steps": len(self.skipped_steps), "rollbacks": len(self.rollbacks),
        }

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def write_result(paths: list[Path], fields: dict) -> None:
    """Write result.json with every field of the contract, null where nothing is known."""
    result = dict.fromkeys(RESULT_FIELDS) | {"schema_version": SCHEMA_VERSION} | fields
    for path in paths:
        write_atomic(path, json.dumps({k: finite(v) for k, v in result.items()}, indent=1) + "\n")


def git_state() -> tuple[str | None, bool | None]:
    """Commit of the source tree and whether it has uncommitted changes; None where git cannot say."""
    def git(*args):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *args], capture_output=True, text=True, check=True).stdout
    try:
        return git("rev-parse", "HEAD").strip(), bool(git("status", "--porcelain").strip())
    except (OSError, subprocess.CalledProcessError):
        return None, None
