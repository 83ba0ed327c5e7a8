"""Runs in processes of their own that start at once: forked by a server that has imported torch already."""

import multiprocessing
import os
import sys
from pathlib import Path

from nanochat.cli.output import tolerant_streams
from nanochat.features import FEATURES
from nanochat.training.build import Run
from nanochat.training.config import parse_config
from nanochat.training.loop import run_to_the_end

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["nanochat.training.loop"])


def anew(flags) -> list[str]:
    """The flags of a run that may take a name again, in tests that do not care what was trained under it."""
    return [*flags, *([] if any("--resume-from-step" in flag for flag in flags) else ["--overwrite"])]


class Served:
    """A run, its output in the file `log`; with what the proof of resuming asks of a process.

    before: what to do with the run between its making and its training, a function of a test module.
    """

    def __init__(self, argv, base, log, before=None, output=None):
        self.log = Path(log)
        self.process = SERVER.Process(target=_train, args=(argv, base, log, before, output))
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=300):
        """The exit status."""
        self.process.join(timeout)
        self.returncode = self.process.exitcode
        return self.returncode


def _train(argv, base, log, before, output):
    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    errors = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(output, os.O_WRONLY) if output else errors, 1)
    os.dup2(errors, 2)
    tolerant_streams()  # as every script does
    run = Run(parse_config(FEATURES, argv))
    if before:
        before(run)
    sys.exit(run_to_the_end(run))
