"""The tables that a finished search prints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.search.result import Comparison, Placement, StudyResult, Trial
from mohawk_nas.search.space import SearchSpace

__all__ = ["OBJECTIVE_NOTES", "describe_counts", "layers_text", "print_placement", "print_result"]

OBJECTIVE_NOTES = {
    "kl": "KL divergence from the teacher, nats a token",
    "stage2_cascade": "relative distance of the replaced mixers' outputs in the assembled student",
    "stage2_local": "relative distance of the replaced mixers' outputs on the teacher's inputs",
}
"""What the figures of an objective are."""

SPACED_UP_TO = 16
"""Layers up to which a layout is printed with spaces between the symbols."""
HALF_BAR = 12
"""Characters of the longest bar on either side of zero."""
MOST_TIES = 6
"""Tied layouts named one by one."""
TIED_MARK = "≈"


def print_result(
    result: StudyResult, *, console: Console, next_command: str | None = None, top: int = 10
) -> None:
    """Everything a finished search has to say.

    Args:
        result: The study; it has at least one trial.
        console: Where to print.
        next_command: What to type next.
        top: Best layouts shown; baselines are shown however many there are.
    """
    symbols = ", ".join(f"{symbol} = {name}" for name, symbol in result.space.symbols.items())
    console.print()
    _say(console, f"[bold]{result.name}[/bold]: one symbol a layer, first layer left ({symbols})")
    for line in describe_counts(result):
        _say(console, line)
    console.print()
    console.print(_best_table(result, top=top))
    _say(console, f"[dim]{_reading(result)}[/dim]")
    if result.baselines:
        console.print()
        console.print(_baseline_table(result))
    if result.worth.fitted or result.worth.swap_one or result.worth.add_one_in:
        console.print()
        console.print(_worth_table(result))
        if result.worth.r_squared is not None:
            _say(console, f"[dim]{_fit_reading(result.worth.r_squared)}[/dim]")
    console.print()
    _print_verdict(result, console)
    if next_command:
        console.print()
        console.print(Text.assemble("Next:  ", (next_command, "bold")), soft_wrap=True)


def print_placement(
    placement: Placement, layout: Layout, value: float, result: StudyResult, *, console: Console
) -> None:
    """Where one layout stands among a study's trials."""
    strip = Text.assemble(_strip(layout, result.space), f"  keeps {layers_text(layout)}")
    console.print(strip)
    known = " (the study has scored it too)" if placement.trial else ""
    tied = ", tied within noise" if placement.versus_best.tied else ""
    _say(
        console,
        f"{_value_name(result)} {value:.4f}, rank {placement.rank} of {placement.num_trials}{known}",
    )
    _say(
        console,
        f"against the best, {layers_text(result.best.layout)}: "
        f"{_difference(placement.versus_best)}{tied}",
    )


def describe_counts(result: StudyResult) -> list[str]:
    """How much was scored, and of how much."""
    kept = result.budget.attention_layers
    fits = f"that keep {kept} attention layer{'' if kept == 1 else 's'}"
    scored, possible = len(result.trials), result.num_possible
    if result.solved:
        lines = [
            f"Solved exactly: stage2_local is a sum over layers. {scored} of {possible:,} layouts "
            f"{fits} were scored."
        ]
    elif result.exhaustive:
        lines = [f"All {possible:,} layouts {fits} were scored: the search was exhaustive."]
    else:
        lines = [f"{scored:,} distinct layouts of the {possible:,} {fits} were scored."]
    if result.probe_costs:
        each = ", ".join(f"{name} {cost.asked}" for name, cost in result.probe_costs.items())
        fresh = sum(cost.scored for cost in result.probe_costs.values())
        lines.append(
            f"Selectors looked at other layouts too ({each}); {fresh} scores were made for them."
        )
    return lines


def layers_text(layout: Layout) -> str:
    """The attention layers as one types them, ``4,10,16,22``."""
    return ",".join(map(str, layout.attention_layers)) or "none"


def _best_table(result: StudyResult, *, top: int) -> Table:
    table = _table("Best layouts")
    shown = result.ranking[:top]
    table.add_column("#", justify="right")
    _add_layout_columns(table, result, [trial.layout for trial in shown])
    table.add_column("proposed by")
    for rank, trial in enumerate(shown, start=1):
        by = ", ".join(dict.fromkeys([trial.proposed_by, *result.labels(trial.layout)]))
        table.add_row(str(rank), *_layout_cells(result, trial, shown), by)
    if len(result.ranking) > top:
        table.caption = f"and {len(result.ranking) - top:,} more"
    return table


def _baseline_table(result: StudyResult) -> Table:
    table = _table("Baselines: what simple rules choose")
    trials = [result.by_layout[layout] for layout in result.baselines.values()]
    table.add_column("baseline")
    _add_layout_columns(table, result, [trial.layout for trial in trials])
    table.add_column("rank", justify="right")
    table.add_column("looked at", justify="right")
    rank = {trial.layout: place for place, trial in enumerate(result.ranking, start=1)}
    for label, trial in zip(result.baselines, trials, strict=True):
        cost = result.probe_costs.get(label)
        looked = f"{cost.asked}" if cost else ""
        cells = _layout_cells(result, trial, trials)
        table.add_row(label, *cells, str(rank[trial.layout]), looked)
    return table


def _add_layout_columns(table: Table, result: StudyResult, layouts: Sequence[Layout]) -> None:
    table.add_column("layout", no_wrap=True)
    if _has_room(layouts):
        table.add_column("keeps", no_wrap=True)
    if len(result.weights) > 1:
        for name in result.weights:
            table.add_column(name, justify="right")
    table.add_column(_value_name(result), justify="right")
    table.add_column("behind the best", no_wrap=True)


def _layout_cells(result: StudyResult, trial: Trial, beside: Sequence[Trial]) -> list[str | Text]:
    cells: list[str | Text] = [_strip(trial.layout, result.space)]
    if _has_room([other.layout for other in beside]):
        cells.append(layers_text(trial.layout))
    if len(result.weights) > 1:
        cells += [f"{trial.score.mean(name):.4f}" for name in result.weights]
    cells.append(f"{trial.value:.4f}")
    if trial.layout == result.best.layout:
        cells.append("the best")
    else:
        versus = result.versus_best(trial)
        cells.append(f"{_difference(versus)}{' ' + TIED_MARK if versus.tied else ''}")
    return cells


def _worth_table(result: StudyResult) -> Table:
    worth, name = result.worth, _value_name(result)
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


def _print_verdict(result: StudyResult, console: Console) -> None:
    best = result.best
    _say(
        console,
        f"Best: attention in layers [bold]{layers_text(best.layout)}[/bold], "
        f"{_value_name(result)} {best.value:.4f}.",
    )
    if not result.ties:
        _say(console, "No other layout that was scored is tied with it.")
        return
    named = " | ".join(layers_text(trial.layout) for trial in result.ties[:MOST_TIES])
    more = len(result.ties) - MOST_TIES
    rest = f" and {more} more" if more > 0 else ""
    many = "layout is" if len(result.ties) == 1 else "layouts are"
    _say(console, f"{len(result.ties)} other {many} tied with it within noise: {named}{rest}.")


def _reading(result: StudyResult) -> str:
    notes = "; ".join(
        f"{name}: {OBJECTIVE_NOTES[name]}" for name in result.weights if name in OBJECTIVE_NOTES
    )
    formula = ""
    if len(result.weights) > 1:
        formula = "value = " + " + ".join(f"{w:g} {name}" for name, w in result.weights.items())
        formula += ". "
    return (
        f"Lower is better. {formula}{notes}. Behind the best: mean difference over the same blocks "
        f"of text ± its standard error; {TIED_MARK} marks a tie, at most two standard errors."
    )


def _fit_reading(r_squared: float) -> str:
    return (
        "Keeping it lowers ... by: against keeping an average layer, from an additive fit to all "
        f"scored layouts (adjusted R² {r_squared:.2f}; 1 would mean that layers do not interact)."
    )


def _value_name(result: StudyResult) -> str:
    return next(iter(result.weights)) if len(result.weights) == 1 else "value"


def _difference(versus: Comparison) -> str:
    error = f"{versus.standard_error:.4f}" if math.isfinite(versus.standard_error) else "?"
    return f"{versus.difference:+.4f} ± {error}"


def _strip(layout: Layout, space: SearchSpace) -> Text:
    narrow = all(len(symbol) == 1 for symbol in space.symbols.values())
    gap = "" if narrow and space.num_layers > SPACED_UP_TO else " "
    text = Text()
    for layer, name in enumerate(layout.candidates):
        style = "bold green" if name == ATTENTION else "dim"
        text.append(f"{gap if layer else ''}{space.symbols[name]}", style=style)
    return text


def _has_room(layouts: Sequence[Layout]) -> bool:
    return max(len(layers_text(layout)) for layout in layouts) <= 20


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
    )


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False)
