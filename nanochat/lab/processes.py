"""Processes of base_train: their command lines, how far one has come, and how they end with the program that started them."""

import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path


def training_command(flags: list[str], processes: int = 1) -> list[str]:
    """The command that runs base_train with these flags, with torchrun's launcher where it takes several processes."""
    launcher = ["-m", "nanochat.runtime.launch", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, "-m", "scripts.base_train", *flags]


def last_step(run_dir: Path) -> int:
    """The step of the last whole line of a run's metrics.jsonl; -1 where there is none.

    Only the end of the file is read, as this is called often while the run trains.
    """
    try:
        with open(run_dir / "metrics.jsonl", "rb") as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - 4096))
            return json.loads(f.read().split(b"\n")[-2])["step"]
    except (OSError, ValueError, LookupError):
        return -1


@contextmanager
def sigterm_as_interrupt():
    """Raise KeyboardInterrupt on SIGTERM, so that both signals end a program in the same way."""
    def interrupt(signum, frame):
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def signals_wait():
    """Hold back SIGINT and SIGTERM until the end of the block: one that comes while `subprocess.Popen` starts a program would
    leave that program behind, as nobody has got hold of it."""
    came: list[int] = []
    caught = [signum for signum in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(signum))]
    before = {signum: signal.signal(signum, lambda signum, frame: came.append(signum)) for signum in caught}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if came:
        raise KeyboardInterrupt
