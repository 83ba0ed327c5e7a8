"""What the readers of every source share: how rows become text, what is done with bad ones, what was met on the way."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from nanochat.common import UserError
from nanochat.data.text import replace_lone_surrogates

COLUMN_HINT = "Name the one with the text (--text-column NAME)"
MOST_KINDS = 10  # of files left out, that are named in the one line about them


@dataclass
class Counts:
    """What was met while reading."""
    files: int = 0
    documents: int = 0
    empty: int = 0  # documents of nothing but white space, left out
    unreadable: int = 0  # files or rows left out because they could not be read
    duplicates: int = 0  # exact copies left out
    left_out: dict[str, int] = field(default_factory=dict)  # files that were never read, by kind: {".png": 3, "hidden": 2}
    examples: dict[str, str] = field(default_factory=dict)  # the first of each kind, and the first problem of "unreadable"

    def leave_out(self, kind: str, name: str) -> None:
        """Count a file that is not read."""
        self.left_out[kind] = self.left_out.get(kind, 0) + 1
        self.examples.setdefault(kind, name)


def describe_left_out(counts: dict) -> str:
    """What a source has that is not among its documents, in one line, with an example of each kind; "" if nothing.

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
    """How rows are read, for the readers of each file type and of the hub."""
    text_column: str
    skip_bad: bool
    counts: Counts

    def bad(self, problem: str, hint: str = "Mend it") -> None:
        """Refuse something unreadable, or count it and go on where the user asked for that."""
        if not self.skip_bad:
            raise UserError(f"{problem}. {hint}, or leave out what cannot be read with --skip-bad.")
        self.counts.unreadable += 1
        self.counts.examples.setdefault("unreadable", problem)

    def check_column(self, where: str, columns: Iterable[str]) -> bool:
        """Whether a row or a table has the column with the text; without one it is bad."""
        columns = list(columns)
        if self.text_column not in columns:
            self.bad(self.missing_column(where, columns), COLUMN_HINT)
        return self.text_column in columns

    def missing_column(self, where: str, columns: list[str]) -> str:
        """What is wrong with a row or a table of these columns."""
        there = ", ".join(map(repr, columns)) or "none"
        return f"{where} has no column {self.text_column!r}; it has {there}"

    def row(self, row, where: str) -> Iterator[str]:
        """The text of an object with the column, or of a string."""
        if isinstance(row, str):
            yield from self.text(row, where)
        elif not isinstance(row, dict):
            self.bad(f"{where} is not a JSON object or string")
        elif self.check_column(where, row):
            yield from self.text(row[self.text_column], where)

    def text(self, value, where: str) -> Iterator[str]:
        """A value of the column: nothing is empty text, anything but a string is bad."""
        if value is None or isinstance(value, str):
            yield replace_lone_surrogates(value or "")
        else:
            self.bad(f"{where}: column {self.text_column!r} holds {type(value).__name__}, not text")
