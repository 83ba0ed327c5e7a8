"""Signals that ask a run to stop: Ctrl-C (SIGINT), SIGTERM, and SIGHUP of a terminal that closes.

The first signal asks for a stop: the training loop stops after the step, from where a resume is exact. Where nothing would be
lost, in an evaluation for example, the signal is raised at once as `Interrupted`. The second signal ends the process on the
spot: a checkpoint is written under another name and renamed, so the one before it is whole. The exit status is 128 + the
signal's number, as in a shell.

Under torchrun every rank gets the signal, but each at another moment. A rank that stopped by itself would leave the others
waiting in a collective. So the signal's number is reduced over the ranks together with the loss: all learn of it at one step.
"""

import os
import signal
import sys
import threading
import time
from contextlib import contextmanager

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
DEBOUNCE_SECONDS = 0.5  # signals this close together count as one: `timeout` and some launchers send theirs twice


class Interrupted(BaseException):
    """The run was stopped by a signal. Like KeyboardInterrupt it is no Exception, so that no handler takes it for a failure."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class Signals:
    """The signals that this process got inside `with signals.install_handlers()`.

    received: the number of the first one, 0 before that. A signal that was ignored before, by nohup for example, stays ignored.
    """

    def __init__(self):
        self.received, self.when, self.raising = 0, 0.0, False

    @contextmanager
    def install_handlers(self):
        """Record signals instead of ending the process. Only in a process's main thread; in others nothing changes."""
        wanted = SIGNALS if threading.current_thread() is threading.main_thread() else []
        before = {s: signal.getsignal(s) for s in wanted}
        handled = [s for s, handler in before.items() if handler not in (signal.SIG_IGN, None)]
        for s in handled:
            signal.signal(s, self._handle)
        try:
            yield
        finally:
            for s in handled:
                signal.signal(s, before[s])

    @contextmanager
    def raise_immediately(self, wanted: bool = True):
        """Inside, if `wanted`, a signal raises Interrupted at whatever line it comes."""
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
        elif time.monotonic() - self.when > DEBOUNCE_SECONDS:
            os._exit(128 + signum)


def _forget_terminal() -> None:
    """Send what is printed to a closed terminal to /dev/null, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if stream.isatty():
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
