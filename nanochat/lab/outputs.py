"""What an experiment prints and writes in its folder: a table, verdict.json, runs.csv, report.html."""

import json
import statistics
from pathlib import Path

from nanochat.common import format_table, print0
from nanochat.lab.decide import DECISIONS, Verdict
from nanochat.lab.gain import succeeded
from nanochat.lab.report import cost_in_words, estimates, quality_unit, write_report
from nanochat.lab.rows import number, write_csv
from nanochat.runtime.files import write_atomic


def summary(rows: list[dict]) -> dict:
    """A variant's rows in one: medians over the seeds that succeeded. Bits per byte are the lab's where it evaluated them."""
    ended = [row for row in rows if succeeded(row)]

    def median(field):
        known = [row[field] for row in ended if number(row.get(field)) is not None]
        return statistics.median(known) if known else None
    val_bpb = median("lab_val_bpb")
    return {"runs": f"{len(ended)}/{len(rows)}", "steps": median("steps_done"), "train_time_sec": median("train_time_sec"),
            "tok_per_sec": median("tok_per_sec_median"), "final_train_loss": median("final_train_loss"),
            "val_bpb": median("val_bpb") if val_bpb is None else val_bpb,
            "time_to_target_sec": median("time_to_target_sec_measured"), "peak_mem_mib": median("peak_mem_mib")}


def table(rows: dict[str, list[dict]]) -> str:
    """A line per variant, the hidden control left out."""
    return format_table([{"variant": name, **summary(found)} for name, found in rows.items() if name != "control"])


def write_verdict(folder: Path, verdict: Verdict, about: str, variants: dict, **extra) -> None:
    """Write verdict.json. `variants`: name -> summary; `extra`: what else the report shows."""
    assert verdict.decision in DECISIONS
    content = verdict.as_dict() | {"about": about, "line": str(verdict)} | extra | {"variants": variants}
    write_atomic(folder / "verdict.json", json.dumps(content, indent=1) + "\n")


def write_outputs(folder: Path, verdict: Verdict, rows: dict[str, list[dict]], about: str, **extra) -> int:
    """Write verdict.json, runs.csv and report.html; print the table, the numbers, the gates and, as the last line, the verdict.

    Returns the exit status: 1 where a run failed.
    """
    write_verdict(folder, verdict, about, {name: summary(found) for name, found in rows.items()}, **extra)
    write_csv(folder)
    write_report(folder)
    print0("\n" + table(rows) + "\n")
    for title, words, _ in estimates(verdict.as_dict(), quality_unit(rows)):
        print0(f"{title}: {words}")
    for gate in verdict.gates:
        print0(f"{gate.outcome.ljust(8)}{gate.name}: {gate.detail}")
    for title, text in (("cost", cost_in_words(extra.get("cost") or {})), ("next", verdict.next)):
        if text:
            print0(f"{title}: {text}")
    print0(f"report: {folder / 'report.html'}")
    print0(str(verdict))
    return int(any(not succeeded(row) for found in rows.values() for row in found))
