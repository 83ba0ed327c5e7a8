"""Choose among implementations of one function by running them on the machine and the sizes at hand.

What is fastest on one processor is often not on another, so nothing here is chosen by a rule. Candidates run interleaved for some
tens of milliseconds, and the least time of each decides: what other programs add is left out. On a GPU its own time counts,
without the program's for launching. The choice is kept under the base directory, by machine and problem: the next start takes it
without timing, and trains to the same bits.
"""

import hashlib
import json
from collections.abc import Callable
from functools import cache
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch

from nanochat.common import UserError, get_base_dir, is_main_rank
from nanochat.runtime.device import device_name
from nanochat.runtime.distributed import broadcast_object
from nanochat.runtime.files import read_json, write_atomic
from nanochat.runtime.timing import device_timer

BUDGET = 0.2        # seconds for the rounds of one problem, after a first call of each candidate
ROUNDS = 3, 15      # at least and at most
# On a CPU and on a GPU, whose clock tells single microseconds and which does ten times as much in a second, or more:
SHORT, SHORT_ON_GPU = 0.002, 0.0002  # seconds: shorter calls are timed several at once
NEGLIGIBLE, NEGLIGIBLE_ON_GPU = 0.0005, 0.00005  # seconds of the whole problem: below, the first candidate is taken, as noise
TIE = 0.03          # a candidate has to be this much faster than those before it: noise must not decide
MOST_TOKENS = 2**14  # of a larger micro-batch a part is timed
KERNELS = Path(__file__).parents[1] / "kernels"


class Choice(NamedTuple):
    """The candidate that is used for a problem."""
    name: str
    reason: str
    milliseconds: dict[str, float]  # the least time of each candidate that was timed

    def __str__(self) -> str:
        times = ", ".join(f"{name} {ms:.3g}" for name, ms in sorted(self.milliseconds.items(), key=lambda item: item[1]))
        return f"{self.name} ({self.reason}{f': {times} ms' if times else ''})"


class Tuner:
    """Chooses for one device, and remembers in `folder` (by default tuner/ in the base directory; None: nowhere).

    Under torchrun rank 0 measures, and every rank takes its choice: all ranks must ask for the same problems in the same order.
    """

    def __init__(self, device: torch.device, folder: Path | None | str = "default"):
        self.device = torch.device(device)
        place = get_base_dir() / "tuner" if folder == "default" else folder
        self.path = Path(place) / f"{_machine_digest(self.device)}.json" if place else None

    def choose(self, problem: str, candidates: dict[str, Callable[[], Callable]], times_in_use: float = 1.0) -> Choice:
        """The fastest of the candidates: name -> a function that makes the call to time. The order breaks ties.

        problem: what decides the times beside the machine, such as "attention 2x512x4x64 bfloat16, window 128".
        times_in_use: how much more work the problem has in use than what is timed; see NEGLIGIBLE.
        """
        if len(candidates) == 1:
            return Choice(next(iter(candidates)), "the only one that works", {})
        return broadcast_object(self._choose(problem, candidates, times_in_use) if is_main_rank() else None)

    def _choose(self, problem: str, candidates: dict[str, Callable[[], Callable]], times_in_use: float) -> Choice:
        known = self._known().get(problem)
        if known and set(known["milliseconds"]) == set(candidates):
            return Choice(known["name"], "measured before", known["milliseconds"])
        times = measure({name: make() for name, make in candidates.items()}, self.device)
        first = next(iter(times))
        short = times[first] * times_in_use < (NEGLIGIBLE_ON_GPU if self.device.type == "cuda" else NEGLIGIBLE)
        choice = Choice(first if short else fastest(times), "too short to matter" if short else "measured",
                        {name: float(f"{1000 * s:.4g}") for name, s in times.items()})
        self._remember(problem, choice)
        return choice

    def _known(self) -> dict:
        """Earlier choices, by problem. A file that is damaged or of another form counts as none."""
        try:
            choices = read_json(self.path)["choices"] if self.path else {}
            return {problem: known for problem, known in choices.items() if known["name"] in known["milliseconds"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _remember(self, problem: str, choice: Choice) -> None:
        if not self.path:
            return
        choices = self._known() | {problem: {"name": choice.name, "milliseconds": choice.milliseconds}}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, json.dumps({"machine": _machine(self.device), "choices": choices}, indent=1) + "\n")
        except OSError:  # a base directory that cannot be written: the next start measures again
            pass


def untimed_choice(flag: str, wanted: str, plain: str, fast: str, why_not: str | None, recorded: str | None) -> Choice | None:
    """The choice between `plain`, which always works, and `fast` where it needs no measurement; None where it does.

    flag: the option that says which, `wanted` its value (`auto`, plain or fast).   why_not: the reason why `fast` does not work
    here.   recorded: the choice of the run to be resumed.
    Raises: UserError where `fast` is wanted and does not work.
    """
    if wanted == fast and why_not:
        raise UserError(f"{flag} {fast} cannot be used here: {why_not}. Leave it out to take the fastest that works.")
    if wanted != "auto":
        return Choice(wanted, flag, {})
    if why_not:
        return Choice(plain, "the only one that works", {})
    return Choice(recorded, "as before the resume", {}) if recorded else None


def fastest(seconds: dict[str, float]) -> str:
    """The first candidate that no other one beats by more than TIE."""
    best = min(seconds.values())
    return next(name for name, s in seconds.items() if s <= best * (1 + TIE))


def measure(calls: dict[str, Callable], device: torch.device) -> dict[str, float]:
    """The least seconds of each call, all of them run in turn. A call that takes three times the fastest is timed twice only."""
    seconds_of = device_timer(device)

    def seconds(call: Callable, repeats: int = 1) -> float:
        return seconds_of(lambda: [call() for _ in range(repeats)]) / repeats
    for call in calls.values():
        call()  # the first run may allocate and compile
    least = {name: min(seconds(call) for _ in range(2)) for name, call in calls.items()}
    in_question = {name: call for name, call in calls.items() if least[name] < 3 * min(least.values())}
    short = SHORT_ON_GPU if device.type == "cuda" else SHORT
    repeats = {name: max(1, ceil(short / max(least[name], 1e-9))) for name in in_question}
    a_round = sum(least[name] * repeats[name] for name in in_question)
    rounds = min(max(int(BUDGET / a_round), ROUNDS[0]), ROUNDS[1])
    for _ in range(rounds):
        for name, call in in_question.items():
            least[name] = min(least[name], seconds(call, repeats[name]))
    return least


def _machine(device: torch.device) -> dict:
    """What the times of all problems depend on."""
    return {"device": device_name(device), "torch": torch.__version__, "kernels": _kernels_digest()}


def _machine_digest(device: torch.device) -> str:
    return hashlib.sha256(json.dumps(_machine(device)).encode()).hexdigest()[:16]


@cache
def _kernels_digest() -> str:
    """Of the source of all kernels: a kernel that was changed is timed again."""
    digest = hashlib.sha256()
    for path in sorted([*KERNELS.rglob("*.py"), *KERNELS.glob("cpp/*"), KERNELS.parent / "flash_attention.py"]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
