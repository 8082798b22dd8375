"""The best layout's neighbours first."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.search.pareto import pareto_ranks
from mohawk_nas.search.strategy import (
    STRATEGIES,
    Proposal,
    SearchContext,
    Strategy,
    random_unseen,
    solve_local,
)


@STRATEGIES.register("swaps")
@dataclass(frozen=True, kw_only=True)
class Swaps(Strategy):
    """Best-first local search: scores what lies a swap away from the best layout so far.

    A swap exchanges the candidates of two layers, or gives one layer another if the budget lets it.
    Once all neighbours of the best are scored, those of the second best follow, and so on. Among a
    layout's neighbours the one with the smallest sum of stage-2 losses comes first. A study that
    scores ``greedy`` among its baselines begins around greedy's layout. With several figures the
    Pareto set stands in front of the rest.
    """

    def propose(self, context: SearchContext) -> Proposal | None:
        losses, free = context.stage2_losses(), context.space.free_layers
        if not context.seen:
            layout = solve_local(context.space, context.budget, losses)
            return Proposal(layout=layout, proposed_by=f"{self.label}:start")

        def local(layout: Layout) -> tuple[float, tuple[str, ...]]:
            loss = sum(losses[layer, layout[layer]] for layer in free if layout[layer] != ATTENTION)
            return loss, layout.candidates

        # Of what others score at this moment nothing is known yet, so that it comes last.
        for layout in (*_best_first(context), *context.pending):
            fresh = [
                other
                for other in context.space.neighbours(layout)
                if other not in context.seen and context.budget.meets(other)
            ]
            if fresh:
                return Proposal(layout=min(fresh, key=local), proposed_by=self.label)
        # A budget may part layouts that no single swap joins.
        rng = random.Random(context.seed)
        drawn = random_unseen(context.space, context.budget, context.seen, rng)
        return (
            None if drawn is None else Proposal(layout=drawn, proposed_by=f"{self.label}:fallback")
        )


def _best_first(context: SearchContext) -> Iterator[Layout]:
    ranks = pareto_ranks(context.figures) if context.figures else [0] * len(context.finished)
    places = range(len(context.finished))
    for place in sorted(places, key=lambda i: (ranks[i], context.finished[i][1], i)):
        yield context.finished[place][0]
