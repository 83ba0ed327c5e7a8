"""report.html of a run: how it stands, curves, the blocks that were trained, samples, time, memory, settings, text, kernels,
checkpoints, and the commands that go on with it.

One self-contained file, drawn without any library. It is written at the end of a run, and again by `scripts.runs show`; of a run
that was killed or still trains it shows what is known. No torch.
"""

from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path

from nanochat.common import format_duration
from nanochat.runtime.files import write_atomic
from nanochat.training import run_facts
from nanochat.training.curves import STYLE as CHART_STYLE, Curve, bar, block_map, chart, grouped, time_axis
from nanochat.training.page import cell, page, table
from nanochat.training.records import number
from nanochat.training.run_index import FOREIGN, StoredRun

FILE_NAME = "report.html"
MOST_SAMPLES = 6  # times at which the run sampled
LOSS, BPB = "nats per token", "bits per byte"
STYLE = CHART_STYLE + """
.status { border-left: .5rem solid var(--blue); padding: .6rem 1rem; background: #8881 } .ok { border-color: var(--good) }
.diverged, .oom, .failed { border-color: var(--bad) } .interrupted, .unfinished { border-color: var(--open) }
.samples td { vertical-align: top } .samples pre { margin: 0; background: none; padding: 0; overflow-wrap: anywhere }
.changed td:nth-child(2) { font-weight: 600 } h3 { font-size: .9rem; margin: 1rem 0 .2rem }
"""


def report_run(run_dir: Path) -> str:
    """Write the report of a run that this process ends, whose lock it still holds. Returns a line for the user: where it is, or
    why there is none."""
    try:
        return f"report: {write_report(StoredRun(run_dir, is_ours=True))}"
    except Exception as e:  # damaged records, a full disk: no page is worth a run
        return f"no report: {type(e).__name__}: {e}"


def write_report(run: StoredRun) -> Path:
    """Write `FILE_NAME` in the folder of a run; returns where it is."""
    write_atomic(run.folder / FILE_NAME, report(run))
    return run.folder / FILE_NAME


def report(run: StoredRun) -> str:
    """The page. What is not known is left out."""
    parts = [f"<h1>{escape(run.name)}</h1>", _status(run), *_curves(run)]
    parts += _section("Results", _pairs(run_facts.results(run))) + _samples(run) + _time(run)
    parts += _section("Memory", _pairs(run_facts.memory(run)))
    parts += _settings(run)
    parts += _section("Tokenizer and text", _pairs(run_facts.text_facts(run)))
    parts += _section("Kernels", _rows(run_facts.kernels(run), "text"))
    parts += _section("Checkpoints", _checkpoints(run)) + _section("Evaluations", _rows(run_facts.evaluation_rows(run)))
    parts += _commands(run)
    parts += _section("Machine and source", _pairs(run_facts.machine(run)))
    return page(f"{run.name}: nanochat run", parts, STYLE)


def _status(run: StoredRun) -> str:
    why = run_facts.reason(run)
    return (f'<p class="status {escape(run.status.replace(" ", "-"))}"><b id="status">{escape(run_facts.headline(run))}</b>'
            + (f"<br>{escape(why)}" if why else "") + "</p>")


def _section(title: str, content: str) -> list[str]:
    return [f"<h2>{title}</h2>{content}"] if content else []


def _rows(rows: list[dict], kind: str = "") -> str:
    return table(rows, kind) if rows else ""


def _pairs(facts: dict) -> str:
    """Names and values as a table of two columns."""
    body = "".join(f"<tr><td>{escape(str(name))}</td>{cell(value)}</tr>" for name, value in facts.items())
    return f'<div class="wide"><table class="text">{body}</table></div>' if facts else ""


# ---- curves

@dataclass(frozen=True)
class Axis:
    """An x axis for curves of runs. field: of a row of metrics.jsonl. unit: what the field is divided by. last: its end."""
    title: str
    field: str
    label: str
    unit: float
    last: float


def axes(runs: list[StoredRun]) -> tuple[Axis, Axis]:
    """Steps, and training time."""
    steps, seconds = (max((value or 0.0 for value in values), default=0.0)
                      for values in ([run.steps_done for run in runs], [run.train_seconds for run in runs]))
    unit, name = time_axis(seconds)
    return (Axis("over steps", "step", "optimizer step", 1.0, steps),
            Axis("over training time", "train_time_sec", f"training time ({name})", unit, seconds / unit))


def loss_points(run: StoredRun, field: str, x: Axis) -> list[tuple[float, float]]:
    """(x, a row's `field`) of each step."""
    return [(row[x.field] / x.unit, row[field]) for row in run.steps
            if number(row[x.field]) is not None and number(row[field]) is not None]


def val_points(run: StoredRun, x: Axis) -> list[tuple[float, float]]:
    """(x, bits per byte) of each evaluation."""
    return [((step if x.field == "step" else seconds) / x.unit, bpb) for step, seconds, bpb in run.val_curve]


def _curves(run: StoredRun) -> list[str]:
    both = axes([run])
    charts = [chart(f"Training loss {x.title}", x.label, LOSS, [
        Curve("each step", loss_points(run, "loss", x), "band"), Curve("loss", loss_points(run, "smooth_loss", x))], x.last)
        for x in both]
    charts += [chart(f"Validation {x.title}", x.label, BPB, [Curve("validation", val_points(run, x), "dots", 1)], x.last)
               for x in both]
    return [f'<div class="charts">{"".join(charts)}</div>' if any(charts) else "", *_blocks(run, both)]


def _blocks(run: StoredRun, both: tuple[Axis, Axis]) -> list[str]:
    """Maps of the blocks that were trained, where not every step trained the same."""
    blocks = run.depth or 0
    rows = [row for row in run.steps if isinstance(row["active_start"], int) and isinstance(row["active_layers"], int)
            and 0 <= row["active_start"] <= blocks - row["active_layers"] < blocks and number(row["train_time_sec"])]
    trained = [range(row["active_start"], row["active_start"] + row["active_layers"]) for row in rows]
    if len(set(trained)) < 2:
        return []
    maps = [block_map(f"Blocks trained {x.title}", x.label, [(row[x.field] + (x.field == "step")) / x.unit for row in rows],
                      trained, blocks) for x in both]
    kinds = Counter(str(row["step_kind"]) for row in rows)
    counts = escape(", ".join(f"{kind} {count:,}" for kind, count in kinds.items()))
    return [f'<h2>Blocks trained</h2><div class="charts">{"".join(maps)}</div><p>A row is a block, the top one above. Full '
            f"colour: every step trained it; pale: none did. Steps by kind: {counts}.</p>"]


# ---- samples, time, settings, commands

def _samples(run: StoredRun) -> list[str]:
    """Texts of the same prompts at some steps, the newest first."""
    by_step = {row["step"]: row["samples"] for row in run.rows if isinstance(row.get("samples"), list)}
    if not by_step:
        return []
    steps = [group[0] for group in grouped(sorted(by_step, reverse=True), MOST_SAMPLES)]
    parts = []
    for prompt in range(max(len(by_step[step]) for step in steps)):
        rows = "".join(f"<tr><td>step {step:,}</td><td><pre>{escape(printable(str(by_step[step][prompt])))}</pre></td></tr>"
                       for step in steps if prompt < len(by_step[step]))
        parts.append(f'<div class="wide"><table class="text samples">{rows}</table></div><br>')
    return [f"<h2>Samples</h2><p>The likeliest continuations of the same prompts, the newest first.</p>{''.join(parts)}"]


def printable(text: str) -> str:
    """Text without the control characters that no page may hold."""
    return "".join(c if c >= " " or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _time(run: StoredRun) -> list[str]:
    parts = run_facts.time_parts(run)
    total = sum(parts.values())
    if total <= 0:
        return []
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{format_duration(seconds)}</td><td>{seconds / total:.1%}</td>"
                   f"{bar(seconds / total)}</tr>" for name, seconds in parts.items())
    rows += f"<tr><td>in total</td><td>{format_duration(total)}</td><td></td><td></td></tr>"
    return [f'<h2>Time</h2><div class="wide"><table class="parts">{rows}</table></div>']


def _settings(run: StoredRun) -> list[str]:
    changed = [{"flag": name, "value": shown(value), "default": shown(default)}
               for name, (value, default) in run_facts.changed_settings(run).items()]
    groups: dict[str, list[dict]] = {}
    for row in run_facts.settings(run):
        groups.setdefault(row["group"], []).append({"flag": row["flag"], "value": shown(row["value"])})
    if not groups:
        return []
    whole = "".join(f"<h3>{escape(title)}</h3>{table(rows, 'text')}" for title, rows in groups.items())
    return [f"<h2>Settings that differ from the defaults</h2>{table(changed, 'text changed')}"
            f"<details><summary>All settings</summary>{whole}</details>"]


def shown(value) -> str:
    """The value of a flag as one types it."""
    return "-" if value in (None, [], "") else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _checkpoints(run: StoredRun) -> str:
    rows = run_facts.checkpoint_rows(run)
    few = run_facts.notable(rows)
    whole = f"<details><summary>All {len(rows)}</summary>{table(rows)}</details>" if len(few) < len(rows) else ""
    return f"{table(few)}{whole}" if rows else ""


def _commands(run: StoredRun) -> list[str]:
    found = run_facts.commands(run)
    lines = "".join(f"<h3>{escape(what)}</h3><pre>{escape(command)}</pre>" for what, command in found.items())
    return [f"<h2>Go on</h2><p>For a shell in the folder in which the run was started.</p>{lines}"] if lines else []


def can_be_written(run: StoredRun) -> bool:
    """Whether a page may be put into the folder of a run: not among the files of another program."""
    return run.status != FOREIGN
