"""Attention layers added one by one, each where it helps most."""

from __future__ import annotations

from mohawk_nas.layout import Layout
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.space import SearchSpace
from mohawk_nas.search.strategy import STRATEGIES, SearchContext, Selector


@STRATEGIES.register("greedy")
class Greedy(Selector):
    """Starts with all free layers replaced and puts attention back where it helps most.

    With L free layers and K of them to keep, it costs L + (L-1) + ... + (L-K+1) probes, of which
    the first L are those of ``add_one_in`` and the last L-K+1 are on the budget.
    """

    def layouts(self, context: SearchContext) -> list[tuple[str, Layout]]:
        kept: list[int] = []
        for _ in range(context.num_kept):
            rest = [layer for layer in context.space.free_layers if layer not in kept]
            value = context.values({layer: context.keeping([*kept, layer]) for layer in rest})
            kept.append(min(rest, key=value.__getitem__))
        return [("greedy", context.keeping(kept))]

    def num_probes(self, space: SearchSpace, budget: Budget) -> int:
        return sum(len(space.free_layers) - i for i in range(budget.num_free(space)))
