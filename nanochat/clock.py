"""Time that is what it says: training, evaluation and compilation apart, on the device's own clock."""

import sys
import time
from contextlib import contextmanager
from typing import NamedTuple

import torch

from nanochat.device import synchronize


def compile_seconds() -> float:
    """Seconds that torch.compile has spent in this process so far, forward and backward graphs alike."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.calculate_time_spent().get("total_wall_time", 0.0) if dynamo else 0.0


class StepTime(NamedTuple):
    """Seconds of one step, compilation left out, and of its parts summed over the micro-batches, where they are known."""
    total: float
    forward: float | None = None
    backward: float | None = None
    update: float | None = None


class Clock:
    """Seconds of training, evaluation and compilation, kept apart. All three survive a resume.

    The device is synchronized at both ends of what is timed, and what torch.compile spends in between is taken out.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.train = self.eval = self.compile = 0.0

    @contextmanager
    def training(self):
        """Times one step; `last` is its StepTime. Yields `lap(name)`, to call at the end of each part of a step."""
        synchronize(self.device)
        started, compiled = time.perf_counter(), compile_seconds()
        marks = [("start", stamp(self.device))]
        yield lambda name: marks.append((name, stamp(self.device)))
        synchronize(self.device)
        compiled = compile_seconds() - compiled
        total = max(time.perf_counter() - started - compiled, 1e-9)
        self.last = StepTime(total, **(laps(marks) if not compiled else {}))
        self.train += total
        self.compile += compiled

    def evaluating(self):
        return self._aside("eval")

    def compiling(self):
        return self._aside("compile")

    @contextmanager
    def _aside(self, name: str):
        """Adds what is inside to the clock of that name."""
        started = time.perf_counter()
        yield
        synchronize(self.device)
        setattr(self, name, getattr(self, name) + time.perf_counter() - started)

    def state_dict(self) -> dict:
        return {"train": self.train, "eval": self.eval, "compile": self.compile}

    def load_state_dict(self, state: dict) -> None:
        self.train, self.eval, self.compile = state["train"], state["eval"], state["compile"]


def stamp(device: torch.device):
    """A moment of the device's own time: an event on CUDA, which waits for nothing; the host's clock on a CPU."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    return time.perf_counter() if device.type == "cpu" else None


def laps(marks: list[tuple]) -> dict[str, float]:
    """Seconds by name of what lies between each (name, stamp) and the one before it."""
    spent = {}
    for (_, before), (name, now) in zip(marks, marks[1:]):
        if now is not None:
            seconds = now - before if isinstance(now, float) else before.elapsed_time(now) / 1000
            spent[name] = spent.get(name, 0.0) + seconds
    return spent
