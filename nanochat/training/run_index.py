"""Runs as they lie on disk: which there are, how each stands, and what its records say. No torch.

A run is read while it trains, after a kill and by other versions, so each record may be missing or cut off: what cannot be read
is not known.
"""

import difflib
import json
import os
import statistics
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from nanochat.cli.paths import list_steps, runs_dir, step_dir
from nanochat.common import UserError
from nanochat.runtime.lock import lock_holder, lock_path
from nanochat.training import run_folder
from nanochat.training.records import number, read_metrics, read_result

RUNNING, UNFINISHED, SET_ASIDE, FOREIGN = "running", "unfinished", "set aside", "foreign"
STATUSES = {  # besides those of result.json: ok, interrupted, diverged, oom, failed
    RUNNING: "It trains now.", UNFINISHED: "Its process was killed, or could not write its result.",
    SET_ASIDE: "It was renamed by --overwrite, to make place for a run of its name.",
    FOREIGN: "The folder has files that this program does not write, such as those of the public nanochat."}
TAIL = 2**16  # bytes at the end of metrics.jsonl
LEAD = 2  # steps by which result.json may be ahead of metrics.jsonl: a step that failed has no row


class StoredRun:
    """The run in `folder`. Records are read when they are first asked for.

    is_ours: whether this process holds the run's lock, so that nobody else trains.
    """

    def __init__(self, folder: Path, is_ours: bool = False):
        self.folder, self.name, self.is_ours = folder, folder.name, is_ours

    # ---- files

    @cached_property
    def result(self) -> dict:
        """result.json of the run's last process that came to its end."""
        return read_result(self.folder / "result.json")

    @cached_property
    def checkpoints(self) -> list[int]:
        return list_steps(self.folder)

    @cached_property
    def state(self) -> dict:
        """state.json of the newest checkpoint that has one that can be read."""
        return next(filter(None, (read_result(step_dir(self.folder, step) / "state.json")
                                  for step in reversed(self.checkpoints))), {})

    @cached_property
    def flags(self) -> dict:
        """Field name of every flag -> its value: as of the last checkpoint, which may be of a resume with other flags, else as of
        the start."""
        known = part(self.state, "user_config") or read_result(self.folder / "config.json")
        return {name: value for name, value in known.items() if name != "command"}

    @cached_property
    def rows(self) -> list[dict]:
        """All rows of metrics.jsonl."""
        try:
            return read_metrics(self.folder / "metrics.jsonl")
        except OSError:
            return []

    @property
    def steps(self) -> list[dict]:
        """The rows of steps whose loss is a number."""
        return [row for row in self.rows if number(row["loss"]) is not None]

    @cached_property
    def val_curve(self) -> list[tuple[int, float, float]]:
        """(step, seconds of training, bits per byte) of each evaluation whose result is a number."""
        found = {row["step"]: (row["step"], row["train_time_sec"], row["val_bpb"]) for row in self.rows
                 if number(row["val_bpb"]) is not None and number(row["train_time_sec"]) is not None}
        return [found[step] for step in sorted(found)]

    def size(self) -> int:
        """Bytes of all files."""
        return folder_bytes(self.folder)

    @property
    def changed(self) -> float:
        """When the run last wrote a record: seconds since the epoch; 0 where it has none."""
        times = []
        for name in ("metrics.jsonl", "result.json"):
            with suppress(OSError):
                times.append((self.folder / name).stat().st_mtime)
        return max(times, default=0.0)

    # ---- how it stands

    @cached_property
    def holder(self) -> str | None:
        """Who trains now, in words; None where nobody does."""
        return None if self.is_ours else lock_holder(self.folder)

    @cached_property
    def status(self) -> str:
        """RUNNING, UNFINISHED, SET_ASIDE or FOREIGN, else the status of result.json."""
        if run_folder.foreign_files(self.folder):
            return FOREIGN
        if self.holder:
            return RUNNING
        if "~" in self.name:
            return SET_ASIDE
        done, last = self.result.get("steps_done"), last_recorded_step(self.folder)
        went_on = isinstance(done, int) and last >= 0 and not 0 <= done - 1 - last <= LEAD  # since the result was written
        was_killed = went_on or not self.is_ours and lock_path(self.folder).exists()
        return UNFINISHED if was_killed else str(self.result.get("status") or UNFINISHED)

    @property
    def has_ended(self) -> bool:
        """Whether result.json tells how the run stands now."""
        return self.status not in (RUNNING, UNFINISHED) and bool(self.result)

    @property
    def steps_done(self) -> int | None:
        if self.has_ended and isinstance(self.result.get("steps_done"), int):
            return self.result["steps_done"]
        reached = last_recorded_step(self.folder) + 1
        return reached or (self.checkpoints[-1] if self.checkpoints else None if self.status == FOREIGN else 0)

    @property
    def steps_planned(self) -> int | None:
        steps = self.result.get("num_iterations") if self.has_ended else \
            part(self.state, "result_fingerprint").get("the number of steps") or self.flags.get("num_iterations")
        return steps if isinstance(steps, int) and steps > 0 else None

    @property
    def depth(self) -> int | None:
        """Layers. result.json says it too, and is the smaller file."""
        depth = self.result.get("depth") or self.flags.get("depth")
        return depth if isinstance(depth, int) else None

    @property
    def best_bpb(self) -> float | None:
        """The lowest bits per byte of its evaluations."""
        if self.has_ended:
            return number(self.result.get("min_val_bpb"))
        return min((bpb for *_, bpb in self.val_curve), default=None)

    @property
    def tokens_per_second(self) -> float | None:
        """The median over steps."""
        if self.has_ended:
            return number(self.result.get("tok_per_sec_median"))
        rates = [row["tok_per_sec"] for row in self.steps if number(row["tok_per_sec"])]
        return statistics.median(rates) if rates else None

    @property
    def train_seconds(self) -> float | None:
        if self.has_ended:
            return number(self.result.get("train_time_sec"))
        return next((row["train_time_sec"] for row in reversed(self.rows) if number(row["train_time_sec"]) is not None), None)


def list_runs(folder: Path | None = None) -> list[StoredRun]:
    """The runs of a folder, by default base_checkpoints, by name. Those that are being deleted have a hidden name."""
    folder = folder or runs_dir()
    try:
        return [StoredRun(path) for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    except FileNotFoundError:
        return []
    except OSError as e:
        raise UserError(f"cannot read {folder}: {e.strerror}. Choose another base directory with NANOCHAT_BASE_DIR.") from None


def find_run(name: str) -> StoredRun:
    """The run of this name. UserError that names those with almost this name, or the newest."""
    runs = {run.name: run for run in list_runs()}
    if name in runs:
        return runs[name]
    if not runs:
        raise UserError(f"there is no run in {runs_dir()}. Train one first: python -m scripts.base_train --help")
    close = difflib.get_close_matches(name, runs, 3) or sorted(runs, key=lambda n: -runs[n].changed)[:10]
    raise UserError(f"no run is called {name!r} in {runs_dir()}. There {'is' if len(close) == 1 else 'are'}: {', '.join(close)}"
                    + (", ..." if len(close) < len(runs) else ""))


def part(record: dict, name: str) -> dict:
    """An object within a JSON object; {} where it is missing, or something else."""
    found = record.get(name)
    return found if isinstance(found, dict) else {}


def last_recorded_step(folder: Path) -> int:
    """The last step that has a row of its own in metrics.jsonl; -1 without one. Only the end of the file is read."""
    try:
        with open(folder / "metrics.jsonl", "rb") as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - TAIL))
            lines = f.read().split(b"\n")[:-1]
    except OSError:
        return -1
    for line in reversed(lines):
        with suppress(ValueError, KeyError, TypeError):  # the part of a row with which the end begins
            row = json.loads(line)
            if row["step_kind"] is not None and isinstance(row["step"], int):  # no evaluation
                return row["step"]
    return -1


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; links are not followed."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # deleted meanwhile
                total += os.lstat(os.path.join(path, name)).st_size
    return total
