"""The page of an audit: the score against what layouts distil to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from mohawk_nas.files import atomic_write
from mohawk_nas.reporting import text
from mohawk_nas.reporting.page import page, paragraphs, svg, table

if TYPE_CHECKING:
    from mohawk_nas.audit import AuditReport, Distilled, Trust

__all__ = ["render_audit", "write_audit"]


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
        f'<div class="answer">{paragraphs(text.audit_verdict(report))}</div>',
    ]
    for trust in report.trusts:
        sections += [
            f"<h2>Does the score foretell distilled {escape(trust.figure)}?</h2>",
            paragraphs(text.trust_lines(trust, report)),
            _scatter(report, trust),
        ]
    sections.append(
        '<p class="soft">Each mark is a layout: its mean over the seeds, and a line from the '
        "lowest to the highest. The large green mark is the study's best, the ring the best when "
        f"distilled. Score: {escape(report.objective)} on the search split, lower is better. "
        "Distilled figures are of the test split: kl in nats a token, lower is better; "
        "recall the share of right answers, higher is better.</p>"
    )
    if report.rivals:
        rows = [[escape(cell) for cell in row] for row in text.rival_rows(report)]
        sections += [
            "<h2>What baselines name, against the study's best</h2>",
            table(text.RIVAL_COLUMNS, rows, numbers={3}),
            f'<p class="soft">{escape(text.rivals_reading(report))}</p>',
        ]
    return page(f"{name}: audit", sections)


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
    return svg(width, height, marks, label=f"Score against distilled {trust.figure}")
