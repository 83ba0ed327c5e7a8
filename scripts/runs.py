"""The runs under the base directory: `python -m scripts.runs list`, `show NAME`, `compare A B ...`, `rm NAME ...`, `gc`.

    python -m scripts.runs list --sort bpb     # a table of all runs, also of those that train now or were killed
    python -m scripts.runs show d4             # one run: results, settings, checkpoints; writes its report.html again
    python -m scripts.runs compare d4 d6       # settings that differ, results, and a page with the curves of both
    python -m scripts.runs rm d4               # says what would go; with --yes it goes
    python -m scripts.runs gc                  # what can go without loss; with --yes it goes

`gc` finds optimizer states of runs that have ended (but for the best and the last checkpoint; the weights stay), what interrupted
saves have left, and runs that --overwrite has replaced.
"""

from dataclasses import dataclass, fields
from datetime import datetime

from nanochat.cli.flags import CommonFlags, default_of, flag, flag_name, parse
from nanochat.cli.paths import output_problem, runs_dir
from nanochat.cli.program import cli, subcommand
from nanochat.common import UserError, format_duration, format_table, get_base_dir, resolve
from nanochat.runtime.files import write_atomic
from nanochat.training import run_facts
from nanochat.training.cleanup import bytes_of, delete_items, delete_run, deletion_problem, find_items
from nanochat.training.comparison import MOST_RUNS, compared_results, comparison, differing_settings, notes
from nanochat.training.explain import lines, size_text
from nanochat.training.page import figure
from nanochat.training.report import can_be_written, shown, write_report
from nanochat.training.run_index import StoredRun, find_run, list_runs

SORTS = {  # name of a column -> what orders it: the best, newest or largest first; runs of which it is not known are last
    "name": lambda run: run.name, "depth": lambda run: run.depth, "steps": lambda run: negative(run.steps_done),
    "status": lambda run: run.status,
    "bpb": lambda run: run.best_bpb, "tok/s": lambda run: negative(run.tokens_per_second),
    "time": lambda run: negative(run.train_seconds), "size": lambda run: -run.size(), "date": lambda run: -run.changed}


@dataclass
class ListFlags:
    """The table"""
    sort: str = flag("date", "order by this column: the best, newest or largest first", choices=tuple(SORTS))
    reverse: bool = flag(False, "the other way round")


@dataclass
class CompareFlags:
    """The page"""
    html: str | None = flag(None, "where to write the page; by default compare/ in the base directory", metavar="PATH")

    def validate(self) -> list[str]:
        trouble = self.html and output_problem(self.html)
        return [f"--html {trouble}"] if trouble else []


@dataclass
class DeleteFlags:
    """Deletion"""
    yes: bool = flag(False, "delete it; without this it is only said what would go")


def negative(value: float | None) -> float | None:
    return None if value is None else -value


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status."""
    if not (found := subcommand(argv, COMMANDS, __doc__)):
        return 0
    command, rest = found
    run_command, flags_class, operands, least, most = COMMANDS[command]
    names, flags = split_operands(rest, flags_class)
    values = parse([flags_class] if flags_class else [], flags, prog=f"python -m scripts.runs {command} {operands}".strip())
    if not least <= len(names) <= most:
        raise UserError(f"runs {command} takes {operands or 'no names'}, got {' '.join(names) or 'none'}")
    return run_command(names, *values)


def split_operands(words: list[str], flags_class: type | None) -> tuple[list[str], list[str]]:
    """(names of runs, flags with their values)."""
    groups = [CommonFlags, *([flags_class] if flags_class else [])]
    with_value = {flag_name(f.name) for group in groups for f in fields(group) if not isinstance(default_of(f), bool)}
    names: list[str] = []
    flags: list[str] = []
    for word in words:
        is_flag = word.startswith(("-", "@")) or bool(flags) and flags[-1] in with_value
        (flags if is_flag else names).append(word)
    return names, flags


def print_list(names: list[str], flags: ListFlags) -> int:
    runs = list_runs()
    if not runs:
        print(f"there is no run in {get_base_dir()}. Train one: python -m scripts.base_train --help")
        return 0
    known, unknown = [], []
    for run in runs:
        key = SORTS[flags.sort](run)
        (unknown if key is None else known).append((key, run))
    known.sort(key=lambda pair: pair[0], reverse=flags.reverse)
    rows = [table_row(run) for _, run in [*known, *unknown]]
    print(format_table(right_aligned(rows, ("steps", "bpb", "tok/s", "time", "size"))))
    return 0


def table_row(run: StoredRun) -> dict:
    steps, planned, bpb, rate, seconds = run.steps_done, run.steps_planned, run.best_bpb, run.tokens_per_second, run.train_seconds
    return {"name": run.name, "depth": run.depth,
            "steps": "NA" if steps is None else f"{steps}/{planned or '?'}", "status": run.status,
            "bpb": "NA" if bpb is None else f"{bpb:.4f}", "tok/s": "NA" if rate is None else f"{rate:,.0f}",
            "time": "NA" if seconds is None else format_duration(seconds), "size": size_text(run.size()),
            "date": datetime.fromtimestamp(run.changed).strftime("%Y-%m-%d %H:%M") if run.changed else "NA"}


def right_aligned(rows: list[dict], columns: tuple[str, ...]) -> list[dict]:
    """Rows whose texts in these columns are filled up on the left."""
    widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}
    return [row | {c: row[c].rjust(width) for c, width in widths.items()} for row in rows]


def show(names: list[str]) -> int:
    run = find_run(names[0])
    print(f"{run.name}: {run_facts.headline(run)}\n{run.folder}")
    if why := run_facts.reason(run):
        print(why)
    settings = {name: f"{shown(value)} (default {shown(default)})"
                for name, (value, default) in run_facts.changed_settings(run).items()}
    print_facts("results", run_facts.results(run))
    print_facts("settings that differ from the defaults", settings)
    print_facts("time", {name: format_duration(seconds) for name, seconds in run_facts.time_parts(run).items()})
    print_facts("memory", run_facts.memory(run))
    print_facts("tokenizer and text", run_facts.text_facts(run))
    print_facts("machine and source", run_facts.machine(run))
    checkpoints = run_facts.checkpoint_rows(run)
    few = run_facts.notable(checkpoints)
    print_rows(f"checkpoints ({len(checkpoints)}: the best and the last)" if len(few) < len(checkpoints) else "checkpoints", few)
    print_rows("evaluations", run_facts.evaluation_rows(run))
    print_facts("go on", run_facts.commands(run))
    if can_be_written(run):
        print(f"\nreport: {written(lambda: write_report(run))}")
    return 0


def print_facts(title: str, facts: dict) -> None:
    if facts:
        print(f"\n{title}\n" + indented(lines({name: figure(value) for name, value in facts.items()})))


def print_rows(title: str, rows: list[dict]) -> None:
    if rows:
        texts = [{name: figure(value) for name, value in row.items()} for row in rows]
        print(f"\n{title}\n" + indented(format_table(right_aligned(texts, tuple(name for name in texts[0] if name)))))


def indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def written(write):
    """What `write()` returns. Raises: UserError where the file cannot be written."""
    try:
        return write()
    except OSError as e:
        raise UserError(f"the page could not be written: {e.strerror or e}") from None


def compare(names: list[str], flags: CompareFlags) -> int:
    if len(set(names)) < len(names):
        raise UserError(f"a run is named twice: {' '.join(names)}")
    runs = [find_run(name) for name in names]
    results = [{name: figure(value) for name, value in row.items()} for row in compared_results(runs)]
    for title, rows in (("settings that differ", differing_settings(runs)), ("results", results)):
        print(f"{title}\n{indented(format_table(rows)) if rows else '  none'}\n")
    print("\n".join(notes(runs)))
    target = resolve(flags.html) if flags.html else get_base_dir() / "compare" / f"{'+'.join(names)[:150]}.html"

    def write():
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, comparison(runs))
        return target
    print(f"page: {written(write)}")
    return 0


def remove(names: list[str], flags: DeleteFlags) -> int:
    runs = [find_run(name) for name in dict.fromkeys(names)]
    problems = [problem for run in runs if (problem := deletion_problem(run))]
    if problems:
        raise UserError("\n".join(problems))
    for run in runs:
        print(f"{run.folder}: {size_text(run.size())}, checkpoints: {len(run.checkpoints)} ({run_facts.headline(run)})")
    if not flags.yes:
        raise UserError("nothing is deleted. Add --yes to delete what is listed above")
    freed = sum(delete_run(run) for run in runs)
    print(f"deleted: {size_text(freed)}")
    return 0


def collect_garbage(names: list[str], flags: DeleteFlags) -> int:
    items = find_items()
    if not items:
        print("there is nothing that can go without loss")
        return 0
    rows = [{"what": item.kind, "size": size_text(bytes_of(item.path)), "where": item.path.relative_to(runs_dir()).as_posix(),
             "why": item.why} for item in items]
    print(format_table(right_aligned(rows, ("size",))))
    if not flags.yes:
        print(f"\n{size_text(sum(bytes_of(item.path) for item in items))} in total. Nothing is deleted: add --yes")
        return 0
    print(f"\ndeleted: {size_text(delete_items(items))}")
    return 0


COMMANDS = {  # name -> function, flags, what it takes, fewest and most of these
    "list": (print_list, ListFlags, "", 0, 0),
    "show": (show, None, "NAME", 1, 1),
    "compare": (compare, CompareFlags, f"two to {MOST_RUNS} names", 2, MOST_RUNS),
    "rm": (remove, DeleteFlags, "NAME ...", 1, 1000),
    "gc": (collect_garbage, DeleteFlags, "", 0, 0),
}

if __name__ == "__main__":
    cli(main, for_its_output=True)
