"""The report's charts: an estimate with its interval and its margin; lines with a band over seeds; rows of dots, one per seed.

An estimate is drawn as SVG, which takes its colours from the page and needs no library. The others are drawn by matplotlib;
without it a report has no curves.
"""

import base64
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.training.curves import COLOURS, nice_step

AXIS_WIDTH, AXIS_HEIGHT, EDGE = 480, 67, 24  # an estimate's chart, in units of its view box; EDGE: beside the axis
WIDTH, HEIGHT, ROW = 5.6, 3.2, 0.32  # inches: width of a chart, height of one of lines, height of a row of dots


@dataclass(frozen=True)
class Estimate:
    """A value with its interval on an axis where better is to the right, with lines at zero and at a margin.

    low, high: None where an end is not known, which is drawn to the edge. required: the margin is to be exceeded; else it is
    what may just be lost. tick: the text of a number on the axis.
    """
    mean: float
    low: float | None
    high: float | None
    margin: float
    margin_label: str
    axis_label: str
    tick: Callable[[float], str]
    required: bool = True

    def svg(self, about: str) -> str:
        """The chart as an <svg> element; `about` is its text for those who cannot see it."""
        shown = [0.0, self.margin, self.mean, *(end for end in (self.low, self.high) if end is not None)]
        space = 0.12 * (max(shown) - min(shown))
        first, last, end = min(shown) - space, max(shown) + space, AXIS_WIDTH - EDGE

        def x(value: float) -> float:
            return round(EDGE + (end - EDGE) * (value - first) / (last - first), 1)
        low, high = x(first if self.low is None else self.low), x(last if self.high is None else self.high)
        bar = "" if self.low is None and self.high is None else f'<path class="range" d="M{low} 25H{high}"/>'
        margin, step = x(self.margin), nice_step((last - first) / 6)
        shade, start, width = ("good", margin, end - margin) if self.required else ("bad", EDGE, margin - EDGE)
        ticks = [step * i for i in range(math.ceil(first / step), math.floor(last / step) + 1)]
        parts = [
            f'<rect class="{shade}" x="{start}" y="12" width="{width:.1f}" height="26"/>',
            f'<path class="axis" d="M{EDGE} 38H{end}{"".join(f"M{x(t)} 38v4" for t in ticks)}"/>',
            f'<path class="zero" d="M{x(0.0)} 12V38"/><path class="margin" d="M{margin} 12V38"/>',
            f'{bar}<circle cx="{x(self.mean)}" cy="25" r="5"/>',
            *(f'<text x="{x(t)}" y="51">{self.tick(t)}</text>' for t in ticks),
            f'<text x="{min(max(margin, 60), AXIS_WIDTH - 60)}" y="9">{self.margin_label}</text>',
            f'<text x="{AXIS_WIDTH / 2}" y="64">{self.axis_label}</text>']
        return f'<svg role="img" aria-label="{about}" viewBox="0 0 {AXIS_WIDTH} {AXIS_HEIGHT}">{"".join(parts)}</svg>'


@dataclass(frozen=True)
class Lines:
    """Curves over one x axis. `curves`: name -> points (x, y, lowest y, highest y)."""
    x_label: str
    y_label: str
    curves: dict[str, list[tuple[float, float, float, float]]]
    log_x: bool = False

    def draw(self, figure) -> None:
        axes = figure.subplots()
        for colour, (name, points) in zip(COLOURS, self.curves.items(), strict=False):  # no more curves than colours
            x, y, low, high = zip(*points, strict=True)
            axes.plot(x, y, color=colour, marker="o", markersize=3, linewidth=1.2, label=name)
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.set(xlabel=self.x_label, ylabel=self.y_label, xscale="log" if self.log_x else "linear")
        if self.log_x:  # ticks at powers of ten and between them are too few or too many
            axes.set_xticks([x for x, *_ in points], [f"{x:.1e}" for x, *_ in points])
            axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)

    @property
    def height(self) -> float:
        return HEIGHT


@dataclass(frozen=True)
class Dots:
    """A row of dots per name. `intervals`: name -> (low, high), for the names that have one."""
    x_label: str
    values: dict[str, list[float]]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def draw(self, figure) -> None:
        axes = figure.subplots()
        for row, (name, values) in enumerate(self.values.items()):
            colour = COLOURS[row % len(COLOURS)]
            if name in self.intervals:
                axes.plot(self.intervals[name], [row, row], color=colour, linewidth=2)
            axes.plot(values, [row] * len(values), color=colour, marker="o", linestyle="", alpha=0.7)
        axes.set_yticks(range(len(self.values)), list(self.values))
        axes.set(xlabel=self.x_label, ylim=(len(self.values) - 0.5, -0.5))
        axes.grid(alpha=0.25, axis="x")

    @property
    def height(self) -> float:
        return 0.7 + ROW * len(self.values)


def save(chart: Lines | Dots, path: Path) -> str:
    """Draw `chart` to the PNG file `path`; return an <img> with the picture embedded, "" without data or without matplotlib."""
    if not (chart.curves if isinstance(chart, Lines) else chart.values):
        return ""
    try:
        from matplotlib.figure import Figure  # the object interface: no display, no global state
    except ImportError:
        return ""
    figure = Figure(figsize=(WIDTH, chart.height), layout="constrained")
    chart.draw(figure)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=180)
    path.write_bytes(picture.getvalue())
    encoded = base64.b64encode(picture.getvalue()).decode()
    return f'<img alt="{path.stem.replace("_", " ")}" src="data:image/png;base64,{encoded}">'
