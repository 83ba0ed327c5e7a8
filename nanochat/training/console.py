"""What a run prints: on a terminal a progress line rewritten in place, elsewhere plain lines now and then."""

import shutil
import sys
import time

from nanochat.common import format_duration, print0

LOG_EVERY_SECONDS = 5.0


class Console:

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


def progress_line(row: dict, num_iterations: int, recent_step_seconds: list[float], train_seconds: float,
                  max_train_seconds: float) -> str:
    """A step's row of metrics.jsonl as one line, with the time left: until the last step or --max-train-seconds (<= 0: none)."""
    done = row["step"] + 1
    eta = (num_iterations - done) * sum(recent_step_seconds) / len(recent_step_seconds)
    if max_train_seconds > 0:
        eta = min(eta, max(0.0, max_train_seconds - train_seconds))
    return (f"step {done:0{len(str(num_iterations))}d}/{num_iterations} ({100 * done / num_iterations:.1f}%) | "
            f"loss {row['smooth_loss']:.4f} | lr x{row['lr_multiplier']:.2f} | {row['dt_ms']:,.0f} ms | "
            f"{row['tok_per_sec']:,.0f} tok/s | {row['peak_mem_mib']:,.0f} MiB | {format_duration(train_seconds)} | "
            f"eta {format_duration(eta)}")
