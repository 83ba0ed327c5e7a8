"""HTML pages that hold all that they show: one file that loads nothing, light and dark, readable on a phone. No torch.

The reports of runs (report.py, comparison.py) and of the lab (nanochat/lab/report.py) are such pages.
"""

from collections.abc import Callable, Iterable
from html import escape

from nanochat.training.records import number

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # makes the browser load nothing
STYLE = """
:root { color-scheme: light dark; --line: #8884; --text: #222; --back: #fff; --blue: #3366cc; --good: #0a7d16; --bad: #c62a0c;
        --open: #a86200 }
@media (prefers-color-scheme: dark) {
  :root { --text: #ddd; --back: #181a1b; --blue: #7ba4ff; --good: #4fd15c; --bad: #ff7a5c; --open: #ffb547 }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 52rem; margin: 0 auto;
       padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem } summary { font-weight: 600; margin-top: 1rem }
:not(svg) > svg { max-width: 40rem; width: 100%; display: block }
svg text { font: 10px system-ui, sans-serif; fill: var(--text); text-anchor: middle }
@media (max-width: 30rem) { svg text { font-size: 12px } }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
         overflow-wrap: break-word }
td:first-child, th:first-child, .text td, .text th { text-align: left } .text td { white-space: normal }
.text td:first-child { min-width: 6rem } @media (max-width: 30rem) { td:first-child { white-space: normal } }
pre { font-size: .75rem; white-space: pre-wrap; background: #8881; padding: .6rem }
"""


def page(title: str, parts: Iterable[str], style: str = "") -> str:
    """A whole page. title: of the window, as text. parts: HTML. style: CSS in addition to STYLE."""
    text = ('<!doctype html><html lang="en"><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(title)}</title><style>{STYLE}{style}</style><body>{''.join(parts)}</body></html>\n")
    return text.encode("utf-8", "replace").decode("utf-8")  # names of files in any bytes


def cell(value) -> str:
    """A value as a cell of a table."""
    return f"<td>{escape(figure(value))}</td>"


def table(rows: list[dict], kind: str = "", cell: Callable[[object], str] = cell) -> str:
    """Rows as a table; a column in which nothing is known is left out. kind: "text", where cells hold words that may wrap."""
    columns = [c for c in dict.fromkeys(c for row in rows for c in row) if any(row.get(c) is not None for row in rows)]
    if not columns:
        return "<p>none</p>"
    head = "".join(f"<th>{escape(str(c))}</th>" for c in columns)
    body = "".join("<tr>" + "".join(cell(row.get(c)) for c in columns) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><tr>{head}</tr>{body}</table></div>'


def figure(value) -> str:
    """A value of a table as text: numbers with five digits, of which at most four are decimals."""
    if value is None:
        return "-"
    if isinstance(value, bool) or number(value) is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.{max(0, 5 - len(str(int(abs(value)))))}f}"
