"""The state of an optimization cycle (docs/lab.md): its declared target, its phases, plateau and rollback, and the change log.

A cycle file is JSON. A declared target stays for the whole cycle, as results under two targets cannot be compared.
"""

import json
import re
from datetime import date
from pathlib import Path

from nanochat.common import UserError
from nanochat.runtime.files import write_atomic

PHASES = {"0": "baseline and target lock", "0.5": "tactical RMSNorm check", "1": "theory transfer", "2": "data and horizon",
          "3": "shape at fixed budget", "4": "support lane", "5": "miniseries"}
STATES = ("open", "running", "done")
ROLLBACK_REASONS = ("cross-depth regression", "complexity", "hard to reason about")  # docs/lab.md, "Rollback"
PLATEAU_GAIN, PLATEAU_CYCLES = 0.02, 2                                               # docs/lab.md, "Plateau"


def new_cycle(name: str, metric: str, threshold: float) -> dict:
    return {"name": name, "target_metric_name": metric, "target_metric_threshold": threshold, "started": str(date.today()),
            "phases": dict.fromkeys(PHASES, "open"), "robust_gain": 0.0, "promoted": [], "optional": [], "log": []}


def read_cycles(path: Path) -> list[dict]:
    """The cycles of a file, oldest first; [] where there is no file.

    Raises: UserError where the file cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read the cycles in {path}: {e}") from None


def write_cycles(path: Path, cycles: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(cycles, indent=1) + "\n")


def current(cycles: list[dict]) -> dict:
    if not cycles:
        raise UserError("no cycle yet: start one with `lab cycle start --name NAME --target-metric-name val_bpb "
                        "--target-metric-threshold X`")
    return cycles[-1]


def record_decision(cycle: dict, change: str, decision: str, gain: float | None) -> dict:
    """A copy of the cycle with a decision in it. A promoted gain, in ln(time), adds to the cycle's robust gain."""
    entry = {"date": str(date.today()), "change": change, "decision": decision, "gain": gain}
    lists = {"promote": "promoted", "keep optional": "optional"}
    cycle = cycle | {"log": [*cycle["log"], entry]}
    if decision in lists:
        cycle[lists[decision]] = [*cycle[lists[decision]], change]
    if decision == "promote" and gain:
        cycle["robust_gain"] = cycle["robust_gain"] + gain
    return cycle


def roll_back(cycles: list[dict], change: str, reason: str) -> list[dict]:
    """A copy of the cycles with a promoted change optional again in the newest cycle that promoted it, its gain subtracted.

    Raises: UserError for a change that no cycle promoted, or a reason that is not one of ROLLBACK_REASONS.
    """
    places = [i for i, cycle in enumerate(cycles) if change in cycle["promoted"]]
    if not places:
        known = ", ".join(name for cycle in cycles for name in cycle["promoted"]) or "nothing is"
        raise UserError(f"{change!r} is not promoted in any cycle: {known}")
    if reason not in ROLLBACK_REASONS:
        raise UserError(f"a rollback is for one of: {', '.join(ROLLBACK_REASONS)}")
    i = places[-1]
    return [*cycles[:i], _rolled_back(cycles[i], change, reason), *cycles[i + 1:]]


def _rolled_back(cycle: dict, change: str, reason: str) -> dict:
    gain = sum(e["gain"] or 0.0 for e in cycle["log"] if e["change"] == change and e["decision"] == "promote")
    cycle = record_decision(cycle, change, f"rolled back: {reason}", -gain)
    return cycle | {"promoted": [c for c in cycle["promoted"] if c != change], "robust_gain": cycle["robust_gain"] - gain,
                    "optional": [*cycle["optional"], change]}


def plateau(cycles: list[dict]) -> tuple[bool, str]:
    """Whether the last two cycles, one that is still under way not counted, were full (phases 1 to 5 done), each gained less than
    2 % and promoted nothing; and why."""
    last = (cycles if cycles and is_full(cycles[-1]) else cycles[:-1])[-PLATEAU_CYCLES:]
    if len(last) < PLATEAU_CYCLES:
        return False, f"{len(last)} of {PLATEAU_CYCLES} full cycles are done"
    for cycle in last:
        if not is_full(cycle):
            return False, f"cycle {cycle['name']!r} was not finished"
        if cycle["robust_gain"] >= PLATEAU_GAIN:
            return False, f"cycle {cycle['name']!r} gained {cycle['robust_gain']:.1%}"
        if cycle["promoted"]:
            return False, f"cycle {cycle['name']!r} promoted {', '.join(cycle['promoted'])}"
    return True, "reached: deferred architectures may be reconsidered"


def is_full(cycle: dict) -> bool:
    """Whether phases 1 to 5 are done."""
    return all(cycle["phases"][phase] == "done" for phase in ("1", "2", "3", "4", "5"))


def log_entry(change: str, decision: str, why: str, gain: float | None, details: str = "") -> str:
    """A change log entry in Markdown: date, change, net gain in ln(time), decision."""
    measured = "unknown" if gain is None else f"{gain:+.1%} (time saved minus quality lost)"
    return (f"## {date.today()} · {change}\n\nNet gain: {measured}. Decision: **{decision}** ({why}).\n"
            + (f"\n{details.strip()}\n" if details else ""))


def write_log(path: Path, entry: str) -> None:
    """Insert an entry into a log whose newest entry is first: before the first `## `, or at the end where there is none."""
    text = path.read_text(encoding="utf-8") if path.exists() else "# Log\n"
    first = re.search(r"^## ", text, re.MULTILINE)
    at = first.start() if first else len(text)
    before = text[:at].rstrip("\n") + "\n\n" if text[:at].strip() else ""
    write_atomic(path, before + entry + ("\n" + text[at:] if first else ""))
