"""Several workers for one command of the lab: one per GPU, or per group of CPU cores, or jobs of SLURM.

Every worker runs the same command on the same folder; claims (claim.py) see to it that no cell is run twice. The first worker is
the process that the user has started: it shows its output, and it alone records the verdict. The output of the others is in
workers/ in the folder. On several machines that share a disk the command is started on each, with the same --out.
"""

import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nanochat.cli.flags import flag
from nanochat.cli.paths import child_environment
from nanochat.common import ROOT, UserError, print0

WORKER = "NANOCHAT_LAB_WORKER"  # its number, from 0 on; unset where a command has one worker
SHUTDOWN_SECONDS = 150.0        # that a worker which was asked to stop has: its run writes a checkpoint


@dataclass
class WorkerFlags:
    """Workers"""
    gpus: list[int] = flag([], "run cells side by side, one on each of these GPUs (--nproc-per-node=2: on each pair)", low=0)
    workers: int = flag(1, "run this many cells side by side, each on its share of the CPU cores; with --submit, in this many "
                           "jobs", low=1)
    submit: str | None = flag(None, "submit the workers as jobs, by submitit, and end; local: as processes of this machine",
                              choices=("slurm", "local"))
    submit_options: list[str] = flag([], "of the jobs, such as partition=gpu gpus_per_node=1 timeout_min=600",
                                     metavar="NAME=VALUE", requires={"submit": "slurm"})

    def validate(self):
        problems = [f"--submit-options takes NAME=VALUE, got {text!r}" for text in self.submit_options if "=" not in text]
        if self.gpus and self.workers > 1:
            problems.append("give --gpus or --workers, not both: there is a worker for each GPU")
        if len(set(self.gpus)) < len(self.gpus):
            problems.append("--gpus has a GPU twice")
        if self.gpus and self.submit:
            problems.append("give --gpus or --submit, not both: a job sees the GPUs that --submit-options ask for")
        return problems


@dataclass(frozen=True)
class Place:
    """Where a worker's runs are computed. cores: None leaves them alone."""
    environment: dict[str, str]
    cores: frozenset[int] | None = None


def places(flags: WorkerFlags, processes: int = 1) -> list[Place]:
    """A place for each worker. processes: of a run, one per GPU. Raises: UserError where GPUs or cores do not suffice."""
    if flags.gpus:
        if len(flags.gpus) % processes:
            raise UserError(f"--gpus names {len(flags.gpus)} GPUs, which are no whole number of runs of {processes} "
                            "(--nproc-per-node)")
        groups = [flags.gpus[i:i + processes] for i in range(0, len(flags.gpus), processes)]
        return [Place({"CUDA_VISIBLE_DEVICES": ",".join(map(str, group))}) for group in groups]
    if flags.workers == 1:
        return [Place({})]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    share = len(cores) // flags.workers
    if not share:
        raise UserError(f"--workers {flags.workers}: cores that this program may use: {len(cores)}; each worker needs one")
    threads = {"OMP_NUM_THREADS": str(max(1, share // processes))}
    return [Place(threads, frozenset(cores[i * share:(i + 1) * share])) for i in range(flags.workers)]


def is_worker() -> bool:
    """Whether this process is one of several workers."""
    return WORKER in os.environ


def is_assistant() -> bool:
    """Whether this process is a worker that another one has started, which shows the verdict and records it."""
    return os.environ.get(WORKER, "0") != "0"


@contextmanager
def assistants(flags: WorkerFlags, argv: list[str], folder: Path, processes: int = 1):
    """Start the other workers of a command, and take the first one's place; inside, this process works. They end with it.

    argv: the command line of the lab.
    """
    if is_worker():  # this is one of them
        yield
        return
    first, *others = places(flags, processes)
    if not others:
        os.environ.update(first.environment)
        yield
        return
    (folder / "workers").mkdir(parents=True, exist_ok=True)
    started = []
    try:
        for number, place in enumerate(others, 1):
            with open(folder / "workers" / f"{number}.txt", "ab") as log:
                started.append(subprocess.Popen(
                    worker_command(argv, folder), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                    env=child_environment() | place.environment | {WORKER: str(number)}))
            if place.cores:
                os.sched_setaffinity(started[-1].pid, place.cores)  # before it starts a thread: Python is still being loaded
        os.environ.update(first.environment | {WORKER: "0"})
        if first.cores:
            os.sched_setaffinity(0, first.cores)
        print0(f"{len(others) + 1} workers; the output of the others: {folder / 'workers'}")
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            try:
                process.wait(SHUTDOWN_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def worker_command(argv: list[str], folder: Path) -> list[str]:
    return [sys.executable, "-m", "scripts.lab", *argv, f"--out={folder}"]


def submit(flags: WorkerFlags, argv: list[str], folder: Path) -> int:
    """Submit the workers as jobs; the exit status. Raises: UserError without submitit, or where it refuses."""
    try:
        import submitit
    except ImportError:
        raise UserError("--submit needs submitit: pip install -e '.[slurm]'") from None
    options = {name: int(value) if value.isdigit() else value
               for name, value in (text.split("=", 1) for text in flags.submit_options)}
    logs = folder / "workers"
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster=flags.submit)
        executor.update_parameters(**({"timeout_min": 24 * 60} | options))
        jobs = [executor.submit(submitit.helpers.CommandFunction(
            worker_command(argv, folder), cwd=str(ROOT), env=child_environment() | {WORKER: str(number)}))
            for number in range(flags.workers)]
    except (RuntimeError, ValueError, TypeError, NameError) as e:
        raise UserError(f"submitit: {e}") from None
    print0(f"submitted: {', '.join(job.job_id for job in jobs)}; output: {logs}; the verdict comes to {folder}")
    return 0
