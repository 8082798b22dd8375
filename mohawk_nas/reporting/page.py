"""What every HTML page is made of: its frame and style, paragraphs, tables, drawings.

A page is one file that needs nothing else: no scripts, no fonts, no network.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["page", "paragraphs", "svg", "table"]

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #667085; --line: #d9dee7;
  --page: #ffffff; --panel: #f5f7fa; --keep: #0b7a53; --lose: #b4483c; --dot: #8aa0bd; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #333b48;
  --page: #14181f; --panel: #1c222c; --keep: #3fbf8f; --lose: #e07a6d; --dot: #5d7391; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 74rem; padding: 2rem 1.25rem 4rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2.4rem 0 .5rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); font-size: .87rem; max-width: 52rem; }
.answer { background: var(--panel); border-radius: 8px; padding: 1rem 1.2rem; margin: 1.2rem 0; }
.answer .strip { font-size: 1.1rem; margin-bottom: .5rem; display: inline-block; }
.scroll { overflow-x: auto; } .scroll .strip { font-size: .86em; letter-spacing: .04em; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .82rem; }
th, td { padding: .28rem .7rem .28rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.strip { font-family: ui-monospace, monospace; color: var(--soft); letter-spacing: .1em; }
.strip b { color: var(--keep); }
svg { width: 100%; height: auto; display: block; font: 12px system-ui, sans-serif; }
svg text { fill: var(--soft); } svg .axis { stroke: var(--line); }
.keep { fill: var(--keep); } .lose { fill: var(--lose); } svg text.kept { fill: var(--keep);
  font-weight: 700; } .dot { fill: var(--dot); } .base { fill: none; stroke: var(--dot); }
.seeds { stroke: var(--dot); } .best { fill: none; stroke: var(--keep); stroke-width: 2; }
pre { background: var(--panel); border-radius: 8px; padding: 1rem; overflow-x: auto;
  font-size: .82rem; }
"""


def page(title: str, sections: Iterable[str]) -> str:
    """A whole page of HTML sections."""
    body = "\n".join(sections)
    title = escape(title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}: mohawk-nas</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def paragraphs(lines: Iterable[str]) -> str:
    """Plain text, a paragraph a line."""
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: set[int]) -> str:
    """Cells are HTML; the columns of ``numbers`` stand on the right."""

    def line(tag: str, cells: Sequence[str]) -> str:
        joined = "".join(
            f'<{tag} class="n">{cell}</{tag}>' if i in numbers else f"<{tag}>{cell}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{joined}</tr>"

    lines = [line("th", [escape(name) for name in columns]), *(line("td", row) for row in rows)]
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def svg(width: int, height: int, marks: Iterable[str], *, label: str) -> str:
    """A drawing of SVG elements; ``label`` is read out where it is not seen."""
    inner = "\n".join(marks)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">\n'
        f"{inner}\n</svg>"
    )
