"""Charts of runs as SVG: curves, a map of the blocks that were trained, bars. They need no library and take their colours from
the page that they stand in (nanochat/training/page.py). No torch.

A run has as many points as steps. What is drawn has at most some hundred: each stands for a group of neighbours.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from nanochat.training.page import figure

WIDTH, HEIGHT = 360, 216  # of a chart, in units of its view box: pixels on a phone
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 8, 36  # around the plot
MOST_POINTS = 150  # of a curve; as many columns has a map
START = 0.1  # share of the points, the first ones, that do not decide how high the picture is
RARE = 0.01  # share of the later ones, the highest, that do not either
LEVELS = 4  # shades of a map
COLOURS = ("#3366cc", "#dc3912", "#109618", "#ff9900", "#990099", "#0099c6", "#dd4477", "#66aa00")
ON_DARK = ("#7ba4ff", "#ff7a5c", "#4fd15c", "#ffb547", "#d98cff", "#4fd0ee", "#ff8fb4", "#a5d64c")
STYLE = f"""
:root {{ {'; '.join(f'--c{i}: {colour}' for i, colour in enumerate(COLOURS))} }}
@media (prefers-color-scheme: dark) {{ :root {{ {'; '.join(f'--c{i}: {colour}' for i, colour in enumerate(ON_DARK))} }} }}
{' '.join(f'.c{i} {{ --c: var(--c{i}) }}' for i in range(len(COLOURS)))}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem 1.5rem }}
figure {{ margin: 0 }} figcaption {{ font-size: .85rem }} figcaption small {{ display: block; opacity: .8 }}
svg .grid {{ stroke: var(--line); fill: none }} svg .ticks-y text {{ text-anchor: end }}
svg .line {{ stroke: var(--c); fill: none; stroke-width: 1.6; stroke-linejoin: round }}
svg .band {{ stroke: var(--c); fill: var(--c); stroke-width: .5; opacity: .35 }} svg .dot {{ fill: var(--c) }}
svg .cells {{ fill: var(--c) }}
.legend {{ display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; list-style: none; font-size: .85rem }}
.legend i, td i {{ display: inline-block; height: .8em; background: var(--c); border-radius: .1em }}
.legend i {{ width: 1.4em; margin-right: .4em }} td i {{ min-width: 1px }}
.parts {{ width: 100% }} .parts td:first-child {{ white-space: normal }}
td.bar {{ width: 45%; min-width: 3rem; text-align: left }}
"""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """Points (x, y), x ascending. kind: "line", "dots" (a line with a dot per point), or "band" (a faint one, from the lowest to
    the highest of neighbours). colour: a place in COLOURS."""
    name: str
    points: Points
    kind: str = "line"
    colour: int = 0


def chart(title: str, x_label: str, y_label: str, curves: Sequence[Curve], last: float = 0.0) -> str:
    """Curves over one x axis as a <figure>; "" without a point. Early values and spikes far above the others are cut off, and
    named.

    last: where the x axis ends, if not at the last point.
    """
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    last = max(last, *(curve.points[-1][0] for curve in curves)) or 1.0
    low, high, highest = y_range(curves)
    plot = Plot(last, low, high)
    note = f"<small>Values up to {figure(highest)} are above the picture.</small>" if highest > high else ""
    drawn = "".join(f'<g class="c{curve.colour}">{_drawn(curve, plot)}</g>' for curve in curves)
    ends = "; ".join(f"{curve.name} ends at {figure(curve.points[-1][1])}" for curve in curves if curve.kind != "band")
    return (f"<figure><figcaption>{escape(title)}{note}</figcaption>"
            f"{plot.svg(f'{title}: {ends}', y_label, x_label, drawn, plot.ticks())}</figure>")


def y_range(curves: Sequence[Curve]) -> tuple[float, float, float]:
    """(lowest y of the picture, highest y of the picture, highest value of all). A loss falls far in its first steps, and may
    jump for one: shown in full, this would press all else flat."""
    values = [y for curve in curves for _, y in curve.points]
    later = sorted(y for curve in curves for _, y in curve.points[int(START * len(curve.points)):])
    usual, middle = later[math.ceil((1 - RARE) * (len(later) - 1))], later[len(later) // 2]
    low, high, highest = min(values), min(later[-1], usual + (usual - middle)), max(values)
    if highest - low < 1.5 * (high - low):
        high = highest
    space = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - space, high + space, highest


@dataclass(frozen=True)
class Plot:
    """The place of a picture within its chart: x from 0 to last, y from low to high."""
    last: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * value / self.last, 1)

    def y(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.low) / (self.high - self.low), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and labels on the y axis."""
        return axis_ticks(self.low, self.high, 5)

    def svg(self, about: str, y_label: str, x_label: str, drawn: str, y_ticks: Sequence[tuple[float, str]]) -> str:
        """The chart: axes with their labels, and what is drawn. about: for who cannot see it."""
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        x_ticks = axis_ticks(0.0, self.last, 5)
        grid = "".join(f"M{self.x(t)} {TOP}V{bottom}" for t, _ in x_ticks)
        grid += "".join(f"M{LEFT} {self.y(t)}H{right}" for t, _ in y_ticks)
        x_labels = "".join(f'<text x="{self.x(t)}" y="{bottom + 13}">{label}</text>' for t, label in x_ticks)
        y_labels = "".join(f'<text x="{LEFT - 5}" y="{self.y(t) + 3.5}">{label}</text>' for t, label in y_ticks)
        return (f'<svg role="img" aria-label="{escape(about)}" viewBox="0 0 {WIDTH} {HEIGHT}"><path class="grid" d="{grid}"/>'
                f'{drawn}{x_labels}<g class="ticks-y">{y_labels}</g>'
                f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 6}">{escape(x_label)}</text>'
                f'<text transform="translate(11 {(TOP + bottom) / 2}) rotate(-90)">{escape(y_label)}</text></svg>')


def _drawn(curve: Curve, plot: Plot) -> str:
    """The paths of a curve, cut off at the upper edge of the picture."""
    groups = grouped(curve.points)
    if curve.kind == "band":
        upper = [(group[0][0], min(plot.high, max(y for _, y in group))) for group in groups]
        lower = [(group[0][0], min(plot.high, min(y for _, y in group))) for group in groups]
        return f'<path class="band" d="{_path([*upper, *reversed(lower)], plot)}Z"/>'
    points = [curve.points[0], *(group[-1] for group in groups)]
    dots = "".join(f'<circle class="dot" cx="{plot.x(x)}" cy="{plot.y(y)}" r="2.2"><title>{figure(y)}</title></circle>'
                   for x, y in points if y <= plot.high) if curve.kind == "dots" and len(points) <= MOST_POINTS // 2 else ""
    paths = "".join(_path(part, plot) for part in below(points, plot.high))
    return f'<path class="line" d="{paths}"/>{dots}'


def _path(points: Points, plot: Plot) -> str:
    return "M" + "L".join(f"{plot.x(x)} {plot.y(y)}" for x, y in points)


def below(points: Points, limit: float) -> list[list[tuple[float, float]]]:
    """The parts of a line that are not above `limit`, with the places where it crosses it."""
    parts: list[list[tuple[float, float]]] = [[]]
    for (x0, y0), (x1, y1) in pairwise([points[0], *points]):
        crosses = (y0 > limit) != (y1 > limit)
        crossing = (x0 + (x1 - x0) * (limit - y0) / (y1 - y0), limit) if crosses else None
        if y1 <= limit:
            parts[-1] += [crossing, (x1, y1)] if crossing else [(x1, y1)]
        elif crossing:
            parts[-1].append(crossing)
            parts.append([])
    return [part for part in parts if part]


def grouped(items: Sequence, most: int = MOST_POINTS) -> list[Sequence]:
    """Neighbours in groups of one size, at most `most` groups."""
    size = max(1, math.ceil(len(items) / most))
    return [items[i:i + size] for i in range(0, len(items), size)]


def block_map(title: str, x_label: str, ends: Sequence[float], trained: Sequence[range], blocks: int) -> str:
    """Which blocks were trained, as a <figure>: a row per block, the top block above; the darker, the larger the share of steps.

    ends: x at the end of each step, ascending. trained: the blocks that the step trained, of range(blocks).
    """
    plot = Plot(ends[-1], 0.0, float(blocks))
    columns, begin = [], 0.0  # (x of its begin and end, shade of each block)
    for group in grouped(list(zip(ends, trained, strict=True))):
        shades = [round(LEVELS * sum(block in which for _, which in group) / len(group)) for block in range(blocks)]
        columns.append((begin, group[-1][0], shades))
        begin = group[-1][0]
    paths: dict[int, str] = {}
    for block in range(blocks):
        y, height = plot.y(block + 1), round(plot.y(block) - plot.y(block + 1), 1)
        at = 0
        while at < len(columns):  # neighbours of one shade are one rectangle
            end = at
            while end + 1 < len(columns) and columns[end + 1][2][block] == columns[at][2][block]:
                end += 1
            x, right = plot.x(columns[at][0]), plot.x(columns[end][1])
            shade = columns[at][2][block]
            paths[shade] = paths.get(shade, "") + f"M{x} {y}H{right}v{height}H{x}Z"
            at = end + 1
    drawn = "".join(f'<path class="cells" opacity="{0.08 + 0.92 * shade / LEVELS:.2f}" d="{path}"/>'
                    for shade, path in sorted(paths.items()))
    step = max(1, math.ceil(blocks / 8))
    ticks = [(block + 0.5, str(block + 1)) for block in range(0, blocks, step)]
    average = sum(map(len, trained)) / len(trained)
    about = f"{title}: {figure(average)} of {blocks} blocks were trained on average"
    return (f'<figure class="c2"><figcaption>{escape(title)}</figcaption>'
            f'{plot.svg(about, "block", x_label, drawn, ticks)}</figure>')


def legend(names: Sequence[str]) -> str:
    """The names of curves beside their colours."""
    items = "".join(f'<li class="c{i}"><i></i>{escape(name)}</li>' for i, name in enumerate(names))
    return f'<ul class="legend">{items}</ul>'


def bar(share: float) -> str:
    """A cell of a table with a bar of this share of its width."""
    return f'<td class="bar c0"><i style="width:{100 * share:.1f}%"></i></td>'


def time_axis(longest: float) -> tuple[float, str]:
    """Seconds of a unit, and the unit's name, for an axis up to `longest` seconds."""
    return next(((size, name) for size, name in ((3600.0, "hours"), (60.0, "minutes")) if longest > 3 * size), (1.0, "seconds"))


def axis_ticks(first: float, last: float, about: int) -> list[tuple[float, str]]:
    """Round places on an axis, some `about` of them, and their labels."""
    step = nice_step((last - first) / about)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    places = [step * i for i in range(math.ceil(first / step - 1e-9), math.floor(last / step + 1e-9) + 1)]
    size, suffix = next(((s, n) for s, n in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if step >= s and last >= 1e4), (1.0, ""))
    return [(place, f"{place / size:.{decimals if size == 1 else 0}f}{suffix if place else ''}") for place in places]


def nice_step(least: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
