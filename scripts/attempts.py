"""The attempts: `python -m scripts.attempts list`, `run NAME ...` or `run all`, `show [JSON ...]`.

    python -m scripts.attempts run matrix_approx_bench --preset smoke --json-out a.json    # flags behind the name are its own
    python -m scripts.attempts run all --record        # measures everything anew and replaces attempts/results/
    python -m scripts.attempts show                    # what is stored there, a table per attempt
    python -m scripts.attempts show old.json new.json --metric bpb --plot compare.png

Each attempt is a process of its own, so that none finds the memory or the caches of another.
"""

import ast
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from nanochat.cli.flags import flag, parse
from nanochat.cli.paths import output_problem
from nanochat.cli.program import cli
from nanochat.common import ROOT, UserError, format_table, resolve

RESULTS = ROOT / "attempts" / "results"
LONGEST = 60  # characters of a cell
# --record: the flags of the figures of record. Sizes are those of the preset `default`.
RECORD = {"dynamic_block_update_schedule_bench": ["--equal-time-budget"]}


@dataclass
class RunFlags:
    """What is run, and how"""
    record: bool = flag(False, "write to attempts/results/, replacing the figures of record; other flags are not taken then")


@dataclass
class ShowFlags:
    """What is shown"""
    metric: str | None = flag(None, "compare this field over the files, where several are of one attempt; by default the first "
                                    "that differs")
    plot: str | None = flag(None, "draw the metric, variant by variant, a colour per file", metavar="PNG")

    def validate(self) -> list[str]:
        trouble = self.plot and output_problem(self.plot)
        return [f"--plot {trouble}"] if trouble else []


def scripts() -> dict[str, Path]:
    """The attempts by name: what in attempts/container_*/ is a script."""
    found = sorted((ROOT / "attempts").glob("container_*/*.py"))
    if not found:
        raise UserError(f"there are no attempts in {ROOT / 'attempts'}: they are in the checkout, not in an installed package")
    return {path.stem: path for path in found if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}


def question(path: Path) -> str:
    """The first line of the script's docstring."""
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
    """The command lines that run these attempts, from the root of the checkout where they are recorded."""
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


def read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not content["results"] or not isinstance(content["script"], str):
            raise ValueError("no results in it")
        return content
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} is not a result of an attempt ({type(e).__name__}: {e})") from None


def cell(value):
    """What a table shows of a field: numbers as they are, words cut short, of a spread the median. None for anything else."""
    if isinstance(value, dict):
        return value.get("median")
    if isinstance(value, str) and len(value) > LONGEST:
        return value[:LONGEST - 3] + "..."
    return value if isinstance(value, (int, float, str)) else None


def fields_of(results: dict) -> list[str]:
    """The fields that a table can show, in order."""
    return list(dict.fromkeys(name for row in results.values() for name, value in row.items() if cell(value) is not None))


def tables(results: dict, width: int) -> str:
    """Every field of the results: first those that are the same in all variants, then tables no wider than `width`."""
    columns = fields_of(results)
    rows = [{"variant": name} | {c: cell(row.get(c)) for c in columns} for name, row in results.items()]
    same = [c for c in columns if len(rows) > 1 and len({row[c] for row in rows}) == 1]
    parts = [["variant"]]
    for column in (c for c in columns if c not in same):
        longest = max(map(len, format_table(rows, [*parts[-1], column]).splitlines()))
        if longest > width and len(parts[-1]) > 1:
            parts.append(["variant"])
        parts[-1].append(column)
    everywhere = f"everywhere: {', '.join(f'{c} {rows[0][c]}' for c in same)}\n" if same else ""
    return everywhere + "\n\n".join(format_table(rows, part) for part in parts)


def show(paths: list[str], flags: ShowFlags) -> int:
    """A table per attempt; where several files are of one attempt, one field side by side, and the last over the first."""
    files = [resolve(path) for path in paths] or sorted(Path(os.path.relpath(path)) for path in RESULTS.rglob("*.json"))
    if not files:
        raise UserError(f"nothing is stored in {RESULTS}: name files, or measure with `run all --record`")
    by_script = {}
    for path in files:
        content = read(path)
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


def first_difference(results: list[dict]) -> str:
    """The first field whose numbers differ between the files in a variant that they share."""
    first, *others = results
    for variant, row in first.items():
        for field in row:
            values = [cell(other.get(variant, {}).get(field)) for other in others]
            if isinstance(cell(row[field]), (int, float)) and any(v not in (None, cell(row[field])) for v in values):
                return field
    raise UserError("these results do not differ in any variant that they share; name a field with --metric")


def compare(results: list[dict], names: list[str], metric: str) -> list[dict]:
    """A row per variant: the metric in each file, and the last over the first where both have it."""
    if not any(metric in row for one in results for row in one.values()):
        raise UserError(f"--metric {metric}: these results have {', '.join(fields_of(results[0]))}")
    labels = [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, 1)]
    rows = []
    for variant in dict.fromkeys(v for one in results for v in one):
        values = [cell(one.get(variant, {}).get(metric)) for one in results]
        numbers = [v for v in (values[0], values[-1]) if isinstance(v, (int, float))]
        ratio = numbers[1] / numbers[0] if len(results) > 1 and len(numbers) == 2 and numbers[0] else None
        row = {"variant": variant} | dict(zip(labels, values, strict=True))
        rows.append(row | ({"last / first": ratio} if len(results) > 1 else {}))
    return rows


def plot(path: str, compared: dict) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(11, 5 * len(compared)), layout="constrained")
    column = figure.subplots(len(compared), 1, squeeze=False)[:, 0]
    for axes, (script, (metric, contents)) in zip(column, compared.items(), strict=True):
        variants = list(dict.fromkeys(v for _, content in contents for v in content["results"]))
        for i, (file, content) in enumerate(contents):
            values = [cell(content["results"].get(v, {}).get(metric)) for v in variants]
            bars = [(x + i / (len(contents) + 1), y) for x, y in enumerate(values) if isinstance(y, (int, float))]
            if bars:
                axes.bar(*zip(*bars, strict=True), width=1 / (len(contents) + 1), label=str(file))
        axes.set_xticks(range(len(variants)), variants, rotation=60, ha="right", fontsize=7)
        axes.set(title=f"{script}: {metric}")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)
    figure.savefig(resolve(path), dpi=100)
    print(f"plot: {path}")


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """What stands before the first flag, and the rest."""
    first = next((i for i, a in enumerate(argv) if a.startswith("-")), len(argv))
    return argv[:first], argv[first:]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    command, rest = argv[0], argv[1:]
    names, flags = split(rest)
    if command == "run":
        return run(names, flags)
    if command == "show":
        return show(names, *parse([ShowFlags], flags, prog="python -m scripts.attempts show"))
    if command == "list":
        parse([], rest, prog="python -m scripts.attempts list")
        return list_attempts()
    raise UserError(f"{command}: say list, run or show; --help explains them")


if __name__ == "__main__":
    cli(main)
