"""The attempts: `python -m scripts.attempts list`, `run NAME ...` or `run all`, `show [JSON ...]`.

    python -m scripts.attempts run matrix_approx_bench --preset smoke --json-out a.json    # flags after the name are its own
    python -m scripts.attempts run all --record        # measures everything again and replaces attempts/results/
    python -m scripts.attempts show                    # the results stored there, a table per attempt
    python -m scripts.attempts show old.json new.json --metric bpb --plot compare.png

Each attempt runs in its own process, so that none is affected by the memory or the caches of another.
"""

import ast
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from nanochat.benchmarks.result_tables import compare, first_difference, plot, read_result_file, tables
from nanochat.cli.flags import flag, parse
from nanochat.cli.paths import output_problem
from nanochat.cli.program import subcommand
from nanochat.common import ROOT, UserError, format_table, resolve

RESULTS = ROOT / "attempts" / "results"
# --record: flags in addition to the sizes of the preset `default`, for the figures of record
RECORD = {"dynamic_block_update_schedule_bench": ["--equal-time-budget"]}


@dataclass
class RunFlags:
    """The run"""
    record: bool = flag(False, "write to attempts/results/, replacing the figures of record; takes no other flags")


@dataclass
class ShowFlags:
    """The tables"""
    metric: str | None = flag(None, "compare this field over the files, where several are of one attempt; by default the first "
                                    "that differs")
    plot: str | None = flag(None, "draw the metric, variant by variant, a colour per file", metavar="PNG")

    def validate(self) -> list[str]:
        trouble = self.plot and output_problem(self.plot)
        return [f"--plot {trouble}"] if trouble else []


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit status."""
    if not (found := subcommand(argv, ("list", "run", "show"), __doc__)):
        return 0
    command, rest = found
    first_flag = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    names, flags = rest[:first_flag], rest[first_flag:]
    if command == "run":
        return run(names, flags)
    if command == "show":
        return show(names, *parse([ShowFlags], flags, prog="python -m scripts.attempts show"))
    parse([], rest, prog="python -m scripts.attempts list")
    return list_attempts()


def scripts() -> dict[str, Path]:
    """The attempts by name: the files of attempts/container_*/ that are scripts. Raises: UserError without a checkout."""
    found = sorted((ROOT / "attempts").glob("container_*/*.py"))
    if not found:
        raise UserError(f"there are no attempts in {ROOT / 'attempts'}: they are in the checkout, not in an installed package")
    return {path.stem: path for path in found if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}


def question(path: Path) -> str:
    """The first line of a script's docstring."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()[0]


def stored(name: str, path: Path) -> Path:
    return RESULTS / path.parent.name / f"{name}.json"


def list_attempts() -> int:
    known = scripts()
    for container in dict.fromkeys(path.parent.name for path in known.values()):
        print(container)
        for name, path in known.items():
            if path.parent.name == container:
                print(f"  {name}{' (stored)' if stored(name, path).exists() else ''}\n      {question(path)}")
    return 0


def commands(names: list[str], argv: list[str]) -> list[list[str]]:
    """The command lines that run these attempts; with --record they start in the root of the checkout.

    Raises: UserError for unknown names, or flags that do not fit them.
    """
    known = scripts()
    if unknown := [name for name in names if name not in known and name != "all"]:
        raise UserError(f"no attempt is called {', '.join(unknown)}: there are {', '.join(known)}, and all")
    if not names:
        raise UserError(f"run which? {', '.join(known)}, or all")
    record = "--record" in argv
    if record:
        parse([RunFlags], argv, prog="python -m scripts.attempts run")
    chosen = list(known) if "all" in names else list(dict.fromkeys(names))
    if len(chosen) > 1 and any(a.split("=")[0] == "--json-out" for a in argv):
        raise UserError("--json-out is one file, and several attempts would write it: run one, or --record")
    flags = {name: [*RECORD.get(name, []), f"--json-out={stored(name, known[name]).relative_to(ROOT)}"] if record else argv
             for name in chosen}
    return [[sys.executable, str(known[name].relative_to(ROOT) if record else known[name]), *flags[name]] for name in chosen]


def run(names: list[str], argv: list[str]) -> int:
    """Run attempts one after the other; the exit status is the first that is not 0."""
    status = 0
    for command in commands(names, argv):
        print(f"+ {shlex.join(['python', *command[1:]])}", flush=True)
        code = subprocess.run(command, cwd=ROOT if "--record" in argv else None).returncode
        status = status or code
    return status


def show(paths: list[str], flags: ShowFlags) -> int:
    """Print a table per attempt; where several files are of one attempt, one field side by side."""
    files = [resolve(path) for path in paths] or sorted(Path(os.path.relpath(path)) for path in RESULTS.rglob("*.json"))
    if not files:
        raise UserError(f"nothing is stored in {RESULTS}: name files, or measure with `run all --record`")
    by_script = {}
    for path in files:
        content = read_result_file(path)
        by_script.setdefault(content["script"], []).append((path, content))
    compared = {}
    for script, contents in by_script.items():
        print(f"\n== {script}")
        for path, content in contents:
            print(f"{path}: {content['device']}, torch {content['torch_version']}, commit {str(content['git_commit'])[:9]}, "
                  f"{content['elapsed_sec']:.0f} s\n  python {script} {shlex.join(content['argv'])}")
        if len(contents) == 1 and flags.metric is None:
            print(tables(contents[0][1]["results"], shutil.get_terminal_size((128, 24)).columns))
            continue
        results = [content["results"] for _, content in contents]
        metric = flags.metric or first_difference(results)
        print(f"{metric}:\n{format_table(compare(results, [path.stem for path, _ in contents], metric))}")
        compared[script] = metric, contents
    if flags.plot:
        if not compared:
            raise UserError("--plot draws one field: name it with --metric")
        plot(flags.plot, compared)
    return 0
