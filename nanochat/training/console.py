"""What a run prints: on a terminal a progress line rewritten in place, elsewhere plain lines now and then."""

import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

from nanochat.common import format_duration, print0

LOG_EVERY_SECONDS = 5.0
RECENT_STEPS = 50  # whose mean time foretells the time left


class Console:
    """The plain one. nanochat/training/live_view.py has one that draws more than a line."""

    def __init__(self):
        self.tty = sys.stdout.isatty()
        self.shown = 0.0         # time of the last progress line
        self.unfinished = False  # whether the cursor stands behind a progress line

    def is_due(self) -> bool:
        """Whether it is time for another progress line."""
        return self.tty or time.monotonic() - self.shown >= LOG_EVERY_SECONDS

    def progress(self, text: str) -> None:
        """Show a progress line."""
        self.shown = time.monotonic()
        if self.tty:  # a line that wraps could not be rewritten
            text = "\r\033[K" + text[:shutil.get_terminal_size().columns - 1]
        print0(text, end="" if self.tty else "\n")
        self.unfinished = self.tty

    def line(self, text: str) -> None:
        """Print a line that stays."""
        print0(("\n" if self.unfinished else "") + text)
        self.unfinished = False

    def row(self, row: dict) -> None:
        """Take note of a row of metrics.jsonl, of a step or of an evaluation in bits per byte."""

    def training(self):
        """The context of the training loop."""
        return nullcontext()


def steps_alike(start: int, end: int) -> float:
    """What steps cost whose cost does not differ (`Feature.cost_between`)."""
    return end - start


def time_left(done: int, num_iterations: int, recent_step_seconds: list[float], train_seconds: float,
              max_train_seconds: float, cost_between: Callable[[int, int], float] = steps_alike) -> float:
    """Seconds until the last step or --max-train-seconds (<= 0: none), by the time and the cost of the last steps."""
    recent = cost_between(max(0, done - len(recent_step_seconds)), done)
    left = cost_between(done, num_iterations) * sum(recent_step_seconds) / recent
    return min(left, max(0.0, max_train_seconds - train_seconds)) if max_train_seconds > 0 else left


def progress_line(row: dict, num_iterations: int, recent_step_seconds: list[float], train_seconds: float,
                  max_train_seconds: float, cost_between: Callable[[int, int], float] = steps_alike) -> str:
    """A step's row of metrics.jsonl as one line, with the time left."""
    done = row["step"] + 1
    eta = time_left(done, num_iterations, recent_step_seconds, train_seconds, max_train_seconds, cost_between)
    return (f"step {done:0{len(str(num_iterations))}d}/{num_iterations} ({100 * done / num_iterations:.1f}%) | "
            f"loss {row['smooth_loss']:.4f} | lr x{row['lr_multiplier']:.2f} | {row['dt_ms']:,.0f} ms | "
            f"{row['tok_per_sec']:,.0f} tok/s | {row['peak_mem_mib']:,.0f} MiB | {format_duration(train_seconds)} | "
            f"eta {format_duration(eta)}")
