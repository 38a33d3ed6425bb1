"""The parts of an HTML page that needs nothing else, and is light or dark as its reader has it."""

import html
from collections.abc import Iterable, Sequence

_STYLE = """
:root { color-scheme: light dark; --ink: #37352f; --soft: #6b6b6b; --paper: #ffffff; --grid: #e6e6e3;
  --blue: #0b6e99; --orange: #c2620a; --red: #c4352b; --grey: #8a8a86; --good: #1d7a46; --pale: #a8cfe0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e2df; --soft: #a3a29e; --paper: #1b1c1e; --grid: #38393c;
  --blue: #5db6e0; --orange: #f0a050; --red: #f2766c; --grey: #93938f; --good: #5cc48c; --pale: #2d5a6e; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .2rem; }
p { margin: .2rem 0 .6rem; } .soft { color: var(--soft); } .wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
td, th { border-bottom: 1px solid var(--grid); padding: .25rem .5rem; text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
td:first-child, th:first-child { text-align: left; white-space: pre-wrap; }
.good { color: var(--good); } .bad { color: var(--red); font-weight: 600; }
svg { max-width: 100%; height: auto; }
"""

Cell = str | tuple[str, str]
"""A text, or a text and its class."""


def document(title: str, parts: Iterable[str]) -> str:
    """Return the whole page."""
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escaped(title)}</title><style>{_STYLE}</style><h1>{escaped(title)}</h1>\n{''.join(parts)}\n</html>\n"
    )


def plot_section(title: str, words: str, svg: str) -> str:
    """Return a plot under its title."""
    return f"<h2>{escaped(title)}</h2><p class=soft>{escaped(words)}</p>{svg}"


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[Cell]], note: str = "") -> str:
    """Return a table under its title; nothing where it has no rows."""
    if not rows:
        return ""
    names = "".join(f"<th>{escaped(name)}" for name in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}\n" for row in rows)
    soft = f"<p class=soft>{escaped(note)}</p>" if note else ""
    return f"<h2>{escaped(title)}</h2>{soft}<div class=wide><table><tr>{names}\n{body}</table></div>"


def escaped(text: str) -> str:
    """Return a text as HTML."""
    return html.escape(text)


def _cell(cell: Cell) -> str:
    text, kind = cell if isinstance(cell, tuple) else (cell, "")
    return f"<td class={kind}>{escaped(text)}" if kind else f"<td>{escaped(text)}"
