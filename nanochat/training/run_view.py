"""What the live view of a run says: lines of text for a terminal of any size, made from rows of metrics.jsonl alone, so that it
costs the device nothing. nanochat/training/live_view.py draws them. No torch."""

import math
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from nanochat.common import format_duration
from nanochat.training.console import RECENT_STEPS, steps_alike, time_left

WIDEST, MOST_LINES = 100, 11           # of the view, whatever the terminal has; the last line is empty
ROWS_ABOVE = 3                         # of the terminal, left for the lines that scroll above the view
LABEL = len("memory ")
NARROW = 60                            # a line of fewer characters has no room for words
CHANGE_OVER = 100                      # steps between the two losses whose difference is shown
QUIET_SECONDS = 5.0                    # without a step, until the view says for how long
Line = list[tuple[str, str]]           # pieces of text, each with a style of rich's


@dataclass(frozen=True)
class Glyphs:
    """The characters of the drawings: a curve's levels from low to high, a bar's two parts, a layer that is trained or not."""
    levels: str
    full: str
    empty: str
    trained: str
    frozen: str


BLOCKS, ASCII = Glyphs("▁▂▃▄▅▆▇█", "━", "─", "█", "·"), Glyphs("_.:-=+*#", "#", "-", "#", ".")


def glyphs_for(encoding: str) -> Glyphs:
    """The block characters where an encoding has them, else ASCII."""
    try:
        "".join(vars(BLOCKS).values()).encode(encoding)
        return BLOCKS
    except (UnicodeEncodeError, LookupError):
        return ASCII


class Curve:
    """Values in the order of their coming. Of many, neighbours are averaged, so that it stays short."""

    MOST = 512

    def __init__(self):
        self.points: list[float] = []
        self.stride, self.waiting = 1, []  # values per point; those that are no point yet

    def add(self, value: float) -> None:
        self.waiting.append(value)
        if len(self.waiting) == self.stride:
            self.points.append(statistics.fmean(self.waiting))
            self.waiting = []
        if len(self.points) == self.MOST:
            self.points = [statistics.fmean(pair) for pair in zip(self.points[::2], self.points[1::2], strict=True)]
            self.stride *= 2


def sparkline(values: list[float], width: int, levels: str) -> str:
    """A curve in one line of at most `width` characters. Many values are averaged in groups. The highest tenth is cut off at the
    top: the first steps of a training would press the rest of it flat. Values that are not finite are left out."""
    values = [value for value in values if math.isfinite(value)]
    if len(values) > width:
        edges = [len(values) * i // width for i in range(width + 1)]
        values = [statistics.fmean(values[start:end]) for start, end in zip(edges, edges[1:], strict=False)]
    if not values:
        return ""
    ranked = sorted(values)
    low, high = ranked[0], ranked[math.ceil(0.9 * (len(ranked) - 1))]
    span = high - low or ranked[-1] - low or 1.0
    return "".join(levels[min(int((value - low) / span * len(levels)), len(levels) - 1)] for value in values)


def gauge(share: float, width: int, glyphs: Glyphs) -> str:
    """A bar whose first part is this share of it, 0 to 1."""
    full = int(min(max(share, 0.0), 1.0) * width)
    return glyphs.full * full + glyphs.empty * (width - full)


def layer_map(start: int, trained: int, layers: int, width: int, glyphs: Glyphs) -> str:
    """One character per layer: so many from `start` on are trained. Of more layers than `width`, each stands for several."""
    shown = min(layers, width)
    return "".join(glyphs.trained if (i + 1) * layers / shown > start and i * layers / shown < start + trained else glyphs.frozen
                   for i in range(shown))


def stop_hint(received: int, at_once: bool) -> list[str]:
    """What Ctrl-C does now, and what a second one does (nanochat/runtime/signals.py).

    received: the number of the signal that has come, 0 before that.
    at_once: whether the first one ends the run at once instead of after the step.
    """
    if received:
        return [f"{signal.Signals(received).name}: this step, a checkpoint, the end", "Ctrl-C: end at once, without saving"]
    return ["Ctrl-C: end now, nothing is lost" if at_once else "Ctrl-C: save and end after this step",
            "twice: end at once, without saving"]


@dataclass
class RunView:
    """The view of a run that has taken `steps` of `num_iterations` steps. Its methods may be called from any thread.

    evaluations: step -> bits per byte.   memory_mib: of memory, that the run may use in all.
    """
    name: str
    num_iterations: int
    tokens_per_step: int
    n_layer: int
    max_train_seconds: float                    # <= 0: no limit
    memory_mib: float
    cost_between: Callable[[int, int], float] = steps_alike
    steps: int = 0
    evaluations: dict[int, float] = field(default_factory=dict)

    def __post_init__(self):
        self.lock, self.arrived, self.doing = threading.Lock(), time.monotonic(), ""
        self.row: dict | None = None                     # of the last step
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)  # seconds of the last steps
        self.smooth: deque[float] = deque(maxlen=CHANGE_OVER + 1)
        self.loss, self.counted, self.seconds, self.suffix = Curve(), 0, 0.0, False

    def add(self, row: dict) -> None:
        """Take over a row of metrics.jsonl, of a step or of an evaluation."""
        with self.lock:
            if "val_bpb" in row:
                self.evaluations[row["step"]] = row["val_bpb"]
                return
            if self.row and row["step"] <= self.row["step"]:  # the run has gone back to a checkpoint
                self.evaluations = {step: bpb for step, bpb in self.evaluations.items() if step <= row["step"]}
                self.smooth.clear()
            self.row, self.steps, self.arrived = row, row["step"] + 1, time.monotonic()
            self.recent.append(row["dt_ms"] / 1000)
            self.smooth.append(row["smooth_loss"])
            self.loss.add(row["smooth_loss"])
            self.counted, self.seconds = self.counted + 1, self.seconds + row["dt_ms"] / 1000
            self.suffix |= row["step_kind"] != "full"

    def lines(self, columns: int, rows: int, glyphs: Glyphs, hint: list[str], changing: bool = True) -> list[Line]:
        """The view as lines that are narrower than the terminal. In a short one the less important are left out.

        hint: what Ctrl-C does.   changing: False for the last state, below which anything may be printed.
        """
        width = max(min(columns, WIDEST) - 1, 1)
        with self.lock:
            ranked = self._ranked_lines(width, glyphs, hint, changing)
        room = max(min(MOST_LINES, rows - ROWS_ABOVE), 1)
        kept = sorted(sorted(range(len(ranked)), key=lambda i: ranked[i][0])[:room])
        return [cut(ranked[i][1], width) for i in kept]

    def _ranked_lines(self, width: int, glyphs: Glyphs, hint: list[str], changing: bool) -> list[tuple[int, Line]]:
        """(rank, line) from top to bottom. The lower the rank, the more important."""
        row, size = self.row or {}, max(8, min(40, width - 45))  # of the drawings

        def line(label: str, drawing: str, style: str, *parts: str) -> Line:
            return [(label.ljust(LABEL), "bold"), (drawing.ljust(size) + "  ", style),
                    (joined(width - LABEL - size - 2, *parts), "")]

        share = self.steps / max(self.num_iterations, 1)
        found = [(9, [(f"{glyphs.empty * 2} {self.name} ".ljust(LABEL + size, glyphs.empty), "dim")]),
                 (1, line("step", gauge(share, size, glyphs), "cyan", f"{self.steps:,}/{self.num_iterations:,}",
                          f"{100 * share:.1f} %", *([f"lr x{row['lr_multiplier']:.2f}"] if row else []))),
                 (1, [("time".ljust(LABEL), "bold"), (joined(width - LABEL, *self._times()), "")])]
        if row:
            loss, steps = f"{row['smooth_loss']:.4f} | {self.smooth[-1] - self.smooth[0]:+.4f}", len(self.smooth) - 1
            found += [(2, line("loss", sparkline(self.loss.points, size, glyphs.levels), "green",
                               loss if width < NARROW else f"{loss} in {steps} steps"))]
        if self.evaluations:
            best = min(self.evaluations, key=lambda step: (not math.isfinite(self.evaluations[step]), self.evaluations[step]))
            found += [(4, line("bpb", sparkline(list(self.evaluations.values()), size, glyphs.levels), "magenta",
                               f"{self.evaluations[max(self.evaluations)]:.4f}",
                               f"best {self.evaluations[best]:.4f} at step {best}"))]
        if row:
            if self.suffix:
                drawn = layer_map(row["active_start"], row["active_layers"], self.n_layer, size, glyphs)
                found += [(6, line("layers", drawn, "yellow", f"{row['active_layers']} of {self.n_layer} trained",
                                   row["step_kind"]))]
            peak = row["peak_mem_mib"]
            found += [(7, line("memory", gauge(peak / self.memory_mib, size, glyphs), "blue",
                               f"{peak:,.0f} of {self.memory_mib:,.0f} MiB", f"{100 * peak / self.memory_mib:.1f} %")),
                      (5, [("speed".ljust(LABEL), "bold"), (joined(width - LABEL, *self._speeds()), "")])]
        if self.doing and changing:
            found += [(3, [("now".ljust(LABEL), "bold"), (self.doing, "")])]
        one = " | ".join(hint)
        found += [(1, [(text, "yellow")]) for text in ([one] if len(one) <= width else hint) if text]
        if changing:
            found += [(0, [("", "")])]  # where the cursor stands: what is typed, and a shell after a kill, find an empty line
        return found

    def _times(self) -> list[str]:
        spent = f"{format_duration(self.row['train_time_sec'])} of training" if self.row else "no step yet"
        waiting = time.monotonic() - self.arrived
        if not self.recent:
            return [spent, f"started {format_duration(waiting)} ago"]
        mean = statistics.fmean(self.recent)
        left = time_left(self.steps, self.num_iterations, list(self.recent), self.row["train_time_sec"], self.max_train_seconds,
                         self.cost_between)
        quiet = waiting > max(QUIET_SECONDS, 3 * mean) and self.steps < self.num_iterations
        return [spent, f"eta {format_duration(left)}", *([f"last step {format_duration(waiting)} ago"] if quiet else [])]

    def _speeds(self) -> list[str]:
        mean = statistics.fmean(self.recent)
        mfu = self.row.get("mfu")
        return [f"{self.tokens_per_step / mean:,.0f} tok/s", f"mean {self.tokens_per_step * self.counted / self.seconds:,.0f}",
                f"{1000 * mean:,.{0 if mean >= 0.1 else 1}f} ms per step", *([f"MFU {100 * mfu:.1f} %"] if mfu else [])]


def joined(width: int, *parts: str) -> str:
    """The first of the parts that fit into `width` characters together; the first one anyhow."""
    text = parts[0]
    for part in parts[1:]:
        if len(text) + len(part) + 3 > width:
            break
        text += f" | {part}"
    return text


def cut(line: Line, width: int) -> Line:
    """The line without what would be beyond `width` characters, and without spaces at its end."""
    shown, text = [], "".join(text for text, _ in line)[:width].rstrip()
    for piece, style in line:
        shown.append((text[:len(piece)], style))
        text = text[len(piece):]
    return shown
