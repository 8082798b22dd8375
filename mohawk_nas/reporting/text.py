"""What the reports say in words, the same on the terminal and in report.html."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING

from mohawk_nas.layout import Layout
from mohawk_nas.search.result import Placement, StudyResult
from mohawk_nas.search.scoring import Comparison
from mohawk_nas.search.statistics import Interval

if TYPE_CHECKING:
    from mohawk_nas.audit import AuditReport, Trust
    from mohawk_nas.config import StudyConfig
    from mohawk_nas.search.statistics import Regret

OBJECTIVE_NOTES: Mapping[str, str] = {
    "kl": "KL divergence from the teacher, nats a token",
    "recall": "share of the teacher's key-value recall that is lost",
    "stage2_cascade": "relative distance of the replaced mixers' outputs in the assembled student",
    "stage2_local": "relative distance of the replaced mixers' outputs on the teacher's inputs",
}
"""What the figures of an objective are."""

COST_NOTES: Mapping[str, str] = {
    "attention_layers": "layers that keep attention; for search.pareto",
    "cache": "bytes that a sequence of one block leaves in caches and states; for search.pareto",
}
"""What the other figures are that ``search.pareto`` may name."""

RUNGS_TITLE = (
    "Rungs: the best, and the best of each baseline, are distilled; the best of these longer"
)

TIED_MARK = "≈"
MOST_TIES = 6
"""Tied layouts named one by one."""
SPOILT = 1.2
"""Times their undistilled KL, on other text, from which on distilling has done layouts harm."""


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
    for name, learning in result.learnt.items():
        lines.append(f"Learning: {name} {learning.tokens:,} tokens in {learning.seconds:,.0f} s.")
    return lines


def rung_counts(result: StudyResult) -> str:
    """Who climbed how far, and what it took."""
    steps = [
        f"{len(rung.climbers):,} to {rung.tokens:,} tokens of stage 3"
        + ("" if rung.complete else f" ({len(rung.scores):,} of these are distilled so far)")
        for rung in result.rungs
    ]
    # Only the last rung has any.
    for standing in (standing for rung in result.rungs for standing in rung.run_off):
        steps.append(f"{len(standing)} tied ones with another seed")
    if any(rung.run_off and rung.left for rung in result.rungs):
        steps[-1] += " (not done yet)"
    climbed = ", then ".join(steps)
    scores = [score for rung in result.rungs for score in rung.scores.values()]
    tokens, seconds = sum(s.tokens for s in scores), math.fsum(s.seconds for s in scores)
    return (
        f"Climbed, of {len(result.trials):,} layouts: {climbed}; {tokens:,} tokens and "
        f"{seconds:,.0f} s in all. KL is that of distilled students on the validation split."
    )


def rung_table(result: StudyResult) -> tuple[list[str], dict[Layout, list[str]]]:
    """Columns of figures, and those of each distilled layout; who came furthest and best first."""
    recall = any("recall" in s.per_block for rung in result.rungs for s in rung.scores.values())
    columns = [f"{value_name(result)} undistilled\n(search text)"]
    columns += [f"KL at {rung.tokens:,}\n(validation text)" for rung in result.rungs]
    run_off = any(rung.run_off for rung in result.rungs)
    columns += [*(["recall lost"] if recall else []), *(["seeds"] if run_off else [])]
    columns += ["tokens", "seconds"]
    rows: dict[Layout, list[str]] = {}
    for layout in dict.fromkeys(x for rung in reversed(result.rungs) for x in rung.ranking):
        found = [rung.scores.get(layout) for rung in result.rungs]
        scores = [score for score in found if score]
        rows[layout] = [
            f"{result.by_layout[layout].value:.4f}",
            *(f"{score.mean('kl'):.4f}" if score else "-" for score in found),
            *([f"{scores[-1].mean('recall'):.4f}"] if recall else []),
            *([str(max(rung.num_seeds(layout) for rung in result.rungs))] if run_off else []),
            f"{sum(score.tokens for score in scores):,}",
            f"{math.fsum(score.seconds for score in scores):,.1f}",
        ]
    return columns, rows


def verdict(result: StudyResult) -> list[str]:
    """The best layout and those that cannot be told from it."""
    best, ties = result.best, result.ties
    figure = f"{value_name(result)} {best.value:.4f}"
    if top := result.top_rung:
        name = next(iter(top.weights)) if len(top.weights) == 1 else "value"
        count = top.num_seeds(best.layout)
        seeds = f"mean of {count} seeds; " if count > 1 else ""
        figure = (
            f"{name} {top.value(best.layout):.4f} after {top.tokens:,} tokens of stage 3 "
            f"({seeds}{figure} undistilled)"
        )
    lines = [f"Best: attention in layers {named(result, best.layout)}, {figure}."]
    worse = [*_overtaken(result), *_spoilt(result)]
    if not ties:
        how = "distilled as long" if result.top_rung else "scored"
        return [*lines, f"No other layout that was {how} is tied with it.", *worse]
    listed = " | ".join(named(result, trial.layout) for trial in ties[:MOST_TIES])
    rest = f" and {len(ties) - MOST_TIES} more" if len(ties) > MOST_TIES else ""
    subject = "1 other layout is" if len(ties) == 1 else f"{len(ties)} other layouts are"
    return [*lines, f"{subject} tied with it within noise: {listed}{rest}.", *worse]


def _overtaken(result: StudyResult) -> list[str]:
    """That layouts with fewer seeds come to less than the best one, if so."""
    top = result.top_rung
    if not (top and top.overtaken):
        return []
    listed = " | ".join(named(result, layout) for layout in top.overtaken)
    return [
        f"By the fewer seeds of stage 3 that these had, they come to less: {listed}. They may have "
        "been lucky, or let go too early, which an audit can tell."
    ]


def _spoilt(result: StudyResult) -> list[str]:
    """That the distillations which the choice goes by have made layouts worse, if so."""
    if not (top := result.top_rung):
        return []
    undistilled = [result.by_layout[layout].score for layout in top.climbers]
    distilled = [top.scores[layout] for layout in top.climbers]
    if not all("kl" in score.per_block for score in (*undistilled, *distilled)):
        return []
    pairs = zip(distilled, undistilled, strict=True)
    times = median(one.mean("kl") / (two.mean("kl") or math.inf) for one, two in pairs)
    if times <= SPOILT:
        return []
    return [
        f"The {top.tokens:,} tokens of stage 3 made layouts worse: KL is {times:.1f} times what it "
        "was undistilled (median; on other text). Give the rungs a lower lr or more tokens."
    ]


def left_out(result: StudyResult, config: StudyConfig) -> list[str]:
    """That what the study names is not part of its result, if so."""
    wanted, found = config.search, result.weights
    where = ["objective"] if "recall" in wanted.objective and "recall" not in found else []
    where += ["Pareto set"] if "recall" in wanted.pareto and "recall" not in result.pareto else []
    if not where:
        return []
    return [f"recall is left out of the {' and the '.join(where)}: the teacher solves no probe."]


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
    if result.top_rung:
        parts.append("All undistilled; the best is that of the highest rung.")
    return " ".join(parts)


def pareto_reading(result: StudyResult) -> str:
    """What the Pareto set is, and how much of what was found it covers."""
    notes = {**OBJECTIVE_NOTES, **COST_NOTES}
    parts = [
        f"{len(result.pareto_set)} of {len(result.trials):,} scored layouts: no other is at least "
        "as good in all of these figures and better in one; members may be tied within noise."
    ]
    # The others are explained where the layouts are ranked.
    new = (name for name in result.pareto if name not in result.weights)
    parts += [f"{name}: {notes[name].partition(';')[0]}." for name in new]
    covered = result.anytime_hypervolume[-1]
    parts.append(f"The set covers {covered:.0%} of the range between best and worst figures.")
    return " ".join(parts)


def figure(name: str, value: float) -> str:
    """A figure as a table shows it."""
    if name == "attention_layers":
        return f"{value:.0f}"
    if name == "cache":
        return f"{value / 2**20:,.2f} MiB" if value >= 2**20 else f"{value / 2**10:,.2f} KiB"
    return f"{value:.4f}"


def placed_in_set(placement: Placement, result: StudyResult) -> str:
    """How a layout stands to the Pareto set."""
    names = ", ".join(result.pareto)
    if placement.beaten_by:
        symbols, some = result.space.symbols, placement.beaten_by[:MOST_TIES]
        named = " | ".join(trial.layout.strip(symbols) for trial in some)
        more = len(placement.beaten_by) - MOST_TIES
        return f"Pareto set of {names}: beaten by {named}{f' and {more} more' if more > 0 else ''}"
    return f"Pareto set of {names}: no layout of it is better, so this one belongs to it"


def fit_reading(result: StudyResult) -> str:
    """How to read the additive fit; only where there is one."""
    # Where all layouts keep as many layers, what attention as such is worth cannot be told.
    fixed = len({len(trial.layout.attention_layers) for trial in result.trials}) == 1
    against = "keeping an average layer" if fixed else "replacing it"
    return (
        f"What keeping a layer brings is told against {against}, by an additive fit to all scored "
        f"layouts: adjusted R² {result.worth.r_squared:.2f}, where 1 would mean that layers do not "
        "interact."
    )


def audit_verdict(report: AuditReport) -> list[str]:
    """What an audit rests on, and where the study's best stands among the distilled."""
    lines = [
        f"{report.layouts} layouts were distilled on {report.tokens:,} tokens each, with "
        f"{report.seeds} seed{'' if report.seeds == 1 else 's'}, and measured on the test split.",
        f"Best when distilled: attention in layers {layers(report.best)}.",
    ]
    if report.tied:
        named = " | ".join(layers(layout) for layout in report.tied[:MOST_TIES])
        more = len(report.tied) - MOST_TIES
        rest = f" and {more} more" if more > 0 else ""
        lines.append(f"Tied with it within noise: {named}{rest}.")
    among = report.searched == report.best or report.searched in report.tied
    where = "among them" if among else "not among them"
    return [*lines, f"The study's own best, {layers(report.searched)}, is {where}."]


RIVAL_COLUMNS = ("baseline", "keeps", "figure", "loses [95 %]")


def rival_rows(report: AuditReport) -> list[tuple[str, ...]]:
    """What baselines lose beyond the study's best when distilled, a row a figure."""
    return [
        (
            "" if place else ", ".join(rival.labels),
            "" if place else layers(rival.layout),
            figure,
            f"{lost.value:+.4f} [{lost.low:+.4f}, {lost.high:+.4f}]",
        )
        for rival in report.rivals
        for place, (figure, lost) in enumerate(rival.loses.items())
    ]


def rivals_reading(report: AuditReport) -> str:
    """Whether a baseline beats the study's best beyond noise, in words."""
    better = {
        name: [", ".join(rival.labels) for rival in report.rivals if rival.loses[name].high < 0]
        for name in report.rivals[0].loses
    }
    said = [f"{' and '.join(labels)} by {name}" for name, labels in better.items() if labels]
    over = "text, questions and seeds" if report.repeated else "text and questions, not seeds"
    rest = f" Not distilled as often: {', '.join(report.not_held)}." if report.not_held else ""
    return (
        "What a baseline's layout loses beyond the study's best when distilled (kl in nats a "
        "token, recall as a share of right answers), below 0 where it is better; the intervals "
        f"hold for all of them together, over {over}. Better beyond them: "
        f"{'; '.join(said) or 'none'}.{rest}"
    )


def trust_lines(trust: Trust, report: AuditReport) -> list[str]:
    """How well the score foretells a distilled figure, in words.

    Args:
        trust: What was found.
        report: Which this belongs to.
    """
    tau = trust.kendall
    if trust.spearman is None or tau is None:
        return [f"All layouts have the same distilled {trust.figure}, so nothing foretells it."]
    pairs = " to ".join(f"{(1 + end) / 2:.0%}" for end in (tau.low, tau.high))
    lines = [
        f"Spearman's correlation {trust.spearman}: of two layouts, the one with the better score "
        f"distils better in {(1 + tau.value) / 2:.0%} of all pairs ({pairs}), where guessing gives "
        "50%. The ranges are intervals of 95%."
    ]
    if trust.best_quarter is not None:
        lines.append(f"Within the quarter that distils best: {trust.best_quarter}.")
    if trust.reliability is None or trust.ceiling is None:
        lines.append(
            "With one seed, or several of a few layouts, nothing says how much of this is chance; "
            "give more --seeds."
        )
    else:
        some = report.repeated < report.layouts
        by = f" (by {report.repeated} layouts with several seeds)" if some else ""
        lines.append(
            f"Reliability {trust.reliability:.2f}{by}: so much of what single distillations differ "
            "by is the layouts' doing, the rest is the seed's. A perfect score's correlation would "
            f"be {trust.ceiling:.2f}."
        )
    if trust.regret is None:
        lines.append(
            "Regret cannot be told: the study's best was not distilled, or no layout is better "
            "than the mean beyond noise."
        )
    else:
        lines.append(
            f"Regret {regret_total(trust.regret)} of ({mean_of_all(report)} - best): "
            f"{trust.regret.objective:.1%} is the score's, by how its best layout distils, and "
            f"{trust.regret.strategy:.1%} the search's, by how the study's best differs from that."
        )
    return lines


def flips(tau: Interval) -> str:
    """Pairs of layouts that change their order when they are distilled, by Kendall's tau."""
    return f"{(1 - tau.value) / 2:.0%} [{(1 - tau.high) / 2:.0%}, {(1 - tau.low) / 2:.0%}]"


def mean_of_all(report: AuditReport) -> str:
    """What stands for all layouts on the budget."""
    if report.drawn:
        return f"mean of {report.drawn} layouts drawn at random"
    return "mean of the distilled"


def regret_total(regret: Regret) -> str:
    """A total regret, with its interval if it is known."""
    within = "" if regret.within is None else " [{:.1%}, {:.1%}]".format(*regret.within)
    return f"{regret.total:.1%}{within}"


def value_name(result: StudyResult) -> str:
    """The objective's name, or "value" where it is a sum of several."""
    return next(iter(result.weights)) if len(result.weights) == 1 else "value"


def difference(versus: Comparison) -> str:
    """A paired difference with its standard error."""
    largest = max(abs(versus.difference), versus.standard_error)
    digits = ".1e" if 0 < largest < 0.001 else ".4f"
    error = f"{versus.standard_error:{digits}}" if math.isfinite(versus.standard_error) else "?"
    return f"{versus.difference:+{digits}} ± {error}"


def layers(layout: Layout) -> str:
    """The attention layers as one types them, ``4,10,16,22``."""
    return ",".join(map(str, layout.attention_layers)) or "none"


def named(result: StudyResult, layout: Layout) -> str:
    """The attention layers, and the strip where that does not say what the others hold."""
    if len(result.space.replacements) == 1:
        return layers(layout)
    return f"{layers(layout)} ({layout.strip(result.space.symbols)})"


def proposers(result: StudyResult, layout: Layout) -> str:
    """Who proposed a trial's layout, and every baseline that names it too."""
    first = result.by_layout[layout].proposed_by
    return ", ".join(dict.fromkeys([first, *result.labels(layout)]))
