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
    if suite == "inference" and (cells := [r for r in records if "context" in r.shapes]):
        varying = ["context", "batch"]
        _fill_side_by_side(table, cells)
        _OUT.print()
        _OUT.print(table)
        _show_fixed(records, varying)
        return
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
    _show_fixed(records, varying)


def _show_fixed(records: Sequence[Record], varying: Sequence[str]) -> None:
    """Shapes that all cases share."""
    fixed = {
        name: value
        for record in records
        for name, value in record.shapes.items()
        if name not in varying
    }
    shown = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in fixed.items())
    types = ", ".join(sorted({record.dtype for record in records}))
    _OUT.print(f"{shown}; {types}", style="dim", highlight=False, soft_wrap=True)


def _fill_side_by_side(table: Table, records: Sequence[Record]) -> None:
    """Teacher and student in one row for each context and batch."""
    names = "context", "batch", "", "prefill/s", "decode/s", "ms a step", "cache", "budget", "peak"
    for name in names:
        table.add_column(name, justify="left" if name == "" else "right", no_wrap=True)
    rows: dict[tuple[object, object], dict[str, dict[str, Record]]] = {}
    for record in records:
        who, _, what = record.case.partition(", ")
        batch: object = what if what == "largest batch" else record.shapes["batch"]
        row = rows.setdefault((record.shapes["context"], batch), {})
        row.setdefault(who, {})[what] = record
    for (context, batch), row in rows.items():
        rates = {}
        for who, found in row.items():
            decoded = found.get("decode") or found.get("largest batch")
            assert decoded is not None
            figures, own = decoded.figures, decoded.shapes["batch"]
            if decoded.median is not None:
                rates[who] = decoded.median
            table.add_row(
                f"{context}",
                f"{own}" if batch == own else f"largest: {own}",
                who,
                _cell(found.get("prefill")),
                _cell(decoded),
                _number(figures["ms_a_step"]) if "ms_a_step" in figures else "",
                *(_size(figures.get(f"{name}_bytes")) for name in ("cache", "budget", "peak")),
            )
        if len(rates) == 2:
            times = rates["student"] / rates["teacher"]
            table.add_row("", "", "student / teacher", "", f"{times:.2f} times")


def _cell(record: Record | None) -> str:
    if record is None:
        return ""
    if record.error is not None:
        return "FAILED"
    if record.median is None:
        return "too long" if "s, more than" in (record.left_out or "") else record.left_out or ""
    return _number(record.median)


def _size(num_bytes: float | None) -> str:
    if num_bytes is None:
        return ""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**27 else f"{num_bytes / 2**20:.3g} MiB"


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
