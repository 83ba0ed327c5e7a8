"""The state of an optimization cycle (docs/lab.md): its locked target, its phases and their order, its decisions, plateau and
rollback; and the change log.

A file holds a JSON list of cycles, oldest first; the last one is the present cycle. A cycle is a dict: `name`, `started`,
`target_metric_name` and `target_metric_threshold` (locked, as results under two targets cannot be compared), `phases` (phase
-> open | running | done, and skipped for phase 4), `promoted` (names of changes), `log`, and `abandoned` (a date) where it was
given up. An entry of the log is a dict: `date`, `phase` (the one that was running, or None), `change`, `decision`, `gain` (net
gain in ln(time), or None), `lowered` (why a change whose gates all passed was recorded as less than that, or None), `flags`
(the candidate's, on top of the profile) and `candidates` (how many were judged together).

**Order.** A phase may run once those before it are done: 0 first, then 1, 2, 3 and 5; 0.5 may come at any time after 0. One
runs at a time. Phase 4 is only for a plateau of phases 1 to 3: all three are done, and the changes that passed the local gate
in them, and that no later verdict took back, gain less than 2 % together. With such a plateau phase 4 comes before 5; without
it, it is skipped. Phases 1 to 4 are done only if a decision is recorded in them, and 5 only if a miniseries is, where a change
passed the local gate. A cycle is over when 5 is done.

**What counts.** All gates passed makes a change one that passed the local gate. In phases 2, 3 and 4 it must also have been
measured against the current best, and in phase 4 its net gain must be 3 % or more (the lower 95 % bound). A miniseries
promotes only in phase 5, and only a change that has passed the local gate. Otherwise `keep optional` is recorded, with the
reason. A reject of a change that is promoted, in this or an earlier cycle, rolls it back at once.
"""

import json
import re
from collections.abc import Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from nanochat.cli.paths import output_problem
from nanochat.common import UserError, format_table
from nanochat.lab.claim import hold_claim
from nanochat.lab.decide import Verdict
from nanochat.lab.gates import FALLBACK_GAIN
from nanochat.lab.rows import config_of
from nanochat.runtime.files import write_atomic

PHASES = {"0": "baseline and target lock", "0.5": "tactical RMSNorm check", "1": "theory transfer", "2": "data and horizon",
          "3": "shape at fixed budget", "4": "support lane", "5": "miniseries"}
BEFORE = {"0": "", "0.5": "0", "1": "0", "2": "01", "3": "012", "4": "0123", "5": "0123"}  # phase -> those that must be done
PRIMARY, AGAINST_BEST = ("1", "2", "3"), ("2", "3", "4")
LENGTH = ("num_iterations", "target_flops", "target_param_data_ratio")
STATES = ("open", "running", "done")  # that a user may set
PASSED, REGRESSION = "passed the local gate", "cross-depth regression"
ROLLBACK_REASONS = (REGRESSION, "complexity", "hard to reason about")  # docs/lab.md, "Rollback"
PLATEAU_GAIN, PLATEAU_CYCLES = 0.02, 2                                 # docs/lab.md, "Plateau"


def new_cycle(name: str, metric: str, threshold: float) -> dict:
    return {"name": name, "target_metric_name": metric, "target_metric_threshold": threshold, "started": str(date.today()),
            "phases": dict.fromkeys(PHASES, "open"), "promoted": [], "log": []}


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


@contextmanager
def changing(path: Path):
    """The cycles of a file, as a list to be changed inside the `with` block, which then writes it. Others wait meanwhile.

    Raises: UserError where it cannot be read or written.
    """
    if problem := output_problem(path, make_folders=True):
        raise UserError(problem)
    path.parent.mkdir(parents=True, exist_ok=True)
    with hold_claim(path.with_name(f".{path.name}.claim")):
        cycles = read_cycles(path)
        yield cycles
        write_atomic(path, json.dumps(cycles, indent=1) + "\n")


def current(cycles: list[dict]) -> dict:
    if not cycles:
        raise UserError("no cycle yet: start one with `lab cycle start --name NAME --target-metric-name val_bpb "
                        "--target-metric-threshold X`")
    return cycles[-1]


def start(cycles: list[dict], name: str, metric: str, threshold: float, abandon: bool = False) -> list[dict]:
    """The cycles with a new one at the end.

    Raises: UserError where the present one is not over, unless it is to be abandoned, which keeps it in the file; or where
    there is a cycle of this name.
    """
    if name in [cycle["name"] for cycle in cycles]:
        raise UserError(f"there is a cycle {name!r} already: choose another --name")
    if cycles and (state := cycles[-1]["phases"]["5"]) != "done":
        *over, last = cycles
        if not abandon:
            raise UserError(f"cycle {last['name']!r} is not over, phase 5 is {state}: finish it, or give it up with --abandon")
        cycles = [*over, last | {"abandoned": str(date.today())}]
    return [*cycles, new_cycle(name, metric, threshold)]


def locked(cycle: dict, flags: Sequence[str]) -> str | None:
    """What is wrong with base_train's `flags` where they set another target than the cycle's. None where they do not."""
    found = config_of(flags).eval
    own = (cycle["target_metric_name"], cycle["target_metric_threshold"])
    given = (found.target_metric_name, found.target_metric_threshold)
    if given in ((None, None), own):
        return None
    return (f"the flags set a target of {given[0]} {given[1]}, but cycle {cycle['name']!r} is locked to {own[0]} {own[1]}: "
            "leave --target-metric-name and --target-metric-threshold out, or start another cycle")


# --- phases --------------------------------------------------------------------------------------------------------


def running_phase(cycle: dict) -> str | None:
    return next((phase for phase, state in cycle["phases"].items() if state == "running"), None)


def set_phase(cycle: dict, phase: str, state: str) -> dict:
    """A copy of the cycle with `phase` open, running or done. Where phase 5 begins without phase 4, that becomes skipped.

    Raises: UserError that says what is missing.
    """
    other = running_phase(cycle)
    problem = None if state == "open" else missing(cycle, phase) or (unfinished(cycle, phase) if state == "done" else None)
    if state == "running" and other not in (None, phase):
        problem = f"phase {other} is running: set it to done, or to open, first"
    if state == "running" and cycle["phases"]["5"] == "done":
        problem = f"cycle {cycle['name']!r} is over: start another one, or set phase 5 to open first"
    if problem:
        raise UserError(f"phase {phase} cannot be {state}: {problem}")
    phases = cycle["phases"] | {phase: state}
    if phase == "5" and state != "open" and phases["4"] == "open":
        phases["4"] = "skipped"
    return cycle | {"phases": phases}


def missing(cycle: dict, phase: str) -> str | None:
    """What must be done before `phase` may run; None where nothing is missing."""
    if before := [p for p in BEFORE[phase] if cycle["phases"][p] != "done"]:
        return f"phase {', '.join(before)} must be done before"
    gain, state = primary_gain(cycle), cycle["phases"]["4"]
    if phase == "4" and gain >= PLATEAU_GAIN:
        return f"it needs a plateau of phases 1 to 3, which gained {gain:.1%}, not less than {PLATEAU_GAIN:.0%}"
    if phase == "5" and (state == "running" or (state == "open" and gain < PLATEAU_GAIN)):
        return f"phase 4 must be done before, as phases 1 to 3 gained {gain:.1%}, less than {PLATEAU_GAIN:.0%}"
    return None


def unfinished(cycle: dict, phase: str) -> str | None:
    """What the log must hold before `phase` is done; None where nothing is missing."""
    recorded = any(entry.get("phase") == phase for entry in cycle["log"])
    if phase in (*PRIMARY, "4") and not recorded:
        return "no decision is recorded in it: run its experiments with --cycle"
    if phase == "5" and not recorded and (passed := standing([cycle])):
        return f"no miniseries is recorded in it, and {', '.join(map(repr, passed))} passed the local gate"
    return None


def standing(cycles: list[dict]) -> dict[str, dict]:
    """The changes that passed the local gate, and that no later verdict took back: name -> the entry with which they passed."""
    found: dict[str, dict] = {}
    for entry in (entry for cycle in cycles for entry in cycle["log"]):
        if entry["decision"] == PASSED:
            found[entry["change"]] = entry
        elif entry["decision"] not in ("promote", "inconclusive") and not entry.get("lowered"):
            found.pop(entry["change"], None)
    return found


def primary_gain(cycle: dict) -> float:
    """The net gain, in ln(time), of the changes that passed the local gate in phases 1 to 3: logarithms add."""
    return sum(entry["gain"] or 0.0 for entry in standing([cycle]).values() if entry.get("phase") in PRIMARY)


def current_best(cycle: dict) -> dict | None:
    """The entry of the change that others have to beat: the one that passed last in phases 2 to 4, each of which beat the best
    before it; where there is none, the one with the highest gain."""
    passed = list(standing([cycle]).values())
    later = [entry for entry in passed if entry.get("phase") in AGAINST_BEST]
    return later[-1] if later else max(passed, key=lambda entry: entry["gain"] or 0.0, default=None)


def against_best(cycle: dict, baseline: Sequence[str]) -> str | None:
    """What the `baseline` of an experiment (base_train's flags) lacks of the current best; None where it has all of it. The
    length of its runs may be another."""
    best = current_best(cycle)
    flags = best.get("flags", []) if best else []
    before, after = (config_of(words).flat() for words in (baseline, [*baseline, *flags]))
    if all(before[name] == after[name] for name in before if name not in LENGTH):
        return None
    return f'it is not measured against the current best: give --baseline "{" ".join(flags)}"'


# --- decisions -----------------------------------------------------------------------------------------------------


def obstacle(cycles: list[dict], change: str, miniseries: bool, baseline: Sequence[str]) -> str | None:
    """Why the change could not count now, as one that passed the local gate, or of a miniseries as promoted, even if it passes
    every gate. None where it could. baseline: base_train's flags of the experiment's baseline."""
    cycle = current(cycles)
    phase = running_phase(cycle)
    if not miniseries:
        return against_best(cycle, baseline) if phase in AGAINST_BEST else None
    if is_promoted(cycles, change):
        return None
    if change not in standing(cycles):
        return "it has not passed the local gate: `lab gate` with the same --change and --cycle comes first"
    return None if phase == "5" else "phase 5 is not running, and only it promotes"


def record(cycles: list[dict], change: str, verdict: Verdict, *, miniseries: bool, baseline: Sequence[str],
           flags: Sequence[str] = (), candidates: int = 1) -> tuple[list[dict], str]:
    """The cycles with a verdict in the log of the present one, and a line or two that say what was recorded.

    The same verdict again, as from a second worker of the same experiment, changes nothing. baseline: base_train's flags of the
    experiment's baseline; flags: the candidate's, on top of the profile; candidates: how many were judged together.
    """
    cycle, decision, lowered = current(cycles), verdict.decision, None
    phase = running_phase(cycle)
    if decision == "promote":
        lowered = obstacle(cycles, change, miniseries, baseline)
        if phase == "4" and not miniseries and (verdict.gain is None or verdict.gain.low < FALLBACK_GAIN):
            lowered = lowered or f"phase 4 asks for 3 % in time at matched quality; net gain {verdict.gain}"
        decision = "keep optional" if lowered else "promote" if miniseries else PASSED
    entry = {"date": str(date.today()), "phase": phase, "change": change, "decision": decision,
             "gain": verdict.gain.mean if verdict.gain else None, "lowered": lowered, "flags": list(flags),
             "candidates": candidates}
    if any(known | {"date": entry["date"]} == entry for known in cycle["log"]):
        return cycles, f"cycle {cycle['name']!r} has this decision already"
    promoted = [change] if decision == "promote" and not is_promoted(cycles, change) else []
    cycles = [*cycles[:-1], cycle | {"log": [*cycle["log"], entry], "promoted": [*cycle["promoted"], *promoted]}]
    line = f"cycle {cycle['name']!r}, {f'phase {phase}' if phase else 'no phase is running'}: {change}: {_decision(entry)}"
    after = regression(cycles, change, decision)
    return after, line if after == cycles else f"{line}\nrolled back: {change} is optional again ({REGRESSION})"


def is_promoted(cycles: list[dict], change: str) -> bool:
    return any(change in cycle["promoted"] for cycle in cycles)


def robust_gain(cycle: dict) -> float:
    """The net gain, in ln(time), of the changes that the cycle promoted and that were not rolled back: logarithms add."""
    last = {entry["change"]: entry["gain"] or 0.0 for entry in cycle["log"] if entry["decision"] == "promote"}
    return sum(last.get(change, 0.0) for change in cycle["promoted"])


def regression(cycles: list[dict], change: str, decision: str) -> list[dict]:
    """The cycles after a decision of an experiment on `change`: a reject rolls it back where it is promoted."""
    return roll_back(cycles, change, REGRESSION) if decision == "reject" and is_promoted(cycles, change) else cycles


def roll_back(cycles: list[dict], change: str, reason: str) -> list[dict]:
    """A copy of the cycles with a promoted change optional again in the newest cycle that promoted it.

    Raises: UserError for a change that no cycle promoted, or a reason that is not one of ROLLBACK_REASONS.
    """
    places = [i for i, cycle in enumerate(cycles) if change in cycle["promoted"]]
    if not places:
        known = ", ".join(name for cycle in cycles for name in cycle["promoted"]) or "nothing is"
        raise UserError(f"{change!r} is not promoted in any cycle: {known}")
    if reason not in ROLLBACK_REASONS:
        raise UserError(f"a rollback is for one of: {', '.join(ROLLBACK_REASONS)}")
    i, cycle = places[-1], cycles[places[-1]]
    entry: dict = {"date": str(date.today()), "phase": running_phase(cycles[-1]), "change": change,
                   "decision": f"rolled back: {reason}", "gain": None, "lowered": None, "flags": [], "candidates": 0}
    rolled_back = cycle | {"promoted": [c for c in cycle["promoted"] if c != change], "log": [*cycle["log"], entry]}
    return [*cycles[:i], rolled_back, *cycles[i + 1:]]


def plateau(cycles: list[dict]) -> tuple[bool, str]:
    """Whether the last two cycles, one that is still under way not counted, were full (phases 1 to 5 done), each gained less
    than 2 % and promoted nothing; and why."""
    last = (cycles if cycles and is_full(cycles[-1]) else cycles[:-1])[-PLATEAU_CYCLES:]
    if len(last) < PLATEAU_CYCLES:
        return False, f"{sum(map(is_full, last))} of {PLATEAU_CYCLES} full cycles are done"
    for cycle in last:
        if not is_full(cycle):
            return False, f"cycle {cycle['name']!r} was not finished"
        if robust_gain(cycle) >= PLATEAU_GAIN:
            return False, f"cycle {cycle['name']!r} gained {robust_gain(cycle):.1%}"
        if cycle["promoted"]:
            return False, f"cycle {cycle['name']!r} promoted {', '.join(cycle['promoted'])}"
    return True, "reached: deferred architectures may be reconsidered"


def is_full(cycle: dict) -> bool:
    """Whether phases 1 to 5 are done, phase 4 where it was allowed."""
    return all(cycle["phases"][phase] in ("done", "skipped") for phase in ("1", "2", "3", "4", "5"))


# --- what a person reads -------------------------------------------------------------------------------------------


def status(cycles: list[dict]) -> str:
    """The present cycle as text: target, phases and what they lack, decisions, what is promoted, plateau, earlier cycles."""
    cycle = current(cycles)
    judged = sum(entry.get("candidates", 1) for entry in cycle["log"])
    best = current_best(cycle)
    phases = [{"phase": phase, "about": about, "state": cycle["phases"][phase], "missing": _missing(cycle, phase)}
              for phase, about in PHASES.items()]
    decisions = [{"date": entry["date"], "phase": entry.get("phase") or "-", "change": entry["change"],
                  "decision": _decision(entry), "gain": "-" if entry["gain"] is None else f"{entry['gain']:+.1%}"}
                 for entry in cycle["log"]]
    earlier = [{"cycle": c["name"], "state": f"given up {c['abandoned']}" if c.get("abandoned") else
                "full" if is_full(c) else "not full", "robust gain": f"{robust_gain(c):+.1%}",
                "promoted": ", ".join(c["promoted"]) or "nothing"} for c in cycles[:-1]]
    parts = [f"cycle {cycle['name']!r}, started {cycle['started']}: target {cycle['target_metric_name']} of "
             f"{cycle['target_metric_threshold']}; {judged} candidates judged", format_table(phases),
             format_table(decisions) if decisions else "no decision yet", *([format_table(earlier)] if earlier else []),
             f"current best: {best['change'] if best else 'the baseline'}\n"
             f"promoted: {', '.join(cycle['promoted']) or 'nothing'}; robust gain {robust_gain(cycle):+.1%}\n"
             f"plateau: {plateau(cycles)[1]}"]
    return "\n\n".join(parts)


def _missing(cycle: dict, phase: str) -> str:
    state = cycle["phases"][phase]
    if state in ("done", "skipped"):
        return ""
    return missing(cycle, phase) or (unfinished(cycle, phase) if state == "running" else None) or ""


def _decision(entry: dict) -> str:
    return entry["decision"] + (f" ({entry['lowered']})" if entry.get("lowered") else "")


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
