"""A folder of cells: one cell is one variant with one seed: one run of base_train, one row.

    DIR/runs.csv                   every run, however it ended
    DIR/cells/ID/row.json          the cell's row, with log.txt, result.json and metrics.jsonl beside it
    DIR/cells/ID.claim             exists while a worker trains the cell

The same command continues where it was stopped: a finished cell is never run again, an interrupted one resumes from its
checkpoint. A failed one stays failed unless it is to be retried. Workers on several machines that share DIR take turns by claims.
"""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from nanochat.cli.paths import child_environment, list_steps, step_dir
from nanochat.common import ROOT, Progress, UserError, format_duration, print0
from nanochat.lab.claim import Claim, hold_claim
from nanochat.lab.plan import horizon_of
from nanochat.lab.processes import last_step, sigterm_as_interrupt, training_command
from nanochat.lab.rows import config_of, make_row, read_result, write_csv
from nanochat.runtime.files import write_atomic
from nanochat.runtime.provenance import git_state
from nanochat.tokenizer import FILE_NAME, get_tokenizer

POLL_SECONDS = 1.0        # between checks of a run, each of which is also a heartbeat
SHUTDOWN_SECONDS = 120.0  # that a run which was asked to stop has to write its checkpoint


@dataclass(frozen=True)
class Cell:
    """A variant's name, a seed, and base_train's flags for it, without --seed."""
    variant: str
    seed: int
    flags: tuple[str, ...]
    kill: bool = False  # kill the run (SIGKILL) once it has a checkpoint, then resume it

    @property
    def id(self) -> str:
        digest = hashlib.sha256(json.dumps([self.variant, self.seed, self.flags]).encode()).hexdigest()[:8]
        return f"{self.variant}-s{self.seed}-{digest}"


class Folder:
    """An experiment's folder.

    base_dir: the NANOCHAT_BASE_DIR of its runs. processes: how many a run takes, one per GPU. show_output: print the output of
    the runs instead of writing it to log.txt.

    Raises: UserError where the folder cannot be written.
    """

    def __init__(self, path: Path, name: str, base_dir: Path, retry_failed: bool = False, keep_checkpoints: bool = False,
                 processes: int = 1, show_output: bool = False):
        self.path, self.name, self.base_dir = path, name, base_dir
        self.keep_checkpoints, self.processes, self.show_output = keep_checkpoints, processes, show_output
        self.data_is_ready = self.commits_compared = False
        try:
            (path / "cells").mkdir(parents=True, exist_ok=True)
            base_dir.mkdir(parents=True, exist_ok=True)
            with hold_claim(path / ".folder.claim"):
                if not (path / "folder-id").exists():
                    write_atomic(path / "folder-id", uuid.uuid4().hex[:8])
        except OSError as e:
            raise UserError(f"cannot write to {path} or {base_dir}: {e.strerror}. Choose another --out") from None
        self.id = (path / "folder-id").read_text()
        if retry_failed:
            for row in (path / "cells").glob("*/row.json"):
                if read_result(row).get("status") not in ("ok", "interrupted"):
                    row.unlink()

    def cell_dir(self, cell: Cell) -> Path:
        return self.path / "cells" / cell.id

    def run_dir(self, cell: Cell) -> Path:
        return self.base_dir / "base_checkpoints" / self.tag(cell)

    def tag(self, cell: Cell) -> str:
        return f"lab-{self.id}-{cell.id}"

    def vocab_size(self) -> int:
        """The size of the vocabulary of this folder's runs."""
        return get_tokenizer(self.base_dir / "tokenizer").get_vocab_size()

    def row(self, cell: Cell) -> dict | None:
        """The row of a finished cell."""
        row = read_result(self.cell_dir(cell) / "row.json")
        return row if row and row["status"] != "interrupted" else None

    def run(self, cells: list[Cell]) -> list[dict]:
        """Run the cells that are not finished, here or by other workers; return the rows of all, in their order."""
        for cell in cells:
            config_of(cell.flags)  # wrong flags are an error before anything is started
        waiting = [c for c in dict.fromkeys(cells) if not self.row(c)]
        started, done, total = time.monotonic(), 0, len(waiting)
        self.note_other_commits(cells)
        if waiting:
            self.prepare_data(cells[0])
        while waiting := [c for c in waiting if not self.row(c)]:
            for cell in waiting:
                if row := self._run_cell(cell):
                    done += 1
                    left = len([c for c in waiting if not self.row(c)])
                    eta = left * (time.monotonic() - started) / done
                    print0(f"[{total - left}/{total}] {describe(row)} | eta {format_duration(eta)}")
                    break
            else:
                time.sleep(POLL_SECONDS)  # other workers train the rest
        write_csv(self.path)
        return [row for cell in cells if (row := self.row(cell))]

    def note_other_commits(self, cells: list[Cell]) -> None:
        """Print a note, once, where finished cells were run with another commit: they are not run again."""
        here = git_state()[0]
        others = {row["git_commit"] for cell in cells if (row := self.row(cell))} - {here, None}
        if here and others and not self.commits_compared:
            self.commits_compared = True
            print0(f"note: cells in {self.path} were run at commit {', '.join(sorted(c[:9] for c in others))}, here is "
                   f"{here[:9]}; another --out runs all of them again")

    def _run_cell(self, cell: Cell) -> dict | None:
        """Run the cell, unless another worker holds it or has finished it."""
        claim = Claim.take(self.path / "cells" / f"{cell.id}.claim")
        if not claim:
            return None
        try:
            return None if self.row(cell) else self._train(cell, claim)
        finally:
            claim.release()

    def _train(self, cell: Cell, claim: Claim) -> dict | None:
        folder = self.cell_dir(cell)
        folder.mkdir(exist_ok=True)
        flags, killed, code = [*cell.flags, f"--seed={cell.seed}"], None, None
        try:
            if cell.kill:
                killed = self.train_and_kill(cell, flags, claim.heartbeat)
            resume = ["--resume-from-step=latest"] if list_steps(self.run_dir(cell)) else []
            code = self.train(cell, [*flags, *resume], claim.heartbeat)
        finally:
            if claim.heartbeat():  # else another worker has taken the cell over
                result = read_result(folder / "result.json")
                row = make_row(self.name, cell.variant, cell.seed, cell.id, flags, result, -1 if code is None else code)
                row |= {"killed_at": killed, "flags": cell.flags} | ({"status": "interrupted"} if code is None else {})
                write_atomic(folder / "row.json", json.dumps(row))
                write_csv(self.path)
        self.collect(cell, keep_checkpoints=self.keep_checkpoints or row["status"] != "ok")
        return row

    def train(self, cell: Cell, flags: list[str], heartbeat: Callable[[], bool] = lambda: True) -> int:
        """Run base_train and return its exit status.

        Raises: KeyboardInterrupt once the run, which is sent SIGTERM, has ended; UserError where another worker took the cell.
        """
        folder = self.cell_dir(cell)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").unlink(missing_ok=True)
        with self.output(cell) as log, sigterm_as_interrupt():
            process = self.start_training(cell, [*flags, f"--result-json={folder / 'result.json'}"], log)
            steps = horizon_of(config_of(flags)).num_iterations
            progress = Progress(f"{cell.variant} seed {cell.seed}", steps, " steps", plain_every=30.0)
            progress.enabled = not self.show_output
            try:
                while True:
                    try:
                        return process.wait(POLL_SECONDS)
                    except subprocess.TimeoutExpired:
                        if not heartbeat():
                            raise UserError(f"{cell.id} was taken over by another worker") from None
                    progress.update(max(0, last_step(self.run_dir(cell))) - progress.done)
            except BaseException:
                process.terminate()  # a second signal, after a terminal's Ctrl-C: base_train takes the two for one request
                try:
                    process.wait(SHUTDOWN_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                raise
            finally:
                progress.clear()

    def train_and_kill(self, cell: Cell, flags: list[str], heartbeat: Callable[[], bool]) -> str | None:
        """Train until there is a checkpoint, then kill the run; the name of that checkpoint, None where the run ended first."""
        shutil.rmtree(self.run_dir(cell), ignore_errors=True)
        with self.output(cell) as log, sigterm_as_interrupt():
            process = self.start_training(cell, flags, log)
            try:
                while process.poll() is None and not (found := list_steps(self.run_dir(cell))):
                    time.sleep(0.01)
                    heartbeat()
                pid: int | None = process.pid
                if self.processes > 1:  # torchrun ends with its first rank; if it were killed itself, its ranks would live on
                    pid = read_result(self.run_dir(cell).with_name(f".{self.tag(cell)}.lock")).get("pid")
                if process.poll() is not None or not pid:
                    return None
                os.kill(pid, signal.SIGKILL)
                return step_dir(self.run_dir(cell), found[-1]).name
            finally:
                (process.kill if self.processes == 1 else process.terminate)()
                process.wait()

    def output(self, cell: Cell):
        """Where the cell's run writes its output, as a context manager."""
        return nullcontext(sys.stdout.buffer) if self.show_output else open(self.cell_dir(cell) / "log.txt", "ab")

    def start_training(self, cell: Cell, flags: list[str], log) -> subprocess.Popen:
        return self.start(training_command([*flags, f"--model-tag={self.tag(cell)}"], self.processes), log)

    def start(self, command: list[str], log) -> subprocess.Popen:
        """Start a program, whose command line is the first line of its output."""
        log.write(f"+ {shlex.join(command)}\n".encode())
        log.flush()
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                env=child_environment(self.base_dir))

    def prepare_data(self, cell: Cell) -> None:
        """Make the tokenizer and the tokens of the runs, once, by one worker.

        Raises: UserError where that fails.
        """
        if self.data_is_ready:
            return
        data = config_of(cell.flags).data
        source = [f"--data={data.data}", f"--text-column={data.text_column}", f"--max-chars={data.max_chars}",
                  *(["--skip-bad"] if data.skip_bad else [])]
        steps = [("nanochat.dataset", source + ([f"--val-data={data.val_data}"] if data.val_data else []))]
        tokenizer = self.base_dir / "tokenizer" / FILE_NAME
        if not tokenizer.exists():
            steps.insert(0, ("scripts.tok_train", [*source, f"--vocab-size={data.vocab_size}"]))
        with hold_claim(self.base_dir / ".lab.claim", poll=0.5) as claim, open(self.path / "prepare.txt", "ab") as log:
            for module, flags in steps:
                if module == "scripts.tok_train" and tokenizer.exists():
                    continue  # another worker was first
                with sigterm_as_interrupt():
                    process = self.start([sys.executable, "-m", module, *flags], log)
                    try:
                        while process.poll() is None:
                            claim.heartbeat()
                            time.sleep(0.1)
                    finally:
                        process.kill()
                if process.returncode:
                    raise UserError(f"the text could not be prepared; the error is at the end of {log.name}")
        self.data_is_ready = True

    def collect(self, cell: Cell, keep_checkpoints: bool) -> None:
        """Copy the run's metrics into the cell; delete its checkpoints unless they are to be kept."""
        run_dir = self.run_dir(cell)
        if (run_dir / "metrics.jsonl").exists():
            shutil.copy(run_dir / "metrics.jsonl", self.cell_dir(cell))
        if not keep_checkpoints:
            shutil.rmtree(run_dir, ignore_errors=True)


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
