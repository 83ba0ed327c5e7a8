"""Being told to stop: Ctrl-C (SIGINT), SIGTERM, a terminal that closes (SIGHUP).

The first signal is a wish, which the training loop grants at the next moment that leaves an exact resume: after the step.
Where nothing would be lost, in an evaluation say, it is raised at once. The second signal ends the process on the spot; a
checkpoint is written beside and renamed, so the one before it is whole. Exit status: 128 + the signal's number, as in a shell.

Under torchrun every rank gets the signal, but each in another moment. A rank that stopped by itself would leave the others
waiting in a collective. So the wish travels with the loss, which all ranks reduce at each step and read at the same step.
"""

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
ONE_WISH = 0.5  # seconds within which signals count as one: `timeout` and some launchers send theirs twice


class Interrupted(BaseException):
    """The run was told to stop by this signal. Like KeyboardInterrupt no Exception, so that nothing takes it for a failure."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class Signals:
    """The signals that this process got, from `with signals.caught()` on. A signal that was ignored before, by nohup say,
    stays so."""

    def __init__(self):
        self.received, self.when, self.raising = 0, 0.0, False  # received: the first signal's number

    @contextmanager
    def caught(self):
        """Take note of signals instead of dying of them. Only a process's main thread can; in others nothing changes."""
        wanted = SIGNALS if threading.current_thread() is threading.main_thread() else []
        before = {s: signal.getsignal(s) for s in wanted}
        caught = [s for s, handler in before.items() if handler not in (signal.SIG_IGN, None)]
        for s in caught:
            signal.signal(s, self._handle)
        try:
            yield
        finally:
            for s in caught:
                signal.signal(s, before[s])

    @contextmanager
    def raised(self, wanted: bool = True):
        """Inside, a signal is raised as Interrupted wherever it comes, if `wanted`."""
        if wanted and self.received:
            raise Interrupted(self.received)
        self.raising = wanted
        try:
            yield
        finally:
            self.raising = False

    def _handle(self, signum: int, frame) -> None:
        if not self.received:
            self.received, self.when = signum, time.monotonic()
            if signum == getattr(signal, "SIGHUP", None):
                _forget_terminal()
            if self.raising:
                raise Interrupted(signum)
        elif time.monotonic() - self.when > ONE_WISH:
            os._exit(128 + signum)


def _forget_terminal() -> None:
    """Let what is printed to a terminal that is gone go nowhere, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if stream.isatty():
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
