"""The two files in which a run is recorded, metrics.jsonl and result.json: their columns, writing and reading. No torch."""

import json
import math
import os
from contextlib import suppress
from pathlib import Path

from nanochat.common import is_main_rank, print0
from nanochat.runtime.files import read_json, write_atomic

SCHEMA_VERSION = 1
ROW_COLUMNS = ("step", "loss", "smooth_loss", "lr_multiplier", "dt_ms", "tok_per_sec", "peak_mem_mib", "step_kind",
               "active_start", "active_layers", "tokens_seen", "train_time_sec", "val_bpb", "grad_norm", "batch_crc32")
RESULT_FIELDS = (
    "schema_version", "status", "exit_code", "error", "last_checkpoint", "command", "argv", "git_commit", "git_dirty",
    "source_fingerprint", "seed", "host", "device", "dtype", "torch_version", "text_fingerprint", "depth", "model_dim",
    "num_params", "flops_per_token", "num_iterations", "steps_done", "tokens_seen", "wall_time_sec", "loop_time_sec",
    "train_time_sec", "compile_time_sec", "eval_time_sec", "save_time_sec", "unnamed_time_sec", "other_load",
    "tok_per_sec_max", "tok_per_sec_avg", "tok_per_sec_median", "dt_median_ms", "mfu", "final_loss", "final_train_loss",
    "val_bpb", "min_val_bpb", "val_curve", "target_metric_name", "target_metric_threshold",
    "time_to_target_sec_measured", "peak_mem_mib", "avg_step_peak_mem_mib", "skipped_steps", "rollbacks", "fp8_layers",
    "schedule", "active_layers_mean", "active_layers_range", "speedup_predicted", "compiled_graphs", "graph_breaks",
    "eager_fallbacks", "kernel_choices", "audit", "plan")


class MetricsFile:
    """metrics.jsonl: one JSON object a line, every line with all columns, in the file as soon as it is written.

    A row that cannot be written (a full disk) is lost whole, is counted, and training goes on.
    """

    def __init__(self, path: Path, resume_step: int = 0):
        """Rows from `resume_step` on are dropped: they will be written again."""
        self.path = path
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


def number(value) -> float | None:
    """`value` if it is a finite number, else None: what `finite` wrote as a string, and null where nothing is known."""
    return value if isinstance(value, (int, float)) and abs(value) < math.inf else None


def read_result(path: Path) -> dict:
    """Read a result.json, or another JSON object; {} where there is none or it cannot be read."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def write_result(paths: list[Path], fields: dict) -> None:
    """Write result.json with every field of the contract, null where nothing is known."""
    result = dict.fromkeys(RESULT_FIELDS) | {"schema_version": SCHEMA_VERSION} | fields
    for path in paths:
        write_atomic(path, json.dumps({k: finite(v) for k, v in result.items()}, indent=1) + "\n")
