"""Time spent on training, evaluation and compilation, measured apart and on the device's own clock."""

import sys
import time
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch

from nanochat.runtime.device import synchronize


def compile_seconds() -> float:
    """Seconds that torch.compile has spent in this process so far, forward and backward graphs alike."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.calculate_time_spent().get("total_wall_time", 0.0) if dynamo else 0.0


class StepTime(NamedTuple):
    """Seconds of one step without compilation, and of its parts over all micro-batches, where they are known.

    Where torch.compile worked in between, `total` is a guess on CUDA: the device went on with what was queued while the host
    compiled.
    """
    total: float
    forward: float | None = None
    backward: float | None = None
    update: float | None = None


class Clock:
    """Seconds of training, evaluation and compilation, kept apart. All three survive a resume.

    On CUDA a step is timed by events, which wait for nothing; elsewhere the device is synchronized at both ends. What
    torch.compile spends in between is taken out.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.train = self.eval = self.compile = 0.0

    @contextmanager
    def training(self):
        """Times one step. Yields `lap(name)`, to call at the end of each part of a step. Afterwards `last()`, to be called
        once, waits for the step's end, adds it to the clock and gives its StepTime."""
        self._wait()
        marks, compiled = [("start", self._stamp())], compile_seconds()
        yield lambda name: marks.append((name, self._stamp()))
        self._wait()
        marks.append(("end", self._stamp()))
        compiled = compile_seconds() - compiled
        self.compile += compiled

        def wait() -> StepTime:
            total = max(seconds_between(marks[0][1], marks[-1][1]) - compiled, 1e-9)
            self.train += total
            return StepTime(total, **(laps(marks[:-1]) if not compiled and self.device.type != "mps" else {}))
        self.last = wait

    def _wait(self) -> None:
        if self.device.type != "cuda":
            synchronize(self.device)

    def _stamp(self):
        """A moment of the device's own time: an event on CUDA, elsewhere the host's clock."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

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


def seconds_between(start, end) -> float:
    """Seconds from one stamp to a later one, waiting until it is reached."""
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


def laps(marks: list[tuple]) -> dict[str, float]:
    """Seconds by name of what lies between each (name, stamp) and the one before it."""
    spent = {}
    for (_, before), (name, now) in pairwise(marks):
        spent[name] = spent.get(name, 0.0) + seconds_between(before, now)
    return spent
