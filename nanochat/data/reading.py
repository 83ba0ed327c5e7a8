"""Shared by the readers of all sources: rows to text, the handling of bad rows and files, and the counts of what was read."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from nanochat.common import UserError
from nanochat.data.text import replace_lone_surrogates

COLUMN_HINT = "Name the one with the text (--text-column NAME)"
MOST_KINDS = 10  # kinds of skipped files that the summary line names


@dataclass
class Counts:
    """Counts of what was read and of what was skipped."""
    files: int = 0
    documents: int = 0
    empty: int = 0  # skipped documents of white space only
    unreadable: int = 0  # skipped files or rows that are bad (--skip-bad)
    duplicates: int = 0  # skipped exact copies
    left_out: dict[str, int] = field(default_factory=dict)  # skipped files by kind: {".png": 3, "hidden": 2}
    examples: dict[str, str] = field(default_factory=dict)  # kind -> its first file; "unreadable" -> the first problem

    def leave_out(self, kind: str, name: str) -> None:
        """Count a file that is not read."""
        self.left_out[kind] = self.left_out.get(kind, 0) + 1
        self.examples.setdefault(kind, name)


def describe_left_out(counts: dict) -> str:
    """One line about everything that was skipped, with an example of each kind; "" if nothing was.

    counts: the fields of a `Counts`.
    """
    kinds = {kind: counts[kind] for kind in ("empty", "unreadable", "duplicates") if counts[kind]}
    files = sorted(counts["left_out"].items(), key=lambda item: -item[1])
    shown, more = files[:MOST_KINDS], files[MOST_KINDS:]
    parts = []
    for kind, number in [*kinds.items(), *shown]:
        example = counts["examples"].get(kind)
        parts.append(f"{number} {kind}" + (f" ({example}{', ...' if number > 1 else ''})" if example else ""))
    if more:
        parts.append(f"{sum(number for _, number in more)} files of {len(more)} more kinds")
    return ", ".join(parts)


@dataclass
class Reading:
    """The options of reading, and how rows become text. Shared by the file formats and the hub."""
    text_column: str
    skip_bad: bool
    counts: Counts

    def bad(self, problem: str, hint: str = "Repair it") -> None:
        """Report a bad row or file. Raises: UserError, unless `skip_bad`, which counts it."""
        if not self.skip_bad:
            raise UserError(f"{problem}. {hint}, or leave out what cannot be read with --skip-bad.")
        self.counts.unreadable += 1
        self.counts.examples.setdefault("unreadable", problem)

    def check_column(self, where: str, columns: Iterable[str]) -> bool:
        """Whether a row or table has the text column; reported as bad if not."""
        columns = list(columns)
        if self.text_column not in columns:
            self.bad(self.missing_column(where, columns), COLUMN_HINT)
        return self.text_column in columns

    def missing_column(self, where: str, columns: list[str]) -> str:
        """The problem of a row or table that has these columns only."""
        there = ", ".join(map(repr, columns)) or "none"
        return f"{where} has no column {self.text_column!r}; it has {there}"

    def row(self, row, where: str) -> Iterator[str]:
        """Yield the text of a JSON row: an object with the text column, or a string."""
        if isinstance(row, str):
            yield from self.text(row, where)
        elif not isinstance(row, dict):
            self.bad(f"{where} is not a JSON object or string")
        elif self.check_column(where, row):
            yield from self.text(row[self.text_column], where)

    def text(self, value, where: str) -> Iterator[str]:
        """Yield a value of the text column: None is empty text, anything but a string is bad."""
        if value is None or isinstance(value, str):
            yield replace_lone_surrogates(value or "")
        else:
            self.bad(f"{where}: column {self.text_column!r} holds {type(value).__name__}, not text")
