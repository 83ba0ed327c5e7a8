"""What every part of the repository needs and none owns: user errors, the base directory, printing, progress. No torch."""

import os
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the checkout, or what an installed package lies in
BASE, HERE = "NANOCHAT_BASE_DIR", "NANOCHAT_CWD"


class UserError(Exception):
    """A problem the user can mend. The message says what is wrong and what to do; `cli` turns it into exit status 2.

    Ranks of one run meet the same problem, which rank 0 prints."""


class RankError(UserError):
    """One that a single rank has met: that rank prints it."""


class Diverged(Exception):
    """The loss or a gradient is not finite. The run ends with the status `diverged`."""


def user_dir() -> Path:
    """The folder that relative paths are meant from: the working directory, or, for a program that another one has started
    from the root of the checkout, that one's ($NANOCHAT_CWD)."""
    try:
        working = Path.cwd()
    except OSError:
        raise UserError("the folder you are in has been deleted: change to another one.") from None
    return Path(os.environ.get(HERE) or working) if working == ROOT else working


def resolve(path: str | os.PathLike) -> Path:
    """The absolute path that the user means, `~` and `~user` included. UserError where that home does not exist."""
    try:
        return user_dir() / Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no such home directory. Write the path out.") from None


def get_base_dir() -> Path:
    """Where tokenizers, tokens and runs live: `$NANOCHAT_BASE_DIR`, by default `~/.cache/nanochat`. Made if missing."""
    try:
        path = resolve(os.environ.get(BASE) or "~/.cache/nanochat")
    except UserError as e:
        raise UserError(f"no base directory: {e} Set {BASE} to a folder you can write to.") from None
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot use the base directory {path}: {e.strerror}. Set {BASE} to a folder you can write to.") from None
    return path


def is_main_rank() -> bool:
    """True on rank 0 of a torchrun job, and in any other process."""
    return os.environ.get("RANK", "0") == "0"


def print0(*args, **kwargs) -> None:
    """Print on rank 0 only. (nanochat/cli/output.py makes the streams tolerant.)"""
    if is_main_rank():
        print(*args, flush=True, **kwargs)


def format_duration(seconds: float) -> str:
    """A duration at a glance: `850ms`, `42s`, `3m12s`, `2h05m`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{s}s"


def format_table(rows: list[dict], columns: list[str] | None = None) -> str:
    """Rows as text in columns that line up; numbers to the right. `columns` defaults to the keys of the first row."""
    columns = columns or list(rows[0])
    cells = [[_cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(c), *(len(r[i]) for r in cells)) for i, c in enumerate(columns)]
    numeric = [all(isinstance(row.get(c), (int, float, type(None))) for row in rows) for c in columns]
    lines = [columns, *cells]
    return "\n".join("  ".join(v.rjust(w) if n else v.ljust(w) for v, w, n in zip(line, widths, numeric, strict=True)).rstrip()
                     for line in lines)


def _cell(value) -> str:
    if value is None:
        return "NA"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


class Progress:
    """Progress of long work with rate and ETA: one line rewritten on a terminal, a plain line now and then elsewhere.

    `Progress("tokenizing", total=10**8, unit="B")`, then `update(n)` as work is done and `close()`.
    `total=None` where the amount is not known beforehand. Silent on ranks other than 0.
    """

    def __init__(self, label: str, total: int | None = None, unit: str = "", plain_every: float = 10.0):
        self.label, self.total, self.unit = label, total, unit
        self.done, self.started = 0, time.monotonic()
        self.tty = sys.stderr.isatty()
        self.interval = 0.2 if self.tty else plain_every
        self.shown = self.started
        self.enabled = is_main_rank()

    def update(self, n: int = 1) -> None:
        self.done += n
        now = time.monotonic()
        if now - self.shown >= self.interval:
            self.shown = now
            self._show(end="" if self.tty else "\n")

    def close(self) -> None:
        """Show the final state; on a terminal the line is ended."""
        self._show(end="\n")

    def clear(self) -> None:
        """Take the line off a terminal, where something else is to stand."""
        if self.tty and self.enabled:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def _show(self, end: str) -> None:
        if not self.enabled:
            return
        elapsed = max(time.monotonic() - self.started, 1e-9)
        text = f"{self.label}: {_si(self.done)}{self.unit}"
        if self.total:
            text += f" of {_si(self.total)}{self.unit} ({100 * self.done / self.total:.0f}%)"
        text += f" | {_si(self.done / elapsed)}{self.unit}/s | {format_duration(elapsed)}"
        if self.total and 0 < self.done < self.total:
            text += f" | eta {format_duration(elapsed * (self.total - self.done) / self.done)}"
        if self.tty:  # a line that wraps could not be rewritten
            text = "\r\033[K" + text[:shutil.get_terminal_size().columns - 1]
        print(text, end=end, file=sys.stderr, flush=True)


def _si(n: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= limit:
            return f"{n / limit:.1f}{suffix}"
    return f"{n:.0f}"
