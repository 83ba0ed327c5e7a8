"""Tiny runs, in this process or in one of their own that starts at once: forked by a server that has imported torch already."""

import multiprocessing
import os
import sys
from dataclasses import replace
from pathlib import Path

from nanochat.cli.output import tolerant_streams
from nanochat.features import FEATURES
from nanochat.training.build import build_run
from nanochat.training.config import parse_config
from nanochat.training.loop import fit

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["nanochat.training.loop"])


def anew(flags) -> list[str]:
    """The flags of a run that may take a name again, in tests that do not care what was trained under it."""
    return [*flags, *([] if any("--resume-from-step" in flag for flag in flags) else ["--overwrite"])]


def tiny_flags(base, tag, *extra) -> list[str]:
    """The flags of a run of two layers on the text of the fixture `base`. `extra` come last, so they count."""
    return (f"--depth=2 --head-dim=16 --aspect-ratio=16 --max-seq-len=32 --device-batch-size=2 --total-batch-size=128 "
            f"--warmup-steps=2 --eval-every=3 --eval-tokens=256 --core-metric-every=-1 --sample-every=-1 --vocab-size=300 "
            f"--device-type=cpu --no-compile --data={base / 'text'} --model-tag={tag}").split() + list(extra)


def trained(run):
    """The run, trained to its end without trouble."""
    assert fit(run) == 0
    return run


def compile_with(run, forward) -> None:
    """Let a run that was built with --no-compile train through this compiled model."""
    run.trainer.plan, run.trainer.forward = replace(run.plan, compile=True), forward


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
    run = build_run(parse_config(FEATURES, argv))
    if before:
        before(run)
    sys.exit(fit(run))
