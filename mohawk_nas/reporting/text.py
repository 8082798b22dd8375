"""What the reports say in words, the same on the terminal and in report.html."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mohawk_nas.layout import Layout
from mohawk_nas.search.result import Comparison, StudyResult

OBJECTIVE_NOTES: Mapping[str, str] = {
    "kl": "KL divergence from the teacher, nats a token",
    "recall": "share of the teacher's key-value recall that is lost",
    "stage2_cascade": "relative distance of the replaced mixers' outputs in the assembled student",
    "stage2_local": "relative distance of the replaced mixers' outputs on the teacher's inputs",
}
"""What the figures of an objective are."""

TIED_MARK = "≈"
MOST_TIES = 6
"""Tied layouts named one by one."""


def counts(result: StudyResult) -> list[str]:
    """How much was scored, and of how much."""
    fits = f"that {result.budget.text}"
    scored, possible = len(result.trials), result.num_possible
    if result.solved:
        lines = [
            f"Solved exactly, since stage2_local is a sum over layers; {scored} of {possible:,} "
            f"layouts {fits} were scored."
        ]
    elif result.exhaustive:
        lines = [f"Exhaustive: all {possible:,} layouts {fits} were scored."]
    else:
        lines = [f"{scored:,} distinct layouts of the {possible:,} {fits} were scored."]
    if result.probe_costs:
        each = ", ".join(f"{name} {cost.asked}" for name, cost in result.probe_costs.items())
        fresh = sum(cost.scored for cost in result.probe_costs.values())
        lines.append(f"Probes of other layouts: {each}; {fresh} of these were not yet known.")
    return lines


def verdict(result: StudyResult) -> list[str]:
    """The best layout and those that cannot be told from it."""
    best, ties = result.best, result.ties
    lines = [
        f"Best: attention in layers {layers(best.layout)}, {value_name(result)} {best.value:.4f}."
    ]
    if not ties:
        return [*lines, "No other layout that was scored is tied with it."]
    named = " | ".join(layers(trial.layout) for trial in ties[:MOST_TIES])
    rest = f" and {len(ties) - MOST_TIES} more" if len(ties) > MOST_TIES else ""
    subject = "1 other layout is" if len(ties) == 1 else f"{len(ties)} other layouts are"
    return [*lines, f"{subject} tied with it within noise: {named}{rest}."]


def reading(result: StudyResult) -> str:
    """How to read the figures of a layout."""
    parts = ["Lower is better."]
    if len(result.weights) > 1:
        terms = " + ".join(f"{weight:g} {name}" for name, weight in result.weights.items())
        parts.append(f"value = {terms}.")
    parts += [f"{name}: {OBJECTIVE_NOTES[name]}." for name in result.weights]
    parts.append(
        "Behind the best: mean difference over the same blocks of text ± its standard error; "
        f"{TIED_MARK} marks a tie, at most two standard errors."
    )
    return " ".join(parts)


def fit_reading(r_squared: float) -> str:
    """How to read the additive fit."""
    return (
        "What keeping a layer brings is told against keeping an average layer, by an additive fit "
        f"to all scored layouts: adjusted R² {r_squared:.2f}, where 1 would mean that layers do "
        "not interact."
    )


def value_name(result: StudyResult) -> str:
    """The objective's name, or "value" where it is a sum of several."""
    return next(iter(result.weights)) if len(result.weights) == 1 else "value"


def difference(versus: Comparison) -> str:
    """A paired difference with its standard error."""
    error = f"{versus.standard_error:.4f}" if math.isfinite(versus.standard_error) else "?"
    return f"{versus.difference:+.4f} ± {error}"


def layers(layout: Layout) -> str:
    """The attention layers as one types them, ``4,10,16,22``."""
    return ",".join(map(str, layout.attention_layers)) or "none"


def proposers(result: StudyResult, layout: Layout) -> str:
    """Who proposed a trial's layout, and every baseline that names it too."""
    first = result.by_layout[layout].proposed_by
    return ", ".join(dict.fromkeys([first, *result.labels(layout)]))
