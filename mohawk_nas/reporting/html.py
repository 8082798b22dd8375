"""``report.html``: what a search found, in one file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from pathlib import Path

from mohawk_nas.config import StudyConfig, dump
from mohawk_nas.files import atomic_write
from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.reporting import text
from mohawk_nas.reporting.page import page, paragraphs, svg, table
from mohawk_nas.search.result import StudyResult, Trial

__all__ = ["render_report", "write_report"]

TOP = 20
"""Best layouts shown."""


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
        f"{paragraphs([*text.verdict(result), *text.left_out(result, config)])}</div>",
        paragraphs(text.counts(result)),
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
            f"<h2>{escape(text.RUNGS_TITLE)}</h2>",
            _rung_table(result),
            f'<p class="soft">{escape(text.rung_counts(result))}</p>',
        ]
    if result.worth.fitted:
        sections += ["<h2>What each layer is worth as attention</h2>", _worth_chart(result)]
        if result.worth.r_squared is not None:
            note = escape(text.fit_reading(result))
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
    return page(result.name, sections)


def _best_table(result: StudyResult) -> str:
    shown = result.ranking[:TOP]
    rows = [
        [f"{rank}", *_cells(result, trial), escape(text.proposers(result, trial.layout))]
        for rank, trial in enumerate(shown, start=1)
    ]
    return table(["#", *_columns(result), "proposed by"], rows, numbers=_numbers(result, [0]))


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
    return table(["layout", "keeps", *result.pareto, "proposed by"], rows, numbers=numbers)


def _baseline_table(result: StudyResult) -> str:
    rank = {trial.layout: place for place, trial in enumerate(result.ranking, start=1)}
    rows = []
    for label, layout in result.baselines.items():
        cost = result.probe_costs.get(label)
        cells = _cells(result, result.by_layout[layout])
        rows.append([escape(label), *cells, str(rank[layout]), str(cost.asked) if cost else ""])
    columns = _columns(result)
    numbers = _numbers(result, [1 + len(columns), 2 + len(columns)])
    return table(["baseline", *columns, "rank", "probes"], rows, numbers=numbers)


def _rung_table(result: StudyResult) -> str:
    columns, found = text.rung_table(result)
    rows = [
        [_strip(result, x), text.layers(x), *cells, escape(text.proposers(result, x))]
        for x, cells in found.items()
    ]
    columns = ["layout", "keeps", *columns]
    return table([*columns, "proposed by"], rows, numbers=set(range(2, len(columns))))


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


def _strip(result: StudyResult, layout: Layout) -> str:
    cells = []
    for name in layout.candidates:
        symbol = escape(result.space.symbols[name])
        cells.append(f"<b>{symbol}</b>" if name == ATTENTION else symbol)
    narrow = all(len(symbol) == 1 for symbol in result.space.symbols.values())
    return f'<span class="strip">{("" if narrow else " ").join(cells)}</span>'


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
    return svg(800, height, marks, label="What each layer is worth as attention")


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
    return svg(width, height, marks, label="Best value after each layout")


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
    chart = svg(800, height + 30, marks, label="Range covered after each layout")
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
    return svg(width, height, marks, label=f"{up} and {across} of each layout")
