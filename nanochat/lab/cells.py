"""A folder of cells: one cell is one variant with one seed, one process of base_train, one row.

    DIR/runs.csv                   every run, whatever its end
    DIR/cells/ID/row.json          the cell's row; log.txt, result.json and metrics.jsonl beside it
    DIR/cells/ID.claim             there while a worker trains it

The same command goes on where it was left: a finished cell is never run again, an interrupted one goes on from its checkpoint.
A failed one stays failed unless it is to be tried again. Several workers, on machines that share DIR, take turns by claims.
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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from nanochat.cli.paths import child_environment, list_steps, step_dir
from nanochat.common import ROOT, Progress, UserError, format_duration, print0
from nanochat.lab.claim import Claim, held
from nanochat.lab.plan import horizon_of
from nanochat.lab.rows import config_of, make_row, read_result, write_csv
from nanochat.runtime.files import write_atomic
from nanochat.runtime.provenance import git_state
from nanochat.tokenizer import FILE_NAME, get_tokenizer

POLL = 1.0         # seconds between looks at a run, each a sign of life to the other workers
PATIENCE = 120.0   # seconds that a run which was told to stop has for its checkpoint


@dataclass(frozen=True)
class Cell:
    """A variant's name, a seed, and base_train's flags for it (without --seed)."""
    variant: str
    seed: int
    flags: tuple[str, ...]
    kill: bool = False  # kill the process (SIGKILL) once it has a checkpoint, then resume from that

    @property
    def id(self) -> str:
        digest = hashlib.sha256(json.dumps([self.variant, self.seed, self.flags]).encode()).hexdigest()[:8]
        return f"{self.variant}-s{self.seed}-{digest}"


class Folder:
    """An experiment's folder. `home`: the NANOCHAT_BASE_DIR of its runs. `processes`: of a run, one per GPU.

    `show_output`: what a run prints is for whoever waits, and not kept in its log.txt.
    """

    def __init__(self, path: Path, name: str, home: Path, retry_failed: bool = False, keep_checkpoints: bool = False,
                 processes: int = 1, show_output: bool = False):
        self.path, self.name, self.home = path, name, home
        self.keep_checkpoints, self.processes, self.show_output = keep_checkpoints, processes, show_output
        self.prepared = self.noted = False
        try:
            (path / "cells").mkdir(parents=True, exist_ok=True)
            home.mkdir(parents=True, exist_ok=True)
            with held(path / ".folder.claim"):
                if not (path / "folder-id").exists():
                    write_atomic(path / "folder-id", uuid.uuid4().hex[:8])
        except OSError as e:
            raise UserError(f"cannot write to {path} or {home}: {e.strerror}. Choose another --out") from None
        self.id = (path / "folder-id").read_text()
        if retry_failed:
            for row in (path / "cells").glob("*/row.json"):
                if read_result(row).get("status") not in ("ok", "interrupted"):
                    row.unlink()

    def cell_dir(self, cell: Cell) -> Path:
        return self.path / "cells" / cell.id

    def run_dir(self, cell: Cell) -> Path:
        return self.home / "base_checkpoints" / self.tag(cell)

    def tag(self, cell: Cell) -> str:
        return f"lab-{self.id}-{cell.id}"

    def vocab_size(self) -> int:
        """Of the tokenizer of this folder's runs."""
        return get_tokenizer(self.home / "tokenizer").get_vocab_size()

    def row(self, cell: Cell) -> dict | None:
        """The row of a finished cell."""
        row = read_result(self.cell_dir(cell) / "row.json")
        return row if row and row["status"] != "interrupted" else None

    def run(self, cells: list[Cell]) -> list[dict]:
        """Their rows, in their order; those not finished yet are run first, by this worker or by others."""
        for cell in cells:
            config_of(cell.flags)
        waiting = [c for c in dict.fromkeys(cells) if not self.row(c)]
        started, done, total = time.monotonic(), 0, len(waiting)
        self.note_other_commits(cells)
        if waiting:
            self.prepare(cells[0])
        while waiting := [c for c in waiting if not self.row(c)]:
            for cell in waiting:
                if row := self._take(cell):
                    done += 1
                    left = len([c for c in waiting if not self.row(c)])
                    eta = left * (time.monotonic() - started) / done
                    print0(f"[{total - left}/{total}] {describe(row)} | eta {format_duration(eta)}")
                    break
            else:
                time.sleep(POLL)  # the rest is with other workers
        write_csv(self.path)
        return [row for cell in cells if (row := self.row(cell))]

    def note_other_commits(self, cells: list[Cell]) -> None:
        """Say so where finished cells are of other code than what is here now: they are not run again."""
        here = git_state()[0]
        others = {row["git_commit"] for cell in cells if (row := self.row(cell))} - {here, None}
        if here and others and not self.noted:
            self.noted = True
            print0(f"note: cells in {self.path} were run at commit {', '.join(sorted(c[:9] for c in others))}, here is "
                   f"{here[:9]}; another --out runs all of them anew")

    def _take(self, cell: Cell) -> dict | None:
        """Run the cell, unless another worker has it or has done it."""
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
                killed = self.kill_midway(cell, flags, claim.beat)
            resume = ["--resume-from-step=latest"] if list_steps(self.run_dir(cell)) else []
            code = self.launch(cell, [*flags, *resume], claim.beat)
        finally:
            if claim.beat():  # else another worker has it now
                result = read_result(folder / "result.json")
                row = make_row(self.name, cell.variant, cell.seed, cell.id, flags, result, -1 if code is None else code)
                row |= {"killed_at": killed, "flags": cell.flags} | ({"status": "interrupted"} if code is None else {})
                write_atomic(folder / "row.json", json.dumps(row))
                write_csv(self.path)
        self.tidy(cell, keep=row["status"] != "ok")
        return row

    def launch(self, cell: Cell, flags: list[str], beat: Callable[[], bool] = lambda: True) -> int:
        """Run base_train to its end; its exit status. KeyboardInterrupt goes on to it, and is raised when it has ended."""
        folder, argv = self.cell_dir(cell), [*flags, f"--model-tag={self.tag(cell)}"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").unlink(missing_ok=True)
        with self.output(cell) as log, ended_like_ctrl_c():
            process = self.start("scripts.base_train", [*argv, f"--result-json={folder / 'result.json'}"], log)
            steps = horizon_of(config_of(flags)).num_iterations
            progress = Progress(f"{cell.variant} seed {cell.seed}", steps, " steps", plain_every=30.0)
            progress.enabled = not self.show_output
            try:
                while True:
                    try:
                        return process.wait(POLL)
                    except subprocess.TimeoutExpired:
                        if not beat():
                            raise UserError(f"{cell.id} was taken over by another worker") from None
                    progress.update(steps_taken(self.run_dir(cell)) - progress.done)
            except BaseException:
                process.terminate()  # right after a terminal's Ctrl-C it is the same wish
                try:
                    process.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                raise
            finally:
                progress.clear()

    def kill_midway(self, cell: Cell, flags: list[str], beat: Callable[[], bool]) -> str | None:
        """Train until there is a checkpoint, kill, and name that checkpoint; None where the run was over before."""
        shutil.rmtree(self.run_dir(cell), ignore_errors=True)
        with self.output(cell) as log, ended_like_ctrl_c():
            process = self.start("scripts.base_train", [*flags, f"--model-tag={self.tag(cell)}"], log)
            try:
                while process.poll() is None and not (found := list_steps(self.run_dir(cell))):
                    time.sleep(0.01)
                    beat()
                victim: int | None = process.pid
                if self.processes > 1:  # torchrun ends with its first rank; killed itself, it would leave the ranks behind
                    victim = read_result(self.run_dir(cell).with_name(f".{self.tag(cell)}.lock")).get("pid")
                if process.poll() is not None or not victim:
                    return None
                os.kill(victim, signal.SIGKILL)
                return step_dir(self.run_dir(cell), found[-1]).name
            finally:
                (process.kill if self.processes == 1 else process.terminate)()
                process.wait()

    def output(self, cell: Cell):
        return nullcontext(sys.stdout.buffer) if self.show_output else open(self.cell_dir(cell) / "log.txt", "ab")

    def start(self, module: str, argv: list[str], log) -> subprocess.Popen:
        command = [sys.executable, "-m", module, *argv]
        if module == "scripts.base_train" and self.processes > 1:
            command[1:1] = ["-m", "nanochat.runtime.launch", "--standalone", f"--nproc_per_node={self.processes}"]
        log.write(f"+ {shlex.join(command)}\n".encode())
        log.flush()
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                env=child_environment(self.home))

    def prepare(self, cell: Cell) -> None:
        """Tokenizer and tokens of the runs, made once, by one worker."""
        if self.prepared:
            return
        data = config_of(cell.flags).data
        reading = [f"--data={data.data}", f"--text-column={data.text_column}", f"--max-chars={data.max_chars}",
                   *(["--skip-bad"] if data.skip_bad else [])]
        steps = [("nanochat.dataset", reading + ([f"--val-data={data.val_data}"] if data.val_data else []))]
        tokenizer = self.home / "tokenizer" / FILE_NAME
        if not tokenizer.exists():
            steps.insert(0, ("scripts.tok_train", [*reading, f"--vocab-size={data.vocab_size}"]))
        with held(self.home / ".lab.claim", poll=0.5) as claim, open(self.path / "prepare.txt", "ab") as log:
            for module, argv in steps:
                if module == "scripts.tok_train" and tokenizer.exists():
                    continue  # another worker was first
                with ended_like_ctrl_c():
                    process = self.start(module, argv, log)
                    try:
                        while process.poll() is None:
                            claim.beat()
                            time.sleep(0.1)
                    finally:
                        process.kill()
                if process.returncode:
                    raise UserError(f"the text could not be prepared; what went wrong is at the end of {log.name}")
        self.prepared = True

    def tidy(self, cell: Cell, keep: bool) -> None:
        """Keep the metrics, let the checkpoints go."""
        run_dir = self.run_dir(cell)
        if (run_dir / "metrics.jsonl").exists():
            shutil.copy(run_dir / "metrics.jsonl", self.cell_dir(cell))
        if not keep and not self.keep_checkpoints:
            shutil.rmtree(run_dir, ignore_errors=True)


def steps_taken(run_dir: Path) -> int:
    """How many a run has taken so far, by the last whole line of its metrics.jsonl."""
    try:
        with open(run_dir / "metrics.jsonl", "rb") as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - 4096))
            return json.loads(f.read().split(b"\n")[-2])["step"]
    except (OSError, ValueError, LookupError):
        return 0


@contextmanager
def ended_like_ctrl_c():
    """SIGTERM as KeyboardInterrupt, so that being ended leaves what Ctrl-C leaves."""
    def interrupt(signum, frame):
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def describe(row: dict) -> str:
    """A row in one line, for whoever waits."""
    parts = [f"{row['variant']} seed {row['seed']}: {row['status']}"]
    if row["status"] != "ok":
        parts.append(str(row["error"]).split("\n")[0][:90])
    if row["val_bpb"] is not None:
        parts.append(f"{row['val_bpb']:.6f} bpb" if isinstance(row["val_bpb"], float) else f"{row['val_bpb']} bpb")
    if row["train_time_sec"] is not None:
        parts.append(f"{row['train_time_sec']:.1f} s of training")
    return " | ".join(parts)
