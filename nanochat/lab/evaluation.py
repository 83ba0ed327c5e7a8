"""What is measured is the lab's: the final checkpoint of every run is evaluated by a program of the lab, not by the run.

That is nanochat/training/checkpoint_evaluation.py, in a process (evaluation_process.py) that loads torch once for all of them.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import Empty, Queue

from nanochat.cli.paths import child_environment
from nanochat.common import ROOT
from nanochat.lab.processes import sigterm_as_interrupt

COMMAND = [sys.executable, "-m", "nanochat.lab.evaluation_process"]
POLL_SECONDS = 1.0
WRONG_START = 2  # exit status of a program that could not begin: text or device cannot be used


def evaluate_runs(run_dirs: Iterable[Path], flags: Iterable[str], base_dir: Path, log: Path, record: Callable[[dict], None],
                  heartbeat: Callable[[], object]) -> None:
    """Evaluate the last checkpoint of each run, and call `record` with each answer as soon as it is there: one for every run, as
    nanochat/training/checkpoint_evaluation.py describes it, with "error" where there is no result, and the "seconds" it took.

    flags: the text and the device, as flags of that program. base_dir: its NANOCHAT_BASE_DIR. log: for what it prints.
    heartbeat: called about once a second. Where the process is killed, for want of memory say, another goes on with the next run.
    Raises: KeyboardInterrupt on Ctrl-C and SIGTERM, after the process has ended.
    """
    left, since = [str(run_dir) for run_dir in run_dirs], time.monotonic()

    def answered(answer: dict) -> None:
        nonlocal since
        seconds, since = time.monotonic() - since, time.monotonic()
        left.remove(answer["run_dir"])
        record(answer | {"seconds": seconds})
    while left:
        status = _evaluate(left, flags, base_dir, log, answered, heartbeat)
        for run_dir in left[:] if status == WRONG_START else left[:1]:
            answered({"run_dir": run_dir, "error": f"its evaluation ended with exit status {status}: see the end of {log}"})


def _evaluate(run_dirs: list[str], flags: Iterable[str], base_dir: Path, log: Path, answered: Callable[[dict], None],
              heartbeat: Callable[[], object]) -> int:
    """Evaluate in one process; its exit status."""
    with tempfile.TemporaryFile("w+") as folders, open(log, "ab") as output, sigterm_as_interrupt():
        json.dump(run_dirs, folders)
        folders.seek(0)
        process = subprocess.Popen([*COMMAND, *flags], cwd=ROOT, stdin=folders, stdout=subprocess.PIPE, stderr=output, text=True,
                                   env=child_environment(base_dir))
        lines: Queue[str | None] = Queue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        try:
            while True:
                try:
                    line = lines.get(timeout=POLL_SECONDS)
                except Empty:
                    heartbeat()
                    continue
                if line is None:
                    return process.wait()
                answered(json.loads(line))
        finally:
            process.kill()
            process.wait()


def _read(stream, lines: Queue) -> None:
    """Pass on the lines of a stream, and None at its end."""
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)
