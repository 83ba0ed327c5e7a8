"""Tables and bar charts of result files: one file in full, or one field of several files side by side."""

import json
from pathlib import Path

from nanochat.common import UserError, format_table, resolve

LONGEST = 60  # characters of a cell


def read_result_file(path: Path) -> dict:
    """Read a result file. Raises: UserError where it cannot be read, or has no results."""
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
    """A field as a table shows it: numbers, words cut short, the median of a spread; None for anything else."""
    if isinstance(value, dict):
        return value.get("median")
    if isinstance(value, str) and len(value) > LONGEST:
        return value[:LONGEST - 3] + "..."
    return value if isinstance(value, (int, float, str)) else None


def fields_of(results: dict) -> list[str]:
    """The fields that a table can show, in order."""
    return list(dict.fromkeys(name for row in results.values() for name, value in row.items() if cell(value) is not None))


def tables(results: dict, width: int) -> str:
    """All fields of the results: first those that are equal in all variants, then tables no wider than `width` characters."""
    columns = fields_of(results)
    rows = [{"variant": name} | {c: cell(row.get(c)) for c in columns} for name, row in results.items()]
    same = [c for c in columns if len(rows) > 1 and len({row[c] for row in rows}) == 1]
    parts = [["variant"]]
    for column in (c for c in columns if c not in same):
        longest = max(map(len, format_table(rows, [*parts[-1], column]).splitlines()))
        if longest > width and len(parts[-1]) > 1:
            parts.append(["variant"])
        parts[-1].append(column)
    in_all = f"in all variants: {', '.join(f'{c} {rows[0][c]}' for c in same)}\n" if same else ""
    return in_all + "\n\n".join(format_table(rows, part) for part in parts)


def first_difference(results: list[dict]) -> str:
    """The first numeric field that differs between the files, in a variant that they share. Raises: UserError without one."""
    first, *others = results
    for variant, row in first.items():
        for field in row:
            values = [cell(other.get(variant, {}).get(field)) for other in others]
            if isinstance(cell(row[field]), (int, float)) and any(v not in (None, cell(row[field])) for v in values):
                return field
    raise UserError("these results do not differ in any variant that they share; name a field with --metric")


def compare(results: list[dict], names: list[str], metric: str) -> list[dict]:
    """A row per variant: the metric in each file, and the last file's over the first file's. Raises: UserError without it."""
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
    """Draw bars, a colour per file. `compared`: script -> (metric, [(file, content), ...]). Raises: UserError without
    matplotlib."""
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
