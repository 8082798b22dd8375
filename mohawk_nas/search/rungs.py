"""Rungs: layouts that scored well are distilled for a while and scored again, fewer at each rung.

Rung 0 is the study itself: undistilled students on the search split. Each rung above it is a budget
of stage-3 tokens; a pruner decides by the figures of the rung below who climbs to it. Of each
baseline the best layout climbs to the first rung in any case: rankings name layouts that distil
better than they score (studies/ground_truth). Every rung starts again from the bank, and its
students are measured on the validation split.

The last rung chooses, and one distillation of good layouts differs from the next by as much as they
do: those that it leaves tied with the best are distilled once more with another seed, as long as
some are and there are seeds. A layout's figures are then means over its seeds.

Who climbs is a function of the scores, so it is kept nowhere: whoever has the scores finds the same
layouts again, after a kill or beside other workers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from scipy import stats

from mohawk_nas.config import LogitsConfig, read_options, recipe_of
from mohawk_nas.errors import ConfigError, did_you_mean
from mohawk_nas.layout import Layout
from mohawk_nas.recall import notation_of
from mohawk_nas.search.scoring import Score, compare
from mohawk_nas.search.statistics import Values

__all__ = [
    "PRUNERS",
    "Distiller",
    "Halving",
    "Pruner",
    "Rung",
    "Wilcoxon",
    "build_pruner",
    "climb",
    "most_in_run_off",
    "rung_recipe",
    "rung_weights",
]


class Distiller(Protocol):
    """Distils layouts and scores them; the same numbers whenever it is asked, in any company."""

    @property
    def at_once(self) -> int:
        """Layouts that are best distilled side by side here."""

    def __call__(self, layouts: Sequence[Layout], tokens: int, seed: int) -> list[Score]:
        """Scores of some layouts, each distilled from the bank on so many tokens.

        ``seed`` counts the seeds of stage 3 from 0; which ones they are is the distiller's affair.
        A score holds ``kl`` of each block of the validation split, ``recall`` (the lost share of
        the teacher's) if the teacher solves that split's probe, the tokens trained on, and the
        seconds it took.
        """


class Pruner(ABC):
    """Decides who climbs to the next rung; its fields are the options a study may give it."""

    @abstractmethod
    def climbers(self, blocks: Sequence[Sequence[float]]) -> list[int]:
        """Places of those that climb, the best among them.

        Args:
            blocks: One row a layout, best first: its figure in each block of text, lower is better.
        """

    @abstractmethod
    def limit(self, count: int) -> int:
        """How many of so many layouts climb at most."""


@dataclass(frozen=True, kw_only=True)
class Halving(Pruner):
    """Successive halving (Jamieson and Talwalkar 2016): the best part climbs, two at least."""

    factor: int = 4
    """One in so many climbs."""
    most: int | None = None
    """So many climb at most; None as many as ``factor`` allows."""

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise ValueError(f"`factor >= 2` must hold, but got {self.factor}")
        if self.most is not None and self.most < 1:
            raise ValueError(f"`most >= 1` must hold, but got {self.most}")

    def climbers(self, blocks: Sequence[Sequence[float]]) -> list[int]:
        return list(range(self.limit(len(blocks))))

    def limit(self, count: int) -> int:
        part = min(count, max(2, count // self.factor))
        return part if self.most is None else min(part, self.most)


@dataclass(frozen=True, kw_only=True)
class Wilcoxon(Pruner):
    """Those climb that a paired test over blocks cannot tell from the best.

    Wilcoxon's signed-rank test, one-sided: is this layout worse than the best one?
    """

    p: float = 0.1
    """Below this probability a layout counts as worse."""
    most: int = 16
    """However many cannot be told from the best, the first so many climb."""

    def __post_init__(self) -> None:
        if not 0 < self.p < 1:
            raise ValueError(f"`0 < p < 1` must hold, but got {self.p}")
        if self.most < 1:
            raise ValueError(f"`most >= 1` must hold, but got {self.most}")

    def climbers(self, blocks: Sequence[Sequence[float]]) -> list[int]:
        best = np.array(blocks[0])
        chosen = [0]
        for place in range(1, len(blocks)):
            if len(chosen) == self.most:
                break
            if not self._is_worse(np.array(blocks[place]), best):
                chosen.append(place)
        return chosen

    def limit(self, count: int) -> int:
        return min(count, self.most)

    def _is_worse(self, blocks: Values, best: Values) -> bool:
        if not np.isfinite(blocks).all():
            return True
        differences = blocks - best
        # Nothing is left to rank where all are equal.
        if not differences.any():
            return False
        return bool(stats.wilcoxon(differences, alternative="greater").pvalue < self.p)


PRUNERS: Mapping[str, type[Pruner]] = {"halving": Halving, "wilcoxon": Wilcoxon}


def build_pruner(choice: Any, *, where: str = "search.rungs.pruner") -> Pruner:
    """The pruner that a name or ``{"name": NAME, option: value}`` describes.

    Options without a name are those of ``halving``.

    Raises:
        ConfigError: There is no such pruner, or every unknown option and impossible value.
    """
    options = dict(choice) if isinstance(choice, Mapping) else {"name": choice}
    name = options.pop("name", "halving")
    if not isinstance(name, str) or name not in PRUNERS:
        raise ConfigError(
            f"{where}: unknown pruner {name!r}; available: {', '.join(PRUNERS)}."
            f"{did_you_mean(str(name), PRUNERS)}"
        )
    return read_options(PRUNERS[name], options, where=where, owner=name)


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A budget of stage 3, who climbed to it, and how they score there."""

    tokens: int
    """Of stage 3, for each layout."""
    climbers: tuple[Layout, ...]
    """Best first by the figures of the rung below."""
    scores: Mapping[Layout, Score]
    """Of those that have been distilled; means over their seeds."""
    weights: Mapping[str, float]
    """What the layouts are compared by: ``kl``, ``recall`` -> weight."""
    left: tuple[Layout, ...] = ()
    """Those still to be distilled, with seed ``len(run_off)``."""
    run_off: tuple[tuple[Layout, ...], ...] = ()
    """Of each further seed those that the seeds before left tied with the best. Of the last one no
    score counts as long as some are left."""

    @property
    def complete(self) -> bool:
        """Whether all who climbed have been distilled, with one seed at least."""
        return len(self.scores) == len(self.climbers)

    @cached_property
    def ranking(self) -> tuple[Layout, ...]:
        """Layouts with a score, best first; of two equal ones the better of the rung below.

        Those with more seeds are ahead, whatever the others' fewer ones come to: these were told
        from the best, or stood too far behind, before the next seed.
        """
        scored = [layout for layout in self.climbers if layout in self.scores]
        return tuple(sorted(scored, key=lambda x: (-self.num_seeds(x), self.value(x))))

    @property
    def overtaken(self) -> tuple[Layout, ...]:
        """Those whose fewer seeds come to less than the best one's: lucky, or let go too early."""
        best = self.ranking[0]
        fewer = (x for x in self.ranking if self.num_seeds(x) < self.num_seeds(best))
        return tuple(x for x in fewer if self.value(x) < self.value(best))

    def num_seeds(self, layout: Layout) -> int:
        """Distillations behind a layout's score."""
        over = self.run_off[:-1] if self.left else self.run_off
        return 1 + sum(layout in standing for standing in over)

    def value(self, layout: Layout) -> float:
        """A layout's figure at this rung; lower is better."""
        return self.scores[layout].value(self.weights)


def climb(
    ranked: Sequence[tuple[Layout, Score]],
    *,
    weights: Mapping[str, float],
    tokens: Sequence[int],
    pruner: Pruner,
    found: Mapping[tuple[Layout, int, int], Score],
    named: Collection[Layout] = (),
    seeds: int = 1,
) -> tuple[Rung, ...]:
    """Who climbs how far, as far as the scores tell.

    Args:
        ranked: The study's layouts and their undistilled scores, best first.
        weights: The study's objective.
        tokens: Of each rung, the lowest first.
        pruner: Decides.
        found: (layout, tokens, seed) -> score.
        named: Those that climb to the first rung in any case.
        seeds: Of those that the last rung leaves tied, at most.

    Returns:
        The rungs, the lowest first. The last one may be incomplete: nobody climbs beyond it yet.
    """
    rungs: list[Rung] = []
    # With attention everywhere a student has nothing that could be distilled.
    standing = [(layout, score) for layout, score in ranked if layout.replaced_layers]
    for budget in tokens if standing else ():
        chosen = set(pruner.climbers([score.blocks(weights) for _, score in standing]))
        climbers = tuple(
            layout
            for place, (layout, _) in enumerate(standing)
            if place in chosen or (layout in named and not rungs)
        )
        scores = {x: found[x, budget, 0] for x in climbers if (x, budget, 0) in found}
        weights = rung_weights(weights, scores.values())
        left = tuple(x for x in climbers if x not in scores)
        rung = Rung(tokens=budget, climbers=climbers, scores=scores, weights=weights, left=left)
        rungs.append(rung)
        if not rung.complete:
            return tuple(rungs)
        standing = [(layout, scores[layout]) for layout in rung.ranking]
    if rungs:
        rungs[-1] = _run_off(rungs[-1], found, seeds)
    return tuple(rungs)


def _run_off(rung: Rung, found: Mapping[tuple[Layout, int, int], Score], seeds: int) -> Rung:
    """The rung, with what is known of further seeds of those that are tied with the best."""
    scores, standing = dict(rung.scores), list(rung.ranking)
    run_off: list[tuple[Layout, ...]] = []
    left: tuple[Layout, ...] = ()
    for seed in range(1, seeds):
        best = scores[standing[0]]
        tied = [x for x in standing if compare(scores[x], best, rung.weights).tied]
        # However little a short text tells apart, a seed costs at most half of the rung, or two.
        tied = tied[: _most_tied(len(rung.climbers))]
        if len(tied) == 1:
            break
        run_off.append(tuple(tied))
        if left := tuple(x for x in tied if (x, rung.tokens, seed) not in found):
            break
        for layout in tied:
            several = [found[layout, rung.tokens, number] for number in range(seed + 1)]
            scores[layout] = Score.mean_of(several)
        standing = sorted(tied, key=lambda layout: scores[layout].value(rung.weights))
    return replace(rung, scores=scores, run_off=tuple(run_off), left=left)


def _most_tied(climbers: int) -> int:
    return max(2, climbers // 2)


def most_in_run_off(climbers: int, seeds: int) -> int:
    """Distillations with further seeds, at most, after a last rung of so many layouts."""
    return (seeds - 1) * _most_tied(climbers) if climbers > 1 else 0


def rung_weights(weights: Mapping[str, float], scores: Iterable[Score]) -> dict[str, float]:
    """What distilled students are compared by: the objective's parts that are measured there.

    Distances to the teacher's mixers say nothing of students whose other weights have moved as
    well, so an objective of such alone becomes ``kl``.
    """
    measured = {name for score in scores for name in score.per_block}
    return {name: w for name, w in weights.items() if name in measured} or {"kl": 1.0}


def rung_recipe(config: LogitsConfig, figures: Collection[str] = ()) -> dict[str, Any]:
    """What a rung's scores depend on besides layout, tokens and the study, as plain JSON values.

    Students are trained without looks at the validation split or checkpoints, so how often those
    come does not matter.

    Args:
        config: Stage 3 of the rungs.
        figures: Of the study's objective; recall depends on how it is asked.
    """
    apart = ("tokens", "validate_steps", "checkpoint_steps")
    recipe = {name: value for name, value in recipe_of(config).items() if name not in apart}
    if "recall" in figures:
        recipe["recall is asked by"] = notation_of("validation")
    return recipe
