"""Optuna's tree-structured Parzen estimator on layouts with a fixed number of attention layers."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from typing import Any

from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.space import SearchSpace
from mohawk_nas.search.strategy import (
    STRATEGIES,
    Proposal,
    SearchContext,
    Strategy,
    random_unseen,
)

NUM_STARTUP = 5
"""Layouts drawn at random before the estimator has something to go by."""
NUM_TRIES = 8
"""Samples that are known with all their neighbours, after which one is drawn at random instead."""


@STRATEGIES.register("tpe")
class TPE(Strategy):
    """Each free layer has a priority, and the layers with the highest ones keep attention.

    So every sample meets the budget. Optuna samples in a scratch study that is built anew from the
    finished trials for each proposal, so the study itself never sees a wasted or repeated trial.
    Where a layout comes up again, the one swap that the sampled priorities regret least takes its
    place: late in a search most samples are known, and sampling on costs more than scoring does.
    """

    def propose(self, context: SearchContext) -> Proposal | None:
        rng = random.Random(context.seed)
        space, budget, known = context.space, context.budget, dict(context.finished)
        if len(context.seen) >= budget.count(space):
            return None
        if len(context.seen) >= NUM_STARTUP:
            import optuna

            distributions = _distributions(space)
            study = _scratch_study(context, distributions)
            for _ in range(NUM_TRIES):
                trial = study.ask(distributions)
                layout = _decode(trial.params, space=space, num_kept=context.num_kept)
                near = _nearest_unseen(layout, trial.params, space=space, seen=context.seen)
                if near is not None:
                    return Proposal(layout=near, proposed_by="tpe")
                if layout in known:
                    study.tell(trial, known[layout])
                else:
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
        way = "startup" if len(context.seen) < NUM_STARTUP else "fallback"
        drawn = random_unseen(space, budget, context.seen, rng)
        return None if drawn is None else Proposal(layout=drawn, proposed_by=f"tpe:{way}")


def _distributions(space: SearchSpace) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    # One object for all layers, since Optuna copies the distributions of every trial it is given.
    priority, replacement = FloatDistribution(0.0, 1.0), CategoricalDistribution(space.replacements)
    found: dict[str, Any] = {_priority(layer): priority for layer in space.free_layers}
    if len(space.replacements) > 1:
        found |= {_replacement(layer): replacement for layer in space.free_layers}
    return found


def _scratch_study(context: SearchContext, distributions: Mapping[str, Any]) -> Any:
    import optuna
    from optuna.trial import TrialState, create_trial

    sampler = optuna.samplers.TPESampler(seed=context.seed, n_startup_trials=0, multivariate=False)
    study = optuna.create_study(sampler=sampler)
    for layout, value in [*context.finished, *((layout, None) for layout in context.pending)]:
        params = _encode(layout, space=context.space, budget=context.budget)
        present = {name: distributions[name] for name in params}
        state = TrialState.RUNNING if value is None else TrialState.COMPLETE
        study.add_trial(
            create_trial(state=state, value=value, params=params, distributions=present)
        )
    return study


def _encode(layout: Layout, *, space: SearchSpace, budget: Budget) -> dict[str, Any]:
    # A uniform prior keeps attention in a layer whose priority is among the highest share of them,
    # so a known layout stands at the middle of the part of the interval that leads to it.
    share = budget.num_free(space) / len(space.free_layers)
    params: dict[str, Any] = {}
    for layer in space.free_layers:
        kept = layout[layer] == ATTENTION
        params[_priority(layer)] = 1 - share / 2 if kept else (1 - share) / 2
        if not kept and len(space.replacements) > 1:
            params[_replacement(layer)] = layout[layer]
    return params


def _decode(params: Mapping[str, Any], *, space: SearchSpace, num_kept: int) -> Layout:
    ranked = sorted(space.free_layers, key=lambda layer: (-params[_priority(layer)], layer))
    return space.fill(
        {
            layer: ATTENTION
            if place < num_kept
            else params.get(_replacement(layer), space.replacements[0])
            for place, layer in enumerate(ranked)
        }
    )


def _nearest_unseen(
    layout: Layout, params: Mapping[str, Any], *, space: SearchSpace, seen: Collection[Layout]
) -> Layout | None:
    """The layout itself, or its unseen neighbour whose swap costs the least priority.

    After the swaps come other replacements of one layer.
    """
    if layout not in seen:
        return layout
    free = set(space.free_layers)
    kept = [layer for layer in layout.attention_layers if layer in free]
    replaced = [layer for layer in layout.replaced_layers if layer in free]
    swaps = [
        (params[_priority(out)] - params[_priority(into)], out, into)
        for out in kept
        for into in replaced
    ]
    for _, out, into in sorted(swaps):
        candidates = list(layout.candidates)
        candidates[into] = ATTENTION
        candidates[out] = params.get(_replacement(out), space.replacements[0])
        neighbour = Layout(tuple(candidates))
        if neighbour not in seen:
            return neighbour
    for layer in replaced:
        for other in space.replacements:
            candidates = list(layout.candidates)
            candidates[layer] = other
            neighbour = Layout(tuple(candidates))
            if neighbour not in seen:
                return neighbour
    return None


def _priority(layer: int) -> str:
    return f"layer_{layer:03d}.priority"


def _replacement(layer: int) -> str:
    return f"layer_{layer:03d}.replacement"
