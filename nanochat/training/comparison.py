"""Several runs side by side: the settings in which they differ, their results, and a page with their curves one over the other.
No torch."""

from html import escape

from nanochat.training import run_facts
from nanochat.training.curves import COLOURS, STYLE as CHART_STYLE, Curve, chart, legend
from nanochat.training.page import page, table
from nanochat.training.report import BPB, LOSS, axes, loss_points, shown, val_points
from nanochat.training.run_index import StoredRun, part

MOST_RUNS = len(COLOURS)
# of no effect on a run
NAMES = ("--model-tag", "--run", "--result-json", "--overwrite", "--resume-from-step", "--allow-change", "--ui")
ONE_SEED = ("One run of each proves little: another seed often changes more than a setting does. The lab trains both sides with "
            "several seeds and says whether a difference is real: python -m scripts.lab compare --help")
STYLE = CHART_STYLE + ".legend { position: sticky; top: 0; background: var(--back) }"  # in sight of all charts


def differing_settings(runs: list[StoredRun]) -> list[dict]:
    """A row per flag that differs between the runs, and per fact of machine, source and text that does: its name in a column
    without one, and a column per run."""
    by_run = {run.name: {row["flag"]: shown(row["value"]) for row in run_facts.settings(run) if row["flag"] not in NAMES}
              | {name: str(value) for name, value in run_facts.machine(run).items()}
              | ({"tokens": fingerprint} if (fingerprint := text_fingerprint(run)) else {}) for run in runs}
    names = dict.fromkeys(name for values in by_run.values() for name in values)
    rows = [{"": name} | {run: values.get(name) for run, values in by_run.items()} for name in names]
    return [{key: value or "-" for key, value in row.items()} for row in rows
            if len({row[run.name] for run in runs} - {None}) > 1]  # what is not known of a run is no difference


def text_fingerprint(run: StoredRun) -> str | None:
    """The fingerprint of tokenizer and text; None where it is not known."""
    known = run.result.get("text_fingerprint") or part(run.state, "result_fingerprint").get("the tokens")
    return str(known)[:run_facts.DIGITS] if known else None


def compared_results(runs: list[StoredRun]) -> list[dict]:
    """A row per result: its name in a column without one, and a column per run."""
    by_run = {run.name: {"status": run.status, **run_facts.results(run), **{
        f"memory, {name}": value for name, value in run_facts.memory(run).items()}} for run in runs}
    names = dict.fromkeys(name for values in by_run.values() for name in values)
    return [{"": name} | {run: values.get(name) for run, values in by_run.items()} for name in names]


def notes(runs: list[StoredRun]) -> list[str]:
    """What to keep in mind about the comparison, as sentences."""
    texts = {text_fingerprint(run) for run in runs} - {None}
    found = ["The runs have different tokens or tokenizers: their losses do not compare, nor do bits per byte on other text."] \
        if len(texts) > 1 else []
    if unfinished := [run.name for run in runs if not run.has_ended]:
        found.append(f"Not at an end: {', '.join(unfinished)}.")
    return [*found, ONE_SEED]


def comparison(runs: list[StoredRun]) -> str:
    """The page."""
    names, both = [run.name for run in runs], axes(runs)
    figures = [chart(f"Validation {x.title}", x.label, BPB, [
        Curve(run.name, val_points(run, x), "dots", i) for i, run in enumerate(runs)], x.last) for x in both]
    figures += [chart(f"Smoothed training loss {x.title}", x.label, LOSS, [
        Curve(run.name, loss_points(run, "smooth_loss", x), "line", i) for i, run in enumerate(runs)], x.last) for x in both]
    parts = [f"<h1>{escape(', '.join(names))}</h1>", legend(names), f'<div class="charts">{"".join(figures)}</div>',
             "<h2>Results</h2>", table(compared_results(runs)), "<h2>Settings that differ</h2>",
             table(differing_settings(runs), "text"), *(f"<p>{escape(note)}</p>" for note in notes(runs))]
    return page(" | ".join(names), parts, STYLE)
