"""What Optuna's samplers share: encodings of layouts that always meet the budget."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.search.pareto import pareto_ranks
from mohawk_nas.search.space import SearchSpace
from mohawk_nas.search.strategy import Proposal, SearchContext, Strategy, random_unseen

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

NUM_STARTUP = 5
"""Layouts drawn at random before a sampler has something to go by."""
NUM_TRIES = 8
"""Samples that are known with all their neighbours, after which one is drawn at random instead."""


@dataclass(frozen=True, kw_only=True)
class OptunaSampler(Strategy):
    """One of Optuna's samplers on parameters from which every sample gives a layout on the budget.

    Optuna samples in a scratch study that is built anew from the finished trials for each proposal,
    so the study itself never sees a wasted or repeated trial. Where a layout comes up again, the
    one swap that the sampled parameters regret least takes its place: late in a search most samples
    are known, and sampling on costs more than scoring does.

    Where the budget does not fix the number of attention layers, K is the largest that it allows,
    and layer by layer attention stays where the budget can still be met with it; layouts that could
    keep more are left to the draws at random.
    """

    encoding: Literal["priority", "slots", "bits"] = "priority"
    """``priority``: a number from 0 to 1 a free layer, the K highest keep attention. ``slots``: K
    sorted integers, the i-th is the place of the i-th attention layer less i. ``bits``: 0 or 1 a
    free layer; where these are not K, the layers that are kept most often in the best quarter of
    the trials fill in or stay."""

    needs_all: ClassVar[bool] = False
    """Whether each known trial must have every parameter, also one that its layout does not use."""
    ties_by_chance: ClassVar[bool] = False
    """Whether chance decides between layers that the sampled parameters hold equal, where the lower
    layer would come first: for samplers that make parameters out of those of known layouts."""

    @abstractmethod
    def sampler(self, seed: int) -> BaseSampler:
        """A fresh sampler."""

    def propose(self, context: SearchContext) -> Proposal | None:
        space, known = context.space, self._aims(context)
        if len(context.seen) >= context.budget.count(space):
            return None
        if len(context.seen) >= NUM_STARTUP:
            import optuna

            encoding = _ENCODINGS[self.encoding](context)
            distributions = _distributions(encoding, space)
            study = self._scratch_study(context, encoding, distributions)
            chance = random.Random(context.seed)
            for _ in range(NUM_TRIES):
                trial = study.ask(distributions)
                worth = encoding.worth(trial.params)
                if self.ties_by_chance:
                    worth = {layer: w + 1e-9 * chance.random() for layer, w in worth.items()}
                layout = _decode(worth, trial.params, context)
                near = _nearest_unseen(layout, worth, trial.params, context)
                if near is not None:
                    return Proposal(layout=near, proposed_by=self.label)
                if layout in known:
                    study.tell(trial, known[layout])
                else:
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
        way = "startup" if len(context.seen) < NUM_STARTUP else "fallback"
        rng = random.Random(context.seed)
        drawn = random_unseen(space, context.budget, context.seen, rng)
        return None if drawn is None else Proposal(layout=drawn, proposed_by=f"{self.label}:{way}")

    def _scratch_study(
        self, context: SearchContext, encoding: _Encoding, distributions: Mapping[str, Any]
    ) -> Any:
        import optuna
        from optuna.trial import TrialState, create_trial

        count = len(context.figures[0]) if context.figures else 1
        sampler = self.sampler(context.seed)
        study = optuna.create_study(directions=["minimize"] * count, sampler=sampler)
        space, aims = context.space, self._aims(context)
        for layout, values in [*aims.items(), *((layout, None) for layout in context.pending)]:
            params = encoding.params(layout)
            for layer in space.free_layers if len(space.replacements) > 1 else ():
                if layout[layer] != ATTENTION:
                    params[_replacement(layer)] = layout[layer]
                elif self.needs_all:
                    params[_replacement(layer)] = space.replacements[0]
            present = {name: distributions[name] for name in params}
            state = TrialState.RUNNING if values is None else TrialState.COMPLETE
            study.add_trial(
                create_trial(state=state, values=values, params=params, distributions=present)
            )
        return study

    def _aims(self, context: SearchContext) -> dict[Layout, list[float]]:
        """What the sampler is to make small: the figures of a Pareto set, or the value."""
        rows = context.figures or [(value,) for _, value in context.finished]
        layouts = (layout for layout, _ in context.finished)
        return dict(zip(layouts, map(list, rows), strict=True))


class _Encoding(ABC):
    """How the set of layers that keep attention becomes an Optuna trial's parameters, and back."""

    def __init__(self, context: SearchContext) -> None:
        self.free = context.space.free_layers
        self.num_kept = context.num_kept

    @abstractmethod
    def distributions(self) -> dict[str, Any]:
        """Parameter -> Optuna distribution."""

    @abstractmethod
    def params(self, layout: Layout) -> dict[str, Any]:
        """The parameters that stand for a known layout."""

    @abstractmethod
    def worth(self, params: Mapping[str, Any]) -> dict[int, float]:
        """Free layer -> how much the parameters want attention there; the K highest keep it."""


class _Priority(_Encoding):
    def distributions(self) -> dict[str, Any]:
        from optuna.distributions import FloatDistribution

        # One object for all layers: Optuna copies the distributions of every trial it is given.
        return dict.fromkeys(map(_priority, self.free), FloatDistribution(0.0, 1.0))

    def params(self, layout: Layout) -> dict[str, Any]:
        # A uniform prior keeps attention in a layer whose priority is among the highest share of
        # them, so a known layout stands at the middle of the part of the interval that leads to it.
        share = self.num_kept / len(self.free)
        return {
            _priority(layer): 1 - share / 2 if layout[layer] == ATTENTION else (1 - share) / 2
            for layer in self.free
        }

    def worth(self, params: Mapping[str, Any]) -> dict[int, float]:
        return {layer: params[_priority(layer)] for layer in self.free}


class _Slots(_Encoding):
    # Sorted integers with repetition, each with its index added, are all sets of K places, each
    # set once.
    def distributions(self) -> dict[str, Any]:
        from optuna.distributions import IntDistribution

        slot = IntDistribution(0, len(self.free) - self.num_kept)
        return {_slot(i): slot for i in range(self.num_kept)}

    def params(self, layout: Layout) -> dict[str, Any]:
        places = [i for i, layer in enumerate(self.free) if layout[layer] == ATTENTION]
        # A layout that keeps fewer than K stands for one that keeps the last layers besides.
        last = len(self.free) - self.num_kept
        slots = [min(place - i, last) for i, place in enumerate(places)]
        slots += [last] * (self.num_kept - len(places))
        return {_slot(i): slot for i, slot in enumerate(slots)}

    def worth(self, params: Mapping[str, Any]) -> dict[int, float]:
        slots = sorted(params[_slot(i)] for i in range(self.num_kept))
        places = [slot + i for i, slot in enumerate(slots)]
        # The farther from the nearest place that is taken, the less.
        return {
            layer: -float(min((abs(i - place) for place in places), default=0))
            for i, layer in enumerate(self.free)
        }


class _Bits(_Encoding):
    def __init__(self, context: SearchContext) -> None:
        super().__init__(context)
        values = [value for _, value in context.finished]
        # Of several figures, layouts that fewer others beat; the objective decides between equals.
        ranks = pareto_ranks(context.figures) if context.figures else [0] * len(values)
        order = sorted(range(len(values)), key=lambda i: (ranks[i], values[i]))
        ranked = [context.finished[i][0] for i in order]
        best = ranked[: max(1, len(ranked) // 4)]
        self._share = {
            layer: sum(layout[layer] == ATTENTION for layout in best) / (len(best) + 1)
            for layer in self.free
        }

    def distributions(self) -> dict[str, Any]:
        from optuna.distributions import IntDistribution

        return dict.fromkeys(map(_bit, self.free), IntDistribution(0, 1))

    def params(self, layout: Layout) -> dict[str, Any]:
        return {_bit(layer): int(layout[layer] == ATTENTION) for layer in self.free}

    def worth(self, params: Mapping[str, Any]) -> dict[int, float]:
        # Shares are below 1, so they only decide between layers of the same bit.
        return {layer: params[_bit(layer)] + self._share[layer] for layer in self.free}


_ENCODINGS: Mapping[str, type[_Encoding]] = {
    "priority": _Priority,
    "slots": _Slots,
    "bits": _Bits,
}


def _distributions(encoding: _Encoding, space: SearchSpace) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution

    found = encoding.distributions()
    if len(space.replacements) > 1:
        replacement = CategoricalDistribution(space.replacements)
        found |= {_replacement(layer): replacement for layer in space.free_layers}
    return found


def _decode(
    worth: Mapping[int, float], params: Mapping[str, Any], context: SearchContext
) -> Layout:
    space = context.space
    ranked = sorted(space.free_layers, key=lambda layer: (-worth[layer], layer))
    wishes = {}
    for layer in ranked:
        named = params.get(_replacement(layer), space.replacements[0])
        wishes[layer] = (ATTENTION, named, *(x for x in space.replacements if x != named))
    found = context.budget.grant(space, wishes)
    assert found is not None, "a study whose budget is impossible has not begun"
    return found


def _nearest_unseen(
    layout: Layout, worth: Mapping[int, float], params: Mapping[str, Any], context: SearchContext
) -> Layout | None:
    """The layout itself, or its unseen neighbour whose swap costs the least worth.

    After the swaps come other replacements of one layer.
    """
    space, seen, budget = context.space, context.seen, context.budget
    if layout not in seen:
        return layout
    free = set(space.free_layers)
    kept = [layer for layer in layout.attention_layers if layer in free]
    replaced = [layer for layer in layout.replaced_layers if layer in free]
    swaps = [(worth[out] - worth[into], out, into) for out in kept for into in replaced]
    for _, out, into in sorted(swaps):
        candidates = list(layout.candidates)
        candidates[into] = ATTENTION
        candidates[out] = params.get(_replacement(out), space.replacements[0])
        neighbour = Layout(tuple(candidates))
        if neighbour not in seen and budget.meets(neighbour):
            return neighbour
    for layer in replaced:
        for other in space.replacements:
            neighbour = layout.with_candidate(layer, other)
            if neighbour not in seen and budget.meets(neighbour):
                return neighbour
    return None


def _priority(layer: int) -> str:
    return f"layer_{layer:03d}.priority"


def _slot(index: int) -> str:
    return f"slot_{index:03d}"


def _bit(layer: int) -> str:
    return f"layer_{layer:03d}.attention"


def _replacement(layer: int) -> str:
    return f"layer_{layer:03d}.replacement"
