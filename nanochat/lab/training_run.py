"""The run of base_train that belongs to a cell: started, watched, stopped with its worker; killed, where resuming is tested."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from nanochat.checkpoint_names import optimizer_files
from nanochat.cli.paths import child_environment, list_steps, step_dir
from nanochat.common import ROOT, Progress, UserError
from nanochat.lab.plan import horizon_of
from nanochat.lab.processes import last_step, signals_wait, sigterm_as_interrupt, training_command
from nanochat.lab.rows import config_of, read_result

POLL_SECONDS = 1.0        # between checks of a run, each of which is also a heartbeat
SHUTDOWN_SECONDS = 120.0  # that a run which was asked to stop has to write its checkpoint


@dataclass(frozen=True)
class TrainingRun:
    """A run of base_train.

    name: of the progress bar. folder: for log.txt and result.json. run_dir: its folder in base_checkpoints of base_dir.
    processes: one per GPU. show_output: print its output instead of writing it to log.txt.
    """
    name: str
    folder: Path
    run_dir: Path
    base_dir: Path
    processes: int = 1
    show_output: bool = False

    def train(self, flags: list[str], heartbeat: Callable[[], bool] = lambda: True) -> int:
        """Run it to its end, from its last checkpoint on if it has one, and return the exit status.

        Raises: KeyboardInterrupt once the run, which is sent SIGTERM, has ended; UserError where another worker took the cell.
        """
        (self.folder / "result.json").unlink(missing_ok=True)
        resume = ["--resume-from-step=latest"] if list_steps(self.run_dir) else []
        with self.output() as log, sigterm_as_interrupt():
            steps = horizon_of(config_of(flags)).num_iterations
            progress = Progress(self.name, steps, " steps", plain_every=30.0)
            progress.enabled = not self.show_output
            process = None
            try:
                with signals_wait():
                    process = self.start([*flags, *resume, f"--result-json={self.folder / 'result.json'}"], log)
                while True:
                    try:
                        return process.wait(POLL_SECONDS)
                    except subprocess.TimeoutExpired:
                        if not heartbeat():
                            raise UserError(f"{self.folder.name} was taken over by another worker") from None
                    progress.update(max(0, last_step(self.run_dir)) - progress.done)
            except BaseException:
                if process is None:
                    raise
                process.terminate()  # a second signal, after a terminal's Ctrl-C: base_train takes the two for one request
                try:
                    process.wait(SHUTDOWN_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                raise
            finally:
                progress.clear()

    def train_and_kill(self, flags: list[str], heartbeat: Callable[[], bool]) -> str | None:
        """Start it anew and kill it once there is a checkpoint; the name of that checkpoint, None where the run ended first."""
        shutil.rmtree(self.run_dir, ignore_errors=True)
        with self.output() as log, sigterm_as_interrupt():
            process = None
            try:
                with signals_wait():
                    process = self.start(flags, log)
                while process.poll() is None and not (found := list_steps(self.run_dir)):
                    time.sleep(0.01)
                    heartbeat()
                pid: int | None = process.pid
                if self.processes > 1:  # torchrun ends with its first rank; if it were killed itself, its ranks would live on
                    pid = read_result(self.run_dir.with_name(f".{self.run_dir.name}.lock")).get("pid")
                if process.poll() is not None or not pid:
                    return None
                os.kill(pid, signal.SIGKILL)
                return step_dir(self.run_dir, found[-1]).name
            finally:
                if process:
                    (process.kill if self.processes == 1 else process.terminate)()
                    process.wait()

    def output(self):
        """Where the run writes its output, as a context manager."""
        return nullcontext(sys.stdout.buffer) if self.show_output else open(self.folder / "log.txt", "ab")

    def start(self, flags: list[str], log) -> subprocess.Popen:
        return start_program(training_command([*flags, f"--model-tag={self.run_dir.name}"], self.processes), self.base_dir, log)

    def keep_final_weights(self) -> None:
        """Delete what an evaluation of the last checkpoint does not need: the others, and the optimizer's state."""
        for step in list_steps(self.run_dir)[:-1]:
            shutil.rmtree(step_dir(self.run_dir, step), ignore_errors=True)
        for step in list_steps(self.run_dir):
            for path in optimizer_files(step_dir(self.run_dir, step)):  # two thirds of a checkpoint's bytes
                path.unlink()


def start_program(command: list[str], base_dir: Path, log) -> subprocess.Popen:
    """Start a program with this NANOCHAT_BASE_DIR; its command line is the first line of its output."""
    log.write(f"+ {shlex.join(command)}\n".encode())
    log.flush()
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                            env=child_environment(base_dir))
