"""The table of each suite of ``mohawk-nas bench``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from mohawk_nas.bench.options import SUITES
from mohawk_nas.bench.results import Record

__all__ = ["show_end", "show_suite"]

# A file or pipe has no width of its own; the tables want this much.
_OUT = Console(width=None if sys.stdout.isatty() else 120)

WARMUP_FROM = 5.0
"""Seconds of warm-up that are worth showing."""


def show_suite(suite: str, records: Sequence[Record]) -> None:
    """What one suite measured."""
    table = Table(
        title=f"{suite}: {SUITES[suite]}",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    varying = _varying(records)
    table.add_column("case")
    for name in varying:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_column("median", justify="right", no_wrap=True)
    table.add_column("quartiles", justify="right", no_wrap=True)
    table.add_column("also")
    for record in records:
        shapes = [str(record.shapes.get(name, "")) for name in varying]
        table.add_row(record.case, *shapes, *_measurement(record))
    _OUT.print()
    _OUT.print(table)
    fixed = {
        name: value
        for record in records
        for name, value in record.shapes.items()
        if name not in varying
    }
    shown = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in fixed.items())
    types = ", ".join(sorted({record.dtype for record in records}))
    _OUT.print(f"{shown}; {types}", style="dim", highlight=False, soft_wrap=True)


def show_end(path: Path, failed: Sequence[Record]) -> None:
    """Where everything stands, and what is missing in it."""
    _OUT.print()
    _OUT.print(f"Wrote  {path}", highlight=False, soft_wrap=True)
    for record in failed:
        text = f"failed: {record.suite}, {record.case}: {record.error}"
        _OUT.print(text, highlight=False, markup=False, soft_wrap=True)


def _varying(records: Sequence[Record]) -> list[str]:
    """Shapes that tell the suite's cases apart."""
    names = dict.fromkeys(name for record in records for name in record.shapes)
    shared = {
        name: {record.shapes[name] for record in records if name in record.shapes} for name in names
    }
    return [name for name, values in shared.items() if len(values) > 1]


def _measurement(record: Record) -> list[str]:
    if record.median is None or record.spread is None:
        left_out = "" if record.left_out is None else f"left out: {record.left_out}"
        return ["", "", left_out if record.error is None else f"FAILED: {record.error}"]
    low, high = record.spread
    spread = f"{_number(low)} to {_number(high)}" if record.repeats > 1 else ""
    also = [_figure(name, value) for name, value in record.figures.items()]
    return [f"{_number(record.median)} {record.unit}", spread, ", ".join(filter(None, also))]


def _figure(name: str, value: float) -> str:
    words = name.replace("_", " ")
    if name == "calls_a_repeat" or (name == "warmup_seconds" and value < WARMUP_FROM):
        return ""
    if name.endswith("_bytes"):
        return f"{words.removesuffix(' bytes')} {_number(value / 2**20)} MiB"
    if unit := {"ms_a_step": "ms a step", "tflops": "TFLOP/s"}.get(name):
        return f"{_number(value)} {unit}"
    for ending, unit in (("_seconds", "s"), ("_per_second", "/s")):
        if name.endswith(ending):
            stem = name.removesuffix(ending).replace("_", " ")
            return f"{stem} {_number(value)} {unit}"
    return f"{words} {_number(value)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
