"""The live view of a run on a terminal (--ui rich): a few lines that `rich.live` draws below what is printed.

A thread of its own draws, from rows that were read anyway, so that neither a slow terminal nor the drawing holds up the training.
The cursor stays visible, in an empty line below the view: however the process ends, it leaves a terminal in order.
"""

import logging
import os
import re
import signal
import sys
import threading
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from nanochat.common import UserError, is_main_rank, print0
from nanochat.runtime.signals import Signals
from nanochat.training.auto_batch import memory_limit
from nanochat.training.console import Console
from nanochat.training.run_view import RunView, glyphs_for, stop_hint
from nanochat.training.state import RunPlan, TrainState

SECONDS_BETWEEN_DRAWINGS = 0.25


def open_console(plan: RunPlan, state: TrainState, signals: Signals) -> Console:
    """The console that --ui asks for: on rank 0, where standard output is a terminal that can move its cursor, the live view;
    for `auto` only if rich can be imported.

    Raises: UserError where --ui rich finds it broken. (That it is not installed, the check of the flags has said before.)
    """
    ui = plan.config.run.ui
    if ui == "plain" or not is_main_rank():
        return Console()
    drawable = sys.stdout.isatty()
    if drawable:
        try:
            console = rich_console()
        except ImportError as e:
            if ui == "auto":
                return Console()
            raise UserError(f"--ui rich: {e}. Reinstall it (pip install --force-reinstall rich), or leave out --ui.") from None
        drawable = console.is_interactive  # not where TERM is dumb
    if drawable:
        return LiveConsole(console, plan, state, signals)
    if ui == "rich":
        print0("note: --ui rich needs a terminal, so plain lines follow")
    return Console()


def rich_console():
    """rich's console on standard output. It asks the terminal for its size each time: $COLUMNS and $LINES, where they are
    exported, would hide that it has another one now. Raises: ImportError without rich."""
    from rich.console import Console as RichConsole
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    return RichConsole(file=sys.stdout, markup=False, highlight=False, emoji=False, _environ=environment)


class LiveConsole(Console):
    """Draws the view while the run trains. Before and after that it prints lines, as any console."""

    def __init__(self, console, plan: RunPlan, state: TrainState, signals: Signals):
        super().__init__()
        self.console, self.plan, self.state, self.signals = console, plan, state, signals
        self.glyphs = glyphs_for(console.encoding)
        self.lock = threading.RLock()     # held by who writes to the terminal
        self.view: RunView | None = None  # while the run trains
        self.changing = False             # whether the view is not in its last state

    def is_due(self) -> bool:
        return False

    def progress(self, text: str) -> None:
        """Nothing: the view says more."""

    def row(self, row: dict) -> None:
        if self.view:
            self.view.add(row)

    @contextmanager
    def training(self):
        """Inside, the view is drawn below all that is printed. Its last state stays, as text."""
        plan, state = self.plan, self.state
        self.view = RunView(
            name=plan.config.model_tag, num_iterations=plan.horizon.num_iterations, n_layer=plan.shape.n_layer,
            tokens_per_step=plan.horizon.total_batch_size, max_train_seconds=plan.config.run.max_train_seconds,
            memory_mib=memory_limit(plan.device) / 2**20, cost_between=state.features.cost_between, steps=state.step,
            evaluations={step: bpb for step, _, bpb in state.stats.val_curve})
        try:
            with printed_above(self), self._drawing():
                yield
        finally:
            self.view = None

    @contextmanager
    def _drawing(self):
        """Inside, a thread draws the view. rich's own would not hold the lock while somebody prints."""
        from rich.live import Live
        live = Live(self, console=self.console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False,
                    vertical_overflow="crop")
        ended = threading.Event()

        def draw():
            while not ended.wait(SECONDS_BETWEEN_DRAWINGS):
                with self.lock:
                    live.refresh()

        thread = threading.Thread(target=draw, name="live view", daemon=True)
        try:
            with self.lock:
                self.changing = True
                live.start()
                self.console.show_cursor(True)  # which rich hides
            thread.start()
            yield
        finally:
            ended.set()
            if thread.is_alive():
                thread.join()
            with self.lock:
                self.changing = False
                live.stop()

    def __rich_console__(self, console, options):
        """The view as rich asks for it, with each drawing."""
        from rich.text import Text
        hint = stop_hint(self.signals.received, self.signals.raising) if self._ctrl_c_is_handled() else []
        try:
            lines = self.view.lines(options.size.width, options.size.height, self.glyphs, hint, self.changing)
        except Exception as e:  # a run must not end because of its picture
            lines = [[(f"the view cannot be drawn: {type(e).__name__}: {e}", "")]]
        for line in lines:
            yield Text.assemble(*line, no_wrap=True, overflow="crop")

    def _ctrl_c_is_handled(self) -> bool:
        """Whether there is something to say about it: it may be ignored (nohup), and at the end only what it has done counts."""
        return bool(self.signals.received) or (self.changing and signal.getsignal(signal.SIGINT) != signal.SIG_IGN)

    def print_above(self, lines: list[str]) -> None:
        """Print lines as they are, colours included; long ones are left to the terminal to wrap, so that they can be copied."""
        from rich.ansi import AnsiDecoder
        from rich.text import Text
        decoder = AnsiDecoder()
        with self.lock:
            self.console.print(Text("\n").join(decoder.decode_line(line.rstrip("\r")) for line in lines), soft_wrap=True)


class StreamAbove:
    """Stands for a standard stream while the view is drawn: whole lines go above it; a line without an end, such as a progress
    bar that is rewritten in place, is shown in it."""

    def __init__(self, stream, console: LiveConsole):
        self.stream, self.console, self.rest = stream, console, ""

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        view = self.console.view
        if not view:  # somebody has kept this object
            return self.stream.write(text)
        *lines, rest = (self.rest + text).split("\n")
        if lines:
            self.console.print_above(lines)
        self.rest = rest.rpartition("\r")[2] if not rest.endswith("\r") else rest
        view.doing = re.sub("\033\\[[0-9;]*[A-Za-z]", "", self.rest).strip()
        return len(text)

    def writelines(self, lines) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        """Nothing: lines are written when they end."""

    def finish(self) -> None:
        """Print what is left of a line."""
        if self.rest.strip():
            self.write("\n")


@contextmanager
def printed_above(console: LiveConsole):
    """Inside, what is printed to the standard streams goes above the view: also by handlers of `logging`, such as torch's, which
    hold the streams since they were made."""
    out, errors = StreamAbove(sys.stdout, console), StreamAbove(sys.stderr, console)
    moved = []
    try:
        with redirect_stdout(out), redirect_stderr(errors):
            for logger in [logging.root, *logging.root.manager.loggerDict.values()]:
                for handler in getattr(logger, "handlers", ()):
                    for above in (out, errors):
                        if isinstance(handler, logging.StreamHandler) and handler.stream is above.stream:
                            moved.append((handler, handler.setStream(above)))
            yield
    finally:
        for handler, stream in moved:
            handler.setStream(stream)
        out.finish()
        errors.finish()
