"""Time of the training loop and of its parts (training, evaluation, compilation, saving), on the device's own clock."""

import sys
import time
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch

from nanochat.runtime.device import synchronize
from nanochat.runtime.other_load import OtherLoad


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
    """Seconds of the training loop, and of its parts: training, evaluation, compilation, saving. They survive a resume.

    On CUDA a step is timed by events, which wait for nothing; elsewhere the device is synchronized at both ends. What
    torch.compile spends in between is taken out.

    train, eval, compile, save: seconds of each part. loop: of the whole loop. unnamed: of the loop, under none of these names.
    other_load: share of all cores' time, 0 to 1, that other programs used during the loop; None where it is not known.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.train = self.eval = self.compile = self.save = 0.0
        self.earlier_loop = self.earlier_named = 0.0  # of loops that have ended, also in earlier processes: all, their parts
        self.began: float | None = None               # when the present loop began; None outside of a loop
        self.named_before = 0.0                       # seconds of all parts at that moment
        self.load = LoadMeter()

    @contextmanager
    def looping(self):
        """Times the training loop."""
        self.began, self.named_before = time.perf_counter(), self._named()
        self.load.start()
        try:
            yield
        finally:
            self.load.stop()
            self.earlier_loop, self.earlier_named, self.began = self.loop, self._named_in_loops(), None

    @contextmanager
    def left_out(self):
        """Leaves what is inside out of the loop's time: for what is no part of the run. The device must be idle."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.began is not None:
                self.began += time.perf_counter() - started  # as if the loop had begun later

    @contextmanager
    def waiting(self):
        """For a run that waits for its turn: leaves what is inside out of the loop's time, and out of `other_load`."""
        with self.left_out(), self._load_left_out():
            yield

    @property
    def loop(self) -> float:
        return self.earlier_loop + (time.perf_counter() - self.began if self.began is not None else 0.0)

    @property
    def unnamed(self) -> float:
        return self.loop - self._named_in_loops()

    @property
    def other_load(self) -> float | None:
        return self.load.share()

    def _named(self) -> float:
        return self.train + self.eval + self.compile + self.save

    def _named_in_loops(self) -> float:
        """Seconds of all parts without what was compiled before a loop."""
        return self.earlier_named + (self._named() - self.named_before if self.began is not None else 0.0)

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

    def saving(self):
        """For what the loop waits for while a checkpoint is written; the rest of the writing goes on beside it."""
        return self._aside("save")

    @contextmanager
    def compiling(self):
        with self._load_left_out(), self._aside("compile"):  # the compiler's own processes would count as other programs
            yield

    @contextmanager
    def _aside(self, name: str):
        """Adds what is inside to the clock of that name, also where it is cut short."""
        started = time.perf_counter()
        try:
            yield
            synchronize(self.device)
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - started)

    @contextmanager
    def _load_left_out(self):
        """Leaves what is inside out of `other_load`."""
        self.load.stop()
        try:
            yield
        finally:
            if self.began is not None:
                self.load.start()

    def state_dict(self) -> dict:
        with self._load_left_out():  # ends the stretch that is running, so that it is among the rest
            pass
        return {"train": self.train, "eval": self.eval, "compile": self.compile, "save": self.save,
                "loop": self.loop, "named_in_loops": self._named_in_loops(), "load": [self.load.seconds, self.load.others]}

    def load_state_dict(self, state: dict) -> None:
        """Take over `state_dict()`. Within a loop, for a return to a checkpoint, the loop's own time and load go on as before.

        A state of before the loop was timed counts as a loop that spent its time on named parts only.
        """
        self.train, self.eval, self.compile = state["train"], state["eval"], state["compile"]
        self.save = state.get("save", 0.0)
        if self.began is None:
            self.earlier_loop = state.get("loop", self._named())
            self.earlier_named = state.get("named_in_loops", self._named())
            self.load.seconds, self.load.others = state.get("load", (0.0, 0.0))


class LoadMeter:
    """The share of all cores' time that other programs use between each `start` and `stop`, over all of these stretches."""

    def __init__(self):
        self.seconds = self.others = 0.0  # of the stretches that have ended, and of these the share of others
        self.running: tuple[OtherLoad, float] | None = None  # and when it began

    def start(self) -> None:
        self.running = OtherLoad(), time.perf_counter()

    def stop(self) -> None:
        """End the stretch, if one is running."""
        if self.running:
            (load, began), self.running = self.running, None
            if (share := load.share()) is not None:
                seconds = time.perf_counter() - began
                self.seconds, self.others = self.seconds + seconds, self.others + share * seconds

    def share(self) -> float | None:
        """0 to 1; None where the system does not say, or nothing was measured."""
        return self.others / self.seconds if self.seconds else None


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
