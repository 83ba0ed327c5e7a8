"""One row per run: the columns that docs/lab.md ("Records") requires, in that order, then further ones.

`runs.csv` is rewritten from the rows that the cells keep (`cells/*/row.json`) while its claim is held, and replaced atomically.
So several writers lose no row, a reader never sees half a line, and a cell that is run again replaces its row.
"""

import csv
import io
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from nanochat.cli.flags import flag_name
from nanochat.cli.launch_environment import USER_ERROR
from nanochat.common import UserError, format_table
from nanochat.features import FEATURES
from nanochat.lab.claim import hold_claim
from nanochat.runtime.files import write_atomic
from nanochat.training.config import parse_config
from nanochat.training.records import number as number, read_result  # other modules of the lab take both from here

SCHEMA_VERSION = 1
REQUIRED_COLUMNS = (
    "timestamp", "git_commit", "experiment_name", "seed", "depth", "max_seq_len", "device_batch_size", "total_batch_size",
    "target_param_data_ratio", "warmdown_ratio", "warmdown_shape", "target_metric_name", "target_metric_threshold",
    "time_to_target_sec_measured", "time_to_target_sec_extrapolated", "extrapolation_method", "tok_per_sec_median",
    "dt_median_ms", "wall_time_sec", "final_train_loss", "min_val_bpb", "peak_mem_mib", "status")
FROM_RESULT = (
    "exit_code", "error", "git_dirty", "host", "device", "dtype", "torch_version", "text_fingerprint", "model_dim", "num_params",
    "flops_per_token", "num_iterations", "steps_done", "tokens_seen", "train_time_sec", "compile_time_sec", "eval_time_sec",
    "tok_per_sec_avg", "mfu", "final_loss", "val_bpb", "skipped_steps", "rollbacks", "eager_fallbacks")
SOURCE_AND_TIMES = ("source_fingerprint", "loop_time_sec", "save_time_sec", "unnamed_time_sec", "other_load")
# What the lab itself has found out about a run, whatever its result.json says
BY_THE_LAB = ("lab_val_bpb", "lab_val_tokens", "lab_own_bpb", "weights_sha256", "validation_fingerprint", "failures_before",
              "shared_from", "lab_val_error", "lab_val_time_sec", "lab_time_sec")
MORE_COLUMNS = ("schema_version", "variant", "cell", *FROM_RESULT, "time_to_target_sec_low", "time_to_target_sec_high",
                "killed_at", "worker", "command", *SOURCE_AND_TIMES, *BY_THE_LAB)
COLUMNS = REQUIRED_COLUMNS + MORE_COLUMNS


def config_of(flags: Sequence[str]):
    """Parse base_train's `flags` into its Config.

    Raises: UserError for wrong flags.
    """
    return parse_config(FEATURES, list(flags))


def make_row(experiment: str, variant: str, seed: int, cell: str, flags: list[str], result: dict, exit_code: int,
             log: Path | None = None) -> dict:
    """Make the row of a run, with `val_curve` and `audit`, which are no columns. Without a result.json the status is `failed`,
    and the error names the exit status, and what the run's log says was wrong with its command line."""
    config = config_of(flags)
    steps = result.get("steps_done")
    said = last_error(log) if log and exit_code == USER_ERROR else ""
    row = dict.fromkeys(COLUMNS) | {
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), "experiment_name": f"{experiment}/{variant}",
        "seed": seed, "depth": config.model.depth, "max_seq_len": config.model.max_seq_len,
        "device_batch_size": config.horizon.device_batch_size,
        "total_batch_size": result["tokens_seen"] // steps if steps else max(config.horizon.total_batch_size, 0) or None,
        "target_param_data_ratio": config.horizon.target_param_data_ratio, "warmdown_ratio": config.optim.warmdown_ratio,
        "warmdown_shape": config.optim.warmdown_shape, "target_metric_name": config.eval.target_metric_name,
        "target_metric_threshold": config.eval.target_metric_threshold,
        "status": "failed", "exit_code": exit_code, "error": said or f"exit status {exit_code}, no result.json",
        "schema_version": SCHEMA_VERSION, "variant": variant, "cell": cell, "worker": f"{platform.node()}:{os.getpid()}",
    }
    row |= {name: result[name] for name in (*REQUIRED_COLUMNS, *FROM_RESULT, *SOURCE_AND_TIMES, "command")
            if name in result and name not in ("timestamp", "experiment_name", "seed", "depth", "total_batch_size")}
    return row | {"val_curve": result.get("val_curve") or [], "audit": result.get("audit")}


def last_error(log: Path) -> str:
    """The message of the last line `error: MESSAGE` of a run's log, else ""."""
    with suppress(OSError):
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.startswith("error: ")]
        return said[-1].removeprefix("error: ") if said else ""
    return ""


def read_row(path: Path) -> dict:
    """Read a row.json; {} where there is none or it cannot be read. Columns that are newer than the row are None."""
    row = read_result(path)
    return row and dict.fromkeys(COLUMNS) | row


def read_rows(folder: Path) -> list[dict]:
    """The rows of all cells of an experiment's folder, oldest first."""
    rows = [row for path in (folder / "cells").glob("*/row.json") if (row := read_row(path))]
    return sorted(rows, key=lambda row: row["timestamp"])


def run_fields(folder: Path, row: dict) -> dict:
    """All fields of a run: its row, the rest of its result.json, and its flags. Of these only switches and those that were given:
    the default of another flag may mean nothing while its switch is off."""
    given = {word.split("=")[0] for word in row["flags"]}
    flags = {name: value for name, value in config_of(row["flags"]).flat().items()
             if isinstance(value, bool) or flag_name(name) in given}
    result = read_result(folder / "cells" / row["cell"] / "result.json")
    return flags | {name: value for known in (result, row) for name, value in known.items() if value is not None}


def table_of(columns: str, runs: list[dict]) -> str:
    """Format runs as a table. Columns, separated by spaces, are "name", "name=field", or either with ":format" for numbers."""
    parsed = {}  # name -> (field, format)
    for column in columns.split():
        name, _, form = column.partition(":")
        name, _, field = name.partition("=")
        parsed[name] = (field or name, form)

    def cell(value, form):
        return format(value, form) if form and isinstance(value, (int, float)) else value
    return format_table([{name: cell(run.get(field), form) for name, (field, form) in parsed.items()} for run in runs])


def csv_text(rows: list[dict], columns: Sequence[str]) -> str:
    """CSV with a header; other fields of the rows are ignored."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_csv(folder: Path) -> None:
    """Write the folder's runs.csv from its cells."""
    with hold_claim(folder / ".csv.claim"):
        write_atomic(folder / "runs.csv", csv_text(read_rows(folder), COLUMNS))


def read_csv(path: Path) -> list[dict]:
    """Read a runs.csv; its values are strings.

    Raises: UserError where it cannot be read, or has another schema version.
    """
    try:
        with open(path, newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    if any(row.get("schema_version") != str(SCHEMA_VERSION) for row in rows):
        raise UserError(f"{path} has another schema version than {SCHEMA_VERSION}: write it again with `lab report`")
    return rows
