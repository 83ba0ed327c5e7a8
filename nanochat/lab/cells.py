"""A folder of cells: one cell is one variant with one seed: one run of base_train, one row.

    DIR/runs.csv                   every run, however it ended
    DIR/cells/ID/row.json          the cell's row, with log.txt, result.json and metrics.jsonl beside it
    DIR/cells/ID/row.json~1        the row of an attempt that failed, before the cell was run again
    DIR/cells/ID.claim             exists while a worker trains or evaluates the cell

A cell is trained, then its final checkpoint is evaluated by the lab itself (evaluation.py). The same command continues where it
was stopped: a finished cell is never run again, an interrupted one resumes from its checkpoint, one that was only trained is
evaluated. A failed one stays failed unless it is to be retried. Workers on several machines that share DIR take turns by claims.

Cells that several experiments need, such as the baseline's, are run in a store that these share, and copied into the folder of
each.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from nanochat.cli.paths import list_steps
from nanochat.common import ROOT, UserError, format_duration, get_base_dir, print0
from nanochat.data.sources import source_identity
from nanochat.lab.claim import Claim, hold_claim
from nanochat.lab.evaluation import evaluate_runs
from nanochat.lab.processes import sigterm_as_interrupt
from nanochat.lab.rows import config_of, make_row, number, read_result, read_row, write_csv
from nanochat.lab.training_run import TrainingRun, start_program
from nanochat.lab.workers import is_worker
from nanochat.runtime.files import set_aside, write_atomic
from nanochat.runtime.provenance import fingerprint_of, git_state, source_fingerprint
from nanochat.tokenizer import FILE_NAME, get_tokenizer

POLL_SECONDS = 1.0      # between looks at what other workers have done
EVALUATE_AFTER = 120.0  # seconds of training, after which what is trained is evaluated: Python's start is little beside them
RECORDS = ("result.json", "metrics.jsonl", "log.txt")
ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "NANOCHAT_DTYPE")  # of it, what a run depends on


@dataclass(frozen=True)
class Cell:
    """A variant's name, a seed, and base_train's flags for it, without --seed."""
    variant: str
    seed: int
    flags: tuple[str, ...]
    kill: bool = False    # kill the run (SIGKILL) once it has a checkpoint, then resume it
    shared: bool = False  # take the row of another experiment that has run the same, and let others take this one

    @property
    def id(self) -> str:
        return f"{self.variant}-s{self.seed}-{digest([self.variant, self.seed, self.flags])[:8]}"


class Folder:
    """An experiment's folder.

    base_dir: the NANOCHAT_BASE_DIR of its runs. processes: how many a run takes, one per GPU. show_output: print the output of
    the runs instead of writing it to log.txt. With keep_checkpoints or show_output no cell is shared. judged: the runs are to
    be compared, so they are audited (--audit), and their final checkpoints are evaluated by the lab; a row without that is not
    enough.

    Raises: UserError where the folder cannot be written.
    """

    def __init__(self, path: Path, name: str, base_dir: Path, retry_failed: bool = False, keep_checkpoints: bool = False,
                 processes: int = 1, show_output: bool = False, judged: bool = True):
        self.path, self.name, self.base_dir = path, name, base_dir
        self.keep_checkpoints, self.processes, self.show_output, self.judged = keep_checkpoints, processes, show_output, judged
        self.data_is_ready = self.sources_compared = False
        self.text: dict = {}  # what identifies the text of runs that are judged, once it is ready
        self.store: Store | None = None
        self.trained: set[str] = set()    # ids of cells, by this object
        self.evaluated: set[str] = set()  # also in vain
        try:
            (path / "cells").mkdir(parents=True, exist_ok=True)
            base_dir.mkdir(parents=True, exist_ok=True)
            with hold_claim(path / ".folder.claim"):
                if not (path / "folder-id").exists():
                    write_atomic(path / "folder-id", uuid.uuid4().hex[:8])
        except OSError as e:
            raise UserError(f"cannot write to {path} or {base_dir}: {e.strerror}. Choose another --out") from None
        self.id = (path / "folder-id").read_text()
        self.trained_for = self.id  # the folder of the experiment that has the runs made
        if retry_failed:
            for row in (path / "cells").glob("*/row.json"):
                self._retry(row)

    def _retry(self, path: Path) -> None:
        """Let a cell be run again that failed, or be evaluated again whose evaluation failed."""
        row = read_row(path)
        with suppress(FileNotFoundError):  # another worker was faster
            if row.get("status") not in ("ok", "interrupted"):
                set_aside(path)
            elif row["lab_val_error"] and list_steps(self.runs_dir() / f"lab-{self.id}-{row['cell']}"):
                write_atomic(path, json.dumps(row | {"lab_val_error": None}))
            elif row["lab_val_error"]:  # the store may still have the checkpoint
                path.unlink()

    def runs_dir(self) -> Path:
        return self.base_dir / "base_checkpoints"

    def cell_dir(self, cell: Cell) -> Path:
        return self.path / "cells" / cell.id

    def run_dir(self, cell: Cell) -> Path:
        return self.runs_dir() / self.tag(cell)

    def tag(self, cell: Cell) -> str:
        return f"lab-{self.id}-{cell.id}"

    def take_claim(self, cell: Cell) -> Claim | None:
        return Claim.take(self.path / "cells" / f"{cell.id}.claim")

    def vocab_size(self) -> int:
        """The size of the vocabulary of this folder's runs."""
        return get_tokenizer(self.base_dir / "tokenizer").get_vocab_size()

    def row(self, cell: Cell) -> dict | None:
        """The row of a finished cell."""
        row = read_row(self.cell_dir(cell) / "row.json")
        if not row or row["status"] == "interrupted":
            return None
        enough = row.get("judged", True) or row["status"] != "ok" or not self.judged
        return row if enough else None

    def write_row(self, cell: Cell, row: dict) -> None:
        write_atomic(self.cell_dir(cell) / "row.json", json.dumps(row))

    # --- what is asked of rows -----------------------------------------------------------------------------------------

    @staticmethod
    def cost(rows: Iterable[dict]) -> dict:
        """What these rows have cost: {"runs": made for this experiment, "shared": taken from the store, "seconds": that the lab
        waited for the runs made for it, their evaluations included}."""
        rows = list(rows)
        own = [row for row in rows if not row.get("shared_from")]
        seconds = sum(number(row.get(field)) or 0.0 for row in own for field in ("lab_time_sec", "lab_val_time_sec"))
        return {"runs": len(own), "shared": len(rows) - len(own), "seconds": seconds}

    def other_seeds(self, cells: list[Cell]) -> dict[str, list[int]]:
        """Seeds that were run here for the same candidate and are not among `cells`: variant's name -> seeds, where there are
        any. A choice among seeds would show here."""
        asked = {(cell.variant, cell.flags): {c.seed for c in cells if (c.variant, c.flags) == (cell.variant, cell.flags)}
                 for cell in cells}
        found: dict[str, set[int]] = {}
        for row in map(read_row, (self.path / "cells").glob("*/row.json")):
            if row and row["status"] != "interrupted" and \
                    row["seed"] not in asked.get((row["variant"], tuple(row.get("flags", ()))), {row["seed"]}):
                found.setdefault(row["variant"], set()).add(row["seed"])
        return {variant: sorted(seeds) for variant, seeds in found.items()}

    # --- running cells -------------------------------------------------------------------------------------------------

    def run(self, cells: list[Cell]) -> list[dict]:
        """Run and evaluate the cells that are not finished, here or by other workers; return the rows of all, in their order."""
        for cell in cells:
            config_of(cell.flags)  # wrong flags are an error before anything is started
        self.note_other_sources(cells)
        if any(not self.row(cell) for cell in cells):
            self.prepare_data(cells[0])
        started, done, unevaluated = time.monotonic(), 0, 0.0  # the last: seconds of training
        total = len(self._left(cells, "train"))
        while tasks := {cell: task for cell in dict.fromkeys(cells) if (task := self._task(cell))}:
            begun = time.monotonic()
            if ready := self._left(tasks, "adopt"):
                for cell in ready:
                    self._adopt(cell, self.home(cell))
            elif unevaluated < EVALUATE_AFTER and (row := self._run_first(self._left(tasks, "train"))):
                done, unevaluated = done + 1, unevaluated + time.monotonic() - begun
                left = len(self._left(tasks, "train"))
                eta = left * (time.monotonic() - started) / done
                print0(f"[{total - left}/{total}] {describe(row)} | eta {format_duration(eta)}")
            elif self._evaluate(self._left(tasks, "evaluate")) or unevaluated:
                unevaluated = 0.0
            else:
                time.sleep(POLL_SECONDS)  # other workers do the rest
        write_csv(self.path)
        return [row for cell in cells if (row := self.row(cell))]

    def home(self, cell: Cell) -> "Folder":
        """Where a cell is run, and its row lies until this folder has one: here, or in the store."""
        if not cell.shared or not self.judged or self.keep_checkpoints or self.show_output or self.row(cell):
            return self
        self.store = self.store or Store(self)
        return self.store

    def has(self, cell: Cell) -> bool:
        """Whether the cell need not be run."""
        return self.row(cell) is not None

    def _task(self, cell: Cell) -> str | None:
        """What is to be done for a cell: train, evaluate, or adopt its row from the store; None where it is finished."""
        home = self.home(cell)
        if not home.has(cell):
            return "train"
        return "evaluate" if home.can_be_evaluated(cell) else "adopt" if home is not self else None

    def _left(self, cells: Iterable[Cell], task: str) -> list[Cell]:
        return [cell for cell in dict.fromkeys(cells) if self._task(cell) == task]

    def note_other_sources(self, cells: list[Cell]) -> None:
        """Print a note, once, where finished cells were run with another source: they are not run again."""
        here, commit = source_fingerprint(), git_state()[0]
        rows = [row for cell in cells if (row := self.row(cell))]
        others = {row["git_commit"] or "none" for row in rows if (
            row["source_fingerprint"] != here if row["source_fingerprint"] else row["git_commit"] not in (commit, None))}
        if others and not self.sources_compared:
            self.sources_compared = True
            commits = ", ".join(sorted(c[:9] for c in others))
            print0(f"note: cells in {self.path} were run with another source (commit {commits}); another --out runs all of them "
                   "again")

    def _run_first(self, cells: list[Cell]) -> dict | None:
        """Run the first of these cells that no other worker holds or has finished; its row, None where there is none."""
        return next((row for cell in cells if (row := self._run_cell(cell))), None)

    def _run_cell(self, cell: Cell) -> dict | None:
        home = self.home(cell)
        claim = home.take_claim(cell)
        if not claim:
            return None
        try:
            if self._task(cell) != "train":
                return None
            home.prepare_cell(cell)
            row = home.train_cell(cell, claim)
            if home is not self and row["status"] not in ("ok", "interrupted"):
                self._adopt(cell, home)  # at once: no other experiment takes it
            return row
        finally:
            claim.release()

    def prepare_cell(self, cell: Cell) -> None:
        """Called before a cell is run, while its claim is held."""

    def train_cell(self, cell: Cell, claim: Claim) -> dict:
        """Train a cell and write its row, which is returned. Of a run that succeeded only the final weights are left, to be
        evaluated, unless checkpoints are to be kept."""
        folder, started = self.cell_dir(cell), time.monotonic()
        folder.mkdir(exist_ok=True)
        before = read_row(folder / "row.json").get("lab_time_sec") or 0.0  # of a run that was interrupted
        run = TrainingRun(f"{cell.variant} seed {cell.seed}", folder, self.run_dir(cell), self.base_dir, self.processes,
                          self.show_output)
        flags, killed, code = [*cell.flags, f"--seed={cell.seed}", *(["--audit"] if self.judged else [])], None, None
        try:
            if cell.kill:
                killed = run.train_and_kill(flags, claim.heartbeat)
            code = run.train(flags, claim.heartbeat)
        finally:
            result = read_result(folder / "result.json")
            row = make_row(self.name, cell.variant, cell.seed, cell.id, flags, result, -1 if code is None else code,
                           folder / "log.txt")
            row |= {"killed_at": killed, "flags": cell.flags, "trained_for": self.trained_for, "judged": self.judged,
                    "failures_before": self.failures(cell), "lab_time_sec": before + time.monotonic() - started}
            row |= {"status": "interrupted"} if code is None else {}
            if claim.heartbeat():  # else another worker has taken the cell over
                with suppress(FileNotFoundError):
                    shutil.copy(run.run_dir / "metrics.jsonl", folder)
                self.write_row(cell, row)
                self.trained.add(cell.id)
        if row["status"] == "ok" and not self.keep_checkpoints:
            run.keep_final_weights() if self.judged else shutil.rmtree(run.run_dir, ignore_errors=True)
        return row

    def failures(self, cell: Cell) -> int:
        """How often the cell has failed before."""
        return len(list(self.cell_dir(cell).glob("row.json~*")))

    # --- evaluating them -----------------------------------------------------------------------------------------------

    retries_evaluations = False  # of cells whose evaluation has failed, once per object

    def can_be_evaluated(self, cell: Cell) -> bool:
        """Whether a cell has been trained and not evaluated, although its checkpoint is there."""
        row = self.row(cell)
        return bool(self.judged and row and row["status"] == "ok" and row["lab_val_bpb"] is None and cell.id not in self.evaluated
                    and (self.retries_evaluations or not row["lab_val_error"]) and list_steps(self.run_dir(cell)))

    def _evaluate(self, cells: list[Cell]) -> bool:
        """Evaluate those of these cells that no other worker holds. Returns whether there are any."""
        claims = {cell: claim for cell in cells if (claim := self.home(cell).take_claim(cell))}
        try:
            by_flags: dict[tuple[str, ...], dict[Path, Cell]] = {}
            for cell in self._left(claims, "evaluate"):
                config = config_of(cell.flags)
                flags = (*text_flags(config.data), *validation_flags(config.data), f"--device-type={config.run.device_type}")
                by_flags.setdefault(flags, {})[self.home(cell).run_dir(cell)] = cell
            for flags, by_run in by_flags.items():
                print0(f"evaluating {len(by_run)} checkpoint{'s' * (len(by_run) > 1)} on all validation tokens")
                evaluate_runs(by_run, flags, self.base_dir, self.path / "evaluation.txt",
                              record=partial(self._record, by_run), heartbeat=lambda: [c.heartbeat() for c in claims.values()])
            return bool(by_flags)
        finally:
            for claim in claims.values():
                claim.release()

    def _record(self, by_run: dict[Path, Cell], answer: dict) -> None:
        """Write the lab's evaluation of a cell into its row, and delete its checkpoint, unless that is to be kept or is needed to
        try again."""
        cell = by_run[Path(answer["run_dir"])]
        home = self.home(cell)
        row = home.row(cell)
        assert row, f"{cell.id} was evaluated before it was trained"
        error = answer.get("error")
        if not error and answer["step"] != row["steps_done"]:
            error, answer = f"the last checkpoint is of step {answer['step']}, and the run took {row['steps_done']}", {}
        fields = {"lab_val_bpb": "bpb", "lab_val_tokens": "tokens", "lab_own_bpb": "own_bpb", "weights_sha256": "weights_sha256",
                  "validation_fingerprint": "validation_fingerprint", "lab_val_time_sec": "seconds"}
        row |= {field: answer.get(name) for field, name in fields.items()} | {"lab_val_error": error}
        home.evaluated.add(cell.id)
        home.write_row(cell, row)
        write_csv(home.path)
        found = f"{answer['bpb']:.6f} bpb on {answer['tokens']:,} tokens" if not error else error.splitlines()[0]
        print0(f"evaluated {cell.variant} seed {cell.seed}: {found}")
        if not error and not self.keep_checkpoints:
            shutil.rmtree(home.run_dir(cell), ignore_errors=True)

    def _adopt(self, cell: Cell, home: "Folder") -> None:
        """Copy a cell that was run in the store into this folder."""
        row, own, there = home.row(cell), self.cell_dir(cell), home.cell_dir(cell)
        assert row, f"{cell.id} is not in {home.path}"
        own.mkdir(exist_ok=True)
        for name in RECORDS:
            with suppress(FileNotFoundError):
                shutil.copy(there / name, own)
        shared_from = None if row["trained_for"] == self.id else str(home.path)
        self.write_row(cell, row | {"experiment_name": f"{self.name}/{cell.variant}", "shared_from": shared_from,
                                    "failures_before": max(row["failures_before"], self.failures(cell))})
        write_csv(self.path)
        if shared_from:
            print0(f"{cell.variant} seed {cell.seed}: taken from {home.path}, where {row['experiment_name']} has run it")

    def prepare_data(self, cell: Cell) -> None:
        """Make the tokenizer and the tokens of the runs, once, by one worker.

        Raises: UserError where that fails.
        """
        if self.data_is_ready:
            return
        data = config_of(cell.flags).data
        source = text_flags(data)
        steps = [("nanochat.dataset", [*source, *validation_flags(data)])]
        tokenizer = self.base_dir / "tokenizer" / FILE_NAME
        if not tokenizer.exists():
            steps.insert(0, ("scripts.tok_train", [*source, f"--vocab-size={data.vocab_size}"]))
        with hold_claim(self.base_dir / ".lab.claim", poll=0.5) as claim, open(self.path / "prepare.txt", "ab") as log:
            for module, flags in steps:
                if module == "scripts.tok_train" and tokenizer.exists():
                    continue  # another worker was first
                with sigterm_as_interrupt():
                    process = start_program([sys.executable, "-m", module, *flags], self.base_dir, log)
                    try:
                        while process.poll() is None:
                            claim.heartbeat()
                            time.sleep(0.1)
                    finally:
                        process.kill()
                if process.returncode:
                    raise UserError(f"the text could not be prepared; the error is at the end of {log.name}")
        if self.judged:
            self.text = {"flags": steps[-1][1], "tokenizer": get_tokenizer(self.base_dir / "tokenizer").fingerprint(),
                         "sources": digest([source_identity(source) for source in (data.data, data.val_data) if source])}
        self.data_is_ready = True


class Store(Folder):
    """Cells that experiments share, in $NANOCHAT_BASE_DIR/lab/shared/. There is one for all that must be the same so that a run
    comes out the same: source, machine, text, base directory. A run that failed is not taken from it."""

    retries_evaluations = True

    def __init__(self, experiment: Folder):
        """The store of an experiment, whose data are ready."""
        self.source = source_fingerprint()
        environment = {name: os.environ.get(name) for name in ENVIRONMENT}
        if is_worker():  # which has a GPU of its own; those of a machine are taken for equal
            environment["CUDA_VISIBLE_DEVICES"] = None
        conditions = {
            "source": self.source, "torch": version("torch"), "python": platform.python_version(), "host": platform.node(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "processes": experiment.processes, "base_dir": str(experiment.base_dir), "text": experiment.text,
            "environment": environment}
        super().__init__(get_base_dir() / "lab" / "shared" / digest(conditions)[:12], experiment.name, experiment.base_dir,
                         processes=experiment.processes)
        self.trained_for = experiment.id
        write_atomic(self.path / "conditions.json", json.dumps(conditions, indent=1) + "\n")

    def has(self, cell: Cell) -> bool:
        """Whether there is a row that can be taken: of a run of this source that succeeded, and is or can be evaluated."""
        row = self.row(cell)
        return bool(row and row["status"] == "ok" and row["source_fingerprint"] == self.source and (
            row["lab_val_bpb"] is not None or cell.id in self.trained or list_steps(self.run_dir(cell))))

    def prepare_cell(self, cell: Cell) -> None:
        """Make way for a run.

        Raises: UserError where it would not be of the source of this store.
        """
        if fingerprint_of(ROOT) != self.source:
            raise UserError("nanochat/ or scripts/ has changed since this experiment was started, so its runs would not be "
                            "comparable: start it again")
        row = self.row(cell)
        if row and row["status"] == "ok":
            (self.cell_dir(cell) / "row.json").unlink()
            shutil.rmtree(self.run_dir(cell), ignore_errors=True)
        elif row:
            set_aside(self.cell_dir(cell) / "row.json")


def digest(value) -> str:
    """SHA-256 (hex) of what JSON can express."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def text_flags(data) -> list[str]:
    """Flags of the text, of programs that prepare or read it. `data`: base_train's DataFlags."""
    return [f"--data={data.data}", f"--text-column={data.text_column}", f"--max-chars={data.max_chars}",
            *(["--skip-bad"] if data.skip_bad else [])]


def validation_flags(data) -> list[str]:
    return [f"--val-data={data.val_data}"] if data.val_data else []


def describe(row: dict) -> str:
    """A row in one line of progress."""
    parts = [f"{row['variant']} seed {row['seed']}: {row['status']}"]
    if row["status"] != "ok":
        parts.append(str(row["error"]).split("\n")[0][:90])
    if row["val_bpb"] is not None:
        parts.append(f"{row['val_bpb']:.6f} bpb" if isinstance(row["val_bpb"], float) else f"{row['val_bpb']} bpb")
    if row["train_time_sec"] is not None:
        parts.append(f"{row['train_time_sec']:.1f} s of training")
    return " | ".join(parts)
