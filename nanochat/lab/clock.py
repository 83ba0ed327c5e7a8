"""What the jobs of a timing (nanochat/lab/timing.py) say together: the time that a candidate saves, with its error.

A job times rounds: some steps of the baseline and the same of the candidate. The unit of the error is the job.

    BASE/lab/clock_noise.json    the noise card: how far apart jobs of one comparison lie on this machine
"""

import itertools
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochat.lab.claim import hold_claim
from nanochat.lab.rows import read_result
from nanochat.runtime.files import write_atomic
from nanochat.runtime.other_load import SPOILT

SIDES = ["baseline", "candidate"]
CLEAN_ROUNDS = 10         # without other load, that a job needs
SLOW = 1.25               # times the usual, from which on a stretch is a slow spell of the machine


@dataclass(frozen=True)
class Round:
    """Seconds per step of both sides, and the share of all cores' time that others had meanwhile; None where unknown.

    step: of the runs, at its end.
    """
    baseline: float
    candidate: float
    load: float | None
    step: int = 0

    @property
    def spoilt(self) -> bool:
        return self.load is not None and self.load > SPOILT


@dataclass(frozen=True)
class Job:
    """The rounds in which nothing was compiled, how many others there were, on which device, and the seconds that all took."""
    rounds: tuple[Round, ...]
    compiled: int = 0
    device: str = ""
    seconds: float = 0.0

    def kept(self, accept_load: bool) -> list[Round]:
        """The rounds that count: without other load, or with it if that is accepted."""
        return [r for r in self.rounds if accept_load or not r.spoilt]

    def is_enough(self, accept_load: bool) -> bool:
        return len(self.kept(accept_load)) >= CLEAN_ROUNDS


@dataclass(frozen=True)
class Clock:
    """The time that a candidate saves.

    log_ratio: ln(the baseline's seconds per step / the candidate's).   se, df: its standard error, infinite where the time is not
    known, and the degrees of freedom that this has.   set_apart: rounds that do not count, as other programs ran or the machine
    was slow.   note: what the user should know.   seconds: that the measurement took.
    """
    log_ratio: float
    se: float
    df: float
    jobs: int
    set_apart: int
    note: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict:
        """For JSON: what is not known is None."""
        return {name: None if value in (math.inf, -math.inf) else value for name, value in asdict(self).items()}


def log_ratio(rounds: Sequence[Round]) -> float:
    """ln(the baseline's time / the candidate's) over these rounds: of sums, as of two whole runs. Where steps cost different
    amounts, as in dynamic suffix training, the mean of the rounds' logarithms would be another number, and a trimmed mean would
    lose steps that are rare and slow."""
    return math.log(sum(r.baseline for r in rounds) / sum(r.candidate for r in rounds))


@dataclass(frozen=True)
class Spread:
    """How far jobs lie from the mean of their comparison: sum of squares (of log ratios), and its degrees of freedom."""
    sum_of_squares: float = 0.0
    df: int = 0

    @property
    def variance(self) -> float:
        return self.sum_of_squares / self.df if self.df else math.inf


def clock_of(jobs: Sequence[Job], accept_load: bool, pooled_with: Callable[[Spread], Spread]) -> Clock:
    """What the jobs say together: the mean of their log ratios, each job having the same weight.

    pooled_with: this measurement's Spread -> the noise card's with it.

    Three jobs have two degrees of freedom of their own, with which nothing is ever sure; the card has those of all measurements
    so far. So the variance is the card's, or the jobs' own where that is larger, as a candidate may be noisier than others; the
    degrees of freedom are the card's. The error is then too large rather than too small: with three jobs, by 14 % on average.
    """
    seconds, notes = sum(job.seconds for job in jobs), notes_on(jobs, accept_load)
    if short := next((job for job in jobs if not job.is_enough(accept_load)), None):
        guess, spoilt = log_ratio(short.rounds) if short.rounds else 0.0, sum(r.spoilt for job in jobs for r in job.rounds)
        return Clock(guess, math.inf, 0, len(jobs), spoilt, "; ".join([why_short(short), *notes]), seconds)
    counted = without_slow_spells([job.kept(accept_load) for job in jobs])
    set_apart = sum(len(job.rounds) for job in jobs) - sum(map(len, counted))
    if slow := sum(len(job.kept(accept_load)) for job in jobs) - sum(map(len, counted)):
        notes.append(f"the machine was slow in {slow} rounds, set apart")
    values = [log_ratio(rounds) for rounds in counted]
    mean = statistics.fmean(values)
    own = Spread(sum((value - mean) ** 2 for value in values), len(values) - 1)
    pooled = pooled_with(own)
    variance = max(pooled.variance, own.variance if own.df else 0.0)
    if not pooled.df:
        notes.append("one job does not show its error: run more")
    return Clock(mean, math.sqrt(variance / len(jobs)), pooled.df, len(jobs), set_apart, "; ".join(notes), seconds)


def without_slow_spells(jobs: Sequence[Sequence[Round]]) -> list[Sequence[Round]]:
    """The rounds of each job but for those in which the machine was slow for a while: some virtual machines take half as long
    again for seconds, and their system shows no load.

    A stretch that took SLOW times as long as the same steps do in the median of all jobs, compared with the other stretches of
    its job, sets its round apart. So steps that cost more stay: they do so in every job. What is slow at random is taken for the
    machine's doing, and only if it falls on both sides alike (within 3 standard deviations of an even split). A job that would be
    left fewer than CLEAN_ROUNDS stays whole.
    """
    same_steps, slow = defaultdict(list), []
    for round_ in itertools.chain(*jobs):
        same_steps[round_.step].append(round_)
    for side in SIDES:
        usual = {step: statistics.median(getattr(r, side) for r in found) for step, found in same_steps.items() if len(found) > 2}
        found = set[Round]()
        for rounds in jobs:
            relative = {r: getattr(r, side) / usual[r.step] for r in rounds if r.step in usual}
            found |= {r for r, times in relative.items() if times > SLOW * statistics.median(relative.values())}
        slow.append(found)
    few, many = sorted(map(len, slow))
    if many - few > 3 * math.sqrt(many + few):
        return list(jobs)
    left = [[r for r in rounds if not any(r in found for found in slow)] for rounds in jobs]
    return [rest if len(rest) >= CLEAN_ROUNDS else rounds for rest, rounds in zip(left, jobs, strict=True)]


def why_short(job: Job) -> str:
    """Why so few of a job's rounds count."""
    loads = [r.load for r in job.rounds if r.load is not None]
    if len(job.rounds) < CLEAN_ROUNDS or not loads:
        return "too few rounds in which nothing was compiled"
    return f"other programs used {statistics.fmean(loads):.0%} of the processor: run it again on a quiet machine"


def notes_on(jobs: Sequence[Job], accept_load: bool) -> list[str]:
    """What rounds were left out, or beside what they ran."""
    compiled, spoilt = sum(job.compiled for job in jobs), sum(r.spoilt for job in jobs for r in job.rounds)
    rounds = compiled + sum(len(job.rounds) for job in jobs)
    return [text for number, text in (
        (spoilt, f"other programs ran in {spoilt} of {rounds} rounds, {'which count' if accept_load else 'set apart'}"),
        (compiled, f"something was compiled in {compiled} of {rounds} rounds, which do not count")) if number]


@dataclass(frozen=True)
class NoiseCard:
    """A file of all measurements on a machine. key: machine, device and profile of those that are pooled."""
    path: Path
    key: str

    def pooled_with(self, measurement: str, spread: Spread) -> Spread:
        """Write a measurement down, in place of an earlier state of it, and pool all of this key."""
        with hold_claim(self.path.with_suffix(".claim")):
            content = read_result(self.path)
            entries = content.setdefault(self.key, {})
            entries[measurement] = asdict(spread)
            write_atomic(self.path, json.dumps(content, indent=1) + "\n")
        found = [Spread(**entry) for entry in entries.values()]
        return Spread(sum(s.sum_of_squares for s in found), sum(s.df for s in found))
