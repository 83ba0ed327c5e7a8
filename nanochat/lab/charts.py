"""The report's charts: lines with a band over seeds, and rows of dots, one per seed, with an interval.

Without matplotlib a report has tables only.
"""

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path

COLOURS = ("#3366cc", "#dc3912", "#109618", "#ff9900", "#990099", "#0099c6", "#dd4477", "#66aa00")
WIDTH, HEIGHT, ROW = 5.6, 3.2, 0.32  # inches: width of a chart, height of one of lines, height of a row of dots


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
