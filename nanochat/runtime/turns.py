"""Stretches of steps that another program asks for, so that two runs can take turns on one machine (nanochat/lab/timing.py).

The environment variable NANOCHAT_TURNS="R,W" names two file descriptors that the run has inherited. On W it writes "ready" once
it is built. From R it reads "go K", takes K steps, and answers "done STEP COMPILED": its next step, and 1 if something was
compiled in this stretch, else 0. At the end of R the run ends, as after a signal. No torch.
"""

import os
import re
import signal

from nanochat.common import UserError
from nanochat.runtime.signals import Interrupted

VARIABLE = "NANOCHAT_TURNS"


class Turns:
    """The run's ends of the two pipes, by number. Raises: UserError where one of them is not open.

    steps_left: that may be taken before the next `wait`.
    """

    def __init__(self, requests: int, answers: int):
        try:
            self.requests, self.answers = os.fdopen(requests, "r"), os.fdopen(answers, "w")
        except OSError as e:
            raise UserError(f"{VARIABLE}={requests},{answers}: {e.strerror}. Only the lab sets it: unset it") from None
        self.steps_left = 0
        self.compile_seconds: float | None = None  # at the start of the stretch

    @classmethod
    def from_environment(cls, world_size: int) -> "Turns | None":
        """The turns that the environment asks for, None if it does not. Raises: UserError."""
        value = os.environ.get(VARIABLE)
        if value is None:
            return None
        if world_size > 1:
            raise UserError(f"{VARIABLE} is for a run of one process: only the lab sets it, so unset it")
        if not re.fullmatch(r"\d+,\d+", value):
            raise UserError(f"{VARIABLE} is two file descriptors, as in 5,6, not {value!r}. Only the lab sets it: unset it")
        requests, answers = value.split(",")
        return cls(int(requests), int(answers))

    def wait(self, step: int, compile_seconds: float) -> None:
        """Say that the run is ready, or that a stretch is over, and wait until another is asked for.

        step: the next one. compile_seconds: that the run has spent on compilation so far.
        Raises: Interrupted where no more steps are asked for.
        """
        before = self.compile_seconds
        try:
            print("ready" if before is None else f"done {step} {int(compile_seconds > before)}", file=self.answers, flush=True)
            request = self.requests.readline()
        except BrokenPipeError:
            request = ""
        if not request:
            raise Interrupted(signal.SIGHUP)  # the other end has hung up
        if not (found := re.fullmatch(r"go ([1-9]\d*)\n", request)):
            raise UserError(f"{VARIABLE}: expected 'go STEPS', not {request!r}")
        self.steps_left, self.compile_seconds = int(found[1]), compile_seconds
