"""Seconds per step of a candidate against the baseline's, measured apart from quality.

A job is one fresh process of base_train for each side. The two take stretches of steps in turn (nanochat/runtime/turns.py): while
one works the other waits, and a machine that slows down slows both. Two stretches are a round: baseline, candidate; then
candidate, baseline; and so on. The lab's clock runs from asking for a stretch to its answer, so whatever a run does for its steps
counts, under whatever name. Evaluations, samples and checkpoints are left out, and rounds in which something was compiled.

What the jobs say together is clock.py's. The unit of the error is the job: two processes of one program differ a little for as
long as they live (where their memory lies, what their kernels' first timings chose), which more rounds do not average out.

    DIR/timing/NAME-jobN-SIDE.txt      output of a side's run
    DIR/timing/NAME-DIGEST-jobN.json   rounds of a finished job, which is not run again by the same source on the same machine

Limits: one process a side; the device has to hold both runs at once, and --auto-batch would find less memory for the second; the
load of a GPU's other users is not seen. What --dyn-require-stable waits for comes when it comes in the shorter run.
"""

import hashlib
import json
import math
import os
import platform
import select
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nanochat.cli.flags import flag_name
from nanochat.cli.paths import child_environment
from nanochat.common import ROOT, print0
from nanochat.lab.claim import hold_claim
from nanochat.lab.clock import SIDES, Clock, Job, NoiseCard, Round, clock_of, log_ratio
from nanochat.lab.plan import horizon_of, interleaved, read_profile, steps_of
from nanochat.lab.processes import sigterm_as_interrupt, training_command
from nanochat.lab.rows import config_of, read_result
from nanochat.recipe.depth_growth import grows
from nanochat.recipe.suffix_policy import freeze_start, recovery_share
from nanochat.runtime.files import write_atomic
from nanochat.runtime.other_load import SPOILT, OtherLoad
from nanochat.runtime.provenance import source_fingerprint
from nanochat.runtime.turns import VARIABLE

SIDE_SECONDS = 15.0       # of a side in a job; less where a whole run takes less, more where ROUNDS take more
ROUNDS = 20               # of a job, at least
STRETCH_SECONDS = 0.25    # of a stretch, at least: asking and answering take 0.1 ms of it, and clock ticks of 10 ms show the load
DEFERRED_STRETCH = 5      # steps of a stretch, at least, where losses are read a step late: only its end waits for the device
LEAD_IN = 5               # steps of each side before the first round: they compile, and fill caches and pools of memory
ATTEMPTS = 2              # pairs of processes, one after the other, to come to CLEAN_ROUNDS (clock.py)
PATIENCE = 60.0           # seconds that an attempt waits, in all, for other programs to be quiet
LOOK = 0.5                # seconds for which they are watched
POLL_SECONDS = 1.0        # between heartbeats
SHUTDOWN_SECONDS = 60.0   # that a run has to end when no more steps are asked for
NEVER = 10**9             # steps between evaluations


@dataclass(frozen=True)
class Pace:
    """How many rounds of a job count, the steps of a stretch, and those of each side before the first round.

    changes: the moments, as shares of the run, at which a schedule of either side begins with other steps. These are compiled
    then, and the round does not count; so there is a further round for each, or such steps would have too little weight.
    """
    rounds: int
    stretch: int
    lead_in: int = LEAD_IN
    changes: tuple[float, ...] = ()

    @property
    def all_rounds(self) -> int:
        return self.rounds + len(self.changes)

    @property
    def steps(self) -> int:
        return self.lead_in + self.all_rounds * self.stretch

    def step_at(self, share: float) -> int:
        """The step of the timed run that stands for the one at this share of the whole run."""
        further = sum(change < share for change in self.changes)
        return self.lead_in + round(share * self.rounds * self.stretch) + further * self.stretch


class Stretch(NamedTuple):
    """Steps that a side took at once: seconds of each, whether something was compiled, and the load of others, which the side
    that should be waiting is one of: work that it does then would be on nobody's clock."""
    seconds: float
    compiled: bool
    load: float | None
    step: int = 0  # the next one


def round_of(baseline: Stretch, candidate: Stretch) -> Round:
    """The round of two stretches of the same steps."""
    loads = [stretch.load * stretch.seconds for stretch in (baseline, candidate) if stretch.load is not None]
    seconds = baseline.seconds + candidate.seconds
    return Round(baseline.seconds, candidate.seconds, sum(loads) / seconds if len(loads) == 2 else None, baseline.step)


class RunFailed(Exception):
    """A side's run that ended before its time. The message says where its output is."""


def measure(folder: Path, name: str, baseline: Sequence[str], candidate: Sequence[str], *, seconds_per_step: float,
            base_dir: Path, profile: str, jobs: int = 3, accept_load: bool = False) -> Clock:
    """Time the candidate's steps against the baseline's in so many jobs, of which those in the folder are not run again.

    name: of the candidate.   baseline, candidate: flags of base_train, whose text is prepared in base_dir.
    seconds_per_step: about, from earlier runs.   profile: name or file; measurements of one profile share a noise card.
    accept_load: also count the rounds in which other programs ran; such measurements have a noise card of their own.

    Where a side fails, or other programs leave a job fewer than CLEAN_ROUNDS, the standard error is infinite, and the note says
    why. Raises: UserError for wrong flags.
    """
    pace = make_pace(seconds_per_step, *map(config_of, (baseline, candidate)))
    flags = {side: shortened(given, pace) for side, given in zip(SIDES, (baseline, candidate), strict=True)}
    folder, lab, found = folder / "timing", base_dir / "lab", list[Job]()
    for place in (folder, lab):
        place.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{digest_of(platform.node(), source_fingerprint(), list(baseline), list(candidate))}"
    for n in range(jobs):
        path = folder / f"{stem}-job{n + 1}.json"
        # one job at a time on a machine
        with hold_claim(lab / f".timing-{platform.node()}.claim", poll=POLL_SECONDS) as claim:
            known = read_job(path)
            job = known if known and known.is_enough(accept_load) else None
            fresh = job is None
            if job is None:
                logs = {side: folder / f"{name}-job{n + 1}-{side}.txt" for side in SIDES}
                try:
                    job = run_job(flags, logs, pace, base_dir, n, accept_load, claim.heartbeat)
                except RunFailed as e:
                    return Clock(0.0, math.inf, 0, 0, 0, str(e), sum(job.seconds for job in found))
                write_atomic(path, json.dumps(asdict(job) | {"flags": flags}))
        found.append(job)
        if not job.is_enough(accept_load):
            break
        if fresh:
            kept = job.kept(accept_load)
            print0(f"timing {name}, job {n + 1} of {jobs}: a step takes {math.expm1(-log_ratio(kept)):+.2%} | "
                   f"{len(kept)} of {len(job.rounds)} rounds | {job.seconds:.0f} s")
    key = [platform.node(), found[0].device, digest_of(read_profile(profile)), *(["with other load"] if accept_load else [])]
    card = NoiseCard(lab / "clock_noise.json", " | ".join(key))
    return clock_of(found, accept_load, lambda spread: card.pooled_with(str((folder / stem).resolve()), spread))


# ---- what is run

def make_pace(seconds_per_step: float, *sides) -> Pace:
    """Stretches just long enough, so that a slow spell of the machine falls on both sides; rounds that fill SIDE_SECONDS.

    sides: their Config. A run that is shorter than that is made longer, or its time would be lost in the noise. Where a schedule
    has steps of several kinds, their number is a multiple of ROUNDS, so that each kind has its share.
    """
    fewest = DEFERRED_STRETCH if any(side.run.deferred_loss_logging for side in sides) else 1
    stretch = max(fewest, math.ceil(STRETCH_SECONDS / seconds_per_step))
    whole = seconds_per_step * max(horizon_of(side).num_iterations for side in sides)
    rounds = max(ROUNDS, round(min(SIDE_SECONDS, whole) / (stretch * seconds_per_step)))
    changes = tuple(sorted({share for side in sides for share in changes_of(side)}))
    return Pace(ROUNDS * math.ceil(rounds / ROUNDS) if changes else rounds, stretch, changes=changes)


def changes_of(config) -> list[float]:
    """The shares of a run at which it begins with steps that were not compiled at its start."""
    suffix, depth, steps = config.features["suffix"], config.features["progressive_depth"], horizon_of(config).num_iterations
    freezes = suffix.block_update_schedule == "dynamic_suffix"
    return [depth.depth_growth_frac] * grows(depth, config.model.depth) + [freeze_start(suffix, steps) / steps] * freezes


def shortened(flags: Sequence[str], pace: Pace) -> list[str]:
    """A run of the pace's steps that evaluates, samples and saves nothing but before its first step.

    After the lead-in, every phase of a schedule, of progressive depth or of dynamic suffix training, has the share of the steps
    that it has in the whole run.
    """
    config = config_of(flags)
    periods = ("eval_every", "core_metric_every", "sample_every", "save_every")
    found = [*flags, *steps_of(pace.steps), "--max-train-seconds=-1", "--eval-tokens=1",
             *(f"{flag_name(period)}={NEVER}" for period in periods if getattr(config.eval, period) > 0)]
    suffix, depth, steps = config.features["suffix"], config.features["progressive_depth"], horizon_of(config).num_iterations
    if grows(depth, config.model.depth):
        found.append(f"--depth-growth-frac={pace.step_at(depth.depth_growth_frac) / pace.steps}")
    if suffix.block_update_schedule != "dynamic_suffix":
        return found
    found.append(f"--dyn-warmup-steps={pace.step_at(suffix.dyn_warmup_steps / steps)}")
    if suffix.dyn_freeze_start_step == -1:
        found.append(f"--dyn-freeze-start-frac={pace.step_at(suffix.dyn_freeze_start_frac) / pace.steps}")
    else:
        found.append(f"--dyn-freeze-start-step={pace.step_at(suffix.dyn_freeze_start_step / steps)}")
    if recovery := recovery_share(suffix):
        found.append(f"--dyn-final-full-frac={recovery * pace.rounds * pace.stretch / pace.steps}")
    return found


def run_job(flags: dict[str, list[str]], logs: dict[str, Path], pace: Pace, base_dir: Path, first: int, accept_load: bool,
            heartbeat: Callable[[], object]) -> Job:
    """Run a job; with a second pair of processes, where other programs leave the first too few rounds.

    flags, logs: by side.   first: even where the baseline comes first.   Raises: RunFailed.
    """
    started, job = time.monotonic(), Job(())
    for _ in range(1 if accept_load else ATTEMPTS):
        rounds, device = run_pair(flags, logs, pace, base_dir, first, 0.0 if accept_load else PATIENCE, heartbeat)
        job = Job((*job.rounds, *rounds), job.compiled + pace.all_rounds - len(rounds), device, time.monotonic() - started)
        if job.is_enough(accept_load):
            break
    return job


def run_pair(flags: dict[str, list[str]], logs: dict[str, Path], pace: Pace, base_dir: Path, first: int, patience: float,
             heartbeat: Callable[[], object]) -> tuple[list[Round], str]:
    """Start both sides, let them take turns, and end them. Returns the rounds in which nothing was compiled, and the device.

    patience: seconds to wait, in all, for other programs to be quiet again after a round that they spoilt.
    """
    sides, rounds = dict[str, Side](), []
    with sigterm_as_interrupt(), ExitStack() as stack:
        for name in interleaved(SIDES, first):  # one after the other, as a run times its kernels while it is built
            sides[name] = stack.enter_context(Side(name, flags[name], logs[name], base_dir, heartbeat))
            sides[name].answer()  # it is ready
        for side in sides.values():
            side.take(pace.lead_in)
        for i in range(pace.all_rounds):
            heartbeat()
            taken = {name: sides[name].take(pace.stretch) for name in interleaved(SIDES, first + i)}
            round_ = round_of(*(taken[name] for name in SIDES))
            if not any(stretch.compiled for stretch in taken.values()):
                rounds.append(round_)
            if round_.spoilt and patience > 0:
                patience -= wait_until_quiet(patience, heartbeat)
    return rounds, sides["baseline"].result.get("device", "")


def wait_until_quiet(longest: float, heartbeat: Callable[[], object]) -> float:
    """Wait, while both sides do, until other programs are quiet, for so many seconds at most; returns how long it was."""
    started = time.monotonic()
    while time.monotonic() - started < longest:
        load = OtherLoad()
        time.sleep(LOOK)
        heartbeat()
        if (load.share() or 0.0) <= SPOILT:
            break
    return time.monotonic() - started


class Side:
    """A run that takes its steps when it is told to, inside `with`. Its folder is deleted at the end.

    result: what its result.json says, then. The methods raise RunFailed where the run has ended by itself.
    """

    def __init__(self, name: str, flags: list[str], log: Path, base_dir: Path, heartbeat: Callable[[], object]):
        self.name, self.log, self.heartbeat, self.received = name, log, heartbeat, b""
        tag = f"timing-{digest_of(platform.node(), str(log.resolve()))}"
        self.run_dir, self.result = base_dir / "base_checkpoints" / tag, dict[str, Any]()
        command = training_command([*flags, f"--model-tag={tag}"])
        shutil.rmtree(self.run_dir, ignore_errors=True)  # of a lab that was killed
        theirs, self.requests = os.pipe()
        self.answers, answers = os.pipe()
        try:
            with open(log, "wb") as output:
                output.write(f"+ {shlex.join(command)}\n".encode())
                output.flush()
                self.process = subprocess.Popen(
                    command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                    pass_fds=(theirs, answers), env=child_environment(base_dir) | {VARIABLE: f"{theirs},{answers}"})
        finally:
            os.close(theirs)
            os.close(answers)

    def __enter__(self) -> "Side":
        return self

    def answer(self) -> str:
        """The run's next line."""
        while b"\n" not in self.received:
            if not select.select([self.answers], [], [], POLL_SECONDS)[0]:
                self.heartbeat()
            elif more := os.read(self.answers, 4096):
                self.received += more
            else:
                raise self.failure()
        line, _, self.received = self.received.partition(b"\n")
        return line.decode()

    def take(self, steps: int) -> Stretch:
        """Let the run take steps."""
        load, started = OtherLoad(processes=[self.process.pid]), time.perf_counter()
        try:
            os.write(self.requests, f"go {steps}\n".encode())
        except BrokenPipeError:
            raise self.failure() from None
        _, step, compiled = self.answer().split()
        return Stretch((time.perf_counter() - started) / steps, compiled == "1", load.share(), int(step))

    def failure(self) -> RunFailed:
        code, result = self.process.wait(SHUTDOWN_SECONDS), read_result(self.run_dir / "result.json")
        why = str(result.get("error") or f"exit status {code}").split("\n")[0]
        return RunFailed(f"the {self.name} could not be timed ({result.get('status', 'failed')}: {why}): see {self.log}")

    def __exit__(self, error, *details) -> None:
        os.close(self.requests)  # a run that waits for its turn ends at once
        os.close(self.answers)
        if error:
            self.process.kill()
        try:
            self.process.wait(SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.result = read_result(self.run_dir / "result.json")
        shutil.rmtree(self.run_dir, ignore_errors=True)
        self.run_dir.with_name(f".{self.run_dir.name}.lock").unlink(missing_ok=True)


# ---- what is kept

def read_job(path: Path) -> Job | None:
    """A job that is finished."""
    if not (found := read_result(path)):
        return None
    return Job(tuple(Round(**r) for r in found["rounds"]), found["compiled"], found["device"], found["seconds"])


def seconds_spent(folder: Path) -> float:
    """What the finished jobs of an experiment's folder have taken."""
    return sum(read_result(path).get("seconds", 0.0) for path in (folder / "timing").glob("*-job*.json"))


def digest_of(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
