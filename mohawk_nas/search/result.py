"""What a study found, and how far it can be told from noise.

The best layout was chosen on the blocks that it is compared on, so its lead is flattered a little;
the set of tied layouts is the honest answer of a search.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.pareto import dominates, hypervolumes, pareto_ranks
from mohawk_nas.search.rungs import Rung
from mohawk_nas.search.scoring import Comparison, Score, compare
from mohawk_nas.search.space import SearchSpace

__all__ = [
    "LayerWorth",
    "LearningCost",
    "Placement",
    "Probe",
    "ProbeCost",
    "StudyResult",
    "Trial",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A distinct layout on the budget that has been scored."""

    number: int
    """Place in the order in which they were begun, counted from 0."""
    layout: Layout
    score: Score
    value: float
    """Weighted sum of the objectives; lower is better."""
    proposed_by: str
    provenance: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A layout that a selector had to look at, on or off the budget."""

    layout: Layout
    score: Score
    charged_to: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeCost:
    """What a selector's probes cost."""

    asked: int
    """Distinct layouts that the selector looked at: its cost if it were alone in the study."""
    scored: int
    """Those that nobody had scored before it."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningCost:
    """What a selector that learns cost, over all its restarts."""

    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWorth:
    """What it is worth to keep attention in a layer, by up to three views; pinned layers have none.

    None where too little was scored.
    """

    fitted: Mapping[int, float] | None
    """How much lower the value is if this layer keeps attention, by an additive least-squares fit
    to the trials. With the number of attention layers fixed only differences can be told, so these
    are against an average layer and sum to 0."""
    r_squared: float | None
    """Of that fit, adjusted for its parameters: low means that layers interact."""
    swap_one: Mapping[int, float] | None
    """Value with only this layer replaced: high means it is needed."""
    add_one_in: Mapping[int, float] | None
    """Value with only this layer kept: low means it helps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where a layout stands among a study's trials."""

    rank: int
    """1 is the best."""
    num_trials: int
    versus_best: Comparison
    trial: Trial | None
    """The trial that scored this layout, if one did."""
    beaten_by: tuple[Trial, ...] = ()
    """Of the Pareto set: those at least as good in every figure and better in one."""


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """Everything a study knows once it has ended, or been interrupted."""

    name: str
    space: SearchSpace
    budget: Budget
    weights: Mapping[str, float]
    """Objective -> weight."""
    trials: tuple[Trial, ...]
    """In the order of scoring."""
    probes: tuple[Probe, ...]
    baselines: Mapping[str, Layout]
    """Label -> the layout of that name."""
    asked: Mapping[str, int]
    """Selector -> distinct layouts it looked at by probes."""
    solved: bool
    """Whether the best layout follows from the single layers' losses and needed no search."""
    rungs: tuple[Rung, ...] = ()
    """Who was distilled, the lowest rung first; the last one may be incomplete."""
    learnt: Mapping[str, LearningCost] = field(default_factory=dict)
    """Selector -> what its learning cost, for those that learnt."""
    pareto: tuple[str, ...] = ()
    """Figures whose Pareto set is a result too; empty if there is one objective."""

    @cached_property
    def ranking(self) -> tuple[Trial, ...]:
        """Trials from best to worst; of two equal ones the earlier is first."""
        return tuple(sorted(self.trials, key=lambda trial: (trial.value, trial.number)))

    @property
    def best(self) -> Trial:
        """The trial with the lowest value; if layouts were distilled, at the highest rung."""
        return self.by_layout[self.top_rung.ranking[0]] if self.top_rung else self.ranking[0]

    @cached_property
    def top_rung(self) -> Rung | None:
        """The highest rung at which all who climbed to it are scored."""
        return next((rung for rung in reversed(self.rungs) if rung.complete), None)

    @cached_property
    def num_possible(self) -> int:
        """Layouts of the space that meet the budget."""
        return self.budget.count(self.space)

    @property
    def exhaustive(self) -> bool:
        """Whether every layout that meets the budget was scored."""
        return len(self.trials) == self.num_possible

    @cached_property
    def by_layout(self) -> dict[Layout, Trial]:
        """The trial of each layout."""
        return {trial.layout: trial for trial in self.trials}

    @cached_property
    def ties(self) -> tuple[Trial, ...]:
        """Trials that cannot be told from the best within noise, the best itself left out.

        If layouts were distilled, those of the highest rung.
        """
        if top := self.top_rung:
            best = top.scores[self.best.layout]
            others = [layout for layout in top.ranking if layout != self.best.layout]
            return tuple(
                self.by_layout[layout]
                for layout in others
                if compare(top.scores[layout], best, top.weights).tied
            )
        return tuple(t for t in self.ranking[1:] if self.versus_best(t).tied)

    @cached_property
    def pareto_set(self) -> tuple[Trial, ...]:
        """Trials that no other dominates in the figures of ``pareto``, by the first of these.

        A trial dominates another if its figures, means over the blocks, are all at least as good
        and one is better; whether by more than noise is not asked, so members may be tied. Two with
        equal figures are both in, one with a figure that is not finite never is.
        """
        rows = [(trial, self.figures(trial.score)) for trial in self.trials] if self.pareto else []
        finite = [(trial, row) for trial, row in rows if all(map(math.isfinite, row))]
        ranks = pareto_ranks([row for _, row in finite])
        members = [pair for pair, rank in zip(finite, ranks, strict=True) if rank == 0]
        return tuple(t for t, _ in sorted(members, key=lambda pair: (pair[1], pair[0].number)))

    @cached_property
    def probe_costs(self) -> dict[str, ProbeCost]:
        """Selector -> what its probes cost, for selectors that made any."""
        costs = {}
        for name, asked in self.asked.items():
            own = [probe for probe in self.probes if probe.charged_to == name]
            seconds = math.fsum(probe.score.seconds for probe in own)
            costs[name] = ProbeCost(asked=asked, scored=len(own), seconds=seconds)
        return costs

    @cached_property
    def worth(self) -> LayerWorth:
        """What each layer is worth."""
        fitted = _fit(self.space, self.trials)
        singles = _singles(self.space, self.weights, [*self.trials, *self.probes])
        return LayerWorth(
            fitted=fitted[0] if fitted else None,
            r_squared=fitted[1] if fitted else None,
            swap_one=singles[0],
            add_one_in=singles[1],
        )

    def labels(self, layout: Layout) -> tuple[str, ...]:
        """Baselines that name this layout."""
        return tuple(label for label, named in self.baselines.items() if named == layout)

    def versus_best(self, trial: Trial) -> Comparison:
        """A trial against the best one, both undistilled."""
        return compare(trial.score, self.best.score, self.weights)

    def figures(self, score: Score) -> tuple[float, ...]:
        """A score's figures that ``pareto`` names, in its order."""
        return tuple(score.mean(name) for name in self.pareto)

    @cached_property
    def anytime_hypervolume(self) -> list[float]:
        """The share of the range of figures that 1, 2, ... distinct layouts cover, see
        :func:`mohawk_nas.search.pareto.hypervolumes`."""
        return hypervolumes([self.figures(trial.score) for trial in self.trials])

    def anytime(self) -> list[float]:
        """The lowest value after 1, 2, ... distinct layouts, in the order of scoring."""
        values: list[float] = []
        for trial in self.trials:
            values.append(min(trial.value, values[-1]) if values else trial.value)
        return values

    def place(self, layout: Layout, score: Score) -> Placement:
        """Where any layout's score stands among the trials."""
        value = score.value(self.weights)
        others = [trial for trial in self.trials if trial.layout != layout]
        return Placement(
            rank=1 + sum(trial.value < value for trial in others),
            num_trials=len(others) + 1,
            versus_best=compare(score, self.best.score, self.weights),
            trial=self.by_layout.get(layout),
            beaten_by=tuple(
                trial
                for trial in self.pareto_set
                if dominates(self.figures(trial.score), self.figures(score))
            ),
        )


def _fit(space: SearchSpace, trials: tuple[Trial, ...]) -> tuple[dict[int, float], float] | None:
    free = space.free_layers
    usable = [trial for trial in trials if math.isfinite(trial.value)]
    # As many parameters as free layers: their effects, which sum to 0, and a constant.
    spare = len(usable) - len(free)
    if not free or spare < 3:
        return None
    kept = np.array([[t.layout[layer] == ATTENTION for layer in free] for t in usable], dtype=float)
    values = np.array([trial.value for trial in usable])
    kept, values = kept - kept.mean(axis=0), values - values.mean()
    # Where every layout keeps as many layers, the centred columns sum to 0; the smallest solution
    # is then the one whose effects sum to 0 as well.
    effects, _, rank, _ = np.linalg.lstsq(kept, values, rcond=None)
    total = float(values @ values)
    if rank < len(free) - 1 or total == 0:
        return None
    residual = values - kept @ effects
    r_squared = 1 - float(residual @ residual) / spare / (total / (len(usable) - 1))
    return dict(zip(free, (-float(e) for e in effects), strict=True)), r_squared


def _singles(
    space: SearchSpace, weights: Mapping[str, float], scored: list[Trial | Probe]
) -> tuple[dict[int, float] | None, dict[int, float] | None]:
    # Layouts in which one free layer differs from all others, whoever had them scored. With several
    # candidates a layer may have several such layouts; the best of them stands for it.
    replaced: dict[int, float] = {}
    added: dict[int, float] = {}
    for item in scored:
        kept = [layer for layer in space.free_layers if item.layout[layer] == ATTENTION]
        value = item.score.value(weights)
        if len(kept) == len(space.free_layers) - 1:
            (layer,) = set(space.free_layers) - set(kept)
            replaced[layer] = min(value, replaced.get(layer, math.inf))
        if len(kept) == 1:
            added[kept[0]] = min(value, added.get(kept[0], math.inf))

    def complete(found: dict[int, float]) -> dict[int, float] | None:
        return (
            dict(sorted(found.items())) if found and len(found) == len(space.free_layers) else None
        )

    return complete(replaced), complete(added)
