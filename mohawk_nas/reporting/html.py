"""``report.html``: what a search found, in one file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from mohawk_nas.config import StudyConfig, dump
from mohawk_nas.files import atomic_write
from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.reporting import text
from mohawk_nas.search.result import StudyResult, Trial

if TYPE_CHECKING:
    from mohawk_nas.audit import AuditReport, Distilled, Trust

__all__ = ["render_audit", "render_report", "write_audit", "write_report"]

TOP = 20
"""Best layouts shown."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #667085; --line: #d9dee7;
  --page: #ffffff; --panel: #f5f7fa; --keep: #0b7a53; --lose: #b4483c; --dot: #8aa0bd; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #333b48;
  --page: #14181f; --panel: #1c222c; --keep: #3fbf8f; --lose: #e07a6d; --dot: #5d7391; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2.4rem 0 .5rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); font-size: .87rem; max-width: 52rem; }
.answer { background: var(--panel); border-radius: 8px; padding: 1rem 1.2rem; margin: 1.2rem 0; }
.answer .strip { font-size: 1.1rem; margin-bottom: .5rem; display: inline-block; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
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


def write_report(path: Path, result: StudyResult, config: StudyConfig) -> Path:
    """Write the report and return its path.

    Args:
        path: Where; an earlier report is replaced.
        result: The study; it has at least one trial.
        config: The settings that were resolved for it.
    """
    with atomic_write(path) as beside:
        beside.write_text(render_report(result, config), encoding="utf-8")
    return path


def render_report(result: StudyResult, config: StudyConfig) -> str:
    """The report's text."""
    symbols = ", ".join(f"{symbol} = {name}" for name, symbol in result.space.symbols.items())
    sections = [
        f"<h1>{escape(result.name)}</h1>",
        "<p>Which layers of the teacher stay attention. One symbol a layer, first layer left: "
        f"{escape(symbols)}.</p>",
        f'<div class="answer">{_strip(result, result.best.layout)}'
        f"{_paragraphs(text.verdict(result))}</div>",
        _paragraphs(text.counts(result)),
        "<h2>Best layouts</h2>",
        _best_table(result),
        f'<p class="soft">{escape(text.reading(result))}</p>',
    ]
    if result.pareto_set:
        sections += [
            f"<h2>Pareto set of {escape(', '.join(result.pareto))}</h2>",
            _pareto_table(result),
            f'<p class="soft">{escape(text.pareto_reading(result))}</p>',
            *(_pareto_scatter(result, name) for name in result.pareto[1:]),
        ]
    if result.baselines:
        sections += ["<h2>Baselines: what simple rules choose</h2>", _baseline_table(result)]
    if result.rungs:
        sections += [
            "<h2>Rungs: the best are distilled, and the best of these longer</h2>",
            _rung_table(result),
            f'<p class="soft">{escape(text.rung_counts(result))}</p>',
        ]
    if result.worth.fitted:
        sections += ["<h2>What each layer is worth as attention</h2>", _worth_chart(result)]
        if result.worth.r_squared is not None:
            note = escape(text.fit_reading(result.worth.r_squared))
            sections.append(f'<p class="soft">{note}</p>')
    sections += [
        "<h2>How the search went</h2>",
        _anytime_chart(result),
        '<p class="soft">Each mark is a layout in the order of scoring, hollow where a baseline '
        "named it; the line is the best so far.</p>",
        *_covered_chart(result),
        "<h2>Settings</h2>",
        f"<pre>{escape(dump(config))}</pre>",
    ]
    return _page(result.name, sections)


def write_audit(path: Path, report: AuditReport, *, name: str) -> Path:
    """Write an audit's page and return its path.

    Args:
        path: Where; an earlier page is replaced.
        report: What the audit found.
        name: The study's.
    """
    with atomic_write(path) as beside:
        beside.write_text(render_audit(report, name=name), encoding="utf-8")
    return path


def render_audit(report: AuditReport, *, name: str) -> str:
    """The text of an audit's page."""
    sections = [
        f"<h1>{escape(name)}: audit</h1>",
        f'<div class="answer">{_paragraphs(text.audit_verdict(report))}</div>',
    ]
    for trust in report.trusts:
        sections += [
            f"<h2>Does the score foretell distilled {escape(trust.figure)}?</h2>",
            _paragraphs(text.trust_lines(trust)),
            _scatter(report, trust),
        ]
    sections.append(
        '<p class="soft">Each mark is a layout: its mean over the seeds, and a line from the '
        "lowest to the highest. The large green mark is the study's best, the ring the best when "
        f"distilled. Score: {escape(report.objective)} on the search split, lower is better. "
        "Distilled figures are of the validation split: kl in nats a token, lower is better; "
        "recall the share of right answers, higher is better.</p>"
    )
    return _page(f"{name}: audit", sections)


def _page(title: str, sections: Iterable[str]) -> str:
    body = "\n".join(sections)
    title = escape(title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}: mohawk-nas</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _best_table(result: StudyResult) -> str:
    shown = result.ranking[:TOP]
    rows = [
        [f"{rank}", *_cells(result, trial), escape(text.proposers(result, trial.layout))]
        for rank, trial in enumerate(shown, start=1)
    ]
    return _table(["#", *_columns(result), "proposed by"], rows, numbers=_numbers(result, [0]))


def _pareto_table(result: StudyResult) -> str:
    rows = [
        [
            _strip(result, trial.layout),
            text.layers(trial.layout),
            *map(text.figure, result.pareto, result.figures(trial.score)),
            escape(text.proposers(result, trial.layout)),
        ]
        for trial in result.pareto_set
    ]
    numbers = set(range(2, 2 + len(result.pareto)))
    return _table(["layout", "keeps", *result.pareto, "proposed by"], rows, numbers=numbers)


def _baseline_table(result: StudyResult) -> str:
    rank = {trial.layout: place for place, trial in enumerate(result.ranking, start=1)}
    rows = []
    for label, layout in result.baselines.items():
        cost = result.probe_costs.get(label)
        cells = _cells(result, result.by_layout[layout])
        rows.append([escape(label), *cells, str(rank[layout]), str(cost.asked) if cost else ""])
    columns = _columns(result)
    numbers = _numbers(result, [1 + len(columns), 2 + len(columns)])
    return _table(["baseline", *columns, "rank", "probes"], rows, numbers=numbers)


def _rung_table(result: StudyResult) -> str:
    columns, found = text.rung_table(result)
    rows = [
        [_strip(result, layout), text.layers(layout), *cells] for layout, cells in found.items()
    ]
    columns = ["layout", "keeps", *columns]
    return _table(columns, rows, numbers=set(range(2, len(columns))))


def _columns(result: StudyResult) -> list[str]:
    parts = list(result.weights) if len(result.weights) > 1 else []
    return ["layout", "keeps", *parts, text.value_name(result), "behind the best"]


def _numbers(result: StudyResult, others: Iterable[int]) -> set[int]:
    # Columns of figures: behind "layout" and "keeps", up to the value.
    parts = len(result.weights) if len(result.weights) > 1 else 0
    return {*others, *range(3, 4 + parts)}


def _cells(result: StudyResult, trial: Trial) -> list[str]:
    cells = [_strip(result, trial.layout), text.layers(trial.layout)]
    if len(result.weights) > 1:
        cells += [f"{trial.score.mean(name):.4f}" for name in result.weights]
    cells.append(f"{trial.value:.4f}")
    if trial.layout == result.best.layout:
        return [*cells, "the best"]
    versus = result.versus_best(trial)
    return [*cells, f"{text.difference(versus)}{' ' + text.TIED_MARK if versus.tied else ''}"]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: set[int]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        joined = "".join(
            f'<{tag} class="n">{cell}</{tag}>' if i in numbers else f"<{tag}>{cell}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{joined}</tr>"

    lines = [line("th", [escape(name) for name in columns]), *(line("td", row) for row in rows)]
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _strip(result: StudyResult, layout: Layout) -> str:
    cells = []
    for name in layout.candidates:
        symbol = escape(result.space.symbols[name])
        cells.append(f"<b>{symbol}</b>" if name == ATTENTION else symbol)
    narrow = all(len(symbol) == 1 for symbol in result.space.symbols.values())
    return f'<span class="strip">{("" if narrow else " ").join(cells)}</span>'


def _paragraphs(lines: Iterable[str]) -> str:
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _worth_chart(result: StudyResult) -> str:
    fitted = result.worth.fitted or {}
    longest = max((abs(value) for value in fitted.values()), default=0.0) or 1.0
    row, middle, reach = 20, 430, 250
    height = row * result.space.num_layers + 30
    marks = [
        f'<text x="{middle}" y="14" text-anchor="middle">keeping it raises | lowers '
        f"{escape(text.value_name(result))}</text>",
        f'<line class="axis" x1="{middle}" x2="{middle}" y1="24" y2="{height - 6}"/>',
    ]
    for layer in range(result.space.num_layers):
        y = 26 + row * layer
        kept = result.best.layout[layer] == ATTENTION
        symbol = escape(result.space.symbols[result.best.layout[layer]])
        style = ' class="kept"' if kept else ""
        marks.append(f'<text{style} x="10" y="{y + 13}">layer {layer}</text>')
        marks.append(f'<text{style} x="80" y="{y + 13}">{symbol}</text>')
        if layer not in fitted:
            marks.append(f'<text x="110" y="{y + 13}">pinned</text>')
            continue
        value = fitted[layer]
        length = reach * abs(value) / longest
        x = middle if value >= 0 else middle - length
        style = "keep" if value >= 0 else "lose"
        marks.append(
            f'<rect class="{style}" x="{x:.1f}" y="{y + 3}" width="{length:.1f}" height="{row - 6}"'
            f' rx="2"/><text x="780" y="{y + 13}" text-anchor="end">{value:+.4f}</text>'
        )
    return _svg(800, height, marks, label="What each layer is worth as attention")


def _anytime_chart(result: StudyResult) -> str:
    width, height, left, top, bottom = 800, 310, 70, 14, 52
    finite = [trial.value for trial in result.trials if math.isfinite(trial.value)] or [0.0]
    low, high = min(finite), max(finite)
    spread = (high - low) or 1.0
    count = len(result.trials)

    def x(number: float) -> float:
        return left + (width - left - 20) * (number / max(count - 1, 1))

    def y(value: float) -> float:
        return top + (height - top - bottom) * (1 - (min(value, high) - low) / spread)

    floor = height - bottom + 8
    marks = [f'<line class="axis" x1="{left - 8}" x2="{width - 10}" y1="{floor}" y2="{floor}"/>']
    for value in (low, (low + high) / 2, high):
        at = y(value)
        marks.append(
            f'<line class="axis" x1="{left - 8}" x2="{width - 10}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text x="{left - 14}" y="{at + 4:.1f}" text-anchor="end">{value:.4f}</text>'
        )
    for number in sorted({0, (count - 1) // 2, count - 1}):
        marks.append(
            f'<text x="{x(number):.1f}" y="{floor + 18}" text-anchor="middle">{number + 1}</text>'
        )
    marks.append(
        f'<text x="{width / 2}" y="{height - 2}" text-anchor="middle">layouts scored</text>'
    )
    for trial in result.trials:
        style = "base" if result.labels(trial.layout) else "dot"
        note = f"{text.layers(trial.layout)}: {trial.value:.4f} ({trial.proposed_by})"
        marks.append(
            f'<circle class="{style}" cx="{x(trial.number):.1f}" cy="{y(trial.value):.1f}" r="3">'
            f"<title>{escape(note)}</title></circle>"
        )
    steps = result.anytime()
    path = f"M{x(0):.1f} {y(steps[0]):.1f}"
    for number, value in enumerate(steps[1:], start=1):
        path += f"H{x(number):.1f}V{y(value):.1f}"
    marks.append(f'<path class="best" d="{path}"/>')
    return _svg(width, height, marks, label="Best value after each layout")


def _scatter(report: AuditReport, trust: Trust) -> str:
    """Score against a distilled figure."""
    width, height, left, top, bottom = 800, 380, 80, 14, 52
    shown = [
        one
        for one in report.distilled
        if all(map(math.isfinite, [one.score, *one.figures[trust.figure]]))
    ]
    if not shown:
        return "<p>No layout has a finite score and figure.</p>"
    values = [value for one in shown for value in one.figures[trust.figure]]
    scores = [one.score for one in shown]
    floor = height - bottom + 12

    def place(value: float, ends: Sequence[float], start: float, end: float) -> float:
        return start + (end - start) * (value - min(ends)) / ((max(ends) - min(ends)) or 1.0)

    def x(score: float) -> float:
        return place(score, scores, left + 10, width - 30)

    def y(value: float) -> float:
        return place(value, values, height - bottom, top)

    marks = []
    for share in (0.0, 0.5, 1.0):
        score = min(scores) + share * (max(scores) - min(scores))
        value = min(values) + share * (max(values) - min(values))
        marks += [
            f'<line class="axis" x1="{left - 8}" x2="{width - 10}" y1="{y(value):.1f}" '
            f'y2="{y(value):.1f}"/><text x="{left - 14}" y="{y(value) + 4:.1f}" '
            f'text-anchor="end">{value:.4f}</text>',
            f'<text x="{x(score):.1f}" y="{floor + 16}" text-anchor="middle">{score:.4f}</text>',
        ]
    marks.append(
        f'<text x="{width / 2}" y="{height - 2}" text-anchor="middle">score: '
        f'{escape(report.objective)}</text><text x="14" y="{height / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {height / 2})">distilled {escape(trust.figure)}</text>'
    )

    def mark(one: Distilled) -> str:
        seeds = one.figures[trust.figure]
        mean, at = math.fsum(seeds) / len(seeds), f"{x(one.score):.1f}"
        note = f"{text.layers(one.layout)}: score {one.score:.4f}, {trust.figure} {mean:.4f}"
        searched = one.layout == report.searched
        circles = f'<circle class="{"keep" if searched else "dot"}" cx="{at}" cy="{y(mean):.1f}"'
        circles += f' r="{6 if searched else 4}"><title>{escape(note)}</title></circle>'
        if one.layout == report.best:
            circles += f'<circle class="best" cx="{at}" cy="{y(mean):.1f}" r="9"/>'
        spread = f'<line class="seeds" x1="{at}" x2="{at}" y1="{y(min(seeds)):.1f}"'
        return f'{spread} y2="{y(max(seeds)):.1f}"/>{circles}'

    # The study's best last, so that it is on top.
    marks += [mark(one) for one in sorted(shown, key=lambda one: one.layout == report.searched)]
    return _svg(width, height, marks, label=f"Score against distilled {trust.figure}")


def _covered_chart(result: StudyResult) -> list[str]:
    if not result.pareto_set:
        return []
    left, top, width, height = 70, 14, 700, 120
    shares = result.anytime_hypervolume
    path = f"M{left} {top + height}"
    for number, share in enumerate(shares):
        x = left + width * number / max(len(shares) - 1, 1)
        path += f"H{x:.1f}V{top + height * (1 - share):.1f}"
    marks = [
        f'<line class="axis" x1="{left - 8}" x2="{left + width}" y1="{y}" y2="{y}"/>'
        f'<text x="{left - 14}" y="{y + 4}" text-anchor="end">{share}</text>'
        for y, share in ((top, "100 %"), (top + height, "0 %"))
    ]
    marks.append(f'<path class="best" d="{path}"/>')
    note = "What the Pareto set covers of the range between best and worst figures, so far."
    chart = _svg(800, height + 30, marks, label="Range covered after each layout")
    return [chart, f'<p class="soft">{note}</p>']


def _pareto_scatter(result: StudyResult, across: str) -> str:
    """Every trial by the first figure of the Pareto set, upwards, and another one."""
    width, height, left, top, bottom = 800, 300, 70, 14, 52
    up, members = result.pareto[0], {trial.number for trial in result.pareto_set}
    points = [(t, t.score.mean(across), t.score.mean(up)) for t in result.trials]
    points = [p for p in points if math.isfinite(p[1]) and math.isfinite(p[2])]
    xs, ys = [p[1] for p in points] or [0.0], [p[2] for p in points] or [0.0]

    def share(value: float, values: list[float]) -> float:
        return (value - min(values)) / ((max(values) - min(values)) or 1.0)

    marks = []
    for value in sorted({min(ys), max(ys)}):
        at = top + (height - top - bottom) * (1 - share(value, ys))
        marks.append(
            f'<line class="axis" x1="{left - 8}" x2="{width - 10}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text x="{left - 14}" y="{at + 4:.1f}" text-anchor="end">'
            f"{text.figure(up, value)}</text>"
        )
    for value in sorted({min(xs), max(xs)}):
        at = left + (width - left - 60) * share(value, xs)
        marks.append(
            f'<text x="{at:.1f}" y="{height - bottom + 26}" text-anchor="middle">'
            f"{text.figure(across, value)}</text>"
        )
    marks.append(
        f'<text x="{width / 2}" y="{height - 2}" text-anchor="middle">{escape(across)}, with '
        f"{escape(up)} upwards; ringed: the Pareto set</text>"
    )
    for trial, x, y in points:
        style = "best" if trial.number in members else "dot"
        note = f"{text.layers(trial.layout)}: {across} {text.figure(across, x)}, "
        note += f"{up} {text.figure(up, y)} ({trial.proposed_by})"
        marks.append(
            f'<circle class="{style}" cx="{left + (width - left - 60) * share(x, xs):.1f}" '
            f'cy="{top + (height - top - bottom) * (1 - share(y, ys)):.1f}" r="4">'
            f"<title>{escape(note)}</title></circle>"
        )
    return _svg(width, height, marks, label=f"{up} and {across} of each layout")


def _svg(width: int, height: int, marks: Iterable[str], *, label: str) -> str:
    inner = "\n".join(marks)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">\n'
        f"{inner}\n</svg>"
    )
