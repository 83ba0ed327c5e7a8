"""Tiny runs, in this process or in one of their own that starts at once, and other programs: forked by a server that has imported
torch already, which takes a program seconds."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from nanochat.cli.launch_environment import PeerLost
from nanochat.cli.output import tolerant_streams
from nanochat.features import FEATURES
from nanochat.training.build import build_run
from nanochat.training.config import parse_config
from nanochat.training.loop import fit

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["preloaded"])
ROOT = Path(__file__).parents[1]


def started(target, *arguments):
    """A process that calls target(*arguments). The first one starts the server, which finds preloaded.py in this folder."""
    process = SERVER.Process(target=target, args=arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        process.start()
    return process


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


def train_and_exit(run) -> None:
    """Train, and end this process with the exit status of the program, also where another rank is lost."""
    try:
        sys.exit(fit(run))
    except PeerLost as e:
        sys.exit(e.status)


def compile_with(run, forward) -> None:
    """Let a run that was built with --no-compile train through this compiled model."""
    run.trainer.plan, run.trainer.forward = replace(run.plan, compile=True), forward


class Served:
    """A run, its output in the file `log`; with what the proof of resuming asks of a process.

    before: what to do with the run between its making and its training, a function of a test module.
    """

    def __init__(self, argv, base, log, before=None, output=None):
        self.log = Path(log)
        self.process = started(_train, argv, base, log, before, output)
        self.pid, self.kill = self.process.pid, self.process.kill

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=300):
        """The exit status."""
        self.process.join(timeout)
        self.returncode = self.process.exitcode
        return self.returncode


def python_m(module, *words, stdin="", cwd=ROOT, timeout=300, **environment) -> subprocess.CompletedProcess:
    """`python -m module words...` to its end, with what it has printed. `environment` comes on top of this process's own.

    For programs that load torch: any other starts as fast by itself. What is read when Python, torch or OpenMP is loaded
    (PYTHONPATH, PYTHONIOENCODING, OMP_NUM_THREADS) has no effect here.
    """
    return _program(["-m", module, *map(str, words)], stdin, cwd, timeout, environment)


def python_c(code, *words, stdin="", cwd=ROOT, timeout=300, **environment) -> subprocess.CompletedProcess:
    """`python -c code words...`, as python_m."""
    return _program(["-c", code, *map(str, words)], stdin, cwd, timeout, environment)


def _program(words, stdin, cwd, timeout, environment):
    argv = [sys.executable, *words]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        files[0].write_text(stdin)
        process = started(_run, words, str(cwd), os.environ | environment, files)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(argv, timeout, *(file.read_text() for file in files[1:]))
        return subprocess.CompletedProcess(argv, process.exitcode, *(file.read_text() for file in files[1:]))


def _run(words, cwd, environment, files):
    for number, file in enumerate(files):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY), number)
    sys.stdin = open(0, closefd=False)  # a process that is made by multiprocessing has none
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    _hide_pictures()
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})


def _hide_pictures():
    """As conftest.py does in the process of the tests."""
    for name in ("matplotlib", "matplotlib.figure"):
        sys.modules[name] = None


def _train(argv, base, log, before, output):
    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    errors = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(output, os.O_WRONLY) if output else errors, 1)
    os.dup2(errors, 2)
    _hide_pictures()
    tolerant_streams()  # as every script does
    run = build_run(parse_config(FEATURES, argv))
    if before:
        before(run)
    sys.exit(fit(run))
