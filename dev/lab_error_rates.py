"""How often does the lab err? Experiments with a known truth, judged by its own functions: runs are drawn instead of trained.

    python -m dev.lab_error_rates                  # the table of docs/lab.md: two minutes
    python -m dev.lab_error_rates --experiments 100

Tests hold these rates too (tests/lab/test_lab_decide.py).
"""

import math
import random
import statistics
from dataclasses import dataclass

from nanochat.cli.flags import flag, parse
from nanochat.cli.program import cli
from nanochat.common import format_table
from nanochat.lab.decide import Verdict, judge
from nanochat.lab.gates import FALLBACK_GAIN
from nanochat.lab.timing import Clock

WORTH = 0.12   # bits per byte per unit of ln(steps)
STEPS = 1000
TARGET = 1.0 + 0.05 * WORTH  # the baseline reaches it shortly before its end


@dataclass(frozen=True)
class World:
    """The noise of a machine and of training.

    pair: standard deviation of a pair's net gain, in ln(time). tails: Student's t with 3 degrees of freedom instead of normal
    noise. shared: standard deviation of what both runs of a seed have in common. candidate: the candidate's noise, times the
    baseline's. diverge: share of all runs, on both sides. slow: share of runs that another program makes 12 % slower. hosts: how
    many machines, 12 % apart, the runs are spread over. together: time and quality of a run err alike. clock: steps are timed in
    turn, with this standard deviation; without, by whole runs. calibrated: seeds of the runs that tell the worth of a step.
    """
    pair: float = 0.01
    tails: bool = False
    shared: float = 0.0
    candidate: float = 1.0
    diverge: float = 0.0
    slow: float = 0.0
    hosts: int = 1
    together: bool = False
    clock: float | None = 0.003
    calibrated: int = 3


WORLDS = {
    "1 % a pair": World(), "2 % a pair": World(pair=0.02), "heavy tails": World(tails=True),
    "heavy tails, 2 %": World(pair=0.02, tails=True), "seeds differ": World(shared=0.03),
    "noisier candidate": World(pair=0.008, candidate=2.0), "5 % diverge": World(diverge=0.05),
    "worth of a step from few runs": World(calibrated=2), "slow spells": World(slow=0.15),
    "whole runs": World(clock=None), "whole runs, time and quality err alike": World(clock=None, together=True),
}

TRUTHS = {"no difference": {}, "trains 3.5 % less": {"steps": 0.965}, "1.5 % faster": {"pace": 0.985},
          "5 % faster": {"pace": 0.95}, "5 % better at the same speed": {"better": -math.log(0.95)}}
SHOWN = ("1 % a pair", "2 % a pair", "heavy tails", "5 % diverge", "whole runs")  # worlds of the table


def draw(rng: random.Random, world: World) -> float:
    """Standard noise."""
    if not world.tails:
        return rng.gauss(0, 1)
    return rng.gauss(0, 1) / math.sqrt(rng.gammavariate(1.5, 2.0) / 3) / math.sqrt(3)


def simulate(rng, seed, steps=1.0, pace=1.0, better=0.0, noise=0.01, target=None, world=None, common=0.0, **fields):
    """The row of a run.

    steps: share of the horizon. pace: seconds per step relative to the baseline. better: quality in units of ln(steps).
    noise: standard deviation of ln(time to the same quality) of this run, without a world 0.8 of it from quality and 0.6 from the
    clock; with one that has a clock, all of it from quality. common: what the seed's runs share.
    """
    world = world or World(clock=None)
    first = draw(rng, world)
    second = first if world.together else draw(rng, world)
    quality, clock = (1.0, 0.3) if world.clock is not None else (0.8, 0.6)
    bpb = 1.0 - WORTH * (math.log(steps) + better + common + noise * quality * first)
    slowed = 1.12 if rng.random() < world.slow else 1.0
    host = rng.randrange(world.hosts)
    seconds = 100 * steps * pace * slowed * (1 + 0.12 * host) * math.exp(noise * clock * second)
    crossed = target is not None and bpb <= target
    status = "diverged" if rng.random() < world.diverge else "ok"
    return {"seed": seed, "status": status, "train_time_sec": seconds, "val_bpb": bpb, "lab_val_bpb": bpb, "lab_own_bpb": bpb,
            "final_train_loss": 2 + bpb, "host": f"host{host}",
            "time_to_target_sec_measured": seconds * math.exp((bpb - target) / (2 * WORTH)) if crossed else None,
            "steps_done": round(STEPS * steps), "tokens_seen": 512 * round(STEPS * steps), "flops_per_token": 1e6,
            "skipped_steps": 0, "rollbacks": 0} | fields


def clock_of(rng, world: World, pace: float) -> Clock | None:
    """The clock of a candidate whose step takes `pace` times the baseline's."""
    if world.clock is None:
        return None
    estimated = world.clock * math.sqrt(rng.gammavariate(4, 2.0) / 8)  # 8 degrees of freedom
    return Clock(-math.log(pace) + rng.gauss(0, world.clock), estimated, 8, 3, 0, "")


def experiment(rng, world=None, most=8, first=2, match="free", target=None, **candidate):
    """The verdict of a comparison that adds seeds while it is inconclusive, and the number of seeds."""
    world = world or World()
    each = world.pair / math.sqrt(2)  # of a run
    shorter = [simulate(rng, s, steps=share, noise=each, world=world) for s in range(world.calibrated) for share in (0.95, 0.9)]
    clock, base, other = clock_of(rng, world, candidate.get("pace", 1.0)), [], []
    for n in range(most):
        common = rng.gauss(0, world.shared)
        base.append(simulate(rng, n, noise=each, target=target, world=world, common=common))
        other.append(simulate(rng, n, noise=each * world.candidate, target=target, world=world, common=common, **candidate))
        if n + 1 >= first:
            calibration = [r for r in base + shorter if r["seed"] < min(world.calibrated, n + 1)]
            verdict = judge(base, other, calibration, clock=clock, match=match, resumed=True)
            if verdict.decision != "inconclusive":
                break
    return verdict, n + 1


def experiments(n: int, world: World | None, **how) -> list[tuple[Verdict, int]]:
    """The verdicts and numbers of seeds of `n` experiments, always the same."""
    rng = random.Random(7)
    return [experiment(rng, world, **how) for _ in range(n)]


@dataclass
class RateFlags:
    """Error rates of the lab"""
    experiments: int = flag(1000, "experiments of each kind", low=1)


def main() -> None:
    flags, = parse([RateFlags], prog="python -m dev.lab_error_rates", description="How often does the lab err?")
    rows = []
    for truth, how in TRUTHS.items():
        for name in SHOWN:
            for target in (None, TARGET):
                found = experiments(flags.experiments, WORLDS[name], target=target, **how)
                promoted = [verdict for verdict, _ in found if verdict.decision == "promote"]
                called = sum(verdict.gain is not None and verdict.gain.mean >= FALLBACK_GAIN for verdict in promoted)
                rejected = sum(verdict.decision == "reject" for verdict, _ in found)
                shares = {"promoted": len(promoted), "called 3 %": called, "rejected": rejected}
                rows.append({"truth": truth, "noise": name, "target": "reached" if target else "none",
                             **{what: f"{100 * count / len(found):.1f}" for what, count in shares.items()},
                             "median runs": statistics.median(seeds for _, seeds in found)})
    print(format_table(rows))


if __name__ == "__main__":
    cli(main)
