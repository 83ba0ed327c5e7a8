"""report.html of an experiment's folder: the verdict first, then curves, time to target, numbers, commands, machine.

One self-contained file that loads nothing from elsewhere. Its pictures are embedded, and saved beside it as PNG. It is written
from the folder's rows and verdict.json.
"""

import json
import math
import statistics
from contextlib import suppress
from html import escape
from pathlib import Path

from nanochat.common import UserError
from nanochat.lab.charts import COLOURS, Dots, Lines, save
from nanochat.lab.decide import number, succeeded
from nanochat.lab.rows import read_result, read_rows
from nanochat.lab.stats import margin_of_error
from nanochat.runtime.files import write_atomic

BPB = "validation (bits per byte)"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # makes the browser load nothing
STYLE = """
:root { color-scheme: light dark; --line: #8884; --text: #222; --back: #fff }
@media (prefers-color-scheme: dark) { :root { --text: #ddd; --back: #181a1b } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 52rem; margin: 0 auto;
       padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.verdict { border-left: .5rem solid; padding: .6rem 1rem; font-size: 1.15rem; background: #8881 }
.promote { border-color: #109618 } .reject { border-color: #dc3912 }
.keep { border-color: #3366cc } .inconclusive { border-color: #ff9900 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem }
td, th { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
td:first-child, th:first-child, .text td, .text th { text-align: left } .text td { white-space: normal }
.text td:first-child { min-width: 6rem }
img { width: 100%; height: auto; border-radius: .3rem }
pre { font-size: .75rem; white-space: pre-wrap; background: #8881; padding: .6rem }
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
    parts = [f"<h1>{escape(verdict.get('about', folder.name))}</h1>", _verdict(verdict)]

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
                                                             f"<pre>{escape(json.dumps(found, indent=1))}</pre>"))
    figures = [{"variant": name, **found} for name, found in verdict.get("variants", {}).items()]
    parts.append("<h2>Figures</h2>" + _table(figures))
    parts.append("<h2>Runs</h2>" + _table([{k: row[k] for k in (
        "variant", "seed", "status", "steps_done", "train_time_sec", "compile_time_sec", "eval_time_sec", "dt_median_ms",
        "tok_per_sec_median", "final_train_loss", "val_bpb", "time_to_target_sec_measured", "time_to_target_sec_extrapolated",
        "peak_mem_mib")} for row in rows]))
    parts.append("<h2>Machine and source</h2>" + _table(_machines(rows), "text"))
    parts.append("<h2>Commands</h2>" + "".join(f"<pre>{escape(row['command'])}</pre>" for row in rows if row["command"]))
    page = ('<!doctype html><html lang="en"><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(folder.name)}</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>\n")
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


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


def _verdict(verdict: dict) -> str:
    if not verdict:
        return '<p class="verdict inconclusive">not decided yet: the experiment is not over</p>'
    gates = [{"gate": g["name"], "outcome": g["outcome"], "found": g["detail"]} for g in verdict["gates"]]
    return (f'<p class="verdict {verdict["decision"].split()[0]}"><b id="verdict">{escape(verdict["decision"])}</b><br>'
            f'{escape(verdict["why"])}</p>' + (_table(gates, "text") if gates else ""))


def _machines(rows: list[dict]) -> list[dict]:
    columns = {"host": "host", "device": "device", "dtype": "dtype", "torch": "torch_version", "commit": "git_commit",
               "uncommitted changes": "git_dirty"}
    found = {tuple(row[field] for field in columns.values()) for row in rows}
    return [dict(zip(columns, known, strict=True)) for known in sorted(found, key=str)]


def _table(rows: list[dict], kind: str = "") -> str:
    if not rows:
        return "<p>none</p>"
    head = "".join(f"<th>{escape(str(c))}</th>" for c in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{_cell(v)}</td>" for v in row.values()) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><tr>{head}</tr>{body}</table></div>'


def _cell(value) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else escape(str(value))
