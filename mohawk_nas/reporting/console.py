"""The tables that a finished search prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.reporting import text
from mohawk_nas.search.result import Placement, StudyResult, Trial
from mohawk_nas.search.space import SearchSpace

__all__ = ["print_placement", "print_result"]

SPACED_UP_TO = 16
"""Layers up to which a layout is printed with spaces between the symbols."""
MOST_MEMBERS = 20
"""Members of a Pareto set that are printed."""
HALF_BAR = 12
"""Characters of the longest bar on either side of zero."""


def print_result(
    result: StudyResult,
    *,
    console: Console,
    next_command: str | None = None,
    top: int = 10,
    notes: Sequence[str] = (),
) -> None:
    """Everything a finished search has to say.

    Args:
        result: The study; it has at least one trial.
        console: Where to print.
        next_command: What to type next.
        top: Best layouts shown; baselines are shown however many there are.
        notes: Said behind the verdict.
    """
    symbols = ", ".join(f"{symbol} = {name}" for name, symbol in result.space.symbols.items())
    console.print()
    _say(console, f"[bold]{result.name}[/bold]: one symbol a layer, first layer left ({symbols})")
    for line in text.counts(result):
        _say(console, line)
    console.print()
    console.print(_best_table(result, top=top, width=console.width))
    _say(console, f"[dim]{text.reading(result)}[/dim]")
    if result.pareto_set:
        console.print()
        console.print(_pareto_table(result, width=console.width))
        _say(console, f"[dim]{text.pareto_reading(result)}[/dim]")
    if result.baselines:
        console.print()
        console.print(_baseline_table(result, width=console.width))
    if result.rungs:
        console.print()
        console.print(_rung_table(result))
        _say(console, f"[dim]{text.rung_counts(result)}[/dim]")
    if result.worth.fitted or result.worth.swap_one or result.worth.add_one_in:
        console.print()
        console.print(_worth_table(result))
        if result.worth.r_squared is not None:
            _say(console, f"[dim]{text.fit_reading(result)}[/dim]")
    console.print()
    for line in (*text.verdict(result), *notes):
        _say(console, line)
    if next_command:
        console.print()
        console.print(Text.assemble("Next:  ", (next_command, "bold")), soft_wrap=True)


def print_placement(
    placement: Placement, layout: Layout, value: float, result: StudyResult, *, console: Console
) -> None:
    """Where one layout stands among a study's trials."""
    strip = Text.assemble(_strip(layout, result.space), f"  keeps {text.layers(layout)}")
    console.print(strip)
    known = " (the study has scored it too)" if placement.trial else ""
    tied = ", tied within noise" if placement.versus_best.tied else ""
    tied += ", both undistilled" if result.top_rung else ""
    rank = f"rank {placement.rank} of {placement.num_trials}{known}"
    _say(console, f"{text.value_name(result)} {value:.4f}, {rank}")
    _say(
        console,
        f"against the best, {text.named(result, result.best.layout)}: "
        f"{text.difference(placement.versus_best)}{tied}",
    )
    if result.pareto:
        _say(console, text.placed_in_set(placement, result))


def _best_table(result: StudyResult, *, top: int, width: int) -> Table:
    table = _table("Best layouts")
    shown = result.ranking[:top]
    table.add_column("#", justify="right")
    _add_layout_columns(table, result, [trial.layout for trial in shown], width)
    table.add_column("proposed by")
    for rank, trial in enumerate(shown, start=1):
        cells = _layout_cells(result, trial, shown, width)
        table.add_row(str(rank), *cells, text.proposers(result, trial.layout))
    if len(result.ranking) > top:
        table.caption = f"and {len(result.ranking) - top:,} more"
    return table


def _pareto_table(result: StudyResult, *, width: int) -> Table:
    table = _table(f"Pareto set of {', '.join(result.pareto)}")
    shown = result.pareto_set[:MOST_MEMBERS]
    strip, listed = _layout_forms(result, [trial.layout for trial in shown], width)
    if strip:
        table.add_column("layout", no_wrap=True)
    if listed:
        table.add_column("keeps", no_wrap=True)
    for name in result.pareto:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("proposed by")
    for trial in shown:
        cells: list[str | Text] = [_strip(trial.layout, result.space)] if strip else []
        if listed:
            cells.append(text.layers(trial.layout))
        figures = zip(result.pareto, result.figures(trial.score), strict=True)
        cells += [text.figure(name, value) for name, value in figures]
        table.add_row(*cells, text.proposers(result, trial.layout))
    if more := len(result.pareto_set) - len(shown):
        table.caption = f"and {more:,} more in report.html"
    return table


def _baseline_table(result: StudyResult, *, width: int) -> Table:
    table = _table("Baselines: what simple rules choose")
    trials = [result.by_layout[layout] for layout in result.baselines.values()]
    table.add_column("baseline", no_wrap=True)
    _add_layout_columns(table, result, [trial.layout for trial in trials], width)
    table.add_column("rank", justify="right")
    table.add_column("probes", justify="right")
    rank = {trial.layout: place for place, trial in enumerate(result.ranking, start=1)}
    for label, trial in zip(result.baselines, trials, strict=True):
        cost = result.probe_costs.get(label)
        looked = f"{cost.asked}" if cost else ""
        cells = _layout_cells(result, trial, trials, width)
        table.add_row(label, *cells, str(rank[trial.layout]), looked)
    return table


def _rung_table(result: StudyResult) -> Table:
    columns, rows = text.rung_table(result)
    table = _table(text.RUNGS_TITLE)
    table.add_column("keeps")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("proposed by")
    for layout, cells in rows.items():
        style = "bold green" if layout == result.best.layout else ""
        named = Text(text.named(result, layout), style=style)
        table.add_row(named, *cells, text.proposers(result, layout))
    return table


def _add_layout_columns(
    table: Table, result: StudyResult, layouts: Sequence[Layout], width: int
) -> None:
    strip, listed = _layout_forms(result, layouts, width)
    if strip:
        table.add_column("layout", no_wrap=True)
    if listed:
        table.add_column("keeps", no_wrap=True)
    if len(result.weights) > 1:
        for name in result.weights:
            table.add_column(name, justify="right")
    table.add_column(text.value_name(result), justify="right", no_wrap=True)
    table.add_column("behind the best", no_wrap=True)


def _layout_cells(
    result: StudyResult, trial: Trial, beside: Sequence[Trial], width: int
) -> list[str | Text]:
    strip, listed = _layout_forms(result, [other.layout for other in beside], width)
    cells: list[str | Text] = [_strip(trial.layout, result.space)] if strip else []
    if listed:
        cells.append(text.layers(trial.layout))
    if len(result.weights) > 1:
        cells += [f"{trial.score.mean(name):.4f}" for name in result.weights]
    cells.append(f"{trial.value:.4f}")
    if trial.layout == result.best.layout:
        cells.append("the best")
    else:
        versus = result.versus_best(trial)
        cells.append(f"{text.difference(versus)}{' ' + text.TIED_MARK if versus.tied else ''}")
    return cells


def _worth_table(result: StudyResult) -> Table:
    worth, name = result.worth, text.value_name(result)
    table = _table("What each layer is worth as attention")
    table.add_column("layer", justify="right")
    table.add_column("best", justify="center")
    if worth.fitted:
        table.add_column(f"keeping it lowers {name} by", no_wrap=True)
    if worth.swap_one:
        table.add_column(f"{name}, only it replaced", justify="right")
    if worth.add_one_in:
        table.add_column(f"{name}, only it kept", justify="right")
    for layer in range(result.space.num_layers):
        symbol = result.space.symbols[result.best.layout[layer]]
        style = "bold green" if result.best.layout[layer] == ATTENTION else "dim"
        row: list[str | Text] = [str(layer), Text(symbol, style=style)]
        if worth.fitted:
            row.append(_bar(worth.fitted, layer))
        row += [
            f"{values[layer]:.4f}" if layer in values else "pinned"
            for values in (worth.swap_one, worth.add_one_in)
            if values
        ]
        table.add_row(*row)
    return table


def _bar(values: Mapping[int, float], layer: int) -> Text:
    if layer not in values:
        return Text("pinned", style="dim")
    value, longest = values[layer], max(abs(v) for v in values.values())
    length = round(HALF_BAR * abs(value) / longest) if longest else 0
    left = "█" * length if value < 0 else ""
    right = "█" * length if value >= 0 else ""
    return Text.assemble(
        f"{value:+.4f} ",
        (left.rjust(HALF_BAR), "red"),
        ("│", "dim"),
        (right.ljust(HALF_BAR), "green"),
    )


def _strip(layout: Layout, space: SearchSpace) -> Text:
    narrow = all(len(symbol) == 1 for symbol in space.symbols.values())
    gap = "" if narrow and space.num_layers > SPACED_UP_TO else " "
    strip = Text()
    for layer, name in enumerate(layout.candidates):
        style = "bold green" if name == ATTENTION else "dim"
        strip.append(f"{gap if layer else ''}{space.symbols[name]}", style=style)
    return strip


def _layout_forms(result: StudyResult, layouts: Sequence[Layout], width: int) -> tuple[bool, bool]:
    # The strip and the list of layers say the same: both where a row has room, else the strip, and
    # the list alone where the strip is too long for a row and longer than the list.
    room = width - (54 if len(result.weights) == 1 else 70)
    strip = len(_strip(layouts[0], result.space))
    listed = max(len(text.layers(layout)) for layout in layouts)
    if strip + listed <= room:
        return True, True
    return (True, False) if strip <= max(room, listed) else (False, True)


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
        show_edge=False,
        collapse_padding=True,
    )


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False)
