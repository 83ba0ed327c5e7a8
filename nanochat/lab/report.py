"""report.html of an experiment's folder: what was decided and by which numbers; then curves, tables, commands, machine.

One self-contained file that loads nothing from elsewhere. Its pictures are embedded, and saved beside it as PNG. It is written
from the folder's rows and verdict.json; what one of them does not have is left out.
"""

import json
import math
import statistics
from collections.abc import Callable
from contextlib import suppress
from html import escape
from pathlib import Path

from nanochat.common import UserError, format_duration
from nanochat.lab.charts import COLOURS, Dots, Estimate, Lines, save
from nanochat.lab.gain import measure_of, succeeded
from nanochat.lab.gates import BPB_MARGIN, FALLBACK_GAIN
from nanochat.lab.rows import number, read_result, read_rows
from nanochat.lab.stats import margin_of_error
from nanochat.runtime.files import write_atomic
from nanochat.training.page import figure, page, table

BPB = "validation (bits per byte)"
MEANINGS = {"promote": "A real gain: every gate passed.", "keep optional": "Not worth a default: it stays an option.",
            "no change": "It makes no difference.", "inconclusive": "The data cannot tell yet.",
            "reject": "Not to be used: it is worse, or something broke."}
CAPTION = ("The dot is the estimate, the bar its 95 % interval, the dashed line the margin. Better is to the right. The net "
           "gain is the time saved less what the quality lost is worth in time.")
MARKS = {"pass": "\N{CHECK MARK}", "unclear": "?", "fail": "\N{BALLOT X}"}
STYLE = """
@media (prefers-color-scheme: dark) { img { filter: invert(.9) hue-rotate(180deg) } }
.verdict { border-left: .5rem solid; padding: .6rem 1rem; background: #8881 } .verdict b { font-size: 1.3rem }
.promote { border-color: var(--good) } .reject { border-color: var(--bad) } .inconclusive { border-color: var(--open) }
.keep, .no { border-color: var(--blue) }
.numbers p { margin: .8rem 0 0 }
svg .axis, svg .zero { stroke: var(--text); fill: none } svg .margin { stroke: var(--text); stroke-dasharray: 4 3 }
svg .range { stroke: var(--blue); stroke-width: 5 } svg circle { fill: var(--blue); stroke: var(--back); stroke-width: 1.5 }
svg .good { fill: var(--good); opacity: .15 } svg .bad { fill: var(--bad); opacity: .15 }
.pass { color: var(--good) } .fail { color: var(--bad) } .unclear { color: var(--open) }
img { width: 100%; height: auto; border-radius: .3rem }
"""


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html, and its pictures beside it.

    Raises: UserError where the folder holds no runs.
    """
    rows, verdict = read_rows(folder), read_result(folder / "verdict.json")
    if not rows and not verdict:
        raise UserError(f"{folder} holds no runs of the lab")
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["variant"], []).append(row)
    shown = [name for name in verdict.get("variants", {}) if name in groups] or list(groups)
    main = {name: groups[name] for name in shown if not name.startswith(("baseline-", "pilot-", "control"))}
    parts = [f"<h1>{escape(verdict.get('about', folder.name))}</h1>", *_decision(verdict, main)]

    def picture(heading: str, name: str, chart: Lines | Dots, about: str) -> None:
        if image := save(chart, folder / f"{name}.png"):
            parts.append(f"<h2>{escape(heading)}</h2>{image}<p>{about}</p>")
    for x, label in (("step", "optimizer step"), ("time", "training time (s)")):
        curves = {name: points for name, found in list(main.items())[:len(COLOURS)] if (points := curve(found, x))}
        picture(f"Validation over {label.split(' (')[0]}", f"val_bpb_by_{x}", Lines(label, BPB, curves),
                "Mean over seeds; the band is lowest to highest.")
    if times := times_to_target(main):
        metric, threshold = (next(iter(main.values()))[0][f"target_metric_{part}"] for part in ("name", "threshold"))
        picture(f"Time to target: {metric} of {threshold}", "time_to_target", times,
                "A dot is a seed. The line is the 95 % confidence interval of the mean, where there are two or more seeds.")
    for heading, field, label in (("Throughput", "tok_per_sec_median", "tokens per second, median over steps"),
                                  ("Memory", "peak_mem_mib", "peak memory (MiB)")):
        picture(heading, field, Dots(label, {name: values for name, found in main.items() if (values := [
            row[field] for row in found if number(row[field]) is not None])}), "A dot is a seed.")
    if verdict.get("series"):
        picture("Over depths", "scaling", scaling(verdict["series"]), "A point is a depth; the band is lowest to highest seed.")
        parts.append(_table(verdict["series"]))
    for title in ("ranking", "card"):
        if verdict.get(title):
            found = verdict[title]
            parts.append(f"<h2>{title.capitalize()}</h2>" + (_table(found) if isinstance(found, list) else
                                                             f"<pre>{escape(json.dumps(_rounded(found), indent=1))}</pre>"))
    if figures := [{"variant": name, **found} for name, found in verdict.get("variants", {}).items()]:
        parts.append("<h2>Figures</h2>" + _table(figures))
    if rows:
        parts.append("<h2>Runs</h2>" + _table([{k: row.get(k) for k in (
            "variant", "seed", "status", "steps_done", "train_time_sec", "compile_time_sec", "eval_time_sec", "dt_median_ms",
            "tok_per_sec_median", "final_train_loss", "val_bpb", "lab_val_bpb", "time_to_target_sec_measured",
            "time_to_target_sec_extrapolated", "peak_mem_mib", "other_load")} for row in rows]))
        parts.append("<h2>Machine and source</h2>" + _table(_machines(rows), "text"))
        commands = "".join(f"<pre>{escape(row['command'])}</pre>" for row in rows if row["command"])
        parts.append(f"<details><summary>Commands</summary>{commands}</details>" if commands else "")
    write_atomic(folder / "report.html", page(folder.name, parts, STYLE))
    return folder / "report.html"


# --- the verdict and its numbers -----------------------------------------------------------------------------------


def _decision(verdict: dict, variants: dict[str, list[dict]]) -> list[str]:
    """The parts of the page that say what was decided, by which numbers and gates, at what cost, and what would change it."""
    if not verdict:
        return ['<p class="verdict inconclusive">not decided yet: the experiment is not over</p>']
    decision, unit = verdict["decision"], quality_unit(variants)
    parts = [f'<p class="verdict {decision.split()[0]}"><b id="verdict">{escape(decision)}</b>: '
             f"{escape(_compared(verdict, variants))} {MEANINGS.get(decision, '')}<br>{escape(verdict['why'])}</p>"]
    drawn = [f"<p><b>{title}</b> {escape(words)}</p>{estimate.svg(escape(f'{title}: {words}'))}"
             for title, words, estimate in estimates(verdict, unit)]
    if drawn:
        parts.append(f'<div class="numbers">{"".join(drawn)}</div><p>{CAPTION}</p>')
    if depths := [{"depth": depth, "decision": found["decision"]} | {title: words for title, words, _ in estimates(found, unit)}
                  for depth, found in verdict.get("by_depth", {}).items()]:
        parts.append("<h2>Depths</h2>" + _table(depths, "text"))
    if gates := [{"gate": g["name"], "outcome": g["outcome"], "found": g["detail"]} for g in verdict.get("gates") or ()]:
        parts.append("<h2>Gates</h2>" + _table(gates, "text"))
    more = {"What would change the verdict": verdict.get("next"), "What it cost": cost_in_words(verdict.get("cost") or {})}
    return parts + [f"<h2>{title}</h2><p>{escape(text)}</p>" for title, text in more.items() if text]


def _compared(verdict: dict, variants: dict[str, list[dict]]) -> str:
    """What was compared, and on what, as a sentence."""
    ended = [row for rows in variants.values() for row in rows if succeeded(row)]
    seeds, depths = len({row["seed"] for row in ended}), list(verdict.get("by_depth", {}))
    devices = sorted({str(row["device"]) for row in ended if row.get("device")})
    on = [f"with {seeds} seed{'s' if seeds > 1 else ''}" if seeds else "", f"at depths {', '.join(depths)}" if depths else "",
          f"on {' and '.join(devices)}" if devices else ""]
    return " ".join([f"{verdict.get('about', 'The candidate')}, against the baseline", *filter(None, on)]) + "."


def quality_unit(variants: dict[str, list[dict]]) -> str:
    """The unit in which quality was compared."""
    return "nats of training loss" if variants and measure_of(*variants.values()) == "final_train_loss" else "bits per byte"


def estimates(verdict: dict, unit: str = "bits per byte") -> list[tuple[str, str, Estimate]]:
    """Title, words and chart of the numbers that a verdict has: time, quality, net gain. After a crash there are none."""
    found = []
    if known := _known(verdict.get("time"), lambda d: 1 - math.exp(-d)):
        found.append(("Time", directed(*known, "% less time", "% more time", "{:.1%}"), Estimate(
            *known, 1 - math.exp(-FALLBACK_GAIN), "3 % faster", "less time than the baseline", percent_tick)))
    if known := _known(verdict.get("quality"), lambda q: -q):
        mean, high, low = known
        found.append(("Quality", directed(mean, low, high, f" {unit} better", f" {unit} worse", "{:.4f}"), Estimate(
            mean, low, high, -BPB_MARGIN, f"{BPB_MARGIN:g} worse", f"{unit} better than the baseline", tick, required=False)))
    if known := _known(verdict.get("net_gain"), float):
        found.append(("Net gain", directed(*known, "% gained", "% lost", "{:.1%}"), Estimate(
            *known, FALLBACK_GAIN, "3 %", "net gain", percent_tick)))
    return found


def _known(value: dict | None, convert: Callable[[float], float]) -> tuple[float, float | None, float | None] | None:
    """Mean, low and high, converted; an end that is not known is None. None where there is no mean."""
    known = (number((value or {}).get(key)) for key in ("mean", "low", "high"))
    mean, low, high = (None if end is None else convert(end) for end in known)
    return None if mean is None else (mean, low, high)


def directed(mean: float, low: float | None, high: float | None, positive: str, negative: str, form: str) -> str:
    """A value and its 95 % interval in words, both in the direction of the word: "4.1 % less time (3.2 to 5.0)".

    form: the format of a number; a "%" at its end multiplies by 100.
    """
    if mean == low == high == 0:
        return "exactly the same"
    sign = -1 if mean < 0 else 1

    def text(value: float, signed: bool = False) -> str:
        shown = form.format(value).rstrip("%")
        return f"+{shown}" if signed and value > 0 else shown
    ends = "interval not known"
    if low is not None and high is not None:
        first, last = sorted((sign * low, sign * high))
        ends = f"{text(first, first < 0)} to {text(last, first < 0)}"
    word = negative if sign < 0 else positive
    return f"{text(abs(mean))}{word.replace('%', ' %', 1)} ({ends})"


def percent_tick(share: float) -> str:
    """A share on an axis, in percent."""
    return f"{round(100 * share, 6):g} %"


def tick(value: float) -> str:
    """A number on an axis."""
    return f"{round(value, 9):g}"


def cost_in_words(cost: dict) -> str:
    """What a verdict cost: runs, those shared with other experiments, and wall time. "" where that is not known."""
    parts = [f"{cost['runs']:,} runs were made for it" if cost.get("runs") is not None else "",
             f"{cost['shared']:,} more were taken from the store" if cost.get("shared") else "",
             f"{format_duration(cost['seconds'])} of wall time" if number(cost.get("seconds")) is not None else ""]
    return ", ".join(filter(None, parts))


# --- curves and tables ---------------------------------------------------------------------------------------------


def curve(rows: list[dict], x: str) -> list[tuple[float, float, float, float]]:
    """Validation bits per byte over x, "step" or "time" (seconds): (x, mean over seeds, lowest, highest) at each evaluation."""
    by_step: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        for step, seconds, bpb in row["val_curve"]:
            if number(bpb) is not None:
                by_step.setdefault(step, []).append((seconds, bpb))
    most = max(map(len, by_step.values()), default=0)
    points = []
    for step, seen in sorted(by_step.items()):
        if step > 0 and len(seen) == most:  # before training all are alike, and far above
            values = [bpb for _, bpb in seen]
            at = step if x == "step" else statistics.fmean(seconds for seconds, _ in seen)
            points.append((at, statistics.fmean(values), min(values), max(values)))
    return points


def times_to_target(variants: dict[str, list[dict]]) -> Dots | None:
    """Seconds of training until the target was met, extrapolated where a variant never met it. None where nothing is known."""
    values, intervals = {}, {}
    for name, rows in variants.items():
        if found := [measured for row in rows if succeeded(row) and number(measured := row["time_to_target_sec_measured"])]:
            values[name] = found
            with suppress(UserError):  # no scipy: dots without an interval
                mean, margin = statistics.fmean(found), margin_of_error(found, 0.025)
                if math.isfinite(margin):
                    intervals[name] = (max(0.0, mean - margin), mean + margin)
        elif row := next((row for row in rows if number(row["time_to_target_sec_extrapolated"])), None):
            label, best = f"{name} (extrapolated)", row["time_to_target_sec_extrapolated"]
            values[label] = [best]
            intervals[label] = (row["time_to_target_sec_low"], row["time_to_target_sec_high"] or best)
    return Dots("seconds of training", values, intervals) if values else None


def scaling(table: list[dict]) -> Lines:
    """Bits per byte over training FLOPs, a curve per variant, a point per depth."""
    curves = {}
    for name in dict.fromkeys(row["variant"] for row in table):
        by_depth: dict[int, list[tuple[float, float]]] = {}
        for row in table:
            if row["variant"] == name and number(row["val_bpb"]):
                by_depth.setdefault(row["depth"], []).append((row["tokens_trained"] * row["flops_per_token"], row["val_bpb"]))
        points = [(found[0][0], [bpb for _, bpb in found]) for found in by_depth.values()]
        if points:
            curves[name] = sorted((flops, statistics.fmean(v), min(v), max(v)) for flops, v in points)
    return Lines("training FLOPs", BPB, curves, log_x=True)


def _machines(rows: list[dict]) -> list[dict]:
    columns = {"host": "host", "device": "device", "dtype": "dtype", "torch": "torch_version", "commit": "git_commit",
               "uncommitted changes": "git_dirty"}
    found = {tuple(row[field] for field in columns.values()) for row in rows}
    return [dict(zip(columns, known, strict=True)) for known in sorted(found, key=str)]


def _table(rows: list[dict], kind: str = "") -> str:
    return table(rows, kind, _cell)


def _cell(value) -> str:
    if isinstance(value, str) and value in MARKS:
        return f'<td class="{value}">{MARKS[value]} {value}</td>'
    return f"<td>{escape(figure(value))}</td>"


def _rounded(value):
    """A JSON value whose numbers have five digits."""
    if isinstance(value, dict):
        return {key: _rounded(found) for key, found in value.items()}
    if isinstance(value, list):
        return [_rounded(found) for found in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
